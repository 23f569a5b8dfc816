"""Repeats from far back against a search by hand, and what the result says about them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracles import PLAN, Oracle, documents, scores_of

from longspan.trainer.evaluation import repeats
from longspan.trainer.evaluation.repeats import repeated_tokens
from longspan.trainer.evaluation.result import summarise
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.evaluation.windows import POSITION

SPEC = EvaluationSpec(name="test", context_tokens=PLAN.context_tokens, bootstrap_samples=200)


def by_hand(tokens: list[int], ngram: int, beyond: int) -> list[bool]:
    found = [False] * len(tokens)
    for end in range(ngram - 1, len(tokens)):
        wanted = tokens[end - ngram + 1 : end + 1]
        before = [e for e in range(ngram - 1, end) if tokens[e - ngram + 1 : e + 1] == wanted]
        found[end] = bool(before) and end - before[-1] > beyond
    return found


@pytest.mark.parametrize("ngram", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("beyond", [0, 7, 40])
def test_repeats_are_those_of_a_search_by_hand(ngram: int, beyond: int) -> None:
    rng = np.random.default_rng(ngram)
    phrase = rng.integers(0, 50_000, 30)
    tokens = np.concatenate([rng.integers(0, 3, 60), phrase, rng.integers(0, 50_000, 45), phrase, phrase])
    expected = by_hand(tokens.tolist(), ngram, beyond)
    assert repeated_tokens(tokens, ngram, beyond).tolist() == expected
    assert any(expected)


def test_a_short_document_has_no_repeats() -> None:
    assert not repeated_tokens(np.array([1, 1]), 3, 0).any() and len(repeated_tokens(np.array([1, 1]), 3, 0)) == 2


def test_a_search_that_forgets_the_distance_is_noticed() -> None:
    tokens = np.array([1, 2, 3, 1, 2, 3, 9, 9, 9, 9, 1, 2, 3])
    assert repeated_tokens(tokens, 3, 4).tolist() == by_hand(tokens.tolist(), 3, 4)
    assert repeated_tokens(tokens, 3, 2).tolist() != by_hand(tokens.tolist(), 3, 4)


def test_a_search_for_the_first_token_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.array([1, 2, 3, 9, 9, 9, 9, 1, 2, 4])
    assert not repeated_tokens(tokens, 3, 4).any()
    monkeypatch.setattr(repeats, "_ngram_names", lambda tokens, n: tokens[: len(tokens) - n + 1])
    assert repeated_tokens(tokens, 3, 4).any()


def test_losses_are_divided_into_repeats_and_others_in_every_mode() -> None:
    """Each third token is called a repeat and costs a nat more: the parts differ by that, in every mode and place."""
    docs = documents(repeats=lambda place: place % 3 == 0)
    oracle = Oracle(lambda context: 2.0 + 0 * context, by_place=lambda place: (place % 3 == 0).double())
    oracle.swap_rows = lambda state, permutation, kinds: state  # type: ignore[method-assign]
    scores = scores_of(oracle, docs=docs)
    for score in scores:
        a, b = docs[score.document].spans[score.span] if score.mode != POSITION else (score.context_min, 0)
        stop = b or score.context_max + 1
        count = len([place for place in range(a, stop) if place % 3 == 0])
        assert (score.repeat_tokens, score.repeat_bytes) == (count, count)
        assert score.repeat_nats == pytest.approx(3.0 * count, abs=1e-12)
        assert score.nats == pytest.approx(2.0 * score.tokens + count, abs=1e-12)
    parts = summarise(scores, docs, SPEC, PLAN.window_tokens)["by_repeat"]
    for name, nats in (("repeat", 3.0), ("other", 2.0)):
        for mode in ("carried", "swapped", "local"):
            assert parts[name][mode]["bits_per_byte"] == pytest.approx(nats / math.log(2), abs=1e-12)
        assert all(entry["nats_per_token"] == pytest.approx(nats, abs=1e-12) for entry in parts[name]["curve"])


def test_without_repeats_there_is_no_such_part() -> None:
    parts = summarise(scores_of(Oracle(lambda context: 2.0 + 0 * context)), documents(), SPEC, 16)["by_repeat"]
    assert parts["repeat"] is None and parts["other"]["target_tokens"] == 3 * 96
