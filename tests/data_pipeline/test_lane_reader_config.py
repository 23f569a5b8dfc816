"""From `data` of a recipe to a reader: folder or URL, ranged or streaming."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from reader_corpora import write_corpus
from shard_server import ShardServer

from longspan.data_pipeline.config import DataConfig
from longspan.data_pipeline.streaming import StreamedDocuments
from longspan.data_pipeline.streaming_plan import StreamPlan
from longspan.errors import SecurityError, UsageError
from longspan.trainer.data_source import open_data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus that no test changes."""
    return write_corpus(tmp_path_factory.mktemp("config"), [200, 90, 300, 50, 400, 70], shard_bytes=2000)


def open_with(shards, **data):
    config = DataConfig(shards=str(shards), segment_tokens=32, lanes=2, **data)
    model = SimpleNamespace(vocab_size=50_048, quantum=8)
    return open_data(SimpleNamespace(data=config, model=model, seed=3))


@pytest.mark.parametrize("reader", ["ranged", "streaming"])
def test_a_url_gives_the_batches_of_the_folder(corpus, tmp_path, reader):
    with ShardServer(corpus.folder) as server:
        local = open_with(corpus.folder, reader=reader)
        remote = open_with(server.url, reader=reader, cache_dir=str(tmp_path))
        assert isinstance(remote.plan, StreamPlan) == (reader == "streaming")
        one, two = (source.lane_reader(0, 2) for source in (local, remote))
        for step in range(40):
            first, second = one.batch(step), two.batch(step)
            assert torch.equal(first.tokens, second.tokens) and torch.equal(first.labels, second.labels)
        assert remote.documents.counters["downloads"] == len(corpus.shards)
        assert isinstance(two._documents, StreamedDocuments) == (reader == "streaming")


def test_what_cannot_be_is_refused_at_the_start(corpus, tmp_path):
    with pytest.raises(UsageError, match=r"source_weights cannot be had with data\.reader = streaming"):
        open_with(corpus.folder, reader="streaming", source_weights={"source0": 0.5, "source1": 0.5})
    with pytest.raises(UsageError, match=r"there is no corpus \(no manifest\.json\)"):
        open_with(tmp_path)
    with pytest.raises(SecurityError, match="allowed: none"):
        open_with(f"pipe:cat {corpus.folder}/{{}}", cache_dir=str(tmp_path))
    open_with(f"pipe:cat {corpus.folder}/{{}}", cache_dir=str(tmp_path), allowed_pipes=["cat"])
    with pytest.raises(ValidationError, match="ranged"):
        open_with(corpus.folder, reader="random")
