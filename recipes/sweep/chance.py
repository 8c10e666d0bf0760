"""What choosing a block size per prompt is worth in a sweep, and what chance alone makes it look worth.

One number for each prompt and size cannot tell a prompt's preference from luck, and a maximum takes both: the winner's
curse. Two answers:

- `chance_tables`: tables with the same prompts and the same sizes in which no prompt prefers any size. The oracle of
  these is what luck alone gives it.
- `choose_by_neighbours`: the size is chosen by what *other* sizes did on this prompt and scored by its own value, so
  what decides and what is scored share no measurement. It flatters, as neighbouring sizes draft the same text and share
  its luck, and it takes measurements that no policy has; it is also noisier than a perfect forecast. So it says what
  order of gain per-prompt knowledge is worth, and bounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEWEST_PROMPTS, FEWEST_SIZES = 3, 4
"""Of `choose_by_neighbours`: a slope from two other prompts, and two sizes in each half."""


def residuals(values: Floats) -> Floats:
    """What an additive model, size mean plus prompt mean, leaves of a table: float64 [prompts, sizes]."""
    rows, columns = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    left: Floats = values - rows - columns + values.mean()
    return left


def chance_tables(values: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Tables in which no prompt prefers any size, as noisy as the real one: float64 [count, prompts, sizes].

    The residuals of the additive model are shuffled **within each prompt**. If a value is prompt + size + noise, and
    the noise of one prompt is as likely to fall on one size as on another, all shuffles are equally likely. Nothing is
    assumed of how noisy prompts are, and they differ: an answer of ten steps has a noisier mean than one of sixty.
    (Shuffling across prompts within each size would assume that they are alike.) It does assume that sizes are about
    equally noisy, so it is meant for sizes near each other.

    The means of prompts and sizes are kept, so the best fixed size is worth the same in every table; removing the size
    means once more takes 1 part in `prompts` of the variance, which is given back.
    """
    left = residuals(values)
    prompts = len(values)
    shuffled = rng.permuted(np.broadcast_to(left, (count, *left.shape)), axis=2)
    shuffled = (shuffled - shuffled.mean(axis=1, keepdims=True)) * np.sqrt(prompts / (prompts - 1))
    tables: Floats = values - left + shuffled
    return tables


def one_sided(observed: float, chance: Floats) -> float:
    """p-value of a permutation test, (1 + count) / (1 + permutations): the observed table is one of them."""
    # Sums in another order differ in the last bits; equal tables must count as equal.
    reached = int((chance >= observed - 1e-12 * abs(observed)).sum())
    return (1 + reached) / (1 + len(chance))


def leave_one_out(values: Floats) -> Ints:
    """For each prompt, the column that is best on average over the others: int64 [..., prompts]."""
    others = values.sum(axis=-2, keepdims=True) - values
    columns: Ints = others.argmax(axis=-1)
    return columns


@dataclass(frozen=True)
class ChosenSizes:
    """Values that were got, float64 [..., prompts]: by choosing per prompt, and with the size best on the others."""

    chosen: Floats
    fixed: Floats

    @property
    def gain(self) -> Floats:
        """Of choosing per prompt, as a share: float64 [...]."""
        gain: Floats = self.chosen.mean(axis=-1) / self.fixed.mean(axis=-1) - 1
        return gain


def choose_by_neighbours(values: Floats, sizes: Ints) -> ChosenSizes:
    """Choose among every other size by the values of the sizes between them, and the other way round: the mean of both.

    Args:
        values: [..., prompts, sizes]; at least 3 prompts and 4 sizes.
        sizes: ascending, [sizes].
    """
    halves = [_half(values, sizes, np.arange(start, len(sizes), 2)) for start in (0, 1)]
    return ChosenSizes(
        np.mean([half.chosen for half in halves], axis=0),
        np.mean([half.fixed for half in halves], axis=0),
    )


def _half(values: Floats, sizes: Ints, candidates: Ints) -> ChosenSizes:
    """Choose among the candidates by the other sizes.

    Shapes are [..., prompts, candidates]. A prompt's curve over the candidates is read off its values at the other
    sizes (`seen`: interpolated, its own level taken out). How far such a reading is to be trusted is a slope, fitted
    on the other prompts: 0, where readings say nothing, leaves the size that is best on the other prompts.
    """
    prompts = values.shape[-2]
    others = np.delete(np.arange(len(sizes)), candidates)
    seen = _centred(values[..., others] @ _interpolation(sizes[others], sizes[candidates]))
    scores = values[..., candidates]
    truth = _centred(scores)

    def without(per_prompt: Floats) -> Floats:
        rest: Floats = per_prompt.sum(axis=-2, keepdims=True) - per_prompt
        return rest

    def covariance(a: Floats, b: Floats) -> Floats:
        # Over the other prompts, around the other prompts' means.
        products = without(a * b) - without(a) * without(b) / (prompts - 1)
        total: Floats = products.sum(axis=-1, keepdims=True)
        return total

    spread = covariance(seen, seen)
    known = spread > 1e-12 * (1 + np.abs(seen).max())
    slope = np.where(known, covariance(seen, truth) / np.where(known, spread, 1), 0).clip(min=0)
    usual = without(truth) / (prompts - 1)
    predicted = usual + slope * (seen - without(seen) / (prompts - 1))
    return ChosenSizes(_pick(scores, predicted), _pick(scores, usual))


def _centred(curves: Floats) -> Floats:
    centred: Floats = curves - curves.mean(axis=-1, keepdims=True)
    return centred


def _pick(scores: Floats, by: Floats) -> Floats:
    """The score where `by` is highest: [..., prompts]."""
    picked: Floats = np.take_along_axis(scores, by.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    return picked


def _interpolation(known: Ints, wanted: Ints) -> Floats:
    """Weights that read values at `wanted` sizes off those at `known` ones, linearly, level beyond the ends.

    float64 [known, wanted]; each column sums to 1.
    """
    weights = [np.interp(wanted, known, row) for row in np.eye(len(known))]
    return np.array(weights, dtype=np.float64)
