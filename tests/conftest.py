"""What several test files share: a small corpus, settings for a tiny run on it, a tokenizer for it."""

import argparse
import ast
import copy
import dataclasses
import inspect
import json
import os
import tarfile
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scorecard import (  # noqa: F401  hooks and a fixture, which pytest takes from here
    pytest_addoption,
    pytest_generate_tests,
    pytest_pyfunc_call,
    pytest_sessionfinish,
    pytest_terminal_summary,
    trials,
)

from moelet.attention import ATTENTION
from moelet.data import training_texts
from moelet.experts import BACKENDS
from moelet.hparams import Hparams, make_hparams
from moelet.kernels.native import why_not
from moelet.modelling import GPT
from moelet.storage import checkpoint
from moelet.tokenizer import Tokenizer

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of two workers on two cores would wait for one another
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and of what tests start

TinySettings = Callable[..., dict[str, Any]]
# without a C compiler everything is still tested but what it would build
HAVE_KERNELS = why_not(torch.float32) is None
needs_kernels = pytest.mark.skipif(not HAVE_KERNELS, reason=f"no kernels in C: {why_not(torch.float32)}")
# tests/test_kernels.py tests `triton`
CPU_BACKENDS = [name for name in BACKENDS if name != "triton" and (name != "fused" or HAVE_KERNELS)]
CPU_ATTENTION = [name for name in ATTENTION if name != "blocked" or HAVE_KERNELS]

TINY: dict[str, dict[str, Any]] = {
    "model": {
        "max_length": 32,
        "d_model": 32,
        "d_embed": 16,
        "n_layers": 2,
        "n_heads": 4,
        "d_ff": 64,
        "n_experts": 4,
        "top_k": 2,
        "dropout": 0.1,
    },
    "tokenizer": {"vocab_size": 400, "sample_bytes": 60_000},
    "data": {"source": "files", "shuffle_window": 64, "validation_fraction": 0.05},
    "optim": {"lr": 0.01, "min_lr": 0.001, "warmup_steps": 2},
    "train": {
        "device": "cpu",
        "precision": "fp32",
        "batch_size": 4,
        "train_steps": 6,
        "eval_tokens": 1000,
        "log_steps": 1,
        "sample_prompt": None,
    },
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about 400 KB of text: five .txt files and one .jsonl file of short rows."""
    folder = tmp_path_factory.mktemp("corpus")
    for module in (argparse, ast, dataclasses, textwrap, typing):
        (folder / f"{module.__name__}.txt").write_text(inspect.getsource(module), encoding="utf-8")
    functions = [value for value in vars(tarfile.TarFile).values() if inspect.isfunction(value)]
    rows = [json.dumps({"text": inspect.getsource(function)}) for function in functions]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_settings(corpus: Path) -> TinySettings:
    """`tiny_settings(train={"seed": 1}, ...)` returns the tiny run's settings with those of each section changed."""

    def make(**changes: dict[str, Any]) -> dict[str, Any]:
        settings = copy.deepcopy(TINY)
        settings["data"]["files"] = str(corpus)
        for section, values in changes.items():
            settings.setdefault(section, {}).update(values)
        return settings

    return make


def save_run(path: Path, hparams: Hparams, model: GPT, tokenizer: Tokenizer) -> Path:
    """Write the run folder of a model as it is, at step 3; return it."""
    identity = {"tokenizer": tokenizer.fingerprint, "model": hparams.model.fingerprint}
    checkpoint.save(path, checkpoint.Checkpoint(3, model.state_dict(), {}, {}, identity))
    (path / checkpoint.HPARAMS).write_text(hparams.to_json())
    tokenizer.save(path / checkpoint.TOKENIZER)
    return path


@pytest.fixture(scope="session")
def tokenizer(tiny_settings: TinySettings) -> Tokenizer:
    """The tokenizer that the tiny run trains."""
    hparams = make_hparams(tiny_settings())
    return Tokenizer.train(training_texts(hparams.data, 0), hparams.tokenizer.vocab_size, sample_bytes=60_000)


from serving import served  # noqa: E402, F401  a fixture too; serving takes what is above
