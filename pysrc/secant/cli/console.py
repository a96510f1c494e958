"""Tables and progress: by rich where it is installed, in plain text elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from secant.benchmarks.report import Table

try:
    import rich.box
    import rich.console
    import rich.progress
    import rich.table
    import rich.text
except ImportError:
    rich = None  # type: ignore[assignment]

#: Width of what is written to a file or a pipe.
WIDTH = 160


def _console() -> rich.console.Console:
    console = rich.console.Console(highlight=False)
    return console if console.is_terminal else rich.console.Console(highlight=False, width=WIDTH)


def show(table: Table) -> None:
    """Print a table."""
    if rich is None:
        print(plain(table))
        return
    box, head = rich.box.SIMPLE_HEAD, any(table.columns)
    pretty = rich.table.Table(title=table.title, title_justify="left", title_style="bold", box=box, show_header=head)
    for i, column in enumerate(table.columns):
        pretty.add_column(column, justify="right" if _is_numeric(table, i) else "left")
    for row in table.rows:
        pretty.add_row(*(rich.text.Text(cell) for cell in row))  # as Text: [demo] is no markup
    console = _console()
    console.print(pretty)
    for note in table.notes:
        console.print(note, markup=False)


def _is_numeric(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows if row[column] not in ("", "-")]
    return bool(cells) and all(cell.lstrip("≥≤ -+")[:1].isdigit() for cell in cells)


def plain(table: Table) -> str:
    """Lay a table out in plain text."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    right = [_is_numeric(table, i) for i in range(len(widths))]
    text = [table.title]
    head = [table.columns, tuple("-" * width for width in widths)] if any(table.columns) else []
    for line in (*head, *table.rows):
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        text.append("  ".join(cells).rstrip())
    return "\n".join([*text, *table.notes, ""])


class Advance(Protocol):
    """Say which share of the work is done, and what it was."""

    def __call__(self, share: float, text: str) -> None:
        """Share in [0, 1]."""


@contextlib.contextmanager
def progress(title: str) -> Iterator[Advance]:
    """Show a bar that is full when the block ends."""
    if rich is None:
        print(f"{title} ...", flush=True)
        yield lambda share, text: None
        return
    columns = (
        rich.progress.TextColumn("{task.description:<40}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=_console()) as bars:
        task = bars.add_task(title, total=1.0)
        yield lambda share, text: bars.update(task, completed=share, description=f"{title}: {text}")
        bars.update(task, completed=1.0, description=title)
