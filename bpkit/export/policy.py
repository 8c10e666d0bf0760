"""The policy `onnx`: the decisions of an exported policy, made by onnxruntime. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

import bpkit
from bpkit.export.core import DECIDES, TREE, Method
from bpkit.export.curves import CostCurves, Curves
from bpkit.installation.distribution import install_command, requirement
from bpkit.policy import Policy, PolicyConfig, PolicyError, State
from bpkit.types import OF_THE_DISTRIBUTION, ON_THE_HOST, Context, CostModel, DecoderSpec, Draft, Feature, Plan, Step

if TYPE_CHECKING:
    from torch import Tensor

    from bpkit.export.inputs import JointInputs
    from bpkit.export.load import Loaded
    from bpkit.export.schema import ExportedPolicy

SHIPPED = tuple(Path(bpkit.__file__).parents[above] / "exported" for above in (0, 1))
"""Where exported policies of the shipped pair lie: in an installed distribution, and in a checkout."""


def folder_of(path: str) -> Path:
    """The folder that a path names, or the shipped one of that name if there is no such folder here.

    Raises:
        PolicyError: a bare name is neither; the message lists those that ship.
    """
    folder = Path(path).expanduser()
    if folder.exists() or folder.name != path:
        return folder
    shipped = {found.parent.name: found.parent for root in SHIPPED for found in sorted(root.glob("*/policy.json"))}
    if path not in shipped:
        raise PolicyError(
            f"there is no folder {path!r}, and no exported policy of that name ships ({', '.join(shipped) or 'none'}): "
            "name a folder that `bpkit export` wrote"
        )
    return shipped[path]


class OnnxConfig(PolicyConfig):
    """Options of `onnx`."""

    path: str | None = Field(
        default=None, description="folder that `bpkit export` wrote, or the name of one that ships, as in onnx:forecast"
    )
    provider: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description=f"where it runs; cuda needs {requirement('gpu')}, and is never exchanged for the CPU silently",
    )
    allow_other_models: bool = Field(
        default=False, description="run it for models of other names than those that it was trained for"
    )


class Onnx(Policy):
    """Asks the networks of an exported policy, each for its own decision, and keeps what they keep of a request.

    The files are checked before they are run, and rows that came with them are tried once in a process; see
    `bpkit.export.load`. A score that is not finite is a fault of the policy: the runtime drafts at the trained size.

    Args:
        loaded: sessions that were opened already, with or without a folder.
    """

    Config: ClassVar[type[PolicyConfig]] = OnnxConfig
    wants = frozenset()
    config: OnnxConfig

    def __init__(self, config: PolicyConfig | None = None, *, loaded: Loaded | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.loaded = loaded or self._load()
        self.wants = frozenset(Feature(name) for name in self.loaded.description.features)  # type: ignore[misc]
        self.joint = bool(self._shared())  # type: ignore[misc]

    def _load(self) -> Loaded:
        if self.config.path is None:
            raise PolicyError("policy 'onnx' needs the folder of an exported policy, as in onnx:exported/forecast")
        try:
            from bpkit.export.load import load_exported
        except ModuleNotFoundError as error:
            raise PolicyError(f"policy 'onnx' needs {error.name}: {install_command('onnx')}") from None
        return load_exported(folder_of(self.config.path), provider=self.config.provider)

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        from bpkit.export.inputs import Inputs

        description = self.loaded.description
        check_decoder(description, decoder, allow_other_models=self.config.allow_other_models)
        curves = self._curves(cost)
        self.of_all, self.branches = self._joint_inputs(decoder, cost), decoder.branches
        self.inputs = {
            network.method: Inputs([tensor.name for tensor in network.inputs], curves, self.of_all)
            for network in description.networks.values()
        }
        self.shared = self._shared()

    def predict(self, features: Mapping[Feature, Tensor]) -> dict[str, Tensor]:
        """The vectors themselves, so that networks on the host get them without a read of their own."""
        if self.config.provider != "cpu":
            return {}
        return {str(name): value for name, value in features.items() if name not in ON_THE_HOST and not value.is_cpu}

    def begin(self, context: Context) -> State:
        made = self._ask("begin", context, {}) if "begin" in self.inputs else {}
        waiting = self.of_all.begin(context) if self.of_all is not None else {}
        return {**self._kept(context.batch_size), **waiting, **made}

    def select(self, state: State, context: Context) -> Tensor | Plan:
        drafts = self.loaded.description.drafts
        if drafts is not None:
            return context.full(drafts)
        if "select" in self.inputs:
            made = self._ask("select", context, state)
            block_size: Tensor = made.pop(DECIDES["select"])
            shape = [made.pop(name) for name in TREE if name in made]
            state.update(made)
            return Plan(block_size, context.full(0), *shape) if shape and self.branches > 1 else block_size
        chosen: Tensor = state[DECIDES["begin"]]
        return chosen

    def extend(self, state: State, draft: Draft) -> Tensor:
        if "extend" not in self.inputs:
            return super().extend(state, draft)
        go_on: Tensor = self._ask("extend", draft, state)["go_on"]
        return go_on

    def truncate(self, state: State, draft: Draft) -> Tensor:
        if "truncate" not in self.inputs:
            return draft.draft_length
        made = self._ask("truncate", draft, state)
        verify_length: Tensor = made.pop(DECIDES["truncate"])
        state.update(made)
        return verify_length

    def observe(self, state: State, step: Step) -> None:
        if "observe" in self.inputs:
            state.update(self._ask("observe", step, state))
        if self.of_all is not None:
            self.of_all.observe(state, step)

    def _ask(self, method: Method, source: Context | Draft | Step, state: State) -> State:
        """The decision, and what is kept of the request; what is kept of all of them is kept here."""
        from bpkit.decode.host import to_host  # here, so that options can be listed without torch

        made = self.loaded.sessions[method].run_torch(self.inputs[method](source, {**state, **self.shared}))
        outputs = dict(zip(made, to_host(list(made.values())), strict=True))
        wrong = [name for name, value in outputs.items() if value.is_floating_point() and not value.isfinite().all()]
        if wrong:
            raise PolicyError(f"{self.config.path} gave values that are not finite ({', '.join(wrong)})")
        kept = {name.removeprefix("next_"): value for name, value in outputs.items()}
        self.shared.update({name: kept.pop(name) for name in self.shared if name in kept})
        wanted = {DECIDES.get(method), *TREE, *self.loaded.description.state}
        return {name: value for name, value in kept.items() if name in wanted}

    def _kept(self, rows: int) -> State:
        """What will be kept of each request after `begin`, as zeros: those that begin and those that run have the same
        state.
        """
        import torch

        description, state = self.loaded.description, State()
        for network in description.networks.values():
            for output in network.outputs if network.method != "begin" else ():
                name = output.name.removeprefix("next_")
                if name in description.state and name not in self.shared:
                    axes = [axis for axis in output.shape if isinstance(axis, int)]  # all but the batch
                    state[name] = torch.zeros(rows, *axes, dtype=getattr(torch, output.dtype))
        return state

    def _shared(self) -> State:
        """What is kept of all requests together, as zeros."""
        from bpkit.export.schema import shared_state

        shared = shared_state(self.loaded.description)
        if not shared:
            return {}
        import torch

        return {
            name: torch.zeros([*map(int, each.shape)], dtype=getattr(torch, each.dtype))
            for name, each in shared.items()
        }

    def _joint_inputs(self, decoder: DecoderSpec, cost: CostModel | None) -> JointInputs | None:
        from bpkit.export.inputs import JointInputs

        description = self.loaded.description
        if description.slope is None:
            return None
        sizes = [size for size in description.block_sizes if size > 1]
        features = bool(self.wants & OF_THE_DISTRIBUTION)
        return JointInputs(cost, sizes, decoder.work, features=features, slope=description.slope)

    def _curves(self, cost: CostModel | None) -> Any:
        description = self.loaded.description
        default = description.curves
        if cost is None or default is None:
            curves = Curves([], []) if default is None else Curves(**default.model_dump())
            return lambda context_length: curves
        sizes = [size for size in description.block_sizes if size > 1]
        return CostCurves(cost, sizes, longest_draft=len(default.draft) or None)


def check_decoder(description: ExportedPolicy, spec: DecoderSpec, allow_other_models: bool = False) -> None:
    """Refuse a decoder that the policy was not trained for.

    Args:
        allow_other_models: take a target or drafter of another name, as long as their sizes agree.

    Raises:
        PolicyError: with one sentence that says what differs.
    """
    who = f"the exported policy {description.name!r}"
    different = description.decoder.differences(spec)
    if different:
        raise PolicyError(
            f"{who} was made for another decoder ({'; '.join(different)}): export one that was trained for this one"
        )
    largest = max(description.block_sizes, default=1)
    if spec.max_block_size < largest:
        raise PolicyError(
            f"{who} chooses block sizes up to {largest}, and this decoder stops at {spec.max_block_size}: raise its "
            f"max_block_size to {largest}"
        )
    if spec.branches < description.branches:
        raise PolicyError(
            f"{who} drafts trees of up to {description.branches} branches, and drafts of this decoder have "
            f"{spec.branches}: ask for more, as in block-diffusion:branches={description.branches}"
        )
    names = description.decoder.other_names(spec)
    if names and not allow_other_models:
        raise PolicyError(
            f"{who} was made for models of other names ({'; '.join(names)}): if they are the same models, say so with "
            "allow_other_models=true"
        )
