"""Which rank the others wait for, worked out from what all ranks say of their collectives. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Told = Mapping[int, Mapping[str, Any]]
_MOST_NAMED = 8


@dataclass(frozen=True)
class Blame:
    """Ranks that hold the others up, a sentence that names the collective, and whether ranks asked for different
    things in one call: they cannot go on then, however long one waits."""

    culprits: tuple[int, ...]
    sentence: str
    is_disagreement: bool = False


def blame(told: Told) -> Blame | None:
    """Compare the ranks' collectives, as `Recorder.told` gives them.

    In order: ranks that asked for different things in the same call of a group (in the earliest such call those in
    the minority are named, all if there is none); ranks that others wait for and that wait for nobody; ranks that
    wait for each other.

    Args:
        told: of each rank; without an entry for ranks that have said nothing.

    Returns:
        None if nothing shows.
    """
    return _disagreement(told) or _missing(told)


def _disagreement(told: Told) -> Blame | None:
    """The first call that the ranks of a group disagree in."""
    for group, members in _groups(told).items():
        asked: dict[int, dict[int, str]] = defaultdict(dict)
        for rank in members:
            for number, text in told[rank]["groups"][group]["calls"]:
                asked[number][rank] = text
        for number, texts in sorted(asked.items()):
            kinds = Counter(texts.values()).most_common()
            if len(kinds) == 1:
                continue
            is_majority = kinds[0][1] > kinds[1][1]
            culprits = [rank for rank, text in texts.items() if not is_majority or text != kinds[0][0]]
            calls = "; ".join(
                f"{_ranks([rank for rank in texts if texts[rank] == text])} called {text}" for text, _ in kinds
            )
            name = told[members[0]]["groups"][group]["name"]
            sentence = f"The ranks disagree about call {number} of {name}: {calls}."
            return Blame(tuple(sorted(culprits)), sentence, is_disagreement=True)
    return None


def _missing(told: Told) -> Blame | None:
    waits = _waits(told)
    if not waits:
        return None
    waited_for = {missing for edges in waits.values() for missing in edges}
    # who waits for nobody holds the others up; if all wait, some wait for each other
    culprits = sorted(waited_for - waits.keys()) or sorted(_in_circles(waits))
    sentences = []
    for culprit in culprits[:_MOST_NAMED]:
        by_call: dict[str, list[int]] = defaultdict(list)
        for rank, edges in waits.items():
            if culprit in edges:
                by_call[edges[culprit]].append(rank)
        sentences += [
            f"Rank {culprit} has not entered {call}, in which {_ranks(ranks)} wait{'s' if len(ranks) == 1 else ''}."
            for call, ranks in by_call.items()
        ]
    return Blame(tuple(culprits), " ".join(sentences))


def _waits(told: Told) -> dict[int, dict[int, str]]:
    """Of each rank that waits: whom for, and the call. Ranks known to be in no call wait for nobody; where that is
    known of none (GPUs take calls and compute them later), whoever is ahead in a group waits for those behind."""
    groups = _groups(told)
    known = any(said["waits"] for said in told.values())
    waits: dict[int, dict[int, str]] = defaultdict(dict)
    for rank, said in told.items():
        for group, number, text, peer in said["waits"] if known else _newest(said):
            if group not in said["groups"]:
                continue
            call = f"call {number} of {said['groups'][group]['name']}, {text}"
            if peer is not None:
                if peer in told and told[peer]["sent"].get(f"{group}:{rank}", 0) < number:
                    waits[rank].setdefault(peer, call)
                continue
            for member in groups[group]:
                if told[member]["groups"][group]["count"] < number:
                    waits[rank].setdefault(member, call)
    return dict(waits)


def _newest(said: Mapping[str, Any]) -> list[tuple[str, int, str, None]]:
    """The last collective of each group."""
    return [(group, *found["calls"][-1], None) for group, found in said["groups"].items() if found["calls"]]


def _groups(told: Told) -> dict[str, list[int]]:
    """The ranks of each group, of those that have said something."""
    found: dict[str, list[int]] = defaultdict(list)
    for rank, said in sorted(told.items()):
        for group in said["groups"]:
            found[group].append(rank)
    return found


def _in_circles(waits: Mapping[int, Mapping[int, str]]) -> set[int]:
    """Ranks that wait, over others, for themselves."""

    def reach(rank: int) -> set[int]:
        seen: set[int] = set()
        front = list(waits.get(rank, ()))
        while front:
            next_one = front.pop()
            if next_one not in seen:
                seen.add(next_one)
                front += waits.get(next_one, ())
        return seen

    return {rank for rank in waits if rank in reach(rank)}


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:_MOST_NAMED]))
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
