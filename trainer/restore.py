"""What a run starts from: its own newest checkpoint, or another run's weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from longspan.data_pipeline.entries import VocabularyEntry
from longspan.errors import UsageError
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.places import Place
from longspan.trainer.config import RunConfig
from longspan.trainer.corpus_tokenizer import check_tokenizer
from longspan.trainer.engine import Engine
from longspan.trainer.export_origin import load_checkpoint_or_export

# neither changes what the weights mean
_FREE_MODEL_FIELDS = ("model.name", "model.dropout")
_FREE_INITIAL_FIELDS = (*_FREE_MODEL_FIELDS, "model.memory.norm_penalty")


def seed_everything(seed: int, *place: int) -> None:
    """Seed Python's, numpy's and torch's generators from `seed` and where it is used, e.g. (rank, step)."""
    words = np.random.SeedSequence([seed, *place]).generate_state(3, dtype=np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def check_resumable(config: RunConfig, state: RunState, checkpoint: Place) -> list[str]:
    """Compare the configuration with the one that the checkpoint was written with.

    Returns:
        Differences that do not hinder a resume, as text.

    Raises:
        UsageError: the model or the optimizer differs (all fields are listed), or the run is over already.
    """
    saved = yaml.safe_load(state.config_yaml)
    now = config.model_dump(mode="json")
    refuse = [
        line
        for where, line in differences(saved, now)
        if where == "optimizer.name" or (where.startswith("model.") and where not in _FREE_MODEL_FIELDS)
    ]
    if "converted_from" in state.counters:
        raise UsageError(
            f"--resume: {checkpoint} was converted from an export and has no optimizer state. Start a new run with "
            f"--init-from {checkpoint}."
        )
    if refuse:
        raise UsageError(
            f"--resume: {checkpoint} was written with another configuration:\n  "
            + "\n  ".join(refuse)
            + "\nSet these back to resume, or choose another --run-dir to start a new run."
        )
    if state.step > config.training.steps:
        raise UsageError(
            f"--resume: {checkpoint} is at step {state.step}, beyond training.steps = {config.training.steps}. "
            f"Set training.steps to {state.step} or more."
        )
    return [line for where, line in differences(saved, now)]


def keeps_generators(config: RunConfig, state: RunState) -> bool:
    """Whether a rank may go on with the random numbers that the rank of its number drew: ranks that share lanes draw
    alike, so other sizes of the mesh put together ranks that did not."""
    saved = (yaml.safe_load(state.config_yaml) or {}).get("parallel", {})
    return all(saved.get(axis, 1) == getattr(config.parallel, axis) for axis in ("tp", "cp"))


def load_initial_weights(engine: Engine, config: RunConfig, vocabulary: VocabularyEntry, init_from: Path) -> Path:
    """Set the weights of another run's checkpoint, or of an export; returns its folder.

    Raises:
        UsageError: its model is not this one's (lists what differs), or its tokenizer not that of the shards, whose
            `vocabulary` is given.
        CheckpointError: it does not verify.
    """
    loaded = load_checkpoint_or_export(init_from)
    pair = ({"model": loaded.config.model.model_dump(mode="json")}, {"model": config.model.model_dump(mode="json")})
    lines = [line for where, line in differences(*pair) if where not in _FREE_INITIAL_FIELDS]
    if lines:
        raise UsageError(
            f"--init-from: {loaded.path} holds another model:\n  "
            + "\n  ".join(lines)
            + "\nUse that run's model configuration, or start without --init-from."
        )
    check_tokenizer(loaded.tokenizer_digest, vocabulary, str(loaded.path), config.data.shards)
    engine.load({name: parameter.detach() for name, parameter in loaded.model.named_parameters()})
    return loaded.path


def differences(saved: Any, now: Any, where: str = "") -> list[tuple[str, str]]:
    """(dotted field, "field: A in the checkpoint, B now") of every field that differs."""
    if isinstance(saved, list) and isinstance(now, list):
        saved, now = dict(enumerate(saved)), dict(enumerate(now))
    if isinstance(saved, dict) and isinstance(now, dict):
        prefix = f"{where}." if where else ""
        names = [*saved, *(name for name in now if name not in saved)]
        return [found for name in names for found in differences(saved.get(name), now.get(name), f"{prefix}{name}")]
    return [] if saved == now else [(where, f"{where}: {_shown(saved)} in the checkpoint, {_shown(now)} now")]


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)
