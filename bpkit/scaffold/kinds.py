"""The kinds of policies that there are templates for."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """A folder of `templates/` each, on top of `templates/common`."""

    STATELESS = "stateless"
    FEEDBACK = "feedback"
    TRAINED = "trained"


SUMMARIES = {
    Kind.STATELESS: "Drafts a long block after a token that the target was sure of, else a short one.",
    Kind.FEEDBACK: "Before each draft: as much as recent steps accepted on average, and a little more.",
    Kind.TRAINED: "Before each draft, a small trained network picks the block size.",
}
"""What the made policy does, for `bpkit policies`, unless its author says it."""

EXTRAS = {Kind.STATELESS: "traces", Kind.FEEDBACK: "traces", Kind.TRAINED: "export,train"}
"""Extras of bpkit that the author of such a policy needs."""

EXTRAS_FOR = {Kind.STATELESS: "", Kind.FEEDBACK: "", Kind.TRAINED: ", training and exporting"}
"""What for, after "reading traces"."""
