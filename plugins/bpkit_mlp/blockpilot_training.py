"""How BlockPilot learns: one example for each prompt, labelled with what every candidate size gives on it."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn, tensor

from bpkit.learn.training.policy_module import PolicyModule, TrainingOptions
from bpkit.policy import PolicyError
from bpkit.trace.records import PromptTrace
from bpkit_mlp.blockpilot import BlockPilot
from bpkit_mlp.curves import Label, candidate_sizes, curve
from bpkit_mlp.losses import Target, choice_loss, relative
from bpkit_mlp.networks import Standard


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
        sizes = self._sizes(prompt)
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

    def _sizes(self, prompt: PromptTrace) -> tuple[int, ...]:
        traced = prompt.drafts.block_sizes.tolist()
        return candidate_sizes(self.policy.config.candidates, self.spec.trained_block_size, traced)
