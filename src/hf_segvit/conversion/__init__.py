"""Weights in and out: backbones, official checkpoints, Transformers' own format."""
