"""Features and scores of generated clips."""
