"""The first moments of a run, in a process of its own that leaves nothing behind: how fast it is, how much it takes.

It does what `moelet.train` does, in the same order, on the run's own text where that is at hand and on the embedded
text where it isn't. Weights don't move: a learning rate that is too high would end the measurement, not only its run.
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelet.console import Progress
from moelet.data import PREFETCH_BATCHES, START, Batch, read_validation, training_batches
from moelet.errors import UserError
from moelet.fit import find_batch_size
from moelet.foresee.patient import Patient
from moelet.foresee.tally import Tally
from moelet.hparams import Hparams, make_hparams
from moelet.metrics import append_metrics, matrix_rate, peak_memory_mb
from moelet.precision import choose_device
from moelet.report import write_loss_curve, write_report
from moelet.session import metrics_row
from moelet.speed.contest import SideFailed, alone
from moelet.speed.peers import AnyIds, Workload, zipf_batches
from moelet.state import Training, build, snapshot
from moelet.step import StepReport, train_step
from moelet.storage.checkpoint import HPARAMS, serialised
from moelet.text.prefetch import Prefetch
from moelet.tokenizer import Tokenizer
from moelet.train import begin_run, make_tokenizer

LEAST_STEPS = 2  # timed of each size, however long they take
WHOLE = 4  # micro-steps: a step of more is measured by steps of two sizes,
TWO_SIZES = (2, 4)  # in turn, and the line through them
AT_HAND = ("embedded", "files", "prepared")  # sources that need no network
MIB = 2**20

WATCHED = """
import sys, torch
from moelet.cli import main
from moelet.metrics import peak_memory_mb
assert main(sys.argv[1:]) == 0
print(f"\\n{peak_memory_mb(torch.device('cpu'))}")
"""

Batches = Iterator[Batch]


class Rehearsed(NamedTuple):
    """What was found. Memory is in MB of 2^20 bytes."""

    batch_size: int  # sequences a micro-step
    tokens_per_second: float  # of the median step
    slowest: float  # of single steps, but for the lowest and the highest tenth
    fastest: float
    seconds: float  # of the timed steps
    steps: int  # timed
    text: str  # what was read
    peak_mb: float
    parts_mb: dict[str, float]  # which add up to the peak


def rehearse(hparams: Hparams, vocab_size: int, seconds: float) -> Rehearsed:
    """Return what the run's first steps are like on this machine, after `seconds` of them.

    Raises UserError where they can't be made.
    """
    try:
        return alone(_rehearse, hparams.model_dump(mode="json"), vocab_size, seconds)
    except SideFailed:
        raise UserError(
            "the process that made the first steps was killed: most likely they need more memory than this machine "
            "has. Lower train.batch_size or model.d_model, or give --seconds 0 to plan without trying."
        ) from None


def _rehearse(settings: dict[str, Any], vocab_size: int, seconds: float) -> Rehearsed:
    cpu, hparams = torch.device("cpu"), make_hparams(settings)
    device, marks = choose_device(hparams.train.device), [peak_memory_mb(cpu)]
    tokenizer, hparams, text = _text(hparams, vocab_size)
    hparams = _sized(hparams, tokenizer)
    marks.append(peak_memory_mb(cpu))
    training = build(hparams, tokenizer)
    marks.append(peak_memory_mb(cpu))
    for group in training.optimizer.param_groups:
        group["lr_scale"] = 0.0
    whole = len(hparams.micro_batches)
    counts = TWO_SIZES if whole > WHOLE else (whole,)
    sizes = [hparams.batch_size] if whole > WHOLE else hparams.micro_batches
    with _batches(hparams, tokenizer, sizes) as batches:
        _step(training, batches, counts[-1])  # it allocates, and builds kernels
        began, made = time.perf_counter(), list[list[tuple[float, int]]]()
        while time.perf_counter() - began < seconds or len(made) < LEAST_STEPS:
            made.append([_step(training, batches, count) for count in counts])
        took = time.perf_counter() - began
        serialised(snapshot(training, {}))  # a checkpoint, and one more step, with what that leaves of the heap
        _report(training, train_step(training, list(itertools.islice(batches, counts[-1]))))
        peak = peak_memory_mb(device)
        with Tally(_held(training)) as tally:  # last: what counts a step's tensors leaves gaps in the heap
            _step(training, batches, counts[-1])
    rates = sorted(_rate(steps, counts, whole) for steps in made)
    edge = len(rates) // 10
    parts = _parts(training, tally, peak, marks if device.type == "cpu" else [0.0, 0.0, 0.0])
    size, median = hparams.batch_size, statistics.median(rates)
    n_steps = len(made) * len(counts)
    return Rehearsed(size, median, rates[edge], rates[-1 - edge], took, n_steps, text, peak, parts)


def _text(hparams: Hparams, vocab_size: int) -> tuple[Tokenizer, Hparams, str]:
    """Return a tokenizer of the planned size, the settings with text that is at hand, and in words what that is."""
    embedded = hparams.data.model_copy(update={"source": "embedded", "mix": None})
    ways = [hparams.data] if hparams.data.source in AT_HAND else []
    for data in [*ways, embedded]:
        tried = hparams.model_copy(update={"data": data})
        try:
            tokenizer = make_tokenizer(tried)
            if (hparams.model.vocab_size or tokenizer.vocab_size) == vocab_size:
                return tokenizer, tried, "the run's own text" if data is hparams.data else "the embedded text"
        except UserError:  # the text isn't there, or it is too small for so many pieces
            continue
    return AnyIds(vocab_size), hparams, "ids drawn as frequent as text's"


def _sized(hparams: Hparams, tokenizer: Tokenizer) -> Hparams:
    """Return the settings with `train.batch_size` "auto" replaced by what fits."""
    if hparams.train.global_batch_size is None:
        return hparams
    if isinstance(tokenizer, AnyIds) and hparams.train.batch_size == "auto":
        raise UserError(
            'train.batch_size is "auto", and there is no text at hand to make the tokenizer of, which the search for a '
            "size needs. Set train.batch_size to a number, or tokenizer.file."
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        if not isinstance(tokenizer, AnyIds):
            tokenizer.save(file)
        return find_batch_size(hparams, tokenizer, file, Progress())


@contextmanager
def _batches(hparams: Hparams, tokenizer: Tokenizer, sizes: Sequence[int]) -> Iterator[Batches]:
    """Give batches as training gets them: made in a thread beside it, with the held-out text in memory."""
    length, data = hparams.model.max_length, hparams.data
    matrix_rate(choose_device(hparams.train.device), torch.float32)
    if isinstance(tokenizer, AnyIds):
        drawn = zipf_batches(Workload(hparams, tokenizer.vocab_size))
        yield (batch._replace(input_ids=batch.input_ids[:n], labels=batch.labels[:n])
               for batch, n in zip(drawn, itertools.cycle(sizes), strict=False))  # fmt: skip
        return
    held_out = read_validation(data, tokenizer, length, hparams.batch_size, hparams.train.eval_tokens, "validation")
    stream = training_batches(data, tokenizer, length, sizes, hparams.train.seed, START)
    with Prefetch(stream, PREFETCH_BATCHES) as ahead:
        yield (next(ahead)[0] for _ in itertools.count())
    del held_out


def _step(training: Training, batches: Batches, count: int) -> tuple[float, int]:
    """Make a step of so many micro-batches; return its seconds, waiting for data included, and its tokens."""
    began = time.perf_counter()
    tokens = train_step(training, list(itertools.islice(batches, count))).tokens
    return time.perf_counter() - began, tokens


def _report(training: Training, last: StepReport) -> None:
    """Draw the run's pictures and page, as its process does at its end, of lines like the last step's."""
    training.seconds += 1.0
    with tempfile.TemporaryDirectory() as place:
        run = Path(place)
        (run / HPARAMS).write_text(training.hparams.to_json())
        for _ in range(2):
            training.step += 1
            append_metrics(run, metrics_row(training, last, (0, 0.0), 1.0) | {"elapsed": 1.0})
        write_loss_curve(run)
        write_report(run)


def _rate(steps: Sequence[tuple[float, int]], counts: Sequence[int], whole: int) -> float:
    """Return the tokens a second of a whole step, given one step of each count of micro-batches."""
    (seconds, tokens), count = steps[-1], counts[-1]
    if len(steps) > 1:  # the optimizer's part stays what it is, the rest grows in proportion
        seconds += (whole - count) * (seconds - steps[0][0]) / (count - counts[0])
    return tokens * whole / count / seconds


def _held(training: Training) -> list[Tensor]:
    """Return the weights and what the optimizer keeps."""
    kept = [item for entry in training.optimizer.state.values() for item in entry.values() if isinstance(item, Tensor)]
    return [*training.model.parameters(), *kept]


def _parts(training: Training, tally: Tally, peak: float, marks: Sequence[float]) -> dict[str, float]:
    """Return what the peak is made of, in MB; `marks` are the peaks after imports, after the text, after building."""
    weights = sum(parameter.numel() * parameter.dtype.itemsize for parameter in training.model.parameters()) / MIB
    optimizer = sum(tensor.numel() * tensor.dtype.itemsize for tensor in _held(training)) / MIB - weights
    started, read, built = marks
    parts = {
        "weights": weights,
        "optimizer": optimizer,
        "gradients": tally.gradients / MIB,
        "activations and work space": (tally.peak - tally.gradients) / MIB - weights - optimizer,
    }
    if built:
        parts["Python and torch"] = started + max(0.0, built - read - weights)
        parts["text and tokenizer"] = read - started
        parts["a checkpoint, while it is written"] = weights + optimizer
    for name in ("a checkpoint, while it is written", "text and tokenizer"):
        # what was free again by the time of the peak was used once more, and counts once
        over = max(0.0, sum(parts.values()) - peak)
        if name in parts:
            parts[name] = max(0.0, parts[name] - over)
    return {**parts, "buffers, the report, gaps in the heap": peak - sum(parts.values())}


def least_decoding(hparams: Hparams) -> float:
    """Return the MB that a process of `moelet generate` takes at its most with a model of next to no size."""
    training = Patient(hparams).training(train={"device": "cpu"})
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with tempfile.TemporaryDirectory() as place:
        begin_run(Path(place) / "run", training)
        command = [sys.executable, "-c", WATCHED, "generate", f"{place}/run", "--prompt", "def", "--tokens", "8"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return float(done.stdout.rsplit("\n", 2)[-2])
