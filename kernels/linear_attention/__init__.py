"""Linear attention as a chunked affine scan (arXiv:2006.16236)."""
