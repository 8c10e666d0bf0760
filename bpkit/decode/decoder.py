"""The SpeculativeDecoder: a `custom_generate` callable for transformers' `generate`, with a front door of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

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

from bpkit.assets import model_name, shipped
from bpkit.decode.attention import use_grouped_attention
from bpkit.decode.clock import Clock, GuardedClock, WallClock
from bpkit.decode.drafter import Drafter
from bpkit.decode.inputs import ModelInputs, model_inputs
from bpkit.decode.loop import decode
from bpkit.decode.noise import POLICY_SALT, TARGET_SALT, GumbelNoise, hashed
from bpkit.decode.observers import ObservedRequest, ObserverLike, Observers, Watching, next_number
from bpkit.decode.owned import DrafterLike, KeptDecoders, drafter_key, policy_for, policy_key
from bpkit.decode.pretrained import input_device, inside, load_causal_lm, move
from bpkit.decode.refuse import (
    refuse_changing_frequencies,
    refuse_virtual_tokens,
    refuse_what_generate_dropped,
    refuse_what_we_cannot_do,
)
from bpkit.decode.request import Request
from bpkit.decode.resolve_drafter import resolve_drafter
from bpkit.decode.result import Generation, Run
from bpkit.decode.sampling import Processors
from bpkit.decode.serving import session_class
from bpkit.decode.stateful import StatefulTarget
from bpkit.decode.stopping import Stopping
from bpkit.decode.streaming import TextPieces
from bpkit.decode.text import RunningText
from bpkit.decode.timing import Stopwatch, TimedDrafter, TimedPolicy, TimedTarget
from bpkit.decode.verify import RULES, make_rule
from bpkit.policy import Policy, PolicyError
from bpkit.registry.resolve import PolicyLike, written
from bpkit.types import (
    OF_THE_DRAFTED_TOKEN,
    OF_THE_TARGET,
    CostModel,
    DecoderSpec,
    DraftWork,
    Feature,
    work_of,
)


class SpeculativeDecoder:
    """Speculative decoding of one target with one drafter under one policy.

    Args:
        target: a causal language model of transformers.
        drafter: bound to this target, or what `resolve_drafter` takes.
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

    Raises:
        PolicyError: unknown policy or option, or a policy that wants what this drafter cannot provide.
        ValueError: a target that cannot be decoded speculatively; see "Which models work" in the documentation.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: Drafter | str | dict[str, Any],
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
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"there is no verify rule {rule!r}; the rules are: {', '.join(RULES)}")
        self.target, self.model = target.eval(), inside(target)
        refuse_virtual_tokens(target)
        self.drafter = resolve_drafter(drafter, self.model) if isinstance(drafter, (str, dict)) else drafter
        self.tokenizer, self.rule, self.streamer, self.strict = tokenizer, rule, streamer, strict
        self.clock = clock or WallClock(input_device(self.model))
        self.cost: CostModel | None = cost or getattr(self.clock, "cost", None)
        config = self.model.config.get_text_config()
        largest = self._largest(max_block_size)
        self.spec = DecoderSpec(
            target=model_name(str(self.model.name_or_path or type(self.model).__name__)),
            drafter=model_name(self.drafter.name),
            drafter_kind=self.drafter.kind,
            trained_block_size=min(self.drafter.trained_block_size, largest),
            max_block_size=largest,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            verify_rule=rule,
            device=str(input_device(self.model)),
            stateful=issubclass(session_class(self.model), StatefulTarget),
            work=self._drafter_work(),
        )
        self.policy, self.policy_name = self._bound(policy), written(policy)
        self._written_policy, self._written_drafter = policy, drafter
        self._kept = KeptDecoders()
        self.requests = 0
        self.observers = observers if isinstance(observers, Observers) else Observers(observers)

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path | None = None,
        drafter: str | Path | dict[str, Any] | None = None,
        policy: PolicyLike = "fixed",
        *,
        dtype: torch.dtype | str | None = None,
        device: str | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> SpeculativeDecoder:
        """Load target, tokenizer and drafter from folders or the Hub; by default the pair that ships with bpkit.

        Args:
            target: folder or Hub name. drafter: folder or Hub name of a DFlash drafter or a causal language model,
                `ngram`, or a mapping with `name` and options.
            dtype: by default float32 on a CPU and the checkpoint's own on a GPU.
            device: by default a GPU if there is one. Quantised targets stay where they were loaded.
            device_map: of transformers' `from_pretrained`, instead of `device`: which parts go to which device.
            options: passed to the constructor.
        """
        if device is not None and device_map is not None:
            raise ValueError(f"device={device!r} and device_map={device_map!r}: give one of them")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" else "auto")
        path = str(target or shipped("target"))
        if drafter is None and target is None:
            drafter = str(shipped("drafter"))
        if drafter is None:
            raise ValueError(f"name a drafter for the target {path}: a folder, a Hub name, or 'ngram'")
        if device_map is None:
            model = move(load_causal_lm(path, dtype=dtype), device)
        else:
            model = load_causal_lm(path, dtype=dtype, device_map=device_map)
        use_grouped_attention(model)
        options.setdefault("tokenizer", AutoTokenizer.from_pretrained(path))
        return cls(model, str(drafter) if isinstance(drafter, Path) else drafter, policy, **options)

    def with_policy(self, policy: PolicyLike | None, drafter: DrafterLike | None = None) -> SpeculativeDecoder:
        """The same target under another policy or with another drafter; None keeps what there is.

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
            max_block_size=self.spec.max_block_size if drafter is None else None,
            cost=self.cost if drafter is None else None,
            observers=self.observers,
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

    def generate(self, prompt: str | Tensor, **options: Any) -> Generation:
        """Generate to the end.

        Args:
            prompt: text, or token ids int64 [1, length].
            options: of transformers' `generate` (`max_new_tokens`, `temperature`, `top_p`, `stop_strings`, ...);
                a temperature above 0 turns sampling on, 0 turns it off. `seed` fixes the noise and `stream_id`
                tells apart prompts that share a seed.

        Raises:
            ValueError: an option that speculative decoding cannot honour; the message names it.
        """
        result = self._to_the_end(self.run(prompt, **options))
        if self.tokenizer is not None:
            result.text = cast("str", self.tokenizer.decode(result.tokens[0], skip_special_tokens=True))
        return result

    def stream(self, prompt: str | Tensor, **options: Any) -> Iterator[str]:
        """Yield the text in pieces as it is decided; takes what `generate` takes."""
        if self.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer: SpeculativeDecoder(..., tokenizer=tokenizer)")
        pieces = TextPieces(self.tokenizer)
        with self.run(prompt, **options) as run:
            for record in run:
                yield from pieces.put(record.tokens)
        yield from pieces.end()

    def run(self, prompt: str | Tensor, **options: Any) -> Run:
        """Start a generation and return it as an iterator over its records, with `finish()` for the result."""
        if options.get("cache_implementation") == "paged":
            raise ValueError("cache 'paged': transformers decodes with it by itself; leave cache_implementation")
        self._stop_at_strings(options)
        temperature = options.pop("temperature", None)
        if temperature is not None:
            options["do_sample"] = temperature > 0
            if temperature > 0:
                options["temperature"] = float(temperature)
        if isinstance(prompt, str):
            ids = self._ids(prompt)
            if "attention_mask" in inspect.signature(self.model.forward).parameters:
                options.setdefault("attention_mask", torch.ones_like(ids))  # else it is guessed from pad tokens
        else:
            ids = prompt
        ids = ids.to(input_device(self.model))
        generate = getattr(self.target, "generate", self.model.generate)  # data parallelism has none
        return cast("Run", generate(input_ids=ids, custom_generate=self, return_run=True, **options))

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
        seed: int | None = None,
        stream_id: int = 0,
        return_run: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput | Run:
        """What transformers' `generate(custom_generate=decoder)` calls after its own preparations."""
        refuse_what_generate_dropped()
        refuse_what_we_cannot_do(model, self.model, input_ids, generation_config, model_kwargs)
        inputs = model_inputs(self.model, input_ids, model_kwargs)
        text = RunningText(input_ids)
        stopping = Stopping(stopping_criteria, text)
        refuse_changing_frequencies(self.model, input_ids.shape[1], stopping.max_length)
        processors = Processors(logits_processor, ends=stopping.ends, prompt_length=input_ids.shape[1])
        decoder = self._for_call(policy, drafter)
        if generation_config.do_sample and seed is None:
            seed = int(torch.randint(2**62, ()))
        seed = seed if generation_config.do_sample else None
        request = decoder._request(text, processors, stopping, seed, stream_id, inputs)
        observed = decoder._observed(request, generation_config, seed, stream_id) if decoder.observers.active else None
        records = processors.rollback.settled(decode(request), input_ids.shape[1])
        run = Run(records, request, seed, Watching(decoder.observers, observed))
        if return_run:
            return run
        result = self._to_the_end(run)
        if not generation_config.return_dict_in_generate:
            return result.sequences
        output = GenerateDecoderOnlyOutput(sequences=result.sequences, past_key_values=request.target.cache)
        output.generation = result
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

    def _observed(
        self, request: Request, config: GenerationConfig, seed: int | None, stream_id: int
    ) -> ObservedRequest:
        """What observers learn about a request."""
        (length,) = request.text.prompt_length
        return ObservedRequest(
            number=next_number(),
            policy=self.policy_name,
            policy_repr=repr(self.policy),
            target=self.spec.target,
            drafter=self.spec.drafter,
            drafter_kind=self.spec.drafter_kind,
            trained_block_size=self.spec.trained_block_size,
            max_block_size=self.spec.max_block_size,
            rule=self.rule,
            clock=type(self.clock).__name__,
            prompt_length=length,
            max_new_tokens=request.stopping.max_length - length,
            temperature=0.0 if seed is None else float(config.temperature or 1.0),
            seed=seed,
            stream_id=stream_id,
        )

    def _request(
        self,
        text: RunningText,
        processors: Processors,
        stopping: Stopping,
        seed: int | None,
        stream_id: int,
        inputs: ModelInputs,
    ) -> Request:
        wants = self.policy.wants | (self.policy.wants_optional & self._offered())
        if self.rule == "rejection" and seed is not None:
            self._refuse_bias(wants)
        # What such drafters know of a position depends on the tokens drafted before it; see GuardedPolicy.
        stepwise = self.rule == "rejection" and seed is not None and self.spec.work.passes != "one"
        noise = None
        if seed is not None:
            noise = GumbelNoise(seed, stream_id, self.spec.vocab_size, text.ids.device, salt=TARGET_SALT)
        # The count of requests tells greedy ones apart, which have no seed: a policy must not explore alike in each.
        self.requests += 1
        generator = torch.Generator().manual_seed(hashed(seed or 0, stream_id, self.requests, POLICY_SALT) >> 1)
        keep_hidden = bool(wants & {Feature.PREFILL_HIDDEN, Feature.LAST_HIDDEN})
        session = session_class(self.model)
        target = session(self.model, text, feature_layers=self.drafter.feature_layers, keep_hidden=keep_hidden)
        target.wrapper = self.target if self.target is not self.model else None
        target.inputs = inputs if inputs.following else None
        watch = Stopwatch(GuardedClock(self.clock))
        return Request(
            text=text,
            target=TimedTarget(target, watch),
            drafter=TimedDrafter(self.drafter.begin(text), watch),
            policy=TimedPolicy(self.policy, self.spec, watch, strict=self.strict, stepwise=stepwise),
            rule=make_rule(self.rule, text, processors, noise),
            stopping=stopping,
            watch=watch,
            spec=self.spec,
            wants=wants,
            generator=generator,
            inputs=inputs.prefill,
        )

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
            raise PolicyError(
                f"policy {type(made).__name__} wants {', '.join(sorted(missing))}, which drafter {self.drafter.name!r} "
                f"({self.drafter.kind}) does not provide; it provides: {', '.join(sorted(self.drafter.provides))}"
            )
        made.bind(self.spec, self.cost)
        return made

    def _offered(self) -> frozenset[Feature]:
        layered = {Feature.TARGET_FEATURES} if self.drafter.feature_layers else set()
        return OF_THE_TARGET | layered | self.drafter.provides

    def _drafter_work(self) -> DraftWork:
        work = getattr(self.drafter, "work", None)
        return work if isinstance(work, DraftWork) else work_of(self.drafter.kind)

    def _largest(self, given: int | None) -> int:
        most = self.drafter.max_block_size
        if given is not None and not 1 <= given <= most:
            raise ValueError(f"max_block_size {given} is not within 1 .. {most}, what drafter {self.drafter.name} can")
        return given or most

    def _ids(self, prompt: str) -> Tensor:
        """Token ids of a text. What a chat template made begins with a start token of its own, and gets no other."""
        tokenizer = self._tokenizer()
        start = tokenizer.bos_token
        templated = bool(start) and prompt.startswith(start)
        return cast("Tensor", tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated)["input_ids"])

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("this needs a tokenizer: SpeculativeDecoder(..., tokenizer=tokenizer)")
        return self.tokenizer
