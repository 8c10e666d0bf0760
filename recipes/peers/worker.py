"""A process that decodes with one library when it is asked, and waits for the next line otherwise.

`recipes.peers.processes` starts it by its path, with the interpreter of an environment that has the library, so it
imports the library, torch and the standard library only. Lines are JSON:

    in   {"library": ..., "target": FOLDER, "contestants": {NAME: SETTINGS}}
    out  {"versions": {...}, "failed": {NAME: TEXT}}
    in   {"contestant": NAME, "ids": [...], "max_new_tokens": N, "threads": N, "stream": N, "trial": BOOL}
    out  {"tokens": [...], "seconds": S, "steps": N, "step_tokens": N, "near_ties": [...]}   or {"error": TEXT}

All libraries are timed alike: wall clock from token ids in to the finished output. `steps` are target passes after the
one over the prompt, and `step_tokens` the tokens that they yielded. Decoding is greedy, in float32, on the CPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TextIO

import torch

Reply = dict[str, Any]
Decode = Callable[..., Reply]
"""(token ids, max_new_tokens=, stream=, trial=) -> the reply."""
REPORTED = ("torch", "transformers", "bpkit", "flashspec")
"""Libraries whose versions are told."""


class Library(Protocol):
    """A library with the target loaded."""

    def contestant(self, settings: Mapping[str, Any]) -> Decode:
        """One way of decoding, with its own models."""
        ...


class Bpkit:
    """`settings`: `policy`, or None for plain decoding; `drafter`, as bpkit takes it; `cost`, a file or None;
    `products`, which are the same for all.
    """

    def __init__(self, target: str) -> None:
        from bpkit.decode.decoder import SpeculativeDecoder

        self.base = SpeculativeDecoder.from_pretrained(target, "ngram", "fixed:1", dtype=torch.float32, device="cpu")
        self.drafters: dict[str, Any] = {}

    def contestant(self, settings: Mapping[str, Any]) -> Decode:
        from bpkit.decode.decoder import SpeculativeDecoder
        from bpkit.decode.products import use_products
        from bpkit.decode.resolve_drafter import resolve_drafter
        from bpkit.judge.wall_clock.decoders import plain_loop
        from bpkit.trace.cost import read_cost

        products = settings["products"]
        use_products(products, self.base.model)
        if settings["policy"] is None:
            return partial(self._decode, plain_loop(self.base))
        spec = settings["drafter"]
        if spec not in self.drafters:
            self.drafters[spec] = resolve_drafter(spec, self.base.model)
        cost = read_cost(settings["cost"]) if settings["cost"] else None
        shared: dict[str, Any] = {"tokenizer": self.base.tokenizer, "capture": self.base.capture, "cost": cost}
        decoder = SpeculativeDecoder(
            self.base.target, self.drafters[spec], settings["policy"], products=products, **shared
        )
        return partial(self._decode, decoder)

    def _decode(self, decoder: Any, ids: list[int], *, max_new_tokens: int, stream: int, trial: bool) -> Reply:
        """A trial is run by a copy, so that no policy has learned from it when it counts."""
        from bpkit.judge.wall_clock.decoders import PolicyDecoder

        used = decoder.with_policy(None) if trial else decoder
        timed = PolicyDecoder("", used, {"max_new_tokens": max_new_tokens, "temperature": 0.0}, seed=0)
        found = timed.run(torch.tensor([ids]), stream)
        told = {"tokens": list(found.tokens), "seconds": found.seconds, "near_ties": list(found.near_ties)}
        return {**told, "steps": found.steps, "step_tokens": len(found.tokens) - 1}


class Transformers:
    """`settings`: `way`, plain or a peer's name; `options` of that way; `draft`, the folder of its model or None."""

    def __init__(self, target: str) -> None:
        self.target = causal_lm(target)

    def contestant(self, settings: Mapping[str, Any]) -> Decode:
        way, options, draft = settings["way"], dict(settings["options"]), settings["draft"]
        if way == "transformers-assisted":
            assistant = causal_lm(draft)
            for name, value in options.items():  # where `generate` reads them
                setattr(assistant.generation_config, name, value)
            options = {"assistant_model": assistant}
        elif way == "transformers-dflash":
            from bpkit.draft.dflash_model import DFlashModel  # transformers has the decoding, but no such model

            model = DFlashModel.from_pretrained(draft, dtype=torch.float32).eval()
            model.config.block_size = options.pop("block_size", model.config.block_size)
            options = {"assistant_model": model, "speculation_type": "dflash"}
        return partial(self._decode, options)

    def _decode(self, how: dict[str, Any], ids: list[int], *, max_new_tokens: int, **_: Any) -> Reply:
        prompt = torch.tensor([ids])
        asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": max_new_tokens}
        with cache_lengths(self.target) as lengths:
            started = time.perf_counter()
            output = self.target.generate(**asked, do_sample=False, **how)
            seconds = time.perf_counter() - started
        tokens = output[0, len(ids) :].tolist()
        # An assistant drafts before the prompt is read: the first pass may have yielded several tokens.
        first = lengths[1] - len(ids) + 1 if len(lengths) > 1 else len(tokens)
        return {"tokens": tokens, "seconds": seconds, "steps": len(lengths) - 1, "step_tokens": len(tokens) - first}


class FlashSpec:
    """`settings`: `way`, `options` and `draft` as above; the drafter is a causal language model."""

    def __init__(self, target: str) -> None:
        self.package: Any = importlib.import_module("flashspec")
        self.parts: Any = importlib.import_module("flashspec.engine")
        model = causal_lm(target)
        ends = model.generation_config.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else list(ends or ())
        self.target = self.parts.TargetModel(target, torch.device("cpu"), torch.float32, model=model)

    def contestant(self, settings: Mapping[str, Any]) -> Decode:
        """The model drafter alone is what it calls a bandit with one arm."""
        alone, options, draft = settings["way"] == "flashspec-model", dict(settings["options"]), settings["draft"]
        sampling = {name: options.pop(name) for name in ("gamma",) if name in options}
        if alone:
            options |= {"drafter_strategy": "bandit", "bandit": self.package.BanditConfig(n_arms=1)}
        sampled = self.package.SamplingConfig(temperature=0.0, **sampling)
        config = self.package.FlashSpecConfig(device="cpu", dtype="float32", sampling=sampled, **options)
        drafter = self.parts.HuggingFaceDrafter(draft, "cpu", torch.float32, model=causal_lm(draft))
        return partial(self._decode, self.package.SpeculativeEngine(config, [drafter], self.target))

    def _decode(self, engine: Any, ids: list[int], *, max_new_tokens: int, **_: Any) -> Reply:
        prompt = torch.tensor([ids])
        started = time.perf_counter()
        result = engine.generate(prompt, max_new_tokens=max_new_tokens, eos_token_ids=self.ends)
        seconds = time.perf_counter() - started
        tokens = result.output_ids[0, : result.n_tokens_generated].tolist()
        return {"tokens": tokens, "seconds": seconds, "steps": len(result.arm_steps), "step_tokens": len(tokens)}


LIBRARIES: dict[str, Callable[[str], Library]] = {
    "bpkit": Bpkit,
    "transformers": Transformers,
    "flashspec": FlashSpec,
}


def causal_lm(folder: str) -> Any:
    """A causal language model as transformers loads it, in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@contextmanager
def cache_lengths(model: Any) -> Iterator[list[int]]:
    """The length of the cache before each pass of a model."""
    lengths: list[int] = []

    def note(module: object, arguments: object, named: dict[str, Any]) -> None:
        cache = named.get("past_key_values")
        lengths.append(0 if cache is None else int(cache.get_seq_length()))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        hook.remove()


def serve(lines: Iterable[str], out: TextIO) -> None:
    """Answer each line with one. What one contestant raises is its answer, and the others go on."""
    rest = iter(lines)
    asked = json.loads(next(rest))
    decoders, failed = loaded(asked)
    modules = {name: sys.modules[name] for name in REPORTED if name in sys.modules}
    versions = {name: str(getattr(module, "__version__", "")) for name, module in modules.items()}
    print(json.dumps({"versions": versions, "failed": failed}), file=out, flush=True)
    for line in rest:
        reply = answer(decoders, json.loads(line))
        wait_until_idle()
        print(json.dumps(reply), file=out, flush=True)


def loaded(asked: Mapping[str, Any]) -> tuple[dict[str, Decode], dict[str, str]]:
    """The contestants that are there, and what was raised by those that are not."""
    decoders: dict[str, Decode] = {}
    failed: dict[str, str] = {}
    try:
        library = LIBRARIES[asked["library"]](asked["target"])
    except Exception as error:
        return {}, dict.fromkeys(asked["contestants"], said(error))
    for name, settings in asked["contestants"].items():
        try:
            decoders[name] = library.contestant(settings)
        except Exception as error:
            failed[name] = said(error)
    return decoders, failed


def answer(decoders: Mapping[str, Decode], asked: dict[str, Any]) -> Reply:
    """Decode one prompt with one contestant."""
    name, ids, threads = asked.pop("contestant"), asked.pop("ids"), asked.pop("threads")
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    try:
        return {"near_ties": [], **decoders[name](ids, **asked)}
    except Exception as error:
        return {"error": said(error)}


def said(error: Exception) -> str:
    """What was raised, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def wait_until_idle(pause: float = 0.02, most: int = 50) -> None:
    """Wait until no thread of this process works: OpenMP's spin for a while, and would slow whoever is next."""
    for _ in range(most):
        before = time.process_time()
        time.sleep(pause)
        if time.process_time() - before < pause / 20:
            return


def main() -> None:
    """Keep stdout for replies: what libraries print goes to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, out)


if __name__ == "__main__":
    main()
