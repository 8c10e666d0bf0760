"""What `policy.json` must say so that a runtime can ask its networks: outputs that decide, inputs that are known."""

from __future__ import annotations

from bpkit.export.core import DECIDES, FEATURES, KNOWN
from bpkit.export.schema import ExportedPolicy, Network
from bpkit.policy import PolicyError

LARGEST_BLOCK = 1 << 12


def check_contract(where: str, description: ExportedPolicy) -> None:
    """Refuse a description that contradicts itself. Raises PolicyError with one sentence."""
    try:
        _check_sizes(description)
        for file, network in description.networks.items():
            _check_names(file, network)
            _check_decision(file, network)
            _check_sources(file, network, description)
    except _Refused as error:
        raise PolicyError(f"{where} {error}: export the policy again") from None


class _Refused(Exception):
    """What is wrong."""


def _check_sizes(description: ExportedPolicy) -> None:
    sizes = description.block_sizes
    if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] > LARGEST_BLOCK:
        raise _Refused(f"has block_sizes that do not ascend from 1 or more to at most {LARGEST_BLOCK}")


def _check_names(file: str, network: Network) -> None:
    names = [tensor.name for tensor in (*network.inputs, *network.outputs)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _Refused(f"says of {file} that it has {twice[0]!r} twice")
    for kind, tensors, rows in (
        ("input", network.inputs, network.golden.inputs),
        ("output", network.outputs, network.golden.outputs),
    ):
        if {tensor.name for tensor in tensors} != set(rows):
            raise _Refused(f"has golden rows of {file} for other {kind}s than it describes")


def _check_decision(file: str, network: Network) -> None:
    outputs = {tensor.name: tensor for tensor in network.outputs}
    decides = DECIDES[network.method]
    for name, dtype in ((decides, "bool" if network.method == "extend" else "int64"), (network.margin, "float32")):
        output = outputs.get(name)
        if output is None or output.dtype != dtype or output.shape != ["batch"]:
            raise _Refused(f"says of {file} ({network.method}) that it has no output {name!r}, {dtype} [batch]")


def _check_sources(file: str, network: Network, description: ExportedPolicy) -> None:
    state = set(description.state)
    for tensor in network.inputs:
        if tensor.name not in KNOWN | state:
            raise _Refused(f"says of {file} that it takes {tensor.name!r}, which is neither known nor state")
        if tensor.name in FEATURES and tensor.name not in description.features:
            raise _Refused(f"says of {file} that it takes {tensor.name!r}, which is not among its features")
    unknown = sorted(set(description.features) - FEATURES)
    if unknown:
        raise _Refused(f"asks for the feature {unknown[0]!r}, which this version does not know")
