"""Where two modes must agree to the last bit: models without positions, models without state, and what breaks it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import MILLION, PLAN, documents
from torch import Tensor
from torch.nn import functional as F

from longspan.modeling import state as states
from longspan.trainer.evaluation.scorer import Scorer
from longspan.trainer.evaluation.windows import Score

VOCAB = 23
MOST = 640  # tokens of the longest document


class FullAttention:
    """One layer of causal attention over the whole document, float64; with or without absolute positions.

    Keys and values are a cache; the place in the document, which no mode may clear, is neither cache nor recurrent.
    """

    quantum = 8

    def __init__(self, positions: bool, reach: int = MOST) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.embedding, self.positions = draw(VOCAB, 12), draw(MOST, 12) * float(positions)
        self.query, self.key, self.value = draw(12, 12), draw(12, 12), draw(12, 12)
        self.reach = reach

    def init_state(self, batch: int, device: Any) -> dict[str, Any]:
        empty = torch.zeros(batch, MOST, 12, dtype=torch.float64)
        count = torch.zeros(batch, dtype=torch.int64)
        return {"cache": {"keys": empty, "values": empty.clone(), "held": count}, "place": {"now": count.clone()}}

    def __call__(
        self, tokens: Tensor, state: dict[str, Any], *, reset: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
        length, cache, place = tokens.shape[1], state["cache"], state["place"]["now"]
        x = self.embedding[tokens % VOCAB] + self.positions[place[:, None] + torch.arange(length)]
        keys = torch.cat([cache["keys"], x @ self.key], dim=1)  # the newest is last
        values = torch.cat([cache["values"], x @ self.value], dim=1)
        scores = (x @ self.query) @ keys.transpose(1, 2) / math.sqrt(12)
        distance = (torch.arange(length) + MOST)[:, None] - torch.arange(MOST + length)
        held = torch.arange(MOST + length) >= MOST - cache["held"][:, None, None]
        scores = scores.masked_fill((distance < 0) | (distance >= self.reach) | ~held, -math.inf)
        logits = scores.softmax(-1) @ values @ self.embedding.t()
        nll = F.cross_entropy(logits.flatten(0, 1), (labels % VOCAB).flatten(), reduction="none").view(labels.shape)
        cache = {"keys": keys[:, -MOST:], "values": values[:, -MOST:], "held": cache["held"] + length}
        return torch.where(labels < 0, 0.0, nll), {"cache": cache, "place": {"now": place + length}}, {}

    def advance(self, tokens: Tensor, state: dict[str, Any], *, reset: Tensor) -> Any:
        return self(tokens, state, reset=reset, labels=torch.full_like(tokens, -100))[1]

    def reset_rows(self, state: dict[str, Any], rows: Tensor, kinds: Sequence[str] = ()) -> dict[str, Any]:
        initial = self.init_state(len(rows), "cpu")
        return {"cache": initial["cache"] if "cache" in kinds else state["cache"], "place": state["place"]}

    def swap_rows(self, state: dict[str, Any], permutation: Tensor, kinds: Sequence[str] = ()) -> dict[str, Any]:
        return state


def by_mode(model: FullAttention, batch_tokens: int = 4096, **changes: Any) -> dict[tuple[str, int], list[float]]:
    plan = replace(PLAN, **{"modes": ("truncated", "carried", "reset"), "batch_tokens": batch_tokens, **changes})
    found: dict[tuple[str, int], list[float]] = {}
    scores: list[Score] = Scorer(model, documents(), plan).run()  # type: ignore[arg-type]
    for score in scores:
        found.setdefault((score.mode, score.context_tokens), []).append(score.nats)
    return found


def test_full_attention_without_positions_is_reset_to_truncated_exactly() -> None:
    found = by_mode(FullAttention(positions=False))
    for length in PLAN.reset_tokens:
        assert found["reset", length] == found["truncated", length]
        assert found["reset", length] != found["carried", 0]


def test_absolute_positions_tell_reset_from_truncated() -> None:
    found = by_mode(FullAttention(positions=True))
    assert all(found["reset", length] != found["truncated", length] for length in PLAN.reset_tokens)


def test_a_cache_that_leaks_through_a_reset_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FullAttention, "reset_rows", lambda self, state, rows, kinds: state)
    found = by_mode(FullAttention(positions=False))
    assert all(found["reset", length] != found["truncated", length] for length in PLAN.reset_tokens)


@pytest.mark.parametrize("batch_tokens", [4096, 40])
def test_a_model_that_sees_32_tokens_is_truncated_there_to_carried(batch_tokens: int) -> None:
    """And at every longer context; a token less of context shows."""
    found = by_mode(FullAttention(positions=False, reach=32), batch_tokens)
    for length in (32, 64, 128):
        assert found["truncated", length] == pytest.approx(found["carried", 0], abs=1e-11)
    assert found["truncated", 16] != pytest.approx(found["carried", 0], abs=1e-3)
    quantum_one = FullAttention(positions=False, reach=32)
    quantum_one.quantum = 1
    # the first target of a window has L tokens before it, of which attention from the last one sees 32
    exact = by_mode(quantum_one, context_tokens=(31, 32), reset_tokens=(32,), stride_tokens=1)
    assert exact["truncated", 32] == pytest.approx(exact["carried", 0], abs=1e-11)
    assert exact["truncated", 31] != pytest.approx(exact["carried", 0], abs=1e-6)


def test_long_windows_run_in_segments_to_the_same_losses() -> None:
    whole, pieces = (by_mode(FullAttention(positions=True), size) for size in (4096, 24))
    assert whole.keys() == pieces.keys()
    for variant, nats in whole.items():
        assert pieces[variant] == pytest.approx(nats, abs=1e-10), variant


def test_a_stride_that_grows_with_the_context_keeps_at_least_that_context() -> None:
    plan = replace(PLAN, modes=("truncated", "carried"), stride_tokens=4, stride_share=0.25)
    assert [plan.stride_at(length) for length in (8, 16, 64, 128)] == [4, 4, 16, 32]
    scores = Scorer(FullAttention(positions=False, reach=16), documents(), plan).run()  # type: ignore[arg-type]
    carried = [score.nats for score in scores if score.mode == "carried"]
    for length in PLAN.context_tokens:
        mine = [score for score in scores if (score.mode, score.context_tokens) == ("truncated", length)]
        assert all(length <= score.context_min <= score.context_max < 1.25 * length + 8 + 4 for score in mine)
        assert [score.nats for score in mine] == pytest.approx(carried, abs=1e-11)


def test_states_of_the_test_models_are_trees() -> None:
    state = FullAttention(positions=True).init_state(2, "cpu")
    assert set(states.pack(state)) == {"cache.keys", "cache.values", "cache.held", "place.now"} and MOST < MILLION
