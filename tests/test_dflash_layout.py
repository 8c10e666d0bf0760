"""Published DFlash checkpoints in and out: config, tensor names, and what the forward pass computes from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from bpkit import SpeculativeDecoder
from bpkit.decode.resolve_drafter import resolve_drafter
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.dflash_model import DFlashConfig, DFlashModel
from bpkit.testing import TinyPair, tiny_pair

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, LAYERS = 64, 2, 1, 32, 96, 2
TARGET_LAYERS = [0, 1, 3]
MASK = 98
CLOSE = 1e-4

# As in z-lab/Qwen3-4B-DFlash-b16, only smaller.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 6,
    "bos_token_id": 97,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": TARGET_LAYERS},
    "dtype": "float32",
    "eos_token_id": 97,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "layer_types": ["full_attention"] * LAYERS,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "num_target_layers": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.3",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 100,
}
# As in z-lab's drafters for Qwen3.5 and later: the block size inside, newer names, sliding windows.
INSIDE: dict[str, Any] = {
    **{k: v for k, v in PUBLISHED.items() if k not in ("block_size", "rope_theta", "rope_scaling", "auto_map")},
    "dflash_config": {"block_size": 6, "mask_token_id": MASK, "target_layer_ids": TARGET_LAYERS},
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "transformers_version": "5.15.0",
}
SLIDING: dict[str, Any] = {
    **INSIDE,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "use_sliding_window": True,
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a published checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (HIDDEN, len(TARGET_LAYERS) * HIDDEN),
        "hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        of_layer = {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            "self_attn.q_norm": (HEAD,),
            "self_attn.k_norm": (HEAD,),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes.update({f"layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()})
    return shapes


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.5 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.2)
        + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in published_shapes().items()
    }


def publish(folder: Path, config: dict[str, Any]) -> Path:
    """Write a checkpoint by hand, as a stranger would have published it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LAYOUTS = {"block size beside": PUBLISHED, "block size inside": INSIDE, "sliding windows": SLIDING}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_checkpoint_loads_with_every_weight(tmp_path: Path, layout: str) -> None:
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", LAYOUTS[layout]))
    # What transformers' own DFlashTokenCandidateGenerator reads from the config.
    assert model.config.block_size == 6
    assert model.config.mask_token_id == MASK
    assert model.config.target_layer_ids == TARGET_LAYERS
    assert model.config.rope_parameters["rope_theta"] == 10000
    loaded = model.state_dict()
    assert set(loaded) == set(published_shapes())
    for name, value in weights().items():
        assert loaded[name].equal(value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_that_was_loaded_is_saved_in_the_published_layout(tmp_path: Path, layout: str) -> None:
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", LAYOUTS[layout]))
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["block_size"] == 6
    assert config["dflash_config"]["mask_token_id"] == MASK
    assert config["dflash_config"]["target_layer_ids"] == TARGET_LAYERS
    assert config["dflash_config"].get("block_size", 6) == 6
    assert "mask_token_id" not in config
    assert "target_layer_ids" not in config
    for name in ("model_type", "layer_types", "sliding_window", "head_dim", "num_key_value_heads", "vocab_size"):
        assert config[name] == LAYOUTS[layout][name]
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == published_shapes()  # noqa: SIM118
    twice = DFlashModel.from_pretrained(tmp_path / "again")
    for name, value in model.state_dict().items():
        assert twice.state_dict()[name].equal(value)
    assert {**twice.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}


def test_a_model_made_here_is_saved_in_the_published_layout(tmp_path: Path, pair: TinyPair) -> None:
    pair.drafter_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["block_size"] == 8
    assert config["dflash_config"] == {"mask_token_id": MASK, "target_layer_ids": [0, 2]}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {name for name in published_shapes() if not name.startswith("layers.1.")}


def test_engines_find_the_architecture_that_they_look_for(tmp_path: Path, pair: TinyPair) -> None:
    # vLLM and SGLang choose their model class by this name; transformers has no class for it.
    pair.drafter_model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["DFlashDraftModel"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_drafter_decodes_what_plain_decoding_gives(
    tmp_path: Path, tiny_folder: Path, layout: str, pair: TinyPair
) -> None:
    folder = publish(tmp_path / "drafter", LAYOUTS[layout])
    decoder = SpeculativeDecoder.from_pretrained(tiny_folder / "target", str(folder), strict=True)
    assert decoder.drafter.kind == "block-diffusion"
    assert (decoder.spec.trained_block_size, decoder.spec.max_block_size) == (6, 12)
    assert decoder.drafter.feature_layers == tuple(TARGET_LAYERS)
    made = decoder.generate("x = ", max_new_tokens=24, temperature=0)
    assert made.sequences.equal(pair.target.generate(pair.ids("x = "), max_new_tokens=24, do_sample=False))
    assert {int(step.block_size) for step in made.steps} == {6}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_drafter_runs_under_transformers_dflash(tmp_path: Path, layout: str, pair: TinyPair) -> None:
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", LAYOUTS[layout])).eval()
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    theirs = pair.target.generate(
        pair.ids("x = "), assistant_model=model, speculation_type="dflash", do_sample=False, max_new_tokens=24
    )
    handle.remove()
    assert len(calls) > 3
    assert theirs.equal(pair.target.generate(pair.ids("x = "), max_new_tokens=24, do_sample=False))


# What is not a DFlash drafter for this target.


def test_the_folder_of_a_target_is_refused_with_what_is_missing(tiny_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"not a DFlash drafter: .*dflash_config.mask_token_id.*folder of the target\?"
    ):
        DFlashModel.from_pretrained(tiny_folder / "target")


@pytest.mark.parametrize("missing", ["mask_token_id", "target_layer_ids"])
def test_a_config_without_an_essential_part_is_refused(tmp_path: Path, missing: str) -> None:
    nested = {k: v for k, v in PUBLISHED["dflash_config"].items() if k != missing}
    folder = publish(tmp_path / "drafter", {**PUBLISHED, "dflash_config": nested})
    with pytest.raises(ValueError, match="not a DFlash drafter"):
        DFlashModel.from_pretrained(folder)


def test_a_mask_token_of_id_0_is_taken(tmp_path: Path) -> None:
    nested = {**PUBLISHED["dflash_config"], "mask_token_id": 0}
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", {**PUBLISHED, "dflash_config": nested}))
    assert model.config.mask_token_id == 0


def test_a_drafter_of_another_width_is_refused_with_both_widths(pair: TinyPair) -> None:
    values = {**pair.drafter_model.config.to_dict(), "hidden_size": 32}
    model = DFlashModel(DFlashConfig(**values))
    with pytest.raises(ValueError, match=r"made for hidden size 32, but the target has 64: use the drafter that was"):
        BlockDiffusionDrafter(model, pair.target, name="narrow")


def test_a_drafter_that_asks_for_layers_the_target_has_not_is_refused(tmp_path: Path, pair: TinyPair) -> None:
    nested = {**PUBLISHED["dflash_config"], "target_layer_ids": [0, 1, 9]}
    folder = publish(tmp_path / "drafter", {**PUBLISHED, "dflash_config": nested})
    with pytest.raises(ValueError, match="layer"):
        SpeculativeDecoder(pair.target, str(folder)).generate(pair.ids("x"), max_new_tokens=8, temperature=0)


def test_a_folder_that_is_not_there_is_refused_by_name(pair: TinyPair) -> None:
    with pytest.raises(ValueError, match="no/such/folder"):
        resolve_drafter("no/such/folder", pair.target)


def test_a_checkpoint_without_its_weights_is_refused_instead_of_drafting_at_random(
    tmp_path: Path, pair: TinyPair
) -> None:
    folder = publish(tmp_path / "drafter", PUBLISHED)
    some = {name: value for name, value in weights().items() if name != "fc.weight"}
    save_file(some, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"fc\.weight"):
        resolve_drafter(str(folder), pair.target)


def test_a_checkpoint_of_the_next_generation_is_refused_instead_of_half_loaded(tmp_path: Path, pair: TinyPair) -> None:
    # DFlash2 adds convolutions and a candidate selector; without them its drafts are worth nothing.
    folder = publish(tmp_path / "drafter", {**INSIDE, "architectures": ["DFlash2DraftModel"]})
    more = {**weights(), "candidate_selector.hidden_projection.weight": torch.zeros(4, HIDDEN)}
    save_file(more, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"DFlash2DraftModel|candidate_selector"):
        resolve_drafter(str(folder), pair.target)


@pytest.mark.parametrize("name", ["output_multiplier", "final_logit_softcapping", "input_embedding_scale"])
def test_settings_that_would_change_the_drafts_are_refused_instead_of_ignored(
    tmp_path: Path, pair: TinyPair, name: str
) -> None:
    config = {**INSIDE, "dflash_config": {**INSIDE["dflash_config"], name: 0.2}}
    folder = publish(tmp_path / "drafter", config)
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        resolve_drafter(str(folder), pair.target)


def test_a_drafter_that_was_loaded_by_hand_is_checked_alike(tmp_path: Path, pair: TinyPair) -> None:
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", {**PUBLISHED, "sample_from_anchor": True}))
    with pytest.raises(ValueError, match=r"drafter DFlash was trained with settings .*: sample_from_anchor = True"):
        BlockDiffusionDrafter(model, pair.target)


# Settings of published offshoots that bpkit does not have: what they ask for would be ignored.
UNKNOWN: dict[str, Any] = {
    "sample_from_anchor": True,
    "markov_rank": 256,
    "projector_type": "domino",
    "attention_sink_bias": True,
    "fc_layernorm": True,
    "shift_label": True,
    "pure_draft_prefix_len": 2,
    "use_swa": True,
    "swa_window_size": 2048,
    "partial_rotary_factor": 0.25,
    "enable_confidence_head": True,
    "a_setting_of_tomorrow": [1, 2],
    "draft_vocab_size": 50,
}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "beside"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_setting_that_is_not_known_is_refused_with_its_value(
    tmp_path: Path, pair: TinyPair, name: str, inside: bool
) -> None:
    asked = {name: UNKNOWN[name]}
    config = (
        {**PUBLISHED, "dflash_config": {**PUBLISHED["dflash_config"], **asked}} if inside else {**PUBLISHED, **asked}
    )
    with pytest.raises(ValueError, match=rf"settings that bpkit does not honour.*{name} = ") as refused:
        resolve_drafter(str(publish(tmp_path / "drafter", config)), pair.target)
    assert f"{name} = {UNKNOWN[name]!r}" in str(refused.value)


SWITCHED_OFF: dict[str, Any] = {
    "sample_from_anchor": False,
    "markov_rank": 0,
    "projector_type": None,
    "output_multiplier": 1.0,
    "final_logit_softcapping": None,
    "use_qk_norm": True,
    "partial_rotary_factor": 1.0,
    "use_swa": False,
    "mask_token": "<|MASK|>",
    "draft_vocab_size": 100,
    "target_hidden_size": HIDDEN,
    "num_anchors": 512,
    "_commit_hash": "0" * 40,
    "torch_dtype": "float32",
}


def test_settings_that_are_switched_off_or_say_what_is_done_anyway_are_taken(tmp_path: Path, pair: TinyPair) -> None:
    config = {**PUBLISHED, "dflash_config": {**PUBLISHED["dflash_config"], **SWITCHED_OFF}, **SWITCHED_OFF}
    assert resolve_drafter(str(publish(tmp_path / "drafter", config)), pair.target).kind == "block-diffusion"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types = .*, sliding_window = None"),
        ({**SLIDING, "use_sliding_window": False}, "layer_types = .*, sliding_window = None"),
        ({"dflash_config": {**PUBLISHED["dflash_config"], "sliding_window": 64}}, "dflash_config.sliding_window = 64"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"num_target_layers": 36}, "a target of 36 layers, but the target has 4"),
        (
            {"sample_from_anchor": True, "dflash_config": {**PUBLISHED["dflash_config"], "sample_from_anchor": False}},
            "= True",
        ),
        ({"target_hidden_size": 128}, "hidden size 128, but the target has 64"),
        ({"vocab_size": 151936}, "vocabulary of 151936, but the target has 100"),
        ({"dflash_config": {**PUBLISHED["dflash_config"], "mask_token_id": 100}}, "tokens 0 to 99"),
        ({"architectures": ["DSparkDraftModel"]}, "is a DSparkDraftModel, not a DFlash drafter"),
    ],
)
def test_what_contradicts_the_model_or_the_target_is_refused(
    tmp_path: Path, pair: TinyPair, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        resolve_drafter(str(publish(tmp_path / "drafter", {**PUBLISHED, **change})), pair.target)


def test_a_mask_token_in_the_padding_of_the_targets_embedding_is_taken(tmp_path: Path) -> None:
    pair = tiny_pair()
    pair.target.resize_token_embeddings(128, mean_resizing=False)
    config = {**PUBLISHED, "dflash_config": {**PUBLISHED["dflash_config"], "mask_token_id": 127}}
    folder = publish(tmp_path / "drafter", config)
    SpeculativeDecoder(pair.target, str(folder), strict=True).generate(pair.ids("x"), max_new_tokens=4, temperature=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
    ids=["yarn", "linear"],
)
def test_scaled_rotary_positions_are_honoured(tmp_path: Path, pair: TinyPair, rope: dict[str, Any]) -> None:
    plain = {key: value for key, value in PUBLISHED.items() if not key.startswith("rope")}
    drafter = resolve_drafter(str(publish(tmp_path / "drafter", {**plain, **rope})), pair.target)
    assert isinstance(drafter, BlockDiffusionDrafter)
    scaled = drafter.model.rotary_emb.inv_freq
    theta = drafter.model.config.rope_parameters["rope_theta"]
    assert not torch.allclose(scaled, theta ** -(torch.arange(HEAD // 2) / (HEAD // 2)))


@pytest.mark.parametrize("causal", [False, True])
def test_what_a_block_sees_may_be_said_inside(tmp_path: Path, causal: bool) -> None:
    config = {**SLIDING, "dflash_config": {**SLIDING["dflash_config"], "causal": causal}}
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", config)).eval()
    noise, features = inputs(7, 9)
    ahead = see_window(7, 9, 99, causal=True) if causal else see_all(7, 9)
    wanted = reference(noise, features, [see_window(7, 9, 5, causal=causal), ahead], weights())
    assert (computed(model, noise, features) - wanted).abs().max() < CLOSE


# What the forward pass computes, against a slow and separate calculation.


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * weight


def rotated(x: Tensor, position: int) -> Tensor:
    """Rotary embedding of one head's vector, [head]."""
    half = HEAD // 2
    angles = position / 10000.0 ** (torch.arange(half) / half)
    left, right = x[:half], x[half:]
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()])


def reference(
    noise: Tensor, features: Tensor, visible: list[Tensor], w: dict[str, Tensor], *, start: int = 0
) -> Tensor:
    """Last hidden states of a block, one vector at a time.

    Args:
        noise: embeddings of anchor and masks, [block, hidden].
        features: of the context, [context, layers * hidden].
        visible: for each layer which key each query may see, bool [block, context + block].
        start: position of the first context token.
    """
    context = norm(features @ w["fc.weight"].T, w["hidden_norm.weight"])
    hidden, before = noise, len(context)
    for layer in range(LAYERS):
        part = {name: w[f"layers.{layer}.{name}.weight"] for name in names_of_a_layer()}
        normed = norm(hidden, part["input_layernorm"])
        source = torch.cat([context, normed])
        keys = [
            rotated(norm(part["self_attn.k_proj"] @ x, part["self_attn.k_norm"]), start + at)
            for at, x in enumerate(source)
        ]
        values = [part["self_attn.v_proj"] @ x for x in source]
        rows = []
        for i, x in enumerate(normed):
            heads = []
            for head in (part["self_attn.q_proj"] @ x).split(HEAD):
                query = rotated(norm(head, part["self_attn.q_norm"]), start + before + i)
                scores = torch.stack([query @ key / math.sqrt(HEAD) for key in keys])
                share = scores.masked_fill(~visible[layer][i], -torch.inf).softmax(dim=0)
                heads.append(sum(s * v for s, v in zip(share, values, strict=True)))
            rows.append(part["self_attn.o_proj"] @ torch.cat(heads))
        hidden = hidden + torch.stack(rows)
        normed = norm(hidden, part["post_attention_layernorm"])
        gate = torch.nn.functional.silu(normed @ part["mlp.gate_proj"].T)
        hidden = hidden + (gate * (normed @ part["mlp.up_proj"].T)) @ part["mlp.down_proj"].T
    return norm(hidden, w["norm.weight"])


def names_of_a_layer() -> list[str]:
    return [
        n.removeprefix("layers.0.").removesuffix(".weight") for n in published_shapes() if n.startswith("layers.0.")
    ]


def inputs(block: int, context: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(context, len(TARGET_LAYERS) * HIDDEN, generator=generator)
    return torch.randn(block, HIDDEN, generator=generator), features


def see_all(block: int, context: int) -> Tensor:
    return torch.ones(block, context + block, dtype=torch.bool)


def see_window(block: int, context: int, window: int, *, causal: bool) -> Tensor:
    """A key is seen if it is less than `window` away, and not ahead if causal."""
    keys, queries = torch.arange(context + block), context + torch.arange(block)[:, None]
    near = (keys - queries).abs() < window
    return near & (keys <= queries) if causal else near


def computed(model: DFlashModel, noise: Tensor, features: Tensor, *, cuts: tuple[int, ...] = ()) -> Tensor:
    """The model's answer, the context handed over in pieces that end at `cuts`, through a cache."""
    cache = DynamicCache()
    with torch.no_grad():
        for begin, end in zip((0, *cuts), (*cuts, len(features)), strict=True):
            output = model(
                noise_embeds=noise[None], context_hidden_states=features[None, begin:end], past_key_values=cache
            )
            cache.crop(-len(noise))
    assert cache.get_seq_length() == len(features)
    answer: Tensor = output.last_hidden_state[0]
    return answer


@pytest.mark.parametrize("cuts", [(), (4,), (1, 6, 7)])
@pytest.mark.parametrize("block", [2, 6, 12])
def test_every_position_of_a_block_sees_context_and_block(tmp_path: Path, block: int, cuts: tuple[int, ...]) -> None:
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", PUBLISHED)).eval()
    noise, features = inputs(block, 9)
    wanted = reference(noise, features, [see_all(block, 9)] * LAYERS, weights())
    assert (computed(model, noise, features, cuts=cuts) - wanted).abs().max() < CLOSE


@pytest.mark.parametrize("cuts", [(), (4,), (1, 6, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_sliding_layer_sees_what_is_less_than_a_window_away(
    tmp_path: Path, cuts: tuple[int, ...], causal: bool
) -> None:
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", {**SLIDING, "is_causal": causal})).eval()
    noise, features = inputs(7, 9)
    ahead = see_window(7, 9, 99, causal=True) if causal else see_all(7, 9)
    wanted = reference(noise, features, [see_window(7, 9, 5, causal=causal), ahead], weights())
    assert (computed(model, noise, features, cuts=cuts) - wanted).abs().max() < CLOSE
    everything = reference(noise, features, [see_all(7, 9)] * LAYERS, weights())
    assert (wanted - everything).abs().max() > 0.01, "the window must matter here"


def test_a_sliding_layer_is_causal_where_the_config_does_not_say(tmp_path: Path) -> None:
    # z-lab's model: `is_causal` given holds for all layers; not given, sliding layers are causal and full ones are not.
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", SLIDING)).eval()
    noise, features = inputs(7, 9)
    wanted = reference(noise, features, [see_window(7, 9, 5, causal=True), see_all(7, 9)], weights())
    assert (computed(model, noise, features) - wanted).abs().max() < CLOSE


def test_positions_begin_where_the_cache_ends_or_as_given(tmp_path: Path) -> None:
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", PUBLISHED)).eval()
    noise, features = inputs(4, 5)
    with torch.no_grad():
        given = model(
            noise_embeds=noise[None],
            context_hidden_states=features[None],
            position_ids=torch.arange(30, 39)[None],
            attention_mask=torch.ones(1, 9),
        ).last_hidden_state[0]
    wanted = reference(noise, features, [see_all(4, 5)] * LAYERS, weights(), start=30)
    assert (given - wanted).abs().max() < CLOSE


def test_a_2d_mask_hides_keys(tmp_path: Path) -> None:
    noise, features = inputs(4, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    for config, window in ((PUBLISHED, 99), ({**SLIDING, "is_causal": False}, 5)):
        folder = publish(tmp_path / str(window), config)
        model = DFlashModel.from_pretrained(folder).eval()
        with torch.no_grad():
            output = model(noise_embeds=noise[None], context_hidden_states=features[None], attention_mask=mask)
        seen = mask.bool().expand(4, -1)
        wanted = reference(noise, features, [seen & see_window(4, 5, window, causal=False), seen], weights())
        assert (output.last_hidden_state[0] - wanted).abs().max() < CLOSE


@pytest.mark.parametrize("config", [PUBLISHED, {**SLIDING, "is_causal": False}], ids=["full", "sliding"])
def test_an_additive_mask_hides_keys(tmp_path: Path, config: dict[str, Any]) -> None:
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", config)).eval()
    noise, features = inputs(4, 5)
    seen = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]]).bool().expand(4, -1)
    additive = torch.zeros(1, 1, 4, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        output = model(noise_embeds=noise[None], context_hidden_states=features[None], attention_mask=additive)
    window = see_window(4, 5, config["sliding_window"] or 99, causal=False)
    wanted = reference(noise, features, [seen & window, seen], weights())
    assert (output.last_hidden_state[0] - wanted).abs().max() < CLOSE


def test_rows_of_a_batch_do_not_see_each_other(tmp_path: Path) -> None:
    model = DFlashModel.from_pretrained(publish(tmp_path / "drafter", SLIDING)).eval()
    noise, features = inputs(6, 8)
    rows = torch.stack([noise, noise.flip(0)]), torch.stack([features, features.roll(1, dims=0)])
    with torch.no_grad():
        both = model(noise_embeds=rows[0], context_hidden_states=rows[1]).last_hidden_state
        alone = [model(noise_embeds=n[None], context_hidden_states=f[None]) for n, f in zip(*rows, strict=True)]
    for i, output in enumerate(alone):
        assert (both[i] - output.last_hidden_state[0]).abs().max() < CLOSE


def test_a_smaller_block_is_not_a_truncated_larger_one(pair: TinyPair) -> None:
    embed = pair.target.get_input_embeddings()
    ids = torch.tensor([[5, *[MASK] * 7]])
    features = torch.randn(1, 6, 2 * 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        large, small = (
            pair.drafter_model(noise_embeds=embed(ids[:, :size]), context_hidden_states=features).last_hidden_state
            for size in (8, 4)
        )
    assert (large[:, :4] - small).abs().max() > 0.01
