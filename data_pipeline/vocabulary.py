"""The byte-level vocabulary: 256 bytes, bos, eos, pad; the embedding is padded to 384 rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

BOS = 256
EOS = 257
PAD = 258
PADDED_SIZE = 384
NO_LABEL = -100  # torch's cross_entropy ignores it by default


class ByteVocabulary:
    """Bytes 0..255 are their own ids; every document is bos, its bytes, eos."""

    @staticmethod
    def description() -> dict[str, Any]:
        """What a manifest records; two vocabularies with equal descriptions give equal ids."""
        return {"name": "bytes", "bos": BOS, "eos": EOS, "pad": PAD, "padded_size": PADDED_SIZE}

    @property
    def digest(self) -> str:
        """Hex sha256 of the description."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    @staticmethod
    def encode(text: bytes) -> np.ndarray:
        """Ids of a document: uint16 [len(text) + 2], bos first, eos last."""
        ids = np.empty(len(text) + 2, dtype=np.uint16)
        ids[0], ids[-1] = BOS, EOS
        ids[1:-1] = np.frombuffer(text, dtype=np.uint8)
        return ids

    @staticmethod
    def decode(ids: Iterable[int]) -> str:
        """Text of `ids`; special and padding ids are left out, invalid UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if 0 <= int(i) < BOS).decode("utf-8", errors="replace")

    @staticmethod
    def target_bytes(labels: np.ndarray) -> np.ndarray:
        """Bytes that each scored label stands for: int32, 1 for a byte, 0 for eos and for no label."""
        return ((labels >= 0) & (labels < BOS)).astype(np.int32)
