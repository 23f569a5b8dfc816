"""Byte-pair encoding trained on the corpus: byte-level, GPT-2's pattern, no space put before the text."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable

from longspan.data_pipeline.tokenization.base import decode_utf8
from longspan.data_pipeline.tokenization.byte_level import ByteLevelEngine, byte_characters
from longspan.data_pipeline.tokenization.chunks import BYTE_LEVEL, cut
from longspan.data_pipeline.tokenization.file_tokenizer import FileTokenizer
from longspan.data_pipeline.tokenization.hugging_face import CONFIG_NAMES, TOKENIZER_NAME, hugging_face_tokenizer
from longspan.errors import UsageError

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")  # ids 0, 1, 2
SMALLEST_VOCABULARY = len(SPECIALS) + 256 + 1
TRAIN_BYTES = 64_000_000
VOCAB_SIZE = 32_000  # unless a recipe says another


def train_bpe(texts: Iterable[bytes], vocab_size: int, train_bytes: int = TRAIN_BYTES) -> FileTokenizer:
    """Train on `texts`; the same texts give the same tokenizer, in whatever order they come.

    Args:
        texts: UTF-8, read once and never held all at once.
        vocab_size: ids in all, at least 260.
        train_bytes: bytes to train on at most: the chunks whose hashes are lowest, an even sample of all texts.

    Raises:
        UsageError: no text, text that is not UTF-8, or too little text or too few ids for the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"vocab_size = {vocab_size} is too small: byte-level BPE has 3 special tokens and 256 bytes before its "
            f"first merge. Use {SMALLEST_VOCABULARY} or more, or the tokenizer `bytes`."
        )
    sample = _sample(texts, train_bytes)
    if not sample:
        raise UsageError(
            "there is no text to train the BPE tokenizer on: all training documents are empty. Add documents, or use "
            "the tokenizer `bytes`."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once says nothing about other texts
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(byte_characters()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise UsageError(
            f"{sum(map(len, sample)):,} characters of training text give a vocabulary of {found:,}, not "
            f"{vocab_size:,}: there is no further pair that comes twice. Set vocab_size to {found} or less, or train "
            f"on more text."
        )
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIALS, strict=True))
    # so that Hugging Face's AutoTokenizer reads the folder
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    return bpe_tokenizer(
        {
            TOKENIZER_NAME: tokenizer.to_str().encode(),
            CONFIG_NAMES[0]: (json.dumps(settings, indent=2) + "\n").encode(),
        }
    )


def bpe_tokenizer(files: dict[str, bytes]) -> FileTokenizer:
    """The tokenizer of the files that `train_bpe` made.

    Raises:
        UsageError: they hold something else.
    """
    tokenizer = hugging_face_tokenizer("bpe", "bpe", files)
    if not isinstance(tokenizer.engine, ByteLevelEngine):
        raise UsageError(
            f"{TOKENIZER_NAME} is not byte-level BPE with GPT-2's pattern, so it was not trained here. Use it with "
            f"`kind: hugging_face`."
        )
    tokenizer.name = f"bpe-{tokenizer.size}"
    return tokenizer


def _sample(texts: Iterable[bytes], train_bytes: int) -> list[str]:
    """Chunks of the texts in order of their hashes; the highest are dropped until `train_bytes` are left."""
    kept: list[tuple[int, str]] = []  # a heap, highest hash first
    total = 0
    for text in texts:
        for chunk in cut(decode_utf8(text), BYTE_LEVEL):
            content = chunk.encode()
            key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
            heapq.heappush(kept, (-key, chunk))
            total += len(content)
            while total > train_bytes and len(kept) > 1:
                total -= len(heapq.heappop(kept)[1].encode())
    return [chunk for _, chunk in sorted(kept, reverse=True)]
