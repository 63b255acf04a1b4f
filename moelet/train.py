"""Training: from settings to a run folder. One code path, whatever the machine.

`start` and `resume` make the run folder, the tokenizer and the identity; `train` is the loop, which stops on request.
What is done at each step is `moelet.session`'s.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from moelet import checkpoint
from moelet.attention import ATTENTION
from moelet.budget import Clock
from moelet.checkpoint import HPARAMS, TOKENIZER, load_run_settings
from moelet.console import Progress, duration, table
from moelet.data import PREFETCH_BATCHES, Prefetch, Validation, read_validation, training_batches, training_texts
from moelet.disk import write_file
from moelet.errors import Interrupted, UserError, pick
from moelet.experts import ACTIVATIONS, BACKENDS
from moelet.fit import find_batch_size
from moelet.hparams import Hparams, read_hparams
from moelet.kernels.native import why_not
from moelet.loss import BALANCE
from moelet.metrics import METRICS_FILE, cut_metrics, last_elapsed, matrix_rate
from moelet.moe import ROUTERS
from moelet.optim import OPTIMIZERS, SCHEDULES
from moelet.precision import choose_device, choose_dtype
from moelet.sections import LENGTHS
from moelet.session import Session
from moelet.shards import folder_of, read_manifest
from moelet.sources import SOURCES
from moelet.step import Training, build, restore
from moelet.tokenizer import Tokenizer

# what may change at resume: nothing that the weights depend on
FREE_SETTINGS = {
    "run", "device", "eval_steps", "eval_tokens", "log_steps", "checkpoint_steps", "keep_checkpoints", "sample_prompt",
    "memory_limit_gb", "checkpoint_activations",
}  # fmt: skip


def check(hparams: Hparams) -> None:
    """Raise UserError, before any work, for a name that no table holds and for what this machine hasn't got."""
    pick(SOURCES, hparams.data.source, "data.source")
    for part in hparams.data.parts:
        pick(SOURCES, part.source, "data.mix.source")
    pick(OPTIMIZERS, hparams.optim.optimizer, "optim.optimizer")
    pick(SCHEDULES, hparams.optim.schedule, "optim.schedule")
    if hparams.balance.loss is not None:
        pick(BALANCE, hparams.balance.loss, "balance.loss")
    pick(ACTIVATIONS, hparams.model.activation, "model.activation")
    pick(ATTENTION, hparams.model.attention, "model.attention")
    pick({**BACKENDS, "auto": None}, hparams.model.experts, "model.experts")
    pick(ROUTERS, hparams.model.router, "model.router")
    choose_dtype(hparams.train.precision, choose_device(hparams.train.device))


def pinned(hparams: Hparams) -> Hparams:
    """Return the settings with all they name made explicit: absolute paths, the commit of a dataset.

    So the run can go on from anywhere, on the same text. Raises UserError and TemporaryError as the source does.
    """
    data = pick(SOURCES, hparams.data.source, "data.source").pin(hparams.data)
    tokenizer = hparams.tokenizer
    if tokenizer.file is not None:
        tokenizer = tokenizer.model_copy(update={"file": os.path.abspath(tokenizer.file)})
    return hparams.model_copy(update={"data": data, "tokenizer": tokenizer})


def make_tokenizer(hparams: Hparams) -> Tokenizer:
    """Return the tokenizer of the settings: loaded, or trained on the run's own training text.

    Raises UserError when the text was prepared with another, or cut in other pieces.
    """
    settings, data = hparams.tokenizer, hparams.data
    if data.source == "prepared":
        folder = folder_of(data)
        manifest = read_manifest(folder)
        tokenizer = Tokenizer.load(settings.file or folder / TOKENIZER)
        if (tokenizer.fingerprint, data.piece_chars) != (manifest["tokenizer"], manifest["piece_chars"]):
            raise UserError(
                f"{folder} was prepared with another tokenizer, or in pieces of {manifest['piece_chars']} characters. "
                f"Set tokenizer.file to null and data.piece_chars to {manifest['piece_chars']}, or prepare it again."
            )
        return tokenizer
    if settings.file is not None:
        return Tokenizer.load(Path(settings.file))
    texts = training_texts(data, hparams.train.seed)
    return Tokenizer.train(texts, settings.vocab_size, settings.algorithm, settings.sample_bytes)


def identity(hparams: Hparams, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the fingerprints that a checkpoint and the run resuming it must share.

    Where files lie doesn't count, only what is in them: text and tokenizer have fingerprints of their own. Nor does
    how a step is cut into micro-steps, where the settings give its size as a whole.
    """
    places: Any = {"files": True, "mix": {"__all__": {"files"}}}
    cut = {"global_batch_size"} if hparams.train.global_batch_size is None else {"batch_size", "gradient_accumulation"}
    left_out: Any = {"train": FREE_SETTINGS.union(LENGTHS, cut), "data": places, "tokenizer": {"file"}}
    left_out |= {name: getattr(hparams, name).unsaid for name in ("model", "optim", "balance")}
    settings = hparams.model_dump(mode="json", exclude=left_out)
    source = pick(SOURCES, hparams.data.source, "data.source").fingerprint(hparams.data)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    length = hparams.total_steps
    marks = {"settings": digest, "model": hparams.model.fingerprint}
    marks["length"] = "a time budget" if length is None else f"{length} steps"
    return {**marks, "tokenizer": tokenizer.fingerprint, "data": source}


def start(hparams: Hparams, run: Path, progress: Progress, began: float | None = None) -> None:
    """Train from the first step in folder `run`; `began` is when the process did, by time.monotonic().

    Raises UserError before any work when the settings don't fit, or the folder holds a complete checkpoint or files
    that are not a run's.
    """
    clock = Clock(0.0, time.monotonic() if began is None else began)
    check(hparams)
    if run.is_dir() and any(run.iterdir()) and not (run / checkpoint.LOCK).exists():
        raise UserError(
            f"{run} holds files that are not a run's. A new run needs a folder that is empty or not there yet. Give "
            "another --run."
        )
    with checkpoint.lock(run):
        if checkpoint.checkpoint_steps(run):
            raise UserError(
                f"{run} holds a run with checkpoints. A new run needs a folder of its own: give another --run, or go "
                f"on with this one: python -m moelet train --resume {run}"
            )
        train(_fresh(pinned(hparams), run, progress), run, progress, clock)


def _fresh(hparams: Hparams, run: Path, progress: Progress) -> Training:
    """Return a run at its first step: its folder cleared of what an earlier try left, its tokenizer made, its batch
    size found."""
    for leftover in (METRICS_FILE, TOKENIZER):
        (run / leftover).unlink(missing_ok=True)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    write_file(run / HPARAMS, hparams.to_json().encode())
    tokenizer = make_tokenizer(hparams)
    write_file(run / TOKENIZER, tokenizer.model_bytes)
    hparams = find_batch_size(hparams, tokenizer, run / TOKENIZER, progress)
    write_file(run / HPARAMS, hparams.to_json().encode())
    return build(hparams, tokenizer)


def resume(
    run: Path,
    changes: Sequence[str],
    progress: Progress,
    began: float | None = None,
    settings: Path | None = None,
    seconds: float | None = None,
) -> None:
    """Go on with the run in folder `run` from its newest checkpoint that verifies; from its start when it has none.

    The settings are the run's own, or those in the file `settings`, with `changes`. With `seconds` the run ends that
    long after this command began. Raises UserError when settings or files would make it another run.
    """
    if not is_run(run):
        raise UserError(f"{run} is not a run folder: it holds no {HPARAMS}. Give the folder of a run to resume.")
    with checkpoint.lock(run):
        spent = spent_on(run)
        limit = [] if seconds is None else [f"train.time_budget={spent + seconds}"]
        hparams = read_hparams(settings or run / HPARAMS, [*changes, *limit])
        saved = read_hparams(run / HPARAMS)
        if not any(change.startswith("train.batch_size=") for change in changes):
            hparams = with_batch_size_of(saved, hparams)
        hparams = pinned(with_commits_of(saved, hparams))
        check(hparams)
        if checkpoint.checkpoint_steps(run):
            training = _restored(hparams, run, progress)
            total = training.total_steps
            progress.say(f"resumed at step {training.step}" + (f" of {total}" if total else ""))
            if total == training.step:
                progress.say("this run is finished: nothing is left to train, whatever the time.")
        else:
            progress.say(f"{run} has no checkpoint yet: starting over.")
            training = _fresh(hparams, run, progress)
        train(training, run, progress, Clock(spent, time.monotonic() if began is None else began))


def is_run(run: Path) -> bool:
    """Return whether the folder holds a run, trained or only begun."""
    return (run / HPARAMS).is_file()


def spent_on(run: Path) -> float:
    """Return the seconds that earlier sessions of the run took, as far as they were noted."""
    steps = checkpoint.checkpoint_steps(run)
    state = checkpoint.read_state(run, steps[-1]) if steps else {}
    return max(last_elapsed(run), state.get("elapsed", 0.0))


def with_commits_of(saved: Hparams, hparams: Hparams) -> Hparams:
    """Return `hparams` where a dataset without a revision stays at the commit that the run began with."""

    def keep(old: Any, new: Any) -> Any:
        same = (old.dataset, old.name) == (new.dataset, new.name) and new.revision is None
        return new.model_copy(update={"revision": old.revision}) if same else new

    data = keep(saved.data, hparams.data)
    if data.parts and len(saved.data.parts) == len(data.parts):
        data = data.model_copy(update={"mix": list(map(keep, saved.data.parts, data.parts))})
    return hparams.model_copy(update={"data": data})


def with_batch_size_of(saved: Hparams, hparams: Hparams) -> Hparams:
    """Return `hparams` where "auto" stays at the size that the run has found, as long as a step's is the same."""
    old, new = saved.train, hparams.train
    if new.batch_size != "auto" or old.batch_size == "auto" or old.global_batch_size != new.global_batch_size:
        return hparams
    kept = new.model_copy(update={"batch_size": old.batch_size, "memory_limit_gb": None})
    return hparams.model_copy(update={"train": kept})


def _restored(hparams: Hparams, run: Path, progress: Progress) -> Training:
    """Return the run as its newest checkpoint that verifies has it; metrics.jsonl is cut back to that step."""
    saved_hparams, tokenizer = load_run_settings(run)
    if hparams.tokenizer != saved_hparams.tokenizer and hparams.tokenizer.file is not None:
        tokenizer = Tokenizer.load(Path(hparams.tokenizer.file))
    step, passed = checkpoint.newest(run)
    progress.say(*passed)
    if step is None:
        raise UserError(
            f"no checkpoint of {run} verifies (see above). Nothing was changed. Restore one from a copy, or start "
            "a new run in another folder."
        )
    saved = checkpoint.read(run, step)
    refuse_another_run(run, saved.identity, identity(hparams, tokenizer), saved_hparams, hparams)
    hparams = find_batch_size(hparams, tokenizer, run / TOKENIZER, progress)
    training = build(hparams, tokenizer)
    restore(training, saved)
    write_file(run / HPARAMS, hparams.to_json().encode())
    cut_metrics(run, step)
    return training


def refuse_another_run(
    run: Path, saved: dict[str, str], now: dict[str, str], saved_hparams: Hparams, hparams: Hparams
) -> None:
    """Raise UserError when the fingerprints of the checkpoint and of what would go on from it differ."""
    different = [name for name in saved if saved[name] != now.get(name)]
    if hparams.train.time_budget is not None and "length" in different:
        different.remove("length")  # from here on the clock decides
    if not different:
        return
    old, new = saved_hparams.model_dump(mode="json"), hparams.model_dump(mode="json")
    lines = [f"{name}: the run has {saved[name][:16]}, given is {str(now.get(name))[:16]}" for name in different]
    lines += [
        f"{section}.{key}: the run has {json.dumps(value)}, given is {json.dumps(new[section][key])}"
        for section, settings in old.items()
        for key, value in settings.items()
        if value != new[section][key]
    ]
    raise UserError(
        f"{run} can't go on as another run; these differ:\n  "
        + "\n  ".join(lines)
        + "\nNothing was changed. Resume with the run's own settings, tokenizer and data, or start a new run."
    )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that the loop looks at; the second one acts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        os.write(2, b"\nstopping after this step; again to stop at once, unsaved\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(training: Training, run: Path, progress: Progress, clock: Clock) -> None:
    """Train to the last step.

    Raises Interrupted when a signal asks to stop and TemporaryError when the data's source is away, with everything
    saved.
    """
    hparams, tokenizer = training.hparams, training.tokenizer
    length, size, sizes = hparams.model.max_length, hparams.batch_size, hparams.micro_batches
    validation = read_validation(hparams.data, tokenizer, length, size, hparams.train.eval_tokens, "validation")
    introduce(training, run, validation, progress)
    rate = matrix_rate(training.device, training.dtype)
    session = Session(training, run, progress, validation, rate, identity(hparams, tokenizer), clock)
    stream = training_batches(hparams.data, tokenizer, length, sizes, hparams.train.seed, training.cursor)
    with stop_signals() as received, Prefetch(stream, PREFETCH_BATCHES) as batches, progress:
        while training.total_steps is None or training.step < training.total_steps:
            if received:
                session.save()
                raise Interrupted(
                    received[0],
                    f"interrupted and saved at step {training.step}. Go on with: python -m moelet train --resume {run}",
                )
            session.advance(batches, lambda: bool(received))


def introduce(training: Training, run: Path, validation: Validation, progress: Progress) -> None:
    """Say what is about to be trained, on what, where."""
    model, hparams = training.model, training.hparams
    count = sum(parameter.numel() for parameter in model.parameters())
    settings = hparams.model
    budget = hparams.train.time_budget
    length = f"{training.total_steps:,} " if budget is None else f"{duration(budget)} in all, "
    experts = f"{settings.n_experts} experts top-{settings.top_k}" if settings.n_experts > 1 else "dense"
    rows = [
        ("run", str(run)),
        ("model", f"{settings.n_layers} layers x {settings.d_model}, {experts}, {count / 1e6:.1f}M parameters"),
        ("text", f"{hparams.data.source}, vocabulary {training.tokenizer.vocab_size}"),
        ("held out", f"{validation.n_tokens:,} tokens, {validation.n_bytes:,} bytes"),
        ("length", f"{length}steps of {hparams.tokens_per_step:,} tokens"),
        ("machine", f"{training.device.type}, {str(training.dtype).removeprefix('torch.')}"),
    ]
    if training.device.type == "cpu" and (reason := why_not(training.dtype)) is not None:
        rows.append(("kernels", f"torch's, half as fast as ours: {reason}"))
    progress.say(*table("moelet", rows))
