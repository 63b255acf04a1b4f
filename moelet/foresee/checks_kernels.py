"""Whether every way to compute something computes the same: kernels against torch's operations, backends against the
plain definition, outputs and gradients. In float32, and in the format that a run would take.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from moelet.attention import ATTENTION, causal_attention
from moelet.decoding import Decoder, can_decode
from moelet.experts import BACKENDS, GATED, routed_ffn, why_not_triton
from moelet.foresee.patient import FAULT, LENGTH, NOTE, OK, ROWS, WIDTH, Finding, Patient, numbers
from moelet.kernels.native import why_not, without_kernels
from moelet.kv_cache import KVCache
from moelet.loss import linear_cross_entropy
from moelet.modelling import NORM_EPS
from moelet.moe import Router
from moelet.norm import add_norm
from moelet.precision import autocast
from moelet.rotary import prepare_heads, turns
from moelet.sections import ModelSettings
from moelet.speed.contest import SideFailed, alone

# the norm of the difference over the norm of what should be: rounding of products of some hundred terms, with room
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
TOKENS, EXPERTS, CHOSEN, HEADS = 96, 4, 2, 2
MENDED = (
    "Remove the folder moelet in ~/.cache, so that kernels are built anew. If this stays, set MOELET_NATIVE=0, which "
    "leaves them out, and report it."
)
Work = Callable[[], Sequence[Tensor]]


def trial(name: str) -> None:
    """Make one step with the kernels; it is called in a process of its own, which they may end."""
    from_numbers = torch.bfloat16 if name == "bf16" else torch.float32
    list(components(torch.device("cpu"), from_numbers))


def build(patient: Patient) -> Iterator[Finding]:
    """Whether there are kernels in C for this machine, and whether a process survives them."""
    if patient.device.type != "cpu":
        yield Finding("kernels", OK, "not needed: the run is on a card")
        return
    if (reason := why_not(patient.dtype)) is not None:
        yield Finding(
            "kernels",
            NOTE,
            f"none in C ({reason}): torch's operations do the same at half the speed",
            "Install a C compiler, such as gcc, or unset MOELET_NATIVE.",
        )
        return
    try:
        alone(trial, "bf16" if patient.dtype == torch.bfloat16 else "fp32")
    except SideFailed as error:
        yield Finding("kernels", FAULT, f"built, and a process that uses them ends: {error}", MENDED)
        return
    yield Finding("kernels", OK, "built for this processor, in C")


def parity(patient: Patient) -> Iterator[Finding]:
    """Whether all ways to compute a part agree."""
    formats = dict.fromkeys([torch.float32, patient.dtype])
    wrong: dict[str, list[str]] = {}
    checked: dict[str, list[str]] = {}
    for dtype in formats:
        for part, way, error in components(patient.device, dtype):
            checked.setdefault(part, []).append(way)
            if not error <= ALLOWED[dtype]:
                name = str(dtype).removeprefix("torch.")
                wrong.setdefault(part, []).append(f"{way} in {name} is off by {error:.1e} of the right values")
    for part, ways in checked.items():
        if part in wrong:
            yield Finding(f"parity of {part}", FAULT, "; ".join(wrong[part]), MENDED)
        else:
            yield Finding(f"parity of {part}", OK, f"{', '.join(dict.fromkeys(ways))}: outputs and gradients agree")
    yield from decoding(patient)


def components(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str, float]]:
    """Yield part, way to compute it, and how far it is from the plain definition."""
    yield from experts(device, dtype)
    yield from attention(device, dtype)
    if device.type == "cpu" and why_not(dtype) is None:
        for part, work in kernels(dtype).items():
            yield part, "kernel", difference(work(), work(plain=True))


def results(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return outputs and the gradients of a fixed weighted sum of them."""
    floats = [output for output in outputs if output.is_floating_point() and output.requires_grad]
    weights = [numbers(90 + k, *output.shape, device=output.device).detach() for k, output in enumerate(floats)]
    total = torch.stack([(o.float() * w).sum() for o, w in zip(floats, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    return [item.detach().float() for item in (*outputs, *gradients) if item is not None]


def difference(made: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the largest norm of a difference over the norm of what is right; nan where anything is."""
    found = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(made, right, strict=True)]
    return max(found, key=lambda error: (error != error, error))


def experts(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str, float]]:
    x_TD = numbers(0, TOKENS, WIDTH, device=device)
    draw = torch.Generator().manual_seed(1)
    scores_TE = torch.rand(TOKENS, EXPERTS, generator=draw)
    scores_TE[:, 0] = 0  # one expert has no token
    weights, ids_TK = scores_TE.to(device).topk(CHOSEN)
    weights_TK = weights.softmax(-1).requires_grad_()
    shape = (EXPERTS, WIDTH // 2, WIDTH)
    for activation in ("silu", "swiglu"):
        w_in = numbers(2, *shape, device=device)
        w_out = numbers(3, EXPERTS, WIDTH, WIDTH // 2, device=device)
        gate = numbers(4, *shape, device=device) if activation in GATED else None
        inputs = [x_TD, weights_TK, w_in, w_out, *([] if gate is None else [gate])]
        made = {}
        for name in BACKENDS:
            if _missing(name, x_TD.to(dtype)):
                continue
            with autocast(dtype, device):
                y_TD = routed_ffn(x_TD, ids_TK, weights_TK, w_in, gate, w_out, activation, name)
            made[name] = results([y_TD], inputs)
        for name in made:
            if name != "reference":
                yield "experts", name, difference(made[name], made["reference"])


def _missing(backend: str, x: Tensor) -> bool:
    """Return whether this machine hasn't got a backend; the definition is there everywhere."""
    if backend == "fused":
        return x.device.type != "cpu" or why_not(x.dtype) is not None
    return backend == "triton" and why_not_triton(x) is not None


def attention(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str, float]]:
    shape = (ROWS, HEADS, LENGTH, WIDTH // HEADS)
    q, k, v = ((numbers(seed, *shape, device=device)) for seed in (5, 6, 7))
    two_documents = (torch.arange(LENGTH, device=device) >= LENGTH // 3).long().expand(ROWS, LENGTH) + 1
    for segments in (None, two_documents):
        right = results([causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), segments, 0.0, "explicit")], [q, k, v])
        for name in ATTENTION:
            if name in ("explicit", "auto") or (name == "blocked" and why_not(dtype) is not None):
                continue
            if name == "blocked" and device.type != "cpu":
                continue
            out = causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), segments, 0.0, name)
            yield "attention", name, difference(results([out], [q, k, v]), right)


def kernels(dtype: torch.dtype) -> dict[str, Callable[..., list[Tensor]]]:
    """Return by part what computes it, with the kernel or `plain`."""
    cpu = torch.device("cpu")

    def ways(outputs: Work, inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
        def work(plain: bool = False) -> list[Tensor]:
            with without_kernels() if plain else nullcontext(), autocast(dtype, cpu):
                made = outputs()
            return results(made, inputs)

        return work

    h, table, labels = numbers(8, TOKENS, WIDTH), numbers(9, 200, WIDTH), torch.arange(TOKENS) * 2 % 200
    residual, branch, weight = numbers(10, ROWS, LENGTH, WIDTH), numbers(11, ROWS, LENGTH, WIDTH), numbers(12, WIDTH)
    heads, scale = numbers(13, ROWS, LENGTH, HEADS, WIDTH // HEADS), numbers(14, WIDTH // HEADS)
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    angles = turns(LENGTH, WIDTH // HEADS, 10_000.0)
    router = Router(ModelSettings(d_model=WIDTH, n_heads=HEADS, n_experts=EXPERTS, d_ff=WIDTH * EXPERTS))
    with torch.no_grad():
        router.weight.copy_(numbers(15, EXPERTS, WIDTH) * WIDTH**-0.5)
    x = numbers(16, TOKENS, WIDTH)

    def route() -> Sequence[Tensor]:
        ids_TK, weights_TK, stats = router(x, None)
        return [ids_TK, weights_TK, *stats]

    return {
        "the vocabulary head": ways(lambda: [linear_cross_entropy(h, table, labels)], [h, table]),
        "norms": ways(lambda: add_norm(residual, branch, weight, NORM_EPS), [residual, branch, weight]),
        "rotary positions": ways(lambda: [prepare_heads(heads, scale, NORM_EPS, angles, positions)], [heads, scale]),
        "the router": ways(route, [x, router.weight]),
    }


def decoding(patient: Patient) -> Iterator[Finding]:
    """Whether a token at a time gives what the whole text gives."""
    model, ids = patient.model(), patient.ids(3, rows=2).to(patient.device)
    half = ids.shape[1] // 2
    with torch.no_grad(), without_kernels():
        right = model.logits(model(ids).hidden)[:, half:]
    with torch.no_grad():
        cache, by_model = KVCache(model.settings), []
        model(ids[:, :half], None, cache)
        decoder = Decoder(model, torch.float32) if can_decode(model) else None
        for at in range(half, ids.shape[1]):
            if decoder is not None:
                by_model.append(decoder.logits(ids[:, at], cache))
            else:
                by_model.append(model.logits(model(ids[:, at : at + 1], None, cache).hidden)[:, 0])
    error = difference([torch.stack(by_model, 1)], [right])
    way = "in C" if decoder is not None else "with the cache"
    if error <= ALLOWED[torch.float32]:
        yield Finding("parity of decoding", OK, f"a token at a time {way} gives what a whole text gives")
    else:
        told = f"a token at a time {way} is off by {error:.1e} of what a whole text gives"
        yield Finding("parity of decoding", FAULT, told, MENDED)
