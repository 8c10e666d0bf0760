"""Fresh weights for a policy that has trained ones: its own usually belong to another pair of models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from bpkit.installation.distribution import install_command
from bpkit.learn.config import TrainedConfig
from bpkit.learn.trained import TrainedPolicy
from bpkit.policy import PolicyError, validated
from bpkit.testing.checks import setup
from bpkit.testing.checks.setup import AGREEABLE, ASSISTANT, COST
from bpkit.types import OF_THE_TARGET, Feature

if TYPE_CHECKING:
    from bpkit.learn.training.policy_module import PolicyModule


class NoTrainer(PolicyError):
    """Fresh weights cannot be made, whatever the drafter."""


class NoWeights(PolicyError):
    """What makes weights failed: the policy's network or its trainer is at fault, not the drafter."""


class FreshWeights:
    """Makes policies with the options of one and first weights of its training, from a few traces of the tiny pair."""

    def __init__(self, policy: TrainedPolicy) -> None:
        self.kind = type(policy)
        options = policy.config.model_dump(exclude={"weights"})
        self.config = cast("TrainedConfig", validated(self.kind.Config, options, owner=self.kind.__name__))
        self.wants = frozenset(policy.wants | policy.wants_optional)
        self._modules: dict[str, PolicyModule] = {}

    def policy(self, drafter: str) -> TrainedPolicy:
        """A new policy with copies of the fresh weights.

        Raises:
            PolicyError: the drafter does not give what it is trained with. NoWeights: its own fault.
        """
        kind = ASSISTANT if drafter == AGREEABLE else drafter  # the same shapes
        if kind not in self._modules:
            self._modules[kind] = self._prepared(kind)
        return self._modules[kind].finished()

    def _prepared(self, drafter: str) -> PolicyModule:
        from bpkit.learn.training.examples import collect_examples
        from bpkit.progress import NoProgress

        trainer = _trainer(self.kind)
        decoder = setup.decoder(drafter, "fixed:1")
        module = trainer(self.kind.untrained(self.config), decoder.spec, COST, trainer.Options())
        wanted = frozenset(module.features | self.wants)
        known = decoder.drafter
        offered = known.provides | ({Feature.TARGET_FEATURES} if known.feature_layers else set())
        missing = (wanted & frozenset(Feature)) - OF_THE_TARGET - offered
        if missing:
            raise PolicyError(
                f"policy {self.kind.__name__} is trained with {', '.join(sorted(missing))}, which drafter {drafter} "
                "does not provide"
            )
        traces = setup.traces(drafter, wanted)
        try:
            with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(0)
                data = collect_examples(module, traces, Path(folder), part="train", key="check", progress=NoProgress())
                module.prepare(data)
                module.calibrate(data)
        except Exception as error:
            what = f"examples, prepare or calibrate of {trainer.__name__} raised {type(error).__name__}: "
            raise NoWeights(f"{'' if isinstance(error, PolicyError) else what}{error}") from error
        if not len(module.networks):
            raise NoWeights(f"{trainer.__name__}.prepare left self.networks empty: set it from policy.build(facts)")
        return module


def _trainer(kind: type[TrainedPolicy]) -> type[PolicyModule]:
    """The policy's PolicyModule. Raises NoTrainer if it names none, or if lightning is missing."""
    from bpkit.learn.training.trainable import load_trainer

    has = f"policy {kind.__name__} has trained weights"
    if not getattr(kind, "trainer", ""):
        raise NoTrainer(
            f"{has} and does not say what trains it, so that no weights for the tiny pair can be made: add a class "
            "attribute `trainer`"
        )
    try:
        return load_trainer(kind)
    except ModuleNotFoundError as error:
        raise NoTrainer(
            f"{has}; to check it, fresh ones are made by its trainer, which needs {error.name}: "
            f"{install_command('train')}"
        ) from error
