"""Training: from settings to a run folder. One code path, whatever the machine.

`start` and `resume` make the run folder, the tokenizer and the identity; `train` is the loop: step, log, evaluate,
save, stop on request.
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
from moelet.checkpoint import HPARAMS, TOKENIZER, load_run_settings, write_file
from moelet.console import Progress, progress_line, table
from moelet.data import Prefetch, Validation, read_validation, reading_report, training_batches, training_texts
from moelet.errors import Interrupted, TemporaryError, UserError, pick
from moelet.evaluate import evaluate
from moelet.experts import ACTIVATIONS, BACKENDS
from moelet.generate import Sampling, stream_text
from moelet.hparams import Hparams, read_hparams
from moelet.loss import BALANCE, bits_per_byte
from moelet.metrics import METRICS_FILE, append_metrics, cut_metrics, matrix_rate, peak_memory_mb, sync_metrics
from moelet.moe import ROUTERS
from moelet.optim import OPTIMIZERS, SCHEDULES
from moelet.precision import choose_device, choose_dtype
from moelet.sources import SOURCES
from moelet.step import StepReport, Training, build, restore, snapshot, train_step
from moelet.tokenizer import Tokenizer

SAMPLE_TOKENS = 200
# what may change at resume: nothing that the weights depend on
FREE_SETTINGS = {
    "run", "device", "eval_steps", "eval_tokens", "log_steps", "checkpoint_steps", "keep_checkpoints", "sample_prompt"
}  # fmt: skip


def check(hparams: Hparams) -> None:
    """Raise UserError, before any work, for a name that no table holds and for what this machine hasn't got."""
    pick(SOURCES, hparams.data.source, "data.source")
    for part in hparams.data.mix or []:
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
    """Return the tokenizer of the settings: loaded, or trained on the run's own training text."""
    settings = hparams.tokenizer
    if settings.file is not None:
        return Tokenizer.load(Path(settings.file))
    texts = training_texts(hparams.data, hparams.train.seed)
    return Tokenizer.train(texts, settings.vocab_size, settings.algorithm, settings.sample_bytes)


def identity(hparams: Hparams, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the fingerprints that a checkpoint and the run resuming it must share.

    Where files lie doesn't count, only what is in them: text and tokenizer have fingerprints of their own.
    """
    places: Any = {"files": True, "mix": {"__all__": {"files"}}}
    settings = hparams.model_dump(mode="json", exclude={"train": FREE_SETTINGS, "data": places, "tokenizer": {"file"}})
    source = pick(SOURCES, hparams.data.source, "data.source").fingerprint(hparams.data)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    marks = {"settings": digest, "model": hparams.model.fingerprint}
    return {**marks, "tokenizer": tokenizer.fingerprint, "data": source}


def start(hparams: Hparams, run: Path, progress: Progress) -> None:
    """Train from the first step in folder `run`.

    Raises UserError before any work when the settings don't fit, or the folder holds a complete checkpoint or files
    that are not a run's.
    """
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
        train(_fresh(pinned(hparams), run), run, progress)


def _fresh(hparams: Hparams, run: Path) -> Training:
    """Return a run at its first step, its folder cleared of what an earlier try left and its tokenizer made."""
    for leftover in (METRICS_FILE, TOKENIZER):
        (run / leftover).unlink(missing_ok=True)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    write_file(run / HPARAMS, hparams.to_json().encode())
    tokenizer = make_tokenizer(hparams)
    write_file(run / TOKENIZER, tokenizer.model_bytes)
    return build(hparams, tokenizer)


def resume(run: Path, changes: Sequence[str], progress: Progress) -> None:
    """Go on with the run in folder `run` from its newest checkpoint that verifies; from its start when it has none.

    Raises UserError when `changes` or the files would make it another run.
    """
    if not (run / HPARAMS).is_file():
        raise UserError(f"{run} is not a run folder: it holds no {HPARAMS}. Give the folder of a run to resume.")
    with checkpoint.lock(run):
        hparams = pinned(read_hparams(run / HPARAMS, changes))
        check(hparams)
        if checkpoint.checkpoint_steps(run):
            training = _restored(hparams, run, progress)
            progress.say(f"resumed at step {training.step} of {hparams.total_steps}")
        else:
            progress.say(f"{run} has no checkpoint yet: starting over.")
            training = _fresh(hparams, run)
        train(training, run, progress)


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


def train(training: Training, run: Path, progress: Progress) -> None:
    """Train to the last step.

    Raises Interrupted when a signal asks to stop and TemporaryError when the data's source is away, with everything
    saved.
    """
    hparams, tokenizer = training.hparams, training.tokenizer
    length, size = hparams.model.max_length, hparams.train.batch_size
    validation = read_validation(hparams.data, tokenizer, length, size, hparams.train.eval_tokens, "validation")
    introduce(training, run, validation, progress)
    rate = matrix_rate(training.device, training.dtype)
    session = Session(training, run, progress, validation, rate, identity(hparams, tokenizer))
    stream = training_batches(hparams.data, tokenizer, length, size, hparams.train.seed, training.cursor)
    with stop_signals() as received, Prefetch(stream) as batches, progress:
        while training.step < hparams.total_steps:
            if received:
                session.save()
                raise Interrupted(
                    received[0],
                    f"interrupted and saved at step {training.step}. Go on with: python -m moelet train --resume {run}",
                )
            session.advance(batches)


class Session:
    """One process's part of a run: a step at a time, with what is due after it."""

    def __init__(
        self,
        training: Training,
        run: Path,
        progress: Progress,
        validation: Validation,
        rate: float,
        marks: dict[str, str],
    ) -> None:
        self.training, self.run, self.progress, self.validation = training, run, progress, validation
        self.rate, self.marks = rate, marks
        self.logged = (training.tokens, training.seconds)  # at the last line of metrics.jsonl
        self.saved_at = training.step if checkpoint.checkpoint_steps(run) else None

    def advance(self, batches: Prefetch) -> None:
        """Make one optimizer step, and log, evaluate and save where that is due."""
        training, settings = self.training, self.training.hparams.train
        began, before = time.perf_counter(), training.step
        try:
            items = [next(batches) for _ in range(settings.gradient_accumulation)]
        except TemporaryError:
            self.save()
            raise
        report = train_step(training, [batch for batch, _ in items])
        training.cursor = items[-1][1]
        training.seconds += time.perf_counter() - began
        if training.step == before:  # skipped: fp16 overflowed
            return
        evaluates, better = self.due(settings.eval_steps), False
        if evaluates or training.step == 1 or self.due(settings.log_steps):
            row = metrics_row(training, report, self.logged, self.rate)
            self.logged = (training.tokens, training.seconds)
            better = evaluates and self.assess(row)
            append_metrics(self.run, row)
            show(training, row, self.progress)
        if better or self.due(settings.checkpoint_steps):
            self.save()

    def due(self, every: int | None) -> bool:
        """Return whether something done every so many steps, and after the last one, is due now."""
        step = self.training.step
        return step == self.training.hparams.total_steps or (every is not None and step % every == 0)

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one, and remove those no longer kept."""
        training = self.training
        if self.saved_at == training.step:
            return
        sync_metrics(self.run)
        checkpoint.save(self.run, snapshot(training, self.marks))
        self.saved_at = training.step
        best = None if training.best is None else int(training.best["step"])
        checkpoint.retain(self.run, training.hparams.train.keep_checkpoints, best)

    def assess(self, row: dict[str, Any]) -> bool:
        """Evaluate, add the results to the metrics row, and return whether the model is the best so far."""
        training = self.training
        result = evaluate(training.model, self.validation, training.dtype)
        row |= {
            "val_loss": result.loss,
            "val_bits_per_byte": result.bits_per_byte,
            "gzip_bits_per_byte": self.validation.gzip_bits_per_byte,
            **reading_report(training.hparams.data, training.cursor),
        }
        prompt = training.hparams.train.sample_prompt
        if prompt is not None:
            training.model.eval()
            sample = stream_text(training.model, training.tokenizer, prompt, SAMPLE_TOKENS, Sampling())
            row["sample"] = prompt + "".join(sample)
        if training.best is not None and result.loss >= training.best["val_loss"]:
            return False
        training.best = {"step": training.step, "val_loss": result.loss}
        return True


def metrics_row(training: Training, report: StepReport, since: tuple[int, float], rate: float) -> dict[str, Any]:
    """Return the line of metrics.jsonl for the step just made; throughput is that since the last line."""
    tokens, seconds = training.tokens - since[0], training.seconds - since[1]
    speed = tokens / seconds
    row = {
        "step": training.step,
        "tokens": training.tokens,
        "seconds": training.seconds,
        "loss": report.loss,
        "bits_per_byte": bits_per_byte(report.loss * report.tokens, report.bytes),
        "balance_loss": report.balance_loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "tokens_per_second": speed,
        "mfu": training.model.flops_per_token(training.hparams.model.max_length) * speed / rate,
        "expert_load": report.expert_load,
        "memory_mb": peak_memory_mb(training.device),
    }
    if training.scaler is not None:
        row |= {"loss_scale": training.scaler.get_scale(), "skipped_steps": training.skipped_steps}
    return row


def show(training: Training, row: dict[str, Any], progress: Progress) -> None:
    """Show the progress line and, after an evaluation, its results."""
    total = training.hparams.total_steps
    left = training.seconds / training.step * (total - training.step)
    evaluated = "val_loss" in row
    progress.show(progress_line(row, total, left), lasting=evaluated)
    if evaluated:
        progress.say(
            f"  held-out loss {row['val_loss']:.4f}, {row['val_bits_per_byte']:.3f} bits/byte "
            f"(gzip -9: {row['gzip_bits_per_byte']:.3f})"
        )


def introduce(training: Training, run: Path, validation: Validation, progress: Progress) -> None:
    """Say what is about to be trained, on what, where."""
    model, hparams = training.model, training.hparams
    count = sum(parameter.numel() for parameter in model.parameters())
    settings = hparams.model
    experts = f"{settings.n_experts} experts top-{settings.top_k}" if settings.n_experts > 1 else "dense"
    rows = [
        ("run", str(run)),
        ("model", f"{settings.n_layers} layers x {settings.d_model}, {experts}, {count / 1e6:.1f}M parameters"),
        ("text", f"{hparams.data.source}, vocabulary {training.tokenizer.vocab_size}"),
        ("held out", f"{validation.n_tokens:,} tokens, {validation.n_bytes:,} bytes"),
        ("length", f"{hparams.total_steps:,} steps of {hparams.tokens_per_step:,} tokens"),
        ("machine", f"{training.device.type}, {str(training.dtype).removeprefix('torch.')}"),
    ]
    progress.say(*table("moelet", rows))
