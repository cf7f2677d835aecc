"""What a GPU is measured on: an 8B model's shape at long contexts, in a given time."""
