"""Keeps large tensors' memory inside the process between steps, and what kernels keep for themselves small.

glibc hands every block over 32 MiB back to the kernel when it is freed, so each training step faults the same pages in
again: on a 2-core machine that is 40% of the step (see docs/experiments.md). The price is that the peak stays.
"""

import ctypes
import os
import platform

# names and numbers of mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 256 << 20  # ask the kernel for this much at a time
_NEVER = 2**31 - 1
KEPT_PRODUCTS = "256"  # shapes of products, of which a step has some 200; each keeps about 100 KB


def keep_freed_memory() -> bool:
    """Make malloc reuse what is freed instead of returning it; call before the first large tensor.

    Returns whether it took effect: on glibc only, elsewhere nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(option, value) == 1 for option, value in wanted])


def bound_product_caches() -> None:
    """Have oneDNN, and torch above it, keep fewer compiled products; call before the first one.

    Without kernels of our own, experts' products have other numbers of rows at each step, and 1,024 shapes are kept by
    default: 300 MB more within four steps of the default run in bf16, 20 MB with 256.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, KEPT_PRODUCTS)
