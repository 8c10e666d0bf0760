"""BlockPilot (Zhang et al. 2026, 2606.31315): one block size for each prompt, chosen after prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bpkit.export.core import Core, Export, Port, decision, given, margin
from bpkit.learn import TrainedConfig, TrainedPolicy
from bpkit.policy import PolicyError, State
from bpkit.types import Context, CostModel, DecoderSpec, Feature

if TYPE_CHECKING:
    from torch import Tensor, nn

DEPTH, DROPOUT = 2, 0.2
"""Layers before the output, and dropout in training, as published."""
MARGIN = "how far the decision is from the next, in units of the scores"


class BlockPilotConfig(TrainedConfig):
    """Options of `blockpilot`; all but `weights` are settled by training."""

    input: Literal["logits", "hidden"] = Field(
        default="logits", description="what is read after the last prompt token: raw logits, or the final hidden state"
    )
    normalise: Literal["none", "standard", "layer", "softmax"] = Field(
        default="none",
        description="of the input: none; by the training prompts' mean and deviation; by its own; softmax",
    )
    width: int = Field(default=2048, ge=1, description="neurons of each layer")
    candidates: str | None = Field(
        default=None, description="block sizes to choose from, as 1+8-16; by default those within 2 of the trained one"
    )


class BlockPilot(TrainedPolicy):
    """An MLP on what the target makes of the prompt names the block size, once, in `begin`.

    As the authors' program has it: vocabulary -> 2048, 2048 -> 2048 with a residual connection, output over the sizes;
    ReLU, dropout 0.2 in training. The size with the largest output is kept for the whole prompt.
    """

    name = "blockpilot"
    Config = BlockPilotConfig
    trainer = "bpkit_mlp.blockpilot_training:BlockPilotModule"
    config: BlockPilotConfig

    @property
    def wants(self) -> frozenset[Feature]:  # type: ignore[override]
        """The one input that the options name."""
        return frozenset({self.feature})

    @property
    def feature(self) -> Feature:
        """What the network reads."""
        config = getattr(self, "config", None)  # the base class asks for `wants` before the options are there
        hidden = config is not None and config.input == "hidden"
        return Feature.PREFILL_HIDDEN if hidden else Feature.PREFILL_LOGITS

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        """The networks for `facts`: `inputs` (how many) and `sizes` (block sizes, in the order of the outputs)."""
        from bpkit_mlp.networks import ResidualMLP, normalisation

        inputs = int(facts["inputs"])
        outputs = len(facts["sizes"])
        return {
            "normalisation": normalisation(self.config.normalise, inputs),
            "mlp": ResidualMLP(inputs, self.config.width, outputs, depth=DEPTH, dropout=DROPOUT),
        }

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        from torch import nn

        from bpkit.learn.quick import quick
        from bpkit_mlp.networks import Choice

        self.decoder = decoder
        self.sizes = [min(int(size), decoder.max_block_size) for size in self.facts["sizes"]]
        self.choice = Choice(nn.Sequential(*self.networks.values()), self.sizes)
        # Of each block size: float32 [batch, inputs] -> [batch, sizes].
        self.scores = quick(self.choice.network, int(self.facts["inputs"]))

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        if self.feature not in features:
            return {}
        return {"scores": self.scores(features[self.feature].float())}

    def begin(self, context: Context) -> State:
        return {"block_size": self.choice.size_at(self.predicted(context)["scores"].argmax(dim=-1))}

    def select(self, state: State, context: Context) -> Tensor:
        block_size: Tensor = state["block_size"]
        return block_size

    def export(self) -> Export:
        """The choice after prefill."""
        core = Core(
            "begin",
            self.choice,
            inputs=(given(self.feature, int(self.facts["inputs"])),),
            outputs=(
                decision("begin"),
                Port("scores", ("batch", len(self.sizes)), "float32", "of each block size"),
                margin(MARGIN),
            ),
        )
        return Export({"policy": core}, sorted({1, *self.sizes}))

    def folded(self, lm_head: nn.Module, *, config: Any = None, processors: Sequence[object] = ()) -> BlockPilot:
        """A policy that decides alike from `prefill_hidden` instead of `prefill_logits`; bind this one first.

        Args:
            lm_head: of the target, a plain linear layer.
            config: of the target, to see what it does to the logits behind its head.
            processors: that the policy's logits went through in training. bpkit's own features are raw: none.

        Raises:
            PolicyError: what stands between hidden state and first layer is not affine, or not known to be.
        """
        from torch import nn

        from bpkit_mlp.fold import folded_mlp, refuse_what_is_not_affine
        from bpkit_mlp.networks import ResidualMLP

        if self.config.input != "logits":
            raise PolicyError("this policy reads hidden states already: there is nothing to fold")
        if "mlp" not in self.networks:
            raise PolicyError("the policy has no weights yet: bind it to its decoder before it is folded")
        refuse_what_is_not_affine(self.config.normalise, self.facts["inputs"], lm_head, config, processors)
        mlp, normalisation, spec = self.networks["mlp"], self.networks["normalisation"], self.decoder
        assert isinstance(mlp, ResidualMLP)
        assert isinstance(lm_head, nn.Linear)
        if lm_head.in_features != spec.hidden_size:
            raise PolicyError(
                f"the head reads {lm_head.in_features} numbers, hidden states of {spec.target} have {spec.hidden_size}"
            )
        options = self.config.model_copy(update={"input": "hidden", "normalise": "none", "weights": None})
        networks = {"normalisation": nn.Identity(), "mlp": folded_mlp(mlp, normalisation, lm_head)}
        return BlockPilot.trained(options, {**self.facts, "inputs": spec.hidden_size}, networks, spec)
