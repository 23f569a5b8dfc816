"""The way back from an export: what training knew and Transformers does not need, kept in its folder `longspan/`.

    training.json         the model's configuration, its data's digests, step and counters; no paths
    padding.safetensors   rows of the embedding that pad the vocabulary, where there are some
    tokenizer/            files of the corpus's tokenizer, where tokens are not bytes

With it an export becomes the very weights again that it was made of. Without it (a model that Transformers saved) the
padding rows are zero, and the configuration is what config.json says.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.data_pipeline.tokenization.description import DESCRIPTION_NAME, read_description
from longspan.errors import CheckpointError, UsageError
from longspan.modeling.config import ModelConfig
from longspan.modeling.model import build_model
from longspan.trainer import recipes
from longspan.trainer.checkpoint import contents
from longspan.trainer.checkpoint.load import LoadedModel, assign_weights, load_model
from longspan.trainer.config import RunConfig
from longspan.trainer.export_weights import EMBEDDING, tensor_sha256

MODEL_TYPE = "longspan"
EXPORT_MANIFEST = "export_manifest.json"
ORIGIN = "longspan"
_TRAINING, _PADDING = "training.json", "padding.safetensors"
_UNKNOWN_SHARDS = "unknown"


@dataclass(frozen=True)
class ExportedModel:
    """An exported folder, read back.

    Attributes:
        config: of a run with this model; where its shards are is not known.
        weights: all tensors by name, float32, padding rows of the embedding included.
        used_ids: rows of the embedding that stand for something.
        tokenizer_digest: of its tokenizer. tokenizer_files: by name; empty for bytes.
        data: the saved state of the data reader, as far as it is kept.
        counters: the trainer's. step: optimizer updates.
        fingerprint: hex sha256 over names and numbers of all tensors.
    """

    config: RunConfig
    weights: dict[str, Tensor]
    used_ids: int
    tokenizer_digest: str
    tokenizer_files: dict[str, bytes]
    data: dict[str, Any]
    counters: dict[str, Any]
    step: int
    fingerprint: str


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported model of this kind."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def write_origin(
    folder: Path,
    config: RunConfig,
    *,
    step: int,
    counters: dict[str, Any],
    data: dict[str, Any],
    tokenizer_files: dict[str, bytes],
    padding: Tensor | None,
) -> None:
    """Write `longspan/` into an export. padding: rows [R, D] of the embedding that the export leaves out."""
    origin = folder / ORIGIN
    origin.mkdir()
    plan = data.get("plan", {})
    training = {
        "name": config.name,
        "model": config.model.model_dump(mode="json"),
        "segment_tokens": config.data.segment_tokens,
        "step": step,
        "counters": counters,
        "data": {"plan": {name: plan[name] for name in ("manifest_digest", "vocabulary_digest") if name in plan}},
    }
    (origin / _TRAINING).write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
    if padding is not None:
        rows = {EMBEDDING: padding.contiguous()}
        (origin / _PADDING).write_bytes(safetensors.torch.save(rows, {"sha256": tensor_sha256(padding)}))
    for name, content in tokenizer_files.items():
        (origin / contents.TOKENIZER).mkdir(exist_ok=True)
        (origin / contents.TOKENIZER / name).write_bytes(content)


def read_export(folder: Path) -> ExportedModel:
    """Read an exported folder, or one that Transformers saved after it loaded one.

    Raises:
        UsageError: it is no such folder, or says things that no model of this version has.
        CheckpointError: a tensor is missing, or not the one that the export's manifest lists.
    """
    if not is_exported(folder):
        raise UsageError(f"{folder} is no exported model: its config.json does not say model_type {MODEL_TYPE}.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    training = _read_training(folder)
    tensors = _read_tensors(folder)
    _check_hashes(folder, tensors)
    try:
        run = _run_config(config, training)
    except (KeyError, TypeError, ValidationError) as error:
        raise UsageError(f"{folder}/config.json describes no model of this version of Longspan: {error}") from error
    used = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else 0
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    if used and run.model.vocab_size > used:
        weights[EMBEDDING] = torch.cat([weights[EMBEDDING], _padding(folder, run.model.vocab_size - used, weights)])
    _check_fit(folder, run.model, weights)
    tokenizer, files = _tokenizer(folder, config)
    if tokenizer is not None and tokenizer[1] != used:
        raise UsageError(
            f"{folder} has {used} rows in its embedding and a tokenizer of {tokenizer[1]} ids, so that the model "
            "cannot have been trained with it. Use another export."
        )
    return ExportedModel(
        config=run,
        weights=weights,
        used_ids=used,
        tokenizer_digest="" if tokenizer is None else tokenizer[0],
        tokenizer_files=files,
        data=training.get("data", {}),
        counters=training.get("counters", {}),
        step=training.get("step", 0),
        fingerprint=_fingerprint(weights),
    )


def load_checkpoint_or_export(path: Path, device: str | torch.device = "cpu") -> LoadedModel:
    """As `checkpoint.load.load_model`, from an exported folder too.

    Raises:
        UsageError, CheckpointError: as `load_model` and `read_export`.
    """
    if not is_exported(path):
        return load_model(path, device)
    found = read_export(path)
    with torch.random.fork_rng(devices=[]):
        model = build_model(found.config.model)
    assign_weights(model, found.weights, path)
    return LoadedModel(
        model=model.to(device).eval(),
        config=found.config,
        step=found.step,
        fingerprint=found.fingerprint,
        path=path,
        tokenizer_digest=found.tokenizer_digest,
        used_ids=found.used_ids,
    )


def _read_training(folder: Path) -> dict[str, Any]:
    path = folder / ORIGIN / _TRAINING
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Export the model again.") from error
    return found if isinstance(found, dict) else {}


def _run_config(config: dict[str, Any], training: dict[str, Any]) -> RunConfig:
    model = training.get("model") or {
        "name": "exported",
        "vocab_size": config.get("padded_vocab_size") or config["vocab_size"],
        "dim": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "head_dim": config["head_dim"],
        "ffn_dim": config["intermediate_size"],
        "window_tokens": config["window_tokens"],
        "layers": config["blocks"],
        "feedback": config["feedback"],
        "memory": config["memory"],
    }
    checked = ModelConfig.model_validate(model)
    segment = training.get("segment_tokens") or config.get("training_tokens") or 2 * checked.window_tokens
    raw = {
        "name": training.get("name", "exported"),
        "model": checked.model_dump(mode="json"),
        "data": {"shards": _UNKNOWN_SHARDS, "segment_tokens": segment, "lanes": 1},
        "training": {"steps": max(training.get("step", 0), 1)},
    }
    return recipes.validate(RunConfig, raw, "config.json")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        tensors: dict[str, Tensor] = {}
        for name in files:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name!r}, which is not a file of the folder.")
            tensors |= safetensors.torch.load_file(folder / name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read: {error}. Export the model again.") from error
    return tensors


def _check_hashes(folder: Path, tensors: dict[str, Tensor]) -> None:
    path = folder / EXPORT_MANIFEST
    if not path.is_file():
        return
    try:
        listed = {entry["name"]: entry["sha256"] for entry in json.loads(path.read_bytes())["tensors"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Export the model again.") from error
    problems = [f"{name}: not there" for name in listed.keys() - tensors.keys()]
    problems += [f"{name}: not listed" for name in tensors.keys() - listed.keys()]
    problems += [
        f"{name}: other numbers"
        for name in listed.keys() & tensors.keys()
        if tensor_sha256(tensors[name]) != listed[name]
    ]
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the tensors that {EXPORT_MANIFEST} lists:\n"
            + "\n".join(f"  {problem}" for problem in sorted(problems)[:10])
            + f"\nExport the model again; if they were changed on purpose, remove {EXPORT_MANIFEST}."
        )


def _check_fit(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        wanted = {name: list(tensor.shape) for name, tensor in build_model(config).named_parameters()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    problems = [
        f"{name}: {found.get(name, 'none')} in the weights, {wanted.get(name, 'none')} in the configuration"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if problems:
        raise CheckpointError(
            f"{folder} holds the weights of another model than its configuration describes; {len(problems)} "
            "differences:\n" + "\n".join(f"  {problem}" for problem in problems[:10]) + "\nExport the model again."
        )


def _padding(folder: Path, rows: int, weights: dict[str, Tensor]) -> Tensor:
    """Rows [rows, D] that pad the vocabulary: those of training, or zeros where the folder does not keep them."""
    width = weights[EMBEDDING].shape[1]
    path = folder / ORIGIN / _PADDING
    if not path.is_file():
        return torch.zeros(rows, width)
    try:
        with safetensors.safe_open(path, "pt") as file:
            padding, wanted = file.get_tensor(EMBEDDING), (file.metadata() or {}).get("sha256")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Export the model again.") from error
    if list(padding.shape) != [rows, width] or tensor_sha256(padding) != wanted:
        raise CheckpointError(f"{path} does not hold the {rows} rows of {width} that it was written with.")
    return padding.float()


def _tokenizer(folder: Path, config: dict[str, Any]) -> tuple[tuple[str, int] | None, dict[str, bytes]]:
    """(digest, ids) of the corpus's tokenizer, None where the folder does not say; and its files."""
    saved = folder / ORIGIN / contents.TOKENIZER
    if (saved / DESCRIPTION_NAME).is_file():
        found = read_description(saved)
        return (found.digest, found.size), {path.name: path.read_bytes() for path in sorted(saved.iterdir())}
    tokenizer: Tokenizer = ByteTokenizer()
    is_bytes = all(config.get(f"{name}_token_id") == getattr(tokenizer, name) for name in ("bos", "eos", "pad"))
    return ((tokenizer.digest, tokenizer.size) if is_bytes else None), {}


def _fingerprint(weights: dict[str, Tensor]) -> str:
    lines = [f"{name} {tensor_sha256(tensor)}" for name, tensor in sorted(weights.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
