"""Policies with trained weights: where these come from, what they fit, and how they are saved. Imports no torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from bpkit.learn.config import TrainedConfig
from bpkit.policy import Policy, PolicyConfig, PolicyError, validated
from bpkit.registry.policy_folder import (
    POLICY,
    WEIGHTS,
    PolicyFile,
    TrainedFor,
    read_policy_file,
    read_weights,
    shipped_folders,
    write_policy_folder,
)
from bpkit.registry.resolve import class_of_folder, registered_by_another, spec_of, with_weights
from bpkit.types import CostModel, DecoderSpec

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TrainedConfig", "TrainedElsewhereWarning", "TrainedPolicy"]

_DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")
_FILES = [POLICY, WEIGHTS, "prompts.json", "provenance.json", "evaluation.json", "README.md"]


class TrainedElsewhereWarning(UserWarning):
    """A policy was trained for models of other names: the text is not affected, the speed may be."""


@dataclass(frozen=True)
class Trained:
    """What training leaves: facts, networks (float32, on the CPU, in eval mode) and the decoder they are for."""

    facts: dict[str, Any]
    networks: dict[str, nn.Module]
    trained_for: TrainedFor


class TrainedPolicy(
    Policy,
    ModelHubMixin,
    library_name="bpkit",
    tags=["speculative-decoding"],
    model_card_template="""---
{{ card_data }}
---

# {{ policy }}: a block-size policy for speculative decoding

Trained with `bpkit train {{ policy }}` for target `{{ target }}` and drafter `{{ drafter }}` ({{ drafter_kind }}).
Use it as `--policy FOLDER`, or as `TrainedPolicy.from_pretrained("name/of/this/repository")`.
""",
):
    """Base of policies with weights.

    Subclasses say `name`, `Config`, `trainer` and `build`. Where they define `bind`, they call `super().bind(decoder,
    cost)` first; from then on `self.facts` and `self.networks` are there. Weights come from option `weights`, or from
    the folder that ships with bpkit for this pair, which `bind` chooses if there are several. Options that the user
    leaves open are those stored in the folder.

    `bind` moves the networks to the decoder's device, where features are. A subclass runs them in `predict`, so that
    what they give comes to the host with the tokens of the step. They take and give float32, so hand them
    `features[...].float()`.

    Class attributes:
        name: that the policy is registered under.
        trainer: `"module:Class"` of its `bpkit.learn.training.policy_module.PolicyModule`.

    Attributes:
        facts: plain JSON values, such as sizes of networks and statistics of their inputs. A copy.
        networks: what `build` made, with trained weights; eval mode, no gradients. Empty before `bind`.
    """

    Config: ClassVar[type[PolicyConfig]] = TrainedConfig
    name: ClassVar[str]
    trainer: ClassVar[str]
    config: TrainedConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not issubclass(cls.Config, TrainedConfig):
            raise PolicyError(
                f"{cls.__name__}.Config must derive from bpkit.learn.TrainedConfig, which has the option 'weights'"
            )

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._hub_mixin_config = None  # the mixin would write a config.json of its own
        self.facts: dict[str, Any] = {}
        self.networks: dict[str, nn.Module] = {}
        self._trained: Trained | None = None
        self._shipped = None if self.config.weights is not None else next(iter(self._shipped_folders()), None)
        folder = self.folder
        if folder is not None:
            self.config = self._with_stored_options(folder)

    def build(self, facts: dict[str, Any]) -> dict[str, nn.Module]:
        """The networks by name, with any weights, from plain JSON facts. Raises KeyError or ValueError for bad ones."""
        raise NotImplementedError(f"{type(self).__name__} must define build(self, facts)")

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        """Get facts and networks.

        Raises:
            PolicyError: there are no weights, they are damaged, or they were trained for another decoder.
        """
        if self._shipped is not None:
            self._choose(decoder)
        if self._trained is None:
            self._trained = self._load()
        self._check(self._trained.trained_for, decoder)
        # Copies, because subclasses may replace some: each bind begins with what was trained.
        self.facts = copy.deepcopy(self._trained.facts)
        self.networks = {name: network.to(decoder.device) for name, network in self._trained.networks.items()}

    @property
    def folder(self) -> Path | None:
        """Where the weights come from: option `weights`, else what ships for this policy, else None."""
        return Path(self.config.weights).expanduser() if self.config.weights is not None else self._shipped

    # For training

    @classmethod
    def untrained(cls, config: TrainedConfig) -> Self:
        """A policy with these options as they are, none from a folder, that has no weights yet."""
        policy = cls(config)
        policy.config = config
        return policy

    @classmethod
    def trained(
        cls, config: TrainedConfig, facts: dict[str, Any], networks: Mapping[str, nn.Module], spec: DecoderSpec
    ) -> Self:
        """A policy with copies of these networks, still to be bound."""
        policy = cls.untrained(config)
        copies = {name: copy.deepcopy(network).cpu() for name, network in networks.items()}
        policy._trained = Trained(copy.deepcopy(facts), _ready(copies), TrainedFor.of(spec))
        policy._shipped = None
        return policy

    # Folders and the Hub

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """A policy from a folder, or from the Hub if there is no such folder.

        Args:
            pretrained_model_name_or_path: folder, or `user/name` on the Hub. A folder needs no network.
            options: of the policy, on top of those stored; and `revision`, `token`, `cache_dir`, `force_download` and
                `local_files_only` of the download.

        Raises:
            PolicyError: there is no policy, or one of another class.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name).expanduser()
        if not (folder.is_dir() or name.startswith((".", "/", "~"))):
            download = {argument: options.pop(argument) for argument in _DOWNLOAD if argument in options}
            try:
                folder = Path(snapshot_download(name, allow_patterns=_FILES, **download))
            except (HfHubHTTPError, OSError, ValueError) as error:
                raise PolicyError(
                    f"there is no folder {name!r}, and the Hub gave no policy of that name: {error}"
                ) from error
        stored = read_policy_file(folder).policy
        made = cast("type[Self]", class_of_folder(folder)) if cls is TrainedPolicy else cls
        if cls is not TrainedPolicy and cls.name != stored:
            raise PolicyError(f"{folder} holds a policy {stored!r}, not {cls.name!r}")
        return made(validated(made.Config, {**options, "weights": str(folder)}, owner=stored))

    def _save_pretrained(self, save_directory: Path) -> None:
        """What `save_pretrained` and `push_to_hub` write: `policy.json` and `weights.safetensors`."""
        if self._trained is None:
            self._trained = self._load()
        write_policy_folder(
            Path(save_directory),
            policy=self.name,
            options=self.config.model_dump(mode="json", exclude={"weights"}),
            facts=self._trained.facts,
            trained_for=self._trained.trained_for,
            networks=self._trained.networks,
        )

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """The README of a saved folder."""
        facts = self._trained.trained_for.model_dump() if self._trained is not None else {}
        return super().generate_model_card(*args, policy=self.name, **facts, **kwargs)

    def _choose(self, decoder: DecoderSpec) -> None:
        """Take the shipped folder that fits best: no differences, then no other names, then the first."""

        def unfit(folder: Path) -> tuple[int, int]:
            trained_for = self._file(folder).trained_for
            return len(trained_for.differences(decoder)), len(trained_for.other_names(decoder))

        best = min(self._shipped_folders(), key=unfit)
        if best != self._shipped:
            self._shipped, self._trained = best, None
            self.config = self._with_stored_options(best)

    def _load(self) -> Trained:
        import torch

        folder = self.folder
        if folder is None:
            raise PolicyError(f"policy {self.name!r} has no weights: {self._how_to_train()}")
        file = self._file(folder)
        try:
            with torch.random.fork_rng(devices=[]):  # first weights are drawn, only to be replaced
                networks = self.build(copy.deepcopy(file.facts))
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyError(
                f"{folder / POLICY}: the networks of policy {self.name!r} cannot be built from its facts "
                f"({type(error).__name__}: {error})"
            ) from error
        read_weights(folder, file, networks)
        return Trained(dict(file.facts), _ready(networks), file.trained_for)

    def _file(self, folder: Path) -> PolicyFile:
        file = read_policy_file(folder)
        if file.policy != self.name:
            raise PolicyError(f"{folder} holds a policy {file.policy!r}, not {self.name!r}")
        return file

    def _with_stored_options(self, folder: Path) -> TrainedConfig:
        """The options of the folder under those that were given; only the latter count as set."""
        config = self.config
        given = {name: getattr(config, name) for name in config.model_fields_set}
        stored = {name: value for name, value in self._file(folder).options.items() if name != "weights"}
        made = validated(type(config), {**stored, **given}, owner=f"{self.name} of {folder}")
        values = {name: getattr(made, name) for name in type(made).model_fields}
        return type(config).model_construct(_fields_set=set(given), **values)

    def _check(self, trained_for: TrainedFor, decoder: DecoderSpec) -> None:
        different = trained_for.differences(decoder)
        if different:
            raise PolicyError(
                f"policy {self.name!r}: {self._which()} was trained for another decoder ({'; '.join(different)}); "
                f"{self._how_to_train()}"
            )
        names = trained_for.other_names(decoder)
        if names:
            warnings.warn(
                f"policy {self.name!r} was trained for models of other names ({'; '.join(names)}); if they are other "
                f"models, {self._how_to_train()}",
                TrainedElsewhereWarning,
                stacklevel=3,
            )

    def _which(self) -> str:
        if self._shipped is None:
            return f"that of {self.folder}" if self.config.weights is not None else "this one"
        others = [folder.name for folder in self._shipped_folders() if folder != self._shipped]
        return f"the one that ships{f' and fits best, {self._shipped.name},' if others else ''}"

    def _how_to_train(self) -> str:
        spec = spec_of(type(self))
        use = "FOLDER" if spec == self.name else with_weights(spec, "FOLDER")
        return f"train it with `bpkit train {spec} TRACE --out FOLDER --cost COST`, and use `--policy {use}`"

    def _shipped_folders(self) -> list[Path]:
        """What ships for the policy; nothing for a stranger's class that merely has the name of a registered one."""
        found = shipped_folders(self.name)
        return found if not found or registered_by_another(type(self)) is None else []


def _ready(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Float32, eval mode, without gradients."""
    for network in networks.values():
        network.float().eval().requires_grad_(False)
    return networks
