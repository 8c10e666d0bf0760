"""Puts a folder of files where there was none: all of them or nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bpkit.scaffold.names import ScaffoldError


def refuse_folder_in_use(folder: Path) -> None:
    """Raise ScaffoldError unless the folder is empty or not there."""
    if folder.is_dir():
        inside = next(folder.iterdir(), None)
        if inside is not None:
            raise ScaffoldError(
                f"{folder} is not empty (it has {inside.name}), and nothing is overwritten: choose another folder with "
                "`--out`, or move it away"
            )
    elif folder.exists() or folder.is_symlink():
        raise ScaffoldError(f"{folder} is a file: choose another folder with `--out`")


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Write the files, path -> text, beside the folder first, so that an error or an interrupt leaves none of them.

    Raises:
        ScaffoldError: there is something in the folder.
    """
    refuse_folder_in_use(folder)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        made = Path(partial) / "made"  # the temporary folder itself can be read by its owner only
        for path, text in files.items():
            file = made / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
        if folder.exists():  # and empty: it may be where the user stands, so it is filled and not replaced
            for entry in sorted(made.iterdir()):
                shutil.move(entry, folder / entry.name)
        else:
            made.rename(folder)
