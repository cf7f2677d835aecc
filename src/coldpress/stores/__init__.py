"""Stores of the keys and values of one layer: layouts, and codecs for few bits."""
