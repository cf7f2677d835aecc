"""What the commands that measure no quality and no speed do, and the options of all commands."""
