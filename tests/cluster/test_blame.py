"""Which rank the others wait for, from what all of them say of their collectives."""

from __future__ import annotations

from typing import Any

from longspan.cluster.blame import blame

ALL, TENSOR, CONTEXT = "0", "1", "2"


def rank(counts: dict[str, int], inside: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """A rank whose calls were all alike so far, and that is inside of the last one of some groups."""
    groups = {
        group: {"name": f"group {group}", "count": count, "calls": [[n, "all_reduce"] for n in range(1, count + 1)]}
        for group, count in counts.items()
    }
    pending = [[group, counts[group], "all_reduce", None] for group in inside]
    return {"groups": groups, "sent": {}, "received": {}, "waits": pending} | more


def test_the_rank_that_has_not_entered_a_call_is_named_with_it() -> None:
    found = blame({0: rank({ALL: 5}, (ALL,)), 1: rank({ALL: 4}), 2: rank({ALL: 5}, (ALL,))})
    assert found is not None and found.culprits == (1,) and not found.is_disagreement
    assert found.sentence == "Rank 1 has not entered call 5 of group 0, all_reduce, in which ranks 0, 2 wait."


def test_who_waits_for_another_is_not_blamed() -> None:
    """0 and 1 wait for 2 and 3 in all; 2 waits for 3 in its own group."""
    told = {
        0: rank({ALL: 5, CONTEXT: 9}, (ALL,)),
        1: rank({ALL: 5, CONTEXT: 9}, (ALL,)),
        2: rank({ALL: 4, TENSOR: 7}, (TENSOR,)),
        3: rank({ALL: 4, TENSOR: 6}),
    }
    found = blame(told)
    assert found is not None and found.culprits == (3,)
    assert "call 7 of group 1, all_reduce, in which rank 2 waits" in found.sentence


def test_ranks_that_wait_for_each_other_are_both_named() -> None:
    """3 left a call of its own group out and waits in the next of all; 2 waits for it."""
    told = {
        0: rank({ALL: 5}, (ALL,)),
        2: rank({ALL: 4, TENSOR: 7}, (TENSOR,)),
        3: rank({ALL: 5, TENSOR: 6}, (ALL,)),
    }
    found = blame(told)
    assert found is not None and found.culprits == (2, 3)
    assert "Rank 3 has not entered call 7 of group 1, all_reduce, in which rank 2 waits." in found.sentence
    assert "Rank 2 has not entered call 5 of group 0, all_reduce, in which ranks 0, 3 wait." in found.sentence


def test_a_message_that_was_not_sent() -> None:
    waiting = {"waits": [[CONTEXT, 3, "irecv from rank 1 of 8 bytes", 1]]}
    told = {0: rank({CONTEXT: 2}, **waiting), 1: rank({CONTEXT: 2}, sent={f"{CONTEXT}:0": 2})}
    found = blame(told)
    assert found is not None and found.culprits == (1,)
    assert "Rank 1 has not entered call 3 of group 2, irecv from rank 1 of 8 bytes, in which rank 0" in found.sentence
    told[1]["sent"] = {f"{CONTEXT}:0": 3}
    assert blame(told) is None, "it is under way"


def test_the_minority_of_a_disagreement_is_named() -> None:
    told = {number: rank({ALL: 5}, (ALL,)) for number in range(3)}
    told[1]["groups"][ALL]["calls"][2] = [3, "broadcast"]
    found = blame(told)
    assert found is not None and found.culprits == (1,) and found.is_disagreement
    text = "The ranks disagree about call 3 of group 0: ranks 0, 2 called all_reduce; rank 1 called broadcast."
    assert found.sentence == text


def test_of_two_that_disagree_both_are_named() -> None:
    told = {number: rank({ALL: 2}, (ALL,)) for number in range(2)}
    told[1]["groups"][ALL]["calls"][1] = [2, "broadcast"]
    found = blame(told)
    assert found is not None and found.culprits == (0, 1)


def test_when_calls_return_before_they_are_done_the_rank_that_is_behind_is_named() -> None:
    """On GPUs: nobody knows of a call that it waits in."""
    found = blame({0: rank({ALL: 5}), 1: rank({ALL: 4}), 2: rank({ALL: 5})})
    assert found is not None and found.culprits == (1,)


def test_nothing_shows() -> None:
    assert blame({}) is None
    assert blame({0: rank({ALL: 5}, (ALL,)), 1: rank({ALL: 5}, (ALL,))}) is None
    assert blame({0: rank({ALL: 5}, (ALL,))}) is None, "the others have said nothing"
