"""For authors of plug-ins: tiny models to test policies and drafters with, no network and no GPU needed.

>>> from bpkit.testing import tiny_pair
>>> from bpkit import SpeculativeDecoder
>>> pair = tiny_pair()
>>> decoder = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:4", tokenizer=pair.tokenizer)
>>> decoder.generate("x = ", max_new_tokens=12).tokens.shape
torch.Size([1, 12])
"""

from __future__ import annotations

from bpkit.testing.models import AgreeableDrafter, TinyPair, tiny_pair

__all__ = ["AgreeableDrafter", "TinyPair", "tiny_pair"]
