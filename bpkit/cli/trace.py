"""`bpkit trace`: what every draft at every position would have been, once, for exact replay under any policy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bpkit.cli import options
from bpkit.cli.errors import require, when_interrupted
from bpkit.cli.outputs import command_line
from bpkit.cli.terminal import progress_bar, say
from bpkit.config import Config
from bpkit.prompts import BATCH_SIZE, Prompt, choose_prompts, of_domains, read_dataset
from bpkit.registry.resolve import each_drafter
from bpkit.sizes import parse_sizes
from bpkit.types import Feature

if TYPE_CHECKING:
    from bpkit.decode.decoder import SpeculativeDecoder
    from bpkit.trace.collect import TraceOptions
    from bpkit.trace.collect.job import Workers
    from bpkit.trace.store.manifest import Manifest

DEFAULT_NEW_TOKENS = 128
_ALWAYS = {Feature.PREFILL_HIDDEN, Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY}
TO_BE_ADDED = frozenset(Feature) - _ALWAYS
"""Features that a trace holds only if it is asked to."""
_what = partial(typer.Option, rich_help_panel="What to trace")
_work = partial(typer.Option, rich_help_panel="Work")


def texts_of(
    prompts: options.Prompts = None,
    dataset: Annotated[
        str | None, options.of_prompts(help="A dataset of Hugging Face: `name` or `name:config`.", metavar="NAME")
    ] = None,
    split: Annotated[str, options.of_prompts(help="Of the dataset.", metavar="NAME")] = "test",
    column: Annotated[
        str, options.of_prompts(help="Key of the prompts in the file or dataset.", metavar="NAME")
    ] = "prompt",
    domain: options.Domains = None,
    limit: Annotated[int | None, options.of_prompts(help="Prompts of each domain; all by default.", min=1)] = None,
    chat: options.Chat = False,
) -> list[Prompt]:
    """The group of prompts: of a file or a dataset, or else all that ship."""
    if prompts is not None and dataset is not None:
        raise ValueError("--prompts and --dataset exclude each other: give one of them")
    if dataset is None:
        return choose_prompts(prompts, domain or [], limit, column=column, shipped_limit=None, chat=chat)
    found = of_domains(read_dataset(dataset, split, column), domain or [], limit, source=f"dataset {dataset}")
    return [replace(prompt, chat=chat) for prompt in found]


@options.takes(
    texts=texts_of,
    config=options.settings(
        options.MODELS
        | options.SAMPLING
        | options.seed("Of the sampling noise; by default 0. Greedy outputs have none.")
        | options.PLACE
        | options.threads()
    ),
)
def trace(
    out: Annotated[
        Path, typer.Option(help="Folder of the trace. Run again, it goes on where it stopped.", metavar="FOLDER")
    ],
    *,
    texts: list[Prompt],
    block_sizes: Annotated[
        str | None,
        _what(
            help="Such as `2-16` or `2+4+8`; by default every size up to the drafter's trained one. A policy that is "
            "replayed can ask for these and for 1.",
            metavar="SIZES",
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        _what(
            help="Also keep what a policy wants, such as last_hidden or draft_hidden (large); repeat for more.",
            metavar="NAME",
            autocompletion=lambda: sorted(TO_BE_ADDED),
        ),
    ] = None,
    outputs_of: Annotated[
        Path | None,
        _work(
            help="Take the outputs of this trace of the same prompts and settings, in place of decoding them: for a "
            "further source of drafts.",
            metavar="TRACE",
        ),
    ] = None,
    batch_size: Annotated[
        int, _work(help="Prompts that each process works on together. The trace is that of one at a time.", min=1)
    ] = BATCH_SIZE,
    num_workers: Annotated[int, _work(help="Processes, each with its own models and one thread.", min=1)] = 1,
    ray: Annotated[
        str | None,
        _work(
            help="Work on a Ray cluster: its address, or `auto` for the one that is running, or `local`. "
            "`--num-workers` actors share the prompts.",
            metavar="ADDRESS",
        ),
    ] = None,
    config: Config,
) -> None:
    """Record what would be drafted at every position, for replay.

    Writes a folder: outputs of the target, and for every position and block size what the drafter would propose. The
    output does not depend on drafter and policy, so that whether a draft stands is a table. Replay
    (`bpkit evaluate`) walks that table with any policy, in the place of models. Greedy unless a temperature is given.
    The same command goes on where it was interrupted.

    `bpkit trace --out TRACE`

    `bpkit trace --out TRACE --prompts questions.jsonl --column question --temperature 1 --num-workers 4`

    Of several drafters (`--drafter block-diffusion+ngram`) each is traced, in a folder of its own in TRACE.

    Next: `bpkit calibrate --out cost.json`, and `bpkit evaluate TRACE --cost cost.json`
    """
    require("pyarrow", extra="traces", purpose="A trace")
    wanted = known_features(features or [])
    sizes = parse_sizes(block_sizes, smallest=2) if block_sizes else None
    from bpkit.cli.models import in_chat, load_decoder
    from bpkit.decode.sources import sources_of
    from bpkit.trace.collect import GENERATE_WITH
    from bpkit.trace.collect.job import describe, run_job
    from bpkit.trace.collect.tracer import refuse_untraceable

    decoder = load_decoder(config, f"fixed:{GENERATE_WITH}")
    refuse_untraceable(decoder)  # before any of several drafters is traced
    sources, written = sources_of(decoder.drafter), each_drafter(config.drafter)
    several = len(sources) > 1
    for place, (source, drafter) in enumerate(zip(sources, written, strict=True)):
        own = config.model_copy(update={"drafter": drafter})
        folder = out / str(place) if several else out
        alone = decoder.with_policy(f"fixed:{GENERATE_WITH}", source) if several else decoder
        offered = range(2, alone.spec.trained_block_size + 1) if sizes is None else sizes
        fitting = tuple(size for size in offered if size <= alone.spec.max_block_size or not several)
        taken = str(outputs_of) if outputs_of else str(out / "0") if place else None
        settings, ready = trace_options(own, fitting, wanted, taken), in_chat(alone, texts)
        manifest = describe(alone, ready, settings, command=command_line())
        workers = chosen_workers(alone, own, settings, num_workers, ray, batch_size)
        kept = f"What was traced is in {folder}; the same command goes on from there."
        with when_interrupted(kept), progress_bar() as bar:
            done = run_job(folder, manifest, ready, workers, bar)
        report(folder, done)
    said = "make COST with `bpkit calibrate --out COST`" + (" and the same drafters" if several else "")
    say(f"Next: bpkit evaluate {out} --cost COST ({said})")


def known_features(names: list[str]) -> frozenset[Feature]:
    """Features by name. Raises ValueError that lists those a trace can keep."""
    for name in names:
        if name not in [*Feature]:
            raise ValueError(
                f"--features {name}: there is no such feature; to be added are: {', '.join(sorted(TO_BE_ADDED))}"
            )
    return frozenset(Feature(name) for name in names) & TO_BE_ADDED


def trace_options(
    config: Config, sizes: tuple[int, ...], features: frozenset[Feature], outputs_of: str | None = None
) -> TraceOptions:
    """Settings of the trace from the config."""
    from bpkit.trace.collect import TraceOptions

    wanted = config.sampling.options(max_new_tokens=DEFAULT_NEW_TOKENS, temperature=0.0)
    new_tokens = wanted.pop("max_new_tokens")
    seed = config.sampling.seed or 0 if wanted["temperature"] > 0 else None
    return TraceOptions(sizes, new_tokens, wanted, seed, features, outputs_of)


def chosen_workers(
    decoder: SpeculativeDecoder,
    config: Config,
    settings: TraceOptions,
    num_workers: int,
    ray: str | None,
    batch_size: int,
) -> Workers:
    """This process, several, or a Ray cluster."""
    from bpkit.trace.collect import Tracer

    here = Tracer(decoder, settings, batch_size=batch_size)  # refuses what cannot be traced, whoever works
    if num_workers == 1 and ray is None:
        return here
    from bpkit.trace.collect.workers import Models, Processes
    from bpkit.trace.fingerprint import fingerprint_models

    runtime = config.runtime
    models = Models(config.target, config.drafter, runtime.device, runtime.dtype, fingerprint_models(decoder))
    if ray is None:
        return Processes(models, settings, num_workers, batch_size)
    require("ray", extra="ray", purpose="--ray")
    from bpkit.trace.collect.ray_workers import OnRay

    return OnRay(models, settings, num_workers, ray, batch_size)


def report(out: Path, manifest: Manifest) -> None:
    """Say what is there now."""
    size = sum(path.stat().st_size for path in out.glob("*.parquet"))
    facts = {
        "drafter": manifest.drafter.name,
        "prompts": f"{len(manifest.prompt_ids):,}",
        "output tokens": f"{manifest.output_tokens or 0:,}",
        "block sizes": "+".join(map(str, manifest.block_sizes)),
        "near ties": f"{manifest.near_ties:,} output positions where rounding may decide",
        "size": f"{size / 1e6:.1f} MB",
    }
    say("\n".join([f"{out} is complete.", *(f"  {name:14} {value}" for name, value in facts.items())]))
