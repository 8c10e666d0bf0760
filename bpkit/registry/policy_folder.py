"""The folder of a trained policy: `policy.json` says what it is, `weights.safetensors` holds its networks.

Nothing is unpickled, and nothing that the folder names is imported or run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from bpkit.files import faults, json_text, utc, write_at_once
from bpkit.policy import PolicyError
from bpkit.types import DecoderSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

POLICY, WEIGHTS = "policy.json", "weights.safetensors"
SHIPPED = Path(__file__).parents[1] / "assets" / "policies"


class TrainedFor(BaseModel):
    """The decoder that a policy was trained for; as in `bpkit.types.DecoderSpec`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    drafter: str
    drafter_kind: str
    trained_block_size: int
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, spec: DecoderSpec) -> TrainedFor:
        return cls(**{name: getattr(spec, name) for name in cls.model_fields})

    def differences(self, spec: DecoderSpec) -> list[str]:
        """What makes a policy useless for this decoder, as `name: trained for this, here that`."""
        return self._differences(spec, ("drafter_kind", "trained_block_size", "hidden_size", "vocab_size"))

    def other_names(self, spec: DecoderSpec) -> list[str]:
        """Names that differ, which need not mean that the models do: one pair may lie in different places."""
        return self._differences(spec, ("target", "drafter"))

    def _differences(self, spec: DecoderSpec, names: tuple[str, ...]) -> list[str]:
        pairs = [(name.replace("_", " "), getattr(self, name), getattr(spec, name)) for name in names]
        return [f"{name} {ours} there, {theirs} here" for name, ours, theirs in pairs if ours != theirs]


class PolicyFile(BaseModel):
    """What `policy.json` says.

    Attributes:
        policy: name that the policy is registered under.
        options: all of its options but `weights`, as they were when it was saved.
        facts: what its networks are built from, and what training found beside their weights.
        weights_sha256: of `weights.safetensors`, so that the two cannot be of different runs.
        created: UTC.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    policy: str
    options: dict[str, JsonValue] = {}
    facts: dict[str, JsonValue]
    trained_for: TrainedFor
    weights_sha256: str
    created: str


def is_policy_folder(path: str | Path) -> bool:
    """Whether there is a folder with a trained policy in it."""
    return (Path(path).expanduser() / POLICY).is_file()


def shipped_folders(policy: str) -> list[Path]:
    """What ships with bpkit for a policy: folder `NAME`, and any `NAME-...`, for other drafters."""
    folders = [SHIPPED / policy, *sorted(SHIPPED.glob(f"{policy}-*"))]
    return [one for one in folders if is_policy_folder(one) and read_policy_file(one).policy == policy]


def read_policy_file(folder: Path) -> PolicyFile:
    """Read `policy.json`. Raises PolicyError with a sentence that says what is wrong with it."""
    path = folder / POLICY
    if not folder.is_dir():
        raise PolicyError(
            f"there is no folder {str(folder)!r}: name one that `bpkit train NAME TRACE --out FOLDER` made"
        )
    if not path.is_file():
        raise PolicyError(
            f"{folder} holds no trained policy (no {POLICY} in it): name a folder that `bpkit train NAME TRACE --out "
            "FOLDER` made, and if training was interrupted, run it again"
        )
    try:
        return PolicyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        raise PolicyError(f"{path} is no description of a policy that this version reads ({faults(error)})") from None


def read_weights(folder: Path, file: PolicyFile, networks: Mapping[str, nn.Module]) -> None:
    """Fill `networks` from `weights.safetensors`.

    Raises:
        PolicyError: it is missing or damaged, of another run than `policy.json`, or does not fit the networks.
    """
    import safetensors.torch

    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PolicyError(f"{path} cannot be read ({error.strerror or error}): the policy has no weights") from None
    if hashlib.sha256(data).hexdigest() != file.weights_sha256:
        raise PolicyError(
            f"{path} is damaged, or of another run than {POLICY} beside it; copy or train the folder again"
        )
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # what safetensors raises is no public class in every version
        raise PolicyError(f"{path} is no safetensors file ({error})") from None
    _fill(networks, tensors, path)


def _fill(networks: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], path: Path) -> None:
    known = {f"{name}.{key}" for name, network in networks.items() for key in network.state_dict()}
    if known != set(tensors):
        said = [f"lacks {key}" for key in sorted(known - set(tensors))]
        said += [f"has {key}, which nothing takes" for key in sorted(set(tensors) - known)]
        raise PolicyError(f"{path} does not fit the networks of the policy: it {'; '.join(said[:4])}")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise PolicyError(f"{path}: {key} holds NaN or infinite values; train the policy again")
    for name, network in networks.items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        try:
            network.load_state_dict(own)
        except RuntimeError as error:
            raise PolicyError(
                f"{path} does not fit network {name!r} of the policy; options that its networks are built by cannot be "
                f"changed after training ({' '.join(str(error).split())})"
            ) from None


def write_policy_folder(
    folder: Path,
    *,
    policy: str,
    options: dict[str, Any],
    facts: dict[str, Any],
    trained_for: TrainedFor,
    networks: Mapping[str, nn.Module],
) -> None:
    """Write both files, each at once. A reader between the two is told that they do not belong together.

    Raises:
        PolicyError: facts or options are no plain JSON values.
    """
    import safetensors.torch

    named = {
        f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()
    }
    # Copies: safetensors refuses tensors that share memory.
    data = safetensors.torch.save({key: value.detach().cpu().contiguous().clone() for key, value in named.items()})
    digest = hashlib.sha256(data).hexdigest()
    try:
        file = PolicyFile(
            policy=policy, options=options, facts=facts, trained_for=trained_for, weights_sha256=digest, created=utc()
        )
        text = json_text(file)
    except ValueError as error:
        raise PolicyError(f"policy {policy!r}: facts and options must be plain, finite JSON values ({error})") from None
    folder.mkdir(parents=True, exist_ok=True)
    write_at_once(folder / WEIGHTS, data)
    write_at_once(folder / POLICY, text)
