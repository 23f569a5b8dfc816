"""State tracking: a walk on a board, and programs over a few variables.

Programs follow the rules of the Algorithm task of Ju et al., "Staircase Attention for Recurrent Processing of
Sequences", arXiv:2106.04279; the walk is ours (theirs was not published).

Traps avoided:
- a value that is printed into the text tells the state to everything after it: here values are labels beside the text,
  and the text holds only the last one, at its end;
- a walk that starts in the same corner is mostly near it: here start and heading are drawn, and stand in the text;
- a value at its bound cannot be stepped over it, and a variable is assigned only once, so no statement is without
  effect by accident.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import numpy as np

from longspan.data_pipeline.synthetic.config import ProgramConfig, RandomWalkConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.samples import NO_LABEL, Sample, labelled

_HEADINGS = b"NESW"
_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
_MOVES = np.frombuffer(b"LRF", dtype=np.uint8)
_NAMES = b"xyzpr"
_HIGHEST = 10
_STRIDE = 4  # moves that one step of Python takes


def _next_states(board: int) -> np.ndarray:
    """State after a move (left, right, forward) in a state: int64 [states, 3]; state = 4 * cell + heading."""
    table = []
    for state in range(4 * board * board):
        cell, heading = divmod(state, 4)
        column, row = cell % board, cell // board
        right, up = _STEPS[heading]
        inside = 0 <= column + right < board and 0 <= row + up < board
        ahead = cell + right + board * up if inside else cell
        table.append([4 * cell + (heading - 1) % 4, 4 * cell + (heading + 1) % 4, 4 * ahead + heading])
    return np.array(table)


@lru_cache
def _strides(board: int) -> tuple[np.ndarray, list[int]]:
    """One move at a time, and _STRIDE moves at once: entry (state, moves read as a number of base 3), flat."""
    once = _next_states(board)
    many = once
    for _ in range(_STRIDE - 1):
        many = once[many].reshape(len(once), -1)
    return once, many.ravel().tolist()


def _walk(board: int, start: int, moves: np.ndarray) -> np.ndarray:
    """States from `start` on: int64 [len(moves) + 1]."""
    once, many = _strides(board)
    width = 3**_STRIDE
    rows = np.pad(moves, (0, -len(moves) % _STRIDE)).reshape(-1, _STRIDE)
    numbers = rows @ 3 ** np.arange(_STRIDE)[::-1]
    states = np.empty((len(rows) + 1, _STRIDE), dtype=np.int64)
    states[:, 0] = list(accumulate(numbers.tolist(), lambda state, number: many[width * state + number], initial=start))
    for column in range(1, _STRIDE):
        states[:-1, column] = once[states[:-1, column - 1], rows[:, column - 1]]
    return states.ravel()[: len(moves) + 1]


@lru_cache
def _cell_names(board: int) -> tuple[bytes, ...]:
    return tuple(b"%c%d" % (ord("a") + cell % board, cell // board + 1) for cell in range(board * board))


def draw_random_walk(config: RandomWalkConfig, draws: Draws) -> Sample:
    """`c4N:LFFR`: a start, then turns left and right and steps forward, which walls block. Label: the cell, row by row.

    Answer: the last cell, e.g. `d5`. Size = moves.
    """
    board = config.board
    start = draws.below(4 * board * board)
    moves = draws.integers(3, draws.between(*config.moves))
    cells = _walk(board, start, moves) // 4
    head = _cell_names(board)[start // 4] + _HEADINGS[start % 4 : start % 4 + 1] + b":"
    labels = np.full(len(head) + len(moves), NO_LABEL, dtype=np.int16)
    labels[len(head) - 1 :] = cells
    symbols = head + _MOVES[moves].tobytes()
    choices = _cell_names(board)
    sample = labelled(symbols, labels, choices[int(cells[-1])], choices)
    return Sample(sample.text, sample.answers, len(moves), sample.labels, choices)


def draw_program(config: ProgramConfig, draws: Draws) -> Sample:
    """Statements over a few variables with values 1 to 10; size = statements, the last of which prints.

    Label: at the `;` of each `print`, the value. Answer: the last of them.
    """
    count = draws.between(*config.statements)
    values: dict[int, int] = {}
    statements: list[bytes] = []
    printed: list[tuple[int, int]] = []  # statement, value
    while len(statements) < count:
        last = len(statements) == count - 1
        kind = 4 if last and values else draws.below(5)
        if kind == 4 and values:
            variable = _one_of(draws, list(values))
            printed.append((len(statements), values[variable]))
            statements.append(b"print %c ;" % _NAMES[variable])
        elif kind == 3 and values:
            statements.append(_condition(draws, config.variables, values))
        elif kind < 3:
            changed = _change(draws, kind, config.variables, values)
            if changed:
                text, variable, value = changed
                values[variable] = value
                statements.append(text)
    ends = np.cumsum([len(statement) + 1 for statement in statements]) - 2  # place of each `;`, blanks between
    labels = np.full(int(ends[-1]) + 1, NO_LABEL, dtype=np.int16)
    for number, value in printed:
        labels[ends[number]] = value
    choices = tuple(b"%d" % value for value in range(1, _HIGHEST + 1))
    sample = labelled(b" ".join(statements), labels, b"%d" % printed[-1][1], choices)
    return Sample(sample.text, sample.answers, count, sample.labels, choices)


def _change(draws: Draws, kind: int, variables: int, values: dict[int, int]) -> tuple[bytes, int, int] | None:
    """`v = n ;`, `v ++ ;` or `v -- ;` for kinds 0, 1, 2, the variable and its new value; None where none is allowed."""
    if kind == 0:
        fresh = [variable for variable in range(variables) if variable not in values]
        if not fresh:
            return None
        variable, value = _one_of(draws, fresh), draws.between(1, _HIGHEST)
        return b"%c = %d ;" % (_NAMES[variable], value), variable, value
    bound, step, sign = (_HIGHEST, 1, b"++") if kind == 1 else (1, -1, b"--")
    movable = [variable for variable, value in values.items() if value != bound]
    if not movable:
        return None
    variable = _one_of(draws, movable)
    return b"%c %s ;" % (_NAMES[variable], sign), variable, values[variable] + step


def _condition(draws: Draws, variables: int, values: dict[int, int]) -> bytes:
    """`if v < c : S`, carried out on `values` where it holds; c is another variable or a number."""
    variable = _one_of(draws, list(values))
    others = [other for other in values if other != variable]
    if others and draws.below(2):
        other = _one_of(draws, others)
        bound, right = values[other], b"%c" % _NAMES[other]
    else:
        bound = draws.between(1, _HIGHEST)
        right = b"%d" % bound
    less = draws.below(2)
    holds = values[variable] < bound if less else values[variable] > bound
    inner = None
    while inner is None:
        inner = _change(draws, draws.below(3), variables, values)
    text, changed, value = inner
    if holds:
        values[changed] = value
    return b"if %c %s %s : %s" % (_NAMES[variable], b"<" if less else b">", right, text)


def _one_of(draws: Draws, items: list[int]) -> int:
    return items[draws.below(len(items))]
