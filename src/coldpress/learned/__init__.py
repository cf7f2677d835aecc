"""Artefacts that were measured of a model or trained for it, and how a press finds them."""
