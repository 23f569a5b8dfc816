"""Tasks with known answers, made by pure functions of (seed, index)."""
