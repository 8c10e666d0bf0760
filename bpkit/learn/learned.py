"""Policies in ten lines: the author writes which features are read and a network, everything else is here.

>>> from torch import nn
>>> from bpkit.learn import LearnedPolicy
>>> class MyPolicy(LearnedPolicy):
...     wants = frozenset({"last_hidden", "anchor_entropy"})
...
...     def network(self, inputs, outputs):
...         return nn.Sequential(nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, outputs))
>>> MyPolicy.name
'my_policy'

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from bpkit.export.core import Core, Export, Port, decision, given, margin
from bpkit.learn.config import LearnedConfig
from bpkit.learn.trained import TrainedPolicy
from bpkit.names import snake_case
from bpkit.policy import PolicyConfig, PolicyError, State
from bpkit.types import Context, CostModel, DecoderSpec, Feature

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["READABLE", "LearnedConfig", "LearnedPolicy"]

READABLE = (
    Feature.LAST_HIDDEN,
    Feature.TARGET_FEATURES,
    Feature.ANCHOR_EMBEDDING,
    Feature.ANCHOR_LOG_PROBABILITY,
    Feature.ANCHOR_ENTROPY,
)
"""What is known before every draft, in the order in which networks get it."""


class LearnedPolicy(TrainedPolicy):
    """Drafts the block that gains most at the speed that decoding goes at anyway.

    A network says, for each block size that was traced, how much of its draft will stand; `bpkit.learn.gains` weighs
    those tokens against the time that the step takes. Block size 1 is one of the choices. Where the forecasts kept from
    training say that asking gains less than it takes, the best fixed size is drafted without asking.

    Subclasses say `wants` and `network`, and may have options: a nested `Config` that derives from `LearnedConfig`.
    `bpkit train`, `bpkit export` and everything that takes a policy work with them.

    Class attributes:
        name: of the policy; by default the class name in small letters, `my_policy` for `MyPolicy`.
        wants: some of `last_hidden`, `target_features`, `anchor_embedding`, `anchor_log_probability` and
            `anchor_entropy`.
        deciding: of the networks that `build` makes, the name of the one that decides.
    """

    deciding: ClassVar[str] = "forecaster"
    Config: ClassVar[type[PolicyConfig]] = LearnedConfig
    trainer = "bpkit.learn.training.learned:LearnedModule"
    config: LearnedConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            cls.name = snake_case(cls.__name__)
        if not issubclass(cls.Config, LearnedConfig):
            raise PolicyError(
                f"{cls.__name__}.Config must derive from bpkit.learn.LearnedConfig, whose options are needed too"
            )

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.reads = _readable(type(self))

    def network(self, inputs: int, outputs: int) -> nn.Module:
        """The network, untrained: float32 [batch, inputs] -> [batch, outputs].

        Args:
            inputs: numbers in the wanted features together; they arrive standardised, in the order of `READABLE`.
            outputs: block sizes that were traced, one score for each.
        """
        raise NotImplementedError(f"{type(self).__name__} must define network(self, inputs, outputs)")

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        """The network for `facts`: `inputs` (numbers in each feature) and `block_sizes`, ascending, without 1.

        Returns:
            The deciding one: features, float32 [batch, inputs] -> tokens expected to stand, [batch, block sizes].
        """
        from bpkit.learn.networks import Forecaster, checked_network

        widths: Mapping[str, int] = facts["inputs"]
        wanted = [str(name) for name in self.reads]
        if list(widths) != wanted:
            raise PolicyError(
                f"it was trained with {', '.join(widths)}, and its class now wants {', '.join(wanted)}: train it again"
            )
        inputs, sizes = sum(widths.values()), facts["block_sizes"]
        network = checked_network(self.network, inputs, len(sizes), type(self).__name__)
        return {"forecaster": Forecaster(network, inputs, sizes)}

    def widths(self) -> Mapping[str, int]:
        """Numbers in each feature that it reads, by name, in order."""
        found: Mapping[str, int] = self.facts["inputs"]
        return found

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        trained = self.facts["block_sizes"]
        usable = [size for size in trained if size <= decoder.max_block_size]
        if not usable:
            raise PolicyError(
                f"policy {self.name!r} was trained for block sizes {trained}; this decoder drafts none of them"
            )
        from bpkit.learn.gains import Gains
        from bpkit.learn.quick import quick

        self.decoder = decoder
        self.forecaster = quick(self.networks[self.deciding], sum(self.widths().values()))
        self.gains = Gains(self.facts, usable, cost, self.config)
        # Without asking nothing is read, and nothing need be computed.
        others = self.wants - set(self.reads)
        self.wants = others | set(self.reads) if self.gains.asks else others  # type: ignore[misc]

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        if self.reads[0] not in features:
            return {}
        from bpkit.learn.networks import joined

        return {"tokens": self.forecaster(joined([features[name] for name in self.reads]))}

    def select(self, state: State, context: Context) -> Tensor:
        gains = self.gains
        if not gains.asks:
            return context.full(gains.sizes[gains.floor])
        tokens = self.predicted(context)["tokens"]  # [batch, trained sizes]
        return context.position.new_tensor(gains.best_sizes(tokens.numpy(), context.context_length.tolist()))

    def export(self) -> Export:
        """One network: features and cost curves in, a block size out."""
        return Export({"policy": self.select_core()}, [1, *self.gains.sizes], self.gains.curves)

    def select_core(self) -> Core:
        """What `select` decides."""
        from bpkit.learn.networks import BestSize

        sizes = 1 + len(self.gains.sizes)
        features = [given(name, width) for name, width in self.widths().items()]
        return Core(
            "select",
            BestSize(self.networks[self.deciding], self.facts, self.gains.columns, self.config),
            inputs=(*features, given("step_seconds", sizes), given("typical_step_seconds", sizes)),
            outputs=(
                decision("select"),
                Port("gains", ("batch", sizes), "float32", "tokens that each block size gains over no draft; 1 first"),
                margin("how far the choice is ahead of the next, in tokens"),
            ),
        )


def _readable(kind: type[LearnedPolicy]) -> tuple[Feature, ...]:
    """The wanted features, in the order of `READABLE`. Raises PolicyError for any that is not known in `select`."""
    known, can = {str(name) for name in READABLE}, ", ".join(READABLE)
    others = sorted({str(name) for name in (*kind.wants, *kind.wants_optional)} - known)
    if others:
        raise PolicyError(
            f"{kind.__name__} wants {', '.join(others)}, but a LearnedPolicy decides before the draft, at every step: "
            f"choose from {can}"
        )
    if not kind.wants:
        raise PolicyError(f"{kind.__name__} wants no feature, so there is nothing to learn from: choose from {can}")
    return tuple(name for name in READABLE if name in kind.wants)
