"""A picture of one step: the tree that was drafted, what of it was verified, and what stands. SVG, by hand."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple
from unicodedata import combining, east_asian_width

from bpkit.decode.observers import ObservedRequest, Observer
from bpkit.types import Record, Step

CELL, CHANCE_CELL = 8.4, 6.6
"""Width of a letter of a token, and of a chance."""
HEIGHT, ROW, GAP, MARGIN = 36, 44, 26, 18
"""Of a node, from one line of nodes to the next, between two depths, and around all."""
LONGEST, BEFORE = 12, 60
"""Letters of a token, and of the text before, that are shown."""
STANDS, WRONG, LEFT_OUT, ANCHOR, TARGET = "stands", "wrong", "left", "anchor", "target"
"""Kinds of boxes."""
BELOW = LEFT_OUT, WRONG, STANDS, TARGET
"""Whose lines are drawn over those of whom, the last over all."""
LEGEND = {
    STANDS: "stands",
    WRONG: "verified, does not stand",
    LEFT_OUT: "not verified",
    TARGET: "the target's own token",
}
STYLE = """
text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:14px;fill:#222}
.small{font-size:11px}.said{font-family:system-ui,Segoe UI,Helvetica,Arial,sans-serif;font-size:13px}
text.dim{fill:#555}text.on-target{fill:#fff}
path{fill:none;stroke:#8a8f98;stroke-width:1.3}path.left{stroke:#c9ccd2;stroke-dasharray:4 3}
path.stands,path.target{stroke:#1b7a3d;stroke-width:2.6}
rect{stroke-width:1.4}rect.paper{fill:#fbfbfd}rect.anchor{fill:#dbe7fb;stroke:#1a56b0}
rect.wrong{fill:#fff;stroke:#1a56b0}rect.left{fill:#f2f3f5;stroke:#c9ccd2;stroke-dasharray:4 3}
rect.stands{fill:#dcf3e3;stroke:#1b7a3d}rect.target{fill:#1b7a3d;stroke:#1b7a3d}
@media (prefers-color-scheme: dark){
text{fill:#e6e8eb}text.dim{fill:#a4abb6}text.on-target{fill:#08210f}
path{stroke:#7d8590}path.left{stroke:#4a5059}path.stands,path.target{stroke:#4cc274}
rect.paper{fill:#15181d}rect.anchor{fill:#20365c;stroke:#79a8f0}
rect.wrong{fill:#1c2129;stroke:#79a8f0}rect.left{fill:#1a1d22;stroke:#4a5059}
rect.stands{fill:#163b23;stroke:#4cc274}rect.target{fill:#4cc274;stroke:#4cc274}
}
"""


class StepTrees(Observer):
    """Keeps the steps of one generation, with the trees that were drafted."""

    wants_trees = True

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def record(self, request: ObservedRequest, record: Record) -> None:
        if isinstance(record, Step):
            self.steps.append(record)


def off_the_best_path(step: Step) -> int:
    """Accepted tokens of a step of one row that a draft of the best path alone would not have had."""
    if step.tree is None or step.path is None:
        return 0
    place, best = -1, set[int]()
    for node, parent in enumerate(step.tree.parents[0, : int(step.draft_length)].tolist()):
        if parent == place:
            best.add(node)
            place = node
    return sum(node not in best for node in step.path[0].tolist())


def step_to_draw(steps: Sequence[Step], number: int | None = None) -> int:
    """Which step to draw, counted from 1: by default that with the most accepted tokens off the best path.

    Raises:
        ValueError: there is no such step, or no tree was drafted in it.
    """
    if number is not None and not 1 <= number <= len(steps):
        raise ValueError(f"there is no step {number} to draw: the text took {len(steps)} step(s)")
    drawn = [place for place, step in enumerate(steps, 1) if step.tree is not None and step.draft_length > 0]
    if number is not None and number in drawn:
        return number
    if not drawn or number is not None:
        which = "no step" if number is None else f"step {number} of {len(steps)}"
        others = "" if number is None or not drawn else f"; steps that have are {', '.join(map(str, drawn))}"
        raise ValueError(
            f"{which} has drafted a tree{others}: trees come from drafters with branches, such as "
            "--drafter block-diffusion:branches=4"
        )
    return max(drawn, key=lambda place: (off_the_best_path(steps[place - 1]), int(steps[place - 1].num_accepted)))


class Box(NamedTuple):
    """A node as it is drawn.

    Attributes:
        parent: by its place among the boxes; the anchor's is its own. kind: one of those in `LEGEND`, or `ANCHOR`.
        line: from the top, from 0; of a node that of its first child. depth: 0 of the anchor.
    """

    text: str
    below: str
    parent: int
    kind: str
    depth: int
    line: int


@dataclass(frozen=True)
class TreePicture:
    """A step's tree, ready to be drawn.

    Attributes:
        boxes: the anchor, the nodes in their order, and the target's own token.
        title: what is seen. before: the end of the text before the anchor.
    """

    boxes: list[Box]
    title: str
    before: str

    @classmethod
    def of(cls, step: Step, number: int, tokens: Sequence[int], show: Callable[[Sequence[int]], str]) -> TreePicture:
        """Of a step of one row, in which a tree was drafted.

        Args:
            number: of the step. tokens: before the step, of which the last is the anchor.
            show: tokens as text.
        """
        tree, count = step.tree, int(step.draft_length)
        assert tree is not None
        assert step.path is not None
        path, accepted = step.path[0].tolist(), int(step.num_accepted)
        kinds = [WRONG if verified else LEFT_OUT for verified in tree.verified[0, :count].tolist()]
        for node in path:
            kinds[node] = STANDS
        drawn = [tokens[-1], *tree.tokens[0, :count].tolist(), int(step.tokens[0, accepted])]
        parents = [0, *(1 + parent for parent in tree.parents[0, :count].tolist()), 1 + path[-1] if path else 0]
        below = ["anchor", *(_chance(chance) for chance in tree.chances[0, :count].tolist()), "target"]
        places = _places(parents)
        texts = [_shown(show, token) for token in drawn]
        boxes = [Box(*box) for box in zip(texts, below, parents, [ANCHOR, *kinds, TARGET], *places, strict=True)]
        title = (
            f"Step {number}: {count} drafted, {int(step.verify_length)} verified, {accepted} accepted, "
            f"{accepted + 1} {'tokens' if accepted else 'token'} decided"
        )
        text = _printable(show(tokens[:-1]))
        return cls(boxes, title, "…" + text[-BEFORE:] if len(text) > BEFORE else text)

    def svg(self) -> str:
        """The picture. It has its own background, and other colours where dark ones are preferred."""
        depths, lines = 1 + max(box.depth for box in self.boxes), 1 + max(box.line for box in self.boxes)
        widths = [max(_width(box) for box in self.boxes if box.depth == depth) for depth in range(depths)]
        left = [MARGIN + sum(widths[:depth]) + GAP * depth for depth in range(depths)]
        top = MARGIN + 52
        kinds = {box.kind for box in self.boxes}
        legend, legend_width, legend_lines = _legend(kinds, left[-1] + widths[-1], top + lines * ROW + 14)
        wide = max(
            left[-1] + widths[-1], MARGIN + legend_width, MARGIN + 7.2 * max(map(_cells, (self.title, self.before)))
        )
        size = f"{wide + MARGIN:.0f}", f"{top + lines * ROW + 14 + 26 * legend_lines + MARGIN - 6:.0f}"
        drawn = [f'<rect class="paper" width="{size[0]}" height="{size[1]}" rx="8" stroke="none"/>']
        drawn.append(_text(MARGIN, MARGIN + 12, self.title, "said", weight=600))
        drawn.append(_text(MARGIN, MARGIN + 34, self.before, "small dim"))
        places = [(left[box.depth], top + box.line * ROW) for box in self.boxes]
        order = sorted(range(1, len(self.boxes)), key=lambda box: BELOW.index(self.boxes[box].kind))
        for box in order:
            (x, y), parent = places[box], self.boxes[box].parent
            begin, across = places[parent][0] + _width(self.boxes[parent]), left[self.boxes[box].depth] - GAP / 2
            middle, end = places[parent][1] + HEIGHT / 2, y + HEIGHT / 2
            drawn.append(f'<path class="{self.boxes[box].kind}" d="M{begin:.1f} {middle}H{across:.1f}V{end}H{x:.1f}"/>')
        for (x, y), own in zip(places, self.boxes, strict=True):
            drawn += _node(x, y, own)
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
                f'height="{size[1]}" role="img" aria-label="{escape(self.title)}">',
                f"<title>{escape(self.title)}</title><style>{STYLE}</style>",
                *drawn,
                *legend,
                "</svg>\n",
            )
        )


def _places(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Depths, and lines such that first children are beside their parents and no two boxes in one place."""
    children: list[list[int]] = [[] for _ in parents]
    depth = [0] * len(parents)
    for box, parent in enumerate(parents[1:], 1):
        children[parent].append(box)
        depth[box] = depth[parent] + 1
    line, last, left = [0] * len(parents), -1, [0]
    while left:
        box = left.pop()
        first = box == 0 or children[parents[box]][0] == box
        line[box] = line[parents[box]] if first and box else last + 1
        last = max(last, line[box])
        left += reversed(children[box])
    return depth, line


def _shown(show: Callable[[Sequence[int]], str], token: int) -> str:
    """A token in few letters, of which none is invisible."""
    text = _printable(show([token])).replace(" ", "␣")
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _printable(text: str) -> str:
    """A text in one line, of letters that an SVG may hold."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(letter if letter.isprintable() else "·" for letter in text)


def _chance(chance: float) -> str:
    return "" if chance != chance else f"{chance:.2f}" if chance >= 0.005 else f"{chance:.0e}"


def _cells(text: str) -> int:
    """Letters as wide as Latin ones."""
    return sum(0 if combining(letter) else 1 + (east_asian_width(letter) in "WF") for letter in text)


def _width(box: Box) -> float:
    return max(CELL * _cells(box.text), CHANCE_CELL * _cells(box.below)) + 14


def _node(x: float, y: float, box: Box) -> Iterable[str]:
    on = " on-target" if box.kind == TARGET else ""
    width = _width(box)
    yield f'<rect class="{box.kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{HEIGHT}" rx="5"/>'
    yield _text(x + width / 2, y + 16, box.text, f"token{on}", middle=True)
    if box.below:
        yield _text(x + width / 2, y + 30, box.below, f"small dim{on}", middle=True)


def _legend(kinds: Container[str], wide: float, top: float) -> tuple[list[str], float, int]:
    """What the colours say, in lines of the picture's width; how wide and how many lines that is."""
    drawn, x, line, widest = list[str](), float(MARGIN), 0, 0.0
    for kind, said in LEGEND.items():
        if kind not in kinds:
            continue
        width = 25 + 6.3 * _cells(said)
        if x > MARGIN and x + width > max(wide, 420):
            x, line = MARGIN, line + 1
        y = top + 26 * line
        drawn.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="18" height="14" rx="3"/>')
        drawn.append(_text(x + 25, y + 11.5, said, "said"))
        x += width + 18
        widest = max(widest, x - 18)
    return drawn, widest, line + 1


def _text(x: float, y: float, text: str, kind: str, *, middle: bool = False, weight: int = 0) -> str:
    more = ' text-anchor="middle"' * middle + f' font-weight="{weight}"' * bool(weight)
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{more} xml:space="preserve">{escape(text)}</text>'
