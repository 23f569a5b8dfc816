"""Matrix products whose sum over several chunks is kept in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def product_into(total: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """total = a b, or total += a b, in `total`'s type whatever the factors'.

    Args:
        total: [m, n], changed in place; the factors' type, or fp32 with bf16 or fp16 factors.
        a: [m, k].
        b: [k, n].
        add: keep what `total` holds.
    """
    if a.dtype == total.dtype:
        if add:
            total.addmm_(a, b)
        else:
            torch.mm(a, b, out=total)
    elif a.is_cuda:
        # cuBLAS reads and writes the fp32 sum itself: no product is ever rounded to 16 bits
        if add:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        product = a.to(total.dtype) @ b.to(total.dtype)
        if add:
            total.add_(product)
        else:
            total.copy_(product)
