"""Faults put into a run in this process: numbers that aren't finite, memory that runs out, at a chosen place and batch.

A batch of the run is numbered by `step + skipped_steps`, counted from 0, so that one passed over doesn't come again.
"""

import gc
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moelet import cli, metrics, state
from moelet.parallel import orders
from moelet.state import Training

POISONS = (math.nan, math.inf, -math.inf)


class Said(NamedTuple):
    code: int
    text: str


def number(training: Training) -> int:
    return training.step + training.skipped_steps


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs begin without measuring the machine, don't wait for the disk, and end without a report."""
    gc.freeze()  # half a second for each collection else, of torch's modules
    monkeypatch.setattr(metrics, "RATE_SECONDS", 0.0)
    monkeypatch.setitem(metrics.RATE_SIZE, "cpu", 8)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(cli, "_train_and_report", lambda run, progress, work: work())


def infect(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Training], None]) -> None:
    """Have `fault` at every run that is built from here on."""

    def build(*arguments: Any) -> Training:
        training = state.build(*arguments)
        fault(training)
        return training

    monkeypatch.setattr(orders, "build", build)


def moelet(capsys: pytest.CaptureFixture[str], *arguments: object) -> Said:
    """Run a command in this process; return its exit code and all it said."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Said(code, captured.out + captured.err)


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(json.dumps(settings))
    return path


def places(model: nn.Module) -> list[str]:
    """Return the names of the modules whose output can be poisoned, in the order of the network."""
    kinds = ("embed", "self_attn", "q_proj", "o_proj", "mlp", "gate", "experts")
    return [name for name, _ in model.named_modules() if name.split(".")[-1] in kinds]


def poison_first(output: Any, value: float) -> Any:
    """Return a module's output with one number of its first floating tensor changed."""
    done = False

    def change(leaf: Any) -> Any:
        nonlocal done
        if done or not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
            return leaf
        done = True
        changed = leaf.clone()
        changed.view(-1)[leaf.numel() // 2] = value
        return changed

    return tree_map(change, output)


def poison_activation(place: str, value: float, at: int) -> Callable[[Training], None]:
    def fault(training: Training) -> None:
        def hook(module: nn.Module, given: Any, output: Any) -> Any:
            return poison_first(output, value) if training.model.training and number(training) == at else None

        training.model.get_submodule(place).register_forward_hook(hook)

    return fault


def poison_gradient(parameter: str, value: float, at: int) -> Callable[[Training], None]:
    def fault(training: Training) -> None:
        def hook(gradient: Tensor) -> Tensor | None:
            if number(training) != at:
                return None
            changed = gradient.clone()
            changed.view(-1)[gradient.numel() // 3] = value
            return changed

        dict(training.model.named_parameters())[parameter].register_hook(hook)

    return fault


def run_out_of_memory(
    place: str, backward: bool, fits: int, at: int, raise_it: Callable[[], None]
) -> Callable[[Training], None]:
    """From batch `at` on, more than `fits` rows don't fit: `raise_it` in the place's forward or backward pass."""

    def fault(training: Training) -> None:
        rows = 0

        def note(module: nn.Module, given: Any) -> None:
            nonlocal rows
            rows = len(given[0])

        def full() -> bool:
            return training.model.training and rows > fits and number(training) >= at

        def hook(module: nn.Module, given: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            grown = next((t for t in tensors if isinstance(t, Tensor) and t.requires_grad), None)
            if not backward and full():
                raise_it()
            if backward and grown is not None:
                grown.register_hook(lambda gradient: raise_it() if full() else None)

        training.model.register_forward_pre_hook(note)
        training.model.get_submodule(place).register_forward_hook(hook)

    return fault


def cuda_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_is_full() -> None:
    torch.empty(10**15)  # what torch itself says then


def python_is_full() -> None:
    raise MemoryError


SHORTAGES = (cuda_is_full, cpu_is_full, python_is_full)
