"""What `evaluate.py` measures, a kind of score a file."""
