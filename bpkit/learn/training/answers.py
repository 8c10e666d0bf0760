"""The target's own answers to prompts: what drafters are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bpkit.assets import model_path
from bpkit.files import write_at_once
from bpkit.learn.training.model import HELD_OUT, ModelRun

AT_ONCE = 128
"""Prompts in a batch of the target, and so in a shard."""
MOST_PROMPT_TOKENS = 128
"""A longer prompt is cut off."""


@dataclass(frozen=True, kw_only=True)
class DrafterRun(ModelRun):
    """How to train a drafter on what its target answers.

    Attributes:
        layers: transformer layers of the drafter.
        sequences: answers; prompts are cycled until there are as many, every other one sampled at temperature 1.
        new_tokens: tokens that the target generates for each prompt.
        answers: the `outputs.safetensors` of another run with this target, instead of new ones.
        start_from: folder of a drafter of the same kind to go on from.
    """

    layers: int = 2
    sequences: int = 6000
    new_tokens: int = 160
    answers: Path | None = None
    start_from: Path | None = None


def load_target(path: str, run: DrafterRun) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer, and model in bfloat16; from here on torch draws by the run's seed."""
    torch.manual_seed(run.seed)
    path = model_path(path)
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def target_answers(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], out: Path, run: DrafterRun
) -> tuple[Tensor, Tensor, Tensor]:
    """Generate sequences, half greedy and half sampled, into `out/outputs.safetensors`.

    Batches are kept as shards while the work runs, so a run that was cut short goes on where it stopped.

    Returns:
        `ids` int64 [sequences, time] right-padded, `prompt_length` and `length` int64 [sequences].

    Raises:
        ValueError: `run.answers` holds something else.
    """
    if run.answers is not None:
        return _read(run.answers)
    result, shards = out / "outputs.safetensors", out / "outputs"
    if not result.exists():
        # Sorting by length keeps padding, and so wasted work, small.
        chosen = sorted(islice(cycle(prompts), run.sequences), key=len)
        batches = [chosen[i : i + AT_ONCE] for i in range(0, run.sequences, AT_ONCE)]
        files = [shards / f"{index:05d}.safetensors" for index in range(len(batches))]
        for index, file in track(list(enumerate(files)), description="target outputs"):
            if not file.exists():
                torch.manual_seed(run.seed + index)
                greedy = _answers(target, tokenizer, batches[index][::2], run.new_tokens, sample=False)
                sampled = _answers(target, tokenizer, batches[index][1::2], run.new_tokens, sample=True)
                write_at_once(file, _padded([*greedy, *sampled]))
        parts = [load_file(file) for file in files]
        rows = [part["ids"][i, : part["length"][i]] for part in parts for i in range(len(part["length"]))]
        starts = torch.cat([part["prompt_length"] for part in parts]).tolist()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.seed)).tolist()
        write_at_once(result, _padded([(rows[i], starts[i]) for i in order]))
    return _read(result)


def _read(file: Path) -> tuple[Tensor, Tensor, Tensor]:
    data = load_file(file)
    if not data.keys() >= {"ids", "prompt_length", "length"} or not len(data["ids"]) > HELD_OUT:
        raise ValueError(
            f"{file} does not hold more than {HELD_OUT} answers (ids, prompt_length, length): name the "
            "outputs.safetensors of a run of `bpkit train drafter` with this target"
        )
    return data["ids"].long(), data["prompt_length"].long(), data["length"].long()


def learned_from(prompts: list[str], run: DrafterRun) -> dict[str, list[str]]:
    """What a drafter is trained on, for its record: the prompts, or a fingerprint of the answers."""
    if run.answers is None:
        return {"prompts": prompts}
    return {"answers": [hashlib.sha256(run.answers.read_bytes()).hexdigest()]}


@torch.inference_mode()
def _answers(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int, *, sample: bool
) -> Iterator[tuple[Tensor, int]]:
    """Yield (ids of prompt and answer, prompt length) for each prompt, EOS included."""
    if not prompts:
        return
    batch = tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        truncation=True,
        max_length=MOST_PROMPT_TOKENS,
        add_special_tokens=False,
    ).to(target.device)
    out = target.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=sample,
        top_k=0,
    )
    width = batch["input_ids"].shape[1]
    for ids, mask in zip(out.cpu(), batch["attention_mask"].cpu(), strict=True):
        answer = ids[width:]
        ends = (answer == tokenizer.eos_token_id).nonzero()
        stop = int(ends[0]) + 1 if len(ends) else len(answer)
        prompt = ids[:width][mask.bool()]
        yield torch.cat([prompt, answer[:stop]]), len(prompt)


def _padded(rows: list[tuple[Tensor, int]]) -> bytes:
    """A shard of these answers, right-padded."""
    return save(
        {
            "ids": pad_sequence([ids.int() for ids, _ in rows], batch_first=True),
            "prompt_length": torch.tensor([start for _, start in rows]),
            "length": torch.tensor([len(ids) for ids, _ in rows]),
        }
    )
