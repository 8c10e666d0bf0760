"""`blockpilot`, `ldlp` and `ldlp_threshold`: networks, labels, losses, decisions, folding, training."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import pytest
import torch
from bpkit_mlp.blockpilot import BlockPilot, BlockPilotConfig
from bpkit_mlp.blockpilot_training import (
    BlockPilotModule,
    BlockPilotOptions,
    Target,
    candidate_sizes,
    choice_loss,
    curve,
    relative,
)
from bpkit_mlp.fold import folded_layer
from bpkit_mlp.ldlp import Ldlp, LdlpConfig, LdlpThreshold, LdlpThresholdConfig
from bpkit_mlp.ldlp_training import LdlpModule, LdlpOptions, asymmetric_l1, labelled_rows
from bpkit_mlp.networks import ResidualMLP, normalisation
from torch import Tensor, nn
from torch.nn import functional as F

from bpkit.assets import prompts
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.learn.networks import Standard
from bpkit.learn.trained import TrainedConfig
from bpkit.learn.training.policies import train_policy
from bpkit.learn.training.policy_module import PolicyModule
from bpkit.policy import Policy, PolicyError
from bpkit.registry.discovery import build
from bpkit.registry.resolve import resolve_policy
from bpkit.testing import TinyPair
from bpkit.testing.traces import synthetic_prompt, synthetic_prompts
from bpkit.trace.cost import CostTable
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer, with_features
from bpkit.types import Context, DecoderSpec, Draft, Feature, work_of

if TYPE_CHECKING:
    from tests.conftest import ShippedPair

COST = CostTable(
    draft={size: 0.001 + 0.0005 * size for size in range(2, 17)},
    verify={width: 0.005 + 0.001 * width for width in range(1, 17)},
)
HIDDEN, VOCAB = 8, 24
LENGTHS: dict[str, Any] = {"hidden_size": HIDDEN, "sizes": [2, 3, 4, 6, 8]}


def decoder(trained: int = 4, largest: int = 8, hidden: int = HIDDEN, vocab: int = VOCAB) -> DecoderSpec:
    return DecoderSpec("target", "drafter", "block-diffusion", trained, largest, hidden, vocab)


def context(batch: int, **features: Tensor) -> Context:
    zeros = torch.zeros(batch, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    known = {Feature(name): value for name, value in features.items()}
    return Context(decoder(), zeros, zeros + 100, zeros + 5, generator, known)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Kind = TypeVar("Kind", BlockPilot, Ldlp)


def made(
    kind: type[Kind], config: TrainedConfig, facts: dict[str, Any], *, seed: int = 0, spec: DecoderSpec | None = None
) -> Kind:
    """A bound policy with random weights."""
    torch.manual_seed(seed)
    networks = kind.untrained(config).build(facts)
    for network in networks.values():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    policy = kind.trained(config, facts, networks, spec or decoder())
    policy.bind(spec or decoder(), COST)
    return policy


def blockpilot(sizes: tuple[int, ...] = (2, 3, 4, 6), spec: DecoderSpec | None = None, **options: Any) -> BlockPilot:
    config = BlockPilotConfig(**{"width": 16, **options})
    inputs = VOCAB if config.input == "logits" else HIDDEN
    return made(BlockPilot, config, {"inputs": inputs, "sizes": list(sizes)}, spec=spec)


def ldlp(sizes: tuple[int, ...] = (2, 3, 4, 6, 8), spec: DecoderSpec | None = None, **options: Any) -> Ldlp:
    return made(Ldlp, LdlpConfig(**options), {"hidden_size": HIDDEN, "sizes": list(sizes)}, spec=spec)


def forecasting(lengths: list[float], kind: type[Ldlp] = Ldlp, **options: Any) -> Any:
    """An LDLP whose network says these lengths, whatever it reads; traced sizes 2, 3, 4, 6 and 8."""
    config = kind.Config(**options)
    policy = made(kind, cast("TrainedConfig", config), LENGTHS)
    policy.quick = lambda _: torch.tensor(lengths)[:, None]
    return policy


def ldlp_context(batch: int, seed: int = 0) -> Context:
    return context(
        batch, anchor_embedding=noise(batch, HIDDEN, seed=seed), last_hidden=noise(batch, HIDDEN, seed=seed + 1)
    )


def prompt_of(accepted: list[list[int]], sizes: tuple[int, ...], **changes: Any) -> PromptTrace:
    """A trace of one prompt with this table of accepted tokens, [rows][sizes]."""
    prompt = synthetic_prompt(0, output_length=len(accepted) + 1, max_new_tokens=99, block_sizes=sizes)
    drafts = replace(prompt.drafts, num_accepted=np.array(accepted, np.int32))
    return replace(prompt, drafts=drafts, **changes)


# plug-in --------------------------------------------------------------------------------------------------------


def test_hook_modules_and_options_load_without_torch() -> None:
    modules = "bpkit_mlp, bpkit_mlp.blockpilot, bpkit_mlp.ldlp"
    subprocess.run([sys.executable, "-c", f"import {modules}, sys; assert 'torch' not in sys.modules"], check=True)


def test_registered_names_load_their_classes_and_options() -> None:
    policies = build([EntryPoint("mlp", "bpkit_mlp", "bpkit")]).policies
    assert {name: entry.load() for name, entry in policies.items()} == {
        "blockpilot": BlockPilot,
        "ldlp": Ldlp,
        "ldlp_threshold": LdlpThreshold,
    }
    configs = {name: entry.load_config() for name, entry in policies.items()}
    assert configs == {"blockpilot": BlockPilotConfig, "ldlp": LdlpConfig, "ldlp_threshold": LdlpThresholdConfig}


def test_each_wants_what_it_reads() -> None:
    assert BlockPilot.untrained(BlockPilotConfig()).wants == {Feature.PREFILL_LOGITS}
    assert BlockPilot.untrained(BlockPilotConfig(input="hidden")).wants == {Feature.PREFILL_HIDDEN}
    assert Ldlp.wants == {Feature.ANCHOR_EMBEDDING, Feature.LAST_HIDDEN}
    assert LdlpThreshold.wants - Ldlp.wants == {Feature.DRAFT_PROBABILITY}


# networks -------------------------------------------------------------------------------------------------------


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.named_parameters()}


def test_blockpilot_has_the_published_layers() -> None:
    policy = BlockPilot.untrained(BlockPilotConfig())
    network = policy.build({"inputs": 300, "sizes": [14, 15, 16, 17, 18]})["mlp"]
    assert shapes(network) == {
        "layers.0.weight": (2048, 300),
        "layers.0.bias": (2048,),
        "layers.1.weight": (2048, 2048),
        "layers.1.bias": (2048,),
        "output.weight": (5, 2048),
        "output.bias": (5,),
    }
    assert isinstance(network, ResidualMLP)
    assert network.dropout == 0.2
    assert not shapes(policy.build({"inputs": 300, "sizes": [14, 15]})["normalisation"])


def test_ldlp_has_three_layers_on_two_vectors_and_one_output() -> None:
    network = Ldlp.untrained(LdlpConfig()).build({"hidden_size": 8, "sizes": [2]})["mlp"]
    weights = [shape for name, shape in shapes(network).items() if name.endswith("weight")]
    assert weights == [(8, 16), (8, 8), (8, 8), (1, 8)]
    narrow = Ldlp.untrained(LdlpConfig(width=3)).build({"hidden_size": 8, "sizes": [2]})["mlp"]
    assert shapes(narrow)["layers.0.weight"] == (3, 16)


def test_forward_is_linear_relu_and_what_came_in() -> None:
    network = ResidualMLP(5, 7, 3, depth=3).eval()
    x = noise(4, 5)
    first, second, third = (F.linear for _ in range(3))
    a, b, c = (cast("nn.Linear", layer) for layer in network.layers)
    h = first(x, a.weight, a.bias).relu()
    h = second(h, b.weight, b.bias).relu() + h
    h = third(h, c.weight, c.bias).relu() + h
    torch.testing.assert_close(network(x), network.output(h))


def test_dropout_is_for_training_only() -> None:
    network, x = ResidualMLP(5, 64, 3, depth=2, dropout=0.2), noise(1, 5)
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


def test_standard_takes_its_figures_from_the_training_rows() -> None:
    standard, x = Standard(3), noise(50, 3) * torch.tensor([2.0, 5.0, 0.0]) + 1
    standard.fit(x)
    torch.testing.assert_close(standard(x).mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard(x).std(dim=0, correction=0)[:2], torch.ones(2))
    assert standard(x).abs().max() < 10, "a column without variation is left at 0"
    assert set(standard.state_dict()) == {"mean", "scale"}


@pytest.mark.parametrize("keep", ["longer", "shorter"])
def test_what_decides_live_is_what_is_trained_and_written(keep: str) -> None:
    policy = made(LdlpThreshold, LdlpThreshold.Config(normalise="standard", keep=keep), LENGTHS)  # type: ignore[arg-type]
    seen, draft = ldlp_context(9), drafted([[0.9, 0.6, 0.3, 0.2]] * 9)
    state: dict[str, Any] = {}
    size, length = policy.select(state, seen), policy.truncate(state, draft)
    cores = policy.export().cores
    assert {id(p) for p in cores["select"].module.parameters()} == {
        id(p) for network in policy.networks.values() for p in network.parameters()
    }
    chosen, forecast, *_ = cores["select"].module(seen["anchor_embedding"], seen["last_hidden"])
    verify, *_ = cores["truncate"].module(draft["draft_probability"], draft.draft_length, forecast)
    assert (chosen.tolist(), verify.tolist()) == (size.tolist(), length.tolist())
    inputs = torch.cat([seen["anchor_embedding"], seen["last_hidden"]], dim=1)
    expected = policy.networks["mlp"](policy.networks["standard"](inputs))[:, 0]
    torch.testing.assert_close(policy.predicted(seen)["length"], expected)


# labels ---------------------------------------------------------------------------------------------------------


def test_candidates_are_the_trained_size_and_two_on_either_side_as_far_as_traced() -> None:
    assert candidate_sizes(None, 16, range(2, 33)) == (14, 15, 16, 17, 18)
    assert candidate_sizes(None, 16, range(2, 17)) == (14, 15, 16)
    assert candidate_sizes(None, 3, range(2, 17)) == (2, 3, 4, 5)
    assert candidate_sizes("1+3-4", 16, (2, 3, 4)) == (1, 3, 4), "1 is no draft, which every trace has"


@pytest.mark.parametrize(("given", "message"), [("2+9", "not 9"), ("8-2", "backwards"), ("4", "nothing to choose")])
def test_candidates_that_cannot_be_are_refused(given: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        candidate_sizes(given, 4, (2, 3, 4))
    with pytest.raises(PolicyError, match="nothing to choose"):
        candidate_sizes(None, 16, (4, 8, 16))


def test_curve_follows_one_size_through_the_prompt() -> None:
    # Output of 7 tokens, 6 of them by steps. Size 2: 1 -> 3 -> 4 -> 6 -> 7. Size 4: 1 -> 4 -> 7.
    accepted = [[1, 2], [0, 0], [0, 3], [1, 2], [0, 1], [0, 0]]
    prompt = prompt_of(accepted, (2, 4))
    found = curve(prompt, work_of("block-diffusion"), COST, (1, 2, 4), "acceptance_length")
    assert found.tolist() == [1.0, 6 / 4, 6 / 2]
    plain, two, four = (COST.step(size) for size in (1, 2, 4))
    rates = curve(prompt, work_of("block-diffusion"), COST, (1, 2, 4), "tokens_per_second")
    np.testing.assert_allclose(rates, [6 / (6 * plain), 6 / (4 * two), 6 / (2 * four)])


def test_acceptance_length_and_time_disagree_about_the_best_size() -> None:
    prompts = synthetic_prompts(6)
    sizes = (2, 3, 4, 6, 8)
    by = {
        label: [sizes[int(curve(p, work_of("block-diffusion"), COST, sizes, label).argmax())] for p in prompts]
        for label in ("acceptance_length", "tokens_per_second")
    }
    assert np.mean(by["acceptance_length"]) > np.mean(by["tokens_per_second"])


def test_ldlp_learns_what_the_largest_draft_would_have_accepted() -> None:
    accepted = [[1, 2], [0, 0], [0, 3], [1, 2], [0, 1], [0, 0]]
    prompt = with_ldlp_features(prompt_of(accepted, (2, 4)))
    examples = ldlp_module().examples(prompt)
    assert examples["accepted"].tolist() == [2, 0, 3, 2, 1, 0]
    assert examples["sizes"].tolist() == [[2, 4]] * 6
    embedding, hidden = (prompt.features[name] for name in (Feature.ANCHOR_EMBEDDING, Feature.LAST_HIDDEN))
    assert torch.equal(examples["inputs"][2], torch.tensor([*embedding[2], *hidden[2]])), "position 3, anchor token 2"


def test_positions_where_the_limit_cuts_the_label_are_left_out() -> None:
    rows = [[0, 0]] * 6
    assert labelled_rows(prompt_of(rows, (2, 4), max_new_tokens=8)).all(), "the output ended by itself"
    cut = labelled_rows(prompt_of(rows, (2, 4), max_new_tokens=7))
    assert cut.tolist() == [True, True, True, False, False, False], "room for 3 drafted tokens up to position 3"


# losses ---------------------------------------------------------------------------------------------------------


def test_argmax_target_is_cross_entropy_on_the_best_size() -> None:
    scores, curves = noise(3, 4), torch.tensor([[1, 3, 2, 3], [5, 1, 1, 1], [2, 2, 2, 2.5]])
    expected = -scores.log_softmax(dim=1)[range(3), [1, 0, 3]].mean()  # of equals the smallest size
    torch.testing.assert_close(choice_loss(scores, curves, "argmax", temperature=1, spread=1), expected)


def test_soft_target_weighs_sizes_by_how_close_they_come() -> None:
    scores, curves = noise(2, 3), torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    weights = (torch.tensor([-0.5, 0.0, 0.5]) / 0.1).softmax(dim=0)
    expected = -(scores.log_softmax(dim=1) * weights).sum(dim=1).mean()
    torch.testing.assert_close(choice_loss(scores, curves, "soft", temperature=0.1, spread=1), expected)


def test_curve_target_is_the_squared_error_of_relative_curves() -> None:
    curves = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    torch.testing.assert_close(relative(curves), torch.tensor([[-0.5, 0.0, 0.5]] * 2))
    scores = noise(2, 3)
    expected = (scores - torch.tensor([-1.0, 0.0, 1.0])).square().mean()
    torch.testing.assert_close(choice_loss(scores, curves, "curve", temperature=1, spread=0.5), expected)


def test_asymmetric_l1_scales_what_is_too_short() -> None:
    forecast, accepted = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([3.0, 2.0, 2.0])
    assert float(asymmetric_l1(forecast, accepted, 4.0)) == pytest.approx((4 * 2 + 3 + 0) / 3)


def test_asymmetric_l1_is_least_at_its_quantile() -> None:
    accepted = torch.arange(101.0)
    losses = [float(asymmetric_l1(torch.full((101,), float(c)), accepted, 3.0)) for c in range(101)]
    assert int(np.argmin(losses)) == 75


# decisions ------------------------------------------------------------------------------------------------------


def test_blockpilot_decides_in_begin_and_keeps_to_it() -> None:
    policy, logits = blockpilot(), noise(5, VOCAB) * 3
    state = policy.begin(context(5, prefill_logits=logits))
    expected = [(2, 3, 4, 6)[i] for i in policy.scores(logits).argmax(dim=1).tolist()]
    policy.networks.clear()  # nothing is computed after begin
    for _ in range(2):
        chosen = policy.select(state, context(5))
        assert chosen.tolist() == expected
        assert chosen.dtype == torch.int64
    assert len(set(expected)) > 1, "rows that all choose alike would prove nothing"


def test_blockpilot_keeps_to_what_the_decoder_can_do() -> None:
    policy = blockpilot((2, 3, 4, 6), decoder(largest=3))
    chosen = policy.begin(context(8, prefill_logits=noise(8, VOCAB) * 3))["block_size"]
    assert int(chosen.max()) == 3


def test_blockpilot_rows_do_not_influence_each_other() -> None:
    for normalise in ("none", "layer", "softmax", "standard"):
        policy, logits = blockpilot(normalise=normalise), noise(6, VOCAB, seed=3) * 3
        together = policy.begin(context(6, prefill_logits=logits))["block_size"].tolist()
        alone = [int(policy.begin(context(1, prefill_logits=row[None]))["block_size"]) for row in logits]
        assert together == alone


def test_ldlp_rounds_and_clips_to_no_draft_and_the_largest() -> None:
    policy = forecasting([-3.0, 0.4, 0.6, 2.2, 6.7, 99.0])
    chosen = policy.select({}, ldlp_context(6))
    assert chosen.tolist() == [1, 1, 2, 3, 8, 8]
    assert chosen.dtype == torch.int64


def test_ldlp_takes_the_next_traced_size_above() -> None:
    policy = forecasting([3.0, 4.0, 5.0, 6.0, 7.0])
    assert policy.select({}, ldlp_context(5)).tolist() == [4, 6, 6, 8, 8]


def test_ldlp_keeps_to_what_the_decoder_can_do() -> None:
    policy = ldlp(spec=decoder(largest=5))
    assert policy.decision.largest == 3
    policy.quick = lambda _: torch.full((1, 1), 7.0)
    assert policy.select({}, ldlp_context(1)).tolist() == [4]


def test_ldlp_rows_do_not_influence_each_other() -> None:
    policy, seen = ldlp(normalise="standard"), ldlp_context(6, seed=5)
    together = policy.select({}, seen).tolist()
    rows = [{str(name): value[i : i + 1] for name, value in seen.features.items()} for i in range(6)]
    assert together == [int(policy.select({}, context(1, **row))) for row in rows]
    assert len(set(together)) > 1


def drafted(rows: list[list[float]]) -> Draft:
    values = torch.tensor(rows)
    length = torch.full((len(rows),), values.shape[1])
    features = {Feature.DRAFT_PROBABILITY: values}
    return Draft(context(len(rows)), length + 1, length, values.long(), features=features)


def test_ldlp_threshold_keeps_the_longer_length() -> None:
    policy = forecasting([1.0, 3.0, 0.0], LdlpThreshold, threshold=0.5, block_size=6)
    state: dict[str, Any] = {}
    assert policy.select(state, ldlp_context(3)).tolist() == [6, 6, 6], "a block cannot be gone on with"
    draft = drafted([[0.9, 0.9, 0.2, 0.9], [0.9, 0.1, 0.9, 0.9], [0.1, 0.9, 0.9, 0.9]])
    assert policy.truncate(state, draft).tolist() == [2, 3, 0]
    so_far = drafted([[0.9, 0.2], [0.9, 0.1], [0.9, 0.8]])
    assert policy.extend(state, so_far).tolist() == [False, True, True], "beyond the forecast and in doubt"


def test_ldlp_threshold_can_keep_the_shorter_length() -> None:
    policy = forecasting([1.0, 3.0, 0.0], LdlpThreshold, threshold=0.5, keep="shorter")
    state: dict[str, Any] = {}
    assert policy.select(state, ldlp_context(3)).tolist() == [2, 4, 1]
    draft = drafted([[0.9, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0.9]])
    assert policy.truncate(state, draft).tolist() == [1, 1, 0]
    assert policy.extend(state, drafted([[0.9], [0.4], [0.6]])).tolist() == [True, False, True]


def test_ldlp_threshold_drafts_the_trained_size_if_it_was_traced() -> None:
    assert forecasting([0.0], LdlpThreshold).select({}, ldlp_context(1)).tolist() == [4]
    assert forecasting([0.0], LdlpThreshold, block_size=5).select({}, ldlp_context(1)).tolist() == [4]


# folding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalise", ["none", "standard"])
def test_folded_policy_decides_alike(normalise: str, bias: bool) -> None:
    torch.manual_seed(1)
    head, policy = nn.Linear(HIDDEN, VOCAB, bias=bias), blockpilot(normalise=normalise)
    hidden = noise(500, HIDDEN) * 3
    logits = head(hidden).detach()
    standard = policy.networks["normalisation"]
    if isinstance(standard, Standard):
        standard.fit(logits)
    folded = policy.folded(head)
    folded.bind(decoder(), COST)
    assert folded.wants == {Feature.PREFILL_HIDDEN}
    before, after = policy.scores(logits), folded.scores(hidden)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    best = before.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 2e-4 * before.abs().amax(dim=1)
    chosen = [p.begin(context(500, **{f: x}))["block_size"] for p, f, x in alike(policy, logits, folded, hidden)]
    assert clear.sum() > 400
    assert torch.equal(chosen[0][clear], chosen[1][clear])


def alike(policy: BlockPilot, logits: Tensor, folded: BlockPilot, hidden: Tensor) -> Any:
    return [(policy, "prefill_logits", logits), (folded, "prefill_hidden", hidden)]


def test_folded_layer_is_exact_in_float64() -> None:
    torch.manual_seed(2)
    head, layer, standard = nn.Linear(HIDDEN, 20_000), nn.Linear(20_000, 6), Standard(20_000)
    standard.fit(noise(9, 20_000) * 2 + 1)
    weight, bias = folded_layer(layer, standard, head)
    hidden = noise(4, HIDDEN).double()
    logits = hidden @ head.weight.double().T + head.bias.double()
    expected = ((logits - standard.mean) / standard.scale.double()) @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(hidden @ weight.T + bias, expected, atol=1e-9, rtol=1e-9)


def test_fold_takes_the_head_of_a_target(pair: TinyPair) -> None:
    config = pair.target.config
    spec = decoder(hidden=config.hidden_size, vocab=config.vocab_size)
    facts = {"inputs": config.vocab_size, "sizes": [2, 4]}
    policy = made(BlockPilot, BlockPilotConfig(width=8), facts, spec=spec)
    folded = policy.folded(pair.target.lm_head, config=config)
    folded.bind(spec, COST)
    with torch.no_grad():
        output = pair.target(pair.ids("a = b + c"), output_hidden_states=True)
    logits, hidden = output.logits[:, -1], output.hidden_states[-1][:, -1]
    torch.testing.assert_close(policy.scores(logits), folded.scores(hidden), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": SimpleNamespace(final_logit_softcapping=30.0)}, "soft-caps.*final_logit_softcapping=30"),
        ({"config": SimpleNamespace(logit_scale=0.25)}, "scales its logits"),
        ({"processors": [SimpleNamespace()]}, "processors stand between.*SimpleNamespace"),
        ({"policy": {"normalise": "softmax"}}, "softmax' is not affine"),
        ({"policy": {"normalise": "layer"}}, "layer' is not affine"),
        ({"policy": {"input": "hidden"}}, "nothing to fold"),
        ({"head": nn.Sequential(nn.Linear(HIDDEN, VOCAB), nn.Tanh())}, "plain torch.nn.Linear.*Sequential"),
        ({"head": nn.Linear(HIDDEN, VOCAB + 1)}, "25 outputs.*24 logits"),
        ({"head": nn.Linear(HIDDEN + 1, VOCAB)}, "reads 9 numbers.*have 8"),
    ],
)
def test_what_does_not_fold_is_refused(changed: dict[str, Any], message: str) -> None:
    policy = blockpilot(**changed.get("policy", {}))
    rest = {name: value for name, value in changed.items() if name in ("config", "processors")}
    with pytest.raises(PolicyError, match=message):
        policy.folded(changed.get("head", nn.Linear(HIDDEN, VOCAB)), **rest)


def test_heads_with_hooks_and_policies_without_weights_are_refused() -> None:
    head = nn.Linear(HIDDEN, VOCAB)
    with pytest.raises(PolicyError, match="bind it"):
        BlockPilot.untrained(BlockPilotConfig()).folded(head)
    head.register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(PolicyError, match="hooks"):
        blockpilot().folded(head)


def test_folded_policy_is_saved_and_loaded(tmp_path: Path) -> None:
    head, hidden = nn.Linear(HIDDEN, VOCAB), noise(9, HIDDEN)
    folded = blockpilot().folded(head)
    folded.bind(decoder(), COST)
    folded.save_pretrained(tmp_path)
    loaded = resolve_policy({"name": "blockpilot", "weights": str(tmp_path)})
    assert isinstance(loaded, BlockPilot)
    assert loaded.wants == {Feature.PREFILL_HIDDEN}, "the folder says what it reads"
    loaded.bind(decoder(), COST)
    assert torch.equal(loaded.scores(hidden), folded.scores(hidden))


# learning -------------------------------------------------------------------------------------------------------


def with_ldlp_features(prompt: PromptTrace, seed: int = 0) -> PromptTrace:
    """Features from which the accepted length follows: it stands in one column, among noise."""
    rng = np.random.default_rng((seed, prompt.index))
    shape = (prompt.output_length, HIDDEN)
    embedding, hidden = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    hidden[: prompt.drafts.rows, 3] = prompt.drafts.num_accepted[:, -1] / 3
    return with_features(prompt, {Feature.ANCHOR_EMBEDDING: embedding, Feature.LAST_HIDDEN: hidden})


def ldlp_module(**options: Any) -> LdlpModule:
    return LdlpModule(Ldlp.untrained(LdlpConfig()), decoder(), COST, LdlpOptions(**options))


def trained(module: PolicyModule, prompts: list[PromptTrace], *, steps: int = 150, rate: float = 3e-3) -> Policy:
    """What Lightning does, in a few lines."""
    parts = [module.examples(prompt) for prompt in prompts]
    data = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    torch.manual_seed(0)
    module.prepare(data)
    optimizer = torch.optim.AdamW(module.networks.parameters(), lr=rate)
    module.networks.train()
    for _ in range(steps):
        optimizer.zero_grad()
        module.loss(data).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    module.networks.eval()
    return module.finished()


@pytest.mark.parametrize("target", ["argmax", "soft", "curve"])
def test_blockpilot_learns_which_prompts_are_easy(target: Target) -> None:
    # At these costs most easy prompts are worth the longer block and most hard ones are not.
    shown, unseen = synthetic_prompts(160), [synthetic_prompt(i) for i in range(200, 240)]
    config = BlockPilotConfig(input="hidden", width=16, candidates="2+8")
    options = BlockPilotOptions(target=target, label="tokens_per_second", temperature=0.1)
    cost = CostTable(draft={8: 0.001}, verify={1: 0.001, 2: 0.001, 8: 0.0024})
    module = BlockPilotModule(BlockPilot.untrained(config), decoder(), cost, options)
    shown, unseen = ([marked(p) for p in part] for part in (shown, unseen))
    policy = trained(module, shown)
    chosen = [int(policy.begin(hidden_context(p))["block_size"]) for p in unseen]
    assert np.mean([size == (8 if p.domain == "easy" else 2) for size, p in zip(chosen, unseen, strict=True)]) > 0.85


def marked(prompt: PromptTrace) -> PromptTrace:
    """The domain stands plainly in the hidden state."""
    hidden = prompt.features[Feature.PREFILL_HIDDEN].copy()
    hidden[0] = 2.0 if prompt.domain == "easy" else -2.0
    return with_features(prompt, {Feature.PREFILL_HIDDEN: hidden})


def hidden_context(prompt: PromptTrace) -> Context:
    return context(1, prefill_hidden=torch.tensor(prompt.features[Feature.PREFILL_HIDDEN])[None])


def test_blockpilot_begins_no_example_with_an_output_of_one_token() -> None:
    module = BlockPilotModule(
        BlockPilot.untrained(BlockPilotConfig(input="hidden")), decoder(), COST, BlockPilotOptions()
    )
    nothing = module.examples(synthetic_prompt(0, output_length=1))
    assert {name: len(value) for name, value in nothing.items()} == {"inputs": 0, "curve": 0, "sizes": 0}
    something = module.examples(synthetic_prompt(0))
    assert {name: tuple(value.shape[1:]) for name, value in nothing.items()} == {
        name: tuple(value.shape[1:]) for name, value in something.items()
    }


@pytest.mark.parametrize("normalise", ["none", "standard"])
def test_ldlp_learns_planted_lengths(normalise: Literal["none", "standard"]) -> None:
    shown = [with_ldlp_features(p) for p in synthetic_prompts(12)]
    unseen = [with_ldlp_features(synthetic_prompt(i)) for i in range(20, 24)]
    config = LdlpConfig(normalise=normalise, width=32)
    module = LdlpModule(Ldlp.untrained(config), decoder(), COST, LdlpOptions())
    policy = trained(module, shown, steps=300)
    assert isinstance(policy, Ldlp)
    examples = [module.examples(p) for p in unseen]
    inputs, accepted = (torch.cat([e[name] for e in examples]) for name in ("inputs", "accepted"))
    error = (policy.quick(inputs)[:, 0] - accepted).abs().mean()
    spread = (accepted - accepted.median()).abs().mean()
    assert error < 0.5 * spread


def test_ldlp_begins_with_the_best_constant() -> None:
    module = ldlp_module(penalty=3.0)
    parts = [module.examples(with_ldlp_features(p)) for p in synthetic_prompts(6)]
    data = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    module.prepare(data)
    mlp = module.networks["mlp"]
    assert isinstance(mlp, ResidualMLP)
    assert float(mlp.output.bias.detach()) == pytest.approx(float(data["accepted"].quantile(0.75)))


def test_threshold_is_chosen_by_tokens_per_second() -> None:
    config = LdlpThresholdConfig()
    module = LdlpModule(LdlpThreshold.untrained(config), decoder(), COST, LdlpOptions())
    trained(module, [with_ldlp_features(p) for p in synthetic_prompts(3)], steps=1)
    module.choose(lambda policy: -abs(policy.config.threshold - 0.3) - abs((policy.config.block_size or 0) - 6))  # type: ignore[attr-defined]
    chosen = module.policy.config
    assert isinstance(chosen, LdlpThresholdConfig)
    assert (chosen.threshold, chosen.block_size) == (0.3, 6)


def test_given_threshold_is_kept() -> None:
    config = LdlpThresholdConfig(threshold=0.7, keep="shorter")
    module = LdlpModule(LdlpThreshold.untrained(config), decoder(), COST, LdlpOptions())
    trained(module, [with_ldlp_features(p) for p in synthetic_prompts(3)], steps=1)
    module.choose(lambda policy: float(policy.config.threshold == 0.2))  # type: ignore[attr-defined]
    assert module.policy.config == config


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("blockpilot:input=hidden,width=8", {"target": "soft", "epochs": 2}),
        ("ldlp", {"epochs": 1}),
        ("ldlp_threshold", {"epochs": 1}),
    ],
)
def test_trained_folder_is_a_policy(policy: str, options: dict[str, Any], tmp_path: Path) -> None:
    prompts = [with_ldlp_features(p) for p in synthetic_prompts(10)]
    shown, unseen = prompts[:7], prompts[7:]
    folder = train_policy(policy, shown, decoder(), COST, tmp_path / "run", validation=unseen, options=options)
    name = policy.partition(":")[0]
    replayed = [Replayer(decoder(), {"name": name, "weights": str(folder)}, COST, strict=True).run(p) for p in unseen]
    assert all(run.tokens == 47 for run in replayed)


# live -----------------------------------------------------------------------------------------------------------


def live(pair: TinyPair, name: str, **options: Any) -> Policy:
    hidden, vocab = pair.target.config.hidden_size, pair.target.config.vocab_size
    spec = SpeculativeDecoder(pair.target, pair.block_diffusion()).spec
    if name == "blockpilot":
        config = BlockPilotConfig(width=8, **options)
        facts = {"inputs": vocab if config.input == "logits" else hidden, "sizes": [1, 4, 8]}
        return made(BlockPilot, config, facts, spec=spec)
    kind = LdlpThreshold if name == "ldlp_threshold" else Ldlp
    config_of = cast("TrainedConfig", kind.Config(**options))
    return made(kind, config_of, {"hidden_size": hidden, "sizes": list(range(2, 9))}, spec=spec)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("blockpilot", {}),
        ("blockpilot", {"input": "hidden", "normalise": "layer"}),
        ("ldlp", {}),
        ("ldlp_threshold", {}),
        ("ldlp_threshold", {"keep": "shorter"}),
    ],
)
@pytest.mark.parametrize("drafter", ["block_diffusion", "autoregressive", "agreeable"])
def test_text_is_the_same_live_and_no_fault_is_mended(
    pair: TinyPair, name: str, options: dict[str, Any], drafter: str
) -> None:
    policy, drafts = live(pair, name, **options), getattr(pair, drafter)()
    made_for = SpeculativeDecoder(pair.target, drafts).spec
    policy._trained = replace(policy._trained, trained_for=type(policy._trained.trained_for).of(made_for))  # type: ignore[attr-defined]
    plain = SpeculativeDecoder(pair.target, drafts, "fixed:1")
    decoding = SpeculativeDecoder(pair.target, drafts, policy, strict=True)
    for seed, temperature in ((None, 0.0), (7, 1.0)):
        how = {"max_new_tokens": 24, "temperature": temperature, "seed": seed}
        expected, found = (d.generate(pair.ids("f(x) = 2"), **how) for d in (plain, decoding))
        assert torch.equal(expected.tokens, found.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blockpilot", "ldlp", "ldlp_threshold"])
def test_the_shipped_weights_decide_for_the_shipped_pair(shipped: ShippedPair, name: str) -> None:
    policy = resolve_policy(name)
    made_for = SpeculativeDecoder(shipped.target, shipped.drafter, policy, strict=True)
    plain = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed:1")
    sizes = set()
    for prompt in prompts(limit=2):
        ids = shipped.tokenizer(prompt["prompt"], return_tensors="pt")["input_ids"]
        made, expected = (d.generate(ids, max_new_tokens=32, temperature=0) for d in (made_for, plain))
        assert made.near_ties or torch.equal(made.tokens, expected.tokens)
        sizes |= {int(step.block_size) for step in made.steps}
    assert len(sizes) > 1, "weights that say nothing name one size for all"
    weights = policy.folder / "weights.safetensors"  # type: ignore[attr-defined]
    assert weights.parent.name == name
    assert weights.stat().st_size < 2**20


def test_normalisations_by_name() -> None:
    x = noise(3, 5) * 4
    torch.testing.assert_close(normalisation("softmax", 5)(x).sum(dim=1), torch.ones(3))
    torch.testing.assert_close(normalisation("layer", 5)(x).mean(dim=1), torch.zeros(3), atol=1e-6, rtol=0)
    assert torch.equal(normalisation("none", 5)(x), x)
