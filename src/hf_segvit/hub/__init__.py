"""Publishing on the Hub: model cards, checks before an upload, code that travels with a checkpoint."""
