"""`bpkit new`: what it makes is found, is clean and does what its tests say; what it cannot make, it explains."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import bpkit
from bpkit.cli import main
from bpkit.installation.distribution import DISTRIBUTION
from bpkit.policy import Policy, PolicyConfig
from bpkit.registry.discovery import build, registry
from bpkit.registry.resolve import resolve_policy
from bpkit.scaffold.names import MAX_LENGTH, Kind, Names, ScaffoldError, refuse_taken
from bpkit.scaffold.render import MAX_SUMMARY, render, write_folder

ROOT = Path(__file__).parent.parent
PUBLISH = ROOT / "docs" / "publish.md"
KINDS = pytest.mark.parametrize("kind", list(Kind))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `bpkit new` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main.build_app(), ["new", *arguments], prog_name="bpkit")

    return invoke


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Kind], Path]]:
    """Makes `bpkit-my-KIND`, on `sys.path` and registered by its entry point as if it were installed."""
    before = set(sys.modules)

    def make(kind: Kind) -> Path:
        names = Names.of(f"bpkit-my-{kind}")
        folder = tmp_path / names.distribution
        write_folder(folder, render(names, kind))
        monkeypatch.syspath_prepend(str(folder / "src"))
        ((name, module),) = project(folder)["entry-points"]["bpkit"].items()
        own = build(points=[EntryPoint(name=name, value=module, group="bpkit")])
        assert own.failures == {}
        assert set(own.policies) == {names.policy}
        monkeypatch.setitem(registry().policies, names.policy, own.policies[names.policy])
        return folder

    yield make
    for module in set(sys.modules) - before:
        if module.partition(".")[0].startswith(("bpkit_my_", "test_my_")):
            del sys.modules[module]


def project(folder: Path) -> dict[str, Any]:
    """The metadata in `pyproject.toml`."""
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


# What is made.


@KINDS
def test_the_policy_is_found_by_its_entry_point_and_resolves(kind: Kind, made: Callable[[Kind], Path]) -> None:
    folder = made(kind)
    ((name, module),) = project(folder)["entry-points"]["bpkit"].items()
    assert hasattr(importlib.import_module(module), "bpkit_register_policies")
    entry = registry().policies[name]
    assert entry.summary == project(folder)["description"]
    policy = resolve_policy(f"my_{kind}")
    assert isinstance(policy, Policy)
    assert type(policy).Config is entry.load_config()
    assert type(policy).__name__ == f"My{kind.capitalize()}"


@KINDS
def test_its_own_tests_of_what_it_does_pass(
    kind: Kind, made: Callable[[Kind], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(made(kind) / "tests"))
    module = importlib.import_module(f"test_my_{kind}")
    tests = {name: value for name, value in vars(module).items() if name.startswith("test_")}
    # All checks of the kit take their time: `make packages` runs them, on the installed packages.
    assert tests.pop("test_it_is_a_lawful_policy")
    assert len(tests) >= 2
    for test in tests.values():
        test()


@KINDS
def test_listing_it_imports_no_torch(kind: Kind, made: Callable[[Kind], Path]) -> None:
    folder = made(kind)
    program = (
        f"import sys, bpkit_my_{kind}.config\nheavy = {{'torch', 'transformers'}} & set(sys.modules)\nassert not heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


@KINDS
@pytest.mark.parametrize("name", ["a", "bpkit-my-policy", "x" * MAX_LENGTH])
def test_ruff_finds_nothing_whatever_the_length_of_the_name(kind: Kind, name: str, tmp_path: Path) -> None:
    summary = "s" * (MAX_SUMMARY - 1)
    write_folder(tmp_path / "made", render(Names.of(name), kind, summary=summary, author="Zoë Ångström"))
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=tmp_path / "made",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@KINDS
def test_the_readme_lists_the_options_with_their_defaults(kind: Kind, made: Callable[[Kind], Path]) -> None:
    folder = made(kind)
    config = registry().policies[f"my_{kind}"].load_config()
    assert config is not None
    assert issubclass(config, PolicyConfig)
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    listed = {name: (default, text) for name, default, text in rows}
    fields = config.model_fields
    assert listed == {n: ("none" if f.default is None else str(f.default), f.description) for n, f in fields.items()}
    assert set(config.grid) <= set(fields)


@KINDS
def test_metadata_names_the_oldest_bpkit_and_extras_that_exist(kind: Kind) -> None:
    files = render(Names.of("My.Policy"), kind, author="Ada", summary="Does things")
    metadata = tomllib.loads(files["pyproject.toml"])["project"]
    assert metadata["name"] == "my-policy"
    assert metadata["description"] == "Does things."
    assert metadata["authors"] == [{"name": "Ada"}]
    assert metadata["dependencies"] == [f"{DISTRIBUTION}>={bpkit.__version__}"]
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(rf"{DISTRIBUTION}\[(.*?)\]", str(metadata["optional-dependencies"]["test"]))
    assert set(extras.split(",")) <= set(ours["optional-dependencies"])
    assert files["LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    workflow = files[".github/workflows/test.yml"]
    assert "${{ matrix.python-version }}" in workflow
    assert f"BPKIT: {DISTRIBUTION} @ " in workflow
    assert f"`{DISTRIBUTION}`" in files["README.md"]


def test_the_page_on_publishing_has_the_lines_of_every_file() -> None:
    text = PUBLISH.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (\d+|-) \| (\d+|-) \| (\d+|-) \|", text, re.MULTILINE)
    listed = {row[0]: dict(zip(Kind, row[1:], strict=True)) for row in rows}
    counted: dict[str, dict[Kind, str]] = {}
    for kind in Kind:
        for path, content in render(Names.of("bpkit-mine"), kind).items():
            shown = path.replace("bpkit_mine", "PACKAGE").replace("test_mine", "test_POLICY")
            counted.setdefault(shown, dict.fromkeys(Kind, "-"))[kind] = str(content.count("\n"))
    assert listed == counted


# The command.


def test_the_command_makes_the_folder_and_says_what_to_type_next(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("bpkit-quick_stop", "--kind", "feedback", "--author", "Ada", "--summary", "Stops")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "bpkit-quick_stop/src/bpkit_quick_stop/policy.py").is_file()
    assert re.findall(r"^  (.*)$", done.stdout, re.MULTILINE) == [
        "pip install -e './bpkit-quick_stop[test]'",
        "bpkit check quick_stop",
        "python -m pytest bpkit-quick_stop",
    ]
    assert project(tmp_path / "bpkit-quick_stop")["name"] == "bpkit-quick-stop"


def test_it_overwrites_nothing(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    done = run("bpkit-mine", "--out", "mine")
    assert done.exit_code == 2
    assert "notes.txt" in done.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("precious")
    assert "is a file" in run("bpkit-mine", "--out", "file").stderr


def test_an_empty_folder_is_filled_and_parents_are_made(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in ("empty", "new/deep"):
        assert run("bpkit-mine", "--out", out).exit_code == 0
        assert (tmp_path / out / ".github" / "workflows" / "test.yml").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new"]


def test_an_error_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = render(Names.of("bpkit-mine"), Kind.STATELESS)
    write, written = Path.write_text, 0

    def full_disk(self: Path, *args: Any, **options: Any) -> int:
        nonlocal written
        written += 1
        if written > 4:
            raise OSError("no space left on device")
        return write(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_folder(tmp_path / "mine", files)
    assert list(tmp_path.iterdir()) == []


# Names.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bpkit-quick-stop", ("bpkit-quick-stop", "bpkit_quick_stop", "quick_stop", "QuickStop")),
        ("Quick_Stop2", ("quick-stop2", "quick_stop2", "quick_stop2", "QuickStop2")),
        ("a.b--c", ("a-b-c", "a_b_c", "a_b_c", "ABC")),
        ("bpkit", ("bpkit", "bpkit", "bpkit", "Bpkit")),
    ],
)
def test_names_follow_from_one(name: str, expected: tuple[str, ...]) -> None:
    names = Names.of(name)
    assert (names.distribution, names.package, names.policy, names.class_name) == expected


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "cannot name a distribution"),
        ("my policy", "cannot name a distribution"),
        ("../elsewhere", "--out"),
        ("-dash", "cannot name a distribution"),
        ("dash-", "cannot name a distribution"),
        ("naïve", "cannot name a distribution"),
        ("3d", "beginning with a letter"),
        ("bpkit-3d", "begin it with a letter"),
        ("x" * (MAX_LENGTH + 1), "at most 40"),
        ("class", "'class' as a name, which is a keyword"),
        ("bpkit-lambda", "'lambda' as a name, which is a keyword"),
        ("bpkit-none", "'None' as a name, which is a keyword"),
    ],
)
def test_names_that_pip_or_python_would_not_take(name: str, complaint: str) -> None:
    with pytest.raises(ScaffoldError, match=re.escape(complaint)):
        Names.of(name)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("json", "Python's own module 'json'"),
        ("torch", "a distribution 'torch' is installed"),
        ("block-policy-kit", "a distribution 'block-policy-kit' is installed"),
        ("bpkit", "a module 'bpkit' already, of block-policy-kit"),
        ("yaml", "a module 'yaml' already, of PyYAML"),
        ("bpkit-threshold", "a module 'bpkit_threshold' already, of block-policy-kit"),
        ("bpkit-svip", "a policy 'svip' already, of 'block-policy-kit'"),
        ("svip", "a policy 'svip' already, of 'block-policy-kit'"),
    ],
)
def test_names_that_are_taken(name: str, complaint: str) -> None:
    with pytest.raises(ScaffoldError, match=re.escape(complaint)):
        refuse_taken(Names.of(name), Kind.STATELESS)


def test_a_trained_policy_is_not_called_as_another_command() -> None:
    refuse_taken(Names.of("bpkit-drafter"), Kind.STATELESS)
    with pytest.raises(ScaffoldError, match="bpkit train drafter"):
        refuse_taken(Names.of("bpkit-drafter"), Kind.TRAINED)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Kind.STATELESS, "bpkit-policy"),  # class Policy(Policy)
        (Kind.FEEDBACK, "step"),
        (Kind.TRAINED, "bpkit-learned"),  # its options would be a LearnedConfig
        (Kind.STATELESS, "bpkit-value-error"),
    ],
)
def test_a_class_that_would_hide_another_is_refused(kind: Kind, name: str) -> None:
    with pytest.raises(ScaffoldError, match="a name that its files use for something else"):
        render(Names.of(name), kind)


@pytest.mark.parametrize("text", ['say "no"', "two\nlines", "back\\slash", "s" * (MAX_SUMMARY + 1), " "])
def test_a_summary_or_author_that_cannot_stand_in_the_files(text: str) -> None:
    names = Names.of("bpkit-mine")
    with pytest.raises(ScaffoldError, match="--summary"):
        render(names, Kind.STATELESS, summary=text)
    with pytest.raises(ScaffoldError, match="--author"):
        render(names, Kind.STATELESS, author=text)


def test_errors_are_a_paragraph_with_exit_code_2(run: Callable[..., Result]) -> None:
    done = run("svip")
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: there is a policy 'svip'")
    assert "such as 'bpkit-svip-mine'" in done.stderr
    assert done.stderr.count("\n") == 1
