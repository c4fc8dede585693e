"""The command lines: what experiments/*.py and the console scripts run."""
