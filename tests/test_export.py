"""Exported policies decide as the policies that they were made from, everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")

from bpkit_forecast.policy import VECTORS, Forecast, ForecastConfig
from bpkit_mlp.blockpilot import BlockPilot
from bpkit_mlp.ldlp import Ldlp, LdlpThreshold
from bpkit_threshold.specdecpp import SpecDecPP

from bpkit.assets import DOMAINS, prompts
from bpkit.decode.clock import CostClock
from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.guard import PolicyFaultWarning
from bpkit.export.convert import OPSETS, example, stripped, to_onnx
from bpkit.export.core import Core, Exportable, Port
from bpkit.export.load import load_exported
from bpkit.export.policy import Onnx
from bpkit.export.session import open_session
from bpkit.export.validate import Comparison
from bpkit.export.write import export_policy
from bpkit.learn import TrainedPolicy
from bpkit.policy import PolicyError
from bpkit.prompts import Prompt
from bpkit.testing import TinyPair
from bpkit.trace.collect import TraceOptions, Tracer
from bpkit.trace.cost import CostTable
from bpkit.trace.records import PromptTrace
from bpkit.types import Feature
from tests.conftest import ShippedPair

SIZES = [2, 3, 4, 5, 6]
COST = CostTable(
    draft={size: 0.05 + 0.01 * size for size in SIZES},
    verify={width: {64: 1 + 0.1 * width, 640: 2 + 0.2 * width} for width in range(1, 8)},
    rest=0.01,
)
FEATURES = frozenset({*VECTORS, Feature.PREFILL_LOGITS, Feature.DRAFT_HIDDEN})


@pytest.fixture(scope="module")
def decoder(pair: TinyPair) -> SpeculativeDecoder:
    return SpeculativeDecoder(
        pair.target,
        pair.block_diffusion(),
        "fixed:4",
        tokenizer=pair.tokenizer,
        max_block_size=6,
        clock=CostClock(COST),
    )


@pytest.fixture(scope="module")
def traces(decoder: SpeculativeDecoder) -> list[PromptTrace]:
    tracer = Tracer(decoder, TraceOptions(tuple(SIZES), 24, features=FEATURES))
    return [tracer.trace(i, Prompt(str(i), "tiny", text)) for i, text in enumerate(("abc abc ab", "x = y + 1", "1, 2"))]


def policies(decoder: SpeculativeDecoder) -> dict[str, TrainedPolicy]:
    """One of each kind with random weights, made so that decisions differ from row to row."""
    torch.manual_seed(0)
    spec, hidden = decoder.spec, decoder.spec.hidden_size
    layers = len(decoder.drafter.feature_layers)

    def made(policy: TrainedPolicy, facts: dict[str, Any], loud: float = 1.0) -> TrainedPolicy:
        networks = policy.build(facts)
        for network in networks.values():
            for parameter in network.parameters():
                parameter.data.mul_(loud)
        if facts is lengths:  # in the middle of what can be drafted
            networks["mlp"].output.bias.data.fill_(2.5)  # type: ignore[union-attr,operator]
        return type(policy).trained(policy.config, facts, networks, spec)

    forecast = {
        "block_sizes": SIZES,
        "yields": [1.6, 2.0, 2.2, 2.3, 2.35],
        "curves": {"steps": [1.1, 1.3, 1.4, 1.5, 1.6, 1.7], "verify": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]},
        "outlook": [[0.5, 0.9, 1.2, 1.3, 1.3], [0.1, 0.1, 0.1, 0.1, 0.1], [1.0, 2.0, 3.0, 4.0, 5.0]],
        "inputs": (layers + 2) * hidden,
        "hidden": 8,
        "dropout": 0.1,
    }
    choice = {"inputs": hidden, "sizes": [1, 3, 6], "spread": 0.1}
    lengths = {"hidden_size": hidden, "sizes": SIZES}
    head = {"hidden_size": hidden, "blocks": 2, "block_size": 6}
    return {
        "forecast": made(Forecast.untrained(ForecastConfig(truncate=True)), forecast, 3.0),
        "forecast_alone": made(Forecast.untrained(ForecastConfig(rate=0.6)), forecast, 3.0),
        "blockpilot": made(BlockPilot.untrained(BlockPilot.Config(input="hidden", width=16)), choice),
        "ldlp": made(Ldlp.untrained(Ldlp.Config(width=8, normalise="standard")), lengths, 0.3),
        "ldlp_longer": made(LdlpThreshold.untrained(LdlpThreshold.Config(width=8, threshold=0.01)), lengths, 0.3),
        "ldlp_shorter": made(
            LdlpThreshold.untrained(LdlpThreshold.Config(width=8, keep="shorter", threshold=0.01)), lengths, 0.3
        ),
        "specdecpp": made(SpecDecPP.untrained(SpecDecPP.Config(threshold=0.6)), head, 2.0),
    }


NAMES = ("forecast", "forecast_alone", "blockpilot", "ldlp", "ldlp_longer", "ldlp_shorter", "specdecpp")


@pytest.fixture(scope="module")
def exported(
    decoder: SpeculativeDecoder, traces: list[PromptTrace], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    made = policies(decoder)
    assert set(made) == set(NAMES)
    for name, policy in made.items():
        export_policy(policy, traces, decoder.spec, folder / name, name=name, summary="For tests.", cost=COST)
    return {name: folder / name for name in made}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_file_decides_as_the_policy_step_for_step(
    decoder: SpeculativeDecoder, exported: dict[str, Path], name: str
) -> None:
    policy = policies(decoder)[name]
    kinds = set()
    for text in ("abc abc ab", "x = y", "The quick brown fox", "1, 2, 3, 1, 2"):
        results = [
            SpeculativeDecoder(
                decoder.target,
                decoder.drafter,
                made,
                tokenizer=decoder.tokenizer,
                max_block_size=6,
                clock=CostClock(COST),
                strict=True,
            ).generate(text, max_new_tokens=30, temperature=0.0)
            for made in (policy, Onnx(path=str(exported[name])))
        ]
        steps = [[(int(s.block_size), int(s.verify_length), int(s.num_accepted)) for s in r.steps] for r in results]
        assert steps[0] == steps[1]
        assert results[0].tokens.tolist() == results[1].tokens.tolist()
        kinds |= set(steps[0])
    assert len(kinds) > 1, "a policy that always decides the same shows nothing"


@pytest.mark.slow
def test_the_description_says_what_goes_in_and_out(exported: dict[str, Path]) -> None:
    told = json.loads((exported["forecast"] / "policy.json").read_text(encoding="utf-8"))
    assert set(told["networks"]) == {"select.onnx", "truncate.onnx"}
    assert told["block_sizes"] == [1, *SIZES]
    assert set(told["features"]) == {*map(str, VECTORS), "draft_probability", "draft_entropy"}
    for name, network in told["networks"].items():
        data = (exported["forecast"] / name).read_bytes()
        assert network["sha256"] == hashlib.sha256(data).hexdigest()
        assert network["bytes"] == len(data)
        agreement = told["validation"][name]
        assert agreement["agree"] + agreement["within_tolerance"] == agreement["rows"] > 50
        assert {1, 7, 64} & set(agreement["batch_sizes"])
    assert json.loads((exported["ldlp_longer"] / "policy.json").read_text())["state"] == ["forecast"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_same_every_time_and_say_nothing_of_this_machine(
    decoder: SpeculativeDecoder, exported: dict[str, Path], name: str
) -> None:
    policy = policies(decoder)[name]
    assert isinstance(policy, Exportable)
    policy.bind(decoder.spec, COST)
    for stem, core in policy.export().cores.items():
        data = to_onnx(core)
        assert data == (exported[name] / f"{stem}.onnx").read_bytes()
        assert str(Path(__file__).parent.parent).encode() not in data
        assert b".py" not in data


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
def test_both_opsets_give_the_same_outputs_at_any_batch(
    decoder: SpeculativeDecoder, exported: dict[str, Path], opset: int
) -> None:
    for name, policy in policies(decoder).items():
        assert isinstance(policy, Exportable)
        policy.bind(decoder.spec, COST)
        for stem, core in policy.export().cores.items():
            written = (exported[name] / f"{stem}.onnx").read_bytes()  # what the first of them gives, as tested above
            session = open_session(written if opset == OPSETS[0] else to_onnx(core, opset=opset))
            for batch, width in ((1, 1), (5, 4), (33, 5)):
                given = {p.name: example(p, {"batch": batch, "width": width}, i) for i, p in enumerate(core.inputs)}
                with torch.inference_mode():
                    wanted = core.module(*given.values())
                got = session.run({name: value.numpy() for name, value in given.items()})
                for port, value in zip(core.outputs, wanted, strict=True):
                    torch.testing.assert_close(torch.tensor(got[port.name]), value, rtol=1e-4, atol=1e-4)


class Off(nn.Module):
    """Decides otherwise than `BlockPilot`, by a full score."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, inputs: torch.Tensor) -> Any:
        size, scores, margin = self.core(inputs)
        return 7 - size, scores, margin + 1


@pytest.mark.slow
def test_nothing_is_written_if_a_row_is_decided_otherwise(
    decoder: SpeculativeDecoder, traces: list[PromptTrace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policies(decoder)["blockpilot"]
    honest = BlockPilot.export

    def dishonest(self: BlockPilot) -> Any:
        made = honest(self)
        core = made.cores["policy"]
        changed = Core(core.method, Off(core.module), core.inputs, core.outputs)
        return type(made)({"policy": changed}, made.block_sizes)

    monkeypatch.setattr(BlockPilot, "export", dishonest)
    with pytest.raises(PolicyError, match=r"decides otherwise than the policy on 3 of 3 rows.*nothing was"):
        export_policy(policy, traces, decoder.spec, tmp_path / "x", name="x", summary="x")
    assert not (tmp_path / "x").exists()


def test_near_ties_are_counted_apart() -> None:
    class Tie(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.ones(len(x), dtype=torch.int64), x

    ports = (Port("x", ("batch",), "float32", "x"),)
    core = Core(
        "select",
        Tie(),
        ports,
        (Port("block_size", ("batch",), "int64", "b"), Port("margin", ("batch",), "float32", "m")),
    )
    comparison = Comparison()
    margins = torch.tensor([1e-6, 1.0, 1.0])
    decided = torch.tensor([2, 2, 1])
    comparison.add(
        core, {"x": margins}, decided, lambda given: {"block_size": given["x"] * 0 + 1, "margin": given["x"]}
    )
    assert (comparison.rows, comparison.agree, comparison.within_tolerance) == (3, 1, 1)
    assert len(comparison.wrong) == 1


def test_a_policy_without_networks_says_how_to_become_exportable(decoder: SpeculativeDecoder, tmp_path: Path) -> None:
    class Mine(BlockPilot):
        export = None  # type: ignore[assignment]

    with pytest.raises(PolicyError, match="cannot be exported: its class defines no `export"):
        export_policy(Mine.untrained(BlockPilot.Config()), [], decoder.spec, tmp_path, name="mine", summary="")


@pytest.mark.slow
def test_a_score_that_is_not_finite_is_a_fault_and_the_text_stays(
    decoder: SpeculativeDecoder, exported: dict[str, Path]
) -> None:
    policy = Onnx(path=str(exported["ldlp"]))
    loose = SpeculativeDecoder(
        decoder.target, decoder.drafter, policy, tokenizer=decoder.tokenizer, max_block_size=6, clock=CostClock(COST)
    )
    session = policy.loaded.sessions["select"]

    def broken(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = type(session).run_torch(session, given)
        return {**outputs, "length": outputs["length"] * torch.nan}

    session.run_torch = broken  # type: ignore[method-assign]
    with pytest.warns(PolicyFaultWarning, match=r"not finite \(length\)"):
        result = loose.generate("x = y", max_new_tokens=12, temperature=0.0)
    assert result.fallbacks > 0
    assert {int(step.block_size) for step in result.steps} == {loose.spec.trained_block_size}


def test_the_policy_needs_a_folder() -> None:
    with pytest.raises(PolicyError, match="as in onnx:exported/forecast"):
        Onnx()


def test_a_bare_name_is_a_shipped_policy_unless_a_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Onnx(path="forecast").loaded.description.name == "forecast"
    with pytest.raises(PolicyError, match=r"no exported policy of that name ships \(.*blockpilot, forecast"):
        Onnx(path="nothing")
    (tmp_path / "forecast").mkdir()
    with pytest.raises(PolicyError, match="forecast"):
        Onnx(path="forecast")


@pytest.mark.slow
def test_stripping_takes_inner_shapes_and_traces(decoder: SpeculativeDecoder, exported: dict[str, Path]) -> None:
    import onnx

    proto = onnx.load_model_from_string((exported["ldlp"] / "policy.onnx").read_bytes())
    assert not proto.graph.value_info
    assert not proto.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert stripped(proto).SerializeToString(deterministic=True) == (exported["ldlp"] / "policy.onnx").read_bytes()


SHIPPED = sorted(path.parent for path in (Path(__file__).parent.parent / "exported").glob("*/policy.json"))


@pytest.mark.slow
@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_the_shipped_files_decide_as_the_shipped_policies(shipped: ShippedPair, folder: Path) -> None:
    description = load_exported(folder).description
    options = {**description.options, "name": description.policy}
    found = [p["prompt"] for domain in DOMAINS for p in prompts(domain, limit=1)]
    specs = (options, {"name": "onnx", "path": str(folder)})
    made = [
        SpeculativeDecoder(shipped.target, shipped.drafter, spec, tokenizer=shipped.tokenizer, strict=True)
        for spec in specs
    ]
    for text in found:
        results = [decoder.generate(text, max_new_tokens=48, temperature=0.0) for decoder in made]
        steps = [[(int(s.block_size), int(s.verify_length)) for s in result.steps] for result in results]
        assert steps[0] == steps[1]


@pytest.mark.slow
@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_the_shipped_files_are_those_that_the_shipped_weights_give(shipped: ShippedPair, folder: Path) -> None:
    from bpkit.registry.resolve import resolve_policy

    description = load_exported(folder).description
    policy = resolve_policy({**description.options, "name": description.policy})
    assert isinstance(policy, Exportable)
    decoder = SpeculativeDecoder(shipped.target, shipped.drafter, "fixed:4", tokenizer=shipped.tokenizer)
    policy.bind(decoder.spec, None)
    export = policy.export()
    assert (export.block_sizes, export.drafts) == (description.block_sizes, description.drafts)
    assert {f"{stem}.onnx" for stem in export.cores} == set(description.networks)
    for stem, core in export.cores.items():
        network = description.networks[f"{stem}.onnx"]
        ports = [(p.name, p.dtype, list(p.shape), p.meaning) for p in (*core.inputs, *core.outputs)]
        assert ports == [(t.name, t.dtype, t.shape, t.meaning) for t in (*network.inputs, *network.outputs)]
        old = open_session((folder / f"{stem}.onnx").read_bytes())
        new = open_session(to_onnx(core, opset=network.opset))
        golden = {name: np.array(rows, core_dtype(core, name)) for name, rows in network.golden.inputs.items()}
        drawn = {p.name: example(p, {"batch": 50, "width": 5}, i).numpy() for i, p in enumerate(core.inputs)}
        for given in (golden, drawn):
            ours, theirs = new.run(given), old.run(given)
            clear = theirs[core.margin] > core.tolerance
            for port in core.outputs:
                message = f"{port.name}: stale, run `make exported`"
                one, other = ours[port.name][clear], theirs[port.name][clear]
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=core.tolerance, err_msg=message)


def core_dtype(core: Core, name: str) -> str:
    return next(port.dtype for port in core.inputs if port.name == name)
