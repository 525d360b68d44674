"""Models out of PyTorch: exported to other runtimes, and checked there."""
