"""Whether the model is what it should be: causal, tied, balanced, ignorant at its start, the same after a resume."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelet.attention import ATTENTION, causal_attention
from moelet.data import Batch
from moelet.foresee.patient import FAULT, LENGTH, OK, ROWS, WIDTH, Finding, Patient, numbers
from moelet.kernels.native import why_not
from moelet.kv_cache import KVCache
from moelet.modelling import GPT
from moelet.moe import Router
from moelet.precision import autocast
from moelet.state import Training, restore, snapshot
from moelet.step import StepReport, train_step
from moelet.storage import checkpoint
from moelet.train import begin_run

LEAK = 1e-4  # relative: what rounding in another order may change, in float32; a leak changes whole percents
START = 0.03  # the share by which the first loss may differ from ln V
FOLLOWED = 0.05  # of a router's size, along its gradient
STEPS, SAVED = 4, 2  # of the run that is resumed
REPORTED = "This version of moelet is damaged or changed here: install it again, and report it if this stays."


def changed(before: Tensor, after: Tensor) -> float:
    """Return the largest change, relative to the size of what was there."""
    return float((after - before).abs().amax() / before.abs().amax().clamp(min=1e-30))


def causality(patient: Patient) -> Iterator[Finding]:
    """Whether nothing before a token changes when it does: in the whole model, and in each way to compute attention."""
    faults = []
    model, ids, others = patient.model(), patient.ids(1), patient.ids(2)
    length = ids.shape[1]
    with torch.no_grad():
        for at in (1, length // 2 + 1, length - 1):  # not where vectors of numbers begin
            mixed = torch.where(torch.arange(length) >= at, others, ids)
            before, after = (model(x.to(patient.device)).hidden[:, :at] for x in (ids, mixed))
            if not changed(before, after) <= LEAK:
                faults.append(f"tokens from {at} on change what the model says before them")
    faults += cached(patient, model, ids)
    faults += [f"attention {name!r} sees {what}" for name, what in leaks(patient)]
    if faults:
        yield Finding("causality", FAULT, "; ".join(faults), f"Don't train: the model could copy. {REPORTED}")
    else:
        yield Finding("causality", OK, "no token sees a later one, nor another document's")


def cached(patient: Patient, model: GPT, ids: Tensor) -> list[str]:
    """Return what is wrong with new tokens that come several at a time on cached ones."""
    third = ids.shape[1] // 3
    with torch.no_grad():
        whole = model(ids.to(patient.device)).hidden
        cache = KVCache(model.settings)
        parts = [model(part.to(patient.device), None, cache).hidden for part in ids.split(max(1, third), 1)]
    same = changed(whole, torch.cat(parts, 1)) <= 10 * LEAK  # other routines, other rounding
    return [] if same else ["tokens that come in parts, on a cache, are told otherwise than at once"]


def leaks(patient: Patient) -> Iterator[tuple[str, str]]:
    """Yield the ways to compute attention that see what they must not, and what that is."""
    shape, device, half = (ROWS, 2, LENGTH, WIDTH // 2), patient.device, LENGTH // 2 + 1
    q, k, v = (numbers(seed, *shape, device=device).detach() for seed in (21, 22, 23))
    documents = (torch.arange(LENGTH, device=device) >= half).long().expand(ROWS, LENGTH) + 1
    for name in ATTENTION:
        if name == "blocked" and (device.type != "cpu" or why_not(torch.float32) is not None):
            continue
        later = [x.clone() for x in (k, v)]
        for x in later:
            x[:, :, half:] += 1
        before, after = (causal_attention(q, a, b, None, 0.0, name)[:, :, :half] for a, b in ((k, v), later))
        if not changed(before, after) <= LEAK:
            yield name, "later tokens"
        first = [x.clone() for x in (k, v)]
        for x in first:
            x[:, :, :half] += 1
        before, after = (causal_attention(q, a, b, documents, 0.0, name)[:, :, half:] for a, b in ((k, v), first))
        if not changed(before, after) <= LEAK:
            yield name, "other documents"


def tying(patient: Patient) -> Iterator[Finding]:
    """Whether input and output read one table, where the settings say so."""
    if not patient.hparams.model.tie_embeddings:
        yield Finding("tying", OK, "off: the output has a table of its own")
        return
    model, ids = patient.model(), patient.ids(4).to(patient.device)
    unused = int(ids.max()) + 1 if int(ids.max()) + 1 < model.vocab_size else 0  # 0 isn't drawn
    table = model.embed.tokens.weight
    with torch.no_grad():
        before = model.logits(model(ids).hidden)
        table[unused] += 1
        after = model.logits(model(ids).hidden)
        wanted = model.features(model(ids).hidden) @ table.T
    moved = changed(before[..., unused], after[..., unused]) > LEAK
    if model.table.data_ptr() == table.data_ptr() and moved and changed(wanted, after) <= LEAK:
        yield Finding("tying", OK, "input and output read one table")
    else:
        yield Finding("tying", FAULT, "the output doesn't read the input's table, as tie_embeddings says", REPORTED)


def balance(patient: Patient) -> Iterator[Finding]:
    """Whether what should keep experts in balance moves the routers, and the right way."""
    hparams = patient.small
    if hparams.model.n_experts == 1:
        yield Finding("balance", OK, "a dense model: nothing to balance")
        return
    if hparams.balance.loss is None and hparams.balance.bias_rate is None:
        told = "balance.loss and balance.bias_rate are null: nothing keeps experts in use"
        yield Finding("balance", "note", told, 'Set balance.loss to "switch".')
        return
    if hparams.balance.loss is not None:
        yield _slope(patient)
    if hparams.balance.bias_rate is not None:
        training = _lopsided(patient, {})
        train_step(training, [patient.batch(5)])
        biases = [router.bias for router in _routers(training) if router.bias is not None]
        if biases and all(bool((bias[1:] > 0).any()) for bias in biases):
            yield Finding("balance", OK, "the selection bias moves towards idle experts")
        else:
            yield Finding("balance", FAULT, "balance.bias_rate is set and no bias moves", REPORTED)


def _routers(training: Training) -> list[Router]:
    return [module for module in training.model.modules() if isinstance(module, Router)]


def _lopsided(patient: Patient, balance: dict[str, object]) -> Training:
    """Return a run whose routers all lean to the first expert."""
    training = patient.training(balance=balance, model={"dropout": 0.0})
    training.model.load_state_dict(patient.model().state_dict())
    with torch.no_grad():
        for router in _routers(training):
            router.weight[0] += 0.3 * router.weight[1:].abs().amax()
    return training


def _slope(patient: Patient) -> Finding:
    """Look at a step's gradient of the routers with and without the balance loss, and follow the difference."""
    found = []
    for alpha in (0.0, 1.0):
        training, gradients = _lopsided(patient, {"alpha": alpha}), dict[str, Tensor]()
        report = _gradients(training, patient, gradients)
        found.append((gradients, report))
    (without, _), (with_, report) = found
    slope = {name: with_[name] - without[name] for name in with_}
    size = math.sqrt(sum(float(gradient.square().sum()) for gradient in slope.values()))
    whole = math.sqrt(sum(float(gradient.square().sum()) for gradient in with_.values()))
    if not size > 1e-3 * whole or report.balance_loss is None:
        return Finding("balance", FAULT, "the balance loss has no gradient: experts will die", REPORTED)
    moved = _lopsided(patient, {"alpha": 1.0})
    with torch.no_grad():
        for name, parameter in moved.model.named_parameters():
            if name in slope:
                parameter.sub_(slope[name] * (FOLLOWED * parameter.norm() / slope[name].norm().clamp(min=1e-30)))
    after = _gradients(moved, patient, {}).balance_loss
    if after is None or not after < report.balance_loss:
        return Finding("balance", FAULT, "the balance loss rises along its own gradient", REPORTED)
    told = f"the balance loss falls along its gradient ({report.balance_loss:.3f} to {after:.3f})"
    return Finding("balance", OK, told)


def _gradients(training: Training, patient: Patient, into: dict[str, Tensor]) -> StepReport:
    """Make a step; note the routers' gradients just before the optimizer reads them."""

    def note(*given: Any) -> None:
        for name, parameter in training.model.named_parameters():
            if name.endswith("mlp.gate.weight") and parameter.grad is not None:
                into[name] = parameter.grad.detach().float().clone()

    training.hparams = training.hparams.model_copy(
        update={"optim": training.hparams.optim.model_copy(update={"grad_clip": None})}
    )
    handle = training.optimizer.register_step_pre_hook(note)
    report = train_step(training, [patient.batch(5)])
    handle.remove()
    return report


def start(patient: Patient) -> Iterator[Finding]:
    """Whether an untrained model knows nothing: its loss is that of guessing."""
    training = patient.training()
    model, batch = training.model.eval(), patient.batch(6).to(patient.device)
    with torch.no_grad(), autocast(training.dtype, training.device):
        logits = model.logits(model(batch.input_ids).hidden)
        loss = float(torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten()))
    guess = math.log(model.vocab_size)
    told = f"{loss:.3f} nats, ln of {model.vocab_size} pieces is {guess:.3f}"
    if abs(loss - guess) <= START * guess:
        yield Finding("first loss", OK, told)
    else:
        yield Finding("first loss", FAULT, told, f"Mind model.embed_scale, and changed initialisation. {REPORTED}")


def resume(patient: Patient) -> Iterator[Finding]:
    """Whether a run that is saved, loaded and goes on is the run that wasn't stopped, bit for bit."""
    batches = [patient.batch(seed) for seed in range(10, 10 + STEPS)]
    whole, losses = _made(patient.training(), batches)
    cut, _ = _made(patient.training(), batches[:SAVED])
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        begun = patient.training()
        begin_run(run, begun)
        cut.run_id = begun.run_id
        marks = {"model": cut.hparams.model.fingerprint, "tokenizer": cut.tokenizer.fingerprint}
        checkpoint.save(run, snapshot(cut, marks))
        step, passed = checkpoint.newest(run)
        if step != SAVED or passed:
            yield Finding("resume", FAULT, f"a checkpoint just written doesn't verify: {'; '.join(passed)}", REPORTED)
            return
        loaded, again = checkpoint.load(run), patient.training()
        restore(again, checkpoint.read(run, SAVED))
    faults, table = [], loaded.model.embed.tokens.weight
    if not _same(loaded.model.state_dict(), cut.model.state_dict()):
        faults.append("a loaded model isn't the saved one")
    if loaded.hparams.model.tie_embeddings and loaded.model.table.data_ptr() != table.data_ptr():
        faults.append("a loaded model isn't tied")
    if not _same(_state(again), _state(cut)):
        faults.append("a run that is loaded isn't the saved one")
    _, gone_on = _made(again, batches[SAVED:])
    exact = gone_on == losses[SAVED:] and _same(_state(again), _state(whole))
    steady = exact or _same(_state(_made(patient.training(), batches)[0]), _state(whole))
    if not exact and steady:
        faults.append("a run that went on isn't the run that wasn't stopped")
    if faults:
        yield Finding("resume", FAULT, "; ".join(faults), REPORTED)
    elif exact:
        yield Finding("resume", OK, "saved, loaded and gone on, bit for bit")
    else:
        yield Finding("resume", OK, "saved and loaded bit for bit; this device doesn't repeat its own steps exactly")


def _made(training: Training, batches: list[Batch]) -> tuple[Training, list[float]]:
    """Return a run after a step on each batch, and the losses."""
    return training, [train_step(training, [batch]).loss for batch in batches]


def _state(training: Training) -> dict[str, Tensor]:
    """Return all tensors that a run goes on from."""
    saved = snapshot(training, {})
    return {**saved.model, **saved.optimizer}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)
