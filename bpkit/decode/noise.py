"""Counter-based noise: the randomness of output position t is a pure function of (seed, stream, t, token id).

Each (seed, stream, t) is hashed to a 64-bit key in plain integers; the bits of a token are SplitMix64 (Steele, Lea &
Flood 2014, "Fast splittable pseudorandom number generators") at counter `token id` under that key. It is integer
arithmetic, so the bits are the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1
# One key would tie draws that must be independent: each use of the noise has a salt of its own.
TARGET_SALT, DRAFT_SALT, ACCEPT_SALT, POLICY_SALT = range(4)


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def hashed(seed: int, stream: int, position: int, salt: int) -> int:
    """64 bits that depend on every argument, in plain integers."""
    key = _mix(seed + _GOLDEN)
    for part in (stream, position, salt):
        key = _mix(key ^ _mix((part + 1) * _GOLDEN))
    return key


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch only shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seed: int, stream: int, start: int, count: int, width: int, device: torch.device, salt: int) -> Tensor:
    """Uniforms in (0, 1) for positions start .. start + count - 1: float64 [count, width].

    64 bits each, so that values near 0 keep their relative accuracy: the smallest is 2^-65.
    """
    keys = torch.tensor([_signed(hashed(seed, stream, start + i, salt)) for i in range(count)], device=device)
    x = keys[:, None] + (torch.arange(1, width + 1, device=device) * _signed(_GOLDEN))
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    x = x ^ _shift(x, 31)
    value = (x.double() + 0.5) * 2.0**-64 + (x < 0)
    return value.clamp_(max=1 - 2.0**-53)


class GumbelNoise:
    """Standard Gumbel noise of one request, computed once for each position and kept while it may be used again.

    Adding it to log-probabilities and taking the arg-max samples from them (Gumbel-max). Large values decide, so they
    are computed from uniforms near 0, where float64 is exact: -log(-log1p(-u)) reaches 45.
    """

    def __init__(self, seed: int, stream: int, width: int, device: torch.device, *, salt: int = TARGET_SALT) -> None:
        self.seed, self.stream, self.width, self.device, self.salt = seed, stream, width, device, salt
        self._first = 0
        self._rows = torch.empty(0, width, device=device)
        self._elsewhere: GumbelNoise | None = None

    def at(self, start: int, count: int) -> Tensor:
        """Noise of positions start .. start + count - 1, none of them forgotten: float32 [count, width]."""
        begin = start - self._first
        missing = begin + count - len(self._rows)
        if missing > 0:
            fresh = self._compute(self._first + len(self._rows), missing)
            self._rows = torch.cat([self._rows, fresh])
        return self._rows[begin : begin + count]

    def forget_before(self, position: int) -> None:
        """Free the rows of positions that are decided."""
        self._rows, self._first = self._rows[position - self._first :], position
        if self._elsewhere is not None:
            self._elsewhere.forget_before(position)

    def on(self, device: torch.device) -> GumbelNoise:
        """The same noise computed on another device, which is kept and forgotten with this."""
        if self._elsewhere is None:
            self._elsewhere = GumbelNoise(self.seed, self.stream, self.width, device, salt=self.salt)
            self._elsewhere._first = self._first
        return self._elsewhere

    def _compute(self, start: int, count: int) -> Tensor:
        u = uniform(self.seed, self.stream, start, count, self.width, self.device, self.salt)
        return -torch.log(-torch.log1p(-u)).float()
