"""Policies of a few lines: what the base learns, decides and exports, and what it says of networks that will not do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from bpkit_forecast.networks import Before
from bpkit_mlp.networks import ResidualMLP
from torch import Tensor, nn

from bpkit.learn.learned import READABLE, LearnedConfig, LearnedPolicy
from bpkit.learn.networks import Forecaster, Standard
from bpkit.learn.quick import quick
from bpkit.learn.trained import TrainedPolicy
from bpkit.learn.training import trainable
from bpkit.learn.training.learned import LearnedModule, LearnedOptions
from bpkit.learn.training.policies import train_policy
from bpkit.learn.training.validation import Validation
from bpkit.policy import Policy, PolicyConfig, PolicyError
from bpkit.registry.policy_folder import POLICY
from bpkit.registry.resolve import resolve_policy, spec_of
from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.cost import CostTable
from bpkit.trace.oracle.paths import best_fixed
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.types import BLOCK_DIFFUSION, Context, DecoderSpec, Feature

torch.set_num_threads(1)

SIZES = (2, 4, 8)
HIDDEN, ROWS = 6, 40
SPEC = DecoderSpec("a target", "a drafter", BLOCK_DIFFUSION, 8, 8, hidden_size=HIDDEN, vocab_size=64)
COST = CostTable(
    name="made up", draft={2: 0.001, 8: 0.004}, verify={1: 0.010, 2: 0.012, 4: 0.016, 8: 0.024}, unit="plain steps"
)


def planted(index: int, *, told: bool = True) -> PromptTrace:
    """A prompt at each of whose positions all drafted tokens stand, three, or none, as `anchor_entropy` says.

    Args:
        told: or else as nothing says.
    """
    made = synthetic_prompt(index, output_length=ROWS, max_new_tokens=ROWS, block_sizes=SIZES, hidden_size=HIDDEN)
    rng = np.random.default_rng((5, index))
    kind = rng.integers(3, size=ROWS)
    stands = np.array([0, 3, 7])[kind[: ROWS - 1], None]
    room = np.arange(ROWS - 2, -1, -1)[:, None]
    accepted = np.minimum(np.minimum(made.drafts.draft_length, stands), room).astype(np.int32)
    seen = kind if told else rng.integers(3, size=ROWS)
    features = {
        **made.features,
        Feature.LAST_HIDDEN: rng.normal(size=(ROWS, HIDDEN)).astype(np.float32),
        Feature.ANCHOR_ENTROPY: (2.0 - seen + rng.normal(scale=0.1, size=ROWS)).astype(np.float32),
    }
    tokens = np.full(12, index, np.int32)
    return replace(made, prompt_tokens=tokens, features=features, drafts=replace(made.drafts, num_accepted=accepted))


TRAIN, VALIDATION, TEST = ([planted(i) for i in range(a, b)] for a, b in ((0, 24), (24, 32), (32, 48)))


class Planted(LearnedPolicy):
    """Reads what tells, and what does not."""

    class Config(LearnedConfig):
        """With an option of its own."""

        width: int = 16

    config: Config
    wants = frozenset({Feature.LAST_HIDDEN, Feature.ANCHOR_ENTROPY})

    def network(self, inputs: int, outputs: int) -> nn.Module:
        width = self.config.width
        return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs))


HERE = f"{Path(__file__).resolve()}:Planted"


def train(out: Path, prompts: list[PromptTrace] = TRAIN, validation: list[PromptTrace] = VALIDATION) -> Path:
    settings = {"epochs": 12, "learning_rate": 0.01, "dropout": 0.0, "batch_size": 64}
    return train_policy(HERE, prompts, SPEC, COST, out, validation=validation, options=settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "planted")


def trained(folder: Path, **options: Any) -> LearnedPolicy:
    policy = resolve_policy({"name": HERE, "weights": str(folder), **options})
    assert isinstance(policy, LearnedPolicy)
    return policy


def fixed_rate(prompts: list[PromptTrace], cost: CostTable = COST) -> float:
    """Tokens per second of the best fixed size."""
    rates = [Validation(SPEC, cost, prompts)(resolve_policy(f"fixed:{size}")) for size in (1, *SIZES)]  # type: ignore[arg-type]
    return max(rates)


def at(rows: int, features: dict[Feature, Tensor]) -> Context:
    """The context of a step, the same for each row but for its features."""
    position, remaining, length = (torch.full((rows,), value) for value in (3, 30, 20))
    return Context(SPEC, position, remaining, length, torch.Generator(), features)


def test_what_one_feature_tells_is_learnt_and_beats_the_best_fixed_size(folder: Path) -> None:
    rate = Validation(SPEC, COST, TEST)(trained(folder))
    assert rate > 1.15 * fixed_rate(TEST)
    policy = trained(folder)
    policy.bind(SPEC, COST)
    entropies = torch.tensor([2.0, 1.0, 0.0])
    context = at(3, {Feature.LAST_HIDDEN: torch.zeros(3, HIDDEN), Feature.ANCHOR_ENTROPY: entropies})
    assert policy.select({}, context).tolist() == [1, 4, 8]


def test_where_nothing_tells_it_stays_close_to_the_best_fixed_size(tmp_path: Path) -> None:
    blind = [[planted(i, told=False) for i in range(a, b)] for a, b in ((0, 24), (24, 32), (32, 48))]
    policy = trained(train(tmp_path / "blind", blind[0], blind[1]))
    assert Validation(SPEC, COST, blind[2])(policy) > 0.97 * fixed_rate(blind[2])


def test_one_set_of_weights_serves_a_device_with_other_costs(folder: Path) -> None:
    dear = CostTable(name="dear", draft={2: 0.02, 8: 0.09}, verify={1: 0.010, 2: 0.012, 8: 0.024}, unit="plain steps")
    assert Validation(SPEC, dear, TEST)(trained(folder)) >= 0.999 * fixed_rate(TEST, dear)
    cheap = CostTable(name="flat", draft={2: 0.0, 8: 0.0}, verify={1: 0.010, 8: 0.010}, unit="plain steps")
    assert Validation(SPEC, cheap, TEST)(trained(folder)) >= 0.999 * fixed_rate(TEST, cheap)


def test_the_best_fixed_size_of_its_facts_is_that_of_the_training_prompts(folder: Path) -> None:
    policy = trained(folder)
    policy.bind(SPEC, COST)
    size = best_fixed(TRAIN, SPEC.work, COST).block_size
    assert policy.gains.sizes[policy.gains.floor] == size


def test_options_are_stored_with_the_weights_and_chosen_by_validation(folder: Path) -> None:
    stored = json.loads((folder / POLICY).read_text(encoding="utf-8"))["options"]
    assert stored["width"] == 16
    assert stored["rate"] in LearnedConfig.grid["rate"]
    assert stored["margin"] in LearnedConfig.grid["margin"]
    assert trained(folder).config.rate == stored["rate"]
    assert trained(folder, rate=0.5).config.rate == 0.5


def test_a_decision_that_takes_longer_than_it_brings_is_not_asked_for(folder: Path) -> None:
    policy = trained(folder, decision=100.0)
    policy.bind(SPEC, COST)
    assert not policy.wants
    context = at(1, {})
    assert policy.select({}, context).tolist() == [policy.gains.sizes[policy.gains.floor]]
    policy = trained(folder)
    policy.bind(SPEC, COST)
    assert policy.wants == Planted.wants


def test_the_forecast_is_what_the_scores_say_and_begins_at_the_shares_of_training() -> None:
    forecaster = Forecaster(nn.Linear(3, 3), 3, SIZES).eval()
    for parameter in forecaster.network.parameters():
        parameter.data.zero_()
    stood, known = torch.tensor([80.0, 40, 40, 10, 10, 10, 10]), torch.tensor([100.0, 80, 80, 40, 40, 40, 40])
    forecaster.fit(torch.randn(50, 3), stood, known)
    chances = torch.tensor([80.5 / 101, *[80.5 / 161] * 2, *[40.5 / 161] * 4])
    tokens = chances.cumprod(dim=0).cumsum(dim=0)
    assert forecaster(torch.randn(2, 3)).tolist() == [pytest.approx([float(tokens[i - 2]) for i in SIZES])] * 2


def test_training_lowers_the_loss_of_every_feature_that_can_be_read() -> None:
    class Everything(LearnedPolicy):
        wants = frozenset(READABLE)

        def network(self, inputs: int, outputs: int) -> nn.Module:
            assert inputs == 3 * HIDDEN + 2 + HIDDEN  # target features of two layers
            return nn.Linear(inputs, outputs)

    rng = np.random.default_rng(0)

    def complete(prompt: PromptTrace) -> PromptTrace:
        more = {
            Feature.TARGET_FEATURES: rng.normal(size=(ROWS, 2 * HIDDEN)).astype(np.float32),
            Feature.ANCHOR_EMBEDDING: rng.normal(size=(ROWS, HIDDEN)).astype(np.float32),
            Feature.ANCHOR_LOG_PROBABILITY: rng.normal(size=ROWS).astype(np.float32),
        }
        return replace(prompt, features={**prompt.features, **more})

    module = LearnedModule(Everything.untrained(LearnedConfig()), SPEC, COST, LearnedOptions())
    parts = [module.examples(complete(prompt)) for prompt in TRAIN[:8]]
    data = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    torch.manual_seed(0)
    module.prepare(data)
    before = float(module.eval().loss(data).detach())
    optimizer = torch.optim.AdamW(module.networks.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        module.loss(data).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(module.loss(data).detach()) < 0.8 * before
    assert module.facts["inputs"] == dict.fromkeys(map(str, READABLE), HIDDEN) | {
        "target_features": 2 * HIDDEN,
        "anchor_log_probability": 1,
        "anchor_entropy": 1,
    }


# The network as one line of calls


class Branches(nn.Module):
    """Decides by values, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return made if bool((made > 0).all()) else -made


class Deceives(nn.Linear):
    """Gives something else where it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        return made if isinstance(x, Tensor) else made + 1


@pytest.mark.parametrize(
    "network",
    [
        ResidualMLP(5, 7, 3, depth=3, dropout=0.2),
        nn.Sequential(Standard(5), ResidualMLP(5, 7, 3, depth=2)),
        Before(5, [2, 4, 6], 8, 0.3),
        Forecaster(nn.Sequential(nn.Linear(5, 9), nn.SiLU(), nn.Dropout(0.5), nn.Linear(9, 3)), 5, [2, 4, 6]),
        nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 2)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_a_quick_network_gives_the_same_over_the_same_weights(network: nn.Module) -> None:
    network.eval().requires_grad_(False)
    made, x = quick(network, 5), torch.randn(6, 5)
    assert made is not network
    torch.testing.assert_close(made(x), network(x))
    torch.testing.assert_close(made(x[:1]), network(x[:1]))
    for value in network.state_dict().values():
        value.mul_(1.5)
    torch.testing.assert_close(made(x), network(x))


@pytest.mark.parametrize("network", [Branches(), Deceives(5, 2)], ids=lambda network: type(network).__name__)
def test_a_network_that_cannot_be_written_so_stays_itself(network: nn.Module) -> None:
    assert quick(network.eval(), 5) is network


# Export


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"decision": 100.0}, {"margin": 1.0, "rate": 1.3}], ids=str)
def test_the_exported_file_decides_as_the_policy_at_any_cost(
    folder: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from bpkit.export.policy import Onnx
    from bpkit.export.write import export_policy

    out = tmp_path / "planted"
    export_policy(trained(folder, **options), VALIDATION, SPEC, out, name="planted", summary="For tests.", cost=COST)
    other = CostTable(name="other", draft={2: 0.001, 8: 0.002}, verify={1: 0.010, 2: 0.011, 8: 0.015})
    kinds = set()
    for cost in (COST, other):
        original, file = (
            Replayer(SPEC, p, cost, strict=True) for p in (trained(folder, **options), Onnx(path=str(out)))
        )
        for prompt in TEST:
            sizes = [replayer.run(prompt).block_size.tolist() for replayer in (original, file)]
            assert sizes[0] == sizes[1]
            kinds |= set(sizes[0])
    assert len(kinds) >= (1 if options.get("decision") else 2)


# What will not do


def made(network: Any) -> type[LearnedPolicy]:
    class Mine(LearnedPolicy):
        wants = frozenset({"anchor_entropy"})  # type: ignore[arg-type]

        def network(self, inputs: int, outputs: int) -> nn.Module:
            found: nn.Module = network(inputs, outputs)
            return found

    return Mine


class Constant(nn.Module):
    """Learns nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 3)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (
            lambda i, o: nn.Linear(i, o + 1),
            r"network\(1, 3\) gave \[2, 4\] for \[2, 1\]: it must give \[batch, 3\]",
        ),
        (lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Flatten(0)), r"gave \[6\] for \[2, 1\]"),
        (lambda i, o: nn.Linear(i + 1, o), r"Mine.network\(1, 3\) cannot take float32 \[2, 1\]: RuntimeError: mat1"),
        (lambda i, o: Constant(), "has no weights to train"),
        (lambda i, o: None, "must return a torch.nn.Module, not a NoneType"),
        (lambda i, o: nn.Linear(i), "failed: TypeError"),  # type: ignore[call-arg]
        (lambda i, o: nn.GRU(i, o), r"gave tuple for \[2, 1\]"),
    ],
)
def test_a_network_that_will_not_do_is_explained(network: Callable[[int, int], Any], said: str) -> None:
    policy = made(network).untrained(LearnedConfig())
    module = LearnedModule(policy, SPEC, COST, LearnedOptions())
    with pytest.raises(PolicyError, match=said):
        module.prepare(module.examples(TRAIN[0]))


@pytest.mark.parametrize(
    ("wants", "said"),
    [
        ({"draft_probability"}, "wants draft_probability, but a LearnedPolicy decides before the draft.*last_hidden"),
        ({"last_hidden", "prefill_logits"}, "wants prefill_logits, but"),
        ({"entropy"}, "wants entropy, but"),
        (set(), "wants no feature, so there is nothing to learn from: choose from last_hidden"),
    ],
)
def test_features_that_are_not_known_before_every_draft_are_refused(wants: set[str], said: str) -> None:
    kind = made(nn.Linear)
    kind.wants = frozenset(wants)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=said):
        kind()


def test_options_must_derive_from_those_of_the_base() -> None:
    with pytest.raises(PolicyError, match=r"Mine.Config must derive from bpkit.learn.LearnedConfig"):
        type("Mine", (LearnedPolicy,), {"Config": type("Config", (TrainedPolicy.Config,), {})})
    with pytest.raises(PolicyError, match=r"Other.Config must derive from bpkit.learn.TrainedConfig"):
        type("Other", (TrainedPolicy,), {"Config": type("Config", (PolicyConfig,), {})})


def test_the_name_is_that_of_the_class_unless_it_is_given() -> None:
    class MySecondPolicy(LearnedPolicy):
        wants = frozenset()

    class Named(MySecondPolicy):
        name = "other"

    assert (MySecondPolicy.name, Named.name) == ("my_second_policy", "other")


def test_a_name_that_a_plug_in_registers_is_refused_and_gets_none_of_its_weights() -> None:
    class Forecast(LearnedPolicy):
        wants: ClassVar[frozenset[Feature]] = frozenset({Feature.LAST_HIDDEN})

    assert Forecast().folder is None
    with pytest.raises(
        PolicyError, match=r"is called 'forecast', as one that distribution 'block-policy-kit' registers.*`name`"
    ):
        trainable._checked(Forecast, "./mine.py:Forecast")


def test_weights_for_other_features_are_refused(folder: Path) -> None:
    class Planted(LearnedPolicy):
        class Config(LearnedConfig):
            width: int = 16

        wants = frozenset({Feature.ANCHOR_ENTROPY})

        def network(self, inputs: int, outputs: int) -> nn.Module:
            return nn.Linear(inputs, outputs)

    with pytest.raises(PolicyError, match="was trained with last_hidden, anchor_entropy, and its class now wants"):
        Planted(weights=str(folder)).bind(SPEC, COST)


def test_an_option_that_shapes_the_network_stays_as_it_was_trained(folder: Path) -> None:
    with pytest.raises(PolicyError, match=r"(?s)does not fit network 'forecaster'.*size mismatch"):
        trained(folder, width=8).bind(SPEC, COST)


def test_a_class_says_what_to_type_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kinds = {name: type(resolve_policy(name)) for name in ("fixed", "ldlp")}
    assert {name: spec_of(kind) for name, kind in kinds.items()} == {"fixed": "fixed", "ldlp": "ldlp"}
    file = tmp_path / "mine.py"
    file.write_text(
        "from bpkit import Policy\n\nclass Mine(Policy):\n    wants = frozenset()\n    select = None\n",
        encoding="utf-8",
    )
    mine: type[Policy] = type(resolve_policy(f"{file}:Mine"))
    assert spec_of(mine) == f"{file.resolve()}:Mine"
    monkeypatch.chdir(tmp_path)
    assert spec_of(mine) == "./mine.py:Mine"
