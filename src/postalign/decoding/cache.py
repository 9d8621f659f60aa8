"""A key-value cache with room to grow, whose rows come and go.

transformers' own cache copies itself for every token; this one copies itself when its room is used up. Knows that
cache; knows no model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # columns that are added at a time


class RowLayer(DynamicLayer):
    """One layer's keys and values `[rows, heads, length, head_dim]`, views of tensors with room for more columns.

    Of a sliding window all columns are kept, and the mask hides what has left it.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.length = 0
        self.stored: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.length, self.length + key_states.shape[-2]
        if self.stored is None or end > self.stored[0].shape[-2]:
            old = self.stored
            self.stored = _roomy(key_states, end + ROOM), _roomy(value_states, end + ROOM)
            if old is not None:
                for new, had in zip(self.stored, old, strict=True):
                    new[..., :begin, :] = had[..., :begin, :]
        keys, values = self.stored
        keys[:, :, begin:end], values[:, :, begin:end] = key_states, value_states
        self._show(end)
        return self.keys, self.values  # type: ignore[return-value]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns off: as many as `-tokens_to_remove`."""
        self._show(self.length - abs(tokens_to_remove))

    def take(self, index: Tensor, first: int = 0) -> None:
        """Go on with these rows, and with the columns from `first` on."""
        if self.stored is None:
            return
        kept = self.length - first
        chosen = []
        for stored in self.stored:
            new = stored.new_empty((len(index), stored.shape[1], kept + ROOM, stored.shape[3]))
            new[..., :kept, :] = stored[index.to(stored.device), :, first : self.length]
            chosen.append(new)
        self.stored = chosen[0], chosen[1]
        self._show(kept)

    def join(self, other: RowLayer, index: Tensor) -> None:
        """Put `other`'s rows under these, both ending at the same column, and take the rows `index` of that."""
        if self.stored is None or other.stored is None:
            return
        length = max(self.length, other.length)
        mine = self.keys.shape[0]  # type: ignore[union-attr]
        index = index.to(self.stored[0].device)
        joined = []
        for one, two in zip(self.stored, other.stored, strict=True):
            new = one.new_zeros((len(index), one.shape[1], length + ROOM, one.shape[3]))
            old = index < mine
            new[old, :, length - self.length : length] = one[index[old], :, : self.length]
            new[~old, :, length - other.length : length] = two[index[~old] - mine, :, : other.length]
            joined.append(new)
        self.stored = joined[0], joined[1]
        self._show(length)

    def gather(self, columns: Tensor) -> None:
        """Go on with these columns `[rows, columns]`, row by row."""
        if self.stored is None:
            return
        chosen = []
        for stored in self.stored:
            index = columns.to(stored.device)[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
            new = stored.new_empty((*stored.shape[:2], columns.shape[1] + ROOM, stored.shape[3]))
            new[..., : columns.shape[1], :] = stored.gather(2, index)
            chosen.append(new)
        self.stored = chosen[0], chosen[1]
        self._show(columns.shape[1])

    def _show(self, length: int) -> None:
        assert self.stored is not None
        self.length = length
        self.keys, self.values = self.stored[0][:, :, :length], self.stored[1][:, :, :length]


def _roomy(states: Tensor, columns: int) -> Tensor:
    return states.new_empty((*states.shape[:2], columns, states.shape[3]))


class RowCache(DynamicCache):
    """The cache of a model: RowLayer where transformers would grow a layer token by token, else its own kind."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        self.sliding = any(type(layer) is DynamicSlidingWindowLayer for layer in self.layers)
        self.layers = [RowLayer() if type(layer) in kinds else layer for layer in self.layers]
        if getattr(self, "layer_class_to_replicate", None) in kinds:
            self.layer_class_to_replicate = RowLayer

    @property
    def movable(self) -> bool:
        """Whether rows can join and columns be taken off: not where a layer keeps a state of another kind."""
        return all(isinstance(layer, RowLayer) for layer in self.layers)

    def take(self, layer: int, index: Tensor, first: int = 0) -> None:
        """Go on with these rows of one layer; of a RowLayer, with the columns from `first` on."""
        found: Any = self.layers[layer]
        if isinstance(found, RowLayer):
            found.take(index, first)
        else:
            found.reorder_cache(index)
