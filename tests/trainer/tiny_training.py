"""A corpus of a few small files and a configuration that trains a tiny Block-Recurrent model on it in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from longspan.data_pipeline.build import build_corpus
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.trainer import recipes
from longspan.trainer.config import RunConfig, cross_problems

WORDS = ("and", "the", "of", "king", "said", "unto", "behold", "river", "house", "day", "went", "light", "stone")


def build_tiny_corpus(folder: Path) -> Path:
    """Nine documents of 60 to 900 bytes, two of them held out; returns the shards' folder."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    draw = random.Random(5)
    for index in range(9):
        words = [draw.choice(WORDS) for _ in range(12 + 20 * index)]
        (texts / f"{index}.txt").write_text(" ".join(words), encoding="utf-8")
    config = CorpusConfig.model_validate(
        {
            "name": "tiny",
            "sources": [{"name": "texts", "kind": "folder", "path": str(texts)}],
            "held_out": ["texts/3.txt", "texts/5.txt"],
        }
    )
    build_corpus(config, folder / "shards", lambda line: None)
    return folder / "shards"


def tiny_config(shards: Path, **overrides: Any) -> RunConfig:
    """Four lanes of 16 tokens in one micro-batch; overrides are dotted names with double underscores."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "dim": 16,
            "num_heads": 2,
            "head_dim": 8,
            "ffn_dim": 32,
            "window_tokens": 8,
            "dropout": 0.0,
            "layers": [{"mixer": "sliding_window"}, {"mixer": "block_recurrent", "num_states": 4}],
        },
        "data": {"shards": str(shards), "segment_tokens": 16, "lanes": 4},
        "training": {"steps": 12, "micro_batch_lanes": 4, "threads": 1},
        "optimizer": {"lr_peak": 0.01, "weight_decay": 0.01},
        "schedule": {"warmup_steps": 4},
        "checkpoint": {"interval_steps": 4},
        "validation": {"interval_steps": 6, "sample_tokens": 5, "max_document_tokens": 100},
        "tracking": {"enabled": False},
    }
    named = [f"{name.replace('__', '.')}={value}" for name, value in overrides.items()]
    return recipes.validate(RunConfig, recipes.apply_overrides(raw, named), "tiny", cross_problems)


def read_log(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of RUN/log.jsonl, of one kind if given."""
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if kind in (None, record["kind"])]
