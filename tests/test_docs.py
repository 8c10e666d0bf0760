"""The documents tell the truth: snippets run and print what is shown, links lead somewhere, what is listed is there."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from typer.testing import CliRunner

import bpkit
import bpkit.testing
from bpkit.cli.main import build_app
from bpkit.config import Config
from bpkit.policy import Policy
from bpkit.registry import hookspecs
from bpkit.types import Feature

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes/README.md", *sorted(DOCS.rglob("*.md"))]


class Snippet(NamedTuple):
    """A block of Python, and what the page says that it prints, or None where it says nothing."""

    code: str
    prints: str | None


def snippets(page: Path) -> list[Snippet]:
    block = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
    return [Snippet(match[1], match[2]) for match in block.finditer(page.read_text(encoding="utf-8"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_snippets_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "snippet"}
    for snippet in snippets(page):
        # A snippet that begins with a file name is that file.
        named = re.match(r"# (\w+\.py)\n", snippet.code)
        if named:
            (tmp_path / named[1]).write_text(snippet.code, encoding="utf-8")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(snippet.code, str(page), "exec"), names)
        if snippet.prints is not None:
            assert printed.getvalue() == snippet.prints
    for commands in re.findall(r"^<!-- run by the tests -->\n```sh\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        for line in commands.splitlines():
            program, *words = shlex.split(line)
            assert program == "bpkit"
            done = CliRunner().invoke(build_app(), words, prog_name=program)
            assert done.exit_code == 0, f"{line}\n{done.stderr}"


def test_output_that_a_page_shows_is_compared(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shown = "```python\nprint(1)\n```\n\n```text\n2\n```\n"
    page.write_text(f"{shown}\n```python\npass\n```\n\nWords.\n\n```text\n3\n```\n", encoding="utf-8")
    assert snippets(page) == [Snippet("print(1)\n", "2\n"), Snippet("pass\n", None)]
    shown_anywhere = sum(s.prints is not None for page in PAGES for s in snippets(page))
    assert shown_anywhere > 12, "pages that show output are no longer found"


@pytest.mark.parametrize("name", ["docs/your_model.md"])
def test_yaml_of_a_page_is_a_config(name: str) -> None:
    found = blocks(ROOT / name, "yaml")
    assert found
    for text in found:
        Config(**yaml.safe_load(text))


def test_the_quick_start_shows_the_policy_of_the_readme() -> None:
    first, second = (
        next(s.code for s in snippets(page) if s.code.startswith("# my_policy.py"))
        for page in (ROOT / "README.md", DOCS / "index.md")
    )
    assert first == second


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_lists_and_tables_are_such_for_every_reader_of_markdown(page: Path) -> None:
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    # Python-Markdown wants four spaces before a list in a list, and an empty line before lists and tables.
    assert re.findall(r"^ {1,3}(?:-|\d+\.) .*", text, re.MULTILINE) == []
    assert re.findall(r"^(?!- |\d+\. |  |\|)[^\n]+\n(?:- |\d+\. |\|).*", text, re.MULTILINE) == []


def site(module: str) -> ModuleType:
    """A module of docs/site."""
    folder = str(DOCS / "site")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)


def anchors(page: Path) -> set[str]:
    """What headings of a page can be linked to as: lower case, hyphens for spaces, other signs left out."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in site("links").links(page.read_text(encoding="utf-8")):
        if ":" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor[1:] in anchors(file), f"{page.name} links to {target}{anchor}"


def test_links_are_found_outside_of_code_alone() -> None:
    text = "[a](b.md#c) and `[no](no.md)`\n\n```\n[no](no.md)\n```\n![d](e.png)\n[`f`](../g.py)\n"
    assert site("links").links(text) == [("b.md", "#c"), ("e.png", ""), ("../g.py", "")]
    changed = site("links").relinked(text, lambda target: f"x/{target}")
    assert changed == text.replace("b.md", "x/b.md").replace("e.png", "x/e.png").replace("../g.py", "x/../g.py")


def test_files_outside_of_docs_are_pages_of_the_site(tmp_path: Path) -> None:
    files = {
        "docs/index.md": "# Start\n\n[code](../code/one.py) [folder](../code) [history](../HISTORY.md#first)\n",
        "docs/deep/page.md": "# Deep\n\n[code](../../code/one.py)\n",
        "code/one.py": "ANSWER = 42\n",
        "code/two.bin": "\0",
        "code/three/README.md": "# Three\n\n[one](../one.py)\n",
        "code/run": "#!/bin/sh\necho 1\n",
        "HISTORY.md": "# History\n\n## First\n\n[back](docs/deep/page.md)\n",
        "mkdocs.yml": f"site_name: x\nuse_directory_urls: false\nhooks: [{DOCS / 'site' / 'sources.py'}]\n"
        "validation: {anchors: warn}\nmarkdown_extensions: [pymdownx.superfences]\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(tmp_path / "mkdocs.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {path: (tmp_path / "site" / path).read_text("utf-8") for path in ("index.html", "deep/page.html")}
    assert 'href="source/code/one.py.html"' in built["index.html"]
    assert 'href="source/code/index.html"' in built["index.html"]
    assert 'href="source/HISTORY.html#first"' in built["index.html"]
    assert 'href="../source/code/one.py.html"' in built["deep/page.html"]
    assert "42" in (tmp_path / "site/source/code/one.py.html").read_text("utf-8")
    folder = (tmp_path / "site/source/code/index.html").read_text("utf-8")
    assert 'href="one.py.html"' in folder
    assert 'href="three/index.html"' in folder
    assert "two.bin, 1 bytes" in folder
    assert 'href="../one.py.html"' in (tmp_path / "site/source/code/three/index.html").read_text("utf-8")
    assert 'href="../deep/page.html"' in (tmp_path / "site/source/HISTORY.html").read_text("utf-8")


def commands(app: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command of a typer app, groups included."""
    yield path
    for command in app.registered_commands:
        yield (*path, command.name or command.callback.__name__.replace("_", "-"))
    for group in app.registered_groups:
        yield from commands(group.typer_instance, (*path, group.name))


def test_the_page_of_commands_has_every_command_and_option() -> None:
    page = site("commands").with_commands((DOCS / "commands.md").read_text(encoding="utf-8"))
    assert "\x1b" not in page
    sections = dict(re.findall(r"^###? (bpkit.*?)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    app = build_app()
    found = list(commands(app))
    assert len(found) > 15
    for path in found:
        section = sections[" ".join(("bpkit", *path))]
        told = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
        for option in set(re.findall(r"(?<=[ │])--[a-z][\w-]+(?= )", told)) - {"--help"}:
            assert option in section, f"{' '.join(path)} {option}"


def test_the_readme_lists_every_command() -> None:
    told = set(re.findall(r"^\| .*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    listed = {name for row in told for name in re.findall(r"`bpkit ([a-z-]+)", row)}
    assert {path[0] for path in commands(build_app()) if path} == listed


def test_subcommands_that_plugins_bring_are_on_the_page_of_commands() -> None:
    page = site("commands").with_commands((DOCS / "commands.md").read_text(encoding="utf-8"))
    whole: Any = typer.main.get_command(build_app())
    group = whole.commands["train"]
    for name in group.list_commands(typer.Context(group)):
        assert f"### bpkit train {name}\n" in page


def test_the_reference_names_what_is_there() -> None:
    named = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    for name in named:
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ImportError:
            assert hasattr(importlib.import_module(module), attribute), name
    last = {name.rpartition(".")[2] for name in named}
    assert last >= set(bpkit.__all__) - {"hookimpl"}
    assert last >= set(bpkit.testing.__all__)


def test_the_glossary_tells_the_units_in_tooltips() -> None:
    terms = site("tooltips").terms((DOCS / "glossary.md").read_text(encoding="utf-8"))
    units = {"anchor", "block_size", "draft_length", "verify_length", "num_accepted", "acceptance_length", "tau"}
    assert units <= set(terms)
    for term, meaning in terms.items():
        assert re.fullmatch(r"[^\n\[\]`]+\.", meaning), term


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


def test_the_afternoon_on_the_page_is_the_one_that_was_measured() -> None:
    folder = ROOT / "docs" / "benchmarks"
    page = (folder / "README.md").read_text(encoding="utf-8").partition("## The policy author's afternoon")[2]
    record = json.loads((folder / "afternoon.json").read_text(encoding="utf-8"))
    shown = re.findall(
        r"^\| ([\w ]+) \| (?:`([^`]+)`|write `([^`]+)`: \*\*(\d+) lines\*\*) \|(?: ([\d.]+))? ?\|$", page, re.MULTILINE
    )
    measured = [
        (
            step["part"],
            step.get("command", ""),
            step.get("wrote", ""),
            str(step.get("lines", "")),
            str(step.get("seconds", "")),
        )
        for step in record["steps"]
    ]
    assert shown == measured
    assert all(step["lines"] <= 10 for step in record["steps"] if "lines" in step)
