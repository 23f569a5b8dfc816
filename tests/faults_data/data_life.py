"""One life of a reader: open the corpus behind a URL, go on from the last state, deliver batches until the end.

What is delivered goes to a log: int32 tokens, then labels, of each step. Every few steps the state is published with
the length of the log that belongs to it; a new life cuts the log there and goes on, as a training run does with its
weights.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline.corpus import StorageSettings, open_corpus
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.reader import LaneReader
from longspan.data_pipeline.storage.retry import RetryPolicy
from longspan.data_pipeline.streaming import StreamedDocuments
from longspan.data_pipeline.streaming_plan import StreamPlan

QUANTUM, SEGMENT, LANES = 8, 64, 4
STATE_INTERVAL_STEPS = 4
POLICY = RetryPolicy(attempts=10, first_delay_seconds=0.005, max_delay_seconds=0.03, timeout_seconds=0.15)


def make_reader(manifest: Manifest, documents: DocumentReader, kind: str) -> LaneReader:
    """The reader of all lives; `kind` is `ranged` or `streaming`."""
    settings: dict[str, Any] = {"lanes": LANES, "segment_tokens": SEGMENT, "quantum": QUANTUM, "boundary": "pack"}
    if kind == "ranged":
        return LaneReader(LanePlan(manifest, seed=5, **settings), documents, 0, LANES, prefetch_steps=6)
    plan = StreamPlan(manifest, seed=5, **settings)
    return LaneReader(plan, StreamedDocuments(plan, documents, 0, LANES), 0, LANES, prefetch_steps=6)


def content(reader: LaneReader, step: int) -> bytes:
    """What the log has for a step."""
    batch = reader.batch(step)
    return np.concatenate([batch.tokens.numpy().ravel(), batch.labels.numpy().ravel()]).astype(np.int32).tobytes()


def live(request: dict[str, Any]) -> None:
    """Deliver steps until `request["steps"]`; see `DataServer.life` for the request."""
    folder = Path(request["folder"])
    settings = StorageSettings(
        cache_dir=folder / "cache", cache_gib=request["cache_bytes"] / 2**30, policy=POLICY, start_policy=POLICY
    )
    documents = open_corpus(request["url"], settings)
    reader = make_reader(documents.manifest, documents, request["kind"])
    saved = json.loads((folder / "state.json").read_text()) if (folder / "state.json").exists() else None
    step = 0
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    if saved is not None:
        reader.check_state(saved["state"])
        step = saved["state"]["step"]
    shorten(log, 0 if saved is None else saved["log_bytes"])
    while step < request["steps"]:
        os.write(log, content(reader, step))
        step += 1
        if step % STATE_INTERVAL_STEPS == 0 or step == request["steps"]:
            os.fsync(log)
            publish(folder, {"state": reader.state(step), "log_bytes": os.fstat(log).st_size})
        time.sleep(request["pause_seconds"])
    (folder / "counts.json").write_text(json.dumps(documents.counters.snapshot()))


def shorten(log: int, size: int) -> None:
    """Cut the log to the length that belongs to the state."""
    os.ftruncate(log, size)


def publish(folder: Path, state: dict[str, Any]) -> None:
    """Write the state under another name, then rename it."""
    temporary = folder / "state.tmp"
    with temporary.open("w") as stream:
        json.dump(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, folder / "state.json")
