"""Ranks that cannot train together end with 2, all of them, with one message, and none hangs."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from worlds import command_line, in_world

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import build_tiny_corpus, tiny_config
from trainer_toy import free_port

LIMIT = 3.0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    config = tiny_config(build_tiny_corpus(folder), training__micro_batch_lanes=1, parallel__timeout_seconds=60)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def train(rank: int, recipe: Path, run: Path, settings: list[list[str]], environment: dict[str, str]) -> Any:
    """`longspan train` with this rank's settings; its exit code, what it and torch's C++ say, and seconds."""
    os.environ.update(environment)
    sets = [part for setting in settings[rank % len(settings)] for part in ("--set", setting)]
    started, before = time.monotonic(), os.dup(2)
    with tempfile.TemporaryFile() as native:
        os.dup2(native.fileno(), 2)
        try:
            code, said = command_line(rank, ["train", str(recipe), "--run-dir", str(run), *sets])
        finally:
            os.dup2(before, 2)
        native.seek(0)
        return code, said + native.read().decode(), time.monotonic() - started


def ends(
    recipe: Path, folder: Path, ranks: int, settings: list[list[str]], environment: dict[str, str] | None = None
) -> tuple[list[int], list[str], float]:
    """Exit codes, what was said (the data's own warning left out), and the longest time."""
    [found] = in_world(ranks, folder, [(train, (recipe, folder / "run", settings, environment or {}))])
    said = [line for _, text, _ in found for line in text.splitlines() if "few long documents" not in line]
    assert not (folder / "run").exists(), "nothing is written"
    return [code for code, _, _ in found], said, max(seconds for _, _, seconds in found)


def test_processes_that_do_not_factor(recipe: Path, tmp_path: Path) -> None:
    codes, said, _ = ends(recipe, tmp_path, 3, [["parallel.tp=2"]])
    assert codes == [2, 2, 2]
    assert len(said) == 1 and "3 processes do not factor into parallel.tp = 2 x parallel.cp = 1" in said[0]


def test_a_size_that_differs_is_named_before_what_does_not_factor(recipe: Path, tmp_path: Path) -> None:
    codes, said, _ = ends(recipe, tmp_path, 3, [["parallel.tp=2"], ["parallel.tp=1"], ["parallel.tp=2"]])
    assert codes == [2, 2, 2]
    assert "differs in parallel.tp: 1 there, 2 on rank 0" in "\n".join(said) and len(said) == 3, said


def test_sizes_that_do_not_divide_are_one_message_with_all_of_them(recipe: Path, tmp_path: Path) -> None:
    codes, said, _ = ends(recipe, tmp_path, 2, [["parallel.tp=5", "parallel.cp=3"]])
    assert codes == [2, 2]
    text = "\n".join(said)
    assert [text.count(part) for part in ("problems in", "num_heads = 2", "parallel.cp = 3")] == [1, 1, 1], text


def test_another_configuration_on_one_rank(recipe: Path, tmp_path: Path) -> None:
    codes, said, seconds = ends(recipe, tmp_path, 2, [["optimizer.lr_peak=0.01"], ["optimizer.lr_peak=0.02"]])
    assert codes == [2, 2] and seconds < 50, "sooner than the limit"
    text = "\n".join(said)
    assert text.count("rank 1 on host") == 1 and "differs in optimizer.lr_peak: 0.02 there, 0.01 on rank 0" in text


def test_what_is_wrong_on_another_host_alone_is_said_there(recipe: Path, tmp_path: Path) -> None:
    """Rank 0 waits for it, and cannot know."""
    other = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    codes, said, _ = ends(recipe, tmp_path, 1, [["parallel.tp=7"]], other)
    assert codes == [2] and "model.num_heads = 2" in "\n".join(said)


def test_an_environment_that_makes_no_sense_is_one_message(recipe: Path, tmp_path: Path) -> None:
    other = {"RANK": "5", "WORLD_SIZE": "many", "MASTER_PORT": "99999"}
    codes, said, _ = ends(recipe, tmp_path, 1, [[]], other)
    text = "\n".join(said)
    assert codes == [2] and "2 problems" in text and "WORLD_SIZE = 'many'" in text and "MASTER_PORT = '99999'" in text


def test_a_master_that_nobody_serves(recipe: Path, tmp_path: Path) -> None:
    other = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    codes, said, seconds = ends(recipe, tmp_path, 1, [[f"parallel.timeout_seconds={LIMIT}"]], other)
    assert codes == [2] and seconds < LIMIT + 30
    assert len(said) == 1 and f"nobody answers at MASTER_ADDR:MASTER_PORT = 127.0.0.1:{other['MASTER_PORT']}" in said[0]


def test_ranks_that_do_not_come_are_named_on_those_that_do(recipe: Path, tmp_path: Path) -> None:
    codes, said, seconds = ends(recipe, tmp_path, 2, [[f"parallel.timeout_seconds={LIMIT}"]], {"WORLD_SIZE": "4"})
    assert codes == [2, 2] and seconds < LIMIT + 30
    assert len(said) == 1 and f"ranks 2, 3 of 4 did not come within {LIMIT:.0f} s" in said[0]


def test_a_rank_that_does_not_know_its_place_says_so_itself(recipe: Path, tmp_path: Path) -> None:
    """The others can only wait for it."""
    [found] = in_world(2, tmp_path, [(train_as, (recipe, tmp_path / "run", [{}, {"RANK": "7"}]))])
    [code, text] = found[1]
    assert code == 2 and "RANK = '7': not a whole number of 0 to 1, as WORLD_SIZE = 2" in text
    [code, text] = found[0]
    assert code == 2 and "rank 1 of 2 did not come" in text


def train_as(rank: int, recipe: Path, run: Path, environments: list[dict[str, str]]) -> tuple[int, str]:
    """`longspan train` with this rank's own environment; its exit code and what it says."""
    os.environ.update(environments[rank])
    return command_line(
        rank, ["train", str(recipe), "--run-dir", str(run), "--set", f"parallel.timeout_seconds={LIMIT}"]
    )


@pytest.mark.long
def test_a_program_that_listens_there_and_says_nothing(recipe: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        other = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(silent.getsockname()[1])}
        codes, said, seconds = ends(recipe, tmp_path, 1, [[f"parallel.timeout_seconds={LIMIT}"]], other)
    assert codes == [2] and seconds < LIMIT + 30
    assert len(said) == 1 and "rank 1 of 2 cannot join the others" in said[0] and "gives no answer within" in said[0]
    assert "another program" in said[0] and "MASTER_PORT" in said[0]


def test_a_program_that_answers_otherwise(recipe: Path, tmp_path: Path) -> None:
    def serve() -> None:
        while True:
            try:
                connection = web.accept()[0]
            except OSError:
                return
            with connection:
                if connection.recv(100):
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as web:
        threading.Thread(target=serve, daemon=True).start()
        other = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(web.getsockname()[1])}
        codes, said, seconds = ends(recipe, tmp_path, 1, [[f"parallel.timeout_seconds={LIMIT}"]], other)
    assert codes == [2] and seconds < LIMIT + 30
    assert len(said) == 1 and f"rank 1 of 2 cannot join the others at 127.0.0.1:{other['MASTER_PORT']}" in said[0]
    assert "another program listens there" in said[0] and "MASTER_PORT" in said[0]
