"""Segment images: load a model, run it, write its answers."""
