"""A request for completions, checked: OpenAI's fields, `top_k` and `routing` besides. What isn't offered is refused."""

import json
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moelet.errors import UserError, nearest
from moelet.generate import MAX_TEMPERATURE, Sampling
from moelet.serve.limits import CHOICES, Limits, Refusal
from moelet.serve.writing import Wish
from moelet.tokenizer import Tokenizer

MOST_LIKELY = 20  # alternatives of a token that may be asked for
PAGE_LIKELY = 8  # of those that `routing` brings
STOPS = 4  # OpenAI's limit
NOT_OFFERED = {  # fields of OpenAI's that we don't have, and the values that ask for nothing
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
IGNORED = ("user", "best_of")  # a name for the operator's own records; checked against n


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = False


class Fields(BaseModel):
    """The body of a request; null means left out."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    prompt: Any = ""
    max_tokens: int = Field(16, ge=0)  # OpenAI's default
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Any = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY)
    routing: bool = False  # ours: each token with its experts and alternatives, the prompt's too


class Request(NamedTuple):
    model: str
    prompts: list[list[int]]  # ids, one list a prompt
    texts: list[str]  # the same, as text
    fields: Fields
    wish: Wish


def read(body: bytes) -> dict[str, Any]:
    """Return the fields that a body gives a value."""
    try:
        given = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body isn't JSON ({str(error)[:80]}). Send a JSON object.") from None
    if not isinstance(given, dict):
        raise Refusal(400, f"the body is a JSON {type(given).__name__}. Send a JSON object.")
    return {name: value for name, value in given.items() if value is not None}


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def fields_of(given: dict[str, Any]) -> Fields:
    """Return the fields, checked. Raises Refusal for what isn't offered or doesn't fit."""
    for name, harmless in NOT_OFFERED.items():
        if name in given and given.pop(name) not in harmless:
            raise Refusal(400, f"{name} isn't offered here. Leave it out.", name)
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise Refusal(400, "best_of isn't offered here but as n. Leave it out.", "best_of")
    known = {name: value for name, value in given.items() if name not in IGNORED}
    for name in known.keys() - Fields.model_fields.keys():
        raise Refusal(400, f"there is no field '{_short(name)}'.{nearest(name, Fields.model_fields)}", _short(name))
    try:
        return Fields.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        words = first["msg"][0].lower() + first["msg"][1:]
        raise Refusal(400, f"{name} is {_short(first['input'])}: {words}. Change it or leave it out.", name) from None


def make_request(given: dict[str, Any], tokenizers: Mapping[str, tuple[Tokenizer, int]], limits: Limits) -> Request:
    """Return the request; `tokenizers` has each model's tokenizer and context, the default's first.

    Raises Refusal where it can't be answered as it is.
    """
    fields = fields_of(given)
    model = next(iter(tokenizers)) if fields.model is None else fields.model
    if model not in tokenizers:
        names = ", ".join(tokenizers)
        raise Refusal(404, f"there is no model '{_short(model)}'. There are: {names}.", "model", "model_not_found")
    if fields.max_tokens > limits.tokens:
        raise Refusal(
            400,
            f"max_tokens is {_short(fields.max_tokens)}, and at most {limits.tokens} are written here. Ask for fewer.",
            "max_tokens",
        )
    tokenizer, context = tokenizers[model]
    prompts = [_ids(prompt, tokenizer, context) for prompt in _prompts(fields.prompt)]
    if len(prompts) * fields.n > CHOICES:
        raise Refusal(
            400, f"{len(prompts)} prompts times n = {fields.n} are too many texts. Ask for at most {CHOICES}.", "n"
        )
    seed = secrets.randbits(63) if fields.seed is None else fields.seed % 2**63
    top_p = None if fields.top_p == 1 else fields.top_p
    likely = max(fields.logprobs or 0, PAGE_LIKELY if fields.routing else 0)
    wish = Wish(
        tokens=fields.max_tokens,
        sampling=Sampling(fields.temperature, fields.top_k, top_p, seed),
        stops=_stops(fields.stop),
        likely=None if fields.logprobs is None and not fields.routing else likely,
        prompt=fields.routing or (fields.echo and fields.logprobs is not None),
        routing=fields.routing,
    )
    return Request(model, prompts, [tokenizer.decode(ids) for ids in prompts], fields, wish)


def _prompts(given: Any) -> list[Any]:
    """Return the prompts: texts, or lists of ids."""
    several = isinstance(given, list) and bool(given) and not _is_ids(given)
    prompts = given if several else [given]
    if not all(isinstance(prompt, str) or (_is_ids(prompt) and prompt) for prompt in prompts):
        raise Refusal(400, "prompt must be a text, a list of token ids, or a list of these.", "prompt")
    return list(prompts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _ids(prompt: str | list[int], tokenizer: Tokenizer, context: int) -> list[int]:
    """Return the ids of a prompt: a text begins a document, ids are taken as they are."""
    if isinstance(prompt, str):
        try:
            ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
        except UserError:
            raise Refusal(400, "prompt has half a surrogate pair. Send valid Unicode.", "prompt") from None
    else:
        ids = prompt
        if outside := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
            message = f"prompt has the id {_short(outside[0])}. Ids are 0 to {tokenizer.vocab_size - 1}."
            raise Refusal(400, message, "prompt")
    if len(ids) > context:
        raise Refusal(
            413,
            f"the prompt has {len(ids)} tokens, and the model's context is {context}. Shorten it: nothing is cut "
            "without being asked for.",
            "prompt",
            "context_length_exceeded",
        )
    return ids


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else [] if given is None else given
    fits = isinstance(stops, list) and len(stops) <= STOPS and all(isinstance(x, str) and x for x in stops)
    if not fits:
        raise Refusal(400, f"stop must be a text or up to {STOPS} of them, none empty.", "stop")
    return tuple(stops)


def _short(value: Any) -> str:
    """Return what was given, for a message: not all of it where it is long."""
    if isinstance(value, int) and not -(10**40) < value < 10**40:
        return "a very large number"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
