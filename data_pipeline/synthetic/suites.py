"""Published sizes: what each task is trained with, and the test sets that it is extended to.

Sources: formal languages arXiv:2009.11264 and 2310.16076; flip-flop 2306.00946; ListOps and logical inference
2402.00976 (long range: 2011.04006); programs 2106.04279; associative recall 2312.04927; passkey and variables in the
spirit of RULER, 2404.06654. Selection belongs to the `validation` split of the training sizes, never to a test set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longspan.data_pipeline.synthetic.config import (
    CopyConfig,
    DyckConfig,
    FlipFlopConfig,
    LanguageConfig,
    ListOpsConfig,
    LogicConfig,
    PasskeyConfig,
    ProgramConfig,
    RandomWalkConfig,
    RecallConfig,
    ResetDyckConfig,
    TaskConfig,
    UnaryConfig,
    VariableTrackingConfig,
)

_BINS = {"51-100": (51, 100), "100-150": (100, 150)}


@dataclass(frozen=True)
class Suite:
    """Training sizes, and test sets by name; tests are drawn with split `test`."""

    train: TaskConfig
    tests: dict[str, TaskConfig]


def _language(train: TaskConfig, with_same_lengths: bool = True) -> Suite:
    tests = {name: train.model_copy(update={"lengths": lengths}) for name, lengths in _BINS.items()}
    return Suite(train, {"2-50": train, **tests} if with_same_lengths else tests)


def _sizes(train: TaskConfig, **tests: Mapping[str, object]) -> Suite:
    made = {name: type(train).model_validate({**train.model_dump(), **changes}) for name, changes in tests.items()}
    return Suite(train, {"same": train, **made})


def _bytes(train: TaskConfig) -> Suite:
    lengths = {f"{size // 1024}k": {"num_bytes": (size, size)} for size in (16384, 65536, 262144, 1048576)}
    return _sizes(train, **lengths)


SUITES = {
    "parity": _language(LanguageConfig(kind="parity")),
    "aa_star": _language(UnaryConfig(kind="aa_star"), with_same_lengths=False),
    "abab_star": _language(UnaryConfig(kind="abab_star"), with_same_lengths=False),
    "a_n_b_n": _language(UnaryConfig(kind="a_n_b_n"), with_same_lengths=False),
    "a_n_b_n_c_n": _language(UnaryConfig(kind="a_n_b_n_c_n"), with_same_lengths=False),
    "dyck": _language(DyckConfig(kind="dyck")),
    "shuffle_2": _language(LanguageConfig(kind="shuffle_2")),
    "reset_dyck": _language(ResetDyckConfig(kind="reset_dyck")),
    "flip_flop": _sizes(
        FlipFlopConfig(kind="flip_flop"),
        dense={"ignore_probability": 0.1},
        sparse={"ignore_probability": 0.98},
        long={"instructions": (512, 512)},
        long_dense={"instructions": (512, 512), "ignore_probability": 0.1},
        long_sparse={"instructions": (512, 512), "ignore_probability": 0.98},
    ),
    "listops": _sizes(
        ListOpsConfig(kind="listops"),
        **{f"{low}-{low + 100}": {"lengths": (low, low + 100)} for low in range(200, 1000, 100)},
        arguments_10={"max_arguments": 10},
        arguments_15={"max_arguments": 15},
        long_range={"lengths": (500, 2000), "max_arguments": 10, "max_depth": 10},
    ),
    "logical_inference": _sizes(
        LogicConfig(kind="logical_inference"),
        **{f"operators_{count}": {"operators": (count, count)} for count in range(1, 13)},
    ),
    "random_walk": _sizes(
        RandomWalkConfig(kind="random_walk"),
        **{f"moves_{count}": {"moves": (count, count)} for count in (128, 256, 512, 1024)},
    ),
    "program": _sizes(ProgramConfig(kind="program"), variables_5={"variables": 5}, long={"statements": (400, 400)}),
    "variable_tracking": _bytes(VariableTrackingConfig(kind="variable_tracking")),
    "associative_recall": _sizes(
        RecallConfig(kind="associative_recall"),
        **{
            f"tokens_{tokens}_pairs_{pairs}": {"tokens": tokens, "pairs": pairs}
            for tokens, pairs in ((512, 64), (512, 128), (1024, 128), (1024, 256))
        },
    ),
    "copy": _sizes(CopyConfig(kind="copy"), **{name: {"lengths": lengths} for name, lengths in _BINS.items()}),
    "passkey": _bytes(PasskeyConfig(kind="passkey")),
}
