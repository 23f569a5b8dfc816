"""Tensors as the bytes of a safetensors file, without a copy of them.

`safetensors.torch.save` copies every tensor twice and holds the interpreter's lock for it, which a training loop in
another thread would feel. Here a file is a list of pieces: the header, then the tensors' own memory. Layout:
https://huggingface.co/docs/safetensors (length of the header, 8 bytes; header, JSON; data).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

# in the order of alignment in which `safetensors` itself puts them
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {dtype: place for place, dtype in enumerate(_DTYPES)}

Pieces = Sequence[bytes | memoryview]


def encode(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> list[bytes | memoryview]:
    """Pieces of a safetensors file: the header, then one piece a tensor.

    Args:
        tensors: on any device, strided, or views of one another. Contiguous ones on the CPU are not copied, so they
            must not change while the pieces are in use.
        metadata: of the file.

    Raises:
        ValueError: a tensor's dtype has no place in a checkpoint.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    pieces: list[bytes | memoryview] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (_rank(name, tensors[name]), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
        pieces.append(memory(tensor))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _rank(name: str, tensor: torch.Tensor) -> int:
    if tensor.dtype not in _RANK:
        raise ValueError(f"{name}: a checkpoint holds no tensors of {tensor.dtype}")
    return _RANK[tensor.dtype]
