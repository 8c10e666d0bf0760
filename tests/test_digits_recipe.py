"""The recipe that counts passes for images of digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import Result

from recipes.digits.measure import ARMS, headline
from recipes.digits.model import LEVELS, PIXELS, digit_tokens
from recipes.digits.published import Published, outputs

pytest.importorskip("sklearn")


def test_tokens_of_images() -> None:
    images = digit_tokens(0)
    assert images.shape == (1797, 1 + PIXELS)
    assert images[:, 1:].min() == 0
    assert images[:, 1:].max() == LEVELS - 1
    assert sorted(set(images[:, 0].tolist())) == list(range(LEVELS, LEVELS + 10))


@pytest.mark.parametrize("coupled", [False, True])
def test_published_decoding_has_the_distribution_of_the_model(coupled: bool) -> None:
    """A model of two tokens that mostly repeats the token before."""

    class Model:
        config = SimpleNamespace(vocab_size=2)

        def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
            stays = torch.nn.functional.one_hot(ids, 2) * 2.0
            return SimpleNamespace(logits=stays)

    count, draws = 6, 2000
    model: Any = Model()
    made = outputs(model, [[0]] * draws, Published(3, 1, coupled), count=count, seed=1)
    tokens = torch.tensor([[0, *ids] for ids, _ in made])
    stays = (tokens[:, 1:] == tokens[:, :-1]).double().mean(dim=0)
    wanted = torch.tensor(2.0).sigmoid().double()
    error = (wanted * (1 - wanted) / draws).sqrt()
    assert (stays - wanted).abs().max() < 4 * error
    assert sum(passes for _, passes in made) / draws < 0.7 * count


def test_the_headline_chooses_on_the_tuning_seed() -> None:
    rows = [
        {"arm": arm, "window": window, "repeat": 1, "tuning_ratio": tuning, "ratio": ratio}
        | {"ratio_interval": [ratio, ratio], "images": 4, "images_equal": 4}
        for arm in ARMS
        for window, tuning, ratio in ((2, 1.5, 1.4), (4, 1.4, 1.6))
    ]
    found = headline(rows)
    assert (found["jacobi_passes_ratio"], found["jacobi_passes_ratio_window"]) == (1.4, 2)
    assert (found["images"], found["images_equal"]) == (8, 8)


@pytest.mark.slow
def test_images_are_those_of_plain_decoding(recipe: Callable[..., Result], tmp_path: Path) -> None:
    out, plot = tmp_path / "last_pass.json", tmp_path / "last_pass.png"
    sizes = ["--images", 1, "--windows", "4+8", "--steps", 3]
    result = recipe("bench-digits", *sizes, "--json", out, "--plot", plot)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert len(report["rows"]) == len(ARMS) * 2 * 2
    head = report["headline"]
    assert head["images"] == head["images_equal"] == 10 * 2 * 2
    assert head["jacobi_passes_ratio"] > 1
    assert all(image["plain"] == image["last_pass"] for image in report["images"])
    assert plot.stat().st_size > 0
    assert "images equal to plain decoding's" in result.stdout

    result = recipe("bench-digits", "--seed", 1, "--tuning-seed", 1)
    assert result.exit_code == 2
    assert "must differ" in result.stderr
