"""Tiny models for tests of plug-ins: made in memory in a moment, random weights, no network.

Random models hardly ever agree, so that drafts of the tiny DFlash drafter are nearly always rejected. Two drafters
make up for it: the pair's assistant, which is the target without its last layer, and `AgreeableDrafter`, whose share
of right tokens you choose.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bpkit.decode.drafter import GoOn, Proposal
from bpkit.decode.noise import uniform
from bpkit.decode.parts import new_layer
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter, AutoregressiveSession
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.dflash_model import DFlashConfig, DFlashModel
from bpkit.draft.early_exit import EarlyExitDrafter, save_exit

END, MASK, UNKNOWN = "<|end|>", "<|mask|>", "<|unknown|>"
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n\t"
TRAINED_BLOCK_SIZE = 8
EXIT_LAYER = 2
"""Layers of the tiny target below its early exit."""


@dataclass(frozen=True)
class TinyPair:
    """A target with everything that can draft for it, all float32 on the CPU.

    Attributes:
        target: a `Qwen3ForCausalLM` whose head is scaled up, so that its distributions are neither flat nor certain.
        drafter_model: a DFlash model of one layer, trained block size 8 (it was never trained).
        tokenizer: one token for each ASCII character.
        assistant: the target without its last layer, which sometimes agrees with it.
    """

    target: Qwen3ForCausalLM
    drafter_model: DFlashModel
    tokenizer: PreTrainedTokenizerFast
    assistant: Qwen3ForCausalLM

    def block_diffusion(self) -> BlockDiffusionDrafter:
        """The DFlash model as a drafter of the target."""
        return BlockDiffusionDrafter(self.drafter_model, self.target)

    def autoregressive(self) -> AutoregressiveDrafter:
        """The assistant as a drafter of the target."""
        return AutoregressiveDrafter(self.assistant, self.target)

    def early_exit(self) -> EarlyExitDrafter:
        """The target's last layer after its first two: an exit that was never trained, and sometimes agrees."""
        return EarlyExitDrafter(new_layer(self.target, -1), self.target, layer=EXIT_LAYER)

    def agreeable(self, corruption: float = 0.25, *, seed: int = 0) -> AgreeableDrafter:
        """A drafter that is wrong in a chosen share of its tokens."""
        return AgreeableDrafter(self.target, corruption=corruption, seed=seed)

    def ids(self, text: str) -> Tensor:
        """Token ids of a text, int64 [1, length]."""
        ids: Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return ids

    def save(self, folder: Path) -> None:
        """Write `target`, `drafter`, `assistant` and `exit` into a folder, each as it is loaded."""
        self.drafter_model.save_pretrained(folder / "drafter")
        save_exit(new_layer(self.target, -1), self.target, EXIT_LAYER, folder / "exit")
        for name, model in {"target": self.target, "assistant": self.assistant}.items():
            model.save_pretrained(folder / name)
            self.tokenizer.save_pretrained(folder / name)


def tiny_pair(folder: Path | None = None, *, seed: int = 0) -> TinyPair:
    """Make a tiny pair; the same seed gives the same weights. torch's global generator is left as it was.

    Args:
        folder: where to save it as well; `SpeculativeDecoder.from_pretrained` takes its `target` and `drafter`.

    >>> pair = tiny_pair()
    >>> pair.tokenizer.decode(pair.ids("x = 1")[0])
    'x = 1'
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = _causal(tokenizer, layers=4)
        drafter_model = _dflash(tokenizer)
    assistant = _causal(tokenizer, layers=3)
    assistant.load_state_dict(target.state_dict(), strict=False)  # it has no last layer
    pair = TinyPair(target, drafter_model, tokenizer, assistant)
    if folder is not None:
        pair.save(folder)
    return pair


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each ASCII character, and three special ones."""
    vocab = {token: i for i, token in enumerate([*CHARACTERS, END, MASK, UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        mask_token=MASK,
        unk_token=UNKNOWN,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def _causal(tokenizer: PreTrainedTokenizerFast, *, layers: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        **_SHAPE,
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight *= 4
    return model


def _dflash(tokenizer: PreTrainedTokenizerFast) -> DFlashModel:
    config = DFlashConfig(
        **_SHAPE,
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        block_size=TRAINED_BLOCK_SIZE,
        mask_token_id=tokenizer.mask_token_id,
        target_layer_ids=[0, 2],
    )
    model: DFlashModel = DFlashModel(config).float().eval()
    return model


class AgreeableDrafter(AutoregressiveDrafter):
    """The target as its own assistant, whose tokens are then made wrong in a chosen share.

    A wrong token has the true one's id plus one, and its scores are shifted alike: the token is honestly drawn from
    the scores, so that the drafter is lawful under both verify rules. What follows a wrong token is again the true
    continuation, as if nothing had happened: a runtime that accepts by position alone is found out.

    Args:
        corruption: probability that a token is wrong, independently at every position of every draft.
        seed: of the coins. They depend on the seed, where the block begins and the place in it, on nothing else.
    """

    def __init__(self, target: PreTrainedModel, *, corruption: float = 0.25, seed: int = 0) -> None:
        super().__init__(target, target, name="agreeable", block_size=TRAINED_BLOCK_SIZE)
        self.max_block_size = 2 * TRAINED_BLOCK_SIZE
        self.corruption, self.seed = corruption, seed
        self.drafts = 0
        """Drafts made so far, over all requests."""

    def begin(self, text: RunningText) -> AgreeableSession:
        return AgreeableSession(self, text)


class AgreeableSession(AutoregressiveSession):
    """Reads what it drafted before the tokens are made wrong; those that stand are the ones that it read."""

    drafter: AgreeableDrafter

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        self.drafter.drafts += sum(size > 1 for size in block_size)
        coins = torch.stack([self._coins(begin, max(block_size)) for begin in self.text.length])
        places = iter(range(max(block_size)))

        def asked(latest: Proposal) -> list[bool]:
            assert go_on is not None
            return go_on(self._spoiled(latest, coins[:, next(places), None]))

        made = super().draft(block_size, draw, None if go_on is None else asked)
        return self._spoiled(made, coins[:, : made.tokens.shape[1]])

    def _coins(self, begin: int, count: int) -> Tensor:
        """float32 [count] for a block that begins at a position."""
        return uniform(self.drafter.seed, begin, 0, count, 1, torch.device("cpu"), salt=0)[:, 0]

    def _spoiled(self, made: Proposal, coins: Tensor) -> Proposal:
        assert made.scores is not None
        wrong = (coins < self.drafter.corruption).to(made.tokens.device)
        tokens = torch.where(wrong, (made.tokens + 1) % made.scores.shape[-1], made.tokens)
        scores = torch.where(wrong[..., None], made.scores.roll(1, dims=-1), made.scores)
        return dataclasses.replace(made, tokens=tokens, scores=scores)
