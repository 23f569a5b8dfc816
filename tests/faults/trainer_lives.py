"""Runs of the real trainer, killed at chosen moments, and what their final state is."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from life_server import LIFE_SECONDS, LifeServer
from safetensors.torch import save

from longspan.data_pipeline.build import build_corpus
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.trainer.checkpoint import contents
from longspan.trainer.checkpoint.store import CheckpointStore

LANES = 4
KILLED = -signal.SIGKILL


def tiny_corpus(folder: Path) -> Path:
    """Shards of 24 short documents, several of them in one segment, one held out."""
    generator = random.Random(5)
    words = ["and", "state", "carries", "over", "the", "block", "edge", "of", "a", "long", "text"]
    (folder / "texts").mkdir(parents=True)
    for number in range(24):
        text = " ".join(generator.choice(words) for _ in range(generator.randint(1, 40)))
        (folder / "texts" / f"{number:02d}.txt").write_text(text + "\n")
    source = {"kind": "folder", "name": "texts", "path": str(folder / "texts")}
    recipe = CorpusConfig.model_validate({"name": "tiny", "sources": [source], "held_out": ["texts/00.txt"]})
    build_corpus(recipe, folder / "shards", progress=lambda line: None)
    return folder / "shards"


def tiny_recipe(shards: Path, seed: int, steps: int) -> dict[str, Any]:
    """A Block-Recurrent model of a few thousand parameters with dropout, in two micro-batches of two lanes."""
    return {
        "name": "faults",
        "seed": seed,
        "model": {
            "dim": 16,
            "num_heads": 2,
            "head_dim": 8,
            "ffn_dim": 32,
            "window_tokens": 8,
            "dropout": 0.1,
            "layers": [{"mixer": "sliding_window"}, {"mixer": "block_recurrent", "num_states": 4}],
        },
        "data": {"shards": str(shards), "segment_tokens": 32, "lanes": LANES},
        "training": {"steps": steps, "micro_batch_lanes": 2, "threads": 1},
        "optimizer": {"lr_peak": 0.01, "weight_decay": 0.01},
        "schedule": {"warmup_steps": 4},
        "checkpoint": {"interval_steps": 2, "keep_last": 2},
        "validation": {"interval_steps": 8, "max_document_tokens": 64, "sample_tokens": 4},
        "tracking": {"enabled": False},
    }


@dataclass
class Run:
    """One run directory over all lives of its trainer.

    Attributes:
        kills: moments at which a life was killed; kills_in_saves: those that left a half-written checkpoint;
        resumes: steps that lives went on from.
        seen: characters of their standard error that were looked at.
    """

    server: LifeServer
    folder: Path
    recipe: dict[str, Any]
    kills: list[str] = field(default_factory=list)
    kills_in_saves: list[str] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)
    seen: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(self.recipe))

    @property
    def config(self) -> Path:
        """The recipe as a file."""
        return self.folder / "recipe.yaml"

    @property
    def run_dir(self) -> Path:
        """What `--run-dir` would name."""
        return self.folder / "run"

    @property
    def store(self) -> CheckpointStore:
        """The run's checkpoints; quiet."""
        return CheckpointStore(self.run_dir / "checkpoints", warn=lambda message: None)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Whole records of this kind in log.jsonl."""
        path = self.run_dir / "log.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def messages(self) -> str:
        """Standard error of all lives."""
        path = self.folder / "stderr.txt"
        return path.read_text() if path.exists() else ""

    def unfinished_saves(self) -> set[str]:
        """Temporary folders of saves."""
        root = self.run_dir / "checkpoints"
        return {name for name in os.listdir(root) if name.startswith(".tmp-step")} if root.is_dir() else set()

    def live(self, moment: Moment | None = None, number: int = signal.SIGKILL, plant: str | None = None) -> int:
        """One life of the trainer, with a signal at a moment if one is given; its exit status."""
        before = self.unfinished_saves()
        life = self.server.ask(
            config=str(self.config), run_dir=str(self.run_dir), log=str(self.folder / "stderr.txt"), plant=plant
        )
        answer = moment.wait(self, before) if moment else None
        if answer is None and moment is not None:
            os.kill(life, number)
        answer = answer or self.server.answer(LIFE_SECONDS)
        if answer is None:
            os.kill(life, signal.SIGKILL)
            self.server.answer(LIFE_SECONDS)
            raise AssertionError(f"the trainer hangs in {self.folder}:\n{self.messages()[-2000:]}")
        status = int(answer["status"])
        if status == KILLED:
            self.kills.append(str(moment))
            if self.unfinished_saves() - before:
                self.kills_in_saves.append(str(moment))
        self.resumes += [int(line.rsplit(" ", 1)[1]) for line in self._new_lines() if "resuming from" in line]
        return status

    def finish(self, plant: str | None = None) -> dict[str, str]:
        """Live until the last step; digests of the final state."""
        status = self.live(plant=plant)
        assert status == 0, f"exit {status} in {self.folder}:\n{self.messages()[-3000:]}"
        return self.digests()

    def _new_lines(self) -> list[str]:
        text = self.messages()
        new, self.seen = text[self.seen :], len(text)
        return new.splitlines()

    def digests(self) -> dict[str, str]:
        """sha256 of each part of the newest checkpoint, read back and put into one canonical form."""
        found = self.store.load_newest(0, LANES)
        assert found is not None, f"no checkpoint in {self.run_dir}"
        state, _ = found
        parts = {
            "weights": save(state.weights),
            "optimizer": save(contents.flat_optimizer(state.optimizer)),
            "lanes": save(state.lanes or {}),
            "rng": json.dumps(state.rng, sort_keys=True).encode(),
            "data": json.dumps(state.data, sort_keys=True).encode(),
            "step": str(state.step).encode(),
            "counters": json.dumps({**state.counters, "checkpoint_failures": 0}, sort_keys=True).encode(),
        }
        assert all(len(part) > 1 for part in parts.values()) and len(state.weights) > 10 and state.lanes
        return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}

    def typical_seconds(self, what: str) -> float:
        """Median time of a step or save so far; of a start, about what forking and building take."""
        if what == "start":
            return 0.5
        times = sorted(record["seconds"] for record in self.records("checkpoint" if what == "save" else "step"))
        return float(times[len(times) // 2]) if times else 0.01

    def copy(self, folder: Path) -> Run:
        """A run of its own that goes on from where this one stands."""
        shutil.copytree(self.folder, folder)
        return Run(self.server, folder, self.recipe, seen=len(self.messages()))

    def losses(self) -> dict[int, float]:
        """Loss of each step, as the log has it."""
        return {record["step"]: record["loss"] for record in self.records("step")}


@dataclass(frozen=True)
class Moment:
    """When a signal is sent: after something has happened in this life, and a delay.

    Attributes:
        after: start; step (`count` are done); save (the `count`-th has begun); failure (`count` saves have failed).
        fraction: of the time that the thing itself takes here, for the delay.
    """

    after: str
    count: int = 1
    fraction: float = 0.0

    def __str__(self) -> str:
        return f"{self.after} {self.count} + {self.fraction:.3f}"

    @staticmethod
    def draw(generator: random.Random) -> Moment:
        """Most often inside a save or between steps, sometimes while the trainer starts."""
        after = generator.choices(["start", "step", "save"], [1, 3, 4])[0]
        count = generator.randint(1, {"start": 1, "step": 8, "save": 4}[after])
        return Moment(after, count, generator.random())

    def wait(self, run: Run, unfinished: set[str]) -> dict[str, Any] | None:
        """Wait for this moment in the life that has just begun; an answer of the server if it ends before."""
        since = time.time()
        seen = set(unfinished)

        def save_has_begun() -> bool:
            seen.update(run.unfinished_saves())
            return len(seen - unfinished) >= self.count

        def happened(kind: str) -> Callable[[], bool]:
            return lambda: sum(record["time"] > since for record in run.records(kind)) >= self.count

        reached = {"step": happened("step"), "failure": happened("checkpoint_failure"), "save": save_has_begun}
        if self.after == "start":
            return run.server.answer(self.fraction * run.typical_seconds("start"))
        deadline = time.monotonic() + LIFE_SECONDS
        while not reached[self.after]() and time.monotonic() < deadline:
            answer = run.server.answer(0.001)
            if answer is not None:
                return answer
        return run.server.answer(self.fraction * run.typical_seconds(self.after))
