"""The ranks of a run that don't lead: they do what the leader orders, until it says that this is the end."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moelet.data import Validation
from moelet.evaluate import evaluate
from moelet.finite import BadStep
from moelet.hparams import make_hparams
from moelet.parallel.orders import BUILD, END, EVALUATE, HOLD_OUT, RESTORE, SAVE, STEP, advice
from moelet.parallel.ranks import Lost, Team, leave
from moelet.parallel.rows import deal
from moelet.parallel.watch import Watch
from moelet.state import Training, build, restore, write_parts
from moelet.step import train_step
from moelet.stopping import Asked, stop_signals
from moelet.storage.checkpoint import read
from moelet.tokenizer import Tokenizer


def follow(team: Team) -> int:
    """Do what the leader orders until the run's end; return the exit code, which is the leader's.

    Raises TemporaryError where a rank is lost, the leader included.
    """
    code = _follow(team)
    leave(team)
    return code


def _follow(team: Team) -> int:
    with stop_signals(aloud=False) as asked:
        try:
            order = team.ordered()
        except Lost as error:
            raise Lost(f"{error}: rank 0 ended before training began, and has said why") from error
        if order["do"] == END:
            return int(order["code"])
        assert order["do"] == BUILD
        training = build(make_hparams(order["hparams"]), Tokenizer(bytes.fromhex(order["tokenizer"])), team)
        with Watch(team, advice(order["run"])):
            return _Follower(training, asked).follow()


class _Follower:
    def __init__(self, training: Training, asked: Asked) -> None:
        self.training, self.asked = training, asked
        self.validation = Validation([], 0, 0, 0.0)

    def follow(self) -> int:
        work: dict[str, Callable[..., None]] = {
            RESTORE: self.restore,
            HOLD_OUT: self.hold_out,
            STEP: self.step,
            EVALUATE: self.evaluate,
            SAVE: self.save,
        }
        while True:
            order = self.training.team.ordered()
            if (what := order.pop("do")) == END:
                return int(order["code"])
            work[what](**order)

    def restore(self, run: str, step: int) -> None:
        restore(self.training, read(Path(run), step, self.training.layout.part))

    def hold_out(self, rows: list[int], n_tokens: int, n_bytes: int) -> None:
        batches = deal(self.training.team, None, rows, self.training.hparams.model.max_length)
        self.validation = Validation(batches, n_tokens, n_bytes, 0.0)

    def step(self, rows: list[int], plan: list[list[int]]) -> None:
        training = self.training
        training.plan = plan
        batches = deal(training.team, None, rows, training.hparams.model.max_length)
        training.team.highest(self.asked.stop or 0, int(self.asked.save))
        self.asked.save = False
        with suppress(BadStep):  # the leader says what follows
            train_step(training, batches)

    def evaluate(self) -> None:
        training = self.training
        evaluate(training.model, self.validation, training.dtype, layout=training.layout)

    def save(self, folder: str, key: str) -> None:
        write_parts(self.training, Path(folder), key)
