"""Early exit: the first layers of the target and one trained layer, with the target's final norm and head.

After EESD (Liu et al. 2024, 2406.03853).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from bpkit.assets import drafter_path
from bpkit.decode.parts import (
    alike,
    first_layers_of,
    layers_of,
    new_layer,
    numbered,
    reads_alike,
    some_tokens,
    with_layers,
)
from bpkit.decode.pretrained import device_of
from bpkit.decode.serving import session_class
from bpkit.decode.slot_target import SlotTarget
from bpkit.decode.text import RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter, AutoregressiveSession
from bpkit.draft.config import ASSISTANT_BLOCK_SIZE
from bpkit.draft.exit_session import SharedExitSession
from bpkit.files import write_json
from bpkit.types import EARLY_EXIT, work_of

ARCHITECTURE = "EarlyExitLayer"
"""What `architectures` of a config.json says of a folder with an exit."""
WEIGHTS = "model.safetensors"
SAMPLE = 64
"""Values of the target's embedding that tell whether it is the target that an exit was trained for."""


class EarlyExitDrafter(AutoregressiveDrafter):
    """Drafts token after token with the target's first layers, a trained layer, and the target's norm and head.

    Where the target's rows lie in slots, the first layers' keys and values are the target's own, computed once.

    Args:
        exit: the trained layer. target: whose layers, norm and head it shares.
        layer: how many of the target's layers it has below.

    Raises:
        ValueError: a target whose layers are not in a list, or whose first layers alone give something else.
    """

    kind, work = EARLY_EXIT, work_of(EARLY_EXIT)

    def __init__(
        self,
        exit: nn.Module,
        target: PreTrainedModel,
        *,
        layer: int,
        name: str = "early exit",
        block_size: int = ASSISTANT_BLOCK_SIZE,
        branches: int = 1,
    ) -> None:
        refuse_unfit_layer(target, layer)
        self.exit, self.layer = exit, layer
        model = exit_model(exit, target, layer)
        if not reads_alike(target, model, layer):
            raise ValueError(
                f"the first {layer} layers of {type(target).__name__} give something else by themselves than below "
                "the others: early exit cannot share them; use another drafter"
            )
        super().__init__(model, target, name=name, block_size=block_size, branches=branches)
        self.feature_layers = (layer - 1,)
        self.alone, self.below = with_layers(target, [numbered(exit, 0)], [-1]), first_layers_of(target, layer)
        self._shares = session_class(target) is SlotTarget and self._gives_the_same()

    @classmethod
    def load(
        cls, path: str, target: PreTrainedModel, *, block_size: int = ASSISTANT_BLOCK_SIZE, branches: int = 1
    ) -> EarlyExitDrafter:
        """Load an exit from a folder or the Hub; without a path, the target's own or the shipped one.

        Raises:
            ValueError: it is no exit, or it was trained for another target.
        """
        path = drafter_path(path, str(target.name_or_path or ""), "exit")
        config, _ = PreTrainedConfig.get_config_dict(path)
        refuse_another_target(path, config, target)
        layer = config["layer"]
        refuse_unfit_layer(target, layer)
        exit = new_layer(target, -1)
        file = cached_file(path, WEIGHTS)
        try:
            exit.load_state_dict(load_file(str(file)))
        except RuntimeError as error:
            raise ValueError(f"the weights of {path} are not those of a layer of this target: {error}") from error
        return cls(
            exit.to(device_of(target.get_output_embeddings(), target), target.dtype),
            target,
            layer=layer,
            name=path,
            block_size=block_size,
            branches=branches,
        )

    def begin(self, text: RunningText) -> AutoregressiveSession:
        self._follow_the_target()
        return super().begin(text)

    def begin_beside(self, text: RunningText, target: object) -> AutoregressiveSession:
        """A session beside the target's, whose keys and values of the first layers it shares where these lie in slots.

        Beside any other it reads texts by itself, with the same layers and a cache of its own. So it does for trees.
        """
        if (
            self.branches == 1
            and isinstance(target, SlotTarget)
            and target.wrapper is None
            and self._shares
            and self.below is not None
        ):
            self._follow_the_target()
            return SharedExitSession(self, text, target, self.alone, self.below)
        return self.begin(text)

    def _follow_the_target(self) -> None:
        """The target may compute attention in another way by now."""
        for part in (self.model, self.alone, self.below):
            if part is not None:
                part.config._attn_implementation = self.target.config._attn_implementation

    def _gives_the_same(self) -> bool:
        """Whether a few tokens have the same logits in two parts as in one model."""
        if self.below is None:
            return False
        tokens = some_tokens(self.target)
        with torch.inference_mode():
            hidden = self.below(input_ids=tokens, use_cache=False).last_hidden_state
            found = self.alone(inputs_embeds=hidden, use_cache=False).logits
            return alike(self.model(tokens, use_cache=False).logits, found)


def exit_model(exit: nn.Module, target: PreTrainedModel, layer: int) -> PreTrainedModel:
    """The target as it would be with its first `layer` layers and the exit alone; weights are shared."""
    return with_layers(target, [*layers_of(target)[:layer], numbered(exit, layer)], [*range(layer), -1])


def refuse_unfit_layer(target: PreTrainedModel, layer: int) -> None:
    """Raise ValueError unless the target has more than `layer` layers, in a list."""
    depth = len(layers_of(target))
    if not 1 <= layer < depth:
        raise ValueError(
            f"an exit after {layer} layers: this target has {depth}, of which 1 to {depth - 1} may be below it"
        )


def save_exit(exit: nn.Module, target: PreTrainedModel, layer: int, folder: Path) -> None:
    """Write an exit into a folder: its weights in bfloat16, and what target they are for."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in exit.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", {"architectures": [ARCHITECTURE], "layer": layer, "target": identity(target)})


def identity(target: PreTrainedModel) -> dict[str, Any]:
    """What tells a target from others: its class, its shape, and some values of its embedding."""
    config = target.config.get_text_config()
    shape = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    weight = target.get_input_embeddings().weight.detach().flatten()
    sample: Tensor = weight[:: max(1, len(weight) // SAMPLE)][:SAMPLE].float().cpu()
    return {"architecture": type(target).__name__, **shape, "embedding": [round(v, 6) for v in sample.tolist()]}


def refuse_another_target(path: str, config: dict[str, Any], target: PreTrainedModel) -> None:
    """Raise ValueError unless a configuration is that of an exit of this target."""
    if ARCHITECTURE not in (config.get("architectures") or ()) or "layer" not in config or "target" not in config:
        raise ValueError(
            f"{path} holds no early exit: `bpkit train exit` makes one for a target; name a folder with one"
        )
    ours, theirs = identity(target), json.loads(json.dumps(config["target"]))
    for name, value in ours.items():
        if name != "embedding" and value != theirs.get(name):
            raise ValueError(
                f"the early exit {path} was trained for a target whose {name} is {theirs.get(name)}, and this one's is "
                f"{value}: train one for this target with `bpkit train exit`"
            )
    # Half the digits: the same weights in another dtype are the same target.
    if not torch.allclose(torch.tensor(ours["embedding"]), torch.tensor(theirs["embedding"]), rtol=0.05, atol=1e-3):
        raise ValueError(
            f"the early exit {path} was trained for another target of this shape: its embedding has other values; "
            "train one for this target with `bpkit train exit`"
        )
