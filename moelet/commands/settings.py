"""The command line's verb of settings."""

from typing import Annotated

import typer


def show_settings(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A section, or a setting such as model.top_k; default: all.")
    ] = None,
) -> None:
    """Say what settings do, what they may be and what they are by default."""
    from moelet.manual import tell

    print("\n".join(tell(name)))
