"""One process's part of a run: a step at a time, and what is due after each: log, evaluate, save, plan.

What a run is, and how one begins or goes on, is `moelet.train`'s.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moelet import checkpoint
from moelet.budget import Clock, Pace
from moelet.console import Progress, progress_line
from moelet.data import Batch, Prefetch, Validation, reading_report
from moelet.documents import Cursor
from moelet.errors import TemporaryError, UserError
from moelet.evaluate import evaluate
from moelet.generate import Sampling, stream_text
from moelet.health import alarm_lines
from moelet.loss import bits_per_byte
from moelet.metrics import append_metrics, peak_memory_mb, sync_metrics
from moelet.step import StepReport, Training, snapshot, train_step

SAMPLE_TOKENS = 200
FORWARD_SHARE = 0.5  # of a training step's time a token: a third by its FLOPs, and the batches are small
REPLAN_SHARE = 0.02  # a plan stands unless it is off by more than this share of the steps left


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
        clock: Clock,
    ) -> None:
        self.training, self.run, self.progress, self.validation = training, run, progress, validation
        self.rate, self.marks, self.clock = rate, marks, clock
        self.logged = (training.tokens, training.seconds)  # at the last line of metrics.jsonl
        self.waited = 0.0  # seconds for data, since then
        self.saved_at = training.step if checkpoint.checkpoint_steps(run) else None
        hparams = training.hparams
        budget = hparams.train.time_budget
        evaluation = FORWARD_SHARE * validation.n_tokens / hparams.tokens_per_step
        self.pace = None if budget is None else Pace(clock, budget, evaluation)

    def advance(self, batches: Prefetch[Batch], enough: Callable[[], bool]) -> None:
        """Make one optimizer step, and log, evaluate and save where that is due.

        Nothing is done when `enough()` while there is no data. What the data's source raises comes through with
        everything saved.
        """
        training, settings = self.training, self.training.hparams.train
        micro_steps = len(training.hparams.micro_batches)
        began, before = time.perf_counter(), training.step
        items: list[tuple[Batch, Cursor]] = []
        try:
            while len(items) < micro_steps:
                if (item := batches.wait(enough)) is None:
                    return
                items.append(item)
        except (TemporaryError, UserError):
            self.save()
            raise
        self.waited += time.perf_counter() - began
        report = train_step(training, [batch for batch, _ in items])
        training.cursor = items[-1][1]
        took = time.perf_counter() - began
        training.seconds += took
        if training.step == before:  # skipped: fp16 overflowed
            return
        self.plan(took)
        alarms = training.health.note(training.step, report.expert_load, report.router_entropy, report.router_largest)
        evaluates, better = self.due(settings.eval_steps), False
        if alarms or evaluates or training.step == 1 or self.due(settings.log_steps):
            row = metrics_row(training, report, self.logged, self.rate) | {"data_wait": self.waited}
            row |= {"alarms": [alarm._asdict() for alarm in alarms]} if alarms else {}
            self.logged, self.waited = (training.tokens, training.seconds), 0.0
            better = evaluates and self.assess(row)
            row["elapsed"] = training.elapsed = self.clock.now()
            append_metrics(self.run, row)
            self.show(row)
            self.progress.say(*alarm_lines(training.step, alarms, training.hparams))
        if better or self.due(settings.checkpoint_steps):
            self.save()

    def plan(self, took: float) -> None:
        """Under a time budget, decide when that is due how many steps the run has, and keep the decision."""
        if self.pace is None:
            return
        self.pace.note_step(took)
        training, settings = self.training, self.training.hparams.train
        planned = training.total_steps
        if training.step == planned:  # the last step was made at min_lr: that's the end
            return
        if not self.pace.is_due(None if planned is None else planned - training.step):
            return
        left = self.pace.steps_left(training.step, settings.eval_steps, settings.checkpoint_steps)
        if planned is None or abs(training.step + left - planned) > REPLAN_SHARE * left:
            training.plan.append([training.step, training.step + left])
        self.pace.next_planned = left // 2

    def due(self, every: int | None) -> bool:
        """Return whether something done every so many steps, and after the last one, is due now."""
        step = self.training.step
        return step == self.training.total_steps or (every is not None and step % every == 0)

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one, and remove those no longer kept."""
        training = self.training
        if self.saved_at == training.step:
            return
        began = time.perf_counter()
        training.elapsed = self.clock.now()
        sync_metrics(self.run)
        checkpoint.save(self.run, snapshot(training, self.marks))
        self.saved_at = training.step
        best = None if training.best is None else int(training.best["step"])
        checkpoint.retain(self.run, training.hparams.train.keep_checkpoints, best)
        self._note_cost("checkpoint", began)

    def _note_cost(self, part: str, began: float) -> None:
        if self.pace is not None:
            self.pace.costs[part] = time.perf_counter() - began

    def assess(self, row: dict[str, Any]) -> bool:
        """Evaluate, add the results to the metrics row, and return whether the model is the best so far."""
        training, began = self.training, time.perf_counter()
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
        self._note_cost("evaluation", began)
        if training.best is not None and result.loss >= training.best["val_loss"]:
            return False
        training.best = {"step": training.step, "val_loss": result.loss}
        return True

    def show(self, row: dict[str, Any]) -> None:
        """Show the progress line and, after an evaluation, its results."""
        training, evaluated = self.training, "val_loss" in row
        total, left = training.total_steps, None
        if self.pace is not None:
            left = self.pace.budget - self.clock.now()
        elif total is not None:
            left = training.seconds / training.step * (total - training.step)
        self.progress.show(progress_line(row, total, left), lasting=evaluated)
        if evaluated:
            self.progress.say(
                f"  held-out loss {row['val_loss']:.4f}, {row['val_bits_per_byte']:.3f} bits/byte "
                f"(gzip -9: {row['gzip_bits_per_byte']:.3f})"
            )


def metrics_row(training: Training, report: StepReport, since: tuple[int, float], rate: float) -> dict[str, Any]:
    """Return the line of metrics.jsonl for the step just made; throughput is that since the last line."""
    tokens, seconds = training.tokens - since[0], training.seconds - since[1]
    speed = tokens / seconds
    row = {
        "step": training.step,
        "total_steps": training.total_steps,
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
        "router_entropy": report.router_entropy,
        "router_largest": report.router_largest,
        "starving_experts": training.health.starving(),
        "memory_mb": peak_memory_mb(training.device),
    }
    if training.scaler is not None:
        row |= {"loss_scale": training.scaler.get_scale(), "skipped_steps": training.skipped_steps}
    return row
