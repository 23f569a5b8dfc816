"""The steps of the state scan in plain PyTorch, under the names that `triton_scan` has too."""

from longspan.kernels.block_recurrent.adjoint import products, serial, token_gradients
from longspan.kernels.block_recurrent.three_phase import chain_forward, recompute

__all__ = ["chain_forward", "products", "recompute", "serial", "token_gradients"]
