"""The whole job of a trace: what is missing is traced, by one process or many, and written as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from bpkit import __version__
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.installation.machine import describe_machine
from bpkit.progress import NoProgress, Progress
from bpkit.prompts import Prompt
from bpkit.trace.collect.tracer import IndexedPrompt, TraceOptions, Traces, drafts_side_by_side
from bpkit.trace.fingerprint import fingerprint_models, fingerprint_texts
from bpkit.trace.store.manifest import Manifest, ModelFacts
from bpkit.trace.store.storage import TraceWriter, claimed


class Workers(Protocol):
    """Something that traces prompts, as a `Tracer` does."""

    def traces(self, prompts: Sequence[IndexedPrompt]) -> Traces:
        """Trace each (index, prompt), in any order. Closing the generator ends the work."""
        ...


def describe(
    decoder: SpeculativeDecoder, prompts: Sequence[Prompt], options: TraceOptions, *, command: str = ""
) -> Manifest:
    """The manifest of a trace that is to be made."""
    spec, machine = decoder.spec, describe_machine(decoder.target.device)
    of_target, of_drafter = fingerprint_models(decoder)
    return Manifest(
        target=ModelFacts(name=spec.target, fingerprint=of_target),
        drafter=ModelFacts(name=spec.drafter, fingerprint=of_drafter),
        drafter_kind=spec.drafter_kind,
        drafter_work=spec.work,
        trained_block_size=decoder.drafter.trained_block_size,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        stateful=spec.stateful,
        branches=spec.branches,
        candidates=spec.branches > 1 and drafts_side_by_side(decoder.drafter),
        dtype=str(decoder.target.dtype).removeprefix("torch."),
        sampling=dict(options.sampling),
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        block_sizes=options.block_sizes,
        features=tuple(sorted(options.features)),
        prompt_ids=tuple(p.id for p in prompts),
        prompts_fingerprint=fingerprint_texts(part for p in prompts for part in (p.id, p.domain, p.text)),
        command=command,
        versions={"bpkit": __version__, "torch": machine.pop("torch"), "transformers": machine.pop("transformers")},
        machine={name: machine[name] for name in ("cpu", "cores", "gpu", "python", "platform")},
    )


def run_job(
    folder: Path, manifest: Manifest, prompts: Sequence[Prompt], workers: Workers, progress: Progress | None = None
) -> Manifest:
    """Trace the prompts that are missing in `folder`, then complete it. Run again, it goes on where it was stopped.

    Raises:
        TraceError: the folder holds another trace, or another run works on it.
    """
    bar = progress or NoProgress()
    with claimed(folder):
        writer = TraceWriter(folder, manifest)
        missing = writer.missing()
        bar.start("tracing", len(prompts))
        for _ in range(len(prompts) - len(missing)):
            bar.tick()
        with closing(workers.traces([(i, prompts[i]) for i in missing])) as traces:
            for trace in traces:
                writer.write(trace)
                bar.tick()
        return writer.finish()
