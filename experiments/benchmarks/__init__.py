"""Suites of experiments/benchmark.py, one a file."""
