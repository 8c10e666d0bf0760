"""The documents tell the truth: snippets run, every hook and policy method is described, and none that is gone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bpkit import hookspecs
from bpkit.policy import Policy
from bpkit.types import Feature

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "snippet"}
    for snippet in snippets(page):
        # A snippet that begins with a file name is that file.
        named = re.match(r"# (\w+\.py)\n", snippet)
        if named:
            (tmp_path / named[1]).write_text(snippet, encoding="utf-8")
        exec(compile(snippet, str(page), "exec"), names)


def test_every_hook_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^### `(bpkit_\w+)\((.*?)\)`", text, re.MULTILINE))
    specified = {
        (name, ", ".join(hook.__code__.co_varnames[: hook.__code__.co_argcount]))
        for name, hook in vars(hookspecs).items()
        if name.startswith("bpkit_")
    }
    assert documented == specified


def test_every_policy_method_and_feature_is_documented() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    methods = {name for name, value in vars(Policy).items() if callable(value) and not name.startswith("_")}
    methods.discard("Config")
    described = {name for name in methods if re.search(rf"`[^`]*\b{name}\(", text)}
    assert described == methods
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) >= set(Feature)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_table_of_policies_says_what_the_figures_say() -> None:
    text = (ROOT / "docs" / "policies" / "README.md").read_text(encoding="utf-8")
    number = r"(\d\.\d{3}) \([^)]*\)"
    row = re.compile(rf"^\| `(\w+)` \| {number} \| (-?\d+)% \([^)]*\) \| {number} \| {number} \|", re.MULTILINE)
    first, second = text.split("**A second test.**")
    _agree(row.findall(first), "policies.json")
    _agree(row.findall(second), "policies_second.json")


def _agree(rows: list[tuple[str, ...]], file: str) -> None:
    figures = json.loads((ROOT / "docs" / "benchmarks" / file).read_text(encoding="utf-8"))["cost_models"]
    assert {row[0] for row in rows} == set(figures["measured"]["overall"]["policies"])
    for name, measured, share, linear, flat in rows:
        found = {cost: figures[cost]["overall"]["policies"][name] for cost in ("measured", "linear", "flat")}
        ratios = [f"{found[cost]['tokens_per_second_ratio']['value']:.3f}" for cost in found]
        assert ratios == [measured, linear, flat], name
        assert round(100 * found["measured"]["gap_share"]["value"]) == int(share), name
