"""One process's part of a run: a step at a time, and what is due after each: log, evaluate, save, plan.

What a run is, and how one begins or goes on, is `moelet.train`'s.
"""

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from moelet import diagnostics
from moelet.budget import Clock, Pace
from moelet.console import Progress, progress_line
from moelet.data import Batch, Validation, reading_report
from moelet.errors import TemporaryError, UserError
from moelet.evaluate import Evaluation, evaluate
from moelet.finite import BadStep, Trouble, require_finite
from moelet.generate import Sampling, stream_text
from moelet.health import alarm_lines
from moelet.memory import is_shortage
from moelet.metrics import METRICS_FILE, append_metrics, cut_metrics, metrics_lines, peak_memory_mb, sync_metrics
from moelet.parallel.orders import EVALUATE, again, hand_out, hold_out, model_to_sample, order_restore
from moelet.shortage import OutOfMemory, free, within_memory
from moelet.state import Training, restore, snapshot
from moelet.step import StepReport, forget_step, metrics_row, train_step
from moelet.stopping import Asked, StopAsked, until
from moelet.storage.checkpoint import HPARAMS, TOKENIZER, Checkpoint, read
from moelet.storage.lock import Held
from moelet.storage.manifest import RUN_ID, checkpoint_steps, newest
from moelet.storage.saving import Saver
from moelet.text.documents import Cursor
from moelet.text.prefetch import Reader
from moelet.trackers import Tracking

SAMPLE_TOKENS = 200
FORWARD_SHARE = 0.5  # of a training step's time a token: a third by its FLOPs, and the batches are small
REPLAN_SHARE = 0.02  # a plan stands unless it is off by more than this share of the steps left
WAITING = ("cpu",)  # devices that wait for a checkpoint: their cores would write it beside training
MAX_REWINDS = 3  # to one checkpoint: it is the weights there, then, and not the text behind it


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
        tracking: Tracking,
        held: Held,
        asked: Asked,
    ) -> None:
        """When a signal asks to stop, what is half done is left off, and done again at the resume."""
        self.training, self.run, self.progress, self.validation = training, run, progress, validation
        self.rate, self.marks, self.clock, self.tracking = rate, marks, clock, tracking
        self.held, self.asked = held, asked
        if training.team.alone:  # else a step is made by all or by none
            training.enough = self.enough
        self.part = hold_out(training, validation)
        self.items: list[tuple[Batch, Cursor]] = []  # taken for the step to come
        self.unwritten: list[dict[str, Any]] = []  # lines of metrics.jsonl that the disk didn't take
        self.again = again(run, training.team)
        self.logged = (training.tokens, training.seconds)  # at the last line of metrics.jsonl
        self.waited = 0.0  # seconds for data, since then
        self.rewinds: Counter[int] = Counter()  # to the checkpoint of each step
        self.rows_to_evaluate: int | None = None  # at a time, since memory ran out in that; None: as they come
        hparams = training.hparams
        self.saver = Saver(run, hparams, self.whole, self.belongings, progress, self.enough, self.lines, held.check)
        self.saver.at = training.step if checkpoint_steps(run) else None
        budget = hparams.train.time_budget
        evaluation = FORWARD_SHARE * validation.n_tokens / hparams.tokens_per_step
        self.pace = None if budget is None else Pace(clock, budget, evaluation)

    def enough(self) -> bool:
        return bool(self.asked)

    def belongings(self) -> dict[str, bytes]:
        """Return the files that make a folder with a checkpoint the run, as they stand."""
        metrics = b""
        with suppress(OSError):
            metrics = (self.run / METRICS_FILE).read_bytes()
        return {
            HPARAMS: self.training.hparams.to_json().encode(),
            TOKENIZER: self.training.tokenizer.model_bytes,
            RUN_ID: self.training.run_id.encode(),
            METRICS_FILE: metrics + metrics_lines(self.unwritten),
        }

    def advance(self, batches: Reader[Batch]) -> None:
        """Make one optimizer step, and log, evaluate and save where that is due.

        Nothing is done when a signal asks for something while there is no data. What the data's source raises comes
        through with everything saved. Raises StopAsked in the middle of a step, which is then as if not begun.
        """
        training, settings = self.training, self.training.hparams.train
        micro_steps = len(training.hparams.micro_batches)
        began, before = time.perf_counter(), training.step
        try:
            while len(self.items) < micro_steps:
                if (item := batches.wait(lambda: self.asked.save or self.enough())) is None:
                    return
                self.items.append(item)
        except TemporaryError as error:
            self.progress.say(f"reading stopped: {error}")  # should saving fail too, that is what the run ends with
            self.save(final=True)
            raise TemporaryError(f"{error} Saved at step {before}. Resume with: {self.again}") from error
        except Exception as error:
            self.progress.say(f"reading stopped: {error}")
            self.save(final=True)
            raise
        self.waited += time.perf_counter() - began
        report = self.make_step(self.handed_out([batch for batch, _ in self.items]))
        at, training.cursor, self.items = training.cursor, self.items[-1][1], []
        took = time.perf_counter() - began
        training.seconds += took
        if training.step == before:  # skipped
            self.pass_over(report, at)
            return
        self.plan(took)
        alarms = training.health.note(training.step, report.expert_load, report.router_entropy, report.router_largest)
        evaluates, better = self.due(settings.eval_steps), False
        if alarms or evaluates or training.step == 1 or self.due(settings.log_steps):
            row = metrics_row(training, report, self.logged, self.rate) | {"data_wait": self.waited}
            row |= {"alarms": [alarm._asdict() for alarm in alarms]} if alarms else {}
            self.logged, self.waited = (training.tokens, training.seconds), 0.0
            better = self.log(row, evaluates)
            self.progress.say(*alarm_lines(training.step, alarms, training.hparams))
        last = training.step == training.total_steps
        if (better or self.due(settings.checkpoint_steps)) and training.device.type not in WAITING and not last:
            self.save_behind()
        elif better or self.due(settings.checkpoint_steps) or not self.saver.settle():
            self.save(final=last)

    def log(self, row: dict[str, Any], evaluates: bool) -> bool:
        """Write and show a step's line, evaluated if that is due; return whether the model is the best so far.

        Where a signal leaves that off, the line waits in the checkpoint for `catch_up`.
        """
        training = self.training
        training.pending = dict(row) if evaluates else None
        better = evaluates and self.assess(row)
        training.pending = None
        row["elapsed"] = training.elapsed = self.clock.now()
        self.write(row)
        self.tracking.log(row)
        self.show(row)
        return better

    def catch_up(self) -> None:
        """Do the evaluation that the last session was stopped in, as it would have been."""
        if self.training.pending is not None:
            self.log(dict(self.training.pending), True)

    def write(self, *rows: dict[str, Any]) -> None:
        """Append lines to metrics.jsonl, and those before that the disk didn't take; what it doesn't take waits."""
        first = not self.unwritten
        self.unwritten += rows
        if not self.unwritten:
            return
        try:
            self.held.check()  # not into another run's
            append_metrics(self.run, *self.unwritten)
        except OSError as error:
            if first:
                self.progress.say(f"WARNING: metrics.jsonl can't be written ({error.strerror}). Its lines are kept.")
            return
        self.unwritten = []

    def handed_out(self, batches: list[Batch]) -> list[Batch]:
        """Return this rank's rows of a step, and note what signals have asked of other ranks."""
        team = self.training.team
        batches = hand_out(self.training, batches)
        stop, save = team.highest(self.asked.stop or 0, int(self.asked.save))
        if stop and not self.asked:
            self.asked.signals.append(stop)
        self.asked.save = bool(save)
        return batches

    def make_step(self, batches: list[Batch]) -> StepReport:
        """Return what one optimizer step reports, made in smaller parts from the step on at which memory runs out.

        Raises UserError where that doesn't help, and for a step that the settings don't let pass; each with what is
        saved, and what to do.
        """
        training, rows = self.training, self.training.micro_rows
        try:
            if not training.team.alone:  # another cut would have to be made by all ranks at once
                return train_step(training, batches)
            report, training.micro_rows = within_memory(
                lambda parts: train_step(training, parts), batches, rows, lambda: forget_step(training)
            )
        except OutOfMemory as error:
            raise self._out_of_memory(error) from None
        except BadStep as error:
            raise self._bad_step(error) from None
        except StopAsked:
            forget_step(training)
            raise
        if training.micro_rows != rows:
            peak, fitted = peak_memory_mb(training.device), rows or max(len(batch.labels) for batch in batches)
            self.progress.say(
                f"memory ran out at step {training.step} (peak {peak:.0f} MiB): from here on {training.micro_rows} "
                f"rows a micro-step instead of {fitted}. A step has the same rows as before."
            )
        return report

    def _out_of_memory(self, error: OutOfMemory) -> UserError:
        """Return the error for a step that doesn't fit; all that is trained is saved, where there is memory for it."""
        training, hparams = self.training, self.training.hparams
        free()
        self.saver.settle(wait=True)
        unsaved = ""
        try:
            self.save()
        except Exception as failure:
            if not (is_shortage(failure) or isinstance(failure, TemporaryError)):
                raise
            unsaved = f" (what came after can't be saved: {str(failure).splitlines()[0]})"
        peak = peak_memory_mb(training.device)
        return diagnostics.no_memory(error, self.run, checkpoint_steps(self.run), unsaved, training.step, peak, hparams)

    def _bad_step(self, error: BadStep) -> UserError:
        """Return the error for a step that stops the run, with what is known about it written down."""
        training, at = self.training, self.training.cursor
        self.saver.settle(wait=True)
        if not checkpoint_steps(self.run):
            self.save()  # the weights are as before the step, and there is nothing else of them
        words = self._write_down(error.trouble, at, training.step + training.skipped_steps + 1)
        return diagnostics.bad_step(error, words, self.run, checkpoint_steps(self.run), training.hparams.optim)

    def _write_down(self, trouble: Trouble, at: Cursor, number: int) -> str:
        """Write the diagnostics of the run's batch `number`, which is behind cursor `at`; return them in words."""
        training = self.training
        found = diagnostics.report(training.hparams, training.tokenizer, at, training.step + 1, trouble)
        return diagnostics.keep(self.run, number, found)

    def pass_over(self, report: StepReport, at: Cursor) -> None:
        """Say why a batch is passed over and, where the settings say so, go back to the newest checkpoint too.

        What is trained since then is given up with the text it came from: training goes on behind this batch.
        """
        training, trouble = self.training, report.trouble
        if trouble is None or not trouble.row_losses:
            return  # fp16 overflowed, as it does now and then
        words = self._write_down(trouble, at, training.step + training.skipped_steps)
        self.saver.settle(wait=True)
        step = newest(self.run)[0] if training.hparams.train.bad_step == "rewind" else None
        going_on = (
            "the batch is passed over" if step is None else f"back to the checkpoint of step {step}, on behind it"
        )
        self.progress.say(f"{trouble.what} at step {training.step + 1}: {going_on}. {words}")
        if step is not None:
            self._rewind(step)

    def _rewind(self, step: int) -> None:
        """Put the checkpoint of `step` back, but for the text: that read since counts as passed over."""
        training = self.training
        self.rewinds[step] += 1
        if self.rewinds[step] > MAX_REWINDS:
            raise UserError(
                f"training went back to the checkpoint of step {step} {MAX_REWINDS} times and always came to a bad "
                "step: it is the weights, not the text. Nothing was changed. Remove that checkpoint and resume from "
                "an earlier one, or start a new run with a lower optim.lr."
            )
        kept = {name: getattr(training, name) for name in ("cursor", "seconds", "elapsed", "micro_rows")}
        passed_over = training.skipped_steps + training.step - step
        order_restore(training, self.run, step)
        restore(training, read(self.run, step, training.layout.part))
        for name, value in kept.items():
            setattr(training, name, value)
        training.skipped_steps = passed_over
        cut_metrics(self.run, step)
        self.unwritten = [row for row in self.unwritten if row["step"] <= step]
        self.logged, self.saver.at = (training.tokens, training.seconds), step

    def lines(self) -> bool:
        """Write the lines that wait, on the disk before returning; return whether there are none any more."""
        self.write()
        with suppress(OSError):  # the checkpoint itself will tell
            sync_metrics(self.run)
        return not self.unwritten

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

    def save(self, final: bool = False) -> bool:
        """Have a checkpoint of this step on the disk, the run's `final` one perhaps; return whether it is there."""
        began, before = time.perf_counter(), self.saver.at
        saved = self.saver.save(self.training.step, final)
        if saved and self.saver.at != before:
            self._note_cost("checkpoint", began)
        return saved

    def save_behind(self) -> None:
        """Begin a checkpoint of this step, which is written while training goes on."""
        began = time.perf_counter()
        self.saver.begin(self.training.step)
        self._note_cost("checkpoint", began)

    def whole(self) -> Checkpoint:
        """Return the run as it stands. Raises UserError for one that no checkpoint should hold."""
        self.training.elapsed = self.clock.now()
        whole = snapshot(self.training, self.marks)
        require_finite(whole.model, "the weight")
        require_finite(whole.optimizer, "the optimizer's")
        return whole

    def _note_cost(self, part: str, began: float) -> None:
        if self.pace is not None:
            self.pace.costs[part] = time.perf_counter() - began

    def assess(self, row: dict[str, Any]) -> bool:
        """Evaluate, add the results to the metrics row, and return whether the model is the best so far."""
        training, began = self.training, time.perf_counter()
        result = self.evaluate()
        row |= {
            "val_loss": result.loss,
            "val_bits_per_byte": result.bits_per_byte,
            "gzip_bits_per_byte": self.validation.gzip_bits_per_byte,
            **reading_report(training.hparams.data, training.cursor),
        }
        prompt = training.hparams.train.sample_prompt
        if prompt is not None and (model := model_to_sample(training)) is not None:
            model.eval()
            sample = stream_text(model, training.tokenizer, prompt, SAMPLE_TOKENS, Sampling())
            row["sample"] = prompt + "".join(until(self.enough, sample))
        self._note_cost("evaluation", began)
        if training.best is not None and result.loss >= training.best["val_loss"]:
            return False
        training.best = {"step": training.step, "val_loss": result.loss}
        return True

    def evaluate(self) -> Evaluation:
        """Return the model's measures on held-out text, in smaller parts where memory runs out."""
        model, validation, dtype, layout = self.training.model, self.part, self.training.dtype, self.training.layout
        if not layout.team.alone:
            layout.team.order(EVALUATE)
            return evaluate(model, validation, dtype, layout=layout)
        result, self.rows_to_evaluate = within_memory(
            lambda parts: evaluate(model, validation._replace(batches=parts), dtype, self.enough),
            validation.batches,
            self.rows_to_evaluate or self.training.micro_rows,
            lambda: None,
        )
        return result

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
