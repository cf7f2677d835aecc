"""Measuring quality, speed and memory under compression."""
