"""`bpkit new`: the distribution of a new policy, ready to install. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bpkit.scaffold.names import Kind


def new(
    name: Annotated[
        str,
        typer.Argument(
            help="Of the distribution, such as `bpkit-quick-stop`; the policy is called `quick_stop` then.",
            metavar="NAME",
        ),
    ],
    kind: Annotated[
        Kind,
        typer.Option(
            help="`stateless`: a rule on what is known before a draft. `feedback`: it also learns from every step. "
            "`trained`: a network, trained on traces and exported to ONNX."
        ),
    ] = Kind.STATELESS,
    out: Annotated[
        Path | None, typer.Option(help="The folder to make; by default NAME, here.", metavar="FOLDER")
    ] = None,
    author: Annotated[str | None, typer.Option(help="Name in the metadata; none by default.")] = None,
    summary: Annotated[
        str | None, typer.Option(help="One line: what the policy decides, and when. `bpkit policies` shows it.")
    ] = None,
) -> None:
    """Start a policy of your own: a small distribution with tests.

    It installs as it is, and decides something sensible.
    Then change `policy.py` to what you have in mind, and `config.py` to its options. The tests say whether it is
    lawful (`bpkit check`) and does what it is meant to do. Nothing is overwritten.

    `bpkit new bpkit-quick-stop`

    `bpkit new bpkit-my-net --kind trained --author "Ada"`

    Next: `pip install -e ./bpkit-quick-stop[test]`, and `bpkit check quick_stop`
    """
    from bpkit.scaffold.names import Names, refuse_taken
    from bpkit.scaffold.render import refuse_folder_in_use, render, write_folder

    names = Names.of(name)
    folder = out or Path(name)
    refuse_folder_in_use(folder)
    refuse_taken(names, kind)
    files = render(names, kind, summary=summary, author=author)
    write_folder(folder, files)
    lines = sum(text.count("\n") for path, text in files.items() if path.endswith(".py"))
    typer.echo(
        f"made {folder}: {len(files)} files, {lines} lines of Python, policy {names.policy!r} in "
        f"{folder / 'src' / names.package / 'policy.py'}\n\nNext:\n"
        f"  pip install -e {shlex.quote(f'{_as_path(folder)}[test]')}\n"
        f"  bpkit check {names.policy}\n"
        f"  python -m pytest {shlex.quote(str(folder))}"
    )


def _as_path(folder: Path) -> str:
    """A path that pip cannot take for the name of a distribution.

    >>> _as_path(Path("bpkit-quick-stop")), _as_path(Path("../mine"))
    ('./bpkit-quick-stop', '../mine')
    """
    text = str(folder)
    return text if "/" in text or "\\" in text else f"./{text}"
