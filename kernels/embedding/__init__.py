"""Rows of an embedding matrix, with a gradient in one pass."""
