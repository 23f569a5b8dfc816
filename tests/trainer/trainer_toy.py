"""A recurrent toy language model with the real model's interface, batches for it, and two gloo ranks to run it on."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from longspan.data_pipeline.batch import Batch
from longspan.trainer import recipes
from longspan.trainer.config import RunConfig
from longspan.trainer.engine import Engine

VOCAB, WIDTH, LANES, EOS = 37, 13, 4, 36  # odd sizes, so that no parameter divides evenly over two ranks


class ToyModel(nn.Module):
    """Embedding, one recurrence over tokens, tied output; its state is one vector a lane.

    `poison`: "loss" makes the loss NaN and leaves gradients finite, "gradient" makes both NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.5)
        self.layers = nn.ModuleList([nn.Linear(2 * WIDTH, WIDTH)])
        self.norm = nn.LayerNorm(WIDTH)
        self.initial_state = nn.Parameter(torch.randn(WIDTH) * 0.1)
        self.poison: str | None = None

    def init_state(self, batch: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        return {"h": self.initial_state.float().expand(batch, -1).clone().to(device or self.initial_state.device)}

    def reset_rows(self, state: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        return {"h": torch.where(rows[:, None], self.initial_state, state["h"])}

    def forward(
        self, tokens: Tensor, state: dict[str, Tensor], *, reset: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        h = torch.where(reset[:, :1], self.initial_state, state["h"]).to(self.embedding.dtype)
        outputs = []
        for x in nn.functional.embedding(tokens, self.embedding).unbind(1):
            h = torch.tanh(self.layers[0](torch.cat([x, h], dim=-1)))
            outputs.append(self.norm(h))
        logits = torch.stack(outputs, 1) @ self.embedding.T
        nll = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
        ).view_as(labels)
        if self.poison == "loss":
            nll = nll + torch.nan
        if self.poison == "gradient":
            nll = nll * torch.nan
        return nll, {"h": h.float()}, {"size": 1e-3 * h.float().square().sum()}


def toy_batch(step: int, start: int = 0, stop: int = LANES, length: int = 6) -> Batch:
    """Rows of a global batch of 4 lanes; lanes have different numbers of labels; one is eos, a third of the others
    stands for no byte of its own."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (LANES, length), generator=generator)
    labels = torch.randint(0, VOCAB, (LANES, length), generator=generator)
    for lane in range(LANES):
        labels[lane, length - lane :] = -100
    whole = Batch(
        tokens=tokens,
        labels=labels,
        reset=torch.tensor([[(step + lane) % 3 == 0] for lane in range(LANES)]),
        doc_ids=torch.zeros(LANES, 1, dtype=torch.int64),
        target_bytes=torch.where((labels >= 0) & (labels != EOS), labels % 3, 0).int(),
        lane_ids=torch.arange(LANES),
        num_valid=0,
        num_bytes=0,
    )
    return whole.rows(start, stop)


def toy_config(**overrides: Any) -> RunConfig:
    """A configuration for four lanes; overrides are dotted names with double underscores."""
    raw: dict[str, Any] = {
        "name": "toy",
        "model": {"layers": [{"mixer": "sliding_window"}], "window_tokens": 6},
        "data": {"shards": "none", "segment_tokens": 6, "lanes": LANES},
        "training": {"steps": 20, "micro_batch_lanes": LANES},
        "optimizer": {"lr_peak": 0.05, "weight_decay": 0.1},
        "parallel": {"timeout_seconds": 60},
    }
    named = [f"{name.replace('__', '.')}={value}" for name, value in overrides.items()]
    return recipes.validate(RunConfig, recipes.apply_overrides(raw, named), "toy")


class ToyRun:
    """An engine over a toy model, this rank's lanes in `num_micro` micro-batches, and their carried states."""

    def __init__(self, mesh: Any, num_micro: int = 1, **overrides: Any) -> None:
        self.lanes = LANES // mesh.dp_size
        self.size = self.lanes // num_micro
        self.start = mesh.dp_rank * self.lanes
        torch.manual_seed(0)
        self.model = ToyModel()
        self.engine = Engine(self.model, toy_config(training__micro_batch_lanes=self.size, **overrides), mesh, EOS)
        with self.engine.evaluating() as model:
            self.carried = [{"h": model.init_state(self.size)["h"].detach()} for _ in range(num_micro)]

    def batches(self, step: int) -> list[Batch]:
        starts = range(self.start, self.start + self.lanes, self.size)
        return [toy_batch(step, start, start + self.size).to(self.engine.mesh.device) for start in starts]

    def step(self, step: int) -> Any:
        result, self.carried = self.engine.step(self.batches(step), self.carried, lr=0.05 / (1 + step))
        return result

    def losses(self, steps: range) -> list[tuple[float, float, float, float]]:
        results = [self.step(step) for step in steps]
        return [(r.loss, r.bits_per_byte, r.aux_loss, r.grad_norm) for r in results]

    def fingerprint(self) -> str:
        """Of weights and optimizer state."""
        tensors = dict(self.engine.weights())
        for name, state in self.engine.optimizer_state().items():
            tensors.update({f"{name}/{key}": value for key, value in state.items()})
        return fingerprint(tensors)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Hash of names and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def free_port() -> int:
    """A port of the loopback device that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(worker: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `worker(rank, *args)` in new processes under torchrun's environment; their return values by rank."""
    method = "spawn" if torch.cuda.is_available() else "forkserver"  # CUDA wants processes fresh
    answers = mp.get_context(method).Queue()
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **place}  # the fork-server's is that of whichever test was the first
    entry = worker, environment, answers, args
    ranks = mp.start_processes(_entry, entry, nprocs=world_size, join=False, start_method=method)
    found = {}
    while len(found) < world_size and not ranks.join(timeout=0.05):
        while not answers.empty():
            rank, value = answers.get()
            found[rank] = value
    while len(found) < world_size:
        rank, value = answers.get(timeout=10)
        found[rank] = value
    ranks.join()
    return [found[rank] for rank in range(world_size)]


def _entry(rank: int, worker: Callable[..., Any], environment: dict[str, str], answers: Any, args: Any) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=environment["WORLD_SIZE"])
    torch.set_num_threads(1)
    answers.put((rank, worker(rank, *args)))
