"""The tokenizer of an export: written as a Hugging Face tokenizer, proved to give the same ids, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.data_pipeline.tokenization import make_tokenizer
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.data_pipeline.tokenization.config import HuggingFaceTokenizerConfig
from longspan.data_pipeline.tokenization.hugging_face import TOKENIZER_NAME
from longspan.errors import UsageError
from longspan.modeling.hf.tokenizer import byte_tokenizer, load_tokenizer, subword_tokenizer
from longspan.trainer.checkpoint import contents
from longspan.trainer.export_origin import EXPORT_MANIFEST

_PROBES = (
    "",
    "In the beginning was the Word",
    " two  spaces,\ta tab\n\nand lines\r\n",
    "it wasn't 2 long; naïve cafés — 日本 — 👩‍👩‍👧 e\u0301",
    "def f(x_1, y):\n    return {'a': [x_1 ** 2, None]}\n",
)


def write_tokenizer(checkpoint: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face form of a checkpoint's tokenizer to `folder`, and prove that it gives the same ids.

    Raises:
        UsageError: it has no such form, or not one with the same ids.
    """
    _hugging_face_form(checkpoint, tokenizer).save_pretrained(folder)
    if tokenizer.kind == "bytes":
        return
    written = load_tokenizer(folder)
    again = make_tokenizer(HuggingFaceTokenizerConfig(kind="hugging_face", path=str(folder)))
    problems = [
        f"{name} is {getattr(again, name)}, not {getattr(tokenizer, name)}"
        for name in ("bos", "eos", "pad", "size")
        if getattr(again, name) != getattr(tokenizer, name)
    ]
    for text in _PROBES:
        expected = tokenizer.encode(text.encode()).ids
        if written(text)["input_ids"] != expected[:-1].tolist() or again.encode(text.encode()).ids.tolist() != (
            expected.tolist()
        ):
            problems.append(f"other ids for {text!r}")
    if problems:
        raise _refusal(tokenizer, "; ".join(problems))


def read_exported_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an exported folder.

    Raises:
        UsageError: its files cannot be read.
    """
    if not (folder / EXPORT_MANIFEST).exists():
        raise UsageError(
            f"{folder} holds no {EXPORT_MANIFEST}: Transformers saved it, or it was copied in part, and which "
            f"tokenizer it takes is not certain. Make a run of it with `longspan checkpoint convert {folder} RUN` and "
            "use RUN."
        )
    try:
        kind = json.loads((folder / EXPORT_MANIFEST).read_text(encoding="utf-8"))["tokenizer"]["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / EXPORT_MANIFEST} does not name the tokenizer. Export the model again.") from error
    if kind == "bytes":
        return ByteTokenizer()
    return make_tokenizer(HuggingFaceTokenizerConfig(kind="hugging_face", path=str(folder)))


def _hugging_face_form(checkpoint: Path, tokenizer: Tokenizer) -> Any:
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    if tokenizer.kind == "bytes":
        return byte_tokenizer(tokenizer.bos, tokenizer.eos, tokenizer.pad)
    if tokenizer.kind == "sentencepiece":
        raise _refusal(tokenizer, "a SentencePiece model has none with ids that are equal for every text")
    content = (checkpoint / contents.TOKENIZER / TOKENIZER_NAME).read_text(encoding="utf-8")
    try:
        return subword_tokenizer(content, ids)
    except ValueError as error:
        raise _refusal(tokenizer, str(error)) from error


def _refusal(tokenizer: Tokenizer, reason: str) -> UsageError:
    return UsageError(
        f"the tokenizer {tokenizer.name} cannot be exported in the form of Hugging Face: {reason}. `longspan generate` "
        f"and `longspan evaluate` take the checkpoint itself; for an export, build the corpus with a tokenizer of kind "
        f"bytes, bpe or hugging_face."
    )
