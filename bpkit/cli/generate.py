"""`bpkit generate`: text from a prompt, streamed as it is decided."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpkit.cli import options
from bpkit.cli.errors import when_interrupted
from bpkit.cli.terminal import progress_bar, say
from bpkit.config import Config
from bpkit.files import check_writable, write_at_once
from bpkit.prompts import BATCH_SIZE, Prompt, all_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.decode.result import Generation
    from bpkit.types import DecoderSpec, Step

DEFAULT_NEW_TOKENS = 256
STEPS_IN_A_LINE = 20
_many = partial(typer.Option, rich_help_panel="Many prompts")


@options.takes(
    config=options.settings(
        options.POLICY
        | options.MODELS
        | options.SAMPLING
        | options.seed("Of the sampling noise. One seed, one text, whatever the policy.")
        | options.RUNTIME
    )
)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to go on from; `-`, or nothing in a pipe, reads it from stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.", metavar="FILE")] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Hand the prompt to the target as a user's message, by the chat template of its tokenizer; without "
            "this the text is taken as it is.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        _many(
            help="Decode all prompts of this file side by side: JSONL with `prompt`, and if you like `id` and what "
            "that prompt alone has: `max_new_tokens`, `seed`, `stream_id`, `stop_strings`.",
            metavar="FILE",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        _many(
            help="Where their texts go, JSONL in the order of the prompts. What is there already is kept.",
            metavar="FILE",
        ),
    ] = None,
    batch_size: Annotated[int, _many(help="Prompts that run at once.", min=1)] = BATCH_SIZE,
    prefill_chunk: Annotated[
        int | None,
        _many(help="Tokens of a prompt that are read between two steps of those that run.", metavar="N", min=1),
    ] = None,
    *,
    config: Config,
    stop: Annotated[
        list[str] | None, typer.Option(help="End after this text; repeat for more.", metavar="TEXT")
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Afterwards, on stderr: speed, steps, where time went.")
    ] = False,
    tree: Annotated[
        Path | None,
        typer.Option(
            help="Draw the tree of a step, what was verified of it and what stands, as SVG; with drafters of trees.",
            metavar="FILE",
        ),
    ] = None,
    tree_step: Annotated[
        int | None,
        typer.Option(
            help="Which step, from 1; by default the one in which most stands that is not on the drafter's best path.",
            metavar="N",
            min=1,
        ),
    ] = None,
) -> None:
    """Generate text from a prompt, and stream it as it is decided.

    Reads a prompt, and writes the text to stdout and all else to stderr. The text depends on prompt, target, sampling
    settings and seed; a policy changes only how fast it comes.

    `bpkit generate "def fibonacci(n):" --policy threshold:0.6 --stats`

    `echo "Question: What is 7 times 8?" | bpkit generate --temperature 0.7 --seed 1 --observe jsonl:path=steps.jsonl`

    `bpkit generate --prompts questions.jsonl --batch-size 8 --out texts.jsonl`

    `bpkit generate --chat "Why is the sky blue?" --target Qwen/Qwen3-4B --drafter z-lab/Qwen3-4B-DFlash-b16`

    Next: `bpkit bench` compares policies on many prompts.
    """
    if (prompts is None) != (out is None):
        raise ValueError("--prompts FILE and --out FILE belong together: many prompts, and where their texts go")
    if tree_step is not None and tree is None:
        raise ValueError("--tree-step says which step --tree FILE draws: give both")
    if prompts is not None and out is not None:
        if prompt is not None or file is not None:
            raise ValueError("give one prompt, or --prompts FILE, not both")
        if tree is not None:
            raise ValueError("--tree draws a step of one prompt: leave it out, or give that prompt without --prompts")
        texts = all_prompts(prompts, chat=chat)
        write_texts(texts, out, config, stop, batch_size=batch_size, prefill_chunk=prefill_chunk)
        return
    text = read_prompt(prompt, file)
    if tree is not None:
        check_writable(tree, suffixes=(".svg",))
    from bpkit.cli.models import in_chat, load_decoder
    from bpkit.judge.tree_picture import StepTrees

    kept, seen = "The text until then is all that was written.", StepTrees()
    observers = [*(config.observers or ()), *([seen] if tree else [])]
    with when_interrupted(kept), closing(load_decoder(config, observers=observers)) as decoder:
        if tree is not None:
            refuse_chains(decoder)
        wanted = config.sampling.options(max_new_tokens=DEFAULT_NEW_TOKENS) | {"seed": config.sampling.seed}
        if stop:
            wanted["stop_strings"] = stop
        ready = in_chat(decoder, [Prompt("", "", text, chat=chat)])[0].text
        result, seconds = stream(decoder, ready, **wanted)
    if tree is not None:
        draw_tree(tree, seen.steps, tree_step, result, decoder)
    if stats:
        say("")
        for line in describe(result, seconds, decoder.spec):
            say(line)


def refuse_chains(decoder: SpeculativeDecoder) -> None:
    """Raise ValueError if no source of a decoder drafts trees."""
    if all(source.branches == 1 for source in decoder.spec.sources):
        raise ValueError(
            f"--tree draws trees, and {decoder.spec.drafter} drafts chains: use a drafter with branches, such as "
            "--drafter block-diffusion:branches=4"
        )


def draw_tree(
    file: Path, steps: Sequence[Step], number: int | None, result: Generation, decoder: SpeculativeDecoder
) -> None:
    """Write the picture of a step's tree."""
    from bpkit.judge.tree_picture import TreePicture, step_to_draw

    assert decoder.tokenizer is not None
    number = step_to_draw(steps, number)
    step, tokens = steps[number - 1], result.sequences[0].tolist()
    before = len(tokens) - result.tokens.shape[1] + int(step.position)
    picture = TreePicture.of(step, number, tokens[:before], decoder.tokenizer.decode)
    write_at_once(file, picture.svg())
    say(f"wrote {file}: {picture.title}")


def write_texts(prompts: list[Prompt], out: Path, config: Config, stop: list[str] | None, **batch: Any) -> None:
    """The texts of many prompts into a file. Exits with 1 after all others ended, if some failed."""
    from bpkit.cli.generate_many import TextFile, generate_all
    from bpkit.cli.models import in_chat, load_decoder

    wanted = config.sampling.options(max_new_tokens=DEFAULT_NEW_TOKENS)
    if stop:
        wanted["stop_strings"] = stop
    seed = config.sampling.seed or 0
    runtime = {name: getattr(config.runtime, name) for name in ("rule", "dtype")}
    settings = {
        "target": config.target,
        "seed": seed,
        "chat": any(prompt.chat for prompt in prompts),
        **wanted,
        **runtime,
    }
    if config.runtime.rule == "rejection":  # the texts depend on them as well
        settings |= {"drafter": config.drafter, "policy": config.policy}
    file = TextFile(out, prompts, settings)
    kept = f"What was decoded is in {out}; the same command goes on from there."
    with when_interrupted(kept), closing(load_decoder(config, observers=config.observers or ())) as decoder:
        ready = {prompt.id: prompt.text for prompt in in_chat(decoder, prompts)}
        with progress_bar() as bar:
            failed = generate_all(decoder, prompts, ready, file, bar, seed=seed, **wanted, **batch)
    say(f"wrote {out}: {len(prompts) - len(failed)} texts")
    if failed:
        shown = "; ".join(f"{name}: {why}" for name, why in list(failed.items())[:5])
        say(f"{len(failed)} of {len(prompts)} prompts failed, the same command tries them again: {shown}")
        raise typer.Exit(1)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from argument, file or stdin. Raises ValueError that says how to give one."""
    if prompt is not None and file is not None:
        raise ValueError("give the prompt as an argument or with --file, not both")
    if file is not None:
        if not file.exists():
            raise FileNotFoundError(f"there is no prompt file {str(file)!r}")
        text = file.read_text(encoding="utf-8")
    elif prompt is not None and prompt != "-":
        text = prompt
    elif prompt == "-" or not sys.stdin.isatty():
        text = sys.stdin.read().removesuffix("\n")  # the newline that `echo` adds is no part of the prompt
    else:
        raise ValueError('give a prompt: bpkit generate "def add(a, b):", or --file FILE, or pipe it in')
    if not text:
        raise ValueError("the prompt is empty: give at least one character")
    return text


def stream(decoder: SpeculativeDecoder, prompt: str | Tensor, **wanted: Any) -> tuple[Generation, float]:
    """Generate and write the text to stdout as it is decided. Returns the result and its wall-clock seconds."""
    from bpkit.decode.streaming import TextPieces

    assert decoder.tokenizer is not None
    pieces = TextPieces(decoder.tokenizer)
    started = time.perf_counter()
    with decoder.run(prompt, **wanted) as run:
        try:
            for record in run:
                _write(pieces.put(record.tokens))
        except KeyboardInterrupt:
            _write([*pieces.end(), "\n"])
            raise
        seconds = time.perf_counter() - started
        _write([*pieces.end(), "\n"])
        return run.finish(), seconds


def _write(texts: Iterable[str]) -> None:
    sys.stdout.writelines(texts)
    sys.stdout.flush()


def describe(result: Generation, seconds: float, spec: DecoderSpec) -> list[str]:
    """What `--stats` prints; `seconds` is wall-clock time of the whole call, and `spec` the decoder's."""
    count, parts = result.tokens.shape[1], result.seconds
    phases = {"target": parts.verify, "drafter": parts.draft, "policy": parts.policy}
    phases["other"] = max(seconds - sum(phases.values()), 0.0)
    share = ", ".join(f"{name} {100 * spent / seconds:.0f}%" for name, spent in phases.items())
    seed = "none (greedy)" if result.seed is None else result.seed
    steps = [f"{int(s.num_accepted)}/{int(s.verify_length)}" for s in result.steps]
    from bpkit.judge.sources import counts_of_steps, shares, told

    by_source = shares([counts_of_steps(spec, result.steps)])
    lines = [
        f"{count} tokens in {len(result.steps)} steps and {seconds:.2f} s: {count / seconds:.1f} tokens/s",
        f"acceptance length {result.acceptance_length:.2f} (tokens of steps / steps)",
        f"time: {share}",
        *([f"by source, % of steps / % of their tokens: {told(by_source)}"] if by_source else []),
        f"seed {seed}, fallbacks {result.fallbacks}, near ties {result.near_ties}",
        "accepted/verified drafted tokens of each step:",
    ]
    return lines + ["  " + " ".join(steps[i : i + STEPS_IN_A_LINE]) for i in range(0, len(steps), STEPS_IN_A_LINE)]
