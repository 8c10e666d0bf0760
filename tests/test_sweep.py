"""Sweeps: every layout gives the same table, errors say where and how to mend, figures are those computed by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import Result

from recipes.sweep.chance import (
    chance_tables,
    choose_by_neighbours,
    leave_one_out,
    one_sided,
    residuals,
)
from recipes.sweep.figures import summarise_sweep
from recipes.sweep.read import Sweep, read_sweep

Floats = NDArray[np.float64]
Recipe = Callable[..., Result]

DATA = Path(os.environ.get("BPKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
PUBLISHED = DATA / "blockpilot_gsm8k_sweep.json"
needs_published = pytest.mark.skipif(
    not PUBLISHED.exists(), reason="the published sweep is not here: set BPKIT_DATA to the folder that holds it"
)

TABLE = {"a": {4: 3.0, 8: 5.5}, "b": {4: 2.5, 8: 2.25}}


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def sweep_of(values: Any, sizes: Any, **more: Any) -> Sweep:
    table = np.array(values, np.float64)
    return Sweep(tuple(str(i) for i in range(len(table))), np.array(sizes, np.int64), table, **more)


def rows(figure: str = "acceptance_length") -> list[dict[str, Any]]:
    return [{"prompt": p, "block_size": b, figure: v} for p, curve in TABLE.items() for b, v in curve.items()]


# FigureReading


LAYOUTS: dict[str, tuple[str, object]] = {
    "published": (
        "sweep.json",
        {"block_sizes": [4, 8], "prompts": [{"index": p, "acceptance_length": c} for p, c in TABLE.items()]},
    ),
    "json mapping": ("sweep.json", TABLE),
    "json rows": ("sweep.json", rows()),
    "json rows in another order": ("sweep.JSON", sorted(rows(), key=lambda r: (r["prompt"], -r["block_size"]))),
    "csv wide": ("sweep.csv", "prompt,8,4\na,5.5,3\nb,2.25,2.5\n"),
    "csv wide with a byte order mark": ("sweep.csv", "\ufeffprompt, 4, 8\r\na, 3, 5.5\r\n\r\nb, 2.5, 2.25\r\n"),
    "csv long": ("sweep.csv", "block_size,prompt,acceptance_length\n4,a,3\n8,a,5.5\n4,b,2.5\n8,b,2.25\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_table(layout: str, tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, *LAYOUTS[layout]))
    assert sweep.prompts == ("a", "b")
    assert sweep.sizes.tolist() == [4, 8]
    assert sweep.values.tolist() == [[3.0, 5.5], [2.5, 2.25]]
    assert sweep.figure == "acceptance_length"
    assert sweep.domains is None


def test_domains_are_read_where_they_stand(tmp_path: Path) -> None:
    wide = read_sweep(write(tmp_path, "sweep.csv", "prompt,domain,4,8\na,maths,3,5.5\nb,code,2.5,2.25\n"))
    assert wide.domains == ("maths", "code")
    assert wide.sizes.tolist() == [4, 8]
    long = [{**row, "domain": {"a": "maths", "b": "code"}[row["prompt"]]} for row in rows()]
    assert read_sweep(write(tmp_path, "sweep.json", long)).domains == ("maths", "code")


def test_tokens_per_second_may_be_above_the_block_size(tmp_path: Path) -> None:
    long = write(tmp_path, "sweep.csv", "prompt,block_size,tokens_per_second\na,4,180.5\na,8,0.5\n")
    assert read_sweep(long).figure == "tokens_per_second"
    wide = write(tmp_path, "wide.csv", "prompt,4,8\na,180.5,0.5\n")
    assert read_sweep(wide, figure="tokens_per_second").values.tolist() == [[180.5, 0.5]]


def test_a_file_with_both_figures_asks_which(tmp_path: Path) -> None:
    both = write(tmp_path, "sweep.json", [{**row, "tokens_per_second": 100.0} for row in rows()])
    with pytest.raises(ValueError, match="both acceptance_length, tokens_per_second: say which"):
        read_sweep(both)
    assert read_sweep(both, figure="tokens_per_second").values.tolist() == [[100.0, 100.0], [100.0, 100.0]]
    assert read_sweep(both, figure="acceptance_length").values[0].tolist() == [3.0, 5.5]


FAULTS: dict[str, tuple[str, object, list[str]]] = {
    "a gap": (
        "s.csv",
        "prompt,block_size,acceptance_length\na,4,3\na,8,5\nb,4,3\n",
        ["'b'", "block size 8", "measure"],
    ),
    "an empty cell": ("s.csv", "prompt,4,8\na,3,\n", ["line 2, column '8'", "missing"]),
    "a short line": ("s.csv", "prompt,4,8\na,3\n", ["line 2", "2 columns", "header has 3"]),
    "given twice": ("s.csv", "prompt,4\na,3\nb,2\na,2\n", ["'a'", "line 2, column '4'", "line 4, column '4'", "mean"]),
    "a column twice": ("s.csv", "prompt,4,4\na,3,3\n", ["line 1", "'4' stands twice"]),
    "not a number": ("s.csv", 'prompt,4,8\na,3,"5,1"\n', ["line 2, column '8'", "'5,1'", "5.25"]),
    "not finite": ("s.json", '{"a": {"4": NaN}}', ["prompt 'a', block size 4", "not a number"]),
    "a text in JSON": ("s.json", {"a": {"4": "3.1"}}, ["without quotes"]),
    "null in JSON": ("s.json", {"a": {"4": None}}, ["prompt 'a', block size 4", "missing"]),
    "accepted tokens": ("s.csv", "prompt,4,8\na,0.9,2\n", ["line 2, column '4'", "below 1", "add 1"]),
    "draft lengths": ("s.csv", "prompt,3,7\na,3.5,4\n", ["line 2, column '3'", "draft lengths", "--figure"]),
    "no speed": ("s.csv", "prompt,block_size,tokens_per_second\na,4,0\n", ["line 2", "more than 0"]),
    "size zero": ("s.json", {"a": {"0": 1.0}}, ["block size 0"]),
    "not a size": ("s.json", {"a": {"big": 1.0}}, ["'big' is not a whole number"]),
    "no prompts": ("s.csv", "prompt,4,8\n", ["no prompts"]),
    "nothing at all": ("s.csv", "", ["line 1", "no column 'prompt'"]),
    "no sizes": ("s.csv", "prompt,domain\na,maths\n", ["no column for a block size"]),
    "an unknown column": ("s.csv", "prompt,4,speed\na,3,5\n", ["line 1", "'speed' is no block size"]),
    "no figure": ("s.csv", "prompt,block_size,tau\na,3,5\n", ["neither", "tau"]),
    "a declared size": (
        "s.json",
        {"block_sizes": [4, 8], "prompts": [{"index": 0, "acceptance_length": {"4": 3.0}}]},
        ["prompt 1", "block size 8", "'block_sizes'"],
    ),
    "no block_size": ("s.json", [{"prompt": "a", "acceptance_length": 3.0}], ["row 1", "'block_size'"]),
    "no id": ("s.json", [{"block_size": 4, "acceptance_length": 3.0}], ["row 1", "no 'prompt'"]),
    "rows that are none": ("s.json", [3.0], ["row 1", "not an object"]),
    "a key twice": ("s.json", '{"a": {"4": 3, "4": 2}}', ["'4' stands twice"]),
    "no JSON": ("s.json", "{", ["not valid JSON"]),
    "a single number": ("s.json", "3", ["no table"]),
    "two domains": (
        "s.csv",
        "prompt,domain,block_size,acceptance_length\na,x,4,3\na,y,8,3\n",
        ["line 3", "'y'", "'x'"],
    ),
    "half the domains": ("s.csv", "prompt,domain,4\na,x,3\nb,,3\n", ["'b' has no domain"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_with_place_and_mending(fault: str, tmp_path: Path) -> None:
    name, content, fragments = FAULTS[fault]
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=r".") as caught:
        read_sweep(path)
    for fragment in (str(path), *fragments):
        assert fragment in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sweep file"):
        read_sweep(tmp_path / "absent.csv")


# Figures


def test_figures_computed_by_hand() -> None:
    """Two prompts like size 8, one likes size 4 so much that without it the others' best is another."""
    report = summarise_sweep(sweep_of([[3.0, 4.0], [3.0, 4.5], [4.0, 2.0]], [4, 8]))
    group = report["all"]
    assert report["by_size"]["4"]["value"] == pytest.approx(10 / 3)
    assert report["by_size"]["8"]["value"] == pytest.approx(10.5 / 3)
    assert group["best_fixed"]["block_size"] == 8
    assert group["oracle"]["value"] == pytest.approx(12.5 / 3)
    assert group["oracle"]["gain"] == pytest.approx(12.5 / 10.5 - 1)
    # Without the first: 7 against 6.5, so size 4. Without the second: 7 against 6, size 4. Without the third: size 8.
    assert group["leave_one_out"]["block_sizes"] == {"4": 2, "8": 1}
    assert group["leave_one_out"]["value"] == pytest.approx((3 + 3 + 2) / 3)
    assert group["leave_one_out"]["gain"] == pytest.approx(8 / 10.5 - 1)
    assert group["neighbours"] is None
    assert report["chosen"] is None


def test_sizes_asked_for_are_a_group_of_their_own() -> None:
    table = sweep_of([[1, 3, 9, 4], [2, 5, 9, 4], [1, 4, 9, 6]], [2, 4, 8, 16], figure="tokens_per_second")
    report = summarise_sweep(table, [16, 4])
    assert report["all"]["best_fixed"]["block_size"] == 8
    assert report["chosen"]["sizes"] == [4, 16]
    assert report["chosen"]["best_fixed"] == {**report["by_size"]["16"], "block_size": 16}
    assert report["chosen"]["oracle"]["value"] == pytest.approx((4 + 5 + 6) / 3)


def test_a_sweep_without_noise_has_no_oracle_gain_and_nothing_beats_it() -> None:
    """Prompt plus size: every prompt's best is the same size, and shuffling zero residuals changes nothing."""
    table = sweep_of(np.arange(5.0)[:, None] + np.array([2.0, 3.0, 5.0, 4.0]), [14, 15, 16, 17])
    group = summarise_sweep(table)["all"]
    assert group["oracle"]["gain"] == pytest.approx(0)
    assert group["chance"]["gain"] == pytest.approx(0)
    assert group["chance"]["p_value"] == 1.0
    assert group["chance"]["spread_ratio"] == 1
    assert group["neighbours"]["gain"] == pytest.approx(0)


def test_domains_are_judged_apart() -> None:
    table = sweep_of([[3.0, 2.0], [3.5, 2.0], [2.0, 6.0], [2.0, 7.0]], [4, 8], domains=("x", "x", "y", "y"))
    report = summarise_sweep(table)
    assert report["domains"]["x"]["best_fixed"]["block_size"] == 4
    assert report["domains"]["y"]["best_fixed"]["block_size"] == 8
    assert report["all"]["best_fixed"]["block_size"] == 8


def test_intervals_cover_the_figure_and_shrink_with_prompts() -> None:
    rng = np.random.default_rng(0)
    few, many = (
        summarise_sweep(sweep_of(rng.normal(6, 1, (n, 2)).clip(1, 16), [16, 17]))["by_size"]["16"] for n in (16, 256)
    )
    for entry in (few, many):
        assert entry["interval"][0] < entry["value"] < entry["interval"][1]
    assert np.diff(few["interval"])[0] > 2.5 * np.diff(many["interval"])[0]
    # Of the mean of 256 values with standard deviation 1: about +-1.96/16.
    assert np.diff(many["interval"])[0] == pytest.approx(2 * 1.96 / 16, rel=0.2)


@pytest.mark.parametrize(
    ("values", "sizes", "chosen", "message"),
    [
        ([[3.0, 4.0]], [4, 8], None, "one prompt"),
        ([[3.0], [4.0]], [4], None, "nothing to choose"),
        ([[3.0, 4.0], [3.0, 4.0]], [4, 8], [4], "nothing to choose"),
        ([[3.0, 4.0], [3.0, 4.0]], [4, 8], [4, 5, 6], "has no block size 5, 6; it has 4, 8"),
    ],
)
def test_too_little_is_refused(values: Any, sizes: Any, chosen: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarise_sweep(sweep_of(values, sizes), chosen)


def test_the_same_seed_gives_the_same_figures_and_plain_json() -> None:
    table = sweep_of(np.random.default_rng(1).normal(6, 0.5, (8, 5)), range(14, 19))
    first = summarise_sweep(table, seed=3)
    assert json.dumps(first, allow_nan=False) == json.dumps(summarise_sweep(table, seed=3))
    assert first["all"]["chance"] != summarise_sweep(table, seed=4)["all"]["chance"]


# Chance


def noise_only(seed: int, prompts: int = 32) -> Floats:
    """Prompt + size + noise that differs by prompt, as acceptance lengths of long and short answers do."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.1, 0.5, (prompts, 1))
    table: Floats = (
        6 + rng.normal(0, 0.6, (prompts, 1)) + [0.0, 0.2, 0.3, 0.32, 0.1] + rng.normal(0, spread, (prompts, 5))
    )
    return table


def test_chance_tables_keep_all_means_and_the_amount_of_noise() -> None:
    values = noise_only(0)
    tables = chance_tables(values, 400, np.random.default_rng(0))
    np.testing.assert_allclose(tables.mean(axis=1), np.broadcast_to(values.mean(axis=0), (400, 5)))
    np.testing.assert_allclose(tables.mean(axis=2), np.broadcast_to(values.mean(axis=1), (400, 32)))
    noise = np.array([residuals(table) for table in tables])
    assert (noise**2).mean() == pytest.approx((residuals(values) ** 2).mean(), rel=0.02)
    # By prompt too: noisy prompts stay noisy.
    assert np.corrcoef(noise.std(axis=(0, 2)), residuals(values).std(axis=1))[0, 1] > 0.99


def test_where_no_prompt_prefers_any_size_the_oracle_gains_and_chance_says_so() -> None:
    """The winner's curse: 2% and more out of nothing. The permutation expects it, and finds nothing to report."""
    groups = [summarise_sweep(sweep_of(noise_only(seed), range(14, 19)))["all"] for seed in range(8)]
    assert all(group["oracle"]["gain"] > 0.02 for group in groups)
    difference = np.mean([g["oracle"]["gain"] - g["chance"]["gain"] for g in groups])
    assert abs(difference) < 0.003
    assert sum(group["chance"]["p_value"] <= 0.05 for group in groups) <= 1
    assert sum(group["neighbours"]["p_value"] <= 0.05 for group in groups) <= 1
    assert abs(np.mean([group["neighbours"]["gain"] for group in groups])) < 0.002


def test_an_oracle_that_is_more_than_luck_is_found() -> None:
    """Prompts like one or the other of the two good sizes, and never a bad one: no shuffle does as well."""
    liking = np.where(np.arange(20) % 2, 0.5, -0.5)[:, None] * [0.0, 1.0, -1.0, 0.0]
    values = 5 + np.array([0.0, 1.0, 1.0, 0.0]) + liking + np.random.default_rng(0).normal(0, 0.02, (20, 4))
    group = summarise_sweep(sweep_of(values, [14, 15, 16, 17]))["all"]
    assert group["oracle"]["gain"] == pytest.approx(0.5 / 6, abs=0.01)
    assert group["chance"]["p_value"] == 1 / 2001
    assert group["chance"]["gain_interval"][1] < group["oracle"]["gain"]


def test_preferences_that_neighbouring_sizes_share_are_found() -> None:
    rng = np.random.default_rng(0)
    sizes = np.arange(12, 20)
    best = np.where(np.arange(40) % 2, 13.0, 18.0)[:, None]
    values = 8 - 0.05 * (sizes - best) ** 2 + rng.normal(0, 0.1, (40, 8))
    near = summarise_sweep(sweep_of(values, sizes))["all"]["neighbours"]
    # In each half the best is worth about 8 and one size for all about 7.7, whatever it is.
    assert near["gain"] > 0.02
    assert near["gain_interval"][0] > 0.01
    assert near["p_value"] == 1 / 2001
    assert near["chance_interval"][1] < 0.005


def test_what_chooses_by_neighbours_does_not_see_the_score() -> None:
    """Great luck at one size of a half is scored where that size was taken anyway, and never makes it taken."""
    values, sizes = noise_only(5), np.arange(14, 19)
    values[7, [1, 3]] = 6.0  # whatever is taken in the other half scores the same
    before = choose_by_neighbours(values, sizes).chosen[7]
    gained = []
    for column in (0, 2, 4):
        lucky = values.copy()
        lucky[7, column] += 100
        gained.append(choose_by_neighbours(lucky, sizes).chosen[7] - before)
    assert sorted(gained) == pytest.approx([0, 0, 50])


def test_neighbours_by_brute_force() -> None:
    """The closed forms are the loop over prompts that they stand for."""
    values, sizes = noise_only(2, prompts=9), np.array([13, 14, 16, 19, 24])
    choice = choose_by_neighbours(values, sizes)
    chosen, fixed = np.zeros(9), np.zeros(9)
    for start in (0, 1):
        mine = np.arange(start, 5, 2)
        rest = np.setdiff1d(np.arange(5), mine)
        for p in range(9):
            seen = np.array([np.interp(sizes[mine], sizes[rest], row[rest]) for row in values])
            seen -= seen.mean(axis=1, keepdims=True)
            truth = values[:, mine] - values[:, mine].mean(axis=1, keepdims=True)
            others = np.arange(9) != p
            x, y = seen[others] - seen[others].mean(axis=0), truth[others] - truth[others].mean(axis=0)
            slope = max(0.0, (x * y).sum() / (x * x).sum())
            usual = truth[others].mean(axis=0)
            chosen[p] += values[p, mine[(usual + slope * (seen[p] - seen[others].mean(axis=0))).argmax()]] / 2
            fixed[p] += values[p, mine[usual.argmax()]] / 2
    np.testing.assert_allclose(choice.chosen, chosen)
    np.testing.assert_allclose(choice.fixed, fixed)


def test_leave_one_out_and_p_values_by_hand() -> None:
    assert leave_one_out(np.array([[3.0, 4.0], [3.0, 4.5], [4.0, 2.0]])).tolist() == [0, 0, 1]
    assert one_sided(2.0, np.array([1.0, 2.0, 3.0])) == 3 / 4
    assert one_sided(4.0, np.array([1.0, 2.0, 3.0])) == 1 / 4


# The published sweep


@needs_published
def test_the_published_sweep_gives_the_published_figures() -> None:
    report = summarise_sweep(read_sweep(PUBLISHED), range(14, 19))
    assert report["prompts"] == 32
    assert list(report["by_size"]) == ["4", "8", "13", "14", "15", "16", "17", "18", "19", "32"]
    assert round(report["by_size"]["16"]["value"], 2) == 6.51
    assert round(report["by_size"]["17"]["value"], 2) == 6.53
    near = report["chosen"]
    assert round(near["oracle"]["value"], 2) == 6.74
    assert near["best_fixed"]["block_size"] == 17
    assert round(100 * near["oracle"]["gain"], 1) == 3.2


@needs_published
def test_the_published_gain_is_no_more_than_luck_gives() -> None:
    """As `docs/sweep.md` says it."""
    near = summarise_sweep(read_sweep(PUBLISHED), range(14, 19))["chosen"]
    assert near["leave_one_out"]["block_sizes"] == {"16": 2, "17": 30}
    assert round(near["leave_one_out"]["value"], 2) == 6.48
    low, high = near["chance"]["gain_interval"]
    assert low < near["oracle"]["gain"] < high
    assert near["chance"]["p_value"] > 0.5
    assert round(100 * near["neighbours"]["gain"], 1) == 0.3
    assert near["neighbours"]["p_value"] < 0.01


# The command


def test_the_command_prints_says_and_writes(recipe: Recipe, tmp_path: Path) -> None:
    table = {f"p{i}": dict(zip(range(14, 19), row, strict=True)) for i, row in enumerate(noise_only(0).tolist())}
    path = write(tmp_path, "sweep.json", table)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    result = recipe("sweep", path, "--sizes", "14-16+18", "--json", out, "--plot", picture)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report == summarise_sweep(read_sweep(path), [14, 15, 16, 18])
    assert picture.stat().st_size > 10_000
    for word in ("a bound", "luck", "Leave-one-out", "sizes 14-16+18", f"{report['chosen']['oracle']['value']:.2f}"):
        assert word in result.stdout
    assert "\x1b" not in result.stdout


def test_sizes_that_differ_in_noise_are_pointed_out(recipe: Recipe, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = 6 + rng.normal(0, [0.05, 0.05, 0.05, 1.0], (20, 4))
    path = write(
        tmp_path, "s.json", {f"p{i}": dict(zip((14, 15, 16, 17), r, strict=True)) for i, r in enumerate(noisy)}
    )
    assert "the sizes differ in noise" in recipe("sweep", path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "18-14"], "runs backwards"),
        (["--sizes", "4-8"], "has no block size 5, 6, 7"),
        (["--figure", "speed"], "acceptance_length, tokens_per_second"),
        (["--plot", "sweep.txt"], ".png"),
    ],
)
def test_the_command_explains_what_it_cannot_use(
    recipe: Recipe, arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = recipe("sweep", write(tmp_path, "sweep.json", TABLE), *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
