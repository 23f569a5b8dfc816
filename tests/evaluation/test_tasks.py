"""Synthetic tasks as evaluations: exact counts on models whose right answers are known, and what the command shows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
import yaml
from torch import Tensor

from longspan.data_pipeline.synthetic.config import LanguageConfig
from longspan.data_pipeline.synthetic.suites import SUITES
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.errors import ConfigError, UsageError
from longspan.trainer import cli
from longspan.trainer.evaluation import task_documents, tasks
from longspan.trainer.evaluation.run import evaluate
from longspan.trainer.evaluation.specs import TaskSpec, load_spec, parse_spec
from longspan.trainer.evaluation.task_result import summarise_tasks
from longspan.trainer.evaluation.tasks import PreparedTasks

SPEC = TaskSpec(kind="synthetic", name="t", suite="parity", samples=40, seeds=(0, 5), document_bytes=300)


class Parity:
    """Knows every answer of `parity`, but says the contrary for strings with at least `wrong_from` symbols."""

    quantum = 4

    def __init__(self, wrong_from: int = 10**9) -> None:
        self.embedding = torch.nn.Embedding(384, 1)
        self.wrong_from = wrong_from

    def init_state(self, rows: int, device: object) -> dict[str, Tensor]:
        return {"count": torch.zeros(rows, 2)}  # symbols and ones since the line began

    def __call__(self, tokens: Tensor, state: dict[str, Tensor], *, reset: Tensor) -> tuple[Tensor, Any, Any]:
        rows, length = tokens.shape
        assert reset.shape == (rows, -(-length // self.quantum)) and not reset.any()
        count, logits = state["count"].clone(), torch.zeros(rows, length, 384)
        for t in range(length):
            token = tokens[:, t]
            count[(token == ord("\n")) | (token == 256)] = 0
            count[:, 0] += (token == ord("0")) | (token == ord("1"))
            count[:, 1] += token == ord("1")
            even = (count[:, 1] % 2 == 0) ^ (count[:, 0] >= self.wrong_from)
            logits[torch.arange(rows), t, torch.where(even, ord("e"), ord("o"))] = 3.0
        return logits, {"count": count}, {}


def prepared(model: Parity, spec: TaskSpec = SPEC) -> PreparedTasks:
    return PreparedTasks(None, model, spec, "k", task_documents.make_documents(spec, ByteTokenizer()), "cpu")  # type: ignore[arg-type]


def results_of(model: Parity, spec: TaskSpec = SPEC) -> list[dict[str, Any]]:
    ready = prepared(model, spec)
    return summarise_tasks(ready.score(), ready.documents, spec)["tests"]


def test_a_model_that_knows_has_no_error_and_the_rule_of_three_says_how_sure_that_is() -> None:
    found = results_of(Parity())
    assert [entry["test"] for entry in found] == ["2-50", "51-100", "100-150"]
    for entry in found:
        assert (entry["errors"], entry["total"], entry["accuracy"]) == (0, 80, 1.0)
        assert (entry["ci_low"], entry["ci_high"]) == (1 - 3 / 80, 1.0)
        assert [seed["seed"] for seed in entry["seeds"]] == [0, 5]
        assert all(seed["total"] == 40 and seed["ci_low"] == 1 - 3 / 40 for seed in entry["seeds"])


def test_errors_are_counted_where_they_are() -> None:
    spec = SPEC.model_copy(update={"size_bins": ((1, 50), (51, 74), (75, 200))})
    ready = prepared(Parity(wrong_from=75), spec)
    found = {
        (e["test"], e["low"] // 51, e["low"] // 75): e
        for e in summarise_tasks(ready.score(), ready.documents, spec)["tests"]
    }
    sizes = {
        test: [int(s) for d in ready.documents if d.test == test for s in d.made.sizes] for test in spec.test_names
    }
    middle, long = found["51-100", 1, 0], found["51-100", 1, 1]
    assert middle["errors"] == 0 and middle["total"] == sum(size < 75 for size in sizes["51-100"]) > 0
    assert long["right"] == 0 and long["total"] == sum(size >= 75 for size in sizes["51-100"]) > 0
    assert found["100-150", 1, 1]["errors"] == 80 and found["2-50", 0, 0]["errors"] == 0
    assert long["ci_high"] == pytest.approx(3 / long["total"])


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ([[0, 5]], r"\[0, 5\] is no range of sizes"),
        ([[9, 5]], r"\[9, 5\] is no range of sizes"),
        ([[1, 50], [50, 60]], r"\[50, 60\] begins at or below 50: ranges must rise and not overlap"),
        ([[51, 60], [1, 50]], r"\[1, 50\] begins at or below 60"),
    ],
)
def test_ranges_of_sizes_that_count_nothing_or_twice_are_refused(
    tmp_path: Path, bins: list[list[int]], message: str
) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**SPEC.model_dump(mode="json"), "size_bins": bins}))
    with pytest.raises(ConfigError, match=message):
        load_spec(tmp_path / "spec.yaml")


def test_ranges_of_sizes_without_a_sample_are_listed() -> None:
    spec = SPEC.model_copy(update={"size_bins": ((1, 50), (160, 170), (900, 901))})
    with pytest.raises(UsageError) as caught:
        prepared(Parity(), spec)
    for part in ("from 160 to 170", "from 900 to 901", "test set 51-100 is counted", "100-150: 10"):
        assert part in str(caught.value), caught.value
    assert "2-50 is counted" not in str(caught.value)


def test_batch_and_shards_change_nothing() -> None:
    ready = prepared(Parity(wrong_from=75))
    whole = ready.score()
    assert [tally.key for tally in whole] == [tally.key for tally in ready.zeros()]
    small = replace(ready, spec=SPEC.model_copy(update={"batch_tokens": 1024})).score()
    parts = [tally for share in ready.shares(3) for tally in ready.score(share)]
    for other in (small, sorted(parts, key=lambda tally: tally.key)):
        assert [replace(t, nats=0.0) for t in other] == [replace(t, nats=0.0) for t in whole]
        assert [t.nats for t in other] == pytest.approx([t.nats for t in whole])


def test_the_loss_is_that_of_the_answers_alone() -> None:
    ready = prepared(Parity())
    carried = summarise_tasks(ready.score(), ready.documents, SPEC)["carried"]
    nats = math.log(math.exp(3) + 383) - 3
    assert carried["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert carried["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-5)


def test_guesses_off_by_one_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PreparedTasks._guesses

    def late(self: PreparedTasks, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        guessed, nats = right(self, tokens)
        return np.roll(guessed, 1, axis=1), nats

    monkeypatch.setattr(PreparedTasks, "_guesses", late)
    assert all(entry["errors"] > 0 for entry in results_of(Parity()))


def test_a_state_that_is_lost_between_segments_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.states, "detach", lambda state: {"count": torch.zeros_like(state["count"])})
    spec = SPEC.model_copy(update={"batch_tokens": 64})
    assert sum(entry["errors"] for entry in results_of(Parity(), spec)) > 0


def test_samples_are_test_strings_and_differ() -> None:
    documents = task_documents.make_documents(SPEC, ByteTokenizer())
    for test in SPEC.test_names:
        for seed in SPEC.seeds:
            lines = [line for d in documents if (d.test, d.seed) == (test, seed) for line in d.made.text.splitlines()]
            assert len(lines) == len(set(lines)) == 40
    assert all(len(document.made.text) < 300 + 160 for document in documents)


def test_a_task_with_few_strings_gives_those_there_are() -> None:
    spec = TaskSpec(kind="synthetic", name="t", suite="abab_star", tests=("51-100",), samples=60, seeds=(0,))
    assert sum(len(d.made.sizes) for d in task_documents.make_documents(spec, ByteTokenizer())) == 25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "pairity"}, "no such task. Allowed: parity"),
        ({"tests": ["2-51"]}, "no test set 2-51 of parity. Allowed: 2-50, 51-100"),
        ({"seeds": [1, 1]}, "not different"),
        ({"sample": 3}, "Did you mean samples?"),
        ({"kind": "synthetics"}, "kind"),
    ],
)
def test_a_wrong_spec_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({"kind": "synthetic", "name": "t", "suite": "parity", **changes}))
    with pytest.raises(ConfigError, match=None) as caught:
        load_spec(path)
    assert message in str(caught.value)


def test_every_task_has_a_spec_that_reads_back() -> None:
    for suite in SUITES:
        spec = load_spec(f"configs/evals/{suite}.yaml")
        assert isinstance(spec, TaskSpec) and spec.suite == spec.name == suite
        assert parse_spec(spec.model_dump_json()) == spec
    long = load_spec("configs/evals/long_context.yaml")
    assert parse_spec(long.model_dump_json()) == long


def test_the_digest_covers_the_sizes_of_the_test_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SPEC.digest
    assert SPEC.model_copy(update={"batch_tokens": 5}).digest == before
    suite = replace(
        SUITES["parity"], tests={**SUITES["parity"].tests, "2-50": LanguageConfig(kind="parity", lengths=(2, 51))}
    )
    monkeypatch.setitem(SUITES, "parity", suite)
    assert SPEC.digest != before


def test_the_command_writes_counts_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(tiny_run.corpus(tmp_path)))
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        yaml.safe_dump({"kind": "synthetic", "name": "t", "suite": "parity", "tests": ["2-50"], "samples": 20})
    )
    assert cli.main(["evaluate", str(run), "--spec", str(spec)]) == 0
    shown = capsys.readouterr().out
    assert "Samples of parity with every answer right, step 1" in shown
    (folder,) = [path for path in (run / "evals").iterdir() if path.is_dir()]
    result = json.loads((folder / "result.json").read_text())
    entry = result["tests"][0]
    assert f"{entry['errors']:7,}  {entry['total']:8,}" in shown and entry["total"] == 3 * 20
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert evaluate(run / "checkpoints" / "step-00000001", load_spec(spec))["reused"]
