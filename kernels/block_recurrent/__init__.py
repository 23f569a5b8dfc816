"""Attention of a Block-Recurrent layer: tokens, state, and the scan that writes the state (arXiv:2203.07852)."""
