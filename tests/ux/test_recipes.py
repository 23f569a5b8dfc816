"""Configuration errors word for word: what a user with a wrong recipe reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from longspan.errors import ConfigError, UsageError
from longspan.trainer import recipes
from longspan.trainer.config import RunConfig, cross_problems

GOOD = {
    "name": "tiny",
    "model": {"window_tokens": 64, "layers": [{"mixer": "block_recurrent", "num_states": 8}]},
    "data": {"shards": "corpora/tiny", "segment_tokens": 256},
    "training": {"steps": 10},
}


def message(changes: dict[str, object], tmp_path: Path) -> str:
    """The error that GOOD with `changes` (dotted path -> value) ends with."""
    raw = recipes.apply_overrides(GOOD, [])
    for path, value in changes.items():
        *sections, field = path.split(".")
        place = raw
        for section in sections:
            place = place[int(section)] if isinstance(place, list) else place[section]
        place[field] = value
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        recipes.load(RunConfig, file, cross_check=cross_problems)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(file), "recipe.yaml")


def test_good_recipe_round_trips(tmp_path: Path) -> None:
    config = recipes.validate(RunConfig, GOOD, "GOOD", cross_problems)
    file = tmp_path / "config.yaml"
    file.write_text(recipes.dump(config))
    assert recipes.load(RunConfig, file, cross_check=cross_problems) == config


GOLDEN = {
    "unknown key": (
        {"model.window_tokns": 64},
        """1 problem in recipe recipe.yaml:
  model.window_tokns: unknown key. Did you mean model.window_tokens?
Fix the recipe or pass --set section.field=value.""",
    ),
    "unknown key of a layer": (
        {"model.layers.0.nun_states": 3},
        """1 problem in recipe recipe.yaml:
  model.layers.0.nun_states: unknown key. Did you mean model.layers.0.num_states?
Fix the recipe or pass --set section.field=value.""",
    ),
    "key of another section": (
        {"training.segment_tokens": 64},
        """1 problem in recipe recipe.yaml:
  training.segment_tokens: unknown key. Did you mean data.segment_tokens?
Fix the recipe or pass --set section.field=value.""",
    ),
    "wrong type": (
        {"training.steps": "many"},
        """1 problem in recipe recipe.yaml:
  training.steps = 'many': input should be a valid integer, unable to parse string as an integer.
Fix the recipe or pass --set section.field=value.""",
    ),
    "unknown mixer": (
        {"model.layers.0.mixer": "mamba"},
        """1 problem in recipe recipe.yaml:
  model.layers.0.mixer = 'mamba': unknown mixer. Allowed: sliding_window, block_recurrent, linear_attention, \
full_attention.
Fix the recipe or pass --set section.field=value.""",
    ),
    "unknown optimizer": (
        {"optimizer": {"name": "adamW"}},
        """1 problem in recipe recipe.yaml:
  optimizer.name = 'adamW': input should be 'adamw' or 'adafactor'.
Fix the recipe or pass --set section.field=value.""",
    ),
    "three mistakes at once": (
        {"training.steps": "many", "data.lane": 3, "data.segment_tokens": 200},
        """3 problems in recipe recipe.yaml:
  data.lane: unknown key. Did you mean data.lanes?
  training.steps = 'many': input should be a valid integer, unable to parse string as an integer.
  data.segment_tokens = 200: not a multiple of model.window_tokens = 64. Nearest: 192 or 256.
Fix the recipe or pass --set section.field=value.""",
    ),
    "segment not a multiple of the block": (
        {"data.segment_tokens": 4000},
        """1 problem in recipe recipe.yaml:
  data.segment_tokens = 4000: not a multiple of model.window_tokens = 64. Nearest: 3968 or 4032.
Fix the recipe or pass --set section.field=value.""",
    ),
    "segment of one block": (
        {"data.segment_tokens": 64},
        """1 problem in recipe recipe.yaml:
  data.segment_tokens = 64: shorter than two blocks of model.window_tokens = 64. The state that a segment's last block \
writes is read only by the next segment, without gradient, so its update would never be trained. Use 128 or more.
Fix the recipe or pass --set section.field=value.""",
    ),
    "wrong window hides what depends on it": (
        {"model.window_tokens": 0, "data.segment_tokens": 100},
        """1 problem in recipe recipe.yaml:
  model.window_tokens = 0: input should be greater than or equal to 1.
Fix the recipe or pass --set section.field=value.""",
    ),
    "lanes not a multiple": (
        {"data.lanes": 6, "training.micro_batch_lanes": 4},
        """1 problem in recipe recipe.yaml:
  data.lanes = 6: not a multiple of training.micro_batch_lanes = 4.
Fix the recipe or pass --set section.field=value.""",
    ),
    "adafactor with ZeRO": (
        {"optimizer": {"name": "adafactor"}, "parallel": {"zero_stage": 2}},
        """1 problem in recipe recipe.yaml:
  parallel.zero_stage = 2: optimizer.name = adafactor needs the real shapes of the parameters, which ZeRO 1 to 3 \
flatten. Use zero_stage: 0, or optimizer.name: adamw.
Fix the recipe or pass --set section.field=value.""",
    ),
    "bf16 without ZeRO": (
        {"training.precision": "bf16"},
        """1 problem in recipe recipe.yaml:
  parallel.zero_stage = 0: training.precision = bf16 keeps its fp32 master weights in ZeRO 1 to 3. Use zero_stage: 1.
Fix the recipe or pass --set section.field=value.""",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_message(case: str, tmp_path: Path) -> None:
    changes, expected = GOLDEN[case]
    assert message(changes, tmp_path) == expected


def test_base_files_merge_and_later_wins(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\ntraining: {steps: 1, threads: 1}\n")
    (tmp_path / "b.yaml").write_text("training: {steps: 2}\n")
    (tmp_path / "top.yaml").write_text("base: [a.yaml, b.yaml]\ntraining: {micro_batch_lanes: 3}\n")
    assert recipes.read_recipe(tmp_path / "top.yaml") == {
        "seed": 1,
        "training": {"steps": 2, "threads": 1, "micro_batch_lanes": 3},
    }


def test_base_cycle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: [a.yaml]\n")
    with pytest.raises(UsageError, match="is there a cycle"):
        recipes.read_recipe(tmp_path / "a.yaml")


def test_overrides_are_yaml_and_reach_new_sections() -> None:
    raw = recipes.apply_overrides(GOOD, ["optimizer.name=adafactor", "seed=7", "model.window_tokens=32"])
    config = recipes.validate(RunConfig, raw, "GOOD", cross_problems)
    assert (config.optimizer.name, config.seed, config.model.window_tokens) == ("adafactor", 7, 32)
    assert "optimizer" not in GOOD


@pytest.mark.parametrize(
    ("override", "words"),
    [("seed", "section.field=value"), ("=3", "section.field=value"), ("seed.x=3", "seed is a value, not a section")],
)
def test_bad_override(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        recipes.apply_overrides({**GOOD, "seed": 1}, [override])


def test_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"no recipe at configs/quikstart\.yaml\. Did you mean configs/quickstart\.yaml"
    ):
        recipes.find_recipe("configs/quikstart.yaml")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "!!python/object/apply:os.getcwd []", "\x00"])
def test_unreadable_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError):
        recipes.read_recipe(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", sorted((recipes.PACKAGED_CONFIGS).glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_training_recipes_are_valid(path: Path) -> None:
    recipes.load(RunConfig, path, cross_check=cross_problems)


def test_number_of_visible_fields() -> None:
    def count(schema: type) -> int:
        return sum(
            count(field.annotation) if hasattr(field.annotation, "model_fields") else 1
            for field in schema.model_fields.values()
        )

    assert count(RunConfig) <= 60
