"""Logits processors under speculation: those that keep state are rolled back, or refused before any text is wrong."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    SynthIDTextWatermarkingConfig,
    TopKLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation import logits_process

from bpkit import SpeculativeDecoder
from bpkit.decode.rollback import PREFIX_CONSTRAINED, PREFIX_FREE, STATEFUL, STATELESS
from bpkit.decode.visible_state import VisibleState
from bpkit.testing import TinyPair

PROMPT = "def f(a, b):\n    return "
COUNT = 24


@pytest.fixture
def decoder(pair: TinyPair) -> SpeculativeDecoder:
    return SpeculativeDecoder(pair.target, pair.agreeable(0.3), "fixed:5", tokenizer=pair.tokenizer, strict=True)


def drafters(pair: TinyPair) -> list[Any]:
    return [pair.agreeable(0.3), pair.block_diffusion(), pair.autoregressive(), "ngram"]


class Counting(LogitsProcessor):
    """Forbids by its count of calls, not by tokens."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores[:, self.calls % 2 :: 2] = -torch.inf
        return scores


class Rolling(Counting):
    def snapshot(self) -> int:
        return self.calls

    def restore(self, state: int) -> None:
        self.calls = state


class Late(Counting):
    """Changes after a few tokens only."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, scores) if input_ids.shape[1] > 35 else scores


class Grammar(LogitsProcessor):
    """A matcher as compiled grammars have one: it is told of each token once, and fails on one that it had forbidden.

    Digits and letters take turns, and only a letter may be followed by the end.
    """

    def __init__(self, pair: TinyPair) -> None:
        self.end = int(pair.tokenizer.eos_token_id)
        self.digits = pair.ids("0123456789")[0]
        self.letters = pair.ids("abcdefghij")[0]
        self.started, self.wants_digit, self.over = False, True, False

    def accept(self, token: int) -> None:
        assert not self.over, "asked about what follows the end"
        if token == self.end and not self.wants_digit:
            raise AssertionError("a forbidden end")
        assert token == self.end or token in (self.digits if self.wants_digit else self.letters), "a forbidden token"
        self.over, self.wants_digit = token == self.end, not self.wants_digit

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.started:
            self.accept(int(input_ids[0, -1]))
        self.started = True
        mask = torch.full_like(scores, -torch.inf)
        mask[:, self.digits if self.wants_digit else self.letters] = 0
        if self.wants_digit:
            mask[:, self.end] = 0
        return scores + mask

    def snapshot(self) -> tuple[bool, bool, bool]:
        return self.started, self.wants_digit, self.over

    def restore(self, state: tuple[bool, bool, bool]) -> None:
        self.started, self.wants_digit, self.over = state


def plain(pair: TinyPair, processor: Any, **options: Any) -> Tensor:
    made: Tensor = pair.target.generate(
        pair.ids(PROMPT),
        do_sample=False,
        max_new_tokens=COUNT,
        logits_processor=LogitsProcessorList([processor]),
        **options,
    )
    return made


# Rolled back.


@pytest.mark.parametrize("which", range(4))
def test_a_processor_that_can_be_rolled_back_gives_the_text_of_plain_decoding(pair: TinyPair, which: int) -> None:
    theirs, ours = Rolling(), Rolling()
    decoder = SpeculativeDecoder(pair.target, drafters(pair)[which], "fixed:5", tokenizer=pair.tokenizer)
    for _ in range(2):  # the second begins with the state that the first left, as in plain decoding
        wanted = plain(pair, theirs, eos_token_id=None)
        processors = LogitsProcessorList([ours])
        made = decoder.generate(
            PROMPT, temperature=0, max_new_tokens=COUNT, logits_processor=processors, eos_token_id=None
        )
        assert made.sequences.equal(wanted)
        assert ours.calls == theirs.calls


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("sampled", [False, True])
def test_a_grammar_is_told_only_what_it_allows(pair: TinyPair, which: int, sampled: bool) -> None:
    decoder = SpeculativeDecoder(pair.target, drafters(pair)[which], "fixed:6", tokenizer=pair.tokenizer, strict=True)
    for seed in range(3):
        options: dict[str, Any] = {"temperature": 1.3 * sampled, "max_new_tokens": COUNT, "seed": seed}
        made = decoder.generate(PROMPT, logits_processor=LogitsProcessorList([Grammar(pair)]), **options)
        if not sampled:
            assert made.sequences.equal(plain(pair, Grammar(pair)))
        one = decoder.with_policy("fixed:1").generate(
            PROMPT, logits_processor=LogitsProcessorList([Grammar(pair)]), **options
        )
        assert made.tokens.equal(one.tokens)


def test_one_processor_serves_two_runs_in_turns(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    wanted = plain(pair, Rolling(), eos_token_id=None)
    shared = LogitsProcessorList([Rolling()])
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": COUNT, "eos_token_id": None}
    runs = [decoder.run(PROMPT, logits_processor=shared, **options) for _ in range(2)]
    for _ in itertools.zip_longest(*runs):
        pass
    assert all(run.finish().sequences.equal(wanted) for run in runs)


# Refused.


def closure() -> Callable[[Tensor, Tensor], Tensor]:
    calls = 0

    def processor(input_ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return scores

    return processor


class WithState(LogitsProcessor):
    """What it does to its state is a function, so that one class shows many kinds of state."""

    def __init__(self, state: Any, change: Callable[[Any], object]) -> None:
        self.state, self.change = state, change

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.change(self.state)
        return scores


class OnTheClass(LogitsProcessor):
    seen: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(1)
        return scores


class Matcher:
    def __init__(self) -> None:
        self.states = {"at": [0]}

    def advance(self) -> None:
        self.states["at"][0] += 1


class Copied(Matcher):
    def __getstate__(self) -> dict[str, Any]:
        return {}


_calls = 0


def with_a_global(input_ids: Tensor, scores: Tensor) -> Tensor:
    global _calls
    _calls += 1
    return scores


CHANGED: dict[str, tuple[Callable[[], Any], str]] = {
    "a count": (Counting, "Counting keeps state: a call changed calls"),
    "a count that begins late": (Late, "Late keeps state: a call changed calls"),
    "a closure": (closure, "processor keeps state: a call changed calls"),
    "a global": (lambda: with_a_global, "with_a_global keeps state: a call changed _calls"),
    "an attribute of the class": (OnTheClass, "OnTheClass keeps state: a call changed OnTheClass.seen"),
    "a tensor": (lambda: WithState(torch.zeros(3), lambda t: t.add_(1)), "a call changed state"),
    "an object inside": (lambda: WithState(Matcher(), Matcher.advance), "a call changed state"),
    "a dictionary of lists": (lambda: WithState({1: [2]}, lambda d: d[1].append(3)), "a call changed state"),
    "an object that leaves it out when it is copied": (
        lambda: WithState(Copied(), Matcher.advance),
        "a call changed state",
    ),
    "an object of a compiled extension": (
        lambda: WithState(threading.Lock(), lambda lock: None),
        r"holds state \(lock\)",
    ),
    "an iterator": (lambda: WithState(iter([1, 2]), lambda i: None), r"holds state \(list_iterator\)"),
    "a counter of itertools": (lambda: WithState(itertools.count(), next), r"holds state \(count\)"),
    "random numbers": (lambda: WithState(torch.Generator(), lambda g: None), r"holds state \(Generator\)"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_processor_that_keeps_state_is_refused_before_any_text_is_wrong(
    pair: TinyPair, decoder: SpeculativeDecoder, name: str
) -> None:
    make, sentence = CHANGED[name]
    seen: list[int] = []
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": COUNT, "eos_token_id": None}
    with pytest.raises(ValueError, match=sentence) as caught:  # noqa: PT012
        for record in decoder.run(PROMPT, logits_processor=LogitsProcessorList([make()]), **options):
            seen += record.tokens[0].tolist()
    assert "set `stateless = True` on it" in str(caught.value)
    assert "snapshot() and restore(state)" in str(caught.value)
    right = plain(pair, make(), eos_token_id=None)[0, pair.ids(PROMPT).shape[1] :].tolist()
    assert seen == right[: len(seen)]
    assert len(seen) < COUNT


def test_a_function_for_allowed_tokens_that_keeps_state_is_refused(decoder: SpeculativeDecoder) -> None:
    seen: list[int] = []

    def allowed(batch: int, ids: Tensor) -> list[int]:
        seen.append(1)
        return [len(seen) % 90]

    with pytest.raises(ValueError, match="allowed keeps state: a call changed seen"):
        decoder.generate(PROMPT, temperature=0, max_new_tokens=8, prefix_allowed_tokens_fn=allowed)


def test_a_method_for_allowed_tokens_may_belong_to_what_can_be_rolled_back(pair: TinyPair) -> None:
    class Turns:
        def __init__(self) -> None:
            self.calls = 0

        def allowed(self, batch: int, ids: Tensor) -> list[int]:
            self.calls += 1
            return [self.calls % 50, (self.calls * 7) % 50]

    class Rolling(Turns):
        def snapshot(self) -> int:
            return self.calls

        def restore(self, state: int) -> None:
            self.calls = state

    options: dict[str, Any] = {"max_new_tokens": COUNT, "eos_token_id": None}
    ids = pair.ids(PROMPT)
    wanted = pair.target.generate(ids, do_sample=False, prefix_allowed_tokens_fn=Turns().allowed, **options)
    decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:5")
    made = decoder.generate(ids, temperature=0, prefix_allowed_tokens_fn=Rolling().allowed, **options)
    assert made.sequences.equal(wanted)
    with pytest.raises(ValueError, match=r"allowed keeps state: a call changed self\.calls"):
        decoder.generate(ids, temperature=0, prefix_allowed_tokens_fn=Turns().allowed, **options)


# Served.


def test_a_processor_that_says_that_it_is_stateless_is_believed(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    class Memo(LogitsProcessor):
        """Remembers what it would compute again."""

        stateless = True

        def __init__(self) -> None:
            self.memo: dict[int, int] = {}

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, self.memo.setdefault(int(input_ids.sum()), int(input_ids.sum()) % 3) :: 3] = -torch.inf
            return scores

    made = decoder.generate(PROMPT, temperature=0, max_new_tokens=COUNT, logits_processor=LogitsProcessorList([Memo()]))
    assert made.sequences.equal(plain(pair, Memo()))


def test_plain_state_that_no_call_changes_is_served(pair: TinyPair, decoder: SpeculativeDecoder) -> None:
    shift = 3

    class Pure(TopKLogitsWarper):
        table: dict[str, list[int]] = {"a": [1, 2]}

        def __init__(self) -> None:
            super().__init__(30)
            self.weights, self.nested = torch.ones(3), {"x": (1, [2.5, {"y"}])}
            self.matcher, self.tokenizer = Matcher(), pair.tokenizer

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, int(input_ids[0, -1]) % shift :: shift] = -torch.inf
            made: Tensor = super().__call__(input_ids, scores)
            return made

    made = decoder.generate(PROMPT, temperature=0, max_new_tokens=COUNT, logits_processor=LogitsProcessorList([Pure()]))
    assert made.sequences.equal(plain(pair, Pure()))


def test_a_constraint_is_never_asked_about_what_it_forbids(pair: TinyPair) -> None:
    """An n-gram drafter knows nothing of it, and a function without an answer ends the generation."""
    ids = pair.ids(PROMPT)
    start = ids.shape[1]
    cycle = ids[0, -6:].tolist()

    def allowed(batch: int, sent: Tensor) -> list[int]:
        made = sent[start:].tolist()
        follows = [cycle[i % 6] + (i % 4 == 3) for i in range(len(made) + 1)]
        return follows[-1:] if made == follows[:-1] else []

    decoder = SpeculativeDecoder(pair.target, "ngram", "fixed:6", tokenizer=pair.tokenizer)
    options: dict[str, Any] = {"max_new_tokens": COUNT, "prefix_allowed_tokens_fn": allowed, "eos_token_id": None}
    made = decoder.generate(ids, temperature=0, **options)
    assert made.sequences.equal(pair.target.generate(ids, do_sample=False, **options))
    assert any(int(step.verify_length) > int(step.num_accepted) for step in made.steps)


@pytest.mark.parametrize("seeding_scheme", ["lefthash", "selfhash"])
def test_a_watermark_that_depends_on_the_tokens_alone_is_served(
    pair: TinyPair, decoder: SpeculativeDecoder, seeding_scheme: str
) -> None:
    mark = WatermarkingConfig(bias=4.0, context_width=2, seeding_scheme=seeding_scheme)
    options = {"max_new_tokens": 12, "watermarking_config": mark}
    wanted = pair.target.generate(pair.ids(PROMPT), do_sample=False, **options)
    assert not wanted.equal(pair.target.generate(pair.ids(PROMPT), do_sample=False, max_new_tokens=12))
    assert decoder.generate(PROMPT, temperature=0, **options).sequences.equal(wanted)


def test_a_watermark_that_keeps_state_is_refused(decoder: SpeculativeDecoder) -> None:
    mark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3], sampling_table_size=64)
    with pytest.raises(ValueError, match="watermarking_config: SynthID keeps state"):
        decoder.generate(PROMPT, max_new_tokens=4, watermarking_config=mark)
    processor = mark.construct_processor(97, "cpu")
    with pytest.raises(ValueError, match="SynthIDTextWatermarkLogitsProcessor keeps state from token to token"):
        decoder.generate(PROMPT, max_new_tokens=4, logits_processor=LogitsProcessorList([processor]))


def test_every_processor_of_transformers_is_known() -> None:
    found = {
        kind
        for kind in vars(logits_process).values()
        if isinstance(kind, type) and issubclass(kind, LogitsProcessor) and kind is not LogitsProcessor
    }
    assert found == PREFIX_FREE | STATELESS | STATEFUL | {PREFIX_CONSTRAINED}
    assert len(found) == len(PREFIX_FREE) + len(STATELESS) + len(STATEFUL) + 1


def test_what_holds_too_much_to_be_watched_is_refused() -> None:
    held = WithState([Matcher() for _ in range(20_000)], len)
    opaque = VisibleState(held).opaque
    assert opaque is not None
    assert "more than 20000 objects" in opaque
    assert VisibleState(WithState(list(range(100_000)), len)).opaque is None, "plain numbers are one object"
