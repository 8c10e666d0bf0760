"""Tokens per second on validation prompts, by replay: what training is steered by, and ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import safetensors.torch

from bpkit.files import write_at_once
from bpkit.learn.trained import TrainedPolicy
from bpkit.learn.training.policy_module import PolicyModule, TrainingOptions
from bpkit.learn.training.prompts import labels
from bpkit.progress import Progress
from bpkit.trace.oracle.paths import FixedChoice, fixed_choices, fixed_path
from bpkit.trace.oracle.plan import array_cost
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.types import CostModel, DecoderSpec

RATE = "val_tokens_per_second"


@dataclass(frozen=True)
class Validation:
    """Replays policies over the same prompts, in the same order. A fault of the policy is an error.

    Attributes:
        prompts: held in memory.
    """

    spec: DecoderSpec
    cost: CostModel
    prompts: Sequence[PromptTrace]

    @classmethod
    def of(cls, module: PolicyModule, prompts: Sequence[PromptTrace]) -> Validation:
        """By as many prompts as the module's options say, without features that its policy does not read."""
        wanted = module.policy.wants | module.policy.wants_optional

        def trimmed(prompt: PromptTrace) -> PromptTrace:
            kept, of_drafts = (
                {name: value for name, value in features.items() if name in wanted}
                for features in (prompt.features, prompt.drafts.features)
            )
            return replace(prompt, features=kept, drafts=replace(prompt.drafts, features=of_drafts))

        places = spread(labels(prompts, "domain"), module.options.validation_prompts)
        return cls(module.spec, module.cost, [trimmed(prompts[place]) for place in places])

    def __call__(self, policy: TrainedPolicy) -> float:
        """Tokens per second: a ratio of sums. Decision time is left out, so that it is the same on every machine."""
        replayer = Replayer(self.spec, policy, self.cost, strict=True)
        runs = [replayer.run(prompt) for prompt in self.prompts]
        return sum(run.tokens for run in runs) / sum(run.seconds(self.cost) for run in runs)

    def judge(self, policy: TrainedPolicy, prompts: Iterable[PromptTrace], tick: Callable[[], None]) -> dict[str, Any]:
        """The policy and every fixed source and block size on all prompts, as plain JSON values; `tick` after each."""
        cost, unit = self.cost, getattr(self.cost, "unit", "seconds")
        replayer, prices = Replayer(self.spec, policy, cost, strict=True), array_cost(cost)
        works = [source.work for source in self.spec.sources]
        runs, fixed = [], defaultdict[FixedChoice, float](float)
        for prompt in prompts:
            runs.append(replayer.run(prompt))
            for choice in fixed_choices(prompt, len(works)):
                fixed[choice] += fixed_path(prompt, works, prices, *choice).seconds
            tick()
        tokens, steps = sum(run.tokens for run in runs), sum(run.steps for run in runs)
        seconds, decided = sum(run.seconds(cost) for run in runs), sum(run.begin_seconds for run in runs)
        best = min(fixed, key=lambda choice: (fixed[choice], choice))
        named = {"source": best.source} if len(works) > 1 else {}
        per_step = float(np.median(np.concatenate([run.step_seconds for run in runs]))) if steps else 0.0
        charged = seconds + (per_step * steps + decided if unit == "seconds" else 0.0)
        return {
            "prompts": len(runs),
            "tokens": tokens,
            "steps": steps,
            "acceptance_length": tokens / max(1, steps),
            "unit": unit,
            "tokens_per_second": tokens / charged,
            "tokens_per_second_without_decisions": tokens / seconds,
            "decision_seconds_per_step": per_step,
            "decision_seconds_per_prompt": decided / max(1, len(runs)),
            "best_fixed": {"block_size": best.block_size, **named, "tokens_per_second": tokens / fixed[best]},
            "gain_over_best_fixed": fixed[best] / charged - 1,
        }


def spread(domains: Sequence[str], count: int) -> list[int]:
    """Places of `count` prompts, as even over the domains and within each as can be; ascending.

    >>> spread(["a", "a", "a", "a", "b"], 3)
    [0, 2, 4]
    """
    members = {domain: [i for i, other in enumerate(domains) if other == domain] for domain in dict.fromkeys(domains)}
    in_turn = [(turn, domain) for domain, places in members.items() for turn in range(len(places))]
    wanted = Counter(domain for _, domain in sorted(in_turn, key=itemgetter(0))[:count])
    return sorted(members[domain][i * len(members[domain]) // n] for domain, n in wanted.items() for i in range(n))


class BestByReplay(L.Callback):
    """Early stopping on tokens/s rather than loss: a forecast may go on improving where it changes no decision.

    Its state is in every checkpoint, so that a run that was interrupted stops, and ends, where it would have.

    Attributes:
        file: of the best weights so far.
        epochs: figures of each epoch: `epoch`, `train_loss`, and of epochs with a validation `val_loss` and
            `val_tokens_per_second`.
        best: epoch and tokens/s of the best weights; of equal ones the earlier.
    """

    def __init__(self, folder: Path, options: TrainingOptions, progress: Progress) -> None:
        self.file, self.options, self.progress = folder / "best.safetensors", options, progress
        self.epochs: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.waited = 0

    @property
    def stopped_early(self) -> bool:
        return self.waited >= self.options.patience

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epoch_is_over(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        validated = (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0
        names = ("train_loss", "val_loss") if validated else ("train_loss",)
        figures = {"epoch": trainer.current_epoch, **{name: metrics[name] for name in names if name in metrics}}
        if validated and pl_module.rate is not None:
            figures[RATE] = pl_module.rate
        self.epochs.append(figures)
        if RATE in figures:
            self._compare(trainer, pl_module, figures)
        self._epoch_is_over(trainer)

    def _compare(self, trainer: L.Trainer, module: PolicyModule, figures: dict[str, float]) -> None:
        if self.best and figures[RATE] <= self.best[RATE]:
            self.waited += 1
            return
        self.waited = 0
        self.best = {"epoch": figures["epoch"], RATE: figures[RATE]}
        if trainer.is_global_zero:
            weights = module.networks.state_dict()
            copies = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
            write_at_once(self.file, safetensors.torch.save(copies))

    def restore(self, module: PolicyModule) -> None:
        """Put the best weights back."""
        module.networks.load_state_dict(safetensors.torch.load_file(self.file))

    def _epoch_is_over(self, trainer: L.Trainer) -> None:
        best = f", best {self.best[RATE]:.4g} tokens/s in epoch {self.best['epoch']:.0f}" if self.best else ""
        self.progress.start(f"training{best}", self.options.epochs)
        for _ in self.epochs:
            self.progress.tick()
        if self.stopped_early:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.best, self.waited = state_dict["epochs"], state_dict["best"], state_dict["waited"]
