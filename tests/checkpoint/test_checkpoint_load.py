"""A model from a checkpoint, and the command that verifies checkpoints."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_states import tiny_state

from longspan.errors import CheckpointError, UsageError
from longspan.modeling.model import build_model
from longspan.trainer import cli, recipes
from longspan.trainer.checkpoint.load import load_model
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import fingerprint
from longspan.trainer.config import RunConfig

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "dim": 16,
        "num_heads": 2,
        "head_dim": 8,
        "ffn_dim": 32,
        "window_tokens": 8,
        "layers": [{"mixer": "sliding_window"}, {"mixer": "block_recurrent", "num_states": 4}],
    },
    "data": {"shards": "nowhere", "segment_tokens": 16},
    "training": {"steps": 10},
}


def save_model(run_dir: Path, step: int = 10, recipe: dict[str, Any] = RECIPE) -> torch.nn.Module:
    """A fresh model saved as the checkpoint of a run."""
    config = RunConfig.model_validate(recipe)
    torch.manual_seed(step)
    model = build_model(config.model)
    state = tiny_state(step)
    state.weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    state.optimizer = {}
    state.config_yaml = recipes.dump(config)
    assert CheckpointStore(run_dir / "checkpoints").save(state).ok
    return model


def test_the_model_is_the_one_that_was_saved(tmp_path: Path) -> None:
    save_model(tmp_path, 5)
    model = save_model(tmp_path, 10).eval()
    before = torch.get_rng_state()
    loaded = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
    assert loaded.path == tmp_path / "checkpoints" / "step-00000010" and loaded.step == 10
    assert loaded.config.name == "tiny" and loaded.fingerprint == fingerprint(loaded.path)
    assert not loaded.model.training
    tokens, reset = torch.randint(0, 256, (2, 16)), torch.tensor([[True, False]] * 2)
    expected, _, _ = model(tokens, model.init_state(2, "cpu"), reset=reset)
    actual, _, _ = loaded.model(tokens, loaded.model.init_state(2, "cpu"), reset=reset)
    assert torch.equal(actual, expected)


def test_an_older_checkpoint_can_be_named(tmp_path: Path) -> None:
    model = save_model(tmp_path, 5)
    save_model(tmp_path, 10)
    loaded = load_model(str(tmp_path / "checkpoints" / "step-00000005"))
    assert loaded.step == 5
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("name", ["weights/part-00000-00000.safetensors", "rng.json", "config.yaml"])
def test_damage_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    save_model(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000010" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}, bytes 0-{len(content) - 1}") as caught:
        load_model(tmp_path)
    assert caught.value.exit_code == 70


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "small", 10)
    state, _ = CheckpointStore(tmp_path / "small" / "checkpoints").load_newest(0, 4)
    narrow = {**RECIPE, "model": {**RECIPE["model"], "ffn_dim": 24, "layers": RECIPE["model"]["layers"][:1]}}
    state.config_yaml = recipes.dump(RunConfig.model_validate(narrow))
    assert CheckpointStore(tmp_path / "mixed" / "checkpoints").save(state).ok
    with pytest.raises(CheckpointError, match="does not fit its own config") as caught:
        load_model(tmp_path / "mixed")
    assert "unknown to the model" in str(caught.value) and "24]" in str(caught.value)


def test_a_configuration_of_another_version_is_refused(tmp_path: Path) -> None:
    state = tiny_state(1)
    state.config_yaml = "name: tiny\nwarp_drive: 9\n"
    assert CheckpointStore(tmp_path / "checkpoints").save(state).ok
    with pytest.raises(CheckpointError, match="warp_drive"):
        load_model(tmp_path)


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist") as caught:
        load_model(tmp_path / "nothing")
    assert caught.value.exit_code == 2


class TestVerifyCommand:
    def run(self, path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
        code = cli.main(["checkpoint", "verify", str(path), *options])
        out, err = capsys.readouterr()
        return code, out, err

    def test_all_checkpoints_of_a_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save_model(tmp_path, 5)
        save_model(tmp_path, 10)
        code, out, _ = self.run(tmp_path, capsys, "--json")
        assert code == 0
        result = json.loads(out)
        assert [entry["step"] for entry in result["checkpoints"]] == [5, 10]
        assert all(entry["num_files"] == 5 and entry["num_bytes"] > 1000 for entry in result["checkpoints"])

    def test_one_checkpoint_for_people(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save_model(tmp_path, 5)
        code, out, _ = self.run(tmp_path / "checkpoints" / "step-00000005", capsys)
        assert code == 0 and out.startswith("verified  ") and "step 5, 5 files" in out

    def test_damage_names_every_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for step in (5, 10, 15):
            save_model(tmp_path, step)
        (tmp_path / "checkpoints" / "step-00000005" / "data.json").write_bytes(b"{}")
        (tmp_path / "checkpoints" / "step-00000015" / "rng.json").unlink()
        code, out, err = self.run(tmp_path, capsys, "--json")
        assert code == 70
        assert json.loads(out)["exit_code"] == 70
        assert "2 of 3 checkpoints damaged" in err
        assert "data.json, bytes 2-" in err and "rng.json, bytes 0-" in err and "missing" in err

    def test_neither_checkpoint_nor_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(tmp_path, capsys)[0] == 2
        assert self.run(tmp_path / "nothing", capsys)[0] == 2
        save_model(tmp_path)
        folder = tmp_path / "checkpoints" / "step-00000010"
        shutil.copytree(folder, tmp_path / "unfinished")
        (tmp_path / "unfinished" / "COMMITTED").unlink()
        code, _, err = self.run(tmp_path / "unfinished", capsys)
        assert code == 2 and "holds no COMMITTED file" in err


def test_the_command_module_returns_what_json_prints(tmp_path: Path) -> None:
    from longspan.trainer.commands import checkpoint_verify

    save_model(tmp_path)
    result = checkpoint_verify.run(argparse.Namespace(checkpoint=str(tmp_path), json=True))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
