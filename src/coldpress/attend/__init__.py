"""Arithmetic of attention over stored pairs. Knows tensors and no cache."""
