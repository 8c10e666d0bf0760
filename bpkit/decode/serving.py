"""How a target is served: by cropping its cache, by snapshots of its states, or not at all.

Ordinary attention caches are known to drop tokens exactly. Any other target is tried once when a decoder is made: a few
tokens read in passes with rejections must give what they give one at a time. What does not is refused by name.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from bpkit.decode.pretrained import input_device
from bpkit.decode.stateful import StatefulTarget, cache_argument, crop_of
from bpkit.decode.target import CachedTarget
from bpkit.decode.text import RunningText

Session = TypeVar("Session", bound=CachedTarget)
PREFIX, TOKENS = 24, 6
"""Tokens that a probe reads at first, and after them."""
SMALL = 100_000_000
"""Parameters up to which a model of reduced precision is copied to float32 for its probe."""

_ORDINARY = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
_known: WeakKeyDictionary[PreTrainedModel, type[CachedTarget] | str] = WeakKeyDictionary()


def session_class(model: PreTrainedModel) -> type[CachedTarget]:
    """The kind of session that serves a target exactly, found once for each model object.

    Raises:
        ValueError: none does; the message names the target and says why.
    """
    found = served_by(model)
    if isinstance(found, str):
        name = f"{model.name_or_path} ({type(model).__name__})" if model.name_or_path else type(model).__name__
        raise ValueError(f"target {name} cannot be decoded speculatively: {found}; use plain generate")
    return found


def served_by(model: PreTrainedModel) -> type[CachedTarget] | str:
    """The kind of session whose cache goes back exactly, or why there is none."""
    if model not in _known:
        _known[model] = _find(model)
    return _known[model]


def _find(model: PreTrainedModel) -> type[CachedTarget] | str:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder, and the decoder has no input for its encoder"
    if cache_argument(model) is None:
        return "it takes no cache from which rejected tokens could be dropped"
    try:
        cropped, certain = _crops(model)
        weight = next(model.parameters())
        if certain or weight.is_meta or isinstance(weight, FakeTensor):
            return CachedTarget if cropped else StatefulTarget
        return _probe(model, cropped)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = str(error).splitlines()
        return f"it does not read a few tokens in several passes ({type(error).__name__}: {said[0] if said else ''})"


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
    eps = torch.finfo(model.dtype).eps
    with torch.inference_mode():
        tokens = _some_tokens(model)
        expected = _one_at_a_time(model, tokens)
        at_once = _session(StatefulTarget, model, tokens)._pass(tokens, TOKENS, []).logits[:, -TOKENS:].float()
        spread = float(expected.std())
        # Where reading all at once agrees as well, what it differs by is rounding. In some architectures it does not:
        # they read a prompt by another rule than single tokens, and plain decoding is what single tokens give.
        rounding, most = _difference(at_once, expected) / spread, 8 * math.sqrt(eps)
        tolerance = min(max(10 * rounding, 16 * eps), most) if rounding < most else math.sqrt(eps) / 4
        error = math.inf
        if cropped:  # whether it really is, linear layers know once they hold some tokens
            session = _session(CachedTarget, model, tokens)
            session.prefill()
            cropped = session.held.is_croppable
        for kind in (CachedTarget, StatefulTarget) if cropped else (StatefulTarget,):
            error = _difference(_with_rejections(kind, model, tokens), expected) / spread
            if error <= tolerance:
                return kind
    return (
        "several tokens read at once after a prompt do not give what they give one at a time "
        f"(scores differ by {error:.1g} of their spread, rounding allows {tolerance:.1g})"
    )


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
    session, found = _session(StatefulTarget, model, tokens[:, :PREFIX]), []
    session.prefill()
    for i in range(PREFIX, PREFIX + TOKENS):
        session.text.append(tokens[:, i : i + 1], tokens[:, i : i + 1].cpu())
        found.append(session.verify(tokens[:, :0]).logits)
    return torch.cat(found, dim=1).float()


def _with_rejections(kind: type[CachedTarget], model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The same by passes of which the last tokens are rejected."""
    session, found = _session(kind, model, tokens[:, :PREFIX]), []
    session.prefill()
    for start, wrong in ((0, 2), (2, 1), (4, 0)):
        begin = PREFIX + start
        anchor, right = tokens[:, begin : begin + 1], tokens[:, begin + 1 : begin + 2]
        session.text.append(anchor, anchor.cpu())
        found.append(session.verify(torch.cat([right, tokens[:, :wrong]], dim=1)).logits[:, :2])
        session.rollback([wrong])
        session.text.append(right, right.cpu())
    return torch.cat(found, dim=1).float()


def _session(kind: type[Session], model: PreTrainedModel, prompt: Tensor) -> Session:
    return kind(model, RunningText(prompt), feature_layers=(), keep_hidden=False)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
