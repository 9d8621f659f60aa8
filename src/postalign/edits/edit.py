"""The form that every edit has, and what a live edit knows of the forward pass it sits in.

An edit is data (tensors and settings). `attach` makes it live in a model by forward hooks and returns handles that
undo it exactly; whether it acts in a given forward pass, on which rows and positions, is told by a `Control`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PostalignError

State = tuple[dict[str, Any], Mapping[str, Tensor]]


@dataclass
class Control:
    """What attached edits are told of the current forward pass.

    strength: float `[batch]`, the gate's signed strength of each row; None switches the edits off.
    start: index of the first *generated* position in this pass, an int or `[batch]`: the sequence length for a
        prompt, 0 for a decoding step, the prompt's length where prompt and reply are run in one pass.
    rows: where strengths other than 0 may stand. whole: whether all of these are known to be 1.
    thread: the only thread whose passes the edits act in; None: all.
    """

    strength: Tensor | None = None
    start: int | Tensor = 0
    rows: slice = field(default_factory=lambda: slice(None))
    whole: bool = False
    thread: int | None = None

    @property
    def acting(self) -> Tensor | None:
        """`strength`, in the passes that are meant."""
        return self.strength if self.thread is None or self.thread == threading.get_ident() else None

    def coefficients(self, scope: tuple[str, ...], batch: int, length: int, device: torch.device) -> Tensor | None:
        """Strength of each position, float32 `[batch, length]`, or None where nothing is to be done."""
        strength = self.acting
        if strength is None:
            return None
        start = torch.as_tensor(self.start, device=device).reshape(-1, 1)
        position = torch.arange(length, device=device).unsqueeze(0)
        inside = torch.zeros((start.shape[0], length), dtype=torch.bool, device=device)
        if "all" in scope:
            inside = torch.ones_like(inside)
        if "prompt" in scope:
            inside |= position < start
        if "last" in scope:
            inside |= position == start - 1
        if "generation" in scope:
            inside |= position >= start
        if not bool(inside.any()):
            return None
        return strength.to(device=device, dtype=torch.float32).reshape(batch, 1) * inside


@runtime_checkable
class Edit(Protocol):
    """Anything an alignment applies. `kind` names it in files."""

    @property
    def kind(self) -> str: ...

    def attach(self, model: nn.Module, control: Control) -> list[RemovableHandle]:
        """Make the edit live in `model`; each returned handle's `.remove()` undoes its part."""
        ...

    def check(self, model: nn.Module) -> None:
        """Raise PostalignError when the edit does not fit `model`."""
        ...

    def state(self) -> State:
        """Settings (JSON) and tensors, enough for `edit_from_state` to make it again."""
        ...


def attach_all(edits: Iterable[Edit], model: nn.Module, control: Control) -> list[RemovableHandle]:
    """All edits live in `model` under one control, or none when one of them does not fit."""
    handles: list[RemovableHandle] = []
    try:
        for edit in edits:
            handles += edit.attach(model, control)
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return handles


Kind = TypeVar("Kind")
_LOADERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]] = {}


def edit_kind(kind: str) -> Callable[[type[Kind]], type[Kind]]:
    """Class decorator: the class's `from_state(settings, tensors)` reads edits of this kind."""

    def register(cls: type[Kind]) -> type[Kind]:
        cls.kind = kind  # type: ignore[attr-defined]
        _LOADERS[kind] = cls.from_state  # type: ignore[attr-defined]
        return cls

    return register


def edit_from_state(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The edit (or gate, or guide) that `state()` described. Raises PostalignError for a kind not known here."""
    kind = settings.get("kind", "")
    if kind not in _LOADERS:
        raise PostalignError(
            f"the alignment holds an edit of kind {kind!r}, unknown to this version: update postalign."
        )
    try:
        return _LOADERS[kind](settings, tensors)
    except KeyError as error:
        raise PostalignError(
            f"the alignment's {kind} edit lacks {error}: the file is damaged; fit it again."
        ) from error


class _Renamed(Mapping[str, Tensor]):
    """Tensors under other names, each taken from its source when it is asked for: some sources read from the disk."""

    def __init__(self, names: dict[str, str], tensors: Mapping[str, Tensor]) -> None:
        self.names, self.tensors = names, tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors under `prefix.name`."""
    return _Renamed({f"{prefix}.{name}": name for name in tensors}, tensors)


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors whose names begin with `prefix.`, without it."""
    return _Renamed({name[len(prefix) + 1 :]: name for name in tensors if name.startswith(prefix + ".")}, tensors)
