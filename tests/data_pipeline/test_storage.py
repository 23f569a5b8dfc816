"""Stores, transfers and the cache: every fault of a server, a full disk, and several users of one cache."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import socket
import sys
import threading
import time

import fsspec
import numpy as np
import pytest
from reader_corpora import RandomIds, random_document, write_corpus
from shard_server import FAULTS, ShardServer

from longspan.data_pipeline import corpus as corpora
from longspan.data_pipeline.corpus import StorageSettings, open_corpus
from longspan.data_pipeline.manifest import ShardEntry
from longspan.data_pipeline.storage.cache import CacheFullError, ShardCache
from longspan.data_pipeline.storage.http import HttpStore
from longspan.data_pipeline.storage.retry import Counters, RetryPolicy
from longspan.data_pipeline.storage.store import StorageError
from longspan.data_pipeline.storage.transfer import Transfers
from longspan.errors import DataError, SecurityError, UsageError

QUICK = RetryPolicy(attempts=4, first_delay_seconds=0.01, max_delay_seconds=0.05, timeout_seconds=0.3)
LENGTHS = [5, 400, 300, 17, 264, 650, 1000, 33, 1200, 9, 700]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus that no test changes."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), LENGTHS, shard_bytes=8000)


def settings(tmp_path, **changes):
    return StorageSettings(cache_dir=tmp_path / "cache", policy=QUICK, start_policy=QUICK, **changes)


def same_documents(reader):
    for number, entry in enumerate(reader.manifest.documents):
        expected = random_document(RandomIds(), number, entry.num_tokens)
        assert np.array_equal(reader.tokens(entry), expected.ids)
        assert np.array_equal(reader.target_bytes_range(entry, 0, entry.num_tokens), expected.num_bytes)


@pytest.mark.parametrize("cache_gib", [1.0, 0])
def test_a_corpus_over_http_is_the_one_on_disk(corpus, tmp_path, cache_gib):
    with ShardServer(corpus.folder) as server:
        reader = open_corpus(server.url, settings(tmp_path, cache_gib=cache_gib))
        assert reader.manifest.digest == corpus.digest
        same_documents(reader)
        assert reader.counters["downloads"] == (len(corpus.shards) if cache_gib else 0)
        assert reader.counters["ranged_reads"] == (0 if cache_gib else 2 * len(LENGTHS))
        before = server.counts["requests"]
        same_documents(reader)
        again = open_corpus(server.url, settings(tmp_path, cache_gib=cache_gib))
        same_documents(again)
        if cache_gib:  # what was fetched once is there: only manifest, tokenizer and the look at the first shard
            assert server.counts["requests"] - before == 4


def test_other_stores_go_through_fsspec(corpus, tmp_path):
    files = fsspec.filesystem("memory")
    files.put(str(corpus.folder), "/bucket/corpus", recursive=True)
    reader = open_corpus("memory://bucket/corpus", settings(tmp_path))
    same_documents(reader)
    assert reader.counters["downloads"] == len(corpus.shards)
    files.rm("/bucket/corpus/" + corpus.shards[0].url)
    with pytest.raises(UsageError, match=corpus.shards[0].url):
        open_corpus("memory://bucket/corpus", settings(tmp_path))


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_retried_and_counted(corpus, tmp_path, fault):
    with ShardServer(corpus.folder) as server:
        reader = open_corpus(server.url, settings(tmp_path))
        server.script([fault, None, fault, fault])
        same_documents(reader)
        assert server.counts[fault] == 3
        if fault == "wrong_bytes":
            assert reader.counters["hash_mismatches"] == 3
        else:
            assert reader.counters["retries"] == 3
        assert reader.counters["downloads"] + (fault == "wrong_bytes") >= len(corpus.shards)


@pytest.mark.parametrize("fault", ["status500", "truncate", "stall", "wrong_bytes"])
@pytest.mark.parametrize("file", ["manifest.json", "description.json", "ids.txt"])
def test_a_faulty_start_is_retried(corpus, tmp_path, fault, file):
    with ShardServer(corpus.folder) as server:
        server.script([fault, None], suffix=file)
        same_documents(open_corpus(server.url, settings(tmp_path)))
        assert server.counts[fault] == 1


def test_a_cut_body_is_continued_where_it_ends(tmp_path):
    (tmp_path / "big.tar").write_bytes(os.urandom(3_000_000))
    with ShardServer(tmp_path) as server:
        counters = Counters()
        transfers = Transfers(HttpStore(server.url, QUICK), QUICK, counters)
        server.script(["truncate", "truncate", "stall"])
        assert transfers.read("big.tar") == (tmp_path / "big.tar").read_bytes()
        assert counters["resumed"] == 3 and counters["downloaded_bytes"] == 3_000_000
        assert server.counts["if_range"] == 3
        server.honours_ranges = False
        server.script(["truncate"])
        assert transfers.read("big.tar") == (tmp_path / "big.tar").read_bytes()
        assert counters["restarted"] == 1
        assert transfers.read("big.tar", 1000, 2000) == (tmp_path / "big.tar").read_bytes()[1000:2000]


def test_a_file_that_changes_in_the_middle_is_begun_anew(tmp_path):
    file = tmp_path / "big.tar"
    file.write_bytes(b"a" * 2_000_000)
    with ShardServer(tmp_path) as server:
        transfers = Transfers(HttpStore(server.url, QUICK), QUICK, Counters())

        def change(path):
            if server.counts["truncate"]:
                file.write_bytes(b"b" * 2_000_000)
                return None
            return "truncate"

        server.choose = change
        assert transfers.read("big.tar") == b"b" * 2_000_000
        assert transfers.counters["restarted"] == 1


def test_a_trickle_is_a_stall(tmp_path):
    (tmp_path / "big.tar").write_bytes(bytes(100_000))
    with ShardServer(tmp_path) as server:
        server.chunk_bytes, server.chunk_delay_seconds = 1, 0.1
        transfers = Transfers(HttpStore(server.url, QUICK), RetryPolicy(attempts=1), Counters())
        with pytest.raises(StorageError, match="stalled"):
            transfers.read("big.tar")


def test_an_unreachable_address_ends_the_start_quickly(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/corpus"
        started = time.monotonic()
        with pytest.raises(UsageError, match=r"data\.shards = .*127\.0\.0\.1.*4 attempts"):
            open_corpus(url, settings(tmp_path))
        unused.listen()  # takes connections and never answers
        with pytest.raises(UsageError, match=r"4 attempts.*(?i:timed out)"):
            open_corpus(url, settings(tmp_path))
        assert time.monotonic() - started < 10


def test_a_store_without_the_corpus_is_a_usage_error_at_once(corpus, tmp_path):
    with ShardServer(tmp_path) as server:
        with pytest.raises(UsageError, match="status 404"):
            open_corpus(server.url, settings(tmp_path))
        assert server.counts["requests"] == 1
    with pytest.raises(UsageError, match="Allowed are folders, http"):
        open_corpus("gopher://x/y", settings(tmp_path))


def test_a_store_that_goes_away_ends_the_run_and_quarantines_nothing(corpus, tmp_path):
    with ShardServer(corpus.folder) as server:
        reader = open_corpus(server.url, settings(tmp_path))
        server.choose = lambda path: "status500"
        with pytest.raises(StorageError, match=r"4 attempts.*status 500.*what was done before is kept"):
            reader.tokens(reader.manifest.documents[0])
        server.choose = lambda path: None
        same_documents(reader)


def test_a_shard_that_is_damaged_in_the_store_costs_only_its_bad_document(corpus, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(corpus.folder, folder)
    victim = corpus.documents[6]
    data = bytearray((folder / victim.shard).read_bytes())
    data[victim.lengths_offset + 5] ^= 1
    (folder / victim.shard).write_bytes(data)
    lost = corpus.documents[9]
    os.truncate(folder / lost.shard, lost.offset + 3)
    with ShardServer(folder) as server:
        reader = open_corpus(server.url, settings(tmp_path))
        for number, entry in enumerate(corpus.documents):
            if entry.shard == lost.shard and entry.offset >= lost.offset:
                with pytest.raises(DataError) as caught:
                    reader.tokens(entry)
                assert not isinstance(caught.value, StorageError)
            elif entry.id == victim.id:
                with pytest.raises(DataError, match="does not match its sha256"):
                    reader.tokens(entry)
            else:
                assert np.array_equal(reader.tokens(entry), random_document(RandomIds(), number, entry.num_tokens).ids)
        assert reader.counters["hash_mismatches"] >= 2


def test_a_damaged_cache_is_mended(corpus, tmp_path):
    with ShardServer(corpus.folder) as server:
        same_documents(open_corpus(server.url, settings(tmp_path)))
        for file in (tmp_path / "cache" / "shards").glob("*.tar"):
            data = bytearray(file.read_bytes())
            for at in range(0, len(data), 500):
                data[at] ^= 1
            file.write_bytes(data)
        reader = open_corpus(server.url, settings(tmp_path))
        same_documents(reader)
        assert reader.counters["refetched_documents"] == reader.counters["downloads"] == len(corpus.shards)


def shard_of(content, name="a.tar"):
    return ShardEntry(url=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def filler(content):
    def fetch(sink):
        sink.write(content[sink.position :])

    return fetch


def test_the_least_recently_used_shard_goes_first_and_a_held_one_stays(tmp_path):
    counters = Counters()
    cache = ShardCache(tmp_path, 3000, counters)
    contents = [bytes([number]) * 1000 for number in range(5)]
    shards = [shard_of(content) for content in contents]
    held = cache.open(shards[0], filler(contents[0]))
    for number in (1, 2):
        cache.open(shards[number], filler(contents[number])).close()
        time.sleep(0.02)
    cache.open(shards[1], filler(b"")).close()  # used again
    cache.open(shards[3], filler(contents[3])).close()
    here = {file.name: file.stat().st_size for file in tmp_path.iterdir() if file.suffix in (".tar", ".part")}
    assert here == {f"{shards[number].sha256}.tar": 1000 for number in (0, 1, 3)}
    assert counters["evicted"] == 1
    assert held.read(0, 1000) == contents[0]
    others = [cache.open(shards[number], filler(contents[number])) for number in (1, 3)]
    with pytest.raises(CacheFullError, match=r"1,000 bytes.*are being read.*data\.cache_gib"):
        cache.open(shards[4], filler(contents[4]))
    others[0].close()
    cache.open(shards[4], filler(contents[4])).close()
    assert not (tmp_path / f"{shards[1].sha256}.tar").exists()
    with pytest.raises(CacheFullError, match="the limit is 3,000 bytes"):
        cache.open(shard_of(bytes(4000)), filler(bytes(4000)))


def test_a_part_left_behind_is_continued(tmp_path):
    content = os.urandom(5000)
    shard = shard_of(content)
    cache = ShardCache(tmp_path, 10_000, Counters())
    (tmp_path / f"{shard.sha256}.5000.part").write_bytes(content[:3000])
    asked = []

    def fetch(sink):
        asked.append(sink.position)
        sink.write(content[sink.position :])

    assert cache.open(shard, fetch).read(0, 5000) == content
    assert asked == [3000]
    assert [file.name for file in tmp_path.glob("*.part")] == []


def test_a_full_disk_is_named_and_reading_goes_on_without_a_cache(corpus, tmp_path, monkeypatch, caplog):
    with ShardServer(corpus.folder) as server:
        reader = open_corpus(server.url, settings(tmp_path))
        write = os.pwrite

        def refuse(descriptor, data, offset):
            if "/cache/shards/" in os.readlink(f"/proc/self/fd/{descriptor}") and offset + len(data) > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", refuse)
        same_documents(reader)
        assert reader.counters["uncached_shards"] == len(corpus.shards)
        assert reader.counters["ranged_reads"] == 2 * len(LENGTHS) and reader.counters["downloads"] == 0
        assert not list((tmp_path / "cache" / "shards").glob("*.part"))
    message = next(text for text in caplog.messages if "no room" in text)
    assert str(tmp_path / "cache" / "shards") in message and "No space left on device" in message
    assert f"{corpus.shards[0].size:,} bytes" in message and "data.cache_dir" in message


def test_a_cache_folder_that_cannot_be_used_is_a_usage_error(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with ShardServer(corpus.folder) as server, pytest.raises(UsageError, match=r"data\.cache_dir = .*cache"):
        open_corpus(server.url, settings(tmp_path))


def fetch_all(url, cache_dir, barrier, results):
    reader = open_corpus(url, StorageSettings(cache_dir=cache_dir, policy=QUICK, start_policy=QUICK))
    barrier.wait()
    same_documents(reader)
    results.put(reader.counters["downloads"])


def test_processes_share_one_cache_and_fetch_each_shard_once(corpus, tmp_path):
    context = multiprocessing.get_context("forkserver")  # a fork of this process would copy locks of its threads
    barrier, results = context.Barrier(3), context.Queue()
    with ShardServer(corpus.folder) as server:
        server.chunk_bytes, server.chunk_delay_seconds = 2000, 0.005
        processes = [
            context.Process(target=fetch_all, args=(server.url, tmp_path / "cache", barrier, results)) for _ in range(3)
        ]
        for process in processes:
            process.start()
        downloads = sum(results.get(timeout=60) for _ in processes)
        for process in processes:
            process.join(10)
            assert process.exitcode == 0
    assert downloads == len(corpus.shards)


def test_threads_wait_for_one_download(corpus, tmp_path):
    with ShardServer(corpus.folder) as server:
        reader = open_corpus(server.url, settings(tmp_path))
        server.chunk_bytes, server.chunk_delay_seconds = 2000, 0.005
        errors = []

        def read():
            try:
                same_documents(reader)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and reader.counters["downloads"] == len(corpus.shards)


def test_commands_are_refused_unless_allowed_by_name(corpus, tmp_path):
    address = f"pipe:cat {corpus.folder}/{{}}"
    with pytest.raises(SecurityError, match=r"'cat', which is not allowed \(allowed: none\).*data\.allowed_pipes"):
        open_corpus(address, settings(tmp_path))
    with pytest.raises(SecurityError, match="allowed: aws"):
        open_corpus(address, settings(tmp_path, allowed_pipes=["aws"]))
    with pytest.raises(UsageError, match=r"put .* where the file"):
        open_corpus("pipe:cat x", settings(tmp_path, allowed_pipes=["cat"]))
    same_documents(open_corpus(address, settings(tmp_path, allowed_pipes=["cat"])))
    marker = tmp_path / "marker"
    with pytest.raises(UsageError):  # no shell: the rest are arguments of cat
        open_corpus(f"pipe:cat {{}}; touch {marker}", settings(tmp_path, allowed_pipes=["cat"]))
    assert not marker.exists()
    with pytest.raises(UsageError, match="no output in"):
        open_corpus(
            f"pipe:{sys.executable} -c 'import time; time.sleep(9)' {{}}",
            settings(tmp_path, allowed_pipes=[sys.executable]),
        )


def test_the_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpora.default_cache_dir() == tmp_path / "longspan"
