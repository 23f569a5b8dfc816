"""Synthetic sources in corpus recipes: built to shards, read back, and scored from what lies on disk."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import yaml
from synthetic_checkers import CHECKERS
from tiny_corpora import recipe, write_folder, write_recipe

from longspan.data_pipeline.build import build_corpus
from longspan.data_pipeline.corpus_config import CorpusConfig, corpus_problems
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.synthetic.documents import answer_of_tokens, document_again, make_document
from longspan.data_pipeline.synthetic.suites import SUITES
from longspan.errors import EXIT_USAGE
from longspan.trainer import recipes
from longspan.trainer.cli import main

SHIPPED = recipes.PACKAGED_CONFIGS / "data" / "synthetic_state_tracking.yaml"


def small(**changes: object) -> dict[str, object]:
    """The shipped recipe with documents of 1.5 kB, few of each source."""
    content = yaml.safe_load(SHIPPED.read_text())
    for source in content["sources"]:
        source.update(documents=2, document_bytes=1500)
        if "instructions" in source["task"]:
            source["task"]["instructions"] = [700, 700]
    return {**content, **changes}


def built(tmp_path: Path, content: dict[str, object]) -> Manifest:
    config = CorpusConfig.model_validate(content)
    assert not corpus_problems(config)
    build_corpus(config, tmp_path / "corpus", progress=lambda line: None)
    return Manifest.load(tmp_path / "corpus")


def test_answers_are_found_in_the_tokens_of_a_corpus(tmp_path):
    manifest = built(tmp_path, small())
    origins = {source.name: source.origin for source in manifest.sources}
    reader = DocumentReader(manifest)
    assert len(manifest.split("held_out")) == len(origins) == 10
    for entry in manifest.documents:
        assert entry.split == ("held_out" if "/test-" in entry.id else "train")
        source, name = entry.id.split("/")
        again = document_again(origins[source], name)
        tokens = reader.token_range(entry, 0, entry.num_tokens)
        assert bytes(tokens[1:-1].tolist()) == again.text
        answer_of = answer_of_tokens(again, reader.target_bytes_range(entry, 0, entry.num_tokens))
        for number, (start, stop) in enumerate(again.answers.tolist()):
            assert bytes(tokens[answer_of == number].tolist()) == again.text[start:stop]
    reader.close()


def test_a_tokenizer_that_joins_bytes_still_finds_the_answers(tmp_path):
    content = small(tokenizer={"kind": "bpe", "vocab_size": 400, "train_bytes": 50_000})
    content["sources"] = [source for source in content["sources"] if source["name"] in ("recall", "variables")]
    content["held_out"] = ["recall/test-000000", "variables/test-000000"]
    manifest = built(tmp_path, content)
    reader = DocumentReader(manifest)
    for entry in manifest.split("held_out"):
        source, name = entry.id.split("/")
        again = document_again(next(s.origin for s in manifest.sources if s.name == source), name)
        token_bytes = reader.target_bytes_range(entry, 0, entry.num_tokens)
        answer_of = answer_of_tokens(again, token_bytes)
        assert token_bytes.max() > 1 and set(answer_of.tolist()) >= {-1, 0, len(again.answers) - 1}
        covered = np.repeat(answer_of >= 0, token_bytes)
        assert all(covered[start:stop].all() for start, stop in again.answers.tolist())
    reader.close()


def test_the_shipped_recipe_is_sound_and_its_long_tasks_are_long():
    config = recipes.load(CorpusConfig, SHIPPED, cross_check=corpus_problems)
    sources = {source.name: source for source in config.sources}
    assert len(make_document(sources["flip_flop_sparse"], "train", 0).sizes) == 1
    assert len(make_document(sources["variables"], "train", 0).text) > 65536


def test_training_on_test_documents_is_refused(tmp_path, capsys):
    content = small(held_out=["parity/test-000000"], dedupe={"enabled": True})
    path = write_recipe(tmp_path / "recipe.yaml", content)
    assert main(["data", "build", path, "--out", str(tmp_path / "corpus")]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "sources.walk.test_documents = 1: documents for tests would be trained on" in error
    assert "List in held_out: walk/test-000000" in error and "sources.parity.test_documents" not in error
    assert "dedupe.enabled = true" in error
    assert not (tmp_path / "corpus").exists()


def test_recipes_without_synthetic_sources_may_look_for_near_duplicates(tmp_path):
    config = CorpusConfig.model_validate(recipe(write_folder(tmp_path / "texts"), dedupe={"enabled": True}))
    assert not corpus_problems(config)


def test_a_misspelt_task_is_refused(tmp_path, capsys):
    content = small()
    content["sources"][0]["task"] = {"kind": "pariti"}
    path = write_recipe(tmp_path / "recipe.yaml", content)
    assert main(["data", "build", path, "--out", str(tmp_path / "corpus")]) == EXIT_USAGE
    assert "pariti" in capsys.readouterr().err


def test_the_page_names_every_task_and_its_examples_are_right():
    page = (Path(__file__).parents[2] / "docs" / "synthetic_tasks.md").read_text()
    assert all(f"`{kind}`" in page for kind in SUITES)
    kinds = ("parity", "dyck", "random_walk", "listops")
    examples = re.findall(r"`([^`\n]+=[^`\n ]+)`", page)
    assert len(examples) == len(kinds)
    for kind, text in zip(kinds, examples, strict=True):
        assert CHECKERS[kind](text)[0] == [text.rsplit("=", 1)[1].encode()]
    written = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    assert not corpus_problems(CorpusConfig.model_validate({"name": "page", **written}))
