"""What layers really keep for the backward pass, counted on the kernels' autograd functions in the interpreter."""

from __future__ import annotations

import pytest
import torch

from longspan.kernels.backend import forced, interpreting
from longspan.kernels.block_recurrent import scan
from longspan.modeling import state as states
from longspan.modeling.config import ModelConfig
from longspan.modeling.model import build_model
from longspan.trainer.plan import memory
from longspan.trainer.plan.memory import loss_memory, saved
from longspan.trainer.plan.setting import Setting

TINY = {
    "vocab_size": 64,
    "dim": 64,
    "num_heads": 2,
    "head_dim": 32,
    "ffn_dim": 256,
    "window_tokens": 16,
    "dropout": 0.0,
}
RECURRENT = {"mixer": "block_recurrent", "num_states": 16}
SHORT, LONG = 16, 48

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts tensors of the CPU")


def kept_bytes(config: ModelConfig, policy: str, length: int) -> int:
    """Bytes of all storages that the graph of one forward pass holds, parameters and arguments left out."""
    model = build_model(config).train()
    model.set_activation_checkpointing(policy)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    state = model.init_state(1)
    reset = torch.zeros(1, -(-length // model.quantum), dtype=torch.bool)
    given = [*model.parameters(), tokens, reset, *(leaf for _, leaf in states.leaves(state))]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor: so that its address stays its own
        return tensor

    with forced("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, state, reset=reset, labels=tokens)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize(
    ("layers", "policy"),
    [
        ([{"mixer": "sliding_window"}], "none"),
        ([{"mixer": "sliding_window", "positions": "rope"}], "none"),
        ([{"mixer": "sliding_window"}], "mixer"),
        ([{"mixer": "sliding_window", "repeat": 2}], "layer"),
        ([RECURRENT], "none"),
        pytest.param([RECURRENT], "mixer", marks=pytest.mark.long),
        ([RECURRENT], "layer"),
        pytest.param([RECURRENT | {"gate": "lstm"}], "none", marks=pytest.mark.long),
    ],
    ids=[
        "window",
        "rotary",
        "window, mixer again",
        "window, layer again",
        "recurrent",
        "recurrent, mixer again",
        "recurrent, layer again",
        "recurrent, lstm",
    ],
)
def test_kept_bytes_grow_with_tokens_as_planned(layers: list[dict], policy: str) -> None:
    check_growth(layers, policy)


def test_border_states_alone_grow_with_tokens_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments whose reads are too many to be kept."""
    monkeypatch.setattr(scan, "KEEP_LIMIT_BYTES", 0)
    monkeypatch.setattr(memory, "CHAIN_KEEP_BYTES", 0)
    check_growth([RECURRENT], "none")


FEEDBACK = {"layers": [{"mixer": "sliding_window"}, RECURRENT], "feedback": True}
MEMORY = {"layers": [{"mixer": "sliding_window", "repeat": 2}], "memory": {"num_tokens": 4}}


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "policy"),
    [(FEEDBACK, "none"), (FEEDBACK, "mixer"), (FEEDBACK, "layer"), (MEMORY, "none")],
    ids=["feedback", "feedback, mixer again", "feedback, layer again", "memory"],
)
def test_every_run_of_a_stack_keeps_packed_weights_and_tables_of_its_own(model: dict, policy: str) -> None:
    check_growth(model["layers"], policy, **{name: value for name, value in model.items() if name != "layers"})


def check_growth(layers: list[dict], policy: str, **changes: object) -> None:
    """The growth, because tables of fixed size count for much in models as small as these and nothing in others."""
    config = ModelConfig(**TINY, layers=layers, **changes)
    planned = {}
    for length in (SHORT, LONG):
        setting = Setting(config, 1, length, 1, "fp32", policy, "none", 0)
        kept = sum(sum(saved(setting, layer).values()) for layer in config.expanded_layers())
        planned[length] = kept + loss_memory(setting)[0]
    growth = kept_bytes(config, policy, LONG) - kept_bytes(config, policy, SHORT)
    assert planned[LONG] - planned[SHORT] == pytest.approx(growth, rel=0.03)


@pytest.mark.parametrize(
    ("rows", "tokens", "sizes"), [(2, 500, (16, 16, 64)), (32, 4096, (256, 64, 384)), (1, 70_000, (512, 512, 1024))]
)
def test_chunks_of_blocks_are_those_of_the_scan(rows: int, tokens: int, sizes: tuple[int, int, int]) -> None:
    states, window, dim = sizes
    changes = {"window_tokens": window, "dim": dim, "layers": [RECURRENT | {"num_states": states}]}
    setting = Setting(ModelConfig(**(TINY | changes)), rows, tokens, 1, "bf16", "none", "none", 0)
    blocks = -(-tokens // window)
    layer = setting.model.expanded_layers()[0]
    assert memory.chain_chunk_blocks(setting, layer) == scan.chunk_blocks(rows, blocks, *sizes)


def test_limits_are_those_of_the_kernels() -> None:
    from longspan.kernels.block_recurrent import scan_layer
    from longspan.kernels.cross_entropy import autograd as loss
    from longspan.kernels.feed_forward import autograd as feed_forward
    from longspan.kernels.linear_attention import reference as linear_attention
    from longspan.kernels.tensor_parallel import vocabulary
    from longspan.kernels.window_attention import fused, support
    from longspan.kernels.window_attention.tiles import choose_tiles

    assert memory.LOSS_CHUNK_LOGITS == loss.MAX_CHUNK_LOGITS
    assert memory.DIVIDED_CHUNK_LOGITS == vocabulary.MAX_CHUNK_LOGITS
    assert memory.FFN_CHUNK_HIDDEN == feed_forward.MAX_CHUNK_HIDDEN
    assert memory.CHAIN_KEEP_BYTES == scan.KEEP_LIMIT_BYTES
    assert memory.KERNEL_HEAD_WIDTHS == support.WIDTHS == scan_layer.HEAD_WIDTHS
    assert memory.CHAIN_CHUNK_VALUES == scan.CHUNK_VALUES
    assert memory.LINEAR_CHUNK_TOKENS == linear_attention.CHUNK_TOKENS
    assert memory.WINDOW_PIECE_TOKENS == fused.PIECE_TOKENS
    tiles = [choose_tiles(dtype, width) for dtype in (torch.bfloat16, torch.float32) for width in (64, 128)]
    assert memory.WINDOW_DISTANCES == fused.MAX_DISTANCE
    assert memory.WINDOW_REACH == fused.REACH_INT
    assert {memory.WINDOW_TILE_TOKENS} == {tile.key_gradient.keys for tile in tiles}
