"""`bpkit demo`: a short tour on the pair that ships with bpkit, or on another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.rule import Rule

from bpkit.cli import options
from bpkit.cli.errors import when_interrupted
from bpkit.cli.terminal import console, progress_bar
from bpkit.config import Config
from bpkit.prompts import INSTRUCTIONS, Prompt, choose_prompts

POLICIES = ("fixed:4", "fixed:{trained}", "threshold", "bandit")
STREAMED_POLICY = "fixed:8"
STREAMED_TOKENS, MEASURED_TOKENS = 80, 96
ABOUT = {
    "maths": "worked word problems: hard to predict",
    "code": "Python: names and indentation repeat",
    "structured": "JSON, tables and logs: the next line looks like the last",
    "chat": "questions and small tasks: nothing to copy",
    "rewriting": "a text to work on: much of it comes again",
    "conversion": "data into another format: nearly all of it comes again",
}


@options.takes(config=options.settings(options.MODELS | options.PRODUCTS | options.threads()))
def demo(
    *,
    config: Config,
    limit: Annotated[int, typer.Option(help="Prompts of each domain in the comparison.", min=1)] = 3,
) -> None:
    """Decode under several policies: one text, different speeds.

    Reads prompts that ship with bpkit and writes nothing: openings of texts, or for a target that chats, users'
    messages. With the shipped pair it needs no network and no GPU, and takes about a minute on two cores.

    `bpkit demo`

    `bpkit demo --target smollm2 --limit 1`

    Next: `bpkit bench` measures, and `bpkit generate` takes prompts of your own.
    """
    out = console()
    from bpkit.cli.models import in_chat, load_decoder
    from bpkit.judge.wall_clock.bench import BenchSettings, run_bench
    from bpkit.judge.wall_clock.report import print_report

    out.print(
        "A drafter proposes a block of tokens, the target checks them in one pass, and what it would have said itself "
        "stands.\nA policy decides how many to propose and to check; it changes the speed, never the text.\n"
    )
    with when_interrupted("The demo writes nothing; `bpkit demo --limit 1` is shorter."):
        decoder = load_decoder(config, STREAMED_POLICY)
        chats = decoder.tokenizer is not None and decoder.tokenizer.chat_template is not None
        prompts = choose_prompts(Path(INSTRUCTIONS) if chats else None, (), limit)
        ready = in_chat(decoder, prompts)
        first = {prompt.domain: place for place, prompt in reversed(list(enumerate(prompts)))}
        for domain in dict.fromkeys(prompt.domain for prompt in prompts):
            place = first[domain]
            _stream_one(out, decoder, prompts[place], ready[place].text)
        out.print(Rule("the same prompts under several policies, and without any", align="left"))
        policies = [policy.format(trained=decoder.drafter.trained_block_size) for policy in POLICIES]
        settings = BenchSettings(
            policies=dict(zip(policies, policies, strict=True)),
            options={"max_new_tokens": MEASURED_TOKENS, "temperature": 0.0},
            threads=config.runtime.threads,
        )
        with progress_bar() as bar:
            report = run_bench(decoder, ready, settings, bar)
    print_report(report, out)
    out.print(escape(conclusion(report)), soft_wrap=True)


def _stream_one(out: Any, decoder: Any, prompt: Prompt, text: str) -> None:
    """One prompt of a domain: what was asked dim, the text as it comes, and how it went."""
    from bpkit.cli.generate import stream

    out.print(Rule(f"{prompt.domain} ({ABOUT[prompt.domain]})", align="left"))
    out.print(escape(prompt.text), style="dim", end="\n\n" if prompt.chat else "", soft_wrap=True)
    result, seconds = stream(decoder, text, max_new_tokens=STREAMED_TOKENS, temperature=0.0)
    count = result.tokens.shape[1]
    out.print(
        f"{count} tokens in {len(result.steps)} target passes under {STREAMED_POLICY}: acceptance length "
        f"{result.acceptance_length:.2f}, {count / seconds:.0f} tokens/s\n",
        style="italic",
    )


def conclusion(report: dict[str, Any]) -> str:
    """What the tables show, in a sentence or two."""
    policies = report["overall"]["policies"]
    same = all(entry["identical_text"] for entry in policies.values())
    best = max(policies, key=lambda name: policies[name]["tokens_per_second"])
    by_domain = {d: g["best_fixed"] for d, g in report["domains"].items()}
    sizes = ", ".join(f"{name} in {domain}" for domain, name in by_domain.items())
    text = "The text was the same every time." if same else "Some texts differ from plain decoding: see above."
    return (
        f"{text} Fastest overall: {best}, {policies[best]['speedup']:.2f}x plain decoding. Best fixed block size: "
        f"{sizes}. With so few prompts these are impressions; `bpkit bench` measures."
    )
