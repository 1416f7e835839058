"""The MLflow UI on a store."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser

from erpe.errors import ConfigError, StudyError, TrackingError, nearest
from erpe.execution.signals import held_back
from erpe.store import Store
from erpe.text import printable, redact
from erpe.tracking.connection import examine
from erpe.tracking.ui_views import CONFIRMED_VIEW, confirmed_page, runs_page

MOST_SECONDS = 60
"""That the server may take until the browser is opened."""
_CONFIRMED = ", confirmed runs"

HOSTS = ("127.0.0.1", "localhost")
"""Under which names a browser on this machine may ask."""


def serve(store: Store, port: int, study: str | None = None) -> None:
    """Serve the store with MLflow on 127.0.0.1 until Ctrl-C; with a tracking server elsewhere, say where to look.

    Args:
        study: whose page the browser opens; default: the browser stays closed.
    Raises:
        StudyError: MLflow has no such study.
        ConfigError: the port is taken.
        TrackingError: the database is damaged, or of another version; or the server ended by itself.
    """
    uri = store.tracking_uri
    if uri.startswith("http"):
        print(f"The UI is served by the tracking server: {redact(uri)}")
        if study is not None:
            browse(redact(uri).rstrip("/") + page_of(store, study))
        return
    health = examine(uri)
    if health.state != "well":
        raise TrackingError(health.line)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise ConfigError(f"port {port}: taken or not allowed; --port names another, as --port 5001") from None
    address = f"http://127.0.0.1:{port}"
    chosen = page_of(store, study) if study is not None else None
    for name, page in pages(store).items():
        if chosen in (None, page):
            print(f"{printable(name)}: {address}{page}")
    print("Ctrl-C ends the server.", flush=True)
    if chosen:
        threading.Thread(target=_browse_when_up, args=(port, address + chosen), daemon=True).start()
    command, environment = server(store, port)
    run_server(command, environment)


def page_of(store: Store, study: str) -> str:
    """The view of a study that matters: its confirmed runs, arm by arm, or else its trials, best first.

    Raises:
        StudyError: MLflow has no such study.
    """
    known = pages(store)
    names = [name for name in known if not name.endswith(_CONFIRMED)]
    if study not in names:
        hint = nearest(study, names) if names else "it has none; `erpe sync` sends what waits"
        raise StudyError(f"study {study}: not in MLflow; {hint}")
    return known.get(study + _CONFIRMED, known[study])


def browse(address: str) -> None:
    """Open a page in the user's browser, and print its address; without a screen it is only printed."""
    print(printable(address), flush=True)
    if sys.platform != "linux" or {"BROWSER", "DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        webbrowser.open(address)


def _browse_when_up(port: int, address: str) -> None:
    for _ in range(MOST_SECONDS):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            browse(address)
            return
        time.sleep(1)


def run_server(command: list[str], environment: dict[str, str]) -> None:
    """Run a server and all its processes until it ends, or until Ctrl-C.

    It has a session of its own: Ctrl-C in the terminal would have each of its processes show where it was.

    Raises:
        TrackingError: it ended by itself.
    """
    running = None
    try:
        with held_back():  # a signal while it starts would leave it behind
            running = subprocess.Popen(command, env=environment, start_new_session=True)
        code = running.wait()
    except KeyboardInterrupt:
        print("the server has ended", flush=True)
        return
    finally:
        if running:
            with held_back():  # a second Ctrl-C, too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)  # it holds nothing: the database takes whole transactions
                running.wait()
    raise TrackingError(f"the MLflow server ended (exit code {code}); its lines above say why")


def server(store: Store, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves a store's database, and its environment.

    A page of another site may have its name point to 127.0.0.1, and so read what this server answers (DNS rebinding).
    MLflow's own list of hosts lets 10.evil.example pass, which begins as a private address does.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_SERVER_", "MLFLOW_ENABLE_"))
    }
    environment = kept | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONSAFEPATH": "1",  # the working directory is the user's: nothing is imported from it
        "MLFLOW_BACKEND_STORE_URI": store.tracking_uri,  # its password is not for the list of processes
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--default-artifact-root", store.artifacts.as_uri(),
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--allowed-hosts", ",".join(f"{host}:{port}" for host in HOSTS),
    ]  # fmt: skip
    return command, environment


def pages(store: Store) -> dict[str, str]:
    """Return what there is to see -> its page in the UI: the runs of a study, and the confirmed ones, arm by arm."""
    from erpe.tracking.connection import connect

    found: dict[str, str] = {}
    for experiment in connect(store.tracking_uri).search_experiments():
        if experiment.name != "Default":
            found[experiment.name] = runs_page(experiment.experiment_id)
        if CONFIRMED_VIEW[0] in experiment.tags:
            found[experiment.name + _CONFIRMED] = confirmed_page(experiment.experiment_id)
    return found
