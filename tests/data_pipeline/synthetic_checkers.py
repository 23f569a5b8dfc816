"""Brute-force evaluators of the synthetic tasks: they read a text and say what its answers and labels must be.

Written from the tasks' rules, without the generators: stacks, regular expressions, truth tables and Python itself.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable

Checked = tuple[list[bytes], dict[int, int]]  # answers in order; label by place in the text
PAIRS = {")": "(", "]": "[", "}": "{", ">": "<"}


def _prefixes(text: str) -> tuple[list[str], str]:
    symbols = text.rsplit("=", 1)[0]
    return [symbols[: stop + 1] for stop in range(len(symbols))], symbols


def _by_prefix(text: str, label: Callable[[str], int], names: str) -> Checked:
    prefixes, _ = _prefixes(text)
    labels = {len(prefix) - 1: label(prefix) for prefix in prefixes}
    return [names[labels[len(prefixes) - 1]].encode()], labels


def parity(text: str) -> Checked:
    return _by_prefix(text, lambda prefix: int(prefix.count("1") % 2 == 0), "oe")


def aa_star(text: str) -> Checked:
    return _by_prefix(text, lambda prefix: int(bool(re.fullmatch("(aa)*", prefix))), "ny")


def abab_star(text: str) -> Checked:
    return _by_prefix(text, lambda prefix: int(bool(re.fullmatch("(abab)*", prefix))), "ny")


def _counter(text: str, letters: str) -> Checked:
    words = ["".join(letter * count for letter in letters) + "." for count in range(1, 101)]
    classes = {"ab": 0, "b": 1, "c": 2, ".": 3}

    def label(prefix: str) -> int:
        return classes["".join(sorted({word[len(prefix)] for word in words if word.startswith(prefix)}))]

    return _by_prefix(text, label, "abc.")


def a_n_b_n(text: str) -> Checked:
    return _counter(text, "ab")


def a_n_b_n_c_n(text: str) -> Checked:
    return _counter(text, "abc")


def dyck(text: str) -> Checked:
    _, symbols = _prefixes(text)
    stack, labels = [], {}
    for place, symbol in enumerate(symbols):
        if symbol in PAIRS:
            assert stack.pop() == PAIRS[symbol]
        else:
            stack.append(symbol)
        labels[place] = 1 + "([{<".index(stack[-1]) if stack else 0
    return [".)]}>"[labels[len(symbols) - 1]].encode()], labels


def shuffle_2(text: str) -> Checked:
    def label(prefix: str) -> int:
        depths = [prefix.count(opening) - prefix.count(closing) for opening, closing in ("()", "[]")]
        assert min(depths) >= 0
        return (depths[0] > 0) + 2 * (depths[1] > 0)

    return _by_prefix(text, label, ".)]*")


def _unclosed(piece: str) -> str:
    while "()" in piece:
        piece = piece.replace("()", "")
    return piece


def reset_dyck(text: str) -> Checked:
    _, symbols = _prefixes(text)
    before, _ = symbols.rsplit("1", 1)
    assert all("(" in _unclosed(piece) for piece in before.split("1"))  # every reset forgets something
    assert not any(")" in _unclosed(piece) for piece in symbols.split("1"))
    return _by_prefix(text, lambda prefix: int("(" in _unclosed(prefix.rsplit("1", 1)[-1])), ".)")


def flip_flop(text: str) -> Checked:
    assert text[0] == "w" and text[-2] == "r"
    memory, answers = "", []
    for kind, bit in re.findall("([wri])([01])", text):
        if kind == "w":
            memory = bit
        if kind == "r":
            answers.append(memory.encode())
    return answers, {}


def listops(text: str) -> Checked:
    expression = text.rsplit("=", 1)[0]
    called = re.sub(r"\[(\w+) ", r"\1([", expression).replace("]", "])").replace(" ])", "])").replace(" ", ",")
    names = {
        "MIN": min,
        "MAX": max,
        "MED": lambda values: int(statistics.median(values)),
        "SM": lambda values: sum(values) % 10,
    }
    return [str(eval(called, {"__builtins__": {}}, names)).encode()], {}


def logical_inference(text: str) -> Checked:
    left, right = (compile(side, "formula", "eval") for side in text[:-2].split(" : "))
    rows = list(itertools.product([False, True], repeat=6))
    models = [{row for row in rows if eval(side, {}, dict(zip("abcdef", row, strict=True)))} for side in (left, right)]
    first, second = models
    assert 0 < len(first) < 64 and 0 < len(second) < 64
    if first == second:
        return [b"="], {}
    if first < second or first > second:
        return [b"<" if first < second else b">"], {}
    apart, covering = not first & second, len(first | second) == 64
    return [b"^" if apart and covering else b"|" if apart else b"v" if covering else b"#"], {}


def random_walk(text: str, board: int = 8) -> Checked:
    start, moves = text.rsplit("=", 1)[0].split(":")
    here = complex("abcdefghi".index(start[0]), int(start[1]) - 1)
    heading = {"N": 1j, "E": 1, "S": -1j, "W": -1}[start[2]]
    labels = {3: int(here.real + board * here.imag)}
    for place, move in enumerate(moves):
        if move == "F":
            ahead = here + heading
            here = ahead if 0 <= ahead.real < board and 0 <= ahead.imag < board else here
        else:
            heading *= 1j if move == "L" else -1j
        labels[4 + place] = int(here.real + board * here.imag)
    return [f"{'abcdefghi'[int(here.real)]}{int(here.imag) + 1}".encode()], labels


def program(text: str) -> Checked:
    statements = re.findall(r"[^;]*;", text.rsplit("=", 1)[0])
    values: dict[str, int] = {}
    labels, place = {}, -1
    for statement in statements:
        place += len(statement)
        source = statement.strip(" ;").replace("++", "+= 1").replace("--", "-= 1")
        printed = re.fullmatch(r"print (\w)", source)
        if printed:
            labels[place] = values[printed[1]]
        else:
            fresh = re.search(r"(?:^|: )(\w) = ", source)
            assert not fresh or fresh[1] not in values
            exec(source, {"__builtins__": {}}, values)
        assert all(1 <= value <= 10 for value in values.values())
    assert printed
    return [str(labels[place]).encode()], labels


def variable_tracking(text: str) -> Checked:
    held: dict[str, str] = {}
    for name, right in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        assert name not in held
        held[name] = held.get(right, right)
    asked = re.findall(r"Which variables hold (\d+)\?", text)[-1]
    return [name.encode() for name, value in held.items() if value == asked], {}


def associative_recall(text: str) -> Checked:
    values: dict[str, str] = {}
    answers = []
    for key, value in zip(*[iter(re.findall("..", text))] * 2, strict=True):
        if key.isdigit():
            assert value.isdigit()
        elif key in values:
            answers.append(values[key].encode())
        else:
            assert not answers
            values[key] = value
    assert len(set(values.values())) == len(values) == len(answers)
    return answers, {}


def copy(text: str) -> Checked:
    return [text[: len(text) // 2].encode()], {}


def passkey(text: str) -> Checked:
    numbers = dict(re.findall(r"magic number of (\w+) is (\d+)", text))
    asked = re.findall(r"What is the magic number of (\w+)\?", text)[-1]
    return [numbers[asked].encode()], {}


CHECKERS: dict[str, Callable[[str], Checked]] = {
    checker.__name__: checker
    for checker in (
        parity,
        aa_star,
        abab_star,
        a_n_b_n,
        a_n_b_n_c_n,
        dyck,
        shuffle_2,
        reset_dyck,
        flip_flop,
        listops,
        logical_inference,
        random_walk,
        program,
        variable_tracking,
        associative_recall,
        copy,
        passkey,
    )
}
