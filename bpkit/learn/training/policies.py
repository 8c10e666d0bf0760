"""Training a policy on traces: examples, Lightning, validation by replay, and the folder that comes of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bpkit.files import write_at_once
from bpkit.learn.trained import TrainedPolicy
from bpkit.learn.training.best import RATE, BestByReplay
from bpkit.learn.training.example_data import ExampleData
from bpkit.learn.training.examples import (
    NoProgress,
    Progress,
    collect_examples,
    describe_cost,
    examples_key,
    size_of,
)
from bpkit.learn.training.fit import first_process, fit
from bpkit.learn.training.policy_module import PolicyModule
from bpkit.learn.training.prompts import PROMPTS, joined, labels, prompt_record
from bpkit.learn.training.provenance import write_provenance
from bpkit.learn.training.trainable import make_module
from bpkit.learn.training.validation import Validation, judge, spread, trimmed
from bpkit.policy import PolicyError
from bpkit.registry.class_file import file_of
from bpkit.registry.policy_folder import POLICY, TrainedFor, is_policy_folder
from bpkit.trace.fingerprint import fingerprint_values
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import offered
from bpkit.types import CostModel, DecoderSpec, Feature

RUN, EVALUATION = "run.json", "evaluation.json"
NOTE = (
    "Epoch and options were chosen on these prompts, and the best fixed size as well: the figures are too good. "
    "`bpkit evaluate` judges on prompts that decided nothing."
)


@dataclass(frozen=True)
class PolicyRun:
    """How to run, as opposed to what to train.

    Attributes:
        devices, strategy, accelerator: passed to `lightning.Trainer`.
        resume: go on from `checkpoints/last.ckpt` if there is one; otherwise the folder's run is begun anew.
        logger: of the figures of each epoch, under `logs`.
        command: that was typed, for the records.
        fingerprints: of the prompts, by what they are; computed from them if not given, which reads them once more.
    """

    devices: int = 1
    strategy: str = "auto"
    accelerator: str = "auto"
    resume: bool = True
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
    devices: int = 1,
    strategy: str = "auto",
    resume: bool = True,
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
        devices, strategy, resume: as in `PolicyRun`, unless `run` is given.

    Returns:
        `out`, which `--policy` and `bpkit.resolve_policy` take.

    Raises:
        PolicyError: the policy cannot be trained, an option is unknown, or the prompts lack a feature.
        ValueError: there are no prompts, a prompt is in both parts, or the folder holds another run.
    """
    how = run or PolicyRun(devices=devices, strategy=strategy, resume=resume)
    progress = progress or NoProgress()
    module = make_module(policy_spec, spec, cost, options or {})
    prompts = _Prompts(joined(traces), joined(validation))
    check_features(module, prompts)
    facts = _describe(module, dict(how.fingerprints) or prompts.fingerprints())
    if _begun(out, facts, resume=how.resume):
        return out
    with torch.random.fork_rng(devices=[]):
        data = _examples(module, prompts, out, facts, progress)
        torch.manual_seed(module.options.seed)
        module.prepare(data.train)
        check_prepared(module)
        held = _held(module, prompts.validation)
        module.replay = Validation(spec, cost, held)
        best = BestByReplay(
            out / "checkpoints", patience=module.options.patience, epochs=module.options.epochs, progress=progress
        )
        if not fit(module, data, best, out, how):
            return out  # another process writes the result
        best.restore(module)
        module.calibrate(data.validation)
        module.choose(module.replay)
    policy = module.finished()
    progress.start("final validation", len(prompts.validation))
    judged = judge(policy, prompts.validation, spec, cost, progress.tick)
    write_json(out / EVALUATION, _evaluation(policy, module.replay, best, data, judged))
    write_json(out / PROMPTS, prompt_record({"train": prompts.train, "validation": prompts.validation}))
    _write_provenance(out, facts, policy, how)
    policy.save_pretrained(out)  # last: a folder with a policy is whole
    return out


@dataclass(frozen=True)
class _Prompts:
    """Prompts to train on and to validate by."""

    train: Sequence[PromptTrace]
    validation: Sequence[PromptTrace]

    def __post_init__(self) -> None:
        for part in ("train", "validation"):
            if not len(getattr(self, part)):
                raise ValueError(f"there are no {part} prompts: trace more of them, or split them otherwise")

    def ids(self) -> dict[str, list[str]]:
        return {part: labels(getattr(self, part), "id") for part in ("train", "validation")}

    def fingerprints(self) -> dict[str, str]:
        """Of what examples and replays depend on."""
        return {
            part: fingerprint_values([_content(p) for p in getattr(self, part)]) for part in ("train", "validation")
        }


def _content(prompt: PromptTrace) -> list[Any]:
    drafts = prompt.drafts
    return [prompt.id, *(a.tolist() for a in (prompt.prompt_tokens, prompt.output_tokens, drafts.num_accepted))]


def check_features(module: PolicyModule, prompts: _Prompts) -> None:
    """Raise PolicyError if the first prompts lack what examples or replays read."""
    wanted = module.features | module.policy.wants
    for part in (prompts.train, prompts.validation):
        missing = wanted - offered(part[0])
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


def _describe(module: PolicyModule, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What makes a run this run. A class in a file is being worked on: with another text it is another policy."""
    file = file_of(type(module.policy))
    code = {"policy file": hashlib.sha256(file.read_bytes()).hexdigest()[:16]} if file is not None else {}
    return {
        **code,
        "policy": module.policy.name,
        "policy options": module.policy.config.model_dump(mode="json", exclude={"weights"}),
        "training options": module.options.model_dump(mode="json"),
        "cost model": describe_cost(module.cost),
        "decoder": TrainedFor.of(module.spec).model_dump(),
        "prompts": dict(fingerprints),
    }


def _begun(out: Path, facts: dict[str, Any], *, resume: bool) -> bool:
    """Claim the folder for a run. True if that run is finished.

    Raises:
        ValueError: it holds another run, or something else.
    """
    path = out / RUN
    anew = not resume and path.is_file() and first_process()
    if anew:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        (out / POLICY).unlink(missing_ok=True)
    elif path.is_file():
        try:
            known = json.loads(path.read_bytes())
        except ValueError:
            raise ValueError(f"{path} is damaged: train into a new folder, or begin anew with --no-resume") from None
        different = [
            f"{key}: {known.get(key)} there, {facts[key]} here" for key in facts if known.get(key) != facts[key]
        ]
        if different:
            raise ValueError(
                f"{out} holds another run ({'; '.join(different)}): name a new folder, or begin anew with --no-resume"
            )
        return is_policy_folder(out)
    elif out.exists() and any(entry.name not in ("examples", "logs") for entry in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run of `bpkit train`: name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_at_once(path, json.dumps(facts, indent=1) + "\n")
    return False


def _examples(
    module: PolicyModule, prompts: _Prompts, out: Path, facts: Mapping[str, Any], progress: Progress
) -> ExampleData:
    key = examples_key(module, fingerprint_values(facts["prompts"]))
    _refuse_overlap(prompts)
    made = {
        part: collect_examples(module, getattr(prompts, part), out / "examples", part=part, key=key, progress=progress)
        for part in ("train", "validation")
    }
    options = module.options
    return ExampleData(made["train"], made["validation"], batch_size=options.batch_size, seed=options.seed)


def _refuse_overlap(prompts: _Prompts) -> None:
    """The same id may stand for other prompts in other traces; a split of one trace never repeats one."""
    ids = prompts.ids()
    both = set(ids["train"]) & set(ids["validation"])
    if not both:
        return
    texts = {
        part: {prompts_of[i].prompt_tokens.tobytes() for i, name in enumerate(ids[part]) if name in both}
        for part, prompts_of in (("train", prompts.train), ("validation", prompts.validation))
    }
    same = len(texts["train"] & texts["validation"])
    if same:
        raise ValueError(
            f"{same} prompts are both trained on and validated by, such as {sorted(both)[0]!r}: give traces of "
            "different prompts, or one trace and --split"
        )


def _held(module: PolicyModule, prompts: Sequence[PromptTrace]) -> list[PromptTrace]:
    """The prompts that every validation replays, in memory."""
    wanted: frozenset[Feature] = module.policy.wants | module.policy.wants_optional
    places = spread(labels(prompts, "domain"), module.options.validation_prompts)
    return [trimmed(prompts[place], wanted) for place in places]


def _evaluation(
    policy: TrainedPolicy, replay: Validation, best: BestByReplay, data: ExampleData, judged: dict[str, Any]
) -> dict[str, Any]:
    """What `evaluation.json` says."""
    return {
        "schema_version": 1,
        "policy": policy.name,
        "cost_model": describe_cost(replay.cost),
        "note": NOTE,
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


def _write_provenance(out: Path, facts: Mapping[str, Any], policy: TrainedPolicy, how: PolicyRun) -> None:
    """`provenance.json`: as other recipes write it."""
    arguments = {
        **{key.replace(" ", "_"): value for key, value in facts.items() if key != "prompts"},
        "options_in_the_end": policy.config.model_dump(mode="json", exclude={"weights"}),
        **{name: getattr(how, name) for name in ("command", "devices", "strategy", "accelerator", "logger")},
    }
    write_provenance(out, "bpkit.learn.training.policies.train_policy", arguments, facts["prompts"])


def write_json(path: Path, values: Any) -> None:
    """Replace a file by plain JSON values. Raises ValueError for NaN and infinity."""
    write_at_once(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
