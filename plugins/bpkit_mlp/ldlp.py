"""AdaEAGLE's LDLP (Zhang et al. 2024, 2412.18910): forecast what will be accepted, and draft that much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bpkit.export.core import Core, Export, Port, decision, given, margin
from bpkit.learn import TrainedConfig, TrainedPolicy
from bpkit.policy import State
from bpkit.types import Context, CostModel, DecoderSpec, Feature
from bpkit_mlp.blockpilot import MARGIN

if TYPE_CHECKING:
    from torch import Tensor, nn

DEPTH = 3
"""Layers before the output, as published."""


class LdlpConfig(TrainedConfig):
    """Options of `ldlp`; all but `weights` are settled by training."""

    width: int | None = Field(default=None, ge=1, description="neurons of each layer; by default the hidden size")
    normalise: Literal["none", "standard"] = Field(
        default="none", description="of the input: none, or by the training positions' mean and deviation"
    )


class Ldlp(TrainedPolicy):
    """A three-layer residual MLP on two vectors, all that is known where a draft begins, gives the draft length.

    The vectors are the embedding of the anchor and the target's final hidden state that predicted it. The output is
    rounded and kept within 0 (no draft) and the largest draft length that was traced.
    """

    name = "ldlp"
    Config = LdlpConfig
    trainer = "bpkit_mlp.ldlp_training:LdlpModule"
    wants = frozenset({Feature.ANCHOR_EMBEDDING, Feature.LAST_HIDDEN})
    config: LdlpConfig

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        """The networks for `facts`: `hidden_size` of the target, `sizes` (block sizes that were traced, ascending)."""
        from bpkit_mlp.networks import ResidualMLP, Standard

        hidden = int(facts["hidden_size"])
        mlp = ResidualMLP(2 * hidden, self.config.width or hidden, 1, depth=DEPTH)
        return {"standard": Standard(2 * hidden), "mlp": mlp} if self.config.normalise == "standard" else {"mlp": mlp}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        import torch
        from torch import nn

        from bpkit.learn.quick import quick
        from bpkit_mlp.networks import Length

        self.sizes = sizes = self.usable(decoder)
        # A trace may have gaps; the next size above drafts all that the forecast asks for.
        enough = [next(size for size in sizes if size > length) for length in range(sizes[-1])]
        network = nn.Sequential(*self.networks.values())
        self.quick = quick(network, 2 * int(self.facts["hidden_size"]))
        self.decision = Length(network, torch.tensor(enough), self.whole(decoder))

    def whole(self, decoder: DecoderSpec) -> int | None:
        """The block size of every draft, if the forecast does not say it."""
        return None

    def usable(self, decoder: DecoderSpec) -> list[int]:
        """Block sizes to draft at, ascending: 1, and those that were traced and that the decoder can do."""
        traced = [int(size) for size in self.facts["sizes"] if 1 < size <= decoder.max_block_size]
        return [1, *traced]

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        if Feature.LAST_HIDDEN not in features:
            return {}
        import torch

        vectors = features[Feature.ANCHOR_EMBEDDING], features[Feature.LAST_HIDDEN]
        return {"length": self.quick(torch.cat(vectors, dim=1).float())[:, 0]}

    def forecast(self, context: Context) -> Tensor:
        """Draft length that the network names, rounded and clipped: int64 [batch]."""
        return self.decision.forecast(self.predicted(context)["length"])

    def select(self, state: State, context: Context) -> Tensor:
        return self.decision.size_for(self.forecast(context))

    def export(self) -> Export:
        """The forecast before each draft."""
        return Export({"policy": self.select_core()}, self.sizes)

    def select_core(self) -> Core:
        """What `select` decides."""
        hidden = int(self.facts["hidden_size"])
        return Core(
            "select",
            self.decision,
            inputs=(given(Feature.ANCHOR_EMBEDDING, hidden), given(Feature.LAST_HIDDEN, hidden)),
            outputs=(
                decision("select"),
                Port("forecast", ("batch",), "int64", "drafted tokens that are expected to be accepted"),
                Port("length", ("batch",), "float32", "the same before rounding and clipping"),
                margin(MARGIN),
            ),
        )
