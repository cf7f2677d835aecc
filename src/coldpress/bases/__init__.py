"""What methods are built on: scorers, wrappers, second readings of a text, and the register of names."""
