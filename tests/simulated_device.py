"""A simulated accelerator: placement of tensors, traffic, waiting and memory can be tested on a machine without one.

Tensors on the device ``sim:0`` are computed by the CPU. As with CUDA, an operation on tensors of two devices fails.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "sim"


class _Backend(_DummyBackendModule):
    """What torch asks a backend for; also in tests on the CPU that run after this module was imported."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return _current.total - _current.used, _current.total

    def memory_allocated(self, device: object = None) -> int:
        return _current.used

    memory_reserved = memory_allocated


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")
# Operations that accept a tensor of the CPU beside one of the device: copies, and indices.
MIXED = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}
# Operations whose result the CPU has to wait for, in addition to copies to it.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
}


@dataclass
class Traffic:
    """What a block of code did with the device.

    Attributes:
        to_device: bytes copied to it.
        to_host: bytes copied from it.
        waits: number of times that the CPU waited for it.
        used, peak: bytes of its tensors now, and at most. Temporary memory within an operation is not counted.
        total: bytes of its memory.
    """

    to_device: int = 0
    to_host: int = 0
    waits: int = 0
    used: int = 0
    peak: int = 0
    total: int = 1 << 40
    storages: Counter[int] = field(default_factory=Counter)  # tensors by the address of their memory

    def restart(self) -> None:
        """Count anew from here."""
        self.to_device = self.to_host = self.waits = 0
        self.peak = self.used

    def hold(self, tensor: "OnDevice") -> None:
        """Count the memory of a tensor until its last view is gone."""
        storage = tensor.values.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if not self.storages[address]:
            if self.used + nbytes > self.total:
                raise torch.OutOfMemoryError(
                    f"{NAME}: {nbytes} bytes, of {self.total} are {self.used} in use"
                )
            self.used += nbytes
            self.peak = max(self.peak, self.used)
        self.storages[address] += 1
        weakref.finalize(tensor, self._drop, address, nbytes).atexit = False

    def _drop(self, address: int, nbytes: int) -> None:
        self.storages[address] -= 1
        if not self.storages[address]:
            self.used -= nbytes


class OnDevice(Tensor):
    """A tensor of the simulated device; ``values`` has its values."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnDevice":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device=DEVICE, **layout
        )
        made.values = values
        _current.hold(made)
        return made

    def __init__(self, values: Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(
        cls,
        function: Any,
        types: Any,
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        return _compute(function, arguments, options or {}, _current)


class _Watching(TorchDispatchMode):
    """Also sees operations without a tensor of the device, such as those that make one."""

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        return _compute(function, arguments, options or {}, _current)


_current = Traffic()


@contextmanager
def simulated_device() -> Iterator[Traffic]:
    """Provide the device within the block, in this thread, and count its traffic."""
    global _current
    _current = Traffic()
    with _Watching():
        yield _current


def _compute(function: Any, arguments: Sequence[Any], options: Mapping[str, Any], traffic: Traffic) -> Any:
    name = function._schema.name
    tensors = [each for each in _leaves((*arguments, *options.values())) if isinstance(each, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    wanted = options.get("device")
    is_on_device = bool(here) if wanted is None else torch.device(wanted).type == NAME
    if here and name not in MIXED:
        _refuse_others(name, tensors)
    if name == "aten::_fused_sdp_choice":
        return 0  # attention by its formula
    is_discarded = wanted is not None and torch.device(wanted).type == "meta"
    _count(name, arguments, is_on_device, is_discarded, bool(here), traffic)
    computed = {key: _mapped(_values, value) for key, value in options.items() if key != "pin_memory"}
    if wanted is not None and is_on_device:
        computed["device"] = CPU
    result = function(*_mapped(_values, arguments), **computed)
    schema = function._schema
    if not schema.returns:
        return None
    changed = schema.arguments[0].alias_info if schema.arguments else None
    if changed is not None and changed.is_write:
        return arguments[0]  # in place
    return _mapped(_on_device, result) if is_on_device else result


def _refuse_others(name: str, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        # Scalars of the CPU take part in every operation, as with CUDA.
        if not isinstance(tensor, OnDevice) and (tensor.dim() or tensor.is_meta):
            raise RuntimeError(f"{name}: tensors on {DEVICE} and on {tensor.device}")


def _count(
    name: str,
    arguments: Sequence[Any],
    is_on_device: bool,
    is_discarded: bool,
    reads_device: bool,
    traffic: Traffic,
) -> None:
    if name in WAITING and reads_device:
        traffic.waits += 1
    if name == "aten::_to_copy":
        source, target = arguments[0], is_on_device
        if is_discarded:
            return
    elif name == "aten::copy_":
        source, target = arguments[1], isinstance(arguments[0], OnDevice)
    else:
        return
    if isinstance(source, OnDevice) and not target:
        traffic.to_host += source.nbytes
        traffic.waits += 1
    elif not isinstance(source, OnDevice) and target and not source.is_meta:
        traffic.to_device += source.nbytes


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested lists and tuples, which are all that operations take; faster than torch's own function."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return nested lists and tuples with every leaf changed."""
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, each) for each in value])
    return change(value)


def _values(value: Any) -> Any:
    return value.values if isinstance(value, OnDevice) else value


def _on_device(value: Any) -> Any:
    is_plain = isinstance(value, Tensor) and not isinstance(value, OnDevice) and value.device == CPU
    return OnDevice(value) if is_plain else value
