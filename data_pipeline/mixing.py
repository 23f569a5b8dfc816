"""Which source a lane takes its next document from: the one furthest behind its share of tokens.

All arithmetic is in integers, so that every machine makes the same choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from longspan.errors import UsageError

# A document counts towards its source's tokens as it is read, and this far ahead. Counting it whole when a lane takes
# it (the limit of a large value) is exact in the long run only: with documents of megabytes, after 10 M tokens sources
# were 9% off their shares on average. Counting only what was read makes all lanes that refill together choose alike.
LOOKAHEAD_TOKENS = 49_152

_LARGEST_WEIGHT_SUM = 1 << 30
_SHARES_TOLERANCE = Fraction(1, 10**6)


def integer_weights(sources: dict[str, int], weights: Mapping[str, float | Fraction] | None) -> dict[str, int]:
    """The share of tokens of each source as integers of equal ratio, without a common divisor.

    They are exact while their sum stays below 2^30, else rounded to that.

    Args:
        sources: tokens per source.
        weights: wanted shares, which sum to 1 within 1e-6; each source's size if None.

    Raises:
        UsageError: a source is unknown, not named, or weights are negative or do not sum to 1.
    """
    if weights is None:
        return _integers({name: Fraction(size) for name, size in sources.items()})
    unknown, unnamed = sorted(set(weights) - set(sources)), sorted(set(sources) - set(weights))
    negative = sorted(name for name, weight in weights.items() if not 0 <= float(weight) < float("inf"))
    problems = []
    if unknown:
        problems.append(f"the corpus has no source {', '.join(unknown)}")
    if unnamed:
        problems.append(f"no weight for {', '.join(unnamed)}")
    if negative:
        problems.append(f"not a number from 0 on: {', '.join(f'{name} = {weights[name]}' for name in negative)}")
    shares = {name: Fraction(str(weights[name])) for name in weights if name not in negative}
    total = sum(shares.values(), Fraction(0))
    if not negative and abs(total - 1) > _SHARES_TOLERANCE:
        scaled = ", ".join(f"{name}: {float(share / total):.6f}" for name, share in shares.items()) if total else ""
        remedy = f"; in this ratio they are {{{scaled}}}" if scaled and not unknown and not unnamed else ""
        problems.append(f"the weights sum to {float(total):g}, shares must sum to 1{remedy}")
    if problems:
        raise UsageError(
            f"data.source_weights: {'; '.join(problems)}. "
            f"Give a weight for each of {', '.join(sources)}; 0 leaves one out."
        )
    return _integers({name: shares[name] for name in sources})


def _integers(shares: dict[str, Fraction]) -> dict[str, int]:
    scale = lcm(*(share.denominator for share in shares.values()))
    exact = {name: int(share * scale) for name, share in shares.items()}
    total = sum(exact.values())
    divisor = gcd(*exact.values())
    if total // divisor >= _LARGEST_WEIGHT_SUM:
        exact = {name: max(1, weight * _LARGEST_WEIGHT_SUM // total) if weight else 0 for name, weight in exact.items()}
        divisor = gcd(*exact.values())
    return {name: weight // divisor for name, weight in exact.items()}


def tokens_in_view(
    source: np.ndarray, position: np.ndarray, length: np.ndarray, now: int, num_sources: int
) -> list[int]:
    """How much less than their whole length parts in lanes count at `now`, per source.

    A part of more than LOOKAHEAD_TOKENS that started at `position` counts min(length, now - position +
    LOOKAHEAD_TOKENS); a shorter one counts whole from the start.

    Args:
        source, position, length: int [m] of the parts. now: position of all lanes.

    Returns:
        Tokens to take off, one number per source.
    """
    hidden = np.maximum(0, length - (now - position + LOOKAHEAD_TOKENS))
    hidden[length <= LOOKAHEAD_TOKENS] = 0
    return [int(hidden[source == index].sum()) for index in range(num_sources)]


class Credit:
    """Tokens that count for each source, as lanes take parts and steps go by; chooses the next source.

    The largest deficit goes first, ties by order of sources.
    """

    def __init__(
        self,
        weights: list[int],
        segment_tokens: int,
        step: int,
        assigned: Sequence[int],
        lanes: Iterable[tuple[int, int, int]],
    ) -> None:
        """
        Args:
            weights: integers, one a source. segment_tokens: of a lane in a step. step: now.
            assigned: tokens handed out per source, all parts whole.
            lanes: (source, position, tokens) of the parts that are in lanes now.
        """
        self._weights, self._segment_tokens = weights, segment_tokens
        self._candidates = [index for index, weight in enumerate(weights) if weight]
        # Tokens that count are `_fixed` + `_open` * now, where `_open` is the number of parts that count in part.
        self._fixed, self._open = list(assigned), [0] * len(weights)
        self._counted = list(assigned)
        self._step = step
        self._whole_at: dict[int, list[tuple[int, int]]] = {}  # step: [(source, what then goes to `_fixed`)]
        now = step * segment_tokens
        for source, position, length in lanes:
            self._fixed[source] -= length
            self._counted[source] -= length
            self.add(source, step, position - now, length)

    def add(self, source: int, step: int, offset: int, length: int) -> None:
        """A lane takes a part of `length` tokens of `source` at `step`, `offset` tokens after the step's first.

        An offset below 0 is of a part that started before.
        """
        if step != self._step:
            self._go_to(step)
        partly = LOOKAHEAD_TOKENS - offset
        if length <= LOOKAHEAD_TOKENS or length <= partly:
            self._fixed[source] += length
            self._counted[source] += length
        else:
            self._open[source] += 1
            self._fixed[source] += partly - step * self._segment_tokens
            self._counted[source] += partly
            whole_at = step - (partly - length) // self._segment_tokens
            hidden = (source, length - partly + step * self._segment_tokens)
            if whole_at in self._whole_at:
                self._whole_at[whole_at].append(hidden)
            else:
                self._whole_at[whole_at] = [hidden]

    def next_source(self, step: int) -> int:
        """The source furthest behind at `step`, which never goes back."""
        if step != self._step:
            self._go_to(step)
        counted, weights, candidates = self._counted, self._weights, self._candidates
        if len(candidates) == 2:  # which deficit is larger, with less to compute
            one, two = candidates
            return one if counted[one] * weights[two] <= counted[two] * weights[one] else two
        behind = deficits(weights, counted)
        return max(candidates, key=behind.__getitem__)

    def _go_to(self, step: int) -> None:
        for passed in range(self._step + 1, step + 1):
            for source, more in self._whole_at.pop(passed, ()):
                self._open[source] -= 1
                self._fixed[source] += more
        self._step = step
        now = step * self._segment_tokens
        self._counted = [fixed + number * now for fixed, number in zip(self._fixed, self._open, strict=True)]


def deficits(weights: list[int], counted: list[int]) -> list[int]:
    """How far each source is behind its share of the tokens that count, times the sum of weights.

    deficit_s = w_s * sum_r(counted_r) - counted_s * sum_r(w_r), summed over the sources r with a weight
    """
    total = sum(tokens for weight, tokens in zip(weights, counted, strict=True) if weight)
    weight_sum = sum(weights)
    return [weight * total - tokens * weight_sum for weight, tokens in zip(weights, counted, strict=True)]
