"""Segments from images: loading a model, running it on images and writing its answers."""
