"""The recipe of the shipped target: a deep, narrow Qwen3 language model trained from scratch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bpkit.learn.training.model import ModelRun, autocast, train_model
from recipes.pair.corpus import pack, training_documents
from recipes.pair.tokenizer import train_tokenizer


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token, in nats."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 [batch, length]; returns a scalar."""
        with autocast(ids.device):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def target_config(tokenizer: PreTrainedTokenizerFast, *, layers: int, hidden_size: int) -> Qwen3Config:
    """A `Qwen3Config` with tied embeddings, heads of 64 and half as many key/value heads."""
    heads = hidden_size // 64
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_target(
    out: Path,
    *,
    maths: Path | None,
    run: ModelRun,
    layers: int = 12,
    hidden_size: int = 256,
    vocab_size: int = 4096,
    length: int = 384,
    start_from: Path | None = None,
) -> None:
    """Train tokenizer and target and write both to the folder `out`.

    Args:
        start_from: folder of an earlier target to go on from, with its tokenizer, instead of random weights.
        maths: JSONL with `question` and `answer`, or None to leave that domain out.
        length: tokens in a training window, of which `run.batch_size` make a step on each device.
    """
    torch.manual_seed(run.seed)
    texts = training_documents(maths, structured_count=6000, maths_repeats=3, seed=run.seed)
    every = [text for domain in texts.values() for text in domain]
    if start_from is not None or (out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start_from or out)
    else:
        # A sample is enough to choose merges; the whole text would only take longer.
        tokenizer = train_tokenizer((t for domain in texts.values() for t in domain[:6000]), vocab_size=vocab_size)
    tokenizer.save_pretrained(out)
    windows = pack(every, tokenizer, length=length, seed=run.seed)
    if start_from is None:
        model = Qwen3ForCausalLM(target_config(tokenizer, layers=layers, hidden_size=hidden_size))
    else:
        model = Qwen3ForCausalLM.from_pretrained(start_from, dtype=torch.float32)
    train_model(
        "train_target",
        model,
        NextTokenLoss(model),
        (windows,),
        out,
        run,
        texts=texts,
        layers=layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        length=length,
        start_from=start_from,
    )
