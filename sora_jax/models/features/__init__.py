"""Networks whose features images are scored by."""
