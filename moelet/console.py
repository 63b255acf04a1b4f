"""What a person sees while a run goes on: one progress line, in a terminal, a pipe or a notebook."""

import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from moelet.errors import lead_nowhere, printable

PLAIN_SECONDS = 5.0  # a pipe or a notebook gets a line at most this often; a terminal redraws one line in place


def duration(seconds: float) -> str:
    """Return seconds as 1:05 or 2:03:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_line(row: dict[str, Any], total_steps: int | None, seconds_left: float | None) -> str:
    """Return the progress line for one logged step; None for what isn't known yet."""
    bits = f" {row['bits_per_byte']:.3f} bits/byte" if row["bits_per_byte"] is not None else ""
    loads = [load for layer in row["expert_load"] for load in layer]
    parts = [
        f"step {row['step']}" + (f"/{total_steps} {row['step'] / total_steps:4.0%}" if total_steps else ""),
        f"loss {row['loss']:.4f}{bits}",
        f"lr {row['lr']:.1e}",
        f"{row['tokens_per_second']:,.0f} tok/s",
        *([] if seconds_left is None else [f"{duration(max(0.0, seconds_left))} left"]),
        *([f"experts {min(loads):.2f}-{max(loads):.2f}"] if loads else []),
        *([f"scale {row['loss_scale']:g}"] if row.get("skipped_steps") and "loss_scale" in row else []),
        *([f"{row['skipped_steps']} skipped"] if row.get("skipped_steps") else []),
        f"{row['memory_mb']:,.0f} MB",
    ]
    return " | ".join(parts)


class _Unheard(Console):
    """A console whose reader may go away: rich's own ends the process then, as `head` would have any other tool do."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        lead_nowhere(self.file)


class Progress:
    """Shows messages and a progress line; a context manager, so that the terminal is left as it was."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _Unheard(soft_wrap=True, highlight=False)
        in_place = self._console.is_terminal and not self._console.is_jupyter
        self._live = Live(console=self._console, transient=True, auto_refresh=False) if in_place else None
        self._shown = float("-inf")

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()

    def say(self, *lines: str) -> None:
        """Print lines that stay. Training goes on where nobody takes them: on a full disk, in a closed terminal or
        pipe."""
        for line in lines:
            with suppress(OSError):
                self._console.print(Text(printable(line)))

    def show(self, line: str, lasting: bool) -> None:
        """Show the progress line; `lasting` ones stay on the screen and are never left out."""
        now = time.monotonic()
        if lasting or (self._live is None and now - self._shown >= PLAIN_SECONDS):
            self._shown = now
            self.say(line)
        elif self._live is not None:
            with suppress(OSError):
                self._live.update(Text(line), refresh=True)


def table(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return aligned lines of names and values under a title."""
    width = max(len(name) for name, _ in rows)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
