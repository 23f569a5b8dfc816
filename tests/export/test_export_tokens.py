"""Exports of models of subword tokens: all rows that stand for something, a tokenizer with equal ids, or a refusal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import token_corpora
import torch
from exports import native_logits, native_model, run_config, run_directory
from tokenizers import Tokenizer as Library
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan.data_pipeline.tokenization import make_tokenizer
from longspan.data_pipeline.tokenization.base import Tokenizer
from longspan.data_pipeline.tokenization.config import HuggingFaceTokenizerConfig, SentencePieceTokenizerConfig
from longspan.errors import UsageError
from longspan.modeling.hf import tokenizer as hf_tokenizer
from longspan.trainer import export_tokenizer
from longspan.trainer.cli import build_parser, main
from longspan.trainer.commands import generate as command
from longspan.trainer.export import export_checkpoint
from longspan.trainer.generation import as_text

KINDS = ("bpe", "pieces")
TEXTS = [
    "In the beginning",
    " the king said: naïve 日本 👑\n\n",
    "a<|bos|>b<|eos|>",
    "",
    *map(bytes.decode, token_corpora.texts().values()),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: token_corpora.tokenizer(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def places(tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Run directory and export of a model of each kind of tokens."""
    found = {}
    for kind, tokenizer in tokenizers.items():
        root = tmp_path_factory.mktemp(kind)
        run = run_directory(root / "run", "hybrid", tokenizer=tokenizer)
        export_checkpoint(run, root / "export")
        found[kind] = run, root / "export"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_token_is_there(
    places: dict[str, tuple[Path, Path]], tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer, (_, out) = tokenizers[kind], places[kind]
    config = json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    assert config["vocab_size"] == tokenizer.size > 259
    for found in (config, generation):
        assert [found[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.pad,
        ]
    rows = safetensors.torch.load_file(out / "model.safetensors")["embedding.weight"]
    native = native_model(run_config("hybrid"), 1)
    assert torch.equal(rows, dict(native.named_parameters())["embedding.weight"][: tokenizer.size])
    ids = torch.from_numpy(tokenizer.encode(TEXTS[1].encode()).ids.astype("int64"))[None, :-1]
    model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    with torch.no_grad():
        difference = model(ids).logits - native_logits(native, ids)[..., : tokenizer.size]
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_tokenizer_gives_the_ids_of_training(
    places: dict[str, tuple[Path, Path]], tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer, (_, out) = tokenizers[kind], places[kind]
    exported = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert len(exported) == tokenizer.size
    for text in TEXTS:
        ids = exported(text)["input_ids"]
        assert ids == tokenizer.encode(text.encode()).ids[:-1].tolist()
        assert exported.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", KINDS)
def test_run_and_export_write_the_same_text(places: dict[str, tuple[Path, Path]], kind: str) -> None:
    texts = []
    for folder in places[kind]:
        arguments = ["generate", str(folder), "--prompt", "the king 日", "--max-new-tokens", "90", "--json"]
        result = command.run(build_parser().parse_args(arguments))
        assert result["tokens"] > 1
        texts.append(result["text"])
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_text_of_all_ids(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text.encode()).ids[1:-1].tolist()
        for cut in (0, len(ids) // 2):
            before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
            streamed = list(as_text(ids[cut:], tokenizer, ids[:cut]))
            assert before + "".join(streamed) == text
            assert not any("\ufffd" in piece for piece in streamed)


def test_the_card_names_the_tokenizer(places: dict[str, tuple[Path, Path]]) -> None:
    card = (places["bpe"][1] / "README.md").read_text()
    assert "bpe-300: 300 ids, bos 0, eos 1, pad 2" in card and "byte-level" not in card.lower()
    manifest = json.loads((places["bpe"][1] / "export_manifest.json").read_text())
    assert manifest["tokenizer"]["kind"] == "bpe" and manifest["dropped"][0]["rows"] == [300, 384]


def test_sentence_piece_is_refused_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.decode() for text in token_corpora.texts().values()),
        model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "words.model").write_bytes(model.getvalue())
    tokenizer = make_tokenizer(SentencePieceTokenizerConfig(kind="sentencepiece", path=str(tmp_path / "words.model")))
    run = run_directory(tmp_path / "run", "sliding_window", tokenizer=tokenizer)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "cannot be exported in the form of Hugging Face" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    result = command.run(
        build_parser().parse_args(["generate", str(run), "--prompt", "the king", "--max-new-tokens", "20", "--json"])
    )
    assert result["tokens"] > 0


def test_a_model_with_fewer_rows_than_ids_is_refused(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", "sliding_window", tokenizer=token_corpora.bpe(), vocab_size=256)
    with pytest.raises(UsageError, match="256 rows for the 300 ids"):
        export_checkpoint(run, tmp_path / "out")


@pytest.mark.parametrize("planted", ["special tokens swapped", "no bos", "another vocabulary"])
def test_a_tokenizer_with_other_ids_is_not_published(
    places: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    right = hf_tokenizer.subword_tokenizer

    def wrong(content: str, ids: dict[str, int]) -> Any:
        if planted == "special tokens swapped":
            ids = {**ids, "bos_token": ids["eos_token"], "eos_token": ids["bos_token"]}
        made = right(content, ids)
        if planted == "no bos":
            made.backend_tokenizer.post_processor = None
        if planted == "another vocabulary":
            made = right(token_corpora_json(), {"bos_token": 0, "eos_token": 1, "pad_token": 2})
        return made

    def token_corpora_json() -> str:
        other = token_corpora.tokenizer("other_bpe", tmp_path / "files")
        other.save(tmp_path / "other")
        return (tmp_path / "other" / "tokenizer.json").read_text()

    monkeypatch.setattr(export_tokenizer, "subword_tokenizer", wrong)
    with pytest.raises(UsageError, match="cannot be exported in the form of Hugging Face"):
        export_checkpoint(places["bpe"][0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_puts_tokens_around_texts_starts_with_bos_alone(tmp_path: Path) -> None:
    files = tmp_path / "files"
    token_corpora.pieces(files)
    library = Library.from_file(str(files / "tokenizer.json"))
    library.add_special_tokens(["[CLS]"])
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [CLS]", special_tokens=[("[CLS]", library.token_to_id("[CLS]"))]
    )
    library.enable_truncation(4)
    library.enable_padding(length=9)
    library.save(str(files / "tokenizer.json"))
    tokenizer = make_tokenizer(HuggingFaceTokenizerConfig(kind="hugging_face", path=str(files)))
    export_checkpoint(run_directory(tmp_path / "run", "sliding_window", tokenizer=tokenizer), tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported(TEXTS[1])["input_ids"] == tokenizer.encode(TEXTS[1].encode()).ids[:-1].tolist()
