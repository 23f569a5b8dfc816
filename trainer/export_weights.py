"""Weights of an export: safetensors shards, their index, and a manifest of every tensor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from longspan.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9
EMBEDDING = "embedding.weight"


def without_padding(
    weights: dict[str, Tensor], tied: dict[str, str], used_ids: int
) -> tuple[dict[str, Tensor], list[Any], Tensor | None]:
    """The tensors that an export holds, and what was left out of the source on purpose.

    Names stay as they are. The embedding loses the rows that pad the vocabulary: no token has their ids, so the
    logits of all tokens stay the same. A tied name is the tensor of another name and is not stored twice.

    Args:
        weights: all tensors of the checkpoint by name.
        tied: name -> the name whose tensor it shares.
        used_ids: ids of the vocabulary that stand for something.

    Returns:
        Tensors by name; a list of {name, reason, ...}; the rows of the embedding that were left out, or None.

    Raises:
        CheckpointError: there are no weights.
    """
    if not weights:
        raise CheckpointError("the checkpoint holds no weights; there is nothing to export.")
    kept = {name: tensor for name, tensor in sorted(weights.items()) if name not in tied}
    dropped: list[Any] = [{"name": name, "reason": f"shares the tensor of {owner}"} for name, owner in tied.items()]
    rows = kept[EMBEDDING].shape[0] if EMBEDDING in kept else 0
    padding = None
    if rows > used_ids:
        padding = kept[EMBEDDING][used_ids:]
        kept[EMBEDDING] = kept[EMBEDDING][:used_ids].contiguous()
        dropped.append({"name": EMBEDDING, "rows": [used_ids, rows], "reason": "padding of the vocabulary"})
    return kept, dropped, padding


def write_shards(tensors: dict[str, Tensor], folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> list[dict[str, Any]]:
    """Write model*.safetensors of at most `max_bytes` (or one tensor), and model.safetensors.index.json.

    Args:
        tensors: on the CPU.
        folder: existing folder.
        max_bytes: of the tensors in one file.

    Returns:
        One entry a tensor: name, shape, dtype, sha256 of its bytes, file.
    """
    shards = plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}, max_bytes)
    entries = []
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: tensors[name].contiguous() for name in names}
        # not save_file, whose files only their owner may read
        (folder / file).write_bytes(safetensors.torch.save(shard, metadata={"format": "pt"}))
        entries += [
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "sha256": tensor_sha256(tensor),
                "file": file,
            }
            for name, tensor in shard.items()
        ]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {entry["name"]: entry["file"] for entry in entries},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return entries


def plan_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `max_bytes`; a larger tensor gets a group of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def tensor_sha256(tensor: Tensor) -> str:
    """Hex sha256 of a tensor's numbers as they lie in memory, row after row."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
