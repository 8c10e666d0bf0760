"""The manifest of a trace: what was traced, with what, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bpkit.files import faults
from bpkit.types import DecoderSpec, DraftWork, Feature, work_of

MANIFEST = "manifest.json"


class TraceError(ValueError):
    """A trace cannot be used or written; the message says what to do."""


class ModelFacts(BaseModel):
    """A model: name or path as it was given, and fingerprint of its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    fingerprint: str | None


class Manifest(BaseModel):
    """Everything but the tables.

    Attributes:
        complete: whether all prompts are there; until then they lie in `parts`.
        sampling: `temperature`, and `top_p`, `top_k`, `repetition_penalty` where they were given.
        seed: of the noise; None for greedy outputs.
        stateful: whether the target has recurrent states.
        branches: of drafts that are trees, the most children of a node; 1 of chains.
        candidates: whether the candidates of each position were traced, of which trees of any size can be made.
        prompt_ids: in the order of the trace.
        prompts_fingerprint: of ids, domains and texts.
        command, versions, machine: how it came to be; they do not count when a run is taken up again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    complete: bool = False
    target: ModelFacts
    drafter: ModelFacts
    drafter_kind: str
    trained_block_size: int
    hidden_size: int
    vocab_size: int
    stateful: bool = False
    dtype: str
    sampling: dict[str, float]
    max_new_tokens: int
    seed: int | None
    block_sizes: tuple[int, ...]
    features: tuple[Feature, ...]
    prompt_ids: tuple[str, ...]
    prompts_fingerprint: str
    drafter_work: DraftWork | None = None
    branches: int = 1
    candidates: bool = False
    near_ties: int | None = None
    output_tokens: int | None = None
    command: str = ""
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}

    @property
    def spec(self) -> DecoderSpec:
        """The decoder that replay stands for: the one that was traced, limited to the block sizes that were."""
        largest = max(self.block_sizes)
        trained = min(self.trained_block_size, largest)
        most = self.branches * trained if self.candidates and trained == self.trained_block_size else largest
        return DecoderSpec(
            target=self.target.name,
            drafter=self.drafter.name,
            drafter_kind=self.drafter_kind,
            trained_block_size=trained,
            max_block_size=most,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            stateful=self.stateful,
            work=self.drafter_work or work_of(self.drafter_kind),
            branches=self.branches,
        )

    def differences(self, other: Manifest) -> list[str]:
        """What makes `other` another trace, as `name: ours, not theirs`."""
        aside = {"drafter_work", "complete", "command", "versions", "machine", "near_ties", "output_tokens"}
        ours, theirs = self.model_dump(mode="json", exclude=aside), other.model_dump(mode="json", exclude=aside)
        different = [name for name in ours if ours[name] != theirs[name]]
        said = {name: f"{ours[name]}, not {theirs[name]}" for name in different} | {"prompt_ids": "other prompts"}
        return [f"{name}: {said[name]}" for name in different]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a trace folder. Raises TraceError or FileNotFoundError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no trace (no {MANIFEST} in it): make one with `bpkit trace --out {folder}`"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise TraceError(f"{path} is not a manifest that this version reads ({faults(error)}); trace again") from None
