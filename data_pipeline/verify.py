"""Check a corpus on disk against its manifest, and find the document and byte where it differs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longspan.data_pipeline.manifest import DocumentEntry, Manifest, ShardEntry
from longspan.data_pipeline.shards import render_sample
from longspan.errors import DataError

_CHUNK_BYTES = 2**20
_MOST_PROBLEMS_NAMED = 20


@dataclass(frozen=True)
class VerifyResult:
    """What was checked: shards, documents and bytes on disk."""

    manifest: Manifest
    num_bytes: int


def verify_corpus(folder: str | Path) -> VerifyResult:
    """Check size and sha256 of every shard, and offset, size and sha256 of every document.

    Raises:
        UsageError: there is no corpus at `folder`.
        DataError: something differs; names shard, document and byte offset of everything that does.
    """
    manifest = Manifest.load(folder)
    problems: list[str] = []
    for shard in manifest.shards:
        problems += _shard_problems(manifest, shard)
    if problems:
        shown = problems[:_MOST_PROBLEMS_NAMED]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        lines = "\n".join(f"  {problem}" for problem in shown)
        raise DataError(
            f"the corpus at {folder} does not match its manifest:\n{lines}\n"
            f"Build it again with `longspan data build RECIPE --out {folder}`, or copy it anew."
        )
    return VerifyResult(manifest, sum(shard.size for shard in manifest.shards))


def _shard_problems(manifest: Manifest, shard: ShardEntry) -> list[str]:
    file = manifest.folder / shard.url
    documents = sorted((d for d in manifest.documents if d.shard == shard.url), key=lambda d: d.offset)
    try:
        size = file.stat().st_size
        whole = _sha256(file, 0, size)
        wrong = [document for document in documents if _sha256(file, document.offset, document.size) != document.sha256]
    except FileNotFoundError:
        return [f"shard {shard.url}: missing, with documents {_names(documents)}"]
    except OSError as error:
        return [f"shard {shard.url}: not readable: {error.strerror}"]
    problems = []
    if size < shard.size:
        lost = [document for document in documents if document.offset + document.size > size]
        what = f"first document that is not whole: {lost[0].id}" if lost else "every document's text is whole"
        problems.append(f"shard {shard.url}: truncated at byte {size} of {shard.size}; {what}")
        wrong = [document for document in wrong if document not in lost]
    elif size > shard.size:
        problems.append(f"shard {shard.url}: {size} bytes, {size - shard.size} more than the manifest's {shard.size}")
    problems += [_document_problem(document) for document in wrong]
    if not problems and whole != shard.sha256:
        problems.append(_frame_problem(manifest, shard, file, documents))
    return problems


def _document_problem(document: DocumentEntry) -> str:
    stop = document.offset + document.size
    return (
        f"shard {document.shard}: document {document.id} at byte offset {document.offset} (to {stop}) "
        f"does not have sha256 {document.sha256[:16]}"
    )


def _frame_problem(manifest: Manifest, shard: ShardEntry, file: Path, documents: list[DocumentEntry]) -> str:
    """Every text is right, so the damage is in what lies between: it can be rendered again and compared."""
    index = {document.id: place for place, document in enumerate(manifest.documents)}
    data = file.read_bytes()
    expected = b"".join(render_sample(index[d.id], d, data[d.offset : d.offset + d.size]) for d in documents)
    expected = expected.ljust(len(data), b"\0")[: len(data)]
    at = int(np.argmax(np.frombuffer(data, dtype=np.uint8) != np.frombuffer(expected, dtype=np.uint8)))
    near = next((d.id for d in documents if d.offset + d.size > at), "none: in the end of the archive")
    return f"shard {shard.url}: byte {at} is damaged, in a tar header or metadata; document that follows: {near}"


def _sha256(file: Path, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(offset)
        while size > 0 and (chunk := stream.read(min(size, _CHUNK_BYTES))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def _names(documents: list[DocumentEntry]) -> str:
    names = ", ".join(document.id for document in documents[:3])
    return names if len(documents) <= 3 else f"{names} and {len(documents) - 3} more"
