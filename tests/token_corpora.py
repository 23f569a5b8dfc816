"""Corpora of words under tokenizers of several kinds, for tests of what must work with all of them."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from longspan.data_pipeline.tokenization import base, make_tokenizer
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.data_pipeline.tokenization.config import BpeTokenizerConfig, HuggingFaceTokenizerConfig

sys.path.append(str(Path(__file__).resolve().parent / "data_pipeline"))
from packed_corpora import pack

WORDS = ("and", "the", "of", "king", "said", "behold", "river", "naïve", "日本", "day", "light", "👑", "stone")
HELD_OUT = ("tales/3", "tales/5", "laws/4")


def texts(scale: int = 20) -> dict[str, bytes]:
    """Documents of rising length of two sources; characters have one to four bytes."""
    found = {}
    for source, seed in (("tales", 5), ("laws", 6)):
        draw = random.Random(seed)
        for index in range(7):
            words = [draw.choice(WORDS) for _ in range(20 + scale * index)]
            found[f"{source}/{index}"] = " ".join(words).encode()
    return found


def bpe(vocab_size: int = 300) -> base.Tokenizer:
    """Own byte-pair encoding, trained on the texts."""
    return make_tokenizer(BpeTokenizerConfig(kind="bpe", vocab_size=vocab_size), texts().values())


def pieces(folder: Path) -> base.Tokenizer:
    """A Hugging Face tokenizer without special tokens, most of whose tokens of a long character count no bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\p{L}+|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=264, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS[:5] * 9)], trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return make_tokenizer(HuggingFaceTokenizerConfig(kind="hugging_face", path=str(folder)))


def tokenizer(kind: str, folder: Path) -> base.Tokenizer:
    """bytes, bpe, other_bpe (as large, other ids) or pieces; `folder`: for its files, must not exist."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "pieces":
        return pieces(folder)
    if kind == "bpe":
        return bpe()
    reversed_texts = (b" ".join(reversed(text.split())) + b" unlike" * 40 for text in texts().values())
    return make_tokenizer(BpeTokenizerConfig(kind="bpe", vocab_size=300), reversed_texts)


def corpus(folder: Path, of: base.Tokenizer, scale: int = 20) -> Path:
    """Fourteen documents, three of them held out, as shards."""
    return pack(folder, texts(scale), HELD_OUT, tokenizer=of).folder
