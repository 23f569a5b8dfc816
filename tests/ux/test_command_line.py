"""The command line that pipelines rely on: its surface, its speed, its exit codes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import pytest

from longspan.trainer import cli

BENCH_OPTIONS = {"--precision", "--peers", "--no-peers", "--repeat", "--profile", "--write-report", "--json"}
TRAIN_OPTIONS = {"config", "--run-dir", "--resume", "--init-from", "--fork-data", "--set", "--json"}
LAUNCH_OPTIONS = {"--nproc", "--nodes", "--max-restarts", "--dry-run"}
SURFACE = {
    "data build": {"config", "--out", "--processes", "--set", "--json"},
    "data verify": {"folder", "--json"},
    "data inspect": {"folder", "--png", "--json"},
    "data merge": {"out", "folders", "--json"},
    "data split": {"folder", "--out", "--sources", "--hold-out", "--json"},
    "train": TRAIN_OPTIONS,
    "launch local": {*TRAIN_OPTIONS, *LAUNCH_OPTIONS, "--rendezvous", "--run-id"},
    "launch slurm": {*TRAIN_OPTIONS, *LAUNCH_OPTIONS, "--time", "--sbatch"},
    "launch ray": {*TRAIN_OPTIONS, *LAUNCH_OPTIONS, "--address"},
    "launch kubernetes": {*TRAIN_OPTIONS, *LAUNCH_OPTIONS, "--kind", "--image", "--volume-claim"},
    "evaluate": {"checkpoint", "--spec", "--out", "--set", "--json"},
    "evals reconcile": {
        "runs",
        "--spec",
        "--once",
        "--every",
        "--address",
        "--workers",
        "--gpus-per-worker",
        "--alert-worse-by",
        "--alert-command",
        "--set",
        "--json",
    },
    "evals status": {"runs", "--spec", "--set", "--json"},
    "evals retry": {"runs", "--spec", "--step", "--set", "--json"},
    "export": {"checkpoint", "out", "--overwrite", "--push", "--private", "--json"},
    "generate": {"model", "--prompt", "--max-new-tokens", "--temperature", "--top-p", "--seed", "--json"},
    "report": {"runs", "--out", "--json"},
    "checkpoint verify": {"checkpoint", "--json"},
    "checkpoint convert": {"source", "out", "--overwrite", "--json"},
    "plan": {
        "config",
        "--hardware",
        "--rows",
        "--segment-tokens",
        "--vocab-size",
        "--precision",
        "--activation-checkpointing",
        "--lanes",
        "--optimizer",
        "--gpus",
        "--only",
        "--plot",
        "--set",
        "--json",
    },
    "bench list": {"--json"},
    "bench step": {
        *BENCH_OPTIONS,
        "--model",
        "--rows",
        "--segment-tokens",
        "--vocab-size",
        "--activation-checkpointing",
        "--dropout",
        "--optimizer",
        "--in-turns",
    },
    "bench block-recurrent": {*BENCH_OPTIONS, "--model", "--rows", "--segment-tokens"},
    "bench window-attention": {*BENCH_OPTIONS, "--rows", "--segment-tokens", "--window-tokens"},
    "bench cross-entropy": {*BENCH_OPTIONS, "--tokens", "--dim", "--vocab-size"},
    "bench context-parallel": {
        *(BENCH_OPTIONS - {"--peers", "--no-peers", "--profile"}),
        "--nproc",
        "--parts",
        "--model",
        "--rows",
        "--segment-tokens",
        "--state-slices",
        "--ring-tokens",
    },
    "bench data": {"--corpus", "--tokens", "--repeat", "--peers", "--no-peers", "--write-report", "--json"},
    "doctor": {"--json"},
}


def commands(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, argparse.ArgumentParser]:
    """All leaf commands by name."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        return {prefix.strip(): parser}
    found = {}
    for name, sub in groups[0].choices.items():
        found |= commands(sub, f"{prefix} {name}")
    return found


def test_surface_is_frozen() -> None:
    surface = {
        name: {action.option_strings[-1] if action.option_strings else action.dest for action in parser._actions}
        - {"--help"}
        for name, parser in commands(cli.build_parser()).items()
    }
    assert surface == SURFACE


def test_help_answers_at_once() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "longspan.trainer.cli", "--help"], capture_output=True, text=True)
    assert time.monotonic() - started < 1.5
    assert done.returncode == 0
    assert "perplexity versus context length" in done.stdout


@pytest.mark.parametrize("name", SURFACE)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_command_modules_exist() -> None:
    import importlib

    for parser in commands(cli.build_parser()).values():
        module = importlib.import_module(f"longspan.trainer.commands.{parser.get_default('module')}")
        assert callable(module.run)


def test_usage_error_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "configs/no_such.yaml", "--json"]) == 2
    captured = capsys.readouterr()
    assert "no recipe at configs/no_such.yaml" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["exit_code"] == 2


def test_argument_errors_end_with_2() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "errors_too", "code"),
    [
        (["plan", "configs/model/rec_fixed_skip_12l.yaml"], False, 141),
        (["plan", "configs/model/rec_fixed_skip_12l.yaml", "--json"], False, 141),
        (["plan", "configs/no_such.yaml"], True, 141),
        (["plan", "configs/no_such.yaml"], False, 2),
    ],
)
def test_a_reader_that_has_left_is_no_error_to_speak_of(arguments: list[str], errors_too: bool, code: int) -> None:
    """As after `| head`: no traceback, and the exit code that a shell gives to a program that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    errors = writer if errors_too else subprocess.PIPE
    done = subprocess.run([sys.executable, "-m", "longspan.trainer.cli", *arguments], stdout=writer, stderr=errors)
    os.close(writer)
    assert done.returncode == code
    said = (done.stderr or b"").decode()
    assert said.startswith("longspan: no recipe") if code == 2 else not said


def test_a_reader_that_has_left_a_rich_console() -> None:
    """Rich answers with an exit code of its own; `doctor` and the summary of a training print through it."""
    program = (
        "import sys; from rich.console import Console\n"
        "from longspan.trainer import cli; from longspan.trainer.commands import doctor\n"
        "doctor.run = lambda args: Console().print('word')\n"
        "sys.exit(cli.main(['doctor']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise BrokenPipeError("of a socket")

    monkeypatch.setattr("longspan.trainer.commands.doctor.run", fail)
    assert cli.main(["doctor"]) == 1
    assert "unexpected BrokenPipeError: of a socket" in capfd.readouterr().err


def test_a_full_disk_under_standard_output_is_said() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "longspan.trainer.cli", "bench", "list", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1 and "cannot write to standard output: No space left on device" in done.stderr
