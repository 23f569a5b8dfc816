"""Run directories for report tests: a log with known numbers, evaluations, checkpoints, a corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEPS = 120
SAMPLE = 'and <script>alert(1)</script> \x01 & "é" \ud7ff'
CONFIG = """name: my <run>
model:
  window_tokens: 8
  layers:
  - mixer: sliding_window
    repeat: 2
data:
  shards: {shards}
training:
  steps: {steps}
validation:
  sample_prompt: In the beginning
"""


def step_entry(step: int) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "time": 1.7e9 + step,
        "loss": 3.0,
        "bits_per_byte": 2.0 + 3.0 / step,
        "lr": 0.001,
        "grad_norm": 0.5,
        "tokens_per_second": 12345.0,
        "tokens": 1000 * step,
        "model_flops_per_second": 4.2e10,
        "memory_gib": 1.5,
        "skipped": step == 7,
        "skips": int(step >= 7),
    }


def write_log(run: Path, *, steps: int = STEPS, finished: bool = True, torn: bool = False) -> None:
    entries: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "time": 1.7e9, "device": "cpu", "world_size": 1, "parameters": 1234567}
    ]
    for step in range(1, steps + 1):
        entries.append(step_entry(step))
        if step % 40 == 0:
            value = 2.1 + 1 / step
            entries.append(
                {"kind": "validation", "step": step, "time": 1.7e9 + step, "bits_per_byte": value, "sample": SAMPLE}
            )
    entries.append({"kind": "checkpoint_failure", "step": 3, "time": 1.7e9 + 3, "error": "disk <full>"})
    if finished:
        entries.append({"kind": "end", "step": steps, "time": 1.7e9 + steps, "status": "FINISHED"})
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (run / "log.jsonl").write_text(text + ('{"kind": "step", "st' if torn else ""), encoding="utf-8")


def result(step: int, gain: float, spec: str = "s1") -> dict[str, Any]:
    def rate(mode: str, length: int | None, value: float) -> dict[str, Any]:
        return {
            "mode": mode,
            "context_tokens": length,
            "bits_per_byte": value,
            "ci_low": value - 0.03,
            "ci_high": value + 0.03,
            "perplexity_per_token": 2**value,
        }

    return {
        "checkpoint": {"step": step, "fingerprint": "f" * 64},
        "model": {"window_tokens": 8, "segment_tokens": 32},
        "spec": {"confidence": 0.95},
        "spec_digest": spec,
        "data": {"split": "held_out"},
        "curve": [rate("truncated", length, 2.5 - 0.01 * length) for length in (8, 16, 32, 64)]
        + [rate("state_reset", 8, 1.9 + gain)],
        "carried": rate("carried", None, 1.9),
        "swapped": None,
        "memory_gain": {"bits_per_byte": gain, "ci_low": gain - 0.01, "ci_high": gain + 0.01, "context_tokens": 8},
        "content_gain": None,
        "num_documents": 22,
        "target_bytes": 98765,
        "environment": {"torch": "9.9.9", "device": "cpu"},
    }


def plant_result(run: Path, key: str, content: dict[str, Any], finished: bool = True) -> None:
    folder = run / "evals" / key
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(content))
    if finished:
        (folder / "_SUCCESS").touch()


def plant_corpus(folder: Path) -> Path:
    folder.mkdir()
    documents = [
        {"source": "books", "split": "train", "num_bytes": 3 * 2**20},
        {"source": "books", "split": "held_out", "num_bytes": 2**20},
    ]
    manifest = {
        "digest": "d1" * 32,
        "vocabulary": {"digest": "e2" * 32},
        "sources": [{"name": "books", "origin": "old books", "licence": "public domain"}],
        "shards": [{}],
        "documents": documents,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    held_out = {"unigram_bits_per_byte": 4.5, "xz_bits_per_byte": 2.4}
    (folder / "statistics.json").write_text(json.dumps({"held_out": held_out}))
    return folder


def plant_checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "weights").mkdir(parents=True)
    header = json.dumps({"a": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(60)
    (folder / "weights" / "part-00000-00000.safetensors").write_bytes(content)
    (folder / "manifest.json").write_text("{}")
    (folder / "COMMITTED").write_text(f"{'a9' * 32}  manifest.json\n")


def full_run(root: Path) -> Path:
    """A finished run with everything that a report can show."""
    run = root / "run-1"
    run.mkdir()
    shards = plant_corpus(root / "corpus")
    (run / "config.yaml").write_text(CONFIG.format(shards=shards, steps=STEPS))
    write_log(run)
    plant_result(run, "k1", result(60, 0.04))
    plant_result(run, "k2", result(STEPS, 0.0625))
    plant_result(run, "k3", result(STEPS + 1, 9.0), finished=False)
    plant_checkpoint(run, STEPS)
    return run
