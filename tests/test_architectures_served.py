"""The lists of "Which models work" are what decoding with tiny models finds."""

from __future__ import annotations

import os
import re

import pytest

from tests.architecture_survey import CROPPED, PAGE, TOGETHER, architecture, on_page, survey
from tests.tiny_architectures import model_types

LISTED = on_page(PAGE.read_text(encoding="utf-8"))
EVERY = 1 if os.environ.get("BPKIT_ALL_ARCHITECTURES") else 4
"""Of the architectures with a usual cache, every so manieth is tried; all others always."""
USUAL = [name for name in model_types() if LISTED.get(architecture(name)) in (CROPPED, TOGETHER)]
TRIED = [name for name in model_types() if name not in USUAL or USUAL.index(name) % EVERY == 0]


def test_the_page_lists_every_architecture() -> None:
    assert set(LISTED) == {architecture(name) for name in model_types()}
    counts = [int(count) for count in re.findall(r"\*\* \((\d+)\)", PAGE.read_text(encoding="utf-8"))]
    assert sum(counts) == len(LISTED)


@pytest.mark.parametrize("model_type", TRIED)
def test_an_architecture_is_served_exactly_or_refused(model_type: str) -> None:
    outcome = survey(model_type)  # fails where a text is not plain decoding's
    assert outcome.how == LISTED[architecture(model_type)], outcome.reason
