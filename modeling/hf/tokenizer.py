"""The byte vocabulary as a tokenizer that AutoTokenizer loads from an export."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

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


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
