"""The byte vocabulary as a tokenizer that AutoTokenizer loads from an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}


def byte_tokenizer(bos: int, eos: int, pad: int) -> PreTrainedTokenizerFast:
    """Ids 0..255 are the bytes of the UTF-8 text; encoding puts bos in front, `add_special_tokens=False` leaves it out.

    Text that looks like a special token stays text: every string survives encoding and decoding.

    Args:
        bos, eos, pad: their ids, above 255.
    """
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    ids = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    vocabulary |= {SPECIAL_TOKENS[name]: number for name, number in ids.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[(SPECIAL_TOKENS["bos_token"], bos)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS.values()])
    tokenizer.encode_special_tokens = True
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def subword_tokenizer(content: str, ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """The tokenizer of a tokenizer.json, with bos in front and with the special tokens that a model was trained with.

    Special tokens that it does not have are added behind its vocabulary. What it put around texts by itself (e.g.
    `[CLS]`), truncation and padding are left out: the model never saw them.

    Args:
        content: of tokenizer.json. ids: of `bos_token`, `eos_token` and `pad_token`.

    Raises:
        ValueError: a special token cannot get its id.
    """
    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    names = {}
    for name, number in sorted(ids.items(), key=lambda item: item[1]):
        text = tokenizer.id_to_token(number) or SPECIAL_TOKENS[name]
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        if tokenizer.token_to_id(text) != number:
            raise ValueError(f"{text} would have the id {tokenizer.token_to_id(text)}, not {number}")
        names[name] = text
    bos = names["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids["bos_token"])]
    )
    tokenizer.encode_special_tokens = True
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, as a stranger would load it: without leave to run code."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
