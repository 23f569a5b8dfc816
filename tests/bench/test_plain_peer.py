"""The plain PyTorch peer computes what our models compute, as far as it does the same: an honest opponent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from longspan.kernels.backend import forced
from longspan.modeling.config import BlockRecurrentConfig, FullAttentionConfig, ModelConfig, SlidingWindowConfig
from longspan.modeling.mixers.block_recurrent import BlockRecurrent
from longspan.modeling.model import build_model
from longspan.modeling.stack import Layer
from longspan.trainer.bench.contender import Unavailable
from longspan.trainer.bench.peers import plain

WINDOW = 32
SLIDE = SlidingWindowConfig()


def config(*layers: SlidingWindowConfig | BlockRecurrentConfig | FullAttentionConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=96,
        dim=48,
        num_heads=3,
        head_dim=16,
        ffn_dim=64,
        window_tokens=WINDOW,
        dropout=0.0,
        layers=layers,
    )


def with_null_keys(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
    """Our window attention of the first segment of a document: W zero keys and values in front, seen by all."""
    tokens = q.shape[2]
    k, v = (F.pad(x, (0, 0, WINDOW, 0)) for x in (k, v))
    distance = torch.arange(tokens)[:, None] + WINDOW - torch.arange(tokens + WINDOW)[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance > 0) & (distance <= WINDOW), scale=1.0)


def copied(theirs: nn.Parameter, *ours: Tensor) -> None:
    with torch.no_grad():
        theirs.copy_(torch.cat(ours) if len(ours) > 1 else ours[0])


def copy_layer(theirs: plain.Layer, ours: Layer) -> None:
    copied(theirs.norm.weight, ours.norm.scale)
    copied(theirs.ffn_norm.weight, ours.ffn_norm.scale)
    copied(theirs.hidden.weight, ours.ffn.hidden.weight)
    copied(theirs.output.weight, ours.ffn.output.weight)
    mixer, own = theirs.mixer, ours.mixer
    projections = [own.query.weight, own.key.weight, own.value.weight]
    if isinstance(own, BlockRecurrent):
        assert isinstance(mixer, plain.RecurrentAttention)
        state, write = own.recurrent, own.recurrent.write
        assert write is not None
        projections.append(own.state_query.weight)
        copied(mixer.initial, state.initial)
        copied(mixer.ids, state.ids)
        copied(mixer.norm.weight, state.norm.scale)
        copied(
            mixer.state_project.weight,
            state.key.weight,
            state.value.weight,
            write.query.weight,
            write.token_query.weight,
        )
        copied(mixer.state_output.weight, write.output.weight)
        copied(mixer.gate, write.gate.bias)
    copied(mixer.project.weight, *projections)
    copied(mixer.output.weight, own.output.weight)


@pytest.mark.parametrize(
    "layers",
    [(SLIDE, SLIDE), (SLIDE, BlockRecurrentConfig(num_states=24), SLIDE)],
    ids=["slide", "recurrent"],
)
def test_equal_loss_and_gradients_from_equal_weights(
    layers: tuple[SlidingWindowConfig | BlockRecurrentConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "attend_window", with_null_keys)
    torch.manual_seed(1)
    model_config = config(*layers)
    ours, theirs = build_model(model_config).double(), plain.PlainModel(model_config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("position_table"):
                parameter.zero_()
            elif parameter.dim() == 1:  # norm scales and gate biases; not the scales of attention, which stay 1
                parameter.add_(0.1 * torch.randn_like(parameter) * ("mixer" not in name or "norm" in name))
    copied(theirs.embedding.weight, ours.embedding.weight)
    copied(theirs.norm.weight, ours.final_norm.scale)
    for mine, other in zip(theirs.layers, ours.backbone.layers, strict=True):
        copy_layer(mine, other)
    theirs.double()
    tokens = torch.randint(96, (2, 4 * WINDOW + 1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    reset = torch.zeros(2, -(-inputs.shape[1] // ours.quantum), dtype=torch.bool)
    with forced("reference"):
        nll, _, _ = ours(inputs, ours.init_state(2), reset=reset, labels=labels)
    loss = theirs(inputs, labels, None)
    # normalising and the loss are done in fp32 there
    torch.testing.assert_close(loss.double(), nll.mean(), rtol=2e-6, atol=0)
    nll.mean().backward()
    loss.backward()
    ours_gradient, gradient = ours.embedding.weight.grad, theirs.embedding.weight.grad
    assert ours_gradient is not None and gradient is not None
    assert float((gradient - ours_gradient).norm() / ours_gradient.norm()) < 1e-5


def test_its_attention_is_strict_window_attention() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 3, 256, 16) for _ in range(3))
    out = plain.attend_window(q, k, v, plain.window_mask(256, WINDOW, torch.device("cpu")))
    distance = torch.arange(256)[:, None] - torch.arange(256)[None, :]
    visible = (distance > 0) & (distance <= WINDOW)
    logits = (q @ k.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    expected = torch.softmax(logits, dim=-1).nan_to_num() @ v  # the first token sees nothing
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("tokens", "window"), [(1024, 512), (1024, 200), (2560, 2048), (256, 32), (384, 512)])
def test_its_tiles_are_those_of_torch(tokens: int, window: int) -> None:
    device = torch.device("cpu")
    mask = plain.window_mask(tokens, window, device)
    expected = create_block_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=plain.MASK_TILE)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    assert mask.full_kv_num_blocks is not None and expected.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks, expected.full_kv_num_blocks)
    assert torch.equal(mask.kv_num_blocks, expected.kv_num_blocks)


def test_other_layers_are_refused() -> None:
    for layers in (
        (FullAttentionConfig(),),
        (BlockRecurrentConfig(gate="lstm"),),
        (BlockRecurrentConfig(mode="dual"),),
    ):
        with pytest.raises(Unavailable, match="sliding-window and recurrent"):
            plain.PlainModel(config(*layers))
