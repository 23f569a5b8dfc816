"""Corpora, tokenizers, shards, lane schedule and readers."""
