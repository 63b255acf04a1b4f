"""Whether a checkpoint's state and optimizer are ones that this run could have saved. Anybody may have written them."""

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from moelet.errors import UserError
from moelet.health import RULES

Count = Annotated[int, Field(ge=0, lt=2**53)]
Counts = dict[str, Count]
ADAM, MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Cursor(_Part):
    """Where the text goes on; `source` is checked by the source."""

    epoch: Count
    window: Count
    row: Count
    positions: Count
    padding: Count
    source: dict[str, Any] | None
    counts: Counts
    read: Counts


class _State(_Part):
    step: Count
    tokens: Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    elapsed: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    plan: list[Annotated[list[Count], Len(2, 2)]]
    skipped_steps: Count
    skipped_in_a_row: Count
    cursor: _Cursor
    best: dict[str, float] | None
    pending: dict[str, Any] | None = None
    losses: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=list, max_length=1024)
    micro_rows: Annotated[int, Field(ge=1)] | None = None
    scaler: dict[str, float] | None
    health: dict[str, list[list[tuple[float, Count | None, bool]]]] = Field(default_factory=dict)


def check_state(state: dict[str, Any], n_layers: int, n_experts: int) -> None:
    """Raise UserError, naming the first thing that is wrong, for a state that no run of this shape has."""
    watches = state.get("health")
    if isinstance(watches, dict):  # JSON has lists alone
        tuples = {kind: _with_tuples(layers) for kind, layers in watches.items()}
        state = {**state, "health": tuples}
    try:
        checked = _State.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _another(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if any(state["plan"][k - 1] > state["plan"][k] for k in range(1, len(state["plan"]))) or (
        state["plan"] and state["plan"][-1][1] < state["step"]
    ):
        raise _another("plan: it goes back")
    if state["best"] is not None and state["best"].keys() != {"step", "val_loss"}:
        raise _another("best: it isn't a step and a loss")
    for kind, layers in checked.health.items():
        width = n_experts if kind == "load" else 1
        routed = n_layers if n_experts > 1 else 0
        if kind not in RULES or (layers and [len(layer) for layer in layers] != [width] * routed):
            raise _another(f"health.{kind}: it is of other layers or experts")


def _with_tuples(layers: Any) -> Any:
    if not isinstance(layers, list) or not all(isinstance(layer, list) for layer in layers):
        return layers
    return [[tuple(watch) if isinstance(watch, list) else watch for watch in layer] for layer in layers]


def check_optimizer(saved: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], optimizer: str) -> None:
    """Raise UserError for anything but the float32 tensors that the optimizer keeps of each parameter, or none."""
    entries: dict[str, set[str]] = {}
    for key, tensor in saved.items():
        name, _, entry = key.rpartition(":")
        if name not in shapes or entry not in ADAM | MUON:
            raise _another(f"the optimizer has {key[:80]}")
        if tuple(tensor.shape) != (() if entry == "step" else shapes[name]) or not tensor.is_floating_point():
            raise _another(f"the optimizer's {key} has the shape {list(tensor.shape)}, {tensor.dtype}")
        entries.setdefault(name, set()).add(entry)
    for name, found in entries.items():
        if found != ADAM and not (optimizer == "muon" and found == MUON):
            raise _another(f"the optimizer has {', '.join(sorted(found))} of {name}")


def _another(what: str) -> UserError:
    return UserError(f"the checkpoint isn't one that this run saved ({what}). Resume from another, or don't trust it.")
