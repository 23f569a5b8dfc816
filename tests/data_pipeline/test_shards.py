"""Shards: the bytes that WebDataset would write, one document at a time, from any number of writers."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from packed_corpora import TEXTS, small_bpe

from longspan.data_pipeline.shards import SHARD_NAME, PackedDocument, ShardWriter, write_shards
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer

LONG = f"poems/{'long' * 30} (größe).v2.txt"


def documents() -> list[PackedDocument]:
    texts = {**TEXTS, LONG: "größer\n".encode() * 300, "poems/empty": b""}
    return [PackedDocument(name, name.split("/")[0], name, "train", "MIT", text) for name, text in texts.items()]


@pytest.mark.parametrize("tokenizer", [None, small_bpe()], ids=["bytes", "bpe"])
def test_a_shard_is_what_webdataset_writes(tmp_path, tokenizer):
    import webdataset

    (shard,), entries = write_shards(tmp_path, documents(), 10**6, lambda line: None, tokenizer)
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="longspan", group="longspan", mode=0o444) as writer:
        for number, document in enumerate(documents()):
            slug = re.sub(r"[^A-Za-z0-9_]+", "-", document.id)[:48]
            metadata = {"id": document.id, "licence": "MIT", "source": document.source}
            sample = {"__key__": f"{number:08d}-{slug}", "json": json.dumps(metadata).encode()}
            if tokenizer is None:
                sample["txt"] = document.text
            else:
                encoded = tokenizer.encode(document.text)
                sample |= {"ids": encoded.ids.tobytes(), "len": encoded.num_bytes.tobytes()}
            writer.write(sample)
    data = (tmp_path / shard.url).read_bytes()
    assert data == buffer.getvalue()
    assert shard.size == len(data)
    for document, entry in zip(documents(), entries, strict=True):
        content = data[entry.offset : entry.offset + entry.size]
        if tokenizer is None:
            assert content == document.text
            continue
        ids = np.frombuffer(content, dtype="<u2")
        lengths = np.frombuffer(data, dtype="<u2", count=entry.num_tokens, offset=entry.lengths_offset)
        assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
        assert tokenizer.decode(ids) == document.text.decode()
        assert int(lengths.sum()) == entry.num_bytes == len(document.text)


def test_webdataset_reads_tokens(tmp_path):
    import webdataset

    tokenizer = small_bpe()
    shards, entries = write_shards(tmp_path, documents(), 900, lambda line: None, tokenizer)
    assert len(shards) > 2
    samples = list(webdataset.WebDataset([str(tmp_path / shard.url) for shard in shards], shardshuffle=False))
    read = {json.loads(sample["json"])["id"]: np.frombuffer(sample["ids"], dtype="<u2") for sample in samples}
    assert {name: len(ids) for name, ids in read.items()} == {entry.id: entry.num_tokens for entry in entries}
    assert {name: tokenizer.decode(ids).encode() for name, ids in read.items()} == {
        document.id: document.text for document in documents()
    }


def test_writers_with_numbers_of_their_own_share_a_folder(tmp_path):
    told: list[str] = []
    first = ShardWriter(tmp_path, "train", 10**6, progress=told.append)
    second = ShardWriter(tmp_path, "train", 10**6, first_shard=100)
    entries = [(first if place % 2 else second).add(document) for place, document in enumerate(documents())]
    urls = [shard.url for shard in (*first.close(), *second.close())]
    assert urls == ["train-00000.tar", "train-00100.tar"]
    assert all(SHARD_NAME.fullmatch(url) for url in urls)
    assert {entry.shard for entry in entries} == set(urls)
    assert len(told) == 1 and told[0].startswith("wrote train-00000.tar: 5 documents")


def test_tokens_made_elsewhere_give_the_same_shard(tmp_path):
    tokenizer = small_bpe()
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    here, entries = write_shards(tmp_path / "here", documents(), 900, lambda line: None, tokenizer)
    writer = ShardWriter(tmp_path / "elsewhere", "train", 900, tokenizer)
    again = [writer.add(document, tokenizer.encode(document.text)) for document in documents()]
    assert (writer.close(), again) == (here, entries)


def test_the_byte_tokenizer_writes_text(tmp_path):
    shards, entries = write_shards(tmp_path, documents(), 10**6, lambda line: None, ByteTokenizer())
    (tmp_path / "again").mkdir()
    assert write_shards(tmp_path / "again", documents(), 10**6, lambda line: None) == (shards, entries)


def test_a_document_of_the_other_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is train, the shards are held_out"):
        ShardWriter(tmp_path, "held_out", 100).add(documents()[0])
