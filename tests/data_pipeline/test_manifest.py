"""The manifest: its text, its digest, its schema, and the strictness with which it is read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from packed_corpora import TEXTS, forge, pack, small_bpe
from tiny_corpora import manifest_of_lengths

from longspan.data_pipeline import manifest_file
from longspan.data_pipeline.document_table import DocumentTable
from longspan.data_pipeline.manifest import (
    Manifest,
    ShardEntry,
    SourceEntry,
    byte_vocabulary,
    did_you_mean,
    vocabulary_entry,
)
from longspan.data_pipeline.vocabulary import ByteVocabulary
from longspan.errors import DataError, UsageError
from longspan.trainer.cli import main


@pytest.fixture
def corpus(tmp_path):
    return pack(tmp_path / "corpus")


def sign(text: str) -> str:
    """The text with the digest that fits it."""
    body = text[: text.index('  "digest"')]
    return f'{body}  "digest": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def refused(corpus, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Manifest.load(corpus.folder)


@pytest.mark.parametrize("rows_at_once", [1, 3, 4, 100])
def test_what_is_written_is_read_again(corpus, monkeypatch, rows_at_once):
    monkeypatch.setattr(manifest_file, "_ROWS_AT_ONCE", rows_at_once)
    manifest = Manifest.load(corpus.folder)
    assert manifest.documents == corpus.manifest.documents
    assert (manifest.sources, manifest.shards) == (corpus.manifest.sources, corpus.manifest.shards)
    assert manifest.to_json() == corpus.manifest.to_json() == (corpus.folder / "manifest.json").read_text()
    raw = json.loads(manifest.to_json())
    assert raw["schema_version"] == 2
    assert [document["id"] for document in raw["documents"]] == list(TEXTS)
    assert raw["vocabulary"] == byte_vocabulary().model_dump() and raw["vocabulary"]["token_dtype"] == "uint8"
    assert sign(manifest.to_json()) == manifest.to_json()


def test_a_manifest_without_documents_is_read(tmp_path):
    manifest = Manifest.create(tmp_path, "empty", [], [], [])
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert json.loads(manifest.to_json())["documents"] == []
    loaded = Manifest.load(tmp_path)
    assert len(loaded.documents) == 0 and loaded.split("train") == []


def test_a_tokenised_corpus_names_its_tokenizer(tmp_path):
    tokenizer = small_bpe()
    corpus = pack(tmp_path / "corpus", tokenizer=tokenizer)
    vocabulary = Manifest.load(corpus.folder).vocabulary
    assert vocabulary == vocabulary_entry(tokenizer)
    assert (vocabulary.kind, vocabulary.size, vocabulary.token_dtype) == ("bpe", tokenizer.size, "uint16")
    for entry in corpus.manifest.documents:
        assert entry.size == 2 * entry.num_tokens
        assert entry.num_bytes == len(TEXTS[entry.id])
        assert entry.lengths_offset > entry.offset


@pytest.mark.parametrize(
    ("version", "advice"), [(3, "Upgrade Longspan"), (999, "Upgrade"), (1, "Build the corpus again")]
)
def test_another_schema_is_a_usage_error_with_the_remedy(corpus, capsys, version, advice):
    file = corpus.folder / "manifest.json"
    # a newer schema may be of any form behind its version
    file.write_text(file.read_text().replace('"schema_version": 2', f'"schema_version": {version}, "new": ['))
    refused(corpus, UsageError, f"schema version {version}.*reads 2")
    assert main(["data", "verify", str(corpus.folder)]) == 2
    assert advice in capsys.readouterr().err


def test_damage_is_named(corpus):
    file = corpus.folder / "manifest.json"
    text = file.read_text()
    cases = [
        ('"num_tokens": 3', '"num_tokens": 4', "its content does not match its digest"),
        ('"documents"', '"document"', "documents: field required"),
        ('"shards"', '"shard"', "shards: field required"),
        ("{", "[", "is not readable"),
        ('  "digest"', '  "digest" ', "digest: field required"),
    ]
    for old, new, message in cases:
        assert old in text
        file.write_text(text.replace(old, new, 1))
        refused(corpus, DataError, message)
    file.write_text(text + "\n")
    refused(corpus, DataError, "digest: field required at the end")
    file.write_text(json.dumps(json.loads(text)))
    refused(corpus, DataError, "documents: field required, one line a document")
    for damaged, message in (
        ("", "is not readable"),
        ("[]", "is not readable: it holds list"),
        ("[" * 10**5, "recursion"),
    ):
        file.write_text(damaged)
        refused(corpus, DataError, message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_tokens", 3.5, "documents.4.num_tokens: input should be a valid integer"),
        ("num_tokens", "32", "documents.4.num_tokens: input should be a valid integer"),
        ("num_tokens", True, "documents.4.num_tokens: input should be a valid integer"),
        ("num_tokens", None, "documents.4.num_tokens: input should be a valid integer"),
        ("num_tokens", 1, "document letters/e.txt has a num_tokens below 2"),
        ("num_bytes", -1, "document letters/e.txt has a num_bytes below 0"),
        ("offset", -512, "document letters/e.txt has a offset below 0"),
        ("offset", 2**70, "documents"),
        ("sha256", "A" * 64, "document letters/e.txt has a sha256 that is not 64 hexadecimal digits"),
        ("sha256", 7, "documents.4.sha256: input should be a valid string"),
        ("split", "test", "document letters/e.txt has a split other than train and held_out"),
        ("shard", "../../etc/passwd", "document letters/e.txt lies outside its shard"),
        ("licence", None, "documents.4.licence: input should be a valid string"),
        ("weight", 3, "documents.4.weight: extra inputs are not permitted"),
        ("lengths_offset", 5, "document letters/e.txt has a lengths_offset"),
    ],
)
@pytest.mark.parametrize("rows_at_once", [2, 100])
def test_a_signed_manifest_with_wrong_values_is_refused(corpus, monkeypatch, rows_at_once, field, value, message):
    monkeypatch.setattr(manifest_file, "_ROWS_AT_ONCE", rows_at_once)
    forge(corpus.folder, lambda raw: raw["documents"][4].update({field: value}))
    refused(corpus, DataError, message)


def test_fields_and_lines_are_counted(corpus):
    file = corpus.folder / "manifest.json"
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    first = next(place for place, line in enumerate(lines) if "letters/a.txt" in line)

    def written(*changed: str) -> None:
        file.write_text(sign("".join([*lines[:first], *changed, *lines[first + 2 :]])))

    written(lines[first].replace('"lengths_offset": 0, ', ""), lines[first + 1])
    refused(corpus, DataError, r"documents.0.lengths_offset: field required")
    written(lines[first].rstrip() + " " + lines[first + 1].strip() + "\n")
    refused(corpus, DataError, r"documents.0.: invalid json")
    written(lines[first].rstrip(",\n") + "\n", lines[first + 1])
    refused(corpus, DataError, r"documents from 0 on are not readable: not one object a line")
    written(lines[first].replace('"num_tokens"', '"num_tokens": 3, "num_tokens"'), lines[first + 1])
    refused(corpus, DataError, r"documents from 0 on are not readable.*twice")


def test_entries_that_contradict_each_other_are_all_named(corpus):
    def change(raw):
        raw["sources"].append(raw["sources"][0])
        raw["shards"].append(raw["shards"][0])
        raw["documents"][0]["group"] = raw["documents"][7]["group"]  # one in training, one held out
        raw["documents"][1]["id"] = "elsewhere/b.txt"

    forge(corpus.folder, change)
    with pytest.raises(DataError) as caught:
        Manifest.load(corpus.folder)
    message = str(caught.value)
    assert "two sources are named letters" in message
    assert "two shards are named train-00000.tar" in message
    assert "document letters/a.txt is in a group that is only partly held out (and 1 more documents)" in message
    assert "document elsewhere/b.txt has an id that does not begin with its source" in message


def test_documents_are_found_by_split_and_id():
    manifest = manifest_of_lengths({"a": [5, 6], "b": [7]})
    assert [entry.id for entry in manifest.split("train")] == ["a/0", "a/1", "b/0"]
    assert manifest.places("held_out").tolist() == []
    assert manifest.document("b/0").num_tokens == 7
    with pytest.raises(UsageError, match=r"no document b/00. Did you mean b/0"):
        manifest.document("b/00")


def test_near_names_are_found_among_few_and_among_many():
    assert did_you_mean("books/Ema", ["books/Emma", "code/x"]) == ". Did you mean books/Emma?"
    many = [f"code/repository-{number}" for number in range(10**5)]
    assert did_you_mean("books/Ema", [*many, "books/Emma"]) == ". Did you mean books/Emma?"
    assert did_you_mean("books/Ema", many) == "."
    start = time.perf_counter()
    assert "Did you mean code/repository-" in did_you_mean("code/repository-1234567", many)
    assert time.perf_counter() - start < 2  # all of them would take many seconds


def test_the_byte_vocabulary_is_the_one_of_the_reader():
    entry = byte_vocabulary()
    assert entry.digest == ByteVocabulary().digest
    assert (entry.bos, entry.eos, entry.pad, entry.size, entry.padded_size) == (256, 257, 258, 259, 384)


_LOAD = """
import resource, sys, time
from longspan.data_pipeline.manifest import Manifest
began = time.monotonic()
manifest = Manifest.load(sys.argv[1])
assert len(manifest.documents) == int(sys.argv[2]) and manifest.documents.num_tokens.sum() > 0
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.long
def test_a_million_documents_load_in_seconds_and_a_gibibyte(tmp_path: Path) -> None:
    count = 1_000_000
    table = DocumentTable.synthetic(np.full(count, 65_536), np.arange(count) % 3, ["a", "b", "c"])
    sources = [SourceEntry(name=name, kind="folder", licence="none", origin="none") for name in "abc"]
    shard = ShardEntry(url="synthetic.tar", size=count * 65_536, sha256="0" * 64)
    manifest = Manifest.create(tmp_path, "large", sources, [shard], table)
    with (tmp_path / "manifest.json").open("wb") as stream:
        manifest.write(stream)
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path), str(count)], capture_output=True, text=True, check=True
    )
    seconds, peak_bytes = map(float, done.stdout.split())
    assert peak_bytes < 2**30
    assert seconds < 30
