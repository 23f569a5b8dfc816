"""What the two-rank tests look at, computed in one launch of two gloo processes, because a launch takes seconds."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from tiny_training import tiny_config
from trainer_toy import LANES, ToyRun, fingerprint

from longspan.cluster.mesh import Mesh
from longspan.errors import DataError, LongspanError, UsageError
from longspan.trainer.lanes import Lanes
from longspan.trainer.loop import train

STAGES = (0, 1, 2, 3)


def everything(rank: int, shards: str, runs: str, ports: list[int]) -> dict[str, Any]:
    """All measurements of one rank."""
    mesh = Mesh.build(tiny_config(Path(shards)).parallel)
    found = {
        "losses": {(stage, g): losses(mesh, stage, g) for stage in STAGES for g in (1, 2)},
        "resumed": {stage: interrupted(mesh, parallel__zero_stage=stage) for stage in STAGES},
        "resumed_bf16": interrupted(mesh, parallel__zero_stage=1, training__precision="bf16"),
        "resumed_adafactor": interrupted(mesh, optimizer__name="adafactor"),
        "skips": {(stage, kind): skip(mesh, rank, stage, kind) for stage in STAGES for kind in ("loss", "gradient")},
        "without_agreement": skip(mesh, rank, 0, "loss", agree=False),
        "logical": logical_state(mesh, 3),
        "exit_code": exit_code_of_other_rank(mesh),
        "rolled_back": {stage: rolled_back(mesh, rank, stage) for stage in STAGES},
        "bad_data": bad_data_on_rank_one(mesh, rank),
        "gathered": mesh.gather({rank: "bad"}),
    }
    mesh.close()
    for name, port, steps, overrides in (
        ("dp2", ports[0], 20, {}),
        ("dp2_zero3", ports[1], 8, {"parallel__zero_stage": 3}),
    ):
        os.environ["MASTER_PORT"] = str(port)
        config = tiny_config(
            Path(shards),
            training__steps=steps,
            training__micro_batch_lanes=1,
            validation__interval_steps=10,
            checkpoint__interval_steps=20,
            schedule__name="rsqrt",
            **overrides,
        )
        found[name] = train(config, Path(runs) / name)
    return found


def losses(mesh: Mesh, stage: int, num_micro: int) -> list[tuple[float, ...]]:
    """Losses of five steps."""
    return ToyRun(mesh, num_micro, parallel__zero_stage=stage).losses(range(5))


def interrupted(mesh: Mesh, **overrides: Any) -> dict[str, Any]:
    """Four steps after the third, once straight on and once in a fresh engine with the state of the third."""
    straight = ToyRun(mesh, **overrides)
    straight.losses(range(3))
    weights, state = straight.engine.weights(), straight.engine.optimizer_state()
    fresh = ToyRun(mesh, **overrides)
    fresh.engine.load(weights, state)
    again = fresh.engine.optimizer_state()
    exact = all(torch.equal(state[name][key], again[name][key]) for name in state for key in state[name])
    exact = exact and all(torch.equal(weights[name], value) for name, value in fresh.engine.weights().items())
    fresh.carried = straight.carried
    return {
        "straight": straight.losses(range(3, 7)),
        "fresh": fresh.losses(range(3, 7)),
        "exact": exact,
        "names": sorted(state) == sorted(weights),
    }


def skip(mesh: Mesh, rank: int, stage: int, kind: str, agree: bool = True) -> dict[str, Any]:
    """Two good steps, one that is bad on rank 1 alone, one good again."""
    run = ToyRun(mesh, num_micro=2, parallel__zero_stage=stage)
    run.losses(range(2))
    before, carried = run.fingerprint(), [fingerprint(state) for state in run.carried]
    run.model.poison = kind if rank == 1 else None
    if not agree:  # every rank judges by what it sees itself
        run.engine._agree = lambda sums, num_bytes, stop: alone(run, sums, num_bytes)
    result = run.step(2)
    run.model.poison = None
    after = run.fingerprint()
    found = {
        "skipped": result.skipped,
        "untouched": after == before,
        "rolled_back": [fingerprint(state) for state in run.carried] == carried,
    }
    return found if not agree else {**found, "after": run.losses(range(3, 5)), "weights": run.fingerprint()}


def alone(run: ToyRun, sums: torch.Tensor, num_bytes: int) -> list[float]:
    """The planted mistake: the answer of `Engine._agree` without asking the other rank."""
    bad = float(not torch.isfinite(sums).all())
    return [*sums.tolist(), float(num_bytes), 1.0, bad, 0.0]


def logical_state(mesh: Mesh, stage: int) -> dict[str, Any]:
    """Weights, optimizer state and next losses after three steps, to be taken over by one rank."""
    run = ToyRun(mesh, parallel__zero_stage=stage)
    run.losses(range(3))
    weights, state = run.engine.weights(), run.engine.optimizer_state()
    return {
        "weights": {name: value.numpy() for name, value in weights.items()},
        "state": {name: {key: value.numpy() for key, value in entry.items()} for name, entry in state.items()},
        "carried": run.carried[0]["h"].numpy(),
        "next": run.losses(range(3, 6)),
    }


def exit_code_of_other_rank(mesh: Mesh) -> int:
    """What each rank's error says when rank 0 meets a usage error."""

    def fail() -> None:
        raise UsageError("no")

    try:
        mesh.on_rank_zero(fail)
    except Exception as error:
        return error.exit_code
    return 0


def rolled_back(mesh: Mesh, rank: int, stage: int) -> list[bool]:
    """Which of this rank's lanes are initial after a skipped step in which a document started on rank 0 alone."""
    run = ToyRun(mesh, parallel__zero_stage=stage)
    run.losses(range(2))
    lanes = Lanes(run.engine, LANES, run.size)
    initial = lanes.carried[0]["h"]
    lanes.advance([{"h": initial + 1}])
    started = torch.tensor([[rank == 0], [False]])
    lanes.micro_batches(dataclasses.replace(run.batches(2)[0], reset=started))
    lanes.roll_back()
    run.losses(range(3, 4))  # the ranks are still in step
    return (lanes.carried[0]["h"] == initial).all(dim=1).tolist()


def bad_data_on_rank_one(mesh: Mesh, rank: int) -> tuple[str, int]:
    """Kind and exit code of the error on this rank when rank 1 alone cannot read its lanes."""

    def read() -> int:
        if rank == 1:
            raise DataError("too many documents are bad")
        return rank

    try:
        mesh.on_every_rank(read)
    except LongspanError as error:
        return type(error).__name__, error.exit_code
    return "", 0
