"""Where a plan stands, as a checkpoint keeps it, and the proof that a resumed plan stands in the same place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from longspan.data_pipeline.plan import LanePlan
from longspan.errors import DataError, UsageError

STATE_VERSION = 2


def plan_state(plan: LanePlan, next_step: int, quarantine: Mapping[str, str]) -> dict[str, Any]:
    """The state before `next_step`, JSON-able; the same on all ranks but for `quarantine` ({document id: reason}).

    All follows from `plan` and `step`; `lanes` is there so that a resume can prove that it goes on in the same place.
    Deficits are integers, in tokens times the sum of weights.
    """
    progress = plan.progress(next_step)
    state = {
        "version": STATE_VERSION,
        "plan": plan.description(),
        "step": next_step,
        "tokens_seen": dict(zip(plan.sources, progress.tokens, strict=True)),
        "source_epoch": dict(zip(plan.sources, progress.epochs, strict=True)),
        "source_pos": dict(zip(plan.sources, progress.positions, strict=True)),
        "deficit": dict(zip(plan.sources, progress.deficits, strict=True)),
        "lanes": lane_positions(plan, next_step),
        "quarantine": sorted([name, reason] for name, reason in quarantine.items()),
    }
    return {**state, "digest": state_digest(state)}


def check_plan_state(plan: LanePlan, state: Mapping[str, Any]) -> dict[str, str]:
    """Compare a saved state with this plan; returns its quarantine, {document id: reason}.

    Raises:
        UsageError: it was saved under other settings or with another corpus; names all that differ.
        DataError: it is damaged, or its lanes are not where this plan has them; names the first such lane.
    """
    check_state_is_whole(state)
    problems = differing_settings(state["plan"], plan.description())
    if problems:
        listed = "\n  ".join(problems)
        raise UsageError(
            f"the checkpoint was written with other data settings:\n  {listed}\n"
            f"Set them back to resume, or start a new run with --init-from."
        )
    step, saved, own = state["step"], state["lanes"], lane_positions(plan, state["step"])
    for lane in range(max(len(saved), len(own))):
        theirs, ours = (lanes[lane] if lane < len(lanes) else "nothing" for lanes in (saved, own))
        if theirs != ours:
            raise DataError(f"lane {lane} at step {step}: saved {theirs}, the plan says {ours}.")
    return dict(state["quarantine"])


def check_state_is_whole(state: Mapping[str, Any]) -> None:
    """Check version and digest.

    Raises:
        UsageError: the state is of another version. DataError: it is damaged.
    """
    if state.get("version") != STATE_VERSION:
        raise UsageError(
            f"data state version {state.get('version')}; this version reads {STATE_VERSION}. Resume with the version "
            f"that wrote the checkpoint, or start a new run with --init-from."
        )
    if state_digest(state) != state.get("digest"):
        raise DataError("the saved data state does not match its digest. Resume from another checkpoint.")


def differing_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """One line for each setting of two plan descriptions that is not the same in both."""
    return [
        f"{name}: {saved.get(name)} saved, {own.get(name)} now"
        for name in dict.fromkeys([*own, *saved])
        if saved.get(name) != own.get(name)
    ]


def lane_positions(plan: LanePlan, step: int) -> list[dict[str, Any] | None]:
    """For all lanes of the plan, the document that each one's segment of `step` begins with; None if it has ended."""
    table = plan.table(step, 0, plan.lanes)
    positions: list[dict[str, Any] | None] = [None] * plan.lanes
    for row in reversed(range(len(table.lane))):  # a lane's first piece is the last to be written
        part, start, lane = plan.parts.part(int(table.part[row])), int(table.start[row]), int(table.lane[row])
        document = plan.manifest.documents[part.document]
        positions[lane] = {
            "doc_id": document.id,
            "part": part.number,
            "offset": start,
            "started_step": started_step(plan, step, lane, int(table.column[row]) - (start - part.start)),
            "sha256": document.sha256[:16],
        }
    return positions


def state_digest(state: Mapping[str, Any]) -> str:
    """sha256 of all of a state but its own `digest`."""
    rest = {key: value for key, value in state.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def started_step(plan: LanePlan, step: int, lane: int, column: int) -> int:
    """The step in which a part started whose first token would be at `column` of `step`'s segment."""
    place = (step - plan.first_step) * plan.segment_tokens + column
    if place < 0 and plan.origin is not None:
        return plan.origin.started[lane]
    return plan.first_step + place // plan.segment_tokens
