"""`data inspect`, `data merge` and `data split`: what they count, what they keep, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from packed_corpora import TEXTS, forge, pack, small_bpe

from longspan.data_pipeline.corpus_tools.merge import merge_corpora
from longspan.data_pipeline.corpus_tools.split import HoldOut, split_corpus
from longspan.data_pipeline.corpus_tools.summary import summarise
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.statistics import xz_bytes
from longspan.data_pipeline.verify import verify_corpus
from longspan.errors import DataError, UsageError
from longspan.trainer.cli import main

MORE = {"letters/z.txt": b"the last letter, " * 20, "essays/q.txt": b"an essay, " * 300}
TOKENIZERS = {"bytes": None, "bpe": small_bpe()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def contents(folder: Path) -> dict[str, list[int]]:
    """Tokens of all documents by id."""
    manifest = Manifest.load(folder)
    reader = DocumentReader(manifest)
    return {entry.id: reader.tokens(entry).tolist() for entry in manifest.documents}


def merge(out: Path, *folders: Path) -> Manifest:
    return merge_corpora(out, list(folders), lambda line: None)


def untouched(folder: Path, *names: str) -> None:
    assert sorted(item.name for item in folder.iterdir()) == sorted(names)


def test_inspect_counts_what_is_there(tmp_path, tokenizer):
    corpus = pack(tmp_path / "corpus", tokenizer=tokenizer, groups={"letters/a.txt": "twins", "letters/b.txt": "twins"})
    summary = summarise(corpus.folder)
    entries = list(corpus.manifest.documents)
    assert summary["documents"] == 9 and summary["groups"] == {"shared": 1, "documents": 2}
    assert summary["bytes"] == sum(map(len, TEXTS.values()))
    assert summary["tokens"] == sum(entry.num_tokens for entry in entries)
    assert summary["shard_bytes"] == sum(file.stat().st_size for file in corpus.folder.glob("*.tar"))
    assert summary["splits"]["held_out"]["documents"] == 1
    for name, source in summary["sources"].items():
        own = [entry for entry in entries if entry.source == name]
        tokens = sum(entry.num_tokens for entry in own)
        assert source["licences"] == {"CC0-1.0": len(own)}
        assert source["bytes_per_token"] == sum(entry.num_bytes for entry in own) / (tokens - 2 * len(own))
        for entry in source["lengths"]:
            inside = [e.num_tokens for e in own if entry["from_tokens"] <= e.num_tokens < 2 * entry["from_tokens"]]
            assert (entry["documents"], entry["tokens"]) == (len(inside), sum(inside))
        assert sum(entry["documents"] for entry in source["lengths"]) == len(own)
        assert source["lengths"][0]["documents"] and source["lengths"][-1]["documents"]


def test_inspect_prints_a_table_json_and_a_picture(tmp_path, capsys):
    corpus = pack(tmp_path / "corpus")
    assert main(["data", "inspect", str(corpus.folder), "--png", str(tmp_path / "lengths.png")]) == 0
    table = capsys.readouterr().out
    assert "letters          train             6             240             252        1.000" in table
    assert "poems            held_out          1              64              66        1.000" in table
    assert "tokens of a document: 3 to 132, median 32" in table
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert main(["data", "inspect", str(corpus.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summarise(corpus.folder)
    assert main(["data", "inspect", str(corpus.folder), "--png", str(tmp_path / "none" / "x.png")]) == 2
    assert "cannot write the picture" in capsys.readouterr().err
    assert main(["data", "inspect", str(tmp_path)]) == 2


def test_inspect_takes_a_corpus_without_documents(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text(Manifest.create(tmp_path, "empty", [], [], []).to_json())
    assert main(["data", "inspect", str(tmp_path), "--png", str(tmp_path / "x.png")]) == 0
    assert "0 documents" in capsys.readouterr().out


def test_a_merge_keeps_every_document_and_links_the_shards(tmp_path, tokenizer):
    first = pack(tmp_path / "first", tokenizer=tokenizer, shard_bytes=600)
    second = pack(tmp_path / "second", MORE, held_out=("essays/q.txt",), tokenizer=tokenizer)
    merged = merge(tmp_path / "merged", first.folder, second.folder)
    assert verify_corpus(tmp_path / "merged").manifest.digest == merged.digest
    assert contents(tmp_path / "merged") == {**contents(first.folder), **contents(second.folder)}
    assert [entry.id for entry in merged.documents] == [*TEXTS, *MORE]
    assert [source.name for source in merged.sources] == ["letters", "poems", "essays"]
    assert merged.vocabulary == first.manifest.vocabulary
    before = [shard.sha256 for corpus in (first, second) for shard in corpus.manifest.shards]
    assert [shard.sha256 for shard in merged.shards] == before
    links = [(tmp_path / "merged" / shard.url).stat().st_nlink for shard in merged.shards]
    assert links == [2] * len(links)
    again = merge(tmp_path / "again" / "merged", first.folder, second.folder)
    assert again.to_json() == merged.to_json()


def test_a_merge_copies_where_links_are_refused(tmp_path, monkeypatch):
    first, second = pack(tmp_path / "first"), pack(tmp_path / "second", MORE)

    def refuse(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    merge(tmp_path / "merged", first.folder, second.folder)
    verify_corpus(tmp_path / "merged")
    assert (tmp_path / "merged" / "train-00000.tar").stat().st_nlink == 1


def test_sources_of_one_name_become_one(tmp_path):
    first, second = pack(tmp_path / "first"), pack(tmp_path / "second", MORE)
    forge(second.folder, lambda raw: raw["sources"][0].update(licence="MIT", origin="there"))
    merged = merge(tmp_path / "merged", first.folder, second.folder)
    letters = merged.sources[0]
    assert (letters.name, letters.kind) == ("letters", "folder")
    assert (letters.licence, letters.origin) == ("CC0-1.0; MIT", "here; there")


def test_a_merge_that_cannot_be_lists_why(tmp_path, capsys):
    first = pack(tmp_path / "first", groups={"letters/a.txt": "a and z"})
    clash = pack(tmp_path / "clash", {"letters/c.txt": b"another letter", "letters/new.txt": b"new"})
    leak = pack(
        tmp_path / "leak",
        {"copies/h": TEXTS["poems/h.txt"], "copies/i": b"i", "copies/z": b"z"},
        held_out=("copies/z",),
        groups={"copies/z": "a and z"},
    )
    tokens = pack(tmp_path / "tokens", MORE, tokenizer=TOKENIZERS["bpe"])
    before = sorted(item.name for item in tmp_path.iterdir())

    def refused(*folders: Path) -> str:
        assert main(["data", "merge", str(tmp_path / "out"), *map(str, folders)]) == 2
        untouched(tmp_path, *before)
        return capsys.readouterr().err

    message = refused(first.folder, clash.folder)
    assert f"document letters/c.txt is in {first.folder} and in {clash.folder}" in message
    assert "letters/new.txt" not in message and "data split" in message
    message = refused(first.folder, leak.folder)
    assert f"document copies/h of {leak.folder} has the same text as poems/h.txt, held out in {first.folder}" in message
    assert f"letters/a.txt of {first.folder} is of the same group as copies/z, held out in {leak.folder}" in message
    assert "Only corpora of one tokenizer can be merged" in refused(first.folder, tokens.folder)
    assert "give two or more" in refused(first.folder)
    assert f"{first.folder}: the same corpus more than once" in refused(first.folder, first.folder)
    assert "the same corpus more than once" in refused(first.folder, clash.folder / ".." / "first")
    assert "no corpus at" in refused(first.folder, tmp_path / "nowhere")


def test_a_merge_leaves_alone_what_is_there_and_damage_where_it_is(tmp_path):
    first, second = pack(tmp_path / "first"), pack(tmp_path / "second", MORE)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists already and stays as it is"):
        merge(tmp_path / "thesis", first.folder, second.folder)
    for out in (second.folder, first.folder / "merged"):
        with pytest.raises(UsageError, match=r"(is|lies inside) the corpus at .*stays as it is"):
            merge(out, first.folder, second.folder)
    (second.folder / "train-00000.tar").unlink()
    with pytest.raises(DataError, match=r"shard train-00000.tar of .*second, with document letters/z.txt, cannot be"):
        merge(tmp_path / "out" / "merged", first.folder, second.folder)
    split_corpus(first.folder, tmp_path / "third", sources=["letters"])  # without held-out documents none is read
    (tmp_path / "third" / "train-00000.tar").unlink()
    essays = pack(tmp_path / "essays", {"essays/q.txt": b"an essay"}, held_out=())
    with pytest.raises(DataError, match=r"shard train-00000.tar of .*third is missing"):
        merge(tmp_path / "out" / "merged", tmp_path / "third", essays.folder)
    untouched(tmp_path, "essays", "first", "second", "thesis", "third")
    untouched(tmp_path / "thesis", "chapter.txt")


def test_a_split_takes_sources_as_they_are(tmp_path, tokenizer):
    corpus = pack(tmp_path / "corpus", tokenizer=tokenizer, shard_bytes=600)
    taken = split_corpus(corpus.folder, tmp_path / "poems", sources=["poems"])
    verify_corpus(tmp_path / "poems")
    before = contents(corpus.folder)
    assert contents(tmp_path / "poems") == {name: ids for name, ids in before.items() if name.startswith("poems/")}
    assert [source.name for source in taken.sources] == ["poems"]
    assert {entry.id: entry.split for entry in taken.documents} == {
        entry.id: entry.split for entry in corpus.manifest.documents if entry.source == "poems"
    }
    assert [entry.sha256 for entry in taken.documents] == [
        corpus.manifest.document(e.id).sha256 for e in taken.documents
    ]


def test_a_split_and_a_merge_give_the_documents_back(tmp_path, tokenizer):
    corpus = pack(tmp_path / "corpus", tokenizer=tokenizer)
    for name in ("letters", "poems"):
        split_corpus(corpus.folder, tmp_path / name, sources=[name])
    merge(tmp_path / "both", tmp_path / "letters", tmp_path / "poems")
    assert contents(tmp_path / "both") == contents(corpus.folder)


def test_a_list_holds_out_these_documents_and_no_others(tmp_path, tokenizer):
    corpus = pack(tmp_path / "corpus", tokenizer=tokenizer)
    (tmp_path / "ids").write_text("# two of them\nletters/c.txt\n\n  poems/i.txt\n")
    assert (
        main(["data", "split", str(corpus.folder), "--out", str(tmp_path / "new"), "--hold-out", str(tmp_path / "ids")])
        == 0
    )
    verify_corpus(tmp_path / "new")
    manifest = Manifest.load(tmp_path / "new")
    assert [entry.id for entry in manifest.split("held_out")] == ["letters/c.txt", "poems/i.txt"]
    assert contents(tmp_path / "new") == contents(corpus.folder)


def test_a_fraction_holds_out_whole_groups_of_every_source(tmp_path):
    rng = np.random.default_rng(0)
    texts = {
        f"{source}/{n}": bytes(rng.integers(97, 120, int(rng.integers(50, 300)))) for source in "ab" for n in range(60)
    }
    groups = {name: f"{name.split('/')[0]}-{int(name.split('/')[1]) // 3}" for name in texts}
    corpus = pack(tmp_path / "corpus", texts, held_out=(), groups=groups)
    first = split_corpus(corpus.folder, tmp_path / "one" / "new", hold_out=HoldOut(fraction=0.1))
    held_out = {entry.id for entry in first.split("held_out")}
    for source in "ab":
        sizes = {name: len(text) for name, text in texts.items() if name.startswith(source)}
        share = sum(size for name, size in sizes.items() if name in held_out) / sum(sizes.values())
        assert 0.05 < share < 0.15
    for name in texts:
        assert all((other in held_out) == (name in held_out) for other in texts if groups[other] == groups[name])
    again = split_corpus(corpus.folder, tmp_path / "two" / "new", hold_out=HoldOut(fraction=0.1))
    assert again.to_json() == first.to_json()


def test_a_merge_finds_near_duplicates_of_held_out_documents(tmp_path, tokenizer, capsys):
    words = [f"word{number % 97}x{number // 7}" for number in range(600)]
    changed = [*words[:300], "another", *words[301:]]
    texts = {"poems/kept.txt": " ".join(words).encode(), "poems/other.txt": b"quite another text, " * 9}
    first = pack(tmp_path / "first", texts, held_out=("poems/kept.txt",), tokenizer=tokenizer)
    second = pack(tmp_path / "second", {"songs/new.txt": " ".join(changed).encode()}, held_out=(), tokenizer=tokenizer)
    assert main(["data", "merge", str(tmp_path / "out"), str(first.folder), str(second.folder)]) == 2
    message = capsys.readouterr().err
    assert f"comparing the 2 documents of {first.folder} with the others" in message
    assert f"document songs/new.txt of {second.folder} is a near-duplicate of poems/kept.txt, held out in" in message
    assert "other.txt" not in message
    untouched(tmp_path, "first", "second")


def test_new_corpora_have_statistics(tmp_path, tokenizer):
    """Those of a build of the same documents: counts, and what byte statistics reach on the held-out text."""
    corpus = pack(tmp_path / "corpus", tokenizer=tokenizer)
    split_corpus(corpus.folder, tmp_path / "split", sources=["poems"])
    merge(tmp_path / "merged", corpus.folder, pack(tmp_path / "more", MORE, held_out=(), tokenizer=tokenizer).folder)
    figures = json.loads((tmp_path / "split" / "statistics.json").read_text())
    text = TEXTS["poems/h.txt"]
    assert figures["totals"]["train"]["bytes"] == len(TEXTS["poems/g.txt"]) + len(TEXTS["poems/i.txt"])
    assert figures["held_out"]["xz_bits_per_byte"] == 8 * xz_bytes(text) / len(text)
    assert figures["held_out"]["unigram_bits_per_byte"] == 0  # one letter
    merged = json.loads((tmp_path / "merged" / "statistics.json").read_text())
    assert merged["held_out"] == figures["held_out"]
    assert merged["counts"]["letters"]["train"]["documents"] == 7


def test_a_split_does_not_go_into_its_own_corpus(tmp_path, capsys):
    corpus = pack(tmp_path / "corpus")
    before = sorted(item.name for item in corpus.folder.iterdir())
    for out, where in ((corpus.folder / "sub", "lies inside"), (corpus.folder, "is")):
        assert main(["data", "split", str(corpus.folder), "--out", str(out), "--sources", "poems"]) == 2
        assert f"{out} {where} the corpus at {corpus.folder}, which stays as it is" in capsys.readouterr().err
    untouched(corpus.folder, *before)


def test_a_split_that_does_not_fit_is_refused(tmp_path, capsys):
    corpus = pack(tmp_path / "corpus", groups={"letters/a.txt": "twins", "letters/b.txt": "twins"})
    ids = tmp_path / "ids"

    def refused(*arguments: str, listed: str = "") -> str:
        ids.write_text(listed)
        assert main(["data", "split", str(corpus.folder), "--out", str(tmp_path / "new"), *arguments]) == 2
        untouched(tmp_path, "corpus", "ids")
        return capsys.readouterr().err

    assert "give --sources, --hold-out or both" in refused()
    assert "no source poem. Did you mean poems?" in refused("--sources", "poem,letters")
    assert "--sources names none; " in refused("--sources", ",")
    for fraction in ("0", "1", "-1", "nan"):
        assert "lies between 0 and 1" in refused("--hold-out", fraction)
    assert "no readable file of ids" in refused("--hold-out", str(tmp_path / "none"))
    assert "there are no ids in the file" in refused("--hold-out", str(ids), listed="# none\n")
    message = refused("--hold-out", str(ids), listed="letters/a.txt\npoems/x.txt\n")
    assert "no document poems/x.txt. Did you mean" in message
    assert "document letters/b.txt is of group twins, of which others are held out" in message
    assert "zero training documents" in refused("--hold-out", str(ids), listed="\n".join(TEXTS))
    assert "every document is longer than twice that share" in refused("--hold-out", "0.0001")


def test_a_damaged_document_ends_a_split_and_leaves_nothing(tmp_path):
    corpus = pack(tmp_path / "corpus")
    entry = corpus.manifest.document("poems/g.txt")
    shard = corpus.folder / entry.shard
    data = bytearray(shard.read_bytes())
    data[entry.offset] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"document poems/g.txt does not match its sha256"):
        split_corpus(corpus.folder, tmp_path / "new", sources=["poems"])
    shard.unlink()
    with pytest.raises(DataError, match=r"with document poems/g.txt, cannot be read"):
        split_corpus(corpus.folder, tmp_path / "new", sources=["poems"])
    untouched(tmp_path, "corpus")
