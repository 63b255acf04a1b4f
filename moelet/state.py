"""Everything a run is made of: built, saved, put back.

Nothing random has a state: what a step draws comes from (seed, step, micro-step).
"""

import dataclasses
import math
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from moelet.data import START
from moelet.errors import UserError, pick
from moelet.finite import require_finite
from moelet.health import Health
from moelet.hparams import Hparams
from moelet.memory import require_memory
from moelet.modelling import GPT, shapes_of
from moelet.optim import OPTIMIZERS, Plan
from moelet.parallel.layout import Layout, layout_of, new_model
from moelet.parallel.ranks import ALONE, Team, local
from moelet.precision import choose_device, choose_dtype, make_scaler
from moelet.stopping import never
from moelet.storage.checkpoint import Checkpoint, pack_tensors, write_packed
from moelet.storage.manifest import Part
from moelet.storage.saved_state import check_optimizer, check_state
from moelet.text.documents import Cursor
from moelet.tokenizer import Tokenizer

SAVE_PARTS = "save"  # what the leader orders, where a checkpoint is of parts


@dataclasses.dataclass
class Training:
    """Everything a run is made of. The second half is what changes, and what a checkpoint saves."""

    hparams: Hparams
    tokenizer: Tokenizer
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    device: torch.device
    dtype: torch.dtype
    step: int = 0  # optimizer steps made
    tokens: int = 0  # predicted tokens seen
    seconds: float = 0.0  # of training alone
    elapsed: float = 0.0  # of everything, all sessions together
    plan: Plan = dataclasses.field(default_factory=list)  # how many steps the run has
    skipped_steps: int = 0  # batches passed over: fp16 overflowed, or they were bad and the settings say so
    skipped_in_a_row: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)  # of the last steps, for spikes
    micro_rows: int | None = None  # the most rows a micro-step since memory ran out; None: as the settings say
    cursor: Cursor = dataclasses.field(default_factory=lambda: dict(START))
    best: dict[str, float] | None = None  # step and val_loss of the best checkpoint
    health: Health = dataclasses.field(default_factory=Health)
    pending: dict[str, Any] | None = None  # this step's line of metrics.jsonl, where it still waits for an evaluation
    run_id: str = ""  # of the run in its folder
    layout: Layout = dataclasses.field(default_factory=Layout)  # of its parts over ranks
    enough: Callable[[], bool] = never  # whether to leave off in the middle of a step

    @property
    def team(self) -> Team:
        return self.layout.team

    @property
    def total_steps(self) -> int | None:
        """The steps after which the run ends, None before a time budget knows."""
        return self.plan[-1][1] if self.plan else None


def build(hparams: Hparams, tokenizer: Tokenizer, team: Team = ALONE) -> Training:
    """Return a run at its first step: model, optimizer and precision; with other ranks, all of them call this.

    Raises UserError for what doesn't fit.
    """
    layout = layout_of(hparams, team)
    device = choose_device(hparams.train.device)
    dtype = choose_dtype(hparams.train.precision, device)
    shapes = shapes_of(hparams.model, tokenizer.vocab_size)
    whole, here = sum(map(math.prod, shapes.values())), layout.count(shapes)
    require_memory(4 * here, f"a model of {whole / 1e6:,.0f}M parameters")
    torch.manual_seed(hparams.train.seed)
    model = new_model(hparams.model, tokenizer.vocab_size, layout, device)
    model.checkpoint_activations = hparams.train.checkpoint_activations
    optimizer = pick(OPTIMIZERS, hparams.optim.optimizer, "optim.optimizer")(model, hparams.optim)
    plan = [] if hparams.total_steps is None else [[0, hparams.total_steps]]
    scaler = make_scaler(dtype, device)
    return Training(hparams, tokenizer, model, optimizer, scaler, device, dtype, plan=plan, layout=layout)


def snapshot(training: Training, marks: dict[str, str]) -> Checkpoint:
    """Return everything that the rest of the run depends on; where no rank has all of it, a way to have the other ranks
    write theirs."""
    state = {name: getattr(training, name) for name in (*PROGRESS, *LATER)}
    state |= {"health": training.health.state(), "batch_size": training.hparams.train.batch_size}
    state["scaler"] = None if training.scaler is None else training.scaler.state_dict()
    others = partial(_have_parts_written, training) if training.layout.divided else None
    return Checkpoint(training.step, *parts(training), state, marks, training.run_id, others)


def parts(training: Training) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a checkpoint takes from this rank of the model and of the optimizer's state.

    A part of a tensor is called `name@row`, by the first of its rows; a whole one by its name.
    """
    layout, parameters = training.layout, dict(training.model.named_parameters())
    model, optimizer = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in training.model.state_dict().items():
        place = layout.place(name, tensor) if name in parameters else ""
        if place is not None and (name in parameters or training.team.leads):
            model[name + place] = local(tensor)
    for name, parameter in parameters.items():
        place = layout.place(name, parameter)
        for key, value in training.optimizer.state[parameter].items():
            if place is not None and (value.ndim or place in ("", "@0")):
                optimizer[f"{name}:{key}" + (place if value.ndim else "")] = value
    return model, optimizer


def _have_parts_written(training: Training, folder: Path) -> Callable[[], dict[str, Part]]:
    """Have the other ranks write their parts of a checkpoint into a folder, as they are now.

    What is returned waits for them, in any thread, and returns what they wrote; it raises OSError where one of them
    can't, UserError where one of them won't.
    """
    team, key = training.team, f"parts/{uuid.uuid4().hex}"
    team.order(SAVE_PARTS, folder=str(folder.absolute()), key=key)

    def written() -> dict[str, Part]:
        told = team.posted(key)
        for how, what in told:
            if how == "full":
                raise OSError(*what)
            if how == "refused":
                raise UserError(what)
        return {name: Part(*part) for _, files in told for name, part in files.items()}

    return written


def write_parts(training: Training, folder: Path, key: str) -> None:
    """Write this rank's parts of a checkpoint, as they are now, while it goes on; the leader hears how that ended."""
    files, refused = dict[str, bytes](), None
    try:
        model, optimizer = parts(training)
        require_finite(model, "the weight")
        require_finite(optimizer, "the optimizer's")
        files = pack_tensors(training.team.rank, model, optimizer)
    except UserError as error:
        refused = str(error)
    Thread(target=_write_and_tell, args=(training.team, folder, key, files, refused), daemon=True).start()


def _write_and_tell(team: Team, folder: Path, key: str, files: dict[str, bytes], refused: str | None) -> None:
    if refused is not None:
        team.post(key, ["refused", refused])
        return
    try:
        team.post(key, ["written", write_packed(folder, files)])
    except OSError as error:
        team.post(key, ["full", [error.errno, f"{error.strerror}, on rank {team.rank}"]])
    except Exception as error:  # else the leader would wait for ever
        team.give_up(error)
        raise


PROGRESS = ("step", "tokens", "seconds", "elapsed", "plan", "skipped_steps", "skipped_in_a_row", "cursor", "best")
LATER: dict[str, Any] = {
    "losses": [],
    "micro_rows": None,
    "pending": None,
}  # what checkpoints of the first runs don't have, and what it was then


def restore(training: Training, saved: Checkpoint) -> None:
    """Put a snapshot back, of which `saved` has the parts that lie here; from here on the run is the one it would have
    been. Raises UserError for another's."""
    settings = training.hparams.model
    check_state(saved.state, settings.n_layers, settings.n_experts)
    parameters = dict(training.model.named_parameters())
    shapes = {name: tuple(saved.model[name].shape) for name in parameters if name in saved.model}
    check_optimizer(saved.optimizer, shapes, training.hparams.optim.optimizer)
    if training.team.alone:
        training.model.load_state_dict(saved.model)
    else:
        with torch.no_grad():
            for name, tensor in training.model.state_dict().items():
                local(tensor).copy_(saved.model[name])
    training.optimizer.state.clear()
    for key, value in saved.optimizer.items():
        name, entry = key.rsplit(":", 1)
        training.optimizer.state[parameters[name]][entry] = value.to(training.device)
    for name in PROGRESS:
        setattr(training, name, saved.state[name])
    for name, before in LATER.items():
        setattr(training, name, saved.state.get(name, before))
    if saved.state.get("batch_size") != training.hparams.train.batch_size:
        training.micro_rows = None  # another size was set, or found: it is to be tried as it is
    training.health = Health.restored(saved.state.get("health", {}))
    training.run_id = saved.run_id
    if training.scaler is not None and saved.state["scaler"] is not None:
        training.scaler.load_state_dict(saved.state["scaler"])
