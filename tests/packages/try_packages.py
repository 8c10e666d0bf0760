"""Walk the road of a new author in an environment of its own: make, install, list, check, test and build each kind.

`make packages` runs this with the Python of build/packages/venv, where bpkit is an ordinary wheel. Nothing of the tree
is imported. What a command prints is shown if it fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

BIN = Path(sys.executable).parent
MADE = Path(__file__).resolve().parents[2] / "build" / "packages" / "made"
KINDS = ("stateless", "feedback", "trained")
FILES = ("LICENSE", "README.md", "CHANGELOG.md", ".gitignore", ".github/workflows/test.yml")


class Road:
    """Runs the commands of one package, each by the clock."""

    def __init__(self, kind: str) -> None:
        self.kind, self.seconds = kind, {}  # type: str, dict[str, float]

    def step(self, what: str, *command: str, inside: Path = MADE) -> str:
        """Run a command of the environment and return its stdout. Ends the program if the command fails."""
        begun = time.perf_counter()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["OMP_NUM_THREADS"] = "1"  # models are tiny here: more threads would wait for each other
        environment["PATH"] = f"{BIN}{os.pathsep}{environment.get('PATH', '')}"
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]], cwd=inside, env=environment, capture_output=True, text=True
        )
        self.seconds[what] = time.perf_counter() - begun
        print(f"{self.kind:10} {what:8} {self.seconds[what]:6.1f} s  {' '.join(command)}", flush=True)
        if done.returncode:
            sys.exit(f"{done.stdout}\n{done.stderr}\nfailed with exit code {done.returncode} in {inside}")
        return done.stdout


def main() -> None:
    """Each kind from `bpkit new` to a wheel."""
    begun = time.perf_counter()
    shutil.rmtree(MADE, ignore_errors=True)
    MADE.mkdir(parents=True)
    # Those of an earlier run: `bpkit new` would rightly refuse their names.
    subprocess.run([BIN / "pip", "uninstall", "--quiet", "--yes", *map(name_of, KINDS)], check=True)
    for kind in KINDS:
        walk(kind)
    print(f"all of it: {(time.perf_counter() - begun) / 60:.1f} minutes")


def name_of(kind: str) -> str:
    return f"bpkit-my-{kind}"


def walk(kind: str) -> None:
    """One kind; the commands are those that `bpkit new`, the README and the page on publishing name."""
    road, name, policy = Road(kind), name_of(kind), f"my_{kind}"
    folder = MADE / name
    road.step("new", "bpkit", "new", name, "--kind", kind)
    missing = [file for file in FILES if not (folder / file).is_file()]
    assert not missing, f"{missing}: are their templates in the wheel?"
    road.step("install", "pip", "install", "--quiet", "-e", f"./{name}[test]")
    listed = json.loads(road.step("list", "bpkit", "policies", "--json"))
    assert listed["failures"] == {}, listed["failures"]
    (entry,) = (entry for entry in listed["policies"] if entry["name"] == policy)
    assert entry["distribution"] == name, entry
    if kind == "trained":
        assert policy in road.step("trains", "bpkit", "train", "--help"), "`bpkit train` does not list it"
    road.step("check", "bpkit", "check", policy)
    road.step("test", "python", "-m", "pytest", "-q", inside=folder)
    road.step("lint", "ruff", "check", ".", inside=folder)
    road.step("format", "ruff", "format", "--check", ".", inside=folder)
    road.step("wheel", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", ".", inside=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(folder / "src")) for path in (folder / "src").rglob("*.py*") if path.suffix != ".pyc"
    }
    assert modules <= inside, modules - inside
    assert any(path.endswith("entry_points.txt") for path in inside), inside


if __name__ == "__main__":
    main()
