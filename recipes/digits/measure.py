"""Passes of the target for each image, by how drafts are made and verified; plain JSON values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.draft.last_pass import LastPassDrafter
from bpkit.judge.statistics import Bootstrap, interval
from bpkit.progress import NoProgress, Progress
from recipes.digits.model import CLASSES, PIXELS, SIDE, TrainedDigits, prompt_of, train
from recipes.digits.published import Published, outputs

SCHEMA_VERSION = 1
COUPLED, REJECTION, PUBLISHED, PUBLISHED_COUPLED = "coupled", "rejection", "published", "published_coupled"
ARMS = {
    COUPLED: "last-pass, rule coupled",
    REJECTION: "last-pass, rule rejection",
    PUBLISHED: "SJD as published: drafts drawn anew",
    PUBLISHED_COUPLED: "its Gumbel variant as published: drafts with noise that is kept",
}
ROWS = 20
"""Images that are made together."""


@dataclass(frozen=True)
class DigitSettings:
    """Sizes of the comparison.

    Attributes:
        images: of each class, on each of the two seeds.
        windows: drafted tokens; repeats: where new positions take their token from, see `last-pass`.
        steps: of training.
        tuning_seed: of the images on which window and repeat are chosen. seed: of those that are reported.
    """

    images: int = 5
    windows: tuple[int, ...] = (2, 4, 8, 16, 32)
    repeats: tuple[int, ...] = (1, SIDE)
    steps: int = 1200
    tuning_seed: int = 1
    seed: int = 2
    training_seed: int = 0


@dataclass(frozen=True)
class Made:
    """Images of one way of decoding: tokens of each, and passes."""

    images: list[list[int]]
    passes: list[int]


def bench_digits(settings: DigitSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Train the model, then count passes; `images` holds some to look at."""
    trained = train(settings.steps, settings.training_seed, progress)
    ways = {
        (arm, window, repeat): way
        for window in settings.windows
        for repeat in settings.repeats
        for arm, way in _ways(trained, window, repeat).items()
    }
    ticker = progress or NoProgress()
    ticker.start("making images", 2 * (1 + len(ways)))
    digits = [digit for digit in range(CLASSES) for _ in range(settings.images)]
    made: dict[int, dict[tuple[str, int, int], Made]] = {}
    plain: dict[int, Made] = {}
    for seed in (settings.tuning_seed, settings.seed):
        plain[seed] = _decoded(SpeculativeDecoder(trained.model, LastPassDrafter(), "fixed:1"), digits, seed)
        ticker.tick()
        made[seed] = {}
        for key, way in ways.items():
            made[seed][key] = way(digits, seed)
            ticker.tick()
    rows = [
        {"arm": key[0], "window": key[1], "repeat": key[2]}
        | {"tuning_ratio": _ratio(plain[settings.tuning_seed], made[settings.tuning_seed][key])[0]}
        | _figures(plain[settings.seed], made[settings.seed][key])
        for key in ways
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "headline": headline(rows),
        "settings": asdict(settings),
        "model": {
            "parameters": trained.parameters,
            "train_loss": trained.train_loss,
            "held_out_loss": trained.held_out_loss,
        },
        "arms": ARMS,
        "plain_passes": PIXELS,
        "rows": rows,
        "images": _shown(digits, plain[settings.seed], made[settings.seed], rows),
    }


def _ways(trained: TrainedDigits, window: int, repeat: int) -> dict[str, Callable[[Sequence[int], int], Made]]:
    drafter = LastPassDrafter(window=window, repeat=repeat)
    decoders = {
        arm: SpeculativeDecoder(trained.model, drafter, f"fixed:{window + 1}", rule=arm) for arm in (COUPLED, REJECTION)
    }
    published = {PUBLISHED: False, PUBLISHED_COUPLED: True}
    return {
        **{arm: partial(_decoded, decoder) for arm, decoder in decoders.items()},
        **{arm: partial(_published, trained, Published(window, repeat, coupled)) for arm, coupled in published.items()},
    }


def _decoded(decoder: SpeculativeDecoder, digits: Sequence[int], seed: int) -> Made:
    prompts = [{"prompt": prompt_of(digit), "stream_id": place} for place, digit in enumerate(digits)]
    made = decoder.generate(
        prompts, batch_size=ROWS, max_new_tokens=PIXELS, temperature=1.0, top_k=0, eos_token_id=None, seed=seed
    )
    return Made([one.tokens[0].tolist() for one in made], [len(one.records) for one in made])


def _published(trained: TrainedDigits, way: Published, digits: Sequence[int], seed: int) -> Made:
    prompts = [prompt_of(digit)[0].tolist() for digit in digits]
    made = outputs(trained.model, prompts, way, count=PIXELS, seed=seed)
    return Made([image for image, _ in made], [passes for _, passes in made])


def _ratio(plain: Made, made: Made) -> tuple[float, list[float]]:
    """Passes of plain decoding over those of `made`, a ratio of sums, with its interval over images."""
    before, after = np.array(plain.passes, np.float64), np.array(made.passes, np.float64)
    return float(before.sum() / after.sum()), interval(Bootstrap(len(after), 0).ratios(before, after))


def _figures(plain: Made, made: Made) -> dict[str, Any]:
    ratio, between = _ratio(plain, made)
    equal = sum(a == b for a, b in zip(plain.images, made.images, strict=True))
    return {
        "passes": float(np.mean(made.passes)),
        "ratio": ratio,
        "ratio_interval": between,
        "images": len(made.images),
        "images_equal": equal,
    }


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each way the window and repeat that were best on the tuning seed, with the figures of the other seed."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        best = max((row for row in rows if row["arm"] == arm), key=lambda row: row["tuning_ratio"])
        at = "jacobi_passes_ratio" + ("" if arm == COUPLED else f"_{arm}")
        found |= {at: best["ratio"], f"{at}_interval": best["ratio_interval"]}
        found |= {f"{at}_window": best["window"], f"{at}_repeat": best["repeat"]}
    coupled = [row for row in rows if row["arm"] == COUPLED]
    return found | {name: sum(row[name] for row in coupled) for name in ("images", "images_equal")}


def _shown(
    digits: Sequence[int], plain: Made, made: Mapping[tuple[str, int, int], Made], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The first image of each class, by plain decoding and with the last pass."""
    best = max((row for row in rows if row["arm"] == COUPLED), key=lambda row: row["tuning_ratio"])
    drafted = made[COUPLED, best["window"], best["repeat"]]
    first = [digits.index(digit) for digit in range(CLASSES)]
    return [
        {"digit": digits[i], "plain": plain.images[i], "last_pass": drafted.images[i], "passes": drafted.passes[i]}
        for i in first
    ]
