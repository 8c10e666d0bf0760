"""A policy serves one decoder: what it is bound to and what it remembers are of one drafter and one device."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from bpkit.decode.drafter import Drafter
from bpkit.policy import Policy, PolicyError, validated
from bpkit.registry.class_file import names_file
from bpkit.registry.resolve import PolicyLike, class_and_options, each_drafter, parse_spec, resolve_policy

DrafterLike = Drafter | str | dict[str, Any] | Sequence[Drafter | str | dict[str, Any]]
MOST = 16
"""Pairs of a policy and a drafter that a decoder keeps for `generate(policy=..., drafter=...)`."""
_decoders: WeakSet[Any] = WeakSet()
"""Those in use."""
Decoder = TypeVar("Decoder")


def policy_for(policy: PolicyLike, decoder: object) -> Policy:
    """A policy for this decoder alone.

    What is written as text or as a mapping is made anew. An instance is taken as it is, unless it serves another
    decoder that is still in use: then a copy is taken, with the options and the memory that it has now.

    Raises:
        PolicyError: the policy cannot be made, or copied.
    """
    made = resolve_policy(policy)
    if any(other is not decoder and getattr(other, "policy", None) is made for other in _decoders):
        try:
            made = copy.deepcopy(made)
        except Exception as error:
            name = type(made).__name__
            raise PolicyError(
                f"this {name} serves another decoder and cannot be copied for a second one ({type(error).__name__}: "
                f"{error}); make another {name}, or write the policy by its name"
            ) from error
    _decoders.add(decoder)
    return made


class KeptDecoders:
    """Decoders with another policy or drafter, kept so that a policy remembers what earlier calls taught it.

    The least recently used goes when there are more than `MOST`.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Hashable, Hashable], tuple[Any, Any]] = OrderedDict()
        """Each decoder with the policy and drafter of its key, so that no other object gets the id of one."""

    def get(
        self, policy: PolicyLike | None, drafter: DrafterLike | None, make: Callable[[Drafter | None], Decoder]
    ) -> Decoder:
        """The decoder of this pair, made at the first call, with a drafter that another policy has already, if any."""
        key = (policy_key(policy), drafter_key(drafter))
        if key not in self._kept:
            same = (d.drafter for (_, other), (d, _) in self._kept.items() if other == key[1])
            self._kept[key] = make(next(same, None) if drafter is not None else None), (policy, drafter)
        self._kept.move_to_end(key)
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)
        found: Decoder = self._kept[key][0]
        return found


def policy_key(policy: PolicyLike | None) -> Hashable:
    """Equal for two ways to write one policy, and for one instance while it lives. Raises PolicyError for no policy.

    >>> policy_key("fixed:4") == policy_key({"name": "fixed", "block_size": 4})
    True
    """
    if policy is None:
        return None
    if isinstance(policy, Policy):
        return id(policy)
    spec = parse_spec(policy) if isinstance(policy, str) else dict(policy)
    name = str(spec.get("name", ""))
    if names_file(name):  # each reading of a file makes another class
        file = Path(name.partition(".py")[0] + ".py").expanduser()
        about = file.stat() if file.is_file() else None
        return (name, _as_text(spec), about and (about.st_mtime_ns, about.st_size))
    made, options, name = class_and_options(policy)
    if isinstance(made, type) and issubclass(made, Policy):
        return (made, repr(validated(made.Config, options, owner=name)))
    return (made, _as_text(options))


def drafter_key(drafter: DrafterLike | None) -> Hashable:
    """Equal for one spelling of a drafter, and for one instance while it lives."""
    if drafter is None:
        return None
    if len(several := each_drafter(drafter)) > 1:
        return tuple(map(drafter_key, several))
    if not isinstance(drafter, (str, Mapping)):
        return id(drafter)
    return _as_text(parse_spec(drafter) if isinstance(drafter, str) else drafter)


def _as_text(options: Mapping[str, Any]) -> Hashable:
    return tuple(sorted((name, str(value)) for name, value in options.items()))
