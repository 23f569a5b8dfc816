"""The mid-size recipe: pinned, split by name, and large enough on paper; building it takes the network."""

from __future__ import annotations

from collections import Counter

import pytest

from longspan.data_pipeline.corpus_config import CorpusConfig, corpus_problems
from longspan.data_pipeline.source_config import PackagesConfig
from longspan.trainer import recipes


@pytest.fixture(scope="module")
def config() -> CorpusConfig:
    return recipes.load(CorpusConfig, "configs/data/books_code_midsize.yaml", (), corpus_problems)


def test_every_package_is_pinned_and_comes_once(config: CorpusConfig) -> None:
    sources = [source for source in config.sources if isinstance(source, PackagesConfig)]
    packages = [package for source in sources for package in source.packages]
    assert all(package.sha256 for package in packages)
    assert [name for name, count in Counter(package.name for package in packages).items() if count > 1] == []


def test_code_is_one_document_a_repository_from_a_fixed_list(config: CorpusConfig) -> None:
    counts = {}
    for source in config.sources:
        if isinstance(source, PackagesConfig) and source.form == "repository":
            counts[source.name] = len(source.packages)
            assert all(package.name.endswith("-dev") for package in source.packages)
            assert [package.name for package in source.packages] == sorted(package.name for package in source.packages)
    assert counts == {"go": 228, "rust": 194}


def test_whole_books_presidents_sections_and_repositories_are_held_out(config: CorpusConfig) -> None:
    held_out = set(config.held_out)
    assert "novels/Persuasion" in held_out
    assert sum(name.startswith(("go/", "rust/")) for name in held_out) == 15
    assert sum(name.startswith("manuals/") for name in held_out) == 1
    whole = [name for name, members in config.groups.items() if set(members) <= held_out]
    assert len([name for name in whole if name.startswith("faq_section")]) == 2
    assert len([name for name in whole if not name.startswith("faq_section")]) == 4
    assert config.dedupe.enabled and config.split.duplicates == "hold_out"
