"""Tensor x context parallel against one rank, in fp64, for every model recipe at tiny size: losses, logits, every
gradient, and the state at each rank's edge. Documents of odd lengths, across edges and from edge to edge; shares
shorter than the window, equal to it and longer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_tensor_parallel import groups, whole
from torch import Tensor

from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.kernels.tensor_parallel.shard import WHOLE, TensorShard
from longspan.modeling.config import FullAttentionConfig, ModelConfig
from longspan.modeling.context_parallel import set_sequence_shard, shared_state
from longspan.modeling.model import LanguageModel, build_model
from longspan.modeling.state import pack
from longspan.modeling.tensor_parallel import shard_model, whole_state
from longspan.trainer import recipes

sys.path.insert(0, str(Path(__file__).parents[1] / "modeling"))
from tiny_models import random_tokens

NEAR = 1e-10
WINDOW, ROWS, VOCAB = 4, 3, 20
MESHES = [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]  # (tp, cp)
# tokens of a rank's share where the sequence is cut in four
SHARES = {"shorter": 2, "equal": WINDOW, "longer": 2 * WINDOW}
ODD_LENGTHS = (5, 3, 7, 1, 9)
Result = dict[str, Tensor]


def tiny(path: Path) -> str:
    """The recipe's model with its kinds of layers in their order, narrow and at most two alike in a row; as JSON."""
    raw = recipes.read_recipe(path)["model"]
    sizes = {"name": "tiny", "vocab_size": VOCAB, "dim": 16, "num_heads": 4, "head_dim": 4, "ffn_dim": 24}
    sizes |= {"window_tokens": WINDOW, "dropout": 0.0}
    small = {"repeat": 2, "num_states": 3, "context_tokens": 6}
    layers = [
        {key: min(value, small.get(key, value)) if key in small else value for key, value in layer.items()}
        for layer in raw["layers"]
    ]
    return json.dumps(raw | sizes | {"layers": layers}, sort_keys=True)


def models() -> dict[str, str]:
    """Every recipe's tiny model; of recipes that are alike at this size the first one's name."""
    found: dict[str, str] = {}
    for path in sorted((recipes.PACKAGED_CONFIGS / "model").glob("*.yaml")):
        found.setdefault(tiny(path), path.stem)
    return {name: text for text, name in found.items()}


MODELS = models()


def build(text: str) -> LanguageModel:
    """In fp64, with scales that are not all one."""
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate_json(text))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("scale"):
                parameter.mul_(1 + 0.25 * torch.randn_like(parameter))
    return model.double()


def documents(tokens: int, quantum: int) -> tuple[Tensor, Tensor]:
    """Document starts [B, T/Q] and which tokens have a label [B, T].

    Row 0 has documents of odd lengths, each from the next edge of the quantum on; row 1 goes on with one document all
    the way; in row 2 one starts at each quarter.
    """
    reset = torch.zeros(ROWS, tokens // quantum, dtype=torch.bool)
    scored = torch.ones(ROWS, tokens, dtype=torch.bool)
    start, index = 0, 0
    while start < tokens:
        reset[0, start // quantum] = True
        stop = start + ODD_LENGTHS[index % len(ODD_LENGTHS)]
        start, index = -(-stop // quantum) * quantum, index + 1
        scored[0, stop - 1 : start] = False  # the last token has none to predict, and then there is padding
    for quarter in range(4):
        if quarter * tokens // 4 % quantum == 0:
            reset[2, quarter * tokens // 4 // quantum] = True
            scored[2, (quarter + 1) * tokens // 4 - 1] = False
    return reset, scored


def run(text: str, tensors: TensorShard, sequence: SequenceShard, share: int) -> Result:
    """Two steps of four shares; the second one goes on with all documents."""
    model = build(text)
    shard_model(model, tensors)
    set_sequence_shard(model, sequence)
    tokens, quantum = 4 * share, model.quantum
    own = tokens // sequence.size
    place = slice(sequence.rank * own, (sequence.rank + 1) * own)
    blocks = slice(place.start // quantum, place.stop // quantum)
    specs, state, found = model.state_spec(), model.init_state(ROWS), {}
    for step in range(2):
        ids = random_tokens(ROWS, tokens, seed=step) % VOCAB
        reset, scored = documents(tokens, quantum)
        reset = reset if step == 0 else torch.zeros_like(reset)
        labels = ids.roll(-1, dims=1).masked_fill(~scored, -100)
        weights = torch.rand(ROWS, tokens, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        arguments = {"reset": reset[:, blocks]}
        losses, after, aux = model(ids[:, place], state, labels=labels[:, place], **arguments)
        ((losses * weights[:, place]).sum() + sum(aux.values())).backward()
        with torch.no_grad():
            found[f"by token: logits {step}"] = model(ids[:, place], state, **arguments)[0]
            found |= edges(model, after, state, ids, reset, sequence, tensors, f"edge {step}")
        found[f"by token: losses {step}"] = losses.detach()
        state = shared_state(after, sequence)
        found |= {f"state {step} {path}": t for path, t in pack(whole_state(state, specs, tensors)).items()}
    for path, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[f"gradient {path}"] = whole(parameter, gradient, tensors)
    return found


def edges(
    model: Any,
    after: Any,
    before: Any,
    ids: Tensor,
    reset: Tensor,
    sequence: SequenceShard,
    tensors: TensorShard,
    name: str,
) -> Result:
    """The state after this rank's share; one rank gives those after every quarter and half, by running that far."""
    specs = model.state_spec()
    tokens = ids.shape[1]
    if sequence.size > 1:
        ends = {(sequence.rank + 1) * tokens // sequence.size: after}
    else:
        ends = {}
        for stop in (tokens // 4, tokens // 2, 3 * tokens // 4, tokens):
            if stop % model.quantum == 0:
                ends[stop] = model(ids[:, :stop], before, reset=reset[:, : stop // model.quantum])[1]
    # full attention keeps the cache of the whole sequence, on all ranks
    left_out = tuple(
        f"layer{index}."
        for index, layer in enumerate(model.config.expanded_layers())
        if isinstance(layer, FullAttentionConfig)
    )
    return {
        f"{name} {stop} {path}": tensor
        for stop, state in ends.items()
        for path, tensor in pack(whole_state(state, specs, tensors)).items()
        if not any(part in f"{path}." for part in left_out)
    }


def on_this_rank(rank: int, text: str, tp: int, cp: int, shares: list[int]) -> list[Result]:
    tensors, sequence = groups(rank, tp, cp)
    return [run(text, tensors, sequence, share) for share in shares]


def check(name: str, tp: int, cp: int) -> None:
    """All shares of a mesh, in the same processes."""
    text = MODELS[name]
    quantum = ModelConfig.model_validate_json(text).quantum
    shares = [share for share in SHARES.values() if share % quantum == 0]
    assert len(shares) == (3 if quantum == 1 else 2), "a share holds whole blocks"
    parts = on_ranks(on_this_rank, tp * cp, text, tp, cp, shares)
    for index, share in enumerate(shares):
        want = run(text, WHOLE, ONE_RANK, share)
        compare(want, [rank[index] for rank in parts], tp, cp, f"{name}, tp {tp}, cp {cp}, share {share}")


def compare(want: Result, ranks: list[Result], tp: int, cp: int, where: str) -> None:
    for number, found in enumerate(ranks):  # those that hold a share together agree to the last bit
        for name, tensor in found.items():
            assert torch.equal(tensor, ranks[number - number % tp][name]), (where, number, name)
    num_edges = 0
    for name, tensor in want.items():
        got = [rank[name] for rank in ranks[::tp] if name in rank]
        if name.startswith("edge"):
            num_edges += len(got)
            assert len(got) <= 1 or cp == 1
        else:
            assert len(got) == cp, (where, name)
        if name.startswith("by token"):
            got = [torch.cat(got, dim=1)]
        elif name.startswith("gradient"):
            got = [torch.stack(got).sum(0)]
        for found in got:
            assert found.shape == tensor.shape, (where, name)
            assert not tensor.numel() or (found - tensor).abs().max().item() <= NEAR, (where, name)
    assert num_edges >= min(cp, 2) or not any(name.startswith("edge") for name in want), where


@pytest.mark.long
@pytest.mark.parametrize(("tp", "cp"), MESHES, ids=[f"tp{tp}-cp{cp}" for tp, cp in MESHES])
@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_on_every_mesh_is_one_rank(name: str, tp: int, cp: int) -> None:
    check(name, tp, cp)


@pytest.mark.parametrize("name", ["hybrid_12l", "slide_12l"])
def test_a_recipe_on_two_by_two_ranks_is_one_rank(name: str) -> None:
    check(name, 2, 2)


def test_the_matrix_has_every_recipe() -> None:
    recipes_here = sorted((recipes.PACKAGED_CONFIGS / "model").glob("*.yaml"))
    assert {tiny(path) for path in recipes_here} == set(MODELS.values())
    kinds = {layer["mixer"] for text in MODELS.values() for layer in json.loads(text)["layers"]}
    assert kinds == {"sliding_window", "block_recurrent", "linear_attention", "full_attention"}
