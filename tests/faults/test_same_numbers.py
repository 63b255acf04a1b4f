"""The same run in new processes, and the places that could make it another."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU_BACKENDS, TinySettings
from processes import digests, rows
from scorecard import Trials
from test_modern import EVERYTHING

from moelet.data import Batch, collate
from moelet.hparams import make_hparams
from moelet.moe import MoE
from moelet.sections import ModelSettings
from moelet.state import build
from moelet.step import train_step
from moelet.tokenizer import Tokenizer

PACKAGE = Path(__file__).parents[2] / "moelet"
# what adds or writes floats at places that may repeat: in an order that a GPU does not promise
SCATTERS = {
    "index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_put",
    "index_put_", "put_", "index_reduce", "index_reduce_", "segment_reduce",
}  # fmt: skip
ALLOWED = {
    ("loss.py", "scatter_add_"): "one label a row, so no place comes twice",
    ("naive.py", "index_add"): "the plain network that speed is compared with, no part of training",
}
# one process imports, and forks for each run before anything was computed
FORKS = """
import os, sys
from pathlib import Path
import torch._dynamo  # which optimizers import: once for all
from moelet import console, hparams, metrics, train
metrics.RATE_SECONDS, metrics.RATE_SIZE["cpu"] = 0.0, 8
os.fsync = lambda handle: None
for run in sys.argv[2:]:
    if (pid := os.fork()) == 0:
        train.start(hparams.read_hparams(sys.argv[1]), Path(run), console.Progress())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, run
"""


MODES: list[dict[str, Any]] = [
    {},
    {"train": {"precision": "fp16", "gradient_accumulation": 3}},
    {"model": EVERYTHING, "optim": {"optimizer": "muon"}, "balance": {"bias_rate": 0.01, "z_loss": 1e-3}},
    {"data": {"mask_documents": True, "piece_chars": 64}, "model": {"experts": "batched"}},
]


@pytest.mark.check(24)
def test_the_same_settings_in_three_processes(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Every loss is equal to the last bit, and so is every weight and every number of the optimizer."""
    tokenizer.save(tmp_path / "given.model")
    variables = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    for mode in range(trials.count(small=1, full=len(MODES))):
        settings = tiny_settings(**MODES[mode])
        settings["tokenizer"]["file"] = str(tmp_path / "given.model")
        settings["train"] |= {"train_steps": trials.count(small=10, full=50), "seed": mode}
        (tmp_path / f"{mode}.json").write_text(json.dumps(settings))
        runs = [tmp_path / f"run-{mode}-{process}" for process in range(3)]
        command = [sys.executable, "-c", FORKS, tmp_path / f"{mode}.json", *runs]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        for run in runs:
            with trials.one(f"{MODES[mode]}, {run.name}"):
                assert done.returncode == 0, done.stderr[-300:]
                found, expected = rows(run), rows(runs[0])
                assert len(found) == settings["train"]["train_steps"]
                assert [row["loss"].hex() for row in found] == [row["loss"].hex() for row in expected]
                assert found == expected and digests(run) == digests(runs[0])


@pytest.mark.check(24)
def test_scores_that_are_equal(trials: Trials) -> None:
    """The lowest id is taken, on every way to compute the layer, biased or not."""
    for index in range(trials.count(small=10, full=100)):
        draw, n_experts = trials.random, trials.random.randint(2, 40)
        backend, width = CPU_BACKENDS[index % len(CPU_BACKENDS)], [32, 20][index % 2]  # for the kernel, for torch
        top_k = draw.randint(1, n_experts)
        settings = ModelSettings(
            d_model=width, n_heads=1, d_ff=n_experts * 32, n_experts=n_experts, top_k=top_k, experts=backend,
            selection_bias=True,
        )  # fmt: skip
        gate = MoE(settings).gate
        with trials.one(f"{index}: {backend}, {top_k} of {n_experts}"), torch.no_grad():
            kinds = torch.tensor([draw.randrange(3) for _ in range(n_experts)])
            gate.weight.copy_(torch.tensor([-1.0, 0.0, 1.0])[kinds][:, None] / 4)
            assert gate.bias is not None
            gate.bias.copy_(torch.tensor([draw.choice([0.0, 0.0, 8.0]) for _ in range(n_experts)]))
            x = torch.tensor([draw.choice([-1.0, 1.0, 0.0]) for _ in range(9)])[:, None].expand(9, width).contiguous()
            ids, _, _ = gate(x, None)
            for scores, chosen in zip((x @ gate.weight.T + gate.bias).tolist(), ids.tolist(), strict=True):
                want = sorted(range(n_experts), key=lambda e: (-scores[e], e))[:top_k]
                assert chosen == want


def scatters(source: str) -> set[str]:
    """Return which of SCATTERS a source calls, or hands on."""
    return {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)} & SCATTERS


@pytest.mark.check(24)
def test_adding_at_places_that_repeat(trials: Trials) -> None:
    """Nothing in the package does that with floats; what could is named with its reason."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    for path in files:
        with trials.one(str(path)):
            for name in scatters(path.read_text(encoding="utf-8")):
                assert (path.name, name) in ALLOWED, f"{name} adds in any order: gather and sum instead"
    assert scatters("y.index_add_(0, i, x)") and not scatters("y.index_select(0, i)")


@pytest.mark.check(24)
def test_algorithms_that_must_be_deterministic(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer
) -> None:
    """Training runs where torch refuses all others, with the shapes that a GPU gets too, and fresh memory holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    for index in range(trials.count(small=2, full=8)):
        model = (EVERYTHING if index % 4 > 1 else {}) | {"experts": ["batched", "auto"][index % 2]}
        balance = {"bias_rate": 0.01} if index % 4 > 1 else {}
        settings = tiny_settings(model=model, balance=balance, train={"checkpoint_activations": index >= 4})
        with trials.one(json.dumps(model)):
            assert check_deterministic(settings, tokenizer, True) == check_deterministic(settings, tokenizer, False)
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


def check_deterministic(settings: dict[str, Any], tokenizer: Tokenizer, only: bool, device: str = "cpu") -> list[str]:
    """Return the losses of a few steps in hexadecimal, made with deterministic algorithms only or with any."""
    settings["train"]["device"] = device
    batch = some_batch(tokenizer)
    torch.use_deterministic_algorithms(only)
    torch.utils.deterministic.fill_uninitialized_memory = only
    try:
        training = build(make_hparams(settings), tokenizer)
        return [train_step(training, [batch, batch]).loss.hex() for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def some_batch(tokenizer: Tokenizer) -> Batch:
    ids = torch.randint(4, tokenizer.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    ids[1, 20:] = tokenizer.pad_id
    ids[2, 9] = tokenizer.bos_id
    return collate([row.numpy() for row in ids], True)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", ["batched", "auto"])
def test_a_card_makes_the_same_bits(
    experts: str, tiny_settings: TinySettings, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings = tiny_settings(model={"experts": experts})
    found = [check_deterministic(settings, tokenizer, only, "cuda") for only in (True, True, False)]
    assert found[0] == found[1] == found[2]
