"""The cache that a user holds: its layers, what they share, and its file."""
