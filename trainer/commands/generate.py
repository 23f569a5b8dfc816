"""`longspan generate`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.errors import UsageError
from longspan.trainer.checkpoint.load import load_model, read_tokenizer
from longspan.trainer.generation import Decoder, ExportedDecoder, NativeDecoder, as_text, check_sampling, generate


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Stream prompt and continuation to standard output; the result has the continuation and how it was made."""
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    decoder, tokenizer, source = open_decoder(Path(args.model), "cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    ids: list[int] = []
    prompt = args.prompt.encode("utf-8", errors="surrogateescape")
    stream = generate(
        decoder,
        tokenizer,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    if not args.json:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may know fewer characters
        print(args.prompt, end="", flush=True)
    pieces = []
    before = tokenizer.encode(prompt).ids[:-1].tolist()
    for piece in as_text(_recorded(stream, ids), tokenizer, before):
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    if not args.json:
        print()
    seconds = time.monotonic() - started
    return {
        **source,
        "prompt": args.prompt.encode("utf-8", errors="replace").decode(),
        "text": "".join(pieces),
        "tokens": len(ids),
        "finish_reason": "length" if len(ids) == args.max_new_tokens else "eos",
        "seed": args.seed,
        "seconds": seconds,
    }


def open_decoder(path: Path, device: str) -> tuple[Decoder, Tokenizer, dict[str, Any]]:
    """A model at the start of a document, its tokenizer, and what it was read from.

    Args:
        path: exported folder, checkpoint folder or run directory.
        device: where the model runs.

    Raises:
        UsageError: it is none of the three, or its tokenizer cannot be used here.
        CheckpointError: a checkpoint that does not verify.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist. Give an exported folder, a checkpoint or a run directory.")
    if (path / "config.json").is_file():
        # transformers takes seconds to load, and only an export needs it
        from longspan.trainer.export import check_exported, load_exported
        from longspan.trainer.export_tokenizer import read_exported_tokenizer

        check_exported(path)
        tokenizer = read_exported_tokenizer(path)
        exported = ExportedDecoder(load_exported(path, device), device)
        return exported, tokenizer, {"model": str(path), "kind": "export"}
    loaded = load_model(path, device)
    source = {"model": str(loaded.path), "kind": "checkpoint", "step": loaded.step, "fingerprint": loaded.fingerprint}
    return NativeDecoder(loaded.model, device), read_tokenizer(loaded.path), source


def _recorded(stream: Any, ids: list[int]) -> Any:
    for token in stream:
        ids.append(token)
        yield token
