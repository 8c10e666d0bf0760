"""Tracing one prompt: the output once, one target pass over it, and every draft that could have been made."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.decode.clock import GuardedClock, WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.drafter import Drafter
from bpkit.decode.features import OF_THE_ANCHOR
from bpkit.decode.result import Run
from bpkit.decode.timing import Stopwatch
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.prompts import Prompt
from bpkit.trace.collect.autoregressive import trace_rollouts
from bpkit.trace.collect.block_diffusion import trace_blocks
from bpkit.trace.collect.drafts import Drafts, Finished, num_accepted
from bpkit.trace.collect.pieces import HeldNoise
from bpkit.trace.collect.stepwise import trace_step_by_step
from bpkit.trace.collect.target_pass import TargetPass, target_pass
from bpkit.trace.records import DraftTable, PromptTrace
from bpkit.types import Feature

IndexedPrompt = tuple[int, Prompt]
"""A prompt and its place in the trace."""
Traces = Generator[PromptTrace, None, None]

GENERATE_WITH = 6
"""Block size that outputs are made with; it decides nothing but how fast."""
PARTS = ("generation", "target pass", "draft passes", "the rest")
"""Where the time of tracing a prompt goes."""
TOP = 64
"""First tokens whose log-probabilities are kept."""


@dataclass(frozen=True)
class TraceOptions:
    """What to trace.

    Attributes:
        block_sizes: ascending, from 2.
        max_new_tokens: output tokens at most.
        sampling: `temperature`, and `top_p`, `top_k`, `repetition_penalty` where wanted.
        seed: of the noise; None for greedy outputs.
        features: beyond those that are always kept.
    """

    block_sizes: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: Mapping[str, float] = field(default_factory=lambda: {"temperature": 0.0})
    seed: int | None = None
    features: frozenset[Feature] = frozenset()


class Tracer:
    """Traces prompts with one decoder.

    Args:
        decoder: under the coupled rule; its policy decides only how fast the outputs are made.

    Attributes:
        watch: has spent so many seconds on each of `PARTS` since it was made.

    Raises:
        ValueError: a rule, drafter or block size for which there is no exact trace, or a feature that is not there.
    """

    def __init__(self, decoder: SpeculativeDecoder, options: TraceOptions) -> None:
        if decoder.rule != "coupled":
            raise ValueError(
                "only outputs of rule 'coupled' can be traced: under 'rejection' the text depends on the policy"
            )
        drafter = decoder.drafter
        if getattr(drafter, "remembers_requests", False):
            raise ValueError(
                f"drafter {drafter.name} remembers earlier requests, so that what it drafts for a prompt depends on "
                "the prompts before it: a trace would hold for one order of prompts only. Switch its memory off to "
                "trace it, or measure it live, with `bpkit bench`, where the order of prompts is fixed"
            )
        largest = drafter.max_block_size
        if not options.block_sizes or min(options.block_sizes) < 2 or max(options.block_sizes) > largest:
            sizes = "+".join(map(str, options.block_sizes)) or "none"
            raise ValueError(
                f"block sizes to trace are 2 .. {largest} with this drafter (1 needs no trace); got {sizes}"
            )
        if Feature.DRAFT_HIDDEN in options.features - drafter.provides:
            raise ValueError(f"drafter {drafter.name} has no hidden states: leave the feature draft_hidden out")
        self.decoder, self.options = decoder, options
        self.watch = Stopwatch(GuardedClock(WallClock(decoder.target.device, wait=True)))

    @torch.inference_mode()
    def trace(self, index: int, prompt: Prompt) -> PromptTrace:
        """Trace one prompt; `index` is its place in the trace and the stream of its noise."""
        self.watch.resume()
        ids = self.decoder._ids(prompt.text).to(self.decoder.target.device)
        run = self.decoder.run(ids, stream_id=index, **generation_options(self.options))
        tokens = run.finish().tokens
        self.watch.lap("generation")
        return self.retrace(index, prompt, run, tokens)

    def traces(self, prompts: Sequence[IndexedPrompt]) -> Traces:
        """Trace one (index, prompt) after the other, here; see `bpkit.trace.collect.job.Workers`."""
        for task in prompts:
            yield self.trace(*task)

    def retrace(self, index: int, prompt: Prompt, run: Run, tokens: Tensor) -> PromptTrace:
        """Trace the output, int64 [1, output length], that a generation has or would have."""
        ids, processors = run.request.text.prompt, run.request.sampler.processors
        decoder, seed, noise = self.decoder, self.options.seed, None
        seen = target_pass(decoder.target, decoder.drafter.feature_layers, ids, tokens)
        if seed is not None:  # of every position that a draft may reach
            count = tokens.shape[1] + max(self.options.block_sizes)
            noise = HeldNoise(seed, index, count, decoder.spec.vocab_size, decoder.target.device)
        finished = Finished(
            ids=torch.cat([ids, tokens], dim=1),
            prompt_length=ids.shape[1],
            features=seen.features,
            block_sizes=self.options.block_sizes,
            processors=processors,
            vocab_size=seen.vocab_size,
            noise=noise,
            target_probabilities=None if noise is None else seen.probabilities(processors),
            keep_hidden=Feature.DRAFT_HIDDEN in self.options.features,
        )
        self.watch.lap("target pass")
        drafts = trace_drafts(decoder.drafter, finished)
        self.watch.lap("draft passes")
        log_p = seen.first_logits().float().log_softmax(dim=-1)
        top = log_p.topk(min(TOP, len(log_p)))
        trace = PromptTrace(
            index=index,
            id=prompt.id,
            domain=prompt.domain,
            max_new_tokens=self.options.max_new_tokens,
            prompt_tokens=_ints(ids[0]),
            output_tokens=_ints(tokens[0]),
            prefill_top_tokens=_ints(top.indices),
            prefill_top_log_probabilities=_floats(top.values),
            prefill_entropy=float(-(log_p.exp() * log_p.clamp(min=-1e30)).sum()),
            near_ties=_ints(seen.near_ties(processors, noise)),
            drafts=self._table(drafts, tokens[0].cpu()),
            features=self._features(seen, tokens[0]),
        )
        self.watch.lap("the rest")
        return trace

    def _features(self, seen: TargetPass, tokens: Tensor) -> dict[Feature, NDArray[np.float32]]:
        """Features of the target: of the first position, and of all that decided an output token."""
        wanted = self.options.features
        found = {Feature.PREFILL_HIDDEN: seen.last_hidden[0]}
        if Feature.PREFILL_LOGITS in wanted:
            found[Feature.PREFILL_LOGITS] = seen.first_logits()
        if Feature.LAST_HIDDEN in wanted:
            found[Feature.LAST_HIDDEN] = seen.last_hidden
        if Feature.TARGET_FEATURES in wanted and seen.features is not None:
            found[Feature.TARGET_FEATURES] = seen.features[0, -len(tokens) :]
        if Feature.ANCHOR_EMBEDDING in wanted:
            found[Feature.ANCHOR_EMBEDDING] = self.decoder.target.get_input_embeddings()(tokens)
        if wanted & OF_THE_ANCHOR:
            log_probability, entropy = seen.anchor_statistics()
            both = {Feature.ANCHOR_LOG_PROBABILITY: log_probability, Feature.ANCHOR_ENTROPY: entropy}
            found.update({name: value for name, value in both.items() if name in wanted})
        return {name: _floats(value) for name, value in found.items()}

    def _table(self, drafts: Drafts, output: Tensor) -> DraftTable:
        # What the drafter provides decides the columns, not what this prompt has: an output of one token has no drafts.
        found = {Feature.DRAFT_PROBABILITY: drafts.probability, Feature.DRAFT_ENTROPY: drafts.entropy}
        found = {name: values for name, values in found.items() if name in self.decoder.drafter.provides}
        if Feature.DRAFT_HIDDEN in self.options.features:
            nothing = drafts.probability[..., None][..., :0]
            found[Feature.DRAFT_HIDDEN] = nothing if drafts.hidden is None else drafts.hidden
        sampled = Feature.DRAFT_PROBABILITY in found and self.options.seed is not None
        return DraftTable(
            block_sizes=np.array(self.options.block_sizes, np.int32),
            draft_length=_ints(drafts.draft_length),
            num_accepted=_ints(num_accepted(drafts.tokens, output)),
            tokens=_ints(drafts.tokens),
            features={name: _floats(values) for name, values in found.items()},
            match_probability=_floats(drafts.match_probability) if sampled else None,
        )


def trace_drafts(drafter: Drafter, finished: Finished) -> Drafts:
    """All drafts of a finished output, in batches where the kind of drafter allows it.

    A subclass may draft in its own way, so that only the very classes are taken at their word.
    """
    if finished.rows == 0:
        return Drafts(finished)
    if type(drafter) is BlockDiffusionDrafter:
        # Where attention depends on places in the cache, blocks side by side do not keep it.
        windows = [layer.self_attn.sliding_window for layer in drafter.model.layers]
        windowed = drafter.model.config.is_causal or windows != [None] * len(windows)
        return trace_step_by_step(drafter, finished) if windowed else trace_blocks(drafter, finished)
    if type(drafter) is AutoregressiveDrafter:
        return trace_rollouts(drafter, finished)
    return trace_step_by_step(drafter, finished)


def _ints(values: Tensor) -> NDArray[np.int32]:
    return cast("NDArray[np.int32]", values.cpu().numpy().astype(np.int32))


def _floats(values: Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", values.float().cpu().numpy())


def generation_options(options: TraceOptions) -> dict[str, Any]:
    """The options of `generate` that a trace is made under."""
    return {"max_new_tokens": options.max_new_tokens, "seed": options.seed, **options.sampling}
