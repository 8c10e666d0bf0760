"""After every step, target and drafter remember exactly what was decided: no rejected token, no gap, no anchor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bpkit import Context, Draft, Policy, SpeculativeDecoder
from bpkit.decode.drafter import Drafter, DrafterSession, GoOn, Proposal
from bpkit.decode.rows import Rows
from bpkit.decode.sampling import Draw, Processors, Sampler, Samplers
from bpkit.decode.text import RowText, RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter, AutoregressiveSession
from bpkit.draft.block_diffusion import BlockDiffusionSession
from bpkit.draft.ngram import NgramDrafter
from bpkit.policy import State
from bpkit.testing import TinyPair
from bpkit.types import Record, Step

CLOSE = 1e-4
PROMPT = "def f(a, b):"


class Script(Policy):
    """Block sizes and kept tokens from lists that are walked round and round."""

    wants = frozenset()

    def __init__(self, sizes: list[int], keeps: list[int] | None = None) -> None:
        super().__init__()
        self.sizes, self.keeps = sizes, keeps or [99]

    def begin(self, context: Context) -> State:
        return {"turn": context.full(-1)}

    def select(self, state: State, context: Context) -> Tensor:
        state["turn"] = state["turn"] + 1
        return context.full(self.sizes[int(state["turn"]) % len(self.sizes)])

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return draft.full(self.keeps[int(state["turn"]) % len(self.keeps)]).minimum(draft.draft_length)


class Watched:
    """A drafter that keeps the sessions that it begins, every draft of theirs, and how often its model was called."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.sessions: list[DrafterSession] = []
        self.drafts: list[tuple[int, Proposal]] = []
        self.advanced: list[tuple[Tensor, Tensor | None]] = []
        """What was appended to the text, and features of what was read to decide it, [1, count, ...] each."""
        for name in ("name", "kind", "trained_block_size", "max_block_size", "feature_layers", "provides", "work"):
            setattr(self, name, getattr(drafter, name))

    def begin(self, text: RunningText) -> DrafterSession:
        self.sessions.append(self.drafter.begin(text))
        return WatchedSession(self, text)


class WatchedSession:
    def __init__(self, watched: Watched, text: RunningText) -> None:
        self.watched, self.text = watched, text
        self.keep, self.join = watched.sessions[-1].keep, watched.sessions[-1].join

    def advance(self, features: Sequence[Tensor] | None) -> None:
        (count,) = self.text.counts
        self.watched.advanced.append((self.text.newest[:, :count], None if features is None else features[0][None]))
        self.watched.sessions[-1].advance(features)

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        proposal = self.watched.sessions[-1].draft(block_size, draw, go_on)
        self.watched.drafts.append((block_size[0], proposal))
        return proposal


class Opened:
    """A generation that lies open: iterate over it, and look at `rows` between its steps."""

    def __init__(self, decoder: SpeculativeDecoder, prompt: Tensor, count: int, **options: Any) -> None:
        self.run = decoder.run(prompt, max_new_tokens=count, eos_token_id=None, **options)
        self.ids = prompt

    @property
    def rows(self) -> Rows:
        """The one that runs."""
        return self.run.running.rows

    def __iter__(self) -> Iterator[Record]:
        for record in self.run:
            self.ids = torch.cat([self.ids, record.tokens], dim=1)
            yield record


def keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def check_same_cache(cache: DynamicCache, wanted: DynamicCache) -> None:
    assert len(cache.layers) == len(wanted.layers) > 0
    for ours, theirs in zip(keys_and_values(cache), keys_and_values(wanted), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() < CLOSE


def fresh_cache(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


def features_of(pair: TinyPair, ids: Tensor) -> Tensor:
    """Hidden states of the drafter's layers at every position, from a fresh forward: [1, length, layers * hidden]."""
    with torch.no_grad():
        states = pair.target(ids, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([states[i + 1] for i in pair.block_diffusion().feature_layers], dim=-1)


SCRIPTS = {
    "fixed": Script([5]),
    "largest": Script([16]),
    "mixed": Script([4, 1, 16, 1, 1, 2, 9]),
    "cut short": Script([8, 3, 1, 16], [2, 0, 5]),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("drafter", ["agreeable", "block diffusion", "autoregressive", "n-gram"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_targets_cache_holds_the_decided_tokens_without_the_anchor_after_every_step(
    pair: TinyPair, script: str, drafter: str, temperature: float
) -> None:
    made_by: dict[str, Drafter | str] = {
        "agreeable": pair.agreeable(0.3),
        "block diffusion": pair.block_diffusion(),
        "autoregressive": pair.autoregressive(),
        "n-gram": "ngram",
    }
    decoder = SpeculativeDecoder(pair.target, made_by[drafter], SCRIPTS[script], strict=True)
    opened = Opened(decoder, pair.ids(PROMPT), 24, temperature=temperature, seed=1)
    records = 0
    for _ in opened:
        check_same_cache(opened.rows.target.cache(0), fresh_cache(pair.target, opened.ids[:, :-1]))
        assert opened.rows.target.held == [opened.ids.shape[1] - 1]
        records += 1
    assert records > 2
    assert opened.ids.shape[1] == pair.ids(PROMPT).shape[1] + 24


def test_the_cache_is_right_after_a_text_that_ended_inside_a_draft(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(0), "fixed:8")
    free = decoder.generate(pair.ids("x = "), max_new_tokens=12, temperature=0).tokens[0].tolist()
    end = next(token for place, token in enumerate(free) if 2 <= place <= 6 and token not in free[:place])
    output = pair.target.generate(
        pair.ids("x = "), custom_generate=decoder, max_new_tokens=12, eos_token_id=end, return_dict_in_generate=True
    )
    assert output.generation.steps[-1].verify_length > output.generation.steps[-1].num_accepted
    check_same_cache(output.past_key_values, fresh_cache(pair.target, output.sequences[:, :-1]))


def test_a_sliding_window_target_keeps_its_cache_over_rejected_tokens() -> None:
    config = Qwen3Config(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
        eos_token_id=None,
        pad_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = Qwen3ForCausalLM(config).eval()
    prompt = torch.arange(5)[None]
    wanted = target.generate(prompt, max_new_tokens=30, do_sample=False)
    drafters: list[Drafter | str] = ["ngram", AutoregressiveDrafter(target, target)]
    for drafter, policy in itertools.product(drafters, ("fixed:4", "fixed:9")):
        decoder = SpeculativeDecoder(target, drafter, policy, strict=True)
        assert decoder.generate(prompt, max_new_tokens=30, temperature=0).sequences.equal(wanted)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_block_diffusion_cache_holds_the_context_features_of_the_decided_tokens(
    pair: TinyPair, script: str
) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), SCRIPTS[script], strict=True)
    opened = Opened(decoder, pair.ids(PROMPT), 24, temperature=0)
    before, drafted_before = opened.ids, 0
    for record in opened:
        session = session_of(opened.rows.drafter)
        assert isinstance(session, BlockDiffusionSession)
        waiting = torch.cat(session.waiting[0])
        drafted = opened.ids.shape[1] - 1 - len(waiting)
        # What the drafter has read, and what waits, together are the decided tokens without the anchor.
        features = features_of(pair, opened.ids[:, :-1])
        assert (waiting - features[0, drafted:]).abs().max() < CLOSE
        assert session.slot_cache.held == [drafted]
        assert session.text.anchor.equal(opened.ids[:, -1:])
        if drafted:
            wanted = DynamicCache()
            with torch.no_grad():
                pair.drafter_model(
                    noise_embeds=pair.target.get_input_embeddings()(opened.ids[:, :1]),
                    context_hidden_states=features[:, :drafted],
                    past_key_values=wanted,
                )
            wanted.crop(-1)
            check_same_cache(session.slot_cache.row(0), wanted)
        drew = isinstance(record, Step) and int(record.block_size) > 1
        assert drafted == (before.shape[1] - 1 if drew else drafted_before)
        before, drafted_before = opened.ids, drafted
    assert session_of(opened.rows.drafter).slot_cache.held[0] > 0


def counted_calls(model: PreTrainedModel) -> tuple[list[int], Any]:
    """A list that grows by one with each forward of a model, and the handle that ends it."""
    calls: list[int] = []
    return calls, model.register_forward_pre_hook(lambda *_: calls.append(1))


def test_block_size_1_makes_no_drafter_call_and_a_block_makes_one(pair: TinyPair) -> None:
    calls, handle = counted_calls(pair.drafter_model)
    try:
        decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), Script([1]), strict=True)
        made = decoder.generate(pair.ids(PROMPT), max_new_tokens=12, temperature=0)
        assert calls == []
        assert [int(step.draft_length) for step in made.steps] == [0] * 11
        made = decoder.with_policy(Script([1, 4, 1, 1, 16])).generate(
            pair.ids(PROMPT), max_new_tokens=24, temperature=0
        )
        assert len(calls) == sum(int(step.block_size) > 1 for step in made.steps) > 0
    finally:
        handle.remove()


def test_an_autoregressive_drafter_is_called_once_for_each_drafted_token(pair: TinyPair) -> None:
    calls, handle = counted_calls(pair.assistant)
    try:
        decoder = SpeculativeDecoder(pair.target, pair.autoregressive(), Script([1, 4, 1, 7]), strict=True)
        made = decoder.generate(pair.ids(PROMPT), max_new_tokens=24, temperature=0)
        assert len(calls) == sum(int(step.draft_length) for step in made.steps) > 0
    finally:
        handle.remove()


def test_drafting_resumes_after_steps_of_size_1_as_if_it_had_never_paused(pair: TinyPair) -> None:
    # The same decided tokens, read one by one by a drafter that drafted all along, and at once by one that paused.
    ids = pair.ids("def f(a, b):\n    return a + b")
    features, cut = features_of(pair, ids), 12
    text = row_text(ids[:, :cut])
    steady, pausing = pair.block_diffusion().begin(text), pair.block_diffusion().begin(text)
    append(text, ids[:, cut : cut + 1])
    for session in (steady, pausing):
        session.advance([features[0, :cut]])
    with torch.inference_mode():
        for end in range(cut + 1, ids.shape[1]):
            steady.draft([1 + end % 5 + 1], no_noise(text), None)
            append(text, ids[:, end : end + 1])
            for session in (steady, pausing):
                session.advance([features[0, end - 1 : end]])
        one, other = (session.draft([8], no_noise(text), None) for session in (steady, pausing))
    assert_same_proposal(one, other)
    check_same_cache(steady.slot_cache.row(0), pausing.slot_cache.row(0))


def session_of(timed: Any) -> Any:
    """The session of the only source, inside its timing."""
    (session,) = timed.session.sessions
    return session


def row_text(prompt: Tensor) -> RunningText:
    """The text of one row, prompt int64 [1, length]."""
    return RunningText([RowText(prompt, 200)])


def append(text: RunningText, tokens: Tensor) -> None:
    """Append tokens int64 [1, count] to the text of one row."""
    text.append(tokens, tokens[:, -1:], tokens.tolist())


def no_noise(text: RunningText) -> Draw:
    return Draw(Samplers([Sampler(row, Processors(LogitsProcessorList()), None) for row in text.rows]))


def assert_same_proposal(one: Proposal, other: Proposal) -> None:
    assert one.tokens.equal(other.tokens)
    assert one.scores is not None
    assert other.scores is not None
    assert (one.scores - other.scores).abs().max() < CLOSE
    assert one.hidden is not None
    assert other.hidden is not None
    assert (one.hidden - other.hidden).abs().max() < CLOSE


@pytest.mark.parametrize("kind", ["block diffusion", "autoregressive", "n-gram"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_draft_equals_that_of_a_fresh_session_given_the_same_tokens(
    pair: TinyPair, kind: str, script: str
) -> None:
    drafter: Drafter
    if kind == "block diffusion":
        drafter = pair.block_diffusion()
    elif kind == "autoregressive":
        drafter = pair.autoregressive()
    else:
        drafter = NgramDrafter()
    watched = Watched(drafter)
    decoder = SpeculativeDecoder(pair.target, watched, SCRIPTS[script], strict=True)  # type: ignore[arg-type]
    opened = Opened(decoder, pair.ids("1, 2, 3, 1, 2, 3, 1, "), 30, temperature=0)
    ids, compared = opened.ids, 0
    for record in opened:
        if len(watched.drafts) > compared:
            block_size, proposal = watched.drafts[compared]
            text = row_text(ids[:, :-1])
            fresh = drafter.begin(text)
            append(text, ids[:, -1:])
            fresh.advance([features_of(pair, ids[:, :-1])[0]] if drafter.feature_layers else None)
            with torch.inference_mode():
                again = fresh.draft([block_size], no_noise(text), None)
            if kind == "n-gram":
                assert proposal.tokens.equal(again.tokens)
            else:
                assert_same_proposal(proposal, again)
            compared += 1
        ids = torch.cat([ids, record.tokens], dim=1)
    assert compared > 2
    assert ids.equal(opened.ids)


def test_the_autoregressive_cache_holds_only_tokens_that_stand(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.autoregressive(), SCRIPTS["cut short"], strict=True)
    opened = Opened(decoder, pair.ids(PROMPT), 30, temperature=0)
    for _ in opened:
        session = session_of(opened.rows.drafter)
        assert isinstance(session, AutoregressiveSession)
        (read,) = session.held
        assert session.reader.held == [read]
        assert read < opened.ids.shape[1]
        if read:
            check_same_cache(session.reader.cache(0), fresh_cache(pair.assistant, opened.ids[:, :read]))
    assert isinstance(session, AutoregressiveSession)
    assert session.held[0] > 20


def test_features_given_to_the_drafter_are_those_of_the_tokens_that_were_read(pair: TinyPair) -> None:
    watched = Watched(pair.block_diffusion())
    decoder = SpeculativeDecoder(pair.target, watched, SCRIPTS["cut short"], strict=True)  # type: ignore[arg-type]
    made = decoder.generate(pair.ids(PROMPT), max_new_tokens=24, temperature=0)
    tokens = torch.cat([pair.ids(PROMPT), *(t for t, _ in watched.advanced)], dim=1)
    features = torch.cat([f for _, f in watched.advanced if f is not None], dim=1)
    assert tokens.equal(made.sequences)
    assert (features - features_of(pair, made.sequences[:, :-1])).abs().max() < CLOSE


def test_a_generation_can_be_left_after_any_step(pair: TinyPair) -> None:
    decoder = SpeculativeDecoder(pair.target, pair.agreeable(), "fixed:4")
    whole = decoder.generate(pair.ids(PROMPT), max_new_tokens=20, temperature=0).tokens
    run = decoder.run(pair.ids(PROMPT), max_new_tokens=20, temperature=0)
    some = [next(run).tokens for _ in range(3)]
    part = torch.cat(some, dim=1)
    assert part.equal(whole[:, : part.shape[1]])
    assert 3 <= part.shape[1] < 20
