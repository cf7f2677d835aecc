"""What was measured of a model or trained for it, and how a press finds it."""
