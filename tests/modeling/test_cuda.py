"""The same numbers on a CUDA device: outputs, states and gradients in fp64; bf16 stays finite and typed."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import MODELS, WINDOW, no_reset, random_tokens, tiny_model

from longspan.kernels.backend import forced
from longspan.modeling import stack
from longspan.modeling import state as states
from longspan.modeling.config import ModelConfig
from longspan.modeling.model import LanguageModel, build_model
from longspan.modeling.state import pack
from longspan.trainer.recipes import PACKAGED_CONFIGS, read_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
every_model = pytest.mark.parametrize("name", MODELS)


def train_step(model: LanguageModel, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of a segment with a reset inside, after which gradients are set; the new state, flat."""
    tokens = random_tokens(2, 4 * WINDOW).to(device)
    reset = no_reset(model, 2, 4 * WINDOW).to(device)
    reset[0, 0] = reset[1, 2 * WINDOW // model.quantum] = True
    losses, state, aux = model(tokens, model.init_state(2, device), reset=reset, labels=tokens)
    (losses.sum() + sum(aux.values())).backward()
    return losses, pack(state)


@every_model
def test_fp64_equals_the_cpu(name: str) -> None:
    model = tiny_model(name)
    twin = copy.deepcopy(model).cuda()
    want, state = train_step(model, "cpu")
    got, on_device = train_step(twin, "cuda")
    assert torch.allclose(got.cpu(), want, atol=1e-10)
    for path, tensor in state.items():
        assert torch.allclose(on_device[path].cpu(), tensor, atol=1e-10), path
    for (path, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), path
        if a.grad is not None:
            assert torch.allclose(b.grad.cpu(), a.grad, atol=1e-9), path


@every_model
def test_bf16_trains_and_decodes(name: str) -> None:
    model = tiny_model(name, torch.bfloat16, dropout=0.1).cuda()
    losses, _ = train_step(model, "cuda")
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    model.eval()
    with torch.no_grad():
        tokens = random_tokens(2, 2 * WINDOW).cuda()
        reset = no_reset(model, *tokens.shape).cuda()
        want, _, _ = model(tokens, model.init_state(2), reset=reset)
        decode = states.to(model.decode_state(model.init_state(2)), "cuda")
        for place in range(2 * WINDOW):
            logits, decode = model.step_tokens(tokens[:, place], decode)
            assert (logits - want[:, place]).abs().max() < 0.1


ROWS = sorted(path.stem for path in PACKAGED_CONFIGS.glob("model/*_quickstart.yaml"))


def row_gradients(config: ModelConfig, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(losses of a segment with a document start inside, gradient of each parameter), from the same weights, fp64."""
    torch.manual_seed(0)
    model = build_model(config).bfloat16().to("cuda", dtype)
    tokens = torch.randint(0, 256, (2, 4 * config.window_tokens), generator=torch.Generator().manual_seed(1)).cuda()
    reset = torch.zeros(2, tokens.shape[1] // model.quantum, dtype=torch.bool, device="cuda")
    reset[0, 0] = reset[1, 2 * config.window_tokens // model.quantum] = True
    losses, _, _ = model(tokens, model.init_state(2), reset=reset, labels=tokens.roll(-1, 1))
    losses.sum().backward()
    return losses.detach().double(), [p.grad.double() for p in model.parameters()]


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-2), (torch.bfloat16, 1e-1)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("row", ROWS)
def test_rows_with_kernels_equal_fp64(row: str, dtype: torch.dtype, bar: float) -> None:
    """Whole models: one kernel's error is bounded where it is tested, here errors pass through four layers."""
    config = ModelConfig(**(read_recipe(f"configs/model/{row}.yaml")["model"] | {"num_heads": 2, "head_dim": 64}))
    with forced("reference"):
        want, exact = row_gradients(config, torch.float64)
    with forced("triton"):
        losses, gradients = row_gradients(config, dtype)
    assert (losses - want).norm() < bar * want.norm()
    assert sum((a - b).square().sum() for a, b in zip(gradients, exact, strict=True)).sqrt() < bar * (
        sum(b.square().sum() for b in exact).sqrt()
    )


@pytest.mark.parametrize("policy", ["none", "mixer"])
@pytest.mark.parametrize("name", ["rec_fixed_skip_quickstart", "slide_quickstart"])
def test_sums_in_place_are_as_near_to_fp64_as_sums_in_new_tensors(
    name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(f"configs/model/{name}.yaml")["model"]
    config = ModelConfig(**(recipe | {"num_heads": 2, "head_dim": 64, "dropout": 0.0}))
    right, sums = stack.add_rms_norm, []
    monkeypatch.setattr(stack, "add_rms_norm", lambda *a, **options: sums.append(1) or right(*a, **options))
    monkeypatch.setattr(stack.Layer, "checkpointing", policy)
    with forced("reference"):
        _, exact = row_gradients(config, torch.float64)
    sums.clear()
    _, ours = row_gradients(config, torch.bfloat16)
    layers = len(config.expanded_layers())
    assert len(sums) == (1 if policy == "none" else layers)
    monkeypatch.setattr(stack, "adds_in_place", lambda *tensors: False)
    _, old = row_gradients(config, torch.bfloat16)
    far, near = ([(a - b).norm() for a, b in zip(found, exact, strict=True)] for found in (old, ours))
    assert torch.stack(near).norm() < 1.5 * torch.stack(far).norm()
    for number, want in enumerate(exact):
        if want.numel() >= 64:  # of few numbers either error may be small by chance
            assert near[number] <= max(3 * far[number], 0.1 * want.norm()), number
