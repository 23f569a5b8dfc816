"""`longspan bench cross-entropy`: output layer and loss, forward and backward."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels.cross_entropy.api import token_nll
from longspan.trainer.bench.contender import Contender, Session, Unavailable, Work
from longspan.trainer.bench.floors import loss_costs
from longspan.trainer.bench.measured import Measured, speed_ratios
from longspan.trainer.bench.result import OURS
from longspan.trainer.bench.settings import LossSettings

Case = tuple[int, int, int]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(settings: LossSettings, session: Session) -> Measured:
    """Every contender on each case."""
    makers: dict[str, Callable[[], Loss]] = {OURS: lambda: _ours, "plain": _plain, "liger": _liger, "torch": _torch}
    contenders = [
        Contender(name, _title(case), partial(_work, makers[name], case, session))
        for case in settings.cases
        for name in (OURS, *settings.peers)
    ]
    rows = session.race(contenders)
    return Measured(rows, speed_ratios(rows, settings.peers), [])


def _title(case: Case) -> str:
    tokens, dim, vocabulary = case
    return f"{tokens} x {dim} x {vocabulary}"


def _work(make: Callable[[], Loss], case: Case, session: Session) -> Work:
    tokens, dim, vocabulary = case
    loss = make()
    torch.manual_seed(0)
    hidden = torch.randn(tokens, dim, device=session.device, dtype=session.dtype, requires_grad=True)
    embedding = torch.randn(vocabulary, dim, device=session.device, dtype=session.dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), device=session.device)

    def call() -> None:
        hidden.grad = embedding.grad = None
        loss(hidden, embedding, labels).backward()

    costs = loss_costs(tokens, dim, vocabulary, session.dtype.itemsize)
    return Work(call, tokens, costs)


def _ours(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    return token_nll(hidden[None], embedding, labels[None]).sum() / labels.numel()


def _plain() -> Loss:
    def loss(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden * hidden.shape[1] ** -0.5, embedding)
        return F.cross_entropy(logits.float(), labels)

    return torch.compile(loss, dynamic=False) if torch.cuda.is_available() else loss


def _liger() -> Loss:
    try:
        module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    except ImportError as error:
        raise Unavailable("not installed", f"pip install liger-kernel ({error})") from None
    fused = module.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

    def loss(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = fused(embedding, hidden * hidden.shape[1] ** -0.5, labels)
        return value

    return loss


def _torch() -> Loss:
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is None:
        raise Unavailable("not installed", f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()  # in chunks; without options it makes all logits

    def loss(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = fused(hidden * hidden.shape[1] ** -0.5, embedding, labels, options=options)
        return value

    return loss
