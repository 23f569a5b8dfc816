"""Public implementations that `longspan bench` races against, and the plain PyTorch model."""
