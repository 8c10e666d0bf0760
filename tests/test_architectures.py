"""What options of `generate` do to the text is the same on every architecture and with every drafter.

Plain decoding is transformers' own `generate` with the same options. At temperature 1 it is handed the noise as one
more logits processor, which makes its greedy choice the sampled one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from bpkit import SpeculativeDecoder
from bpkit.decode.drafter import Drafter, DrafterSession, GoOn, Proposal
from bpkit.decode.noise import GumbelNoise
from bpkit.decode.parts import new_layer
from bpkit.decode.result import Generation
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.config import HierarchyConfig
from bpkit.draft.early_exit import EarlyExitDrafter
from bpkit.draft.ensemble import EnsembleDrafter
from bpkit.draft.hierarchy import HierarchyDrafter
from bpkit.draft.last_pass import LastPassDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.registry.discovery import registry
from tests.tiny_architectures import REPEATING, VOCABULARY, WINDOW, disturbed, repeating_causal_lm, tiny_dflash

if TYPE_CHECKING:
    from tests.conftest import PlainDecoding

TABLE = [name for name in REPEATING if name != "qwen3_next"]
"""One hybrid is enough here; what their states do is tried elsewhere."""
COUNT = 20
SEED = 5
BLOCK_SIZE = 7
WRONG_EVERY = 4
PROMPT = (3, 50, 30, 31, 32, 33, 34, 30, 31, 32, 33, 34, 30, 31)
SAMPLING: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 0})


@dataclass(frozen=True)
class Free:
    """The text that plain decoding gives without any option, to choose options by."""

    tokens: list[int]

    def new(self, place: int) -> int:
        """The first position that has a token for the first time and is `place` after a wrong drafted token."""
        found = (i for i, token in enumerate(self.tokens) if token not in self.tokens[:i])
        return next(i for i in found if i > 0 and i % WRONG_EVERY == place)

    @property
    def absent(self) -> int:
        """A token that the text does not have."""
        return next(token for token in range(VOCABULARY) if token not in self.tokens)

    @property
    def inside(self) -> int:
        """One with right drafted tokens before it, at it and after it."""
        return self.new(2)

    @property
    def instead(self) -> int:
        """One at which a wrong token is drafted."""
        return self.new(0)

    @property
    def later(self) -> int:
        """The first position after `inside` that has a token for the first time."""
        return next(i for i, token in enumerate(self.tokens) if i > self.inside and token not in self.tokens[:i])


@dataclass(frozen=True)
class Case:
    """One case of the table: options of `generate`, and whether they did to the text what they are there for.

    A case whose event does not happen would show nothing.

    Attributes:
        long: the text is long enough for drafts that are accepted and drafts that are rejected.
        each: of every drafter there must be both; the n-grams of some cases have no chance.
        cut: the text ends inside a draft.
    """

    name: str
    options: Callable[[Free], dict[str, Any]]
    happened: Callable[[Free, list[int]], bool]
    prompt: tuple[int, ...] = PROMPT
    long: bool = True
    each: bool = False
    cut: bool = False


def same(free: Free, tokens: list[int]) -> bool:
    return tokens == free.tokens


def other(free: Free, tokens: list[int]) -> bool:
    return tokens != free.tokens


CASES = (
    Case("no option", lambda free: {}, same, each=True),
    Case("match near the end", lambda free: {}, same, prompt=(3, 50, 12, 60, 61, 40, 60, 61, 60, 61), each=True),
    Case(
        "end token inside a draft",
        lambda free: {"eos_token_id": free.tokens[free.inside]},
        lambda free, tokens: tokens == free.tokens[: free.inside + 1],
        long=False,
        cut=True,
    ),
    Case(
        "end token instead of a drafted one",
        lambda free: {"eos_token_id": free.tokens[free.instead]},
        lambda free, tokens: tokens == free.tokens[: free.instead + 1],
        long=False,
        cut=True,
    ),
    Case(
        "several end tokens",
        lambda free: {"eos_token_id": [free.absent, free.tokens[free.later], free.tokens[free.inside]]},
        lambda free, tokens: tokens == free.tokens[: free.inside + 1],
        long=False,
        cut=True,
    ),
    Case(
        "min_new_tokens",
        lambda free: {"eos_token_id": free.tokens[free.inside], "min_new_tokens": free.inside + 6},
        lambda free, tokens: other(free, tokens) and len(tokens) >= free.inside + 6,
    ),
    Case("bad_words_ids", lambda free: {"bad_words_ids": [[free.tokens[6]], free.tokens[2:4]]}, other),
    Case("sequence_bias", lambda free: {"sequence_bias": [[free.tokens[1:3], -9.0], [[free.tokens[7]], 2.0]]}, other),
    Case("no_repeat_ngram_size", lambda free: {"no_repeat_ngram_size": 2}, other),
    Case(
        "forced_bos_token_id",
        lambda free: {"forced_bos_token_id": free.absent},
        lambda free, tokens: tokens[0] == free.absent,
        prompt=(30,),
    ),
    Case(
        "forced_eos_token_id",
        lambda free: {"forced_eos_token_id": free.absent},
        lambda free, tokens: tokens == [*free.tokens[:-1], free.absent],
    ),
    Case("suppress_tokens", lambda free: {"suppress_tokens": [free.tokens[2], free.tokens[5]]}, other),
    Case(
        "begin_suppress_tokens",
        lambda free: {"begin_suppress_tokens": [free.tokens[0]]},
        lambda free, tokens: tokens[0] != free.tokens[0],
    ),
    Case("repetition_penalty", lambda free: {"repetition_penalty": 1.4}, other),
    Case(
        "exponential_decay_length_penalty",
        lambda free: {"eos_token_id": free.absent, "exponential_decay_length_penalty": (4, 1.3)},
        lambda free, tokens: 4 < len(tokens) < COUNT and tokens[-1] == free.absent,
        long=False,
    ),
    # At least one token, as in plain decoding.
    Case("max_time", lambda free: {"max_time": 1e-9}, lambda free, tokens: tokens == free.tokens[:1], long=False),
)


class Noise(LogitsProcessor):
    """Adds the noise of each output position: whatever has the highest score then is sampled."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.noise = GumbelNoise(SEED, 0, VOCABULARY, torch.device("cpu"))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.noise.at(input_ids.shape[1] - self.prompt_length, 1)


def generated(model: PreTrainedModel, prompt: Tensor, temperature: int, **options: Any) -> list[int]:
    """The text of plain decoding."""
    noise = LogitsProcessorList([Noise(prompt.shape[1])] if temperature else [])
    ids = model.generate(prompt, max_new_tokens=COUNT, do_sample=False, logits_processor=noise, **options)
    tokens: list[int] = ids[0, prompt.shape[1] :].tolist()
    return tokens


class Informed:
    """A drafter whose tokens are replaced by those of a known text but at every fourth position of it.

    The drafter itself reads and drafts as ever; an untrained one would be right once in a hundred tokens.
    """

    def __init__(self, drafter: Drafter, text: list[int]) -> None:
        self.drafter, self.text = drafter, text
        for name in ("name", "kind", "trained_block_size", "max_block_size", "feature_layers", "provides", "work"):
            setattr(self, name, getattr(drafter, name))

    def begin(self, text: RunningText) -> DrafterSession:
        return InformedSession(self.drafter.begin(text), self.text)


class InformedSession:
    def __init__(self, session: DrafterSession, text: list[int]) -> None:
        self.session, self.text = session, text
        self.advance, self.keep, self.join = session.advance, session.keep, session.join

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        (first,) = draw.position
        proposal = self.session.draft(block_size, draw, go_on)
        tokens = proposal.tokens.clone()
        for i in range(tokens.shape[1]):
            if (first + i) % WRONG_EVERY and first + i < len(self.text):
                tokens[0, i] = self.text[first + i]
        return replace(proposal, tokens=tokens)


@dataclass
class Models:
    """A model with everything that drafts for it, made once."""

    target: PreTrainedModel
    block_diffusion: Drafter
    assistant: Drafter
    free: dict[Any, Free] = field(default_factory=dict)

    def drafters(self, text: list[int]) -> dict[str, Any]:
        return {
            "block-diffusion": Informed(self.block_diffusion, text),
            "autoregressive": self.assistant,
            "ngram": NgramDrafter(),
        }

    @functools.cached_property
    def others(self) -> dict[str, Any]:
        """Drafters that are made of the others, or of the target itself."""
        exit = EarlyExitDrafter(new_layer(self.target, -1), self.target, layer=1) if self.has_layers else None
        made = {
            "ensemble": EnsembleDrafter([self.assistant, self.assistant], self.target),
            "hierarchy": HierarchyDrafter(None, HierarchyConfig(last_pass=True)),
            "last-pass": LastPassDrafter(window=BLOCK_SIZE - 1),
        }
        return made if exit is None else {**made, "early-exit": exit}

    @property
    def has_layers(self) -> bool:
        return hasattr(self.target.get_decoder(), "layers")

    def free_text(self, prompt: tuple[int, ...], temperature: int) -> Free:
        key = (prompt, temperature)
        if key not in self.free:
            self.free[key] = Free(generated(self.target, torch.tensor([prompt]), temperature))
        return self.free[key]


@functools.cache
def models(architecture: str) -> Models:
    target = repeating_causal_lm(architecture)
    return Models(target, tiny_dflash(target), AutoregressiveDrafter(disturbed(target), target))


@dataclass
class Counts:
    """What one drafter's drafts came to: tokens accepted, steps that rejected one, and steps that got fewer than asked.

    The last step of a text is no rejection: it may have ended for another reason.
    """

    accepted: int = 0
    rejected: int = 0
    shorter: int = 0

    def add(self, made: Generation) -> None:
        for step in made.steps:
            self.accepted += int(step.num_accepted)
            self.rejected += int(step.num_accepted) < int(step.verify_length) and step is not made.steps[-1]
            self.shorter += 0 < int(step.draft_length) < BLOCK_SIZE - 1


def test_every_registered_drafter_is_in_the_table() -> None:
    llama = models("llama")
    assert {*llama.drafters([]), *llama.others} == set(registry().drafters)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
@pytest.mark.parametrize("architecture", TABLE)
def test_options_do_to_the_text_what_they_do_in_plain_decoding(architecture: str, case: Case) -> None:
    model, prompt = models(architecture), torch.tensor([case.prompt])
    counts, happened = {name: Counts() for name in registry().drafters}, 0
    for temperature in (0, 1):
        free = model.free_text(case.prompt, temperature)
        options = case.options(free)
        wanted = generated(model.target, prompt, temperature, **options)
        happened += case.happened(free, wanted)
        # After an end token the text would have gone on as it does without.
        more = model.others if case.each else {}
        for name, drafter in {**model.drafters([*wanted, *free.tokens[len(wanted) :]]), **more}.items():
            decoder = SpeculativeDecoder(model.target, drafter, f"fixed:{BLOCK_SIZE}", strict=True)
            made = decoder.generate(prompt, max_new_tokens=COUNT, seed=SEED, **SAMPLING[temperature], **options)
            assert made.tokens[0].tolist() == wanted, f"{name} at temperature {temperature} with {options}"
            counts[name].add(made)
            if case.cut and name == "block-diffusion":
                assert 0 < int(made.steps[-1].num_accepted) < int(made.steps[-1].verify_length)
    assert happened, "the options changed nothing, or not what they are there to change"
    informed, assistant, ngram = (counts[name] for name in ("block-diffusion", "autoregressive", "ngram"))
    if case.long:
        assert min(informed.accepted, assistant.accepted) >= 10
        assert informed.rejected >= 3
    if case.each:
        assert all(drafter.accepted and drafter.rejected for drafter in (informed, assistant, ngram))
        assert ngram.shorter, "no match lay so near the end that fewer tokens followed than were asked for"


@pytest.mark.parametrize("architecture", REPEATING)
def test_generate_keeps_its_caches_right(architecture: str, plain: PlainDecoding) -> None:
    """The oracle itself: with a cache, and sliding windows in it, the text is that without one."""
    model, prompt = models(architecture), torch.tensor([PROMPT])
    for temperature, seed in ((0, None), (1, SEED)):
        wanted = plain(model.target, prompt, max_new_tokens=COUNT, seed=seed)
        assert model.free_text(PROMPT, temperature).tokens == wanted.tokens


@pytest.mark.parametrize(
    ("architecture", "off"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 100}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3_text", {"sliding_window": 100}),
    ],
)
def test_windows_and_caps_of_these_models_decide_their_scores(architecture: str, off: dict[str, Any]) -> None:
    assert len(PROMPT) > WINDOW
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        capped, free = (repeating_causal_lm(architecture, **values)(ids).logits for values in ({}, off))
    assert (capped - free)[0, -1].abs().max() > 0.05
