"""Negative log-likelihood of fixed targets under different contexts, for any model with explicit state.

Documents stream from token 0 in lock-step. Where a window starts, the streamed state is copied; each mode then
changes its copy in its own way and scores the same targets from there:

    truncated    initial state
    carried      the streamed state as it is
    reset        recurrent states, memories and window caches back at their initial value
    state_reset  recurrent states and memories back at their initial value, window caches kept
    swapped      recurrent states and memories of another document at the same position, window caches kept

State is cleared `L` tokens before every piece of `stride` targets, not once a span: a span-wide reset would let the
context grow from L to L + span. Modes whose states are bit for bit the same run once, which makes the gain of
a model without trained memory exactly zero.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longspan.modeling import state as states
from longspan.trainer.evaluation.windows import (
    STREAM_TOKENS,
    Plan,
    Score,
    ScoredDocument,
    Window,
    all_windows,
    donors_of,
    stream_stops,
)

State = dict[str, Any]
NO_LABEL = -100

NEEDS_STREAM = ("carried", "reset", "state_reset", "swapped")


class Model(Protocol):
    """What is asked of a model; `longspan.modeling.model.LanguageModel` is one."""

    quantum: int

    def __call__(
        self, tokens: Tensor, state: State, *, reset: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """Nats [B, T] of labels [B, T] (0 where -100), the new state, auxiliary losses."""

    def init_state(self, batch: int, device: torch.device | str) -> State:
        """State at a document start."""

    def reset_rows(self, state: State, rows: Tensor, kinds: tuple[str, ...] = ...) -> State:
        """Tensors of these kinds at their initial value in rows bool [B]."""

    def swap_rows(self, state: State, permutation: Tensor, kinds: tuple[str, ...] = ...) -> State:
        """Tensors of these kinds of row i from row permutation[i], int64 [B]; a row may be taken twice."""


@dataclass
class _Pending:
    """Windows of equal shape that wait for a full batch, with their copies of the streamed state."""

    windows: list[Window] = field(default_factory=list)
    carried: list[State] = field(default_factory=list)
    swapped: list[State] = field(default_factory=list)


class Scorer:
    """Scores documents with one model; sums are exact float64 sums, so batching does not change them."""

    def __init__(
        self,
        model: Model,
        documents: Sequence[ScoredDocument],
        plan: Plan,
        device: torch.device | str = "cpu",
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Lay out the windows.

        Args:
            model: in evaluation mode, on `device`.
            documents: with their targets.
            plan: modes and context lengths.
            device: where the model is.
            progress: called with the fraction of the tokens that are done.

        Raises:
            UsageError: a target has fewer tokens before it than a context length asks for.
        """
        self._model = model
        self._documents = documents
        self._plan = plan
        self._device = torch.device(device)
        self._progress = progress or (lambda fraction: None)
        self._nats: dict[tuple[int, int, str, int], list[float]] = defaultdict(list)
        self._scores: dict[tuple[int, int, str, int], Score] = {}
        self._done_tokens = 0
        self._donors = donors_of(documents) if "swapped" in plan.modes else {}
        self._windows = all_windows(documents, plan, model.quantum)
        self._groups = [self._stream_plan(group) for group in self._stream_groups()]
        self._all_tokens = sum(sum(ends.values()) for _, ends in self._groups)
        self._all_tokens += sum(w.num_inputs * len(plan.modes_at(w.length)) for w in self._windows)

    def run(self) -> list[Score]:
        """Score everything, in the order document, span, mode, length."""
        with torch.inference_mode():
            self._run_fresh()
            for starts, ends in self._groups:
                self._stream(starts, ends)
        for key, score in self._scores.items():
            score.nats = math.fsum(self._nats[key])
        return [self._scores[key] for key in sorted(self._scores)]

    def _needs_stream(self, window: Window) -> bool:
        return any(mode in NEEDS_STREAM for mode in self._plan.modes_at(window.length))

    def _run_fresh(self) -> None:
        """Windows that only need an initial state."""
        batches: dict[tuple[int, int, int], _Pending] = defaultdict(_Pending)
        for window in self._windows:
            if not self._needs_stream(window):
                self._add(batches, window)
        self._flush_all(batches)

    def _stream_groups(self) -> list[set[int]]:
        """Documents that stream together: neighbours in length, so that few rows run on alone."""
        order = sorted(range(len(self._documents)), key=lambda d: (len(self._documents[d].tokens), d))
        rows = max(1, self._plan.batch_tokens // STREAM_TOKENS)
        return [set(order[i : i + rows]) for i in range(0, len(order), rows)]

    def _stream_plan(self, group: set[int]) -> tuple[dict[int, list[Window]], dict[int, int]]:
        """For one group: the windows by start, and how far each of its documents and their donors have to stream."""
        starts: dict[int, list[Window]] = defaultdict(list)
        ends: dict[int, int] = {}
        for window in self._windows:
            if window.document in group and self._needs_stream(window):
                starts[window.start].append(window)
                for document in {window.document, self._donors.get(window.document, window.document)}:
                    ends[document] = max(ends.get(document, 0), window.start)
        return starts, ends

    def _stream(self, starts: dict[int, list[Window]], ends: dict[int, int]) -> None:
        """Stream documents from token 0 to their ends, copying states where windows start."""
        rows = sorted(ends)
        state = self._model.init_state(len(rows), self._device)
        batches: dict[tuple[int, int, int], _Pending] = defaultdict(_Pending)
        position = 0
        for stop in stream_stops(starts, self._model.quantum):
            alive = [i for i, document in enumerate(rows) if ends[document] >= stop]
            if len(alive) < len(rows):
                rows = [rows[i] for i in alive]
                state = states.index_select(state, torch.tensor(alive, device=self._device))
            if stop > position:
                state = self._forward([(d, position, stop) for d in rows], state)[1]
                self._advance(len(rows) * (stop - position))
                position = stop
            self._copy_states(starts.get(stop, []), rows, state, batches)
        self._flush_all(batches)

    def _copy_states(
        self, windows: list[Window], rows: list[int], state: State, batches: dict[tuple[int, int, int], _Pending]
    ) -> None:
        if not windows:
            return
        place = {document: i for i, document in enumerate(rows)}
        swapped = state
        if any("swapped" in self._plan.modes_at(window.length) for window in windows):
            donors = [place.get(self._donors[document], i) for document, i in place.items()]
            swapped = self._model.swap_rows(state, torch.tensor(donors, device=self._device), kinds=("recurrent",))
        for window in windows:
            row = torch.tensor([place[window.document]], device=self._device)
            swap = "swapped" in self._plan.modes_at(window.length)
            self._add(
                batches, window, states.index_select(state, row), states.index_select(swapped, row) if swap else None
            )

    def _add(
        self,
        batches: dict[tuple[int, int, int], _Pending],
        window: Window,
        carried: State | None = None,
        swapped: State | None = None,
    ) -> None:
        """Queue a window with others of its shape; run them when they fill a batch."""
        shape = (window.length, window.num_inputs, window.stop - window.first)
        pending = batches[shape]
        pending.windows.append(window)
        if carried is not None:
            pending.carried.append(carried)
        if swapped is not None:
            pending.swapped.append(swapped)
        if (len(pending.windows) + 1) * window.num_inputs > self._plan.batch_tokens:
            self._flush(batches.pop(shape))

    def _flush_all(self, batches: dict[tuple[int, int, int], _Pending]) -> None:
        for shape in sorted(batches):
            self._flush(batches[shape])
        batches.clear()

    def _flush(self, pending: _Pending) -> None:
        """Score a batch of windows in each of their modes; equal states are run once."""
        windows = pending.windows
        run: list[tuple[dict[str, Tensor], list[float]]] = []
        for mode, state in self._mode_states(pending):
            packed = states.pack(state)
            nats = next((known for other, known in run if _equal(packed, other)), None)
            if nats is None:
                nats = self._nats_of(windows, state)
                run.append((packed, nats))
            for window, value in zip(windows, nats, strict=True):
                self._record(window, mode, value)
            self._advance(len(windows) * windows[0].num_inputs)

    def _advance(self, tokens: int) -> None:
        self._done_tokens += tokens
        self._progress(self._done_tokens / self._all_tokens)

    def _mode_states(self, pending: _Pending) -> list[tuple[str, State]]:
        modes = self._plan.modes_at(pending.windows[0].length)
        rows = torch.ones(len(pending.windows), dtype=torch.bool, device=self._device)
        carried = _cat(pending.carried) if pending.carried else {}
        make: dict[str, Callable[[], State]] = {
            "truncated": lambda: self._model.init_state(len(rows), self._device),
            "carried": lambda: carried,
            "reset": lambda: self._model.reset_rows(carried, rows, kinds=("recurrent", "cache")),
            "state_reset": lambda: self._model.reset_rows(carried, rows, kinds=("recurrent",)),
            "swapped": lambda: _cat(pending.swapped),
        }
        return [(mode, make[mode]()) for mode in modes]

    def _nats_of(self, windows: list[Window], state: State) -> list[float]:
        """Sum of nats of each window's targets."""
        num_targets = windows[0].stop - windows[0].first
        nll = self._forward([(w.document, w.start, w.stop - 1) for w in windows], state, num_targets)[0]
        return [float(value) for value in nll[:, -num_targets:].double().cpu().contiguous().sum(dim=1)]

    def _forward(self, pieces: list[tuple[int, int, int]], state: State, num_targets: int = 0) -> tuple[Tensor, State]:
        """Run inputs [start, stop) of documents, all of one length, asking for the last `num_targets` labels."""
        rows = np.stack([self._documents[d].tokens[start : stop + 1] for d, start, stop in pieces])
        tokens = torch.from_numpy(rows).to(self._device)
        length = tokens.shape[1] - 1
        labels = torch.full((len(pieces), length), NO_LABEL, dtype=torch.int64, device=self._device)
        if num_targets:
            labels[:, -num_targets:] = tokens[:, -num_targets:]
        reset = torch.zeros(
            (len(pieces), -(-length // self._model.quantum)), dtype=torch.bool, device=self._device
        )  # documents start in the initial state, so nothing is left to reset
        nll, new_state, _ = self._model(tokens[:, :-1].contiguous(), state, reset=reset, labels=labels)
        return nll, new_state

    def _record(self, window: Window, mode: str, nats: float) -> None:
        whole = mode in ("carried", "swapped")
        key = (window.document, window.span, mode, 0 if whole else window.length)
        low, high = (0 if whole else window.start), window.stop - 1
        if key not in self._scores:
            self._scores[key] = Score(*key, context_min=window.first - low, context_max=high - low)
        score = self._scores[key]
        score.tokens += window.stop - window.first
        score.bytes += int(self._documents[window.document].token_bytes[window.first : window.stop].sum())
        score.context_min = min(score.context_min, window.first - low)
        score.context_max = max(score.context_max, high - low)
        self._nats[key].append(nats)


def _cat(parts: list[State]) -> State:
    packed = [states.pack(part) for part in parts]
    return states.unpack({name: torch.cat([part[name] for part in packed]) for name in packed[0]})


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
