"""Show a study while it runs: a table that redraws itself in a terminal or a notebook, plain lines elsewhere."""

from __future__ import annotations

import io
import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE
from rich.live import Live
from rich.table import Table

from erpe.execution.callbacks import Progress, TrialProgress
from erpe.study.plan import Plan
from erpe.study.spec import StudySpec
from erpe.text import Terminal, clock, last_line, line, percent

PHASES = {
    "data": "checking the data",
    "workers": "starting the workers",
    "search": "searching",
    "test": "testing the best model, once; a worker starts for it",
    "confirm": "confirming the best of each arm with fresh seeds; each run is tested once",
    "time": "timing all confirmed runs, interleaved",
    "stopping": "finishing the running epochs; Ctrl-C again stops now",
    "tracking": "sending the rest to MLflow; a server that is down is waited for, a minute at most",
}
STYLES = {"RUNNING": "bold", "COMPLETE": "green", "PRUNED": "dim", "FAIL": "red"}
LINE_SECONDS = 10
"""Seconds between two lines about steps, if the output is not a terminal."""

REDRAW_SECONDS = 0.5
"""Between two tables in a notebook."""

SHOWN = 12
"""Rows of the table of a search: the running trials and the last ones that ended."""


class LiveProgress(Progress):
    """What both tables share. Lines go to stderr."""

    def __init__(self) -> None:
        self.phase = self.step = ""
        self.began = self.spoken = time.monotonic()
        self.moments: dict[Any, TrialProgress] = {}
        self.console = Terminal(stderr=True)
        self.live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2, transient=True)
        self.cell: Any = None
        """Handle of what a notebook shows."""

    def __enter__(self) -> Self:
        if self.console.is_jupyter:
            from IPython.display import display

            self.cell = display(self.shown(), raw=True, display_id=True)
        elif self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        self.spoken = -REDRAW_SECONDS
        self.redraw()

    @property
    def lines(self) -> bool:
        """Whether nothing redraws itself."""
        return not self.cell and not self.console.is_terminal

    def on_phase(self, phase: str) -> None:
        """Another part of the work begins."""
        self.phase, self.spoken = PHASES[phase], -REDRAW_SECONDS
        self.say(self.phase)

    def on_start(self, moment: TrialProgress) -> None:
        """Show that a trial is handed to a worker."""
        self.moments[self.key(moment)] = moment
        self.redraw()

    def on_epoch(self, moment: TrialProgress) -> None:
        """Show an epoch that is recorded."""
        self.on_start(moment)

    def on_end(self, moment: TrialProgress) -> None:
        """Show that a trial has ended."""
        self.on_start(moment)
        why = f"  {last_line(moment.reason)}" if moment.reason else ""
        self.say(f"{self.what(moment)}  {moment.state.lower()}{self.value(moment)}{why}")

    def on_warning(self, text: str) -> None:
        """Show a warning, also where there is no terminal."""
        if self.cell:
            print(f"warning: {line(text)}", file=sys.stderr, flush=True)
        else:
            self.console.print(f"warning: {line(text)}", soft_wrap=True)

    def on_step(self, done: int, steps: int) -> None:
        """Show a step of the running epoch; where lines are shown, only some."""
        self.step = f", step {done}/{steps}" if done < steps else ""
        if self.lines and done < steps and (time.monotonic() - self.spoken) > LINE_SECONDS:
            self.say(f"step {done}/{steps}")
        self.redraw()

    def say(self, text: str) -> None:
        """One line with the seconds since the start, where no table is shown."""
        if self.lines:
            self.spoken = time.monotonic()
            print(f"{time.monotonic() - self.began:7.1f} s  {line(text)}", file=sys.stderr, flush=True)
        self.redraw()

    def redraw(self) -> None:
        """Replace the table of a notebook, unless that was just done."""
        if self.cell and time.monotonic() - self.spoken > REDRAW_SECONDS:
            self.spoken = time.monotonic()
            self.cell.update(self.shown(), raw=True)

    def shown(self) -> dict[str, str]:
        """Return the table as a notebook takes it: rich's own way needs ipywidgets."""
        page = Terminal(file=io.StringIO(), record=True, width=120, force_jupyter=False, force_terminal=True)
        table = self.table()
        title, table.title = table.title, None  # rich breaks it where the table ends
        page.print(title, table)
        plain = page.export_text(clear=False, styles=False)
        return {"text/plain": plain, "text/html": page.export_html(inline_styles=True, code_format="<pre>{code}</pre>")}

    def key(self, moment: TrialProgress) -> Any:
        """What a row of the table is for."""
        raise NotImplementedError

    def what(self, moment: TrialProgress) -> str:
        """How a line names a trial."""
        raise NotImplementedError

    def value(self, moment: TrialProgress) -> str:
        """How the line of its end names its value."""
        return f"  {percent(moment.value)}"

    def table(self) -> Table:
        """Return the study as it stands."""
        raise NotImplementedError


class SearchProgress(LiveProgress):
    """A search, a row a trial."""

    def __init__(self, spec: StudySpec) -> None:
        self.title = f"{spec.variant} on {spec.dataset}"
        super().__init__()

    def on_epoch(self, moment: TrialProgress) -> None:
        """Show an epoch that is recorded."""
        super().on_epoch(moment)
        self.say(f"{self.what(moment)}  epoch {moment.epoch}/{moment.epochs}  {percent(moment.value)}")

    def key(self, moment: TrialProgress) -> int:
        """Its number."""
        return moment.number

    def what(self, moment: TrialProgress) -> str:
        """Its number."""
        return f"trial {moment.number:>3}"

    def table(self) -> Table:
        """Return the study as it stands."""
        seconds = time.monotonic() - self.began
        title = f"{self.title}: {self.phase}{self.step} ({clock(seconds)})"
        table = Table(box=SIMPLE, title=title, title_justify="left", caption=self.caption(), caption_justify="left")
        for name in ("trial", "state", "epoch", "accuracy", "lr", "batch", "width", "depth", "heads", "patch"):
            table.add_column(name, justify="left" if name == "state" else "right")
        running = [m for m in self.moments.values() if m.state == "RUNNING"]
        ended = [m for m in self.moments.values() if m.state != "RUNNING"]
        for moment in [*ended[-max(0, SHOWN - len(running)) :], *running]:
            model, train = moment.config.model, moment.config.train
            table.add_row(
                str(moment.number), moment.state.lower(), f"{moment.epoch}/{moment.epochs}", percent(moment.value),
                f"{train.lr:.1e}", *map(str, (train.batch, model.width, model.depth, model.heads, model.patch)),
                style=STYLES[moment.state],
            )  # fmt: skip
        self.console.fit(table)
        return table

    def caption(self) -> str:
        """Best value, trials done, pruned and left, and what MLflow has not got."""
        if not self.moments:
            return ""
        last = list(self.moments.values())[-1]
        done = sum(count for state, count in last.counts.items() if state != "RUNNING")
        counts = ", ".join(f"{count} {state.lower()}" for state, count in sorted(last.counts.items()) if count)
        return (
            f"best {percent(last.best)} · {done} of {last.budget} trials done ({counts}) · {last.lag} events for MLflow"
        )


class StudyProgress(LiveProgress):
    """A study of many arms, a row an arm."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        super().__init__()

    def key(self, moment: TrialProgress) -> str:
        """Its arm."""
        return moment.arm

    def what(self, moment: TrialProgress) -> str:
        """Its arm and number."""
        return f"{moment.arm}  {'seed' if moment.phase == 'confirm' else 'trial'} {moment.number}"

    def value(self, moment: TrialProgress) -> str:
        """Return nothing of a confirmation, which has no validation part."""
        return super().value(moment) if moment.phase == "search" else ""

    def table(self) -> Table:
        """Return the study as it stands, and what runs."""
        table = Table(box=SIMPLE, title_justify="left", caption_justify="left")
        table.title = f"{self.plan.name}: {self.phase}{self.step} ({clock(time.monotonic() - self.began)})"
        measures = {"search": "val accuracy", "confirm": "train loss"}
        phases = sorted({moment.phase for moment in self.moments.values()}, reverse=True) or ["search"]
        measure = " or ".join(measures[phase] for phase in phases)
        for name in ("arm", "phase", "trial", measure, "epoch", "done", "state"):
            table.add_column(name, justify="left" if name in ("arm", "phase", "state") else "right")
        for arm in self.plan.arms():
            moment = self.moments.get(arm.name)
            if moment is None:
                table.add_row(arm.name, style="dim")
                continue
            done = sum(count for state, count in moment.counts.items() if state != "RUNNING")
            value = percent(moment.value) if moment.phase == "search" else f"{-(moment.value or 0):.4f}"
            table.add_row(
                arm.name, moment.phase, str(moment.number), value, f"{moment.epoch}/{moment.epochs}",
                f"{done}/{moment.budget}", moment.state.lower(),
            )  # fmt: skip
        self.console.fit(table)
        return table
