"""What a policy remembers across requests: plain JSON values, which all policies save and take back in one way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bpkit.files import faults, write_json
from bpkit.policy.policy import Policy, PolicyConfig, PolicyError, State

if TYPE_CHECKING:
    from bpkit.types import Context


class PolicyMemory(BaseModel):
    """Base of what policies remember. Values of other names are errors when a memory is taken back."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def mean_of(cls, state: State) -> Self:
        """The mean over the rows of a state whose entries are the fields of this memory."""
        return cls(**{name: rows.mean(dim=0).tolist() for name, rows in state.items()})

    def rows(self, context: Context) -> State:
        """A state in which every row begins with this memory: each field, float64 [batch, ...]."""
        import torch  # here, so that options can be listed without it

        values = {name: context.position.new_tensor(value, dtype=torch.float64) for name, value in self}
        return {name: value.expand(context.batch_size, *value.shape).clone() for name, value in values.items()}


M = TypeVar("M", bound=PolicyMemory)


class RememberingPolicy(Policy, Generic[M]):
    """A policy whose requests teach something to those that come after.

    >>> class Count(PolicyMemory):
    ...     requests: int = 0
    >>> class Counting(RememberingPolicy[Count]):
    ...     Memory = Count
    ...     wants = frozenset()
    ...
    ...     def select(self, state, context):
    ...         return context.full(8 if self.memory.requests else 4)
    ...
    ...     def end(self, state):
    ...         self.memory = Count(requests=self.memory.requests + 1)
    >>> policy = Counting()
    >>> policy.end({})
    >>> policy.state_dict()
    {'requests': 1}

    Attributes:
        Memory: the class of `memory`; a class attribute, as `Config` is.
        memory: what is remembered now.
    """

    Memory: type[M]
    memory: M

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.memory = self.fresh_memory()

    def fresh_memory(self) -> M:
        """What is known before the first request."""
        return self.Memory()

    def fitted(self, memory: M) -> M:
        """A memory as this policy takes it up. Raise PolicyError if it does not fit the options."""
        return memory

    def state_dict(self) -> dict[str, Any]:
        """The memory as plain JSON values; empty if nothing was learned."""
        return {} if self.memory == self.fresh_memory() else self.memory.model_dump(mode="json")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned. Raises PolicyError that names each fault; the memory then stays."""
        if state == {}:
            self.memory = self.fresh_memory()
            return
        try:
            loaded = self.Memory.model_validate(state)
        except ValidationError as error:
            raise PolicyError(f"this is no memory of {type(self).__name__} ({faults(error)})") from None
        self.memory = self.fitted(loaded)

    def save(self, path: str | Path) -> None:
        """Write the memory to a JSON file, at once: a reader sees the old one or the new one."""
        write_json(Path(path).expanduser(), self.state_dict())

    def load(self, path: str | Path) -> None:
        """Take the memory from a JSON file. Raises PolicyError that names the file if it holds none that fits."""
        file = Path(path).expanduser()
        try:
            self.load_state_dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            why = error if isinstance(error, PolicyError) else f"this cannot be read as JSON ({error})"
            raise PolicyError(f"{file}: {why}; delete the file or name another") from None
