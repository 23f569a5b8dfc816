"""Bad input end to end: each command's message, its exit code, its JSON object, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from longspan.trainer.cli import main
from longspan.trainer.tracking import MlflowStore

RECIPE = {
    "name": "tiny",
    "model": {
        "dim": 32,
        "num_heads": 2,
        "head_dim": 16,
        "ffn_dim": 64,
        "window_tokens": 16,
        "layers": [{"mixer": "sliding_window"}, {"mixer": "block_recurrent", "num_states": 4}],
    },
    "data": {"shards": "shards", "recipe": "corpus.yaml", "segment_tokens": 64, "lanes": 2},
    "training": {"steps": 4, "micro_batch_lanes": 2, "threads": 1},
    "checkpoint": {"interval_steps": 2},
    "validation": {"interval_steps": 4, "max_document_tokens": 128, "sample_tokens": 4},
    "tracking": {"enabled": False},
}
SHORT = "longspan: 1 of 17 documents are shorter than a block of 16 tokens and are padded to it, e.g. notes/short.txt"

Outcome = tuple[int, str, dict[str, object]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes, a corpus with one short document, and a finished run `run`."""
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "texts").mkdir()
    for index in range(17):
        words = " ".join(f"word{(index * 7 + i * i) % 23}" for i in range(60))
        (folder / "texts" / f"{index:02}.txt").write_text(words)
    (folder / "texts" / "short.txt").write_text("hi")
    corpus = {"name": "tiny", "sources": [{"kind": "folder", "name": "notes", "path": "texts"}]}
    (folder / "corpus.yaml").write_text(yaml.safe_dump({**corpus, "held_out": ["notes/03.txt"]}))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["data", "build", "corpus.yaml", "--out", "shards", "--json"]) == 0
        assert main(["train", "tiny.yaml", "--run-dir", "run", "--json"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command with `--json` in `place`: exit code, standard error, the one object on standard output."""
    monkeypatch.chdir(place)

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        try:
            code = main([*arguments, "--json"])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        assert captured.out.count("\n") == 1
        return code, captured.err, json.loads(captured.out)

    return run


@pytest.fixture
def refused(place: Path, command: Callable[..., Outcome]) -> Callable[..., str]:
    """Run a command that must fail with `exit_code` and change nothing; returns its message."""

    def run(*arguments: str, exit_code: int = 2) -> str:
        before = snapshot(place)
        code, error, result = command(*arguments)
        assert (code, result["exit_code"]) == (exit_code, exit_code)
        assert error.endswith(f"longspan: {result['error']}\n")
        assert snapshot(place) == before
        return str(result["error"])

    return run


def snapshot(folder: Path) -> dict[str, int]:
    """Every path below `folder` with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


VALUES = {
    "optimizer.betas=[0.9]": "optimizer.betas.1: required, but not given.",
    "optimizer.betas=[0.9,2.0]": "optimizer.betas.1 = 2.0: input should be less than 1.",
    "optimizer.lr_peak=.inf": "optimizer.lr_peak = inf: input should be a finite number.",
    "data.source_weights={notes: .nan}": "data.source_weights.notes = nan: input should be a finite number.",
    "parallel.timeout_seconds=.inf": "parallel.timeout_seconds = inf: input should be a finite number.",
    "model.dropout=.nan": "model.dropout = nan: input should be a finite number.",
    "model.layers=deep": "model.layers = 'deep': input should be a list.",
    "model.layers=[]": "model.layers: list should have at least 1 items, not 0.",
    "model=3": "model = 3: input should be a section with fields.",
    "model.dim=": "model.dim = null: input should be a valid integer.",
}


@pytest.mark.parametrize("override", VALUES)
def test_a_value_that_cannot_be(refused: Callable[..., str], override: str) -> None:
    assert refused("train", "tiny.yaml", "--run-dir", "new", "--set", override) == (
        f"1 problem in recipe tiny.yaml:\n  {VALUES[override]}\nFix the recipe or pass --set section.field=value."
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optimizer.betas=[0.9,2]", "optimizer.betas.1 = 2: input should be less than 1."),
        (
            "model.layers=[{mixer: mamba}]",
            "model.layers.0.mixer = 'mamba': unknown mixer. "
            "Allowed: sliding_window, block_recurrent, linear_attention, full_attention.",
        ),
    ],
)
def test_three_mistakes_at_once_one_of_them_in_a_list(refused: Callable[..., str], override: str, problem: str) -> None:
    overrides = ["--set", override, "--set", "seeed=1", "--set", "data.segment_tokens=100"]
    assert refused("train", "tiny.yaml", "--run-dir", "new", *overrides) == (
        f"3 problems in recipe tiny.yaml:\n"
        f"  {problem}\n"
        f"  seeed: unknown key. Did you mean seed?\n"
        f"  data.segment_tokens = 100: not a multiple of model.window_tokens = 16. Nearest: 96 or 112.\n"
        f"Fix the recipe or pass --set section.field=value."
    )


def test_fields_that_are_missing_inside_a_list(place: Path, refused: Callable[..., str]) -> None:
    (place / "thin.yaml").write_text("name: thin\nsources: [{kind: folder}, 3]\n")
    assert refused("data", "build", "thin.yaml", "--out", "new") == (
        "3 problems in recipe thin.yaml:\n"
        "  sources.0.name: required, but not given.\n"
        "  sources.0.path: required, but not given.\n"
        "  sources.1 = 3: input should be a section with fields.\n"
        "Fix the recipe or pass --set section.field=value."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "the following arguments are required: config. See `longspan train --help`."),
        (["data", "verify"], "the following arguments are required: folder. See `longspan data verify --help`."),
        (
            ["generate", "run", "--prompt", "x", "--seed", "one"],
            "argument --seed: invalid int value: 'one'. See `longspan generate --help`.",
        ),
        (["train", "texts"], "texts is a folder, not a recipe. Name a YAML file."),
    ],
)
def test_a_wrong_command_line(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert refused(*arguments) == message


def test_a_recipe_that_is_like_no_other_gets_the_list(refused: Callable[..., str]) -> None:
    message = refused("train", "zzz.yaml")
    assert message.startswith("no recipe at zzz.yaml. Packaged recipes: configs/data/")
    assert "configs/quickstart.yaml" in message and message.endswith("; models in configs/model/.")


def test_shards_that_are_not_there_name_the_command_that_puts_them_there(refused: Callable[..., str]) -> None:
    assert refused("train", "tiny.yaml", "--run-dir", "new", "--set", "data.shards=elsewhere") == (
        "data.shards = elsewhere: there is no corpus (no manifest.json). Build it with "
        "`longspan data build corpus.yaml --out elsewhere`, or point data.shards at a folder that it wrote."
    )


def test_evaluation_from_another_folder_says_how_to_name_the_shards(
    place: Path, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "spec.yaml").write_text("name: tiny\ncontext_tokens: [16]\n")
    monkeypatch.chdir(tmp_path)
    assert refused("evaluate", str(place / "run"), "--spec", str(place / "spec.yaml")) == (
        f"no corpus at shards: manifest.json is missing. Build one with `longspan data build RECIPE --out shards`. "
        f"The run was trained on data.shards = shards, seen from {tmp_path}; to name another place: "
        f"--set shards=FOLDER."
    )


def test_a_port_in_use(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        message = refused("train", "tiny.yaml", "--run-dir", "new")
    assert message.startswith(
        f"port {port} on 127.0.0.1 is in use, so the processes cannot meet there. "
        f"Set MASTER_PORT (torchrun: --master-port) to a free port, e.g. "
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "damaged", "--prompt", "x"],
        ["export", "damaged", "new"],
        ["train", "tiny.yaml", "--run-dir", "new", "--init-from", "damaged"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_named_checkpoint_with_one_flipped_bit(
    place: Path, refused: Callable[..., str], arguments: list[str]
) -> None:
    folder = place / "damaged" / "checkpoints"
    shutil.rmtree(place / "damaged", ignore_errors=True)
    shutil.copytree(place / "run" / "checkpoints" / "step-00000004", folder / "step-00000004")
    (weights,) = (folder / "step-00000004" / "weights").iterdir()
    content = bytearray(weights.read_bytes())
    content[5000] ^= 1
    weights.write_bytes(content)
    assert refused(*arguments, exit_code=70) == (
        f"checkpoint damaged/checkpoints/step-00000004 does not verify:\n"
        f"  weights/{weights.name}, bytes 0-{len(content) - 1}: not the bytes that were saved\n"
        f"Name another checkpoint of the run; `longspan train --resume` falls back to the newest that verifies."
    )


def test_a_short_document_costs_one_warning(command: Callable[..., Outcome], tmp_path: Path) -> None:
    code, error, result = command("train", "tiny.yaml", "--run-dir", str(tmp_path / "run"))
    assert (code, result["steps"]) == (0, 4)
    assert error.count("padded") == 1 and error.count(SHORT) == 1


def test_a_run_that_diverges_keeps_and_names_the_checkpoint_from_before(
    command: Callable[..., Outcome], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sets = ["optimizer.lr_peak=1e30", "schedule.warmup_steps=0", "checkpoint.interval_steps=1", "training.steps=9"]
    sets += ["training.max_consecutive_skips=6", "validation.interval_steps=3"]
    code, error, result = command("train", "tiny.yaml", "--run-dir", str(run), *(x for s in sets for x in ("--set", s)))
    assert (code, result["exit_code"]) == (72, 72)
    assert result["error"] == (
        f"loss or gradient was not finite in 6 steps in a row (training.max_consecutive_skips = 6), the last of them "
        f"step 7. The last good checkpoint is {run}/checkpoints/step-00000001. "
        f"Lower optimizer.lr_peak or look at the data of these steps."
    )
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000001"]
    assert "step 3: held-out nan bits/byte" in error


def test_a_home_folder_in_a_corpus_recipe(
    place: Path, command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place))
    recipe = {"name": "home", "sources": [{"kind": "folder", "name": "notes", "path": "~/texts"}]}
    (tmp_path / "home.yaml").write_text(yaml.safe_dump(recipe))
    code, _, result = command("data", "build", str(tmp_path / "home.yaml"), "--out", str(tmp_path / "shards"))
    assert (code, result["documents"]) == (0, 18)


def test_metrics_of_a_dead_server_reach_a_live_store_once(command: Callable[..., Outcome], tmp_path: Path) -> None:
    run, database = tmp_path / "run", tmp_path / "mlflow.db"
    base = ["train", "tiny.yaml", "--run-dir", str(run), "--set", "tracking.enabled=true", "--set"]
    code, error, _ = command(*base, "tracking.uri=http://127.0.0.1:9")
    assert code == 0
    assert error.count("cannot reach the tracking store http://127.0.0.1:9") == 1
    MlflowStore(f"sqlite:///{database}", "tests", None)  # making the tables may take longer than a short run waits
    code, _, _ = command(*base, f"tracking.uri=sqlite:///{database}", "--resume")
    assert code == 0
    with sqlite3.connect(database) as store:
        steps = store.execute("select step from metrics where key = 'train/loss' order by step").fetchall()
    assert steps == [(1,), (2,), (3,), (4,)]


def test_a_tracking_database_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "mlflow.db"
    (tmp_path / ".mlflow.db.new-1").write_text("what a process left that died while it made the tables")
    replace = os.replace

    def dies(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        MlflowStore(f"sqlite:///{database}", "tests", None)
    assert not database.exists()
    monkeypatch.setattr(os, "replace", replace)
    MlflowStore(f"sqlite:///{database}", "tests", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.lock", "mlflow.db"]
