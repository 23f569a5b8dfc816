"""Training on tokens of any kind: bits per byte of the text itself, one tokenizer from the first step to the last."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import token_corpora
import torch
from tiny_training import read_log, tiny_config

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.tokenization import load_tokenizer
from longspan.errors import CheckpointError, UsageError
from longspan.trainer.checkpoint.load import load_model, read_tokenizer
from longspan.trainer.engine import Engine
from longspan.trainer.loop import train

KINDS = ("bpe", "pieces")
HEAD = 150  # tokens of a document that are scored; one held-out document is shorter as `bpe`
SHORT = {"training__steps": 2, "validation__interval_steps": 2, "validation__max_document_tokens": HEAD}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        kind: token_corpora.corpus(root / kind, token_corpora.tokenizer(kind, root / f"{kind}-files"))
        for kind in ("bytes", "bpe", "other_bpe", "pieces")
    }


@pytest.fixture(scope="module")
def runs(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of two steps on each corpus."""
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        train(tiny_config(corpora[kind], **SHORT), root / kind)
    return {kind: root / kind for kind in KINDS}


def held_out_rate(run: Path, shards: Path) -> tuple[float, int]:
    """Bits per byte and bytes of the heads of the held-out texts, from the model and the texts alone."""
    model, manifest = load_model(run).model, Manifest.load(shards)
    nats, num_bytes = 0.0, 0
    for entry in manifest.split("held_out"):
        encoded = load_tokenizer(shards / "tokenizer").encode(token_corpora.texts()[entry.id])
        ids = torch.from_numpy(encoded.ids[: HEAD + 1].astype(np.int64))[None]
        reset = torch.zeros(1, -(-(ids.shape[1] - 1) // 8), dtype=torch.bool)
        with torch.no_grad():
            nll, _, _ = model(ids[:, :-1], model.init_state(1), reset=reset, labels=ids[:, 1:])
        nats += float(nll.double()[ids[:, 1:] != manifest.vocabulary.eos].sum())
        num_bytes += int(encoded.num_bytes[: HEAD + 1].sum())
    return nats / num_bytes / math.log(2), num_bytes


def assert_validated(run: Path, shards: Path) -> None:
    wanted, num_bytes = held_out_rate(run, shards)
    found = read_log(run, "validation")[-1]
    assert found["bytes"] == num_bytes
    assert found["bits_per_byte"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_in_bits_per_byte_of_the_text(runs: dict[str, Path], corpora: dict[str, Path], kind: str) -> None:
    assert_validated(runs[kind], corpora[kind])
    assert isinstance(read_log(runs[kind], "validation")[-1]["sample"], str)


def test_byte_lengths_off_by_one_are_noticed(
    corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DocumentReader.target_bytes_range
    monkeypatch.setattr(DocumentReader, "target_bytes_range", lambda *args: np.roll(right(*args), 1))
    train(tiny_config(corpora["bpe"], **SHORT), tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_validated(tmp_path / "run", corpora["bpe"])


@pytest.mark.parametrize("kind", KINDS)
def test_training_counts_each_token_but_eos(
    corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The first step's rate against its batch by hand; of `pieces` many tokens count no bytes, but have a cost."""
    seen = []
    right = Engine.step

    def step(self, batches, carried, *args, **kwargs):  # type: ignore[no-untyped-def]
        with self.evaluating() as model:
            batch = batches[0]
            nll, _, _ = model(batch.tokens, carried[0], reset=batch.reset, labels=batch.labels)
            scored = (batch.labels >= 0) & (batch.labels != eos)
            assert bool((batch.target_bytes[scored] == 0).any()) == (kind == "pieces")
            seen.append(float(nll[scored].sum()) / int(batch.target_bytes.sum()) / math.log(2))
        return right(self, batches, carried, *args, **kwargs)

    eos = Manifest.load(corpora[kind]).vocabulary.eos
    monkeypatch.setattr(Engine, "step", step)
    train(tiny_config(corpora[kind], training__steps=1, validation__sample_tokens=0), tmp_path / "run")
    assert read_log(tmp_path / "run", "step")[0]["bits_per_byte"] == pytest.approx(seen[0], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_its_tokenizer(runs: dict[str, Path], corpora: dict[str, Path], kind: str) -> None:
    checkpoint = runs[kind] / "checkpoints" / "step-00000002"
    assert read_tokenizer(checkpoint).digest == Manifest.load(corpora[kind]).vocabulary.digest
    assert load_model(runs[kind]).tokenizer_digest == Manifest.load(corpora[kind]).vocabulary.digest


def test_a_checkpoint_with_the_tokenizer_of_another_run_is_noticed(
    corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.trainer.saving.tokenizer_files", lambda manifest: {})
    train(tiny_config(corpora["bpe"], training__steps=1, validation__sample_tokens=0), tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"keeps the tokenizer \w{{64}}, but .* {digest_of(corpora['bpe'])}"):
        load_model(tmp_path / "run")


def digest_of(shards: Path) -> str:
    return Manifest.load(shards).vocabulary.digest


@pytest.mark.parametrize("start", ["resume", "init_from"])
def test_shards_of_another_tokenizer_are_refused(
    runs: dict[str, Path], corpora: dict[str, Path], tmp_path: Path, start: str
) -> None:
    config = tiny_config(corpora["other_bpe"], training__steps=4, validation__sample_tokens=0)
    how = {"resume": True} if start == "resume" else {"init_from": runs["bpe"]}
    with pytest.raises(UsageError, match="does not match the model") as caught:
        train(config, runs["bpe"] if start == "resume" else tmp_path / "run", **how)
    assert caught.value.exit_code == 2
    assert digest_of(corpora["bpe"]) in str(caught.value) and digest_of(corpora["other_bpe"]) in str(caught.value)


def test_a_vocabulary_that_is_too_small_names_the_size_to_set(corpora: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model.vocab_size = 256 is smaller .*\(384\). Set model.vocab_size=384"):
        train(tiny_config(corpora["bpe"], model__vocab_size=256), tmp_path / "run")
    assert not (tmp_path / "run").exists()
