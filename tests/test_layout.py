"""The shape of the code: no circles, imports that point down, a core that knows no plug-in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cli", "judge", "learn", "export", "trace", "engines", "draft", "decode", "registry", "policy", "types")
"""From the top to the bottom: each may import those after it. Other rooms and files serve all of these."""


def modules() -> dict[str, Path]:
    """Every module of the core and of the plug-ins, by its dotted name."""
    found = {}
    for folder in (ROOT / "bpkit", *sorted((ROOT / "plugins").glob("bpkit_*"))):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder.parent).with_suffix("").parts
            if "templates" not in parts:
                found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(name: str, text: str, known: dict[str, Path] | set[str]) -> set[str]:
    """The modules of `known` that a module imports: at its top, in functions, and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are written in full"
            module = str(node.module)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in known else module)
    return found & set(known)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    assert len(known) > 100
    return {name: imports(name, file.read_text(encoding="utf-8"), known) for name, file in known.items()}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of modules that all lead to each other."""
    reached = {name: _reached(graph, name) for name in graph}
    return {frozenset(m for m in reached[name] if name in reached[m]) for name in graph if name in reached[name]}


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    ahead = set(graph[start])
    while ahead:
        name = ahead.pop()
        found.add(name)
        ahead |= graph[name] - found
    return found


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "bpkit" else ""


def test_a_circle_is_found_however_it_is_imported() -> None:
    known = {"a", "a.b", "a.c"}
    assert imports("a.b", "def f():\n    from a.c import x", known) == {"a.c"}
    assert imports("a.b", "if TYPE_CHECKING:\n    from a import c, d", known) == {"a.c", "a"}
    assert imports("a.b", "import a.c, torch", known) == {"a.c"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()
    assert circles({"a": {"a"}}) == {frozenset("a")}


def test_no_files_import_each_other(graph: dict[str, set[str]]) -> None:
    assert circles(graph) == set()


def test_the_core_imports_no_plugin(graph: dict[str, set[str]]) -> None:
    core = {name for name in graph if name.split(".")[0] == "bpkit"}
    assert len(core) < len(graph)
    assert {(name, other) for name in core for other in graph[name] - core} == set()


def test_imports_point_down(graph: dict[str, set[str]]) -> None:
    height = {name: -i for i, name in enumerate(ROOMS)}
    pairs = {(room(name), room(other)) for name, targets in graph.items() for other in targets}
    ranked = {pair for pair in pairs if height.keys() >= set(pair)}
    assert len(ranked) > 20
    assert {(one, other) for one, other in ranked if height[other] > height[one]} == set()


def test_few_modules_lie_at_the_top() -> None:
    found = {file.name for file in (ROOT / "bpkit").glob("*.py")}
    assert "types.py" in found
    assert len(found) <= 8


def test_a_public_class_has_a_name_of_its_own() -> None:
    found: dict[str, list[str]] = {}
    for folder in ("bpkit", "plugins", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(file.relative_to(ROOT).as_posix())
    assert len(found) > 200
    assert {name: files for name, files in found.items() if len(files) > 1} == {}
