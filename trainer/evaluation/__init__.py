"""Perplexity versus context length of a checkpoint: protocol ppl-vs-length v1."""
