"""From stored clips to packed rows: NumPy only."""
