"""A fixed order of sources: the first that has something to offer drafts, at a block size of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from bpkit.policy import Policy, PolicyConfig, PolicyError, State
from bpkit.types import Context, CostModel, DecoderSpec, Feature, Plan

if TYPE_CHECKING:
    from torch import Tensor


def _read(value: object) -> object:
    if isinstance(value, str):  # a `;` may stand for `+`; a comma separates options on the command line
        return value.replace(";", "+").split("+")
    return (value,) if isinstance(value, int) else value


Size = Annotated[int, Field(ge=1)]
Sizes = Annotated[tuple[Size, ...] | None, BeforeValidator(_read)]
Places = Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_read)]


class PriorityConfig(PolicyConfig):
    """Options of `priority`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "store_block_size": (4, 6, 8, 12),
        "model_block_size": (2, 3, 4, 6),
        "min_match": (1, 2, 3),
    }

    order: Places = Field(
        default=None,
        description="sources, first choice first: a list, or text such as 1+0; by default free ones, then others",
    )
    store_block_size: Size | None = Field(
        default=None, description="positions to draft from free sources; by default each one's trained block size"
    )
    model_block_size: Size | None = Field(default=None, description="the same of the others")
    block_sizes: Sizes = Field(
        default=None, description="one for each source of the order, as 8+4; goes before the two above"
    )
    min_match: int = Field(
        default=1, ge=1, description="tokens that a match must have for its offer to count; offers without one do"
    )


class Priority(Policy):
    """Of the sources, in `order`, the first that has something to offer drafts; no draft if none has.

    A source that is not free always has something, so that those behind it never draft. With a store before a model
    this is the rule of `flashspec` (the model where prompt lookup finds no match), with several stores the order of
    Hierarchy Drafting (2502.05609).
    """

    Config = PriorityConfig
    wants = frozenset({Feature.SOURCE_OFFER, Feature.SOURCE_MATCH})
    config: PriorityConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        import torch  # here, so that options can be listed without it

        sources, own = decoder.sources, self.config
        default = sorted(range(len(sources)), key=lambda place: not sources[place].work.free)
        order = default if own.order is None else own.order
        if not order or len(set(order)) < len(order) or max(order) >= len(sources):
            raise PolicyError(
                f"policy 'priority': option `order` is {_text(order)}, and this decoder has {len(sources)} source(s) "
                "of drafts, numbered from 0: name some of them, each once"
            )
        if own.block_sizes is not None and len(own.block_sizes) != len(order):
            raise PolicyError(
                f"policy 'priority': option `block_sizes` is {_text(own.block_sizes)}, and the order is "
                f"{_text(order)}: give one size for each of these sources"
            )
        of_kind = [own.store_block_size if sources[place].work.free else own.model_block_size for place in order]
        usual = [size or sources[place].trained_block_size for size, place in zip(of_kind, order, strict=True)]
        sizes = own.block_sizes or usual
        for place, size in zip(order, sizes, strict=True):
            if size > sources[place].max_block_size:
                raise PolicyError(
                    f"policy 'priority': block size {size} of source {place} ({sources[place].drafter}) is above "
                    f"{sources[place].max_block_size}, the largest that it drafts here"
                )
        self.order, self.sizes = torch.tensor(order), torch.tensor(sizes)

    def select(self, state: State, context: Context) -> Plan:
        offer, match = (context[name][:, self.order] for name in (Feature.SOURCE_OFFER, Feature.SOURCE_MATCH))
        has: Tensor = (offer > 0) & ((match == 0) | (match >= self.config.min_match))
        first, some = has.int().argmax(-1), has.any(-1)  # the first of those that have
        return Plan(self.sizes[first].where(some, 1), self.order[first].where(some, 0))


def _text(numbers: Any) -> str:
    return "+".join(map(str, numbers)) or "empty"
