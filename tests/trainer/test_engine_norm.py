"""What DeepSpeed takes from the engine instead of computing it: if it stops asking, these tests fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from trainer_toy import ToyRun

from longspan.cluster.mesh import Mesh
from longspan.errors import ClusterError
from longspan.trainer.zero_step import AgreedNorm

SETTINGS = [
    pytest.param(stage, precision, offload, id=f"ZeRO {stage} {precision}{' offloaded' if offload else ''}")
    for stage in (1, 2, 3)
    for precision, offload in (("fp32", False), ("bf16", False), ("bf16", True))
]


def toy(mesh: Mesh, stage: int, precision: str, offload: bool, num_micro: int = 1) -> ToyRun:
    settings = {"zero_stage": stage, "offload_optimizer": offload}
    return ToyRun(
        mesh,
        num_micro,
        training__precision=precision,
        **{f"parallel__{name}": value for name, value in settings.items()},
    )


@pytest.mark.parametrize(("stage", "precision", "offload"), SETTINGS)
def test_deepspeed_clips_by_the_engines_norm_and_looks_at_no_gradient_itself(
    mesh: Mesh, stage: int, precision: str, offload: bool
) -> None:
    run = toy(mesh, stage, precision, offload)
    run.losses(range(2))
    zero, given = run.engine._deepspeed.optimizer, 7.25  # no norm that the toy has
    forbid(zero, "get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload", "has_overflow")
    hand_over = run.engine._norm.set
    run.engine._norm.set = lambda norm: hand_over(given)
    assert run.step(2).grad_norm != pytest.approx(given)
    assert float(run.engine._deepspeed.get_global_grad_norm()) == given


@pytest.mark.parametrize(("stage", "precision", "offload"), SETTINGS)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_refused_step_leaves_nothing_behind(mesh: Mesh, stage: int, precision: str, offload: bool, kind: str) -> None:
    """With a loss of NaN the gradients are finite: nothing but the engine's word refuses the step."""
    run, never = (toy(mesh, stage, precision, offload, num_micro=2) for _ in range(2))
    for each in (run, never):
        each.losses(range(2))
    before = run.fingerprint()
    run.model.poison = kind
    assert run.step(2).skipped
    run.model.poison = None
    assert run.fingerprint() == before
    assert run.losses(range(3, 6)) == never.losses(range(3, 6))
    assert run.fingerprint() == never.fingerprint()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_norm_waits_for_gradients_on_their_way_to_the_host(
    mesh: Mesh, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, copies of gradients arrive when the device has been waited for."""
    run, prompt = (toy(mesh, stage, "bf16", True) for _ in range(2))
    zero = run.engine._deepspeed.optimizer
    under_way: list[tuple[torch.Tensor, torch.Tensor]] = []
    copy_now, synchronize = zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu, CPU_Accelerator.synchronize

    def copy_later(param: torch.Tensor) -> None:
        copy_now(param)
        group, _, first, count = zero.grad_position[zero.get_param_id(param)]
        arrives = zero.single_partition_of_fp32_groups[group].grad.view(-1).narrow(0, first, count)
        under_way.append((arrives, arrives.clone()))
        arrives.zero_()

    def arrive(accelerator: Any, *arguments: Any) -> None:
        while under_way:
            place, value = under_way.pop()
            place.copy_(value)
        synchronize(accelerator, *arguments)

    monkeypatch.setattr(zero, "async_inplace_copy_grad_to_fp32_buffer_from_gpu", copy_later)
    monkeypatch.setattr(CPU_Accelerator, "synchronize", arrive)
    losses = run.losses(range(1))
    assert not under_way
    monkeypatch.undo()
    assert losses == prompt.losses(range(1))
    assert run.fingerprint() == prompt.fingerprint()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_deepspeed_takes_against_the_engine_ends_the_run(mesh: Mesh, stage: int) -> None:
    run = ToyRun(mesh, parallel__zero_stage=stage)
    hand_over = run.engine._norm.set
    run.engine._norm.set = lambda norm: hand_over(1.0)
    run.model.poison = "loss"
    with pytest.raises(ClusterError, match="took or refused a step by a gradient norm other than inf"):
        run.step(0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_without_the_methods_is_refused(stage: int) -> None:
    with pytest.raises(ClusterError, match="object has no method"):
        AgreedNorm(object(), stage)


@pytest.mark.parametrize("num_micro", [1, 2])
def test_one_rank_averages_with_nobody(mesh: Mesh, num_micro: int) -> None:
    """No bucket and no copy of a gradient: the norm is taken of the memory that autograd filled."""
    run = toy(mesh, 1, "bf16", False, num_micro)
    run.losses(range(2))
    forbid(run.engine._deepspeed.optimizer, "allreduce_and_copy", "average_tensor", "copy_grads_in_partition")
    made: set[int] = set()
    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: made.add(p.grad.data_ptr()))
    held: set[int] = set()
    agree = run.engine._agree

    def watched(*arguments: Any) -> list[float]:
        held.update(part.data_ptr() for parts in run.engine._gradients() for part in parts)
        return agree(*arguments)

    run.engine._agree = watched
    assert not run.step(2).skipped
    assert len(made) == len(list(run.model.parameters()))
    assert made <= held


def forbid(zero: Any, *names: str) -> None:
    """Methods of DeepSpeed that must not run."""

    def called(*arguments: Any, **named: Any) -> None:
        raise AssertionError("DeepSpeed did what the engine should have spared it")

    for name in names:
        assert callable(getattr(zero, name)), name
        setattr(zero, name, called)
