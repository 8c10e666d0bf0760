"""What a policy remembers across requests: plain JSON values, which all policies save and take back in one way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bpkit.files import faults, write_json
from bpkit.policy.policy import Policy, PolicyConfig, PolicyError, State

if TYPE_CHECKING:
    from torch import Tensor

    from bpkit.types import Context


BEGUN = "begun_"
"""Before the name of a field, in a state: what the row began with."""
KEPT = "kept"
"""In a state: the share of what the row began with that is left in its `fading` fields, float64 [batch]."""


class PolicyMemory(BaseModel):
    """Base of what policies remember. Values of other names are errors when a memory is taken back.

    Rows that run at the same time all begin with the memory as it is then (`rows`), and each learns by itself. When
    they end, in that order, the memory becomes what it would be had each row's steps followed those that it knows
    already (`after`):

        memory <- row + kept * (memory - begun)

    `row` is a field of the row, `begun` what it was when the row began, and `kept` the share of that which is left in
    it: 1 of counts, sums and whatever else is added to, so that the memory gains what the row added; less of `fading`
    fields, where the policy tells it with `fade`. A row that ran alone finds the memory as it was when it began, and
    becomes the memory.

    Class attributes:
        fading: fields whose past is multiplied by a factor before something is added: running means, discounted counts.
        latest: fields that cannot be added to, such as a choice: that of the row that ended last is taken.
        bounds: least and largest value, for rounding may leave them.
    """

    model_config = ConfigDict(extra="forbid")

    fading: ClassVar[frozenset[str]] = frozenset()
    latest: ClassVar[frozenset[str]] = frozenset()
    bounds: ClassVar[tuple[float, float] | None] = None

    def rows(self, context: Context) -> State:
        """A state in which every row begins with this memory: each field, float64 (integers int64) [batch, ...].

        Beside the fields there is what `after` needs: `begun_NAME` of each, and `kept`.
        """
        import torch  # here, so that options can be listed without it

        like, batch, state = context.position, context.batch_size, State()
        for name, value in self:
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            row = like.new_tensor(value, dtype=dtype)
            state[name] = row.expand(batch, *row.shape).clone()
            if name not in self.latest:
                state[BEGUN + name] = state[name].clone()
        if self.fading:
            state[KEPT] = like.new_ones(batch, dtype=torch.float64)
        return state

    def after(self, ended: State) -> Self:
        """This memory with what rows learned that have ended, taken in their order.

        Args:
            ended: their rows of a state that began with `rows` of such a memory, fields of the same shapes.
        """
        return type(self)(**{name: self._after(name, value, ended) for name, value in self})

    def _after(self, name: str, value: Any, ended: State) -> Any:
        rows = ended[name]
        if name in self.latest:
            return rows[-1].tolist()
        known = rows.new_tensor(value)
        kept = ended[KEPT] if name in self.fading else [1] * len(rows)
        for row, begun, share in zip(rows, ended[BEGUN + name], kept, strict=True):
            known = row + share * (known - begun)
        return (known if self.bounds is None else known.clamp(*self.bounds)).tolist()


def fade(state: State, factor: float, where: Tensor | None = None) -> None:
    """Note that a step multiplied the `fading` fields by `factor`, of all rows or of those in `where`, bool [batch]."""
    kept = state[KEPT]
    state[KEPT] = kept * factor if where is None else (kept * factor).where(where, kept)


M = TypeVar("M", bound=PolicyMemory)


class RememberingPolicy(Policy, Generic[M]):
    """A policy whose requests teach something to those that come after.

    Requests may run at the same time, as rows of a batch. There are two ways to learn from all of them:

    - by rows: `begin` returns `self.memory.rows(context)`, `observe` changes the state, and `end`, which is handed the
      rows that end, sets `self.memory = self.memory.after(state)`. A row knows what others learned that had ended when
      it began; see `PolicyMemory` for how rows come together.
    - at once: `observe` changes `self.memory`, and counts each row of the step once. Running rows then know of each
      other.

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
