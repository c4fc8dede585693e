"""Text encoders that turn captions into token states."""
