"""One training step as a map, and its derivative."""
