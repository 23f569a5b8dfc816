"""Strict sliding-window attention with a Transformer-XL cache (arXiv:2203.07852)."""
