"""Devices and number formats, for cards that this machine doesn't have."""

import pytest
import torch

from moelet import precision
from moelet.errors import UserError
from moelet.precision import autocast, choose_device, choose_dtype, make_scaler

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A card of `capability`; like torch on a T4, it claims bf16, which it only emulates."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)


@pytest.mark.parametrize(
    ("capability", "name", "want"),
    [
        ((7, 5), "auto", torch.float16),
        ((8, 0), "auto", torch.bfloat16),
        ((8, 6), "auto", torch.bfloat16),
        ((9, 0), "auto", torch.bfloat16),
        ((7, 5), "fp16", torch.float16),
        ((7, 5), "fp32", torch.float32),
        ((8, 0), "fp16", torch.float16),
        ((8, 0), "bf16", torch.bfloat16),
        ((9, 0), "fp32", torch.float32),
    ],
)
def test_format_of_a_card(
    capability: tuple[int, int], name: str, want: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability)
    assert choose_dtype(name, CUDA) == want


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_emulated_bf16_is_refused(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability)
    with pytest.raises(UserError, match=rf"capability {capability[0]}\.{capability[1]}.*8\.0.*fp16"):
        choose_dtype("bf16", CUDA)


@pytest.mark.parametrize(
    ("has_bf16", "seconds", "want"),
    [
        (True, [1.0, 2.0], torch.bfloat16),
        (True, [1.8, 1.0], torch.float32),  # as Intel's with avx512_bf16 and without AMX
        (False, [1.0, 2.0], torch.float32),
    ],
)
def test_format_of_a_cpu(
    has_bf16: bool, seconds: list[float], want: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to choose, it takes the faster format; told which, it takes that."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(precision, "product_seconds", lambda *formats: seconds)
    monkeypatch.setattr(precision, "cpu_gains_by_bf16", precision.cpu_gains_by_bf16.__wrapped__)
    assert choose_dtype("auto", CPU) == want
    if has_bf16:
        assert choose_dtype("bf16", CPU) == torch.bfloat16
    else:
        with pytest.raises(UserError, match='"bf16" and this CPU has no.*"auto" or "fp32"'):
            choose_dtype("bf16", CPU)
    assert choose_dtype("fp16", CPU) == torch.float16
    assert choose_dtype("fp32", CPU) == torch.float32


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch doesn't list what the CPU can do")
@pytest.mark.parametrize(
    ("capabilities", "want"),
    [
        ({}, False),
        ({"avx512": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_cpu_has_bf16(capabilities: dict[str, bool], want: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.cpu_has_bf16() is want


def test_what_is_timed_is_a_time() -> None:
    narrow, wide = precision.product_seconds(torch.bfloat16, torch.float32)
    assert narrow > 0 and wide > 0
    assert not precision.cpu_gains_by_bf16() or precision.cpu_has_bf16()


def test_only_fp16_has_a_scaler() -> None:
    """Scaling bf16's losses would be for nothing: it has the range of fp32."""
    assert isinstance(make_scaler(torch.float16, CPU), torch.amp.GradScaler)
    for device in (CPU, CUDA):
        assert make_scaler(torch.bfloat16, device) is None
        assert make_scaler(torch.float32, device) is None


@pytest.mark.parametrize(("available", "name", "want"), [
    (False, "auto", "cpu"), (False, "cpu", "cpu"), (True, "auto", "cuda"), (True, "cpu", "cpu"), (True, "cuda", "cuda"),
])  # fmt: skip
def test_device(available: bool, name: str, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device(name).type == want


def test_absent_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match='train.device is "cuda".*Set train.device'):
        choose_device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_run_in_the_chosen_format(dtype: torch.dtype) -> None:
    with autocast(dtype, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
