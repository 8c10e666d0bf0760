"""The picture of a step's tree: which step, what is in it, and that nothing lies over anything else."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bpkit import Draft, Feature, SpeculativeDecoder
from bpkit.cli import main
from bpkit.decode.observers import Observer
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.judge.tree_picture import (
    HEIGHT,
    StepTrees,
    TreePicture,
    _width,
    off_the_best_path,
    step_to_draw,
)
from bpkit.policy import State
from bpkit.testing import TinyPair, tiny_pair
from bpkit.types import Record, Seconds, Step, StepTree
from tests.test_rows import PROMPTS
from tests.test_trees import RandomNodes, TreeDrafter

SVG = "{http://www.w3.org/2000/svg}"
WORDS = {1: " pen", 2: "\n", 3: "<b>&", 4: "日本", 5: "a\x00\t ", 6: "incomprehensibilities", 7: "x"}


def step_of(
    parents: Sequence[int],
    path: Sequence[int],
    verified: Sequence[bool] | None = None,
    tokens: Sequence[int] | None = None,
    own: int = 7,
) -> Step:
    """A step of one row that drafted such a tree."""
    count = len(parents)
    tokens = tokens or [1 + node % 7 for node in range(count)]
    kept = verified or [True] * count
    tree = StepTree(
        torch.tensor([tokens]), torch.tensor([parents]), torch.linspace(1, 0, count)[None], torch.tensor([kept])
    )
    one = torch.ones(1, dtype=torch.long)
    return Step(
        block_size=one * (count + 1),
        draft_length=one * count,
        verify_length=one * sum(kept),
        num_accepted=one * len(path),
        tokens=torch.tensor([[*(tokens[node] for node in path), own]]),
        position=one,
        seconds=Seconds(),
        path=torch.tensor([path], dtype=torch.long),
        tree=tree,
    )


def drawn(step: Step, before: Sequence[int] = (7, 7, 1)) -> ElementTree.Element:
    picture = TreePicture.of(step, 3, before, lambda tokens: "".join(WORDS[token] for token in tokens))
    return ElementTree.fromstring(picture.svg())


def rectangles(svg: ElementTree.Element, kinds: Sequence[str]) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of boxes of these kinds, without those of the legend."""
    found = [
        rect for rect in svg.iter(f"{SVG}rect") if rect.get("class") in kinds and rect.get("height") == str(HEIGHT)
    ]
    sides = [[float(rect.get(name) or 0) for name in ("x", "y", "width", "height")] for rect in found]
    return [(x, y, x + width, y + height) for x, y, width, height in sides]


def test_all_nodes_and_the_path_are_there() -> None:
    svg = drawn(step_of([-1, 0, -1, 2, 2, 4], [2, 4], [True, False, True, True, True, False]))
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert texts[0] == "Step 3: 6 drafted, 4 verified, 2 accepted, 3 tokens decided"
    assert texts[1] == "xx"
    shown = [text.text for text in svg.iter(f"{SVG}text") if (text.get("class") or "").startswith("token")]
    assert shown == ["␣pen", "␣pen", "⏎", "<b>&", "日本", "a·⇥␣", "incomprehen…", "x"], "anchor, nodes, target's own"
    assert [text for text in texts if re.fullmatch(r"0\.\d\d|1\.00|anchor|target|0e\+00", text or "")] == [
        "anchor", "1.00", "0.80", "0.60", "0.40", "0.20", "0e+00", "target"
    ]  # fmt: skip
    kinds = {kind: len(rectangles(svg, [kind])) for kind in ("anchor", "stands", "wrong", "left", "target")}
    assert kinds == {"anchor": 1, "stands": 2, "wrong": 2, "left": 2, "target": 1}
    lines = [path.get("class") for path in svg.iter(f"{SVG}path")]
    assert lines == ["left", "left", "wrong", "wrong", "stands", "stands", "target"], "what stands is on top"
    assert {"stands", "verified, does not stand", "not verified", "the target's own token"} < set(texts)
    assert "not verified" not in [text.text for text in drawn(step_of([-1, 0], [0])).iter(f"{SVG}text")]
    assert svg.get("aria-label") == svg.findtext(f"{SVG}title") == texts[0]
    style = svg.findtext(f"{SVG}style") or ""
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    assert set(re.findall(r"(?:rect|text|path)\.[\w-]+", dark)) == set(re.findall(r"(?:rect|text|path)\.[\w-]+", light))


def test_the_path_is_one_line_from_the_anchor_to_the_targets_token() -> None:
    svg = drawn(step_of([-1, -1, 1, 1, 3], [1, 3, 4]))
    boxes = [*rectangles(svg, ["anchor"]), *rectangles(svg, ["stands"]), *rectangles(svg, ["target"])]
    bold = [path.get("d") or "" for path in svg.iter(f"{SVG}path") if path.get("class") in ("stands", "target")]
    assert len(bold) == len(boxes) - 1 == 4
    for line, (before, after) in zip(bold, itertools.pairwise(boxes), strict=True):
        ends = re.fullmatch(r"M([\d.]+) ([\d.]+)H[\d.]+V([\d.]+)H([\d.]+)", line)
        assert ends is not None
        x, y, to_y, to_x = map(float, ends.groups())
        assert (x, y) == pytest.approx((before[2], before[1] + HEIGHT / 2), abs=0.11)
        assert (to_x, to_y) == pytest.approx((after[0], after[1] + HEIGHT / 2), abs=0.11)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_nothing_lies_over_anything_else(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(count)]
    path, node = list[int](), data.draw(st.integers(-1, count - 1))
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    tokens = [data.draw(st.integers(1, 7)) for _ in parents]
    svg = drawn(step_of(parents, path, tokens=tokens), data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=40)))
    boxes = rectangles(svg, ["anchor", "stands", "wrong", "left", "target"])
    assert len(boxes) == count + 2
    width, height = float(svg.get("width") or 0), float(svg.get("height") or 0)
    assert all(0 < left < right < width and 50 < top < bottom < height - 20 for left, top, right, bottom in boxes)
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    # Lines run in the gaps: none goes through a box.
    for line in svg.iter(f"{SVG}path"):
        across, begin, end = (
            float(re.findall(pattern, line.get("d") or "")[0])
            for pattern in (r"H([\d.]+)V", r" ([\d.]+)H", r"V([\d.]+)")
        )
        for left, top, right, bottom in boxes:
            assert not (left < across < right and top < max(begin, end) and bottom > min(begin, end))


def test_the_step_with_most_off_the_best_path_is_drawn() -> None:
    chain, fork = step_of([-1, 0, 1, 0], [0, 1, 2]), step_of([-1, 0, 0, -1, 3], [0, 2])
    assert [off_the_best_path(step) for step in (chain, fork, step_of([-1, -1, 1], [1, 2]))] == [0, 1, 2]
    nothing = step_of([], [])
    assert step_to_draw([nothing, chain, fork, chain]) == 3
    assert step_to_draw([nothing, chain, nothing]) == 2
    assert step_to_draw([nothing, chain, fork], 2) == 2
    for steps, number, says in (
        ([chain], 2, r"there is no step 2 to draw: the text took 1 step\(s\)"),
        ([chain], 0, "there is no step 0"),
        ([nothing, chain], 1, "step 1 of 2 has drafted a tree; steps that have are 2"),
        ([nothing], None, "no step has drafted a tree: trees come from drafters with branches"),
        ([], None, "no step has drafted"),
    ):
        with pytest.raises(ValueError, match=says):
            step_to_draw(steps, number)


def test_steps_say_what_was_drafted_where_an_observer_wants_it(pair: TinyPair) -> None:
    class Kept(RandomNodes):
        def __init__(self) -> None:
            super().__init__(4, 14)
            self.seen: list[tuple[Step, Draft, list[list[int]]]] = []

        def observe(self, state: State, step: Step) -> None:
            super().observe(state, step)
            if self.draft is not None:
                self.seen.append((step, self.draft, self.kept))
            self.draft = None

    class Counting(Observer):
        def __init__(self) -> None:
            super().__init__()
            self.trees = 0

        def record(self, request: Any, record: Record) -> None:
            self.trees += isinstance(record, Step) and record.tree is not None

    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0}
    counting = Counting()
    plain = SpeculativeDecoder(
        pair.target, TreeDrafter(pair.target, 1), RandomNodes(4, 14), tokenizer=pair.tokenizer, observers=[counting]
    )
    texts = [one.text for one in plain.generate(list(PROMPTS[:3]), **options)]
    assert counting.trees == 0
    policy, seen = Kept(), StepTrees()
    decoder = SpeculativeDecoder(
        pair.target, TreeDrafter(pair.target, 1), policy, tokenizer=pair.tokenizer, observers=[seen], strict=True
    )
    assert [one.text for one in decoder.generate(list(PROMPTS[:3]), **options)] == texts
    assert len(policy.seen) > 3
    for step, draft, kept in policy.seen:
        assert step.tree is not None
        assert draft.parents is not None
        for row, length in enumerate(step.draft_length.tolist()):
            assert step.tree.tokens[row, :length].equal(draft[Feature.DRAFT_TOKENS][row, :length])
            assert step.tree.parents[row, :length].equal(draft.parents[row, :length])
            verified = step.tree.verified[row].nonzero()[:, 0].tolist()
            assert len(verified) == int(step.verify_length[row])
            assert set(verified) <= set(kept[row])
            own = step.row(row).tree
            assert own is not None
            assert own.tokens.equal(step.tree.tokens[row : row + 1])


def test_a_step_of_a_real_decoder(pair: TinyPair) -> None:
    seen = StepTrees()
    drafter = BlockDiffusionDrafter(pair.drafter_model, pair.target, branches=3)
    decoder = SpeculativeDecoder(
        pair.target, [drafter, NgramDrafter()], "fixed:9", tokenizer=pair.tokenizer, observers=[seen]
    )
    result = decoder.generate("x = ", max_new_tokens=12, temperature=0)
    assert [int(step.position) for step in seen.steps] == [int(step.position) for step in result.steps]
    number = step_to_draw(seen.steps)
    step = seen.steps[number - 1]
    before = [*pair.ids("x = ")[0].tolist(), *result.tokens[0, : int(step.position)].tolist()]
    picture = TreePicture.of(step, number, before, pair.tokenizer.decode)
    assert len(picture.boxes) == int(step.draft_length) + 2
    assert sum(box.kind == "stands" for box in picture.boxes) == int(step.num_accepted)
    assert all(_width(box) > 14 for box in picture.boxes)
    ElementTree.fromstring(picture.svg())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pair")
    tiny_pair(made)
    return made


def test_generate_draws_a_step(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        models = ["--target", str(folder / "target"), "--threads", "1", "--max-new-tokens", "8", "--policy", "fixed:6"]
        return CliRunner().invoke(main.build_app(), ["generate", *arguments, *models], prog_name="bpkit")

    drafter, file = f"block-diffusion:{folder / 'drafter'},branches=3", tmp_path / "step.svg"
    done = run("x = 1", "--drafter", drafter, "--tree", str(file))
    assert done.exit_code == 0, done.stderr
    assert re.search(rf"wrote {re.escape(str(file))}: Step \d: 5 drafted, 5 verified", done.stderr)
    assert done.stdout == run("x = 1", "--drafter", drafter).stdout
    assert (
        len(rectangles(ElementTree.fromstring(file.read_text("utf-8")), ["anchor", "stands", "wrong", "target"])) == 7
    )
    assert "Step 2: " in run("x = 1", "--drafter", drafter, "--tree", str(file), "--tree-step", "2").stderr
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text('{"prompt": "x"}\n', "utf-8")
    for arguments, says in (
        (["x", "--drafter", drafter, "--tree", str(file), "--tree-step", "99"], "there is no step 99 to draw"),
        (
            ["x", "--drafter", str(folder / "drafter"), "--tree", str(file)],
            "drafts chains: use a drafter with branches",
        ),
        (["x", "--drafter", drafter, "--tree", str(tmp_path / "a.png")], "name a file that ends in .svg"),
        (["x", "--drafter", drafter, "--tree-step", "1"], "--tree-step says which step --tree FILE draws"),
        (["--prompts", str(prompts), "--out", str(out), "--tree", str(file)], "--tree draws a step of one prompt"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 2
        assert says in refused.stderr
