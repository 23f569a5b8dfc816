"""Byte-level BPE through tiktoken's engine, with the ids that the `tokenizers` library gives, several times as fast."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from longspan.data_pipeline.tokenization.chunks import BYTE_LEVEL, cut

_THREADED_CHARS = 2**20  # shorter texts are done before threads pay
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes each byte 0..255 as (GPT-2's table)."""
    table = {byte: chr(byte) for byte in _PRINTABLE}
    rest = (byte for byte in range(256) if byte not in table)
    table.update((byte, chr(256 + number)) for number, byte in enumerate(rest))
    return [table[byte] for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


def token_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for.

    Raises:
        KeyError: a character is not one of the 256.
    """
    return bytes(_BYTE_OF[character] for character in token)


class ByteLevelEngine:
    """Encodes and decodes with tiktoken. Cuts texts by `chunks.BYTE_LEVEL`.

    tiktoken merges the pair whose joined bytes have the lowest rank, `tokenizers` the pair that comes first in its list
    of merges. Both give the same tokens for every text if each token is made by one merge, has the rank of that merge,
    and is what `tokenizers` makes of the token's own bytes: the bytes between two places where a text stays cut are
    merged as if they stood alone, so a pair that tiktoken would merge and `tokenizers` would not can never come up.
    """

    rule = BYTE_LEVEL.name
    unknown: int | None = None  # every byte is a token

    def __init__(self, ids: dict[bytes, int], ranks: dict[bytes, int]) -> None:
        """Args: ids: of each token's bytes. ranks: order of merging of the same tokens; single bytes come first."""
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's pattern; importing it downloads nothing

        rows = max(ranks.values()) + 1
        # never allowed, so never found; but without any, tiktoken tries the empty text as one at every character
        self._encoding = tiktoken.Encoding(
            "longspan", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|never|>": rows}
        )
        self._id_of_rank = np.zeros(rows, dtype=np.uint32)
        self._bytes_of_rank = np.zeros(rows, dtype=np.uint16)
        for token, rank in ranks.items():
            self._id_of_rank[rank] = ids[token]
            self._bytes_of_rank[rank] = len(token)
        self._token_of_id = {ids[token]: token for token in ranks}

    def encode(self, text: str, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids uint32 [n] and bytes per token uint16 [n] of `text`, which is never searched for special tokens."""
        chunks = cut(text, BYTE_LEVEL)
        if threads > 1 and len(text) >= _THREADED_CHARS:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(self._ranks, chunks))
        else:
            parts = [self._ranks(chunk) for chunk in chunks]
        ranks = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
        return self._id_of_rank[ranks], self._bytes_of_rank[ranks]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; ids that no text has are left out."""
        return b"".join(self._token_of_id.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def _ranks(self, chunk: str) -> np.ndarray:
        return np.asarray(self._encoding.encode_to_numpy(chunk, disallowed_special=()))


def byte_level_engine(tokenizer: Any) -> ByteLevelEngine | None:
    """The engine for a `tokenizers.Tokenizer`, or None if it is not byte-level BPE with GPT-2's pattern.

    Args:
        tokenizer: its normaliser, pre-tokenizer, model and added tokens decide; its post-processor is not looked at.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    if not _has_gpt2_form(content) or not set(byte_characters()) <= model["vocab"].keys():
        return None
    merged = ["".join(pair) for pair in model["merges"]]
    if len(set(merged)) != len(merged):
        return None
    vocabulary = model["vocab"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for number, token in enumerate(merged):
        # a token that its own bytes do not lead to never comes out of any text
        if [part.value for part in tokenizer.model.tokenize(token)] == [token]:
            ranks[token_bytes(token)] = 256 + number
    ids = {token_bytes(token): i for token, i in vocabulary.items() if _BYTE_OF.keys() >= set(token)}
    if max(map(len, ranks)) > np.iinfo(np.uint16).max:
        return None
    return ByteLevelEngine({token: ids[token] for token in ranks}, ranks)


def _has_gpt2_form(content: dict[str, Any]) -> bool:
    model, pre_tokenizer = content["model"], content["pre_tokenizer"] or {}
    if pre_tokenizer.get("type") == "Sequence" and len(pre_tokenizer["pretokenizers"]) == 1:
        pre_tokenizer = pre_tokenizer["pretokenizers"][0]
    changed = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    return (
        content["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and not pre_tokenizer["add_prefix_space"]
        and pre_tokenizer["use_regex"]
        and model.get("type") == "BPE"
        and not any(model.get(setting) for setting in changed)
        # text that holds the words of an added token which is not special is encoded to that token
        and all(token["special"] for token in content["added_tokens"])
    )
