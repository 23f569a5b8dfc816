"""Models whose loss is a known function of the context that they were really given.

A token says where it is: document * MILLION + position. So an oracle notices a label that is not the next token, and
a state that comes from another document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from longspan.modeling import state as states
from longspan.trainer.evaluation.scorer import Scorer
from longspan.trainer.evaluation.windows import Plan, Score, ScoredDocument

MILLION = 1_000_000
WRONG = 7.0  # nats for a label that is not the next token
FOREIGN = 0.25  # nats for a state of another document

State = states.State


class Oracle:
    """Loss in float64 nats: of the tokens that the state has seen, those that the cache has, and the target's place."""

    def __init__(
        self,
        by_state: Callable[[Tensor], Tensor],
        by_cache: Callable[[Tensor], Tensor] = lambda context: 0 * context,
        by_place: Callable[[Tensor], Tensor] = lambda place: 0 * place,
        quantum: int = 8,
    ) -> None:
        self.quantum = quantum
        self._by_state, self._by_cache, self._by_place = by_state, by_cache, by_place

    def init_state(self, batch: int, device: torch.device | str) -> State:
        zeros = torch.zeros(batch, 1, dtype=torch.float64)
        return {"memory": {"seen": zeros.clone(), "owner": zeros - 1}, "cache": {"seen": zeros.clone()}}

    def __call__(
        self, tokens: Tensor, state: State, *, reset: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        batch, length = tokens.shape
        assert reset.shape == (batch, -(-length // self.quantum)) and not reset.any()
        documents = (tokens // MILLION).double()
        grown = torch.arange(1, length + 1, dtype=torch.float64)
        nll = self._by_state(state["memory"]["seen"] + grown) + self._by_cache(state["cache"]["seen"] + grown)
        nll = nll + self._by_place((tokens % MILLION + 1).double())
        owner = state["memory"]["owner"]
        nll = nll + FOREIGN * ((owner >= 0) & (owner != documents))
        assert labels is not None
        nll = torch.where(labels == tokens + 1, nll, WRONG)
        nll = torch.where(labels == -100, 0.0, nll)
        kept = torch.where(owner < 0, documents[:, :1], owner)
        memory = {"seen": state["memory"]["seen"] + length, "owner": kept}
        return nll, {"memory": memory, "cache": {"seen": state["cache"]["seen"] + length}}, {}

    def advance(self, tokens: Tensor, state: State, *, reset: Tensor) -> State:
        return self(tokens, state, reset=reset, labels=torch.full_like(tokens, -100))[1]

    def reset_rows(self, state: State, rows: Tensor, kinds: Sequence[str] = ("recurrent", "cache")) -> State:
        assert rows.all()
        initial = self.init_state(len(rows), "cpu")
        return {
            "memory": initial["memory"] if "recurrent" in kinds else state["memory"],
            "cache": initial["cache"] if "cache" in kinds else state["cache"],
        }

    def swap_rows(self, state: State, permutation: Tensor, kinds: Sequence[str] = ("recurrent",)) -> State:
        assert tuple(kinds) == ("recurrent",)
        return {**state, "memory": states.index_select(state["memory"], permutation)}


def flat(most: int) -> Callable[[Tensor], Tensor]:
    """No gain beyond `most` tokens of context."""
    return lambda context: 2.0 + 1.5 / torch.sqrt(context.clamp(max=most) + 1)


def gaining(context: Tensor) -> Tensor:
    """Gains for ever."""
    return 3.0 - 0.05 * torch.log2(context + 1)


def gaining_oracle(quantum: int = 8) -> Oracle:
    """All gain comes from the state; each target costs something of its own."""
    return Oracle(gaining, by_place=lambda place: 0.001 * place, quantum=quantum)


def documents(
    lengths: Sequence[int] = (400, 330, 510),
    first: int = 130,
    span: int = 48,
    token_bytes: Sequence[int] = (1, 1, 1, 1, 1, 1),
    sources: Sequence[str] = ("", "", "", "", "", ""),
    words: Sequence[int | None] = (None, None, None, None, None, None),
    repeats: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[ScoredDocument]:
    """Documents with two spans each, which start off every grid."""
    return [
        ScoredDocument(
            f"doc{d}",
            np.arange(length, dtype=np.int64) + d * MILLION,
            np.full(length, token_bytes[d], dtype=np.int64),
            [(first + 3 * d, first + 3 * d + span), (first + span + 11 * d + 20, first + 2 * span + 11 * d + 20)],
            sources[d],
            np.zeros(0, dtype=bool) if repeats is None else repeats(np.arange(length)),
            words[d],
        )
        for d, length in enumerate(lengths)
    ]


PLAN = Plan(
    modes=("truncated", "carried", "reset", "state_reset", "swapped", "local"),
    context_tokens=(16, 32, 64, 128),
    reset_tokens=(16, 64),
    window_tokens=16,
    stride_tokens=16,
    batch_tokens=4096,
    segment_tokens=64,
)


def scores_of(model: object, plan: Plan = PLAN, docs: list[ScoredDocument] | None = None) -> list[Score]:
    """What the real scorer says."""
    return Scorer(model, documents() if docs is None else docs, plan).run()  # type: ignore[arg-type]
