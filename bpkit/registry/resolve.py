"""From what users write to classes and objects, and back: what to type for a class.

A policy or an observer is written as `name`, `name:value`, `name:key=value,...`, `./file.py:Class` or a mapping; for a
policy, the path of a trained policy's folder may stand where the name stands.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from bpkit.names import snake_case
from bpkit.policy import Policy, PolicyError, validated
from bpkit.registry import discovery
from bpkit.registry.class_file import class_of_file, names_file, split_file
from bpkit.registry.policy_folder import is_policy_folder, read_policy_file

PolicyLike = Policy | str | Mapping[str, Any]
Made = TypeVar("Made")
WEIGHTS = "weights"
"""The option that takes the folder of a trained policy."""


def resolve_policy(policy: PolicyLike) -> Policy:
    """Make a policy from an instance, a name, `name:value`, `name:key=value,...`, `./file.py:Class` or a mapping.

    Where a name stands, the path of a trained policy's folder may stand as well; options come on top of those stored.

    >>> resolve_policy("fixed:4")
    Fixed(block_size=4)
    >>> resolve_policy({"name": "fixed", "block_size": 8})
    Fixed(block_size=8)

    Raises:
        PolicyError: the name or an option is unknown; the message lists what there is.
    """
    return resolve(policy, Policy, what="policy")


def resolve(given: Made | str | Mapping[str, Any], base: type[Made], *, what: str) -> Made:
    """Make an object of class `base`, a policy or an observer, unless one is given. Raises PolicyError."""
    if isinstance(given, base):
        return given
    assert isinstance(given, (str, Mapping))
    make, options, name = class_and_options(given, base, what=what)
    config = _config_of(make, base)
    if config is not None:
        made = validated(config, options, owner=name, what=what)
        _check_constructor(make, made, what)
        result = make(made)
    else:
        result = make(**options)
    if not isinstance(result, base):
        where = "bpkit.Policy" if base is Policy else f"{base.__module__}.{base.__qualname__}"
        raise PolicyError(f"{what} {name!r} is not a {where} but a {type(result).__name__}")
    return result


def class_and_options(
    given: str | Mapping[str, Any], base: type = Policy, *, what: str = "policy"
) -> tuple[Callable[..., Any], dict[str, Any], str]:
    """What `resolve` would call, the options that it would give, and the name. Raises PolicyError."""
    spec = parse_spec(given) if isinstance(given, str) else dict(given)
    if "name" not in spec:
        raise PolicyError(f"{what} {spec}: a mapping needs a key 'name', as in {{'name': NAME, ...}}")
    name, value = str(spec.pop("name")), spec.pop("", None)
    skip = ""
    if _names_folder(name, what):
        if WEIGHTS in spec:
            raise PolicyError(f"policy {name!r} is a folder with weights; leave out option {WEIGHTS!r}")
        folder, skip = Path(name).expanduser(), WEIGHTS
        make: Callable[..., Any] = class_of_folder(folder)
        spec = {WEIGHTS: str(folder), **spec}
    elif names_file(name):
        make = class_of_file(name, base, what=what)
    else:
        make = discovery.registry().find(what, name).load()
    config = _config_of(make, base)
    if value is not None and config is not None:
        spec = {first_option(config, name, skip=skip, what=what): value, **spec}
    return make, spec, name


def class_of_folder(folder: Path) -> type[Policy]:
    """The registered class of the trained policy in a folder. Raises PolicyError."""
    name = read_policy_file(folder).policy
    entry = discovery.registry().policies.get(name)
    if entry is None:
        raise PolicyError(
            f"{folder} holds a policy {name!r}, which no installed plug-in registers: install the distribution that "
            f"has it, or name the class with `./file.py:ClassName:{folder}`"
        )
    made = entry.load()
    if not (isinstance(made, type) and issubclass(made, Policy) and WEIGHTS in made.Config.model_fields):
        raise PolicyError(f"{folder} holds weights of policy {name!r}, which takes none here")
    return made


def check_policy_name(policy: PolicyLike) -> None:
    """Raise PolicyError for a mistyped name or option of a registered policy, before anything heavy is imported."""
    if isinstance(policy, Policy):
        return
    spec = parse_spec(policy) if isinstance(policy, str) else dict(policy)
    name = str(spec.pop("name", ""))
    if not name or names_file(name) or _names_folder(name, "policy"):
        return
    config = discovery.registry().find("policy", name).load_config()
    if config is not None and "" not in spec:  # what a bare value sets, `resolve_policy` knows
        validated(config, spec, owner=name)


def _names_folder(name: str, what: str) -> bool:
    """Whether a name is the path of a trained policy's folder, there or not. Registered names come first."""
    if what != "policy" or names_file(name) or name in discovery.registry().policies:
        return False
    return "/" in name or name.startswith((".", "~")) or is_policy_folder(name)


def _config_of(make: Callable[..., Any], base: type) -> type[BaseModel] | None:
    """The options of a class of this kind; None for any other callable, which checks its own."""
    if not (isinstance(make, type) and issubclass(make, base)):
        return None
    return cast("type[BaseModel]", cast("Any", make).Config)


def _check_constructor(make: Callable[..., Any], config: BaseModel, what: str) -> None:
    try:
        inspect.signature(make).bind(config)
    except TypeError:
        name = getattr(make, "__name__", make)
        raise PolicyError(
            f"{what} {name} cannot be made: leave its __init__ out, or let it be __init__(self, config=None, "
            "**options) and call super().__init__(config, **options)"
        ) from None


def parse_spec(text: str) -> dict[str, Any]:
    """Split the command-line form of a policy or drafter into name and options.

    A bare value stands under the key `""` and sets the first option.

    >>> parse_spec("threshold:0.6,block_size=8")
    {'name': 'threshold', '': '0.6', 'block_size': '8'}
    """
    head, tail = split_file(text) if names_file(text) else text.partition(":")[::2]
    spec: dict[str, Any] = {"name": head}
    for part in filter(None, tail.split(",")):
        key, equals, value = part.partition("=")
        spec.update({key.strip(): value.strip()} if equals else {"": part.strip()})
    return spec


def each_drafter(given: Any) -> list[Any]:
    """The drafters that are named, several of which are sources of drafts for one decoder.

    Args:
        given: a list, a text with `+` between drafters whose names are registered, or one drafter.

    >>> each_drafter("block-diffusion:some/folder+ngram:max_ngram=4"), each_drafter("some/folder+1")
    (['block-diffusion:some/folder', 'ngram:max_ngram=4'], ['some/folder+1'])
    """
    if isinstance(given, (list, tuple)):
        return list(given)
    if not isinstance(given, str):
        return [given]
    names, found = discovery.registry().drafters, list[str]()
    for part in given.split("+"):
        if not found or part.partition(":")[0] in names or ":" not in found[-1]:
            found.append(part)
        else:  # of an option of the one before, such as a list
            found[-1] += f"+{part}"
    return found if found[0].partition(":")[0] in names else [given]


def first_option(config: type[BaseModel], name: str, *, skip: str = "", what: str = "policy") -> str:
    """The option that a bare value sets: the first but `skip`. Raises PolicyError if there is none."""
    for option in config.model_fields:
        if option != skip:
            return option
    raise PolicyError(f"{what} {name!r} takes no options")


# Back: what to type.


def written(policy: PolicyLike) -> str:
    """A policy as it would be typed; of an instance, the name of its class.

    >>> written({"name": "threshold", "threshold": 0.6, "block_size": 8})
    'threshold:threshold=0.6,block_size=8'
    >>> written({"name": "bandit", "block_sizes": [1, 2, 4]})
    'bandit:block_sizes=1+2+4'
    """
    if isinstance(policy, Policy):
        return type(policy).__name__
    if isinstance(policy, str):
        return policy
    name, rest = str(policy.get("name", "")), {k: v for k, v in policy.items() if k != "name"}
    return name + (":" + ",".join(f"{k}={_typed(v)}" for k, v in rest.items()) if rest else "")


def _typed(value: Any) -> str:
    """An option as text: entries of a list or a mapping have `+` between them."""
    if isinstance(value, Mapping):
        return "+".join(f"{key}:{_typed(entry)}" for key, entry in value.items())
    return "+".join(map(_typed, value)) if isinstance(value, (list, tuple)) else str(value)


def name_of(kind: type[Policy]) -> str:
    """The name of a policy: its attribute `name`, else its class in small letters."""
    name = getattr(kind, "name", None)
    return name if isinstance(name, str) and name else snake_case(kind.__name__)


def registered_by_another(kind: type[Policy]) -> str | None:
    """The distribution whose plug-in registers the policy's name for another class, or None."""
    entry = discovery.registry().policies.get(name_of(kind))
    if entry is None:
        return None
    made = entry.load()
    related = not isinstance(made, type) or issubclass(kind, made)
    return None if related else entry.distribution


def spec_of(kind: type[Policy]) -> str:
    """What to type for a class: the name that it is registered under, or `./file.py:ClassName`.

    A path below the working directory is relative to it.
    """
    entry = discovery.registry().policies.get(name_of(kind))
    if entry is not None and entry.load() is kind:
        return entry.name
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or "." in kind.__module__:  # a module of a package cannot be read on its own
        return name_of(kind)
    path, here = Path(file).resolve(), Path.cwd()
    shown = f"./{path.relative_to(here)}" if path.is_relative_to(here) else str(path)
    return f"{shown}:{kind.__name__}"


def with_weights(spec: str, folder: str | Path) -> str:
    """What to type for a policy with the weights of a folder.

    >>> with_weights("./mine.py:Mine", "runs/mine"), with_weights("forecast", "mine")
    ('./mine.py:Mine:runs/mine', './mine')
    """
    if names_file(spec):
        return f"{split_file(spec)[0]}:{folder}"
    # A bare name that a plug-in registers would be taken for that policy.
    return str(folder) if "/" in str(folder) else f"./{folder}"
