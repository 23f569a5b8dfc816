"""What DeepSpeed sends in a step over dp x cp, counted, against the formula in docs/distributed.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tensor_parallel_engine import config_of
from trainer_toy import toy_batch
from worlds import in_world

from longspan.cluster.collectives import recorder
from longspan.cluster.config import ParallelConfig
from longspan.cluster.mesh import Mesh
from longspan.data_pipeline.batch import Batch
from longspan.modeling import state as states
from longspan.modeling.model import build_model
from longspan.trainer import engine as engine_module
from longspan.trainer.config import RunConfig
from longspan.trainer.engine import Engine
from longspan.trainer.optimizers import build_optimizer

LANES, BLOCKS, WINDOW = 4, 4, 8
STAGES = (0, 1, 2, 3)
# of stage 3: nothing stays gathered, as in a model whose parameters are large
RELEASED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
Settings = list[tuple[int, dict[str, int]]]


def measured(rank: int, precision: str, tp: int, cp: int, settings: Settings) -> list[dict[str, Any]]:
    """Of each (stage, DeepSpeed's settings): bytes of the third step over dp x cp, by operation, and sizes."""
    found = []
    mesh = Mesh.build(ParallelConfig(tp=tp, cp=cp), device="cpu")
    real = Engine._deepspeed_config
    for stage, changes in settings:
        sizes = {"parallel__cp": cp, "training__micro_batch_lanes": 1, "data__segment_tokens": BLOCKS * WINDOW}
        config = config_of(stage, precision, tp, **sizes)

        def with_changes(self: Engine, config: RunConfig, changes: dict[str, int] = changes) -> dict[str, Any]:
            whole = real(self, config)
            return whole | {"zero_optimization": whole["zero_optimization"] | changes}

        groups: list[list[int]] = []

        def counted(*arguments: Any, groups: list[list[int]] = groups) -> Any:
            optimizer = build_optimizer(*arguments)
            groups.extend([p.numel() for p in group["params"]] for group in optimizer.param_groups)
            return optimizer

        # this process is the test's own
        Engine._deepspeed_config, engine_module.build_optimizer = with_changes, counted
        torch.manual_seed(0)
        model = build_model(config.model)
        engine = Engine(model, config, mesh)
        with engine.evaluating() as whole:
            carried = [states.detach(whole.init_state(1, mesh.device)) for _ in range(engine.num_micro_batches)]
        for step in range(3):
            before = dict(recorder().sent)
            _, carried = engine.step(lanes_of(step, mesh), carried, lr=0.01)
        name = mesh.dp_cp_group.group_name
        now = {operation: count for (group, operation), count in recorder().sent.items() if group == name}
        sent = {operation: count - before.get((name, operation), 0) for operation, count in now.items()}
        found.append({"sent": {key: count for key, count in sent.items() if count}, "groups": groups})
    mesh.close()
    return found


def lanes_of(step: int, mesh: Mesh) -> list[Batch]:
    """This rank's micro-batches of one lane."""
    reset = torch.zeros(LANES, BLOCKS, dtype=torch.bool)
    share = replace(toy_batch(step, length=BLOCKS * WINDOW), reset=reset, doc_ids=reset.long())
    share = share.share(mesh.cp_rank, mesh.cp_size)
    count = LANES // mesh.dp_size
    return [share.rows(lane, lane + 1) for lane in range(mesh.dp_rank * count, (mesh.dp_rank + 1) * count)]


def padded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def formula(
    stage: int, released: bool, precision: str, ranks: int, micro: int, groups: list[list[int]]
) -> dict[str, int]:
    """docs/distributed.md: bytes that a rank gives to each operation in a step."""
    width = 2 if precision == "bf16" else 4
    whole = sum(map(sum, groups))
    # stages 1 and 2 divide a group, to multiples of 2 elements a rank; stage 3 each parameter
    by_group = sum(padded(sum(group), 2 * ranks) for group in groups)
    by_parameter = sum(padded(count, ranks) for group in groups for count in group)
    control = 8  # valid tokens; that a step is taken, and its norm, all ranks agree on
    if stage == 0:
        return {"all_reduce": width * whole + control}
    if stage in (1, 2):
        times = micro if stage == 2 else 1
        return {
            "all_reduce": width * whole * times + control,
            "all_gather_into_tensor": width * by_group // ranks,
        }
    gathers = 2 * micro if released else 1
    # stage 3 reduces in fp32 or the training type alike: the gradients' own
    return {
        "all_reduce": control,
        "reduce_scatter_tensor": width * by_parameter * micro,
        "all_gather_into_tensor": width * by_parameter // ranks * gathers,
    }


def check(folder: Path, ranks: int, precision: str, tp: int, cp: int, settings: Settings) -> None:
    [found] = in_world(ranks, folder, [(measured, (precision, tp, cp, settings))])
    over = ranks // tp
    micro = LANES // (over // cp)
    for rank in found:
        for (stage, changes), result in zip(settings, rank, strict=True):
            want = formula(stage, bool(changes), precision, over, micro, result["groups"])
            assert result["sent"] == want, (stage, changes, precision, tp, cp)


def test_two_ranks_send_what_the_formula_says(tmp_path: Path) -> None:
    check(tmp_path, 2, "fp32", 1, 1, [*((stage, {}) for stage in STAGES), (3, RELEASED)])


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "tp", "cp"), [(2, 1, 2), (4, 1, 1), (4, 1, 2), (4, 2, 1), (8, 2, 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_mesh_sends_what_the_formula_says(tmp_path: Path, precision: str, ranks: int, tp: int, cp: int) -> None:
    settings = [(stage, {}) for stage in STAGES if stage or precision == "fp32"] + [(3, RELEASED)]
    check(tmp_path, ranks, precision, tp, cp, settings)
