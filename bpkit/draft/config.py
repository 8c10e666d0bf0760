"""Options of drafters. Imports no torch, so that they can be listed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NGRAM_BLOCK_SIZE, ASSISTANT_BLOCK_SIZE = 8, 6
"""Block sizes of drafters that were trained with none."""
LAST_PASS_WINDOW = 16
"""Drafted tokens of `last-pass`."""


STORES: tuple[Literal["context", "model", "corpus"], ...] = ("context", "model", "corpus")
"""Of `hierarchy`, in the published order."""


class DrafterConfig(BaseModel):
    """Base of the options of drafters: frozen, and unknown options are errors.

    Those that were given, and no others, are passed on to the drafter's target, `path` as its first argument.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockDiffusionConfig(DrafterConfig):
    """Options of `block-diffusion`."""

    path: str = Field(default="", description="folder or Hub name of a DFlash checkpoint; by default the shipped one")
    revision: str | None = Field(default=None, description="branch, tag or commit on the Hub")
    subfolder: str = Field(default="", description="where the checkpoint lies in its folder or repository")
    attn_implementation: str | None = Field(
        default=None, description="attention of transformers, such as sdpa or eager"
    )
    local_files_only: bool = Field(default=False, description="never ask the Hub")
    branches: int = Field(
        default=1, ge=1, description="candidates at each position; with more than one a draft is a tree of the best"
    )


class AutoregressiveConfig(DrafterConfig):
    """Options of `autoregressive`."""

    path: str = Field(
        default="", description="folder or Hub name of a causal language model; by default the shipped one"
    )
    block_size: int = Field(default=ASSISTANT_BLOCK_SIZE, ge=1, description="stands for a trained block size")
    branches: int = Field(
        default=1, ge=1, description="candidates after each token; with more than one a draft is a tree of the best"
    )


class EarlyExitConfig(DrafterConfig):
    """Options of `early-exit`."""

    path: str = Field(default="", description="folder or Hub name of a trained exit; by default the shipped one")
    block_size: int = Field(default=ASSISTANT_BLOCK_SIZE, ge=1, description="stands for a trained block size")
    branches: int = Field(
        default=1, ge=1, description="candidates after each token; with more than one a draft is a tree of the best"
    )


class NgramConfig(DrafterConfig):
    """Options of `ngram`."""

    max_ngram: int = Field(default=3, ge=1, description="longest n-gram that is looked up, first")
    min_ngram: int = Field(default=1, ge=1, description="shortest, if no longer one is found")
    block_size: int = Field(default=NGRAM_BLOCK_SIZE, ge=1, description="stands for a trained block size")
    branches: int = Field(
        default=1, ge=1, description="continuations after each token; with more than one a draft is a tree of the best"
    )

    @model_validator(mode="after")
    def _in_order(self) -> NgramConfig:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} is above max_ngram {self.max_ngram}")
        return self


def _split(value: object) -> object:
    """`A+B` as a list: on the command line a comma separates options."""
    return value.split("+") if isinstance(value, str) else value


class EnsembleConfig(DrafterConfig):
    """Options of `ensemble`."""

    members: Annotated[tuple[str | dict[str, Any], ...], BeforeValidator(_split)] = Field(
        min_length=2, description="a list of drafters; or folders and Hub names with + between them"
    )
    weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...] | None, BeforeValidator(_split)] = Field(
        default=None, description="one for each member, such as 0.7+0.3; by default they follow the target's tokens"
    )

    @model_validator(mode="after")
    def _one_for_each(self) -> EnsembleConfig:
        if self.weights is not None and (len(self.weights) != len(self.members) or sum(self.weights) == 0):
            raise ValueError(f"{len(self.members)} members need as many weights, not all 0; got {list(self.weights)}")
        return self


class LastPassConfig(DrafterConfig):
    """Options of `last-pass`."""

    window: int = Field(
        default=LAST_PASS_WINDOW, ge=1, description="drafted tokens, where the policy has no other size"
    )
    repeat: int = Field(
        default=1,
        ge=0,
        description="a position that no pass has read yet repeats the token so many before it: 1 the last token, the "
        "width of an image the pixel above; 0 leaves it out",
    )


class HierarchyConfig(DrafterConfig):
    """Options of `hierarchy`."""

    store: str = Field(
        default="", description="folder of `bpkit store build`; without one the context store alone is asked"
    )
    order: Annotated[tuple[Literal["context", "model", "corpus"], ...], BeforeValidator(_split)] = Field(
        default=STORES, min_length=1, description="stores in the order in which they are asked, with + between them"
    )
    max_ngram: int = Field(default=4, ge=1, description="longest n-gram that the context store looks up, first")
    min_ngram: int = Field(default=1, ge=1, description="shortest, if no longer one is found")
    span: int = Field(default=4, ge=1, le=64, description="tokens that the context store keeps after each n-gram")
    candidates: int = Field(default=7, ge=1, description="continuations that it keeps for each n-gram")
    max_entries: int = Field(default=65536, ge=1, description="continuations that it keeps in all")
    max_match: int = Field(default=8, ge=1, le=16, description="longest match in the corpus store")
    min_match: int = Field(default=2, ge=1, description="shortest match in the corpus store")
    sure_match: int = Field(
        default=2, ge=1, description="a shorter match is passed over for a longer one in a later store"
    )
    go_on_match: int = Field(default=2, ge=1, description="match that a draft needs to go on beyond one look-up")
    look_ups: int = Field(default=8, ge=1, description="look-ups of a draft at most")
    last_pass: bool = Field(
        default=False, description="context also keeps what the target said after a wrong token; cannot be traced"
    )
    across_requests: bool = Field(
        default=False, description="one context store for all requests, so texts of one are drafted to others"
    )
    block_size: int = Field(default=NGRAM_BLOCK_SIZE, ge=1, description="stands for a trained block size")
    branches: int = Field(
        default=1, ge=1, description="continuations after each token; with more than one a draft is a tree of the best"
    )

    @model_validator(mode="after")
    def _fits(self) -> HierarchyConfig:
        for less, more in (("min_ngram", "max_ngram"), ("min_match", "max_match")):
            if getattr(self, less) > getattr(self, more):
                raise ValueError(f"{less} {getattr(self, less)} is above {more} {getattr(self, more)}")
        if len(set(self.order)) < len(self.order):
            raise ValueError(f"order {'+'.join(self.order)} names a store twice")
        return self
