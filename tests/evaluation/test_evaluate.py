"""`longspan evaluate` on real checkpoints: right numbers, exact zeros, one result per key, clear refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.errors import LongspanError
from longspan.trainer import cli, recipes
from longspan.trainer.checkpoint.load import load_model, without_padding_rows
from longspan.trainer.evaluation import run as evaluation_run
from longspan.trainer.evaluation.run import evaluate
from longspan.trainer.evaluation.spec import EvaluationSpec

FROZEN = ({"mixer": "sliding_window"}, {"mixer": "block_recurrent", "num_states": 4, "update": "frozen"})
WINDOWS = ({"mixer": "sliding_window", "repeat": 2},)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    return tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(corpus))


def spec_of(tmp_path: Path, **changes: object) -> EvaluationSpec:
    return recipes.load(EvaluationSpec, tiny_run.spec_file(tmp_path, **changes))


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "step-00000001"


def test_carried_is_the_plain_pass_over_each_document(run: Path, tmp_path: Path, corpus: Path) -> None:
    result = evaluate(checkpoint_of(run), spec_of(tmp_path))
    model = without_padding_rows(load_model(checkpoint_of(run))).model
    manifest = Manifest.load(corpus)
    reader = DocumentReader(manifest)
    nats, scored = [], 0
    for document in result["data"]["documents"]:
        tokens = torch.from_numpy(reader.tokens(manifest.document(document["id"])))[None]
        reset = torch.zeros(1, -(-(tokens.shape[1] - 1) // 8), dtype=torch.bool)
        with torch.no_grad():
            nll, _, _ = model(tokens[:, :-1], model.init_state(1), reset=reset, labels=tokens[:, 1:])
        for start, end in document["spans"]:  # byte i is token i + 1, whose loss stands at i
            nats += nll[0, start:end].double().tolist()
            scored += end - start
    assert scored == result["target_bytes"] == result["target_tokens"] == 3 * 2 * 48
    wanted = math.fsum(nats) / (math.log(2) * scored)
    assert result["carried"]["bits_per_byte"] == pytest.approx(wanted, abs=1e-6)


def test_the_result_says_what_was_measured_on_what(run: Path, tmp_path: Path) -> None:
    result = evaluate(checkpoint_of(run), spec_of(tmp_path))
    folder = run / "evals" / result["key"]
    assert sorted(path.name for path in folder.iterdir()) == ["_SUCCESS", "curve.png", "result.json"]
    assert {**json.loads((folder / "result.json").read_text()), "folder": str(folder), "reused": False} == result
    assert [(entry["mode"], entry["context_tokens"]) for entry in result["curve"]] == [
        (mode, length) for mode in ("truncated", "reset", "state_reset") for length in (8, 16, 64)
    ]
    for entry in [*result["curve"], result["carried"], result["swapped"]]:
        assert entry["ci_low"] <= entry["bits_per_byte"] <= entry["ci_high"]
        assert entry["context_min"] >= entry.get("context_tokens", 0)
    assert [entry["id"] for entry in result["data"]["excluded"]] == ["t/d.txt"]
    assert result["num_documents"] == 3 and result["data"]["needed_bytes"] == 64 + 2 * 48
    gain = result["memory_gain"]
    assert gain["context_tokens"] == 8 and gain["ci_low"] < gain["bits_per_byte"] < gain["ci_high"]
    assert gain["bits_per_byte"] != 0.0  # random weights, but the state is read


def test_a_model_without_absolute_positions_is_reset_to_truncated_exactly(run: Path, tmp_path: Path) -> None:
    result = evaluate(checkpoint_of(run), spec_of(tmp_path))
    assert all(entry["bits_per_byte"] == entry["ci_high"] == 0.0 for entry in result["position_effect"])


def test_a_frozen_state_shows_exactly_no_memory_gain(tmp_path: Path, corpus: Path) -> None:
    run = tiny_run.run_directory(tmp_path / "frozen", tiny_run.config(corpus, FROZEN))
    result = evaluate(checkpoint_of(run), spec_of(tmp_path))
    assert result["memory_gain"] == {"context_tokens": 8, "bits_per_byte": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    assert result["content_gain"] == {"bits_per_byte": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    assert result["reset_gain"][0]["bits_per_byte"] != 0.0  # the window caches do carry something


def test_windows_alone_gain_nothing_beyond_what_the_stack_reaches(tmp_path: Path, corpus: Path) -> None:
    run = tiny_run.run_directory(tmp_path / "windows", tiny_run.config(corpus, WINDOWS))
    result = evaluate(checkpoint_of(run), spec_of(tmp_path, context_tokens=[8, 32, 64]))
    truncated = {e["context_tokens"]: e["bits_per_byte"] for e in result["curve"] if e["mode"] == "truncated"}
    assert truncated[32] == pytest.approx(result["carried"]["bits_per_byte"], abs=1e-6)  # 2 layers reach 16 tokens
    assert abs(truncated[8] - result["carried"]["bits_per_byte"]) > 1e-5


def test_the_batch_does_not_change_the_numbers(run: Path, tmp_path: Path) -> None:
    reference = evaluate(checkpoint_of(run), spec_of(tmp_path), tmp_path / "one")
    small = evaluate(checkpoint_of(run), spec_of(tmp_path, batch_tokens=1), tmp_path / "two")
    assert small["key"] == reference["key"] and not small["reused"]
    assert small["data"]["mask_digest"] == reference["data"]["mask_digest"]
    for one, other in zip(reference["scores"], small["scores"], strict=True):
        assert other["nats"] == pytest.approx(one["nats"], rel=1e-5)


def test_the_same_evaluation_is_done_once_and_another_spec_beside_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(checkpoint_of(run), spec_of(tmp_path))
    other = evaluate(checkpoint_of(run), spec_of(tmp_path, seed=1))
    assert other["key"] != first["key"] and other["data"]["mask_digest"] == first["data"]["mask_digest"]
    monkeypatch.setattr(evaluation_run, "Scorer", None)
    again = evaluate(checkpoint_of(run), spec_of(tmp_path))
    assert again == {**first, "reused": True}


def test_an_interrupted_evaluation_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_run, "curve_png", full)
    with pytest.raises(LongspanError, match=r"No space left on device. Free space .* or name another folder") as caught:
        evaluate(checkpoint_of(run), spec_of(tmp_path))
    assert caught.value.exit_code == 1  # not final: a later try may find space
    assert list((run / "evals").iterdir()) == []


def call(*arguments: object) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


def test_the_command_prints_curve_and_gain(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tiny_run.spec_file(tmp_path)
    assert call(run, "--spec", spec, "--out", tmp_path / "out", "--set", "seed=3") == 0
    shown = capsys.readouterr().out
    assert "truncated 64" in shown and "carried" in shown and "memory gain" in shown
    assert "Evaluated: " + str(tmp_path / "out") in shown and "t/d.txt" in shown
    assert call(run, "--spec", spec, "--out", tmp_path / "out", "--set", "seed=3", "--json") == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["reused"] and line["num_documents"] == 3 and "truncated 64" in line["text_plot"]
    assert "scores" not in line


def test_a_damaged_checkpoint_ends_with_70(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = next((checkpoint_of(run) / "weights").iterdir())
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert call(checkpoint_of(run), "--spec", tiny_run.spec_file(tmp_path)) == 70
    assert weights.name in capsys.readouterr().err
    assert not (run / "evals").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_token": [8]}, "Did you mean context_tokens?"),
        ({"modes": ["truncated"]}, "`carried` always"),
        ({"context_tokens": [16, 8]}, "not rising"),
        ({"context_tokens": [8, 4096]}, "0 of 4 documents hold 4192 bytes"),
        ({"max_document_bytes": 100}, "Set it to 160 or more"),
        ({"sources": ["u"]}, "no documents of that source. It has those of t"),
        ({"context_tokens": [4]}, "Put 8 into context_tokens"),
        ({"shards": "nowhere"}, "no corpus at nowhere"),
    ],
)
def test_a_spec_that_cannot_be_ends_with_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert call(checkpoint_of(run), "--spec", tiny_run.spec_file(tmp_path, **changes)) == 2
    assert message in capsys.readouterr().err
    assert not list((run).glob("evals/*"))


def test_no_such_checkpoint_or_spec_ends_with_2(run: Path, tmp_path: Path) -> None:
    assert call(run / "checkpoints" / "step-00000009", "--spec", tiny_run.spec_file(tmp_path)) == 2
    assert call(run, "--spec", "configs/evals/quickstat.yaml") == 2


def test_results_are_finite_json(run: Path, tmp_path: Path) -> None:
    result = evaluate(checkpoint_of(run), spec_of(tmp_path))
    json.dumps(result, allow_nan=False)
    assert np.isfinite([score["nats"] for score in result["scores"]]).all()
