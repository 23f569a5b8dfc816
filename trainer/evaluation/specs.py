"""The kinds of evaluation spec: perplexity versus length, and synthetic tasks (`kind: synthetic`). Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from longspan.data_pipeline.synthetic.suites import SUITES
from longspan.trainer import recipes
from longspan.trainer.evaluation.spec import EvaluationSpec, SpecName, digest_of

GENERATORS = "synthetic-tasks/1"
"""Version of the tasks' generators; raise the number when any sample changes."""


class TaskSpec(BaseModel):
    """Whole answers that are right on the test sets of a synthetic task, for every seed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["synthetic"] = Field(description="what tells it from a spec of perplexity versus length")
    name: SpecName = Field(description="name of the spec, shown in results; no path")
    suite: str = Field(description="task with its published test sets, as in docs/synthetic_tasks.md")
    tests: tuple[str, ...] | None = Field(None, min_length=1, description="test sets of the suite; all if unset")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of the drawn samples; all are reported")
    samples: int = Field(2000, ge=2, description="different samples of each test set and seed, or all there are")
    document_bytes: int = Field(
        65536, ge=1, description="samples are joined, one a line, until a document has this many; 1: each alone"
    )
    size_bins: tuple[tuple[int, int], ...] | None = Field(
        None,
        min_length=1,
        description="sizes, from and to, rising, that are counted apart within a test set; one bin if unset",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="type of weights and activations")
    batch_tokens: int = Field(16384, ge=1, description="tokens in one forward pass; changes speed and memory alone")

    @field_validator("suite")
    @classmethod
    def _known_suite(cls, suite: str) -> str:
        if suite not in SUITES:
            raise ValueError(f"there is no such task. Allowed: {', '.join(SUITES)}")
        return suite

    @field_validator("tests")
    @classmethod
    def _known_tests(cls, tests: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        known = SUITES[info.data["suite"]].tests if "suite" in info.data else {}
        if tests is not None and known and (unknown := [name for name in tests if name not in known]):
            raise ValueError(f"no test set {', '.join(unknown)} of {info.data['suite']}. Allowed: {', '.join(known)}")
        return tests

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"{list(seeds)} are not different numbers from 0 on")
        return seeds

    @field_validator("size_bins")
    @classmethod
    def _bins_apart(cls, bins: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        below = 0
        for low, high in bins or ():
            if not 1 <= low <= high:
                raise ValueError(f"[{low}, {high}] is no range of sizes: give [from, to] with 1 <= from <= to")
            if low <= below:
                raise ValueError(f"[{low}, {high}] begins at or below {below}: ranges must rise and not overlap")
            below = high
        return bins

    @property
    def test_names(self) -> tuple[str, ...]:
        """Test sets to score, in the suite's order."""
        return tuple(name for name in SUITES[self.suite].tests if self.tests is None or name in self.tests)

    def canonical(self) -> dict[str, Any]:
        """All fields that a result depends on, with the sizes of the test sets; `batch_tokens` is not among them."""
        sizes = {name: SUITES[self.suite].tests[name].model_dump(mode="json") for name in self.test_names}
        return {**self.model_dump(mode="json", exclude={"batch_tokens"}), "test_sizes": sizes}

    @property
    def digest(self) -> str:
        """Hash of the canonical form, 32 hexadecimal characters."""
        return digest_of(self.canonical())

    @property
    def dataset_digest(self) -> str:
        """Stands where a corpus's digest does: the samples are a function of the spec and of the generators."""
        return digest_of(GENERATORS)


Spec = EvaluationSpec | TaskSpec


def load_spec(path: str | Path, overrides: list[str] | None = None) -> Spec:
    """Read an evaluation spec of either kind.

    Raises:
        ConfigError: lists everything that is wrong with it. UsageError: there is no such file.
    """
    raw = recipes.apply_overrides(recipes.read_recipe(path), overrides or [])
    return recipes.validate(_schema(raw), raw, f"recipe {path}")


def parse_spec(text: str) -> Spec:
    """The spec that `model_dump_json` wrote."""
    return _schema(json.loads(text)).model_validate_json(text)


def _schema(raw: dict[str, Any]) -> type[EvaluationSpec] | type[TaskSpec]:
    # without a kind it is the spec of perplexity versus length, which names an unknown key itself
    return TaskSpec if raw.get("kind") == "synthetic" else EvaluationSpec
