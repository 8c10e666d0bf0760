"""The SpeculativeDecoder: a `custom_generate` callable for transformers' `generate`, with a front door of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
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
from bpkit.drafters.base import Drafter
from bpkit.drafters.resolve import resolve_drafter
from bpkit.observers import ObservedRequest, ObserverLike
from bpkit.policy import Policy, PolicyError
from bpkit.registry import PolicyLike, resolve_policy, written
from bpkit.runtime.attention import use_grouped_attention
from bpkit.runtime.clock import Clock, WallClock
from bpkit.runtime.guard import GuardedPolicy
from bpkit.runtime.loop import decode
from bpkit.runtime.noise import POLICY_SALT, TARGET_SALT, GumbelNoise, hashed
from bpkit.runtime.observing import Observers, Watching, next_number
from bpkit.runtime.refuse import refuse_what_generate_dropped, refuse_what_we_cannot_do
from bpkit.runtime.request import Request
from bpkit.runtime.result import Generation, Run
from bpkit.runtime.sampling import Processors
from bpkit.runtime.stopping import Stopping
from bpkit.runtime.streaming import TextPieces
from bpkit.runtime.target import TargetSession
from bpkit.runtime.verify import RULES, make_rule
from bpkit.types import OF_THE_DRAFTED_TOKEN, OF_THE_TARGET, CostModel, DecoderSpec, Feature


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
            `bpkit.observers.resolve_observer` takes.

    Raises:
        PolicyError: unknown policy or option, or a policy that wants what this drafter cannot provide.
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
        self.target = target.eval()
        self.drafter = resolve_drafter(drafter, target) if isinstance(drafter, (str, dict)) else drafter
        self.tokenizer, self.rule, self.streamer, self.strict = tokenizer, rule, streamer, strict
        self.clock = clock or WallClock(target.device)
        self.cost: CostModel | None = cost or getattr(self.clock, "cost", None)
        config = target.config.get_text_config()
        largest = self._largest(max_block_size)
        self.spec = DecoderSpec(
            target=model_name(str(target.name_or_path or type(target).__name__)),
            drafter=model_name(self.drafter.name),
            drafter_kind=self.drafter.kind,
            trained_block_size=min(self.drafter.trained_block_size, largest),
            max_block_size=largest,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            verify_rule=rule,
        )
        self.policy, self.policy_name = self._bound(policy), written(policy)
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
        **options: Any,
    ) -> SpeculativeDecoder:
        """Load target, tokenizer and drafter from folders or the Hub; by default the pair that ships with bpkit.

        Args:
            target: folder or Hub name. drafter: folder or Hub name of a DFlash drafter or a causal language model,
                `ngram`, or a mapping with `name` and options.
            dtype: by default float32 on a CPU and the checkpoint's own on a GPU.
            device: by default a GPU if there is one.
            options: passed to the constructor.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" else "auto")
        path = str(target or shipped("target"))
        if drafter is None and target is None:
            drafter = str(shipped("drafter"))
        if drafter is None:
            raise ValueError(f"name a drafter for the target {path}: a folder, a Hub name, or 'ngram'")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        use_grouped_attention(model)
        options.setdefault("tokenizer", AutoTokenizer.from_pretrained(path))
        return cls(model, str(drafter) if isinstance(drafter, Path) else drafter, policy, **options)

    def with_policy(self, policy: PolicyLike | None, drafter: Drafter | str | None = None) -> SpeculativeDecoder:
        """The same target under another policy or with another drafter; None keeps what there is.

        Observers are kept: they are told of the generations of both decoders, and closed with either.
        """
        made = SpeculativeDecoder(
            self.target,
            drafter if drafter is not None else self.drafter,
            policy if policy is not None else self.policy,
            tokenizer=self.tokenizer,
            rule=self.rule,
            streamer=self.streamer,
            clock=self.clock,
            strict=self.strict,
            max_block_size=self.spec.max_block_size if drafter is None else None,
            cost=self.cost if drafter is None else None,
            observers=self.observers,
        )
        if policy is None:
            made.policy_name = self.policy_name
        return made

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
        stop_strings = options.pop("stop_strings", None)
        if stop_strings is not None:
            options["stopping_criteria"] = StoppingCriteriaList(
                [*(options.get("stopping_criteria") or ()), StopStringCriteria(self._tokenizer(), stop_strings)]
            )
        temperature = options.pop("temperature", None)
        if temperature is not None:
            options["do_sample"] = temperature > 0
            if temperature > 0:
                options["temperature"] = float(temperature)
        ids = self._ids(prompt) if isinstance(prompt, str) else prompt
        return cast(
            "Run",
            self.target.generate(
                input_ids=ids.to(self.target.device), custom_generate=self, return_run=True, **options
            ),
        )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        policy: PolicyLike | None = None,
        drafter: Drafter | str | None = None,
        seed: int | None = None,
        stream_id: int = 0,
        return_run: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput | Run:
        """What transformers' `generate(custom_generate=decoder)` calls after its own preparations."""
        refuse_what_generate_dropped()
        refuse_what_we_cannot_do(model, self.target, input_ids, generation_config, model_kwargs)
        decoder = self if policy is None and drafter is None else self.with_policy(policy, drafter)
        if generation_config.do_sample and seed is None:
            seed = int(torch.randint(2**62, ()))
        seed = seed if generation_config.do_sample else None
        request = decoder._request(input_ids, logits_processor, stopping_criteria, seed, stream_id)
        observed = decoder._observed(request, generation_config, seed, stream_id) if decoder.observers.active else None
        run = Run(decode(request), request, seed, Watching(decoder.observers, observed))
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
        length = request.prompt.shape[1]
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
        prompt: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        seed: int | None,
        stream_id: int,
    ) -> Request:
        wants = self.policy.wants | (self.policy.wants_optional & self._offered())
        if self.rule == "rejection" and seed is not None:
            self._refuse_bias(wants)
        # What such drafters know of a position depends on the tokens drafted before it; see GuardedPolicy.
        stepwise = self.rule == "rejection" and seed is not None and self.drafter.kind != "block-diffusion"
        noise = None
        if seed is not None:
            noise = GumbelNoise(seed, stream_id, self.spec.vocab_size, prompt.device, salt=TARGET_SALT)
        # The count of requests tells greedy ones apart, which have no seed: a policy must not explore alike in each.
        self.requests += 1
        generator = torch.Generator().manual_seed(hashed(seed or 0, stream_id, self.requests, POLICY_SALT) >> 1)
        keep_hidden = bool(wants & {Feature.PREFILL_HIDDEN, Feature.LAST_HIDDEN})
        return Request(
            prompt=prompt,
            target=TargetSession(self.target, feature_layers=self.drafter.feature_layers, keep_hidden=keep_hidden),
            drafter=self.drafter.begin(),
            policy=GuardedPolicy(self.policy, self.spec, strict=self.strict, stepwise=stepwise),
            rule=make_rule(self.rule, Processors(processors), noise, prompt.shape[1]),
            stopping=Stopping(criteria, prompt.shape[1]),
            clock=self.clock,
            spec=self.spec,
            wants=wants,
            generator=generator,
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
        made = resolve_policy(policy)
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

    def _largest(self, given: int | None) -> int:
        most = self.drafter.max_block_size
        if given is not None and not 1 <= given <= most:
            raise ValueError(f"max_block_size {given} is not within 1 .. {most}, what drafter {self.drafter.name} can")
        return given or most

    def _ids(self, prompt: str) -> Tensor:
        return cast("Tensor", self._tokenizer()(prompt, return_tensors="pt")["input_ids"])

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("this needs a tokenizer: SpeculativeDecoder(..., tokenizer=tokenizer)")
        return self.tokenizer
