"""Public function of the Block-Recurrent layer's attention."""

from __future__ import annotations

from collections.abc import Callable

from longspan.errors import ShapeError
from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs, BlockRecurrentOutputs
from longspan.kernels.block_recurrent.reference import sequential
from longspan.kernels.block_recurrent.two_phase import two_phase

FORMS: dict[str, Callable[[BlockRecurrentInputs], BlockRecurrentOutputs]] = {
    "two_phase": two_phase,
    "sequential": sequential,
}


def block_recurrent(inputs: BlockRecurrentInputs, *, form: str = "two_phase") -> BlockRecurrentOutputs:
    """Window attention, read of the state and write of the state over all blocks (arXiv:2203.07852).

    Args:
        inputs: see `BlockRecurrentInputs`; T need not be a multiple of W.
        form: "two_phase" (scan of the state alone, then all tokens) or "sequential" (block by block); equal values.

    Returns:
        See `BlockRecurrentOutputs`.

    Raises:
        ShapeError: state, reset and tokens do not fit together.
    """
    rows, tokens = inputs.q.shape[:2]
    wanted = (rows, -(-tokens // inputs.window))
    if inputs.reset.shape != wanted or inputs.state.shape[0] != rows:
        raise ShapeError(
            f"{rows} rows of {tokens} tokens in blocks of {inputs.window} need reset {list(wanted)} and a state of "
            f"{rows} rows; got reset {list(inputs.reset.shape)} and state {list(inputs.state.shape)}."
        )
    return FORMS[form](inputs)
