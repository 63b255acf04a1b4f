"""The command line's verb that serves. It imports what it needs when it runs, so that --help is quick."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moelet.serve.app import Voice


def serve_runs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `moelet train` wrote.")],
    other: Annotated[Path | None, typer.Argument(metavar="[RUN2]", help="Another, to compare it with.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="MOELET_TOKEN", help="The API key that clients must send; on the page, too.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further name of this machine; may be repeated.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Texts written at a time, in turns.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more get 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most new tokens of a text.")] = 1024,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="The most time for a text.")] = 60.0,
) -> None:
    """Show a run, or two side by side, in a browser, and answer OpenAI's completions; Ctrl-C ends it."""
    from moelet.serve.limits import Limits
    from moelet.serve.server import Door, serve

    def tell(address: str, voices: dict[str, "Voice"]) -> None:
        for name, voice in voices.items():
            card = voice.card(name)["moelet"]
            print(f"{name}: {_shape(card)}, {card['parameters'] / 1e6:.1f}M parameters, step {card['step']:,}")
        print(f"page  {address}/{'' if token is None else '#token=...'}")
        print(f"API   {address}/v1, as OpenAI's completions; models: {', '.join(voices)}", flush=True)

    runs = [run] if other is None else [run, other]
    serve(runs, Door(host, port, token, tuple(allow_host or ())), Limits(at_once, queue, max_tokens, max_seconds), tell)
    print("ended")


def _shape(card: dict[str, int]) -> str:
    if card["n_experts"] == 1:
        return f"{card['n_layers']} dense layers"
    return f"{card['n_layers']} layers of {card['n_experts']} experts, {card['top_k']} for each token"
