"""`longspan bench context-parallel` on a CPU: all parts once over two ranks; bad options; ranks that end badly."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_lives import live
from rank_parts import MISTAKES, counting, mistaken

from longspan.errors import ConfigError, UsageError
from longspan.kernels.context_parallel.shard import ONE_RANK
from longspan.trainer import cli
from longspan.trainer.bench.ceilings import Ceilings
from longspan.trainer.bench.contender import Session, Work
from longspan.trainer.bench.context_parallel import measure as bench
from longspan.trainer.bench.context_parallel.messages import Alive, Began, Measurement, Verdict
from longspan.trainer.bench.context_parallel.processes import Story, run_ranks
from longspan.trainer.bench.context_parallel.rank import Rank
from longspan.trainer.bench.context_parallel.settings import (
    ContextParallelSettings,
    read_context_parallel_settings,
)
from longspan.trainer.bench.context_parallel.step import verdict
from longspan.trainer.bench.floors import Cost

STEP, RING, LINEAR = "step, 2 x 256", "ring attention, 2 x 32", "linear layer, 64 tokens a rank"
CEILINGS = Ceilings(matrix_side=1, matrix_flops=1e12, copy_bytes=1e9)


def settings(*words: str, on_gpu: bool = False) -> ContextParallelSettings:
    return read_context_parallel_settings(cli.build_parser().parse_args(["bench", "context-parallel", *words]), on_gpu)


def measurement(case: str, *times_ms: float) -> Measurement:
    hosts = [1.0] * len(times_ms)
    return Measurement(case, 1000, [Cost(1e9, 0)], None, list(times_ms), hosts, first_call_seconds=1.0, peak_gib=None)


def test_all_parts_over_two_ranks(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("LONGSPAN_KERNELS", "reference")
    words = ["--rows", "2", "--segment-tokens", "256", "--ring-tokens", "32", "--repeat", "2", "--json"]
    assert cli.main(["bench", "context-parallel", *words]) == 0
    out = capfd.readouterr().out
    assert len(out.splitlines()) == 1
    result = json.loads(out)
    rows = {row["case"]: row for row in result["rows"]}
    check = rows.pop("gradients of 2 x 256, 2 ranks against 1")
    assert {row["status"] for row in result["rows"]} == {"measured"}
    loss_gap, gradient_gap = (float(gap) for gap in re.findall(r"(?:loss|gradients) (\S+) \(", check["note"]))
    assert loss_gap < 1e-5 and 0 < gradient_gap < 1e-5
    assert list(rows)[:5] == [
        f"{STEP}, 1 rank",
        f"{STEP}, 2 ranks, 1 slice",
        f"{STEP}, 2 ranks, 2 slices",
        RING,
        f"{RING}, nothing sent",
    ]
    for row in rows.values():
        assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"] and row["repeats"] == 2
        assert row["tokens_per_second"] > 0 and row["first_call_seconds"] > 0
    ratios = {ratio["what"]: ratio["value"] for ratio in result["ratios"]}
    ms = {case: row["ms"] for case, row in rows.items()}
    assert len(ratios) == 5
    assert ratios["step, 2 slices: tokens/s of 2 ranks / of 1 rank"] == pytest.approx(
        ms[f"{STEP}, 1 rank"] / ms[f"{STEP}, 2 ranks, 2 slices"]
    )
    assert ratios["ring attention: time / of the same computation with nothing sent"] == pytest.approx(
        ms[RING] / ms[f"{RING}, nothing sent"]
    )
    assert ratios[f"{LINEAR}: time of the exchange of states / of the layer"] == pytest.approx(
        ms[f"{LINEAR}, exchange of states"] / ms[f"{LINEAR}, each rank alone"]
    )


def test_all_problems_are_listed_at_once() -> None:
    words = ("--nproc", "0", "--rows", "0", "--parts", "stepp,ring", "--state-slices", "1,9,x", "--ring-tokens", "-1")
    with pytest.raises(ConfigError) as raised:
        settings(*words, "--repeat", "0", "--segment-tokens", "0")
    assert raised.value.exit_code == 2
    assert [str(problem) for problem in raised.value.problems] == [
        "--repeat = 0: must be 1 or more.",
        "--nproc = 0: must be 2 or more.",
        "--rows = 0: must be 1 or more.",
        "--segment-tokens = 0: must be 1 or more.",
        "--ring-tokens = -1: must be 1 or more.",
        "--parts stepp: unknown part. Did you mean step?",
        "--state-slices 9: must be a whole number from 1 to --rows = 4.",
        "--state-slices x: must be a whole number from 1 to --rows = 4.",
    ]


def test_shares_are_whole_blocks() -> None:
    with pytest.raises(ConfigError) as raised:
        settings("--segment-tokens", "2048", "--nproc", "3", "--model", "rec_fixed_skip_12l", "--parts", ",")
    assert [str(problem) for problem in raised.value.problems] == [
        "--parts: names nothing. Known: step, ring, linear.",
        "--segment-tokens = 2048: not a multiple of --nproc x the quantum of rec_fixed_skip_12l = 1536. "
        "Nearest: 1536 or 3072.",
    ]


def test_defaults_follow_the_device() -> None:
    gpu = settings(on_gpu=True)
    assert (gpu.nproc, gpu.rows, gpu.segment_tokens, gpu.precision) == (2, 4, 131072, "bf16")
    assert (gpu.model.name, gpu.model.vocab_size, gpu.ring_tokens) == ("rec_fixed_skip_12l", 32128, 65536)
    assert gpu.parts == ("step", "ring", "linear") and gpu.state_slices == (1, 2) and gpu.repeat == 5
    assert settings("--nproc", "3", on_gpu=True).segment_tokens == 132096
    assert settings("--parts", "linear,step").parts == ("step", "linear")


def test_too_few_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    chosen = settings("--nproc", "2", on_gpu=True)
    with pytest.raises(UsageError, match="--nproc = 2: each rank needs a GPU of its own, and this machine has 1"):
        bench.measure(chosen, Session(chosen, torch.device("cuda")))


@pytest.mark.parametrize(
    ("loss", "gradient", "passed"),
    [(3e-5, 9e-3, True), (2.7e-4, 1e-3, False), (1e-6, 4.2e-2, False), (float("nan"), 0.0, False)],
)
def test_differences_have_limits(loss: float, gradient: float, passed: bool) -> None:
    assert verdict(loss, gradient, "bf16")[1] is passed


def test_mistakes_show_in_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, whose limits are the wider: none, no gradient of halo or state, one rank's gradients a tenth short."""
    monkeypatch.setenv("LONGSPAN_KERNELS", "reference")
    chosen = settings("--parts", "step", "--precision", "bf16", "--segment-tokens", "512")
    story = run_ranks(mistaken, 2, chosen, str(tmp_path))
    assert story.failure is None
    assert [told.passed for told in story.told[0]] == [True] + [False] * len(MISTAKES)


def test_cases_send_and_compute_what_their_titles_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of each rank against the formulas of docs/context_parallel.md; two ranks, fp32."""
    monkeypatch.setenv("LONGSPAN_KERNELS", "reference")
    words = ["--parts", "ring,linear", "--ring-tokens", "32"]
    story = run_ranks(counting, 2, settings(*words), str(tmp_path))
    assert story.failure is None
    first, last = ({told.case: json.loads(told.note) for told in of_rank} for of_rank in story.told)
    kv = 2 * 32 * 2 * 16 * 4
    assert [ranks[RING]["bytes"] for ranks in (first, last)] == [{"ring": 2 * kv}, {"ring": kv}]
    scan = {"scan": 4 * (2 * 2 * 16 * 17 + 1)}
    for ranks in (first, last):
        assert not ranks[f"{RING}, nothing sent"]["bytes"]
        assert ranks[f"{RING}, nothing sent"]["blocks"] == ranks[RING]["blocks"]
        for tokens in (64, 128):
            linear = f"linear layer, {tokens} tokens a rank"
            assert not ranks[f"{linear}, each rank alone"]["bytes"]
            assert ranks[f"{linear}, 2 ranks"]["bytes"] == ranks[f"{linear}, exchange of states"]["bytes"] == scan
    own = [["attend", 0, True], ["gradients", 0, True]]
    assert first[RING]["blocks"] == own
    assert sorted(last[RING]["blocks"]) == sorted([[name, place, place == 32] for name, *_ in own for place in (0, 32)])


def test_a_rank_speaks_after_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []

    class Parent:
        def send(self, message: object) -> None:
            said.append(type(message))

    monkeypatch.setattr(Rank, "meet", lambda self: None)
    rank = Rank(ONE_RANK, torch.device("cpu"), torch.float32, 2, Parent())  # type: ignore[arg-type]
    rank.measure("a", Work(lambda: said.append("call"), 1, []))
    assert said == [Began, *["call", Alive] * 4, Measurement]


def test_a_call_takes_as_long_as_its_slowest_rank() -> None:
    story = Story([[measurement("a", 1, 9, 5)], [measurement("a", 4, 2, 7)]], ["a", "a"])
    (row,) = bench.table(story, CEILINGS)
    assert (row.ms, row.low_ms, row.high_ms) == (7, 5.5, 8)
    assert row.tokens_per_second == pytest.approx(1000 / 7e-3) and row.matrix_share == pytest.approx(1 / 7)


def test_what_ends_early_is_a_row() -> None:
    far = Verdict("gradients", "far apart", passed=False)
    story = Story([[far, measurement("a", 1), measurement("b", 1)], [measurement("a", 1)]], ["b", "b"], ("b", "gone"))
    rows = bench.table(story, CEILINGS)
    assert [(row.case, row.status) for row in rows] == [("gradients", "failed"), ("a", "measured"), ("b", "failed")]
    assert rows[2].note == "gone; what comes after was not measured"


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("killed", "rank 1 was ended by signal 9 (SIGKILL)"),
        ("complains", "rank 1 was ended by signal 9 (SIGKILL)"),
        ("exits", "rank 1 ended with exit code 3 before it was done"),
        ("raises", "rank 1: MemoryError: no room"),
        ("hangs", "no rank has said anything for 12 s"),
    ],
)
def test_ranks_that_end_badly_are_named(
    end: str, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    story = run_ranks(live, 2, end, str(tmp_path), silent_seconds=12.0)
    assert story.failure == ("second", reason)
    assert story.told[0] == [Verdict("first", "", True)]
    assert not multiprocessing.active_children()
    captured = capfd.readouterr()
    assert not captured.out and "bench: longspan, second" in captured.err
    assert ("no room" in captured.err) == (end == "raises")


def test_closed_streams_take_no_pipe_of_a_rank(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os; from pathlib import Path; from rank_lives import live\n"
        "from longspan.trainer.bench.context_parallel.processes import run_ranks\n"
        f"if __name__ == '__main__':\n    os.closerange(0, 3); story = run_ranks(live, 2, 'well', {str(tmp_path)!r})\n"
        f"    Path({str(tmp_path)!r}, 'told').write_text(f'{{story.told[0]}} {{story.failure}}')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=60)
    assert (tmp_path / "told").read_text() == f"{[Verdict('first', '', True)]} None"


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from rank_lives import live; from longspan.trainer.bench.context_parallel.processes import run_ranks\n"
        f"if __name__ == '__main__': run_ranks(live, 2, 'hangs', {str(tmp_path)!r})"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL) as parent:
        _until(lambda: all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"))
        parent.send_signal(signal.SIGKILL)
    ranks = [int((tmp_path / rank).read_text()) for rank in "01"]
    _until(lambda: not any(_runs(rank) for rank in ranks))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _until(true: object) -> None:
    assert callable(true)
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
