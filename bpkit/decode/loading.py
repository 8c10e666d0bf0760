"""Loading causal language models strictly: every weight comes from the checkpoint, and no other is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def load_causal_lm(path: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub, on the CPU unless `device_map` says otherwise.

    transformers fills what a checkpoint lacks with random numbers and drops what it does not know, with a log message.
    Here either is an error.

    Args:
        options: of transformers' `from_pretrained`, such as `dtype`, `revision` or `local_files_only`.

    Raises:
        ValueError: the checkpoint is of an architecture that transformers does not have, such as a drafter's, or its
            weights are not those of the architecture.
    """
    config, _ = PreTrainedConfig.get_config_dict(path, **hub_options(options))
    refuse_unknown_architecture(path, config)
    model, info = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    refuse_other_weights(path, info, f"a {type(model).__name__}")
    return model


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of `from_pretrained` that say which files to read."""
    names = ("revision", "subfolder", "local_files_only", "cache_dir", "token", "force_download", "proxies")
    return {name: options[name] for name in names if name in options}


def refuse_unknown_architecture(path: str, config: Mapping[str, Any]) -> None:
    """Raise unless all `architectures` of a config.json are classes of transformers that read tokens by themselves.

    Drafters of other layouts (EAGLE, Medusa, multi-token prediction, DSpark) often carry the `model_type` of their
    target, by which transformers would take them for a small model of that type.
    """
    for name in config.get("architectures") or ():
        if not hasattr(transformers, name) or name.endswith(("AssistantForCausalLM", "AssistantModel")):
            raise ValueError(
                f"{path} is a {name}, not a causal language model of transformers: bpkit drafts with DFlash "
                "checkpoints (DFlashDraftModel), with causal language models and with n-grams; use one of these"
            )


def refuse_other_weights(path: str, info: Mapping[str, Any], what: str) -> None:
    """Raise if transformers' loading information tells of weights that are missing, unexpected or of another shape."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(key if isinstance(key, str) else str(key[0]) for key in info[kind])
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(
                f"the weights of {path} are not those of {what}: {kind.replace('_', ' ')} {shown}; "
                "use a complete checkpoint of that architecture, or load the model yourself and hand that over"
            )
