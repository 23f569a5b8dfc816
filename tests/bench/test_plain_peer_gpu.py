"""On a GPU: the plain peer under torch.compile computes what it computes without, however its scan is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.modeling.config import BlockRecurrentConfig, ModelConfig, SlidingWindowConfig
from longspan.trainer.bench.peers import plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WINDOW, TOKENS = 256, 1024


def dense(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
    """Strict window attention with all scores in memory."""
    distance = torch.arange(TOKENS, device=q.device)[:, None] - torch.arange(TOKENS, device=q.device)[None, :]
    visible = (distance > 0) & (distance <= WINDOW)
    logits = (q @ k.transpose(-1, -2)).float().masked_fill(~visible, -torch.inf)
    return torch.softmax(logits, dim=-1).nan_to_num().to(v.dtype) @ v  # the first token sees nothing


@pytest.mark.parametrize("unrolled_blocks", [64, 2], ids=["unrolled", "by-block"])
def test_compiled_equals_uncompiled(unrolled_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(3)
    device = torch.device("cuda")
    config = ModelConfig(
        vocab_size=512,
        dim=256,
        num_heads=2,
        head_dim=128,
        ffn_dim=512,
        window_tokens=WINDOW,
        dropout=0.0,
        layers=(SlidingWindowConfig(), BlockRecurrentConfig(num_states=WINDOW)),
    )
    model = plain.PlainModel(config).to(device)
    tokens = torch.randint(512, (2, TOKENS + 1), device=device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with monkeypatch.context() as patch:
        patch.setattr(plain, "attend_window", dense)
        expected = model.double()(inputs, labels, None)
        expected.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.to(torch.bfloat16)
    monkeypatch.setattr(plain, "MAX_UNROLLED_BLOCKS", unrolled_blocks)
    run, _ = plain.compiled(model, TOKENS)
    loss = run(inputs, labels, plain.window_mask(TOKENS, WINDOW, device))
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=5e-3)
    for name, parameter in model.named_parameters():
        grad, right = parameter.grad, wanted[name]
        assert grad is not None and right is not None
        # weights are rounded to bf16 too, so this is no test of precision: a wrong mask is off by tens of percent
        cosine = F.cosine_similarity(grad.double().flatten(), right.double().flatten(), dim=0)
        assert float(cosine) > 0.98, (name, float(cosine))
