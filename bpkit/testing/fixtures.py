"""pytest fixtures for authors of plug-ins, there wherever bpkit is installed (entry point group `pytest11`).

    def test_my_policy(bpkit_check):
        bpkit_check("./my_policy.py:MyPolicy")

pytest imports this module in every run, whoever's tests they are: it imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bpkit.testing.checks.report import Report
    from bpkit.testing.models import TinyPair


@pytest.fixture(scope="session")
def bpkit_pair() -> TinyPair:
    """The tiny pair (`bpkit.testing.tiny_pair`), made once."""
    from bpkit.testing.models import tiny_pair

    return tiny_pair()


@pytest.fixture(scope="session")
def bpkit_check() -> Callable[..., Report]:
    """`bpkit.testing.check_policy`: call it with a policy; it raises an AssertionError that lists every failure."""
    from bpkit.testing.checks.check import check_policy

    return check_policy
