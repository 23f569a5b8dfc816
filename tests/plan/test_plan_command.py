"""`longspan plan`: what it prints, how it fails, and that it answers without loading torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longspan.trainer import cli

MODEL = "configs/model/rec_fixed_skip_12l.yaml"
OPTIONS = ["--rows", "8", "--segment-tokens", "4096", "--vocab-size", "32128"]
PARTS = {"weights", "gradients", "optimizer", "activations", "workspace", "state", "inputs"}


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["plan", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return json.loads(captured.out)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def test_json_of_a_bare_model(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, MODEL, *OPTIONS)
    assert result["parameters"]["paper_count"] == 160_433_152
    assert result["parameters"]["total"] == sum(
        value for name, value in result["parameters"].items() if name not in ("total", "paper_count")
    )
    memory, step = result["memory"], result["step"]
    assert memory["total_gib"] == pytest.approx(sum(memory[name] for name in PARTS))
    assert memory["total_gib"] < memory["reserved_gib"] < result["hardware"]["memory_gib"]
    assert memory["fits"] is True
    assert memory["optimizer"] == 0
    assert step["tokens"] == 8 * 4096
    assert step["tokens_per_second"] == pytest.approx(step["tokens"] / step["seconds"])
    assert 0.3 < step["share_of_matrix_rate"] < 1
    parts = sum(part["forward_seconds"] + part["backward_seconds"] for part in step["by_part"])
    assert step["bound_by"] == "device"
    assert step["seconds"] == pytest.approx(parts)
    assert result["assumptions"]


def test_json_of_a_training_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "data.lanes=8", "--set", "training.micro_batch_lanes=2"]
    result = plan(capsys, "configs/quickstart.yaml", *changes)
    setting = result["setting"]
    assert (setting["rows"], setting["micro_batches"], setting["segment_tokens"]) == (2, 4, 256)
    assert (setting["precision"], setting["optimizer"]) == ("fp32", "adamw")
    total = result["parameters"]["total"]
    # two moments of every parameter
    assert result["memory"]["optimizer"] == pytest.approx(8 * total / 2**30)
    assert result["step"]["update_seconds"] > 0


def test_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", MODEL, *OPTIONS]) == 0
    out = capsys.readouterr().out
    for expected in ("193,362,040", "160,433,152", "GiB", "tokens/s", "state chain", "window attention", "Assumed:"):
        assert expected in out


def test_overrides_reach_a_bare_model(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, MODEL, "--set", "model.ffn_dim=2048", "--rows", "2")
    assert result["parameters"]["feed_forward"] == 12 * 2 * 1024 * 2048


def test_answers_without_torch() -> None:
    program = (
        "import sys\n"
        "from longspan.trainer import cli\n"
        f"assert cli.main(['plan', {MODEL!r}, '--json']) == 0\n"
        "heavy = {'torch', 'numpy', 'triton', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_problem_of_a_bare_model_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "0", "--segment-tokens", "700", "--precision", "fp4", "--activation-checkpointing", "layr"]
    message = failure(capsys, MODEL, *options, "--hardware", "h10", "--set", "model.wdth=3")
    assert "7 problems" in message
    for expected in (
        "rows = 0: input should be greater than or equal to 1",
        "segment_tokens = 700: not a multiple of model.window_tokens = 512. Nearest: 512 or 1024",
        "segment_tokens = 700: shorter than two blocks of model.window_tokens = 512",
        "precision = 'fp4'",
        "activation_checkpointing = 'layr'",
        "hardware = 'h10': no rates of such a device. Did you mean h100?",
        "model.wdth: unknown key",
    ):
        assert expected in message


def test_a_segment_that_trains_no_state_is_refused_with_the_words_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    words = "segment_tokens = 512: shorter than two blocks of model.window_tokens = 512."
    assert words in failure(capsys, MODEL, "--segment-tokens", "512")
    recipe = ["configs/quickstart.yaml", "--set", "model.window_tokens=512", "--set", "data.segment_tokens=512"]
    assert cli.main(["train", *recipe]) == 2
    assert f"data.{words}" in capsys.readouterr().err
    result = plan(capsys, "configs/model/slide_12l.yaml", "--segment-tokens", "512")
    assert result["setting"]["segment_tokens"] == 512


def test_heads_without_a_kernel_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    for width in (64, 48):
        result = plan(capsys, MODEL, *OPTIONS, "--set", f"model.head_dim={width}", "--gpus", "2", "--lanes", "8")
        for assumed in (result["assumptions"], result["parallel"]["assumptions"]):
            found = [line for line in assumed if line.startswith("heads of width 48 have no kernel")]
            assert len(found) == (width == 48)
            assert all("block_recurrent and sliding_window run as plain PyTorch" in line for line in found)


@pytest.mark.parametrize("option", ["--rows", "--segment-tokens", "--vocab-size"])
def test_zero_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{option.removeprefix('--').replace('-', '_')} = 0" in failure(capsys, MODEL, option, "0")


def test_every_problem_of_a_recipe_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["training.precision=fp4", "data.segment_tokens=100", "data.lanes=7", "training.micro_batch_lanes=2"]
    sets = [argument for change in changes for argument in ("--set", change)]
    message = failure(capsys, "configs/quickstart.yaml", *sets, "--hardware", "tpu")
    assert "5 problems" in message
    for expected in ("training.precision", "data.segment_tokens = 100", "data.lanes = 7", "Known: h100"):
        assert expected in message


def test_options_of_bare_models_are_refused_with_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "configs/quickstart.yaml", "--rows", "4")
    assert "Use --set training.micro_batch_lanes=4" in message


def test_no_such_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean configs/model/slide_12l.yaml" in failure(capsys, "configs/model/slide_12.yaml")


def test_a_file_that_is_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "a recipe is a mapping" in failure(capsys, str(tmp_path / "list.yaml"))
    (tmp_path / "model.yaml").write_text("model: 3")
    assert "input should be a section with fields" in failure(capsys, str(tmp_path / "model.yaml"), "--vocab-size", "9")


def test_an_offloaded_optimizer_takes_no_memory_of_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "parallel.zero_stage=1", "--set", "parallel.offload_optimizer=true"]
    result = plan(capsys, "configs/quickstart.yaml", *changes)
    assert result["memory"]["optimizer"] == 0
    assert any("host's memory" in line for line in result["assumptions"])
