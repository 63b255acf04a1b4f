"""Who is compared: our program, its dense twins, plain code, and the models of `transformers`, each ready to work.

Every side gets the same tokens, optimizer, clipping, dropout rate (as far as it has dropout: see `HF_LACKS`) and number
of threads. How they are run and timed is `bench`'s. `transformers` is optional and imported where it is used.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moelet.data import Batch
from moelet.errors import UserError, nearest
from moelet.generate import Sampling, continuations
from moelet.hparams import Hparams
from moelet.modelling import GPT
from moelet.precision import DTYPES, autocast, choose_device, choose_dtype, make_scaler
from moelet.sections import ModelSettings
from moelet.speed.naive import NaiveGPT, SdpaAttention
from moelet.state import build
from moelet.step import train_step
from moelet.study.arms import active_width, dense_shape, full_width
from moelet.tokenizer import Tokenizer

HF_LACKS = "The transformers models have dropout on attention weights only, none on embeddings and branches."
WEIGHTS = "-weights"  # "bf16-weights": no float32 master copy; less exact, and what grouped_mm needs to run in bf16
BATCHES = 4  # drawn once and used in turn, so that no draw is timed
ZIPF_OFFSET = 10  # Mandelbrot's: id r has probability 1 / (r + 10), which makes embedding gradients as sparse as text's
PROMPT_TOKENS, NEW_TOKENS = 64, 128


NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Workload(NamedTuple):
    """What all sides are given. `vocab_size` is that of the table; there is no text and no tokenizer."""

    hparams: Hparams
    vocab_size: int

    @property
    def tokens_per_step(self) -> int:
        return self.hparams.batch_size * self.hparams.model.max_length


class Side(NamedTuple):
    """A program that is ready to do one unit of work, a step or a text, whenever it is called."""

    work: Callable[[], int]  # returns how many tokens it was
    flops_per_token: int = 0


class AnyIds(Tokenizer):
    """Stands in for a tokenizer of any size: ids without text, a byte each."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        return np.ones(self.vocab_size, dtype=np.int64)


def zipf_batches(workload: Workload) -> Iterator[Batch]:
    """Yield the same BATCHES batches again and again; each side gets the same."""
    draw = torch.Generator().manual_seed(workload.hparams.train.seed)
    settings, first = workload.hparams.model, Tokenizer.pad_id + 1
    probability_V = 1 / (torch.arange(1, workload.vocab_size - first + 1) + float(ZIPF_OFFSET))
    shape = (workload.hparams.batch_size, settings.max_length + 1)
    drawn = []
    for _ in range(BATCHES):
        ids = first + torch.multinomial(probability_V, shape[0] * shape[1], True, generator=draw).view(shape)
        drawn.append(Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None))
    return itertools.cycle(drawn)


def changed(settings: ModelSettings, **changes: Any) -> ModelSettings:
    """Return the settings with changes, checked."""
    return ModelSettings.model_validate({**settings.model_dump(), **changes})


def twin(settings: ModelSettings, width_of: Callable[[ModelSettings], int]) -> ModelSettings:
    """Return the settings of the dense model of this width."""
    return changed(settings, **dense_shape(width_of(settings)))


def flops(settings: ModelSettings, vocab_size: int) -> int:
    """Return the FLOPs of training on a token, without making the model."""
    with torch.device("meta"):
        return GPT(settings, vocab_size).flops_per_token(settings.max_length)


def full_width_gated(settings: ModelSettings) -> ModelSettings:
    """Return our settings for the matrices that a transformers model of the same shape has."""
    return changed(settings, d_embed=None, activation="swiglu", tie_embeddings=True, shared_expert=0)


def ours(workload: Workload, precision: str, model: ModelSettings) -> Side:
    """Our own training step, whatever it is."""
    hparams = workload.hparams
    train = hparams.train.model_copy(update={"precision": precision})
    hparams = hparams.model_copy(update={"model": model, "train": train})
    training, batches = build(hparams, AnyIds(workload.vocab_size)), zipf_batches(workload)

    def work() -> int:
        return train_step(training, [next(batches)]).tokens

    return Side(work, training.model.flops_per_token(model.max_length))


def plain(
    workload: Workload, precision: str, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], shape: ModelSettings
) -> Side:
    """The training loop that everyone writes, with torch's fused AdamW."""
    optim = workload.hparams.optim
    device, dtype = choose_device(workload.hparams.train.device), DTYPES[precision.removesuffix(WEIGHTS)]
    master = dtype if precision.endswith(WEIGHTS) else torch.float32
    model.to(device, master).train()
    scaler, batches = make_scaler(dtype, device), zipf_batches(workload)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )

    def work() -> int:
        batch = next(batches).to(device)
        with autocast(torch.float32 if master == dtype else dtype, device):
            total = loss(batch.input_ids, batch.labels)
        (total if scaler is None else scaler.scale(total)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if optim.grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        total.item()  # as our own step does: everybody looks at the loss
        return workload.tokens_per_step

    return Side(work, flops(shape, workload.vocab_size))


def naive(workload: Workload, precision: str) -> Side:
    """The same network written plainly. Raises UserError for settings that it doesn't know."""
    settings = workload.hparams.model
    model = NaiveGPT(settings, workload.hparams.balance, workload.vocab_size)
    return plain(workload, precision, model, model, settings)


def nanogpt(workload: Workload, precision: str) -> Side:
    """A dense model as in nanoGPT: GELU, LayerNorm, torch's attention, one tied table of full width."""
    settings = twin(workload.hparams.model, active_width)
    settings = changed(settings, d_embed=None, activation="gelu", tie_embeddings=True, **NANOGPT_LACKS)
    balance = workload.hparams.balance
    model = NaiveGPT(settings, balance, workload.vocab_size, SdpaAttention, nn.LayerNorm)
    return plain(workload, precision, model, model, settings)


def hf_model(workload: Workload, family: str, implementation: str) -> nn.Module:
    """Return an untrained transformers model of our shape: the same widths, experts gated, the head not factorised."""
    import transformers

    s, balance = workload.hparams.model, workload.hparams.balance
    options: dict[str, Any] = {
        "vocab_size": workload.vocab_size,
        "hidden_size": s.d_model,
        "num_hidden_layers": s.n_layers,
        "num_attention_heads": s.n_heads,
        "num_key_value_heads": s.n_heads,
        "head_dim": s.head_width,
        "max_position_embeddings": s.max_length,
        "num_experts_per_tok": s.top_k,
        "attention_dropout": s.dropout,
        "tie_word_embeddings": True,
        "output_router_logits": balance.loss is not None,
        "router_aux_loss_coef": balance.alpha,
        "experts_implementation": implementation,
        "bos_token_id": Tokenizer.bos_id,
        "eos_token_id": Tokenizer.eos_id,
        "pad_token_id": Tokenizer.pad_id,
    }
    if family == "mixtral":
        shape = {"num_local_experts": s.n_experts, "intermediate_size": s.expert_width}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**options, **shape))
    assert family == "qwen3moe", family
    shape = {"num_experts": s.n_experts, "moe_intermediate_size": s.expert_width, "norm_topk_prob": s.normalize_top_k}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**options, **shape))


def hf(workload: Workload, precision: str, family: str, implementation: str) -> Side:
    model = hf_model(workload, family, implementation)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # it shifts the labels itself

    return plain(workload, precision, model, loss, full_width_gated(workload.hparams.model))


# what nanoGPT's architecture doesn't have
NANOGPT_LACKS: dict[str, Any] = {
    "positions": "learned",
    **dict.fromkeys(("qk_norm", "embed_norm", "embed_residual", "value_residual", "smear"), False),
    "bigram_rows": 0,
}
HF_FAMILIES = ("mixtral", "qwen3moe")
# a few minutes on 2 cores: each peer's steps take longer than ours
QUICK = ("dense-active", "nanogpt-style", "hf-mixtral-eager")
QUICK_DECODE = ("hf-mixtral-batched_mm",)  # the fastest on 2 cores


def hf_implementations() -> list[str]:
    """Return the ways to compute experts that the installed transformers offers, none where it isn't installed."""
    if find_spec("transformers") is None:
        return []
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]


Maker = Callable[[Workload, str], Side]
OWN: dict[str, Maker] = {
    "moelet": lambda w, precision: ours(w, precision, w.hparams.model),
    "dense-active": lambda w, precision: ours(w, precision, twin(w.hparams.model, active_width)),
    "dense-total": lambda w, precision: ours(w, precision, twin(w.hparams.model, full_width)),
}
PLAIN: dict[str, Maker] = {"naive-fp32": naive, "naive-bf16": naive, "nanogpt-style": nanogpt}


def hf_variants(*families: str) -> list[str]:
    return [f"hf-{family}-{implementation}" for family in families for implementation in hf_implementations()]


def trainer(variant: str) -> Maker:
    """Return how a variant gets ready to train. Only transformers' own variants import it."""
    if variant in OWN or variant in PLAIN:
        return {**OWN, **PLAIN}[variant]
    family, implementation = variant.removeprefix("hf-").split("-", 1)
    return partial(hf, family=family, implementation=implementation)


def decoder(variant: str) -> Maker:
    """Return how a variant, ours or one of Mixtral's, gets ready to decode."""
    if variant == "moelet":
        return decode_ours
    return partial(decode_hf, implementation=variant.removeprefix("hf-mixtral-"))


def choose(names: str | None) -> tuple[list[str], list[str]]:
    """Return the variants that a comma-separated list names, and what had to be left out for want of transformers.

    None means a quick selection, "all" everything. Raises UserError for an unknown name.
    """
    known = [name for name in (*OWN, *PLAIN, *hf_variants(*HF_FAMILIES)) if name != "moelet"]  # it is in all of them
    missing = (
        ["hf-*: transformers isn't installed (pip install transformers)"] if find_spec("transformers") is None else []
    )
    if names == "all":
        return known, missing
    if names is None:
        return [name for name in known if name in QUICK], missing
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError(f"--variants is {names!r}, which names nobody. Known: moelet, {', '.join(known)}.")
    for name in wanted:
        if name.startswith("hf-") and missing:
            raise UserError(
                f"--variants names '{name}' and transformers isn't installed. Run pip install transformers, or leave "
                "it out."
            )
        if name not in known and name != "moelet":
            more = f" Left out: {missing[0]}." if missing else ""
            raise UserError(
                f"--variants names '{name}'. Known: moelet, {', '.join(known)}.{nearest(name, known)}{more}"
            )
    return [name for name in dict.fromkeys(wanted) if name != "moelet"], []


def precisions(variant: str, workload: Workload) -> list[str]:
    """Return the precisions that a variant may train in; of several the fastest is measured.

    Raises UserError for a format that this machine only emulates.
    """
    device = choose_device(workload.hparams.train.device)
    if variant.startswith("naive-"):
        return [NAMES[choose_dtype(variant.removeprefix("naive-"), device)]]
    if variant in OWN:
        return [NAMES[choose_dtype(workload.hparams.train.precision, device)]]
    best = NAMES[choose_dtype("auto", device)]
    if not variant.startswith("hf-"):
        return [best]
    return list(dict.fromkeys(["fp32", best, *([best + WEIGHTS] if best == "bf16" else [])]))


def decode_precisions(workload: Workload) -> list[str]:
    """Return the formats that a transformers model's weights may have in decoding."""
    best = NAMES[choose_dtype("auto", choose_device(workload.hparams.train.device))]
    return list(dict.fromkeys(["fp32", best]))


def text_lengths(workload: Workload) -> tuple[int, int]:
    """Return the tokens of the prompt and of its continuation: less than PROMPT and NEW_TOKENS in a short context."""
    context = workload.hparams.model.max_length
    start = min(PROMPT_TOKENS, context // 2)
    return start, min(NEW_TOKENS, context - start)


def decode_ours(workload: Workload, precision: str) -> Side:
    """Our own greedy decoding, one text at a time, as `moelet generate` does it."""
    device = choose_device(workload.hparams.train.device)
    model = GPT(workload.hparams.model, workload.vocab_size).to(device).eval()
    n_prompt, n_new = text_lengths(workload)
    prompt = next(zipf_batches(workload)).input_ids[0, :n_prompt].tolist()

    def work() -> int:
        return len(list(continuations(model, [prompt], n_new, Sampling(temperature=0))))

    return Side(work)


def decode_hf(workload: Workload, precision: str, implementation: str) -> Side:
    """Mixtral's `generate`, greedy, with its KV cache."""
    device = choose_device(workload.hparams.train.device)
    model: Any = hf_model(workload, "mixtral", implementation).to(device, DTYPES[precision]).eval()
    n_prompt, n_new = text_lengths(workload)
    ids = next(zipf_batches(workload)).input_ids[:1, :n_prompt].to(device)
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}

    def work() -> int:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), output_router_logits=False, **options)
        return out.shape[1] - ids.shape[1]

    return Side(work)


def choose_decoders(names: str | None) -> list[str]:
    """Return whose decoding is compared with ours, given a checked list of variants; None means a quick selection."""
    known = hf_variants("mixtral")
    if names == "all":
        return known
    return [name for name in known if name in (QUICK_DECODE if names is None else names.replace(" ", "").split(","))]
