"""What `train.py` needs for each kind of experiment: its data, its pictures and its report."""
