"""The cache of a model: its layers, what they share, and its file."""
