"""From a GGUF file to a model as transformers keeps it: safetensors in float32, config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file into a folder, and read it back to see that it is whole. Needs gguf, accelerate.

    Raises:
        ValueError: what was written is not what was read.
    """
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    unquantised(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_whole(folder, model)
    if AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the tokenizer that was written to {folder} is not that of {gguf.name}")


def unquantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF: transformers refuses to save one that does."""
    model.config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def check_whole(folder: Path, model: PreTrainedModel) -> None:
    """Raise ValueError unless a folder holds every weight of a model, and none besides."""
    again, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    amiss = {name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in map(str, info[kind])}
    wanted, found = model.state_dict(), again.state_dict()
    amiss |= {name for name in wanted.keys() | found.keys() if name not in wanted or name not in found}
    amiss |= {name for name in wanted.keys() & found.keys() if not torch.equal(wanted[name], found[name])}
    if amiss:
        shown = ", ".join(sorted(amiss)[:4])
        raise ValueError(f"the model that was written to {folder} is not whole ({shown}): fetch it again")
