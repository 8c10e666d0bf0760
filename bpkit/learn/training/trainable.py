"""Which policies can be trained, and what trains them. Listing them imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from bpkit.learn.config import TrainedConfig
from bpkit.names import did_you_mean
from bpkit.policy import PolicyError, validated
from bpkit.registry.class_file import names_file
from bpkit.registry.discovery import Entry, registry
from bpkit.registry.resolve import class_and_options, name_of, registered_by_another

if TYPE_CHECKING:
    from bpkit.learn.trained import TrainedPolicy
    from bpkit.learn.training.policy_module import PolicyModule
    from bpkit.types import CostModel, DecoderSpec


def trainable_entries() -> dict[str, Entry]:
    """The registered policies whose options say that they have weights, by name."""
    found = {}
    for name, entry in sorted(registry().policies.items()):
        try:
            config = entry.load_config()
        except PolicyError:
            continue
        if config is not None and issubclass(config, TrainedConfig):
            found[name] = entry
    return found


def refuse_untrainable(name: str, *, beside: Sequence[str] = ()) -> None:
    """Raise PolicyError unless a policy of that name has weights, or names a file. `beside` can be trained as well."""
    trainable = trainable_entries()
    if names_file(name) or name in trainable:
        return
    choices = [*beside, *trainable]
    listed = f"{did_you_mean(name, choices)} Trainable: {', '.join(choices) or 'none'}."
    known = registry().policies
    if name in known:
        others = ", ".join(other for other in sorted(known) if other not in trainable)
        raise PolicyError(f"policy {name!r} has no weights to train.{listed} Without weights: {others}")
    failed = "".join(f" Plug-in {n!r} could not be loaded ({why})." for n, why in registry().failures.items())
    raise PolicyError(f"there is no policy {name!r} to train.{listed}{failed}")


def make_module(
    policy: str | Mapping[str, Any], spec: DecoderSpec, cost: CostModel, settings: Mapping[str, Any]
) -> PolicyModule:
    """The Lightning module that trains a policy.

    Args:
        policy: name and options, as `bpkit.resolve_policy` takes them.
        settings: training options of the module and options of the policy, by name.

    Raises:
        PolicyError: the policy cannot be trained, or one of the settings is unknown.
    """
    made, options, name = class_and_options(policy)
    kind = _checked(made, name)
    module = load_trainer(kind)
    training = {key: value for key, value in settings.items() if key in module.Options.model_fields}
    of_policy = {key: value for key, value in settings.items() if key not in training}
    for key in of_policy:
        if key not in kind.Config.model_fields or key == "weights":
            hint = did_you_mean(key, [*module.Options.model_fields, *kind.Config.model_fields])
            raise PolicyError(
                f"policy {kind.name!r} has no setting {key!r}.{hint} "
                f"Of the training: {_listed(module.Options)}. Of the policy: {_listed(kind.Config)}"
            )
    options = {**options, **of_policy}
    if "weights" in options:
        raise PolicyError(f"policy {name!r}: training begins with new weights; leave out option 'weights'")
    config = cast("TrainedConfig", validated(kind.Config, options, owner=name))
    chosen = validated(module.Options, training, owner=f"{name} (training)")
    return module(kind.untrained(config), spec, cost, chosen)


def load_trainer(kind: type[TrainedPolicy]) -> type[PolicyModule]:
    """Import `kind.trainer`; without a module name it is a class beside the policy. Raises PolicyError."""
    from bpkit.learn.training.policy_module import PolicyModule

    where, _, attribute = kind.trainer.partition(":")
    try:
        found = getattr(importlib.import_module(where or kind.__module__), attribute)
    except Exception as error:
        raise PolicyError(
            f"policy {kind.name!r} names {kind.trainer!r} as its trainer, which cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, PolicyModule)):
        raise PolicyError(f"policy {kind.name!r}: its trainer {kind.trainer!r} is no PolicyModule")
    return found


def _checked(made: Any, name: str) -> type[TrainedPolicy]:
    from bpkit.learn.trained import TrainedPolicy

    if not (isinstance(made, type) and issubclass(made, TrainedPolicy)):
        refuse_untrainable(name)
        raise PolicyError(
            f"policy {name!r} has no weights, so there is nothing to train: derive it from "
            "bpkit.learn.LearnedPolicy, which needs a network only, or from "
            "bpkit.learn.TrainedPolicy with a trainer of its own"
        )
    if not getattr(made, "trainer", ""):
        raise PolicyError(f"policy {name!r} does not say what trains it: add a class attribute `trainer`")
    other = registered_by_another(made)
    if other is not None:
        raise PolicyError(
            f"policy {name!r} is called {name_of(made)!r}, as one that distribution {other!r} registers, and its "
            "folder would be taken for that one's: give it a class attribute `name` of its own"
        )
    return made


def _listed(config: Any) -> str:
    shown = (f"{name}={field.default!r}" for name, field in config.model_fields.items() if name != "weights")
    return ", ".join(shown) or "none"
