"""Show a study while it runs: a table that redraws itself in a terminal or a notebook, plain lines elsewhere."""

from __future__ import annotations

import io
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE
from rich.live import Live
from rich.table import Table

from erpe.execution.callbacks import Progress, TrialProgress
from erpe.study.objectives import Goals, shown
from erpe.study.plan import Plan
from erpe.study.spec import StudySpec
from erpe.text import Terminal, clock, last_line, line

PHASES = {
    "data": "checking the data",
    "workers": "starting the workers",
    "search": "searching",
    "test": "testing the best model, once",
    "confirm": "confirming the best of each arm with fresh seeds; each run is tested once",
    "time": "timing all confirmed runs, interleaved",
    "stopping": "finishing the running epochs; Ctrl-C again stops now",
    "tracking": "sending the rest to MLflow; a server that is down is waited for, a minute at most",
}
STYLES = {"RUNNING": "bold", "COMPLETE": "green", "PRUNED": "dim", "FAIL": "red"}
LINE_SECONDS = 30
"""So long nothing is said of running trials, if the output is not a terminal."""

REDRAW_SECONDS = 0.5
"""Between two tables in a notebook."""

SHOWN = 12
"""Rows of the table of a search: the running trials and the last ones that ended."""


def epochs_told(moment: TrialProgress) -> str:
    """Epochs of a trial: `3/5`, or `3.4/5` in the middle of one."""
    trained = moment.trained or 0.0
    return f"{trained:.{int(trained % 1 > 0)}f}/{moment.epochs}"


def state_told(moment: TrialProgress) -> str:
    """State of a trial; one that waits for its worker is `starting`."""
    return "starting" if moment.trained is None else moment.state.lower()


class LiveProgress(Progress):
    """What both tables share. Lines go to stderr."""

    def __init__(self) -> None:
        self.phase = ""
        self.began = self.spoken = self.entered = time.monotonic()
        self.moments: dict[Any, TrialProgress] = {}
        self.last: TrialProgress | None = None
        self.over = threading.Event()
        self.sought = "accuracy"
        """The first objective."""
        self.console = Terminal(stderr=True)
        self.live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2, transient=True)
        self.cell: Any = None
        """Handle of what a notebook shows."""

    def __enter__(self) -> Self:
        if self.console.is_jupyter:
            from IPython.display import display

            self.cell = display(self.as_page(), raw=True, display_id=True)
        elif self.console.is_terminal:
            self.live.start()
        if not self.console.is_terminal:
            threading.Thread(target=self.tell, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        self.over.set()
        self.spoken = -REDRAW_SECONDS
        self.redraw()

    @property
    def lines(self) -> bool:
        """Whether nothing redraws itself."""
        return not self.cell and not self.console.is_terminal

    def on_phase(self, phase: str) -> None:
        """Another part of the work begins."""
        self.phase, self.spoken, self.entered = PHASES[phase], -REDRAW_SECONDS, time.monotonic()
        self.say(self.phase)

    def on_start(self, moment: TrialProgress) -> None:
        """Show that a trial is handed to a worker."""
        self.last = self.moments[self.key(moment)] = moment
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

    def tell(self) -> None:
        """Redraw a notebook's table; where lines are shown, say where running trials are if nothing else was said."""
        while not self.over.wait(1):
            running = [each for each in list(self.moments.values()) if each.state == "RUNNING"]
            if self.lines and running and time.monotonic() - self.spoken > LINE_SECONDS:
                told = (f"{self.what(each).strip()} {state_told(each)}, epoch {epochs_told(each)}" for each in running)
                self.say("; ".join([*told, *filter(None, [self.left()])]))
            self.redraw()

    def left(self) -> str:
        """How long the rest takes; nothing where nobody knows."""
        return ""

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
            self.cell.update(self.as_page(), raw=True)

    def as_page(self) -> dict[str, str]:
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
        return f"  {shown(self.sought, moment.value)}"

    def table(self) -> Table:
        """Return the study as it stands."""
        raise NotImplementedError


class SearchProgress(LiveProgress):
    """A search, a row a trial."""

    def __init__(self, spec: StudySpec) -> None:
        self.title = f"{spec.variant} on {spec.dataset}"
        self.before: dict[int, float] = {}
        """Number of a trial -> the part of it that was trained before this command."""
        super().__init__()
        self.sought = spec.goals.objectives[0]

    def on_start(self, moment: TrialProgress) -> None:
        """Show that a trial is handed to a worker."""
        self.before.setdefault(moment.number, moment.epoch / moment.epochs)
        super().on_start(moment)

    def on_epoch(self, moment: TrialProgress) -> None:
        """Show an epoch that is recorded."""
        super().on_epoch(moment)
        self.say(f"{self.what(moment)}  epoch {moment.epoch}/{moment.epochs}{self.value(moment)}")

    def key(self, moment: TrialProgress) -> int:
        """Its number."""
        return moment.number

    def what(self, moment: TrialProgress) -> str:
        """Its number."""
        return f"trial {moment.number:>3}"

    def table(self) -> Table:
        """Return the study as it stands."""
        seconds = time.monotonic() - self.began
        title = f"{self.title}: {self.phase} ({clock(seconds)})"
        table = Table(box=SIMPLE, title=title, title_justify="left", caption=self.caption(), caption_justify="left")
        for name in ("trial", "state", "epoch", self.sought, "lr", "batch", "width", "depth", "heads", "patch"):
            table.add_column(name, justify="left" if name == "state" else "right")
        running = [m for m in self.moments.values() if m.state == "RUNNING"]
        ended = [m for m in self.moments.values() if m.state != "RUNNING"]
        for moment in [*ended[-max(0, SHOWN - len(running)) :], *running]:
            model, train = moment.config.model, moment.config.train
            table.add_row(
                str(moment.number), state_told(moment), epochs_told(moment), shown(self.sought, moment.value),
                f"{train.lr:.1e}", *map(str, (train.batch, model.width, model.depth, model.heads, model.patch)),
                style=STYLES[moment.state],
            )  # fmt: skip
        self.console.fit(table)
        return table

    def caption(self) -> str:
        """Best value, trials done, pruned and left, and what MLflow has not got."""
        last = self.last
        if last is None:
            return ""
        done = sum(count for state, count in last.counts.items() if state != "RUNNING")
        counts = ", ".join(f"{count} {state.lower()}" for state, count in sorted(last.counts.items()) if count)
        told = f"best {shown(self.sought, last.best)} · {done} of {last.budget} trials done ({counts})"
        return " · ".join(filter(None, [told, f"{last.lag} events for MLflow", self.left()]))

    def left(self) -> str:
        """How long the rest of the search takes, at the pace so far; nothing before there is one."""
        moments, last = list(self.moments.values()), self.last
        if last is None or self.phase != PHASES["search"]:
            return ""
        running = [(each.trained or 0) / each.epochs for each in moments if each.state == "RUNNING"]
        over = sum(each.state != "RUNNING" for each in moments)
        gained = over + sum(running) - sum(self.before.values())
        ended = max(over, sum(count for state, count in last.counts.items() if state != "RUNNING"))
        rest = last.budget - ended - sum(running)
        if gained < 0.05 or rest <= 0:
            return ""
        return f"about {clock((time.monotonic() - self.entered) * rest / gained)} left"


class StudyProgress(LiveProgress):
    """A study of many arms, a row an arm."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        super().__init__()
        self.sought = Goals.of(plan.search).objectives[0]

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
        table.title = f"{self.plan.name}: {self.phase} ({clock(time.monotonic() - self.began)})"
        measures = {"search": f"val {self.sought}", "confirm": "train loss"}
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
            value = self.value(moment).strip() or f"{-(moment.value or 0):.4f}"
            table.add_row(
                arm.name, moment.phase, str(moment.number), value, epochs_told(moment),
                f"{done}/{moment.budget}", state_told(moment),
            )  # fmt: skip
        self.console.fit(table)
        return table
