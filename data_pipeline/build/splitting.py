"""Which documents belong together, and which of them training never sees. Groups come first, splits second."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.data_pipeline.build.reading import Document
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.data_pipeline.manifest import Split, did_you_mean
from longspan.errors import UsageError

_MOST_LISTED = 20


@dataclass(frozen=True)
class Splitting:
    """What becomes of each document.

    Attributes:
        group: of each document. split: of each document; None: left out of the corpus.
        duplicates: figures for the statistics. notes: what the reader of the summary should know.
        left_out: {source: {reason: (count, example)}}.
    """

    group: list[str]
    split: list[Split | None]
    duplicates: dict[str, Any]
    notes: list[str]
    left_out: dict[str, dict[str, tuple[int, str]]]


def check_held_out(config: CorpusConfig, documents: Sequence[Document]) -> None:
    """Refuse a list of held-out documents with one that does not exist.

    Raises:
        UsageError: names them, and the nearest ids that there are.
    """
    known = {document.id for document in documents}
    unknown = [name for name in config.held_out if name not in known]
    if unknown:
        ids = [document.id for document in documents]
        lines = [f"  held_out: no document {name}{did_you_mean(name, ids)}" for name in unknown[:_MOST_LISTED]]
        if len(unknown) > len(lines):
            lines.append(f"  and {len(unknown) - len(lines)} more")
        listed = "\n".join(lines)
        raise UsageError(f"the recipe holds out documents that do not exist:\n{listed}\nIds are SOURCE/NAME.")


def split_documents(config: CorpusConfig, documents: Sequence[Document], similar: list[list[int]]) -> Splitting:
    """Join near-duplicates, copies and the recipe's groups, then hold out whole groups.

    Args:
        documents: of all sources; `config.held_out` names only ids of these.
        similar: places in `documents` of near-duplicates, a list for each group of them.

    Raises:
        UsageError: no training document is left.
    """
    place = {document.id: index for index, document in enumerate(documents)}
    copies = _copies(documents)
    named = [[place[member] for member in members if member in place] for members in config.groups.values()]
    groups = _components(len(documents), [*named, *copies, *similar])
    listed = {place[name] for name in config.held_out}
    split: list[Split | None] = ["train"] * len(documents)
    why_out: dict[int, str] = {}
    beside: list[str] = []
    for members in groups:
        chosen = [member for member in members if member in listed]
        if _drawn([documents[member].id for member in members], config.split.held_out_fraction):
            chosen = list(members)
        for member in members:
            if member in chosen or (chosen and config.split.duplicates == "hold_out"):
                split[member] = "held_out"
            elif chosen and config.split.duplicates == "leave_out":
                split[member] = None
                why_out[member] = "near-duplicates of held-out documents"
            if chosen and member not in chosen:
                beside.append(f"{documents[member].id}, near {documents[chosen[0]].id}")
    if config.dedupe.exact == "leave_out":
        for members in copies:
            keep = min(members, key=lambda member: (split[member] != "held_out", member not in listed, member))
            for member in members:
                if member != keep and split[member] is not None:
                    split[member] = None
                    why_out[member] = "copies of other documents"
    _check_training(split, len(documents))
    group = _names(config, documents, groups)
    left_out: dict[str, dict[str, tuple[int, str]]] = {}
    for member, reason in why_out.items():
        cell = left_out.setdefault(config.sources[documents[member].source].name, {})
        count, example = cell.get(reason, (0, documents[member].id))
        cell[reason] = (count + 1, example)
    duplicates = _figures(config, documents, groups, copies, beside)
    return Splitting(group, split, duplicates, _notes(config, set(place), split, beside), left_out)


def _copies(documents: Sequence[Document]) -> list[list[int]]:
    """Places of documents with the same text."""
    by_text: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        by_text.setdefault(document.sha256, []).append(index)
    return [members for members in by_text.values() if len(members) > 1]


def _components(count: int, sets: Iterable[list[int]]) -> list[list[int]]:
    """The places 0 to `count` joined by `sets`: every component, in order of its first member."""
    parents = list(range(count))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for members in sets:
        for member in members[1:]:
            first, second = sorted((root(members[0]), root(member)))
            parents[second] = first
    components: dict[int, list[int]] = {}
    for index in range(count):
        components.setdefault(root(index), []).append(index)
    return list(components.values())


def _drawn(ids: list[str], fraction: float) -> bool:
    """Whether a group is in the held-out share: by a hash, so that it stays where it is when others come or go."""
    if not fraction:
        return False
    digest = hashlib.blake2b(min(ids).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _names(config: CorpusConfig, documents: Sequence[Document], groups: list[list[int]]) -> list[str]:
    """Group of each document: the recipe's name for it, else the id of its first member."""
    given = {member: name for name, members in config.groups.items() for member in members}
    result = [document.id for document in documents]
    for members in groups:
        names = sorted({given[documents[member].id] for member in members if documents[member].id in given})
        for member in members:
            result[member] = "+".join(names) if names else documents[members[0]].id
    return result


def _check_training(split: list[Split | None], count: int) -> None:
    if "train" not in split:
        kept = sum(value is not None for value in split)
        what = f"all {count} documents are held out" if kept == count else f"{kept} of {count} documents are held out"
        rest = "" if kept == count else f" and {count - kept} left out"
        raise UsageError(f"zero training documents: {what}{rest}. Take some off `held_out`, or add text.")


def _figures(
    config: CorpusConfig,
    documents: Sequence[Document],
    groups: list[list[int]],
    copies: list[list[int]],
    beside: list[str],
) -> dict[str, Any]:
    several = sorted((members for members in groups if len(members) > 1), key=len, reverse=True)
    rule = config.dedupe.model_dump(mode="json", exclude={"exact"}) if config.dedupe.enabled else None
    return {
        "rule": rule,
        "groups": len(several),
        "documents_in_groups": sum(map(len, several)),
        "copies": sum(len(members) - 1 for members in copies),
        "near_held_out": beside[:_MOST_LISTED],
        "num_near_held_out": len(beside),
        "largest_groups": [
            [documents[member].id for member in members[:_MOST_LISTED]] for members in several[:_MOST_LISTED]
        ],
    }


def _notes(config: CorpusConfig, known: set[str], split: list[Split | None], beside: list[str]) -> list[str]:
    missing = [(name, member) for name, members in config.groups.items() for member in members if member not in known]
    notes = [f"group {name}: this corpus has no document {member}" for name, member in missing]
    done = {"hold_out": "held out too", "leave_out": "left out", "train": "trained on, as the recipe says"}
    for line in beside[:_MOST_LISTED]:
        notes.append(f"{line}: {done[config.split.duplicates]}")
    if len(beside) > _MOST_LISTED:
        notes.append(f"and {len(beside) - _MOST_LISTED} more near-duplicates of held-out documents")
    if "held_out" not in split:
        notes.append("no document is held out: validation and evaluation will have nothing to score")
    return notes
