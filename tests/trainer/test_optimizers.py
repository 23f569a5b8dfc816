"""Adafactor against an independent NumPy version, and the parameter groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from longspan.errors import ShapeError
from longspan.trainer.config import OptimizerConfig, ScheduleConfig
from longspan.trainer.optimizers import Adafactor, build_optimizer, factored_axes, parameter_groups
from longspan.trainer.recipes import read_recipe
from longspan.trainer.schedules import learning_rate


def numpy_adafactor(p: np.ndarray, grads: list[np.ndarray], rates: list[float], wd: float = 0.0) -> np.ndarray:
    """optax.adafactor(rates[t], decay_rate=0.8, momentum=0.9), written from its documentation, float64."""
    p = p.astype(np.float64)
    order = np.argsort(p.shape, kind="stable")
    factored = p.ndim >= 2 and p.shape[order[-2]] >= 128
    v, rows, cols, m = np.zeros(p.shape), 0.0, 0.0, np.zeros(p.shape)
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        beta = 1 - t**-0.8
        square = g.astype(np.float64) ** 2 + 1e-30
        if factored:
            small, large = order[-2], order[-1]
            rows = beta * rows + (1 - beta) * square.mean(large, keepdims=True)
            cols = beta * cols + (1 - beta) * square.mean(small, keepdims=True)
            u = g / np.sqrt(rows * cols / rows.mean(small, keepdims=True))
        else:
            v = beta * v + (1 - beta) * square
            u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()))
        u = u * max(1e-3, np.sqrt((p**2).mean())) * lr
        m = 0.9 * m + 0.1 * u
        p = p * (1 - lr * wd) - m
    return p


@pytest.mark.parametrize("shape", [(7,), (5, 300), (128, 128), (130, 200), (200, 130), (3, 128, 150), ()])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adafactor_equals_numpy(shape: tuple[int, ...], weight_decay: float) -> None:
    generator = np.random.default_rng(3)
    start = generator.normal(size=shape).astype(np.float32)
    grads = [generator.normal(size=shape).astype(np.float32) * 10.0**k for k in (0, -2, 1, 0, -1)]
    parameter = nn.Parameter(torch.from_numpy(np.array(start)))
    optimizer = Adafactor([parameter], lr=0.03, weight_decay=weight_decay)
    for gradient in grads:
        parameter.grad = torch.from_numpy(np.array(gradient))
        optimizer.step()
    np.testing.assert_allclose(
        parameter.detach().numpy(), numpy_adafactor(start, grads, [0.03] * 5, weight_decay), rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("shape", [(9,), (40, 60), (130, 140)])
def test_paper_optimizer_equals_numpy_over_steps_of_its_schedule(shape: tuple[int, ...]) -> None:
    """configs/optimizer/paper.yaml as `build_optimizer` makes it, at rates of its schedule; parameters barely not zero
    and large ones, so that updates are seen to be scaled by the parameter's RMS."""
    recipe = read_recipe("configs/optimizer/paper.yaml")
    config, schedule = OptimizerConfig(**recipe["optimizer"]), ScheduleConfig(**recipe["schedule"])
    updates = [*range(1, 6), *range(996, 1006), *range(9_000, 9_005)]
    rates = [learning_rate(schedule, config.lr_peak, update, 500_000) for update in updates]
    assert rates == pytest.approx([min(k / 1000, 1) / max(k, 1000) ** 0.5 for k in updates], rel=1e-12)
    generator = np.random.default_rng(4)
    module = nn.ParameterDict()
    starts, grads = {}, {}
    for name, size in (("small", 1e-4), ("large", 30.0)):
        starts[name] = (size * generator.normal(size=shape)).astype(np.float32)
        grads[name] = [generator.normal(size=shape).astype(np.float32) for _ in updates]
        module[name] = nn.Parameter(torch.from_numpy(starts[name].copy()))
    optimizer = build_optimizer(module, config)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in module.items():
            parameter.grad = torch.from_numpy(grads[name][step].copy())
        optimizer.step()
    for name, parameter in module.items():
        want = numpy_adafactor(starts[name], grads[name], rates)
        np.testing.assert_allclose(parameter.detach().numpy(), want, rtol=2e-5, atol=1e-5 * np.abs(want).max())
        assert np.abs(want - starts[name]).max() > 0.03 * np.abs(starts[name]).max()


def test_adafactor_keeps_factored_state_small() -> None:
    parameter = nn.Parameter(torch.randn(130, 200))
    optimizer = Adafactor([parameter], lr=0.1)
    parameter.grad = torch.randn(130, 200)
    optimizer.step()
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[parameter].items()}
    assert shapes == {"step": (), "momentum": (130, 200), "row": (130,), "column": (200,)}


def test_factored_axes_need_two_large_dimensions() -> None:
    assert factored_axes((127, 500)) is None
    assert factored_axes((500,)) is None
    assert factored_axes((128, 128)) == (0, 1)
    assert factored_axes((300, 4, 200)) == (2, 0)


def test_adafactor_refuses_a_tensor_that_is_no_parameter() -> None:
    """What ZeRO 1 to 3 do: the groups' parameters are replaced by one flat tensor."""
    parameter = nn.Parameter(torch.randn(4, 4))
    optimizer = Adafactor([parameter], lr=0.1)
    flat = parameter.detach().reshape(-1).clone().requires_grad_()
    flat.grad = torch.ones(16)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ShapeError, match=r"shape \[16\].*zero_stage: 0"):
        optimizer.step()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.dense = nn.Linear(4, 4)
        self.gate = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.initial = nn.Parameter(torch.zeros(3, 4))
        self.position_table = nn.Parameter(torch.zeros(3, 4))
        self.state_scale = nn.Parameter(torch.ones(4))


def names_by_group(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: sorted(names[id(p)] for p in group["params"]) for group in groups}


def test_only_matrices_of_projections_decay() -> None:
    model = Named()
    groups = parameter_groups(model, 0.1, gain_lr_multiplier=10.0)
    names = names_by_group(model, groups)
    assert names["decay"] == ["dense.weight", "embedding.weight"]
    assert names["gains"] == ["gate.bias", "position_table", "state_scale"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group.get("lr_multiplier") for group in groups] == [None, None, 10.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_decay_shrinks_what_decays_and_nothing_else(name: str) -> None:
    model = Named()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr_peak=0.5, weight_decay=0.1))
    optimizer.step()
    moved = sorted(name for name, p in model.named_parameters() if not torch.all(p == 1.0))
    assert moved == ["dense.weight", "embedding.weight"]
    torch.testing.assert_close(model.dense.weight, torch.full((4, 4), 0.95))


def test_an_empty_group_is_left_out() -> None:
    groups = parameter_groups(nn.LayerNorm(4), 0.1)
    assert [group["name"] for group in groups] == ["no_decay"]
