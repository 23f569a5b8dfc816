"""`longspan evaluate` on tokens of any kind: the same bytes of the text, exactly counted, or a clear refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import token_corpora
import torch

from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.tokenization import load_tokenizer
from longspan.errors import UsageError
from longspan.trainer import cli, recipes
from longspan.trainer.checkpoint.load import load_model, without_padding_rows
from longspan.trainer.corpus_tokenizer import tokenizer_files
from longspan.trainer.evaluation import run as evaluation_run
from longspan.trainer.evaluation import targets
from longspan.trainer.evaluation.run import evaluate
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.evaluation.windows import ScoredDocument

KINDS = ("bytes", "bpe", "pieces")
SPEC = {"span_bytes": 40, "context_tokens": [8, 32], "bytes_per_token": 4}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        kind: token_corpora.corpus(root / kind, token_corpora.tokenizer(kind, root / f"{kind}-files"))
        for kind in (*KINDS, "other_bpe")
    }


@pytest.fixture(scope="module")
def runs(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        tokenizer = tokenizer_files(Manifest.load(corpora[kind]))
        tiny_run.run_directory(root / kind, tiny_run.config(corpora[kind]), tokenizer=tokenizer)
    return {kind: root / kind for kind in KINDS}


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "step-00000001"


def spec_of(folder: Path, **changes: Any) -> EvaluationSpec:
    return recipes.load(EvaluationSpec, tiny_run.spec_file(folder, **{**SPEC, **changes}))


def scored_by_hand(run: Path, result: dict[str, Any]) -> tuple[float, int, int]:
    """Bits per byte, bytes and tokens of the result's spans, from the texts and whole passes over them."""
    model, shards = without_padding_rows(load_model(run)).model, Path(result["data"]["shards"])
    encode: Callable[[bytes], Any] = lambda text: np.array([256, *text, 257])  # noqa: E731
    if (shards / "tokenizer").is_dir():
        encode = lambda text: load_tokenizer(shards / "tokenizer").encode(text).ids.astype(np.int64)  # noqa: E731
    nats, num_bytes, num_tokens = [], 0, 0
    for document in result["data"]["documents"]:
        text = token_corpora.texts()[document["id"]]
        lengths = byte_lengths(text, encode, shards)
        ids = torch.from_numpy(encode(text))[None]
        reset = torch.zeros(1, -(-(ids.shape[1] - 1) // 8), dtype=torch.bool)
        with torch.no_grad():
            nll, _, _ = model(ids[:, :-1], model.init_state(1), reset=reset, labels=ids[:, 1:])
        for start, end in document["spans"]:
            place, inside = 0, []
            for token, size in enumerate(lengths):
                # a token without bytes belongs to the character that it stands in or beside
                if size == 0 and start <= place <= end and 0 < token < len(lengths) - 1:
                    inside.append((token, 0))
                elif size and start <= place and place + size <= end:
                    inside.append((token, size))
                place += size
            nats += [float(nll[0, token - 1].double()) for token, _ in inside]
            num_bytes += sum(size for _, size in inside)
            num_tokens += len(inside)
    return math.fsum(nats) / num_bytes / math.log(2), num_bytes, num_tokens


def byte_lengths(text: bytes, encode: Callable[[bytes], Any], shards: Path) -> list[int]:
    """Bytes of each token of the whole text, as the tokenizer says."""
    if not (shards / "tokenizer").is_dir():
        return [0, *[1] * len(text), 0]
    return load_tokenizer(shards / "tokenizer").encode(text).num_bytes.tolist()


def assert_right(run: Path, result: dict[str, Any]) -> None:
    rate, num_bytes, num_tokens = scored_by_hand(run, result)
    assert (result["target_bytes"], result["target_tokens"]) == (num_bytes, num_tokens)
    assert result["carried"]["bits_per_byte"] == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scored_are_the_tokens_inside_the_spans_and_their_bytes(
    runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    result = evaluate(checkpoint_of(runs[kind]), spec_of(tmp_path), tmp_path)
    assert_right(runs[kind], result)
    assert result["data"]["tokenizer"]["name"] == Manifest.load(result["data"]["shards"]).vocabulary.name


def test_the_spans_are_those_of_the_text_whatever_the_tokens(runs: dict[str, Path], tmp_path: Path) -> None:
    found = [evaluate(checkpoint_of(runs[kind]), spec_of(tmp_path), tmp_path)["data"] for kind in KINDS]
    assert len(found[0]["documents"]) == 3
    for data in found[1:]:
        assert data["documents"] == found[0]["documents"] and data["needed_bytes"] == found[0]["needed_bytes"]
        assert data["mask_digest"] != found[0]["mask_digest"]  # the tokens are others


def test_spans_from_a_hash_of_the_tokens_are_noticed(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = targets.document_spans
    monkeypatch.setattr(
        targets, "document_spans", lambda entry, *rest: right(entry.model_copy(update={"id": entry.sha256}), *rest)
    )
    found = [evaluate(checkpoint_of(runs[kind]), spec_of(tmp_path), tmp_path)["data"]["documents"] for kind in KINDS]
    assert found[0] != found[1]


def test_words_are_those_of_the_text_whatever_the_tokens(runs: dict[str, Path], tmp_path: Path) -> None:
    results = [evaluate(checkpoint_of(runs[kind]), spec_of(tmp_path), tmp_path) for kind in KINDS]
    texts = [token_corpora.texts()[entry["id"]] for entry in results[0]["data"]["documents"]]
    for result in results:
        whole = result["whole"]
        assert whole["complete"] and whole["words"] == sum(len(text.decode().split()) for text in texts)
        assert whole["bytes"] == sum(len(text) for text in texts)
        nats = whole["nats_per_token"] * whole["tokens"]
        assert math.log(whole["perplexity_per_word"]) == pytest.approx(nats / whole["words"], rel=1e-12)
    headed = evaluate(checkpoint_of(runs["bpe"]), spec_of(tmp_path, max_document_bytes=400), tmp_path)["whole"]
    assert not headed["complete"] and headed["words"] is None and headed["perplexity_per_word"] is None


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (-1, -1)])
def test_targets_off_by_one_are_noticed(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: tuple[int, int]
) -> None:
    right = targets.token_ranges

    def wrong(*args: Any) -> list[tuple[int, int]]:
        return [(first + shift[0], stop + shift[1]) for first, stop in right(*args)]

    monkeypatch.setattr(evaluation_run.targets, "token_ranges", wrong)
    result = evaluate(checkpoint_of(runs["bpe"]), spec_of(tmp_path), tmp_path)
    with pytest.raises(AssertionError):
        assert_right(runs["bpe"], result)


def test_lengths_off_by_one_are_noticed(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = evaluation_run.DocumentReader.target_bytes_range
    monkeypatch.setattr(evaluation_run.DocumentReader, "target_bytes_range", lambda *args: np.roll(right(*args), 1))
    result = evaluate(checkpoint_of(runs["bpe"]), spec_of(tmp_path), tmp_path)
    with pytest.raises(AssertionError):
        assert_right(runs["bpe"], result)


def test_the_longest_document_has_a_donor_for_every_place(runs: dict[str, Path], tmp_path: Path) -> None:
    """Heads of equal bytes have other numbers of tokens."""
    result = evaluate(checkpoint_of(runs["bpe"]), spec_of(tmp_path, spans_per_document=4), tmp_path)
    assert result["swapped"]["bits_per_byte"] != result["carried"]["bits_per_byte"]
    document = ScoredDocument("a", np.array([9, 1, 2, 3]), np.array([0, 1, 1, 1]), [])
    assert document.inputs(2, 4).tolist() == [2, 3] and document.inputs(2, 7).tolist() == [2, 3, 9, 1, 2]


def test_too_few_tokens_before_a_target_name_the_setting(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"bytes_per_token = 1: .* 32 are wanted.* set bytes_per_token to (\d)"
    ) as caught:
        evaluate(checkpoint_of(runs["bpe"]), spec_of(tmp_path, bytes_per_token=1), tmp_path)
    enough = int(str(caught.value).rstrip(".")[-1])
    assert evaluate(checkpoint_of(runs["bpe"]), spec_of(tmp_path, bytes_per_token=enough), tmp_path)["target_tokens"]


def test_a_span_that_holds_no_token_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"span_bytes = 1: a span of .* holds no whole token"):
        evaluate(checkpoint_of(runs["bpe"]), spec_of(tmp_path, span_bytes=1, spans_per_document=8), tmp_path)


def test_shards_of_another_tokenizer_end_with_2(
    runs: dict[str, Path], corpora: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny_run.spec_file(tmp_path, **SPEC, shards=str(corpora["other_bpe"]))
    assert cli.main(["evaluate", str(runs["bpe"]), "--spec", str(spec)]) == 2
    message = capsys.readouterr().err
    assert "does not match the model" in message
    assert all(Manifest.load(corpora[kind]).vocabulary.digest in message for kind in ("bpe", "other_bpe"))
