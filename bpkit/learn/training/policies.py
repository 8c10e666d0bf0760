"""Training a policy on traces: examples, Lightning, validation by replay, and the folder that comes of it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from bpkit.files import write_json
from bpkit.installation.distribution import install_command
from bpkit.learn.trained import TrainedPolicy
from bpkit.learn.training.examples import ExampleData, collect_examples, examples_key, size_of
from bpkit.learn.training.fit import FitOptions, fit
from bpkit.learn.training.policy_module import PolicyModule
from bpkit.learn.training.prompts import PROMPTS, joined, prompt_record
from bpkit.learn.training.provenance import write_provenance
from bpkit.learn.training.run_folder import claim, cost_label, run_facts
from bpkit.learn.training.trainable import make_module
from bpkit.learn.training.validation import RATE, BestByReplay, Validation
from bpkit.policy import PolicyError
from bpkit.progress import NoProgress, Progress
from bpkit.trace.fingerprint import fingerprint_values
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import offered
from bpkit.types import CostModel, DecoderSpec


@dataclass(frozen=True, kw_only=True)
class PolicyRun(FitOptions):
    """How to run the training of a policy. Without `resume`, the folder's run is begun anew.

    Attributes:
        logger: of the figures of each epoch, under `logs`.
        command: that was typed, for the records.
        fingerprints: of the prompts, by what they are; computed from them if not given, which reads them once more.
    """

    logger: Literal["csv", "tensorboard"] = "csv"
    command: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)


def train_policy(
    policy_spec: str | Mapping[str, Any],
    traces: Sequence[PromptTrace] | Sequence[Sequence[PromptTrace]],
    spec: DecoderSpec,
    cost: CostModel,
    out: Path,
    *,
    validation: Sequence[PromptTrace] | Sequence[Sequence[PromptTrace]],
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    run: PolicyRun | None = None,
) -> Path:
    """Train a policy, and write its folder. The same call goes on where an earlier one was interrupted.

    Args:
        policy_spec: name and options of a trainable policy.
        traces: prompts to train on, or several traces of one decoder; read prompt by prompt.
        spec: of that decoder. cost: what its steps cost; validation is by it.
        validation: other prompts, by which epoch and options are chosen.
        options: of the training and of the policy, by name.

    Returns:
        `out`, which `--policy` and `bpkit.resolve_policy` take.

    Raises:
        PolicyError: the policy cannot be trained, an option is unknown, or the prompts lack a feature.
        ValueError: there are no prompts, a prompt is in both parts, the folder holds another run, or the logger is not
            installed.
        KeyboardInterrupt: the user wants no more; the same call goes on later.
    """
    how, progress = run or PolicyRun(), progress or NoProgress()
    module = make_module(policy_spec, spec, cost, options or {})
    prompts = {"train": joined(traces), "validation": joined(validation)}
    for part, of_part in prompts.items():
        if not len(of_part):
            raise ValueError(f"there are no {part} prompts: trace more of them, or split them otherwise")
        check_features(module, of_part[0])
    record = prompt_record(prompts)
    _refuse_overlap(record)
    facts = run_facts(module, how.fingerprints or {part: _fingerprint(of_part) for part, of_part in prompts.items()})
    if claim(out, facts, resume=how.resume):
        return out
    with torch.random.fork_rng(devices=[]):
        key = examples_key(module, fingerprint_values(facts["prompts"]))
        train, held = (
            collect_examples(module, of_part, out / "examples", part=part, key=key, progress=progress)
            for part, of_part in prompts.items()
        )
        data = ExampleData(train, held, module.options)
        torch.manual_seed(module.options.seed)
        module.prepare(train)
        check_prepared(module)
        module.replay = replay = Validation.of(module, prompts["validation"])
        best = BestByReplay(out / "checkpoints", module.options, progress)
        if not _fit(module, data, best, out, how):
            return out  # another process writes the result
        best.restore(module)
        module.calibrate(held)
        module.choose(replay)
    policy = module.finished()
    progress.start("final validation", len(prompts["validation"]))
    judged = replay.judge(policy, prompts["validation"], progress.tick)
    arguments = {
        **{key.replace(" ", "_"): value for key, value in facts.items() if key != "prompts"},
        "options_in_the_end": policy.config.model_dump(mode="json", exclude={"weights"}),
        **{name: getattr(how, name) for name in ("command", "devices", "strategy", "accelerator", "logger")},
    }
    write_json(out / "evaluation.json", _evaluation(policy, judged, replay, best, data))
    write_json(out / PROMPTS, record)
    write_provenance(out, f"{__name__}.train_policy", arguments, facts["prompts"])
    policy.save_pretrained(out)  # last: a folder with a policy is whole
    return out


def _fit(module: PolicyModule, data: ExampleData, best: BestByReplay, out: Path, how: PolicyRun) -> bool:
    """Train; after every epoch `checkpoints/last.ckpt` and the best weights are fresh. True on the first process."""
    epochs = module.options.epochs
    last = ModelCheckpoint(
        out / "checkpoints",
        filename="last",
        save_top_k=1,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        return fit(
            module,
            [data],
            out,
            how,
            max_epochs=epochs,
            check_val_every_n_epoch=min(module.options.validate_every, epochs),
            gradient_clip_val=module.options.clip,
            deterministic="warn",
            inference_mode=False,  # what a validation makes, the policy, is used later
            use_distributed_sampler=False,
            logger=_logger(how, out),
            callbacks=[best, last],
            log_every_n_steps=50,
            enable_progress_bar=False,
        )
    finally:  # Lightning sets it for the whole process
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _logger(how: PolicyRun, out: Path) -> Logger:
    if how.logger == "csv":
        return CSVLogger(out, name="logs")
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            f"logger 'tensorboard' needs tensorboard, which is not installed: {install_command('tensorboard')}"
        )
    return TensorBoardLogger(out, name="logs")


def _fingerprint(prompts: Sequence[PromptTrace]) -> str:
    """Of what examples and replays depend on."""
    columns = ((p.id, p.prompt_tokens, p.output_tokens, p.drafts.num_accepted) for p in prompts)
    return fingerprint_values([[name, *(values.tolist() for values in arrays)] for name, *arrays in columns])


def check_features(module: PolicyModule, prompt: PromptTrace) -> None:
    """Raise PolicyError if a prompt lacks what examples or replays read."""
    missing = (module.features | module.policy.wants) - offered(prompt)
    if missing:
        names, flags = ", ".join(sorted(missing)), " ".join(f"--features {name}" for name in sorted(missing))
        raise PolicyError(
            f"policy {module.policy.name!r} is trained with {names}, which the trace does not hold: trace into a "
            f"new folder with `{flags}`, or let them be computed again with `--recompute`"
        )


def check_prepared(module: PolicyModule) -> None:
    """Raise PolicyError unless `prepare` did what it must."""
    where = f"{type(module).__name__}.prepare"
    if not len(module.networks) or not any(p.requires_grad for p in module.networks.parameters()):
        raise PolicyError(f"{where} must set self.networks to networks with weights to train, from policy.build(facts)")
    try:
        json.dumps(module.facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{where} must set self.facts to plain, finite JSON values: {error}") from None


def _refuse_overlap(record: Mapping[str, Any]) -> None:
    """The same id may stand for other prompts in other traces; a split of one trace never repeats one."""
    known = (zip(record[part], record["fingerprints"][part], strict=True) for part in ("train", "validation"))
    both = sorted(set.intersection(*map(set, known)))
    if both:
        raise ValueError(
            f"{len(both)} prompts are both trained on and validated by, such as {both[0][0]!r}: give traces of "
            "different prompts, or one trace and --split"
        )


def _evaluation(
    policy: TrainedPolicy, judged: dict[str, Any], replay: Validation, best: BestByReplay, data: ExampleData
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "policy": policy.name,
        "cost_model": cost_label(replay.cost),
        "note": "Epoch and options were chosen on these prompts, and the best fixed size as well: the figures are too "
        "good. `bpkit evaluate` judges on prompts that decided nothing.",
        "validation": judged,
        "replayed_each_epoch": {
            "prompts": len(replay.prompts),
            "tokens_per_second_of_best_epoch": best.best[RATE],
            "tokens_per_second_in_the_end": replay(policy),
        },
        "best_epoch": best.best["epoch"],
        "stopped_early": best.stopped_early,
        "epochs": best.epochs,
        "examples": {"train": size_of(data.train), "validation": size_of(data.validation)},
    }
