"""Causal attention with rotary positions and a cache."""
