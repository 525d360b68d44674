"""Metrics that accumulate counts, never images."""
