"""Features that a trace does not hold, from the models again: one target pass and the drafts of a stored output."""

from __future__ import annotations

import torch

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.prompts import Prompt
from bpkit.trace.collect.tracer import Output, TraceOptions, Tracer, generation_options
from bpkit.trace.fingerprint import fingerprint_models
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import offered, with_features
from bpkit.trace.store.manifest import Manifest, TraceError
from bpkit.types import Feature


def check_models(decoder: SpeculativeDecoder, manifest: Manifest) -> None:
    """Raise TraceError unless the decoder's models are those of the trace."""
    roles = ("target", manifest.target), ("drafter", manifest.drafter)
    for (role, facts), found in zip(roles, fingerprint_models(decoder), strict=True):
        if found != facts.fingerprint:
            raise TraceError(
                f"the {role} is not the one that was traced ({facts.name}, fingerprint {facts.fingerprint}; this one "
                f"has {found}): name the models of the trace with --target and --drafter"
            )


class Recompute:
    """A `Fill` for `Replayer`. The last prompt is remembered, so that several policies may ask for it in turn.

    Raises:
        TraceError: the models are not those of the trace.
    """

    def __init__(self, decoder: SpeculativeDecoder, manifest: Manifest) -> None:
        check_models(decoder, manifest)
        self.decoder, self.manifest = decoder, manifest
        self.offers = decoder._offered()
        self._last: PromptTrace | None = None

    @torch.inference_mode()
    def __call__(self, prompt: PromptTrace, features: frozenset[Feature]) -> PromptTrace:
        """The prompt with `features` added."""
        again = self._last
        if again is None or again.index != prompt.index or not features <= offered(again):
            wanted = features | (offered(again) if again is not None else frozenset())
            again = self._last = self._traced_again(prompt, wanted)
        added = {**again.features, **again.drafts.features}
        return with_features(prompt, {name: added[name] for name in features})

    def _traced_again(self, prompt: PromptTrace, features: frozenset[Feature]) -> PromptTrace:
        manifest, device = self.manifest, self.decoder.target.device
        options = TraceOptions(manifest.block_sizes, prompt.max_new_tokens, manifest.sampling, manifest.seed, features)
        ids = torch.tensor(prompt.prompt_tokens).long()[None].to(device)
        tokens = torch.tensor(prompt.output_tokens).long()[None].to(device)
        run = self.decoder.run(ids, stream_id=prompt.index, **generation_options(options))
        again = Output(prompt.index, Prompt(prompt.id, prompt.domain, ""), ids, tokens, run.request.sampler.processors)
        (trace,) = Tracer(self.decoder, options).retraced([again])
        return trace
