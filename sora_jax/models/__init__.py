"""Flax linen models, all made of the one block in `transformer.py`."""
