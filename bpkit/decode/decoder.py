"""The SpeculativeDecoder: a `custom_generate` callable for transformers' `generate`, with a front door of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from bpkit.assets import model_name, model_path, own_drafter, shipped
from bpkit.decode.admission import Admission
from bpkit.decode.attention import use_grouped_attention
from bpkit.decode.caller_batch import CallerBatch, sequences
from bpkit.decode.capture import Capture, Mode
from bpkit.decode.chat import token_ids
from bpkit.decode.clock import Clock, GuardedClock, WallClock
from bpkit.decode.drafter import Drafter
from bpkit.decode.loop import decode
from bpkit.decode.noise import POLICY_SALT, hashed
from bpkit.decode.observers import ObservedRequest, ObserverLike, Observers
from bpkit.decode.owned import DrafterLike, KeptDecoders, drafter_key, policy_for, policy_key
from bpkit.decode.pretrained import input_device, inside, load_causal_lm, move
from bpkit.decode.products import Products, use_products
from bpkit.decode.refuse import (
    refuse_virtual_tokens,
    refuse_what_generate_dropped,
    refuse_what_we_cannot_do,
)
from bpkit.decode.request import Request
from bpkit.decode.resolve_drafter import resolve_drafters
from bpkit.decode.result import Generation, Piece, Run, RunMany, Running
from bpkit.decode.rows import Rows, Shared
from bpkit.decode.sampling import Samplers
from bpkit.decode.serving import refuse_branches, session_class
from bpkit.decode.sources import SourceSessions, source_spec, sources_of
from bpkit.decode.streaming import TextPieces
from bpkit.decode.text import RunningText
from bpkit.decode.timing import Stopwatch, TimedDrafter, TimedPolicy, TimedTarget
from bpkit.decode.two_devices import elsewhere
from bpkit.decode.verify import RULES
from bpkit.policy import Policy, PolicyError
from bpkit.prompts import BATCH_SIZE
from bpkit.registry.resolve import PolicyLike, written
from bpkit.types import (
    OF_THE_DRAFTED_TOKEN,
    OF_THE_SOURCES,
    OF_THE_TARGET,
    CostModel,
    DecoderSpec,
    Feature,
    SourceSpec,
)

PromptLike = str | Tensor | Mapping[str, Any]


class SpeculativeDecoder:
    """Speculative decoding of one target with one drafter under one policy.

    Args:
        target: a causal language model of transformers.
        drafter: bound to this target, or what `resolve_drafter` takes; or a list of these, the sources of drafts that a
            policy chooses among. Text names several with `+` between them: `block-diffusion+ngram`.
        policy: an instance, or what `bpkit.resolve_policy` takes.
        tokenizer: needed for text in and out and for stop strings.
        rule: `coupled` (the text never depends on drafter and policy) or `rejection` (Leviathan et al. 2023).
        streamer: a transformers streamer that is handed the tokens of every step.
        clock: what a step costs, for the records and for policies that learn from time; the wall by default.
        strict: raise on policy faults instead of mending them.
        max_block_size: the largest block that policies may ask for, by default the drafter's own limit.
        cost: what steps cost on this device, for policies that weigh it (`bpkit calibrate`); by default the clock's, if
            it goes by a cost model.
        observers: told of every step (`bpkit observers` lists them): instances, or what
            `bpkit.decode.observers.resolve_observer` takes.
        capture: whether passes are captured in CUDA graphs: `auto`, where there is CUDA and they can be; `off`; or
            `on`, which refuses a target whose passes cannot be. Without a GPU `on` does all but the capture itself,
            for tests. Or what another decoder of this target captures, its `capture`.
        drafter_device: where drafters with a model work, with copies of the target's embedding and head; by default
            where the target is. It places drafters that are named, not those handed over.
        products: what multiplies matrices in linear layers in float32 on a CPU: `torch`, `onednn`
            (`bpkit.decode.products`), or `auto`, oneDNN where it can; for all decoders of this target.

    Raises:
        PolicyError: unknown policy or option, or a policy that wants what this drafter cannot provide.
        ValueError: a target that cannot be decoded speculatively; see "Which models work" in the documentation.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: DrafterLike,
        policy: PolicyLike = "fixed",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rule: str = "coupled",
        streamer: BaseStreamer | None = None,
        clock: Clock | None = None,
        strict: bool = False,
        max_block_size: int | None = None,
        cost: CostModel | None = None,
        observers: Sequence[ObserverLike] | Observers = (),
        capture: Mode | Capture = "auto",
        products: Products = "torch",
        drafter_device: str | torch.device | None = None,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"there is no verify rule {rule!r}; the rules are: {', '.join(RULES)}")
        self.target, self.model = target.eval(), inside(target)
        refuse_virtual_tokens(target)
        self.drafter_device = elsewhere(drafter_device, input_device(self.model))
        self.drafter: Drafter = resolve_drafters(drafter, self.model, self.drafter_device)
        refuse_branches(self.drafter, self.model, rule)
        use_products(products, self.model, *(getattr(source, "model", None) for source in sources_of(self.drafter)))
        self.products = products
        self.tokenizer, self.rule, self.streamer, self.strict = tokenizer, rule, streamer, strict
        self._max_block_size = max_block_size
        self.clock = clock or WallClock(input_device(self.model), self.drafter_device)
        self.cost: CostModel | None = cost or getattr(self.clock, "cost", None)
        config = self.model.config.get_text_config()
        first, *others = self._sources(max_block_size)
        self.spec = DecoderSpec(
            target=model_name(str(self.model.name_or_path or type(self.model).__name__)),
            drafter=first.drafter,
            drafter_kind=first.kind,
            trained_block_size=first.trained_block_size,
            max_block_size=first.max_block_size,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            verify_rule=rule,
            device=str(input_device(self.model)),
            stateful=session_class(self.model).stateful,
            work=first.work,
            others=tuple(others),
            branches=first.branches,
        )
        serves = session_class(self.model)
        self.capture = capture if isinstance(capture, Capture) else Capture(capture, target, self.model, serves)
        self.policy, self.policy_name = self._bound(policy), written(policy)
        self._written_policy, self._written_drafter = policy, drafter
        self._kept = KeptDecoders()
        self.requests = 0
        self.observers = observers if isinstance(observers, Observers) else Observers(observers)

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path | None = None,
        drafter: str | Path | DrafterLike | None = None,
        policy: PolicyLike = "fixed",
        *,
        dtype: torch.dtype | str | None = None,
        device: str | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> SpeculativeDecoder:
        """Load target, tokenizer and drafter from folders or the Hub; by default the pair that ships with bpkit.

        Args:
            target: folder, Hub name, or a name of `bpkit models`, whose own drafter is the default then.
            drafter: folder or Hub name of a DFlash drafter or a causal language model, `ngram`, a mapping with
                `name` and options, or a list of these.
            dtype: by default float32 on a CPU and the checkpoint's own on a GPU.
            device: by default a GPU if there is one. Quantised targets stay where they were loaded.
            device_map: of transformers' `from_pretrained`, instead of `device`: which parts go to which device.
            options: passed to the constructor.
        """
        if device is not None and device_map is not None:
            raise ValueError(f"device={device!r} and device_map={device_map!r}: give one of them")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" else "auto")
        path = model_path(target or shipped("target"))
        if drafter is None and (drafter := own_drafter(path)) is None:
            raise ValueError(f"name a drafter for the target {path}: a folder, a Hub name, or 'ngram'")
        if device_map is None:
            model = move(load_causal_lm(path, dtype=dtype), device)
        else:
            model = load_causal_lm(path, dtype=dtype, device_map=device_map)
        use_grouped_attention(model)
        options.setdefault("tokenizer", AutoTokenizer.from_pretrained(path))
        return cls(model, str(drafter) if isinstance(drafter, Path) else drafter, policy, **options)

    def with_policy(
        self, policy: PolicyLike | None, drafter: DrafterLike | None = None, *, cost: CostModel | None = None
    ) -> SpeculativeDecoder:
        """The same target under another policy or with another drafter; None keeps what there is.

        Costs of another drafter are others: `cost` says them.

        The two decoders share no policy. Where `policy` is None it is made again as this decoder's was written, or
        copied with its memory if it was handed over as an instance.

        Observers are kept: they are told of the generations of both decoders, and closed with either.
        """
        if policy is None:
            policy = self.policy if isinstance(self._written_policy, Policy) else self._written_policy
        return SpeculativeDecoder(
            self.target,
            drafter if drafter is not None else self.drafter,
            policy,
            tokenizer=self.tokenizer,
            rule=self.rule,
            streamer=self.streamer,
            clock=self.clock,
            strict=self.strict,
            max_block_size=self._max_block_size if drafter is None else None,
            cost=self.cost if drafter is None else cost,
            observers=self.observers,
            capture=self.capture,
            products=self.products,
            drafter_device=self.drafter_device,
        )

    def _for_call(self, policy: PolicyLike | None, drafter: DrafterLike | None) -> SpeculativeDecoder:
        """The decoder of one call: this one, or one that is kept for this policy and this drafter."""
        if drafter is self.drafter or drafter_key(drafter) == drafter_key(self._written_drafter):
            drafter = None
        if policy is self.policy or policy_key(policy) == policy_key(self._written_policy):
            policy = None
        if policy is None and drafter is None:
            return self
        return self._kept.get(policy, drafter, lambda made: self.with_policy(policy, made or drafter))

    def close(self) -> None:
        """Close the observers. The decoder goes on decoding, unobserved."""
        self.observers.close()

    @overload
    def generate(self, prompt: str | Tensor, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Sequence[PromptLike], *, batch_size: int = ..., **options: Any) -> list[Generation]: ...

    def generate(
        self, prompt: str | Tensor | Sequence[PromptLike], *, batch_size: int = BATCH_SIZE, **options: Any
    ) -> Generation | list[Generation]:
        """Generate to the end: of one prompt, or of many that share passes.

        Args:
            prompt: text, or token ids int64 [1, length]; or a sequence of these and of mappings with a `prompt` and
                options of its own, such as `{"prompt": "Once", "max_new_tokens": 8, "stop_strings": ["."]}`.
            batch_size: of many prompts, how many run at once.
            options: of transformers' `generate` (`max_new_tokens`, `temperature`, `top_p`, `stop_strings`, ...);
                a temperature above 0 turns sampling on, 0 turns it off. `seed` fixes the noise and `stream_id`
                tells apart prompts that share a seed: of many prompts, the first has this one, by default 0, and each
                further one the next. `prefill_chunk`: of many prompts, how many tokens of a prompt are read between
                two steps of those that run.

        Returns:
            Of many prompts, generations in their order. One that failed has an `error`, and the others went on.

        Raises:
            ValueError: an option that speculative decoding cannot honour; the message names it.
        """
        if not isinstance(prompt, (str, Tensor)):
            generations: dict[int, Generation] = {}
            with self.run_many(prompt, batch_size=batch_size, **options) as runs:
                for _ in runs:
                    generations.update(runs.ended())
            generations.update(runs.ended())
            return [generations[place] for place in sorted(generations)]
        return self._told(self._to_the_end(self.run(prompt, **options)))

    def stream(self, prompt: str | Tensor, **options: Any) -> Iterator[str]:
        """Yield the text in pieces as it is decided; takes what `generate` takes."""
        pieces = TextPieces(self._tokenizer("streaming text"))
        with self.run(prompt, **options) as run:
            for record in run:
                yield from pieces.put(record.tokens)
        yield from pieces.end()

    def stream_many(
        self, prompts: Iterable[PromptLike], *, batch_size: int = BATCH_SIZE, **options: Any
    ) -> Iterator[Piece]:
        """Yield the texts of many prompts in pieces, as they are decided; takes what `generate` takes.

        Prompts are asked for when there is room for them, so they may come from elsewhere while others run.
        """
        tokenizer = self._tokenizer("streaming text")
        texts: dict[int, TextPieces] = {}
        with self.run_many(prompts, batch_size=batch_size, **options) as runs:
            for record in runs:
                for place, row in runs.rows_of(record):
                    pieces = texts.setdefault(place, TextPieces(tokenizer))
                    yield from (Piece(place, text) for text in pieces.put(row.tokens))
                for place, generation in runs.ended():
                    rest = texts.pop(place, TextPieces(tokenizer)).end()
                    yield Piece(place, "".join(rest), generation)
        yield from (Piece(place, "", generation) for place, generation in runs.ended())

    def run(self, prompt: str | Tensor, **options: Any) -> Run:
        """Start a generation and return it as an iterator over its records, with `finish()` for the result."""
        decoder, requests = self._prepared(prompt, options)
        if len(requests) > 1:
            raise ValueError(
                f"{len(requests)} sequences of one prompt: give a list, as in decoder.generate([prompt] * "
                f"{len(requests)}, ...)"
            )
        return Run(decoder._running(requests), requests[0])

    def run_many(
        self,
        prompts: Iterable[PromptLike],
        *,
        batch_size: int = BATCH_SIZE,
        prefill_chunk: int | None = None,
        **options: Any,
    ) -> RunMany:
        """Start generations that share passes: an iterator over the records of all, which tells what `ended`."""
        if batch_size < 1 or (prefill_chunk is not None and prefill_chunk < 1):
            raise ValueError(f"batch_size {batch_size} and prefill_chunk {prefill_chunk} must be 1 or more")
        if self.streamer is not None:
            raise ValueError("a streamer prints one text: use decoder.stream_many, or a decoder without streamer")
        decoder = self._for_call(options.pop("policy", None), options.pop("drafter", None))
        if options.get("seed") is None:
            options["seed"] = int(torch.randint(2**62, ()))
        first, together = options.pop("stream_id", 0), session_class(self.model).shares_passes

        def request(place: int, prompt: PromptLike) -> Request:
            own = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}
            if unfit := own.keys() & {"policy", "drafter", "batch_size", "prefill_chunk"}:
                raise ValueError(f"{', '.join(sorted(unfit))}: all rows share it; give it to the call")
            text = own.pop("prompt", None)
            if not isinstance(text, (str, Tensor)):
                raise ValueError('a prompt is text, token ids [1, length], or a mapping with one as "prompt"')
            _, made = decoder._prepared(text, {**options, "stream_id": first + place, **own})
            if len(made) > 1:
                raise ValueError(f"{len(made)} sequences of one prompt: give the prompt so many times")
            inputs = made[0].inputs
            if together and inputs is not None and (names := {*inputs.prefill, *inputs.following}):
                raise ValueError(
                    f"{', '.join(sorted(names))}: beside other rows this target takes token ids only; decode this "
                    "prompt by itself"
                )
            return made[0]

        start = functools.partial(decoder._running, most=batch_size, chunk=prefill_chunk)
        return RunMany(prompts, request, start, self._told)

    def _prepared(self, prompt: str | Tensor, options: dict[str, Any]) -> tuple[SpeculativeDecoder, list[Request]]:
        """Let transformers' `generate` prepare a call, and return what came of it instead of decoding."""
        options = dict(options)
        if options.get("cache_implementation") == "paged":
            raise ValueError("cache 'paged': transformers decodes with it by itself; leave cache_implementation")
        self._stop_at_strings(options)
        temperature = options.pop("temperature", None)
        if temperature is not None:
            options["do_sample"] = temperature > 0
            if temperature > 0:
                options["temperature"] = float(temperature)
        if isinstance(prompt, str):
            ids = self.token_ids(prompt)
            if "attention_mask" in inspect.signature(self.model.forward).parameters:
                options.setdefault("attention_mask", torch.ones_like(ids))  # else it is guessed from pad tokens
        else:
            ids = prompt
        ids = ids.to(input_device(self.model))
        generate = getattr(self.target, "generate", self.model.generate)  # data parallelism has none
        prepared = generate(input_ids=ids, custom_generate=self, prepare=True, **options)
        return cast("tuple[SpeculativeDecoder, list[Request]]", prepared)

    def _stop_at_strings(self, options: dict[str, Any]) -> None:
        """Turn stop strings into a criterion: `generate` drops the tokenizer that it would need for them."""
        config = options.get("generation_config") or self.model.generation_config
        strings, tokenizer = options.pop("stop_strings", None), options.pop("tokenizer", None)
        if config.stop_strings is not None or self.model.generation_config.stop_strings is not None:
            options["stop_strings"] = None  # theirs: they are ours from here on
            strings = strings or config.stop_strings or self.model.generation_config.stop_strings
        if strings is not None:
            criterion = StopStringCriteria(tokenizer or self._tokenizer(), strings)
            options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), criterion])

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        policy: PolicyLike | None = None,
        drafter: DrafterLike | None = None,
        seed: int | Sequence[int] | None = None,
        stream_id: int | Sequence[int] = 0,
        prepare: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """What transformers' `generate(custom_generate=decoder)` calls after its own preparations.

        Args:
            seed: one for all rows, or one for each.
            stream_id: of the first row, those of the others follow; or one for each.
            prepare: return the decoder of this call and its requests instead of decoding them.
        """
        refuse_what_generate_dropped()
        refuse_what_we_cannot_do(model, self.model, input_ids, generation_config, model_kwargs)
        decoder = self._for_call(policy, drafter)
        if decoder.rule == "rejection" and generation_config.do_sample:
            decoder._refuse_bias(decoder._wants())
        batch = CallerBatch(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        requests = batch.requests(decoder.model, seed, stream_id, decoder._generator)
        if prepare:
            return decoder, requests
        if len(requests) > 1 or requests[0].text.padding:
            return decoder._batch(input_ids, requests, generation_config)
        run = Run(decoder._running(requests), requests[0])
        result = self._to_the_end(run)
        if not generation_config.return_dict_in_generate:
            return result.sequences
        output = GenerateDecoderOnlyOutput(sequences=result.sequences, past_key_values=run.cache())
        output.generation = result
        return output

    def _generator(self, seed: int | None, stream_id: int) -> torch.Generator:
        """The next request's random numbers for its policy."""
        # The count of requests tells greedy ones apart, which have no seed: a policy must not explore alike in each.
        self.requests += 1
        return torch.Generator().manual_seed(hashed(seed or 0, stream_id, self.requests, POLICY_SALT) >> 1)

    def rows(self, prompt: str | Tensor, **options: Any) -> Rows:
        """What the loop works on, made but not begun: for calling its pieces by hand; takes what `generate` takes."""
        decoder, requests = self._prepared(prompt, options)
        return decoder._rows(decoder._shared(), requests, len(requests))

    def _shared(self) -> Shared:
        watch = Stopwatch(GuardedClock(self.clock))
        policy = TimedPolicy(self.policy, self.spec, watch, strict=self.strict)
        return Shared(policy, watch, self.spec, self._wants(), self.observers.want_trees)

    def _running(self, requests: Iterable[Request], *, most: int = 1, chunk: int | None = None) -> Running:
        """Rows that begin when somebody asks for the first record."""
        shared = self._shared()
        running = Running(shared.policy, shared.watch, self.observers, self._observed)

        def begin(requests: list[Request], slots: int) -> Rows:
            running.rows = self._rows(shared, requests, slots)
            return running.rows

        together = session_class(self.model).shares_passes
        admission = Admission(running.watched(requests), begin, most=most, together=together, chunk=chunk)
        running.records = decode(admission, shared.policy)
        return running

    def _rows(self, shared: Shared, requests: list[Request], slots: int) -> Rows:
        """Sessions for requests that begin together."""
        if self.rule == "rejection" and any(source.work.passes != "one" for source in self.spec.sources):
            # What such drafters know of a position depends on the tokens drafted before it; see GuardedPolicy.
            shared.policy.stepwise |= any(request.seed is not None for request in requests)
        text = RunningText([request.text for request in requests], slots=slots)
        session = session_class(self.model)(
            self.model,
            rows=len(requests),
            capacity=text.max_length + max(source.max_block_size for source in self.spec.sources),
            slots=slots,
            feature_layers=self.drafter.feature_layers,
            keep_hidden=bool(shared.wants & {Feature.PREFILL_HIDDEN, Feature.LAST_HIDDEN}),
        )
        session.wrapper = self.target if self.target is not self.model else None
        session.inputs = [request.inputs for request in requests]
        drafting = SourceSessions.begun(self.drafter, self.spec.sources, text, None if self.capture.wanted else session)
        for source, drafts in zip(sources_of(self.drafter), drafting.sessions, strict=True):
            self.capture.attach(session, source, drafts)
        return Rows(
            requests,
            text,
            TimedTarget(session, shared.watch),
            TimedDrafter(drafting, shared.watch),
            RULES[self.rule](Samplers([request.sampler for request in requests])),
            shared,
            requests[0].generator,
        )

    def _batch(self, ids: Tensor, requests: list[Request], config: GenerationConfig) -> Any:
        """Decode the rows of a caller's batch; what transformers returns of them. Raises RowFailure after all ended."""
        start = functools.partial(self._running, most=len(requests))
        generations: dict[int, Generation] = {}
        with RunMany(requests, lambda place, request: request, start, self._told) as runs:
            for _ in runs:
                generations.update(runs.ended())
        results = [generations[place] for place in range(len(requests))]
        for result in results:
            if result.error is not None:
                raise result.error
        texts = sequences(ids, [result.tokens for result in results], config)
        if not config.return_dict_in_generate:
            return texts
        output = GenerateDecoderOnlyOutput(sequences=texts)
        output.generations = results
        return output

    def _to_the_end(self, run: Run) -> Generation:
        """Finish a run, handing prompt and tokens to the streamer as transformers would."""
        with run:
            if self.streamer is not None:
                self.streamer.put(run.prompt.cpu())
                for record in run:
                    self.streamer.put(record.tokens.cpu())
                self.streamer.end()
            return run.finish()

    def _told(self, result: Generation) -> Generation:
        """With its text, if there is a tokenizer."""
        if self.tokenizer is not None:
            result.text = cast("str", self.tokenizer.decode(result.tokens[0], skip_special_tokens=True))
        return result

    def _observed(self, request: Request) -> ObservedRequest:
        """What observers learn about a request."""
        text = request.text
        return ObservedRequest(
            number=request.number,
            policy=self.policy_name,
            policy_repr=repr(self.policy),
            target=self.spec.target,
            drafter=" + ".join(source.drafter for source in self.spec.sources),
            drafter_kind=self.spec.drafter_kind,
            trained_block_size=self.spec.trained_block_size,
            max_block_size=self.spec.max_block_size,
            rule=self.rule,
            clock=type(self.clock).__name__,
            prompt_length=text.prompt_length,
            max_new_tokens=text.max_length - text.prompt_length,
            temperature=request.temperature,
            seed=request.seed,
            stream_id=request.stream_id,
        )

    def _wants(self) -> frozenset[Feature]:
        return self.policy.wants | (self.policy.wants_optional & self._offered())

    def _refuse_bias(self, wants: frozenset[Feature]) -> None:
        """Under rejection sampling, whether a token is verified must not depend on that token."""
        name, biasing = type(self.policy).__name__, wants & OF_THE_DRAFTED_TOKEN
        if biasing:
            raise PolicyError(
                f"policy {name} looks at {', '.join(sorted(biasing))}, which would bias the output under rule "
                "'rejection' at temperature > 0; use rule 'coupled', or features of the distribution alone such as "
                "draft_entropy"
            )

    def _bound(self, policy: PolicyLike) -> Policy:
        made = policy_for(policy, self)
        missing = made.wants - self._offered()
        if missing:
            drafter = model_name(self.drafter.name)
            raise PolicyError(
                f"policy {type(made).__name__} wants {', '.join(sorted(missing))}, which drafter {drafter!r} "
                f"({self.drafter.kind}) does not provide; it provides: {', '.join(sorted(self.drafter.provides))}"
            )
        made.bind(self.spec, self.cost)
        return made

    def _offered(self) -> frozenset[Feature]:
        layered = {Feature.TARGET_FEATURES} if self.drafter.feature_layers else set()
        return OF_THE_TARGET | OF_THE_SOURCES | layered | self.drafter.provides

    def _sources(self, given: int | None) -> list[SourceSpec]:
        """What policies learn of each source, whose block sizes are limited to the one that was given."""
        sources = sources_of(self.drafter)
        most = max(source.max_block_size for source in sources)
        if given is not None and not 1 <= given <= most:
            raise ValueError(f"max_block_size {given} is not within 1 .. {most}, what drafter {self.drafter.name} can")
        return [source_spec(source, given) for source in sources]

    def token_ids(self, text: str) -> Tensor:
        """Token ids of a text as this decoder reads it, int64 [1, length]. Raises ValueError without a tokenizer."""
        return token_ids(self._tokenizer(), text)

    def _tokenizer(self, what: str = "this") -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer: SpeculativeDecoder(..., tokenizer=tokenizer)")
        return self.tokenizer
