"""What an export holds, what is refused, and that nothing half-written ever stands at its place."""

from __future__ import annotations

import ast
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from exports import MODELS, native_model, run_config, run_directory
from huggingface_hub import ModelCard
from life_server import LifeServer

sys.path.append(str(Path(__file__).resolve().parents[1] / "evaluation"))
import tiny_run

from longspan.data_pipeline.tokenization.byte_tokenizer import ByteTokenizer
from longspan.errors import CheckpointError, UsageError
from longspan.modeling.hf.source import python_files
from longspan.trainer import export, recipes
from longspan.trainer.evaluation.run import evaluate
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.export import export_checkpoint, hf_config, load_exported
from longspan.trainer.export_weights import plan_shards, tensor_sha256

FILES = {
    "README.md",
    "config.json",
    "configuration_longspan.py",
    "export_manifest.json",
    "generation_config.json",
    "longspan/padding.safetensors",
    "longspan/training.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_longspan.py",
    "tokenizer.json",
    "tokenizer_config.json",
}


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_directory(tmp_path_factory.mktemp("runs") / "run", "fixed_skip", (1, 2))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "out"
    result = export_checkpoint(run / "checkpoints" / "step-00000001", out)
    assert result["out"] == str(out) and result["step"] == 1 and result["evaluation"] is None
    return out


def test_files(exported: Path) -> None:
    assert listing(exported) == FILES
    assert list(exported.parent.iterdir()) == [exported]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in exported.rglob("*")), "readable by others"


def test_python_files_stand_alone(exported: Path) -> None:
    for name, text in python_files().items():
        assert (exported / name).read_text() == text
        modules = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                modules.add("." * node.level + (node.module or ""))
        allowed = {"functools", "importlib", "math", "typing", "collections", "torch", "transformers"}
        assert {m for m in modules if m.split(".")[0] not in allowed} <= {".configuration_longspan"}
        assert "import longspan" not in text and "from longspan" not in text


def test_class_names_avoid_what_the_library_treats_specially() -> None:
    text = "".join(python_files().values())
    names = [node.name.lower() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    assert len(names) > 10
    for part in ("mamba", "rwkv", "xlstm", "minimax", "reformer", "xlnet"):
        assert not [name for name in names if part in name]


def test_weights_are_the_checkpoints_bit_for_bit_without_padding_rows(exported: Path) -> None:
    weights = safetensors.torch.load_file(exported / "model.safetensors")
    source = dict(native_model(run_config("fixed_skip"), 1).named_parameters())
    assert weights.keys() == source.keys()
    for name, tensor in weights.items():
        expected = source[name][:259] if name == "embedding.weight" else source[name]
        assert torch.equal(tensor, expected), name
    manifest = read_json(exported / "export_manifest.json")
    assert manifest["dropped"] == [
        {"name": "embedding.weight", "rows": [259, 384], "reason": "padding of the vocabulary"}
    ]
    assert {t["name"]: (t["shape"], t["sha256"]) for t in manifest["tensors"]} == {
        name: (list(tensor.shape), tensor_sha256(tensor)) for name, tensor in weights.items()
    }
    index = read_json(exported / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(weights)


@pytest.mark.parametrize("name", MODELS)
def test_configuration(name: str) -> None:
    model, config = run_config(name).model, hf_config(run_config(name), ByteTokenizer())
    assert (config.vocab_size, config.window_tokens, config.training_tokens) == (259, model.window_tokens, 32)
    assert [block["mixer"] for block in config.blocks] == [layer.mixer for layer in model.expanded_layers()]
    assert config.state_dtype == "float32"


def test_configuration_files(exported: Path) -> None:
    config = read_json(exported / "config.json")
    assert config["auto_map"] == {
        "AutoConfig": "configuration_longspan.LongspanConfig",
        "AutoModelForCausalLM": "modeling_longspan.LongspanForCausalLM",
    }
    assert "layer_types" not in config
    generation = read_json(exported / "generation_config.json")
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (256, 257, 258)


def test_shards(run: Path, tmp_path: Path, exported: Path) -> None:
    export_checkpoint(run / "checkpoints" / "step-00000001", tmp_path / "out", max_shard_bytes=12_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert sorted(set(index["weight_map"].values())) == shards
    whole = load_exported(exported).state_dict()
    assert all(
        torch.equal(tensor, whole[name]) for name, tensor in load_exported(tmp_path / "out").state_dict().items()
    )


def test_plan_of_shards() -> None:
    assert plan_shards({"a": 3, "b": 3, "c": 9, "d": 1, "e": 4}, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards({"a": 9, "b": 9}, 6) == [["a"], ["b"]]


def test_newest_checkpoint_of_a_run(run: Path, tmp_path: Path) -> None:
    assert export_checkpoint(run, tmp_path / "deeper" / "out")["step"] == 2


def test_card_with_the_measured_curve(tmp_path: Path) -> None:
    run = tiny_run.run_directory(tmp_path / "run", tiny_run.config(tiny_run.corpus(tmp_path)), (1, 2))
    spec = recipes.load(EvaluationSpec, tiny_run.spec_file(tmp_path))
    earlier, newest = run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000002"
    result = evaluate(earlier, spec)
    assert export_checkpoint(newest, tmp_path / "before")["evaluation"] is None, "the result of another checkpoint"
    assert export_checkpoint(earlier, tmp_path / "out")["evaluation"] == result["key"]
    assert listing(tmp_path / "out") == FILES | {"curve.png", "eval/ppl_vs_length.json"}
    _, head, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    points = [(point["mode"], point["context_tokens"]) for point in result["curve"]]
    entries = yaml.safe_load(head)["model-index"][0]["results"]
    found = [(e["dataset"]["args"]["mode"], e["dataset"]["args"]["context"]) for e in entries]
    assert found == [*points, ("carried", "whole document")] and ("truncated", 64) in points
    assert [e["metrics"][0]["value"] for e in entries[:-1]] == [point["bits_per_byte"] for point in result["curve"]]
    parsed = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert parsed is not None and [entry.metric_value for entry in parsed] == [
        *(point["bits_per_byte"] for point in result["curve"]),
        result["carried"]["bits_per_byte"],
    ]
    gain = result["memory_gain"]["bits_per_byte"]
    assert f"{gain:+.4f}" in body
    fingerprint = result["checkpoint"]["fingerprint"]
    for fact in (fingerprint, "16 tokens a segment", "8 tokens", "float32", "vLLM", "![Bits per byte"):
        assert fact in body, fact
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert read_json(tmp_path / "out" / "eval" / "ppl_vs_length.json")["curve"] == result["curve"]


def test_existing_target_is_refused_and_untouched(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"exists.*--overwrite"):
        export_checkpoint(run, tmp_path / "out")
    with pytest.raises(UsageError, match="not an earlier export"):
        export_checkpoint(run, tmp_path / "out", overwrite=True)
    assert listing(tmp_path) == {"out/mine.txt"}


def test_overwrite_replaces_an_earlier_export(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run / "checkpoints" / "step-00000001", tmp_path / "out")
    export_checkpoint(run, tmp_path / "out", overwrite=True)
    assert read_json(tmp_path / "out" / "export_manifest.json")["checkpoint"]["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_target_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        export_checkpoint(run, tmp_path / "file" / "out")


def test_damaged_checkpoint_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", "sliding_window")
    part = next((run / "checkpoints").rglob("weights/*.safetensors"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=part.name):
        export_checkpoint(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("change", ["missing", "left over", "other numbers"])
def test_export_that_does_not_load_back_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    write = export.write_shards

    def wrong(tensors: dict[str, torch.Tensor], *args: Any) -> Any:
        tensors = dict(tensors)
        if change == "missing":
            del tensors["final_norm.scale"]
        elif change == "left over":
            tensors["backbone.extra"] = torch.zeros(1)
        else:
            tensors["final_norm.scale"] = tensors["final_norm.scale"] + 1e-7
        return write(tensors, *args)

    monkeypatch.setattr(export, "write_shards", wrong)
    with pytest.raises(CheckpointError, match="does not load back"):
        export_checkpoint(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["write_shards", "write_card", "write_origin", "verify_export"])
def test_killed_export_shows_nothing_and_the_next_cleans_up(
    export_server: LifeServer, run: Path, tmp_path: Path, place: str
) -> None:
    log = run.parent / "messages"
    request = {"run": str(run), "out": str(tmp_path / "out"), "point": None, "instead_of": place, "exchanges": True}
    assert export_server.live(**request, log=str(log)) == -signal.SIGKILL, log.read_text()
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    export_checkpoint(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_loading_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {}}')
    with pytest.raises(UsageError, match="model_type"):
        load_exported(tmp_path)
