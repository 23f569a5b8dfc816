"""`data verify` finds damage of every kind and names shard, document and offset."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tarfile

import pytest
from packed_corpora import TEXTS, forge, pack, small_bpe
from planted_readers import TRAIN, Victim

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.verify import verify_corpus
from longspan.errors import DataError, SecurityError, UsageError
from longspan.trainer.cli import main


@pytest.fixture
def corpus(tmp_path):
    """A corpus with several documents in its first shard."""
    return pack(tmp_path / "corpus")


def problems(folder) -> list[str]:
    with pytest.raises(DataError) as caught:
        verify_corpus(folder)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"the corpus at {folder} does not match its manifest:"
    assert lines[-1].startswith(f"Build it again with `longspan data build RECIPE --out {folder}`")
    return [line.strip() for line in lines[1:-1]]


def shard_of(corpus, document_id):
    entry = corpus.manifest.document(document_id)
    return entry, corpus.folder / entry.shard


def test_a_whole_corpus_verifies(corpus):
    result = verify_corpus(corpus.folder)
    assert result.manifest.digest == corpus.manifest.digest
    assert result.num_bytes == sum(file.stat().st_size for file in corpus.folder.glob("*.tar"))


@pytest.mark.parametrize("document_id", [name for name in TEXTS if name != "poems/h.txt"])
def test_a_flipped_bit_names_its_document(corpus, document_id):
    entry, shard = shard_of(corpus, document_id)
    data = bytearray(shard.read_bytes())
    data[entry.offset + entry.size // 2] ^= 1
    shard.write_bytes(data)
    assert problems(corpus.folder) == [
        f"shard train-00000.tar: document {document_id} at byte offset {entry.offset} (to {entry.offset + entry.size}) "
        f"does not have sha256 {entry.sha256[:16]}"
    ]


def test_every_single_flipped_byte_is_found(tmp_path):
    corpus = pack(tmp_path / "corpus", texts={"letters/a.txt": b"one", "poems/h.txt": b"two"})
    shard = corpus.folder / "train-00000.tar"
    whole = shard.read_bytes()
    for place in [*range(0, 2048, 37), *range(2048, len(whole), 499)]:
        data = bytearray(whole)
        data[place] ^= 0x20
        shard.write_bytes(data)
        (problem,) = problems(corpus.folder)
        entry = corpus.manifest.documents[0]
        if entry.offset <= place < entry.offset + entry.size:
            assert "document letters/a.txt at byte offset" in problem
        else:
            assert re.match(
                rf"shard train-00000.tar: byte {place} damaged, in the (header|metadata|padding|end) of ", problem
            )


def test_damage_between_documents_names_the_one_that_follows(corpus):
    entry, shard = shard_of(corpus, "letters/c.txt")
    data = bytearray(shard.read_bytes())
    data[entry.offset - 300] ^= 1  # in the header before the text
    shard.write_bytes(data)
    assert problems(corpus.folder) == [
        f"shard train-00000.tar: byte {entry.offset - 300} damaged, in the header of 00000002-letters-c-txt.txt; "
        f"document letters/c.txt"
    ]


def test_truncation_names_the_first_document_that_is_lost(corpus):
    entry, shard = shard_of(corpus, "poems/g.txt")
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: entry.offset + 10])
    assert problems(corpus.folder) == [
        f"shard train-00000.tar: truncated at byte {entry.offset + 10} of {size}; "
        f"first document that is not whole: poems/g.txt"
    ]


def test_a_cut_at_a_member_boundary_is_found(corpus):
    entry, shard = shard_of(corpus, "poems/g.txt")
    with tarfile.open(shard) as tar:
        boundary = next(member.offset for member in tar if member.offset_data == entry.offset)
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:boundary])  # tar readers see an archive that ends here, without an error
    assert problems(corpus.folder) == [
        f"shard train-00000.tar: truncated at byte {boundary} of {size}; first document that is not whole: poems/g.txt"
    ]


def test_a_cut_after_the_last_document_is_found(corpus):
    entry, shard = shard_of(corpus, "poems/i.txt")
    size = shard.stat().st_size
    end = entry.offset + 512
    shard.write_bytes(shard.read_bytes()[:end])
    assert problems(corpus.folder) == [
        f"shard train-00000.tar: truncated at byte {end} of {size}; every document is whole"
    ]


def test_swapped_members_are_both_named(corpus):
    first, shard = shard_of(corpus, "letters/d.txt")
    second, _ = shard_of(corpus, "letters/e.txt")
    data = bytearray(shard.read_bytes())
    one, two = data[first.offset : first.offset + 512], data[second.offset : second.offset + 512]
    data[first.offset : first.offset + 512], data[second.offset : second.offset + 512] = two, one
    shard.write_bytes(data)
    found = problems(corpus.folder)
    assert [re.search(r"document (\S+)", line)[1] for line in found] == ["letters/d.txt", "letters/e.txt"]


def test_missing_longer_and_empty_shards(corpus):
    train, held_out = corpus.folder / "train-00000.tar", corpus.folder / "held_out-00000.tar"
    whole = train.read_bytes()
    train.write_bytes(whole + b"!")
    held_out.unlink()
    assert problems(corpus.folder) == [
        f"shard train-00000.tar: {len(whole) + 1} bytes, 1 more than the manifest's {len(whole)}",
        "shard held_out-00000.tar: missing, with documents poems/h.txt",
    ]
    train.write_bytes(b"")
    held_out.write_bytes(b"")
    assert len(problems(corpus.folder)) == 2


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(corpus):
    train = corpus.folder / "train-00000.tar"
    train.unlink()
    os.mkfifo(train)
    assert problems(corpus.folder) == [
        "shard train-00000.tar: not readable: not a regular file but a pipe, socket or device"
    ]


def test_the_command_exits_70_on_damage_and_2_without_a_corpus(corpus, tmp_path, capsys):
    entry, shard = shard_of(corpus, "letters/c.txt")
    data = bytearray(shard.read_bytes())
    data[entry.offset] ^= 1
    shard.write_bytes(data)
    assert main(["data", "verify", str(corpus.folder)]) == 70
    assert f"document letters/c.txt at byte offset {entry.offset}" in capsys.readouterr().err
    for missing in (tmp_path / "nothing", tmp_path / "texts", shard):
        assert main(["data", "verify", str(missing)]) == 2
        assert capsys.readouterr().err == (
            f"longspan: no corpus at {missing}: manifest.json is missing. "
            f"Build one with `longspan data build RECIPE --out {missing}`.\n"
        )


@pytest.mark.parametrize("url", ["../train-00000.tar", "pipe:touch owned", "/etc/passwd", "http://host/x.tar", ""])
def test_a_shard_outside_the_folder_is_refused(corpus, url):
    forge(corpus.folder, lambda raw: raw["shards"][0].update(url=url))
    with pytest.raises(SecurityError, match="only plain file names beside it are allowed"):
        Manifest.load(corpus.folder)


class _Bomb:
    def __reduce__(self):
        return open, ("owned", "w")


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth"])
@pytest.mark.parametrize("tokenizer", [None, small_bpe()], ids=["bytes", "bpe"])
def test_a_pickled_member_is_refused_and_never_loaded(tmp_path, monkeypatch, extension, tokenizer):
    monkeypatch.chdir(tmp_path)
    victim = Victim.copy_of(pack(tmp_path / "whole", tokenizer=tokenizer), tmp_path / "corpus")
    name = f"00000000-letters-a-txt.{extension}"
    victim.rewrite(TRAIN, lambda member: True, {name: pickle.dumps(_Bomb())})
    data = victim.read(TRAIN)
    # even when the manifest vouches for the shard
    entry = {"url": TRAIN, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(victim.folder, lambda raw: raw["shards"][0].update(entry))
    (problem,) = problems(victim.folder)
    assert f"unknown member {name} at byte" in problem
    assert "pickled data that Longspan never reads" in problem
    read = DocumentReader(Manifest.load(victim.folder)).tokens(victim.document("letters/c.txt"))
    assert len(read) == victim.document("letters/c.txt").num_tokens
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(_Bomb())).close()  # the trap is armed
    assert (tmp_path / "owned").exists()


def test_an_unknown_document_is_met_with_near_ones(corpus):
    with pytest.raises(UsageError, match=r"no document poem/g.txt. Did you mean poems/g.txt"):
        corpus.manifest.document("poem/g.txt")
