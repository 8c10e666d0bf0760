"""A folder of an exported policy, loaded as if it came from a stranger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bpkit.export.check import check_graph
from bpkit.export.contract import check_contract
from bpkit.export.core import Method
from bpkit.export.golden import check_golden, compare, rows_of
from bpkit.export.read import DESCRIPTION, read_description, read_network
from bpkit.export.schema import ExportedPolicy
from bpkit.export.session import Session, open_session


@dataclass(frozen=True)
class Loaded:
    """An exported policy that passed every check.

    Attributes:
        sessions: by the method that each stands for.
    """

    folder: Path
    description: ExportedPolicy
    sessions: dict[Method, Session]


def load_exported(path: str | Path, provider: str = "cpu") -> Loaded:
    """Read a folder, check it, and open a session for each of its files, over the very bytes that were checked.

    Args:
        path: folder that `bpkit export` made. provider: `cpu` or `cuda`.

    Raises:
        PolicyError: with one sentence that names the file, says what is wrong and how to mend it.
    """
    folder = Path(path).expanduser()
    description = read_description(folder)
    check_contract(str(folder / DESCRIPTION), description)
    files = {
        str(folder / name): (read_network(folder, name, network), network)
        for name, network in description.networks.items()
    }
    for file, (data, network) in files.items():
        check_graph(file, data, network)
    check_golden(files)
    sessions = {network.method: open_session(data, provider) for data, network in files.values()}
    if provider != "cpu":
        for file, (_, network) in files.items():
            inputs, outputs = rows_of(file, network)
            compare(file, network, outputs, sessions[network.method].run(inputs))
    return Loaded(folder, description, sessions)
