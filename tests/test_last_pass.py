"""Drafts of what the target's last pass said after its first wrong token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bpkit import Context, Policy, SpeculativeDecoder
from bpkit.decode.drafter import Drafter, Offer, Proposal
from bpkit.decode.noise import GumbelNoise
from bpkit.decode.text import RowText
from bpkit.draft.last_pass import LastPassDrafter, LastPassSession
from bpkit.policy import State
from bpkit.testing import TinyPair
from bpkit.testing.models import AgreeableSession
from bpkit.types import Feature, Plan

SEED = 5


def session(tokens: list[int], repeat: int = 1) -> LastPassSession:
    return LastPassSession(repeat, RowText(torch.tensor([tokens]), 100))


def test_positions_that_were_not_read_again_keep_what_a_pass_said() -> None:
    row = session([1, 2, 3])
    assert row.offer(3) == Offer([3, 3, 3])
    row.text.append([10])
    row.passed([20, 30, 40, 50])
    assert row.offer(2) == Offer([20, 30])
    assert row.offer(6) == Offer([20, 30, 40, 50, 50, 50])
    row.text.append([20, 31])  # 20 stood, 30 did not; a third position was read behind it
    row.passed([41])
    assert row.offer(3) == Offer([41, 50, 50])
    row.text.append([41, 50, 60])  # a step in which another source was asked, and nobody said what a pass said
    assert row.offer(2) == Offer([60, 60])
    row.passed([])
    assert row.offer(1) == Offer([60])


def test_new_positions_repeat_the_token_so_many_before() -> None:
    assert session([1, 2, 3, 4], repeat=3).offer(5) == Offer([2, 3, 4, 2, 3])
    assert session([1, 2, 3, 4], repeat=5).offer(2) == Offer([4, 4]), "the text has no token so many before"
    row = session([1, 2, 3], repeat=2)
    row.text.append([4])
    row.passed([9])
    assert row.offer(4) == Offer([9, 4, 9, 4])
    only = session([1, 2, 3], repeat=0)
    only.text.append([4])
    assert only.offer(4) == Offer([])
    only.passed([9])
    assert only.offer(4) == Offer([9])


@torch.no_grad()
def jacobi(target: PreTrainedModel, ids: list[int], window: int, count: int, seed: int | None) -> list[list[int]]:
    """The tokens of each step after the first token, by passes over the whole text without a cache."""
    width = target.config.vocab_size
    noise = torch.zeros(count + window, width)
    if seed is not None:
        noise = GumbelNoise(seed, 0, width, torch.device("cpu")).at(0, count + window)

    def choices(guess: list[int], made: int) -> list[int]:
        logits = target(torch.tensor([[*ids, *guess]]), use_cache=False).logits[0, len(ids) - 1 :]
        found: list[int] = (logits + noise[made : made + len(guess) + 1]).argmax(dim=-1).tolist()
        return found

    start, guess = len(ids), list[int]()
    ids, steps = [*ids, *choices([], 0)], []
    while len(ids) - start < count:
        guess += [(ids + guess)[-1]] * (window - len(guess))
        left = count - (len(ids) - start) - 1
        said = choices(guess[:left], len(ids) - start)
        stands = next((k for k, (a, b) in enumerate(zip(said, guess[:left], strict=False)) if a != b), len(said) - 1)
        steps.append(said[: stands + 1])
        ids, guess = ids + said[: stands + 1], said[stands + 1 :] + guess[len(said) :]
    return steps


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_are_those_of_jacobi_iterations_without_a_cache(pair: TinyPair, temperature: float) -> None:
    decoder = SpeculativeDecoder(pair.target, LastPassDrafter(window=6), "fixed", strict=True)
    several = 0
    for prompt in ("x = ", "1, 2, 1, 2, 1,", "aaaa"):
        made = decoder.generate(
            pair.ids(prompt), max_new_tokens=30, temperature=temperature, top_k=0, seed=SEED, eos_token_id=None
        )
        seed = SEED if temperature else None
        wanted = jacobi(pair.target, pair.ids(prompt)[0].tolist(), 6, 30, seed)
        assert [step.tokens[0].tolist() for step in made.steps] == wanted
        several += sum(len(step) > 1 for step in wanted)
    assert several > 5, "no draft of a last pass ever stood"


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.no_grad()
def test_a_session_is_told_what_the_target_says_after_a_wrong_token(
    pair: TinyPair, rule: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each row, in each step: after the drafted tokens before it, whoever drafted them."""
    told: list[list[list[int]]] = []
    drafted: list[tuple[list[list[int]], torch.Tensor]] = []
    draft = AgreeableSession.draft

    def noted(self: AgreeableSession, *arguments: Any) -> Proposal:
        proposal = draft(self, *arguments)
        drafted.append(([list(row.tokens) for row in self.text.rows], proposal.tokens.clone()))
        return proposal

    monkeypatch.setattr(AgreeableSession, "draft", noted)
    monkeypatch.setattr(
        AgreeableSession, "passed", lambda _, chosen: told.append([list(row) for row in chosen]), raising=False
    )
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0.5), "fixed:5", rule=rule, strict=True)
    made = decoder.generate(
        pair.ids("x = "), max_new_tokens=24, temperature=temperature, top_k=0, seed=SEED, eos_token_id=None
    )
    assert len(told) == len(drafted) == len(made.steps)
    noise = GumbelNoise(SEED, 0, pair.target.config.vocab_size, torch.device("cpu")).at(0, 40)
    said = 0
    for step, (texts, tokens), chosen in zip(made.steps, drafted, told, strict=True):
        verified, after = int(step.verify_length), int(step.num_accepted) + 1
        ids = torch.tensor([[*texts[0], *tokens[0, :verified].tolist()]])
        logits = pair.target(ids, use_cache=False).logits[0, len(texts[0]) - 1 :]
        if temperature and rule == "coupled":
            logits = logits + noise[step.position : step.position + verified + 1]
        assert chosen == [logits.argmax(dim=-1)[after:].tolist()]
        said += len(chosen[0])
    assert said > 10


class InTurn(Policy):
    """Another source first, then the last pass, as much as it has."""

    wants = frozenset({Feature.SOURCE_OFFER})

    def select(self, state: State, context: Context) -> Plan:
        offers = context[Feature.SOURCE_OFFER][:, 1]
        source = (offers > 0).long()
        return Plan(torch.where(source == 1, offers.long() + 1, 5), source)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_beside_another_source_it_drafts_what_passes_over_its_drafts_said(pair: TinyPair, temperature: float) -> None:
    options = {"max_new_tokens": 30, "temperature": temperature, "top_k": 0, "seed": SEED, "eos_token_id": None}
    sources: list[Drafter] = [pair.agreeable(0.5), LastPassDrafter(repeat=0)]
    decoder = SpeculativeDecoder(pair.target, sources, InTurn(), strict=True)
    prompts = [pair.ids(prompt) for prompt in ("x = ", "1, 2, 1, 2, 1,", "aaaa")]
    made = decoder.generate(prompts, batch_size=2, **options)
    plain = decoder.generate(prompts, batch_size=1, policy="fixed:1", **options)
    assert [one.tokens.tolist() for one in made] == [one.tokens.tolist() for one in plain]
    ours = [step for one in made for step in one.steps if int(step.source) == 1]
    assert len(ours) > 5
    assert sum(int(step.num_accepted) for step in ours) > 0


def test_alone_without_repeats_it_drafts_nothing(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, LastPassDrafter(repeat=0), "fixed", strict=True)
    made = decoder.generate(pair.ids("x = "), max_new_tokens=8, temperature=0, eos_token_id=None)
    assert [int(step.draft_length) for step in made.steps] == [0] * 7


def test_sizes_and_unfit_options() -> None:
    drafter = LastPassDrafter(window=40)
    assert (drafter.trained_block_size, drafter.max_block_size) == (41, 41)
    assert LastPassDrafter().max_block_size == 32
    assert LastPassDrafter.depends_on_steps
    for options in ({"window": 0}, {"repeat": -1}):
        with pytest.raises(ValueError, match="window >= 1 and repeat >= 0"):
            LastPassDrafter(**options)
