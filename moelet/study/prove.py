"""`moelet prove`: trains an MoE and its dense twins, or any arms, on one stream of text, and says what pays.

What the arms and jobs are is `study`'s, how fast they are `calibrate`'s, where they train
`workers`', what the figures mean `verdict`'s. A study's folder:

    plan.json       everything decided; with it the study goes on, or is made again elsewhere
    data/           the text, encoded once
    jobs/           a run folder for each job: jobs/<arm>/<horizon>-<seed>
    prove.json, prove.png, prove.html
"""

import shlex
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from moelet.budget import Clock
from moelet.console import Progress, duration, table
from moelet.errors import Interrupted, TemporaryError, UserError
from moelet.stopping import stop_signals
from moelet.storage.checkpoint import HPARAMS
from moelet.storage.disk import write_file
from moelet.storage.lock import LOCK, lock
from moelet.study import study
from moelet.study.findings import findings
from moelet.study.page import write
from moelet.study.planning import Request, begin, prepare_text
from moelet.study.study import PLAN, REPORT_SECONDS, Done, Job, Plan
from moelet.study.workers import STOPPED, ask_to_stop, drop_checkpoints, progress_of, result_of, run_job, workers

POLL_SECONDS = 0.5
PACE_SECONDS = 20.0  # of predicted work done, before what it took corrects the prediction of the rest


class Study:
    """A plan being carried out: its jobs, one after the other or a few at a time."""

    def __init__(self, plan: Plan, folder: Path, data: dict[str, Any], progress: Progress, clock: Clock) -> None:
        self.plan, self.folder, self.data, self.progress, self.clock = plan, folder, data, progress, clock
        self.results: dict[Job, Done] = {}
        self.running: dict[Future[str | None], tuple[Job, float]] = {}  # with the share that was done before
        self.began, self.predicted = clock.now(), 0.0  # seconds of the jobs done since

    def path(self, job: Job) -> Path:
        return self.folder / "jobs" / job.folder

    def save(self) -> None:
        self.plan.spent = self.clock.now()
        save_plan(self.plan, self.folder)

    def settle(self) -> None:
        """Take in the results that lie in the folder, and choose the learning rates that they decide."""
        for arm in self.plan.arms:
            while found := [(job, self._result(job)) for job in study.sweep_jobs(self.plan, arm)]:
                if not (known := [(job.factor, done.bits_per_byte) for job, done in found if done is not None]):
                    break
                arm.sweep += known
            if arm.lr_factor is None and not study.sweep_jobs(self.plan, arm):
                arm.lr_factor = study.best_factor(dict(arm.sweep))
                if arm.lr_factor is None:
                    raise UserError(
                        f"arm {arm.name!r} diverged with every learning rate tried ({arm.sweep}). Set lower ones in "
                        "optim, or give a lower --lr-grid."
                    )
        for job in study.matrix(self.plan):
            if self._rate_is_known(job) and job not in self.results and (done := self._result(job)) is not None:
                self.results[job] = done

    def _result(self, job: Job) -> Done | None:
        return result_of(self.path(job))

    def _rate_is_known(self, job: Job) -> bool:
        return self.plan.arm(job.arm).lr_factor is not None

    def outstanding(self) -> list[Job]:
        """Return the jobs that can begin now, in order."""
        running = {job for job, _ in self.running.values()}
        sweeps = [job for arm in self.plan.arms for job in study.sweep_jobs(self.plan, arm)]
        runs = [job for job in study.matrix(self.plan) if self._rate_is_known(job) and job not in self.results]
        return [job for job in (*sweeps, *runs) if job not in running]

    def seconds_left(self, seeds: Sequence[int]) -> float:
        """Return how long the rest of these seeds takes: as predicted, corrected by what jobs took so far."""
        sweeps = [job for arm in self.plan.arms for job in study.sweep_jobs(self.plan, arm)]
        runs = [job for job in study.matrix(self.plan) if job not in self.results and job.seed in seeds]
        rest = sum(study.job_seconds(self.plan, job) for job in (*sweeps, *runs))
        made = sum(study.job_seconds(self.plan, job) * progress_of(self.path(job)) for job, _ in self.running.values())
        before = sum(study.job_seconds(self.plan, job) * share for job, share in self.running.values())
        work, took = self.predicted + made - before, self.clock.now() - self.began
        return (rest - made) * (took / work if work > PACE_SECONDS else 1 / self.plan.side_by_side)

    def keep_to_budget(self, job: Job) -> None:
        """Before a job, leave out its seed and those after it where the seed wouldn't end in time; the first stays.

        Not before it is due: a machine that is slow now may be quick again by then.
        """
        plan = self.plan
        before = plan.seeds[: plan.seeds.index(job.seed)]
        if plan.budget is None or not before:
            return
        if self.seconds_left([*before, job.seed]) <= plan.budget - self.clock.now() - REPORT_SECONDS:
            return
        for seed in plan.seeds[len(before) :]:
            plan.notes.append(f"seed {seed} is left out: the time budget had no room for it.")
            self.progress.say(plan.notes[-1])
        plan.seeds = before

    def run(self) -> None:
        """Do all jobs that aren't done.

        Raises Interrupted when a signal asks to stop, with everything saved; TemporaryError when a worker dies.
        """
        self.settle()
        self.save()
        with stop_signals() as received, workers(self.plan.jobs, self.plan.threads) as pool, self.progress:
            asked = False
            while True:
                self._fill(pool, stopping=bool(received))
                if not self.running:
                    break
                if received and not asked:
                    ask_to_stop()
                    asked = True
                for future in wait(self.running, POLL_SECONDS, FIRST_COMPLETED).done:
                    self._finish(future, bool(received))
                self._show()
        if received.stop is not None:
            raise Interrupted(
                received.stop,
                f"interrupted and saved. Go on with: python -m moelet prove --run {shlex.quote(str(self.folder))}",
            )

    def _fill(self, pool: ProcessPoolExecutor, stopping: bool) -> None:
        """Give every idle worker a job."""
        while not stopping and len(self.running) < self.plan.jobs and self.outstanding():
            self.keep_to_budget(self.outstanding()[0])
            if not (jobs := self.outstanding()):
                return
            job = jobs[0]
            settings = study.job_settings(self.plan, job, self.data)
            future = pool.submit(run_job, settings, self.path(job))
            self.running[future] = (job, progress_of(self.path(job)))

    def _finish(self, future: "Future[str | None]", stopping: bool) -> None:
        """Take in how a job ended."""
        job, before = self.running.pop(future)
        try:
            problem = future.result()
        except BrokenProcessPool:
            if stopping:
                return
            raise TemporaryError(
                f"the process of job {job.folder} was killed, perhaps for want of memory. What it had saved is kept. "
                f"Run it again, with fewer --jobs if need be: python -m moelet prove --run "
                f"{shlex.quote(str(self.folder))}"
            ) from None
        if problem == STOPPED:
            return
        arm = self.plan.arm(job.arm)
        if problem is not None and not job.sweeps:
            self._leave_out(arm, f"job {job.folder}: {problem}")
        elif problem is not None:
            arm.sweep.append((job.factor, None))
            self.plan.notes.append(f"{arm.name}, learning rates x {job.factor:g}: {problem}")
        if job.sweeps or job.horizon < 1:
            drop_checkpoints(self.path(job))
        self.predicted += study.job_seconds(self.plan, job) * (1 - before)
        self.settle()
        self.save()

    def _leave_out(self, arm: study.Arm, why: str) -> None:
        """Go on without an arm that diverged with the learning rate that was best on short runs.

        Raises UserError where nothing would be left to compare.
        """
        if arm is self.plan.arms[0] or len(self.plan.standing) < 3:
            raise UserError(
                f"{why} There is no verdict without {arm.name!r}: make a new study, with a lower --lr-grid for it."
            )
        arm.left_out = True
        self.plan.notes.append(f"{arm.name} is left out: {why}")
        self.progress.say(self.plan.notes[-1])

    def _show(self) -> None:
        total = len(list(study.matrix(self.plan))) + sum(
            len(arm.sweep) + len(study.sweep_jobs(self.plan, arm)) for arm in self.plan.arms
        )
        done = len(self.results) + sum(len(arm.sweep) for arm in self.plan.arms)
        now = " + ".join(f"{job.folder} {progress_of(self.path(job)):.0%}" for job, _ in self.running.values())
        self.progress.show(f"{done}/{total} jobs | {now} | {duration(self.seconds_left(self.plan.seeds))} left", False)


def save_plan(plan: Plan, folder: Path) -> None:
    write_file(folder / PLAN, plan.to_json().encode())


def introduce(plan: Plan, folder: Path, progress: Progress) -> None:
    """Say what is about to be trained."""
    rows = [("study", str(folder))]
    for arm in plan.arms:
        size = f"{arm.parameters:,} parameters, {arm.active_parameters:,} active"
        rows.append((arm.name, f"{size}, {arm.tokens_per_second:,.0f} tokens/s"))
    active = max(arm.active_parameters for arm in plan.arms)
    epochs = plan.tokens / max(1, plan.text["tokens"])
    rows += [
        ("tokens", f"{plan.tokens:,}: {plan.tokens / active:.1f} per active parameter or more, {epochs:.2f} epochs"),
        ("horizons", ", ".join(f"{horizon:g}" for horizon in plan.horizons)),
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("learning rates", f"x {', '.join(f'{factor:g}' for factor in plan.grid)}"),
        ("time", f"about {duration(study.study_seconds(plan))} for all jobs"),
    ]
    progress.say(*table("moelet prove", rows), *plan.notes)


def prove(request: Request, folder: Path, progress: Progress, began: float) -> dict[str, Any]:
    """Carry out a study in `folder`, new or going on; write its findings there, say them and return them.

    Raises UserError before any work for what doesn't fit, Interrupted and TemporaryError with everything saved.
    """
    if folder.is_dir() and any(folder.iterdir()) and ((folder / HPARAMS).exists() or not (folder / LOCK).exists()):
        raise UserError(f"{folder} holds files that are not a study's. Give --run a folder that is empty or new.")
    clock = Clock(0.0, began)
    with lock(folder):
        plan = begin(request, folder, progress, clock)
        save_plan(plan, folder)
        data = prepare_text(plan, folder, progress)
        introduce(plan, folder, progress)
        done = Study(plan, folder, data, progress, clock)
        done.run()
        found = findings(plan, done.results)
        paths = write(found, folder)
    progress.say("", *(comparison["sentence"] for comparison in found["comparisons"]))
    progress.say(f"see   {' and '.join(map(str, paths))}")
    return found
