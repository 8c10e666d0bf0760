"""The base of the Lightning modules that train policies. A plug-in defines examples, preparation and loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from bpkit.learn.trained import TrainedConfig, TrainedPolicy
from bpkit.policy import PolicyConfig, PolicyError, validated
from bpkit.trace.records import PromptTrace
from bpkit.types import CostModel, DecoderSpec, Feature

Replay = Callable[[TrainedPolicy], float]
"""Replays a policy over validation prompts and gives tokens per second by the cost model, decision time left out."""


class TrainingOptions(PolicyConfig):
    """What every policy's training takes. Plug-ins derive their own options and defaults from it."""

    epochs: int = Field(default=30, ge=1, description="passes over the training examples, at most")
    batch_size: int = Field(default=256, ge=1, description="examples a step, on each device")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW, at its peak")
    weight_decay: float = Field(default=0.01, ge=0, description="of AdamW")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="of the learning rate: down to 0 along a cosine, or the same throughout"
    )
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    patience: int = Field(default=8, ge=1, description="validations without more tokens/s after which training ends")
    validate_every: int = Field(default=1, ge=1, description="epochs between two validations")
    validation_prompts: int = Field(
        default=64, ge=1, description="prompts replayed at each validation, spread over the domains"
    )
    seed: int = Field(default=0, ge=0, description="of first weights, order and dropout")

    @field_validator("epochs", "batch_size", "patience", "validate_every", "validation_prompts", "learning_rate")
    @classmethod
    def _positive(cls, value: float) -> float:
        # A subclass that gives another default loses the bounds of the field, but not this.
        if not value > 0:
            raise ValueError("Input should be greater than 0")
        return value


class PolicyModule(L.LightningModule):
    """Trains the networks of one policy.

    The order of calls: `examples` for each prompt, `prepare` with all training examples, `loss` for each batch, and at
    the end, with the best weights back in place, `calibrate` and `choose`. A validation replays `finished()`.

    Args:
        policy: untrained; its `config` holds the policy's options.
        spec, cost: of the decoder and of its steps, as for `Policy.bind`.

    Class attributes:
        Options: training options with their defaults.
        features: that `examples` reads, beyond those that every trace holds (`prefill_hidden`, `draft_tokens`, and of
            drafters with a distribution `draft_probability` and `draft_entropy`).

    Attributes:
        facts: plain JSON values for `TrainedPolicy.build`, set by `prepare`.
        networks: by name, set by `prepare`.
        replay: set while training runs.
        rate: tokens per second of the last validation.
    """

    Options: ClassVar[type[TrainingOptions]] = TrainingOptions
    features: ClassVar[frozenset[Feature]] = frozenset()

    def __init__(self, policy: TrainedPolicy, spec: DecoderSpec, cost: CostModel, options: TrainingOptions) -> None:
        super().__init__()
        self.policy, self.spec, self.cost, self.options = policy, spec, cost, options
        self.facts: dict[str, Any] = {}
        self.networks = nn.ModuleDict()
        self.replay: Replay | None = None
        self.rate: float | None = None

    # For subclasses to define

    def examples(self, prompt: PromptTrace) -> dict[str, Tensor]:
        """Examples of one prompt: rows first, the same keys for every prompt; there may be no rows."""
        raise NotImplementedError(f"{type(self).__name__} must define examples(self, prompt)")

    def prepare(self, data: dict[str, Tensor]) -> None:
        """Set `self.facts` and `self.networks` from all training examples, rows of all prompts one after the other."""
        raise NotImplementedError(f"{type(self).__name__} must define prepare(self, data)")

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean over the rows of a batch, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(self, batch)")

    def calibrate(self, data: dict[str, Tensor]) -> None:
        """After training, with validation examples: change `self.facts` or `self.networks`."""

    def choose(self, replay: Replay) -> None:
        """After `calibrate`: pick facts (`self.facts`) or options (`set_options`) by validation tokens/s.

        self.set_options(**self.fastest(replay, {"threshold": (0.3, 0.5, 0.7)}))
        """

    # For everybody

    def finished(self, **options: Any) -> TrainedPolicy:
        """A bound policy with copies of the current facts and weights, and these options in place of its own."""
        networks = cast("dict[str, nn.Module]", dict(self.networks.items()))
        policy = type(self.policy).trained(self._config(options), self.facts, networks, self.spec)
        policy.bind(self.spec, self.cost)
        return policy

    def fastest(self, replay: Replay, grid: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
        """Of the options in the grid that were left open, the values with the most tokens per second together."""
        names = [name for name in grid if name not in self.policy.config.model_fields_set]
        tried = (dict(zip(names, values, strict=True)) for values in product(*(grid[name] for name in names)))
        return max(tried, key=lambda options: replay(self.finished(**options))) if names else {}

    def set_options(self, **options: Any) -> None:
        """Change options of the policy, which are stored with it. Raises PolicyError."""
        self.policy = type(self.policy).untrained(self._config(options))

    def _config(self, options: dict[str, Any]) -> TrainedConfig:
        config = self.policy.config
        if not options:
            return config
        return validated(type(config), {**config.model_dump(exclude_unset=True), **options}, owner=self.policy.name)

    # What Lightning calls

    def configure_optimizers(self) -> Any:
        options = self.options
        optimizer = torch.optim.AdamW(
            [p for p in self.networks.parameters() if p.requires_grad],
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
        )
        if options.schedule == "constant":
            return optimizer
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # Dropout draws from torch's generator: seeded with each epoch, a resumed run goes on as if it had not stopped.
        # Not before the first batch, since what Lightning does at the beginning of a run draws as well.
        if batch_idx == 0:
            torch.manual_seed(self.options.seed * 1_000_003 + 1009 * self.current_epoch + self.global_rank)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if not bool(loss.isfinite()):
            raise PolicyError(
                f"the loss of policy {self.policy.name!r} became {loss.item()} in epoch {self.current_epoch}: try a "
                f"lower learning rate than {self.options.learning_rate}"
            )
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=rows(batch))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True, batch_size=rows(batch))

    def on_validation_epoch_end(self) -> None:
        if self.replay is None:
            return
        rate = self.replay(self.finished()) if self.trainer.is_global_zero else 0.0
        rate = self.trainer.strategy.broadcast(rate)
        self.rate = float(rate)  # what is logged is rounded to float32, which may hide which epoch is better
        self.log("val_tokens_per_second", self.rate)


def rows(examples: dict[str, Tensor]) -> int:
    """How many examples there are."""
    return len(next(iter(examples.values())))


def _cosine(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1].

    >>> [round(_cosine(p), 3) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
