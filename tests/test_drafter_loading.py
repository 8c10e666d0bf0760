"""Drafters that fit their target or are refused: dtypes, devices, positions, architectures, weights and tokenizers."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    LogitsProcessorList,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from bpkit import SpeculativeDecoder
from bpkit.decode.drafter import EachRow, Proposal
from bpkit.decode.pretrained import device_of, load_causal_lm, move, position_limit
from bpkit.decode.resolve_drafter import resolve_drafter
from bpkit.decode.sampling import Draw, Processors, Sampler, Samplers
from bpkit.decode.text import RowText, RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter, AutoregressiveSession
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.dflash_model import DFlashModel
from bpkit.draft.ngram import NgramDrafter
from bpkit.testing import TinyPair, tiny_pair
from bpkit.testing.models import END, tiny_tokenizer

PROMPT = "x = 1 + 2\ny = "
SIZE = 32

ROTARY: dict[str, Any] = {
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
GPT2: dict[str, Any] = {"n_embd": SIZE, "n_layer": 1, "n_head": 2}
OPT: dict[str, Any] = {
    "hidden_size": SIZE,
    "word_embed_proj_dim": SIZE,
    "ffn_dim": SIZE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def small(config: type[PreTrainedConfig], vocab_size: int = 100, **values: Any) -> PreTrainedModel:
    """A random causal language model that agrees with nobody."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config(vocab_size=vocab_size, **special, **values))
    return model.float().eval()


def texts(decoder: SpeculativeDecoder, pair: TinyPair, *, count: int = 24) -> None:
    """Assert that greedy text is plain decoding's, and that sampled text does not depend on the drafter."""
    ids = pair.ids(PROMPT)
    made = decoder.generate(ids, max_new_tokens=count, temperature=0)
    assert made.sequences.equal(decoder.target.generate(ids, max_new_tokens=count, do_sample=False))
    sampled = [d.generate(ids, max_new_tokens=count, temperature=1.0, seed=5) for d in (decoder, ngram(decoder))]
    assert sampled[0].sequences.equal(sampled[1].sequences)


def ngram(decoder: SpeculativeDecoder) -> SpeculativeDecoder:
    return SpeculativeDecoder(decoder.target, "ngram", "fixed:4")


# Dtypes.


@pytest.mark.parametrize(("target", "drafter"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("kind", ["block_diffusion", "autoregressive"])
def test_target_and_drafter_may_have_different_dtypes(kind: str, target: str, drafter: str) -> None:
    pair = tiny_pair()
    pair.target.to(getattr(torch, target))
    for model in (pair.drafter_model, pair.assistant):
        model.to(getattr(torch, drafter))
    bound = getattr(pair, kind)()
    decoder = SpeculativeDecoder(pair.target, bound, "fixed:6", strict=True)
    made = decoder.generate(pair.ids(PROMPT), max_new_tokens=12, temperature=1.0, seed=1)
    assert made.tokens.shape == (1, 12)
    assert any(int(step.draft_length) > 0 for step in made.steps)
    if target == "float32":
        texts(decoder, pair)


# Positions.


@pytest.mark.parametrize(
    ("config", "values", "limit"),
    [
        (GPT2Config, {**GPT2, "n_positions": 20}, 20),
        (OPTConfig, {**OPT, "max_position_embeddings": 20}, 20),
        (GPTJConfig, {**GPT2, "rotary_dim": 8, "n_positions": 20}, 20),
        (MptConfig, {"d_model": SIZE, "n_layers": 1, "n_heads": 2, "max_seq_len": 20}, 20),
        (LlamaConfig, {**ROTARY, "max_position_embeddings": 20}, None),
    ],
    ids=["GPT-2", "OPT", "GPT-J", "MPT", "Llama"],
)
def test_drafting_ends_where_the_assistant_has_no_more_positions(
    pair: TinyPair, config: type[PreTrainedConfig], values: dict[str, Any], limit: int | None
) -> None:
    model = small(config, **values)
    assert position_limit(model) == limit
    decoder = SpeculativeDecoder(pair.target, AutoregressiveDrafter(model, pair.target, name="short"), "fixed:6")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        texts(decoder, pair)
    ours = [str(w.message) for w in said if "positions" in str(w.message)]
    if limit is None:
        assert ours == []
    else:
        assert ours == [
            "drafter short has 20 positions and the text is longer: drafting ends there, and the text goes on without "
            "it; use an assistant with more positions (said once)"
        ]


def test_drafts_are_as_long_as_the_last_position_allows(pair: TinyPair) -> None:
    length = pair.ids(PROMPT).shape[1]
    model = small(GPT2Config, **GPT2, n_positions=length + 4)
    decoder = SpeculativeDecoder(pair.target, AutoregressiveDrafter(model, pair.target), "fixed:6", strict=True)
    with pytest.warns(UserWarning, match="positions"):
        made = decoder.generate(pair.ids(PROMPT), max_new_tokens=12, temperature=0)
    read = length + 1
    for step in made.steps:
        # It reads up to the anchor and all drafted tokens but the last.
        assert int(step.draft_length) == min(5, max(0, length + 4 - read + 1))
        read += step.tokens.shape[1]
    assert int(made.steps[-1].draft_length) == 0


def test_a_prompt_that_is_longer_than_the_assistant_reads_is_decoded_without_it(pair: TinyPair) -> None:
    model = small(GPT2Config, **GPT2, n_positions=32)
    prompt = pair.ids("x" * 40)
    decoder = SpeculativeDecoder(pair.target, AutoregressiveDrafter(model, pair.target), "threshold")
    with pytest.warns(UserWarning, match="has 32 positions"):
        made = decoder.generate(prompt, max_new_tokens=8, temperature=0)
    assert made.sequences.equal(pair.target.generate(prompt, max_new_tokens=8, do_sample=False))
    assert all(int(step.draft_length) == 0 for step in made.steps)
    assert all(int(step.fallbacks) == 0 for step in made.steps)


class Always(NgramDrafter):
    """Proposes the same token as often as it is asked for."""

    def begin(self, text: RunningText) -> EachRow:
        return EachRow(text, lambda row: self)

    def advance(self, features: Tensor | None) -> None:
        """Nothing to remember."""

    def draft(self, block_size: int, draw: Draw, go_on: object) -> Proposal:
        return Proposal(torch.full((1, block_size - 1), 5), None, None, [block_size - 1])


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_a_target_reads_no_draft_beyond_its_own_positions_where_plain_decoding_ends_before(spare: int) -> None:
    torch.manual_seed(0)
    long = small(GPT2Config, **GPT2, n_positions=64)
    prompt = torch.randint(100, (1, 12))
    text = long.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    end = text[-1]
    ends_at = text.index(end, 12) + 1  # tokens that plain decoding has then, of which it read all but the last
    assert ends_at - 12 > 3
    short = small(GPT2Config, **GPT2, n_positions=64)
    short.load_state_dict(long.state_dict())
    short.config.n_positions = ends_at - 1 + spare
    short.transformer.wpe = nn.Embedding.from_pretrained(long.transformer.wpe.weight[: short.config.n_positions])  # type: ignore[no-untyped-call]
    plain = short.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=end)
    made = SpeculativeDecoder(short, Always(), "fixed:8", strict=True).generate(
        prompt, max_new_tokens=30, temperature=0, eos_token_id=end
    )
    assert made.sequences.equal(plain)
    assert int(made.steps[-1].verify_length if made.steps else 0) <= spare


# Caches.

HYBRID: dict[str, Any] = {
    **ROTARY,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


@pytest.mark.parametrize("policy", ["fixed:2", "fixed:5"])
def test_an_assistant_with_states_drafts_what_it_would_draft_from_scratch(pair: TinyPair, policy: str) -> None:
    drafter = AutoregressiveDrafter(small(Qwen3_5TextConfig, **HYBRID), pair.target)
    assert drafter.stateful
    decoder = SpeculativeDecoder(pair.target, drafter, policy, strict=True)
    texts(decoder, pair)
    ids = pair.ids(PROMPT)
    session, text = begun(drafter, ids)
    with torch.inference_mode():
        for accepted, waited in ((0, 0), (2, 0), (4, 0), (1, 40), (0, 0)):
            made = session.draft([5], no_noise(text), None)
            fresh, same = begun(drafter, ids)
            scratch, drafted = fresh.draft([5], no_noise(same), None), made.tokens
            assert drafted.equal(scratch.tokens)
            assert made.hidden is not None
            assert scratch.hidden is not None
            assert (made.hidden - scratch.hidden).abs().max() < 1e-4
            decided = torch.cat([drafted[:, :accepted], torch.tensor([[7]])], dim=1)
            for tokens in (decided, *[torch.tensor([[11 + i % 3]]) for i in range(waited)]):
                text.append(tokens, tokens[:, -1:], tokens.tolist())
                session.advance(None)
                ids = torch.cat([ids, tokens], dim=1)


def begun(drafter: AutoregressiveDrafter, ids: Tensor) -> tuple[AutoregressiveSession, RunningText]:
    """A session that knows these tokens, and its text."""
    text = RunningText([RowText(ids[:, :-1], 200)])
    session = drafter.begin(text)
    text.append(ids[:, -1:], ids[:, -1:], ids[:, -1:].tolist())
    session.advance(None)
    return session, text


def no_noise(text: RunningText) -> Draw:
    return Draw(Samplers([Sampler(row, Processors(LogitsProcessorList()), None) for row in text.rows]))


def test_an_assistant_that_keeps_no_keys_and_values_is_refused(pair: TinyPair) -> None:
    model = small(OpenAIGPTConfig, n_embd=SIZE, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"OpenAIGPTLMHeadModel\) cannot take back drafted tokens: it takes no cache"):
        AutoregressiveDrafter(model, pair.target)
    with pytest.raises(ValueError, match=r"MambaForCausalLM\) cannot take back drafted tokens: .*; use another"):
        AutoregressiveDrafter(small(MambaConfig, hidden_size=SIZE, num_hidden_layers=1, state_size=4), pair.target)


# Architectures and weights.


def saved(model: PreTrainedModel, folder: Path, **config: Any) -> Path:
    """Save a model; `config` replaces entries of its config.json."""
    model.save_pretrained(folder)
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entries, **config}))
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("config", "values"),
    [(LlamaConfig, ROTARY), (Qwen3Config, ROTARY), (GemmaConfig, ROTARY), (GPT2Config, GPT2), (OPTConfig, OPT)],
)
def test_whole_checkpoints_load_without_a_false_alarm(
    tmp_path: Path, config: type[PreTrainedConfig], values: dict[str, Any], tied: bool
) -> None:
    model = small(config, **values, tie_word_embeddings=tied).bfloat16()
    loaded = load_causal_lm(str(saved(model, tmp_path / "model")), dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].equal(value), name


OTHERS = ["Qwen3DSparkModel", "DSparkDraftModel", "DFlash2DraftModel", "LlamaForCausalLMEagle3", "Qwen3NextMTP"]
OTHERS += ["Gemma4AssistantForCausalLM", "MedusaModel", "DFlashDraftModel"]


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("how", ["{}", "autoregressive:path={}"])
def test_a_drafter_of_another_layout_is_refused_by_its_architecture(
    tmp_path: Path, pair: TinyPair, architecture: str, how: str
) -> None:
    folder = saved(pair.assistant, tmp_path / "drafter", architectures=[architecture])
    with pytest.raises(ValueError, match=r"not a (DFlash drafter|causal language model)") as refused:
        resolve_drafter(how.format(folder), pair.target)
    assert architecture in str(refused.value) or "dflash_config" in str(refused.value)


@pytest.mark.parametrize("architectures", [["Qwen3ForCausalLM"], None], ids=["another's name", "no name"])
def test_weights_of_another_layout_are_refused_though_the_architecture_is_known(
    tmp_path: Path, pair: TinyPair, architectures: list[str] | None
) -> None:
    folder = saved(pair.drafter_model, tmp_path / "drafter", architectures=architectures, dflash_config=None)
    with pytest.raises(ValueError, match=r"weights of .*drafter are not those of a Qwen3ForCausalLM: missing keys"):
        resolve_drafter(str(folder), pair.target)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_every_weight_of_an_assistant_must_be_its_own(tmp_path: Path, pair: TinyPair, change: str) -> None:
    folder = saved(pair.assistant, tmp_path / "assistant")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        name = "draft_head.weight"
        weights[name] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{change} keys {name}; use a complete checkpoint"):
        resolve_drafter(f"autoregressive:path={folder}", pair.target)


# Vocabularies.


def resized(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize("rows", [100, 112])
def test_a_padded_vocabulary_is_served(rows: int) -> None:
    pair = tiny_pair()
    resized(pair.target, 112)
    assistant = resized(pair.assistant, 100 if rows == 112 else 120)
    drafter = AutoregressiveDrafter(assistant, pair.target)
    decoder = SpeculativeDecoder(pair.target, drafter, "fixed:6", strict=True)
    texts(decoder, pair)
    for temperature in (0.0, 1.0):
        made = decoder.generate(pair.ids(PROMPT), max_new_tokens=24, temperature=temperature, seed=7)
        assert any(int(step.num_accepted) for step in made.steps), "the assistant must be right now and then"
    logits = torch.randn(1, 2, assistant.config.vocab_size)
    assert drafter.score(logits).shape == (1, 2, 112)
    assert drafter.score(logits)[..., :100].equal(logits[..., :100])


def test_padding_does_not_change_what_is_drafted() -> None:
    decoders = []
    for rows in (100, 90):
        pair = tiny_pair()
        assistant = small(GPT2Config, vocab_size=rows, **GPT2)
        if rows == 90:
            assistant.transformer.wte.weight.data.copy_(small(GPT2Config, **GPT2).transformer.wte.weight.data[:90])
        decoders.append((AutoregressiveDrafter(assistant, pair.target), rows))
    wide, narrow = (drafter for drafter, _ in decoders)
    logits = torch.randn(1, 1, 100)
    assert wide.score(logits).equal(logits)
    padded = narrow.score(logits[..., :90])
    assert padded[..., :90].equal(logits[..., :90])
    assert padded[..., 90:].eq(-torch.inf).all()


def test_an_assistant_reads_ids_that_only_the_target_has(pair: TinyPair) -> None:
    drafter = AutoregressiveDrafter(small(GPT2Config, vocab_size=90, **GPT2), pair.target)
    assert drafter.own(torch.tensor([[5, 89, 90, 99]])).tolist() == [[5, 89, 89, 89]]
    prompt = torch.tensor([[99, 95, 5, 93]])
    decoder = SpeculativeDecoder(pair.target, drafter, "fixed:4", strict=True)
    made = decoder.generate(prompt, max_new_tokens=12, temperature=0)
    assert made.sequences.equal(pair.target.generate(prompt, max_new_tokens=12, do_sample=False))


def test_a_much_smaller_vocabulary_is_refused_where_no_tokenizer_can_be_compared(pair: TinyPair) -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 300, the target of 100: .*put the tokenizer's files"):
        AutoregressiveDrafter(small(GPT2Config, vocab_size=300, **GPT2), pair.target)


def other_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with its tokens in another order, and `count` more."""
    given = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = given["model"]["vocab"]
    turned = {token: (i + 1) % len(vocab) for token, i in vocab.items()}
    given["model"]["vocab"] = {**turned, **{f"<{i}>": len(vocab) + i for i in range(count)}}
    given["added_tokens"] = []
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(given)), eos_token=END)


@pytest.fixture(scope="module")
def target_with_tokenizer(tiny_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_folder / "target", dtype=torch.float32)


@pytest.mark.parametrize("more", [0, 20], ids=["same size", "larger"])
def test_another_tokenizer_is_refused(
    tmp_path: Path, pair: TinyPair, target_with_tokenizer: PreTrainedModel, more: int
) -> None:
    folder = saved(small(GPT2Config, vocab_size=100 + more, **GPT2), tmp_path / "assistant")
    other_tokenizer(more).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"assistant has another tokenizer than the target .*of the target's family"):
        resolve_drafter(str(folder), target_with_tokenizer)


def test_one_tokenizer_is_taken_whatever_the_padding_and_whatever_the_file(
    tmp_path: Path, target_with_tokenizer: PreTrainedModel
) -> None:
    folder = saved(small(GPT2Config, vocab_size=1000, **GPT2), tmp_path / "assistant")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])  # an id that only the assistant knows
    tokenizer.save_pretrained(folder)
    drafter = resolve_drafter(str(folder), target_with_tokenizer)
    made = SpeculativeDecoder(target_with_tokenizer, drafter, "fixed:4", strict=True).generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=12, temperature=1.0, seed=0
    )
    assert made.tokens.shape == (1, 12)


def test_a_tokenizer_that_cannot_be_read_is_not_compared(
    tmp_path: Path, target_with_tokenizer: PreTrainedModel
) -> None:
    folder = saved(small(GPT2Config, **GPT2), tmp_path / "assistant")
    (folder / "tokenizer.json").write_text("{")
    assert resolve_drafter(str(folder), target_with_tokenizer).kind == "autoregressive"


# Devices.


class Placed(nn.Module):
    """Says where it was moved to."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.moved: Any = None
        for name, value in attributes.items():
            setattr(self, name, value)

    def to(self, *args: Any, **_: Any) -> Placed:
        self.moved = args[0]
        return self


@pytest.mark.parametrize(
    ("attributes", "moves"),
    [
        ({}, True),
        ({"hf_device_map": {"": 0}}, True),
        ({"hf_device_map": {"model": 0, "lm_head": 1}}, False),
        ({"is_quantized": True}, False),
        ({"quantization_method": "bitsandbytes"}, False),
    ],
)
def test_what_is_quantised_or_split_is_not_moved(attributes: dict[str, Any], moves: bool) -> None:
    model: Any = Placed(**attributes)
    assert move(model, "cpu") is model
    assert model.moved == ("cpu" if moves else None)


def test_a_part_that_is_offloaded_works_where_its_hook_says(pair: TinyPair) -> None:
    part = nn.Linear(2, 2, device="meta")
    assert device_of(part, pair.target) == torch.device("cpu")
    part._hf_hook = type("Hook", (), {"execution_device": 1})()
    assert device_of(part, pair.target) == torch.device("cuda:1")


class Elsewhere(nn.Module):
    """A head whose weights are of another dtype than the rest of the model."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(head.weight.detach().double())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


def test_hidden_states_are_cast_to_what_the_head_takes() -> None:
    pair = tiny_pair()
    pair.target.lm_head = Elsewhere(pair.target.lm_head)
    drafter = pair.block_diffusion()
    assert drafter.score(torch.zeros(1, 1, 64)).dtype == torch.float64


def test_a_target_without_a_head_is_refused(pair: TinyPair) -> None:
    headless = replace(pair, target=pair.target.model)
    with pytest.raises(ValueError, match="the target has none: use a causal language model"):
        BlockDiffusionDrafter(DFlashModel(pair.drafter_model.config), headless.target)
