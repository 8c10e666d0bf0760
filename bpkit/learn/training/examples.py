"""Training examples of a trace, computed once, prompt by prompt, and kept as safetensors."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from bpkit.files import write_at_once
from bpkit.learn.training.policy_module import PolicyModule, TrainingOptions, rows
from bpkit.learn.training.run_folder import cost_label
from bpkit.policy import PolicyError
from bpkit.progress import Progress
from bpkit.trace.fingerprint import fingerprint_values
from bpkit.trace.records import PromptTrace

PROMPTS_A_FILE = 64
Examples = dict[str, Tensor]
"""Rows first."""


def collect_examples(
    module: PolicyModule, prompts: Sequence[PromptTrace], folder: Path, *, part: str, key: str, progress: Progress
) -> Examples:
    """Examples of all prompts, from `folder` where they are there.

    Memory: all of them, and while they are put together one key of them twice; the trace is read prompt by prompt.

    Args:
        part: `train` or `validation`. key: fingerprint of all that the examples depend on.

    Raises:
        PolicyError: the examples of some prompt are not what the protocol asks for, or there are none at all.
    """
    mine = folder / f"{part}-{key}"
    for other in folder.glob(f"{part}-*"):
        if other != mine:
            shutil.rmtree(other, ignore_errors=True)
    mine.mkdir(parents=True, exist_ok=True)
    progress.start(f"{part} examples", len(prompts))
    files = []
    for first in range(0, len(prompts), PROMPTS_A_FILE):
        places = range(first, min(first + PROMPTS_A_FILE, len(prompts)))
        files.append(mine / f"{first:06d}.safetensors")
        if not files[-1].is_file():
            made = [_checked(module, prompts[place], progress) for place in places]
            write_at_once(files[-1], safetensors.torch.save(_joined(made, module)))
        else:
            for _ in places:
                progress.tick()
    data = _joined([safetensors.torch.load_file(file) for file in files], module)
    if not data or not rows(data):
        raise PolicyError(f"policy {module.policy.name!r}: the {part} prompts give no examples to train with")
    return data


class ExampleData(L.LightningDataModule):
    """Examples for training and validation, in memory.

    The order of training follows from seed and epoch alone, whether the run was interrupted or not; each of several
    processes takes every n-th, all of them the same number.
    """

    def __init__(self, train: Examples, validation: Examples, options: TrainingOptions) -> None:
        super().__init__()
        self.train, self.validation, self.options = train, validation, options

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.validation, shuffle=False)

    def _loader(self, data: Examples, *, shuffle: bool) -> DataLoader[Any]:
        places: Any = range(rows(data))
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        # Each epoch it draws by its seed plus the epoch: seeds that follow each other must not share orders.
        order: Any = DistributedSampler(places, processes, rank, shuffle=shuffle, seed=self.options.seed * 1_000_003)

        def batch(chosen: list[int]) -> Examples:
            return {name: tensor[torch.tensor(chosen)] for name, tensor in data.items()}

        return DataLoader(places, self.options.batch_size, sampler=order, collate_fn=batch)


def examples_key(module: PolicyModule, data: str) -> str:
    """Fingerprint of what examples depend on: the prompts, the options, the cost model and the code that makes them."""
    source = inspect.getsourcefile(type(module))
    code = Path(source).read_bytes() if source and Path(source).is_file() else b""
    usual = set(TrainingOptions.model_fields) - {"seed"}  # a learning rate makes no other examples
    facts = {
        "data": data,
        "class": f"{type(module).__module__}:{type(module).__qualname__}",
        "policy": module.policy.config.model_dump(mode="json"),
        "features": sorted(module.features | module.policy.wants),
        "options": module.options.model_dump(mode="json", exclude=usual),
        "cost": cost_label(module.cost),
        "spec": repr(module.spec),
        "code": hashlib.sha256(code).hexdigest(),
    }
    return fingerprint_values(facts)


def size_of(data: Examples) -> dict[str, int]:
    """Rows and bytes."""
    return {"rows": rows(data), "bytes": sum(tensor.nbytes for tensor in data.values())}


def _checked(module: PolicyModule, prompt: PromptTrace, progress: Progress) -> Examples:
    with torch.no_grad():
        made = module.examples(prompt)
    progress.tick()
    where = f"policy {module.policy.name!r}: the examples of prompt {prompt.id!r}"
    if not made or not all(isinstance(value, Tensor) and value.ndim for value in made.values()):
        raise PolicyError(f"{where} must be a dict of tensors with rows first; got {type(made).__name__}")
    if len({len(value) for value in made.values()}) > 1:
        raise PolicyError(f"{where} differ in their rows: { {name: len(value) for name, value in made.items()} }")
    for name, value in made.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise PolicyError(f"{where}: {name!r} holds NaN or infinite values")
    return {name: value.detach().cpu().contiguous() for name, value in made.items()}


def _joined(parts: list[Examples], module: PolicyModule) -> Examples:
    names = list(parts[0])
    if any(set(part) != set(names) for part in parts):
        keys = sorted({", ".join(sorted(part)) for part in parts})
        raise PolicyError(f"policy {module.policy.name!r}: examples of prompts have different keys: {' | '.join(keys)}")
    try:
        return {name: torch.cat([part.pop(name) for part in parts]) for name in names}
    except RuntimeError as error:
        raise PolicyError(f"policy {module.policy.name!r}: examples of prompts do not fit together: {error}") from None
