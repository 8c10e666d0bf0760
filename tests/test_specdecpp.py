"""`specdecpp`: head, labels and loss by hand, the stop rule against its formula, and training end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpkit_threshold.specdecpp import SpecDecPP, SpecDecPPConfig
from bpkit_threshold.specdecpp_networks import AcceptanceHead
from bpkit_threshold.specdecpp_training import (
    SpecDecPPModule,
    SpecDecPPOptions,
    drafted_tokens,
    weighted_loss,
)
from safetensors.torch import load_file
from torch import Tensor

from bpkit import Context, Draft, SpeculativeDecoder, resolve_policy
from bpkit.decode.clock import CostClock
from bpkit.decode.drafter import Drafter
from bpkit.learn.training.policies import train_policy
from bpkit.policy import PolicyError
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.testing.traces import synthetic_prompt
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.cost import CostTable
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer
from bpkit.types import DecoderSpec, Feature

WIDTH = 16
SPEC = DecoderSpec("target", "drafter", "block-diffusion", 8, 16, WIDTH, 64)
COST = CostTable(
    draft={size: 0.002 + 0.0001 * size for size in range(2, 11)},
    verify={width: 0.01 + 0.002 * width for width in range(1, 11)},
    rest=0.001,
)
TEXTS = ("x = y + 1", "abc abc ab", "1, 2, 3, 1, 2,", "def f(a):", "the quick", "((()))", "aaaa b", "q w e r t y")


def policy(**options: Any) -> SpecDecPP:
    """With random weights, bound."""
    torch.manual_seed(1)
    head = AcceptanceHead(WIDTH, 2)
    made = SpecDecPP.trained(
        SpecDecPPConfig(**options), {"hidden_size": WIDTH, "blocks": 2, "block_size": 8}, {"head": head}, SPEC
    )
    made.bind(SPEC)
    return made


def drafts(lengths: Sequence[int]) -> Draft:
    """Random hidden states; in the padding of a shorter row they are NaN."""
    rows, length = len(lengths), torch.tensor(lengths)
    hidden = torch.randn(rows, max(lengths), WIDTH, generator=torch.Generator().manual_seed(0)) * 2
    hidden[torch.arange(max(lengths)) >= length[:, None]] = torch.nan
    position = torch.ones(rows, dtype=torch.long)
    context = Context(SPEC, position, position * 100, position * 10, torch.Generator())
    tokens = torch.zeros(rows, max(lengths), dtype=torch.long)
    return Draft(context, length + 1, length, tokens, None, {Feature.DRAFT_HIDDEN: hidden})


# The head


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_the_head_has_separate_residual_blocks_and_one_logit(blocks: int) -> None:
    head = AcceptanceHead(WIDTH, blocks)
    assert sum(p.numel() for p in head.parameters()) == blocks * (WIDTH * WIDTH + WIDTH) + WIDTH + 1
    assert len({p.data_ptr() for p in head.parameters()}) == 2 * blocks + 2
    x = torch.randn(2, 5, WIDTH)
    logits = head(x)
    assert logits.shape == (2, 5)
    for block in head.blocks:
        inner = x @ block.linear.weight.T + block.linear.bias  # type: ignore[union-attr, operator]
        x = x + inner * inner.sigmoid()
    torch.testing.assert_close(logits, x @ head.output.weight[0] + head.output.bias[0])


def test_a_drafter_of_another_width_is_explained() -> None:
    with pytest.raises(PolicyError, match=r"drafter of width 16, this one has 8.*bpkit train specdecpp"):
        AcceptanceHead(WIDTH, 1)(torch.zeros(1, 3, 8))


# The stop rule


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("keep_last", [True, False])
def test_a_draft_stops_where_the_chance_of_a_rejection_exceeds_the_threshold(threshold: float, keep_last: bool) -> None:
    made, lengths = policy(threshold=threshold, keep_last=keep_last), [7, 1, 4, 6, 7]
    draft = drafts(lengths)
    verified = made.truncate({}, draft).tolist()
    for row, length in enumerate(lengths):
        chances = made.networks["head"](draft[Feature.DRAFT_HIDDEN][row, :length]).sigmoid().tolist()
        stand, stops = 1.0, None
        for place, chance in enumerate(chances, start=1):
            stand *= chance
            if 1 - stand > threshold:
                stops = place
                break
        expected = length if stops is None else stops if keep_last else stops - 1
        assert verified[row] == expected
        for count in range(1, length + 1):
            goes_on = bool(made.extend({}, draft.first(count))[row])
            assert goes_on == (stops is None or count < stops)
    assert threshold == 1 or verified != lengths


def test_the_drafter_drafts_its_trained_size_unless_told_otherwise() -> None:
    context = drafts([3, 3]).context
    assert policy().select({}, context).tolist() == [8, 8]
    assert policy(block_size=12).select({}, context).tolist() == [12, 12]


# Labels and loss


def test_labels_are_what_replay_accepts() -> None:
    trace = synthetic_prompt(1, output_length=20, max_new_tokens=40)
    plain = replace(trace, drafts=replace(trace.drafts, match_probability=None))
    labels = drafted_tokens(plain)
    for row, column in np.ndindex(*trace.drafts.num_accepted.shape):
        accepted, length = trace.drafts.num_accepted[row, column], trace.drafts.draft_length[row, column]
        left = trace.output_length - (row + 1) - 1  # tokens that a step could accept here
        reached = min(accepted + 1, length, left)
        assert labels.reached[row, column].tolist() == [k < reached for k in range(7)]
        assert labels.known[row, column].tolist() == [k < min(length, left) for k in range(7)]
        assert labels.accepted[row, column, :reached].tolist() == [float(k < accepted) for k in range(reached)]
    assert (labels.known & ~labels.reached & (labels.accepted == 1)).any(), "some match after one that did not"
    chances = drafted_tokens(trace).accepted[labels.known]
    assert chances.tolist() == trace.drafts.match_probability[labels.known].tolist()  # type: ignore[index]


def test_the_loss_weighs_rejections_and_depths() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    accepted, mixture = torch.tensor([1.0, 0.0, 0.25]).double(), torch.tensor([1.0, 0.85, 0.7]).double()
    p = logits.sigmoid()
    each = -(accepted * p.log() + 6 * (1 - accepted) * (1 - p).log())
    expected = (mixture * each).sum() / (mixture * torch.tensor([1.0, 6.0, 0.25 + 6 * 0.75])).sum()
    assert float(weighted_loss(logits, accepted, mixture, rejection_weight=6.0)) == pytest.approx(float(expected))
    ordinary = torch.nn.functional.binary_cross_entropy_with_logits(logits, accepted)
    torch.testing.assert_close(weighted_loss(logits, accepted, torch.ones(3), rejection_weight=1.0), ordinary)


def test_token_k_weighs_as_token_mixing_would_have_it() -> None:
    module = SpecDecPPModule(SpecDecPP.untrained(SpecDecPPConfig()), SPEC, COST, SpecDecPPOptions(mixing=0.5))
    module.networks["head"] = AcceptanceHead(4, 0)
    hidden = torch.randn(3, 4).half()
    batch = {"hidden": hidden, "accepted": torch.tensor([1.0, 0.0, 1.0]), "depth": torch.tensor([0, 1, 3]).short()}
    logits = module.networks["head"](hidden.float())
    expected = weighted_loss(logits, batch["accepted"], torch.tensor([1, 0.5, 0.125]), rejection_weight=6.0)
    assert float(module.loss(batch).detach()) == float(expected.detach())


# Training


def traced(pair: TinyPair, drafter: Drafter) -> tuple[list[PromptTrace], DecoderSpec]:
    decoder = SpeculativeDecoder(pair.target, drafter, "fixed:4", tokenizer=pair.tokenizer)
    tracer = Tracer(decoder, TraceOptions((2, 4, 8), 24, features=frozenset({Feature.DRAFT_HIDDEN})))
    return [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(TEXTS)], decoder.spec


def train(out: Path, prompts: list[PromptTrace], spec: DecoderSpec, name: str = "specdecpp", **options: Any) -> Path:
    options = {"epochs": 4, "batch_size": 64, "patience": 9, **options}
    return train_policy(name, prompts[:6], spec, COST, out, validation=prompts[6:], options=options)


@pytest.mark.parametrize("after_rejection", [False, True])
def test_examples_are_the_tokens_that_count(pair: TinyPair, after_rejection: bool) -> None:
    for drafter in (pair.block_diffusion(), pair.autoregressive()):
        prompts, spec = traced(pair, drafter)
        options = SpecDecPPOptions(after_rejection=after_rejection)
        module = SpecDecPPModule(SpecDecPP.untrained(SpecDecPPConfig()), spec, COST, options)
        made, labels = module.examples(prompts[0]), drafted_tokens(prompts[0])
        wanted = labels.known if after_rejection else labels.reached
        columns = 1 if drafter.kind == "autoregressive" else 3
        wanted = wanted[:, -columns:]
        assert made["hidden"].shape == (int(wanted.sum()), 64)
        assert made["sizes"][0].tolist() == [2, 4, 8]
        rows, sizes, places = np.nonzero(wanted)
        assert made["depth"].tolist() == places.tolist()
        hidden = prompts[0].drafts.features[Feature.DRAFT_HIDDEN][:, -columns:]
        assert torch.equal(made["hidden"], torch.from_numpy(hidden[rows, sizes, places]).half())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block_diffusion", "autoregressive"])
def test_training_learns_chooses_and_decodes_the_same_text(pair: TinyPair, kind: str, tmp_path: Path) -> None:
    drafter: Drafter = getattr(pair, kind)()
    prompts, spec = traced(pair, drafter)
    folder = train(tmp_path / "run", prompts, spec, epochs=8)
    made = resolve_policy(str(folder))
    assert isinstance(made, SpecDecPP)
    grid = SpecDecPPConfig.grid
    assert made.config.threshold in grid["threshold"]
    assert made.config.block_size in (2, 4, 8)
    live = SpeculativeDecoder(pair.target, drafter, made, clock=CostClock(COST), strict=True)
    for trace in prompts[6:]:
        result = live.generate(torch.tensor(trace.prompt_tokens).long()[None], max_new_tokens=24, temperature=0.0)
        assert result.tokens[0].tolist() == trace.output_tokens.tolist()
        replayed = Replayer(spec, str(folder), COST, strict=True).run(trace)
        for name in ("block_size", "draft_length", "verify_length", "num_accepted"):
            assert getattr(replayed, name).tolist() == [int(getattr(step, name)) for step in result.steps], name


def test_an_autoregressive_draft_ends_early_and_a_block_is_trimmed(pair: TinyPair) -> None:
    torch.manual_seed(0)
    head = AcceptanceHead(64, 1)
    for drafter in (pair.autoregressive(), pair.block_diffusion()):
        decoder = SpeculativeDecoder(pair.target, drafter, "fixed:4", tokenizer=pair.tokenizer)
        facts = {"hidden_size": 64, "blocks": 1, "block_size": 4}
        made = SpecDecPP.trained(SpecDecPPConfig(threshold=0.5, block_size=8), facts, {"head": head}, decoder.spec)
        decoder = SpeculativeDecoder(pair.target, drafter, made, tokenizer=pair.tokenizer, strict=True)
        steps = decoder.generate(pair.ids("x = "), max_new_tokens=24, temperature=0.0).steps[:-2]
        drafted, verified = ([int(getattr(s, n)) for s in steps] for n in ("draft_length", "verify_length"))
        if drafter.kind == "autoregressive":
            assert drafted == verified
            assert min(drafted) < 7
        else:
            assert set(drafted) == {7}
            assert min(verified) < 7


def test_options_that_are_given_are_not_chosen(pair: TinyPair, tmp_path: Path) -> None:
    prompts, spec = traced(pair, pair.block_diffusion())
    folder = train(tmp_path / "run", prompts, spec, "specdecpp:threshold=0.42,block_size=4", epochs=1, blocks=1)
    made = resolve_policy(str(folder))
    assert (made.config.threshold, made.config.block_size) == (0.42, 4)  # type: ignore[attr-defined]
    made.bind(spec)
    assert len(made.networks["head"].blocks) == 1  # type: ignore[attr-defined]


def test_the_shipped_weights_are_those_for_the_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpkit.registry.policy_folder.SHIPPED", tmp_path)
    other = replace(SPEC, drafter="assistant", drafter_kind="autoregressive", trained_block_size=6)
    for folder, spec, threshold in (("specdecpp", SPEC, 0.6), ("specdecpp-autoregressive", other, 0.8)):
        facts = {"hidden_size": WIDTH, "blocks": 1, "block_size": 8}
        config = SpecDecPPConfig(threshold=threshold)
        SpecDecPP.trained(config, facts, {"head": AcceptanceHead(WIDTH, 1)}, spec).save_pretrained(tmp_path / folder)
    made = SpecDecPP(block_size=5)
    for spec, threshold in ((SPEC, 0.6), (other, 0.8), (SPEC, 0.6)):
        made.bind(spec)
        assert (made.config.threshold, made.config.block_size) == (threshold, 5)
        assert made.folder == tmp_path / ("specdecpp" if spec is SPEC else "specdecpp-autoregressive")
    given = SpecDecPP(threshold=0.5)
    given.bind(other)
    assert given.config.threshold == 0.5
    with pytest.raises(PolicyError, match=r"fits best, specdecpp-autoregressive,.*vocab size 64 there.*bpkit train"):
        SpecDecPP().bind(replace(other, vocab_size=32))
    named = SpecDecPP(weights=str(tmp_path / "specdecpp"))
    with pytest.raises(PolicyError, match=r"that of .*specdecpp was trained for another decoder"):
        named.bind(other)


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_weights(
    pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, spec = traced(pair, pair.block_diffusion())
    whole = train(tmp_path / "whole", prompts, spec)
    loss, calls = SpecDecPPModule.loss, [0]

    def failing(self: SpecDecPPModule, batch: dict[str, Tensor]) -> Tensor:
        calls[0] += self.current_epoch == 2
        if calls[0] == 2:
            raise RuntimeError("the power went")
        return loss(self, batch)

    monkeypatch.setattr(SpecDecPPModule, "loss", failing)
    with pytest.raises(RuntimeError, match="the power went"):
        train(tmp_path / "cut", prompts, spec)
    monkeypatch.setattr(SpecDecPPModule, "loss", loss)
    cut = train(tmp_path / "cut", prompts, spec)
    ours, theirs = load_file(cut / "weights.safetensors"), load_file(whole / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
