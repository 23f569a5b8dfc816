"""How planned memory and time move with what is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longspan.modeling.config import ModelConfig, SlidingWindowConfig
from longspan.trainer.plan.hardware import Hardware, interpolate, load_hardware
from longspan.trainer.plan.memory import backward_workspace, plan_memory
from longspan.trainer.plan.parameters import total_parameters
from longspan.trainer.plan.report import make_plan
from longspan.trainer.plan.setting import Setting
from longspan.trainer.plan.timing import plan_step
from longspan.trainer.recipes import read_recipe


def setting(name: str = "rec_fixed_skip_12l", **changes: object) -> Setting:
    config = ModelConfig(**{**read_recipe(f"configs/model/{name}.yaml")["model"], "vocab_size": 32128})
    return replace(Setting(config, 8, 4096, 1, "bf16", "none", "none", 0), **changes)


@pytest.fixture(scope="module")
def h100() -> Hardware:
    return load_hardware("h100")


@pytest.mark.parametrize("name", ["rec_fixed_skip_12l", "slide_12l", "hybrid_12l", "full_12l"])
@pytest.mark.parametrize("checkpointing", ["none", "mixer", "layer"])
def test_more_tokens_take_more_memory_and_time(name: str, checkpointing: str, h100: Hardware) -> None:
    plans = [setting(name, segment_tokens=n, checkpointing=checkpointing) for n in (1024, 2048, 4096, 16384, 65536)]
    totals = [plan_memory(plan).total for plan in plans]
    assert totals == sorted(set(totals))
    steps = [plan_step(plan, h100) for plan in plans]
    device, seconds = [step.device for step in steps], [step.seconds for step in steps]
    assert device == sorted(set(device))
    assert seconds == sorted(seconds)  # short ones take as long as their launches
    assert seconds[-1] > seconds[0]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_checkpointing_lowers_memory_and_costs_time(rows: int, h100: Hardware) -> None:
    plans = [setting(rows=rows, segment_tokens=32768, checkpointing=c) for c in ("none", "mixer", "layer")]
    totals = [plan_memory(plan).total for plan in plans]
    assert totals == sorted(totals, reverse=True)
    assert totals[2] < 0.6 * totals[0]
    seconds = [plan_step(plan, h100).seconds for plan in plans]
    assert seconds == sorted(set(seconds))


def test_an_optimizer_and_wider_numbers_take_more_memory() -> None:
    bare = plan_memory(setting())
    assert plan_memory(setting(precision="fp32")).total > 1.7 * bare.total
    adamw, adafactor = (plan_memory(setting(optimizer=name, zero_stage=1)) for name in ("adamw", "adafactor"))
    assert adamw.optimizer > adafactor.optimizer > bare.optimizer == 0


def test_gradients_are_whole_when_micro_batches_add_up() -> None:
    once, often = plan_memory(setting(optimizer="adamw")), plan_memory(setting(optimizer="adamw", micro_batches=4))
    assert often.gradients == often.weights > once.gradients


def test_the_update_is_the_peak_of_a_tiny_batch() -> None:
    tiny = plan_memory(setting(rows=1, segment_tokens=1024, optimizer="adamw", zero_stage=1))
    assert tiny.activations == 0
    assert tiny.gradients == 2 * total_parameters(setting().model)


def test_half_of_the_time_of_long_segments_is_not_lost_on_the_host(h100: Hardware) -> None:
    assert make_plan(setting(), h100)["step"]["bound_by"] == "device"
    small = make_plan(setting("rec_fixed_skip_quickstart", rows=1, segment_tokens=128), h100)
    assert small["step"]["bound_by"] == "host"
    assert any("launching" in line for line in small["assumptions"])
    assert small["step"]["seconds"] == pytest.approx(small["step"]["host_seconds"])


def test_the_engine_s_part_of_a_step_comes_once(h100: Hardware) -> None:
    bare, once, often = (
        plan_step(setting(rows=1, optimizer=name, zero_stage=stage, micro_batches=count), h100)
        for name, stage, count in (("none", 0, 1), ("adamw", 1, 1), ("adamw", 1, 4))
    )
    assert bare.engine == 0 < once.engine == often.engine
    assert once.seconds == pytest.approx(bare.seconds + once.update + once.engine)
    assert often.seconds == pytest.approx(4 * bare.seconds + often.update + often.engine)


def test_states_of_all_micro_batches_are_held() -> None:
    one, four = (plan_memory(setting(rows=2, micro_batches=count)).state for count in (1, 4))
    assert four == 4 * one


def test_buffers_of_the_engine() -> None:
    """Stage 3 has one for its share of the gradients; at stage 2 one rank has the bucket for their sum too."""
    whole = 2 * total_parameters(setting().model)
    two = [plan_memory(setting(optimizer="adamw", zero_stage=stage, shards=2)).gradients for stage in (2, 3)]
    assert two[0] < two[1] == whole / 2
    weights = [plan_memory(setting(optimizer="adamw", zero_stage=stage)).weights for stage in (0, 1, 2)]
    assert weights == [whole, whole, 2 * whole]


def test_sums_of_the_bias_grow_with_the_segment() -> None:
    """[tiles of 64 keys, those of the cache too, 8 heads, 128] in fp32: 67 MB at 2^20 tokens; none with RoPE."""
    t5, rotary = (SlidingWindowConfig(mixer="sliding_window", positions=name) for name in ("t5", "rope"))
    long = setting("slide_13l", rows=1, segment_tokens=2**20, checkpointing="layer")
    sums = backward_workspace(long, t5) - backward_workspace(long, rotary)
    assert sums == (2**14 + 8) * 8 * 128 * 4


def test_what_does_not_fit_is_said(h100: Hardware) -> None:
    plan = make_plan(setting(rows=1, segment_tokens=2**20), h100)
    assert plan["memory"]["fits"] is False
    assert any("does not fit" in line for line in plan["assumptions"])


def test_more_rows_share_the_serial_chain(h100: Hardware) -> None:
    one, eight = (
        plan_step(setting(rows=rows, segment_tokens=32768 // rows), h100).parts["state chain"] for rows in (1, 8)
    )
    assert eight.forward < 0.8 * one.forward
    assert eight.flops == pytest.approx(one.flops)


def test_unmeasured_rates_are_named(h100: Hardware) -> None:
    estimated = h100.estimated()
    lines = make_plan(setting(), h100)["assumptions"]
    assert all(any(text in line for line in lines) for text in estimated)


def test_rates_of_shapes_between_and_beyond_the_measured_ones(h100: Hardware) -> None:
    seconds = [h100.matrix_seconds("forward", m, 1024, 1024, "bf16") for m in (64, 4096, 20000, 131072, 10**6)]
    assert seconds == sorted(seconds)
    # one launch does not get faster than its least time however few its rows
    assert seconds[0] > 1e-6
    assert 2 * 10**6 * 1024**2 / seconds[-1] < 1e12 * h100.matrix.peak_tflops
    wide, narrow = (h100.window_seconds(32768, window, 8, 128) for window in (2048, 512))
    assert 3 < wide[0] / narrow[0] < 4


def test_interpolation() -> None:
    curve = [(1.0, 10.0), (2.0, 20.0), (4.0, 30.0)]
    assert interpolate(curve, 1.5) == 15.0
    assert interpolate(curve, 8.0) == 50.0
    assert interpolate(curve, 0.5) == 7.5
    assert interpolate([(3.0, 7.0)], 100.0) == 7.0
