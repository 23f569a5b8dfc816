"""Bytes and own BPE: ids equal to those of `tokenizers`, every byte counted once, cuts that change nothing."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from tokenizers import pre_tokenizers

from longspan.data_pipeline.tokenization import load_tokenizer, make_tokenizer
from longspan.data_pipeline.tokenization.base import Tokenizer, padded_size, token_dtype
from longspan.data_pipeline.tokenization.bpe import SPECIALS, train_bpe
from longspan.data_pipeline.tokenization.byte_level import ByteLevelEngine, token_bytes
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.data_pipeline.tokenization.chunks import BYTE_LEVEL, WORDS, CutRule, cut
from longspan.data_pipeline.tokenization.config import BpeTokenizerConfig, BytesTokenizerConfig
from longspan.data_pipeline.tokenization.file_tokenizer import FileTokenizer
from longspan.data_pipeline.vocabulary import ByteVocabulary
from longspan.errors import UsageError

TEXTS = [
    Path(argparse.__file__).read_bytes(),
    Path(ast.__file__).read_bytes(),
    "täglich Brot 日本語のテキスト、ここ。 naïve café 😀 <|eos|> <| it's we'll they're 2026\r\n".encode() * 40,
]
# what goes wrong in tokenizers: words of special tokens, contractions, white space, characters of many bytes
FRAGMENTS = [
    *SPECIALS,
    *("<|", "|>", "<|eos", "'s", "'ll", "'", "s", " ", "  ", " " * 70, "\n", "\r\n", "\r", "\t", "\n\n", "\u3000"),
    *(
        "\u00a0",
        "\u0085",
        "\u001c",
        "\u200b",
        "\u2028",
        "\u180e",
        "\u0000",
        "e\u0301",
        "ä",
        "日本",
        "。",
        "😀",
        "👩‍👩‍👧",
        "²",
        "Ⅷ",
        "٣",
    ),
    *("def ", "return", "argument", "a", "Z", "7", "2026", "_", "-", "....", "====", "(", ")", "\ufeff", "\ufffd"),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=30).map("".join)


@pytest.fixture(scope="module")
def bpe() -> FileTokenizer:
    return train_bpe(TEXTS, vocab_size=2_000)


@pytest.fixture(scope="module")
def reference(bpe: FileTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("bpe")
    bpe.save(folder)
    tokenizer = Reference.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def text_ids(tokenizer: FileTokenizer, text: str) -> list[int]:
    encoded = tokenizer.encode(text.encode())
    assert encoded.ids[0] == tokenizer.bos and encoded.ids[-1] == tokenizer.eos
    return [int(i) for i in encoded.ids[1:-1]]


@pytest.mark.parametrize("text", [b"", b"a", "täglich\r\n".encode(), bytes(range(256))])
def test_bytes_are_the_byte_vocabulary(text: bytes) -> None:
    tokenizer = ByteTokenizer()
    encoded = tokenizer.encode(text)
    np.testing.assert_array_equal(encoded.ids, ByteVocabulary.encode(text))
    assert encoded.num_bytes.tolist() == [0, *[1] * len(text), 0]
    assert encoded.ids.dtype == tokenizer.token_dtype and encoded.num_bytes.dtype == np.uint16
    assert (tokenizer.digest, tokenizer.padded_size) == (ByteVocabulary().digest, 384)


@settings(max_examples=400, deadline=None)
@given(texts)
def test_bpe_gives_the_ids_of_tokenizers(bpe: FileTokenizer, reference: Reference, text: str) -> None:
    assert text_ids(bpe, text) == reference.encode(text, add_special_tokens=False).ids


@settings(max_examples=200, deadline=None)
@given(texts)
def test_bpe_counts_every_byte_where_it_is(bpe: FileTokenizer, text: str) -> None:
    encoded = bpe.encode(text.encode())
    assert encoded.num_bytes[0] == encoded.num_bytes[-1] == 0
    vocabulary = {i: token for token, i in json.loads(bpe._files["tokenizer.json"])["model"]["vocab"].items()}
    spelt = [token_bytes(vocabulary[int(i)]) for i in encoded.ids[1:-1]]
    assert b"".join(spelt) == text.encode()
    assert encoded.num_bytes[1:-1].tolist() == [len(token) for token in spelt]
    assert bpe.decode(encoded.ids) == text


@pytest.mark.parametrize("special", SPECIALS)
def test_words_of_a_special_token_are_text(bpe: FileTokenizer, special: str) -> None:
    ids = text_ids(bpe, f"x{special}y")
    assert not {bpe.bos, bpe.eos, bpe.pad} & set(ids)
    assert bpe.decode(ids) == f"x{special}y"


@settings(max_examples=300, deadline=None)
@given(texts, texts)
def test_no_cut_of_byte_level_texts_changes_ids(bpe: FileTokenizer, left: str, right: str) -> None:
    text = left + right
    whole = text_ids(bpe, text)
    for found in BYTE_LEVEL.places[0].finditer(text):
        assert text_ids(bpe, text[: found.end()]) + text_ids(bpe, text[found.end() :]) == whole


def test_long_documents_have_the_ids_of_the_whole_text(bpe: FileTokenizer, reference: Reference) -> None:
    text = (TEXTS[0] + TEXTS[2]).decode() * 4
    minified = "".join(f"v{number}=f({number * 7919});" for number in range(20_000))
    for document in (text, minified):
        assert len(cut(document, BYTE_LEVEL)) > 3
        assert text_ids(bpe, document) == reference.encode(document, add_special_tokens=False).ids


def test_threads_change_nothing(bpe: FileTokenizer) -> None:
    text = (TEXTS[0] + TEXTS[2]) * 12
    assert len(text.decode()) > 2**20
    threads = bpe.threads
    try:
        bpe.threads = 1
        one = bpe.encode(text)
        bpe.threads = 3
        three = bpe.encode(text)
    finally:
        bpe.threads = threads
    np.testing.assert_array_equal(one.ids, three.ids)
    np.testing.assert_array_equal(one.num_bytes, three.num_bytes)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(1, 40), st.sampled_from([BYTE_LEVEL, WORDS]))
def test_chunks_join_to_the_text(text: str, most_chars: int, rule: CutRule) -> None:
    chunks = cut(text, CutRule("test", most_chars, rule.places))
    assert "".join(chunks) == text
    assert all(1 <= len(chunk) <= most_chars for chunk in chunks)


def test_cut_places_are_what_gpt2_takes_them_for() -> None:
    """The characters that the rule calls letters and digits, and punctuation, are these for the pattern too."""
    every = "".join(chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point <= 0xDFFF)
    words = "".join(re.findall(r"[^\W_]", every))
    assert len(words) > 100_000
    assert regex.sub(r"[\p{L}\p{N}]+", "", words) == ""
    rights = [character for character in every if BYTE_LEVEL.places[0].match("a" + character)]
    assert len(rights) > 60
    assert not [hex(ord(c)) for c in rights if not c.isdigit() and not regex.fullmatch(r"\s|[^\p{L}\p{N}]", c)]
    assert not [hex(ord(character)) for character in rights if unicodedata.category(character) == "Cn"]


@pytest.mark.parametrize(
    "text",
    ["a" * 400_000, " " * 400_000, "x" + " " * 200_000 + "y", "日本語" * 70_000, "=" * 200_000, "\r\n" * 200_000],
    ids=["letters", "spaces", "gap", "japanese", "punctuation", "lines"],
)
def test_one_endless_line_is_encoded(bpe: FileTokenizer, text: str) -> None:
    encoded = bpe.encode(text.encode())
    assert int(encoded.num_bytes.sum(dtype=np.int64)) == len(text.encode())
    assert bpe.decode(encoded.ids) == text


@pytest.mark.long
@pytest.mark.parametrize(
    "unit", [b"a", b"v1=f(2);", b"It was the best of times.\n"], ids=["letters", "minified", "prose"]
)
def test_sixteen_megabytes_take_seconds(bpe: FileTokenizer, unit: bytes) -> None:
    text = (unit * (16_000_000 // len(unit) + 1))[:16_000_000]
    start = time.monotonic()
    encoded = bpe.encode(text)
    assert time.monotonic() - start < 30
    assert int(encoded.num_bytes.sum(dtype=np.int64)) == len(text)


@pytest.mark.long
def test_both_libraries_split_at_the_same_characters() -> None:
    """Each code point joins letters, digits, punctuation or white space for tiktoken as it does for `tokenizers`."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    before = ("a", "1", "!", "\n")
    # the planes that hold characters, or may in a later Unicode: 0 to 3 and 14
    every = [chr(point) for point in (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))]
    for first in range(0, len(every), 20_000):
        block = every[first : first + 20_000]
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += sorted({(left + character).encode() for character in block for left in before})
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
        engine = ByteLevelEngine(ranks, ranks)  # a piece that is not split is one token
        for character in block:
            for left in before:
                joined = len(engine.encode(left + character, 1)[0]) == 1
                assert joined == (len(splitter.pre_tokenize_str(left + character)) == 1), hex(ord(character))


def test_training_is_deterministic(bpe: FileTokenizer) -> None:
    again = train_bpe(iter(TEXTS[::-1]), vocab_size=2_000)
    assert again.digest == bpe.digest
    assert train_bpe(TEXTS[:2], vocab_size=2_000).digest != bpe.digest
    program = (
        "import sys; from pathlib import Path; from longspan.data_pipeline.tokenization.bpe import train_bpe; "
        "print(train_bpe([Path(f).read_bytes() for f in sys.argv[1:]], vocab_size=600).digest)"
    )
    files = [argparse.__file__, ast.__file__]
    found = {
        subprocess.run(
            [sys.executable, "-c", program, *order],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for order, seed, threads in ((files, "1", "1"), (files[::-1], "2", "2"))
    }
    assert len(found) == 1


def test_training_looks_at_a_sample_that_does_not_depend_on_order() -> None:
    words = ["alpha", "bravo", "charlie", "delta"]
    documents = [f"{word} {number}. ".encode() * 500 for word in words for number in range(6)]
    total = sum(map(len, documents))
    sampled = train_bpe(documents, vocab_size=270, train_bytes=total // 4)
    assert sampled.digest == train_bpe(documents[::-1], vocab_size=270, train_bytes=total // 4).digest
    assert sampled.digest != train_bpe(documents, vocab_size=270).digest
    one = train_bpe(documents, vocab_size=262, train_bytes=1)  # one chunk is looked at in any case
    assert one.digest == train_bpe(documents[::-1], vocab_size=262, train_bytes=1).digest


def test_facts_of_a_trained_tokenizer(bpe: FileTokenizer) -> None:
    assert isinstance(bpe, Tokenizer) and isinstance(ByteTokenizer(), Tokenizer)
    assert (bpe.bos, bpe.eos, bpe.pad) == (0, 1, 2)
    assert (bpe.name, bpe.kind, bpe.size, bpe.padded_size) == ("bpe-2000", "bpe", 2_000, 2_048)
    assert bpe.token_dtype == np.uint16 == bpe.encode(b"x").ids.dtype
    assert [padded_size(size) for size in (1, 128, 129, 32_000)] == [128, 128, 256, 32_000]
    assert (token_dtype(65_535), token_dtype(65_536)) == (np.uint16, np.uint32)
    assert bpe.encode(b"").ids.tolist() == [0, 1]
    assert bpe.encode(b"").num_bytes.tolist() == [0, 0]
    assert bpe.decode([0, 5_000, 2, 1, -1]) == ""


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_tokenizer_loads_the_same(bpe: FileTokenizer, tmp_path: Path, kind: str) -> None:
    tokenizer: Tokenizer = bpe if kind == "bpe" else make_tokenizer(BytesTokenizerConfig())
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    for fact in ("name", "kind", "bos", "eos", "pad", "size", "padded_size", "digest", "token_dtype"):
        assert getattr(loaded, fact) == getattr(tokenizer, fact)
    np.testing.assert_array_equal(loaded.encode(TEXTS[2]).ids, tokenizer.encode(TEXTS[2]).ids)
    tokenizer.save(tmp_path / "tokenizer")  # the same one again is fine


def test_recipe_trains_or_takes_a_trained_one(bpe: FileTokenizer, tmp_path: Path) -> None:
    trained = make_tokenizer(BpeTokenizerConfig(kind="bpe", vocab_size=2_000), TEXTS)
    assert trained.digest == bpe.digest
    bpe.save(tmp_path)
    by_path = BpeTokenizerConfig(kind="bpe", path=str(tmp_path))
    for config in (by_path, BpeTokenizerConfig.model_validate(by_path.model_dump())):  # a build passes it on as data
        assert make_tokenizer(config).digest == bpe.digest
    with pytest.raises(UsageError, match=r"asks for bpe with vocab_size 300, the tokenizer at .* is bpe with 2000 ids"):
        make_tokenizer(BpeTokenizerConfig(kind="bpe", vocab_size=300, path=str(tmp_path)))
    ByteTokenizer().save(tmp_path / "bytes")
    with pytest.raises(UsageError, match=r"asks for bpe, the tokenizer at .* is bytes with 259 ids"):
        make_tokenizer(BpeTokenizerConfig(kind="bpe", path=str(tmp_path / "bytes")))


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        ([], 300, "no text to train"),
        ([b"", b""], 300, "no text to train"),
        ([b"abc"], 259, "vocab_size = 259 is too small.*260"),
        ([b"ab ab ab"], 5_000, "give a vocabulary of 26[0-9], not 5,000"),
        ([b"fine", b"\xff\xfe"], 300, "byte 0xff at offset 0 .* not UTF-8"),
    ],
    ids=["nothing", "empty", "vocabulary", "too little", "latin"],
)
def test_what_cannot_be_trained(documents: list[bytes], vocab_size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_bpe(documents, vocab_size)


def test_text_that_is_not_utf8(bpe: FileTokenizer) -> None:
    with pytest.raises(UsageError, match="byte 0xe4 at offset 3 of a text of 8 bytes is not UTF-8"):
        bpe.encode("xyzätsch".encode("latin-1"))


def change_description(folder: Path, **changes: object) -> None:
    file = folder / "description.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_damaged_folders_are_refused(bpe: FileTokenizer, tmp_path: Path) -> None:
    def saved(name: str) -> Path:
        bpe.save(tmp_path / name)
        return tmp_path / name

    with pytest.raises(UsageError, match=r"no tokenizer at .*description\.json is missing"):
        load_tokenizer(tmp_path / "nowhere")
    folder = saved("changed")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content + b" ")
    with pytest.raises(UsageError, match=r"(?s)tokenizer.json: sha256 .*tokenizer_config.json: sha256"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.json: No such file"):
        load_tokenizer(folder)
    for name, changes, message in (
        ("digest", {"digest": "0" * 64}, "does not match its description: digest .*described as 0000"),
        ("specials", {"pad": 7}, "pad 2, described as 7"),
        ("newer", {"schema_version": 2, "new_field": 1}, "schema version 2, this Longspan reads up to 1. Upgrade"),
        ("unknown", {"kind": "words"}, "damaged: kind"),
        ("leaving", {"files": {"../../etc/passwd": "0" * 64}}, "damaged: files"),
    ):
        folder = saved(name)
        change_description(folder, **changes)
        with pytest.raises(UsageError, match=message):
            load_tokenizer(folder)
    folder = saved("broken")
    (folder / "description.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        load_tokenizer(folder)


def test_a_folder_of_another_tokenizer_is_not_overwritten(bpe: FileTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    with pytest.raises(UsageError, match="holds another tokenizer"):
        ByteTokenizer().save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the tokenizer to"):
        bpe.save(tmp_path / "file")


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys; import longspan.data_pipeline.tokenization, longspan.data_pipeline.tokenization.config; "
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'tiktoken', 'sentencepiece') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
