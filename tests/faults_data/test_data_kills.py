"""Readers killed again and again while they stream and download from a server that misbehaves.

The parent is the server and counts its faults; the children deliver batches and are killed at random moments. What
they delivered in all must be, byte for byte, what an undisturbed reader of the same corpus on disk delivers.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_life
import numpy as np
import pytest
from reader_corpora import RandomIds, random_document, write_corpus
from shard_server import ShardServer

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest

LENGTHS = [int(n) for n in np.random.default_rng(4).integers(300, 9000, 48)]
FAULT_SHARES = {"status500": 0.06, "truncate": 0.08, "wrong_bytes": 0.06, "close": 0.04, "stall": 0.03}
LAST_STEPS = 40
STEP_BYTES = 8 * data_life.LANES * data_life.SEGMENT


class DataServer:
    """The process that forks lives."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("data_fork_server.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.answer() == {"ready": True}

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the fork server is gone"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def life(self, request: dict[str, Any], until: Callable[[], None] | None = None) -> int:
        """Run one life; killed when `until` returns, if it is given. Its exit code, or minus the signal."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid = self.answer()["pid"]
        if until is not None:
            until()
            with contextlib.suppress(ProcessLookupError):  # it ended by itself; its status will say so
                os.kill(pid, signal.SIGKILL)
        return int(self.answer()["status"])


@pytest.fixture(scope="module")
def lives() -> Iterator[DataServer]:
    """Everything imported once."""
    server = DataServer()
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait(10)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some twenty shards of about 50 kB."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), LENGTHS, shard_bytes=50_000)


def misbehave(server: ShardServer, seed: int, shares: dict[str, float], suffix: str = "") -> None:
    """Faults at random for files with this suffix.

    No file arrives with wrong bytes twice in a row: that would be a damaged store.
    """
    rng = random.Random(seed)
    last: dict[str, str | None] = {}

    def choose(path: str) -> str | None:
        with server.lock:
            if not path.endswith(suffix):
                return None
            fault = rng.choices([None, *shares], [1 - sum(shares.values()), *shares.values()])[0]
            if fault == "wrong_bytes" and last.get(path) == fault:
                fault = None
            if fault in (None, "wrong_bytes"):  # the others bring nothing
                last[path] = fault
            return fault

    server.choose = choose


@dataclass
class Outcome:
    """What a series of lives did: kills, those of them during a download, what was delivered and what should be."""

    kills: int
    kills_in_download: int
    faults: Counter[str]
    delivered: bytes
    expected: bytes
    statuses: list[int]
    messages: str


def kill_again_and_again(
    lives: DataServer, corpus: Manifest, folder: Path, kind: str, kills: int, plant: str | None = None, seed: int = 0
) -> Outcome:
    """Let a reader live and die `kills` times, then deliver some steps more in peace, and collect everything."""
    rng = random.Random(seed)
    cache_bytes = 6 * max(shard.size for shard in corpus.shards)
    killed = in_download = 0
    statuses = []
    with ShardServer(corpus.folder) as server:
        server.chunk_bytes, server.chunk_delay_seconds = 8192, 0.001
        server.wrong_stride = 61
        if plant == "trust_what_arrives":  # a few wrong bytes here and there might lie where nothing is delivered
            misbehave(server, seed, {"wrong_bytes": 0.6}, suffix=".tar")
        else:
            misbehave(server, seed, FAULT_SHARES)
        request = {"url": server.url, "folder": str(folder), "kind": kind, "cache_bytes": cache_bytes, "plant": plant}

        flying = [0]

        def moment() -> None:
            """Return at a random moment: early, or after some steps; every second time within a download."""
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0.02, 0.2))
            else:
                grown = log_bytes(folder) + rng.randint(1, 9) * STEP_BYTES
                wait(lambda: log_bytes(folder) >= grown, 4)
            if rng.random() < 0.5:
                wait(lambda: server.in_flight > 0, 0.3)
            flying[0] = server.in_flight

        while killed < kills and killed == len(statuses):
            if rng.random() < 0.2:
                shutil.rmtree(folder / "cache", ignore_errors=True)
            status = lives.life({**request, "steps": 10**6, "pause_seconds": 0.001}, moment)
            statuses.append(status)
            killed += status == -signal.SIGKILL
            in_download += status == -signal.SIGKILL and flying[0] > 0
        state = folder / "state.json"
        steps = LAST_STEPS + (json.loads(state.read_text())["state"]["step"] if state.exists() else 0)
        for _ in range(5):
            statuses.append(lives.life({**request, "steps": steps, "pause_seconds": 0}))
            if statuses[-1] == 0:
                break
        faults = Counter({name: server.counts[name] for name in FAULT_SHARES})
    reader = data_life.make_reader(corpus, DocumentReader(corpus), kind)
    expected = b"".join(data_life.content(reader, step) for step in range(steps))
    messages = (folder / "messages").read_text()[-6000:]
    return Outcome(killed, in_download, faults, (folder / "log").read_bytes(), expected, statuses, messages)


def wait(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition, but no longer than this."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.0005)


def log_bytes(folder: Path) -> int:
    """Length of the log, 0 if there is none."""
    return (folder / "log").stat().st_size if (folder / "log").exists() else 0


def multiset(log: bytes) -> dict[int, int]:
    """How often each token was delivered as something to predict."""
    steps = np.frombuffer(log, dtype=np.int32).reshape(-1, 2, data_life.LANES * data_life.SEGMENT)
    labels = steps[:, 1]
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def check(outcome: Outcome, kills: int) -> None:
    """Every fault happened, and everything was delivered once."""
    assert outcome.kills == kills and outcome.statuses[-1] == 0, outcome.messages
    assert set(outcome.statuses[:-1]) <= {-signal.SIGKILL}, outcome.messages
    assert outcome.kills_in_download >= kills // 10
    assert multiset(outcome.delivered) == multiset(outcome.expected)
    assert outcome.delivered == outcome.expected


@pytest.mark.parametrize("kind", ["ranged", "streaming"])
def test_a_few_kills_lose_and_repeat_nothing(lives, corpus, tmp_path, kind):
    outcome = kill_again_and_again(lives, corpus, tmp_path, kind, kills=6, seed=1)
    check(outcome, 6)
    assert outcome.faults.total() >= 3


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ranged", "streaming"])
def test_two_hundred_kills_lose_and_repeat_nothing(lives, corpus, tmp_path, kind):
    outcome = kill_again_and_again(lives, corpus, tmp_path, kind, kills=200, seed=2)
    check(outcome, 200)
    assert all(outcome.faults[name] >= 10 for name in FAULT_SHARES), outcome.faults
    print(
        f"\n{kind}: {outcome.kills} kills, {outcome.kills_in_download} in a download, faults {dict(outcome.faults)}, "
        f"{len(outcome.delivered) // (8 * data_life.LANES * data_life.SEGMENT)} steps"
    )


@pytest.mark.parametrize(
    "plant",
    [
        "trust_what_arrives",
        "skip_a_step_on_resume",
        pytest.param("quarantine_what_the_store_withholds", marks=pytest.mark.long),
        pytest.param("forget_to_shorten_the_log", marks=pytest.mark.long),
    ],
)
def test_a_planted_bug_is_seen(lives, corpus, tmp_path, plant):
    outcome = kill_again_and_again(lives, corpus, tmp_path, "ranged", kills=4, plant=plant, seed=3)
    assert outcome.faults.total() > 0
    with pytest.raises(AssertionError):  # wrong batches, or a life that ended by itself
        check(outcome, outcome.kills)


def test_the_corpus_is_what_the_check_takes_it_for(corpus):
    """Were all documents alike, the comparison could not see one in the place of another."""
    heads = {random_document(RandomIds(), number, length).ids[:50].tobytes() for number, length in enumerate(LENGTHS)}
    assert len(heads) == len(LENGTHS) and len(corpus.shards) >= 15
