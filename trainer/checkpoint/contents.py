"""What a checkpoint holds: tensors in safetensors files, everything else in JSON and YAML.

All of it is logical: full parameter names, no sharding, and nothing that runs code when it is loaded.

    config.yaml                          resolved configuration
    data.json                            position in the data, as the lane reader wrote it
    rng.json                             {"ranks": [states of the random generators of rank 0, 1, ...]}
    weights/part-RRRRR-PPPPP.safetensors     parameter name -> tensor
    optimizer/part-RRRRR-PPPPP.safetensors   parameter name/state name -> tensor
    state/lanes-AAAAA-BBBBB.safetensors      packed state name -> [lanes A..B, ...]; in its metadata, under `places`,
                                         the document and token that each lane goes on with, as JSON
    tokenizer/*                          what `Tokenizer.save` wrote; not there for bytes
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch

from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.files import read_checked
from longspan.trainer.checkpoint.manifest import Manifest
from longspan.trainer.checkpoint.places import Place as Folder
from longspan.trainer.checkpoint.tensor_file import Pieces, encode

CONFIG = "config.yaml"
DATA = "data.json"
RNG = "rng.json"
FOLDERS = ("weights", "optimizer", "state")
TOKENIZER = "tokenizer"
# bounds the memory that a save or load needs besides the tensors themselves
FILE_BYTES = 256 * 1024 * 1024

# document and first token of a lane's next segment; None: the lane has none
Place = tuple[str, int] | None

_PLACES = "places"
_LANES_FILE = re.compile(r"^state/lanes-(\d{5,})-(\d{5,})\.safetensors$")


@dataclass
class RunState:
    """Everything that a run needs to go on as if it had never stopped, as one rank sees it.

    Attributes:
        step: optimizer updates done.
        weights: full tensors by parameter name. Ranks may hold all of them or disjoint parts.
        optimizer: parameter name -> state name -> full tensor; scalars are 0-d tensors.
        lanes: packed carried state of this rank's lanes, [lane_stop - lane_start, ...]; None if this rank has none
            to save (a peer of the same lanes does). After loading: of those lanes that the checkpoint has.
        lane_start, lane_stop: this rank's lanes [start, stop) of the global batch.
        data: the lane reader's state; that of rank 0 is saved.
        rng: `rng.capture()` of this rank. After loading: empty if the checkpoint has none for this rank (it was
            written by fewer ranks); the caller then seeds anew.
        counters: tokens, skips, ...; those of rank 0 are saved. JSON-able.
        config_yaml: the resolved configuration.
        places: of each of these lanes, what its carried state belongs to; empty where a checkpoint does not say.
        tokenizer: files of the corpus's tokenizer by name; empty for bytes. Those of rank 0 are saved.
    """

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    lanes: dict[str, torch.Tensor] | None
    lane_start: int
    lane_stop: int
    data: dict[str, Any]
    rng: dict[str, Any]
    counters: dict[str, Any] = field(default_factory=dict)
    config_yaml: str = ""
    places: list[Place] = field(default_factory=list)
    tokenizer: dict[str, bytes] = field(default_factory=dict)


def flat_optimizer(optimizer: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Optimizer state under the names of its file: `<parameter>/<state>`."""
    return {f"{name}/{key}": tensor for name, states in optimizer.items() for key, tensor in states.items()}


def find_tied(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Names whose tensor is the very memory of an earlier name -> that earlier name."""
    first: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    tied = {}
    for name, tensor in weights.items():
        if tensor.numel():
            owner = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), name)
            if owner != name:
                tied[name] = owner
    return tied


def divide(holders: list[dict[str, int]]) -> list[list[str]]:
    """Which rank writes which tensor, the largest first to the rank with the least to write.

    Args:
        holders: for each rank, bytes of the tensors that it holds, by name.

    Returns:
        For each rank its names, sorted; every name is written by exactly one rank that holds it. All ranks compute
        the same answer.
    """
    sizes = {name: size for held in holders for name, size in held.items()}
    load = [0] * len(holders)
    shares: list[list[str]] = [[] for _ in holders]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        able = [rank for rank, held in enumerate(holders) if name in held]
        rank = min(able, key=lambda rank: (load[rank], rank))
        load[rank] += sizes[name]
        shares[rank].append(name)
    return [sorted(share) for share in shares]


def encode_parts(tensors: dict[str, torch.Tensor], folder: str, rank: int) -> Iterator[tuple[str, Pieces]]:
    """(file name, pieces of the file) of `tensors`, each file about `FILE_BYTES` at most."""
    part: dict[str, torch.Tensor] = {}
    size = number = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > FILE_BYTES:
            yield f"{folder}/part-{rank:05d}-{number:05d}.safetensors", encode(part)
            part, size, number = {}, 0, number + 1
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield f"{folder}/part-{rank:05d}-{number:05d}.safetensors", encode(part)


def encode_lanes(state: RunState) -> tuple[str, Pieces]:
    """(file name, pieces of the file) of this rank's carried state.

    Raises:
        ValueError: a state tensor's first dimension is not the number of lanes.
    """
    assert state.lanes is not None
    count = state.lane_stop - state.lane_start
    for name, tensor in state.lanes.items():
        if tensor.ndim == 0 or tensor.shape[0] != count:
            raise ValueError(f"carried state {name} has shape {list(tensor.shape)}, but the rank has {count} lanes")
    name = f"state/lanes-{state.lane_start:05d}-{state.lane_stop - 1:05d}.safetensors"
    return name, encode(state.lanes, {_PLACES: json.dumps(state.places)})


def encode_json(value: Any) -> bytes:
    """JSON with sorted keys, so that equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, allow_nan=False) + "\n").encode()


def read_weights(folder: Folder, manifest: Manifest) -> dict[str, torch.Tensor]:
    """All weights by parameter name, tied ones sharing memory. Raises CheckpointError as `read_checked` does."""
    weights = _read_parts(folder, manifest, "weights/")
    for alias, owner in manifest.tied.items():
        weights[alias] = weights[owner]
    return weights


def read_optimizer(folder: Folder, manifest: Manifest) -> dict[str, dict[str, torch.Tensor]]:
    """All optimizer state by parameter name and state name."""
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _read_parts(folder, manifest, "optimizer/").items():
        name, _, state = key.rpartition("/")
        optimizer.setdefault(name, {})[state] = tensor
    return optimizer


def read_lanes(
    folder: Folder, manifest: Manifest, start: int, stop: int
) -> tuple[dict[str, torch.Tensor] | None, list[Place]]:
    """Carried state of lanes [start, stop), put together from the files of any number of ranks.

    Returns:
        Packed state [n, ...] in memory of its own, and what each of these lanes goes on with (as `RunState.places`).
        n is stop - start, or less where the checkpoint has fewer lanes. None and nothing if it has none of them.
    """
    ranges = {name: (int(match[1]), int(match[2]) + 1) for name in manifest.files if (match := _LANES_FILE.match(name))}
    pieces: list[dict[str, torch.Tensor]] = []
    places: list[Place] = []
    position = start
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if first <= position < min(last, stop):
            content = read_file(folder, manifest, name)
            rows = slice(position - first, min(last, stop) - first)
            pieces.append({key: tensor[rows] for key, tensor in _tensors(content, name).items()})
            known = _places(content)
            places += known[rows] if len(known) == last - first else [None] * (rows.stop - rows.start)
            position = min(last, stop)
    if not pieces:
        return None, []
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}, places


def read_tokenizer_files(folder: Folder, manifest: Manifest) -> dict[str, bytes]:
    """Files of the tokenizer by name, checked; none if the run's tokens are bytes."""
    prefix = f"{TOKENIZER}/"
    return {
        name.removeprefix(prefix): read_file(folder, manifest, name)
        for name in sorted(manifest.files)
        if name.startswith(prefix)
    }


def read_json(folder: Folder, manifest: Manifest, name: str) -> Any:
    """A JSON file of the checkpoint, checked; CheckpointError if it is damaged, not listed or no JSON."""
    content = read_file(folder, manifest, name)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not JSON ({error})") from error


def read_file(folder: Folder, manifest: Manifest, name: str) -> bytes:
    """A file of the checkpoint, checked; CheckpointError if the manifest does not list it."""
    if name not in manifest.files:
        raise CheckpointError(f"manifest.json: lists no {name}")
    return read_checked(folder, name, manifest.files[name], manifest.chunk_bytes)


def _read_parts(folder: Folder, manifest: Manifest, prefix: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(manifest.files):
        if name.startswith(prefix):
            tensors.update(_read_tensors(folder, manifest, name))
    return tensors


def _read_tensors(folder: Folder, manifest: Manifest, name: str) -> dict[str, torch.Tensor]:
    return _tensors(read_file(folder, manifest, name), name)


def _tensors(content: bytes, name: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{name}: not a safetensors file ({error})") from error


def _places(content: bytes) -> list[Place]:
    """The metadata of a lanes file that `safetensors.torch.load` has read: length of the header, header."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return [None if place is None else (place[0], place[1]) for place in json.loads(metadata.get(_PLACES, "[]"))]
