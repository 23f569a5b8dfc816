"""Several corpora to one: shards are linked, not rewritten; what cannot go together is listed."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from longspan.data_pipeline.corpus_tools.near_leaks import near_leaks
from longspan.data_pipeline.corpus_tools.new_corpus import finish, new_corpus
from longspan.data_pipeline.document_table import DocumentTable
from longspan.data_pipeline.manifest import TOKENIZER_FOLDER, Manifest, ShardEntry, SourceEntry
from longspan.errors import DataError, UsageError

_MOST_NAMED = 20


def merge_corpora(out: Path, folders: list[Path], progress: Callable[[str], None]) -> Manifest:
    """Make one corpus of several: their documents one after another, in the order of `folders`.

    Shards get new numbers in that order and keep their bytes and hashes; they are hard links where the file system
    allows it, else copies. Sources of one name become one, whose kind, licence and origin name those of all.

    Args:
        out: folder to make. progress: told of each part of the work.

    Raises:
        UsageError: there are fewer than two corpora, their vocabularies differ, or documents or groups cannot go
            together: the same id twice, or a group, the same text or a near-duplicate in training here and held out
            there. Lists them.
        DataError: a shard is missing or has another size than its manifest says.
    """
    if len(folders) < 2:
        raise UsageError(f"{len(folders)} corpus to merge; give two or more folders behind the new one.")
    places = Counter(folder.resolve() for folder in folders)
    twice = [str(folder) for folder in dict.fromkeys(folders) if places[folder.resolve()] > 1]
    if twice:
        raise UsageError(f"{', '.join(twice)}: the same corpus more than once. Name each corpus once.")
    manifests = [Manifest.load(folder) for folder in folders]
    _check_vocabularies(manifests)
    problems = _collisions(manifests) + _leaks(manifests, "group") + _leaks(manifests, "sha256")
    problems = problems or near_leaks(manifests, progress)  # which reads all documents
    if problems:
        shown = problems[:_MOST_NAMED]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise UsageError(
            "the corpora cannot be merged:\n  " + "\n  ".join(shown) + "\nTake sources or documents out of one of them "
            "first (`longspan data split CORPUS --out NEW --sources NAMES`, or `--hold-out`), or rename a source in "
            "its recipe and build that corpus again."
        )
    with new_corpus(out, folders) as place:
        shards: list[ShardEntry] = []
        tables = []
        numbers: Counter[str] = Counter()
        for manifest in manifests:
            names = _take_shards(manifest, place.building, numbers)
            shards += [shard.model_copy(update={"url": names[shard.url]}) for shard in manifest.shards]
            tables.append(_renamed(manifest.documents, names))
            progress(f"took {len(names)} shards of {manifest.folder}")
        merged = Manifest.create(
            place.out,
            place.out.name,
            _sources(manifests),
            shards,
            DocumentTable(pa.concat_tables(tables)),
            manifests[0].vocabulary,
        )
        finish(place, merged, manifests[0].folder / TOKENIZER_FOLDER)
    return merged


def _check_vocabularies(manifests: list[Manifest]) -> None:
    first = manifests[0]
    for other in manifests[1:]:
        if other.vocabulary != first.vocabulary:
            raise UsageError(
                f"{first.folder} holds tokens of {first.vocabulary.name} (digest {first.vocabulary.digest[:16]}), "
                f"{other.folder} of {other.vocabulary.name} (digest {other.vocabulary.digest[:16]}). "
                f"Only corpora of one tokenizer can be merged: build one of them again with the other's (`path`)."
            )


def _collisions(manifests: list[Manifest]) -> list[str]:
    """Ids that are in more than one corpus."""
    where: dict[str, Path] = {}
    problems = []
    for manifest in manifests:
        for name in manifest.documents.strings("id"):
            if name in where:
                problems.append(f"document {name} is in {where[name]} and in {manifest.folder}")
            where.setdefault(name, manifest.folder)
    return problems


def _leaks(manifests: list[Manifest], column: str) -> list[str]:
    """Groups, or texts by their hash, that are in training in one corpus and held out in another."""
    held_out: dict[str, tuple[str, Path]] = {}
    problems = []
    for manifest in manifests:
        table = manifest.documents.take(manifest.places("held_out"))
        for value, name in zip(table.strings(column), table.strings("id"), strict=True):
            held_out.setdefault(value, (name, manifest.folder))
    what = {"group": "is of the same group as", "sha256": "has the same text as"}[column]
    for manifest in manifests:
        table = manifest.documents.take(manifest.places("train"))
        for value, name in zip(table.strings(column), table.strings("id"), strict=True):
            if value in held_out and held_out[value][1] != manifest.folder:
                other, folder = held_out[value]
                problems.append(f"document {name} of {manifest.folder} {what} {other}, held out in {folder}")
    return problems


def _take_shards(manifest: Manifest, folder: Path, numbers: Counter[str]) -> dict[str, str]:
    """Link or copy all shards of a corpus under the next free numbers; returns {old name: new name}."""
    names = {}
    for shard in manifest.shards:
        file = manifest.folder / shard.url
        if not file.is_file() or file.stat().st_size != shard.size:
            raise DataError(
                f"shard {shard.url} of {manifest.folder} is missing or not of its {shard.size} bytes. "
                f"See `longspan data verify {manifest.folder}`."
            )
        split = shard.url.rsplit("-", 1)[0]
        names[shard.url] = f"{split}-{numbers[split]:05d}.tar"
        numbers[split] += 1
        try:
            os.link(file, folder / names[shard.url])
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, folder / names[shard.url])
    return names


def _renamed(documents: DocumentTable, names: dict[str, str]) -> pa.Table:
    codes, urls = documents.codes("shard")
    renamed = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array([names[url] for url in urls], pa.string()))
    rows = documents.rows
    return rows.set_column(rows.schema.get_field_index("shard"), "shard", renamed)


def _sources(manifests: list[Manifest]) -> list[SourceEntry]:
    by_name: dict[str, list[SourceEntry]] = {}
    for manifest in manifests:
        for source in manifest.sources:
            by_name.setdefault(source.name, []).append(source)
    return [
        SourceEntry(
            name=name,
            kind="; ".join(dict.fromkeys(source.kind for source in sources)),
            licence="; ".join(dict.fromkeys(source.licence for source in sources)),
            origin="; ".join(dict.fromkeys(source.origin for source in sources)),
        )
        for name, sources in by_name.items()
    ]
