"""State between decoder layers: what a model carries from one layer to the next for each token, as one tensor.

Most models carry hidden states only. Others need more in later layers: the tokens (Gemma 4 has an embedding of its own for
every layer, Zamba gives the embedded tokens to its attention layers), the output of an earlier layer (Inkling 2), or
keys and values that an earlier layer stored (Gemma 4). Such values follow the hidden states in the last dimension. So
windows can be batched, kept in files and resumed without knowing what their state contains.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

TOKEN_DTYPE = torch.int32

# Place of a tensor in a mapping among the arguments of a layer: position of the mapping after the hidden states, or its
# name; key in the mapping; and position in the tuple under this key, or None if the tensor is not in a tuple.
Place = tuple[int | str, Hashable, int | None]


@dataclass(frozen=True)
class TokenTensor:
    """Layout of a tensor that has values for every token of a batch of windows.

    Attributes:
        window_axis, token_axis: axes of the windows and of their tokens.
        sizes: sizes of the other axes, in their order.
        dtype: dtype of the values.
    """

    window_axis: int
    token_axis: int
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of values for each token."""
        return torch.Size(self.sizes).numel()

    @property
    def has_windows_first(self) -> bool:
        """Whether the shape is ``(windows, seqlen, width)``, as that of most models' hidden states."""
        return (self.window_axis, self.token_axis, len(self.sizes)) == (0, 1, 1)

    def fits(self, tensor: Tensor, windows: Sequence[int]) -> bool:
        """Return whether a tensor has this layout, for windows of a shape that begins with ``(windows, seqlen)``."""
        sizes = list(self.sizes)
        for axis, size in sorted(((self.window_axis, windows[0]), (self.token_axis, windows[1]))):
            sizes.insert(axis, size)
        return list(tensor.shape) == sizes and tensor.dtype == self.dtype

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the values as ``(windows, seqlen, numel)``; without a copy if they lie that way."""
        if self.has_windows_first:
            return tensor
        return tensor.movedim((self.window_axis, self.token_axis), (0, 1)).flatten(2)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return the tensor with these values, see ``rows``."""
        if self.has_windows_first:
            return rows.contiguous()
        restored = rows.reshape(*rows.shape[:2], *self.sizes)
        return restored.movedim((0, 1), (self.window_axis, self.token_axis))


def token_tensor(
    one: Tensor, other: Tensor, windows: tuple[int, int], seqlens: tuple[int, int]
) -> TokenTensor | None:
    """Return the layout of a tensor that was computed for two batches of different shapes; None if it has no such layout.

    Args:
        windows, seqlens: number of windows and their length in both batches.
    """
    if one.ndim != other.ndim:
        return None
    both = list(zip(one.shape, other.shape, strict=True))
    if both.count(windows) != 1 or both.count(seqlens) != 1:
        return None
    axes = both.index(windows), both.index(seqlens)
    others = [sizes for axis, sizes in enumerate(both) if axis not in axes]
    if any(size != same for size, same in others):
        return None
    return TokenTensor(*axes, tuple(size for size, _ in others), one.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """Tensor that a layer stores in a mapping which later layers receive as an argument.

    Attributes:
        place: place among the arguments.
        layers: layers that store it.
        tensor: its layout.
    """

    place: Place
    layers: tuple[int, ...]
    tensor: TokenTensor


@dataclass(frozen=True)
class StateLayout:
    """Layout of the state between decoder layers, shape ``(windows, seqlen, size)``.

    The hidden states come first. Values of another dtype are kept as they are, byte by byte.

    Attributes:
        hidden: hidden states; their values are converted to ``dtype``.
        dtype: dtype of the state.
        has_tokens: whether the state has the token ids, because the model computes arguments of its layers from them.
        kept: layers whose output is kept, because the model uses it after the next layer.
        stored: tensors that layers store for later layers.
    """

    hidden: TokenTensor
    dtype: torch.dtype
    has_tokens: bool = False
    kept: tuple[int, ...] = ()
    stored: tuple[StoredTensor, ...] = ()

    @property
    def size(self) -> int:
        """Number of entries for each token."""
        return sum(each.stop - each.start for each in self._parts.values())

    @property
    def is_plain(self) -> bool:
        """Whether the state is nothing but hidden states."""
        return not (self.has_tokens or self.kept or self.stored)

    @property
    def replays(self) -> bool:
        """Whether the arguments of a layer depend on the state, so that each batch needs its own."""
        return self.has_tokens or bool(self.kept)

    @cached_property
    def _parts(self) -> dict[object, slice]:
        """Entries of the hidden states (``None``), the tokens (``"tokens"``), kept outputs (by layer) and stored tensors."""
        sizes: dict[object, int] = {None: self.hidden.numel}
        if self.has_tokens:
            sizes["tokens"] = -(-TOKEN_DTYPE.itemsize // self.dtype.itemsize)
        sizes |= {layer: self.hidden.numel for layer in self.kept}
        for each in self.stored:
            sizes[each] = -(-each.tensor.numel * each.tensor.dtype.itemsize // self.dtype.itemsize)
        parts, start = {}, 0
        for name, size in sizes.items():
            parts[name] = slice(start, start + size)
            start += size
        return parts

    def hidden_rows(self, states: Tensor) -> Tensor:
        """Return the hidden states, shape ``(..., hidden_size)``, as a view."""
        return states if self.is_plain else states[..., self._parts[None]]

    def hidden_states(self, states: Tensor) -> Tensor:
        """Return the hidden states in the shape that the layers receive."""
        return (
            states
            if self.is_plain and self.hidden.has_windows_first
            else self.hidden.from_rows(self.hidden_rows(states))
        )

    def tokens(self, states: Tensor) -> Tensor:
        """Return the token ids, shape ``(windows, seqlen)``."""
        return self._read(states, "tokens", 1, TOKEN_DTYPE)[..., 0].long()

    def kept_output(self, states: Tensor, layer: int) -> Tensor:
        """Return the kept output of a layer, in the shape of the hidden states."""
        return self.hidden.from_rows(states[..., self._parts[layer]])

    def stored_tensor(self, states: Tensor, stored: StoredTensor) -> Tensor:
        """Return a tensor that an earlier layer has stored."""
        return stored.tensor.from_rows(self._read(states, stored, stored.tensor.numel, stored.tensor.dtype))

    def begin(self, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
        """Return the state before the first layer.

        Args:
            hidden_states: input of the first layer.
            input_ids: tokens, shape ``(windows, seqlen)``.
        """
        rows = self.hidden.rows(hidden_states)
        if self.is_plain:
            return rows
        states = rows.new_zeros(*rows.shape[:2], self.size, dtype=self.dtype)
        states[..., self._parts[None]] = rows
        if self.has_tokens:
            self._write(states, "tokens", input_ids[..., None].to(rows.device, TOKEN_DTYPE))
        return states

    def following(
        self, states: Tensor, layer: int, output: Tensor, written: Mapping[StoredTensor, Tensor]
    ) -> Tensor:
        """Return the state after a layer, given that before it.

        Args:
            output: hidden states that the layer returned.
            written: tensors that the layer stored.
        """
        rows = self.hidden.rows(output)
        if self.is_plain:
            return rows
        states = states.clone()
        states[..., self._parts[None]] = rows
        if layer in self.kept:
            states[..., self._parts[layer]] = rows
        for stored, tensor in written.items():
            self._write(states, stored, stored.tensor.rows(tensor))
        return states

    def _write(self, states: Tensor, part: object, rows: Tensor) -> None:
        if rows.dtype != self.dtype:
            as_bytes = rows.contiguous().view(torch.uint8)
            missing = -as_bytes.shape[-1] % self.dtype.itemsize
            rows = nn.functional.pad(as_bytes, (0, missing)).view(self.dtype)
        states[..., self._parts[part]] = rows

    def _read(self, states: Tensor, part: object, numel: int, dtype: torch.dtype) -> Tensor:
        rows = states[..., self._parts[part]].contiguous()
        if dtype == self.dtype:
            return rows
        # A copy: a view starts where its dtype may not.
        return (
            rows.view(torch.uint8)[..., : numel * dtype.itemsize]
            .clone(memory_format=torch.contiguous_format)
            .view(dtype)
        )


def stored_tensors(arguments: Mapping[int | str, object]) -> Iterator[tuple[Place, Tensor]]:
    """Yield the tensors in the mappings among the arguments of a layer."""
    for argument, mapping in arguments.items():
        if not isinstance(mapping, Mapping):
            continue
        for key, value in mapping.items():
            if isinstance(value, Tensor):
                yield (argument, key, None), value
            elif isinstance(value, tuple):
                for position, each in enumerate(value):
                    if isinstance(each, Tensor):
                        yield (argument, key, position), each
