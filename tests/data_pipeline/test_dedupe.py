"""Near-duplicates: what a signature sees, which documents it joins, and that groups come before splits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpora import recipe, write_folder

from longspan.data_pipeline import dedupe
from longspan.data_pipeline.build import BuildResult, build_corpus
from longspan.data_pipeline.corpus_config import CorpusConfig, DedupeConfig
from longspan.data_pipeline.dedupe import near_duplicates, shingle_hashes, signature
from longspan.errors import UsageError

CONFIG = DedupeConfig()


def words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(10**6)}" for _ in range(count)]


def text(*parts: list[str]) -> bytes:
    return " ".join(word for part in parts for word in part).encode()


def plain_shingles(data: bytes, count: int) -> set[tuple[bytes, ...]]:
    kept = bytes(byte if byte >= 0x80 or chr(byte).isalnum() or byte == ord("_") else 32 for byte in data)
    split = kept.lower().split() if data.isascii() else kept.split()
    return {tuple(split[start : start + count]) for start in range(len(split) - count + 1)}


@given(st.text("ab_ .,\n0", max_size=60), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_there_are_as_many_hashes_as_different_runs_of_words(body: str, count: int) -> None:
    data = body.encode()
    assert len(shingle_hashes(data, count)) == max(1, len(plain_shingles(data, count)))


def test_case_punctuation_and_line_ends_do_not_count_but_order_does() -> None:
    same = [b"The King said, unto them: go forth now!", b"the king   said\nUNTO them (go) forth now"]
    assert np.array_equal(shingle_hashes(same[0], 5), shingle_hashes(same[1], 5))
    assert not np.intersect1d(
        shingle_hashes(b"one two three four five", 5), shingle_hashes(b"five four three two one", 5)
    ).size


def test_long_texts_are_cut_between_words_without_losing_a_shingle(monkeypatch: pytest.MonkeyPatch) -> None:
    data = text(words(1, 3000))
    whole = shingle_hashes(data, 5)
    for size in (7, 64, 1000):
        monkeypatch.setattr(dedupe, "_CHUNK_BYTES", size)
        assert np.array_equal(shingle_hashes(data, 5), whole)


@pytest.mark.parametrize("data", [b"", b"...", b"one", b"two words"])
def test_a_text_of_few_words_is_one_shingle(data: bytes) -> None:
    assert len(shingle_hashes(data, 5)) == 1
    assert signature(data, CONFIG).shape == (CONFIG.num_perm,)


@pytest.mark.parametrize("shared", [0.2, 0.5, 0.8])
def test_signatures_estimate_the_jaccard_similarity(shared: float) -> None:
    common, num = words(2, int(shared * 20_000)), int((1 - shared) * 20_000)
    first, second = text(common, words(3, num)), text(common, words(4, num))
    one, two = plain_shingles(first, 5), plain_shingles(second, 5)
    exact = len(one & two) / len(one | two)
    config = DedupeConfig(num_perm=512)
    estimate = (signature(first, config) == signature(second, config)).mean()
    assert estimate == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 512) ** 0.5)


def test_signatures_stay_what_they_are_from_release_to_release() -> None:
    found = signature(b"In the beginning God created the heaven and the earth.", DedupeConfig(num_perm=16))
    assert found[:4].tolist() == GOLDEN


GOLDEN = [619680476, 740237660, 14819108, 180281161]


def test_chains_of_similar_documents_are_one_group() -> None:
    parts = [words(seed, 400) for seed in range(10, 16)]
    texts = [
        text(*parts[0:4]),
        text(words(20, 1600)),
        text(*parts[0:4], parts[4][:80]),
        text(*parts[0:4], parts[4]),
        text(words(21, 1600)),
        text(*parts[0:4], parts[4], parts[5]),
        text(words(20, 1600)),
    ]
    signatures = np.stack([signature(data, CONFIG) for data in texts])
    assert near_duplicates(signatures, CONFIG) == [[0, 2, 3, 5], [1, 6]]
    assert near_duplicates(signatures[:1], CONFIG) == []


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8])
def test_planted_near_duplicates_are_found_and_others_are_not(threshold: float) -> None:
    config = DedupeConfig(threshold=threshold)
    draw = random.Random(7)
    texts, pairs = [], []
    for number in range(60):
        base = words(1000 + number, 800)
        changed = list(base)
        for place in draw.sample(range(800), 4):  # each change breaks five shingles of 800: similarity about 0.95
            changed[place] = "changed"
        pairs.append([len(texts), len(texts) + 1])
        texts += [text(base), text(changed)]
        texts.append(text(words(5000 + number, 800), base[:100]))  # a long quotation: similarity about 0.06
    signatures = np.stack([signature(data, config) for data in texts])
    assert near_duplicates(signatures, config) == pairs


def test_many_documents_with_the_same_band_do_not_cost_their_square() -> None:
    rows = np.random.default_rng(0).integers(0, 2**32, size=(8_000, 128), dtype=np.uint32)
    rows[:, :9] = 7  # boilerplate that all of them share
    rows[7_999] = rows[7_990]
    assert near_duplicates(rows, CONFIG) == [[7_990, 7_999]]


BASE = words(42, 300)
NEAR = [*BASE[:150], "changed", *BASE[151:]]
TEXTS = {
    "letters/original.txt": text(BASE),
    "letters/other.txt": text(words(43, 300)),
    "poems/copy.txt": text(BASE),
    "poems/near.txt": text(NEAR),
    "poems/single.txt": text(words(44, 300)),
}


def built(tmp_path: Path, **changes: Any) -> BuildResult:
    folder = write_folder(tmp_path / "texts", TEXTS)
    settings = {"held_out": [], "shard_bytes": 10_000, **changes}
    return build_corpus(CorpusConfig.model_validate(recipe(folder, **settings)), tmp_path / "corpus", lambda line: None)


def splits(result: BuildResult) -> dict[str, str]:
    return {entry.id.split("/")[1].removesuffix(".txt"): entry.split for entry in result.manifest.documents}


def groups(result: BuildResult) -> dict[str, str]:
    return {entry.id.split("/")[1].removesuffix(".txt"): entry.group for entry in result.manifest.documents}


def test_near_duplicates_and_copies_share_a_group(tmp_path: Path) -> None:
    result = built(tmp_path)
    assert groups(result) == {
        "original": "letters/original.txt",
        "other": "letters/other.txt",
        "copy": "letters/original.txt",
        "near": "letters/original.txt",
        "single": "poems/single.txt",
    }
    figures = result.statistics["duplicates"]
    assert (figures["groups"], figures["documents_in_groups"], figures["copies"]) == (1, 3, 1)
    assert figures["largest_groups"] == [["letters/original.txt", "poems/copy.txt", "poems/near.txt"]]
    assert figures["rule"] == {"enabled": True, "shingle_words": 5, "threshold": 0.7, "num_perm": 128}


def test_what_is_near_a_held_out_document_is_held_out_too_and_said(tmp_path: Path) -> None:
    result = built(tmp_path, held_out=["poems/near.txt"])
    assert {name for name, split in splits(result).items() if split == "held_out"} == {"original", "copy", "near"}
    assert result.notes == [
        "letters/original.txt, near poems/near.txt: held out too",
        "poems/copy.txt, near poems/near.txt: held out too",
    ]
    assert result.statistics["duplicates"]["num_near_held_out"] == 2


def test_or_left_out_or_trained_on_as_the_recipe_says(tmp_path: Path) -> None:
    result = built(tmp_path, held_out=["poems/near.txt"], split={"duplicates": "leave_out"})
    assert splits(result) == {"near": "held_out", "other": "train", "single": "train"}
    reason = {"near-duplicates of held-out documents": {"count": 1, "example": "letters/original.txt"}}
    assert result.statistics["left_out"]["letters"] == reason
    result = built(tmp_path, held_out=["poems/near.txt"], split={"duplicates": "train"})
    assert [name for name, split in splits(result).items() if split == "held_out"] == ["near"]
    assert "letters/original.txt, near poems/near.txt: trained on, as the recipe says" in result.notes


def test_copies_are_left_out_if_asked_and_the_held_out_one_stays(tmp_path: Path) -> None:
    result = built(tmp_path, dedupe={"exact": "leave_out"})
    assert set(splits(result)) == {"original", "other", "near", "single"}
    assert result.statistics["left_out"] == {
        "poems": {"copies of other documents": {"count": 1, "example": "poems/copy.txt"}}
    }
    result = built(tmp_path, dedupe={"exact": "leave_out"}, held_out=["poems/copy.txt"])
    assert {name for name, split in splits(result).items() if split == "held_out"} == {"copy", "near"}


def test_without_a_look_for_near_duplicates_only_copies_are_grouped(tmp_path: Path) -> None:
    result = built(tmp_path, dedupe={"enabled": False})
    assert groups(result)["copy"] == "letters/original.txt"
    assert groups(result)["near"] == "poems/near.txt"
    assert result.statistics["duplicates"]["rule"] is None


def test_the_groups_of_the_recipe_join_those_that_were_found(tmp_path: Path) -> None:
    result = built(tmp_path, groups={"mine": ["letters/other.txt", "poems/near.txt"]})
    assert {name for name, group in groups(result).items() if group == "mine"} == {"original", "other", "copy", "near"}


def test_a_fraction_holds_out_whole_groups_whatever_else_comes_or_goes(tmp_path: Path) -> None:
    def drawn(texts: dict[str, bytes]) -> dict[str, str]:
        folder = write_folder(tmp_path / f"texts{len(texts)}", texts)
        config = CorpusConfig.model_validate(
            recipe(folder, held_out=[], shard_bytes=10**6, split={"held_out_fraction": 0.3}, dedupe={"enabled": False})
        )
        result = build_corpus(config, tmp_path / "corpus", lambda line: None)
        return {entry.id: entry.split for entry in result.manifest.documents}

    texts = {f"letters/{number}.txt": text(words(number, 20)) for number in range(200)}
    texts |= {"poems/a.txt": texts["letters/7.txt"], "poems/b.txt": b"alone"}
    found = drawn(texts)
    assert 40 <= sum(split == "held_out" for split in found.values()) <= 80
    assert found["poems/a.txt"] == found["letters/7.txt"]
    fewer = {name: data for name, data in texts.items() if name != "letters/3.txt"}
    again = drawn(fewer)
    assert again == {name: found[name] for name in fewer}


def test_a_chain_that_takes_every_document_is_refused(tmp_path: Path) -> None:
    members = [name for name in TEXTS if name != "letters/original.txt"]
    with pytest.raises(UsageError, match="zero training documents: all 5 documents are held out"):
        built(tmp_path, held_out=members)
    with pytest.raises(UsageError, match="zero training documents: 4 of 5 documents are held out and 1 left out"):
        built(tmp_path, held_out=members, split={"duplicates": "leave_out"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["texts"]
