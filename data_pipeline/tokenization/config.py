"""Which tokenizer a corpus is stored with. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BytesTokenizerConfig(_Schema):
    """Every byte of the UTF-8 text is a token."""

    kind: Literal["bytes"] = "bytes"


class BpeTokenizerConfig(_Schema):
    """Byte-level byte-pair encoding, trained on the corpus itself unless `path` names a trained one."""

    kind: Literal["bpe"]
    vocab_size: int | None = Field(
        None,
        ge=260,
        description="ids in all: 3 specials, 256 bytes and the merges; above 65,535 ids take 4 bytes; 32,000 if it is "
        "trained, those of the tokenizer at `path` if that is set",
    )
    train_bytes: int = Field(
        64_000_000, ge=1, description="text that training looks at, an even sample of the training documents"
    )
    path: str | None = Field(None, min_length=1, description="folder of a tokenizer saved earlier; trained if unset")


class SentencePieceTokenizerConfig(_Schema):
    """A SentencePiece model file."""

    kind: Literal["sentencepiece"]
    path: str = Field(min_length=1, description="model file, or folder with one *.model (also tokenizer.model.v1 etc.)")


class HuggingFaceTokenizerConfig(_Schema):
    """A tokenizer in the form of the Hugging Face `tokenizers` library."""

    kind: Literal["hugging_face"]
    path: str = Field(min_length=1, description="folder with tokenizer.json, or that file")


TokenizerConfig = Annotated[
    BytesTokenizerConfig | BpeTokenizerConfig | SentencePieceTokenizerConfig | HuggingFaceTokenizerConfig,
    Field(discriminator="kind"),
]
