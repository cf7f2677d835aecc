"""What the commands that work with saved contexts do, and the options of all commands."""
