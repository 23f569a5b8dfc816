"""The command line that pipelines rely on: its surface, its speed, its exit codes."""

from __future__ import annotations

import argparse
import json
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
    },
    "bench block-recurrent": {*BENCH_OPTIONS, "--model", "--rows", "--segment-tokens"},
    "bench window-attention": {*BENCH_OPTIONS, "--rows", "--segment-tokens", "--window-tokens"},
    "bench cross-entropy": {*BENCH_OPTIONS, "--tokens", "--dim", "--vocab-size"},
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
