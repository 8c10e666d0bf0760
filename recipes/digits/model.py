"""An autoregressive model of scikit-learn's digits: a token for each pixel, in raster order, after the class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bpkit.progress import NoProgress, Progress

SIDE, LEVELS, CLASSES = 8, 17, 10
PIXELS = SIDE * SIDE
HELD_OUT, BATCH, RATE = 297, 32, 3e-3
"""Images whose loss is reported; images of a step; the largest learning rate."""


@dataclass(frozen=True)
class TrainedDigits:
    """The model, and its mean loss in nats a pixel on the images it learned from and on those it did not see."""

    model: LlamaForCausalLM
    train_loss: float
    held_out_loss: float

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())


def digit_tokens(seed: int) -> Tensor:
    """All 1,797 images, shuffled: int64 [images, 1 + pixels]; grey levels are tokens 0 .. 16, classes 17 .. 26.

    They come with scikit-learn (optical recognition of handwritten digits, UCI).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.from_numpy(digits.target).long() + LEVELS
    images = torch.cat([labels[:, None], torch.from_numpy(digits.data).long()], dim=1)
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]


def prompt_of(digit: int) -> Tensor:
    """What asks for an image of a digit: int64 [1, 1]."""
    return torch.tensor([[LEVELS + digit]])


def new_model() -> LlamaForCausalLM:
    """Three layers, 0.15 million weights. No token ends an image."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=LEVELS + CLASSES,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=1 + PIXELS,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def train(steps: int, seed: int, progress: Progress | None = None) -> TrainedDigits:
    """Train from scratch on the CPU; torch's global generator is left as it was."""
    images = digit_tokens(seed)
    held_out, images = images[:HELD_OUT], images[HELD_OUT:]
    ticker = progress or NoProgress()
    ticker.start("training the model of digits", steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(steps):
            loss = _loss(model, images[torch.randint(len(images), (BATCH,))])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ticker.tick()
    model.eval()
    with torch.no_grad():
        return TrainedDigits(model, float(_loss(model, images)), float(_loss(model, held_out)))


def _loss(model: LlamaForCausalLM, images: Tensor) -> Tensor:
    logits = model(images[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), images[:, 1:].flatten())
