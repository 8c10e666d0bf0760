"""What a new policy is called: by pip, by Python and by `--policy`. Names that something else has are refused."""

from __future__ import annotations

import keyword
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from typing import Self

from bpkit.registry.discovery import registry

MAX_LENGTH = 40
"""Characters of a name; with more, lines of the made files would be too long."""


class Kind(StrEnum):
    """A folder of `templates/` each, on top of `templates/common`."""

    STATELESS = "stateless"
    FEEDBACK = "feedback"
    TRAINED = "trained"


class ScaffoldError(ValueError):
    """A package cannot be made under this name or in this folder; the message says what to change."""


@dataclass(frozen=True)
class Names:
    """The names that follow from one.

    Attributes:
        distribution: as `pip install` takes it.
        package: as `import` takes it.
        policy: as `--policy` takes it: the package without `bpkit_`.
        class_name: of the policy.
    """

    distribution: str
    package: str
    policy: str
    class_name: str

    @classmethod
    def of(cls, name: str) -> Self:
        """Derive them.

        >>> Names.of("bpkit-quick-stop")
        Names(distribution='bpkit-quick-stop', package='bpkit_quick_stop', policy='quick_stop', class_name='QuickStop')

        Raises:
            ScaffoldError: pip or Python would not take it.
        """
        if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
            raise ScaffoldError(
                f"{name!r} cannot name a distribution: use letters, digits and dashes, beginning with a letter, such "
                "as bpkit-quick-stop (`--out` says where the folder goes)"
            )
        if len(name) > MAX_LENGTH:
            raise ScaffoldError(f"{name!r} has {len(name)} characters: use at most {MAX_LENGTH}")
        distribution = re.sub(r"[-_.]+", "-", name).lower()
        package = distribution.replace("-", "_")
        policy = package.removeprefix("bpkit_")
        if not policy.isidentifier():
            raise ScaffoldError(f"{name!r} would make a policy {policy!r}: begin it with a letter after 'bpkit-'")
        class_name = "".join(part.capitalize() for part in policy.split("_"))
        for word in (package, policy, class_name):
            if keyword.iskeyword(word):
                raise ScaffoldError(
                    f"{name!r} would need {word!r} as a name, which is a keyword of Python: {another(name)}"
                )
        return cls(distribution, package, policy, class_name)


def refuse_taken(names: Names, kind: Kind) -> None:
    """Raise ScaffoldError if something that is installed here has one of the names already."""
    other = another(names.distribution)
    if names.package in sys.stdlib_module_names:
        raise ScaffoldError(f"Python's own module {names.package!r} would be hidden: {other}")
    installed = {re.sub(r"[-_.]+", "-", d.name).lower() for d in metadata.distributions() if d.name}
    if names.distribution in installed:
        raise ScaffoldError(
            f"a distribution {names.distribution!r} is installed here, and installing yours would replace it: {other}; "
            f"or `pip uninstall {names.distribution}` first, if it is an earlier one of yours"
        )
    owners = metadata.packages_distributions().get(names.package)
    if owners:
        raise ScaffoldError(
            f"there is a module {names.package!r} already, of {', '.join(sorted(set(owners)))}: {other}"
        )
    known = registry()
    entries = known.conflicts.get(("policy", names.policy)) or known.policies.get(names.policy)
    if entries is not None:
        of = " and ".join(repr(entry.distribution) for entry in (entries if isinstance(entries, list) else [entries]))
        raise ScaffoldError(f"there is a policy {names.policy!r} already, of {of}: {other}")
    if kind is Kind.TRAINED and names.policy == "drafter":
        raise ScaffoldError(f"`bpkit train {names.policy}` is something else already: {other}")


def another(name: str) -> str:
    """The way out.

    >>> another("fixed"), another("bpkit-fixed")
    ("choose another name, such as 'bpkit-fixed-mine'", "choose another name, such as 'bpkit-fixed-mine'")
    """
    return f"choose another name, such as 'bpkit-{name.lower().removeprefix('bpkit-')}-mine'"
