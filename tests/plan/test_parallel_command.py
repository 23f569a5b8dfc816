"""`longspan plan --gpus`: what it prints and refuses, how long it takes, and what must hold between layouts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path

import pytest

from longspan.modeling.config import ModelConfig
from longspan.trainer import cli, recipes
from longspan.trainer.config import RunConfig, cross_problems
from longspan.trainer.plan.hardware import load_hardware
from longspan.trainer.plan.layout import Job, Layout, axis_problems, layouts, read_only
from longspan.trainer.plan.search import LEAST_EFFICIENCY, Planner, describe, predicted_of
from longspan.trainer.plan.setting import Setting

MODEL = "configs/model/rec_fixed_skip_12l.yaml"
LONG = ["--segment-tokens", "131072", "--vocab-size", "32128", "--rows", "4", "--activation-checkpointing", "layer"]
HARDWARE = load_hardware("h100")
# launches that take no time: waits for other ranks are not hidden under them
NO_LAUNCHES = dict.fromkeys(("launch_us", "engine_us", "stage2_tensor_us", "stage3_tensor_us", "message_us"), 0.0)
LAUNCHED = HARDWARE.model_copy(update={"host": HARDWARE.host.model_copy(update=NO_LAUNCHES)})


def job(lanes: int = 8, segment: int = 65_536, **changes: object) -> Job:
    raw = recipes.read_recipe(MODEL)["model"]
    model = ModelConfig(**{**raw, "vocab_size": 32_128, "dropout": 0.0, **changes})
    return Job(Setting(model, 1, segment, 1, "bf16", "none", "adamw", 1), lanes)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def test_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    without = plan(capsys, MODEL, *LONG)
    result = plan(capsys, MODEL, *LONG, "--gpus", "1,2", "--lanes", "4", "--plot", str(picture))
    parallel = result.pop("parallel")
    without["setting"]["micro_batches"] = result["setting"]["micro_batches"]
    assert result == without  # what scripts read is as before
    assert [point["gpus"] for point in parallel["points"]] == [1, 2]
    best = parallel["points"][1]["layouts"][0]
    assert best["dp"] * best["cp"] * best["tp"] == 2
    assert best["seconds"] == pytest.approx(sum(best["seconds_by_cause"].values()))
    assert best["seconds"] == pytest.approx(best["simulated_seconds"], rel=0.03)
    assert best["tokens_per_second"] == pytest.approx(4 * 131_072 / best["seconds"])
    assert {step["gpus"] for step in parallel["measured"]} == {1, 2}
    assert not any(step["fitted"] for step in parallel["measured"])
    assert best["bound_by"] == "device"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "8", "--lanes", "4", "--only", "cp=8", "--only", "state_slices=1", "--optimizer", "adamw"]
    assert cli.main(["plan", MODEL, "--segment-tokens", "131072", *options]) == 0
    out = capsys.readouterr().out
    for expected in ("simulated", "is under 0.8", "ranks wait for each other's state", "Better: ", "InfiniBand"):
        assert expected in out


def test_impossible_numbers_of_gpus_are_all_named(capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "configs/quickstart.yaml", "--gpus", "3,7,8,1024")
    assert "3 problems" in message
    for expected in ("gpus = 3: no layout", "gpus = 7", "gpus = 1024", "Nearest: 2 or 4", "dp must divide 8 lanes"):
        assert expected in message


@pytest.mark.parametrize("text", ["0", "1025", "two", "1,-4", "8..", "..8", "1.5"])
def test_wrong_numbers_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a number of 1 to 1024" in failure(capsys, MODEL, "--gpus", text)


def test_a_range_that_falls_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "gpus = '64..8': a range rises. Write 8..64." in failure(capsys, MODEL, "--gpus", "64..8")


def test_everything_wrong_is_named_at_once_and_before_anything_is_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.trainer.commands.plan.make_plan", lambda *_: pytest.fail("computed"))
    options = ["pp=2", "zero_stag=1", "zero_stage=4", "activation_checkpointing=all", "offload_optimizer=maybe"]
    options += ["cp=0", "cp=", "dp"]
    only = [word for option in options for word in ("--only", option)]
    message = failure(
        capsys, MODEL, *only, "--gpus", "0,8..2,2", "--plot", "/nowhere/x.png", "--hardware", "tpu", "--rows", "0"
    )
    assert "13 problems in plan of " in message
    for expected in (
        "--only pp=2: write it as AXIS=VALUE,...; axes: dp, cp, tp",
        "Did you mean zero_stage?",
        "--only zero_stage=4: allowed: 0, 1, 2, 3.",
        "--only activation_checkpointing=all: allowed: none, mixer, layer.",
        "--only cp=0: allowed: whole numbers from 1 on.",
        "--only cp=: allowed",
        "--only dp: write it as",
        "gpus = '0': not a number of 1 to 1024",
        "gpus = '8..2': a range rises. Write 2..8.",
        "--plot /nowhere/x.png: there is no folder /nowhere.",
        "hardware = 'tpu'",
        "rows = 0",
    ):
        assert expected in message


def test_a_missing_recipe_hides_no_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "configs/no_such.yaml", "--gpus", "0")
    assert "2 problems" in message and "no recipe at configs/no_such.yaml" in message and "gpus = '0'" in message


def test_values_of_an_axis_add_up_and_may_have_leading_zeros() -> None:
    assert read_only(["cp=1", "cp=02,4", "zero_stage=0"]) == {"cp": ("1", "2", "4"), "zero_stage": ("0",)}


def test_options_of_several_gpus_need_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--plot: is of a plan over several GPUs" in failure(capsys, MODEL, "--plot", "x.png")
    assert "--only: is of a plan over several GPUs" in failure(capsys, MODEL, "--only", "cp=2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/x.png", "there is no folder"),
        ("x.pdf", "the picture is a PNG. Name it"),
        ("x", "the picture is a PNG. Name it"),
        ("folder.png", "is a folder. Name a file in it"),
    ],
)
def test_a_picture_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    assert message in failure(capsys, MODEL, "--gpus", "1", "--plot", str(tmp_path / name))


def test_a_disk_that_fills_while_the_picture_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "full.png").symlink_to("/dev/full")
    assert "cannot write the picture" in failure(capsys, MODEL, "--gpus", "1", "--plot", str(tmp_path / "full.png"))


def test_lanes_that_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert "lanes = 7: not a multiple of rows = 2" in failure(capsys, MODEL, "--rows", "2", "--lanes", "7")


def test_a_thousand_gpus_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    result = plan(capsys, MODEL, "--gpus", "1024", *LONG, "--optimizer", "adamw")
    assert time.process_time() - started < 10
    assert result["parallel"]["points"][0]["layouts_considered"] > 1000


@pytest.mark.parametrize("recipe", ["configs/quickstart.yaml", "configs/rec_gpu_quick.yaml"])
def test_layouts_are_those_that_the_trainer_accepts(recipe: str) -> None:
    raw = recipes.read_recipe(recipe)
    raw["model"] = {**raw["model"], "layers": [*raw["model"]["layers"], {"mixer": "full_attention"}], "dropout": 0.1}
    for dropout, name, cp, tp in itertools.product((0.0, 0.1), ("adamw", "adafactor"), (1, 2, 3, 4, 32), (1, 2, 3, 8)):
        changed = {**raw, "model": {**raw["model"], "dropout": dropout}, "optimizer": {"name": name}}
        changed["parallel"] = {"cp": cp, "tp": tp}
        config = RunConfig.model_validate(changed)
        refused = [problem for problem in cross_problems(config) if "zero_stage" not in problem.where]
        setting = Setting(config.model, 8, config.data.segment_tokens, 1, "fp32", "none", name, 0)  # type: ignore[arg-type]
        assert bool(axis_problems(Job(setting, 8), cp, tp)) == bool(refused), (dropout, name, cp, tp)


def test_every_layout_uses_all_gpus_and_lanes() -> None:
    found = layouts(job(lanes=24), 16)
    assert found
    for layout in found:
        assert layout.gpus == 16
        assert layout.dp * layout.micro_batch_lanes * layout.micro_batches == 24
        assert layout.micro_batch_lanes % layout.state_slices == 0
        assert layout.cp > 1 or layout.state_slices == 1
    assert {layout.zero_stage for layout in found} == {1, 2, 3}


def test_the_host_takes_what_does_not_fit() -> None:
    """A model whose fp32 state alone is more than a GPU has; offloading is tried where the rest does not fit."""
    large = job(1, 4096, dim=8192, num_heads=64, ffn_dim=32_768)
    ranked = Planner(large, HARDWARE).ranked(1, {})
    assert {one.layout.offload_optimizer for one in ranked} == {False, True}
    gained = [one.memory_gib for one in ranked if one.layout.offload_optimizer]
    assert min(gained) < min(one.memory_gib for one in ranked if not one.layout.offload_optimizer)
    assert not any(one.layout.offload_optimizer for one in Planner(job(), HARDWARE).ranked(1, {}) if one.layout.cp > 1)
    asked = layouts(job(), 8, {"offload_optimizer": ("true",)})
    assert asked and all(layout.offload_optimizer and layout.zero_stage for layout in asked)
    assert not any(layout.offload_optimizer for layout in layouts(job(), 8))


def seconds(layout: Layout, of: Job, hardware: object = HARDWARE) -> float:
    return Planner(of, hardware).candidate(layout).prediction.seconds  # type: ignore[arg-type]


def test_more_of_a_good_thing() -> None:
    """Faster links and more GPUs never slow a step down; a slower one never speeds it up."""
    layout = Layout(1, 8, 2, 1, 1, "layer", 8, 1)
    plain = seconds(layout, job())
    for name in ("nvlink", "infiniband"):
        link = getattr(HARDWARE.links, name)
        slow = link.model_copy(update={"gigabytes_per_second": link.gigabytes_per_second / 4})
        links = HARDWARE.links.model_copy(update={name: slow})
        assert seconds(layout, job(), HARDWARE.model_copy(update={"links": links})) > plain
    times = [seconds(Layout(dp, 1, 1, 1, 1, "layer", 1, 64 // dp), job(64)) for dp in (1, 2, 4, 8, 16, 32, 64)]
    assert times == sorted(times, reverse=True)
    spread = [seconds(Layout(1, cp, 1, 1, 1, "layer", 8, 1), job(segment=2**20)) for cp in (1, 2, 4, 8)]
    assert spread == sorted(spread, reverse=True)


def test_efficiency_falls_with_ranks_of_a_sequence() -> None:
    planner = Planner(job(), HARDWARE)
    found = [
        planner.efficiency(planner.candidate(Layout(1, cp, 1, 1, 1, "layer", 8, 1))) for cp in (1, 2, 4, 8, 16, 32)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1.0)
    assert found[-1] < LEAST_EFFICIENCY


def test_a_warning_names_the_cause_and_a_remedy_that_helps() -> None:
    planner = Planner(job(lanes=8, segment=16_384), LAUNCHED)
    candidate = planner.candidate(Layout(1, 8, 1, 1, 1, "layer", 8, 1))
    described = describe(planner, candidate, simulated=True)
    assert described["efficiency"] < LEAST_EFFICIENCY
    (warning,) = described["warnings"]
    assert "ranks wait for each other's state" in warning
    assert "state_slices = 2 (" in warning
    better = planner.efficiency(planner.candidate(Layout(1, 8, 1, 1, 2, "layer", 8, 1)))
    assert f"state_slices = 2 ({better:.2f})" in warning
    assert better > described["efficiency"]
    more = Planner(job(lanes=64, segment=16_384), LAUNCHED)
    wide = more.efficiency(more.candidate(Layout(1, 8, 1, 1, 8, "layer", 64, 1)))
    assert f"lanes = 64 in micro-batches of 64, state_slices = 8 ({wide:.2f})" in warning


def test_what_does_not_fit_says_so() -> None:
    planner = Planner(job(lanes=8, segment=2**20), HARDWARE)
    candidate = planner.candidate(Layout(1, 1, 1, 1, 1, "none", 8, 1))
    assert not candidate.fits
    assert "does not fit" in describe(planner, candidate, simulated=True)["warnings"][0]


@pytest.mark.parametrize("index", range(len(HARDWARE.measured)))
def test_measured_steps_are_met(index: int) -> None:
    """Within 20%, as on one GPU; those that rates of the host are fitted to within 5%."""
    measured = HARDWARE.measured[index]
    setting = dataclasses.replace(job().setting, segment_tokens=measured.segment_tokens)
    predicted = predicted_of(measured, setting, HARDWARE).prediction.seconds
    assert predicted == pytest.approx(measured.seconds, rel=0.05 if measured.fitted else 0.20)
