"""The exported tokenizer: ids of the byte vocabulary, and every text survives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from longspan.data_pipeline.vocabulary import BOS, EOS, PAD, ByteVocabulary
from longspan.modeling.hf.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(BOS, EOS, PAD).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def texts() -> list[str]:
    draw = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    mixed = ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(300)) for _ in range(30)]
    return [
        "",
        " ",
        "a  b\n\t\r\n ",
        "<|bos|>x<|eos|><|pad|>",
        "don't , . ' s",
        "\x00\xad\ufeff",
        "👩‍👩‍👧 日本 e\u0301",
        *mixed,
    ]


def test_ids_and_round_trip(tokenizer) -> None:
    for text in texts():
        ids = tokenizer(text)["input_ids"]
        assert ids == ByteVocabulary.encode(text.encode())[:-1].tolist()
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_and_padding(tokenizer) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, PAD)
    assert len(tokenizer) == PAD + 1
    batch = tokenizer(["ab", "abcd"], padding=True)
    assert batch["input_ids"][0] == [PAD, PAD, BOS, 97, 98]
    assert batch["attention_mask"][0] == [0, 0, 1, 1, 1]


def test_bytes_that_are_no_utf8_are_replaced(tokenizer) -> None:
    assert tokenizer.decode([0xFF, 65, EOS], skip_special_tokens=True) == "\ufffdA"
