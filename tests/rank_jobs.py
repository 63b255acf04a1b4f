"""What tests have ranks do, each in a process of its own (see `crew`)."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moelet.cli
import moelet.follow
import moelet.modelling
import moelet.session
import moelet.state
import moelet.storage.checkpoint
from moelet.data import START, training_batches
from moelet.hparams import make_hparams
from moelet.parallel.ranks import Team, join, leave, local
from moelet.parallel.rows import deal, shares
from moelet.parallel.started import started_rank
from moelet.state import Training, build, restore, snapshot
from moelet.step import train_step
from moelet.storage import checkpoint
from moelet.storage.manifest import folder_of
from moelet.tokenizer import Tokenizer


def built(settings: dict[str, Any], tokenizer: str, team: Team) -> Training:
    return build(make_hparams(settings), Tokenizer.load(tokenizer), team)


def steps(settings: dict[str, Any], tokenizer: str, count: int, out: str) -> None:
    """Make `count` steps; leave in the folder `out` each step's report, and the first one's gradients, unclipped."""
    team = join()
    training = built(settings, tokenizer, team)
    hparams, length = training.hparams, training.hparams.model.max_length
    rows = training_batches(hparams.data, training.tokenizer, length, hparams.micro_batches, 0, START)
    if training.scaler is not None:  # one that overflows again and again
        training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_factor=2.0**4, growth_interval=2)
    reports: list[dict[str, Any]] = []
    for number in range(count):
        batches = [next(rows)[0] for _ in hparams.micro_batches]
        hand = deal(team, batches if team.leads else None, shares(batches, team.size), length)
        if number == 0:
            _keep_gradients(training, Path(out))
        reports.append(train_step(training, hand)._replace(trouble=None)._asdict())
    Path(out, f"reports-{team.rank}.json").write_text(json.dumps(reports))
    held = sum(local(p).numel() for name, p in training.model.named_parameters() if ".experts." in name)
    held_state = sum(
        value.numel()
        for name, p in training.model.named_parameters()
        for value in training.optimizer.state[p].values()
        if ".experts." in name and value.ndim
    )
    sent = [m.exchange.rows_sent for m in training.model.modules() if getattr(m, "exchange", None) is not None]
    scale = None if training.scaler is None else training.scaler.get_scale()
    Path(out, f"held-{team.rank}.json").write_text(
        json.dumps({"experts": held, "state": held_state, "sent": sent, "scale": scale})
    )
    if team.leads:
        Path(out, checkpoint.HPARAMS).write_text(hparams.to_json())
        (Path(out) / checkpoint.TOKENIZER).write_bytes(training.tokenizer.model_bytes)
        checkpoint.save(Path(out), snapshot(training, {}))
    elif training.layout.divided:
        Follower(training).save()
    team.total(0)  # nobody ends before all is written
    leave(team)


def _keep_gradients(training: Training, out: Path) -> None:
    """Have the optimizer write this rank's gradients before its first step, in the place of its state."""
    step, team = training.optimizer.step, training.team

    def keep(*given: Any, **named: Any) -> Any:
        training.optimizer.step = step  # type: ignore[method-assign]
        gradients = {}
        for name, parameter in training.model.named_parameters():
            place = training.layout.place(name, parameter)
            if place is not None and parameter.grad is not None:
                gradients[name + place] = local(parameter.grad).clone()
        out.mkdir(exist_ok=True)
        checkpoint.write_packed(out, checkpoint.pack_tensors(team.rank, gradients, {}))
        return step(*given, **named)

    training.optimizer.step = keep  # type: ignore[method-assign]


class Follower:
    """A rank that answers one order to save."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def save(self) -> None:
        from moelet.follow import _Follower
        from moelet.stopping import Asked

        order = self.training.team.ordered()
        _Follower(self.training, Asked()).save(order["folder"], order["key"])


def reload(settings: dict[str, Any], tokenizer: str, run: str, step: int, out: str) -> None:
    """Put a checkpoint back, in the layout of these settings, and save it again in the run folder `out`."""
    team = join()
    training = built(settings, tokenizer, team)
    restore(training, checkpoint.read(Path(run), step, training.layout.part))
    if team.leads:
        checkpoint.save(Path(out), snapshot(training, {}))
        assert folder_of(Path(out), step).is_dir()
    elif training.layout.divided:
        Follower(training).save()
    team.total(0)
    leave(team)


def train(*arguments: str) -> int:
    return moelet.cli.main(["train", *arguments])


PLACES = {  # where a fault comes: the places that look a function up, and its name there
    "step": ([moelet.session, moelet.follow], "train_step"),
    "forward": ([moelet.modelling.GPT], "forward"),
    "evaluation": ([moelet.session, moelet.follow], "evaluate"),
    "save": ([moelet.state, moelet.storage.checkpoint], "write_synced"),
    "parts": ([moelet.state], "write_packed"),
}


def train_with_fault(victim: int, kind: str, place: str, call: int, *arguments: str) -> int:
    """Train; at the given call of a place the victim is killed or stopped, or its work raises.

    For every other call checkpoints are written while training goes on, as on GPUs.
    """
    moelet.session.WAITING = () if call % 2 == 0 else ("cpu",)
    owners, name = PLACES[place]
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            if kind == "error":
                raise KeyError("planted")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])

    for owner in owners if started_rank() == victim else []:
        if (work := getattr(owner, name, None)) is not None:

            def failing(*given: Any, work: Callable[..., Any] = work, **named: Any) -> Any:
                fail()
                return work(*given, **named)

            setattr(owner, name, failing)
    return train(*arguments)


JOBS: dict[str, Callable[..., Any]] = {
    "steps": steps,
    "reload": reload,
    "train": train,
    "train_with_fault": train_with_fault,
}


def work(job: str, arguments: list[Any]) -> int:
    """Do one of JOBS; return its exit code."""
    torch.set_num_threads(1)
    code = JOBS[job](*arguments)
    return code if isinstance(code, int) else 0
