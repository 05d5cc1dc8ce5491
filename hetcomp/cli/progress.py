"""Progress on stderr: one bar a stage that has steps, a spinner for one that has none."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class RichProgress:
    """Implements :class:`hetcomp.progress.ProgressSink` with rich; silent when stderr is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, total: float | None = None) -> None:
        """A new stage begins; the one before is done."""
        if self._task is not None:
            task = self._bars.tasks[self._task]
            self._bars.update(self._task, total=task.total or 1, completed=task.total or 1, detail="")
        self._task = self._bars.add_task(name, total=total, detail="")

    def advance(self, amount: float = 1, detail: str = "") -> None:
        """The stage went on by ``amount`` of its total."""
        if self._task is not None:
            self._bars.update(self._task, advance=amount, detail=detail)

    def warn(self, message: str) -> None:
        """A remark for the user that is not an error."""
        self._bars.console.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True)
