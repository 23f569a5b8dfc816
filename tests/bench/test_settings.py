"""Options of `longspan bench`: everything that is wrong is said at once; defaults follow the device."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from longspan.errors import ConfigError
from longspan.trainer import cli
from longspan.trainer.bench.settings import (
    ChainSettings,
    Common,
    LossSettings,
    StepSettings,
    WindowSettings,
    read_settings,
)
from longspan.trainer.commands.bench import command_line


def parsed(*words: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(["bench", *words])


def settings(*words: str, on_gpu: bool = False) -> Common:
    return read_settings(parsed(*words), on_gpu)


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        settings(*words)
    assert raised.value.exit_code == 2
    return [str(problem) for problem in raised.value.problems]


def test_all_problems_of_a_step_are_listed_at_once() -> None:
    found = problems(
        "step",
        "--model",
        "rec_fixed_skip_12",
        "--rows",
        "0",
        "--segment-tokens",
        "-5",
        "--dropout",
        "1",
        "--repeat",
        "0",
    )
    assert found[0] == "--repeat = 0: must be 1 or more."
    assert found[1] == "--rows = 0: must be 1 or more."
    assert found[2] == "--segment-tokens = -5: must be 1 or more."
    assert found[3] == "--dropout = 1.0: must be 0 or more and less than 1."
    assert found[4].startswith("--model rec_fixed_skip_12: no such model. Did you mean rec_fixed_skip_12l")
    assert len(found) == 5


def test_zero_tokens_are_refused() -> None:
    assert "--segment-tokens = 0: must be 1 or more." in problems("step", "--segment-tokens", "0")
    assert problems("cross-entropy", "--tokens", "0") == ["--tokens = 0: must be 1 or more."]
    assert "--rows = 0: must be 1 or more." in problems("block-recurrent", "--rows", "0")
    assert "--window-tokens = 0: must be 1 or more." in problems("window-attention", "--window-tokens", "0")


def test_a_segment_must_be_a_multiple_of_the_window_of_every_model() -> None:
    found = problems("step", "--model", "slide_12l,slide_quickstart", "--segment-tokens", "600")
    assert found == [
        "--segment-tokens = 600: not a multiple of window_tokens of slide_12l = 512. Nearest: 512 or 1024.",
        "--segment-tokens = 600: not a multiple of window_tokens of slide_quickstart = 64. Nearest: 576 or 640.",
    ]


def test_a_segment_that_trains_no_state_is_refused() -> None:
    (found,) = problems("step", "--model", "rec_fixed_skip_12l,slide_12l", "--segment-tokens", "512")
    assert found.startswith(
        "--segment-tokens = 512 for rec_fixed_skip_12l: shorter than two blocks of model.window_tokens"
    )


def test_an_unknown_peer_gets_a_suggestion() -> None:
    assert problems("window-attention", "--peers", "flexx,flash") == [
        "--peers flexx: unknown peer. Did you mean flex or flex_bias?"
    ]


def test_a_model_without_recurrent_layer_has_no_chain() -> None:
    assert problems("block-recurrent", "--model", "slide_12l") == [
        "--model slide_12l: has no block_recurrent layer. Name a model that has one."
    ]


def test_a_recipe_that_is_wrong_names_its_fields(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {layers: [{mixer: sliding_window}], window_tokns: 4}\n", encoding="utf-8")
    (found,) = problems("step", "--model", str(recipe))
    assert "model.window_tokns" in found or "window_tokns" in found
    assert "Did you mean window_tokens?" in found
    (missing,) = problems("step", "--model", str(tmp_path / "none.yaml"))
    assert "no recipe at" in missing


def test_files_need_a_folder(tmp_path: Path) -> None:
    found = problems(
        "step", "--write-report", str(tmp_path / "no" / "page.md"), "--profile", str(tmp_path / "no" / "p")
    )
    assert len(found) == 2 and all("there is no folder" in problem for problem in found)
    found = problems("step", "--write-report", str(tmp_path), "--profile", str(tmp_path))
    assert len(found) == 2 and all("is a folder" in problem for problem in found)


def test_defaults_on_a_gpu_are_the_papers_sizes() -> None:
    step = settings("step", "--model", "rec_fixed_skip_12l", "--model", "slide_12l", on_gpu=True)
    assert isinstance(step, StepSettings)
    assert (step.rows, step.segment_tokens, step.precision) == (8, 4096, "bf16")
    assert [model.name for model in step.models] == ["rec_fixed_skip_12l", "slide_12l"]
    assert {model.vocab_size for model in step.models} == {32128} and {model.dropout for model in step.models} == {0}
    chain = settings("block-recurrent", on_gpu=True)
    assert isinstance(chain, ChainSettings)
    assert chain.chain_rows == (1, 2, 4, 8) and chain.mixer_shapes == ((1, 32768), (8, 4096))
    window = settings("window-attention", on_gpu=True)
    assert isinstance(window, WindowSettings)
    assert (window.shapes, window.window_tokens, window.num_heads) == (((1, 32768), (8, 4096)), 512, 8)
    losses = settings("cross-entropy", on_gpu=True)
    assert isinstance(losses, LossSettings)
    assert losses.cases == ((32768, 1024, 32128), (8192, 1024, 131072))


def test_defaults_on_a_cpu_are_tiny_and_fp32() -> None:
    step = settings("step")
    assert isinstance(step, StepSettings)
    assert (step.rows, step.segment_tokens, step.precision) == (2, 256, "fp32")
    assert step.models[0].vocab_size == 384


@pytest.mark.parametrize(("given", "peers"), [("all", ("plain", "lucidrains")), ("none", ()), ("plain", ("plain",))])
def test_peers_are_chosen_by_name(given: str, peers: tuple[str, ...]) -> None:
    assert settings("step", "--peers", given).peers == peers
    assert settings("step", "--no-peers").peers == ()


def test_the_command_is_written_back_without_places(tmp_path: Path) -> None:
    words = ["step", "--rows", "4", "--model", "slide_12l", "--model", "rec_fixed_skip_12l", "--peers", "plain"]
    line = command_line(parsed(*words, "--json", "--write-report", str(tmp_path / "page.md")))
    assert str(tmp_path) not in line
    assert settings(*line.split()[2:]) == settings(*words)


def test_wrong_options_are_refused_before_torch_is_loaded() -> None:
    code = (
        "import sys; from longspan.trainer import cli; code = cli.main(['bench', 'step', '--rows', '0']); "
        "sys.exit(code + 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "1 problem in longspan bench step:" in done.stderr
