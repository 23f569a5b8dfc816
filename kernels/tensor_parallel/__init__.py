"""Layers divided by heads, hidden units and vocabulary over several ranks: the collectives between them."""
