"""Tracing prompts: the output of each once, one target pass over it, and every draft that could have been made."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bpkit.decode.clock import GuardedClock, WallClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.drafter import Drafter
from bpkit.decode.products import quick_products
from bpkit.decode.result import Generation, RunMany
from bpkit.decode.sampling import Processors
from bpkit.decode.serving import session_class
from bpkit.decode.sources import sources_of, work_of_drafter
from bpkit.decode.timing import Stopwatch
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.early_exit import EarlyExitDrafter
from bpkit.prompts import Prompt
from bpkit.trace.collect.autoregressive import trace_rollouts
from bpkit.trace.collect.block_diffusion import trace_blocks
from bpkit.trace.collect.drafts import Drafts, Finished, nodes_accepted, num_accepted, ranks
from bpkit.trace.collect.pieces import HeldNoise, keep_freed_memory
from bpkit.trace.collect.stepwise import trace_step_by_step
from bpkit.trace.collect.target_pass import TargetPass, target_passes
from bpkit.trace.records import CandidateTable, DraftTable, PromptTrace
from bpkit.trace.store.joined import AnyTrace, open_trace
from bpkit.trace.store.manifest import TraceError
from bpkit.types import OF_THE_ANCHOR, Feature

IndexedPrompt = tuple[int, Prompt]
"""A prompt and its place in the trace."""
Traces = Generator[PromptTrace, None, None]

GENERATE_WITH = 4
"""Block size that outputs are made with; it decides nothing but how fast. With 8 outputs at once, one of the shipped
pair takes 0.15 s, where 3 takes 0.16, 6 takes 0.17 and plain decoding 0.21."""
TOGETHER = 4096
"""Tokens of outputs that are traced together, padding included; a longer one is traced alone."""
READ_AT_ONCE = 1024
"""Tokens of a target pass over several outputs, padding included; more leave the cache of a CPU, and are slower."""
PARTS = ("generation", "target pass", "draft passes", "the rest")
"""Where the time of tracing a prompt goes."""
MOST_CANDIDATES = 16
"""Candidates of a position that a trace holds at most."""
ROLLED_OUT = (AutoregressiveDrafter, EarlyExitDrafter)
"""Drafters of which it is known how they draft token after token, and trees level by level."""
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
        outputs_of: folder of another trace of the same prompts and settings whose outputs are taken; none are decoded.
    """

    block_sizes: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: Mapping[str, float] = field(default_factory=lambda: {"temperature": 0.0})
    seed: int | None = None
    features: frozenset[Feature] = frozenset()
    outputs_of: str | None = None


@dataclass(frozen=True)
class Output:
    """A prompt with its finished output.

    Attributes:
        index: place in the trace. ids, tokens: of prompt and output, int64 [1, length] each.
        processors: that its tokens are drawn under.
    """

    index: int
    prompt: Prompt
    ids: Tensor
    tokens: Tensor
    processors: Processors

    @property
    def length(self) -> int:
        return self.ids.shape[1] + self.tokens.shape[1]


def refuse_untraceable(decoder: SpeculativeDecoder) -> None:
    """Raise ValueError for a decoder for whose drafts, of any of its sources, there is no exact trace."""
    if decoder.rule != "coupled":
        raise ValueError(
            "only outputs of rule 'coupled' can be traced: under 'rejection' the text depends on the policy"
        )
    if decoder.drafter_device is not None:
        raise ValueError(
            f"drafter_device={str(decoder.drafter_device)!r}: a trace holds what would be drafted, whatever the "
            "device; leave it out to trace, and measure the two devices with `bpkit calibrate`"
        )
    for drafter in sources_of(decoder.drafter):
        branches = getattr(drafter, "branches", 1)
        if branches > MOST_CANDIDATES and drafts_side_by_side(drafter):
            raise ValueError(
                f"drafter {drafter.name} has {branches} branches, and a trace holds at most {MOST_CANDIDATES} "
                f"candidates of a position: trace it with branches={MOST_CANDIDATES}"
            )
        if branches > 1 and work_of_drafter(drafter).reads == "tokens" and type(drafter) not in ROLLED_OUT:
            raise ValueError(
                f"drafter {drafter.name} reads tokens and drafts trees (branches={branches}), and of a "
                f"{type(drafter).__name__} it is not known which nodes it has read: trace it with branches=1, or "
                "measure it live, with `bpkit bench`"
            )
        if getattr(drafter, "depends_on_steps", False):
            raise ValueError(
                f"drafter {drafter.name} drafts by what was drafted and verified before, so that a policy decides what "
                "it drafts: no trace holds that. Measure it live, with `bpkit bench`"
            )
        if getattr(drafter, "remembers_requests", False):
            raise ValueError(
                f"drafter {drafter.name} remembers earlier requests, so that what it drafts for a prompt depends on "
                "the prompts before it: a trace would hold for one order of prompts only. Switch its memory off to "
                "trace it, or measure it live, with `bpkit bench`, where the order of prompts is fixed"
            )


class Tracer:
    """Traces prompts with one decoder.

    Args:
        decoder: under the coupled rule; its policy decides only how fast the outputs are made.
        batch_size: prompts whose outputs are made together; each is what it would be alone.

    Attributes:
        watch: has spent so many seconds on each of `PARTS` since it was made.

    Raises:
        ValueError: a rule, drafter or block size for which there is no exact trace, or a feature that is not there.
    """

    def __init__(self, decoder: SpeculativeDecoder, options: TraceOptions, *, batch_size: int = 1) -> None:
        refuse_untraceable(decoder)
        drafter = decoder.drafter
        if len(sources_of(drafter)) > 1:
            raise ValueError(
                f"{drafter.name} are several drafters: trace each by itself, the second with the outputs of the first, "
                "and read the traces together, as `bpkit trace` does"
            )
        branches = getattr(drafter, "branches", 1)
        self.branches = branches if drafts_side_by_side(drafter) else 1
        self.trees = branches > self.branches
        # Larger trees are made of the candidates of the trained size.
        largest = drafter.max_block_size if self.branches == 1 else drafter.trained_block_size
        if not options.block_sizes or min(options.block_sizes) < 2 or max(options.block_sizes) > largest:
            sizes = "+".join(map(str, options.block_sizes)) or "none"
            raise ValueError(
                f"block sizes to trace are 2 .. {largest} with this drafter (1 needs no trace); got {sizes}"
            )
        if Feature.DRAFT_HIDDEN in options.features - drafter.provides:
            raise ValueError(f"drafter {drafter.name} has no hidden states: leave the feature draft_hidden out")
        self.decoder, self.options, self.batch_size = decoder, options, batch_size
        self.known = None if options.outputs_of is None else open_trace(options.outputs_of)
        self.watch = Stopwatch(GuardedClock(WallClock(decoder.target.device, wait=True)))
        keep_freed_memory()

    def trace(self, index: int, prompt: Prompt) -> PromptTrace:
        """Trace one prompt; `index` is its place in the trace and the stream of its noise."""
        (trace,) = self.traces([(index, prompt)])
        return trace

    def traces(self, prompts: Sequence[IndexedPrompt]) -> Traces:
        """Trace each (index, prompt), as their outputs end; see `bpkit.trace.collect.job.Workers`.

        Raises:
            ValueError, RuntimeError: a prompt that cannot be decoded; the message names it.
        """
        if self.known is not None:
            for index, prompt in prompts:
                yield from self.retraced([self._known_output(self.known, index, prompt)])
            return
        asked = ({"prompt": prompt.text, "stream_id": index} for index, prompt in prompts)
        options = generation_options(self.options)
        outputs: list[Output] = []
        with self.decoder.run_many(asked, batch_size=self.batch_size, **options) as runs:
            running = True
            while running:
                running = self._run_on(runs, prompts, outputs)
                while outputs and (not running or len(outputs) >= self.batch_size):
                    together = _first(outputs, TOGETHER)
                    del outputs[: len(together)]
                    yield from self.retraced(together)

    @torch.inference_mode()
    def _run_on(self, runs: RunMany, prompts: Sequence[IndexedPrompt], outputs: list[Output]) -> bool:
        """Go on until so many outputs are there as are traced together; False when all have ended."""
        self.watch.resume()
        running = True
        with self._quickly():
            while running and len(outputs) < self.batch_size:
                running = next(runs, None) is not None
                outputs += [self._output(*prompts[place], generation) for place, generation in runs.ended()]
        self.watch.lap("generation")
        return running

    def _output(self, index: int, prompt: Prompt, generation: Generation) -> Output:
        """What a generation came to. Raises ValueError if it failed."""
        if generation.error is not None:
            cause = generation.error.__cause__ or generation.error
            kind = ValueError if isinstance(cause, ValueError) else RuntimeError
            raise kind(f"prompt {prompt.id!r}: {type(cause).__name__}: {cause}") from cause
        length = generation.sequences.shape[1] - generation.tokens.shape[1]
        return self._output_of(index, prompt, generation.sequences[:, :length], generation.tokens)

    def _output_of(self, index: int, prompt: Prompt, ids: Tensor, tokens: Tensor) -> Output:
        run = self.decoder.run(ids, stream_id=index, **generation_options(self.options))
        return Output(index, prompt, ids, tokens, run.request.sampler.processors)

    def _known_output(self, known: AnyTrace, index: int, prompt: Prompt) -> Output:
        """The output of another trace. Raises TraceError if that read the prompt otherwise."""
        there, ids = known[index], self.decoder.token_ids(prompt.text).to(self.decoder.target.device)
        if there.prompt_tokens.tolist() != ids[0].tolist():
            raise TraceError(f"prompt {prompt.id!r} has other tokens than in {known.path}: give the same prompts")
        tokens = torch.tensor(there.output_tokens.tolist(), device=ids.device)[None]
        return self._output_of(index, prompt, ids, tokens)

    @torch.inference_mode()
    def retraced(self, outputs: Sequence[Output]) -> list[PromptTrace]:
        """Trace outputs that are there."""
        self.watch.resume()
        with self._quickly():
            return self._retraced(outputs)

    def _quickly(self) -> AbstractContextManager[None]:
        models = self.decoder.target, getattr(self.decoder.drafter, "model", None)
        return quick_products(*(model for model in models if isinstance(model, nn.Module)), pack=self.batch_size > 1)

    def _retraced(self, outputs: Sequence[Output]) -> list[PromptTrace]:
        seen = self._read(outputs)
        finished = [self._finished(output, one) for output, one in zip(outputs, seen, strict=True)]
        self.watch.lap("target pass")
        drafts = trace_drafts(self.decoder.drafter, finished)
        self.watch.lap("draft passes")
        traces = [self._trace(*parts) for parts in zip(outputs, seen, finished, drafts, strict=True)]
        self.watch.lap("the rest")
        return traces

    def _read(self, outputs: Sequence[Output]) -> list[TargetPass]:
        read = partial(target_passes, self.decoder.target, self.decoder.drafter.feature_layers)
        at_once = READ_AT_ONCE if session_class(self.decoder.model).shares_passes else 0
        left, found = list(outputs), list[TargetPass]()
        while left:
            together = _first(left, at_once)
            found += read([(output.ids, output.tokens) for output in together])
            del left[: len(together)]
        return found

    def _finished(self, output: Output, seen: TargetPass) -> Finished:
        decoder, seed, noise = self.decoder, self.options.seed, None
        if seed is not None:  # of every position that a draft may reach
            count = output.tokens.shape[1] + max(self.options.block_sizes)
            noise = HeldNoise(seed, output.index, count, decoder.spec.vocab_size, decoder.target.device)
        return Finished(
            ids=torch.cat([output.ids, output.tokens], dim=1),
            prompt_length=output.ids.shape[1],
            features=seen.features,
            block_sizes=self.options.block_sizes,
            processors=output.processors,
            vocab_size=seen.vocab_size,
            noise=noise,
            target_probabilities=None if noise is None else seen.probabilities(output.processors),
            keep_hidden=Feature.DRAFT_HIDDEN in self.options.features,
            branches=self.branches,
            trees=self.trees,
        )

    def _trace(self, output: Output, seen: TargetPass, finished: Finished, drafts: Drafts) -> PromptTrace:
        log_p = seen.first_logits().float().log_softmax(dim=-1)
        top = log_p.topk(min(TOP, len(log_p)))
        return PromptTrace(
            index=output.index,
            id=output.prompt.id,
            domain=output.prompt.domain,
            max_new_tokens=self.options.max_new_tokens,
            prompt_tokens=_ints(output.ids[0]),
            output_tokens=_ints(output.tokens[0]),
            prefill_top_tokens=_ints(top.indices),
            prefill_top_log_probabilities=_floats(top.values),
            prefill_entropy=float(-(log_p.exp() * log_p.clamp(min=-1e30)).sum()),
            near_ties=_ints(seen.near_ties(output.processors, finished.noise)),
            drafts=self._table(drafts, output.tokens[0].cpu()),
            features=self._features(seen, output.tokens[0]),
        )

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
        sampled = Feature.DRAFT_PROBABILITY in found and self.options.seed is not None and drafts.parents is None
        parents, chances = drafts.parents, drafts.chances
        return DraftTable(
            block_sizes=np.array(self.options.block_sizes, np.int32),
            draft_length=_ints(drafts.draft_length),
            num_accepted=_ints(
                num_accepted(drafts.tokens, output)
                if parents is None
                else nodes_accepted(drafts.tokens, parents, output)
            ),
            tokens=_ints(drafts.tokens),
            features={name: _floats(values) for name, values in found.items()},
            match_probability=_floats(drafts.match_probability) if sampled else None,
            match_length=None if drafts.match_length is None else _ints(drafts.match_length),
            match_share=None if drafts.match_share is None else drafts.match_share.numpy(),
            candidates=_candidates(drafts, output),
            parents=None if parents is None else _ints(parents),
            chances=None if chances is None else _floats(chances),
        )


def drafts_side_by_side(drafter: Drafter) -> TypeGuard[BlockDiffusionDrafter]:
    """Whether blocks from many positions are drafted in one pass.

    Where attention depends on places in the cache, blocks side by side do not keep it.
    """
    if type(drafter) is not BlockDiffusionDrafter or drafter.model.config.is_causal:
        return False
    return all(layer.self_attn.sliding_window is None for layer in drafter.model.layers)


def _candidates(drafts: Drafts, output: Tensor) -> CandidateTable | None:
    tokens, chances = drafts.candidates, drafts.candidate_chances
    if tokens is None or chances is None:
        return None
    noisy, plain = map(_floats, chances)
    return CandidateTable(_ints(tokens), noisy, plain, _ints(ranks(tokens, output)))


def trace_drafts(drafter: Drafter, finished: Sequence[Finished]) -> list[Drafts]:
    """All drafts of finished outputs, in batches where the kind of drafter allows it.

    A subclass may draft in its own way, so that only the very classes are taken at their word.
    """
    if drafts_side_by_side(drafter):
        return trace_blocks(drafter, finished)
    if isinstance(drafter, AutoregressiveDrafter) and type(drafter) in ROLLED_OUT and drafter.branches == 1:
        return [trace_rollouts(drafter, one) if one.rows else Drafts(one) for one in finished]
    return [trace_step_by_step(drafter, one) for one in finished]


def _first(outputs: Sequence[Output], tokens: int) -> list[Output]:
    """The first of these outputs that have no more than so many tokens, padding included; at least one."""
    longest, count = 0, 0
    for output in outputs:
        longest = max(longest, output.length)
        if count and longest * (count + 1) > tokens:
            break
        count += 1
    return list(outputs[:count])


def _ints(values: Tensor) -> NDArray[np.int32]:
    return cast("NDArray[np.int32]", values.cpu().numpy().astype(np.int32))


def _floats(values: Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", values.float().cpu().numpy())


def generation_options(options: TraceOptions) -> dict[str, Any]:
    """The options of `generate` that a trace is made under."""
    return {"max_new_tokens": options.max_new_tokens, "seed": options.seed, **options.sampling}
