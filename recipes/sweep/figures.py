"""What a sweep says, as plain JSON values.

    source, figure, prompts, seed, resamples, permutations
    by_size   SIZE -> value (mean over prompts), interval
    all       a group: every size of the file
    chosen    a group: the sizes that were asked for; null if none were
    domains   DOMAIN -> a group over the sizes asked for (else all); null unless the file has several

A group:

    prompts, sizes
    best_fixed     block_size, value, interval: the size with the highest mean, in sample
    leave_one_out  value, interval, gain over best_fixed; block_sizes: SIZE -> prompts it was taken for. Each prompt
                   gets the size that is best on the others: what choosing one size gives on a new prompt
    oracle         value, interval, gain over best_fixed, gain_interval: the mean over prompts of each prompt's best
                   value. A bound, in sample: it picks the luckiest of several measurements
    chance         value, value_interval, gain, gain_interval, p_value of the oracle where no prompt prefers any size
                   (`chance.chance_tables`); spread_ratio: noise of the noisiest size over that of the quietest,
                   null where that has none
    neighbours     value, fixed, gain, gain_interval, chance_gain, chance_interval, p_value: the size is chosen by
                   what other sizes did on the prompt (`chance.choose_by_neighbours`); null for fewer than 4 sizes
                   or 3 prompts

Values are means over prompts of the prompts' own figures: a table of rates has no tokens or seconds to sum. Gains are
shares (0.03 is 3%). `interval` is [low, high]: 95%, paired bootstrap over prompts with the chosen sizes held; those of
`chance` are the central 95% of the permutations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.judge.statistics import RESAMPLES, interval, resampled_sums
from recipes.sweep.chance import (
    FEWEST_PROMPTS,
    FEWEST_SIZES,
    chance_tables,
    choose_by_neighbours,
    leave_one_out,
    one_sided,
    residuals,
)
from recipes.sweep.read import Sweep

PERMUTATIONS = 2000
_CELLS_AT_ONCE = 1_000_000

Floats = NDArray[np.float64]


def summarise_sweep(sweep: Sweep, sizes: Sequence[int] | None = None, seed: int = 0) -> dict[str, Any]:
    """All figures of a sweep.

    Args:
        sweep: at least two prompts and two sizes.
        sizes: also look at these alone, such as the five around the best one; at least two.
        seed: of resamples and permutations; the same seed gives the same figures.

    Raises:
        ValueError: too few prompts or sizes, or a size that was not measured.
    """
    if len(sweep.prompts) < 2:
        raise ValueError(f"{sweep.source or 'the sweep'} has one prompt; leaving one out needs at least two")
    near = None if sizes is None else sweep.at(sizes)
    for part in (sweep, near):
        if part is not None and len(part.sizes) < 2:
            raise ValueError(f"there is nothing to choose from one block size ({part.sizes[0]}); give two or more")
    means = [_mean(column, seed) for column in sweep.values.T]
    return {
        "source": sweep.source,
        "figure": sweep.figure,
        "prompts": len(sweep.prompts),
        "seed": seed,
        "resamples": RESAMPLES,
        "permutations": PERMUTATIONS,
        "by_size": {str(size): mean for size, mean in zip(sweep.sizes, means, strict=True)},
        "all": _group(sweep, seed),
        "chosen": None if near is None else _group(near, seed),
        "domains": _domains(near or sweep, seed),
    }


def _domains(sweep: Sweep, seed: int) -> dict[str, Any] | None:
    """A group for each domain of two prompts or more."""
    if sweep.domains is None or len(set(sweep.domains)) < 2:
        return None
    groups = {}
    for domain in dict.fromkeys(sweep.domains):
        rows = [i for i, other in enumerate(sweep.domains) if other == domain]
        if len(rows) > 1:
            prompts = tuple(sweep.prompts[i] for i in rows)
            groups[domain] = _group(Sweep(prompts, sweep.sizes, sweep.values[rows], sweep.figure), seed)
    return groups


def _group(sweep: Sweep, seed: int) -> dict[str, Any]:
    """The figures of some prompts and sizes."""
    values, sizes = sweep.values, sweep.sizes
    best = int(values.mean(axis=0).argmax())
    fixed, oracle = values[:, best], values.max(axis=1)
    columns = leave_one_out(values)
    honest = values[np.arange(len(values)), columns]
    taken = {str(sizes[column]): int((columns == column).sum()) for column in sorted(set(columns.tolist()))}
    return {
        "prompts": len(sweep.prompts),
        "sizes": [int(size) for size in sizes],
        "best_fixed": {"block_size": int(sizes[best]), **_mean(fixed, seed)},
        "leave_one_out": {**_mean(honest, seed), **_gain(honest, fixed, seed), "block_sizes": taken},
        "oracle": {**_mean(oracle, seed), **_gain(oracle, fixed, seed)},
        **_against_chance(sweep, float(fixed.mean()), seed),
    }


def _against_chance(sweep: Sweep, fixed: float, seed: int) -> dict[str, Any]:
    """What the oracle and the choice by neighbours come to, beside what they come to in tables without preferences."""
    values, sizes = sweep.values, sweep.sizes
    enough = len(values) >= FEWEST_PROMPTS and len(sizes) >= FEWEST_SIZES
    oracles, gains = [], []
    for tables in _chance(values, seed):
        oracles.append(tables.max(axis=2).mean(axis=1))
        if enough:
            gains.append(choose_by_neighbours(tables, sizes).gain)
    oracle = np.concatenate(oracles)
    low, high = interval(oracle)
    chance = {
        "value": float(oracle.mean()),
        "value_interval": [low, high],
        "gain": float(oracle.mean()) / fixed - 1,
        "gain_interval": [low / fixed - 1, high / fixed - 1],
        "p_value": one_sided(float(values.max(axis=1).mean()), oracle),
        "spread_ratio": _spread_ratio(values),
    }
    if not enough:
        return {"chance": chance, "neighbours": None}
    choice, gain = choose_by_neighbours(values, sizes), np.concatenate(gains)
    neighbours = {
        "value": float(choice.chosen.mean()),
        "fixed": float(choice.fixed.mean()),
        **_gain(choice.chosen, choice.fixed, seed),
        "chance_gain": float(gain.mean()),
        "chance_interval": interval(gain),
        "p_value": one_sided(float(choice.gain), gain),
    }
    return {"chance": chance, "neighbours": neighbours}


def _spread_ratio(values: Floats) -> float | None:
    """Noise of the noisiest size over that of the quietest; None where one size has none and another has some."""
    noise = residuals(values).std(axis=0)
    if noise.max() < 1e-12:
        return 1.0
    return float(noise.max() / noise.min()) if noise.min() > 1e-12 else None


def _chance(values: Floats, seed: int) -> Iterator[Floats]:
    """`PERMUTATIONS` chance tables, some at a time: [some, prompts, sizes]."""
    rng, left = np.random.default_rng(seed), PERMUTATIONS
    while left:
        count = min(left, max(1, _CELLS_AT_ONCE // values.size))
        yield chance_tables(values, count, rng)
        left -= count


def _mean(values: Floats, seed: int) -> dict[str, Any]:
    """Mean over prompts, with its interval."""
    return {
        "value": float(values.mean()),
        "interval": interval(resampled_sums(values[:, None], seed)[:, 0] / len(values)),
    }


def _gain(ours: Floats, theirs: Floats, seed: int) -> dict[str, Any]:
    """How much more one choice gives than another on the same prompts, as a share."""
    sums = resampled_sums(np.stack([ours, theirs], axis=1), seed)
    return {
        "gain": float(ours.sum() / theirs.sum() - 1),
        "gain_interval": interval(sums[:, 0] / sums[:, 1] - 1),
    }
