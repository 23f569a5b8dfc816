"""Facts hidden in filler text: passkeys, and chains of variables (Hsieh et al., "RULER", arXiv:2404.06654).

Traps avoided:
- with one number in the text, copying any digits is right: here several keywords have numbers, and one is asked for;
- with one chain of variables, every name in the text is an answer: here there are several, mixed;
- a base model is not good at stopping: `choices` are the other numbers of the text, to rank by likelihood;
- a text that is longer than it says is cut and loses its question: here `num_bytes` includes question and answer.
"""

from __future__ import annotations

import numpy as np

from longspan.data_pipeline.synthetic.config import PasskeyConfig, VariableTrackingConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.samples import Sample

_FILLER = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_KEYWORDS = (
    b"apple anchor basket beaver bridge candle castle cherry circle copper desert dragon engine falcon feather flower "
    b"forest garden ginger guitar hammer harbor helmet island jacket jungle kettle ladder lantern lemon magnet marble "
    b"meadow mirror mountain needle ocean olive orange oyster palace parrot pepper pillow planet pocket rabbit ribbon "
    b"river rocket saddle shadow silver spider statue summer temple thunder tunnel turtle valley velvet violin window"
).split()
_NUMBERS = 90_000  # of five digits, none with a leading zero


def draw_passkey(config: PasskeyConfig, draws: Draws) -> Sample:
    """Filler lines, a line with a number for each of a few keywords, and the question for one. Size = bytes of text."""
    limit = draws.between(*config.num_bytes)
    words = [_KEYWORDS[place] for place in draws.chosen(config.keys, len(_KEYWORDS)).tolist()]
    numbers = _numbers(draws, config.keys)
    asked = draws.below(config.keys)
    facts = [b"The magic number of %s is %s.\n" % pair for pair in zip(words, numbers, strict=True)]
    question = b"What is the magic number of %s? It is " % words[asked]
    hidden = _scattered(draws, facts, limit - len(question) - 5)
    return _with_answers(hidden + question, [numbers[asked]], b"", tuple(sorted(numbers)))


def draw_variable_tracking(config: VariableTrackingConfig, draws: Draws) -> Sample:
    """`VAR A = 12345`, `VAR B = VAR A`, ... of several chains in filler. Size = bytes of text.

    Answers: the names that hold one of the numbers, in the order in which they got it.
    """
    limit = draws.between(*config.num_bytes)
    length = config.hops + 1
    names = _names(draws, config.chains * length)
    numbers = _numbers(draws, config.chains)
    # a shuffled deck of chain numbers: each card is the next statement of its chain
    deck = (draws.order(config.chains * length) % config.chains).tolist()
    held: list[list[bytes]] = [[] for _ in range(config.chains)]
    facts = []
    for chain in deck:
        name = names.pop()
        right = b"VAR " + held[chain][-1] if held[chain] else numbers[chain]
        facts.append(b"VAR %s = %s\n" % (name, right))
        held[chain].append(name)
    asked = draws.below(config.chains)
    question = b"Which variables hold %s? They are" % numbers[asked]
    hidden = _scattered(draws, facts, limit - len(question) - 6 * length)
    return _with_answers(hidden + question, held[asked], b" ", ())


def _with_answers(question: bytes, answers: list[bytes], before: bytes, choices: tuple[bytes, ...]) -> Sample:
    """`question`, then the answers, each after `before`."""
    text, spans = question, []
    for answer in answers:
        text += before
        spans.append([len(text), len(text) + len(answer)])
        text += answer
    return Sample(text, np.array(spans, dtype=np.int64), len(text), choices=choices)


def _scattered(draws: Draws, facts: list[bytes], room: int) -> bytes:
    """`facts` in their order between as many filler lines as fit into `room` bytes, each equally likely anywhere."""
    lines = (room - sum(map(len, facts))) // len(_FILLER)
    places = sorted(draws.integers(lines + 1, len(facts)).tolist())
    parts = []
    for start, stop, fact in zip([0, *places], places, facts, strict=False):
        parts += [_FILLER * (stop - start), fact]
    return b"".join([*parts, _FILLER * (lines - places[-1])])


def _numbers(draws: Draws, count: int) -> list[bytes]:
    """Different numbers of five digits."""
    found: dict[int, None] = {}
    while len(found) < count:
        found[10_000 + draws.below(_NUMBERS)] = None
    return [b"%d" % number for number in found]


def _names(draws: Draws, count: int) -> list[bytes]:
    """Different names of five capitals."""
    found: dict[bytes, None] = {}
    while len(found) < count:
        found[(draws.integers(26, 5) + ord("A")).astype(np.uint8).tobytes()] = None
    return list(found)
