"""`longspan bench`: what training and its kernels cost here, beside public ones, in one process."""
