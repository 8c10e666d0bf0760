"""What pip calls bpkit, and the command that installs an extra of it."""

from __future__ import annotations

import shlex

DISTRIBUTION = "block-policy-kit"
"""As in `pyproject.toml`. The import and the command are called `bpkit`, which on PyPI is another project."""


def requirement(*extras: str) -> str:
    """As a list of dependencies has it.

    >>> requirement(), requirement("onnx", "traces")
    ('block-policy-kit', 'block-policy-kit[onnx,traces]')
    """
    return f"{DISTRIBUTION}[{','.join(extras)}]" if extras else DISTRIBUTION


def install_command(*extras: str) -> str:
    """What to type for these extras.

    >>> install_command("traces")
    "pip install 'block-policy-kit[traces]'"
    """
    return f"pip install {shlex.quote(requirement(*extras))}"
