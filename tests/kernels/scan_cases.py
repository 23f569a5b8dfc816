"""Inputs of the Block-Recurrent layer's attention at any size, and all its outputs and gradients by any form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs, BlockRecurrentOutputs
from longspan.modeling.config import BlockRecurrentConfig, ModelConfig
from longspan.modeling.mixers.block_recurrent import BlockRecurrent

VARIANTS = [
    ("fixed", "skip"),
    ("lstm", "skip"),
    ("fixed", "dual"),
    ("lstm", "dual"),
    ("fixed", "single"),
    ("lstm", "single"),
]


@dataclass(frozen=True)
class Sizes:
    """Of a case; the token count need not be a multiple of the window."""

    rows: int = 2
    tokens: int = 40
    window: int = 16
    states: int = 32
    dim: int = 64
    heads: int = 2
    width: int = 32
    ffn: int = 48

    @property
    def blocks(self) -> int:
        return -(-self.tokens // self.window)

    def values(self, blocks: int) -> int:
        """Of so many blocks of all rows, as the scan counts them to cut a segment into chunks."""
        return blocks * self.rows * max(self.states, self.window) * self.dim


@dataclass
class Case:
    """A mixer, the tensors that go into its kernel, and the gradients that come back."""

    mixer: BlockRecurrent
    tensors: dict[str, Tensor]
    reset: Tensor
    window: int

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """A copy, rounded; states and their gradient keep fp32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {k: v.to(device, wide if k in ("state", "d_state") else dtype) for k, v in self.tensors.items()}
        return Case(copy.deepcopy(self.mixer).to(device, dtype), tensors, self.reset.to(device), self.window)


def make_case(
    gate: str, mode: str, sizes: Sizes, *, update: str = "trained", candidate: str = "linear", seed: int = 0
) -> Case:
    """Scales of both signs, gates away from one half, resets in the middle of rows; bf16-representable values."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = BlockRecurrentConfig(gate=gate, mode=mode, num_states=sizes.states, update=update, candidate=candidate)
    model = ModelConfig(
        dim=sizes.dim,
        num_heads=sizes.heads,
        head_dim=sizes.width,
        ffn_dim=sizes.ffn,
        window_tokens=sizes.window,
        dropout=0.0,
        layers=[layer],
    )
    mixer = BlockRecurrent(model, layer, sizes.window).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith("scale") and "norm" not in name:
                parameter.copy_(2 + 2 * torch.rand(parameter.shape, generator=generator))
                parameter[0].neg_()
            if "bias" in name:
                parameter.mul_(5)
            parameter.copy_(parameter.bfloat16())

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    heads = (sizes.heads, sizes.width)
    cached = torch.nn.functional.normalize(draw(sizes.rows, sizes.window, *heads), dim=-1).bfloat16().double()
    tensors = {
        "qkv": draw(sizes.rows, sizes.tokens, 3, *heads),
        "state_query": draw(sizes.rows, sizes.tokens, *heads),
        "cached_keys": cached,
        "cached_values": draw(sizes.rows, sizes.window, *heads),
        "state": draw(sizes.rows, sizes.states, sizes.dim),
        # gradients of the outputs
        "d_own": draw(sizes.rows, sizes.tokens, *heads),
        "d_read": draw(sizes.rows, sizes.tokens, *heads),
        "d_keys": draw(sizes.rows, sizes.window, *heads),
        "d_values": draw(sizes.rows, sizes.window, *heads),
        "d_state": draw(sizes.rows, sizes.states, sizes.dim),
    }
    reset = torch.zeros(sizes.rows, sizes.blocks, dtype=torch.bool)
    reset[-1, sizes.blocks // 2] = True
    if sizes.rows > 1:
        reset[0, 0] = reset[0, -1] = True
    return Case(mixer, tensors, reset, sizes.window)


def inputs_of(case: Case, **changes: Tensor) -> BlockRecurrentInputs:
    """What the kernel takes."""
    leaves = {name: tensor for name, tensor in case.tensors.items() if not name.startswith("d_")}
    mixer = case.mixer
    given = {
        "bias_table": mixer.position_table,
        "scale": mixer.scale,
        "state_scale": mixer.state_scale,
        "reset": case.reset,
        "path": mixer.recurrent.weights(),
        "drop": None,
    }
    return BlockRecurrentInputs(**(leaves | given | changes))  # type: ignore[arg-type]


def everything(
    case: Case, form: Callable[[BlockRecurrentInputs], BlockRecurrentOutputs], *, last: bool = True
) -> dict[str, Tensor]:
    """Every output and the gradient of every input and weight; `last`: the state's and the caches' gradients count."""
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors.items() if not n.startswith("d_")}
    out = form(inputs_of(case, **leaves))
    outputs = {"own": out.own, "read": out.read, "keys": out.keys, "values": out.values, "state": out.state}
    wanted = [name for name in outputs if last or name in ("own", "read")]
    weights = dict(case.mixer.named_parameters())
    sources = leaves | weights
    found = torch.autograd.grad(
        [outputs[name] for name in wanted],
        list(sources.values()),
        [case.tensors[f"d_{name}"].to(outputs[name].dtype) for name in wanted],
        allow_unused=True,
    )
    gradients = {f"d {name}": g for name, g in zip(sources, found, strict=True) if g is not None}
    return {name: tensor.detach() for name, tensor in (outputs | gradients).items()}


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative norm of the error of every result; what is zero exactly must be (nearly) so here."""
    assert exact.keys() <= ours.keys(), exact.keys() - ours.keys()
    gaps = {}
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        gap = (ours[name].double().to(want.device) - want).norm()
        gaps[name] = (gap / want.norm()).item() if want.norm() > 0 else gap.item()
    return gaps
