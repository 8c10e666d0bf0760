"""What of an exported policy is refused before anything runs: graphs that no policy needs.

No static check bounds what a graph allocates, since shapes are computed too: `bpkit.export.golden` runs the rest in a
process of bounded memory, and `bpkit.export.session` bounds every later run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bpkit.export.schema import Network, Tensor
from bpkit.export.wire import Refused, scan
from bpkit.installation.distribution import install_command
from bpkit.policy import PolicyError

OPSETS = range(17, 22)
"""Versions of the operator set that runtimes of this format take. `bpkit export` writes 18 and 20; 17 is what older
engines take, and what converters write; 21 is the last whose operators were read for `ALLOWED`."""
OLDEST_IR = 8
MOST_NODES = 5_000
MOST_ELEMENTS = 1 << 24
"""Of a tensor whose size the file itself fixes."""
LARGEST_WEIGHTS = 256 << 20
ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
ALLOWED = frozenset(
    """
    Abs Add Ceil Clip Div Erf Exp Floor Identity Log Max Mean Min Mod Mul Neg Pow Reciprocal Round Sign Sin Cos Sqrt Sub
    Sum And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Where Xor
    Celu Elu Gelu HardSigmoid HardSwish LeakyRelu LogSoftmax Mish PRelu Relu Selu Sigmoid Softmax Softplus Softsign Tanh
    ThresholdedRelu BatchNormalization Einsum Gemm LayerNormalization MatMul
    ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare TopK
    Cast Concat Constant Expand Flatten Gather GatherElements GatherND Range Reshape ScatterElements ScatterND Shape
    Size Slice Split Squeeze Transpose Trilu Unsqueeze
    """.split()
)
"""Operators of networks of dense layers: arithmetic, comparisons, activations, layers, reductions, shapes.

Not among them: loops and branches (`Loop`, `Scan`, `If`), random numbers, sequences, strings, images and sound, and
whatever exists to make large tensors from small ones (`ConstantOfShape`, `Tile`, `Pad`, `Resize`, `OneHot`,
`NonZero`). `Expand` and `Range` are, since torch writes them.
"""
BY_SHAPE = {"Expand": 1, "Range": 1}
"""Operators whose output is as large as the values of an input say, and the place of that input."""
_AGAIN = "export the policy again"


def check_graph(file: str, data: bytes, network: Network) -> None:
    """Refuse a model that a policy has no need of, or that is not what `policy.json` says.

    Raises:
        PolicyError: with one sentence that names the file, what is wrong and how to mend it.
    """
    try:
        import onnx
    except ImportError:
        raise PolicyError(f"an exported policy needs onnx, which is not installed: {install_command('onnx')}") from None
    try:
        scan(data)
        try:
            model = onnx.load_model_from_string(data)
        except Exception as error:  # a class of protobuf, of several modules
            raise Refused(f"is no valid ONNX file ({error}): download it or {_AGAIN}") from None
        _check_model(model, network)
        _check_ends(model.graph, network)
    except Refused as error:
        raise PolicyError(f"{file} {error}") from None


def _check_model(model: Any, network: Network) -> None:
    domains = [o.domain for o in model.opset_import if o.domain not in ("", "ai.onnx")]
    if domains:
        raise Refused(f"uses operators of the domain {domains[0][:80]!r}: export it with standard ONNX operators only")
    versions = [o.version for o in model.opset_import]
    if len(versions) != 1 or versions[0] not in OPSETS:
        said = ", ".join(map(str, versions[:3])) or "none"
        raise Refused(f"has opset {said}: export it with one of {OPSETS[0]} to {OPSETS[-1]}, such as 18 or 20")
    if versions[0] != network.opset:
        raise Refused(f"has opset {versions[0]} and policy.json says {network.opset}: {_AGAIN}")
    if model.ir_version < OLDEST_IR:
        raise Refused(f"has IR version {model.ir_version}, and {OLDEST_IR} is the oldest that is read: {_AGAIN}")
    for part, what in (("functions", "functions of its own"), ("training_info", "training information")):
        if len(getattr(model, part)):
            raise Refused(f"has {what}: export it with standard ONNX operators only")
    if getattr(model, "configuration", None) or any(p.key == "ort_config" for p in model.metadata_props):
        raise Refused(f"carries settings for the runtime: {_AGAIN}")
    graph = model.graph
    if len(graph.node) > MOST_NODES:
        raise Refused(f"has {len(graph.node):,} nodes, and at most {MOST_NODES:,} are run: export a smaller network")
    if len(graph.sparse_initializer):
        raise Refused("has sparse initializers, of which a few bytes become any size: store the weights dense")
    _check_weights(graph.initializer)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for place, node in enumerate(graph.node):
        _check_node(f"node {place} ({node.op_type[:80]})", node, constants)


def _check_weights(tensors: Iterable[Any]) -> None:
    total = sum(_checked_bytes(tensor) for tensor in tensors)
    if total > LARGEST_WEIGHTS:
        raise Refused(
            f"holds {total:,} bytes of weights, and at most {LARGEST_WEIGHTS:,} are read: export a smaller one"
        )


def _checked_bytes(tensor: Any) -> int:
    """Bytes that the tensor takes, if it has as many values as its shape says."""
    from onnx import helper

    name = tensor.name[:80]
    dtype = _dtype(tensor.data_type)
    if dtype is None:
        raise Refused(f"has the tensor {name!r} of a type that policies do not use: export it in float32")
    if any(size < 0 for size in tensor.dims) or len(tensor.dims) > 8:
        raise Refused(f"has the tensor {name!r} of an impossible shape: {_AGAIN}")
    count: int = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        stored = len(tensor.raw_data) // ITEM_BYTES[dtype]
    else:
        stored = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type)))
    if stored != count or len(tensor.raw_data) % ITEM_BYTES[dtype]:
        raise Refused(f"has the tensor {name!r} whose shape says {count:,} values, and {stored:,} are stored: {_AGAIN}")
    return count * ITEM_BYTES[dtype]


def _dtype(number: int) -> str | None:
    """The name of an ONNX type, if policies may use it. Not by numpy: older onnx has float32 for 8 bits too."""
    import onnx

    try:
        name: str = onnx.TensorProto.DataType.Name(number).lower()
    except ValueError:
        return None
    name = {"float": "float32", "double": "float64"}.get(name, name)
    return name if name in ITEM_BYTES else None


def _check_node(place: str, node: Any, constants: dict[str, Any]) -> None:
    if node.domain not in ("", "ai.onnx"):
        raise Refused(f"uses operators of the domain {node.domain[:80]!r}: export it with standard operators only")
    if node.op_type not in ALLOWED:
        raise Refused(f"uses the operator {node.op_type[:80]!r}, which policies may not: write the network without it")
    if getattr(node, "overload", "") or getattr(node, "device_configurations", None):
        raise Refused(f"has settings for the runtime at {place}: {_AGAIN}")
    for attribute in node.attribute:
        _check_attribute(place, attribute)
        if node.op_type == "Constant" and attribute.HasField("t"):
            for output in node.output:
                constants[output] = attribute.t
        if node.op_type == "Cast" and attribute.name == "to" and _dtype(attribute.i) is None:
            raise Refused(f"casts to a type that policies do not use at {place}: write the network without it")
    shape_input = BY_SHAPE.get(node.op_type)
    if shape_input is not None:
        given = [constants.get(name) for name in node.input]
        _check_size(place, given[shape_input] if shape_input < len(given) else None)


def _check_attribute(place: str, attribute: Any) -> None:
    if attribute.HasField("g") or len(attribute.graphs):
        raise Refused(f"has a graph inside {place}: write the network without loops and branches")
    odd = attribute.HasField("sparse_tensor") or len(attribute.sparse_tensors) or len(attribute.type_protos)
    if odd or attribute.HasField("tp") or attribute.ref_attr_name:
        raise Refused(
            f"has the attribute {attribute.name[:80]!r} of a kind that policies do not use at {place}: {_AGAIN}"
        )
    _check_weights([*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])])


def _check_size(place: str, tensor: Any) -> None:
    """A constant that says how large an output becomes."""
    if tensor is None or _dtype(tensor.data_type) != "int64":
        return
    import onnx

    size = math.prod(max(1, abs(value)) for value in onnx.numpy_helper.to_array(tensor).ravel().tolist()[:16])
    if size > MOST_ELEMENTS:
        raise Refused(f"makes a tensor of {size:,} elements at {place}: a policy needs no such size, {_AGAIN}")


def _check_ends(graph: Any, network: Network) -> None:
    """Inputs and outputs as `policy.json` has them: names, types, axes."""
    weights = {tensor.name for tensor in graph.initializer}
    for kind, values, described in (("input", graph.input, network.inputs), ("output", graph.output, network.outputs)):
        there, said = {value.name: value for value in values}, {tensor.name: tensor for tensor in described}
        if len(there) < len(values) or set(there) != set(said):
            raise Refused(
                f"has the {kind}s {_listed(there)} and policy.json describes {_listed(said)}: one of them is of "
                f"another export; {_AGAIN}"
            )
        for name, tensor in said.items():
            if kind == "input" and name in weights:
                raise Refused(f"has a default value for the input {name!r}, so that it need not be given: {_AGAIN}")
            _check_value(kind, there[name], tensor)


def _check_value(kind: str, value: Any, tensor: Tensor) -> None:
    if value.type.WhichOneof("value") != "tensor_type" or not value.type.tensor_type.HasField("shape"):
        raise Refused(f"has the {kind} {tensor.name!r}, which is no tensor of known axes: {_AGAIN}")
    there = value.type.tensor_type
    dtype = _dtype(there.elem_type)
    if dtype != tensor.dtype:
        raise Refused(f"has the {kind} {tensor.name!r} of type {dtype} and policy.json says {tensor.dtype}: {_AGAIN}")
    axes = [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in there.shape.dim]
    if axes != tensor.shape:
        raise Refused(
            f"has the {kind} {tensor.name!r} of axes {_axes(axes)} and policy.json says {_axes(tensor.shape)}: {_AGAIN}"
        )


def _axes(axes: list[Any]) -> str:
    return f"[{', '.join(str(axis)[:40] for axis in axes[:8])}]"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name[:64] for name in sorted(names)[:32]) or "none"
