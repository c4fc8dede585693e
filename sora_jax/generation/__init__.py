"""From prompts to clips: the sampler around a trained model."""
