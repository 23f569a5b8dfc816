"""A run directory with a corpus and checkpoints of untrained models of a few thousand parameters."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml

from longspan.data_pipeline.build import build_corpus
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.modeling.model import LanguageModel, build_model
from longspan.trainer import recipes
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.config import RunConfig

LENGTHS = {"a": 700, "b": 900, "c": 640, "d": 120, "train": 400}
LAYERS = ({"mixer": "sliding_window"}, {"mixer": "block_recurrent", "num_states": 4})
# fields of a spec that is soon scored
QUICK = {"spans_per_document": 1, "span_bytes": 16, "context_tokens": [8, 64], "bootstrap_samples": 100}


def text(name: str, size: int) -> bytes:
    """Printable pseudo-random bytes."""
    words = (hashlib.sha256(f"{name}{i}".encode()).hexdigest() for i in range(size // 64 + 1))
    return " ".join(words).encode()[:size]


def corpus(folder: Path) -> Path:
    """Five documents, of which `train` is trained on and `d` is too short for the tests' specs."""
    source = folder / "texts"
    source.mkdir(parents=True)
    for name, size in LENGTHS.items():
        (source / f"{name}.txt").write_bytes(text(name, size))
    raw = {
        "name": "tiny",
        "out": str(folder / "corpus"),
        "sources": [{"kind": "folder", "name": "t", "path": str(source), "licence": "CC0-1.0"}],
        "held_out": [f"t/{name}.txt" for name in "abcd"],
    }
    build_corpus(CorpusConfig.model_validate(raw), folder / "corpus", lambda _: None)
    return folder / "corpus"


def config(shards: Path, layers: tuple[dict[str, Any], ...] = LAYERS, tracked: bool = False) -> RunConfig:
    """A run of the tiny model."""
    raw = {
        "name": "tiny",
        "model": {
            "dim": 16, "num_heads": 2, "head_dim": 8, "ffn_dim": 32, "window_tokens": 8, "dropout": 0.0,
            "layers": list(layers),
        },
        "data": {"shards": str(shards), "segment_tokens": 16, "lanes": 2},
        "training": {"steps": 2},
        "tracking": {"enabled": tracked},
    }  # fmt: skip
    return recipes.validate(RunConfig, raw, "tiny")


def model(run: RunConfig, seed: int = 0) -> LanguageModel:
    """An untrained model, in evaluation mode; its state matters, because gates are drawn at random too."""
    torch.manual_seed(seed)
    built = build_model(run.model).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def run_directory(
    folder: Path, run: RunConfig, steps: tuple[int, ...] = (1,), tokenizer: dict[str, bytes] | None = None
) -> Path:
    """RUN with a checkpoint of other random weights at each step, and with the files of a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(recipes.dump(run), encoding="utf-8")
    store = CheckpointStore(folder / "checkpoints", keep_last=len(steps))
    for step in steps:
        weights = {name: tensor.detach() for name, tensor in model(run, seed=step).named_parameters()}
        state = RunState(
            step=step, weights=weights, optimizer={}, lanes={}, lane_start=0, lane_stop=2,
            data={}, rng={}, counters={}, config_yaml=recipes.dump(run), tokenizer=tokenizer or {},
        )  # fmt: skip
        saved = store.save(state)
        assert saved.ok, saved.error
    return folder


def spec_file(folder: Path, **changes: Any) -> Path:
    """A spec that the tiny corpus is long enough for, as YAML."""
    raw = {
        "name": "tiny", "spans_per_document": 2, "span_bytes": 48, "context_tokens": [8, 16, 64],
        "stride_tokens": 16, "bootstrap_samples": 200, "batch_tokens": 512, **changes,
    }  # fmt: skip
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def one_pass(run: Path, folder: Path) -> list[str]:
    """Arguments of `longspan` for one pass over a run; the spec is written to `folder`."""
    return ["evals", "reconcile", str(run), "--spec", str(spec_file(folder, **QUICK)), "--once"]
