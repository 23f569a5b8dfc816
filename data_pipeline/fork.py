"""Changing the mix, the segment length or the lanes in the middle of a run, and building such a plan again.

At the step of a fork every source goes on at its place in its epoch. A lane that stays goes on with its document, at
the next token and with its state. A document of a lane that is gone is not lost: what is left of it is read next, by
the first lanes that are free, as a part of its own with a reset. So no token is skipped and none is read twice.
Shares are counted from the fork on, so that a new mix holds at once and does not make up for the time before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.parts import Part
from longspan.data_pipeline.plan import LanePlan, Origin
from longspan.data_pipeline.plan_state import check_state_is_whole, differing_settings, started_step
from longspan.data_pipeline.timeline import NO_PART, Held
from longspan.errors import UsageError

_PHASE = ("lanes", "segment_tokens", "quantum", "boundary", "weights")


def fork_plan(
    plan: LanePlan,
    step: int,
    *,
    lanes: int | None = None,
    segment_tokens: int | None = None,
    quantum: int | None = None,
    boundary: str | None = None,
    source_weights: Mapping[str, float | Fraction] | None = None,
    snapshots: Path | None = None,
) -> LanePlan:
    """The plan that goes on from `step` of `plan` with other settings; what is None stays as it is.

    Steps count on. The new plan's description has the settings before the fork in its `history`.

    Args:
        plan: until `step`. step: the first of the new plan, not before the plan's own first.
        lanes, segment_tokens, quantum, boundary, source_weights, snapshots: as of `LanePlan`.

    Raises:
        UsageError: settings that do not fit, a step before the plan's first, or a plan that ends (`drain`).
    """
    if plan.drain or type(plan) is not LanePlan:
        raise UsageError("only a lane plan without end can be forked, not one that drains or streams whole shards.")
    if source_weights is None:
        source_weights = _shares(plan.weights)
    lanes = lanes or plan.lanes
    return LanePlan(
        plan.manifest,
        split=plan.split,
        seed=plan.seed,
        lanes=lanes,
        segment_tokens=segment_tokens or plan.segment_tokens,
        quantum=quantum or plan.quantum,
        boundary=boundary or plan.boundary,
        source_weights=source_weights,
        max_document_tokens=plan.max_document_tokens,
        snapshots=snapshots,
        origin=_origin(plan, step, lanes),
    )


def plan_from_description(
    manifest: Manifest, description: Mapping[str, Any], snapshots: Path | None = None
) -> LanePlan:
    """The plan that a saved state describes, all its forks included.

    Raises:
        UsageError: it was saved with another corpus or by another version; names all that differ.
    """
    phases = [*description["history"], description]
    plan = LanePlan(
        manifest,
        split=description["split"],
        seed=description["seed"],
        max_document_tokens=description["max_document_tokens"],
        drain=description["drain"],
        snapshots=snapshots,
        **_settings(phases[0], drain=description["drain"]),
    )
    for before, after in pairwise(phases):
        plan = fork_plan(plan, before["until_step"], snapshots=snapshots, **_settings(after, drain=False))
    problems = differing_settings(description, plan.description())
    if problems:
        listed = "\n  ".join(problems)
        raise UsageError(
            f"the saved data plan does not fit this corpus or version:\n  {listed}\n"
            f"Resume with the corpus and version that wrote it, or start a new run with --init-from."
        )
    return plan


def continue_plan(
    wanted: LanePlan, state: Mapping[str, Any], *, allow_fork: bool, snapshots: Path | None = None
) -> LanePlan:
    """The plan to resume a saved state with, given the plan that the configuration asks for.

    The saved plan with its history, if its present settings are the wanted ones; a fork of it at the saved step if
    they differ in what a fork may change and `allow_fork`.

    Raises:
        UsageError: the settings differ and no fork is allowed, or in what no fork can change. DataError: the state is
            damaged.
    """
    check_state_is_whole(state)
    saved = state["plan"]
    own = wanted.description()
    if "order" in own or "order" in saved:
        return _same_stream(wanted, saved, own)
    differing = [line for line in differing_settings(saved, own) if not line.startswith("history: ")]
    if not differing and not saved.get("history"):
        return wanted
    fixed = [line for line in differing if line.split(":")[0] not in _PHASE]
    if fixed or (differing and not allow_fork):
        listed = "\n  ".join(differing)
        remedy = (
            f"{', '.join(line.split(':')[0] for line in fixed)} cannot change within a run: set back what differs, or "
            f"start a new run with --init-from."
            if fixed
            else "Set them back to resume, go on with them with --fork-data, or start a new run with --init-from."
        )
        raise UsageError(f"the checkpoint was written with other data settings:\n  {listed}\n{remedy}")
    plan = plan_from_description(wanted.manifest, saved, snapshots)
    if not differing:
        return plan
    return fork_plan(plan, state["step"], snapshots=snapshots, **_settings(own, drain=False))


def _same_stream(wanted: LanePlan, saved: Mapping[str, Any], own: Mapping[str, Any]) -> LanePlan:
    """The plan of a stream of whole shards, which only goes on as it was.

    A fork would put back what is left of the documents of lanes that are gone, and give lanes documents at other
    places: shards that were read already would have to be read again, in between others.
    """
    differing = differing_settings(saved, own)
    if differing:
        listed = "\n  ".join(differing)
        raise UsageError(
            f"the checkpoint was written with other data settings:\n  {listed}\nA plan that streams whole shards "
            f"(data.reader = streaming) cannot be forked: set them back to resume, or start a new run with --init-from."
        )
    return wanted


def _settings(phase: Mapping[str, Any], *, drain: bool) -> dict[str, Any]:
    settings = {name: phase[name] for name in _PHASE if name != "weights"}
    return {**settings, "source_weights": None if drain else _shares(phase["weights"])}


def _shares(weights: Mapping[str, int]) -> dict[str, Fraction]:
    total = sum(weights.values())
    return {name: Fraction(weight, total) for name, weight in weights.items()}


def _origin(plan: LanePlan, step: int, lanes: int) -> Origin:
    """What `lanes` lanes go on with from `step` of `plan`."""
    progress, cursor, supply = plan.progress(step), plan.before(step), plan.supply
    begin, num_sources = (step - plan.first_step) * plan.segment_tokens, len(plan.sources)
    unread = cursor.held.where((cursor.held.sequence != NO_PART) & (cursor.held.end > begin))
    parts = [plan.parts.part(index) for index in supply.parts_of(unread).tolist()]
    sources = supply.source_of(unread).tolist()
    held = Held(np.arange(lanes), *np.zeros((4, lanes), dtype=np.int64))
    held.sequence[:] = NO_PART
    started = [NO_PART] * lanes
    in_lanes: list[tuple[int, Part]] = []
    left: list[tuple[int, Part]] = []
    for row, (lane, part, source) in enumerate(zip(unread.lane.tolist(), parts, sources, strict=True)):
        read = begin - int(unread.position[row])
        if lane >= lanes:
            left.append((source, Part(part.document, part.number, part.start + read, part.stop)))
            continue
        place = (int(unread.sequence[row]), int(unread.ordinal[row]))
        if place[0] == supply.first:
            place = (num_sources, len(in_lanes))
            in_lanes.append((source, part))
        held.sequence[lane], held.ordinal[lane] = place
        held.position[lane], held.length[lane] = -read, unread.length[row]
        started[lane] = started_step(plan, step, lane, -read)
    if supply.first is not None:
        waiting = supply.sequences[supply.first].parts(np.arange(cursor.taken[-1], supply.sequences[-1].size))
        left += [(int(plan.parts.source[index]), plan.parts.part(index)) for index in waiting.tolist()]
    history = () if plan.origin is None else plan.origin.history
    return Origin(
        step=step,
        taken=cursor.taken[:num_sources],
        tokens=tuple(progress.tokens),
        waiting=(*in_lanes, *left),
        num_held=len(in_lanes),
        held=held,
        started=tuple(started),
        history=(*history, {**plan.phase(), "until_step": step}),
    )
