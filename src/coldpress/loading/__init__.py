"""What a command is given to work with: a model, a text, its tokens, and a press by its name."""
