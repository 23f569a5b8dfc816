"""Everything that `longspan bench data` measures, one after another."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from longspan.data_pipeline.manifest import Manifest
from longspan.trainer.bench import environment
from longspan.trainer.bench.contender import Unavailable
from longspan.trainer.bench.data.corpus import make_corpus
from longspan.trainer.bench.data.encoding import THREADS, Encoding
from longspan.trainer.bench.data.peers import PeerReading, mosaicml_row, webdataset_row
from longspan.trainer.bench.data.readers import Reading, http_rows, local_rows
from longspan.trainer.bench.data.result import Result, Row
from longspan.trainer.bench.data.seeking import seek_rows
from longspan.trainer.bench.data.settings import DataSettings
from longspan.trainer.bench.result import OURS, Ratio

SEGMENT_TOKENS = (4096, 16_384)
_PACKAGES = (
    "longspan",
    "torch",
    "numpy",
    "webdataset",
    "mosaicml-streaming",
    "tokenizers",
    "tiktoken",
    "pyarrow",
    "urllib3",
)


def measure(settings: DataSettings, command: str) -> Result:
    """All rows; what breaks becomes a row, and the rest goes on.

    Args:
        command: that asks for this.

    Raises:
        UsageError, DataError: the corpus cannot be read.
    """
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="longspan-bench-") as folder:
        scratch = Path(folder)
        if settings.corpus is None:
            _say(f"making a corpus of {settings.tokens:,} random tokens")
            manifest = make_corpus(scratch / "corpus", settings.tokens)
        else:
            manifest = Manifest.load(settings.corpus)
        rows = _rows(settings, manifest, scratch)
    return Result(
        tokens_per_second=next((row.tokens_per_second for row in rows), None),
        benchmark="data",
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device={"type": "cpu", "name": environment.processor(), "cores": len(os.sched_getaffinity(0))},
        load=(load, os.getloadavg()[0]),
        versions={"python": platform.python_version(), **{name: environment.version(name) for name in _PACKAGES}},
        settings=settings.as_dict(),
        rows=tuple(rows),
        ratios=tuple(_ratios(rows)),
        seconds=time.monotonic() - began,
        notes=tuple(_notes(manifest, settings)),
    )


def _rows(settings: DataSettings, manifest: Manifest, scratch: Path) -> list[Row]:
    repeat, tokens = settings.repeat, min(settings.tokens, int(manifest.documents.num_tokens.sum()))
    rows: list[Row] = []

    def add(contender: str, case: str, work: Callable[[], list[Row]]) -> None:
        _say(f"{contender}, {case}")
        rows.extend(_safely(contender, case, work))

    for segment_tokens in SEGMENT_TOKENS:
        reading = Reading(manifest, "ranged", segment_tokens, tokens, repeat)
        add(OURS, reading.title, partial(local_rows, reading))
    streaming, ranged = (Reading(manifest, name, SEGMENT_TOKENS[0], tokens, repeat) for name in ("streaming", "ranged"))
    add(OURS, streaming.title, partial(local_rows, streaming))
    peer = PeerReading(manifest, SEGMENT_TOKENS[0], tokens, repeat)
    if "webdataset" in settings.peers:
        add("webdataset", peer.title, lambda: [webdataset_row(peer)])
    if "mosaicml-streaming" in settings.peers:
        add("mosaicml-streaming", peer.title, lambda: [mosaicml_row(peer, scratch)])
    for reading in (ranged, streaming):
        add(OURS, f"{reading.title}, http", partial(http_rows, reading, scratch))
    add(OURS, "seek", lambda: seek_rows(repeat, scratch))
    encoding = Encoding(repeat)
    for threads in THREADS:
        add(OURS, encoding.case(threads), lambda threads=threads: [encoding.row(threads)])  # type: ignore[misc]
        if "tokenizers" in settings.peers:
            add("tokenizers", encoding.case(threads), lambda threads=threads: [encoding.peer_row(threads)])  # type: ignore[misc]
    return rows


def _safely(contender: str, case: str, work: Callable[[], list[Row]]) -> list[Row]:
    try:
        return work()
    except Unavailable as error:
        return [Row(contender, case, error.status, note=str(error))]
    except Exception as error:  # the others should still be measured
        if contender == OURS:
            traceback.print_exc()
        return [Row(contender, case, "failed", note=f"{type(error).__name__}: {error}"[:200])]


def _ratios(rows: list[Row]) -> list[Ratio]:
    """The first row's tokens a second over those of each other reader, and our encoding over that of `tokenizers`."""
    ratios = []
    for row in rows:
        if row.contender == OURS or row.tokens_per_second is None:
            continue
        ours = rows[0] if row.megabytes_per_second is None else next(one for one in rows if one.case == row.case)
        if ours.contender == OURS and ours.tokens_per_second is not None:
            ratio = ours.tokens_per_second / row.tokens_per_second
            ratios.append(Ratio(f"tokens/s: longspan, {ours.case} / {row.contender}", ratio))
    return ratios


def _notes(manifest: Manifest, settings: DataSettings) -> list[str]:
    lengths = manifest.documents.num_tokens
    megabytes = sum(shard.size for shard in manifest.shards) / 1e6
    return [
        f"Corpus: {'made here, ' if settings.corpus is None else ''}{len(lengths):,} documents of {lengths.min():,} "
        f"to {lengths.max():,} tokens, {lengths.sum():,} in all, {manifest.vocabulary.token_dtype}, "
        f"{len(manifest.shards)} shards of {megabytes:,.0f} MB together, in the page cache.",
        "A pass starts with the first batch of a new reader; tokens are labels that are scored.",
    ]


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)
