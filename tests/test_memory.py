"""Memory of a training step, counted on paper: every tensor alive, at the reference job's size, without computing."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moelet.foresee.tally import Tally
from moelet.kernels import native
from moelet.kernels.sorted_rows import fair_shares
from moelet.loss import linear_cross_entropy
from moelet.modelling import GPT
from moelet.optim import adamw
from moelet.sections import ModelSettings, OptimSettings

GIB = 2**30


def full_logits(h_TR: Tensor, table_VR: Tensor, labels_T: Tensor) -> Tensor:
    """The usual way: all T x V logits, then the cross-entropy in float32."""
    return F.cross_entropy((h_TR @ table_VR.T).float(), labels_T, reduction="sum")


def peak_of_steps(
    settings: ModelSettings, vocab_size: int, batch: int, dtype: torch.dtype, loss: Callable, again: bool = False
) -> int:
    """Return the peak of two optimizer steps, so that the second has Adam's moments beside the activations.

    With `again`, layers are computed again in backward.
    """
    model = GPT(settings, vocab_size)
    model.checkpoint_activations = again
    optimizer = adamw(model, OptimSettings())
    ids = torch.zeros(batch, settings.max_length, dtype=torch.int64)
    with Tally(model.parameters()) as counted:
        for _ in range(2):
            with torch.autocast("cpu", dtype):
                output = model(ids)
                total = loss(model.features(output.hidden).flatten(0, 1), model.table, ids.flatten())
                loss_value = total / ids.numel() + sum(stats.probability.sum() for stats in output.router)
            loss_value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del output, total, loss_value
    return counted.peak


@pytest.fixture
def even_load() -> Iterator[None]:
    with fair_shares():
        yield


def test_counting_fakes_equals_counting_real_tensors(even_load: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda dtype: "what C allocates can't be counted")
    settings = ModelSettings(max_length=64, d_model=64, d_embed=32, n_layers=2, d_ff=128, n_heads=4)
    real = peak_of_steps(settings, 500, 3, torch.bfloat16, linear_cross_entropy)
    with FakeTensorMode():
        assert peak_of_steps(settings, 500, 3, torch.bfloat16, linear_cross_entropy) == pytest.approx(real, rel=0.02)


def test_the_reference_job_fits_a_t4(even_load: None) -> None:
    """Batch 30 x 512 with a vocabulary of 100,000 in fp16: under 13 GB of the card's 16; with full logits it isn't."""
    with FakeTensorMode():
        chunked = peak_of_steps(ModelSettings(), 100_000, 30, torch.float16, linear_cross_entropy)
        full = peak_of_steps(ModelSettings(), 100_000, 30, torch.float16, full_logits)
    print(f"peak of a step at 30 x 512, V = 100,000: {chunked / GIB:.2f} GiB; with full logits {full / GIB:.2f} GiB")
    assert chunked <= 13e9
    assert full > 13e9


def test_checkpointing_keeps_what_enters_a_layer_alone(even_load: None) -> None:
    """The memory that a row adds falls from that of all layers to that of one: to less than 0.35 with six layers."""
    settings = ModelSettings(n_layers=6)
    with FakeTensorMode():
        (few, few_again), (many, many_again) = (
            [
                peak_of_steps(settings, 32_000, rows, torch.float16, linear_cross_entropy, again)
                for again in (False, True)
            ]
            for rows in (8, 16)
        )
    print(f"peak at 16 x 512, V = 32,000: {many / GIB:.2f} GiB; with layers computed again {many_again / GIB:.2f} GiB")
    assert many_again - few_again < 0.35 * (many - few)
    assert many_again < 0.4 * many
