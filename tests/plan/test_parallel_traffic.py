"""Bytes on each link, by hand: rec_fixed_skip_12l is 1024 wide, 8 heads of 128, W = 512, 512 states; bf16."""

from __future__ import annotations

import dataclasses

import pytest

from longspan.modeling.config import (
    BlockRecurrentConfig,
    FullAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    SlidingWindowConfig,
)
from longspan.trainer.plan import zero
from longspan.trainer.plan.hardware import load_hardware
from longspan.trainer.plan.links import Group, collective_seconds, hop_seconds, message_seconds, wire_bytes
from longspan.trainer.plan.memory import plan_memory
from longspan.trainer.plan.parameters import total_parameters
from longspan.trainer.plan.setting import Setting
from longspan.trainer.plan.timing import update_seconds
from longspan.trainer.plan.traffic import (
    ends_sums,
    halo_rows,
    kept_message_bytes,
    layer_messages,
    whole_state_bytes,
)
from longspan.trainer.recipes import read_recipe

LINKS = load_hardware("h100").links


def model(**changes: object) -> ModelConfig:
    raw = read_recipe("configs/model/rec_fixed_skip_12l.yaml")["model"]
    return ModelConfig(**{**raw, "vocab_size": 32_128, "dropout": 0.0, **changes})


def setting(rows: int, tokens: int, **changes: object) -> Setting:
    return dataclasses.replace(Setting(model(), rows, tokens, 1, "bf16", "none", "adamw", 1), **changes)


def test_halo() -> None:
    """Four rows of 512 tokens: keys and values of 8 x 128, and one flag a token, two bytes each."""
    messages = layer_messages(setting(4, 65_536), SlidingWindowConfig(), cp=2)
    assert messages.halo == (4 * 512 * (2 * 8 * 128 + 1) * 2,) == (8_392_704,)
    assert layer_messages(setting(4, 65_536), SlidingWindowConfig(), cp=1).halo == ()
    # half of the heads on each of two tensor-parallel ranks
    assert layer_messages(setting(4, 65_536, tp=2), SlidingWindowConfig(), cp=2).halo == (4 * 512 * 1025 * 2,)


def test_halo_of_shares_shorter_than_the_window() -> None:
    assert halo_rows(200, 512, 8) == [200, 200, 112]
    assert halo_rows(200, 512, 3) == [200, 200]
    assert halo_rows(512, 512, 8) == [512]
    assert halo_rows(512, 512, 1) == []


def test_state() -> None:
    """Two rows of 512 states of 1024 in fp32."""
    messages = layer_messages(setting(2, 8192), BlockRecurrentConfig(), cp=4)
    assert messages.carry == 2 * 512 * 1024 * 4 == 4_194_304
    assert layer_messages(setting(2, 8192), BlockRecurrentConfig(update="frozen"), cp=4).carry == 0


def test_ring() -> None:
    """Shares of 1024: 4095 tokens back reach four ranks; eight ranks have seven to the left, three have two."""
    layer = FullAttentionConfig(context_tokens=4096)
    messages = layer_messages(setting(2, 1024), layer, cp=8)
    assert messages.ring_hops == 4
    assert messages.ring == 2 * 2 * 1024 * 1024 * 2  # keys and values, rows, tokens, width, bytes
    assert messages.ring_gradients == 2 * messages.ring  # fp32
    assert layer_messages(setting(2, 1024), layer, cp=3).ring_hops == 2


def test_scan() -> None:
    """Eight matrices of 128 x 128 and their sums, and one factor a row, fp32."""
    messages = layer_messages(setting(2, 1024), LinearAttentionConfig(), cp=2)
    assert messages.scan_gradients == 2 * 8 * 128 * 129 * 4 == 1_056_768
    assert messages.scan == messages.scan_gradients + 2 * 4


def test_tensor_sums() -> None:
    """A sum is of B T D vectors; a recurrent layer gathers keys and values of W + T tokens."""
    local = setting(2, 1024, tp=4)
    messages = layer_messages(local, BlockRecurrentConfig(), cp=1)
    assert messages.sums == 2 * 1024 * 1024 * 2
    assert messages.gather == 2 * 2 * (512 + 1024) * 1024 * 2
    # initial state and ids, two double projections and the output's; norm and gate's bias; scales of both queries
    assert messages.path_gradients == 2 * (2 * 512 * 1024 + 4 * 1024**2 + 2 * 1024**2 + 2 * 1024 + 2 * 8)
    assert (messages.sum_calls, messages.gather_calls, messages.path_calls) == (1, 1, 11)
    assert ends_sums(local) == (4_194_304, 2 * 1024 * 3 * 4, 4_194_304)


def test_state_after_a_segment() -> None:
    """Twelve caches of 512 keys and values, and one state, of three rows."""
    assert whole_state_bytes(setting(3, 1024)) == 3 * (12 * 2 * 512 * 1024 * 2 + 512 * 1024 * 4)


@pytest.mark.parametrize(
    ("stage", "want"),
    [
        (0, [("all_reduce", 200, False)]),
        (1, [("all_reduce", 200, False), ("all_gather", 200, False)]),
        (2, [("all_reduce", 600, False), ("all_gather", 200, False)]),
        (3, [("all_gather", 1200, True), ("reduce_scatter", 600, True)]),
    ],
)
def test_zero(stage: int, want: list[tuple[str, float, bool]]) -> None:
    """100 parameters of two bytes, three micro-batches."""
    found = zero.traffic(stage, 100, 2, 3, 12, update=True)
    assert [(one.kind, one.num_bytes, one.overlapped) for one in found] == want


def test_zero_without_update_gathers_nothing() -> None:
    assert [one.kind for one in zero.traffic(1, 100, 2, 1, 12, update=False)] == ["all_reduce"]


def test_limits_are_those_of_deepspeed_and_the_engine() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from longspan.trainer import engine

    assert zero.BUCKET_ELEMENTS == engine._MAX_BUCKET
    assert DeepSpeedZeroConfig(stage=3).max_live_parameters == zero.MAX_LIVE_PARAMETERS
    assert [DeepSpeedZeroConfig(stage=stage).overlap_comm for stage in range(4)] == [False, False, False, True]


def test_a_ring_sends_its_share() -> None:
    assert wire_bytes("all_reduce", 800, 4) == 1200
    assert wire_bytes("all_gather", 800, 4) == 600
    assert wire_bytes("broadcast", 800, 4) == 800
    assert wire_bytes("all_reduce", 800, 1) == 0


def test_who_shares_a_host() -> None:
    """Hosts of eight: sixteen neighbours fill two, and of ranks four apart two fit on each."""
    assert Group.of(8, 1, 8) == Group(8, 1, 8, 1)
    assert Group.of(16, 1, 8) == Group(16, 1, 8, 2)
    assert Group.of(2, 4, 8) == Group(2, 4, 2, 1)
    assert Group.of(8, 4, 8) == Group(8, 4, 2, 4)
    assert Group.of(4, 16, 8) == Group(4, 16, 1, 4)


def test_time_of_messages() -> None:
    """NVLink of 300 GB/s and 100 us, InfiniBand of 45 GB/s and 120 us."""
    assert message_seconds(LINKS.nvlink, 268_435_456) == pytest.approx(1.0e-3, rel=0.01)  # measured: 1.0 ms
    assert message_seconds(LINKS.nvlink, 67_108_864) == pytest.approx(0.33e-3, rel=0.03)  # measured: 0.33 ms
    # fifteen hops of sixteen ranks, one of them between hosts
    want = 14 * (100e-6 + 3e6 / 300e9) + 120e-6 + 3e6 / 45e9
    assert hop_seconds(LINKS, Group.of(16, 1, 8), 3e6) == pytest.approx(want)


def test_time_of_collectives() -> None:
    """2 (R-1)/R of the bytes, 7/8 of them over NVLink; eight adapters of a host are faster than that, two are not."""
    near = collective_seconds(LINKS, Group.of(8, 1, 8), "all_reduce", 300e9)
    assert near == pytest.approx(2 * 7 / 8 + 2 * 3 * 10e-6)
    far = collective_seconds(LINKS, Group.of(64, 1, 8), "all_reduce", 300e9)
    assert far == pytest.approx(2 * 63 / 64 * 7 / 8 + 2 * (3 * 10e-6 + 3 * 20e-6))
    narrow = collective_seconds(LINKS, Group.of(16, 4, 8), "all_gather", 90e9)
    assert narrow == pytest.approx(15 / 16 + 10e-6 + 3 * 20e-6)
    assert collective_seconds(LINKS, Group.of(1, 1, 8), "all_reduce", 300e9) == 0


def test_tensor_parallel_parameters() -> None:
    """Heads, hidden units and vocabulary are divided; norms and the state path are whole."""
    config = model()
    whole = 2 * 12 * 1024 + 1024 + 1024 + (2 * 512 * 1024 + 6 * 1024**2) + 1024 + 2 * 8
    assert total_parameters(config, 4) == (total_parameters(config) - whole) // 4 + whole


def test_zero_divides_memory() -> None:
    """193,362,040 parameters over 8 ranks: fp32 masters and two moments at stage 1, weights too at stage 3."""
    parameters = 193_362_040
    alone, one, three = (
        plan_memory(setting(1, 4096, zero_stage=stage, shards=shards)) for stage, shards in ((1, 1), (1, 8), (3, 8))
    )
    assert alone.optimizer == 12 * parameters
    assert one.optimizer == three.optimizer == 1.5 * parameters
    assert one.weights == 2 * parameters + 2 * parameters  # and the bucket
    assert three.weights == pytest.approx(2 * parameters / 8 + 4 * parameters)  # those in use: all, it is a small model


def test_what_was_received_is_kept_where_layers_are_computed_again() -> None:
    """Two ranks, one row: twelve halos of 512 keys, values and flags, and a state of 512 x 1024 in fp32."""
    for policy in ("mixer", "layer"):
        alone, shared = (plan_memory(setting(1, 65_536, checkpointing=policy, cp=cp)) for cp in (1, 2))
        extra = shared.total - alone.total
        # at the peak some layers' messages may be gone already
        assert 0 < extra <= 12 * 512 * 2049 * 2 + 512 * 1024 * 4
    assert kept_message_bytes(setting(1, 65_536, cp=2), BlockRecurrentConfig()) == 512 * 2049 * 2 + 512 * 1024 * 4
    assert kept_message_bytes(setting(1, 4096, cp=4), LinearAttentionConfig()) == 4 * (8 * 128 * 129 + 1) * 4
    assert kept_message_bytes(setting(1, 4096, cp=4), FullAttentionConfig()) == 0
    whole = plan_memory(setting(1, 65_536, cp=2)).total
    assert whole == plan_memory(setting(1, 65_536)).total


def test_offloaded_optimizer() -> None:
    """193,362,040 parameters over 8 ranks: no fp32 of them on the GPU; the update goes over the host's memory."""
    on, off = (setting(1, 4096, shards=8, offload_optimizer=offload, micro_batches=3) for offload in (False, True))
    assert plan_memory(on).optimizer == 1.5 * 193_362_040
    assert plan_memory(off).optimizer == 0
    hardware = load_hardware("h100")
    rates = hardware.offload
    share = 193_362_040 / 8
    moved = (3 + 1) * 2 * share / (rates.link_gigabytes_per_second * 1e9)
    want = moved + 40 * share / (rates.update_gigabytes_per_second * 1e9)
    assert update_seconds(off, hardware, 193_362_040) == pytest.approx(want)
    assert want > 10 * update_seconds(on, hardware, 193_362_040)


def test_tensor_parallel_memory_shrinks() -> None:
    totals = [plan_memory(setting(1, 65_536, tp=tp)).total for tp in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)
