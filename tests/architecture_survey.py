"""Which architectures of transformers are served, found by decoding with tiny models.

`python -m tests.architecture_survey` writes the lists of docs/models.md. The tests check them, all of them where
BPKIT_ALL_ARCHITECTURES is set.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bpkit import SpeculativeDecoder
from bpkit.decode.drafter import EachRow, GoOn, Proposal
from bpkit.decode.sampling import Draw
from bpkit.decode.serving import session_class
from bpkit.decode.text import RowText, RunningText
from bpkit.types import NGRAM, Feature, work_of
from tests.tiny_architectures import model_types, tiny_causal_lm

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
TOGETHER, CROPPED, SNAPSHOTS, REFUSED, UNTRIED = "together", "cropped", "snapshots", "refused", "not tried"
PROMPT = torch.tensor([[5, 9, 13, 17, 5, 9, 13, 17, 5, 9, 13, 21, 22, 5, 9, 13, 17, 5, 9, 30, 31, 5, 9, 13]])
NEW_TOKENS = 20
LENGTHS = (24, 1, 11)
"""Of prompts that run beside each other."""


class ScriptedDrafter:
    """Drafts a text that it was told, but for the output positions at which it is wrong."""

    kind, name, work = NGRAM, "scripted", work_of(NGRAM)
    provides = frozenset({Feature.DRAFT_TOKENS})
    feature_layers: tuple[int, ...] = ()
    trained_block_size, max_block_size = 4, 16

    def __init__(self, text: list[int], prompt_length: int, wrong: Collection[int], vocab_size: int) -> None:
        self.text, self.prompt_length, self.wrong, self.vocab_size = text, prompt_length, wrong, vocab_size

    def begin(self, text: RunningText) -> EachRow:
        return EachRow(text, partial(ScriptedSession, self))


class ScriptedSession:
    def __init__(self, drafter: ScriptedDrafter, text: RowText) -> None:
        self.drafter, self.text = drafter, text

    def advance(self, features: Tensor | None) -> None:
        """The text knows."""

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None) -> Proposal:
        told, begin = self.drafter, self.text.position
        right = told.text[begin : begin + block_size - 1]
        tokens = [(token + (begin + i in told.wrong)) % told.vocab_size for i, token in enumerate(right)]
        return Proposal(torch.tensor([tokens], dtype=torch.long), None, None, [len(tokens)])


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture."""

    how: str
    reason: str = ""


def greedy(model: PreTrainedModel, prompt: Tensor, count: int) -> list[int]:
    """The output of transformers' own greedy decoding."""
    output: Tensor = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [int(token) for token in output[0, prompt.shape[1] :]]


def survey(model_type: str) -> Outcome:
    """Decode with a tiny model of a type. AssertionError if the text is not plain decoding's."""
    try:
        model = tiny_causal_lm(model_type)
        expected = greedy(model, PROMPT, NEW_TOKENS)
    except Exception as error:  # of whatever its config or plain decoding finds wrong
        return Outcome(UNTRIED, f"{type(error).__name__}: {error}")
    wrong = {position for position in range(NEW_TOKENS) if position * position % 7 == 2}
    drafter = ScriptedDrafter(expected, PROMPT.shape[1], wrong, model.config.get_text_config().vocab_size)
    try:
        decoder = SpeculativeDecoder(model, drafter, "fixed:4")
    except ValueError as error:
        return Outcome(REFUSED, str(error))
    for decoding in (decoder, decoder.with_policy("fixed:4", "ngram")):
        found = decoding.generate(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0, eos_token_id=None)
        assert found.tokens[0].tolist() == expected, f"{model_type} with drafter {decoding.drafter.name}"
    prompts = [PROMPT[:, :length] for length in LENGTHS]
    many = decoder.with_policy("fixed:4", "ngram").generate(
        prompts, batch_size=2, max_new_tokens=NEW_TOKENS, temperature=0, eos_token_id=None
    )
    for prompt, found in zip(prompts, many, strict=True):
        assert found.tokens[0].tolist() == greedy(model, prompt, NEW_TOKENS), f"{model_type} beside other rows"
    if session_class(model).shares_passes:
        return Outcome(TOGETHER)
    return Outcome(SNAPSHOTS if decoder.spec.stateful else CROPPED)


def short_reason(message: str) -> str:
    """A refusal without the target's name and without figures."""
    reason = message.partition("speculatively: ")[2].rpartition("; use")[0]
    return re.sub(r" \(.*\)$", "", reason)


def architecture(model_type: str) -> str:
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def lists(found: dict[str, Outcome]) -> str:
    """The part of the page that says what was found."""

    def names(how: str) -> list[str]:
        return sorted({architecture(name) for name, outcome in found.items() if outcome.how == how}, key=str.lower)

    def text(how: str) -> str:
        return ", ".join(f"`{name}`" for name in names(how))

    reasons: dict[str, list[str]] = {}
    for name, outcome in found.items():
        if outcome.how == REFUSED:
            reasons.setdefault(short_reason(outcome.reason), []).append(architecture(name))
    rows = [
        f"| {reason} | {', '.join(f'`{name}`' for name in sorted(set(those), key=str.lower))} |"
        for reason, those in sorted(reasons.items())
    ]
    return "\n".join(
        [
            BEGIN,
            f"With transformers {transformers.__version__}, which has {len(found)} types of causal language models.",
            "",
            f"**Rows share passes** ({len(names(TOGETHER))}): {text(TOGETHER)}.",
            "",
            f"**Row by row, by cropping the cache** ({len(names(CROPPED))}): {text(CROPPED)}.",
            "",
            f"**Row by row, with snapshots** ({len(names(SNAPSHOTS))}): {text(SNAPSHOTS)}.",
            "",
            f"**Refused** ({len(names(REFUSED))}):",
            "",
            "| why | architectures |",
            "|---|---|",
            *rows,
            "",
            f"**Not tried** ({len(names(UNTRIED))}), because they have no tiny form that decodes text alone (they need "
            f"images, sound or several code books, or a package that we do not install): {text(UNTRIED)}. They go the "
            "same way as the others when a decoder is made.",
            END,
        ]
    )


def on_page(page: str) -> dict[str, str]:
    """Architecture -> how it fares, as the page says."""
    part = page[page.index(BEGIN) : page.index(END)]
    found: dict[str, str] = {}
    for title, how in (
        ("Rows share passes", TOGETHER),
        ("Row by row, by cropping", CROPPED),
        ("Row by row, with snapshots", SNAPSHOTS),
        ("Refused", REFUSED),
        ("Not tried", UNTRIED),
    ):
        section = part[part.index(f"**{title}") :].partition("\n**")[0]
        found |= dict.fromkeys(re.findall(r"`(\w+)`", section), how)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, Outcome] = {}
    for name in model_types():
        found[name] = survey(name)
        print(f"{name:28} {found[name].how:10} {found[name].reason[:160]}", file=sys.stderr, flush=True)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page[: page.index(BEGIN)] + lists(found) + page[page.index(END) + len(END) :], encoding="utf-8")


if __name__ == "__main__":
    main()
