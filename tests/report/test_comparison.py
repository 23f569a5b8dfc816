"""The page that compares runs: same targets only, differences paired by document, well-formed and self-contained."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from test_report import parse, words

from longspan.errors import UsageError
from longspan.trainer.cli import build_parser
from longspan.trainer.commands import report as command
from longspan.trainer.evaluation import bootstrap
from longspan.trainer.evaluation.compare import PairedResults
from longspan.trainer.report import write_report
from longspan.trainer.report_compare import read_comparison, write_comparison
from longspan.trainer.report_html import signed

LN2 = math.log(2)
DOCUMENTS = [(f"{source}/{i}", source) for i, source in enumerate(["books"] * 6 + ["code"] * 4)]


def scored(better: float = 0.0, spread: float = 2.0, sizes: int = 1000, step: int = 7) -> dict[str, Any]:
    """A result whose documents differ by `spread` bits per byte, all of them `better` than the plain one."""
    rng = np.random.default_rng(0)
    hardness = 2.0 + spread * rng.random(len(DOCUMENTS))
    noise = 0.01 * np.random.default_rng(int(1000 * better)).standard_normal(len(DOCUMENTS))
    worse = {("carried", 0): 0.0, ("truncated", 8): 0.5, ("truncated", 64): 0.2, ("state_reset", 8): 0.1}
    scores = [
        {
            "document": name, "span": 0, "mode": mode, "context_tokens": length, "tokens": sizes, "bytes": sizes,
            "nats": float((hardness[d] + more - better + noise[d]) * sizes * LN2),
        }
        for (mode, length), more in worse.items()
        for d, (name, _) in enumerate(DOCUMENTS)
    ]  # fmt: skip
    found = runs.result(step, 0.1)
    found["spec"] |= {"name": "quick", "bootstrap_samples": 500, "seed": 0}
    found["data"]["documents"] = [{"id": name, "source": source, "spans": [[0, sizes]]} for name, source in DOCUMENTS]
    found["data"]["mask_digest"] = "ab" * 16
    part = {"carried": found["carried"], "memory_gain": found["memory_gain"], "num_documents": 5, "target_tokens": 99}
    found["by_source"] = {
        "books": part,
        "code": {**part, "memory_gain": {"bits_per_byte": 0.5, "ci_low": None, "ci_high": None}},
    }
    found["by_repeat"] = {"ngram_tokens": 8, "beyond_tokens": 8, "repeat": part, "other": part}
    bucket = {"first": 16, "last": 31, "bits_per_byte": 2.0, "ci_low": 1.9, "ci_high": 2.1}
    found["position"] = {"num_documents": 10, "buckets": [bucket, {**bucket, "first": 32, "last": 63}]}
    found["whole"] = {
        "num_documents": 10, "complete": True, "tokens": 5000, "bytes": 6000, "words": 900, "bits_per_byte": 2.0,
        "ci_low": 1.9, "ci_high": 2.1, "perplexity_per_token": 4.0, "perplexity_per_word": 123.45,
    }  # fmt: skip
    found["scores"] = scores
    return found


def task(errors: int) -> dict[str, Any]:
    counts = {"right": 100 - errors, "total": 100, "errors": errors, "accuracy": 1 - errors / 100}
    counts |= {"ci_low": 0.91, "ci_high": 0.99}
    entry = {"test": "51-100", "low": 51, "high": 100, **counts, "seeds": [{"seed": 3, **counts}]}
    return {"kind": "synthetic", "curve": [], "spec": {"name": "parity"}, "spec_digest": "t1", "tests": [entry]}


def plant(root: Path, name: str, *results: dict[str, Any]) -> Path:
    run = root / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"name: {name}\n")
    runs.write_log(run)
    for number, result in enumerate(results):
        runs.plant_result(run, f"k{number}", result)
    return run


def test_the_page_has_curves_paired_differences_sources_and_tasks(tmp_path: Path) -> None:
    first = plant(tmp_path, "plain", scored(), task(4))
    second = plant(tmp_path, "better", scored(0.05), task(9))
    page = write_comparison([first, second])
    assert page == tmp_path / "comparison.html"
    shown = words(parse(page))
    for fact in (
        "Comparison of 2 runs", "plain", "better", "Perplexity versus context length", "Difference to plain",
        "By source", "books", "code", "Loss by place in the document", "Repeats from far back", "123.45",
        "Task: parity", "While training", "What was compared", "10 documents",
    ):  # fmt: skip
        assert fact in shown, fact
    paired = PairedResults([scored(), scored(0.05)])
    difference = paired.difference(1, ("carried", 0))
    assert difference and f"{difference.bits_per_byte:+.4f} {difference.ci_low:+.4f} to" in shown
    text = page.read_text(encoding="utf-8")
    assert "http" not in text and "<script" not in text and "url(" not in text


def test_a_small_steady_difference_is_sure_though_documents_differ_much() -> None:
    paired = PairedResults([scored(), scored(0.05)])
    plain, better = paired.rate(0, ("carried", 0)), paired.rate(1, ("carried", 0))
    difference = paired.difference(1, ("carried", 0))
    assert plain and better and difference and plain.ci_low and better.ci_high and difference.ci_high
    assert plain.ci_low < better.ci_high  # the marginal intervals overlap
    assert difference.ci_high < 0 and difference.bits_per_byte == pytest.approx(-0.05, abs=0.01)
    gain = paired.gain(0, ("state_reset", 8))
    assert gain and gain.bits_per_byte == pytest.approx(0.1) and gain.ci_low == pytest.approx(0.1)


def test_unpaired_resamples_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bootstrap.DocumentBootstrap.rate

    def unpaired(self: Any, nats: Any, reference: Any) -> Any:
        one, other = right(self, nats), right(self, reference)
        return bootstrap.Interval(
            one.bits_per_byte - other.bits_per_byte, one.ci_low - other.ci_high, one.ci_high - other.ci_low
        )

    monkeypatch.setattr(bootstrap.DocumentBootstrap, "difference", unpaired)
    with pytest.raises(AssertionError):
        test_a_small_steady_difference_is_sure_though_documents_differ_much()


def test_other_tokenizers_score_other_bytes_of_the_same_spans() -> None:
    same = PairedResults([scored(), scored(0.05)]).difference(1, ("carried", 0))
    other = scored(0.05)
    for place, score in enumerate(other["scores"]):
        share = 1.0 - 0.01 * (place % 3)  # some tokens reach over an edge and are left out
        score["bytes"], score["nats"] = round(1000 * share), score["nats"] * round(1000 * share) / 1000
    found = PairedResults([scored(), other]).difference(1, ("carried", 0))
    assert same and found and found.ci_high is not None and found.ci_high < 0
    assert found.bits_per_byte == pytest.approx(same.bits_per_byte, abs=0.01)


def test_the_newest_results_on_shared_targets_are_taken(tmp_path: Path) -> None:
    older, newer, elsewhere = scored(step=5), scored(step=9), scored(step=11)
    elsewhere["data"]["documents"][0]["spans"] = [[5, 9]]
    first = plant(tmp_path, "a", older, newer, elsewhere)
    second = plant(tmp_path, "b", copy.deepcopy(newer))
    comparison = read_comparison([first, second])
    assert [result["checkpoint"]["step"] for result in comparison.results] == [9, 9]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [plant(tmp_path / parent, "run", scored()) for parent in ("x", "y")]
    assert read_comparison(paths).names == ["x/run", "y/run"]


@pytest.mark.parametrize("change", ["spec", "spans", "none"])
def test_runs_without_shared_targets_are_refused(tmp_path: Path, change: str) -> None:
    other = scored()
    if change == "spec":
        other["spec_digest"] = "s2"
    elif change == "spans":
        other["data"]["documents"][0]["spans"] = [[1, 2]]
    first = plant(tmp_path, "a", scored())
    second = plant(tmp_path, "b", *([] if change == "none" else [other]))
    with pytest.raises(UsageError, match=r"no evaluation in common(.|\n)*a: quick \(s1\)(.|\n)*Evaluate all of them"):
        write_comparison([first, second])
    assert not (tmp_path / "comparison.html").exists()


def test_one_run_twice_and_a_path_that_is_no_run_are_refused(tmp_path: Path) -> None:
    run = plant(tmp_path, "a", scored())
    with pytest.raises(UsageError, match="named more than once"):
        write_comparison([run, tmp_path / "." / "a"])
    with pytest.raises(UsageError, match="no run directory"):
        write_comparison([run, tmp_path])
    with pytest.raises(UsageError, match=r"cannot be written.*--out"):
        write_comparison([run, plant(tmp_path, "b", scored())], tmp_path / "nowhere" / "page.html")


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(plant(tmp_path, name, scored())) for name in ("a", "b", "c")]
    out = tmp_path / "page.html"
    result = command.run(build_parser().parse_args(["report", *names, "--out", str(out)]))
    assert result == {"report": str(out), "bytes": out.stat().st_size}
    assert "Comparison of 3 runs" in words(parse(out))
    single = command.run(build_parser().parse_args(["report", names[0], "--out", str(tmp_path / "one.html")]))
    assert single["report"] == str(tmp_path / "one.html") and not (tmp_path / "a" / "report.html").exists()


def test_one_runs_report_shows_the_same_parts(tmp_path: Path) -> None:
    shown = words(parse(write_report(plant(tmp_path, "a", scored(), task(4)))))
    for fact in ("By source", "Loss by place", "Repeats from far back", "Every token", "Task: parity", "0.9600"):
        assert fact in shown, fact
    json.dumps(scored(), allow_nan=False)


def test_a_difference_too_small_for_the_decimals_is_not_shown_as_nothing() -> None:
    assert [signed(value) for value in (-3.2e-6, -0.0, 0.0, -0.00004, 0.00006, None)] == [
        "-3e-06", "+0.0000", "+0.0000", "-4e-05", "+0.0001", "–",
    ]  # fmt: skip
