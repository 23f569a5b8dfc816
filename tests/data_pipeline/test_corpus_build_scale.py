"""Building at scale: several processes, kills in the middle, memory, and what the tokenizer is trained on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_corpora import recipe, write_folder, write_recipe

from longspan.data_pipeline.build import build_corpus, pieces
from longspan.data_pipeline.build.packing import tokenizer_piece
from longspan.data_pipeline.build.pieces import Piece, Workers
from longspan.data_pipeline.build.reading import Document
from longspan.data_pipeline.build.workplace import WorkerDied
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.tokenization import load_tokenizer
from longspan.data_pipeline.tokenization.config import BpeTokenizerConfig
from longspan.errors import DataError, UsageError

WORDS = [f"{first}{second}" for first in ("ka", "ro", "mi", "tu", "sel") for second in ("n", "lo", "ras", "te", "mond")]


def texts(count: int, size: int) -> dict[str, bytes]:
    draw = random.Random(3)
    found = {}
    for number in range(count):
        line = " ".join(draw.choice(WORDS) for _ in range(size // 5))
        found[f"{('letters', 'poems')[number % 2]}/{number:03d}.txt"] = line.encode()[:size]
    found["poems/copy.txt"] = found["letters/000.txt"]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    folder = write_folder(tmp_path / "texts", texts(24, 4000))
    given = {"held_out": ["poems/003.txt"], "shard_bytes": 15_000, "split": {"held_out_fraction": 0.1}, **changes}
    return recipe(folder, **given)


BPE = {"kind": "bpe", "vocab_size": 300, "train_bytes": 20_000}


@pytest.mark.parametrize("tokenizer", [{"kind": "bytes"}, BPE])
def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: dict[str, Any]
) -> None:
    monkeypatch.setattr(pieces, "_PARALLEL_BYTES", 0)
    config = CorpusConfig.model_validate(settings(tmp_path, tokenizer=tokenizer))
    bars: list[tuple[str, int, int]] = []
    alone = build_corpus(config, tmp_path / "one", lambda line: None)
    several = build_corpus(config, tmp_path / "two", lambda line: None, lambda *row: bars.append(row), processes=2)
    assert contents(alone.folder) == contents(several.folder)
    assert alone.manifest.digest == several.manifest.digest
    assert {stage for stage, _, _ in bars} >= {"reading sources", "comparing documents", "writing shards"}
    assert all(0 <= done <= total for _, done, total in bars)


def test_an_error_of_a_worker_comes_through_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_PARALLEL_BYTES", 0)
    config = CorpusConfig.model_validate(settings(tmp_path))
    (tmp_path / "texts/poems/bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="byte 0xe9 at offset 3 is not UTF-8"):
        build_corpus(config, tmp_path / "corpus", lambda line: None, processes=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["texts"]


def kill_self(payload: dict[str, Any], output: Path, tick: pieces.Tick) -> dict[str, Any]:
    """A piece of work that the system kills the first time."""
    if not Path(payload["marker"]).exists():
        Path(payload["marker"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": payload["number"]}


def test_a_killed_worker_is_said_and_finished_pieces_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_PARALLEL_BYTES", 0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    told: list[str] = []
    work = [
        Piece(kill_self, {"number": number, "marker": str(tmp_path / "marker")}, 1, lambda done: f"{done['number']}")
        for number in range(3)
    ]

    def run() -> list[int]:
        with Workers(tmp_path, 2, lambda *row: None, told.append) as workers:
            return [result["number"] for result in workers.run("stage", work)]

    with pytest.raises(WorkerDied, match="a process of the build was killed, perhaps for want of memory"):
        run()
    assert run() == [0, 1, 2]
    told.clear()
    assert run() == [0, 1, 2]
    assert told == []


def test_a_result_whose_output_is_damaged_is_done_again(tmp_path: Path) -> None:
    def runs() -> int:
        told: list[str] = []
        piece = Piece(write_number, {"number": 5}, 1, lambda done: "done")
        Workers(tmp_path, 1, lambda *row: None, told.append).run("stage", [piece])
        return len(told)

    assert (runs(), runs()) == (1, 0)
    (output,) = tmp_path.glob("*.output")
    output.write_bytes(b"")
    assert (runs(), runs()) == (1, 0)
    (result,) = tmp_path.glob("*.json")
    result.write_bytes(result.read_bytes()[:-3])
    assert (runs(), runs()) == (1, 0)


def write_number(payload: dict[str, Any], output: Path, tick: pieces.Tick) -> dict[str, Any]:
    """A piece of work with output."""
    output.write_text(str(payload["number"]))
    return {}


# Says each step that it makes, and waits a moment in it, so that a kill lands in the middle of the work.
_SLOW_BUILD = """
import sys, time
from pathlib import Path
from longspan.data_pipeline.build import corpus, pieces
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.trainer import recipes

def slowed(tick):
    def tell(num_bytes):
        print("step", flush=True)
        time.sleep(0.005)
        tick(num_bytes)
    return tell

do = pieces._do
pieces._do = lambda piece, folder, tick: do(piece, folder, slowed(tick))
corpus.build_corpus(recipes.load(CorpusConfig, sys.argv[1]), Path(sys.argv[2]), lambda line: print(line, flush=True))
"""


def start_slow_build(path: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SLOW_BUILD, path, str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def killed_builds(path: str, out: Path, kills: int, seed: int) -> list[int]:
    """Kill builds of the recipe at `path` after some steps each, then let one through; pieces that each left behind."""
    draw = random.Random(seed)
    left: list[int] = []
    for _ in range(kills):
        with start_slow_build(path, out) as process:
            assert process.stdout is not None
            steps = draw.randint(14, 28)
            for line in process.stdout:
                steps -= line == "step\n"
                if steps == 0:
                    process.kill()
        if process.returncode == 0 and left:  # there were fewer steps left than it was given
            return left
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
        left.append(len(list(out.with_name(f".{out.name}.spool").glob("*.json"))))
        if left[-1] >= 9:  # of some 13: let the last build finish it
            break
    with start_slow_build(path, out) as process:
        process.communicate()
    assert process.returncode == 0
    return left


def check_kills(tmp_path: Path, tokenizer: dict[str, Any], kills: int, seed: int = 0) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", settings(tmp_path, tokenizer=tokenizer))
    config = CorpusConfig.model_validate(settings(tmp_path, tokenizer=tokenizer))
    straight = build_corpus(config, tmp_path / "straight", lambda line: None)
    left = killed_builds(path, tmp_path / "out" / "corpus", kills, seed)
    assert contents(tmp_path / "out/corpus") == contents(straight.folder)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["corpus"]
    # the kills were in the middle: later builds found finished pieces, and did more of them
    assert left == sorted(left), left
    assert len(set(left)) > 1 and left[0] < left[-1], left


def test_killed_builds_go_on_and_end_with_the_same_bytes(tmp_path: Path) -> None:
    check_kills(tmp_path, {"kind": "bytes"}, kills=3)


@pytest.mark.long
@pytest.mark.parametrize("tokenizer", [{"kind": "bytes"}, BPE])
@pytest.mark.parametrize("seed", range(10))
def test_many_kills(tmp_path: Path, tokenizer: dict[str, Any], seed: int) -> None:
    check_kills(tmp_path, tokenizer, kills=6, seed=seed)


@pytest.mark.parametrize("piece", ["read_source", "sign"])
def test_a_damaged_piece_is_never_built_from(tmp_path: Path, piece: str) -> None:
    config = CorpusConfig.model_validate(settings(tmp_path))

    def interrupt(line: str) -> None:
        if line.startswith("wrote"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, tmp_path / "corpus", interrupt)
    output = next((tmp_path / ".corpus.spool").glob(f"{piece}-*.output"))
    data = bytearray(output.read_bytes())
    data[-1] ^= 1  # a crash of the machine can leave a file of the right size with other bytes
    output.write_bytes(data)
    with pytest.raises(DataError, match=r"(are damaged|is damaged at byte \d+), perhaps by a crash"):
        build_corpus(config, tmp_path / "corpus", lambda line: None)
    assert build_corpus(config, tmp_path / "corpus", lambda line: None).outcome == "built"


def test_a_changed_file_is_read_again_after_a_kill(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", settings(tmp_path))
    out = tmp_path / "out" / "corpus"
    with start_slow_build(path, out) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("read poems"):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out/.corpus.spool").glob("read_source*.json"))) == 2
    (tmp_path / "texts/letters/002.txt").write_bytes(b"another text")
    config = CorpusConfig.model_validate(settings_of(path))
    result = build_corpus(config, out, lambda line: None)
    entry = result.manifest.document("letters/002.txt")
    assert DocumentReader(result.manifest).bytes(entry) == b"another text"


def settings_of(path: str) -> dict[str, Any]:
    import yaml

    content: dict[str, Any] = yaml.safe_load(Path(path).read_text())
    return content


def test_an_interrupted_build_keeps_what_is_finished(tmp_path: Path) -> None:
    config = CorpusConfig.model_validate(settings(tmp_path))
    out = tmp_path / "corpus"

    def interrupt(line: str) -> None:
        if line.startswith("wrote train-00001"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, out, interrupt)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".corpus.spool", "texts"]
    told: list[str] = []
    assert build_corpus(config, out, told.append).outcome == "built"
    assert not [line for line in told if line.startswith(("read ", "wrote train-00000", "wrote train-00001"))]
    assert [line for line in told if line.startswith("wrote train-00002")]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus", "texts"]


def test_a_full_disk_in_a_worker_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    config = CorpusConfig.model_validate(settings(tmp_path))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match="No space left on device"):
        build_corpus(config, tmp_path / "corpus", lambda line: None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["texts"]


def test_a_trained_tokenizer_is_kept_with_the_corpus_and_its_lengths_are_exact(tmp_path: Path) -> None:
    config = CorpusConfig.model_validate(settings(tmp_path, tokenizer=BPE))
    result = build_corpus(config, tmp_path / "corpus", lambda line: None)
    manifest = Manifest.load(result.folder)
    tokenizer = load_tokenizer(result.folder / "tokenizer")
    assert (manifest.vocabulary.kind, manifest.vocabulary.digest) == ("bpe", tokenizer.digest)
    source = texts(24, 4000)
    for entry in manifest.documents:
        encoded = tokenizer.encode(source[entry.id])
        assert (entry.num_tokens, entry.num_bytes) == (len(encoded.ids), len(source[entry.id]))
    train = result.statistics["totals"]["train"]
    assert train["bytes_per_token"] == train["bytes"] / train["tokens"] > 1.5
    assert build_corpus(config, tmp_path / "corpus", lambda line: None).outcome == "reused"


def test_only_training_documents_train_the_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "texts",
        {"letters/a.txt": b"and the king said unto them " * 400, "poems/h.txt": b"QQXXQQXXQQXX " * 2000},
    )
    content = recipe(folder, held_out=["poems/h.txt"], tokenizer={"kind": "bpe", "vocab_size": 270}, shard_bytes=10**6)
    result = build_corpus(CorpusConfig.model_validate(content), tmp_path / "corpus", lambda line: None)
    tokenizer = load_tokenizer(result.folder / "tokenizer")
    held_out = result.manifest.document("poems/h.txt")
    assert held_out.num_bytes / held_out.num_tokens < 1.1  # its words were never seen
    assert len(tokenizer.encode(b"and the king said unto them").ids) < 20  # of 27 bytes


def test_the_sample_for_the_tokenizer_is_even_bounded_and_always_the_same(tmp_path: Path) -> None:
    from longspan.data_pipeline.build.packing import _sample

    file = tmp_path / "texts"
    body = "größe und länge ".encode() * 200_000
    file.write_bytes(body * 2)
    documents = [Document(f"a/{i}", 0, "x", file, i * len(body), len(body), f"{i:064d}") for i in range(2)]
    rows = tokenizer_piece(BpeTokenizerConfig(kind="bpe", train_bytes=10**6), documents).payload["documents"]
    seen: list[int] = []
    sample = list(_sample(rows, 10**6, seen.append))
    assert sample == list(_sample(rows, 10**6, seen.append))
    assert 700_000 < sum(map(len, sample)) <= 10**6
    assert max(map(len, sample)) <= 2**16
    for part in sample:
        part.decode("utf-8")
    everything = b"".join(_sample(rows, 10**9, seen.append))
    assert len(everything) > 0.99 * 2 * len(body)


@pytest.mark.long
def test_the_memory_of_a_build_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    script = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from longspan.data_pipeline.build import build_corpus\n"
        "from longspan.data_pipeline.corpus_config import CorpusConfig\n"
        "config = CorpusConfig.model_validate(json.loads(sys.argv[1]))\n"
        "build_corpus(config, Path(sys.argv[2]), lambda line: None)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )

    def peak_mib(count: int) -> float:
        folder = tmp_path / f"texts{count}"
        (folder / "letters").mkdir(parents=True)
        (folder / "poems").mkdir()
        (folder / "poems/h.txt").write_bytes(b"held out")
        for number in range(count):
            (folder / f"letters/{number}.txt").write_bytes(os.urandom(600_000).hex().encode())
        content = json.dumps(recipe(folder, held_out=["poems/h.txt"], shard_bytes=2**23))
        command = [sys.executable, "-c", script, content, str(tmp_path / f"corpus{count}")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout.split()[-1]) / 1024

    assert peak_mib(16) < peak_mib(3) + 9  # 16 MB more of text
