"""What `moelet plan` says of six shapes, against what is then counted and measured of them.

Prints Markdown tables. A shape's training goes on while its first steps are tried beside it, each in a process of its
own: whatever else the machine does slows both, and only steps of the same seconds are compared. From the repository's
root:

    PYTHONPATH=. python bench/plan.py [--rounds 3] [--seconds 20] [--out bench/results/plan.md]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moelet.foresee.plan import decoding_memory
from moelet.foresee.rehearsal import rehearse
from moelet.foresee.sizes import empty_model, files, flops, parameters
from moelet.hparams import Hparams, read_hparams
from moelet.kernels.sorted_rows import fair_shares
from moelet.loss import linear_cross_entropy
from moelet.modelling import GPT

SHAPES: dict[str, tuple[str, str]] = {  # the file, and changes to it
    "the default run, 4 x 512": ("hparams.json", ""),
    "recipes/cpu-tiny.json": ("recipes/cpu-tiny.json", ""),
    "recipes/modern-cpu.json, Muon": ("recipes/modern-cpu.json", ""),
    "dense, 4 x 384, float32": (
        "hparams.json",
        "model.d_model=384 model.n_heads=6 model.n_experts=1 model.top_k=1 model.d_ff=1536 train.precision=fp32 "
        "train.batch_size=8",
    ),
    "32 experts, 6 micro-steps": (
        "hparams.json",
        "model.d_model=256 model.n_heads=4 model.n_experts=32 model.d_ff=4096 model.max_length=256 "
        "train.gradient_accumulation=6",
    ),
    "context 1024, activations again": (
        "hparams.json",
        "model.d_model=256 model.n_heads=4 model.d_ff=1024 model.max_length=1024 model.n_layers=6 "
        "train.checkpoint_activations=true",
    ),
}
QUIET = ["train.log_steps=1", "train.eval_steps=null", "train.eval_tokens=16384", "train.checkpoint_steps=null"]
# VmHWM is what a process took at its most
WATCHED = """
import re, sys
from moelet.cli import main
code = main(sys.argv[1:])
print("PEAK", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""
AFTER = 2.0  # seconds that the tried process goes on after its timed steps, about
LONG = ["train.train_steps=1000000", "train.train_tokens=null", "train.sample_prompt=null"]


def begin(*arguments: object) -> subprocess.Popen[str]:
    """Start a `moelet` command that says at its end what its process took."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def peak(process: subprocess.Popen[str]) -> float:
    """Return the MB that the process took at its most, once it has ended."""
    said = process.communicate()[1]
    assert "PEAK" in said, said
    return int(said.rsplit("PEAK", 1)[1]) / 1024


def sets(changes: list[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's metrics so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def counted_flops(hparams: Hparams, vocab_size: int) -> float:
    """Return the FLOPs a token of forward and backward by torch's counter, on the plain path."""
    plain = hparams.model.model_copy(update={"attention": "explicit", "experts": "grouped"})
    with FakeTensorMode(), fair_shares():
        model, ids = GPT(plain, vocab_size), torch.zeros(1, plain.max_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            output = model(ids)
            loss = linear_cross_entropy(model.features(output.hidden).flatten(0, 1), model.table, ids.flatten())
            (loss + sum(stats.probability.sum() for stats in output.router)).backward()
    return counter.get_total_flops() / ids.numel()


def measure(shape: str, rounds: int, seconds: float, place: Path) -> dict[str, Any]:
    """Return what was said of a shape and what was found."""
    file, changes = SHAPES[shape][0], SHAPES[shape][1].split()
    hparams = read_hparams(file, [*changes, *QUIET, *LONG])
    vocab_size = hparams.tokenizer.vocab_size
    model, run = empty_model(hparams.model, vocab_size), place / "run"
    training, pairs, peaks = begin("train", file, "--run", run, *sets([*changes, *QUIET, *LONG])), [], []
    try:
        while len(rows_of(run)) < 3:
            assert training.poll() is None, training.communicate()[1]
            time.sleep(0.5)
        for _ in range(rounds):
            made = rehearse(hparams, vocab_size, seconds)
            rows = rows_of(run)
            together = [row for row in rows if row["elapsed"] > rows[-1]["elapsed"] - made.seconds - AFTER]
            pairs.append((made.tokens_per_second, statistics.median(row["tokens_per_second"] for row in together)))
            peaks.append(made.peak_mb)
            print(f"{shape}: {pairs[-1][0]:,.0f} said, {pairs[-1][1]:,.0f} measured", file=sys.stderr, flush=True)
    finally:
        training.terminate()  # it saves, and writes the report, as at its end
    trained = peak(training)
    decoded = peak(begin("generate", run, "--prompt", "def main(", "--tokens", 100))
    said = decoding_memory(hparams, model, None)["decoding_memory_mb"]
    sizes = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    shutil.rmtree(run)
    return {
        "shape": shape,
        "parameters": (parameters(hparams.model, model)["parameters"], count(GPT(hparams.model, vocab_size))),
        "flops": (flops(hparams.model, model)["flops_per_token_full_square"], counted_flops(hparams, vocab_size)),
        "disk": (files(hparams, model)["checkpoint"], sizes),
        "training": (statistics.median(peaks), trained),
        "decoding": (said, decoded),
        "rates": pairs,
    }


def count(model: GPT) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def off(said: float, found: float) -> str:
    return f"{said / found - 1:+.1%}"


def tables(results: list[dict[str, Any]]) -> str:
    lines = ["| shape | parameters: said, real | FLOPs a token: said, counted | off | checkpoint off |"]
    lines.append("|---|---|---|---|---|")
    for result in results:
        (said, real), (named, counted) = result["parameters"], result["flops"]
        lines.append(
            f"| {result['shape']} | {said:,}, {real:,} | {named / 1e6:.2f}M, {counted / 1e6:.2f}M | "
            f"{off(named, counted)} | {off(*result['disk'])} |"
        )
    lines += ["", "| shape | training, MB: said, measured | off | decoding, MB: said, measured | off |"]
    lines.append("|---|---|---|---|---|")
    for result in results:
        cells = (
            f"{said:,.0f}, {real:,.0f} | {off(said, real)}" for said, real in (result["training"], result["decoding"])
        )
        lines.append(f"| {result['shape']} | {' | '.join(cells)} |")
    lines += ["", "| shape | tokens/s said, round by round | measured beside it | off, median of rounds |"]
    lines.append("|---|---|---|---|")
    for result in results:
        said, measured = (", ".join(f"{rate:,.0f}" for rate in rates) for rates in zip(*result["rates"], strict=True))
        ratio = statistics.median(a / b for a, b in result["rates"])
        lines.append(f"| {result['shape']} | {said} | {measured} | {ratio - 1:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, help="write the tables here too")
    options = parser.parse_args()
    began, loads, results = time.monotonic(), [os.getloadavg()[0]], []
    with tempfile.TemporaryDirectory() as place:
        for shape in SHAPES:
            results.append(measure(shape, options.rounds, options.seconds, Path(place)))
            loads.append(os.getloadavg()[0])
            print(tables(results[-1:]), file=sys.stderr, flush=True)
    where = (
        f"{time.strftime('%d %B %Y')}, torch {torch.__version__}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} cores ({platform.machine()}), load between {min(loads):.1f} and {max(loads):.1f}, "
        f"{options.rounds} rounds of {options.seconds:g} s, {(time.monotonic() - began) / 60:.0f} minutes."
    )
    print(f"{tables(results)}\n\n{where}")
    if options.out:
        options.out.write_text(HEAD + f"{tables(results)}\n\n{where}\n", encoding="utf-8")


HEAD = """# What `moelet plan` says, against what is so

Made by `PYTHONPATH=. python bench/plan.py --out bench/results/plan.md`. Parameters are those of the model when it is
made, FLOPs those of torch's counter on the plain path (which counts all of attention's square), memory the most that
the process of `moelet train`, or of `moelet generate`, ever took (VmHWM), from its start to its end. For tokens/s the
run's first steps are tried beside a training of the same settings: both share the machine, so that the figures are
lower than either's alone, and medians of the same seconds are compared.

"""

if __name__ == "__main__":
    main()
