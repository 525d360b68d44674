"""Image segmentation with plain Vision Transformers for the Hugging Face ecosystem."""
