"""What the perceptrons are trained to do."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Target = Literal["argmax", "soft", "curve"]


def relative(curve: Tensor) -> Tensor:
    """Each size against the mean of the prompt's sizes, 0 where it is no better: [batch, sizes] of the same shape.

    How easy a prompt is moves its whole curve, and says nothing about which size to choose.
    """
    return curve / curve.mean(dim=1, keepdim=True) - 1


def choice_loss(scores: Tensor, curve: Tensor, target: Target, *, temperature: float, spread: float) -> Tensor:
    """Loss of scores over block sizes, [batch, sizes], whose largest is the choice.

    - `argmax`: cross-entropy on the best size; the smallest of several that are equally good.
    - `soft`: cross-entropy on softmax(relative curve / temperature), so that near-ties count as near-ties.
    - `curve`: squared error of the relative curve, in units of `spread`.

    Args:
        curve: what each size gives, [batch, sizes].
        spread: standard deviation of the relative curves of all training prompts.
    """
    if target == "argmax":
        return F.cross_entropy(scores, curve.argmax(dim=1))  # the first of equals
    wanted = relative(curve)
    if target == "soft":
        return F.cross_entropy(scores, (wanted / temperature).softmax(dim=1))
    return F.mse_loss(scores, wanted / spread)


def asymmetric_l1(forecast: Tensor, accepted: Tensor, penalty: float) -> Tensor:
    """Mean of |forecast - accepted|, times `penalty` where the forecast is too low (AdaEAGLE, equation 4).

    This is the pinball loss: its minimiser is the quantile penalty / (1 + penalty) of what is accepted.

    Args:
        forecast, accepted: draft lengths, [batch].
    """
    missed = accepted - forecast
    return (missed.clamp(min=0) * penalty + (-missed).clamp(min=0)).mean()
