"""Weights of other projects into our parameter trees, one file a family."""
