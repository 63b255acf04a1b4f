"""Where the time of our own training step goes, by torch's profiler, with nothing added to the model's code.

Hooks on modules mark the forward pass; an operation of the backward pass belongs where the forward operation with its
autograd sequence number does. So a custom autograd.Function counts as well, also one that calls C and shows no
operations of its own. The step's own parts are found by their order: before the model, behind it, after backward.
"""

import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moelet.data import START, Batch, training_batches, training_texts
from moelet.hparams import Hparams
from moelet.modelling import GPT, Attention
from moelet.moe import Experts, FeedForward, MoE
from moelet.sections import DataSettings
from moelet.state import Training
from moelet.step import train_step
from moelet.tokenizer import Tokenizer

PARTS = ("attention", "router + dispatch", "experts", "head + loss", "optimizer", "data", "other")
PART_OF: dict[type[nn.Module], str] = {
    GPT: "other",  # embeddings, norms, residuals, their dropout
    Attention: "attention",
    MoE: "router + dispatch",
    Experts: "experts",
    FeedForward: "experts",
}
# operations inside of Experts that bring rows to experts and back
DISPATCH = re.compile("dispatch|combine|gather|scatter|index|sort|bincount", re.IGNORECASE)
MARK = "moelet: "
BACKWARD = "autograd::engine::evaluate_function: "
OPTIMIZER = "Optimizer."  # what torch calls its own mark around step and zero_grad
STEPS = 3
DATA_SECONDS, DATA_WINDOW = 1.0, 256  # pieces: a small window costs as much a token as a large one
DATA_VOCABULARY, DATA_SAMPLE = 4096, 1_000_000


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Have the profiler see where the forward pass of each module in PART_OF begins and ends."""
    open_marks: list[record_function] = []
    handles = []

    def enter(module: nn.Module, inputs: Any) -> None:
        open_marks.append(record_function(MARK + PART_OF[type(module)]))
        open_marks[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    for module in model.modules():
        if type(module) in PART_OF:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_part(name: str, inherited: str) -> str:
    """Return the part of an operation called `name` within something of the part `inherited`."""
    if name.startswith(MARK):
        return name.removeprefix(MARK)
    return "router + dispatch" if inherited == "experts" and DISPATCH.search(name) else inherited


def microseconds(event: Any, on_device: bool) -> float:
    """Return the time of the event itself, without those inside it: of its kernels, or of the processor."""
    if not on_device:
        return event.self_cpu_time_total
    return 0.0 if event.name.startswith(MARK) else sum(kernel.duration for kernel in event.kernels)


def attribute(events: Sequence[Any], on_device: bool) -> dict[str, float]:
    """Return the microseconds of each part, given the profiler's events of one step."""
    roots = sorted((e for e in events if e.cpu_parent is None and _on_processor(e)), key=lambda e: e.time_range.start)
    model = next(e.time_range for e in roots if e.name == MARK + PART_OF[GPT])
    backwards = [e for e in roots if e.name.startswith(BACKWARD)]
    # the node of the loss was made last; nodes run before it are the balance loss's own small gradient
    first = max(backwards, key=lambda e: e.sequence_nr).time_range.start
    last = backwards[-1].time_range.end
    updated = max((e.time_range.end for e in roots if e.name.startswith(OPTIMIZER)), default=last)
    taken = dict.fromkeys(PARTS, 0.0)
    part_of_node: dict[int, str] = {}

    def walk(event: Any, inherited: str) -> str:
        part = own_part(event.name, inherited)
        taken[part] += microseconds(event, on_device)
        if event.sequence_nr >= 0 and event.time_range.start < first:
            part_of_node[event.sequence_nr] = part  # of those that carry a number the last one made the node
        for child in sorted(event.cpu_children, key=lambda e: e.time_range.start):
            walk(child, part)
        return part

    def stage(time: float) -> str:
        if time < model.start:
            return "data"
        if time < first:
            return "other" if time < model.end else "head + loss"
        return "optimizer" if last <= time <= updated else "other"

    part = "other"
    for event in roots:
        if not event.name.startswith(BACKWARD) or event.time_range.start < first:
            walk(event, stage(event.time_range.start))
        else:  # a leaf's gradient is added right after the node that made it, and carries no number
            part = walk(event, part_of_node.get(event.sequence_nr, "other") if event.sequence_nr >= 0 else part)
    return taken


def _on_processor(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


def data_seconds(hparams: Hparams) -> float:
    """Return the processor seconds of making one batch: reading, cutting, encoding, packing, of the embedded text.

    Training makes batches in threads beside the step, so this is what they take from it at most. The small tokenizer
    encodes as fast as a large one.
    """
    data = DataSettings(shuffle_window=DATA_WINDOW)
    tokenizer = Tokenizer.train(training_texts(data, 0), DATA_VOCABULARY, sample_bytes=DATA_SAMPLE)
    made = training_batches(data, tokenizer, hparams.model.max_length, [hparams.batch_size], 0, START)
    began, used, count = time.perf_counter(), time.process_time(), 0
    while count == 0 or time.perf_counter() - began < DATA_SECONDS:
        next(made)
        count += 1
    return (time.process_time() - used) / count


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the lines from the terminal that the profiler's C++ side writes whenever it starts and stops."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def timed(training: Training, batch: Batch) -> float:
    """Return the seconds of one step."""
    began = time.perf_counter()
    train_step(training, [batch])
    if training.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def breakdown(training: Training, batches: Iterator[Batch]) -> dict[str, Any]:
    """Return milliseconds of each part of a step, means of STEPS; they sum to `profiled_ms`.

    `step_ms` is the median step without the profiler, whose own time is in `profiled_ms`. `other` is embeddings,
    norms, residuals with their dropout, and all that the profiler shows no operation for. On CUDA the parts are the
    time of kernels, and `other` also holds the waiting of the device.
    """
    timed(training, next(batches))
    steps = [timed(training, next(batches)) for _ in range(STEPS)]
    on_device = training.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    parts, wall = dict.fromkeys(PARTS, 0.0), 0.0
    for _ in range(STEPS):
        with marked(training.model), _silence(), profile(activities=activities) as profiler:
            wall += timed(training, next(batches)) * 1e3 / STEPS
        for part, taken in attribute(profiler.events(), on_device).items():
            parts[part] += taken / 1e3 / STEPS
    data = data_seconds(training.hparams) * 1e3
    parts["other"] += wall - sum(parts.values())
    parts["data"] += data
    return {"parts_ms": parts, "profiled_ms": wall + data, "step_ms": statistics.median(steps) * 1e3 + data}
