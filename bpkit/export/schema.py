"""What `policy.json` beside an exported policy says. `docs/policy.schema.json` is made from these classes."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from bpkit.export.core import DECIDES, FEATURES, KNOWN, TREE, DType, Method
from bpkit.registry.policy_folder import TrainedFor

LARGEST_BLOCK = 1 << 12
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
FileName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*\.onnx$", max_length=64)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Model):
    """One input or output: a name, its axes, and what it means."""

    name: Name
    dtype: DType
    shape: list[Annotated[int, Field(ge=1, le=1 << 24)] | Name] = Field(
        max_length=4, description="numbers, or the names of axes that vary"
    )
    meaning: str = Field(max_length=500)


class Golden(_Model):
    """Rows to try a file with: each input and output by name, values nested as the axes are."""

    inputs: dict[Name, list[Any]]
    outputs: dict[Name, list[Any]]


class Network(_Model):
    """One ONNX file."""

    method: Method = Field(
        description="when it is asked: after prefill, before a draft, while drafting, before verify, after a step"
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    opset: int
    inputs: list[Tensor] = Field(max_length=32)
    outputs: list[Tensor] = Field(max_length=32)
    margin: Name | Literal[""] = Field(
        default="", description="the output that says how clear each row's decision was; none of observe"
    )
    tolerance: float = Field(gt=0, le=0.01, description="margins below it may be decided otherwise by another runtime")
    golden: Golden


class Agreement(_Model):
    """How a file did against torch on the rows of a validation trace."""

    rows: int
    agree: int
    within_tolerance: int = Field(description="rows that differ, with a margin below the tolerance")
    largest_difference: float = Field(description="of any float output, over all rows")
    batch_sizes: list[int] = Field(description="that the rows were run at")


class Default(_Model):
    """Cost curves of the device of training, where the runtime has none of its own: seconds."""

    steps: list[float] = Field(description="of a step without a draft, then of each block size")
    verify: list[float] = Field(description="of target passes over 1, 2, ... positions")
    draft: list[float] = Field(
        default=[],
        description="where drafts are trees, of a step without its target pass: by positions of the longest path",
    )


class ExportedPolicy(_Model):
    """An exported policy.

    Attributes:
        block_sizes: that it chooses among, ascending; 1 means no draft.
        features: that the target or the drafter must provide.
        state: values that an output of that name gives, of each request or, without a batch axis, of all.
    """

    schema_version: Literal[1] = 1
    name: Name
    policy: Name = Field(description="that bpkit knows it by")
    summary: str = Field(max_length=500)
    block_sizes: list[int]
    drafts: int | None = Field(default=None, ge=1, description="block size of every draft, where no file chooses it")
    default_block_size: int = Field(ge=1, description="to use where a score is not finite")
    decoder: TrainedFor
    fingerprints: dict[str, str] = Field(default={}, description="of the weights of target and drafter, where known")
    networks: dict[FileName, Network] = Field(min_length=1, max_length=4)
    features: list[Name]
    state: list[Name] = []
    curves: Default | None = None
    branches: int = Field(default=1, ge=1, description="candidates that a drafter must have at each position of a tree")
    slope: float | None = Field(
        default=None,
        ge=0,
        description="of joint costs: a further position of a row, in plain steps, where the runtime has no costs",
    )
    options: dict[str, JsonValue]
    validation: dict[FileName, Agreement]
    evaluation: dict[str, JsonValue] = {}
    provenance: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _contradicts_nothing(self) -> Self:
        """What a runtime needs to ask its networks: outputs that decide, inputs that are known."""
        sizes, methods = self.block_sizes, [network.method for network in self.networks.values()]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] > LARGEST_BLOCK:
            raise ValueError(f"block_sizes do not ascend from 1 or more to at most {LARGEST_BLOCK}")
        if len(set(methods)) < len(methods):
            raise ValueError("two files are for the same method")
        if not {"begin", "select"} & set(methods) and self.drafts is None:
            raise ValueError("nothing says how much to draft: no file for begin or select, and no `drafts`")
        unknown = sorted(set(self.features) - FEATURES)
        if unknown:
            raise ValueError(f"this version does not know the feature {unknown[0]!r}")
        for file, network in self.networks.items():
            _check_decision(file, network)
            for name in (tensor.name for tensor in network.inputs):
                if name not in KNOWN | set(self.state):
                    raise ValueError(f"{file} takes {name!r}, which is neither known nor state")
                if name in FEATURES and name not in self.features:
                    raise ValueError(f"{file} takes {name!r}, which is not among its features")
        return self


def shared_state(policy: ExportedPolicy) -> dict[str, Tensor]:
    """What is kept of all requests together, by name: state without a batch axis."""
    inputs = [tensor for network in policy.networks.values() for tensor in network.inputs]
    return {each.name: each for each in inputs if each.name in policy.state and each.shape[:1] != ["batch"]}


def _check_decision(file: str, network: Network) -> None:
    names = [tensor.name for tensor in (*network.inputs, *network.outputs)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{file} has {twice[0]!r} twice")
    if network.method == "observe":
        return
    outputs = {tensor.name: tensor for tensor in network.outputs}
    if network.method == "select" and outputs.keys() & TREE:
        shapes = [(outputs[name].dtype, outputs[name].shape[:1]) for name in TREE if name in outputs]
        if shapes != [("int64", ["batch"])] * len(TREE):
            raise ValueError(f"{file} (select) has no outputs {' and '.join(TREE)}, int64 [batch, nodes] both")
    decides = DECIDES[network.method]
    for name, dtype in ((decides, "bool" if network.method == "extend" else "int64"), (network.margin, "float32")):
        output = outputs.get(name)
        if output is None or output.dtype != dtype or output.shape != ["batch"]:
            raise ValueError(f"{file} ({network.method}) has no output {name!r}, {dtype} [batch]")


def json_schema() -> str:
    """The JSON Schema of `policy.json`, as in `docs/policy.schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **ExportedPolicy.model_json_schema()}
    return json.dumps(_closed(schema), indent=1)


def _closed(schema: Any) -> Any:
    """With no other keys where keys have a pattern; pydantic leaves that open."""
    if isinstance(schema, dict):
        schema = {key: _closed(value) for key, value in schema.items()}
        return schema | {"additionalProperties": False} if "patternProperties" in schema else schema
    return [_closed(value) for value in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    print(json_schema())
