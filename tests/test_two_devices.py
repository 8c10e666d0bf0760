"""A drafter on another device than its target: the same text, and one crossing each way in a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import SuppressTokensLogitsProcessor

from bpkit import SpeculativeDecoder
from bpkit.decode.clock import WallClock
from bpkit.decode.drafter import Drafter
from bpkit.decode.noise import GumbelNoise
from bpkit.decode.products import use_products
from bpkit.decode.sampling import Processors
from bpkit.decode.sources import Sources, sources_of
from bpkit.decode.text import RowText, RunningText
from bpkit.decode.two_devices import EmbeddingAndHead, OtherDevice, elsewhere, moved
from bpkit.draft.autoregressive import AutoregressiveDrafter
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.ensemble import EnsembleDrafter
from bpkit.draft.ngram import NgramDrafter
from bpkit.installation.machine import describe_machine
from bpkit.testing import TinyPair
from bpkit.testing.simulated_device import DEVICE, DeviceTensor, SimulatedDevice
from bpkit.trace.collect.tracer import TraceOptions, Tracer
from tests.test_rows import PROMPTS, RandomPolicy

META = torch.device("meta")
KINDS = ("block diffusion", "autoregressive", "ensemble")
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.2, "seed": 5}


class Crossed(SimulatedDevice):  # type: ignore[no-untyped-call]
    """Keeps what was copied to the device and back from it."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.out: list[Tensor] = []
        self.back: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.name in ("aten::_to_copy", "aten::to"):
            here, there = isinstance(args[0], DeviceTensor), isinstance(result, DeviceTensor)
            if there and not here:
                self.out.append(result.on_host)
            if here and not there:
                self.back.append(result)
        return result


@pytest.fixture
def device() -> Iterator[Crossed]:
    made = Crossed()
    with made:
        yield made


def drafter_on(device: Crossed, pair: TinyPair, kind: str, target: Any) -> Drafter:
    """The pair's drafter on the simulated device, whose numbers are the host's."""
    parts: Any = EmbeddingAndHead(target, DEVICE)

    def put(model: nn.Module) -> Any:
        made = copy.deepcopy(model)
        device.put(made)
        return made

    makes: dict[str, Any] = {
        "block diffusion": lambda: BlockDiffusionDrafter(put(pair.drafter_model), parts),
        "autoregressive": lambda: AutoregressiveDrafter(put(pair.assistant), parts),
        "ensemble": lambda: EnsembleDrafter(
            [AutoregressiveDrafter(put(model), parts) for model in (pair.assistant, pair.target)],
            parts,
        ),
    }
    return OtherDevice(makes[kind](), DEVICE)


def on_host(pair: TinyPair, kind: str) -> Drafter:
    if kind == "ensemble":
        return EnsembleDrafter([pair.autoregressive(), AutoregressiveDrafter(pair.target, pair.target)], pair.target)
    return pair.block_diffusion() if kind == "block diffusion" else pair.autoregressive()


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_on_the_device_drafts_what_it_drafts_on_the_host(
    pair: TinyPair, device: Crossed, kind: str, rule: str
) -> None:
    """Step for step: nothing but the place of its numbers is another."""
    decoders = [
        SpeculativeDecoder(pair.target, drafter, "fixed:5", rule=rule, strict=True, drafter_device=there)
        for drafter, there in ((on_host(pair, kind), None), (drafter_on(device, pair, kind, pair.target), DEVICE))
    ]
    for options in ({"temperature": 0.0}, SAMPLED):
        made = [
            decoder.generate(
                [pair.ids(PROMPTS[i]) for i in (0, 1, 3)], batch_size=2, max_new_tokens=9, eos_token_id=None, **options
            )
            for decoder in decoders
        ]
        for one, other in zip(*made, strict=True):
            assert one.error is other.error is None
            assert one.tokens.equal(other.tokens)
            assert [int(step.num_accepted) for step in one.steps] == [int(step.num_accepted) for step in other.steps]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2])
def test_one_copy_of_features_goes_and_one_of_tokens_comes_back_in_a_step(
    pair: TinyPair, device: Crossed, kind: str, rows: int
) -> None:
    decoder = SpeculativeDecoder(
        pair.target, drafter_on(device, pair, kind, pair.target), "fixed:4", strict=True, drafter_device=DEVICE
    )
    counted = 0
    hidden = 64 * len(decoder.drafter.feature_layers)
    with decoder.run_many([pair.ids(PROMPTS[i]) for i in range(rows)], batch_size=rows, max_new_tokens=12) as run:
        for record in run:
            if hasattr(record, "draft_length") and int(record.draft_length.max()) == 3:
                (back,) = device.back
                assert back.shape == (len(record.row_ids), 3)
                assert back.dtype == torch.int64
                features = [value for value in device.out if value.is_floating_point() and value.ndim == 2]
                sent = [value for value in features if value.shape[-1] == hidden]
                assert len(sent) == (hidden > 0)
                # What else goes there is made on the host: counts, tokens and places, no logits and no states.
                others = [value for value in device.out if value.is_floating_point() and value.shape[-1:] != (hidden,)]
                assert others == []
                counted += 1
            device.clear()
    assert counted > 1


def test_a_target_on_the_device_waits_for_nothing_but_the_features(pair: TinyPair, device: Crossed) -> None:
    target = copy.deepcopy(pair.target)
    device.put(target)
    host = torch.device("cpu")
    parts: Any = EmbeddingAndHead(target, host)
    drafter = BlockDiffusionDrafter(pair.drafter_model, parts)
    decoder = SpeculativeDecoder(
        target, OtherDevice(drafter, host), "fixed:4", tokenizer=pair.tokenizer, strict=True, drafter_device="cpu"
    )
    alone = SpeculativeDecoder(pair.target, pair.block_diffusion(), "fixed:4", tokenizer=pair.tokenizer)
    reads = device.count(decoder, PROMPTS[0], max_new_tokens=9, **SAMPLED)
    assert list(reads.tokens) == alone.generate(PROMPTS[0], max_new_tokens=9, **SAMPLED).tokens[0].tolist()
    assert max(reads.steps) == 2, "one after verification, and the features"


def test_rows_that_come_and_go_leave_the_texts_alone(pair: TinyPair, device: Crossed) -> None:
    drafter = Sources([NgramDrafter(), drafter_on(device, pair, "block diffusion", pair.target)])
    decoder = SpeculativeDecoder(pair.target, drafter, RandomPolicy(seed=2), strict=True, drafter_device=DEVICE)
    alone = SpeculativeDecoder(pair.target, NgramDrafter(), "fixed:1")
    asked: list[Any] = [{"prompt": pair.ids(PROMPTS[i]), "max_new_tokens": 1 + 5 * i % 13} for i in range(5)]
    for one, other in zip(*(made.generate(asked, batch_size=3, **SAMPLED) for made in (decoder, alone)), strict=True):
        assert one.error is None
        assert one.tokens.equal(other.tokens)


# Where things are.


def test_embedding_and_head_are_copied_and_a_tied_pair_once(pair: TinyPair) -> None:
    parts = EmbeddingAndHead(pair.target, META)
    embedding, head = parts.get_input_embeddings(), parts.get_output_embeddings()
    assert head is not None
    assert embedding.weight.device == head.weight.device == META
    assert pair.target.get_input_embeddings().weight.device.type == "cpu"
    tied = copy.deepcopy(pair.target)
    tied.set_output_embeddings(nn.Linear(64, 100, bias=False))
    tied.get_output_embeddings().weight = tied.get_input_embeddings().weight
    parts = EmbeddingAndHead(tied, META)
    head = parts.get_output_embeddings()
    assert head is not None
    assert head.weight is parts.get_input_embeddings().weight
    use_products("onednn", copied := copy.deepcopy(pair.target))
    parts = EmbeddingAndHead(copied, META)
    assert "forward" not in vars(parts.get_output_embeddings()), "it would compute with the weights that are here"
    with pytest.raises(ValueError, match="'layers' of its target, of which only embedding and head"):
        _ = parts.layers
    with pytest.raises(ValueError, match="offloaded"):
        EmbeddingAndHead(copy.deepcopy(pair.target).to(META), torch.device("cpu"))


def test_noise_of_another_device_is_the_same_and_forgotten_with_it() -> None:
    noise = GumbelNoise(1, 2, 7, torch.device("cpu"))
    other = noise.on(torch.device("cpu"))
    assert noise.on(torch.device("cpu")) is other is not noise
    assert noise.at(0, 3).equal(other.at(0, 3))
    noise.forget_before(2)
    assert noise.at(2, 2).equal(other.at(2, 2))
    assert len(other._rows) == 2


def test_a_copy_of_a_text_follows_it() -> None:
    text = RunningText([RowText(torch.tensor([[1, 2]]), 9), RowText(torch.tensor([[3]]), 9)])
    there = RunningText([row.on(torch.device("cpu")) for row in text.rows])
    tokens = [[4, 5, 6], [7]]
    text.append(torch.tensor([[4, 5, 6], [7, 0, 0]]), torch.tensor([[6], [7]]), tokens)
    there.follow(text)
    assert there.anchor.equal(text.anchor)
    assert [row[:count].tolist() for row, count in zip(there.newest, there.counts, strict=True)] == tokens
    assert [(row.tokens, row.newest, row.position) for row in there.rows] == [
        (row.tokens, row.newest, row.position) for row in text.rows
    ]
    assert there.rows[0].ids.tolist() == [[1, 2, 4, 5, 6]]


class Own(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise AssertionError("a draft on another device")


def test_logits_processors_of_transformers_go_along_with_their_tensors() -> None:
    suppress = SuppressTokensLogitsProcessor([1], device="cpu")
    known = [RepetitionPenaltyLogitsProcessor(1.2), suppress]
    there = moved(Processors(LogitsProcessorList(known)), META)
    assert [type(p) for p in there.processors] == [type(p) for p in known]
    assert there.processors[1].suppress_tokens.device == META
    assert suppress.suppress_tokens.device.type == "cpu"


def test_what_is_the_targets_own_device_is_no_other() -> None:
    cpu = torch.device("cpu")
    assert elsewhere("cpu", cpu) is None
    assert elsewhere(None, cpu) is None
    assert elsewhere("meta", cpu) == META
    machine = describe_machine(cpu, META)
    assert (machine["device"], machine["drafter_device"], machine["drafter_gpu"]) == ("cpu", "meta", None)
    assert "drafter_device" not in describe_machine(cpu)
    assert WallClock(cpu, META).tells_parts is False
    assert WallClock(cpu).tells_parts is True


def test_named_drafters_are_placed_and_objects_are_not(pair: TinyPair, tiny_folder: Path) -> None:
    for name in ("drafter", "assistant"):
        drafters = [str(tiny_folder / name), "ngram"]
        decoder = SpeculativeDecoder(pair.target, drafters, drafter_device="meta")
        placed, lookup = sources_of(decoder.drafter)
        assert isinstance(placed, OtherDevice)
        assert isinstance(lookup, NgramDrafter), "it has no model"
        assert placed.model is not None
        assert {weight.device for weight in placed.model.parameters()} == {META}
        assert decoder.with_policy("fixed:2").drafter is decoder.drafter
        here = SpeculativeDecoder(pair.target, drafters, drafter_device="cpu")
        assert here.drafter_device is None
    with pytest.raises(ValueError, match="drafter DFlash was handed over as an object, and drafter_device='meta'"):
        SpeculativeDecoder(pair.target, pair.block_diffusion(), drafter_device="meta")
    SpeculativeDecoder(pair.target, "ngram", drafter_device="meta")
    with pytest.raises(ValueError, match="a trace holds what would be drafted, whatever the device"):
        Tracer(decoder, TraceOptions(block_sizes=(2,)))
