"""What is wrong with a cost model."""

from __future__ import annotations


class CostError(ValueError):
    """A cost model cannot be read, or does not say what was asked; the message names the place and how to mend it."""
