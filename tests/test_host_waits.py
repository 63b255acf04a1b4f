"""A training step never asks the device for a value but once, at its end: until then the host only hands out work.

It runs here on fake tensors, which have shapes and no values: whatever needs one (`.item()`, `.tolist()`, `nonzero`, a
boolean index) raises. What CUDA computes with is set by name, since no device is needed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_experts import make_case
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moelet import step
from moelet.data import Batch
from moelet.hparams import make_hparams
from moelet.kernels.sorted_rows import pad_blocks, sort_by_expert
from moelet.state import Training, build
from moelet.step import train_step
from moelet.tokenizer import Tokenizer

CPU = torch.device("cpu")
WAITS = (DataDependentOutputException, DynamicOutputShapeException)
MODERN = {"positions": "rope", "qk_norm": True, "shared_expert": 16, "selection_bias": True, "smear": True}
MODERN |= {"embed_norm": True, "embed_residual": True, "value_residual": True}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HostValues(TorchDispatchMode):
    """Counts the tensors made of the host's numbers (`torch.tensor`, `new_tensor`): copies that CUDA waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def what_fake_tensors_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a fake mode even the host's own tensors can't be read, and a module can't be moved, not even to the CPU."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    monkeypatch.setattr(step, "_targets", lambda micro_batches: np.full(72 * len(micro_batches), 5))
    monkeypatch.setattr(step, "_routed_tokens", lambda micro_batches: 72 * len(micro_batches))


@pytest.fixture
def fake() -> Iterator[HostValues]:
    """Within it all tensors are fake."""
    with FakeTensorMode(allow_non_fake_inputs=True), HostValues() as values:
        yield values


def make_training(tokenizer: Tokenizer, precision: str, **changes: object) -> Training:
    shape = {"max_length": 24, "d_model": 32, "d_embed": 16, "n_layers": 2, "n_heads": 4, "d_ff": 64, "dropout": 0.0}
    model = shape | {"attention": "sdpa", "experts": "batched"} | changes
    settings: dict[str, Any] = {"model": model, "train": {"train_steps": 9, "device": "cpu", "precision": "fp32"}}
    if "selection_bias" in changes:
        settings |= {"optim": {"optimizer": "muon"}, "balance": {"bias_rate": 0.1, "z_loss": 0.1}}
    training = build(make_hparams(settings), tokenizer)
    training.dtype = FORMATS[precision]
    training.scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
    return training


def batches(number: int, segments: bool) -> list[Batch]:
    """Return real batches, as the data pipeline makes them."""
    ids = torch.full((3, 24), 5)
    return [Batch(ids, ids, torch.ones_like(ids) if segments else None)] * number


@pytest.mark.parametrize(
    ("precision", "changes", "micro_steps", "segments"),
    [
        ("fp32", {}, 1, False),
        ("bf16", {}, 2, True),
        ("fp16", {}, 2, True),
        ("fp16", {"activation": "swiglu"}, 1, True),
        ("fp16", {"n_experts": 1, "top_k": 1}, 2, False),
        ("bf16", MODERN, 2, True),
    ],
)
def test_a_step_waits_once(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Tokenizer,
    precision: str,
    changes: dict[str, object],
    micro_steps: int,
    segments: bool,
) -> None:
    transfers: list[int] = []

    def to_host(*tensors: Tensor) -> list[Any]:
        transfers.append(len(tensors))
        return [1.0 if tensor.ndim == 0 else [[]] * len(tensor) for tensor in tensors]

    monkeypatch.setattr(step, "_to_host", to_host)
    micro_batches = batches(micro_steps, segments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        training = make_training(tokenizer, precision, **changes)
        train_step(training, micro_batches)  # the optimizer's state is made in the first
        with HostValues() as values:
            train_step(training, micro_batches)
    assert values.count == 0
    assert len(transfers) == 2
    assert training.step == 2 and training.tokens == 2 * micro_steps * 3 * 24


def test_the_transfer_is_the_wait(fake: HostValues, tokenizer: Tokenizer) -> None:
    with pytest.raises(WAITS):
        train_step(make_training(tokenizer, "fp32"), batches(1, False))


def test_a_backend_that_waits_is_seen(fake: HostValues, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_to_host", lambda *tensors: pytest.fail("came this far"))
    with pytest.raises(WAITS):
        train_step(make_training(tokenizer, "fp32", experts="grouped"), batches(1, False))


def test_a_copied_number_is_seen(fake: HostValues) -> None:
    torch.ones(3).new_tensor(2.0)
    assert fake.count == 1


@pytest.mark.parametrize("block_rows", [1, 4, 16])
@pytest.mark.parametrize("number", range(8))
def test_blocks_hold_the_rows_of_their_expert(number: int, block_rows: int) -> None:
    """Every choice stands in exactly one row, in a block of its expert; the shapes are those of any routing."""
    case = make_case(number)
    n_experts, (n_tokens, top_k) = len(case.w_in), case.ids.shape
    rows = sort_by_expert(case.ids, n_experts, block_rows)
    n_blocks = -(-n_tokens * top_k // block_rows) + n_experts if n_tokens else 0
    assert rows.block_expert.shape == rows.block_row.shape == (n_blocks,)
    expert_N = case.ids.flatten()[rows.choice_N]
    assert expert_N.tolist() == sorted(expert_N.tolist())
    assert rows.choice_N[rows.slot_TK.flatten()].tolist() == list(range(n_tokens * top_k))
    covered = []
    for expert, first in zip(rows.block_expert.tolist(), rows.block_row.tolist(), strict=True):
        if expert < n_experts:
            covered += range(first, min(first + block_rows, int(rows.bounds[expert + 1])))
            assert expert_N[covered[-1]] == expert
    assert covered == list(range(n_tokens * top_k))

    padded = pad_blocks(rows, block_rows)
    real = padded.choice_N < n_tokens * top_k
    assert len(padded.choice_N) == n_blocks * block_rows and int(real.sum()) == n_tokens * top_k
    assert padded.choice_N[padded.slot_TK.flatten()].tolist() == list(range(n_tokens * top_k))
    block_expert = padded.block_expert.repeat_interleave(block_rows)
    assert torch.equal(block_expert[real].long(), case.ids.flatten()[padded.choice_N[real]])
    assert torch.equal(padded.token_N[real], padded.choice_N[real] // top_k)
