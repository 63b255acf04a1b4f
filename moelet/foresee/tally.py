"""Counts what a program asks of the machine, operation by operation: live bytes, floating-point operations, traffic.

It works on real tensors and on those without values, where nothing is computed. What kernels allocate behind torch's
back, a few buffers a thread, isn't seen.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

FREE = {  # operations that make a view, or room for numbers
    *("view", "_unsafe_view", "detach", "alias", "transpose", "expand", "select", "slice", "permute", "t", "unsqueeze"),
    *("squeeze", "split", "split_with_sizes", "chunk", "as_strided", "unbind", "lift_fresh", "empty", "new_empty"),
    *("empty_like", "new_empty_strided", "empty_strided"),
}


class Operation(NamedTuple):
    """One that a device would have to do."""

    flops: float  # of products; those of everything else are in its traffic
    bytes: int  # of inputs and outputs
    wide: bool  # whether its products are in float32


class Tally(TorchDispatchMode):
    """A context manager; `peak` is the most bytes of storages alive at once, `existing` ones among them."""

    def __init__(self, existing: Iterable[Tensor] = (), operations: bool = False) -> None:
        super().__init__()
        existing = list(existing)
        self.sizes: dict[StorageWeakRef, int] = {}
        self.total = 0  # of `sizes`, some of which may be dead
        self.peak, self.gradients = 0, 0  # the second: of `existing` ones, at the time of the peak
        self._owners = [tensor for tensor in existing if tensor.requires_grad]
        self.operations: list[Operation] | None = [] if operations else None
        for tensor in existing:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self.total += storage.nbytes() - self.sizes.get(reference, 0)
        self.sizes[reference] = storage.nbytes()

    def _gradients(self) -> int:
        grads = (owner.grad for owner in self._owners)
        return sum(grad.numel() * grad.dtype.itemsize for grad in grads if grad is not None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [item for item in (result if isinstance(result, tuple | list) else [result]) if isinstance(item, Tensor)]
        for item in made:
            self._add(item)
        if self.total > self.peak:  # only then is it worth to look who is dead
            self.sizes = {reference: size for reference, size in self.sizes.items() if not reference.expired()}
            self.total = sum(self.sizes.values())
            if self.total > self.peak:
                self.peak, self.gradients = self.total, self._gradients()
        if self.operations is not None and (operation := _operation(function, args, kwargs or {}, made)) is not None:
            self.operations.append(operation)
        return result


def _operation(function: Any, args: Any, kwargs: Any, made: list[Tensor]) -> Operation | None:
    """Return what an operation costs; None where it is only another view of a tensor, or room for one."""
    name = function._overloadpacket.__name__
    if name in FREE or not made:
        return None
    given = [item for item in _flat((args, kwargs)) if isinstance(item, Tensor)]
    seen = {item.untyped_storage()._cdata: item for item in (*given, *made)}
    flops = FLOPS[name](given) if name in FLOPS else 0.0
    return Operation(flops, sum(map(_bytes, seen.values())), made[0].dtype.itemsize > 2)


def _flat(items: Any) -> list[Any]:
    if isinstance(items, dict):
        items = items.values()
    elif not isinstance(items, tuple | list):
        return [items]
    return [leaf for item in items for leaf in _flat(item)]


def _bytes(tensor: Tensor) -> int:
    """Return what is read or written of a tensor: broadcast ones are smaller than they look."""
    return min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes())


def _product(a: Tensor, b: Tensor) -> float:
    """Return the FLOPs of a @ b, batched or not."""
    return 2.0 * a.numel() * b.shape[-1]


def _causal(q: Tensor, k: Tensor, products: int) -> float:
    """Return the FLOPs of attention with half of its square masked: two products forward, five backward."""
    return products * float(q.numel()) * k.shape[2]


FLOPS: dict[str, Callable[[list[Tensor]], float]] = {
    "mm": lambda given: _product(given[0], given[1]),
    "bmm": lambda given: _product(given[0], given[1]),
    "addmm": lambda given: _product(given[1], given[2]),
    "baddbmm": lambda given: _product(given[1], given[2]),
    "_scaled_dot_product_flash_attention_for_cpu": lambda given: _causal(given[0], given[1], 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda given: _causal(given[1], given[2], 5),
}
