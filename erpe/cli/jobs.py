"""`erpe submit` and `erpe jobs`: commands that a Ray cluster runs, even if this machine is switched off."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from erpe.cli.options import AsJson
from erpe.errors import ErpeError, nearest

if TYPE_CHECKING:
    from erpe.execution.ray_tune.jobs import Job, Jobs

HERE = "http://127.0.0.1:8265"
NOT_THERE = ("ui", "submit", "jobs", "restore")

jobs_app = typer.Typer(no_args_is_help=True, help="List, follow and stop what `erpe submit` handed to a cluster.")
Address = Annotated[
    str | None, typer.Option("--ray-jobs", help=f"Of the cluster's head; default: $ERPE_RAY_JOBS, or {HERE}.")
]
JobId = Annotated[str | None, typer.Argument(help="As `erpe submit` printed it; default: the newest.")]


def jobs_at(address: str | None) -> Jobs:
    """Where jobs are taken."""
    from erpe.execution.ray_tune.jobs import Jobs

    return Jobs(address or os.environ.get("ERPE_RAY_JOBS") or HERE)


def submit(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Of erpe, with its options.")],
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show what it prints until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hand a command to a Ray cluster: erpe submit tune -v relu -d mnist. It goes on when this machine is closed."""
    check_command(words, context)
    jobs = jobs_at(address)
    name = jobs.submit(words)
    where = f" --ray-jobs {jobs.address}" if address else ""
    if as_json:
        print(json.dumps({"job": name, "ray_jobs": jobs.address}))
    else:
        print(f"job {name}: erpe {shlex.join(words)}")
        print(f"follow: erpe jobs logs {name} --follow{where}    stop: erpe jobs stop {name}{where}", flush=True)
    if follow:
        end_as(show(jobs, name))


def check_command(words: list[str], context: typer.Context) -> None:
    """Refuse a command line that makes no sense before it is submitted, in the words it would get if it ran here.

    Raises:
        ErpeError: it is a command for this machine.
        typer.BadParameter: it is none, or one without options that it needs.
    """
    if any(word.partition("=")[0] == "--notify" for word in words):
        raise ErpeError("--notify: the cluster would keep and show it; use ERPE_NOTIFY on its head instead")
    root = context.find_root()
    given, command, above = list(words), root.command, root
    while commands := getattr(command, "commands", None):
        name = given.pop(0) if given else ""
        if above is root and name in NOT_THERE:
            raise ErpeError(f"{name}: is for this machine; tune, train, study run and others can be submitted")
        if name not in commands:
            raise typer.BadParameter(f"no command {name!r}; {nearest(name, commands)}")
        command = commands[name]
        if hasattr(command, "commands"):
            above = typer.Context(command, parent=above, info_name=name)
    command.make_context(command.name, given, parent=above)


def show(jobs: Jobs, name: str) -> Job:
    """Print its log as it grows -> the job, ended."""
    from erpe.text import printable, redact

    try:
        for text in jobs.follow(name):
            print(printable(redact(text)), end="", flush=True)
    except KeyboardInterrupt:
        print(f"no longer followed; the job goes on. To end it: erpe jobs stop {name}", file=sys.stderr)
        raise typer.Exit(130) from None
    return jobs.one(name)


def end_as(job: Job) -> None:
    """Exit as its command did.

    Raises:
        JobError: it never ran.
    """
    from erpe.execution.ray_tune.jobs import JobError

    if job.state == "STOPPED":
        raise typer.Exit(130)
    if job.state == "FAILED" and job.code is None:
        raise JobError(f"job {job.id}: did not run; {job.message}")
    raise typer.Exit(job.code or 0)


def chosen(jobs: Jobs, name: str | None) -> str:
    """Return this job, or the newest."""
    from erpe.execution.ray_tune.jobs import JobError

    if name is not None:
        return name
    for job in jobs.all():
        return job.id
    raise JobError(f"{jobs.name}: no jobs yet; `erpe submit` makes one")


@jobs_app.command("list")
def list_jobs(address: Address = None, as_json: AsJson = False) -> None:
    """Show the jobs of a cluster, the newest first. One that is restarted knows only those since."""
    found = jobs_at(address).all()
    if as_json:
        print(json.dumps([job._asdict() for job in found]))
        return
    from rich.box import SIMPLE
    from rich.table import Table

    from erpe.cli.tables import moment, print_tables

    table = Table(box=SIMPLE)
    for column in ("job", "state", "command", "started"):
        table.add_column(column, overflow="fold")
    for job in found:
        state = job.state.lower() + (f" ({job.code})" if job.code else "")
        table.add_row(job.id, state, job.command, moment(job.started))
    print_tables([table] if found else [], "no jobs yet; `erpe submit` makes one")


@jobs_app.command("logs")
def logs(
    job: JobId = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends; exits as the job did.")] = False,
) -> None:
    """Print what a job printed."""
    from erpe.text import printable, redact

    jobs = jobs_at(address)
    name = chosen(jobs, job)
    if follow:
        end_as(show(jobs, name))
    print(printable(redact(jobs.log(name))), end="")


@jobs_app.command("stop")
def stop(
    job: Annotated[str, typer.Argument(help="As `erpe submit` printed it.")],
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended.")] = False,
) -> None:
    """Ask a job to finish its running epochs, save and end; the same command submitted again continues."""
    jobs = jobs_at(address)
    before = jobs.one(job)
    if not jobs.stop(job):
        print(f"job {job}: has ended already ({before.state.lower()})")
        return
    print(f"job {job}: finishes its running epochs. To continue: erpe submit {before.command.removeprefix('erpe ')}")
    if wait:
        for _ in jobs.follow(job):
            pass
