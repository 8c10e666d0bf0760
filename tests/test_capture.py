"""Passes in buffers of a few shapes give what they give as they are. All but the capture itself, which needs a GPU."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from typer.testing import Result

from bpkit import SpeculativeDecoder
from bpkit.config import ConfigError, load, settle
from bpkit.decode.capture import COLUMNS, WIDTHS, Capture, CaptureWarning, Graphs, Shape, _columns
from bpkit.decode.result import Generation
from bpkit.decode.serving import session_class
from bpkit.decode.slots import STEP, SlotCache
from bpkit.policy import Policy, State
from bpkit.testing import TinyPair
from bpkit.testing.simulated_device import SimulatedDevice
from bpkit.types import Context
from tests.conftest import ShippedPair
from tests.test_sessions import Reader, model_of
from tests.tiny_architectures import WINDOW, repeating_causal_lm, tiny_causal_lm, tiny_dflash

PROMPTS = (
    "x = 1, y",
    "a",
    "def f(a, b):\n    return a + b",
    "The quick brown fox jumps over the lazy dog.",
    "1 + 1 = ",
)
GREEDY, SAMPLED = {"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}
DRAFTERS = ("block_diffusion", "autoregressive", "agreeable", "ngram")


class AnySize(Policy):
    """Block sizes from 1 to 12, another for each row and step."""

    wants = frozenset()

    def select(self, state: State, context: Context) -> Tensor:
        return torch.tensor([1 + (7 * at + row) % 12 for row, at in enumerate(context.position.tolist())])


def drafter_of(pair: TinyPair, name: str) -> Any:
    return name if name == "ngram" else getattr(pair, name)()


def both(
    pair: Any, drafter: Any, policy: Any = "fixed:5", **options: Any
) -> tuple[SpeculativeDecoder, SpeculativeDecoder]:
    """Decoders without and with captured passes."""
    made = [
        SpeculativeDecoder(pair.target, drafter, policy, tokenizer=pair.tokenizer, strict=True, capture=mode, **options)
        for mode in ("off", "on")
    ]
    return made[0], made[1]


def graphs_of(decoder: SpeculativeDecoder) -> Graphs:
    assert decoder.capture.target is not None
    return decoder.capture.target


def shapes(graphs: Graphs) -> list[Shape]:
    return [shape for shape, _ in graphs.kept]


def outcome(generations: Sequence[Generation]) -> list[tuple[list[int], list[int]]]:
    """Texts, and how much of each draft stood: drafts were the same as well."""
    return [(made.tokens[0].tolist(), [int(step.num_accepted) for step in made.steps]) for made in generations]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_texts_and_drafts_are_those_of_plain_passes(pair: TinyPair, name: str, options: dict[str, Any]) -> None:
    plain, captured = both(pair, drafter_of(pair, name), AnySize())
    for prompts, batch_size in ((PROMPTS[:2], 1), (PROMPTS, 3)):
        wanted, found = (
            decoder.generate(prompts, batch_size=batch_size, max_new_tokens=14, **options)
            for decoder in (plain, captured)
        )
        assert outcome(found) == outcome(wanted)
    assert {shape.rows for shape in shapes(graphs_of(captured))} <= {1, 2, 3}
    assert {width for shape in shapes(graphs_of(captured)) for width in shape.widths} <= {*WIDTHS}
    assert len(shapes(graphs_of(captured))) > 2
    drafts = [*captured.capture._drafters.values()]
    assert len(drafts) == (name != "ngram")
    assert all(graphs is not None and len(graphs.kept) > 1 for graphs in drafts)


def test_the_shipped_pair_accepts_the_same(shipped: ShippedPair) -> None:
    plain, captured = both(shipped, shipped.drafter, "fixed:6")
    prompts = ["1, 2, 3, 4, 5, 6, ", "def add(a, b):\n    return", "5 + 7 ="]
    wanted, found = (decoder.generate(prompts, max_new_tokens=32, batch_size=2) for decoder in (plain, captured))
    assert outcome(found) == outcome(wanted)
    assert sum(made.acceptance_length > 1.5 for made in found) > 1
    (drafts,) = captured.capture._drafters.values()
    assert drafts is not None
    assert any(shape.widths[1] == 8 for shape in shapes(drafts))


class Captured(Reader):
    """A reader whose passes are captured."""

    def begin(self, lengths: Sequence[int], **options: Any) -> Captured:
        super().begin(lengths, **options)
        self.session.graphs = Capture("on", self.model, self.model, self.kind).target
        return self


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "mistral", "gpt2", "gpt_oss", "deepseek_v3"])
def test_windows_soft_caps_and_tables_of_positions(kind: str) -> None:
    reader = Captured(model_of(kind), feature_layers=(0, 1))
    with torch.inference_mode():
        reader.begin([1, 3 * WINDOW, 6], slots=4, capacity=90)
        for _ in range(10):
            reader.step()
    assert max(map(len, reader.texts)) > 5 * WINDOW
    assert len(reader.session.graphs.kept) > 2
    reader.check()


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_come_and_go_and_slots_grow(seed: int) -> None:
    reader = Captured(model_of("gemma2"), seed)
    with torch.inference_mode():
        reader.begin([5, 1], slots=2, capacity=60)
        graphs, rooms = reader.session.graphs, set()
        for turn in range(8):
            reader.step()
            rooms.add(reader.session.slot_cache.room)
            assert reader.session.slot_cache is graphs.slots
            if turn % 3 == 1:
                reader.keep(reader.random.sample(range(len(reader.texts)), len(reader.texts) - 1))
            reader.join([reader.random.randrange(1, 20)], capacity=reader.random.choice((40, 400)))
        reader.step()
    assert len(rooms) > 2
    assert {shape.end for shape in shapes(graphs)} <= {COLUMNS, 2 * COLUMNS}
    reader.check()


def test_graphs_of_slots_that_grew_are_dropped(pair: TinyPair) -> None:
    _, decoder = both(pair, pair.block_diffusion())
    decoder.generate("x = 1", max_new_tokens=16)
    graphs = graphs_of(decoder)
    slots, first = graphs.slots, dict(graphs.kept)
    assert slots is not None
    assert slots.room == (1, STEP - 1)
    decoder.generate("y = 2", max_new_tokens=16)
    assert graphs.slots is slots
    assert {key: graphs.kept[key] for key in first} == first  # none was captured again
    decoder.generate("y = 2" * (STEP // 5), max_new_tokens=16)
    assert graphs.slots is not None
    assert graphs.slots.room == (1, 2 * STEP - 1)
    assert not any(graph in first.values() for graph in graphs.kept.values())


def test_columns_are_at_most_half_too_many() -> None:
    needed = range(1, 5000)
    found = [_columns(least) for least in needed]
    assert [*dict.fromkeys(found)] == [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(least <= columns < max(1.5 * least, 257) for least, columns in zip(needed, found, strict=True))


def test_what_a_replay_gave_is_not_overwritten_and_buffers_stay() -> None:
    model = tiny_causal_lm("qwen3")
    reader = Captured(model, feature_layers=(0,))
    with torch.inference_mode():
        reader.begin([4, 7], slots=2)
        reader.read([3, 3])
        ((shape, graph),) = ((shape, graph) for (shape, _), graph in reader.session.graphs.kept.items())
        kept = [found[-1] for found in reader.found]
        before = [output.features.clone() for output in kept if output.features is not None]
        tensors = [*graph.buffers, *(output for output in graph.outputs or () if output is not None)]
        addresses = [tensor.data_ptr() for tensor in tensors]
        reader.read([4, 2])
        assert [*reader.session.graphs.kept.values()] == [graph]
        assert (shape.rows, shape.widths) == (2, (4,))
        assert addresses == [tensor.data_ptr() for tensor in tensors]
        for output, wanted in zip(kept, before, strict=True):
            assert output.features is not None
            assert output.features.equal(wanted)
    reader.check()


def test_wide_passes_run_as_they_are(pair: TinyPair) -> None:
    reader = Captured(pair.target)
    with torch.inference_mode():
        reader.begin([4], slots=1, capacity=99)
        reader.read([WIDTHS[-1] + 1])
        assert reader.session.graphs.kept == {}
        reader.read([WIDTHS[-1]])
        assert [shape.widths for shape in shapes(reader.session.graphs)] == [(32,)]
    reader.check()


def test_generations_side_by_side_have_the_slots_one_after_the_other(pair: TinyPair) -> None:
    plain, decoder = both(pair, pair.block_diffusion())
    wanted = [plain.generate(text, max_new_tokens=20).tokens for text in PROMPTS[:3]]
    runs = [decoder.run(text, max_new_tokens=20) for text in PROMPTS[:3]]
    going = list(runs)
    while going:
        going = [run for run in going if next(run, None) is not None]
    assert [run.finish().tokens.tolist() for run in runs] == [tokens.tolist() for tokens in wanted]
    assert graphs_of(decoder).kept


def test_another_thread_does_not_take_the_slots_of_a_generation_that_runs(pair: TinyPair) -> None:
    plain, decoder = both(pair, pair.block_diffusion())
    run = decoder.run(PROMPTS[0], max_new_tokens=20)
    for _ in range(4):
        next(run)
    holder, texts = graphs_of(decoder)._session(), []
    assert holder is not None
    thread = threading.Thread(target=lambda: texts.append(decoder.generate(PROMPTS[1], max_new_tokens=20).tokens))
    thread.start()
    thread.join()
    assert graphs_of(decoder)._session() is holder
    assert texts[0].equal(plain.generate(PROMPTS[1], max_new_tokens=20).tokens)
    assert run.finish().tokens.equal(plain.generate(PROMPTS[0], max_new_tokens=20).tokens)


def test_decoders_of_one_target_share_slots(pair: TinyPair) -> None:
    _, decoder = both(pair, pair.block_diffusion())
    other = decoder.with_policy("fixed:2", "ngram")
    assert other.capture is decoder.capture
    for made in (decoder, other, decoder):
        made.generate("x = 1", max_new_tokens=12)
    wanted = {wanted for _, wanted in graphs_of(decoder).kept}
    assert wanted == {(), (1, 3)}  # hidden states that the DFlash drafter reads, and none


def test_a_step_waits_for_the_device_no_oftener(pair: TinyPair) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a real device")
    reads = []
    for host in both(pair, pair.block_diffusion(), "fixed:4"):
        with SimulatedDevice() as device:
            decoder = device.decoder(host).with_policy("fixed:4")
            assert (decoder.capture.target is not None) == (host.capture.mode == "on")
            reads.append(device.count(decoder, "x = 1, y = ", temperature=0, max_new_tokens=12))
    assert reads[0].tokens == reads[1].tokens
    assert set(reads[1].steps[1:]) == {1}  # the first replay was compared with the pass itself


# What cannot be captured


def refused(target: Any, drafter: Any) -> str:
    with pytest.raises(ValueError, match="capture='on'") as caught:
        SpeculativeDecoder(target, drafter, capture="on")
    return str(caught.value)


def test_on_names_what_cannot_be_captured(pair: TinyPair) -> None:
    hybrid = repeating_causal_lm("qwen3_5_text")
    assert f"each row of {type(hybrid).__name__} has a cache of its own" in refused(hybrid, "ngram")
    quantised = copy.deepcopy(pair.target)
    quantised.is_quantized = True
    assert "is quantised" in refused(quantised, "ngram")
    assert "is wrapped (DataParallel)" in refused(torch.nn.DataParallel(pair.target), "ngram")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    stretched = Qwen3ForCausalLM(Qwen3Config(**{**small(pair.target), "rope_parameters": rope}))
    assert "(dynamic) follow the longest text" in refused(stretched, "ngram")
    with pytest.raises(ValueError, match="capture='sometimes' is none of: auto, off, on"):
        SpeculativeDecoder(pair.target, "ngram", capture="sometimes")  # type: ignore[arg-type]


def small(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name != "layer_types"}


def test_auto_captures_nothing_on_a_cpu_and_says_nothing(pair: TinyPair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        decoder = SpeculativeDecoder(pair.target, pair.block_diffusion(), tokenizer=pair.tokenizer)
        assert decoder.capture.target is None
        decoder.generate("x", max_new_tokens=6)
    assert len(decoder.capture._drafters) == 0


def test_drafts_are_captured_where_the_target_is_not() -> None:
    target = repeating_causal_lm("qwen3_5_text")
    drafter = tiny_dflash(target)
    plain = SpeculativeDecoder(target, drafter, "fixed:4", capture="off")
    capture = Capture("off", target, target, session_class(target))
    capture.wanted = True  # as `auto` does where there is CUDA
    decoder = SpeculativeDecoder(target, drafter, "fixed:4", capture=capture)
    ids = torch.tensor([[5, 9, 3, 7]])
    texts = [made.generate(ids, max_new_tokens=16, eos_token_id=None).tokens for made in (plain, decoder)]
    assert texts[0].equal(texts[1])
    (drafts,) = capture._drafters.values()
    assert drafts is not None
    assert drafts.kept


def counting_by_itself(model: PreTrainedModel) -> None:
    """Let a model take positions from its cache, which a graph would repeat for ever."""
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        width, start = kwargs["input_ids"].shape[1], kwargs["past_key_values"].get_seq_length()
        kwargs["position_ids"] = torch.arange(start, start + width)[None]
        return forward(*args, **kwargs)

    model.forward = changed


def test_a_pass_that_gives_something_else_when_it_is_captured_is_found_out(pair: TinyPair) -> None:
    target = copy.deepcopy(pair.target)
    session_class(target)  # is found before
    counting_by_itself(target)
    plain = SpeculativeDecoder(target, "ngram", tokenizer=pair.tokenizer, capture="off")
    wanted = plain.generate(PROMPTS[0], max_new_tokens=16).tokens
    with pytest.raises(ValueError, match="Qwen3ForCausalLM gives other scores than the pass itself"):
        SpeculativeDecoder(target, "ngram", tokenizer=pair.tokenizer, capture="on").generate("x", max_new_tokens=9)
    decoder = SpeculativeDecoder(target, "ngram", tokenizer=pair.tokenizer, capture="on")
    decoder.capture.mode = "auto"
    with pytest.warns(CaptureWarning, match="gives other scores") as said:
        found = decoder.generate([PROMPTS[0]] * 2, max_new_tokens=16, batch_size=1)
    assert len(said) == 1
    assert [made.tokens.tolist() for made in found] == [wanted.tolist()] * 2
    assert graphs_of(decoder).kept == {}


def looking_at_tokens(model: PreTrainedModel, how: Callable[[Tensor], object]) -> None:
    """Let the host depend on numbers of a pass, as in some mixtures of experts."""
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        how(kwargs["input_ids"])
        return forward(*args, **kwargs)

    model.forward = changed


@pytest.mark.parametrize(
    ("how", "name"),
    [(torch.nonzero, "nonzero"), (lambda ids: ids[ids > 3], "index"), (lambda ids: int(ids[0, 0]), "item")],
    ids=["nonzero", "mask", "number"],
)
def test_a_pass_that_waits_for_the_device_is_found_before_it_is_captured(
    pair: TinyPair, how: Callable[[Tensor], object], name: str
) -> None:
    target = copy.deepcopy(pair.target)
    looking_at_tokens(target, how)
    with pytest.raises(ValueError, match=f"Qwen3ForCausalLM cannot be captured: {name} waits"):
        SpeculativeDecoder(target, "ngram", tokenizer=pair.tokenizer, capture="on").generate("x", max_new_tokens=9)


# Graphs, by operations that are recorded and done again


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a CUDA graph is, on a CPU: operations at the addresses and with the numbers that they had."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.operations:
            for kept, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():  # else it is a view
                    kept.copy_(new)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Instead of CUDA's graphs: all that were made."""
    made: list[Tape] = []

    def graph(tape: Tape, *, pool: object, stream: Stream, capture_error_mode: str) -> Tape:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        made.append(tape)
        return tape

    for name, value in {
        "CUDAGraph": Tape,
        "graph": graph,
        "current_stream": lambda device: Stream(),
        "stream": nullcontext,
        "device": nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def recording(decoder: SpeculativeDecoder) -> SpeculativeDecoder:
    """The decoder as it is where there is CUDA."""
    capture = decoder.capture
    capture.mode, capture.real, capture._pool, capture._side = "auto", True, "pool", Stream()
    return decoder


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["block_diffusion", "autoregressive"])
def test_operations_done_again_at_their_addresses_give_the_texts(
    pair: TinyPair, tapes: list[Tape], name: str, options: dict[str, Any]
) -> None:
    plain, decoder = both(pair, drafter_of(pair, name), AnySize())
    recording(decoder)
    for prompts, batch_size in ((PROMPTS[:2], 1), (PROMPTS, 3)):
        wanted, found = (
            made.generate(prompts, batch_size=batch_size, max_new_tokens=14, **options) for made in (plain, decoder)
        )
        assert outcome(found) == outcome(wanted)
    assert sum(tape.replays for tape in tapes) > 2 * len(tapes)


def test_windows_and_soft_caps_out_of_recorded_operations(tapes: list[Tape]) -> None:
    model = model_of("gemma2")
    reader = Captured(model)
    with torch.inference_mode():
        reader.begin([1, 3 * WINDOW, 6], slots=3, capacity=90)
        capture = reader.session.graphs.capture
        capture.real, capture._pool, capture._side = True, "pool", Stream()
        for _ in range(10):
            reader.step()
    assert sum(tape.replays for tape in tapes) > len(tapes) > 1
    reader.check()


def test_a_capture_that_fails_is_said_once_and_the_text_is_the_same(
    pair: TinyPair, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, decoder = both(pair, pair.block_diffusion(), AnySize())
    recording(decoder)
    graph = torch.cuda.graph

    def failing(tape: Any, **options: Any) -> Any:
        if len(tapes) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return graph(tape, **options)

    monkeypatch.setattr(torch.cuda, "graph", failing)
    with pytest.warns(CaptureWarning, match="cannot be captured: operation not permitted") as said:
        found = decoder.generate(PROMPTS[2], max_new_tokens=20).tokens
    assert found.equal(plain.generate(PROMPTS[2], max_new_tokens=20).tokens)
    assert sum(tape.replays for tape in tapes) >= 2
    assert len(said) == 1


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_where_memory_ends_generations_go_on_as_they_are(
    pair: TinyPair, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    plain, decoder = both(pair, "ngram")
    recording(decoder)
    join, joins = SlotCache.join, itertools.count(1)

    def joining(cache: SlotCache, other: SlotCache) -> None:
        if next(joins) == fails:  # the slots of the first, the copy for it, or the slots of the second
            raise torch.OutOfMemoryError("no memory")
        join(cache, other)

    monkeypatch.setattr(SlotCache, "join", joining)
    runs = [decoder.run(text, max_new_tokens=12) for text in PROMPTS[:2]]
    with pytest.warns(CaptureWarning, match="no memory for slots"):
        going = [next(run) for _ in range(3) for run in runs]
    assert len(going) == 6
    for run, text in zip(runs, PROMPTS, strict=False):
        assert run.finish().tokens.equal(plain.generate(text, max_new_tokens=12).tokens)


# Where it is asked for


@pytest.mark.parametrize(("text", "mode"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_the_config_takes_what_yaml_makes_of_on_and_off(tmp_path: Path, text: str, mode: str) -> None:
    file = tmp_path / "bpkit.yaml"
    file.write_text(f"runtime: {{capture: {text}}}", encoding="utf-8")
    assert load(file).runtime.capture == mode
    with pytest.raises(ConfigError, match=r"--capture: .*'auto', 'off' or 'on'"):
        settle(file, {"runtime": {"capture": "maybe"}})


def test_generate_takes_it(recipe: Callable[..., Result], tiny_folder: Path) -> None:
    models = ["--target", tiny_folder / "target", "--drafter", tiny_folder / "drafter"]
    texts = [
        recipe("generate", "x = 1", *models, "--max-new-tokens", 9, "--capture", mode).stdout for mode in ("on", "off")
    ]
    assert texts[0] == texts[1] != ""
