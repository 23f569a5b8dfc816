"""Planted corruptions, each of which `data verify` must find and name: shard, document and byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packed_corpora import TEXTS, Packed, forge, pack, small_bpe
from planted_readers import HELD, OTHER, TRAIN, Victim

from longspan.data_pipeline.verify import verify_corpus
from longspan.errors import LongspanError

CASES: dict[str, tuple[str, Callable[[Victim], list[str]]]] = {}


def case(name: str, corpus: str = "bytes"):
    """Register a function that damages a corpus and returns what the message must name."""

    def register(plant: Callable[[Victim], list[str]]) -> Callable[[Victim], list[str]]:
        assert name not in CASES
        CASES[name] = (corpus, plant)
        return plant

    return register


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Packed]:
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "bytes": pack(folder / "bytes", shard_bytes=600),
        "tokens": pack(folder / "tokens", shard_bytes=1600, tokenizer=small_bpe()),
    }


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 70


@pytest.mark.parametrize("name", CASES)
def test_a_planted_corruption_is_named(name: str, corpora: dict[str, Packed], tmp_path: Path) -> None:
    corpus, plant = CASES[name]
    victim = Victim.copy_of(corpora[corpus], tmp_path / "corpus")
    before = victim.fingerprint()
    expected = plant(victim)
    assert victim.fingerprint() != before, "nothing was damaged"
    with pytest.raises(LongspanError) as caught:
        verify_corpus(victim.folder)
    message = str(caught.value)
    assert expected
    for text in expected:
        assert text in message
    assert caught.value.exit_code in (2, 70)


def test_the_corpora_are_whole_before(corpora: dict[str, Packed]) -> None:
    for corpus in corpora.values():
        assert verify_corpus(corpus.folder).manifest.digest == corpus.manifest.digest
        places = {entry.shard for entry in corpus.manifest.documents}
        assert {TRAIN, OTHER, HELD} <= places
        assert {entry.id for entry in corpus.manifest.documents if entry.shard == HELD} == {"poems/h.txt"}


# Flipped bits: (member, part, place in it); "document" is letters/c.txt.
_HEADER_PLACES = {"name": 3, "mode": 104, "size": 130, "time": 145, "checksum": 150, "type": 156, "link": 200}
_HEADER_PLACES |= {"magic": 258, "owner": 267, "device": 331, "prefix": 350, "rest": 511}


def _flip_header(kind: str, place: int, document: str = "letters/c.txt") -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        info = victim.member(document, kind)
        shard = victim.document(document).shard
        victim.flip(shard, info.offset + place)
        return [f"shard {shard}: byte {info.offset + place} damaged, in the header of {info.name}; document {document}"]

    return plant


def _flip_frame(kind: str, where: str, from_end: bool = False) -> Callable[[Victim], list[str]]:
    """A bit of metadata (from its beginning or its end), or of the padding behind a member."""

    def plant(victim: Victim) -> list[str]:
        info = victim.member("letters/c.txt", kind)
        place = info.offset_data + (info.size - 3 if from_end else 10)
        if where == "padding":
            place = info.offset_data + info.size + 1
        victim.flip(TRAIN, place)
        return [f"shard {TRAIN}: byte {place} damaged, in the {where} of {info.name}; document letters/c.txt"]

    return plant


def _flip_content(document: str, kind: str, place: int) -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        info, entry = victim.member(document, kind), victim.document(document)
        victim.flip(entry.shard, info.offset_data + (place if place >= 0 else info.size + place), 0x20)
        ends = f"{entry.offset} (to {entry.offset + entry.size})"
        return [f"shard {entry.shard}: document {document} at byte offset {ends}", "does not have sha256"]

    return plant


def _flip_end(from_end: bool) -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        place = len(victim.read(TRAIN)) - 1 if from_end else victim.sample("letters/f.txt")[1]
        victim.flip(TRAIN, place)
        return [f"shard {TRAIN}: byte {place} damaged, in the end of the archive"]

    return plant


for _name, _place in _HEADER_PLACES.items():
    case(f"flip header {_name}")(_flip_header("txt" if _place % 2 else "json", _place))
case("flip first byte of the shard")(_flip_header("json", 0, "letters/a.txt"))
case("flip metadata")(_flip_frame("json", "metadata"))
case("flip metadata's end")(_flip_frame("json", "metadata", from_end=True))
case("flip padding of metadata")(_flip_frame("json", "padding"))
case("flip padding of text")(_flip_frame("txt", "padding"))
case("flip text of one byte")(_flip_content("letters/a.txt", "txt", 0))
case("flip text's first byte")(_flip_content("letters/c.txt", "txt", 0))
case("flip text's middle")(_flip_content("poems/g.txt", "txt", 200))
case("flip text's last byte")(_flip_content("letters/f.txt", "txt", -1))
case("flip held-out text")(_flip_content("poems/h.txt", "txt", 5))
case("flip end of the archive")(_flip_end(False))
case("flip last byte")(_flip_end(True))
for _kind in ("ids", "json", "len"):
    case(f"flip header of {_kind}", "tokens")(_flip_header(_kind, 20))
for _kind, _place in [("ids", 0), ("ids", 6), ("ids", -2), ("len", 0), ("len", 7), ("len", -1)]:
    case(f"flip {_kind} at {_place}", "tokens")(_flip_content("letters/c.txt", _kind, _place))
case("flip padding of ids", "tokens")(_flip_frame("ids", "padding"))
case("flip padding of len", "tokens")(_flip_frame("len", "padding"))


# Archives cut off, at the edges of members (where tar readers see a sound archive that ends) and inside them.
def _cut(kind: str, edge: str, document: str) -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        info = victim.member(document, kind)
        size = len(victim.read(TRAIN))
        place = {"before": info.offset, "header": info.offset + 100, "inside": info.offset_data + 1}[edge]
        victim.cut(TRAIN, place)
        return [f"shard {TRAIN}: truncated at byte {place} of {size}; first document that is not whole: {document}"]

    return plant


def _cut_end(from_end: int) -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        size = len(victim.read(TRAIN))
        place = size - 1 if from_end else victim.sample("letters/f.txt")[1]
        victim.cut(TRAIN, place)
        return [f"shard {TRAIN}: truncated at byte {place} of {size}; every document is whole"]

    return plant


case("cut to nothing")(_cut("json", "before", "letters/a.txt"))
for _kind, _edge in [("json", "before"), ("txt", "before"), ("txt", "header"), ("txt", "inside")]:
    case(f"cut {_edge} {_kind}")(_cut(_kind, _edge, "letters/c.txt"))
case("cut before the last member")(_cut("txt", "before", "letters/f.txt"))
case("cut behind the last member")(_cut_end(0))
case("cut the last byte")(_cut_end(1))
for _kind, _edge in [("ids", "inside"), ("json", "before"), ("len", "before"), ("len", "inside")]:
    case(f"cut tokens {_edge} {_kind}", "tokens")(_cut(_kind, _edge, "letters/c.txt"))


# Members exchanged, doubled, missing, strange.
@case("swap the texts of two documents")
def _swap_texts(victim: Victim) -> list[str]:
    first, second = victim.document("letters/d.txt"), victim.document("letters/e.txt")
    ends = [(entry.offset, entry.offset + 512) for entry in (first, second)]
    victim.exchange(TRAIN, *ends)
    return [f"document {entry.id} at byte offset {entry.offset}" for entry in (first, second)]


@case("swap the samples of two documents")
def _swap_samples(victim: Victim) -> list[str]:
    victim.exchange(TRAIN, victim.sample("letters/d.txt"), victim.sample("letters/e.txt"))
    name = victim.member("letters/e.txt", "txt").name
    return [f"shard {TRAIN}: member 00000003-letters-d-txt.json at byte", f"stands behind {name}, not before it"]


@case("swap metadata")
def _swap_metadata(victim: Victim) -> list[str]:
    first, second = victim.member("letters/d.txt", "json"), victim.member("letters/e.txt", "json")
    victim.exchange(TRAIN, *((info.offset_data, info.offset_data + 512) for info in (first, second)))
    return [f"metadata of {first.name}; document letters/d.txt", f"metadata of {second.name}; document letters/e.txt"]


@case("swap the lengths of two documents", "tokens")
def _swap_lengths(victim: Victim) -> list[str]:
    names = ("letters/d.txt", "letters/e.txt")
    infos = [victim.member(name, "len") for name in names]
    victim.exchange(TRAIN, *((info.offset, info.offset_data + 512) for info in infos))
    return [f"shard {TRAIN}: document {name} at byte offset" for name in names]


def _rewrite(count: int, suffix: str) -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        name = f"00000002-letters-c-txt{suffix}"
        victim.rewrite(TRAIN, lambda member: count if member.startswith(name) else 1)
        kinds = [suffix] if suffix else [f".{kind}" for kind in victim.kinds]
        what = "is missing" if count == 0 else "is there 2 times, again at byte"
        return [f"shard {TRAIN}: member 00000002-letters-c-txt{kind} {what}" for kind in kinds]

    return plant


case("text missing")(_rewrite(0, ".txt"))
case("metadata missing")(_rewrite(0, ".json"))
case("sample missing")(_rewrite(0, ""))
case("text twice")(_rewrite(2, ".txt"))
case("sample twice")(_rewrite(2, ""))
case("lengths missing", "tokens")(_rewrite(0, ".len"))
case("ids twice", "tokens")(_rewrite(2, ".ids"))


@case("last sample missing")
def _last_missing(victim: Victim) -> list[str]:
    victim.rewrite(TRAIN, lambda member: not member.startswith("00000005"))
    entry = victim.document("letters/f.txt")
    return [f"shard {TRAIN}: ", f"document letters/f.txt at byte offset {entry.offset}"]


@case("pickled member behind the documents")
def _pickled(victim: Victim) -> list[str]:
    victim.rewrite(TRAIN, lambda member: True, {"00000006-x.pyd": b"cos\nsystem\n(S'true'\ntR."})
    at = victim.sample("letters/f.txt")[1]
    return [f"shard {TRAIN}: unknown member 00000006-x.pyd at byte {at}, pickled data that Longspan never reads"]


@case("unknown member between documents")
def _unknown(victim: Victim) -> list[str]:
    start = victim.sample("letters/c.txt")[0]
    data, other = victim.read(TRAIN), victim.read(OTHER)
    stop = victim.sample("poems/g.txt")[1]
    victim.write(TRAIN, data[:start] + other[:stop] + data[start:])
    return [f"shard {TRAIN}: unknown member 00000000-poems-g-txt.json at byte {start}"]


# Shards.
@case("shard missing")
def _shard_missing(victim: Victim) -> list[str]:
    (victim.folder / OTHER).unlink()
    return [f"shard {OTHER}: missing, with documents poems/g.txt"]


@case("shard too many")
def _shard_extra(victim: Victim) -> list[str]:
    victim.write("train-00009.tar", victim.read(OTHER))
    return ["shard train-00009.tar: there, but not in the manifest"]


@case("two shards swapped")
def _shards_swapped(victim: Victim) -> list[str]:
    first, second = victim.read(OTHER), victim.read(HELD)
    victim.write(OTHER, second)
    victim.write(HELD, first)
    return [f"shard {OTHER}: ", "document poems/g.txt", f"shard {HELD}: ", "document poems/h.txt"]


@case("shard empty")
def _shard_empty(victim: Victim) -> list[str]:
    size = len(victim.read(HELD))
    victim.write(HELD, b"")
    return [f"shard {HELD}: truncated at byte 0 of {size}; first document that is not whole: poems/h.txt"]


@case("shard longer")
def _shard_longer(victim: Victim) -> list[str]:
    data = victim.read(OTHER)
    victim.write(OTHER, data + data)
    return [f"shard {OTHER}: {2 * len(data)} bytes, {len(data)} more than the manifest's {len(data)}"]


@case("shard is a folder")
def _shard_folder(victim: Victim) -> list[str]:
    (victim.folder / OTHER).unlink()
    (victim.folder / OTHER).mkdir()
    return [f"shard {OTHER}: not readable"]


# The manifest, damaged without a new signature.
def _edit_manifest(change: Callable[[str], str], *expected: str) -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        file = victim.folder / "manifest.json"
        file.write_text(change(file.read_text()))
        return ["manifest.json", *expected]

    return plant


_UNSIGNED = "its content does not match its digest"
case("manifest count")(_edit_manifest(lambda text: text.replace('"num_tokens": 3', '"num_tokens": 4', 1), _UNSIGNED))
case("manifest hash")(_edit_manifest(lambda text: text.replace('"sha256": "', '"sha256": "0', 1), "sha256"))
case("manifest line lost")(_edit_manifest(lambda text: text.replace(text.splitlines()[-5] + "\n", "", 1), _UNSIGNED))
case("manifest cut")(_edit_manifest(lambda text: text[: len(text) // 2], "is cut off"))
case("manifest without its end")(_edit_manifest(lambda text: text[:-40], "digest: field required"))
case("manifest not JSON")(_edit_manifest(lambda text: text.replace("}", "]", 1), "is not readable"))


# The manifest, changed and signed anew.
def _forge(
    document: str | None, expected: list[str], corpus: str = "bytes", /, **fields: object
) -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        victim.forge(document, **fields)
        return expected

    return plant


_SHARD_RIGHT = "the shard has its sha256, so the manifest is wrong"
_G = "document poems/g.txt"
case("forged num_tokens")(_forge("poems/g.txt", [_G, "has other num_tokens than its bytes"], num_tokens=444))
case("forged num_bytes")(_forge("poems/g.txt", [_G, "has other num_bytes than its text"], num_bytes=440))
case("forged size, consistently")(
    _forge("poems/g.txt", [_G, "does not have", _SHARD_RIGHT], num_bytes=440, num_tokens=442, size=440)
)
case("forged sha256")(_forge("poems/g.txt", [_G, "does not have sha256 00000", _SHARD_RIGHT], sha256="0" * 64))
case("forged split")(
    _forge("poems/g.txt", [_G, f"the manifest says held_out, but the shard is of {OTHER[:5]}"], split="held_out")
)
case("forged source")(_forge("poems/g.txt", [_G, "an id that does not begin with its source"], source="letters"))
case("forged source and id")(
    _forge(
        "poems/g.txt", ["document letters/g.txt", "in the header", _SHARD_RIGHT], source="letters", id="letters/g.txt"
    )
)
case("forged licence")(_forge("poems/g.txt", [_G, "damaged", _SHARD_RIGHT], licence="MIT OR GPL-3.0-only"))
case("forged shard")(_forge("poems/g.txt", [_G, f"shard {HELD}: "], shard=HELD))
case("forged unknown shard")(_forge("poems/g.txt", [_G, "lies outside its shard"], shard="train-00007.tar"))
case("forged offset outside")(_forge("poems/g.txt", [_G, "lies outside its shard"], offset=10**9))
case("forged tokens")(
    _forge("poems/g.txt", ["poems/g.txt", "stand for 441 bytes, the manifest says 440"], num_bytes=440)
)
CASES["forged tokens"] = ("tokens", CASES["forged tokens"][1])


@case("forged offset")
def _forged_offset(victim: Victim) -> list[str]:
    offset = victim.document("letters/c.txt").offset
    victim.forge("letters/c.txt", offset=offset + 512)
    return ["document letters/c.txt", f"byte offset {offset + 512}", f"it is whole at byte offset {offset}"]


@case("forged offsets swapped")
def _forged_offsets(victim: Victim) -> list[str]:
    first, second = victim.document("letters/d.txt"), victim.document("letters/e.txt")
    victim.forge("letters/d.txt", offset=second.offset)
    victim.forge("letters/e.txt", offset=first.offset)
    return ["document letters/d.txt at byte offset", "document letters/e.txt at byte offset", _SHARD_RIGHT]


@case("forged lengths offset", "tokens")
def _forged_lengths_offset(victim: Victim) -> list[str]:
    offset = victim.document("letters/c.txt").lengths_offset
    victim.forge("letters/c.txt", lengths_offset=offset - 512)
    return ["document letters/c.txt", f"{offset - 512}", _SHARD_RIGHT]


def _forge_list(
    key: str, change: Callable[[list[dict[str, Any]]], object], *expected: str
) -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        forge(victim.folder, lambda raw: change(raw[key]))
        return list(expected)

    return plant


case("forged document lost")(_forge_list("documents", lambda items: items.pop(2), f"shard {TRAIN}: ", "letters-c-txt"))
case("forged document twice")(
    _forge_list("documents", lambda items: items.append(items[2]), "letters/c.txt", "two documents share an id")
)
case("forged shard lost")(_forge_list("shards", lambda items: items.pop(0), "letters/a.txt", "lies outside its shard"))
case("forged shard size")(
    _forge_list("shards", lambda items: items[0].update(size=30720), f"shard {TRAIN}: ", "20480", "30720")
)
case("forged shard hash")(
    _forge_list("shards", lambda items: items[0].update(sha256="0" * 64), f"shard {TRAIN}: ", "its entry of the shard")
)
case("forged shard url")(_forge_list("shards", lambda items: items[0].update(url="../train-00000.tar"), "'../train-"))
case("forged source lost")(_forge_list("sources", lambda items: items.pop(), "poems/", "the manifest does not list"))


def _forge_vocabulary(**fields: object) -> Callable[[Victim], list[str]]:
    def plant(victim: Victim) -> list[str]:
        forge(victim.folder, lambda raw: raw["vocabulary"].update(fields))
        return [str(next(iter(fields)))]

    return plant


case("forged vocabulary size", "tokens")(_forge_vocabulary(size=280))
case("forged bos", "tokens")(_forge_vocabulary(bos=5))
case("forged vocabulary digest", "tokens")(_forge_vocabulary(digest="0" * 64))


@case("forged byte vocabulary")
def _forged_byte_vocabulary(victim: Victim) -> list[str]:
    forge(victim.folder, lambda raw: raw["vocabulary"].update(eos=255))
    return ["is not this version's byte vocabulary"]


# The tokenizer beside the shards.
@case("tokenizer missing", "tokens")
def _tokenizer_missing(victim: Victim) -> list[str]:
    (victim.folder / "tokenizer" / "description.json").unlink()
    return ["tokenizer", "description.json is missing"]


@case("tokenizer of another corpus", "tokens")
def _tokenizer_other(victim: Victim) -> list[str]:
    file = victim.folder / "tokenizer" / "description.json"
    digest = victim.manifest.vocabulary.digest
    file.write_text(file.read_text().replace(digest, hashlib.sha256(b"other").hexdigest()))
    return ["tokenizer", "is not the one of the shards", digest]


@case("tokenizer's description formatted anew", "tokens")
def _tokenizer_space(victim: Victim) -> list[str]:
    file = victim.folder / "tokenizer" / "description.json"
    file.write_text(file.read_text().replace("  ", "\t", 1))
    return ["tokenizer/description.json: not as Longspan writes it"]


@case("tokenizer's file changed", "tokens")
def _tokenizer_changed(victim: Victim) -> list[str]:
    file = max((victim.folder / "tokenizer").iterdir(), key=lambda item: item.name != "description.json")
    victim.flip(f"tokenizer/{file.name}", 40)
    return [file.name]


@case("tokenizer's file missing", "tokens")
def _tokenizer_file_missing(victim: Victim) -> list[str]:
    file = max((victim.folder / "tokenizer").iterdir(), key=lambda item: item.name != "description.json")
    file.unlink()
    return [file.name]


@case("tokenizer with a pickle beside it", "tokens")
def _tokenizer_extra(victim: Victim) -> list[str]:
    (victim.folder / "tokenizer" / "tokenizer.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    return ["tokenizer/tokenizer.pkl: there, but the tokenizer does not name it"]


def test_every_text_is_in_the_corpora(corpora: dict[str, Packed]) -> None:
    assert all({entry.id for entry in corpus.manifest.documents} == set(TEXTS) for corpus in corpora.values())
