"""Where a run computes and in which number format.

Master weights, norms, softmax, router and losses stay float32; matrix products run in the format chosen here.
"""

import functools
import time
from contextlib import AbstractContextManager

import torch

from moelet.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_CAPABILITY = (8, 0)  # Ampere; is_bf16_supported() says True on older cards, by slow emulation
PRODUCT, TRIES = 512, 5  # columns of the products that are timed; in turn, the shortest counts


def choose_device(name: str) -> torch.device:
    """Return the device for `train.device`; raise UserError where there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            'train.device is "cuda" and torch finds no CUDA device. Set train.device to "auto" or "cpu", or install '
            "a CUDA build of torch and check nvidia-smi."
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bf16 in hardware."""
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.13
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())


def product_seconds(*formats: torch.dtype) -> list[float]:
    """Return the shortest time of a product in each format on one core of the CPU, tried in turn.

    It is this thread's own time: what else the machine does must not decide in which format a run goes on.
    """
    matrices = [torch.ones(PRODUCT, PRODUCT, dtype=dtype) for dtype in formats]
    taken: list[list[float]] = [[] for _ in formats]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(TRIES + 1):
            for times, matrix in zip(taken, matrices, strict=True):
                began = time.thread_time()
                matrix @ matrix
                times.append(time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return [min(times[1:]) for times in taken]


@functools.cache
def cpu_gains_by_bf16() -> bool:
    """Return whether this CPU's bf16 products are faster than its float32 ones: having them doesn't mean that.

    Zen 4 takes 0.46 of the time with avx512_bf16, an Intel Xeon with avx512_bf16 and without AMX 1.7 times as long.
    """
    if not cpu_has_bf16():
        return False
    narrow, wide = product_seconds(torch.bfloat16, torch.float32)
    return narrow < wide


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the format for `train.precision` on `device`.

    auto: CUDA from capability 8.0 on and CPUs that gain by bf16 take it, older CUDA fp16, other CPUs fp32.
    Raises UserError for bf16 where it would only be emulated.
    """
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
        if name == "bf16" and not modern:
            major, minor = torch.cuda.get_device_capability(device)
            raise UserError(
                f'train.precision is "bf16" and this card has compute capability {major}.{minor}. bf16 needs 8.0 or '
                'newer. Set train.precision to "auto" or "fp16".'
            )
        return DTYPES[("bf16" if modern else "fp16") if name == "auto" else name]
    if name == "bf16" and not cpu_has_bf16():
        raise UserError(
            'train.precision is "bf16" and this CPU has no bf16 products. It would emulate them, slower than fp32. '
            'Set train.precision to "auto" or "fp32".'
        )
    return DTYPES[("bf16" if cpu_gains_by_bf16() else "fp32") if name == "auto" else name]


def make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler | None:
    """Return a gradient scaler for fp16, whose small gradients would vanish; None for the formats that need none."""
    return torch.amp.GradScaler(device.type) if dtype == torch.float16 else None


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which matrix products run in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
