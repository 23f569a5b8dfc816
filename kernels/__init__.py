"""Tensor functions: reference (plain PyTorch) and fast backends behind one public function an operation."""
