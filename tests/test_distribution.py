"""The name that pip knows bpkit by: one everywhere, and never `bpkit`, which on PyPI is another project."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from bpkit import __version__
from bpkit.installation.distribution import DISTRIBUTION, install_command, requirement
from bpkit.registry.discovery import registry
from bpkit.scaffold.names import Kind, Names
from bpkit.scaffold.render import render

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHER = "bpkit"

# Where a text says that a distribution be installed.

_TOOL = (
    r"(?:pip[\d.]*|pipx|uv|conda|mamba|micromamba|poetry|pdm|hatch|rye|pixi|pipenv)"
    r"(?:\s+(?:-\S+|pip|tool|env|python))*\s+(?:install|download|wheel|add|inject|run|upgrade|lock)\b"
    r"|uvx\b|easy_install\b"
)
_COMMAND = re.compile(rf"(?<![\w-])(?:{_TOOL})(?P<rest>\s*(?:\\\n|[^\n`;|&#])*)")
_NAME = rf"(?<![\w./\\$@{{-]){OTHER}(?![\w/}}]|-\w|\.\w)"
"""The word alone: no path, module, file or other distribution."""
_ELSEWHERE = (
    re.compile(rf"{_NAME}\[[^\]\n]*\]", re.I),  # with extras
    re.compile(rf"{_NAME}\s*(?:[=~!<>]=|===|[<>])\s*[\"']?(?:\d|VERSION|[{{$])", re.I),  # with versions
    re.compile(rf"{_NAME}\s+@\s+\S", re.I),  # with an address
    re.compile(rf"(?:dependencies|requires)\"?\s*[=:]\s*\[(?:[^\[\]]|\[[^\[\]]*\])*[\"']{OTHER}[\"']", re.I),
    re.compile(rf"^{OTHER}\s*=\s*(?:\"[\^~<>=*\d]|\{{[^}}]*\b(?:version|git|extras|url)\b)", re.I | re.M),  # Poetry
    re.compile(rf"^\s*-\s+(?:[\w-]+::)?{OTHER}(?:=[\d=.*]+)?\s*$", re.I | re.M),  # conda
    re.compile(rf"^{OTHER}\s*$", re.I | re.M),  # a file of requirements
    # arguments in a program
    re.compile(rf"[\"'](?:install|add)[\"'](?:\s*,\s*[\"'][^\"'\n]*[\"'])*?\s*,\s*[\"']{OTHER}[\"']", re.I),
)


def installs_other(text: str) -> list[str]:
    """Every place where the text says to install the other project's distribution, or to depend on it."""
    found = [match[0] for pattern in _ELSEWHERE for match in pattern.finditer(text)]
    return found + [f"{command} {word}" for command, word in _words(text) if OTHER in _names(word)]


def _words(text: str) -> Iterator[tuple[str, str]]:
    """The arguments of commands that install, each with its command. A sentence around a command ends it."""
    for match in _COMMAND.finditer(text):
        command = match[0].removesuffix(match["rest"])
        for word in match["rest"].replace("\\\n", " ").split():
            yield command, word
            if word.endswith((",", ".", ":", ")")):
                break


def _names(word: str) -> list[str]:
    """What an argument names, without quotes and apart from extras, versions and an option before it."""
    return [part.strip("\"'(),.:").lower() for part in re.split(r"[\[=~!<>@?\\]", word)]


def strings(source: str) -> Iterator[str]:
    """Those of a program as its messages have them: parts that stand side by side are joined."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def texts() -> dict[str, str]:
    """Every text file of the project by its path, whether git knows it already or not."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git, which tells texts of the project from what was built beside them")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    found = {}
    for path in filter(None, listed):
        data = (ROOT / path).read_bytes() if (ROOT / path).is_file() else b""
        if b"\0" not in data[:8192]:
            found[path] = data.decode("utf-8", errors="replace")
    return found


# What must be found, and what must not. OTHER stands for the name, so that this file passes its own test.

INSTALLS = """
pip install OTHER
pip install -U OTHER
pip install --quiet 'OTHER[traces]'
python -m pip install "OTHER[export]" torch
pip3 install torch OTHER
$(BIN)/pip install OTHER==0.1.0
!pip install OTHER
pip -q install OTHER>=0.1
pip install Other
pip download OTHER && echo done
`pip install OTHER`, then go on
Needs `pip install 'OTHER[train]'`.
uv add OTHER
uv pip install OTHER
uv tool install OTHER
uvx OTHER doctor
uvx --from=OTHER bpk
uv run --with OTHER python
pipx install OTHER
pipx run OTHER demo
conda install -c conda-forge OTHER
poetry add OTHER
pdm add OTHER
pip install \\|    torch \\|    OTHER
say `pip install|OTHER` once
"pip install OTHER\\n",
<code>pip install OTHER</code>
(needs OTHER[onnx])
cuda needs OTHER[gpu], and
dependencies = ["OTHER>=0.1.0"]
dependencies = ["torch", "OTHER"]
dependencies = ["black[d]", "OTHER"]
install_requires=["OTHER"]
"dependencies": ["OTHER"]
test = ["OTHER[$extras]", "pytest>=8.2"]
OTHER >= 0.1
OTHER~=0.1
OTHER
OTHER @ git+https://github.com/OWNER/OTHER
OTHER = "^0.1"
OTHER = { version = "*", extras = ["train"] }
  - OTHER
  - conda-forge::OTHER=0.1
run("pip", "install", "--quiet", "OTHER")
"""
OTHERWISE = """
pip install -e '.[dev]'
pip install 'block-policy-kit[traces]' && OTHER doctor
pip install block-policy-kit    # then `OTHER doctor`
pip install -e ./OTHER-quick-stop[test]
pip install ./OTHER build/wheels/OTHER-0.1.0.whl
pip uninstall -y OTHER
`pip install torch`, then `OTHER demo`
pip install torch, then OTHER demo
pip index versions OTHER-NAME
import OTHER
OTHER bench --policy fixed:4
OTHER = "OTHER.cli.main:main"
OTHER = ["py.typed"]
package-dir = { OTHER = "OTHER", OTHER_fixed = "plugins/OTHER_fixed" }
"OTHER": "0.1.0",
keywords = ["OTHER", "speculative decoding"]
Until OTHER 1.0, what a policy imports may change
[project.entry-points.OTHER]
"""


def samples(lines: str) -> list[str]:
    """Each line a sample, in which `|` ends a line."""
    named = lines.strip("\n").replace("OTHER", OTHER).replace("Other", OTHER.title())
    return [line.replace("|", "\n") for line in named.split("\n")]


@pytest.mark.parametrize("text", samples(INSTALLS))
def test_what_installs_the_other_project_is_found(text: str) -> None:
    assert installs_other(text)
    assert installs_other(f"```sh\nmake demo\n{text}\nmake test\n```\n")
    assert not installs_other(re.sub(OTHER, DISTRIBUTION, text, flags=re.I))


@pytest.mark.parametrize("text", samples(OTHERWISE))
def test_other_uses_of_the_name_are_not(text: str) -> None:
    assert not installs_other(text)


def test_messages_are_read_as_they_are_said() -> None:
    source = f"raise ValueError(f'{{what}} is not installed: pip '\n 'install ' f'{OTHER}, please')"
    assert not installs_other(source)
    assert any(installs_other(text) for text in strings(source))


# The project.


def test_no_text_of_the_project_installs_the_other_one() -> None:
    assert {"README.md", "pyproject.toml", "bpkit/installation/doctor.py", "docs/index.md"} <= set(texts())
    found = {path: installs for path, text in texts().items() if (installs := installs_other(text))}
    assert not found


def test_no_message_of_the_code_installs_the_other_one() -> None:
    found = {}
    for path, text in texts().items():
        if path.endswith(".py"):
            said = (string for string in strings(text) if string.strip().lower() != OTHER)
            found[path] = [one for string in said for one in installs_other(string)]
    assert len(found) > 100
    assert not {path: installs for path, installs in found.items() if installs}


def test_nothing_that_is_listed_or_made_installs_the_other_one() -> None:
    said = [text for kind in Kind for text in render(Names.of("bpkit-mine"), kind).values()]
    for name in ("policy", "drafter", "observer", "engine"):
        for entry in registry().of_kind(name).values():
            config = entry.load_config()
            said += [entry.summary, *(f.description or "" for f in (config.model_fields if config else {}).values())]
    assert any(requirement("gpu") in text for text in said)
    assert not [one for text in said for one in installs_other(text)]


def test_the_code_has_the_name_of_the_project_in_one_place() -> None:
    assert PROJECT["name"] == DISTRIBUTION != OTHER
    assert version(DISTRIBUTION) == __version__
    ours = {path: text for path, text in texts().items() if path.startswith(("bpkit/", "plugins/"))}
    assert [path for path, text in ours.items() if DISTRIBUTION in text] == ["bpkit/installation/distribution.py"]


def test_extras_of_the_project_are_its_own_and_exist() -> None:
    extras = PROJECT["optional-dependencies"]
    needed = [Requirement(text) for texts in (*extras.values(), PROJECT["dependencies"]) for text in texts]
    assert OTHER not in {one.name for one in needed}
    named = [one for one in needed if one.extras <= set(extras) and one.extras]
    assert named
    assert {one.name for one in named} == {DISTRIBUTION}


def test_pages_install_this_project_with_extras_that_exist() -> None:
    pages = {path: text for path, text in texts().items() if path.endswith(".md")}
    assert install_command("traces") in pages["README.md"]
    extras = set(PROJECT["optional-dependencies"])
    named: dict[str, set[str]] = {}
    for path, text in pages.items():
        for name, inside in re.findall(r"(?<![\w./-])([A-Za-z][\w.-]*|\.)\[([a-z]+(?:,[a-z]+)*)\]['`]", text):
            of = set(inside.split(","))
            if name in (DISTRIBUTION, "."):
                assert of <= extras, f"{path}: {name}[{inside}]"
            named.setdefault(name, set()).update(of)
    assert {name for name, of in named.items() if of <= extras} <= {DISTRIBUTION, "."}
    assert named[DISTRIBUTION] >= {"traces", "export", "train"}


def test_the_wheel_has_every_package_and_no_other() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    core = {".".join(file.relative_to(ROOT).parent.parts) for file in (ROOT / "bpkit").rglob("__init__.py")}
    plugins = {folder.name for folder in (ROOT / "plugins").glob("bpkit_*") if folder.is_dir()}
    assert sorted(settings["packages"]) == sorted({*core, *plugins, "bpkit.exported"})
