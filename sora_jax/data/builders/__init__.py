"""TFDS builders of the clip data sets."""
