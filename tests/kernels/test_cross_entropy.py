"""Token losses: values, gradients, chunks, and that logits of a long input are never all in memory."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, relative_error
from torch.autograd.graph import saved_tensors_hooks

from longspan.errors import ShapeError
from longspan.kernels.backend import forced
from longspan.kernels.cross_entropy.api import scaled_logits, token_nll
from longspan.kernels.cross_entropy.reference import chunked_nll

DIM, VOCAB = 8, 11
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, DIM, generator=g, dtype=torch.float64).requires_grad_()
    embedding = torch.randn(VOCAB, DIM, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, VOCAB, (tokens,), generator=g)
    labels[::5] = -100
    return hidden, embedding, labels


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_values_and_gradients(chunk_tokens: int) -> None:
    hidden, embedding, labels = inputs(23)
    weights = torch.linspace(0, 2, 23, dtype=torch.float64)
    nll = chunked_nll(hidden, embedding, labels, max_chunk_logits=chunk_tokens * VOCAB)
    logits = hidden @ embedding.T / DIM**0.5
    want = logits.exp().sum(-1).log() - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    want = torch.where(labels == -100, 0.0, want)
    assert torch.allclose(nll, want, atol=1e-12)
    assert (nll[labels == -100] == 0).all()
    grads = [torch.autograd.grad((y * weights).sum(), [hidden, embedding]) for y in (nll, want)]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_logits_of_a_long_input_are_not_kept_for_the_backward_pass() -> None:
    hidden, embedding, labels = inputs(64)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_nll(hidden, embedding, labels, max_chunk_logits=4 * VOCAB)
    assert 64 * VOCAB not in kept and 4 * VOCAB not in kept
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_nll(hidden, embedding, labels)
    assert 64 * VOCAB in kept


def test_losses_are_fp32_in_bf16_models() -> None:
    hidden, embedding, labels = inputs(6)
    nll = token_nll(hidden.bfloat16()[None], embedding.bfloat16(), labels[None])
    assert nll.dtype == torch.float32
    assert scaled_logits(hidden.bfloat16(), embedding.bfloat16()).dtype == torch.float32


def test_labels_of_another_shape_are_refused() -> None:
    hidden, embedding, labels = inputs(6)
    with pytest.raises(ShapeError, match=r"\[1, 5\]"):
        token_nll(hidden[None], embedding, labels[None, :5])
    with pytest.raises(ShapeError, match="int64"):
        token_nll(hidden[None], embedding, labels[None].int())
    with pytest.raises(ShapeError, match=r"\[V, D\]"):
        token_nll(hidden[None], embedding[:, 1:], labels[None])


@pytest.mark.parametrize(("vocab", "dim"), [(0, DIM), (VOCAB, 0)])
def test_an_empty_embedding_is_refused(vocab: int, dim: int) -> None:
    with pytest.raises(ShapeError, match=rf"\[{vocab}, {dim}\].*at least 1"):
        token_nll(torch.zeros(1, 2, dim), torch.zeros(vocab, dim), torch.full((1, 2), -100))
    with pytest.raises(ShapeError, match=rf"\[{vocab}, {dim}\].*at least 1"):
        scaled_logits(torch.zeros(1, 2, dim), torch.zeros(vocab, dim))


def test_logits_of_another_width_or_device_are_refused() -> None:
    hidden, embedding, _ = inputs(6)
    with pytest.raises(ShapeError, match=r"\[V, D\]"):
        scaled_logits(hidden, embedding[:, 1:])
    with pytest.raises(ShapeError, match="scaled_logits got tensors on cpu, meta"):
        scaled_logits(hidden.detach(), embedding.detach().to("meta"))


# --- the fused form, interpreted -------------------------------------------------------------------------------------


def fused_inputs(rows: int, tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(vocab)
    hidden = 3 * torch.randn(rows, tokens, DIM, generator=g, dtype=torch.float64)
    embedding = torch.randn(vocab, DIM, generator=g, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows, tokens), generator=g)
    labels[:, ::5] = -100
    return hidden, embedding, labels


def run(
    hidden: torch.Tensor, embedding: torch.Tensor, labels: torch.Tensor, loss: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Losses, and gradients of a loss that is the same number for all tokens, or not."""
    hidden, embedding = (x.to(dtype).requires_grad_() for x in (hidden, embedding))
    nll = token_nll(hidden, embedding, labels)
    if loss == "sum":
        total = nll.sum() * 0.37
    elif loss == "mean of rows":
        total = (nll.mean(1) * torch.arange(1, labels.shape[0] + 1)).sum()
    else:
        total = (nll * torch.linspace(-1, 2, labels.numel(), dtype=nll.dtype).view_as(nll)).sum()
    return [nll, *torch.autograd.grad(total, [hidden, embedding])]


@needs_interpreter
@pytest.mark.parametrize("loss", ["sum", "mean of rows", "weighted"])
@pytest.mark.parametrize(("rows", "tokens"), [(2, 9), (1, 23), (3, 1)])
@pytest.mark.parametrize("max_chunk", [2**28, 5 * 37])
def test_fused_form_equals_fp64(
    loss: str, rows: int, tokens: int, max_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.kernels.cross_entropy.autograd.MAX_CHUNK_LOGITS", max_chunk)
    tensors = fused_inputs(rows, tokens, 37)
    want = run(*tensors, loss, torch.float64)
    with forced("triton"), poisoned_memory():
        ours = run(*tensors, loss, torch.float32)
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-5, number
    ignored = tensors[2] == -100
    assert (ours[0][ignored] == 0).all() and (ours[1][ignored] == 0).all()


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 4, 11])
@pytest.mark.parametrize("vocab", [1, 384, 513, 1100])
def test_every_way_to_walk_along_rows_and_vocabulary(vocab: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.kernels.cross_entropy import triton as kernels

    monkeypatch.setattr(kernels, "_WARPS", 2)  # a few programs, so that each has several rows
    logits = 4 * torch.randn(rows, vocab, dtype=torch.float64)
    labels, weight = torch.randint(0, vocab, (rows,)), 1 + torch.arange(rows)
    labels[2::3] = -100
    x = logits.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(0.5 * x, labels, reduction="none")
    (gradient,) = torch.autograd.grad((want * weight).sum(), x)
    for config in (kernels.CONFIGS[0], kernels.Config(256, 2)):
        ours, nll = logits.float(), torch.full((rows,), torch.nan)
        kernels.nll_of_logits(ours, labels, 0.5, nll, gradient=False, config=config)
        assert relative_error(nll, want) < 1e-5
        assert torch.equal(ours, logits.float())
        kernels.nll_of_logits(ours, labels, 0.5, None, gradient=True, weight=weight.float(), config=config)
        assert relative_error(ours, gradient) < 1e-5
        assert not ours[2::3].any()


@needs_interpreter
def test_rows_that_do_not_fit_into_registers_are_read_twice() -> None:
    from longspan.kernels.cross_entropy.triton import CONFIGS, default_config

    chosen = {(vocab, size): default_config(vocab, size) for vocab in (384, 16384, 32128, 50257) for size in (2, 4)}
    assert all(config in CONFIGS for config in chosen.values())
    whole = {key for key, config in chosen.items() if key[0] <= config.max_block}
    assert whole == {(384, 2), (384, 4), (16384, 2), (16384, 4), (32128, 2)}


@needs_interpreter
def test_only_what_is_wanted_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation makes no gradients; a frozen embedding gets none."""
    from longspan.kernels.cross_entropy import autograd

    asked: list[bool] = []
    right = autograd.nll_of_logits

    def spy(*args: object, **kwargs: object) -> None:
        asked.append(bool(kwargs["gradient"]))
        right(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(autograd, "nll_of_logits", spy)
    hidden, embedding, labels = fused_inputs(2, 5, 37)
    hidden, embedding = hidden.float().requires_grad_(), embedding.float()
    with forced("triton"):
        with torch.no_grad():
            token_nll(hidden, embedding, labels)
        assert asked == [False]
        nll = token_nll(hidden, embedding, labels)
        assert asked == [False, True]
        nll.sum().backward()
        assert asked == [False, True], "the backward pass of a sum computes nothing again"
        assert hidden.grad is not None and embedding.grad is None
        token_nll(hidden, embedding, labels).square().sum().backward()
        assert asked == [False, True, True, True]


@needs_interpreter
def test_labels_outside_the_vocabulary_and_nan_give_nan() -> None:
    hidden, embedding, labels = fused_inputs(1, 6, 37)
    labels[0, 1:4] = torch.tensor([37, -1, 3])
    hidden[0, 4] = torch.nan
    with forced("triton"):
        nll = token_nll(hidden.float(), embedding.float(), labels)
    assert nll.isnan().tolist() == [[False, True, True, False, True, False]]


@needs_interpreter
def test_no_tokens() -> None:
    hidden, embedding = torch.zeros(2, 0, DIM, requires_grad=True), torch.randn(VOCAB, DIM, requires_grad=True)
    with forced("triton"):
        nll = token_nll(hidden, embedding, torch.zeros(2, 0, dtype=torch.int64))
        nll.sum().backward()
    assert nll.shape == (2, 0) and not embedding.grad.any()
