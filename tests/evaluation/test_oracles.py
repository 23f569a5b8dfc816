"""The real scorer on models whose right answer is known, and proof that it would notice the classic mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import FOREIGN, PLAN, Oracle, documents, flat, gaining, gaining_oracle, scores_of

from longspan.errors import UsageError
from longspan.trainer.evaluation import bootstrap, scorer
from longspan.trainer.evaluation.result import Sums, summarise
from longspan.trainer.evaluation.scorer import Scorer
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.evaluation.token_sums import TokenSums
from longspan.trainer.evaluation.windows import POSITION, WHOLE, Score, score_keys

REMEMBERS = ("carried", "swapped", POSITION)
SPEC = EvaluationSpec(name="test", context_tokens=PLAN.context_tokens, bootstrap_samples=200)
WITHOUT_LOCAL = replace(PLAN, modes=PLAN.modes[:-1])


def assert_flat(scores: list[Score], nats: float, variants: int = 4 + 1 + 2 + 2 + 1 + 1) -> None:
    """Every mode at every length, and every place that has 16 tokens before it, costs `nats` a token."""
    sums = Sums(scores, SPEC)
    assert len(sums.variants) == variants
    for variant in sums.variants:
        assert abs(sums.rate(variant)["nats_per_token"] - nats) < 1e-12, variant
    places = [score for score in scores if score.mode == POSITION and score.span >= 4]
    assert len(places) == 3 * 5
    assert all(abs(score.nats / score.tokens - nats) < 1e-12 for score in places)


def assert_exact(scores: list[Score], nats_of: Callable[[str, int, int], float]) -> None:
    """Each score is the sum of nats_of(mode, position of the target, tokens since its window's start)."""
    docs = documents()
    assert [score.key for score in scores] == score_keys(docs, PLAN)
    assert len(scores) == 3 * 2 * 11 + 3 * 9
    for score in scores:
        a, b = docs[score.document].spans[score.span] if score.mode != POSITION else bucket(score)
        length = score.context_tokens or PLAN.window_tokens
        total, contexts = [], []
        for first in range(a, b, PLAN.stride_tokens):
            start = (first - length) // 8 * 8
            for target in range(first, min(first + PLAN.stride_tokens, b)):
                in_window = (target - 1) % PLAN.segment_tokens + 1 if score.mode == "local" else target - start
                total.append(nats_of(score.mode, target, in_window))
                contexts.append(target if score.mode in WHOLE else target - start)
        assert score.nats == pytest.approx(math.fsum(total), abs=1e-12), score
        assert (score.tokens, score.bytes) == (b - a, b - a)
        assert (score.context_min, score.context_max) == (min(contexts), max(contexts))
        assert score.context_min >= score.context_tokens


def bucket(score: Score) -> tuple[int, int]:
    return 2**score.span, min(2 ** (score.span + 1), len(documents()[score.document].tokens))


def gained(mode: str, position: int, in_window: int) -> float:
    """What `gaining` costs when only the recurrent state counts."""
    context = position if mode in REMEMBERS else in_window
    return 3.0 - 0.05 * math.log2(context + 1) + 0.001 * position + (FOREIGN if mode == "swapped" else 0.0)


def test_without_gain_beyond_the_shortest_context_every_mode_is_flat() -> None:
    nats = 2.0 + 1.5 / math.sqrt(17)
    from_state = Oracle(flat(16))
    from_state.swap_rows = lambda state, permutation, kinds: state  # type: ignore[method-assign]
    assert_flat(scores_of(from_state, WITHOUT_LOCAL), nats, 10)  # `local` takes the last tokens from the state too
    from_cache = Oracle(lambda context: 0 * context, flat(16))
    from_cache.swap_rows = lambda state, permutation, kinds: state  # type: ignore[method-assign]
    assert_flat(scores_of(from_cache), nats)


def test_the_flat_oracle_is_flat_over_a_whole_long_document() -> None:
    docs = documents(lengths=(40_000, 33_000))
    plan = replace(WITHOUT_LOCAL, modes=("carried",), batch_tokens=1000)
    scores = scores_of(Oracle(flat(16)), plan, docs)
    found = [score.nats / score.tokens for score in scores if score.mode == POSITION and score.span >= 4]
    assert len(found) == 2 * 12 and max(abs(nats - (2.0 + 1.5 / math.sqrt(17))) for nats in found) < 1e-12


def test_a_gain_from_the_state_is_measured_exactly_in_every_mode() -> None:
    assert_exact(scores_of(gaining_oracle()), gained)


def test_a_gain_from_the_cache_alone_survives_state_reset_and_not_reset() -> None:
    def nats(mode: str, position: int, in_window: int) -> float:
        context = position if mode not in ("truncated", "reset") else in_window
        return 2.0 + 3.0 - 0.05 * math.log2(context + 1) + (FOREIGN if mode == "swapped" else 0.0)

    scores = scores_of(Oracle(lambda context: 2.0 + 0 * context, gaining))
    assert_exact(scores, nats)
    result = summarise(scores, documents(), SPEC, PLAN.window_tokens)
    assert result["memory_gain"] == {"context_tokens": 16, "bits_per_byte": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    assert result["reset_gain"][0]["ci_low"] > 0
    assert result["content_gain"]["bits_per_byte"] == pytest.approx(FOREIGN / math.log(2))


@pytest.mark.parametrize("quantum", [1, 16, 64])
def test_other_quanta_round_the_window_down(quantum: int) -> None:
    for score in scores_of(gaining_oracle(quantum)):
        if score.context_tokens:
            assert score.context_tokens <= score.context_min
            assert score.context_max < score.context_tokens + PLAN.stride_tokens + quantum
        if quantum == 1 and score.context_tokens:
            assert (score.context_min, score.context_max) == (score.context_tokens, score.context_tokens + 15)


def test_the_batch_changes_nothing() -> None:
    reference = scores_of(gaining_oracle())
    for batch_tokens in (1, 64, 300, 1100):
        scores = scores_of(gaining_oracle(), replace(PLAN, batch_tokens=batch_tokens))
        assert [replace(score, nats=0.0) for score in scores] == [replace(score, nats=0.0) for score in reference]
        for score, other in zip(scores, reference, strict=True):
            assert abs(score.nats - other.nats) <= 1e-14 * other.nats


def test_progress_rises_to_exactly_one() -> None:
    told: list[float] = []
    Scorer(gaining_oracle(), documents(), replace(PLAN, batch_tokens=600), "cpu", told.append).run()  # type: ignore[arg-type]
    assert told == sorted(told) and told[-1] == 1.0 and len(told) > 10


def test_every_mode_and_length_scores_the_same_targets() -> None:
    per_variant: dict[tuple[str, int], list[tuple[int, int, int, int]]] = {}
    for score in scores_of(gaining_oracle()):
        if score.mode == POSITION:
            continue
        key = (score.mode, score.context_tokens)
        per_variant.setdefault(key, []).append((score.document, score.span, score.tokens, score.bytes))
    assert len(per_variant) == 11
    assert all(targets == per_variant["carried", 0] for targets in per_variant.values())


def test_scores_of_different_targets_are_refused() -> None:
    scores = scores_of(gaining_oracle())
    scores[0].tokens -= 1
    with pytest.raises(Exception, match="other targets"):
        Sums(scores, SPEC)


def test_a_context_longer_than_the_text_before_a_target_is_refused() -> None:
    with pytest.raises(UsageError, match="doc0 has fewer than 256 tokens before it"):
        scores_of(gaining_oracle(), replace(PLAN, context_tokens=(16, 256)))


# Planted mistakes: each must be noticed by the checks above.


def test_targets_off_by_one_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scorer._forward

    def one_late(self, pieces, state, num_targets=0):  # type: ignore[no-untyped-def]
        return right(self, [(d, a + 1, b + 1) for d, a, b in pieces], state, num_targets)

    monkeypatch.setattr(Scorer, "_forward", one_late)
    with pytest.raises(AssertionError):
        assert_exact(scores_of(gaining_oracle()), gained)


def test_labels_off_by_one_are_noticed() -> None:
    class OwnToken(Oracle):
        def __call__(self, tokens, state, *, reset, labels=None):  # type: ignore[no-untyped-def]
            return super().__call__(tokens, state, reset=reset, labels=torch.where(labels >= 0, labels - 1, labels))

    with pytest.raises(AssertionError):
        assert_exact(scores_of(OwnToken(gaining, by_place=lambda place: 0.001 * place)), gained)


@pytest.mark.parametrize("leaked", ["memory", "cache"])
def test_a_state_that_leaks_through_a_reset_is_noticed(leaked: str) -> None:
    class Leaky(Oracle):
        def reset_rows(self, state, rows, kinds=("recurrent", "cache")):  # type: ignore[no-untyped-def]
            return {**super().reset_rows(state, rows, kinds), leaked: state[leaked]}

    def from_both(mode: str, position: int, in_window: int) -> float:
        kept = position if mode not in ("truncated", "reset") else in_window
        return gained(mode, position, in_window) + gained("reset", 0, kept)

    assert_exact(scores_of(Oracle(gaining, gaining, lambda place: 0.001 * place)), from_both)
    with pytest.raises(AssertionError):
        assert_exact(scores_of(Leaky(gaining, gaining, lambda place: 0.001 * place)), from_both)


def test_a_state_that_leaks_between_documents_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scorer._copy_states

    def wrong_row(self, windows, rows, state, batches):  # type: ignore[no-untyped-def]
        right(self, windows, rows, scorer.states.tree_map(lambda leaf: leaf.roll(1, 0), state), batches)

    monkeypatch.setattr(Scorer, "_copy_states", wrong_row)
    with pytest.raises(AssertionError):
        assert_exact(scores_of(gaining_oracle()), gained)


def test_a_local_stream_that_is_not_cleared_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scorer._local_stream
    monkeypatch.setattr(Scorer, "_local_stream", lambda self, group: replace(right(self, group), clear_every=10**6))
    with pytest.raises(AssertionError):
        assert_exact(scores_of(gaining_oracle()), gained)


def test_places_off_by_one_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TokenSums.add
    monkeypatch.setattr(TokenSums, "add", lambda self, nll, rows, first: right(self, nll, rows, first - 1))
    with pytest.raises(AssertionError):
        assert_exact(scores_of(gaining_oracle()), gained)


def test_clearing_once_a_span_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(PLAN, stride_tokens=48)  # the whole span in one window: its context grows from L to L + span
    with pytest.raises(AssertionError):
        assert_exact(scores_of(gaining_oracle(), wide), gained)


def test_rates_are_ratios_of_sums_and_a_mean_of_means_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(token_bytes=(1, 2, 5))  # documents of different weight
    scores = scores_of(gaining_oracle(), docs=docs)
    nats = sum(score.nats for score in scores if score.mode == "carried")
    wanted = nats / (math.log(2) * 96 * (1 + 2 + 5))

    def assert_right() -> None:
        assert Sums(scores, SPEC).rate(("carried", 0))["bits_per_byte"] == pytest.approx(wanted, abs=1e-12)

    assert_right()

    def mean_of_means(self, nats):  # type: ignore[no-untyped-def]
        value = float(np.mean(nats / self._bytes)) / math.log(2)
        return bootstrap.Interval(value, value, value)

    monkeypatch.setattr(bootstrap.DocumentBootstrap, "rate", mean_of_means)
    with pytest.raises(AssertionError):
        assert_right()
