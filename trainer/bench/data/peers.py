"""Public readers over the same documents, in the same process: tokens alone, in batches of [32, T] int64.

They give less than our batches do: no labels, no bytes of tokens, no lanes, and no hash is checked.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.errors import DataError
from longspan.trainer.bench.contender import Unavailable
from longspan.trainer.bench.data.readers import LANES
from longspan.trainer.bench.data.result import Row, row_of, timed

_NOTE = "tokens alone: no labels, bytes or lanes; no hashes"
_MDS_SHARD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PeerReading:
    """What a peer reads in a pass.

    Attributes:
        manifest: of the corpus. segment_tokens: T. tokens: at most so many, about. repeat: passes.
    """

    manifest: Manifest
    segment_tokens: int
    tokens: int
    repeat: int

    @property
    def title(self) -> str:
        """Of the row."""
        return f"documents in order, {LANES} x {self.segment_tokens:,}"

    def row(self, peer: str, documents: Iterable[np.ndarray]) -> Row:
        """Time passes over `documents`, which can be iterated more than once.

        Raises:
            DataError: not as many tokens came as the documents have.
        """
        passes = [timed(lambda: self._count(documents)) for _ in range(self.repeat)]
        size = LANES * self.segment_tokens
        table = self.manifest.documents.take(self.manifest.places("train"))
        there = int((table.num_bytes if self.manifest.vocabulary.kind == "bytes" else table.num_tokens).sum())
        expected = min(there, self.tokens) // size * size
        for one in passes:
            if one.tokens != expected:
                raise DataError(f"{peer} delivered {one.tokens:,} tokens of {expected:,}.")
        return row_of(peer, self.title, passes, note=_NOTE)

    def _count(self, documents: Iterable[np.ndarray]) -> int:
        return sum(batch.size for batch in self._batches(documents))

    def _batches(self, documents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """int64 [32, T] each, of the documents one after another."""
        size = LANES * self.segment_tokens
        left = self.tokens // size
        waiting: list[np.ndarray] = []
        held = 0
        for document in documents:
            waiting.append(document)
            held += len(document)
            if held < size:
                continue
            joined = np.concatenate(waiting)
            for start in range(0, held - size + 1, size):
                if not left:
                    return
                left -= 1
                yield joined[start : start + size].astype(np.int64).reshape(LANES, self.segment_tokens)
            waiting, held = [joined[held // size * size :]], held % size


class _WebDataset:
    """Documents of the shards through WebDataset's pipeline."""

    def __init__(self, manifest: Manifest) -> None:
        os.environ["WDS_SECURE"] = "1"  # read when it is imported: no pickled fields, no `pipe:` addresses
        self._wds, self._tar = (_imported(name, "webdataset") for name in ("webdataset", "webdataset.tariterators"))
        self._shards = [manifest.folder / name for name in _train_shards(manifest)]
        self._member = "txt" if manifest.vocabulary.kind == "bytes" else "ids"
        self._dtype = np.dtype(manifest.vocabulary.token_dtype).newbyteorder("<")

    def __iter__(self) -> Iterator[np.ndarray]:
        expand, group = self._tar.tar_file_expander, self._tar.group_by_keys
        for sample in self._wds.DataPipeline(self._streams, expand, group):
            yield np.frombuffer(sample[self._member], dtype=self._dtype)

    def _streams(self) -> Iterator[dict[str, Any]]:
        for shard in self._shards:  # opened here, since it opens no local files in its secure mode
            with open(shard, "rb") as stream:
                yield {"url": shard, "stream": stream}


class _Mosaic:
    """The documents in MosaicML's own format, read back by its dataset, without shuffling or workers."""

    def __init__(self, manifest: Manifest, folder: str) -> None:
        streaming, documents = _imported("streaming", "mosaicml-streaming"), DocumentReader(manifest)
        columns = dict.fromkeys(("ids",), f"ndarray:{manifest.vocabulary.token_dtype}")
        with streaming.MDSWriter(out=folder, columns=columns, size_limit=_MDS_SHARD_BYTES) as writer:
            for entry in manifest.split("train"):
                tokens = documents.tokens(entry)
                kept = tokens[1:-1] if manifest.vocabulary.kind == "bytes" else tokens
                writer.write({"ids": kept.astype(manifest.vocabulary.token_dtype)})
        documents.close()
        self._dataset = streaming.StreamingDataset(local=folder, shuffle=False, batch_size=1)

    def __iter__(self) -> Iterator[np.ndarray]:
        for sample in self._dataset:
            yield sample["ids"]


def _train_shards(manifest: Manifest) -> list[str]:
    """Names of the shards with training documents, in order; a shard holds documents of one split."""
    codes, names = manifest.documents.codes("shard")
    return [names[code] for code in sorted(set(codes[manifest.places("train")].tolist()))]


def webdataset_row(reading: PeerReading) -> Row:
    """A plain WebDataset pipeline over the shards as they are.

    Raises:
        Unavailable: it is not installed. DataError: as `PeerReading.row`.
    """
    return reading.row("webdataset", _WebDataset(reading.manifest))


def mosaicml_row(reading: PeerReading, scratch: Path) -> Row:
    """mosaicml-streaming over a copy of the documents in its own format.

    Args:
        scratch: folder on the disk of the corpus, for the copy.

    Raises:
        Unavailable: it is not installed. DataError: as `PeerReading.row`.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        return reading.row("mosaicml-streaming", _Mosaic(reading.manifest, folder))


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package that does not fit the others here fails in its own ways
        raise Unavailable("not installed", f"pip install {package} ({type(error).__name__}: {error})") from None
