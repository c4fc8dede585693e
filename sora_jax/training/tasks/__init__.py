"""What runs train: a file a kind of model."""
