"""Is choosing a block size per prompt learnable at all from what is known after prefill? A permutation test.

A ridge regression predicts each prompt's curve, seconds per token by block size, from its features; cross-validated,
the size of the lowest predicted time is compared with the best fixed size of the training folds. The same with curves
dealt out anew among the prompts, many times, gives the p-value (Ojala & Garriga 2010, "Permutation tests for studying
classifier performance", test 1). Not by scikit-learn's `permutation_test_score`, which averages a score over folds:
tokens per second is a ratio of sums over all prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.installation.distribution import install_command
from bpkit.judge.statistics import Floats, Ints, interval, resampled_sums
from bpkit.progress import NoProgress, Progress

FEWEST_PROMPTS = 20
"""With fewer, a fold trains on about a dozen curves and the answer is noise either way."""
COMPONENTS = 128
"""Principal components at most, to bound the time of a fit; for fewer training prompts than this none is lost."""
ALPHAS = tuple(float(alpha) for alpha in np.logspace(0, 6, 13))
"""Ridge penalties to choose from. The largest predicts the same curve for all prompts, which is the fixed size."""


def learnable(
    features: NDArray[Any],
    seconds: NDArray[Any],
    tokens: NDArray[Any],
    sizes: Sequence[object],
    *,
    permutations: int = 200,
    folds: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Whether the block size is worth choosing per prompt, by features known after prefill.

    Args:
        features: [prompts, dims], such as the prefill's hidden state.
        seconds: what each prompt takes at each size, measured or under a cost model: [prompts, sizes].
        tokens: what it yields, the same at every size: [prompts].
        sizes: block sizes, or other choices, one per column of `seconds`.
        permutations: the smallest p-value that can come out is 1 / (1 + permutations).
        folds: of the cross-validation.
        seed: of folds, permutations and resamples.
        progress: is told of each permutation.

    Returns:
        Plain JSON values. Gains are shares of the tokens/s of a fixed size: 0.02 is 2% more.

            gain                   tokens/s on held-out prompts with the size chosen per prompt, over that with the size
                                   that was best on the training folds; null where there is too little data to say
            gain_interval          95%, paired bootstrap over prompts with all choices held
            null_gain              mean of the gain when features are paired with other prompts' curves
            null_interval          and its central 95%
            p_value                (1 + permutations that gained as much) / (1 + permutations)
            in_sample_oracle_gain  each prompt's fastest size over the fastest fixed one: a bound, in sample
            prompts, permutations, folds
            note                   one sentence on what it means

    Raises:
        ValueError: shapes that do not fit, or values that are not finite, or not positive where they are times.
        ImportError: scikit-learn is not installed.
    """
    x, s, t = (np.asarray(a, dtype=np.float64) for a in (features, seconds, tokens))
    _check(x, s, t, sizes, permutations, folds)
    reason = _too_little(x, sizes, max(FEWEST_PROMPTS, 2 * folds))
    bound = float(s.sum(axis=0).min() / s.min(axis=1).sum() - 1) if s.size else None
    found: dict[str, Any] = dict.fromkeys(("gain", "gain_interval", "null_gain", "null_interval", "p_value"))
    found |= {"in_sample_oracle_gain": bound, "prompts": len(x), "permutations": 0, "folds": folds, "note": reason}
    if reason:
        return found
    split, ticker, rng = list(_folds(x, folds, seed)), progress or NoProgress(), np.random.default_rng(seed)
    observed, null = _held_out(split, s, t), np.empty(permutations)
    ticker.start("permutation test", permutations)
    for i in range(permutations):
        order = rng.permutation(len(x))
        null[i] = _gain(_held_out(split, s[order], t[order]))
        ticker.tick()
    gain, sums = _gain(observed), resampled_sums(observed, seed)
    p_value = (1 + int((null >= gain - 1e-12).sum())) / (1 + permutations)
    return found | {
        "gain": gain,
        "gain_interval": interval(sums[:, 1] / sums[:, 0] - 1),
        "null_gain": float(null.mean()),
        "null_interval": interval(null),
        "p_value": p_value,
        "permutations": permutations,
        "note": _verdict(gain, p_value),
    }


def _check(x: Floats, s: Floats, t: Floats, sizes: Sequence[object], permutations: int, folds: int) -> None:
    if x.ndim != 2 or s.shape != (len(x), len(sizes)) or t.shape != (len(x),):
        raise ValueError(
            f"features {x.shape}, seconds {s.shape} and tokens {t.shape} must be [prompts, dims], "
            f"[prompts, {len(sizes)} sizes] and [prompts]"
        )
    if not np.isfinite(x).all():
        raise ValueError("features must be finite; some are not")
    for name, values in (("seconds", s), ("tokens", t)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name} must be finite and more than 0; leave out prompts that no step was made for")
    if permutations < 1 or folds < 2:
        raise ValueError(f"it takes a permutation and 2 folds at least, not {permutations} and {folds}")


def _too_little(x: Floats, sizes: Sequence[object], fewest: int) -> str:
    """Why nothing can be said, or nothing."""
    if len(sizes) < 2:
        return "Not tested: with one block size there is nothing to choose."
    if len(x) < fewest:
        return f"Not tested: {len(x)} prompts are too few to learn from and to judge on; it takes {fewest}."
    if not x.shape[1] or np.ptp(x, axis=0).max() == 0:
        return "Not tested: the features are the same for all prompts, so they cannot tell prompts apart."
    return ""


def _verdict(gain: float, p_value: float) -> str:
    said = (
        f"Chosen per prompt from prefill features, held-out tokens/s change by {100 * gain:+.2f}% (p = {p_value:.3f})"
    )
    if p_value > 0.05:
        return f"{said}: no more than features of other prompts give, so on this data nothing was learned."
    if gain <= 0:
        return f"{said}: the features say something of the curves, but choosing by them does not pay."
    return f"{said}: more than features of other prompts give, so something of the choice is learnable."


_Fold = tuple[Ints, Ints, Floats, Floats]
"""Who trains and who is judged, and the features of both, reduced by what the training prompts say alone."""


def _folds(x: Floats, folds: int, seed: int) -> Iterator[_Fold]:
    """Standardised, principal components by fold: none depend on the curves, so all permutations share them."""
    try:
        from sklearn.decomposition import PCA
        from sklearn.model_selection import KFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            f"The test needs scikit-learn, which is not installed: {install_command('traces')}"
        ) from error
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(x):
        components = min(COMPONENTS, len(train) - 1, x.shape[1])
        reduce = make_pipeline(StandardScaler(), PCA(components, random_state=seed, svd_solver="full"))
        yield train, test, reduce.fit_transform(x[train]), reduce.transform(x[test])


def _held_out(folds: Sequence[_Fold], seconds: Floats, tokens: Floats) -> Floats:
    """Seconds of each prompt at the size chosen for it, and at the training folds' best fixed size: [prompts, 2]."""
    from sklearn.linear_model import RidgeCV

    curves = seconds / tokens[:, None]
    # Its own level says nothing of a prompt's best size, but would rule the choice of the penalty.
    curves -= curves.mean(axis=1, keepdims=True)
    result = np.empty((len(seconds), 2))
    for train, test, train_features, test_features in folds:
        # Weighted by tokens, the curve that is predicted where features say nothing is total seconds over total tokens,
        # less a constant: its lowest point is the best fixed size, and the choice falls back to that.
        ridge = RidgeCV(alphas=ALPHAS).fit(train_features, curves[train], sample_weight=tokens[train])
        result[test, 0] = seconds[test, ridge.predict(test_features).argmin(axis=1)]
        result[test, 1] = seconds[test, seconds[train].sum(axis=0).argmin()]
    return result


def _gain(seconds: Floats) -> float:
    """The tokens are the same, so tokens/s is the other way round as seconds: fixed over chosen, less 1."""
    chosen, fixed = seconds.sum(axis=0)
    return float(fixed / chosen - 1)
