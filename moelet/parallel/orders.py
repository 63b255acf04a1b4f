"""What the leader of a run has the other ranks do; how they do it is `moelet.follow`'s.

Each order is one message, and whatever both sides then do together, in the same sequence. Alone nothing is sent.
"""

import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moelet.data import Batch, Validation
from moelet.errors import TemporaryError, UserError
from moelet.hparams import Hparams
from moelet.modelling import GPT, shapes_of
from moelet.parallel.ranks import Team, local
from moelet.parallel.rows import deal, shares
from moelet.state import SAVE_PARTS, Training, build
from moelet.tokenizer import Tokenizer

BUILD, RESTORE, HOLD_OUT, STEP, EVALUATE, SAVE, END = (
    "build", "restore", "hold out", "step", "evaluate", SAVE_PARTS, "end",
)  # fmt: skip


@contextmanager
def refusing(team: Team) -> Iterator[None]:
    """Where what the leader was asked for is refused before the others have anything to do, have them end as it does,
    without a word of their own."""
    try:
        yield
    except (UserError, TemporaryError) as error:
        if not team.told:
            team.order(END, code=error.exit_code)
        raise


def again(run: Path, team: Team) -> str:
    """Return the command that goes on with a run, by as many ranks."""
    start = "python" if team.alone else f"torchrun --nproc-per-node {team.size}"
    return f"{start} -m moelet train --resume {shlex.quote(str(run))}"


def advice(run: str | Path) -> str:
    """Return what to do where a rank is lost."""
    command = f"train --resume {shlex.quote(str(run))}"
    return f"Start all ranks again, with {command}: the run goes on from its newest checkpoint."


def build_everywhere(hparams: Hparams, tokenizer: Tokenizer, team: Team, run: Path) -> Training:
    """Return a run at its first step, as all ranks have it now. Raises UserError as `build`."""
    settings, model = hparams.model_dump(mode="json"), tokenizer.model_bytes.hex()
    team.order(BUILD, hparams=settings, tokenizer=model, run=str(run))
    return build(hparams, tokenizer, team)


def order_restore(training: Training, run: Path, step: int) -> None:
    """Have the other ranks read a checkpoint, from the same folder, and go on from it."""
    training.team.order(RESTORE, run=str(run.absolute()), step=step)


def hold_out(training: Training, validation: Validation) -> Validation:
    """Return this rank's rows of the held-out text; the others have theirs then."""
    team, rows = training.team, shares(validation.batches, training.team.size)
    team.order(HOLD_OUT, rows=rows, n_tokens=validation.n_tokens, n_bytes=validation.n_bytes)
    return validation._replace(batches=deal(team, validation.batches, rows, training.hparams.model.max_length))


def hand_out(training: Training, batches: list[Batch]) -> list[Batch]:
    """Return this rank's rows of a step that all ranks make now."""
    team, rows = training.team, shares(batches, training.team.size)
    team.order(STEP, rows=rows, plan=training.plan)
    return deal(team, batches, rows, training.hparams.model.max_length)


def model_to_sample(training: Training) -> GPT | None:
    """Return a model that this rank alone can have write text; None where no rank has all of it."""
    if training.team.alone:
        return training.model
    if training.layout.divided:
        return None
    model = GPT(training.hparams.model, training.tokenizer.vocab_size).to(training.device)
    model.load_state_dict({name: local(tensor) for name, tensor in training.model.state_dict().items()})
    return model


def count_parameters(training: Training) -> int:
    """Return how many parameters the model has on all ranks together."""
    names = {name for name, _ in training.model.named_parameters()}
    shapes = shapes_of(training.hparams.model, training.tokenizer.vocab_size)
    return sum(math.prod(shape) for name, shape in shapes.items() if name in names)
