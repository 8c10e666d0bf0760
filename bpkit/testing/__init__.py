"""For authors of plug-ins: checks of a policy, and tiny models to test with, no network and no GPU needed.

>>> from bpkit.testing import tiny_pair
>>> from bpkit import SpeculativeDecoder
>>> pair = tiny_pair()
>>> decoder = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:4", tokenizer=pair.tokenizer)
>>> decoder.generate("x = ", max_new_tokens=12).tokens.shape
torch.Size([1, 12])

`check_policy` tries a policy on that pair; see docs/check.md. Importing this package imports no torch: names are looked
up when they are used, because pytest loads `bpkit.testing.fixtures` into every test run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bpkit.names import imported_late

if TYPE_CHECKING:
    from bpkit.testing.checks.check import Check, check_policy, policy_checks
    from bpkit.testing.checks.report import Failure, PolicyCheckError, Report, Result
    from bpkit.testing.models import AgreeableDrafter, TinyPair, tiny_pair

__all__ = [
    "AgreeableDrafter",
    "Check",
    "Failure",
    "PolicyCheckError",
    "Report",
    "Result",
    "TinyPair",
    "check_policy",
    "policy_checks",
    "tiny_pair",
]

__getattr__ = imported_late(__name__, __all__, "checks.check", "checks.report", "models")
