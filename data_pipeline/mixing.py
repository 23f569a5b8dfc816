"""Which source a lane takes its next document from: the one that leaves the shares of tokens nearest to the weights.

All arithmetic is in integers, so that every machine makes the same choices. `trial.py` looks further ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from longspan.errors import UsageError

# A document counts towards its source's tokens as it is read, and this far ahead (a segment, if that is more).
# Counting it whole when a lane takes it (the limit of a large value) is exact in the long run only: with documents of
# megabytes, after 10 M tokens sources were 9% off their shares on average. Counting only what was read makes all lanes
# that refill together choose alike.
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


def lookahead(segment_tokens: int) -> int:
    """How many tokens ahead of their reading documents count, with segments of this many."""
    return max(LOOKAHEAD_TOKENS, segment_tokens)


def tokens_in_view(
    source: np.ndarray, position: np.ndarray, length: np.ndarray, step: int, segment_tokens: int, num_sources: int
) -> list[int]:
    """How much less than their whole length parts in lanes count at `step`, per source.

    With H = `lookahead(segment_tokens)`, a part of more than H tokens that started at `position` counts
    min(length, step * segment_tokens - position + H); a shorter one counts whole from the start.

    Args:
        source, position, length: int [m] of the parts. step: now. segment_tokens: of a lane in a step.

    Returns:
        Tokens to take off, one number per source.
    """
    ahead = lookahead(segment_tokens)
    hidden = np.maximum(0, length - (step * segment_tokens - position + ahead))
    hidden[length <= ahead] = 0
    return [int(hidden[source == index].sum()) for index in range(num_sources)]


class Credit:
    """Tokens that count for each source, as lanes take parts and steps go by; chooses the next source.

    Of all sources, the one goes next whose next part leaves the smallest sum of squared deficits: least squares
    rounds to the nearest share, where the largest deficit first would always round up. Ties go by order of sources.

    Attributes:
        candidates: the sources with a weight. ahead: tokens that a part counts ahead of its reading.
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
        self.ahead = lookahead(segment_tokens)
        self.candidates = [index for index, weight in enumerate(weights) if weight]
        self._weight_sum = sum(weights)
        self._squares = sum(weight * weight for weight in weights)
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

    def copy(self) -> Credit:
        """The same, to try something with."""
        other = object.__new__(Credit)
        other.__dict__.update(self.__dict__)
        other._fixed, other._open, other._counted = self._fixed[:], self._open[:], self._counted[:]
        other._whole_at = {step: hidden[:] for step, hidden in self._whole_at.items()}
        return other

    def total(self, step: int) -> int:
        """Tokens that count at `step`, of the sources with a weight."""
        if step != self._step:
            self._go_to(step)
        return sum([self._counted[index] for index in self.candidates])

    def add(self, source: int, step: int, offset: int, length: int) -> None:
        """A lane takes a part of `length` tokens of `source` at `step`, `offset` tokens after the step's first.

        An offset below 0 is of a part that started before.
        """
        if step != self._step:
            self._go_to(step)
        partly = self.ahead - offset
        if length <= self.ahead or length <= partly:
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

    def next_source(self, step: int, offset: int, lengths: Sequence[int]) -> int:
        """The source to take from at `step`, which never goes back, `offset` tokens after the step's first.

        Args:
            lengths: tokens of each source's next part, in order of `candidates`.
        """
        if step != self._step:
            self._go_to(step)
        if len(self.candidates) != 2:
            return self.ranked(step, offset, lengths)[0]
        # Two deficits are the same but for the sign. After `one` it is more_one - gap, after `two` more_two + gap.
        one, two = self.candidates
        counted, weights, ahead = self._counted, self._weights, self.ahead
        more_one, more_two = lengths
        if more_one > ahead:
            more_one = ahead - offset
        if more_two > ahead:
            more_two = ahead - offset
        gap = counted[two] * weights[one] - counted[one] * weights[two]
        return one if more_one * weights[two] - more_two * weights[one] <= 2 * gap else two

    def ranked(self, step: int, offset: int, lengths: Sequence[int]) -> list[int]:
        """The candidates, best first; arguments as of `next_source`."""
        if step != self._step:
            self._go_to(step)
        behind, weights = deficits(self._weights, self._counted), self._weights
        along = sum([weights[index] * behind[index] for index in self.candidates])

        def squares_more(place: int) -> int:
            # With x more tokens of source k, deficit_r grows by w_r x, and that of k falls by x sum(w) as well.
            index, more, whole = self.candidates[place], lengths[place], self._weight_sum
            if more > self.ahead:
                more = self.ahead - offset
            own = whole * (more * (whole - 2 * weights[index]) - 2 * behind[index])
            return more * (2 * along + more * self._squares + own)

        return [self.candidates[place] for place in sorted(range(len(self.candidates)), key=squares_more)]

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
