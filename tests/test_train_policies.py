"""Training of policies: a toy with planted structure learns it, and the folder that comes of it is a policy."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn
from typer.testing import CliRunner

from bpkit.cli.main import build_app
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.judge.evaluation import evaluate
from bpkit.judge.evaluation.splits import split_prompts
from bpkit.learn.trained import TrainedConfig, TrainedElsewhereWarning, TrainedPolicy
from bpkit.learn.training.examples import ExampleData
from bpkit.learn.training.policies import PolicyRun, train_policy
from bpkit.learn.training.policy_module import PolicyModule, Replay, TrainingOptions
from bpkit.learn.training.prompts import prompt_record
from bpkit.learn.training.validation import Validation
from bpkit.policy import Policy, PolicyError, State
from bpkit.prompts import Prompt
from bpkit.registry.discovery import Entry, registry
from bpkit.registry.policy_folder import POLICY, WEIGHTS
from bpkit.registry.resolve import resolve_policy
from bpkit.testing import TinyPair
from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.collect.job import describe, run_job
from bpkit.trace.cost import CostTable, write_cost
from bpkit.trace.oracle.paths import best_fixed, fixed_path
from bpkit.trace.records import PromptTrace
from bpkit.trace.store.manifest import Manifest, ModelFacts
from bpkit.trace.store.storage import TraceWriter
from bpkit.types import BLOCK_DIFFUSION, Context, CostModel, DecoderSpec, Feature

torch.set_num_threads(1)

SIZES = (1, 8)
COST = CostTable(
    name="made up", draft={8: 0.002}, verify={w: 0.010 + 0.004 * (w - 1) for w in range(1, 9)}, unit="plain steps"
)
SPEC = DecoderSpec("a target", "a drafter", BLOCK_DIFFUSION, 8, 8, hidden_size=4, vocab_size=64)


def planted(index: int) -> PromptTrace:
    """A prompt whose drafts all stand or all fall, as the first number of `prefill_hidden` says; domains alternate."""
    made = synthetic_prompt(index, output_length=24, max_new_tokens=24, block_sizes=(2, 8), hidden_size=4, seed=3)
    rng = np.random.default_rng((17, index))
    easy = bool(rng.uniform() < 0.5)
    room = np.arange(made.drafts.rows - 1, -1, -1, dtype=np.int32)[:, None]
    accepted = np.minimum(made.drafts.draft_length if easy else 0 * made.drafts.draft_length, room).astype(np.int32)
    hidden = rng.normal(scale=0.25, size=4).astype(np.float32)
    hidden[0] += 1 if easy else -1
    tokens = np.full(12, index, np.int32)
    features = {Feature.PREFILL_HIDDEN: hidden}
    return replace(made, prompt_tokens=tokens, features=features, drafts=replace(made.drafts, num_accepted=accepted))


PROMPTS = [planted(i) for i in range(40)]
TRAIN, VALIDATION = PROMPTS[:28], PROMPTS[28:]


class ToyConfig(TrainedConfig):
    """Options of the toy."""

    margin: float = Field(default=0.0, description="score from which the large block is drafted")


class Toy(TrainedPolicy):
    """One of two sizes for a prompt, by logistic regression on its prefill."""

    name = "toy"
    Config = ToyConfig
    trainer = ":ToyModule"
    wants = frozenset({Feature.PREFILL_HIDDEN})
    config: ToyConfig

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        return {"score": nn.Linear(facts["hidden_size"], 1)}

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        self.small, self.large = self.facts["block_sizes"]

    def begin(self, context: Context) -> State:
        score = self.networks["score"](context["prefill_hidden"].float())[:, 0]
        return {"block_size": context.full(self.small).where(score <= self.config.margin, context.full(self.large))}

    def select(self, state: State, context: Context) -> Tensor:
        size: Tensor = state["block_size"]
        return size


class ToyOptions(TrainingOptions):
    """Options of the toy's training."""

    epochs: int = 6
    batch_size: int = 4
    learning_rate: float = 0.05
    dropout: float = Field(default=0.2, ge=0, lt=1, description="share of inputs that are left out")


class ToyModule(PolicyModule):
    """Trains the toy."""

    Options = ToyOptions
    features = frozenset({Feature.PREFILL_HIDDEN})
    options: ToyOptions
    asked: ClassVar[list[str]] = []

    def examples(self, prompt: PromptTrace) -> dict[str, Tensor]:
        self.asked.append(prompt.id)
        small, large = (fixed_path(prompt, SPEC.work, self.cost, size).seconds for size in SIZES)
        return {
            "hidden": torch.tensor(prompt.features[Feature.PREFILL_HIDDEN])[None],
            "large": torch.tensor([float(large < small)]),
        }

    def prepare(self, data: dict[str, Tensor]) -> None:
        self.facts = {"hidden_size": data["hidden"].shape[1], "block_sizes": list(SIZES)}
        self.networks = nn.ModuleDict(self.policy.build(self.facts))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = nn.functional.dropout(batch["hidden"], self.options.dropout, self.training)
        score = self.networks["score"](hidden)[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(score, batch["large"])


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the toy for each test."""
    config = f"{__name__}:ToyConfig"
    entry = Entry("toy", Toy, "Learns which prompts are easy.", config, "toys", "tests")
    monkeypatch.setitem(registry().policies, "toy", entry)


def train(out: Path, *, validation: Sequence[PromptTrace] = VALIDATION, resume: bool = True, **settings: Any) -> Path:
    """Train the toy."""
    return train_policy(
        "toy", TRAIN, SPEC, COST, out, validation=validation, run=PolicyRun(resume=resume), options=settings
    )


def loaded(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained toy, which no test may change."""
    entry = Entry("toy", Toy, "Learns which prompts are easy.", f"{__name__}:ToyConfig", "toys", "tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry().policies, "toy", entry)
        return train(tmp_path_factory.mktemp("runs") / "toy")


def rate(policy: Policy | str, prompts: Sequence[PromptTrace] = VALIDATION) -> float:
    return Validation(SPEC, COST, prompts)(resolve_policy(policy))  # type: ignore[arg-type]


# Learning


def test_the_planted_structure_is_learnt_and_beats_the_best_fixed_size(folder: Path) -> None:
    report = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    judged = report["validation"]
    best = best_fixed(VALIDATION, SPEC.work, COST).block_size
    assert judged["best_fixed"]["block_size"] == best
    assert judged["best_fixed"]["tokens_per_second"] == pytest.approx(rate(f"fixed:{best}"))
    assert judged["tokens_per_second_without_decisions"] == pytest.approx(rate(str(folder)))
    assert judged["gain_over_best_fixed"] > 0.1
    assert rate(str(folder)) > 1.1 * max(rate("fixed:1"), rate("fixed:2"), rate("fixed:8"))
    assert len(report["epochs"]) == 6
    assert "too good" in report["note"]
    assert report["examples"]["train"]["rows"] == len(TRAIN)
    assert all({"train_loss", "val_loss", "val_tokens_per_second"} < set(epoch) for epoch in report["epochs"])


def test_the_folder_holds_weights_config_provenance_and_evaluation(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {POLICY, WEIGHTS, "provenance.json", "evaluation.json", "prompts.json", "run.json", "logs"} <= names
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    described = json.loads((folder / POLICY).read_text(encoding="utf-8"))
    assert described["trained_for"]["hidden_size"] == 4
    assert described["options"] == {"margin": 0.0}
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert facts["arguments"]["training_options"]["seed"] == 0
    assert facts["arguments"]["cost_model"].startswith("made up ")
    assert set(facts["data"]) == {"train", "validation"}
    seen = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    assert seen["validation"] == [prompt.id for prompt in VALIDATION]
    assert [len(set(seen["fingerprints"][part])) for part in ("train", "validation")] == [len(TRAIN), len(VALIDATION)]
    assert not list(folder.rglob("*.tmp"))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path, folder: Path) -> None:
    torch.rand(3)  # the state of the global generator does not matter
    before = torch.random.get_rng_state()
    again, other = loaded(train(tmp_path / "again")), loaded(train(tmp_path / "other", seed=1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, again[name]) for name, value in loaded(folder).items())
    assert not all(torch.equal(value, other[name]) for name, value in again.items())


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_stopped(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = ToyModule.training_step, []

    def failing(self: ToyModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        calls.append(batch_idx)
        if len(calls) == 25:  # seven steps an epoch: in the middle of the fourth
            raise OSError("the power went")
        return usual(self, batch, batch_idx)

    monkeypatch.setattr(ToyModule, "training_step", failing)
    with pytest.raises(OSError, match="the power went"):
        train(tmp_path / "run")
    with pytest.raises(PolicyError, match=r"holds no trained policy.*interrupted"):
        resolve_policy(str(tmp_path / "run"))
    monkeypatch.setattr(ToyModule, "asked", [])
    train(tmp_path / "run")
    assert ToyModule.asked == []  # examples are kept
    assert len(calls) == 25 + 3 * 7
    whole = loaded(folder)
    assert all(torch.equal(value, whole[name]) for name, value in loaded(tmp_path / "run").items())
    reports = [json.loads((f / "evaluation.json").read_text(encoding="utf-8")) for f in (folder, tmp_path / "run")]
    assert reports[0]["epochs"] == reports[1]["epochs"]
    assert reports[0]["best_epoch"] == reports[1]["best_epoch"]


def test_a_run_that_was_interrupted_while_it_wrote_ends_alike(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / POLICY).unlink()
    assert all(torch.equal(value, loaded(folder)[name]) for name, value in loaded(train(copied)).items())
    # And so does one that had stopped early: it is not trained on.
    stopped = train(tmp_path / "stopped", patience=1, epochs=40)
    report, weights = (stopped / "evaluation.json").read_bytes(), loaded(stopped)
    assert json.loads(report)["stopped_early"]
    (stopped / POLICY).unlink()
    monkeypatch.setattr(ToyModule, "training_step", lambda self, batch, batch_idx: pytest.fail("trained on"))
    train(stopped, patience=1, epochs=40)
    assert json.loads((stopped / "evaluation.json").read_bytes())["epochs"] == json.loads(report)["epochs"]
    assert all(torch.equal(value, weights[name]) for name, value in loaded(stopped).items())


def test_a_finished_run_is_left_alone_and_another_is_refused(tmp_path: Path, folder: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    before = (copied / POLICY).read_bytes()
    assert train(copied) == copied
    assert (copied / POLICY).read_bytes() == before
    with pytest.raises(ValueError, match=r"holds another run \(training options.*--no-resume"):
        train(copied, epochs=2)
    train(copied, epochs=2, resume=False)
    assert (copied / POLICY).read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        train(tmp_path / "mine")


def test_early_stopping_and_the_best_epoch_go_by_tokens_per_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates are planted, so that they go against the losses."""
    rates = iter([5.0, 7.0, 7.0, 6.0, 6.5, 9.0])
    seen: list[dict[str, Tensor]] = []

    def replay(self: Validation, policy: TrainedPolicy) -> float:
        seen.append({name: value.clone() for name, value in policy.networks["score"].state_dict().items()})
        return next(rates)

    monkeypatch.setattr(Validation, "__call__", replay)
    out = train(tmp_path / "run", patience=3)
    report = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert [epoch["val_tokens_per_second"] for epoch in report["epochs"]] == [5.0, 7.0, 7.0, 6.0, 6.5]
    assert report["best_epoch"] == 1
    assert report["stopped_early"]
    losses = [epoch["val_loss"] for epoch in report["epochs"]]
    assert losses[-1] < losses[1]
    assert all(torch.equal(seen[1][name.removeprefix("score.")], value) for name, value in loaded(out).items())


def test_calibrate_and_choose_see_the_best_weights_and_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrate(self: ToyModule, data: dict[str, Tensor]) -> None:
        self.facts["calibrated_on"] = len(data["hidden"])

    def choose(self: ToyModule, replay: Replay) -> None:
        rates = {margin: replay(self.finished(margin=margin)) for margin in (-100.0, 0.25, 100.0)}
        self.set_options(margin=max(rates, key=rates.__getitem__))

    monkeypatch.setattr(ToyModule, "calibrate", calibrate)
    monkeypatch.setattr(ToyModule, "choose", choose)
    out = train(tmp_path / "run", epochs=3)
    policy = resolve_policy(str(out))
    assert isinstance(policy, Toy)
    assert policy.config.margin == 0.25
    policy.bind(SPEC, COST)
    assert policy.facts["calibrated_on"] == len(VALIDATION)
    # Options that are stored may still be tuned, and those that are given win.
    assert policy.config.model_fields_set == {"weights"}
    given = resolve_policy(f"{out}:margin=2")
    assert isinstance(given, Toy)
    assert given.config.margin == 2
    assert resolve_policy({"name": str(out), "margin": 3}).config.model_dump()["margin"] == 3
    assert resolve_policy(f"{out}:4").config.model_dump()["margin"] == 4
    assert resolve_policy(f"toy:weights={out}").config.model_dump()["margin"] == 0.25


# The folder as a policy


def test_save_and_load_give_the_same_policy(tmp_path: Path, folder: Path) -> None:
    policy = Toy.from_pretrained(folder)
    policy.save_pretrained(tmp_path / "copy")
    again = TrainedPolicy.from_pretrained(str(tmp_path / "copy"), margin=0.5)
    assert type(again) is Toy
    assert again.config.margin == 0.5
    assert rate(str(tmp_path / "copy")) == rate(str(folder))
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["README.md", POLICY, WEIGHTS]
    again.bind(SPEC)
    network = again.networks["score"]
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_binding_leaves_the_global_generator_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    Toy(weights=str(folder)).bind(SPEC)
    assert torch.equal(before, torch.random.get_rng_state())


def test_pushing_uploads_the_folder_and_loading_downloads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    uploaded: dict[str, list[str]] = {}

    class Repository:
        repo_id = "somebody/toy"

    def upload(self: HfApi, *, folder_path: Path, **_: Any) -> str:
        uploaded["files"] = sorted(path.name for path in folder_path.iterdir())
        uploaded["card"] = (folder_path / "README.md").read_text(encoding="utf-8").splitlines()
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert Toy.from_pretrained(folder).push_to_hub("somebody/toy") == "done"
    assert uploaded["files"] == ["README.md", POLICY, WEIGHTS]
    assert any("toy" in line for line in uploaded["card"])
    monkeypatch.setattr("bpkit.learn.trained.snapshot_download", lambda *_, **__: str(folder))
    assert rate(Toy.from_pretrained("somebody/toy")) == rate(str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 8}, "hidden size 4 there, 8 here"),
        ({"vocab_size": 65}, "vocab size 64 there, 65 here"),
        ({"drafter_kind": "n-gram"}, "drafter kind block-diffusion there, n-gram here"),
        ({"trained_block_size": 4}, "trained block size 8 there, 4 here"),
    ],
)
def test_a_policy_for_another_decoder_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=f"{said}.*bpkit train toy TRACE"):
        resolve_policy(str(folder)).bind(replace(SPEC, **change))


def test_other_names_of_the_models_are_a_warning(folder: Path) -> None:
    with pytest.warns(TrainedElsewhereWarning, match="target a target there, elsewhere here"):
        resolve_policy(str(folder)).bind(replace(SPEC, target="elsewhere"))


def damaged(folder: Path, tmp_path: Path, change: Callable[[Path], Any]) -> str:
    copy = shutil.copytree(folder, tmp_path / "damaged", ignore=shutil.ignore_patterns("checkpoints", "logs"))
    change(copy)
    return str(copy)


def _edited(key: str, value: Any) -> Callable[[Path], Any]:
    def edit(copy: Path) -> None:
        facts = json.loads((copy / POLICY).read_text(encoding="utf-8"))
        facts[key] = value
        (copy / POLICY).write_text(json.dumps(facts), encoding="utf-8")

    return edit


def _other_weights(copy: Path) -> None:
    import hashlib

    data = safetensors.torch.save({"score.weight": torch.zeros(1, 4)})
    (copy / WEIGHTS).write_bytes(data)
    _edited("weights_sha256", hashlib.sha256(data).hexdigest())(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda copy: (copy / WEIGHTS).unlink(), "cannot be read.*has no weights"),
        (lambda copy: (copy / WEIGHTS).write_bytes(b"\x80\x04pickle"), "is damaged, or of another run"),
        (_other_weights, "does not fit the networks.*lacks score.bias"),
        (lambda copy: (copy / POLICY).unlink(), "holds no trained policy"),
        (lambda copy: (copy / POLICY).write_text("{"), "is no description of a policy"),
        (_edited("schema_version", 2), "is no description.*schema_version"),
        (_edited("facts", {}), "cannot be built from its facts.*hidden_size"),
        (_edited("options", {"margin": "wide"}), "option 'margin'"),
        (_edited("policy", "other"), "policy 'other', which no installed plug-in registers"),
    ],
)
def test_a_damaged_folder_is_explained(folder: Path, tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        resolve_policy(damaged(folder, tmp_path, change)).bind(SPEC)


def test_what_is_no_folder_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="there is no folder"):
        resolve_policy(str(tmp_path / "nowhere"))
    with pytest.raises(PolicyError, match="there is no folder"):
        Toy.from_pretrained("./nowhere")
    with pytest.raises(PolicyError, match="has no weights: train it with `bpkit train toy TRACE"):
        resolve_policy("toy").bind(SPEC)


def test_the_shipped_weights_are_the_default_where_they_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpkit.registry.policy_folder.SHIPPED", folder.parent)
    assert rate("toy") == rate(str(folder))
    with pytest.raises(PolicyError, match=r"the one that ships was trained for another decoder.*bpkit train toy"):
        resolve_policy("toy").bind(replace(SPEC, hidden_size=8))


# What cannot be trained


@pytest.mark.parametrize(
    ("policy", "options", "said"),
    [
        ("fixed", {}, "has no weights to train.*Trainable:.*toy"),
        ("toi", {}, "Did you mean 'toy'"),
        ("toy", {"epoch": 3}, "no setting 'epoch'. Did you mean 'epochs'.*learning_rate=0.05.*margin=0.0"),
        ("toy", {"epochs": 0}, "option 'epochs'"),
        ("toy:margin=high", {}, "option 'margin'"),
        ("toy:weights=x", {}, "there is no folder|leave out option 'weights'"),
    ],
)
def test_what_cannot_be_trained_is_explained(tmp_path: Path, policy: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        train_policy(policy, TRAIN, SPEC, COST, tmp_path / "run", validation=VALIDATION, options=options)
    assert not (tmp_path / "run").exists()


def test_faults_of_examples_and_prompts_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="trained on and validated by"):
        train(tmp_path / "a", validation=TRAIN[:1])
    with pytest.raises(ValueError, match="no validation prompts"):
        train(tmp_path / "b", validation=[])
    bare = [replace(prompt, features={}) for prompt in VALIDATION]
    with pytest.raises(PolicyError, match=r"--features prefill_hidden.*--recompute"):
        train(tmp_path / "c", validation=bare)
    monkeypatch.setattr(ToyModule, "loss", lambda self, batch: self.networks["score"].weight.sum() * float("nan"))
    with pytest.raises(PolicyError, match=r"became nan in epoch 0.*learning rate"):
        train(tmp_path / "d")
    monkeypatch.setattr(ToyModule, "prepare", lambda self, data: None)
    with pytest.raises(PolicyError, match=r"must set self\.networks"):
        train(tmp_path / "e")
    monkeypatch.setattr(ToyModule, "examples", lambda self, prompt: {"x": torch.full((1, 2), float("nan"))})
    with pytest.raises(PolicyError, match="holds NaN"):
        train(tmp_path / "f")


def test_processes_share_an_order_that_follows_from_the_epoch() -> None:
    def rows(rank: int, epoch: int, *, seed: int = 1) -> list[int]:
        examples = {"row": torch.arange(7)}
        data = ExampleData(examples, examples, TrainingOptions(batch_size=2, seed=seed))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        loader: Any = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [row for batch in loader for row in batch["row"].tolist()]

    assert [len(rows(rank, 0)) for rank in (0, 1)] == [4, 4]
    assert {*rows(0, 0), *rows(1, 0)} == set(range(7))
    assert rows(0, 0) == rows(0, 0) != rows(0, 1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1_000_003 + 1)).tolist()
    assert rows(0, 1) == [*order, order[0]][::2], "orders are those of earlier versions"
    alone = ExampleData({"row": torch.arange(3)}, {"row": torch.arange(3)}, TrainingOptions(batch_size=2, seed=1))
    assert [batch["row"].tolist() for batch in alone.val_dataloader()] == [[0, 1], [2]]


# From the command line


def traced(folder: Path, prompts: Sequence[PromptTrace], **facts: Any) -> Path:
    """A trace folder with these prompts."""
    described: dict[str, Any] = {
        "target": ModelFacts(name="a target", fingerprint="t"),
        "drafter": ModelFacts(name="a drafter", fingerprint="d"),
        "drafter_kind": BLOCK_DIFFUSION,
        "trained_block_size": 8,
        "hidden_size": 4,
        "vocab_size": 64,
        "dtype": "float32",
        "sampling": {"temperature": 1.0},
        "max_new_tokens": 24,
        "seed": 0,
        "block_sizes": (2, 8),
        "features": (),
        "prompt_ids": tuple(prompt.id for prompt in prompts),
        "prompts_fingerprint": "0",
    }
    writer = TraceWriter(folder, Manifest(**(described | facts)))
    for index, prompt in enumerate(prompts):
        writer.write(replace(prompt, index=index))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All prompts on disk, with a cost file beside the trace."""
    folder = tmp_path_factory.mktemp("traces")
    write_cost(COST, folder / "cost.json")
    return traced(folder / "trace", PROMPTS)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), [*map(str, arguments)])


def test_train_and_evaluate_from_the_command_line(trace: Path, tmp_path: Path) -> None:
    cost = ("--cost", trace.parent / "cost.json")
    out = tmp_path / "toy"
    arguments = ("train", "toy:margin=0.1", trace, "--out", out, *cost, "--epochs", 3, "--set", "dropout=0.1")
    result = command(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "toy:margin=0.1: " in result.stdout
    assert f"--policy {out}" in result.stderr
    ids = json.loads((out / "prompts.json").read_text(encoding="utf-8"))
    split = split_prompts([p.id for p in PROMPTS], [p.domain for p in PROMPTS])
    kept = {part: [PROMPTS[i] for i in getattr(split, part)] for part in ("train", "validation")}
    assert ids == prompt_record(kept)
    assert json.loads((out / POLICY).read_text(encoding="utf-8"))["options"] == {"margin": 0.1}
    provenance = (out / "provenance.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in provenance
    assert '"dropout": 0.1' in provenance
    assert command(*arguments).exit_code == 0  # finished: nothing is done again
    judged = command("evaluate", trace, *cost, "--policy", out, "--json", tmp_path / "e.json", "--permutations", 0)
    assert judged.exit_code == 0, judged.stderr


def test_prompts_that_a_policy_has_seen_do_not_judge_it(trace: Path, tmp_path: Path) -> None:
    cost, out = ("--cost", trace.parent / "cost.json"), tmp_path / "toy"
    assert command("train", "toy", trace, "--out", out, *cost, "--epochs", 1).exit_code == 0
    quick = ("--no-tune", "--permutations", 0, "--orders", 1, "--json", tmp_path / "e.json")
    assert command("evaluate", trace, *cost, "--policy", out, *quick).exit_code == 0
    report = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert report["leaks"] == {}

    refused = command("evaluate", trace, *cost, "--policy", out, *quick, "--seed", 1)
    assert refused.exit_code == 2
    for part in (
        "was trained on",
        "of the test prompts (synthetic-",
        "--split and --seed",
        "other prompts",
        "--allow-leak",
    ):
        assert part in refused.stderr, refused.stderr
    result = command("evaluate", trace, *cost, "--policy", out, *quick, "--seed", 1, "--allow-leak")
    assert result.exit_code == 0, result.stderr
    assert f"LEAK: policy {out} was trained on" in " ".join(result.stdout.split())
    report = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    leak, seen = report["leaks"][str(out)], json.loads((out / "prompts.json").read_text(encoding="utf-8"))
    assert leak["compared_by"] == "tokens"
    for part in ("validation", "test"):
        assert set(leak["trained_on"][part]) == set(seen["train"]) & set(report["split"][part])
    assert set(leak["chosen_on"]["test"]) == set(seen["validation"]) & set(report["split"]["test"])


def test_seen_prompts_are_known_by_their_tokens_or_else_by_their_ids(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(prompts: list[PromptTrace], policy: Path, **options: Any) -> dict[str, Any]:
        given = {"permutations": 0, "tune": False, "orders": 1, **options}
        return evaluate(prompts, SPEC, {"toy": str(policy)}, [COST], **given)

    renamed = [replace(p, id=f"other-{p.id}") for p in PROMPTS]
    with pytest.raises(PolicyError, match=r"was trained on \d+ of the test prompts \(other-"):
        judged(renamed, folder)
    fresh = [replace(planted(i + 100), id=PROMPTS[i].id, index=i) for i in range(40)]
    assert judged(fresh, folder)["leaks"] == {}

    old = tmp_path / "old"
    shutil.copytree(folder, old)
    seen = json.loads((old / "prompts.json").read_text(encoding="utf-8"))
    (old / "prompts.json").write_text(json.dumps({part: seen[part] for part in ("train", "validation")}))
    assert judged(renamed, old)["leaks"] == {}
    with pytest.raises(PolicyError, match="compared by id"):
        judged(fresh, old)
    assert "compared by id" in judged(fresh, old, leave_out=True)["left_out"]["toy"]
    monkeypatch.setattr("bpkit.registry.policy_folder.SHIPPED", tmp_path)
    old.rename(tmp_path / "toy")
    with pytest.raises(PolicyError, match="compared by id"):  # what ships with bpkit has a record like any other
        evaluate(fresh, SPEC, {"toy": "toy"}, [COST], permutations=0)
    (tmp_path / "toy" / "prompts.json").write_text("{}")
    with pytest.raises(PolicyError, match=r"prompts\.json cannot be read"):
        judged(fresh, tmp_path / "toy")
    (tmp_path / "toy" / "prompts.json").unlink()
    assert "does not say which prompts" in judged(PROMPTS, tmp_path / "toy")["notes"][0]


def test_tensorboard_gets_the_figures_or_the_extra_is_named(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", "toy", trace, "--cost", trace.parent / "cost.json", "--epochs", 2, "--logger", "tensorboard")
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
        result = command(*arguments, "--out", tmp_path / "without")
        assert result.exit_code == 1
        assert "pip install 'block-policy-kit[tensorboard]'" in result.stderr
        assert not (tmp_path / "without").exists()
        with pytest.raises(ValueError, match=r"block-policy-kit\[tensorboard\]"):
            train_policy(
                "toy", TRAIN, SPEC, COST, tmp_path / "api", validation=VALIDATION, run=PolicyRun(logger="tensorboard")
            )
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = command(*arguments, "--out", tmp_path / "with")
    assert result.exit_code == 0, result.stderr
    [events] = (tmp_path / "with" / "logs").rglob("events.out.tfevents.*")
    figures = EventAccumulator(str(events))
    figures.Reload()
    assert {"train_loss", "val_loss", "val_tokens_per_second"} <= set(figures.Tags()["scalars"])


def test_several_traces_train_together_and_a_trace_may_validate(trace: Path, tmp_path: Path) -> None:
    more = traced(tmp_path / "more", [planted(i) for i in range(30, 60)])
    cost = ("--cost", trace.parent / "cost.json", "--epochs", 1)
    assert command("train", "toy", trace, more, "--out", tmp_path / "a", *cost).exit_code == 0
    ids = json.loads((tmp_path / "a" / "prompts.json").read_text(encoding="utf-8"))
    for prompts in (PROMPTS, [planted(i) for i in range(30, 60)]):
        tests = split_prompts([p.id for p in prompts], [p.domain for p in prompts]).test
        assert not {prompts[i].id for i in tests} & {*ids["train"], *ids["validation"]}
    other = traced(tmp_path / "other", [planted(i) for i in range(60, 70)])
    result = command("train", "toy", trace, "--validation", other, "--out", tmp_path / "b", *cost, "--limit", 4)
    assert result.exit_code == 0, result.stderr
    ids = json.loads((tmp_path / "b" / "prompts.json").read_text(encoding="utf-8"))
    assert len(ids["train"]) == len(ids["validation"]) == 8


def test_errors_of_the_command_line_are_sentences(trace: Path, tmp_path: Path) -> None:
    cost = ("--out", tmp_path / "out", "--cost", trace.parent / "cost.json")
    alien = traced(tmp_path / "alien", PROMPTS[:4], target=ModelFacts(name="x", fingerprint="other"))
    for arguments, said in (
        (("draftr", trace), "Did you mean 'drafter'? Trainable: drafter, "),
        (("fixed", trace), "policy 'fixed' has no weights to train"),
        (("toy", trace, alien), "cannot be trained on together (target a target (t), not x (other))"),
        (("toy", trace, "--validation", trace), "trained on and validated by"),
        (("toy", trace, "--set", "dropout"), "KEY=VALUE"),
        (("toy", trace, "--set", "drop=1"), "Did you mean 'dropout'?"),
        (("toy", trace, "--split", "1,0,0"), "no validation prompts"),
        (("toy", trace, "--split", "1,0,0", "--validation", alien), "not both"),
        (("toy", trace, "--logger", "paper"), "choose csv or tensorboard"),
        (("toy", tmp_path), "is no trace"),
    ):
        result = command("train", *arguments, *cost)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in result.stderr
        assert "Traceback" not in result.output


def test_help_lists_what_can_be_trained() -> None:
    listed = command("train", "--help").stdout
    assert all(name in listed for name in ("drafter", "toy", "Learns which prompts are easy."))
    assert "--cost" in command("train", "toy", "--help").stdout
    assert "--minutes" in command("train", "drafter", "--help").stdout


def test_missing_features_are_computed_again(tmp_path: Path, pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.save(tmp_path)
    decoder = SpeculativeDecoder.from_pretrained(tmp_path / "target", str(tmp_path / "drafter"))
    prompts = [Prompt(f"p{i}", "d", f"{i} + {i} = ") for i in range(4)]
    options = TraceOptions((2, 4), 6)
    run_job(tmp_path / "trace", describe(decoder, prompts, options), prompts, Tracer(decoder, options))
    write_cost(COST, tmp_path / "cost.json")
    monkeypatch.setattr(ToyModule, "features", frozenset({Feature.LAST_HIDDEN, Feature.PREFILL_HIDDEN}))
    monkeypatch.setattr(f"{__name__}.SIZES", (2, 4))
    seen: list[int] = []

    def examples(self: ToyModule, prompt: PromptTrace) -> dict[str, Tensor]:
        seen.append(len(prompt.features[Feature.LAST_HIDDEN]) - prompt.output_length)
        return {"hidden": torch.tensor(prompt.features[Feature.PREFILL_HIDDEN])[None], "large": torch.ones(1)}

    monkeypatch.setattr(ToyModule, "examples", examples)
    arguments = ["train", "toy", tmp_path / "trace", "--out", tmp_path / "out", "--cost", tmp_path / "cost.json"]
    arguments += ["--split", "0.5,0.25,0.25", "--epochs", 1]
    refused = command(*arguments)
    assert refused.exit_code == 2
    assert "--features last_hidden" in refused.stderr
    models = ["--target", tmp_path / "target", "--drafter", tmp_path / "drafter"]
    result = command(*arguments, "--recompute", *models)
    assert result.exit_code == 0, result.output
    assert seen == [0, 0, 0]
