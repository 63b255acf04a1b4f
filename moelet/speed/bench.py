"""`moelet bench`: how fast we train and decode, against our dense twins, plain code, `transformers` and the machine.

What is compared is `peers`', how is `contest`'s, the machine's limits are `roofline`'s, where our
own step's time goes is `breakdown`'s; here they become one result.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moelet.console import Progress
from moelet.decoding import decodes, decoding_dtype
from moelet.errors import UserError, pick
from moelet.hparams import make_hparams, read_hparams
from moelet.precision import choose_device, choose_dtype
from moelet.sections import ModelSettings
from moelet.speed.breakdown import breakdown
from moelet.speed.contest import Contest, SideFailed, alone, run_contest
from moelet.speed.peers import (
    HF_LACKS,
    OWN,
    WEIGHTS,
    AnyIds,
    Workload,
    choose,
    choose_decoders,
    decode_precisions,
    precisions,
    zipf_batches,
)
from moelet.speed.roofline import decode_bound, higher, limits
from moelet.state import build
from moelet.tokenizer import Tokenizer

# the reference shape, where no settings file is given
REFERENCE = {"model": {"vocab_size": 32_000}, "train": {"train_steps": 10_000, "batch_size": 8}}
# which allocators the peers get: the system's, and the one that keeps freed memory, which we always have
ALLOCATORS = {"both": ("default", "kept"), "default": ("default",), "same": ("kept",)}


def _decoding_format(settings: ModelSettings, device: torch.device) -> str:
    """Return the name of the format in which `moelet generate` reads its weights."""
    in_c = device.type == "cpu" and decodes(settings)
    return "bf16" if in_c and decoding_dtype() == torch.bfloat16 else "fp32"


def workload_of(path: Path | None, batch_size: int | None) -> Workload:
    """Return the settings' shape, or the reference shape; accumulation is left out: a step is one batch.

    Raises UserError for settings that don't fit.
    """
    hparams = make_hparams(REFERENCE) if path is None else read_hparams(path)
    if batch_size is None and hparams.train.batch_size == "auto":
        raise UserError('train.batch_size is "auto". A comparison needs a size that all can take. Give --batch-size.')
    size = batch_size or hparams.batch_size
    train = hparams.train.model_copy(update={"batch_size": size, "gradient_accumulation": 1, "global_batch_size": None})
    hparams = hparams.model_copy(update={"train": train})
    pieces = hparams.tokenizer.vocab_size
    if hparams.model.vocab_size is None and hparams.tokenizer.file is not None:
        pieces = Tokenizer.load(hparams.tokenizer.file).vocab_size
    return Workload(hparams, hparams.model.vocab_size or pieces)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures were made on."""
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpuinfo.exists():
        models = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = None
    return {
        "device": device.type,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers,
    }


def own_breakdown(workload: Workload) -> dict[str, Any]:
    """Return where the time of our step goes."""
    return breakdown(build(workload.hparams, AnyIds(workload.vocab_size)), zipf_batches(workload))


def mfu(row: dict[str, Any], matrix_gflops: dict[str, float]) -> float:
    """Return the share of the matrix rate in its precision that a side's own FLOPs reach."""
    peak = matrix_gflops[row["precision"].removesuffix(WEIGHTS)] * 1e9
    return row["flops_per_token"] * row["tokens_per_second"] / peak


def bench(
    workload: Workload, variants: str | None, peers_allocator: str, rounds: int, progress: Progress
) -> dict[str, Any]:
    """Return all figures: the machine, its limits, the rows of training, a step's parts, decoding.

    Raises UserError for a variant or an allocator that there isn't.
    """
    names, left_out = choose(variants)
    allocators = pick(ALLOCATORS, peers_allocator, "--peers-allocator")
    hparams = workload.hparams
    device = choose_device(hparams.train.device)
    dtype = choose_dtype(hparams.train.precision, device)
    others, failed = dict[str, tuple[list[str], tuple[str, ...]]](), dict[str, str]()
    for name in names:
        try:
            others[name] = (precisions(name, workload), ("kept",) if name in OWN else allocators)
        except UserError as error:
            failed[name] = str(error)
    shape = (hparams.model, workload.vocab_size, hparams.batch_size)
    our_precision = precisions("moelet", workload)[0]
    decoding = {name: (decode_precisions(workload), ("kept",)) for name in choose_decoders(variants)}
    try:
        progress.say("the machine: matrix products and memory")
        before = alone(limits, *shape, dtype, device)
        training = run_contest(Contest("train", our_precision, others, rounds), workload, progress)
        progress.say("the machine once more, as other work may have disturbed it, and the parts of our step")
        found = higher(before, alone(limits, *shape, dtype, device))
        parts = alone(own_breakdown, workload)
        decode = run_contest(
            Contest("decode", _decoding_format(hparams.model, device), decoding, rounds), workload, progress
        )
    except SideFailed as error:
        raise UserError(
            f"our own step doesn't run at this shape ({error}), and all is measured against it. Give a smaller "
            "--batch-size, or other settings."
        ) from None
    found["decode_tokens_per_second"] = decode_bound(*shape[:2], dtype, found["memory_gb_per_second"]["read"])
    return {
        "machine": machine(device),
        "shape": {
            **hparams.model.model_dump(),
            "vocab_size": workload.vocab_size,
            "batch_size": hparams.batch_size,
        },
        "rounds": rounds,
        "peaks": found,
        "rows": [row | {"mfu": mfu(row, found["matrix_gflops"])} for row in training["rows"]],
        "failed": failed | training["failed"],
        "left_out": left_out,
        "remarks": [HF_LACKS] if any(row["variant"].startswith("hf-") for row in training["rows"]) else [],
        "precisions": training["precisions"],
        "breakdown": parts,
        "decode": decode,
    }
