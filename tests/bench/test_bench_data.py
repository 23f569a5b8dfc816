"""`longspan bench data` at tiny sizes: the object, the table, and that no token is counted twice."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.data_pipeline.batch import Batch
from longspan.data_pipeline.reader import LaneReader
from longspan.errors import ConfigError, DataError
from longspan.trainer import cli
from longspan.trainer.bench.data import encoding, measure, peers, readers, seeking
from longspan.trainer.bench.data.corpus import make_corpus
from longspan.trainer.bench.data.result import Bar, Pass, row_of
from longspan.trainer.bench.data.settings import read_data_settings

TOKENS = 30_000
READERS = ("ranged, 32 x 64", "ranged, 32 x 256", "streaming, 32 x 64")
RESULT_KEYS = {
    "tokens_per_second",
    "benchmark",
    "command",
    "date",
    "device",
    "load",
    "versions",
    "settings",
    "rows",
    "ratios",
    "seconds",
    "notes",
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SEGMENT_TOKENS", (64, 256))
    plan = {"documents": 3000, "tokens": 1024, "lanes": 8, "segment_tokens": 512, "step": 1000}
    monkeypatch.setattr(seeking, "PLAN", plan)
    for name, value in {"TEXT_BYTES": 100_000, "TRAIN_BYTES": 50_000, "VOCABULARY": 300}.items():
        monkeypatch.setattr(encoding, name, value)


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    assert cli.main(["bench", "data", "--tokens", str(TOKENS), "--repeat", "2", *words]) == code
    out = capsys.readouterr().out
    return (json.loads(out.splitlines()[0]) if "--json" in words else {}), out


def without_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what the test is not about."""
    monkeypatch.setattr(measure, "seek_rows", lambda repeat, scratch: [])
    monkeypatch.setattr(measure, "http_rows", lambda reading, scratch: [])
    monkeypatch.setattr(measure, "THREADS", ())


def test_the_object_is_complete(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "streaming", None)  # type: ignore[arg-type]  # importing it fails
    result, out = run(capsys, "--json")
    assert len(out.splitlines()) == 1 and set(result) == RESULT_KEYS
    assert result["command"] == f"longspan bench data --tokens {TOKENS} --repeat 2 --peers all"
    assert result["device"]["cores"] >= 1 and len(result["load"]) == 2
    rows = {(row["contender"], row["case"]): row for row in result["rows"]}
    ours = [case for contender, case in rows if contender == "longspan"]
    for case in ("first pass", "later passes", "empty cache", "full cache", "no snapshots yet", "with snapshots"):
        assert any(case in name for name in ours), case
    assert rows["mosaicml-streaming", "documents in order, 32 x 64"]["status"] == "not installed"
    assert "pip install mosaicml-streaming" in rows["mosaicml-streaming", "documents in order, 32 x 64"]["note"]
    for row in result["rows"]:
        if row["contender"] == "mosaicml-streaming":
            continue
        assert row["status"] == "measured", row
        assert row["low_seconds"] <= row["seconds"] <= row["high_seconds"] and row["repeats"] == 2
        assert ("seek" in row["case"]) == (row["peak_gib"] is not None) == (row["tokens_per_second"] is None)
        assert ("BPE" in row["case"]) == (row["megabytes_per_second"] is not None)
        assert (row["is_met"] is None) == (not row["bar"])
    first = result["rows"][0]
    assert first["case"] == "ranged, 32 x 64, first pass" and first["bar"] == "150,000,000 tokens/s"
    assert result["tokens_per_second"] == first["tokens_per_second"] > 0
    assert len([ratio for ratio in result["ratios"] if ratio["value"] > 0]) == 3


def test_tokens_are_those_of_the_batches(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path, TOKENS)
    reading = readers.Reading(manifest, "ranged", 64, TOKENS, 1)
    first, again = readers.local_rows(reading)
    with reading.lane_reader(readers.DocumentReader(manifest)) as reader:
        labels = [reader.batch(step).labels for step in range(2 * reading.steps)]
    held = [int((one != -100).sum()) for one in labels]
    assert first.tokens == sum(held[: reading.steps]) and again.tokens == sum(held[reading.steps :])
    # a pass is about as long as the corpus: no more than its places, and most of them are full
    assert 0.5 * TOKENS < first.tokens <= reading.steps * 32 * 64 < TOKENS + 32 * 64
    assert first.tokens_per_second == pytest.approx(first.tokens / first.seconds)


def test_a_double_count_is_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_rest(monkeypatch)
    real = LaneReader.batch

    def doubled(self: LaneReader, step: int) -> Batch:
        batch = real(self, step)
        return dataclasses.replace(batch, num_valid=2 * batch.num_valid)

    monkeypatch.setattr(LaneReader, "batch", doubled)
    result, out = run(capsys, "--json", "--no-peers", code=70)
    assert [row["status"] for row in result["rows"]] == ["failed"] * 3
    assert all("tokens were counted, the batches of steps" in row["note"] for row in result["rows"])
    assert result["tokens_per_second"] is None
    assert "3 of our own rows failed" in json.loads(out.splitlines()[1])["error"]


def test_a_peer_that_gives_a_document_twice_is_noticed(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path, TOKENS)
    reading = peers.PeerReading(manifest, 64, 2 * TOKENS, 1)
    documents = list(peers._WebDataset(manifest))
    assert reading.row("webdataset", documents).tokens == manifest.documents.num_tokens.sum() // 2048 * 2048
    with pytest.raises(DataError, match="delivered"):
        reading.row("webdataset", [*documents, *documents])


def test_a_peer_reads_no_more_than_a_pass(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path, TOKENS)
    assert peers.webdataset_row(peers.PeerReading(manifest, 64, 10_000, 1)).tokens == 10_000 // 2048 * 2048


def test_the_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    one, other = make_corpus(tmp_path / "a", TOKENS), make_corpus(tmp_path / "b", TOKENS)
    assert one.digest == other.digest and len(one.shards) > 1
    assert TOKENS <= one.documents.num_tokens.sum() < TOKENS + 16 * 512
    assert one.vocabulary.token_dtype == "uint16"


def test_table_and_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_the_rest(monkeypatch)
    page = tmp_path / "page.md"
    _, out = run(capsys, "--peers", "webdataset", "--write-report", str(page))
    for text in ("tokens/s", "seconds", "CPU s", "150,000,000 tokens/s: ", "Load of the machine", "cores of"):
        assert text in out
    for title in READERS:
        assert title in out
    text = page.read_text(encoding="utf-8")
    assert text.count("# Benchmarks on ") == 1 and "| webdataset | documents in order, 32 x 64 |" in text
    assert str(tmp_path) not in text


def test_a_corpus_that_is_there_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_the_rest(monkeypatch)
    manifest = make_corpus(tmp_path / "corpus", 5000)
    result, _ = run(capsys, "--json", "--no-peers", "--corpus", str(tmp_path / "corpus"))
    (about,) = [note for note in result["notes"] if note.startswith("Corpus: ")]
    assert about.startswith(f"Corpus: {len(manifest.documents):,} documents")
    assert result["rows"][0]["tokens"] <= 3 * 2048  # a pass over it, not over the 30,000


def test_a_bar_counts_the_median_and_all_that_it_asks() -> None:
    passes = [Pass(100, seconds, 1.0, peak_gib=0.5) for seconds in (1.0, 2.0, 9.0)]
    assert row_of("x", "y", passes, Bar(tokens_per_second=50)).is_met is True
    assert row_of("x", "y", passes, Bar(tokens_per_second=51)).is_met is False
    assert row_of("x", "y", passes, Bar(seconds=2.0, gib=0.5)).is_met is True
    assert row_of("x", "y", passes, Bar(seconds=2.0, gib=0.4)).is_met is False
    assert row_of("x", "y", passes).is_met is None


def test_seeking_finds_what_the_plan_holds_without_torch(tmp_path: Path) -> None:
    rows = seeking.seek_rows(1, tmp_path)
    assert len(rows) == 2 and all(0 < row.peak_gib < 1 for row in rows if row.peak_gib is not None)
    code = "import sys; import longspan.trainer.bench.data.seeking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_snapshots_that_lead_elsewhere_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = iter([{"pieces": "a"}, {"pieces": "b"}])
    more = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_gib": 0.1}
    monkeypatch.setattr(seeking, "_seek_in_a_process", lambda settings: {**next(answers), **more})
    with pytest.raises(DataError, match="different tokens"):
        seeking.seek_rows(1, tmp_path)


def test_encoding_that_loses_bytes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = encoding.Encoding(1)
    real = measured._tokenizer.encode

    def shorter(text: bytes) -> Any:
        encoded = real(text)
        return dataclasses.replace(encoded, num_bytes=np.zeros_like(encoded.num_bytes))

    monkeypatch.setattr(measured._tokenizer, "encode", shorter)
    with pytest.raises(DataError, match="another number of bytes"):
        measured.row(1)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    words = ["--tokens", "0", "--repeat", "0", "--corpus", str(tmp_path), "--peers", "webdatset"]
    with pytest.raises(ConfigError) as raised:
        read_data_settings(cli.build_parser().parse_args(["bench", "data", *words]))
    found = [str(problem) for problem in raised.value.problems]
    assert found[:2] == ["--tokens = 0: must be 1 or more.", "--repeat = 0: must be 1 or more."]
    assert "no manifest.json" in found[2] and "Did you mean webdataset?" in found[3] and len(found) == 4
