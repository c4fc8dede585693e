"""What a run of a family needs and reports."""
