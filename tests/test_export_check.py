"""Loading exported policies that somebody made to do harm, or that were damaged on the way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bpkit.export import golden, load
from bpkit.export.check import check_graph
from bpkit.export.load import load_exported
from bpkit.export.policy import check_decoder
from bpkit.export.schema import ExportedPolicy
from bpkit.policy import PolicyError
from bpkit.types import DecoderSpec

SPEC = DecoderSpec("target", "drafter", "block-diffusion", 4, 6, 4, 100)
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) % 5
ROWS = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=np.float32)
Description = dict[str, Any]


def model(*extra: Any, opset: int = 20, ir: int = 10) -> Any:
    """Scores = hidden @ weights, the size of the best. `extra` nodes come first, and may give `one`, which is added."""
    nodes = [
        *extra,
        helper.make_node("MatMul", ["last_hidden", "weights"], ["plain"]),
        helper.make_node("Add", ["plain", "one"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["place"], axis=1, keepdims=0),
        helper.make_node("Gather", ["sizes", "place"], ["block_size"]),
        helper.make_node("ReduceMax", ["scores", "last"], ["top"], keepdims=0),
        helper.make_node("ReduceMin", ["scores", "last"], ["bottom"], keepdims=0),
        helper.make_node("Sub", ["top", "bottom"], ["margin"]),
    ]
    made = any("one" in node.output for node in extra)
    arrays = {"weights": WEIGHTS, "sizes": np.array([1, 2, 4]), "last": np.array([1])}
    arrays |= {} if made else {"one": np.ones(1, np.float32)}
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("last_hidden", TensorProto.FLOAT, ["batch", 4])],
        [
            helper.make_tensor_value_info("block_size", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("margin", TensorProto.FLOAT, ["batch"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def description(data: bytes, opset: int = 20) -> Description:
    scores = ROWS @ WEIGHTS + 1
    port = {"name": "last_hidden", "dtype": "float32", "shape": ["batch", 4], "meaning": "final-norm hidden state"}
    network = {
        "method": "select",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "opset": opset,
        "inputs": [port],
        "outputs": [
            {"name": "block_size", "dtype": "int64", "shape": ["batch"], "meaning": "positions to draft"},
            {"name": "margin", "dtype": "float32", "shape": ["batch"], "meaning": "how clear it was"},
        ],
        "margin": "margin",
        "tolerance": 1e-4,
        "golden": {
            "inputs": {"last_hidden": ROWS.tolist()},
            "outputs": {
                "block_size": np.array([1, 2, 4])[scores.argmax(1)].tolist(),
                "margin": (scores.max(1) - scores.min(1)).tolist(),
            },
        },
    }
    decoder = {name: getattr(SPEC, name) for name in ("target", "drafter", "drafter_kind", "trained_block_size")}
    return {
        "schema_version": 1,
        "name": "tiny",
        "policy": "mlp",
        "summary": "for tests",
        "block_sizes": [1, 2, 4],
        "default_block_size": 4,
        "decoder": {**decoder, "hidden_size": 4, "vocab_size": 100},
        "networks": {"select.onnx": network},
        "features": ["last_hidden"],
        "options": {},
        "validation": {},
    }


def write(
    folder: Path,
    proto: Any = None,
    data: bytes | None = None,
    change: Callable[[Description], None] | None = None,
    opset: int = 20,
) -> None:
    """A folder with a model, or with bytes in its place, and its description, changed."""
    data = data if data is not None else (proto or model()).SerializeToString()
    said = description(data, opset)
    if change is not None:
        change(said)
    (folder / "select.onnx").write_bytes(data)
    (folder / "policy.json").write_text(json.dumps(said))


@pytest.fixture(autouse=True)
def _untried() -> None:
    golden._passed.clear()


def test_a_good_folder_loads(tmp_path: Path) -> None:
    write(tmp_path)
    loaded = load_exported(tmp_path)
    assert loaded.description.name == "tiny"
    assert list(loaded.sessions) == ["select"]
    out = loaded.sessions["select"].run({"last_hidden": ROWS[:1]})
    assert out["block_size"].tolist() == loaded.description.networks["select.onnx"].golden.outputs["block_size"][:1]


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_other_opsets_load(tmp_path: Path, opset: int) -> None:
    proto = model(opset=opset)
    if opset == 17:  # axes of reductions were attributes
        for node in proto.graph.node:
            if node.op_type.startswith("Reduce"):
                del node.input[1]
                node.attribute.append(helper.make_attribute("axes", [1]))
    write(tmp_path, proto, opset=opset)
    load_exported(tmp_path)


# Folders and policy.json


def linked(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        elsewhere = folder.parent / f"{folder.name}-elsewhere"
        elsewhere.mkdir()
        write(folder)
        os.replace(folder / name, elsewhere / name)
        (folder / name).symlink_to(elsewhere / name)

    return make


def raw(name: str, content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder)
        (folder / name).write_bytes(content)

    return make


def edited(edit: Callable[[str], str]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder)
        path = folder / "policy.json"
        before = path.read_text()
        path.write_text(edit(before))
        assert path.read_text() != before

    return make


def changed(change: Callable[[Description], Any]) -> Callable[[Path], None]:
    return lambda folder: write(folder, change=lambda said: (change(said), None)[1])


def network(said: Description) -> Any:
    return said["networks"]["select.onnx"]


def renamed(name: str) -> Callable[[Path], None]:
    return changed(lambda said: said.update(networks={name: network(said)}))


def pipe(folder: Path) -> None:
    write(folder)
    (folder / "policy.json").unlink()
    os.mkfifo(folder / "policy.json")


def huge(name: str, size: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder)
        os.truncate(folder / name, size)

    return make


def two_of_one_method(said: Description) -> None:
    said["networks"]["another.onnx"] = network(said)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HTML = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"

FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (lambda folder: folder.rmdir(), "there is no folder"),
    "empty folder": (lambda folder: None, "holds no exported policy .* `bpkit export`"),
    "policy.json is a link": (linked("policy.json"), "policy.json is a symbolic link"),
    "policy.json is a pipe": (pipe, "policy.json is no plain file"),
    "policy.json is a folder": (lambda folder: (folder / "policy.json").mkdir(), "policy.json"),
    "policy.json is too large": (huge("policy.json", (8 << 20) + 1), "policy.json is too large"),
    "policy.json is empty": (raw("policy.json", b" \n"), "policy.json is empty"),
    "policy.json is a web page": (raw("policy.json", HTML), "policy.json is a web page"),
    "policy.json is a pointer": (raw("policy.json", LFS), "git lfs pull"),
    "policy.json is cut short": (edited(lambda text: text[:-9]), "is no JSON"),
    "policy.json is binary": (raw("policy.json", b"\xff\xfe\x00\x80"), "is no JSON"),
    "policy.json is a list": (raw("policy.json", b"[1]"), "no JSON object"),
    "policy.json is nested": (raw("policy.json", b"[" * 200_000 + b"]" * 200_000), "is no JSON"),
    "policy.json has NaN": (edited(lambda text: text.replace("0.0001", "NaN")), "NaN is no finite number"),
    "policy.json has infinity": (edited(lambda text: text.replace("0.0001", "1e999")), "no finite number"),
    "policy.json has a key twice": (edited(lambda text: '{"name": "a", ' + text[1:]), "key twice"),
    "a later schema": (
        changed(lambda said: said.update(schema_version=2)),
        "2, and this version .* reads schema_version 1",
    ),
    "no schema": (changed(lambda said: said.pop("schema_version")), "reads schema_version 1"),
    "a trained policy": (changed(lambda said: said.update(weights_sha256="0")), "run `bpkit export`"),
    "an unknown key": (changed(lambda said: said.update(hook="os.system")), "unknown key hook"),
    "an unknown key inside": (changed(lambda said: network(said).update(path="/x")), "unknown key .*path"),
    "a missing key": (changed(lambda said: said.pop("decoder")), "decoder"),
    "a file outside": (renamed("../select.onnx"), r"\.\./select.onnx.*should match"),
    "an absolute file": (renamed("/etc/passwd.onnx"), "should match"),
    "a file of a subfolder": (renamed("sub/select.onnx"), "should match"),
    "a file of a device": (renamed("con\x00.onnx"), "should match"),
    "two files for one method": (changed(two_of_one_method), "two files are for the same method"),
    "no such method": (changed(lambda said: network(said).update(method="__init__")), "method"),
    "sizes that descend": (changed(lambda said: said.update(block_sizes=[4, 2, 1])), "block_sizes"),
    "no sizes": (changed(lambda said: said.update(block_sizes=[])), "block_sizes"),
    "a huge size": (changed(lambda said: said.update(block_sizes=[1, 10**9])), "block_sizes"),
    "nothing decides": (
        changed(lambda said: (network(said).update(method="truncate"), said.update(drafts=4))),
        "no output 'verify_length'",
    ),
    "nothing to draft by": (changed(lambda said: network(said).update(method="truncate")), "how much to draft"),
    "no margin": (changed(lambda said: network(said).update(margin="gap")), "no output 'gap'"),
    "an unknown feature": (changed(lambda said: said.update(features=["last_hidden", "passwords"])), "'passwords'"),
    "a feature that is not declared": (changed(lambda said: said.update(features=[])), "not among its features"),
    "no golden rows of an output": (changed(lambda said: network(said)["golden"]["outputs"].pop("margin")), "golden"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_and_descriptions_are_refused(tmp_path: Path, case: str) -> None:
    make, words = FOLDERS[case]
    folder = tmp_path / "policy"
    folder.mkdir()
    make(folder)
    refuse(folder, words)


def refuse(folder: Path, words: str) -> None:
    """Loading fails with the words, in one line that names the folder or the file."""
    with pytest.raises(PolicyError, match=words) as caught:
        load_exported(folder)
    said = str(caught.value)
    assert str(folder) in said
    assert len(said) < 1200


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "policy.onnx").write_bytes(b"x")
    refuse(tmp_path / "policy.onnx", "there is no folder")


def test_names_with_folders_are_refused_without_the_schema_too(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="not in its folder"):
        load.read_file(tmp_path, "../secret", 10)


# ONNX files as bytes


def flipped(folder: Path) -> None:
    write(folder)
    data = bytearray((folder / "select.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "select.onnx").write_bytes(data)


def missing(folder: Path) -> None:
    write(folder)
    (folder / "select.onnx").unlink()


def of_bytes(make: Callable[[], bytes]) -> Callable[[Path], None]:
    """Bytes with a description whose SHA-256 is right."""
    return lambda folder: write(folder, data=make())


def good() -> bytes:
    data: bytes = model().SerializeToString()
    return data


def field(number: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while size > 0x7F:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (missing, "select.onnx is missing"),
    "a link": (linked("select.onnx"), "select.onnx is a symbolic link"),
    "empty": (raw("select.onnx", b""), "select.onnx is empty"),
    "too large": (huge("select.onnx", (256 << 20) + 1), "select.onnx is too large"),
    "cut short": (raw("select.onnx", good()[:-7]), "cut short"),
    "a flipped bit": (flipped, "damaged.*SHA-256"),
    "a web page": (raw("select.onnx", HTML), "web page"),
    "a web page with its own hash": (of_bytes(lambda: HTML), "web page"),
    "a pointer": (raw("select.onnx", LFS), "git lfs pull"),
    "a pointer with its own hash": (of_bytes(lambda: LFS), "git lfs pull"),
    "text": (of_bytes(lambda: b"import os; os.system('true')"), "no valid ONNX file"),
    "a pickle": (of_bytes(lambda: b"\x80\x04\x95\x1a\x00\x00\x00"), "no valid ONNX file"),
    "zeros": (of_bytes(lambda: bytes(64)), "no valid ONNX file"),
    "cut short with its own hash": (of_bytes(lambda: good()[:-7]), "no valid ONNX file"),
    "a field that ONNX does not have": (of_bytes(lambda: good() + field(15, b"surprise")), "field 15 of ModelProto"),
    "a number for the graph": (of_bytes(lambda: good() + bytes([7 << 3, 1])), "field 7 of ModelProto"),
    "a number without an end": (of_bytes(lambda: good() + b"\x08" + b"\xff" * 12), "no valid ONNX file"),
    "a million empty nodes": (of_bytes(lambda: field(7, b"\x0a\x00" * 1_000_000)), "more than 200,000 fields"),
    "packed integers": (of_bytes(lambda: field(7, field(5, field(7, bytes(2 << 20))))), "packed integers"),
    "a name that is no text": (of_bytes(lambda: good().replace(b"margin", b"marg\xff\xfe")), "not UTF-8"),
    "no model at all": (of_bytes(lambda: field(2, b"somebody")), "has opset none"),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    make, words = FILES[case]
    make(tmp_path)
    refuse(tmp_path, words)


def test_random_damage_is_an_error_or_harmless() -> None:
    """Whatever is wrong, it is a PolicyError."""
    chance, base = random.Random(0), good()
    said = described().networks["select.onnx"]
    refused = 0
    for _ in range(1500):
        data = bytearray(base)
        for _ in range(chance.choice([1, 2, 5])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            check_graph("select.onnx", bytes(data), said)
        except PolicyError:
            refused += 1
    assert refused > 500


# Graphs


def external(tensor: Any) -> Any:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def one(value: float = 1.0) -> Any:
    return numpy_helper.from_array(np.array([value], np.float32), "one")


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, outputs, **attributes)


def constant(name: str, values: Any) -> Any:
    return node("Constant", [], [name], value=numpy_helper.from_array(np.array(values), name))


def subgraph(*initializers: Any) -> Any:
    output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1])
    return helper.make_graph([constant("inner", np.ones(1, np.float32))], "inside", [], [output], list(initializers))


def with_graph(change: Callable[[Any], Any], *extra: Any, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        proto = model(*extra, **options)
        change(proto)
        return proto

    return make


def sparse(values: Any) -> Any:
    values.name = values.name or "ghost"
    return helper.make_sparse_tensor(values, helper.make_tensor("at", TensorProto.INT64, [1], [0]), [1 << 40])


def loop() -> Any:
    branch = subgraph()
    return node("If", ["yes"], ["one"], then_branch=branch, else_branch=branch)


def wrong_shape(proto: Any, *dims: int) -> None:
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)


def of_value(proto: Any, kind: str) -> Any:
    return getattr(proto.graph, kind)[0]


def set_axis(proto: Any, kind: str, axis: int, name: str) -> None:
    of_value(proto, kind).type.tensor_type.shape.dim[axis].dim_param = name


def function() -> Any:
    return helper.make_function("mine", "F", ["x"], ["y"], [node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 20)])


HUGE = constant("shape", [1 << 40])
GRAPHS: dict[str, tuple[Callable[[], Any], str]] = {
    "external data": (with_graph(lambda p: external(p.graph.initializer[0])), "external data"),
    "external data, not said to be": (
        with_graph(lambda p: p.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")),
        "external data",
    ),
    "external data of a sparse initializer": (
        with_graph(lambda p: p.graph.sparse_initializer.append(sparse(external(one())))),
        "external data",
    ),
    "external data of a constant": (
        lambda: model(node("Constant", [], ["one"], value=external(one()))),
        "external data",
    ),
    "external data of a subgraph": (
        lambda: model(node("If", ["yes"], ["one"], then_branch=subgraph(external(one())), else_branch=subgraph())),
        "external data",
    ),
    "external data of a function": (
        with_graph(
            lambda p: p.functions.append(
                helper.make_function(
                    "mine",
                    "F",
                    [],
                    ["y"],
                    [node("Constant", [], ["y"], value=external(one()))],
                    [helper.make_opsetid("", 20)],
                )
            )
        ),
        "external data",
    ),
    "a sparse initializer": (
        with_graph(lambda p: p.graph.sparse_initializer.append(sparse(one()))),
        "sparse initializers",
    ),
    "a sparse constant": (lambda: model(node("Constant", [], ["one"], sparse_value=sparse(one()))), "'sparse_value'"),
    "a domain": (with_graph(lambda p: p.opset_import.append(helper.make_opsetid("com.evil", 1))), "domain 'com.evil'"),
    "a node of another domain": (
        lambda: model(node("Relu", ["weights"], ["one"], domain="com.microsoft")),
        "com.microsoft",
    ),
    "a function": (with_graph(lambda p: p.functions.append(function())), "functions of its own"),
    "training information": (with_graph(lambda p: p.training_info.add()), "training information"),
    "settings": (with_graph(lambda p: p.metadata_props.add(key="ort_config", value="{}")), "settings for the runtime"),
    "an old opset": (lambda: model(opset=16), "opset 16"),
    "a new opset": (lambda: model(opset=22), "opset 22"),
    "another opset than described": (lambda: model(opset=19), "opset 19 and policy.json says 20"),
    "two opsets": (with_graph(lambda p: p.opset_import.append(helper.make_opsetid("", 18))), "opset 20, 18"),
    "an old file format": (lambda: model(ir=6), "IR version 6"),
    "an initializer of strings": (
        with_graph(lambda p: p.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"x"]))),
        "'s' of a type",
    ),
    "an initializer without its values": (with_graph(lambda p: wrong_shape(p, 1 << 40, 3)), "'weights' whose shape"),
    "an initializer of negative size": (with_graph(lambda p: wrong_shape(p, -4, -3)), "impossible shape"),
    "an unknown type": (with_graph(lambda p: setattr(p.graph.initializer[0], "data_type", 99)), "of a type"),
    "too many nodes": (
        lambda: model(*(node("Relu", ["weights"], [f"n{i}"]) for i in range(5001))),
        "5,008 nodes, and at most 5,000",
    ),
    "a branch": (lambda: model(loop()), "'If', which policies may not"),
    "a graph in an attribute": (
        lambda: model(node("Relu", ["weights"], ["one"], body=subgraph())),
        "graph inside node 0",
    ),
    "a reference attribute": (
        with_graph(lambda p: p.graph.node[2].attribute.add(name="x", ref_attr_name="y")),
        "'x' of a kind",
    ),
    "a cast to text": (lambda: model(node("Cast", ["weights"], ["text"], to=TensorProto.STRING)), "casts to a type"),
    "a huge expansion": (lambda: model(HUGE, node("Expand", ["weights", "shape"], ["one"])), "node 1 .*Expand"),
    "a huge range": (
        lambda: model(
            constant("a", 0), constant("b", 1 << 50), constant("c", 1), node("Range", ["a", "b", "c"], ["one"])
        ),
        "node 3 .*Range",
    ),
    "an input of another name": (
        with_graph(lambda p: setattr(of_value(p, "input"), "name", "secret")),
        "inputs secret",
    ),
    "an input more": (
        with_graph(lambda p: p.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))),
        "inputs last_hidden, more",
    ),
    "an input twice": (with_graph(lambda p: p.graph.input.append(of_value(p, "input"))), "inputs last_hidden"),
    "an output less": (with_graph(lambda p: p.graph.output.pop()), "outputs block_size and"),
    "an input of another type": (
        with_graph(lambda p: setattr(of_value(p, "input").type.tensor_type, "elem_type", TensorProto.INT64)),
        "type int64 and policy.json says float32",
    ),
    "an input that is a sequence": (
        with_graph(lambda p: of_value(p, "input").type.sequence_type.elem_type.tensor_type.SetInParent()),
        "no tensor of known axes",
    ),
    "an input of other axes": (
        with_graph(lambda p: setattr(of_value(p, "input").type.tensor_type.shape.dim[1], "dim_value", 8)),
        r"axes \[batch, 8\] and policy.json says \[batch, 4\]",
    ),
    "an axis of another name": (with_graph(lambda p: set_axis(p, "output", 0, "rows")), r"axes \[rows\]"),
    "an axis without a name": (with_graph(lambda p: set_axis(p, "input", 0, "")), r"axes \[\?, 4\]"),
    "no axes": (
        with_graph(lambda p: of_value(p, "output").type.tensor_type.ClearField("shape")),
        "no tensor of known axes",
    ),
    "a default for an input": (
        with_graph(
            lambda p: p.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 4), np.float32), "last_hidden"))
        ),
        "default value for the input 'last_hidden'",
    ),
    "an input of no node": (lambda: model(node("Relu", ["nowhere"], ["one"])), "does not run in onnxruntime"),
}
REFUSED = """
    Loop Scan RandomNormal RandomUniformLike Bernoulli Dropout ConstantOfShape Tile Pad Resize Upsample OneHot NonZero
    StringNormalizer SequenceEmpty ImageDecoder system
"""


@pytest.mark.parametrize("kind", REFUSED.split())
def test_operators_that_no_policy_needs_are_refused(tmp_path: Path, kind: str) -> None:
    write(tmp_path, model(node(kind, ["weights"], ["one"])))
    refuse(tmp_path, f"'{kind}', which policies may not")


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs_are_refused(tmp_path: Path, case: str) -> None:
    make, words = GRAPHS[case]
    write(tmp_path, make())
    refuse(tmp_path, words)


# Graphs that only running them tells apart


def bomb() -> Any:
    """300 bytes that ask for 2 TB, of a size that is computed from the input."""
    return model(
        node("ReduceMax", ["last_hidden"], ["most"], keepdims=0),
        node("Cast", ["most"], ["count"], to=TensorProto.INT64),
        constant("factor", [1 << 39]),
        node("Mul", ["count", "factor"], ["shape"]),
        constant("start", np.ones(1, np.float32)),
        node("Expand", ["start", "shape"], ["large"]),
        node("ReduceMax", ["large"], ["one"], keepdims=0),
    )


def folded_bomb() -> Any:
    """The same of constants only, which onnxruntime computes while it opens the file."""
    return model(
        constant("half", [1 << 20]),
        node("Mul", ["half", "half"], ["shape"]),
        constant("start", np.ones(1, np.float32)),
        node("Expand", ["start", "shape"], ["large"]),
        node("ReduceMax", ["large"], ["one"], keepdims=0),
    )


def doubling() -> Any:
    """Each node is twice as large as the one before, without any operator that is given a size."""
    doubled = [node("Concat", [f"d{i}", f"d{i}"], [f"d{i + 1}"], axis=0) for i in range(40)]
    start = node("Reshape", ["last_hidden", "flat"], ["d0"])
    return model(constant("flat", [-1]), start, *doubled, node("ReduceMax", ["d40"], ["one"], keepdims=0))


def with_many_rows() -> Any:
    """Grows with the tenth power of the batch: bearable for the golden rows, not for 64."""
    grown = [node("Mul", [f"p{i}", "p0"], [f"p{i + 1}"]) for i in range(9)]
    return model(
        node("Shape", ["last_hidden"], ["p0"], start=0, end=1),
        *grown,
        constant("start", np.ones(1, np.float32)),
        node("Expand", ["start", "p9"], ["large"]),
        node("ReduceMax", ["large"], ["one"], keepdims=0),
    )


def endless() -> Any:
    """Hours of multiplications in 256 MB."""
    products = [node("MatMul", [f"m{i}", "m0"], [f"m{i + 1}"]) for i in range(900)]
    return model(
        node("ReduceMax", ["last_hidden"], ["most"], keepdims=0),
        constant("shape", [4000, 4000]),
        node("Expand", ["most", "shape"], ["m0"]),
        *products,
        node("ReduceMax", ["m900"], ["one"], keepdims=0),
    )


RUNS: dict[str, tuple[Callable[[], Any], str]] = {
    "a bomb": (bomb, "does not run in onnxruntime within 1,024 MiB"),
    "a bomb while it is opened": (folded_bomb, "does not run in onnxruntime within|ended the process"),
    "a bomb by doubling": (doubling, "does not run in onnxruntime within"),
    "a bomb for many rows": (with_many_rows, "does not run in onnxruntime within"),
    "no other batch": (
        lambda: model(
            constant("three", [3, 4]),
            node("Reshape", ["last_hidden", "three"], ["one4"]),
            node("ReduceMax", ["one4"], ["zero"], keepdims=0),
            node("Relu", ["zero"], ["one"]),
        ),
        "does not run in onnxruntime",
    ),
    "other weights": (
        with_graph(lambda p: p.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHTS * 1.001, "weights"))),
        "this runtime computes otherwise",
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_what_does_not_run_well_is_refused(tmp_path: Path, case: str) -> None:
    make, words = RUNS[case]
    write(tmp_path, make())
    refuse(tmp_path, words)


@pytest.mark.slow
def test_an_endless_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, endless())
    monkeypatch.setattr(golden, "SECONDS", 4)
    refuse(tmp_path, "did not finish its golden rows within 4 s")


GOLDEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another decision": (lambda rows: rows["outputs"].update(block_size=[1, 1, 1]), "block_size is .* and should be"),
    "another margin": (lambda rows: rows["outputs"].update(margin=[9.0, 9.0, 9.0]), "margin is .* and should be"),
    "no rows": (
        lambda rows: (rows["inputs"].update(last_hidden=[]), rows["outputs"].update(block_size=[], margin=[])),
        "do not fit",
    ),
    "ragged rows": (lambda rows: rows["inputs"].update(last_hidden=[[1, 2, 3, 4], [1]]), "do not fit"),
    "rows of text": (lambda rows: rows["inputs"].update(last_hidden=[["a"] * 4]), "they are no float32"),
    "a fraction for an integer": (lambda rows: rows["outputs"].update(block_size=[1.5, 1, 1]), "they are no int64"),
    "a number beyond float32": (lambda rows: rows["inputs"].update(last_hidden=[[1e300] * 4] * 3), "do not fit"),
    "rows that are too short": (lambda rows: rows["inputs"].update(last_hidden=[[1.0] * 3] * 3), "axis 4 of another"),
    "fewer answers": (lambda rows: rows["outputs"].update(block_size=[1]), "axis batch of another length"),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_wrong_golden_rows_are_refused(tmp_path: Path, case: str) -> None:
    change, words = GOLDEN[case]
    changed(lambda said: change(network(said)["golden"]))(tmp_path)
    refuse(tmp_path, words)


def test_a_file_is_tried_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    load_exported(tmp_path)
    monkeypatch.setattr(golden, "_command", lambda: ["/nonexistent"])
    load_exported(tmp_path)
    write(tmp_path, change=lambda said: network(said).update(tolerance=1e-3))
    with pytest.raises(PolicyError, match="cannot start"):
        load_exported(tmp_path)


def test_a_child_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    write(tmp_path)
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(golden, "_command", lambda: [sys.executable, "-I", "-S", "-c", kill])
    refuse(tmp_path, "select.onnx ended the process that tried it .signal 9")


# Decoders


def described() -> ExportedPolicy:
    return ExportedPolicy.model_validate(description(good()))


def test_the_decoder_it_was_made_for_is_fine() -> None:
    check_decoder(described(), SPEC)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 8}, "hidden size 4 there, 8 here"),
        ({"vocab_size": 8}, "vocab size 100 there, 8 here"),
        ({"drafter_kind": "n-gram"}, "drafter kind block-diffusion there, n-gram here"),
        ({"trained_block_size": 5}, "trained block size 4 there, 5 here"),
        ({"max_block_size": 3}, "up to 4, and this decoder stops at 3"),
        ({"target": "Qwen/Qwen3-4B"}, "allow_other_models=true"),
        ({"drafter": "z-lab/Qwen3-4B-DFlash-b16"}, "allow_other_models=true"),
    ],
)
def test_other_decoders_are_refused(change: dict[str, Any], words: str) -> None:
    spec = dataclasses.replace(SPEC, **change)
    with pytest.raises(PolicyError, match=words):
        check_decoder(described(), spec)
    if "allow" in words:
        check_decoder(described(), spec, allow_other_models=True)
    else:
        with pytest.raises(PolicyError, match=words):
            check_decoder(described(), spec, allow_other_models=True)


def test_onnx_itself_takes_the_model() -> None:
    onnx.checker.check_model(model(), full_check=True)
