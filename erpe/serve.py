"""The MLflow UI on a store."""

from __future__ import annotations

import os
import socket
import sys

from erpe.errors import ConfigError, TrackingError
from erpe.store import Store
from erpe.tracking.server import examine, redact
from erpe.tracking.view import CONFIRMED_VIEW, confirmed_page, runs_page


def serve(store: Store, port: int) -> None:
    """Become the MLflow server, on 127.0.0.1 alone; with a tracking server elsewhere, say where to look.

    Raises:
        ConfigError: the port is taken.
        TrackingError: the database is damaged, or of another version.
    """
    uri = store.tracking_uri
    if uri.startswith("http"):
        print(f"The UI is served by the tracking server: {redact(uri)}")
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
    for name, page in pages(store).items():
        print(f"{name}: http://127.0.0.1:{port}{page}")
    print("Ctrl-C ends the server.", flush=True)
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--default-artifact-root",
        store.artifacts.as_uri(), "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    os.execve(sys.executable, command, environment)


def pages(store: Store) -> dict[str, str]:
    """What there is to see -> its page in the UI: the runs of a study, and the confirmed ones, arm by arm."""
    from erpe.tracking.server import connect

    found: dict[str, str] = {}
    for experiment in connect(store.tracking_uri).search_experiments():
        if experiment.name != "Default":
            found[experiment.name] = runs_page(experiment.experiment_id)
        if CONFIRMED_VIEW[0] in experiment.tags:
            found[f"{experiment.name}, confirmed runs"] = confirmed_page(experiment.experiment_id)
    return found
