"""How BlockPilot learns: one example for each prompt, labelled with what every candidate size gives on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn, tensor
from torch.nn import functional as F

from bpkit.learn.networks import Standard
from bpkit.learn.training.policy_module import PolicyModule, TrainingOptions
from bpkit.policy import PolicyError
from bpkit.sizes import format_sizes, parse_sizes
from bpkit.trace.oracle.paths import fixed_path
from bpkit.trace.records import PromptTrace
from bpkit.types import CostModel, DraftWork
from bpkit_mlp.blockpilot import BlockPilot

Label = Literal["acceptance_length", "tokens_per_second"]
Target = Literal["argmax", "soft", "curve"]

NEIGHBOURS = 2
"""BlockPilot chooses among the trained block size and so many sizes on either side of it."""


class BlockPilotOptions(TrainingOptions):
    """Training options of `blockpilot`. The paper does not give its own; there are few examples, one a prompt."""

    epochs: int = Field(default=60, ge=1, description="passes over the training prompts, at most")
    batch_size: int = Field(default=32, ge=1, description="prompts a step, on each device")
    learning_rate: float = Field(default=1e-4, gt=0, description="of AdamW, at its peak")
    label: Label = Field(
        default="acceptance_length", description="what a size is judged by; tokens_per_second is by the cost model"
    )
    target: Target = Field(
        default="argmax", description="best size (published); soft: softmax over the sizes; curve: regress all of them"
    )
    temperature: float = Field(
        default=0.02, gt=0, description="with target=soft: differences between sizes that count, as a share"
    )


class BlockPilotModule(PolicyModule):
    """Cross-entropy on the size with the best acceptance length (published), or one of the steadier targets."""

    Options = BlockPilotOptions
    policy: BlockPilot
    options: BlockPilotOptions

    def examples(self, prompt: PromptTrace) -> dict[str, Tensor]:
        """`inputs` float32 [1, inputs] and `curve` float32 [1, sizes]; no rows if the prompt has no steps."""
        traced = prompt.drafts.block_sizes.tolist()
        sizes = candidate_sizes(self.policy.config.candidates, self.spec.trained_block_size, traced)
        inputs = tensor(prompt.features[self.policy.feature]).float()[None]
        rows = min(prompt.decided_by_steps, 1)
        work, label = self.spec.work, self.options.label
        given = [curve(prompt, work, self.cost, sizes, label).tolist() for _ in range(rows)]
        curves = tensor(given, dtype=inputs.dtype).reshape(rows, len(sizes))
        return {"inputs": inputs[:rows], "curve": curves, "sizes": tensor([sizes])[:rows]}

    def prepare(self, data: dict[str, Tensor]) -> None:
        """Facts: `inputs`, `sizes`, and the `spread` of the relative curves."""
        inputs, curves = data["inputs"], data["curve"]
        if not len(inputs):
            raise PolicyError("no training prompt has a step to choose a block size for")
        self.facts = {
            "inputs": inputs.shape[1],
            "sizes": data["sizes"][0].tolist(),
            "spread": max(float(relative(curves).square().mean().sqrt()), 1e-6),
        }
        self.networks = nn.ModuleDict(self.policy.build(self.facts))
        standard = self.networks["normalisation"]
        if isinstance(standard, Standard):
            standard.fit(inputs)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        scores = nn.Sequential(*self.networks.values())(batch["inputs"])
        options = self.options
        spread = self.facts["spread"]
        return choice_loss(scores, batch["curve"], options.target, temperature=options.temperature, spread=spread)


def candidate_sizes(given: str | None, trained: int, traced: Sequence[int]) -> tuple[int, ...]:
    """The block sizes to choose from, ascending.

    Args:
        given: such as `1+8-16`, or None for the trained size and its neighbours, as far as they were traced.

    Raises:
        PolicyError: a given size was not traced, or there are not two sizes to choose from.

    >>> candidate_sizes(None, 8, range(2, 17))
    (6, 7, 8, 9, 10)
    >>> candidate_sizes(None, 16, range(2, 17))
    (14, 15, 16)
    >>> candidate_sizes("1+4+8", 8, (2, 4, 8))
    (1, 4, 8)
    """
    known = {1, *map(int, traced)}
    if given is None:
        around = range(max(trained - NEIGHBOURS, 2), trained + NEIGHBOURS + 1)
        sizes = tuple(size for size in around if size in known)
    else:
        try:
            sizes = parse_sizes(given)
        except ValueError as error:
            raise PolicyError(f"option 'candidates': {error}") from None
        missing = [size for size in sizes if size not in known]
        if missing:
            raise PolicyError(
                f"option 'candidates': the trace has sizes 1+{format_sizes(traced)}, not {format_sizes(missing)}; "
                "name sizes that it has, or trace again with `--block-sizes`"
            )
    if len(sizes) < 2:
        raise PolicyError(
            f"there is nothing to choose: of the sizes around {trained} the trace has only {list(sizes)}. Name others "
            f"with the option 'candidates', of 1+{format_sizes(traced)}"
        )
    return sizes


def curve(
    prompt: PromptTrace, work: DraftWork, cost: CostModel, sizes: Sequence[int], label: Label
) -> NDArray[np.float64]:
    """What each block size, kept for the whole prompt, gives: tokens per step or tokens per second, float64 [sizes].

    Args:
        work: of the drafter.
    """
    paths = [fixed_path(prompt, work, cost, size) for size in sizes]
    if label == "acceptance_length":
        return np.array([path.tokens / path.steps for path in paths])
    return np.array([path.tokens / path.seconds for path in paths])


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
