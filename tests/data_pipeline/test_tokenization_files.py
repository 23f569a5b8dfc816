"""SentencePiece models and Hugging Face folders: every byte counted once, whatever the tokenizer does to the text."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from longspan.data_pipeline.tokenization import load_tokenizer, make_tokenizer
from longspan.data_pipeline.tokenization.byte_level import ByteLevelEngine
from longspan.data_pipeline.tokenization.config import HuggingFaceTokenizerConfig, SentencePieceTokenizerConfig
from longspan.data_pipeline.tokenization.file_tokenizer import FileTokenizer
from longspan.data_pipeline.tokenization.offsets import OffsetEngine
from longspan.errors import UsageError

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
PROSE = "In the beginning was the Word, and it wasn't 2 long; naïve cafés — 日本 — followed. " * 30
FRAGMENTS = [
    *("the", "argument", "Word", "a", "1", "x2", ".", ",", "'s", "(", "def ", "_", "ﬁ", "Ⅳ", "ｱ", "e\u0301", "ß", "İ"),
    *(
        " ",
        "  ",
        "      ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\u0000",
        "\ufeff",
        "日本語",
        "😀",
        "▁",
        "<unk>",
    ),
    *("<s>", "</s>", "<pad>", "[SEP]", "[PAD]", "[UNK]", "<|endoftext|>", "<0x0A>"),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=30).map("".join)


def train_sentence_piece(folder: Path, **settings: object) -> FileTokenizer:
    buffer = io.BytesIO()
    lines = [line for line in (TEXT + PROSE).splitlines() if line.strip()]
    options: dict[str, object] = {"vocab_size": 600, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=buffer, **{**options, **settings}
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    return sentence_piece(folder)


def sentence_piece(path: Path) -> FileTokenizer:
    tokenizer = make_tokenizer(SentencePieceTokenizerConfig(kind="sentencepiece", path=str(path)))
    assert isinstance(tokenizer, FileTokenizer)
    return tokenizer


def hugging_face(path: Path) -> FileTokenizer:
    tokenizer = make_tokenizer(HuggingFaceTokenizerConfig(kind="hugging_face", path=str(path)))
    assert isinstance(tokenizer, FileTokenizer)
    return tokenizer


def byte_level(**changes: Any) -> Tokenizer:
    """Byte-level BPE as GPT-2 has it; `changes` are set on the pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **changes)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, PROSE], trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def prefixed() -> Tokenizer:
    tokenizer = gpt2()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def llama3() -> Tokenizer:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    pattern = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        [TEXT, PROSE], trainers.WordPieceTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 has it: the words of the end of text are a piece of the vocabulary."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz</>.,"] + [("▁the", -2.0), ("▁Word", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, **names: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if names:
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


BUILDERS: dict[str, Callable[[Path], FileTokenizer]] = {
    "unigram-nfkc": lambda folder: train_sentence_piece(folder),
    "bpe-bytes": lambda folder: train_sentence_piece(
        folder,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    ),
    "no-prefix": lambda folder: train_sentence_piece(folder, add_dummy_prefix=False, remove_extra_whitespaces=False),
    "hf-gpt2": lambda folder: hugging_face(save(folder, gpt2(), bos_token="<|endoftext|>", eos_token="<|endoftext|>")),
    "hf-prefixed": lambda folder: hugging_face(save(folder, prefixed())),
    "hf-llama3": lambda folder: hugging_face(save(folder, llama3())),
    "hf-word-piece": lambda folder: hugging_face(save(folder, word_piece(), eos_token="[SEP]", pad_token="[PAD]")),
    "hf-unigram": lambda folder: hugging_face(
        save(folder, unigram(), eos_token="</s>", pad_token={"content": "<pad>"})
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileTokenizer]:
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in BUILDERS.items()}


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_every_byte_belongs_to_one_token(tokenizers: dict[str, FileTokenizer], name: str, text: str) -> None:
    tokenizer = tokenizers[name]
    encoded = tokenizer.encode(text.encode())
    assert int(encoded.num_bytes.sum(dtype=np.int64)) == len(text.encode())
    assert encoded.num_bytes[0] == encoded.num_bytes[-1] == 0
    assert len(encoded.ids) == len(encoded.num_bytes)
    inside = encoded.ids[1:-1]
    assert not np.isin(inside, [tokenizer.bos, tokenizer.eos, tokenizer.pad]).any()
    assert (inside < tokenizer.size).all()


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    "text",
    [" " * 40_000, "a" + " " * 100_000 + "b", "a" * 70_000, "日" * 40_000, "\n" * 40_000],
    ids=["spaces", "gap", "letters", "japanese", "lines"],
)
def test_text_without_words_is_counted_whole(tokenizers: dict[str, FileTokenizer], name: str, text: str) -> None:
    encoded = tokenizers[name].encode(text.encode())
    assert int(encoded.num_bytes.sum(dtype=np.int64)) == len(text.encode())


@pytest.mark.parametrize("name", BUILDERS)
def test_chunks_of_ordinary_text_have_the_ids_of_the_whole(tokenizers: dict[str, FileTokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    text = TEXT[:35_000] + PROSE  # SentencePiece rounds over more
    assert len(text) > 2 * 16_383
    if isinstance(tokenizer.engine, OffsetEngine):
        [(whole, _)] = tokenizer.engine._encoder.encode_chunks([text], 1)
    else:
        reference = Tokenizer.from_str(tokenizer._files["tokenizer.json"].decode())
        whole = reference.encode(text, add_special_tokens=False).ids
    for threads in (1, 2):
        tokenizer.threads = threads
        assert tokenizer.encode(text.encode()).ids[1:-1].tolist() == whole


def test_bytes_are_counted_where_they_are(tokenizers: dict[str, FileTokenizer]) -> None:
    normalising, exact = tokenizers["unigram-nfkc"], tokenizers["bpe-bytes"]
    encoded = normalising.encode("the 한국어 argument".encode())
    unknown = encoded.ids.tolist().index(normalising.engine.unknown)
    assert encoded.num_bytes[unknown] == 9
    assert int(encoded.num_bytes[:unknown].sum()) == 4
    ligature = normalising.encode("ﬁ the".encode())  # two letters in the pieces, three bytes in the text
    start_of_word = next(i for i in range(len(ligature.ids)) if normalising.decode(ligature.ids[: i + 1]) == "fi")
    assert int(ligature.num_bytes[: start_of_word + 1].sum()) == 3
    text = TEXT[:3_000] + PROSE
    encoded = exact.encode(text.encode())
    ends = np.cumsum(encoded.num_bytes, dtype=np.int64)
    for token in range(0, len(ends) - 1, 7):
        whole = text.encode()[: ends[token]].decode(errors="ignore")
        assert exact.decode(encoded.ids[: token + 1]).removesuffix("\ufffd").startswith(whole)


class Letters:
    """Every character is a token, a text starts with a token for a space, and two ends are out of order."""

    unknown = None

    def encode_chunks(self, chunks: list[str], threads: int) -> list[tuple[list[int], np.ndarray]]:
        found = []
        for chunk in chunks:
            ends = np.arange(len(chunk) + 1)
            if len(chunk) > 2:
                ends[-3], ends[-2] = ends[-2], ends[-3]
            found.append(([32, *chunk.encode()], ends))
        return found

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


def test_a_dropped_space_and_ends_out_of_order_are_counted_once() -> None:
    engine = OffsetEngine(Letters())
    assert engine.rule == "words-1-drop"
    text = "a" * 16_380 + " " + "d" * 10  # cut before the space, which the tokenizer adds by itself
    ids, num_bytes = engine.encode(text, 1)
    assert engine.decode(ids.tolist()) == " " + text
    assert ids[-11:].tolist() == [*b" dddddddddd"]
    assert num_bytes[-11:].tolist() == [*[1] * 8, 2, 0, 1]
    assert int(num_bytes.sum()) == len(text)


def test_words_of_special_tokens_that_nothing_names_are_text(tokenizers: dict[str, FileTokenizer]) -> None:
    tokenizer = tokenizers["hf-prefixed"]
    special = json.loads(tokenizer._files["tokenizer.json"])["added_tokens"][0]
    assert special["content"] == "<|endoftext|>"
    assert special["id"] not in tokenizer.encode(b"a<|endoftext|>b").ids


def test_the_unknown_token_is_never_a_special_one(tmp_path: Path) -> None:
    tokenizer = hugging_face(save(tmp_path, word_piece(), eos_token="[SEP]", pad_token="[UNK]"))
    assert tokenizer.engine.unknown == 1
    assert 1 not in (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    assert 1 in tokenizer.encode("the 한 argument".encode()).ids


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("hf-gpt2", ByteLevelEngine),
        ("hf-prefixed", OffsetEngine),
        ("hf-llama3", OffsetEngine),
        ("hf-word-piece", OffsetEngine),
        ("unigram-nfkc", OffsetEngine),
    ],
)
def test_the_fast_engine_is_taken_where_it_gives_the_same(
    tokenizers: dict[str, FileTokenizer], name: str, engine: type
) -> None:
    assert type(tokenizers[name].engine) is engine


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_gpt2_form_has_the_ids_of_tokenizers(tokenizers: dict[str, FileTokenizer], text: str) -> None:
    reference = gpt2_reference(tokenizers["hf-gpt2"])
    encoded = tokenizers["hf-gpt2"].encode(text.encode())
    assert encoded.ids[1:-1].tolist() == reference.encode(text, add_special_tokens=False).ids
    assert tokenizers["hf-gpt2"].decode(encoded.ids) == text


def gpt2_reference(tokenizer: FileTokenizer) -> Tokenizer:
    reference = Tokenizer.from_str(tokenizer._files["tokenizer.json"].decode())
    reference.encode_special_tokens = True
    return reference


def edited(tokenizer: Tokenizer, edit: Callable[[dict[str, Any]], None]) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    edit(content)
    return Tokenizer.from_str(json.dumps(content))


def add_token_nothing_leads_to(content: dict[str, Any]) -> None:
    """`th` + `e` never meet in a text: by then `the` is put together in another way, or `he` is."""
    model = content["model"]
    new = "zqx"
    model["vocab"] |= {"qx": len(model["vocab"]), new: len(model["vocab"]) + 1, "zq": len(model["vocab"]) + 2}
    model["merges"] += [["z", "q"], ["q", "x"], ["z", "qx"]]  # zq comes first, so qx is never there for zqx


def test_tokens_that_no_text_gives_do_not_mislead_the_fast_engine(tmp_path: Path) -> None:
    reference = edited(byte_level(), add_token_nothing_leads_to)
    tokenizer = hugging_face(save(tmp_path, reference))
    assert isinstance(tokenizer.engine, ByteLevelEngine)
    for text in ("zqx", "azqxqx", "zq qx zqxzqx"):
        assert tokenizer.encode(text.encode()).ids[1:-1].tolist() == reference.encode(text).ids


def two_ways(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab |= {token: len(vocab) + number for number, token in enumerate(["zq", "qx", "zqx"])}
    content["model"]["merges"] += [["q", "x"], ["z", "q"], ["z", "qx"], ["zq", "x"]]


@pytest.mark.parametrize(
    "edit",
    [
        two_ways,
        lambda content: content["model"].update(ignore_merges=True),
        lambda content: content["model"].update(dropout=0.5),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content.update(pre_tokenizer=None),
    ],
    ids=["two-ways", "ignore-merges", "dropout", "normaliser", "no-splits"],
)
def test_other_forms_are_left_to_tokenizers(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    reference = edited(byte_level(), edit)
    tokenizer = hugging_face(save(tmp_path, reference))
    if reference.model.dropout:
        reference.model.dropout = None
    else:
        assert isinstance(tokenizer.engine, OffsetEngine)
    text = "zqx the argument wasn't e\u0301 there\n"
    assert tokenizer.encode(text.encode()).ids[1:-1].tolist() == reference.encode(text).ids


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path: Path) -> None:
    reference = gpt2()
    reference.add_tokens(["argument parser"])
    tokenizer = hugging_face(save(tmp_path, reference))
    ids = tokenizer.encode(b"an argument parser.").ids.tolist()
    assert reference.token_to_id("argument parser") in ids
    assert tokenizer.decode(ids) == "an argument parser."


def test_missing_specials_get_ids_behind_the_vocabulary(tokenizers: dict[str, FileTokenizer]) -> None:
    gpt = tokenizers["hf-gpt2"]  # one id for both ends of a text: eos keeps it
    num_ids = gpt_size = gpt2_reference(gpt).get_vocab_size()
    assert (gpt.bos, gpt.eos, gpt.pad, gpt.size) == (num_ids, num_ids - 1, num_ids + 1, gpt_size + 2)
    piece = tokenizers["unigram-nfkc"]
    assert (piece.bos, piece.eos, piece.pad) == (1, 2, piece.size - 1)
    words = tokenizers["hf-word-piece"]
    assert (words.pad, words.eos, words.bos) == (0, 3, words.size - 1)
    bare = tokenizers["hf-prefixed"]
    assert (bare.bos, bare.eos, bare.pad) == (bare.size - 3, bare.size - 2, bare.size - 1)
    for tokenizer in tokenizers.values():
        assert len({tokenizer.bos, tokenizer.eos, tokenizer.pad}) == 3
        assert tokenizer.padded_size % 128 == 0 and 0 <= tokenizer.padded_size - tokenizer.size < 128


def test_words_of_a_special_token_in_the_vocabulary(tokenizers: dict[str, FileTokenizer], tmp_path: Path) -> None:
    unknown = 2
    encoded = tokenizers["hf-unigram"].encode(b"the </s> end")
    assert unknown in encoded.ids[1:-1]
    without = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer = hugging_face(save(tmp_path, without, eos_token="ab"))
    with pytest.raises(UsageError, match="encodes text to its special tokens 3, 2 or 4"):
        tokenizer.encode(b"aab")


def test_a_tokenizer_that_cannot_encode(tmp_path: Path) -> None:
    pieces = [(letter, -5.0) for letter in "▁abc"]
    with pytest.raises(UsageError, match=r"cannot encode a text: .*unk_id"):
        hugging_face(save(tmp_path, Tokenizer(models.Unigram(pieces, unk_id=None))))


def test_a_tokenizer_that_drops_text_without_an_unknown_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = hugging_face(save(tmp_path, tokenizer))
    assert made.encode(b"a  b ").num_bytes.tolist() == [0, 1, 4, 0]
    with pytest.raises(UsageError, match="makes nothing of 3 characters"):
        made.encode(b"   ")


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_tokenizer_loads_the_same(tokenizers: dict[str, FileTokenizer], tmp_path: Path, name: str) -> None:
    tokenizers[name].save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for fact in ("name", "kind", "bos", "eos", "pad", "size", "padded_size", "digest", "token_dtype"):
        assert getattr(loaded, fact) == getattr(tokenizers[name], fact)
    text = (TEXT[:5_000] + PROSE).encode()
    np.testing.assert_array_equal(loaded.encode(text).ids, tokenizers[name].encode(text).ids)


def test_ordinary_text_comes_back(tokenizers: dict[str, FileTokenizer]) -> None:
    text = "the argument was not 2 long, in the beginning"
    for name in ("unigram-nfkc", "bpe-bytes", "no-prefix", "hf-gpt2", "hf-llama3"):
        tokenizer = tokenizers[name]
        ids = [*tokenizer.encode(text.encode()).ids.tolist(), tokenizer.pad, tokenizer.padded_size + 5]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("sentencepiece", None, r"must hold one SentencePiece model .*found: none"),
        ("sentencepiece", {"a.model": b"x", "b.model.v3": b"y"}, r"found: a\.model, b\.model\.v3"),
        ("sentencepiece", {"a.model": b"not a model"}, "is not a SentencePiece model"),
        ("hugging_face", None, r"no Hugging Face tokenizer at .*tokenizer\.json: No such file"),
        ("hugging_face", {"tokenizer.json": b"{}"}, r"tokenizer\.json of .* is not a tokenizer"),
        ("hugging_face", {"tokenizer.json": b"\xff"}, r"tokenizer\.json of .* is not a tokenizer"),
    ],
    ids=["no-model", "two-models", "damaged-model", "no-json", "empty-json", "not-text"],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, kind: str, content: dict[str, bytes] | None, message: str) -> None:
    for name, data in (content or {}).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        (sentence_piece if kind == "sentencepiece" else hugging_face)(tmp_path)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no SentencePiece model at"):
        sentence_piece(tmp_path / "no.model")
    with pytest.raises(UsageError, match="no Hugging Face tokenizer at"):
        hugging_face(tmp_path / "nowhere")


def test_damaged_names_of_special_tokens(tmp_path: Path) -> None:
    folder = save(tmp_path, gpt2())
    (folder / "special_tokens_map.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"special_tokens_map\.json .* is not a JSON object"):
        hugging_face(folder)


def test_empty_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty vocabulary"):
        hugging_face(save(tmp_path, Tokenizer(models.BPE())))


def test_without_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UsageError, match=r"pip install 'longspan\[data\]'"):
        sentence_piece(tmp_path)
