"""A new corpus of some documents of another, or with other documents held out; tokens are copied, not made again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longspan.data_pipeline.corpus_tools.contents import stored
from longspan.data_pipeline.corpus_tools.new_corpus import finish, new_corpus
from longspan.data_pipeline.entries import DocumentEntry, Split
from longspan.data_pipeline.manifest import TOKENIZER_FOLDER, Manifest, did_you_mean
from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.shards import PackedDocument, ShardWriter
from longspan.data_pipeline.tokenization import load_tokenizer
from longspan.data_pipeline.tokenization.base import Encoded, Tokenizer
from longspan.errors import UsageError

_MOST_NAMED = 20


@dataclass(frozen=True)
class HoldOut:
    """Which documents are held out, instead of those that were: `ids`, or a `fraction` of the bytes of each source."""

    ids: tuple[str, ...] = ()
    fraction: float | None = None

    @classmethod
    def parse(cls, text: str) -> HoldOut:
        """From the command line: a number between 0 and 1, or a file with one id a line (# begins a comment).

        Raises:
            UsageError: it is neither.
        """
        try:
            fraction = float(text)
        except ValueError:
            fraction = None
        if fraction is not None:
            if not 0 < fraction < 1:
                raise UsageError(f"--hold-out {text}: a fraction lies between 0 and 1, e.g. 0.01; else name a file.")
            return cls(fraction=fraction)
        try:
            lines = read_regular(Path(text)).decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(
                f"--hold-out {text}: no number between 0 and 1, and no readable file of ids: {reason}."
            ) from None
        ids = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
        if not ids:
            raise UsageError(f"--hold-out {text}: there are no ids in the file; one a line, as in the manifest.")
        return cls(ids=ids)


def split_corpus(
    folder: Path,
    out: Path,
    *,
    sources: list[str] | None = None,
    hold_out: HoldOut | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write a new corpus of the documents of another, in the same order; groups stay whole.

    Args:
        folder: of the corpus. out: folder to make.
        sources: whose documents to take; all if None.
        hold_out: what is held out; as it was if None. A fraction takes whole groups in the order of a hash of their
            names, from each source until its share is reached, so that it is the same wherever it is done.

    Raises:
        UsageError: neither is given; a source or document is unknown, a group would be torn, or nothing would remain
            for training.
        DataError: a document does not have its hash; nothing was written.
    """
    if sources is None and hold_out is None:
        raise UsageError("nothing to do: give --sources, --hold-out or both.")
    manifest = Manifest.load(folder)
    entries = list(manifest.documents.take(_chosen(manifest, sources)))
    if hold_out is not None:
        held_out = _held_out_ids(manifest, entries, hold_out)
        entries = [
            entry.model_copy(update={"split": "held_out" if entry.id in held_out else "train"}) for entry in entries
        ]
    if all(entry.split == "held_out" for entry in entries):
        raise UsageError(f"zero training documents: all {len(entries)} are held out. Hold out fewer.")
    tokenizer = None if manifest.vocabulary.kind == "bytes" else load_tokenizer(folder / TOKENIZER_FOLDER)
    shard_bytes = max(shard.size for shard in manifest.shards)
    with new_corpus(out, [folder]) as place:
        splits: tuple[Split, ...] = ("train", "held_out")
        writers = {
            split: ShardWriter(place.building, split, shard_bytes, tokenizer, progress=progress) for split in splits
        }
        written = [
            writers[document.split].add(document, encoded)
            for document, encoded in _contents(manifest, entries, tokenizer)
        ]
        shards = [shard for writer in writers.values() for shard in writer.close()]
        kept = {entry.source for entry in entries}
        listed = [source for source in manifest.sources if source.name in kept]
        result = Manifest.create(place.out, place.out.name, listed, shards, written, manifest.vocabulary)
        finish(place, result, folder / TOKENIZER_FOLDER)
    return result


def _chosen(manifest: Manifest, sources: list[str] | None) -> np.ndarray:
    """Places of the documents of these sources: int64 [m]."""
    table = manifest.documents
    if sources is None:
        return np.arange(len(table))
    if not sources:
        raise UsageError(f"--sources names none; {manifest.folder} has {', '.join(table.sources)}.")
    unknown = [name for name in sources if name not in table.sources]
    if unknown:
        listed = "; ".join(f"no source {name}{did_you_mean(name, table.sources)}" for name in unknown)
        raise UsageError(f"--sources: {listed} {manifest.folder} has {', '.join(table.sources)}.")
    return np.flatnonzero(np.isin(table.source_index, [table.sources.index(name) for name in sources]))


def _held_out_ids(manifest: Manifest, entries: list[DocumentEntry], hold_out: HoldOut) -> set[str]:
    if hold_out.fraction is not None:
        return _fraction(entries, hold_out.fraction)
    known = [entry.id for entry in entries]
    unknown = sorted(set(hold_out.ids) - set(known))
    wanted = set(hold_out.ids)
    groups = {entry.group for entry in entries if entry.id in wanted}
    torn = [entry for entry in entries if entry.group in groups and entry.id not in wanted]
    problems = [
        f"no document {name}{did_you_mean(name, known) if place < _MOST_NAMED else '.'}"
        for place, name in enumerate(unknown)
    ]
    problems += [f"document {entry.id} is of group {entry.group}, of which others are held out" for entry in torn]
    if problems:
        more = f"\n  and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise UsageError(
            "--hold-out does not fit the corpus at "
            f"{manifest.folder}:\n  " + "\n  ".join(problems[:_MOST_NAMED]) + more + "\n"
            "Hold out all of a group or none."
        )
    return wanted


def _fraction(entries: list[DocumentEntry], fraction: float) -> set[str]:
    """Ids of whole groups that make up this share of the bytes of each source, as near as groups allow."""
    wanted: dict[str, float] = {}
    members: dict[str, list[DocumentEntry]] = {}
    for entry in entries:
        wanted[entry.source] = wanted.get(entry.source, 0.0) + fraction * entry.num_bytes
        members.setdefault(entry.group, []).append(entry)
    held_out: set[str] = set()
    for group in sorted(members, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        size = sum(entry.num_bytes for entry in members[group])
        source = members[group][0].source
        if size / 2 <= wanted[source]:  # nearer to the share with it than without it
            held_out |= {entry.id for entry in members[group]}
            for entry in members[group]:
                wanted[entry.source] -= entry.num_bytes
    if not held_out:
        raise UsageError(
            f"--hold-out {fraction}: every document is longer than twice that share of its source. Hold out more, or "
            f"name the documents in a file."
        )
    return held_out


def _contents(
    manifest: Manifest, entries: list[DocumentEntry], tokenizer: Tokenizer | None
) -> Iterator[tuple[PackedDocument, Encoded | None]]:
    """Each document with its text, or with its tokens if it has some; its hash is checked."""
    for entry in entries:
        content, lengths = stored(manifest.folder, entry, tokenizer is None)
        encoded = None
        if tokenizer is not None:
            ids = np.frombuffer(content, dtype=tokenizer.token_dtype.newbyteorder("<"))
            encoded = Encoded(ids, np.frombuffer(lengths, dtype="<u2"))
        text = content if tokenizer is None else b""
        yield PackedDocument(entry.id, entry.source, entry.group, entry.split, entry.licence, text), encoded
