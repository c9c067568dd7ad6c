"""Seconds of a training step of stage two, and where they go."""
