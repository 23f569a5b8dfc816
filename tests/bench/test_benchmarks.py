"""Each benchmark once at tiny size on a CPU: the object, the table, what is missing, what fails."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.trainer import cli
from longspan.trainer.bench import training_step
from longspan.trainer.bench.catalogue import BENCHMARKS
from longspan.trainer.bench.peers import lucidrains

SMALL = {
    "step": ["--rows", "1", "--segment-tokens", "128"],
    "block-recurrent": ["--rows", "1", "--segment-tokens", "128"],
    "window-attention": ["--segment-tokens", "64", "--window-tokens", "16"],
    "cross-entropy": ["--tokens", "32", "--dim", "16", "--vocab-size", "64"],
}
RESULT_KEYS = {
    "benchmark",
    "command",
    "date",
    "device",
    "versions",
    "kernels",
    "settings",
    "ceilings",
    "rows",
    "ratios",
    "first_step_seconds",
    "compile_caches_at_start",
    "seconds",
    "notes",
}
ROW_NUMBERS = (
    "ms",
    "low_ms",
    "high_ms",
    "host_ms",
    "repeats",
    "first_call_seconds",
    "tokens_per_second",
    "matrix_share",
    "floor_ms",
    "flops",
    "num_bytes",
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and peers of a machine without GPU, wherever the tests run; references, since an interpreter is slow."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("LONGSPAN_KERNELS", "reference")


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    assert cli.main(["bench", *words, "--repeat", "1"]) == code
    captured = capsys.readouterr()
    return (json.loads(captured.out.splitlines()[-1]) if "--json" in words else {}), captured.out


@pytest.mark.parametrize("name", SMALL)
def test_the_object_is_complete(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result, out = run(capsys, name, *SMALL[name], "--json")
    assert len(out.splitlines()) == 1
    assert set(result) == RESULT_KEYS
    assert result["benchmark"] == name and result["command"].startswith(f"longspan bench {name}")
    assert result["device"]["type"] == "cpu" and result["device"]["name"]
    assert {"torch", "triton", "cuda", "ptxas", "python", "longspan"} <= set(result["versions"])
    assert result["ceilings"]["matrix_flops"] > 0 and result["ceilings"]["copy_bytes"] > 0
    assert result["first_step_seconds"] > 0 and "T" in result["date"]
    assert result["kernels"] == "reference"
    assert any("smoke test" in note for note in result["notes"])
    assert not any("host ahead" in note for note in result["notes"])  # which is how a GPU is timed
    ours = [row for row in result["rows"] if row["contender"] == "longspan"]
    assert ours and all(row["status"] == "measured" for row in ours)
    for row in result["rows"]:
        assert row["status"] in ("measured", "not installed", "not supported")
        if row["status"] == "measured":
            assert all(row[number] > 0 for number in ROW_NUMBERS), row
            assert row["low_ms"] <= row["ms"] <= row["high_ms"]
        else:
            assert row["note"] and row["ms"] is None
    assert {row["contender"] for row in result["rows"]} - {"longspan"} <= set(BENCHMARKS[name].peers)


def test_a_step_says_what_share_of_the_rate_it_reaches(capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = run(capsys, "step", *SMALL["step"], "--no-peers", "--optimizer", "adamw", "--dropout", "0.1", "--json")
    for row in result["rows"]:
        expected = 6 * row["parameters"] * 128 / (row["ms"] * 1e-3) / result["ceilings"]["matrix_flops"]
        assert row["share_6nd"] == pytest.approx(expected)
        assert row["tokens_per_second"] == pytest.approx(128 / (row["ms"] * 1e-3))
    (ratio,) = result["ratios"]
    assert ratio["what"] == "longspan: step time of rec_fixed_skip_quickstart / of slide_quickstart"
    assert ratio["value"] == pytest.approx(result["rows"][0]["ms"] / result["rows"][1]["ms"])
    assert any("AdamW" in note for note in result["notes"])


def test_contenders_that_take_turns_are_measured_alike(capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = run(capsys, "step", *SMALL["step"], "--in-turns", "--json")
    assert "--in-turns" in result["command"].split() and result["settings"]["in_turns"] is True
    apart, _ = run(capsys, "step", *SMALL["step"], "--json")
    assert "--in-turns" not in apart["command"]
    names = [(row["contender"], row["case"], row["status"]) for row in result["rows"]]
    assert names == [(row["contender"], row["case"], row["status"]) for row in apart["rows"]]
    for row in result["rows"]:
        if row["status"] == "measured":
            assert row["repeats"] == 3 and all(row[number] > 0 for number in ROW_NUMBERS)


@pytest.mark.parametrize(("value", "told"), [("tritn", "auto, triton, reference"), ("triton", "needs a CUDA device")])
def test_a_choice_of_kernels_that_cannot_be_is_told_first(
    value: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGSPAN_KERNELS", value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["bench", "step", *SMALL["step"], "--no-peers"]) == 2
    error = capsys.readouterr().err
    assert f"LONGSPAN_KERNELS = {value}".replace(" = tritn", " = 'tritn'") in error and told in error
    assert "bench: longspan" not in error


@pytest.mark.parametrize("call", [1, 3, 6], ids=["first", "warm", "timed"])
def test_a_contender_that_breaks_in_a_turn_leaves_the_others(
    call: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = training_step._ours, []

    def broken(config: Any, *rest: Any) -> Any:
        work = real(config, *rest)
        if config.name != "rec_fixed_skip_quickstart":
            return work

        def step() -> None:
            calls.append(1)
            if len(calls) == call:
                raise torch.cuda.OutOfMemoryError("no room")
            work.call()

        return dataclasses.replace(work, call=step)

    monkeypatch.setattr(training_step, "_ours", broken)
    _, out = run(capsys, "step", *SMALL["step"], "--no-peers", "--in-turns", "--json", code=70)
    rows = json.loads(out.splitlines()[-2])["rows"]
    assert [row["status"] for row in rows] == ["failed", "measured"] and len(calls) == call
    assert "no room" in rows[0]["note"] if call == 1 else "without --in-turns" in rows[0]["note"]


def test_a_missing_peer_is_a_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lucidrains, "PACKAGE", "no_such_package")
    result, _ = run(capsys, "step", *SMALL["step"], "--json")
    missing = {(row["contender"], row["case"]): row["status"] for row in result["rows"]}
    assert missing["lucidrains", "rec_fixed_skip_quickstart"] == "not installed"
    assert missing["plain", "slide_quickstart"] == "not supported"
    assert ("lucidrains", "slide_quickstart") not in missing


def test_the_table_has_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(capsys, "step", *SMALL["step"])
    for text in ("contender", "tokens/s", "6ND", "floor ms", "first call s", "rec_fixed_skip_quickstart", "± "):
        assert text in out
    assert "peak GiB" not in out  # nothing to say on a CPU
    assert "TFLOP/s (512 cubed, fp32)" in out and "Process start to the end of the first call" in out
    assert "not supported" in out and "flex_attention has no backward pass on a CPU" in out


def test_a_failure_of_our_own_ends_with_70_after_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training_step._ours

    def broken(config: Any, *rest: Any) -> Any:
        if config.name == "slide_quickstart":
            raise RuntimeError("no such kernel\nsecond line")
        return real(config, *rest)

    monkeypatch.setattr(training_step, "_ours", broken)
    error, out = run(capsys, "step", *SMALL["step"], "--json", code=70)
    assert error["exit_code"] == 70 and "slide_quickstart: RuntimeError: no such kernel" in error["error"]
    result = json.loads(out.splitlines()[-2])
    assert [row["status"] for row in result["rows"]][:2] == ["measured", "failed"]


def test_report_and_profile_are_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, profile = tmp_path / "page.md", tmp_path / "profile.txt"
    for _ in range(2):
        run(capsys, "cross-entropy", *SMALL["cross-entropy"], "--write-report", str(page), "--profile", str(profile))
    text = page.read_text(encoding="utf-8")
    assert text.count("# Benchmarks on ") == 1 and text.count("## cross-entropy, ") == 2
    assert "`longspan bench cross-entropy --tokens 32 --dim 16 --vocab-size 64 --peers all --repeat 1`" in text
    assert "| contender | case | ms |" in text and "| longspan | 32 x 16 x 64 |" in text
    assert str(tmp_path) not in text
    kernels = profile.read_text(encoding="utf-8")
    assert kernels.startswith("== longspan, 32 x 16 x 64: ") and "aten::mm" in kernels and "matrix products" in kernels


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed["benchmarks"]] == list(BENCHMARKS)
    assert cli.main(["bench", "list"]) == 0
    assert "peer lucidrains" in capsys.readouterr().out
