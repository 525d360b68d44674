"""Extensions of hf_segvit, one a file: what docs/extending.md shows."""
