"""Publishing on the Hub: checks before an upload, model cards, and code that travels with a checkpoint."""
