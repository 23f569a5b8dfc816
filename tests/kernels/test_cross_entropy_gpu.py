"""Token losses on a GPU: every type, vocabulary and configuration against fp64, chunks, memory."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, relative_error
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels.cross_entropy.api import token_nll

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 1e-4}
VOCABULARIES = (17, 384, 10000, 32128, 32768, 50257, 131072)


def inputs(rows: int, tokens: int, dim: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator("cuda").manual_seed(vocab)
    hidden = torch.randn(rows, tokens, dim, generator=g, device="cuda").to(dtype)
    embedding = torch.randn(vocab, dim, generator=g, device="cuda").to(dtype)
    labels = torch.randint(0, vocab, (rows, tokens), generator=g, device="cuda")
    labels[:, ::7] = -100
    return hidden, embedding, labels


def run(hidden: Tensor, embedding: Tensor, labels: Tensor, loss: str, dtype: torch.dtype) -> list[Tensor]:
    hidden, embedding = (x.detach().to(dtype).requires_grad_() for x in (hidden, embedding))
    nll = token_nll(hidden, embedding, labels)
    weight = torch.linspace(-1, 2, labels.numel(), device="cuda", dtype=nll.dtype).view_as(nll)
    total = nll.sum() / 321 if loss == "sum" else (nll * weight).sum()
    return [nll, *torch.autograd.grad(total, [hidden, embedding])]


@pytest.mark.parametrize("loss", ["sum", "weighted"])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.filterwarnings("ignore:cross_entropy")
def test_every_type_and_vocabulary_equals_fp64(loss: str, vocab: int, dtype: torch.dtype) -> None:
    tensors = inputs(3, 131, 256, vocab, dtype)
    want = run(*tensors, loss, torch.float64)
    with poisoned_memory():
        ours = run(*tensors, loss, dtype)
    assert ours[0].dtype == torch.float32
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert relative_error(a, b) < LIMITS[dtype], number
    assert not ours[0][tensors[2] == -100].any() and not ours[1][tensors[2] == -100].any()


@pytest.mark.parametrize("loss", ["sum", "weighted"])
@pytest.mark.parametrize("chunk", [128, 100])
@pytest.mark.filterwarnings("ignore:cross_entropy")
def test_chunks_add_up(loss: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.kernels.cross_entropy.autograd.MAX_CHUNK_LOGITS", chunk * 32128)
    tensors = inputs(2, 517, 1024, 32128, torch.bfloat16)
    want = run(*tensors, loss, torch.float64)
    with poisoned_memory():
        ours = run(*tensors, loss, torch.bfloat16)
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert relative_error(a, b) < 1e-2, number


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_every_configuration(vocab: int) -> None:
    from longspan.kernels.cross_entropy.triton import CONFIGS, nll_of_logits

    rows = 300 if vocab > 1024 else 5001  # more than there are programs at a time
    logits = (8 * torch.randn(rows, vocab, device="cuda")).bfloat16()
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    labels[3::7] = -100
    weight = torch.randn(rows, device="cuda")
    x = logits.double().requires_grad_()
    want = F.cross_entropy(0.25 * x, labels, reduction="none")
    (gradient,) = torch.autograd.grad((want * weight).sum(), x)
    for config in CONFIGS:
        for _ in range(3):  # a race between reading and overwriting would come and go
            ours, nll = logits.clone(), torch.full((rows,), torch.nan, device="cuda")
            nll_of_logits(ours, labels, 0.25, nll, gradient=True, weight=weight, config=config)
            assert relative_error(nll, want) < 1e-5, config
            assert relative_error(ours, gradient) < 1e-2, config
            assert not ours[3::7].any(), config


def test_a_sum_is_not_waited_for_and_logits_are_not_kept() -> None:
    hidden, embedding, labels = inputs(1, 16384, 1024, 32128, torch.bfloat16)
    hidden.requires_grad_()
    embedding.requires_grad_()
    token_nll(hidden, embedding, labels).sum().backward()  # compiles
    hidden.grad = embedding.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_nll(hidden, embedding, labels).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    whole_logits = 16384 * 32128 * 2
    assert torch.cuda.max_memory_allocated() - before < 0.9 * whole_logits


def test_offsets_beyond_32_bits() -> None:
    from longspan.kernels.cross_entropy.triton import nll_of_logits

    rows, vocab = 17000, 131072  # 2.2e9 logits
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    tail = logits[-3:].double()
    nll = torch.empty(rows, device="cuda")
    nll_of_logits(logits, labels, 1.0, nll, gradient=True)
    assert relative_error(nll[-3:], F.cross_entropy(tail, labels[-3:], reduction="none")) < 1e-5
    want = tail.softmax(-1) - F.one_hot(labels[-3:], vocab)
    assert relative_error(logits[-3:], want) < 1e-2
