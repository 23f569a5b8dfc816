"""Cleaning rules: small pure functions that a recipe lists by name for each source."""
