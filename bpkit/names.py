"""Names as people write them: what a mistyped one may have meant, and what a class is called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that is nearest, after a blank; empty if none is near.

    >>> did_you_mean("fixd", ["threshold", "fixed"]), did_you_mean("xyz", ["fixed"])
    (" Did you mean 'fixed'?", '')
    """
    near = difflib.get_close_matches(name, [str(one) for one in known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def snake_case(name: str) -> str:
    """A class name as policies are called.

    >>> snake_case("MyPolicy"), snake_case("SpecDecPP2")
    ('my_policy', 'spec_dec_pp2')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
