"""Public function of the Block-Recurrent layer's attention."""

from __future__ import annotations

from collections.abc import Callable

from longspan.kernels import backend
from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs, BlockRecurrentOutputs
from longspan.kernels.block_recurrent.reference import sequential
from longspan.kernels.block_recurrent.scan_layer import scanned, unsupported
from longspan.kernels.block_recurrent.two_phase import two_phase

FORMS: dict[str, Callable[[BlockRecurrentInputs], BlockRecurrentOutputs]] = {
    "two_phase": two_phase,
    "sequential": sequential,
}


def block_recurrent(inputs: BlockRecurrentInputs, *, form: str | None = None) -> BlockRecurrentOutputs:
    """Window attention, read of the state and write of the state over all blocks (arXiv:2203.07852).

    Any gate, mode and T. On CUDA in bf16, fp16 or fp32 with heads of 16, 32, 64 or 128 (64 and 128 are tuned) it
    runs in Triton kernels with a backward of three phases. The forward chain of the states is one of them in mode skip,
    in bf16 and fp32, with heads of 32 or more, D a multiple of 64, S and W of 16; elsewhere it is plain PyTorch between
    the kernels, as are the state FFN and its gate (dual, single). Sizes and types without a kernel give one warning.

    Args:
        inputs: see `BlockRecurrentInputs`; T need not be a multiple of W.
        form: None: the kernels where they can run, else "two_phase" (scan of the state alone, then all tokens).
            "sequential" goes block by block, "three_phase" is the kernels' backward in plain PyTorch; equal values.
            Where the path has more heads than the tokens (tensor parallelism) all of them are that of three phases.

    Returns:
        See `BlockRecurrentOutputs`.

    Raises:
        ShapeError: state, cache, reset and tokens do not fit together, B or T is zero, devices differ, reset is
            not bool.
        ValueError: there is no such form.
    """
    inputs.check()
    if form not in (None, "three_phase", *FORMS):
        raise ValueError(f"form = {form!r}: use one of {', '.join(FORMS)}, three_phase.")
    if form == "three_phase":
        return scanned(inputs, fast=False)
    if form is None and backend.choose("block_recurrent", inputs.qkv, unsupported=unsupported(inputs)) == "triton":
        return scanned(inputs, fast=True)
    if inputs.divided:
        return scanned(inputs, fast=False)
    return FORMS[form or "two_phase"](inputs)
