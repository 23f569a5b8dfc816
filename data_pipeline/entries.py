"""What a manifest says of one document, shard, source or vocabulary. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from longspan.errors import SecurityError

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Split = Literal["train", "held_out"]
TokenDtype = Literal["uint8", "uint16", "uint32"]
TokenizerKind = Literal["bytes", "bpe", "sentencepiece", "hugging_face"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def plain_file_name(url: str) -> str:
    """`url` if it is the name of a file beside the manifest.

    Raises:
        SecurityError: it could run a command or leave the folder.
    """
    if not url or "/" in url or "\\" in url or ":" in url or url.startswith("."):
        raise SecurityError(f"the manifest names the file {url!r}; only plain file names beside it are allowed.")
    return url


class ShardEntry(_Entry):
    """One tar file. `url` is a file name beside the manifest; `size` in bytes."""

    url: Annotated[str, AfterValidator(plain_file_name)]
    size: int = Field(ge=0)
    sha256: Sha256


class DocumentEntry(_Entry):
    """One document.

    Attributes:
        id: `source/name`, unique in the corpus.
        group: near-duplicates share a group; the document's own id if it has none.
        num_tokens: with bos and eos. num_bytes: of the UTF-8 text.
        shard: url of its shard. offset, size: of the text (byte corpora) or the token ids in the shard, bytes.
        lengths_offset: of the bytes of each token, uint16 [num_tokens], in the shard; 0 in byte corpora.
        sha256: of the text; of the token ids followed by the bytes of each token in other corpora.
    """

    id: str
    source: str
    group: str
    split: Split
    licence: str
    num_tokens: int = Field(ge=2)
    num_bytes: int = Field(ge=0)
    shard: str
    offset: int = Field(ge=0)
    lengths_offset: int = Field(0, ge=0)
    size: int = Field(ge=0)
    sha256: Sha256


class SourceEntry(_Entry):
    """One source: its name, kind, licence and origin with version, e.g. `Python 3.11.7 standard library`."""

    name: str
    kind: str
    licence: str
    origin: str


class VocabularyEntry(_Entry):
    """The vocabulary that turns text into token ids.

    Attributes:
        padded_size: rows of the embedding. size: ids are below it.
        token_dtype: of the token ids in the shards, little-endian; uint8: the text itself is there.
        digest: of everything that decides ids and lengths.
    """

    name: str
    bos: int
    eos: int
    pad: int
    padded_size: int
    digest: Sha256
    kind: TokenizerKind
    size: int
    token_dtype: TokenDtype
