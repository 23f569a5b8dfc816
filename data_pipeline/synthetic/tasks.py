"""`sample(task, seed, index, split)`: the one way to a sample of any task.

Cost: O(size of the sample), whatever the index; strings are redrawn until one belongs to the split, 8/6 draws for train
and 8 for test and validation on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from longspan.data_pipeline.synthetic import brackets, flip_flop, haystack, languages, listops, logic, recall, tracking
from longspan.data_pipeline.synthetic.config import TaskConfig, UnaryConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.samples import Sample, Split, split_of
from longspan.errors import UsageError

# the discriminator of `TaskConfig` guarantees that each function gets its own configuration class
_DRAWN_BY: dict[str, Callable[[Any, Draws], Sample]] = {
    "parity": languages.draw_parity,
    "aa_star": languages.draw_repeated,
    "abab_star": languages.draw_repeated,
    "a_n_b_n": languages.draw_counter,
    "a_n_b_n_c_n": languages.draw_counter,
    "dyck": brackets.draw_dyck,
    "shuffle_2": brackets.draw_shuffle,
    "reset_dyck": brackets.draw_reset_dyck,
    "flip_flop": flip_flop.draw_flip_flop,
    "listops": listops.draw_listops,
    "logical_inference": logic.draw_logic,
    "random_walk": tracking.draw_random_walk,
    "program": tracking.draw_program,
    "variable_tracking": haystack.draw_variable_tracking,
    "associative_recall": recall.draw_recall,
    "copy": recall.draw_copy,
    "passkey": haystack.draw_passkey,
}
_MOST_DRAWS = 2000  # one in eight is right: (7/8)^2000 is never, unless there are too few strings


def sample(task: TaskConfig, seed: int, index: int, split: Split = "train") -> Sample:
    """Sample number `index` of a split.

    Args:
        task: which task, and its sizes.
        seed, index: not negative; the sample is a pure function of these, the task and the split.
        split: a text that one split can give, no other can, whatever seed, sizes or index.

    Raises:
        UsageError: the sizes leave the split (almost) without strings.
    """
    longest_train = task.longest_train if isinstance(task, UnaryConfig) else None
    draws = Draws(task.kind, split, seed, index)
    for _ in range(_MOST_DRAWS):
        drawn = _DRAWN_BY[task.kind](task, draws)
        if split_of(task.kind, drawn.text, longest_train) == split:
            return drawn
    remedy = "longer strings than `longest_train` for a test" if longest_train else "a wider range of sizes"
    raise UsageError(
        f"task {task.kind}: no {split} string in {_MOST_DRAWS} draws; {task.model_dump(exclude={'kind'})} has too few "
        f"strings to keep the splits apart. Allow {remedy}."
    )


def distinct(task: TaskConfig, seed: int, count: int, split: Split) -> Iterator[Sample]:
    """The first `count` samples of a split that differ in their text, in order of index: tests count each string once.

    Raises:
        UsageError: the split has fewer strings, or so few that they no longer turn up.
    """
    seen: set[bytes] = set()
    index = 0
    while len(seen) < count:
        if index > 20 * count + 1000:
            raise UsageError(
                f"task {task.kind}: only {len(seen)} different {split} strings in {index} draws, {count} wanted. "
                f"Ask for fewer, or allow a wider range of sizes."
            )
        drawn = sample(task, seed, index, split)
        index += 1
        if drawn.text not in seen:
            seen.add(drawn.text)
            yield drawn
