"""Optimizers and their parameter groups: torch's AdamW and an own Adafactor that must see real shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import ShapeError
from longspan.modeling.tensor_parallel import partition_of
from longspan.trainer.config import OptimizerConfig

MIN_FACTORED_DIM = 128
_GRADIENT_EPS = 1e-30
_MIN_PARAMETER_RMS = 1e-3
_UPDATE_CLIP_RMS = 1.0
_ATTENTION_GAINS = {"scale", "state_scale", "self_scale", "token_scale", "position_table"}


def _is_gain(path: list[str], last: str) -> bool:
    """Whether the parameter sets how sharp attention is, where it looks, or how much a gate lets through."""
    inside = path[-1] if path else ""
    return (last in _ATTENTION_GAINS and not inside.endswith("norm")) or (last == "bias" and inside.endswith("gate"))


def parameter_groups(model: nn.Module, weight_decay: float, gain_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
    """Three groups, `decay`, `no_decay` and `gains`; empty ones are left out.

    Decaying pulls a projection towards zero. So only matrices of linear maps and embeddings decay: parameters named
    `weight` with two axes or more, gates excepted. Norms, scales, biases, tables of positions, learned initial states
    and ids never do, whatever their shape.

    Attention over normalised queries and keys starts nearly flat, and its scales, tables and the gates' biases are
    few, so each must move far: their group carries `lr_multiplier`, which the engine applies to every step's rate.

    Of a model that is divided over tensor-parallel ranks the whole parameters are in groups apart from the divided ones
    (`divided: True`), so that a gradient which ZeRO has flattened by group still says to which of them it belongs.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    gains: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            *path, last = name.split(".")
            decays = parameter.ndim >= 2 and last == "weight" and "gate" not in path
            (gains if _is_gain(path, last) else decay if decays else no_decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
        {"name": "gains", "params": gains, "weight_decay": 0.0, "lr_multiplier": gain_lr_multiplier},
    ]
    return [part for group in groups for part in _by_division(group) if part["params"]]


def _by_division(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group's parameters that each rank has whole, and those of which it has a part."""
    divided = {id(parameter) for parameter in group["params"] if partition_of(parameter) is not None}
    whole = [parameter for parameter in group["params"] if id(parameter) not in divided]
    parts = [parameter for parameter in group["params"] if id(parameter) in divided]
    return [group | {"params": whole}, group | {"name": f"{group['name']} divided", "params": parts, "divided": True}]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over `parameter_groups`."""
    groups = parameter_groups(model, config.weight_decay, config.gain_lr_multiplier)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr_peak, betas=config.betas, eps=config.eps, fused=True)
    return Adafactor(groups, lr=config.lr_peak, decay_rate=config.decay_rate, momentum=config.momentum)


def factored_axes(shape: torch.Size | tuple[int, ...]) -> tuple[int, int] | None:
    """(second largest axis, largest axis) if both are at least MIN_FACTORED_DIM, else None; ties go to later axes."""
    if len(shape) < 2:
        return None
    by_size = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return (by_size[-2], by_size[-1]) if shape[by_size[-2]] >= MIN_FACTORED_DIM else None


class Adafactor(torch.optim.Optimizer):
    """Adafactor (arXiv:1804.04235) with optax's semantics, as the Block-Recurrent paper trains with.

    The second moment decays as 1 - t^-decay_rate and is kept as row and column means where the two largest
    dimensions are at least 128; the update is clipped to RMS 1, scaled by max(RMS(parameter), 1e-3) times the
    learning rate, and averaged with `momentum` (not debiased). Decoupled weight decay is lr * weight_decay * parameter.
    State, float32: `step`, `momentum` [shape], and `row` + `column` (one axis less each) or `second` [shape].
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        decay_rate: float = 0.8,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        """Args: params: parameters or groups with their real shapes; the rest as in the class's text."""
        super().__init__(
            params, {"lr": lr, "decay_rate": decay_rate, "momentum": momentum, "weight_decay": weight_decay}
        )
        self._known = {id(parameter) for group in self.param_groups for parameter in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ShapeError: a parameter is not one that this optimizer was built with, i.e. ZeRO put a flat tensor in
                its place; row and column means of a flat tensor would silently be another algorithm.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._known:
                    raise ShapeError(
                        f"adafactor was given a tensor of shape {list(parameter.shape)} that is none of the model's "
                        f"parameters. It needs their real shapes: use parallel.zero_stage: 0, or optimizer.name: adamw."
                    )
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter] or self._start(parameter)
        state["step"] += 1
        decay = 1.0 - float(state["step"]) ** -group["decay_rate"]
        update = self._precondition(state, gradient, decay, factored_axes(parameter.shape))
        update.div_((_rms(update) / _UPDATE_CLIP_RMS).clamp_(min=1.0))
        update.mul_(_rms(parameter).clamp_(min=_MIN_PARAMETER_RMS) * group["lr"])
        momentum = state["momentum"].lerp_(update, 1.0 - group["momentum"])
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.sub_(momentum)

    def _start(self, parameter: Tensor) -> dict[str, Any]:
        axes = factored_axes(parameter.shape)
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["momentum"] = zeros
        if axes is None:
            state["second"] = zeros.clone()
        else:
            small, large = axes
            state["row"], state["column"] = zeros.mean(dim=large), zeros.mean(dim=small)
        return state

    @staticmethod
    def _precondition(state: dict[str, Any], gradient: Tensor, decay: float, axes: tuple[int, int] | None) -> Tensor:
        """The gradient over the root of its running mean square."""
        square = gradient.square().add_(_GRADIENT_EPS)
        if axes is None:
            return gradient * state["second"].lerp_(square, 1.0 - decay).rsqrt()
        small, large = axes
        row = state["row"].lerp_(square.mean(dim=large), 1.0 - decay)
        column = state["column"].lerp_(square.mean(dim=small), 1.0 - decay)
        small_in_row = small - 1 if small > large else small
        row_factor = (row / row.mean(dim=small_in_row, keepdim=True)).rsqrt()
        return gradient * row_factor.unsqueeze(large) * column.rsqrt().unsqueeze(small)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.float().square().mean().sqrt()
