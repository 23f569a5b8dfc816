"""Sizes of the synthetic tasks, and the corpus source that packs them into documents. Imports no numpy, no torch.

A task's configuration says what is drawn; whether a string belongs to training or to a test is a property of the string
(`samples.split_of`), so two configurations of one kind, e.g. a short and a long one, share no string across splits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from longspan.errors import Problem

LONGEST = 2**24  # bytes, symbols or statements: one sample is made in memory


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _from(least: int) -> AfterValidator:
    """Check of an inclusive pair of bounds: neither below `least`, the smaller first."""

    def check(bounds: tuple[int, int]) -> tuple[int, int]:
        low, high = bounds
        if low > high:
            raise ValueError(f"from {low} to {high} is empty; the smaller bound comes first")
        if low < least or high > LONGEST:
            raise ValueError(f"from {low} to {high}; allowed are bounds from {least} to {LONGEST}")
        return bounds

    return AfterValidator(check)


class LanguageConfig(_Schema):
    """A formal language over one-byte symbols; with many strings of each length."""

    kind: Literal["parity", "shuffle_2"]
    lengths: Annotated[tuple[int, int], _from(2)] = Field((2, 50), description="symbols, from and to")


class UnaryConfig(_Schema):
    """A language with so few strings that only longer ones than those of training are a test."""

    kind: Literal["aa_star", "abab_star", "a_n_b_n", "a_n_b_n_c_n"]
    lengths: Annotated[tuple[int, int], _from(2)] = Field((2, 50), description="symbols, from and to")
    longest_train: int = Field(50, ge=2, description="strings up to this length are training, longer ones test")

    @model_validator(mode="after")
    def _has_strings(self) -> UnaryConfig:
        if self.kind == "abab_star" and self.lengths[0] == self.lengths[1] and self.lengths[0] % 2:
            raise ValueError(f"lengths = {self.lengths}: abab_star is asked about at even lengths only. Allow one")
        return self


class DyckConfig(_Schema):
    """Balanced brackets of several types."""

    kind: Literal["dyck"]
    lengths: Annotated[tuple[int, int], _from(2)] = Field((2, 50), description="symbols, from and to")
    bracket_types: int = Field(2, ge=1, le=4, description="of () [] {} <>")


class ResetDyckConfig(_Schema):
    """Balanced brackets of one type after resets; what came before a reset does not count."""

    kind: Literal["reset_dyck"]
    lengths: Annotated[tuple[int, int], _from(4)] = Field((4, 50), description="symbols, from and to")
    resets: int = Field(1, ge=1, description="in one string")

    @model_validator(mode="after")
    def _fits(self) -> ResetDyckConfig:
        if 2 * self.resets + 2 > self.lengths[0]:
            raise ValueError(f"{self.resets} resets need strings of at least {2 * self.resets + 2} symbols")
        return self


class FlipFlopConfig(_Schema):
    """Write, ignore and read instructions on one bit of memory."""

    kind: Literal["flip_flop"]
    instructions: Annotated[tuple[int, int], _from(2)] = Field((256, 256), description="each two symbols")
    ignore_probability: float = Field(0.8, ge=0, lt=1, description="of `i`; write and read share the rest")


class ListOpsConfig(_Schema):
    """Nested prefix expressions over digits."""

    kind: Literal["listops"]
    lengths: Annotated[tuple[int, int], _from(4)] = Field(
        (10, 100), description="digits plus two for each operator, from and to"
    )
    max_arguments: int = Field(5, ge=4, le=50, description="of an operator; at least 2")
    max_depth: int = Field(20, ge=2, le=50, description="operators inside each other")


class LogicConfig(_Schema):
    """Two propositional formulas and how they relate."""

    kind: Literal["logical_inference"]
    operators: Annotated[tuple[int, int], _from(0)] = Field((0, 6), description="not, and, or in the longer formula")

    @model_validator(mode="after")
    def _short(self) -> LogicConfig:
        if self.operators[1] > 64:
            raise ValueError("more than 64 operators: almost all pairs are independent. Allowed: 0 to 64")
        return self


class RandomWalkConfig(_Schema):
    """Turns and steps on a square board with walls; the heading is hidden state too."""

    kind: Literal["random_walk"]
    moves: Annotated[tuple[int, int], _from(1)] = Field((64, 64), description="one symbol each")
    board: int = Field(8, ge=2, le=9, description="cells along each side")


class ProgramConfig(_Schema):
    """Straight-line programs of assignments, increments, conditions and prints."""

    kind: Literal["program"]
    statements: Annotated[tuple[int, int], _from(2)] = Field((100, 100), description="in one program")
    variables: int = Field(3, ge=2, le=5, description="of x y z p r")


class VariableTrackingConfig(_Schema):
    """Chains of `VAR A = VAR B` scattered in filler text."""

    kind: Literal["variable_tracking"]
    num_bytes: Annotated[tuple[int, int], _from(512)] = Field((4096, 4096), description="of text, at most")
    chains: int = Field(4, ge=2, le=16, description="one is asked for; with a single one, every name is an answer")
    hops: int = Field(4, ge=1, le=16, description="assignments after the first of a chain")

    @model_validator(mode="after")
    def _fits(self) -> VariableTrackingConfig:
        _check_room(self.num_bytes[0], 64 + 24 * self.chains * (self.hops + 1), "chains and hops")
        return self


class RecallConfig(_Schema):
    """Multi-query associative recall: pairs of key and value first, then each key again."""

    kind: Literal["associative_recall"]
    tokens: int = Field(256, ge=8, le=LONGEST, description="of two bytes each")
    pairs: int = Field(64, ge=2, le=676, description="of key and value; at most a quarter of `tokens`")
    power: float = Field(0.01, ge=0, le=1, description="a of P(gap) ~ gap^(a-1); small: most queries come soon")

    @model_validator(mode="after")
    def _fits(self) -> RecallConfig:
        if 4 * self.pairs > self.tokens:
            raise ValueError(f"{self.pairs} pairs need at least {4 * self.pairs} tokens; tokens = {self.tokens}")
        return self


class CopyConfig(_Schema):
    """A string of letters, then the same again."""

    kind: Literal["copy"]
    lengths: Annotated[tuple[int, int], _from(1)] = Field((1, 50), description="letters to copy, from and to")
    letters: int = Field(26, ge=2, le=26, description="size of the alphabet")


class PasskeyConfig(_Schema):
    """Numbers under keywords hidden in filler text; one is asked for at the end."""

    kind: Literal["passkey"]
    num_bytes: Annotated[tuple[int, int], _from(512)] = Field((4096, 4096), description="of text, at most")
    keys: int = Field(4, ge=1, le=16, description="hidden numbers; with a single one, copying any digits is right")

    @model_validator(mode="after")
    def _fits(self) -> PasskeyConfig:
        _check_room(self.num_bytes[0], 128 + 64 * self.keys, "keys")
        return self


def _check_room(num_bytes: int, needed: int, what: str) -> None:
    if num_bytes < needed:
        raise ValueError(f"num_bytes = {num_bytes}: these {what} need {needed} or more")


TaskConfig = Annotated[
    LanguageConfig
    | UnaryConfig
    | DyckConfig
    | ResetDyckConfig
    | FlipFlopConfig
    | ListOpsConfig
    | LogicConfig
    | RandomWalkConfig
    | ProgramConfig
    | VariableTrackingConfig
    | RecallConfig
    | CopyConfig
    | PasskeyConfig,
    Field(discriminator="kind"),
]


class SyntheticConfig(_Schema):
    """Documents made of the samples of one task: `train-000000`, ... for training, `test-000000`, ... to hold out."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="first part of the ids of its documents: NAME/document"
    )
    kind: Literal["synthetic"]
    task: TaskConfig = Field(description="which task, and its sizes")
    seed: int = Field(0, ge=0, lt=2**63, description="another seed gives other documents")
    documents: int = Field(ge=1, lt=10**6, description="for training")
    test_documents: int = Field(0, ge=0, lt=10**6, description="of strings that training never has; hold them all out")
    document_bytes: int = Field(
        65536, ge=1, le=LONGEST, description="samples are joined until a document has this many; a longer one is alone"
    )
    licence: str = Field("CC0-1.0", description="copied into the manifest")

    @model_validator(mode="after")
    def _can_be_split(self) -> SyntheticConfig:
        task = self.task
        if isinstance(task, UnaryConfig):
            if task.lengths[0] > task.longest_train:
                raise ValueError(f"no training strings: all of {task.kind} above {task.longest_train} symbols are test")
            if self.test_documents and task.lengths[1] <= task.longest_train:
                raise ValueError(
                    f"no test strings: {task.kind} has too few strings up to {task.longest_train} symbols to hold any "
                    f"out. Test in a source of its own with longer `lengths`, or set test_documents: 0"
                )
        return self

    @property
    def test_names(self) -> tuple[str, ...]:
        """Ids of the documents to hold out."""
        return tuple(f"{self.name}/test-{index:06d}" for index in range(self.test_documents))


def synthetic_problems(sources: Iterable[object], held_out: Collection[str], dedupe: bool) -> list[Problem]:
    """What would mix up training and test strings of synthetic sources in a corpus recipe.

    Args:
        sources: of the recipe, of any kind.
        held_out: ids of the recipe's held-out documents.
        dedupe: whether near-duplicates are looked for.
    """
    problems = []
    found = [source for source in sources if isinstance(source, SyntheticConfig)]
    for source in found:
        missing = [name for name in source.test_names if name not in held_out]
        if missing:
            what = f"documents for tests would be trained on. List in held_out: {', '.join(missing)}"
            problems.append(Problem(f"sources.{source.name}.test_documents = {source.test_documents}", f"{what}."))
    if found and dedupe:
        what = (
            "synthetic documents share filler and short strings; a search for near-duplicates would hold them out all."
        )
        problems.append(Problem("dedupe.enabled = true", f"{what} Set it to false; their splits are apart by string."))
    return problems
