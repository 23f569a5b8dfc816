"""Tokens a second of our own readers: from local shards, and over loopback http with the cache empty and full."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from longspan.data_pipeline.corpus import StorageSettings, open_corpus
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.lookahead import Documents
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.reader import LaneReader
from longspan.data_pipeline.streaming import StreamedDocuments
from longspan.data_pipeline.streaming_plan import StreamPlan
from longspan.data_pipeline.vocabulary import NO_LABEL
from longspan.errors import DataError
from longspan.trainer.bench.data.result import Bar, Pass, Row, row_of, timed
from longspan.trainer.bench.result import OURS

LANES = 32
QUANTUM = 512
LOCAL_BAR, HTTP_BAR = Bar(tokens_per_second=150e6), Bar(tokens_per_second=20e6)


@dataclass(frozen=True)
class Reading:
    """What is read in a pass.

    Attributes:
        manifest: of the corpus. reader: as `data.reader`. segment_tokens: T; a step is `LANES` x T tokens.
        tokens: of a pass, about.
        repeat: passes.
    """

    manifest: Manifest
    reader: str
    segment_tokens: int
    tokens: int
    repeat: int

    @property
    def steps(self) -> int:
        """Steps of a pass, at least 1."""
        return max(1, math.ceil(self.tokens / (LANES * self.segment_tokens)))

    @property
    def title(self) -> str:
        """Of its rows."""
        return f"{self.reader}, {LANES} x {self.segment_tokens:,}"

    @contextmanager
    def lane_reader(self, documents: DocumentReader) -> Iterator[LaneReader]:
        """A reader of all lanes that has not read anything."""
        plan_class = StreamPlan if self.reader == "streaming" else LanePlan
        plan = plan_class(
            self.manifest,
            seed=0,
            lanes=LANES,
            segment_tokens=self.segment_tokens,
            quantum=min(QUANTUM, self.segment_tokens),
            boundary="pack",
        )
        served: Documents = documents
        if isinstance(plan, StreamPlan):
            served = StreamedDocuments(plan, documents, 0, LANES)
        with closing(served):
            yield LaneReader(plan, served, 0, LANES)


def local_rows(reading: Reading) -> list[Row]:
    """From shards on this disk: a pass in which every document is hashed when it is first touched, and later ones.

    Raises:
        DataError: the reader did not count what it delivered.
    """
    first, again = _passes(reading, lambda: DocumentReader(reading.manifest))
    if reading.reader == "streaming":  # it hashes every document each time it comes by
        return [row_of(OURS, reading.title, first, note="every document hashed")]
    return [
        row_of(OURS, f"{reading.title}, first pass", first, LOCAL_BAR, "every document hashed at its first touch"),
        row_of(OURS, f"{reading.title}, later passes", again, LOCAL_BAR, "hashes known"),
    ]


def http_rows(reading: Reading, scratch: Path) -> list[Row]:
    """Over loopback http: the first pass with an empty cache folder, and a new reader's pass with a full one.

    Args:
        scratch: folder on the disk that the cache is to be on.

    Raises:
        DataError: as `local_rows`.
    """
    cold, warm = [], []
    with serving(reading.manifest.folder) as url:
        for _ in range(reading.repeat):
            with tempfile.TemporaryDirectory(dir=scratch) as cache:
                settings = StorageSettings(cache_dir=Path(cache))
                cold.append(_first_pass(reading, open_corpus(url, settings)))
                warm.append(_first_pass(reading, open_corpus(url, settings)))
    return [
        row_of(OURS, f"{reading.title}, http, empty cache", cold, HTTP_BAR, "server in a process of its own"),
        row_of(OURS, f"{reading.title}, http, full cache", warm, note="a new reader: every document hashed again"),
    ]


def _passes(reading: Reading, documents: Callable[[], DocumentReader]) -> tuple[list[Pass], list[Pass]]:
    """First passes of new readers, and as many later ones of the last reader."""
    first = [_first_pass(reading, documents()) for _ in range(reading.repeat - 1)]
    with reading.lane_reader(documents()) as reader:
        first.append(_timed_pass(reader, range(reading.steps)))
        starts = range(reading.steps, reading.steps * (reading.repeat + 1), reading.steps)
        again = [_timed_pass(reader, range(start, start + reading.steps)) for start in starts]
        check_count(reader, range(reading.steps), first[-1].tokens)
    return first, again


def _first_pass(reading: Reading, documents: DocumentReader) -> Pass:
    with reading.lane_reader(documents) as reader:
        return _timed_pass(reader, range(reading.steps))


def _timed_pass(reader: LaneReader, steps: range) -> Pass:
    return timed(lambda: sum(reader.batch(step).num_valid for step in steps))


def check_count(reader: LaneReader, steps: range, counted: int) -> None:
    """Compare what was counted in a pass with what its batches hold.

    Raises:
        DataError: they differ.
    """
    held = sum(int((reader.batch(step).labels != NO_LABEL).sum()) for step in steps)
    if held != counted:
        raise DataError(
            f"{counted:,} tokens were counted, the batches of steps {steps.start} to {steps.stop} hold {held:,} labels."
        )


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """URL of a folder that the standard library's server serves on the loopback address, in a process of its own.

    Raises:
        DataError: the server did not start.
    """
    command = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--protocol", "HTTP/1.1", "0"]
    with subprocess.Popen(  # noqa: S603 - this Python
        [*command, "--directory", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            found = re.search(r"port (\d+)", said)
            if found is None:
                raise DataError(f"the web server did not start; it said {said!r}.")
            yield f"http://127.0.0.1:{found[1]}"
        finally:
            server.terminate()
