"""States of the random generators of one process, as JSON."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

from longspan.errors import CheckpointError


def capture() -> dict[str, Any]:
    """States of Python's, numpy's (legacy), torch's CPU and, if CUDA is in use, the current device's generator.

    Returns:
        A dictionary that JSON holds exactly; `restore` takes it.
    """
    version, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "key": _encode(np.asarray(key, dtype="<u4").tobytes()),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gauss": float(cached),
        },
        "torch": _encode(torch.get_rng_state().numpy().tobytes()),
        "cuda": _encode(torch.cuda.get_rng_state().numpy().tobytes()) if torch.cuda.is_initialized() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` took. A CUDA state is ignored on a machine without CUDA, and the other way round.

    Raises:
        CheckpointError: the dictionary is not of this form.
    """
    try:
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
        key = np.frombuffer(_decode(numpy["key"]), dtype="<u4")
        np.random.set_state(("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["cached_gauss"]))
        torch.set_rng_state(_byte_tensor(state["torch"]))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_byte_tensor(state["cuda"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"rng.json: not the states of random generators ({error})") from error


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _byte_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_decode(text)), dtype=torch.uint8)
