"""How a target is served: rows together in slots, row by row with caches or snapshots of states, or not at all.

Ordinary attention caches are known to drop tokens exactly. Any other target is tried once when a decoder is made: a few
tokens read in passes with rejections must give what they give one at a time. What does not is refused by name. Whether
rows of different lengths may share passes is tried as well; where they may not, each row has passes of its own.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

from bpkit.decode.drafter import Drafter
from bpkit.decode.pretrained import input_device
from bpkit.decode.row_by_row import CachedRows, RowByRow, StatefulRows
from bpkit.decode.slot_target import SlotTarget, may_share_passes
from bpkit.decode.slots import DUMMY
from bpkit.decode.stateful import StatefulTarget, cache_argument, crop_of
from bpkit.decode.target import CachedTarget
from bpkit.decode.trees import Tree

Sessions = SlotTarget | RowByRow
PREFIX, TOKENS = 24, 6
"""Tokens that a probe reads at first, and after them."""
_NOTHING: dict[str, Any] = {"feature_layers": (), "keep_hidden": False}
"""Hidden states that a probe wants."""
SMALL = 100_000_000
"""Parameters up to which a model of reduced precision is copied to float32 for its probe."""

_ORDINARY = {DynamicLayer, DynamicSlidingWindowLayer, DUMMY}
_FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a few tokens in an unusual way may raise."""
_known: WeakKeyDictionary[PreTrainedModel, dict[str, type[Sessions] | str]] = WeakKeyDictionary()
"""By the way in which the model computes attention."""
_trees: WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = WeakKeyDictionary()


def session_class(model: PreTrainedModel) -> type[Sessions]:
    """The kind of session that serves a target exactly, found once for each model object.

    Raises:
        ValueError: none does; the message names the target and says why.
    """
    found = served_by(model)
    if isinstance(found, str):
        name = f"{model.name_or_path} ({type(model).__name__})" if model.name_or_path else type(model).__name__
        raise ValueError(f"target {name} cannot be decoded speculatively: {found}; use plain generate")
    return found


def served_by(model: PreTrainedModel) -> type[Sessions] | str:
    """The kind of session whose memory goes back exactly, or why there is none."""
    known, attention = _known.setdefault(model, {}), str(model.config._attn_implementation)
    if attention not in known:
        known[attention] = _find(model)
    return known[attention]


def _find(model: PreTrainedModel) -> type[Sessions] | str:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder, and the decoder has no input for its encoder"
    if cache_argument(model) is None:
        return "it takes no cache from which rejected tokens could be dropped"
    try:
        if _hides_by_forgetting(model):
            return "its cache forgets what its masks would show, so that what a token sees depends on the pass"
        cropped, certain = _crops(model)
        weight = next(model.parameters())
        untried = weight.is_meta or isinstance(weight, FakeTensor)
        kind = (CachedTarget if cropped else StatefulTarget) if certain or untried else _probe(model, cropped)
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = str(error).splitlines()
        return f"it does not read a few tokens in several passes ({type(error).__name__}: {said[0] if said else ''})"
    if not isinstance(kind, str) and kind.stateful:
        return StatefulRows
    if isinstance(kind, str):
        return kind
    return SlotTarget if may_share_passes(model) and (untried or _shares(model)) else CachedRows


def _hides_by_forgetting(model: PreTrainedModel) -> bool:
    """Whether a sliding window is in the cache alone: queries of one pass then see as far back as the first (Moshi)."""
    if not type(model).__module__.startswith("transformers."):
        return False
    kinds, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    modules = {type(part).__module__ for part in model.modules()}
    return "sliding_attention" in kinds and not any(
        hasattr(sys.modules.get(name), "create_sliding_window_causal_mask") for name in modules
    )


def _crops(model: PreTrainedModel) -> tuple[bool, bool]:
    """Whether cropping may serve a target, and whether that is certain without trying."""
    if cache_argument(model) != "past_key_values" or not model._supports_default_dynamic_cache():
        return False, False
    kinds = {type(layer) for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers}
    linear = {kind for kind in kinds if issubclass(kind, LinearAttentionCacheLayerMixin)}
    if any(crop_of(kind) is None for kind in kinds - linear):
        return False, False
    ordinary = (
        not linear
        and not model._is_stateful
        and getattr(model.config, "is_decoder", True) is not False
        and type(model).__module__.startswith("transformers.")
        and type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and kinds <= _ORDINARY
    )
    return True, ordinary


def _probe(model: PreTrainedModel, cropped: bool) -> type[CachedTarget] | str:
    """The first kind of session whose passes give what one token at a time gives."""
    model = _precise(model)
    with torch.inference_mode():
        tokens = _some_tokens(model)
        expected = _one_at_a_time(model, tokens)
        at_once = StatefulTarget(model, **_NOTHING)._pass(tokens, TOKENS, []).logits[:, -TOKENS:].float()
        # Where reading all at once agrees as well, what it differs by is rounding. In some architectures it does not:
        # they read a prompt by another rule than single tokens, and plain decoding is what single tokens give.
        spread = float(expected.std())
        tolerance = _tolerance(model, _difference(at_once, expected) / spread)
        error = math.inf
        if cropped:  # whether it really is, linear layers know once they hold some tokens
            session = CachedTarget(model, **_NOTHING)
            session.prefill(tokens)
            cropped = session.past.is_croppable
        for kind in (CachedTarget, StatefulTarget) if cropped else (StatefulTarget,):
            error = _difference(_with_rejections(kind, model, tokens), expected) / spread
            if error <= tolerance:
                return kind
    return (
        "several tokens read at once after a prompt do not give what they give one at a time "
        f"(scores differ by {error:.1g} of their spread, rounding allows {tolerance:.1g})"
    )


def _tolerance(model: PreTrainedModel, rounding: float) -> float:
    """Largest difference between scores, in their spread, that is still rounding.

    Args:
        rounding: a difference that should be nothing else. That it is small says little of other shapes of passes: by
            some kernels a few positions are the same to the bit, and those of padded rows are not.
    """
    eps = torch.finfo(model.dtype).eps
    most, least = 8 * math.sqrt(eps), max(math.sqrt(eps) / 4, 16 * eps)
    return min(max(10 * rounding, least), most) if rounding < most else math.sqrt(eps) / 4


def _shares(model: PreTrainedModel) -> bool:
    """Whether two rows of different lengths, with rejections, give in shared passes what each gives alone."""
    model = _precise(model)
    try:
        with torch.inference_mode():
            tokens = _some_tokens(model)
            texts = (tokens[:, :12], tokens[:, 12:22])
            alone = [CachedTarget(model, **_NOTHING).verify(text).logits.float() for text in texts]
            parts = CachedTarget(model, **_NOTHING)
            parts.prefill(texts[0][:, :9])
            spread = float(torch.cat(alone, dim=1).std())
            rounding = _difference(parts.verify(texts[0][:, 9:]).logits.float(), alone[0][:, 9:]) / spread
            together = _together(model, texts, ((9, 4), (1, 2), (0, 3), (2, 1)), wrong=(1, 3))
            errors = [
                _difference(found, expected[:, -found.shape[1] :])
                for found, expected in zip(together, alone, strict=True)
            ]
            return max(errors) / spread <= _tolerance(model, rounding)
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False


def _together(
    model: PreTrainedModel, texts: Sequence[Tensor], passes: Sequence[tuple[int, ...]], wrong: tuple[int, ...]
) -> list[Tensor]:
    """Logits of each row's tokens after the first pass, [1, count, vocab], read in shared passes.

    Args:
        texts: int64 [1, length] each. passes: tokens that each row reads in each pass.
        wrong: tokens beside those of the second pass that are rejected.
    """
    rows = len(texts)
    found: list[list[Tensor]] = [[] for _ in texts]
    session = SlotTarget(model, rows=rows, slots=rows, capacity=texts[0].shape[1], **_NOTHING)
    for number, counts in enumerate(passes):
        more = wrong if number == 1 else (0,) * rows
        read = [count + added for count, added in zip(counts, more, strict=True)]
        fed = texts[0].new_zeros((rows, max(read)))
        for i, (text, held, count) in enumerate(zip(texts, session.held, counts, strict=True)):
            fed[i, :count] = text[0, held : held + count]
        if number == 0:
            session.prefill(fed, read, last=False)
            continue
        logits = session.verify(fed, read).logits.float()
        session.rollback(more)
        for i, count in enumerate(counts):
            found[i].append(logits[i : i + 1, :count])
    return [torch.cat(parts, dim=1) for parts in found]


def refuse_branches(drafter: Drafter, model: PreTrainedModel, rule: str) -> None:
    """Raise ValueError for a drafter of trees where rule or target verify chains alone."""
    branches = getattr(drafter, "branches", 1)
    if branches == 1:
        return
    if rule != "coupled":
        raise ValueError(
            f"drafter {drafter.name} drafts trees (branches={branches}), and rule {rule!r} verifies chains alone: use "
            "rule 'coupled', or branches=1"
        )
    why = why_no_trees(model)
    if why is not None:
        raise ValueError(f"target {type(model).__name__} {why}: draft chains for it, branches=1")


def why_no_trees(model: PreTrainedModel) -> str | None:
    """What keeps a model from reading trees."""
    kind = session_class(model)
    if not issubclass(kind, SlotTarget):
        why = "its layers keep one state for a whole text" if kind.stateful else "it reads rows apart"
        return f"reads one path at a time, because {why}"
    return None if reads_trees(model) else "does not give for the nodes of a tree what it gives for their paths"


def reads_trees(model: PreTrainedModel) -> bool:
    """Whether a target in slots gives for nodes of trees what it gives for their paths; tried once for each model."""
    known, attention = _trees.setdefault(model, {}), str(model.config._attn_implementation)
    if attention not in known:
        weight = next(model.parameters())
        known[attention] = weight.is_meta or isinstance(weight, FakeTensor) or _tries_trees(model)
    return known[attention]


@torch.inference_mode()
def _tries_trees(model: PreTrainedModel) -> bool:
    """Two rows of different lengths, with a tree each, and tokens after the paths that stand."""
    model = _precise(model)
    try:
        tokens = _some_tokens(model)
        texts, parents = (tokens[:, :12], tokens[:, 12:21]), ([-1, 0, -1, 2, 0, 4], [-1, -1, 1])
        tree = Tree.of(parents, tokens.device)
        session = SlotTarget(model, rows=2, slots=2, capacity=24, **_NOTHING)
        prompts = torch.cat([texts[0], torch.nn.functional.pad(texts[1], (0, 3))])
        session.prefill(prompts[:, :-1], [11, 8], last=False)
        drafted = tokens[:, 21:27].expand(2, -1)
        anchors = torch.stack([texts[0][0, -1:], texts[1][0, -1:]])
        found = session.verify_trees(torch.cat([anchors, drafted], dim=1), tree).logits.float()
        session.accept(tree.counts, ([0, 1, 5, 6], [0, 2, 3]))
        after = session.verify(tokens[:, 27:29].expand(2, -1), [2, 2]).logits.float()
        errors, spread = [], float(found[0].std())
        for row, own in enumerate(parents):
            paths: list[list[int]] = [[]]
            for node, before in enumerate(own):
                paths.append([*paths[before + 1], node])
            parts = [torch.cat([drafted[:1, :0], *(drafted[:1, i : i + 1] for i in path)], dim=1) for path in paths]
            wanted = [_of_path(model, texts[row], part)[:, -1] for part in parts]
            errors.append(_difference(found[row, : len(paths)], torch.cat(wanted)))
            whole = _of_path(model, texts[row], parts[-1], tokens[:, 27:29])
            errors.append(_difference(after[row], whole[0, -2:]))
        pieces = CachedTarget(model, **_NOTHING)
        pieces.prefill(texts[0][:, :-3])
        rounding = _difference(pieces.verify(texts[0][:, -3:]).logits.float(), _of_path(model, texts[0])[:, -3:])
        return max(errors) / spread <= _tolerance(model, rounding / spread)
    except _FAULTS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False


def _of_path(model: PreTrainedModel, *parts: Tensor) -> Tensor:
    """Logits of a text that is read by itself, float32 [1, length, vocab]."""
    return CachedTarget(model, **_NOTHING).verify(torch.cat(parts, dim=1)).logits.float()


def _precise(model: PreTrainedModel) -> PreTrainedModel:
    """A small model in float32, in which rounding hides nothing."""
    reduced = torch.finfo(model.dtype).eps > torch.finfo(torch.float32).eps
    special = getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)
    if reduced and not special and model.num_parameters() <= SMALL:
        return copy.deepcopy(model).float()
    return model


def _some_tokens(model: PreTrainedModel) -> Tensor:
    """Token ids int64 [1, PREFIX + TOKENS], none of which stands for an image or the like."""
    config = model.config
    special = {
        value
        for part in (config, config.get_text_config())
        for name, value in part.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    usual = [i for i in range(min(config.get_text_config().vocab_size, 100)) if i not in special]
    return torch.tensor([[usual[7 * i % len(usual)] for i in range(PREFIX + TOKENS)]], device=input_device(model))


def _one_at_a_time(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits [1, TOKENS, vocab] of the last tokens, as plain decoding reads them."""
    session = StatefulTarget(model, **_NOTHING)
    session.prefill(tokens[:, :PREFIX])
    found = []
    for i in range(PREFIX, PREFIX + TOKENS):
        found.append(session.verify(tokens[:, i : i + 1]).logits)
        session.rollback(0)
    return torch.cat(found, dim=1).float()


def _with_rejections(kind: type[CachedTarget], model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The same by passes of which the last tokens are rejected."""
    session, found = kind(model, **_NOTHING), []
    session.prefill(tokens[:, :PREFIX])
    for start, wrong in ((0, 2), (2, 1), (4, 0)):
        right = tokens[:, PREFIX + start : PREFIX + start + 2]
        found.append(session.verify(torch.cat([right, tokens[:, :wrong]], dim=1)).logits[:, :2])
        session.rollback(wrong)
    return torch.cat(found, dim=1).float()


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
