"""The way back: export -> checkpoint -> export, and `train --init-from EXPORT`, bit for bit; and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import token_corpora
import torch
from exports import native_model, run_config, run_directory

from longspan.errors import CheckpointError, UsageError
from longspan.modeling.model import build_model
from longspan.trainer import export, export_folder, restore
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.load import load_model, read_tokenizer, without_padding_rows
from longspan.trainer.cli import main
from longspan.trainer.commands import generate as generate_command
from longspan.trainer.config import RunConfig
from longspan.trainer.export import export_checkpoint, load_exported
from longspan.trainer.export_import import import_export
from longspan.trainer.export_origin import load_checkpoint_or_export, read_export

CONVERT = ["checkpoint", "convert"]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path).model.named_parameters())


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["fixed_skip", "lstm_dual_tanh", "hybrid", "feedback_two", "memory_hybrid"])
def test_there_and_back_is_exact(name: str, tmp_path: Path) -> None:
    """Padding rows of the vocabulary included, which the export's own model does not have."""
    run = run_directory(tmp_path / "run", name)
    for arguments in (["run", "export"], ["export", "back"], ["back", "again"]):
        assert main([*CONVERT, *(str(tmp_path / part) for part in arguments)]) == 0
    wanted = dict(native_model(run_config(name), 1).named_parameters())
    assert_equal(weights_of(tmp_path / "back"), wanted)
    assert load_model(tmp_path / "back").config.model == load_model(run).config.model
    assert load_model(tmp_path / "back").step == 1
    entries = [json.loads((tmp_path / part / "export_manifest.json").read_text()) for part in ("export", "again")]
    assert entries[0]["tensors"] == entries[1]["tensors"] and len(entries[0]["tensors"]) > 3
    assert entries[0]["dropped"] == entries[1]["dropped"]


def test_tokens_of_a_tokenizer_come_along(tmp_path: Path) -> None:
    tokenizer = token_corpora.tokenizer("bpe", tmp_path / "files")
    run = run_directory(tmp_path / "run", "fixed_skip", tokenizer=tokenizer)
    export_checkpoint(run, tmp_path / "export")
    back = Path(import_export(tmp_path / "export", tmp_path / "back")["checkpoint"])
    assert read_tokenizer(back).digest == tokenizer.digest == load_checkpoint_or_export(run).tokenizer_digest
    assert_equal(weights_of(back), weights_of(run))


class Engine:
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights


class Vocabulary:
    def __init__(self, run: Path) -> None:
        tokenizer = read_tokenizer(load_model(run).path)
        self.digest, self.name = tokenizer.digest, tokenizer.name


def initial(config: RunConfig, run: Path, source: Path) -> dict[str, torch.Tensor]:
    """Weights that `train --init-from source` starts with."""
    engine = Engine()
    restore.load_initial_weights(engine, config, Vocabulary(run), source)  # type: ignore[arg-type]
    return engine.weights


@pytest.mark.parametrize("name", ["fixed_skip", "memory_hybrid"])
def test_a_run_starts_from_an_export(name: str, tmp_path: Path) -> None:
    run, config = run_directory(tmp_path / "run", name), run_config(name)
    export_checkpoint(run, tmp_path / "export")
    before = torch.get_rng_state()
    assert_equal(initial(config, run, tmp_path / "export"), weights_of(run))
    assert torch.equal(torch.get_rng_state(), before)
    # as transformers saves a model: without the folder of what training knew
    load_exported(tmp_path / "export").save_pretrained(tmp_path / "saved")
    found, wanted = initial(config, run, tmp_path / "saved"), weights_of(run)
    assert torch.equal(found["embedding.weight"][:259], wanted["embedding.weight"][:259])
    assert found["embedding.weight"].shape == wanted["embedding.weight"].shape
    assert not found.pop("embedding.weight")[259:].any() and wanted.pop("embedding.weight")[259:].any()
    assert_equal(found, wanted)


def test_another_model_is_refused(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", "fixed_skip")
    export_checkpoint(run, tmp_path / "export")
    with pytest.raises(UsageError, match=r"--init-from: .*another model"):
        initial(run_config("lstm_dual"), run, tmp_path / "export")


def test_a_converted_checkpoint_is_a_checkpoint_but_no_run_goes_on_from_it(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", "fixed_skip")
    export_checkpoint(run, tmp_path / "export")
    import_export(tmp_path / "export", tmp_path / "back")
    texts = []
    for folder in (run, tmp_path / "export", tmp_path / "back"):
        from longspan.trainer.cli import build_parser

        arguments = ["generate", str(folder), "--prompt", "In", "--max-new-tokens", "20", "--json"]
        texts.append(generate_command.run(build_parser().parse_args(arguments))["text"])
    assert texts[0] == texts[1] == texts[2] != ""
    loaded = load_model(tmp_path / "back")
    state = RunState(
        step=1, weights={}, optimizer={}, lanes=None, lane_start=0, lane_stop=0, data={}, rng={},
        counters={"converted_from": "x"}, config_yaml=(tmp_path / "back" / "config.yaml").read_text(),
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"--resume: .*--init-from"):
        restore.check_resumable(loaded.config, state, loaded.path)


def test_native_and_exported_softmax_are_one(tmp_path: Path) -> None:
    """Evaluation gives padding rows no probability, as the export, which does not have them."""
    run = run_directory(tmp_path / "run", "hybrid")
    export_checkpoint(run, tmp_path / "export")
    ids = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(1))
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[:, 0] = True
    losses = {}
    for name, loaded in (("all rows", load_model(run)), ("used rows", without_padding_rows(load_model(run)))):
        model = loaded.model
        with torch.no_grad():
            losses[name] = model(ids[:, :-1], model.init_state(2), reset=reset, labels=ids[:, 1:])[0]
    exported: Any = load_exported(tmp_path / "export")
    with torch.no_grad():
        logits = exported(ids[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert (losses["used rows"] - wanted).abs().max() <= 1e-5
    assert (losses["all rows"] - wanted).min() > 0.01, "the rows matter"
    assert wanted.shape == (2, 32) and build_model(run_config("hybrid").model).embedding.weight.shape[0] == 384


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export_checkpoint(run_directory(tmp_path / "run", "fixed_skip"), tmp_path / "export")
    return tmp_path / "export"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def widen(folder: Path) -> None:
    training = json.loads((folder / "longspan" / "training.json").read_text())
    training["model"].update(dim=32, num_heads=4)
    (folder / "longspan" / "training.json").write_text(json.dumps(training))
    (folder / "longspan" / "padding.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda folder: flip(folder / "model.safetensors"), 70, "other numbers"),
        (lambda folder: flip(folder / "longspan" / "padding.safetensors"), 70, "125 rows"),
        (lambda folder: (folder / "model.safetensors").unlink(), 70, "cannot be read"),
        (lambda folder: (folder / "longspan" / "training.json").write_text("{"), 70, "training.json"),
        (widen, 70, "of another model than its configuration describes"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), 70, "cannot be read"),
        (lambda folder: (folder / "export_manifest.json").write_text("[]"), 70, "export_manifest.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), 2, "COMMITTED"),
    ],
    ids=["weights", "padding rows", "no weights", "training.json", "width", "index", "manifest", "another model"],
)
def test_damaged_exports_are_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, code: int, message: str
) -> None:
    damage(exported)
    assert main([*CONVERT, str(exported), str(tmp_path / "back"), "--json"]) == code
    assert message in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]


def test_a_configuration_of_another_version_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.rmtree(exported / "longspan")
    config = json.loads((exported / "config.json").read_text())
    config["blocks"][0]["mixer"] = "telepathy"
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="describes no model of this version"):
        read_export(exported)


def test_a_tokenizer_of_another_size_is_refused(exported: Path) -> None:
    tensors = safetensors.torch.load_file(exported / "model.safetensors")
    tensors["embedding.weight"] = tensors["embedding.weight"][:200].contiguous()
    safetensors.torch.save_file(tensors, exported / "model.safetensors")
    (exported / "export_manifest.json").unlink()
    (exported / "longspan" / "padding.safetensors").unlink()
    with pytest.raises(UsageError, match="200 rows in its embedding and a tokenizer of 259 ids"):
        read_export(exported)


def test_targets_that_exist(exported: Path, tmp_path: Path) -> None:
    import_export(exported, tmp_path / "back")
    with pytest.raises(UsageError, match="exists"):
        import_export(exported, tmp_path / "back")
    import_export(exported, tmp_path / "back", overwrite=True)
    with pytest.raises(UsageError, match="not an earlier export"):
        import_export(exported, tmp_path / "run", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "export", "run"]


def test_a_checkpoint_that_was_not_committed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_directory(tmp_path / "run", "fixed_skip")
    checkpoint = run / "checkpoints" / "step-00000001"
    (checkpoint / "COMMITTED").unlink()
    for source in (checkpoint, run):
        assert main(["export", str(source), str(tmp_path / "out"), "--json"]) in (2, 70)
        assert "COMMITTED" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("place", "earlier"), [("write_shards", False), ("write_shards", True), ("write_card", True), ("_sync", True)]
)
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str, earlier: bool
) -> None:
    run = run_directory(tmp_path / "run", "fixed_skip", (1, 2))
    if earlier:
        export_checkpoint(run / "checkpoints" / "step-00000001", tmp_path / "out")
    hit = []

    def full(*args: Any, **more: Any) -> None:
        hit.append(place)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_folder if place == "_sync" else export, place, full)
    assert main(["export", str(run), str(tmp_path / "out"), "--overwrite", "--json"]) == 70
    assert "No space left on device" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert hit == [place]
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "run"] if earlier else ["run"])
    if earlier:
        assert json.loads((tmp_path / "out" / "export_manifest.json").read_text())["checkpoint"]["step"] == 1


def test_a_full_disk_while_converting_back(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_folder, "_sync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        import_export(exported, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]
