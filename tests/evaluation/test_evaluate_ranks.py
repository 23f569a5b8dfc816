"""One evaluation on two ranks: the numbers of one rank, one result, and no rank that waits for ever."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from worlds import command_line, in_world

from longspan.errors import DataError
from longspan.trainer.evaluation.ranks import sum_over_ranks
from longspan.trainer.evaluation.run import Prepared, evaluate
from longspan.trainer.evaluation.specs import load_spec
from longspan.trainer.evaluation.windows import Score

MODES = ["truncated", "carried", "reset", "state_reset", "swapped", "local"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    return tiny_run.run_directory(root / "runs" / "tiny", tiny_run.config(tiny_run.corpus(root)))


def failing_on_rank_one(rank: int, arguments: list[str]) -> tuple[int, str]:
    """`evaluate` where the second rank alone cannot score its documents."""
    if rank == 1:

        def broken(*_: object) -> None:
            raise DataError("document t/b.txt is damaged")

        Prepared.score = broken  # type: ignore[assignment, method-assign]  # this process is the test's own
    return command_line(rank, arguments)


def test_two_ranks_give_the_numbers_of_one_and_end_together(run: Path, tmp_path: Path) -> None:
    """One world for all of it: perplexity, a task, and a fault on one rank that must not leave the other waiting."""
    path = tiny_run.spec_file(tmp_path, modes=MODES)
    task = tmp_path / "task.yaml"
    task.write_text("{kind: synthetic, name: t, suite: parity, tests: [2-50], samples: 12, document_bytes: 64}")
    two, tasks, third = (tmp_path / name for name in ("two", "tasks", "third"))
    answers = in_world(
        2,
        tmp_path / "world",
        [
            (command_line, (["evaluate", str(run), "--spec", str(path), "--out", str(two), "--json"],)),
            (command_line, (["evaluate", str(run), "--spec", str(task), "--out", str(tasks), "--json"],)),
            (failing_on_rank_one, (["evaluate", str(run), "--spec", str(path), "--out", str(third)],)),
        ],
    )
    for codes in answers[:2]:
        assert [code for code, _ in codes] == [0, 0], codes
    checkpoint = run / "checkpoints" / "step-00000001"
    for spec, out in ((path, two), (task, tasks)):
        alone = evaluate(checkpoint, load_spec(spec), tmp_path / "one")
        (folder,) = out.iterdir()
        assert_equal(json.loads((folder / "result.json").read_text()), alone)
    (code, said), (other_code, _) = answers[2]
    assert code == other_code == 70 and "rank 1: document t/b.txt is damaged" in said
    assert not any(third.glob("*/_SUCCESS"))


def assert_equal(result: dict[str, Any], alone: dict[str, Any]) -> None:
    """Counts, documents and spans are the same; nats too, but for the rounding of batches of another size."""
    assert result["key"] == alone["key"] and result["data"] == alone["data"]
    if result["kind"] == "synthetic":
        assert result["tests"] == alone["tests"] and result["num_documents"] == alone["num_documents"] > 4
        return
    assert len(result["scores"]) == len(alone["scores"])
    for one, other in zip(alone["scores"], result["scores"], strict=True):
        for name in ("nats", "repeat_nats"):
            assert other.pop(name) == pytest.approx(one.pop(name), rel=1e-5, abs=1e-5)
        assert one == other
    assert result["whole"]["words"] == alone["whole"]["words"]


class TwoRanks:
    """The half of a world: sums what this rank has with what the other one had."""

    device = torch.device("cpu")

    def __init__(self, other: torch.Tensor | None = None) -> None:
        self.other, self.given = other, torch.zeros(0)

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        self.given = values.clone()
        return values if self.other is None else values + self.other


def test_sums_of_ranks_are_exact_and_a_mean_over_ranks_is_noticed() -> None:
    first, second = Score(0, 0, "carried", 0, 0.1 + 0.2, 7, 9), Score(1, 0, "carried", 0, 1e9 / 3, 11, 2**40)
    zeros = [Score(*first.key), Score(*second.key)]
    world = TwoRanks()
    with pytest.raises(DataError, match=r"no rank scored \(1, 0, 'carried', 0\)"):
        sum_over_ranks([first], zeros, world)  # type: ignore[arg-type]
    assert sum_over_ranks([second], zeros, TwoRanks(world.given)) == [first, second]  # type: ignore[arg-type]

    class Mean(TwoRanks):
        def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
            return super().sum_over_data(values) / 2

    assert sum_over_ranks([second], zeros, Mean(world.given)) != [first, second]  # type: ignore[arg-type]
