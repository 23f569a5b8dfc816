"""`longspan generate`: the same seed gives the same text, from a checkpoint and from its export."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from exports import run_directory

from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.errors import UsageError
from longspan.trainer.cli import build_parser, main
from longspan.trainer.commands import generate as command
from longspan.trainer.export import export_checkpoint, load_exported
from longspan.trainer.generation import as_text, choose, generate

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("generate")
    run = run_directory(root / "run", "hybrid")
    export_checkpoint(run, root / "export")
    return {"run": run, "checkpoint": run / "checkpoints" / "step-00000001", "export": root / "export"}


def arguments(model: Path, *more: str) -> argparse.Namespace:
    return build_parser().parse_args(["generate", str(model), "--prompt", "In the beginning é", *more])


def text(model: Path, *more: str) -> dict[str, Any]:
    return command.run(arguments(model, "--json", "--max-new-tokens", "40", *more))


@pytest.mark.parametrize("options", [("--seed", "3"), ("--temperature", "0"), ("--top-p", "0.5", "--temperature", "2")])
def test_checkpoint_run_and_export_agree(models: dict[str, Path], options: tuple[str, ...]) -> None:
    results = {kind: text(path, *options) for kind, path in models.items()}
    assert results["run"]["text"] == results["checkpoint"]["text"] == results["export"]["text"] != ""
    assert results["run"]["kind"] == "checkpoint" and results["export"]["kind"] == "export"
    assert results["run"]["tokens"] == 40 and results["run"]["finish_reason"] == "length"


def test_seed_decides(models: dict[str, Path]) -> None:
    assert text(models["run"], "--seed", "1")["text"] == text(models["run"], "--seed", "1")["text"]
    assert text(models["run"], "--seed", "1")["text"] != text(models["run"], "--seed", "2")["text"]


def test_streams_prompt_and_text(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    result = command.run(arguments(models["run"], "--max-new-tokens", "12"))
    assert capsys.readouterr().out == result["prompt"] + result["text"] + "\n"


def test_bad_numbers_are_all_listed(models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"--max-new-tokens 0.*--temperature -1.0.*--top-p 0.0"):
        command.run(arguments(models["run"], "--max-new-tokens", "0", "--temperature", "-1", "--top-p", "0"))


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        command.run(arguments(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="neither a checkpoint"):
        command.run(arguments(tmp_path))


def drop_a_tensor(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights.pop("final_norm.scale")
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rename_a_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["blocks"][0]["mixer"] = "telepathy"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), 70, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), 70, "cannot be loaded"),
        (drop_a_tensor, 70, "missing_keys: ['final_norm.scale']"),
        (rename_a_layer, 2, "mixer 'telepathy'"),
        (lambda folder: (folder / "export_manifest.json").write_text("{}"), 2, "does not name the tokenizer"),
    ],
    ids=["weights", "no weights", "a tensor", "another layer", "manifest"],
)
def test_damaged_exports_say_what_is_wrong(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, code: int, message: str
) -> None:
    shutil.copytree(models["export"], tmp_path / "export")
    damage(tmp_path / "export")
    assert main(["generate", str(tmp_path / "export"), "--prompt", "x", "--max-new-tokens", "2", "--json"]) == code
    assert message in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]


def test_a_folder_that_transformers_saved_is_to_be_converted(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the remedy of the message works."""
    saved, back = str(tmp_path / "saved"), str(tmp_path / "back")
    load_exported(models["export"]).save_pretrained(saved)
    assert main(["generate", saved, "--prompt", "x", "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert f"longspan checkpoint convert {saved} RUN" in error
    assert main(["checkpoint", "convert", saved, back]) == 0
    assert text(tmp_path / "back")["text"] == text(models["export"])["text"] != ""


def test_text_comes_as_characters_are_complete() -> None:
    assert list(as_text("aé😀".encode(), BYTES)) == ["a", "é", "😀"]
    assert "".join(as_text([65, 0xFF, 66, 0xC3], BYTES)) == "A\ufffdB\ufffd"


def test_choice() -> None:
    logits = torch.full((384,), -9.0)
    logits[[65, 66, 256, 258, 300]] = torch.tensor([5.0, 4.0, 99.0, 99.0, 99.0])
    draws = torch.Generator().manual_seed(0)
    assert choose(logits, BYTES, 0, 1, draws) == 65
    assert {choose(logits, BYTES, 1.0, 0.5, draws) for _ in range(50)} == {65}
    assert {choose(logits, BYTES, 1.0, 0.99, draws) for _ in range(200)} == {65, 66}


def test_eos_ends_the_text() -> None:
    class Fixed:
        def read(self, tokens: list[int]) -> torch.Tensor:
            logits = torch.zeros(259)
            logits[257 if tokens == [65] else 65] = 9
            return logits

    assert list(generate(Fixed(), BYTES, b"x", max_new_tokens=9, temperature=0, top_p=1, seed=0)) == [65]
