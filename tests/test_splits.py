"""The split of prompts: disjoint, stratified by domain, reproducible, and steady when prompts come or go."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpkit.cli.evaluate import parse_split
from bpkit.judge.evaluation.splits import PARTS, split_prompts

IDS = [f"p{i}" for i in range(100)]
DOMAINS = ["a"] * 50 + ["b"] * 30 + ["c"] * 20


def test_parts_are_disjoint_and_complete() -> None:
    split = split_prompts(IDS, DOMAINS, seed=3)
    assert sorted((*split.train, *split.validation, *split.test)) == list(range(100))


def test_each_domain_is_split_by_itself() -> None:
    split = split_prompts(IDS, DOMAINS, seed=3, rule=(0.5, 0.3, 0.2))
    for domain, counts in (("a", [25, 15, 10]), ("b", [15, 9, 6]), ("c", [10, 6, 4])):
        assert [sum(DOMAINS[i] == domain for i in getattr(split, part)) for part in PARTS] == counts


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0, 0, 1]), (2, [1, 0, 1]), (3, [1, 1, 1]), (5, [2, 1, 2]), (7, [3, 1, 3])]
)
def test_counts_are_less_than_one_off_and_test_is_served_first(count: int, expected: list[int]) -> None:
    split = split_prompts(IDS[:count], ["d"] * count, seed=1)
    assert [len(getattr(split, part)) for part in PARTS] == expected


def test_the_seed_decides_and_nothing_else() -> None:
    assert split_prompts(IDS, DOMAINS, seed=5) == split_prompts(IDS, DOMAINS, seed=5)
    assert split_prompts(IDS, DOMAINS, seed=5).test != split_prompts(IDS, DOMAINS, seed=6).test
    # Not on the order of prompts either.
    there = {IDS[i] for i in split_prompts(IDS, DOMAINS, seed=5).test}
    back = split_prompts(IDS[::-1], DOMAINS[::-1], seed=5)
    assert {IDS[::-1][i] for i in back.test} == there


def test_more_prompts_move_only_a_few() -> None:
    few, many = IDS[:90], IDS
    before = split_prompts(few, ["d"] * 90, seed=0)
    after = split_prompts(many, ["d"] * 100, seed=0)
    part_before = {few[i]: part for part in PARTS for i in getattr(before, part)}
    part_after = {many[i]: part for part in PARTS for i in getattr(after, part)}
    assert sum(part_after[prompt] != part for prompt, part in part_before.items()) <= 10


def test_the_record_names_prompts_by_id() -> None:
    record = split_prompts(IDS[:5], ["d"] * 5, seed=1).as_json(IDS)
    assert record["fractions"] == {"train": 0.4, "validation": 0.2, "test": 0.4}
    assert sorted(record["train"] + record["validation"] + record["test"]) == IDS[:5]


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.4, 0.2), (1.2, -0.1, -0.1)])
def test_fractions_that_are_none_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        split_prompts(IDS, DOMAINS, rule=fractions)


def test_ids_must_be_told_apart() -> None:
    with pytest.raises(ValueError, match=r"more than once: p1$"):
        split_prompts(["p0", "p1", "p1"], ["d"] * 3)


def test_parts_that_prompts_name_themselves_are_kept() -> None:
    parts = {"p0": "test", "p1": "train", "p2": "closed", "p3": "validation", "p4": "test"}
    split = split_prompts(IDS[:5], ["d"] * 5, rule=parts)
    assert (split.train, split.validation, split.test) == ((1,), (3,), (0, 4))
    assert split.as_json(IDS)["fractions"] == {"train": 0.25, "validation": 0.25, "test": 0.5}
    with pytest.raises(ValueError, match=r"2 prompts have no part .*, such as p5, p6: give each a `split`"):
        split_prompts(IDS[:7], ["d"] * 7, rule=parts)


def test_a_file_of_prompts_says_their_parts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "prompt": "x", "split": "train"}\n{"id": "b", "prompt": "y", "split": "test"}\n')
    assert parse_split(str(file)) == {"a": "train", "b": "test"}
    with pytest.raises(ValueError, match="or name a file of prompts"):
        parse_split(str(tmp_path / "nothing.jsonl"))
