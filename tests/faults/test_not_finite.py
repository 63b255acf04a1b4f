"""Numbers that aren't finite, and losses that jump: the weights never take them in; the run says where they began."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from injection import POISONS, infect, moelet, number, places, poison_activation, poison_gradient, quick, write_settings
from processes import digests, rows
from safetensors.torch import load_file
from scorecard import Trials

from moelet import step
from moelet.data import START, training_batches
from moelet.diagnostics import row_origins
from moelet.finite import SPIKE_WINDOW, is_spike
from moelet.hparams import make_hparams
from moelet.precision import cpu_has_bf16
from moelet.state import Training, build
from moelet.step import train_step
from moelet.storage.manifest import checkpoint_steps
from moelet.tokenizer import Tokenizer

STEPS, EVERY = 8, 2
FORMATS = ["fp32", "fp16", *(["bf16"] if cpu_has_bf16() else [])]
KINDS = ("activation", "gradient", "loss")
Fault = Callable[[Training], None]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture
def settings(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    tokenizer.save(tmp_path / "given.model")
    given: dict[str, Any] = tiny_settings(
        tokenizer={"file": str(tmp_path / "given.model")},
        train={"train_steps": STEPS, "checkpoint_steps": EVERY, "keep_checkpoints": 99, "eval_tokens": 300},
    )
    return given


def poison_loss(monkeypatch: pytest.MonkeyPatch, value: float, at: int) -> Fault:
    """Return a fault that multiplies (NaN) or shifts (infinity: its gradients stay finite) the loss of one batch."""
    real = step.linear_cross_entropy

    def fault(training: Training) -> None:
        def cross_entropy(*arguments: Any) -> torch.Tensor:
            loss = real(*arguments)
            hit = number(training) == at and torch.is_grad_enabled()
            return loss if not hit else loss * value if math.isnan(value) else loss + value

        monkeypatch.setattr(step, "linear_cross_entropy", cross_entropy)

    return fault


def any_fault(
    trials: Trials, kind: str, training: Training, at: int, patch: pytest.MonkeyPatch
) -> tuple[str, Fault, str | None]:
    """Return where a number is poisoned, the fault, and the layer that is to be named (None: none can be)."""
    draw, value = trials.random, trials.random.choice(POISONS)
    if kind == "activation":
        place = draw.choice(places(training.model))
        return f"{value} out of {place}", poison_activation(place, value, at), place
    if kind == "gradient":
        name = draw.choice([name for name, _ in training.model.named_parameters()])
        return f"{value} in the gradient of {name}", poison_gradient(name, value, at), name
    return f"{value} as the loss", poison_loss(patch, value, at), None


def all_finite(run: Path) -> bool:
    found = [tensor for step in checkpoint_steps(run) for tensor in _tensors(run, step)]
    return bool(found) and all(bool(tensor.isfinite().all()) for tensor in found)


def _tensors(run: Path, step: int) -> list[torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08}"
    return [*load_file(folder / "model.safetensors").values(), *load_file(folder / "optimizer.safetensors").values()]


@pytest.mark.check(22)
def test_a_number_that_is_not_finite(
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """In fp32 and bf16 it ends with 78, weights untouched, and names step, layer and documents; fp16 skips, halves."""
    whole: dict[str, Path] = {}
    for index in range(trials.count(small=4, full=50)):
        precision, at = FORMATS[index % len(FORMATS)], trials.random.randrange(STEPS)
        settings["train"]["precision"] = precision
        given, run = write_settings(tmp_path / "given.json", settings), tmp_path / f"run-{index}"
        training = build(make_hparams(settings), Tokenizer.load(settings["tokenizer"]["file"]))
        if precision not in whole and precision != "fp16":
            whole[precision] = tmp_path / precision
            assert moelet(capsys, "train", given, "--run", whole[precision]).code == 0
        with monkeypatch.context() as patch:
            kind = KINDS[(index + index // len(FORMATS)) % len(KINDS)]
            what, fault, layer = any_fault(trials, kind, training, at, patch)
            with trials.one(f"{index}: {precision}, {what} at step {at + 1}"):
                infect(patch, fault)
                ended = moelet(capsys, "train", given, "--run", run)
                assert all_finite(run)
                if precision == "fp16":
                    assert ended.code == 0, ended.text
                    found = [(row["skipped_steps"], row["loss_scale"]) for row in rows(run)]
                    assert found == [(0, 65536.0)] * at + [(1, 32768.0)] * (STEPS - at)
                    continue
                assert ended.code == 78, ended.text
                assert_stopped_before(run, whole[precision], at)
                assert_told(run, ended.text, settings, at, layer)
                resumed = moelet(capsys, "train", "--resume", run, "--set", "train.bad_step=skip")
                assert resumed.code == 0 and "the batch is passed over" in resumed.text, resumed.text
                assert rows(run)[-1]["step"] == STEPS and rows(run)[-1]["skipped_steps"] == 1
                assert all_finite(run)


def assert_stopped_before(run: Path, whole: Path, at: int) -> None:
    """Every checkpoint is, byte for byte, one that the run without a fault wrote."""
    kept = checkpoint_steps(run)
    assert kept == list(range(EVERY, at + 1, EVERY)) or (at < EVERY and kept == [at])
    for kept_step in kept:
        name = f"step-{kept_step:08}/model.safetensors"
        theirs = whole / "checkpoints" / name
        assert not theirs.exists() or theirs.read_bytes() == (run / "checkpoints" / name).read_bytes()


def assert_told(run: Path, said: str, settings: dict[str, Any], at: int, layer: str | None) -> None:
    """The message and the file name the step, the layer and the documents of the batch."""
    (path,) = (run / "diagnostics").iterdir()
    found = json.loads(path.read_text())
    assert found["step"] == at + 1 and f"at step {at + 1}" in said and str(path) in said
    assert f"the checkpoint of step {checkpoint_steps(run)[-1]} is untouched".lower() in said.lower()
    if layer is not None:
        assert found["layer"] == layer and f"It begins in {layer}" in said
    hparams = make_hparams(settings)
    tokenizer = Tokenizer.load(settings["tokenizer"]["file"])
    assert len(found["row_losses"]) == 4
    origins = row_origins(hparams, tokenizer, found["cursor"], 4)
    assert [row["pieces"] for row in sorted(found["row_losses"], key=lambda row: row["row"])] == [
        origin.pieces for origin in origins
    ]
    assert found["row_losses"][0]["pieces"][0] in said


@pytest.mark.check(22)
def test_documents_of_a_batch(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Every row's documents, found again from the cursor before it, hold the row's text."""
    for index in range(trials.count(small=4, full=40)):
        packing, window = trials.random.random() < 0.6, trials.random.choice([3, 17, 64])
        data = {"packing": packing, "shuffle_window": window, "piece_chars": trials.random.choice([64, 300, 8192])}
        hparams = make_hparams(tiny_settings(data=data, train={"seed": index}))
        with trials.one(json.dumps(data)):
            stream = training_batches(hparams.data, tokenizer, 32, [5], hparams.train.seed, dict(START))
            batches = [next(stream) for _ in range(trials.random.randrange(2, 30))]
            origins = row_origins(hparams, tokenizer, batches[-2][1], 5)
            for ids, origin in zip(batches[-1][0].input_ids.tolist(), origins, strict=True):
                assert_holds(tokenizer, ids, origin.pieces)


def assert_holds(tokenizer: Tokenizer, ids: list[int], pieces: list[str]) -> None:
    """Whether the stretches of a row between marks are in the documents that are said to be its own, in this order."""
    marks = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id)
    stretches = [list(group) for mark, group in itertools.groupby(ids, lambda token: token in marks) if not mark]
    texts = []
    for name in pieces:
        path, _, begin = name.rpartition("#")
        texts.append(text_of(path)[int(begin) :])
    assert 1 <= len(stretches) <= len(texts) <= len(stretches) + 2
    for stretch in stretches:
        words = tokenizer.decode(stretch).strip("\N{REPLACEMENT CHARACTER}")
        assert any(words in text for text in texts), (words, pieces)


def text_of(place: str) -> str:
    """The text of a document by its name: a file, or FILE:ROW of a .jsonl file."""
    if Path(place).exists():
        return Path(place).read_text(encoding="utf-8")
    path, _, row = place.rpartition(":")
    text: str = json.loads(Path(path).read_text(encoding="utf-8").splitlines()[int(row) - 1])["text"]
    return text


@pytest.mark.check(22)
def test_fp16_that_overflows_again_and_again(
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Exit code 78 with advice, once the scale is below 1 or after 20 batches in a row; the last checkpoint stays."""
    settings["train"]["precision"] = "fp16"
    given = write_settings(tmp_path / "given.json", settings)
    for index in range(trials.count(small=2, full=10)):
        at, huge = trials.random.randrange(1, STEPS), index % 2 == 1
        run = tmp_path / f"run-{index}"
        with trials.one(f"{index}: from step {at + 1} on, scale {'2^30' if huge else '2^16'}"):
            with monkeypatch.context() as patch:
                infect(patch, overflowing(at, 2.0**30 if huge else 2.0**16))
                ended = moelet(capsys, "train", given, "--run", run)
            assert ended.code == 78 and "fp16 cannot represent" in ended.text and '"bf16"' in ended.text, ended.text
            times, scale = (20, "1024") if huge else (17, "0.5")
            assert (
                f"overflowed {times} times in a row at step {at + 1}, and the loss scale is down to {scale}"
                in ended.text
            )
            assert all_finite(run)


def overflowing(at: int, scale: float) -> Fault:
    def fault(training: Training) -> None:
        assert training.scaler is not None

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.inf if training.step >= at else gradient

        training.model.norm.weight.register_hook(hook)
        real = training.model.forward

        def forward(*arguments: Any) -> Any:
            if training.step == at and training.skipped_in_a_row == 0:
                training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": scale})
            return real(*arguments)

        training.model.forward = forward  # type: ignore[method-assign]

    return fault


@pytest.mark.check(22)
def test_weights_that_went_bad_on_their_own(
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """No checkpoint takes them in, though no gradient showed it: broken memory, or an update far too large."""
    given = write_settings(tmp_path / "given.json", settings)
    for index in range(trials.count(small=1, full=10)):
        at, run = trials.random.randrange(STEPS // EVERY) * EVERY + 1, tmp_path / f"run-{index}"
        of_optimizer = index % 2 == 1

        with trials.one(f"{index}: after step {at + 1}"):
            with monkeypatch.context() as patch:
                infect(patch, going_bad(at, of_optimizer, trials.random.choice(POISONS)))
                ended = moelet(capsys, "train", given, "--run", run)
            assert ended.code == 78 and "aren't finite" in ended.text, ended.text
            assert checkpoint_steps(run) == list(range(EVERY, at, EVERY)) and (at == 1 or all_finite(run))


def going_bad(at: int, of_optimizer: bool, value: float) -> Fault:
    def fault(training: Training) -> None:
        real = training.optimizer.step

        def bad_step() -> None:
            real()
            if training.step == at:
                weight = training.model.embed.tokens.weight
                with torch.no_grad():
                    (training.optimizer.state[weight]["exp_avg"] if of_optimizer else weight).view(-1)[7] = value

        training.optimizer.step = bad_step  # type: ignore[method-assign]

    return fault


# spikes


def test_a_spike_is_far_above_the_last_losses() -> None:
    """Without a setting none is; nor before half a window is known, nor for a loss that falls."""
    losses = [3.0 + 0.1 * (-1) ** n for n in range(SPIKE_WINDOW)]
    assert is_spike(losses, 3.7, 6.0) and not is_spike(losses, 3.55, 6.0)
    assert not is_spike(losses, 9.0, None) and not is_spike(losses, 0.0, 6.0)
    assert not is_spike(losses[: SPIKE_WINDOW // 2 - 1], 9.0, 6.0) and is_spike(losses[: SPIKE_WINDOW // 2], 9.0, 6.0)


@pytest.mark.check(22)
@pytest.mark.parametrize("answer", ["stop", "skip", "rewind"])
def test_a_loss_that_jumps(
    answer: str,
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """As set, the run stops, passes the batch over, or goes back to a checkpoint and on behind the batch."""
    monkeypatch.setattr("moelet.finite.SPIKE_WINDOW", 4)
    settings["model"]["dropout"] = 0.0
    settings["train"] |= {"spike_deviations": 50.0, "bad_step": answer, "checkpoint_steps": 3, "train_steps": 8}
    given = write_settings(tmp_path / "given.json", settings)
    for index in range(trials.count(small=1, full=8)):
        at, run = trials.random.randrange(4, 8), tmp_path / f"run-{index}"
        with trials.one(f"{index}: {answer} at step {at + 1}"):
            with monkeypatch.context() as patch:
                infect(patch, poison_loss(patch, 1e5, at))
                ended = moelet(capsys, "train", given, "--run", run)
            assert all_finite(run) and f"at step {at + 1}" in ended.text and "deviations above the mean" in ended.text
            (path,) = (run / "diagnostics").iterdir()
            assert json.loads(path.read_text())["layer"] is not None
            if answer == "stop":
                assert ended.code == 78 and checkpoint_steps(run)[-1] == at // 3 * 3
                continue
            assert ended.code == 0, ended.text
            back_to = at if answer == "skip" else at // 3 * 3
            assert "the batch is passed over" in ended.text or f"back to the checkpoint of step {back_to}" in ended.text
            assert [row["step"] for row in rows(run)] == list(range(1, 9))
            assert rows(run)[-1]["skipped_steps"] == at - back_to + 1
            assert digests(run)["model.safetensors"] == expected_digest(
                settings, at, back_to, tmp_path / f"want-{index}"
            )


def expected_digest(settings: dict[str, Any], at: int, back_to: int, folder: Path) -> str:
    """The weights by hand: steps up to `back_to`, then on with the batches behind number `at`."""
    import hashlib

    import safetensors.torch

    hparams = make_hparams(settings)
    tokenizer = Tokenizer.load(settings["tokenizer"]["file"])
    training = build(hparams, tokenizer)
    stream = training_batches(hparams.data, tokenizer, 32, hparams.micro_batches, 0, dict(START))
    for batch, (micro, _) in enumerate(itertools.islice(stream, 8 + at - back_to + 1)):
        if batch < back_to or batch > at:
            train_step(training, [micro])
    return hashlib.sha256(safetensors.torch.save(training.model.state_dict())).hexdigest()


@pytest.mark.check(22)
def test_bad_batches_without_end(
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """After 20 passed over in a row, or going back three times to one checkpoint, the run ends with 78."""
    for index in range(trials.count(small=1, full=6)):
        answer, at = ["skip", "rewind"][index % 2], trials.random.randrange(3, 8)
        settings["train"]["bad_step"] = answer
        given, run = write_settings(tmp_path / "given.json", settings), tmp_path / f"run-{index}"
        with trials.one(f"{index}: {answer} from step {at + 1} on"):
            with monkeypatch.context() as patch:
                infect(patch, poison_from(at))
                ended = moelet(capsys, "train", given, "--run", run)
            assert ended.code == 78 and "it is the weights, not the text" in ended.text, ended.text
            assert all_finite(run)
            shutil.rmtree(run)


def poison_from(at: int) -> Fault:
    def fault(training: Training) -> None:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.nan if training.step >= at else gradient

        training.model.norm.weight.register_hook(hook)

    return fault
