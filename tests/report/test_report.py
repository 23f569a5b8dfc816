"""report.html: well-formed, self-contained, true to the log, and there whatever state the run is in."""

from __future__ import annotations

import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import runs

from longspan.errors import UsageError
from longspan.trainer.cli import build_parser
from longspan.trainer.commands import report as command
from longspan.trainer.report import write_report
from longspan.trainer.report_svg import Chart, Marker, Series, format_length, format_tick, nice_ticks, svg
from longspan.trainer.report_training import binned, smoothed


def parse(page: Path) -> ElementTree.Element:
    """The page as a tree; raises unless it is well-formed to the last tag."""
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def words(tree: ElementTree.Element) -> str:
    return re.sub(r"\s+", " ", " ".join(tree.itertext()))


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return runs.full_run(tmp_path)


def test_page_refers_to_nothing_outside_and_runs_nothing(full: Path) -> None:
    page = write_report(full)
    tree = parse(page)
    for element in tree.iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object")
        assert not {"src", "href", "srcset", "data", "onload", "onclick"} & {
            name.split("}")[-1] for name in element.attrib
        }
    text = page.read_text(encoding="utf-8")
    assert "http" not in text and "@import" not in text and "url(" not in text


def test_page_has_the_numbers(full: Path) -> None:
    shown = words(parse(write_report(full)))
    facts = [
        "my <run>", "finished", "120 steps",
        f"{2.1 + 1 / 120:.3f}",  # held-out bits per byte
        "+0.0625", "+0.0525 to +0.0725",  # memory gain of the newest checkpoint and its interval
        "12.3k", "42G", "1.23M", "120k",  # tokens/s, FLOP/s, parameters, tokens
        "98,765 bytes", "22", "window 8", "trained on 32",
        "In the beginning", "<script>alert(1)</script>",
        "d1" * 32, "e2" * 32, "a9" * 32, "public domain", "3.0 MiB",
        "byte frequencies alone", "xz -9", "disk <full>", "1 steps were skipped",
        "torch 9.9.9", "device cpu", "sample_prompt: In the beginning",
    ]  # fmt: skip
    for fact in facts:
        assert fact in shown, fact
    assert "9.0000" not in shown, "an unfinished evaluation is none"


def test_several_checkpoints_show_the_gain_over_steps(full: Path) -> None:
    assert "Memory gain over steps" in words(parse(write_report(full)))
    runs.plant_result(full, "k4", runs.result(121, 0.07, spec="another"))
    assert "Memory gain over steps" not in words(parse(write_report(full))), "results of different specs do not compare"


def test_charts_hold_the_points(full: Path) -> None:
    tree = parse(write_report(full))
    charts = {chart.get("aria-label"): chart for chart in tree.iter("svg")}
    length = charts["Bits per byte versus context length"]
    hints = [title.text for title in length.iter("title")]
    assert [hint for hint in hints if hint and "2.3400 at" in hint and hint.endswith("16")]
    assert len(list(length.iter("polygon"))) == 2  # bands of truncated and carried
    assert len([line for line in length.iter("line") if line.get("class") == "whisker s2"]) == 1  # state_reset, at W
    assert len(list(charts["Bits per byte over steps"].iter("circle"))) == 3  # validations
    assert {"Tokens per second over steps", "Gradient norm over steps", "Learning rate over steps"} <= charts.keys()


def test_run_without_evaluation_that_was_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(runs.CONFIG.format(shards="gone", steps=500))
    runs.write_log(run, steps=30, finished=False, torn=True)
    shown = words(parse(write_report(run)))
    for fact in ("running or interrupted", "step 30 of 500", "Not evaluated yet", "not at hand any more: gone"):
        assert fact in shown, fact


def test_run_that_stopped_early(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(runs.CONFIG.format(shards="gone", steps=500))
    runs.write_log(run, steps=30)
    assert "stopped early" in words(parse(write_report(run)))


@pytest.mark.parametrize("content", ["", "\n", '{"kind": "step"', '[1]\n"x"\n{"kind": "step", "step": "one"}\n'])
def test_run_that_has_not_begun(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text("name: young\n")
    (tmp_path / "log.jsonl").write_text(content)
    shown = words(parse(write_report(tmp_path)))
    assert "young" in shown and "no data yet" in shown


def test_steps_that_a_resume_repeats_count_once(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        "".join(
            json.dumps({**runs.step_entry(step), "tokens": tokens}) + "\n" for step, tokens in ((1, 5), (2, 6), (1, 7))
        )
    )
    shown = words(parse(write_report(tmp_path)))
    assert "step 2" in shown and "tokens seen 6" in shown


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    entries = [{**runs.step_entry(step), "grad_norm": None, "loss": math.nan} for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    text = write_report(tmp_path).read_text()
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).lower()


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run directory"):
        write_report(tmp_path)


def test_page_is_replaced_whole(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(full).read_text()

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(UsageError, match="No space left"):
        write_report(full)
    assert (full / "report.html").read_text() == before
    assert not [name for name in os.listdir(full) if name.startswith(".")]


def test_command(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = command.run(build_parser().parse_args(["report", str(full)]))
    assert result["report"] == str(full / "report.html")
    assert capsys.readouterr().out == f"{full / 'report.html'}\n"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (1.93, 2.41, [2.0, 2.1, 2.2, 2.3, 2.4]), (3, 3, [3])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high, 5) == pytest.approx(expected)


def test_numbers_on_axes() -> None:
    assert [format_tick(value) for value in (0.05, 2.6, 500, 20000, 1.5e6)] == ["0.05", "2.6", "500", "20k", "1.5M"]
    assert [format_length(value) for value in (64, 1024, 4096, 2**20, 1500)] == ["64", "1k", "4k", "1M", "1500"]


def test_places_of_points() -> None:
    chart = Chart("t", "x", "y", [Series("a", [(64, 1.0), (128, 2.0), (256, 3.0)], style="marked")], x_log2=True)
    dots = [
        (float(dot.get("cx") or 0), float(dot.get("cy") or 0))
        for dot in ElementTree.fromstring(svg(chart)).iter("circle")
        if dot.find("title") is not None
    ]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1, "equal steps for equal factors"
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1, "more is further up"


def test_points_above_the_top_and_not_finite_are_left_out() -> None:
    points = [(1.0, 9.0), (2.0, 3.0), (3.0, 2.0), (4.0, math.inf), (5.0, 1.0)]
    tree = ElementTree.fromstring(svg(Chart("t", "x", "y", [Series("a", points)], [Marker("y", 4, "m")], y_top=5)))
    line = next(element for element in tree.iter("polyline"))
    assert len((line.get("points") or "").split()) == 3


def test_binning_keeps_the_mean_and_the_range() -> None:
    values = [(float(x), float(x % 10)) for x in range(1000)]
    means, ranges = binned(values, 100)
    assert len(means) == len(ranges) == 100
    assert means[0] == (4.5, 4.5) and ranges[0] == (4.5, 0.0, 9.0)
    assert binned(values, 1000) == (values, [])
    assert len(smoothed(values)) == 1000
