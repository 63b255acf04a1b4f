"""What generation keeps of the tokens so far.

Shapes: B batch, S new tokens, H heads, L keys, C head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moelet.sections import ModelSettings


class KVCache:
    """Keys and values of the tokens seen so far, so that a new token costs one step instead of a whole pass."""

    def __init__(self, settings: ModelSettings) -> None:
        self.max_length = settings.max_length
        self.length = 0
        self.segments: Tensor | None = None  # (B, max_length) int64, once there are any
        self._last: dict[str, Tensor] = {}  # what the last token left for the next, by its name
        self._store: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k_BHSC: Tensor, v_BHSC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of `layer`; return its keys and values so far, (B, H, L, C) each."""
        if layer not in self._store:
            shape = (*k_BHSC.shape[:2], self.max_length, k_BHSC.shape[3])
            self._store[layer] = (k_BHSC.new_zeros(shape), v_BHSC.new_zeros(shape))
        end = self.length + k_BHSC.shape[2]
        keys, values = self._store[layer]
        keys[:, :, self.length : end] = k_BHSC
        values[:, :, self.length : end] = v_BHSC
        return keys[:, :, :end], values[:, :, :end]

    def stores(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each layer's keys and values, (B, H, max_length, C), of which the first `length` positions count."""
        for layer in sorted(self._store):
            yield self._store[layer]

    def before(self, name: str, x: Tensor) -> Tensor:
        """Return what stands before each of `x`, (B, S, ...), before the first 0, and keep the last by this name."""
        first = x.new_zeros(x.shape[0], 1, *x.shape[2:])
        joined = torch.cat((self._last.get(name, first), x), 1)
        self._last[name] = joined[:, -1:]
        return joined[:, :-1]

    def note_segments(self, segments_BS: Tensor | None, batch: int, n_new: int, device: torch.device) -> Tensor | None:
        """Return the segments of all positions, the new ones included: (B, L), or None when there never were any."""
        if self.segments is None and segments_BS is None:
            return None
        if self.segments is None:
            self.segments = torch.ones(batch, self.max_length, dtype=torch.int64, device=device)
        end = self.length + n_new
        self.segments[:, self.length : end] = 1 if segments_BS is None else segments_BS
        return self.segments[:, :end]
