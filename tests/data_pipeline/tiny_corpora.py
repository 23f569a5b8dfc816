"""Small corpora for the tests: built ones on disk, and manifests of lengths alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import yaml
from packed_corpora import HELD_OUT, TEXTS, counting

from longspan.data_pipeline.build import BuildResult, build_corpus
from longspan.data_pipeline.corpus_config import CorpusConfig
from longspan.data_pipeline.manifest import DocumentEntry, Manifest, ShardEntry, SourceEntry

__all__ = ["HELD_OUT", "TEXTS", "counting"]  # for those who build corpora of them


def write_folder(folder: Path, texts: dict[str, bytes] = TEXTS) -> Path:
    """Write `texts` below `folder`."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def recipe(folder: Path, **changes: object) -> dict[str, object]:
    """A recipe with two folder sources, `letters` and `poems`."""
    sources = [
        {"kind": "folder", "name": name, "path": str(folder / name), "licence": "CC0-1.0"}
        for name in ("letters", "poems")
    ]
    return {"name": "tiny", "sources": sources, "held_out": list(HELD_OUT), "shard_bytes": 300, **changes}


def write_recipe(path: Path, content: dict[str, object]) -> str:
    """Write a recipe as YAML; returns its path."""
    path.write_text(yaml.safe_dump(content))
    return str(path)


def build(tmp_path: Path, out: str = "corpus", texts: dict[str, bytes] = TEXTS, **changes: object) -> BuildResult:
    """Build the corpus of `texts` into `tmp_path`/`out`."""
    folder = write_folder(tmp_path / "texts", texts)
    config = CorpusConfig.model_validate(recipe(folder, **changes))
    return build_corpus(config, tmp_path / out, progress=lambda line: None)


def manifest_of_lengths(lengths: dict[str, list[int]]) -> Manifest:
    """A manifest with documents of these many tokens per source, and no shards on disk."""
    documents, offset = [], 0
    for source, tokens in lengths.items():
        for number, length in enumerate(tokens):
            name = f"{source}/{number}"
            documents.append(
                DocumentEntry(
                    id=name,
                    source=source,
                    group=name,
                    split="train",
                    licence="CC0-1.0",
                    num_tokens=length,
                    num_bytes=length - 2,
                    shard="train-00000.tar",
                    offset=offset,
                    size=length - 2,
                    sha256=hashlib.sha256(name.encode()).hexdigest(),
                )
            )
            offset += length
    sources = [SourceEntry(name=name, kind="folder", licence="CC0-1.0", origin="folder") for name in lengths]
    shard = ShardEntry(url="train-00000.tar", size=offset, sha256="0" * 64)
    return Manifest.create(Path("nowhere"), "lengths", sources, [shard], documents)
