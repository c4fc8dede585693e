"""Clips to patches and back, their positions, and the segments they form in packed rows."""
