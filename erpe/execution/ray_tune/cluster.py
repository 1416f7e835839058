"""Ray itself: started here, where only this run may use it, or joined where it is."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from erpe.errors import ConfigError, StudyError
from erpe.execution.ray_tune.jobs import Jobs
from erpe.execution.signals import ending_at_once, held_back, unheard_by_children
from erpe.openmp import WAITING
from erpe.surroundings import bypass_proxies, require_loopback, short_folder
from erpe.text import first_line, reason

OBJECT_STORE_BYTES = 100 * 2**20
"""Trials exchange a few numbers; Ray's default is 30 % of the memory."""

HEAD_SECONDS, OWN_SECONDS = 45.0, 3.0
"""How long a cluster's head may be silent, and that of a Ray which was started here; Ray's patience is 60."""

WORKER_SECONDS = 60.0
"""How long a cluster without a CPU is waited for: its workers may be on their way."""


def check_reachable(address: str) -> None:
    """Make sure that somebody listens: Ray itself would try for minutes, and say so in its own words.

    Raises:
        ConfigError: nothing responds, or it is not the address of a cluster.
    """
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise ConfigError(f"ray address {address!r}: use HOST:PORT of the cluster's head, the port mostly 6379")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(f"ray address {address}: no response ({reason(error)}); is the cluster up?") from None


def start(address: str | None, cpus: int, folder: str, tries: int = 2) -> None:
    """Start Ray with a number of CPUs, or join the cluster at an address.

    Args:
        folder: an empty folder of this run alone, where a Ray that starts here keeps its sockets and logs.
        tries: how often a Ray is started here; on a busy machine the 30 s that it waits for itself are too few.
    Raises:
        ConfigError: no cluster answers, it wants another token, this machine is no node of it, or cannot run one.
        StudyError: Ray did not start; another try may help.
    """
    if address:
        check_reachable(address)
        _wait_for_node()
    else:
        require_loopback()
        bypass_proxies()
        require_token()
    import erpe.execution.ray_tune.environment  # isort: skip  # noqa: F401  before Ray
    import ray

    there: dict[str, Any] = {"runtime_env": {"env_vars": WAITING}}
    here: dict[str, Any] = {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": folder,
    }
    os.environ.update({} if address else WAITING)  # inherited by the workers of a Ray that starts here
    try:
        quiet = _without_its_warnings() if address else nullcontext()
        with ending_at_once(), unheard_by_children(), leaving_the_users_folder(folder), quiet:
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **(there if address else here),
            )
    except Exception as error:
        stop()
        again = address is None and tries > 1
        if again and not isinstance(error, OSError | ValueError | ray.exceptions.AuthenticationError):
            return start(address, cpus, folder, tries - 1)
        raise _refusal(address, error) from error


def stop() -> None:
    """Leave Ray, and end the one that was started here. A signal that comes meanwhile is heard afterwards."""
    import ray

    with held_back():  # cut off in its own end, Ray ends this process, without a word
        ray.shutdown()


def _refusal(address: str | None, error: Exception) -> Exception:
    """Return the line for what Ray says: its exceptions have no class of their own for each reason."""
    import ray

    cause = error.__cause__ or error
    said = first_line(cause)
    asks = isinstance(error, ray.exceptions.AuthenticationError)
    if address is None and asks:
        return ConfigError(
            "ray: this process has used the token of another Ray; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN before it"
        )
    if address and (asks or "auth" in str(cause).lower() or "token" in str(cause).lower()):
        how = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        return ConfigError(f"ray address {address}: it asks for a token; {how}")
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        why = f"cannot write {error.filename} ({error.strerror})" if error.filename else said
        return ConfigError(f"ray: {why}; use a HOME and a TMPDIR that can be written, or --executor inline instead")
    if address and "node info" in said:  # Ray has looked for one here for a minute
        return ConfigError(
            f"ray address {address}: this machine is no node of that cluster ({said}); "
            f"`ray start --address={address} --num-cpus=0` makes it one that runs no trials"
        )
    if address:
        return ConfigError(f"ray address {address}: no cluster answers ({said})")
    return StudyError(
        f"ray: did not start ({said}); nothing is lost, the same command tries again, "
        "and --executor inline needs no Ray"
    )


@contextmanager
def leaving_the_users_folder(folder: str) -> Iterator[None]:
    """While the block runs, be in another folder: Ray has its workers import from the one in which it is started.

    There, a `statistics.py` of the user's would take the place of Python's own. A folder from which this process
    imports, too, is left to Ray: a notebook's, or that of a source tree.
    """
    here = Path.cwd()
    with nullcontext() if any(Path(each or ".").resolve() == here for each in sys.path) else chdir(folder):
        yield


def _wait_for_node() -> None:
    """Wait until this machine is a node of the cluster, as the driver's must be.

    `ERPE_RAY_START` is the id of a child of this process that makes it one, as infra/docker/bin/erpe-node has it. With
    a wrong token that takes most of a minute to fail; the same cluster's server of jobs says so at once.

    Raises:
        JobError: a wrong token.
    """
    if child := os.environ.pop("ERPE_RAY_START", None):
        if jobs := os.environ.get("ERPE_RAY_JOBS"):
            Jobs(jobs).check_token()
        with suppress(ChildProcessError):
            os.waitpid(int(child), 0)


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    """Ray's core writes them to the terminal itself; our one line says the same."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def watch_head(
    address: str | None, seconds: float = HEAD_SECONDS, draining: threading.Event | None = None
) -> Iterator[None]:
    """While the block runs: if the cluster's head is silent for so long, SIGINT ends what the main thread waits for.

    Ray would end the process a little later, in its own words. A block outside of the main thread cannot be woken.

    Args:
        draining: set once the user has asked for an end; SIGTERM may have been sent to all of Ray, too.
    Raises:
        StudyError: the head was silent, and the block ended for that.
        KeyboardInterrupt: the same, after the user has asked for an end.
    """
    over, gone = threading.Event(), list[bool]()
    if address and threading.current_thread() is threading.main_thread():
        threading.Thread(target=_watch, args=(address, seconds, over, gone, draining), daemon=True).start()
    try:
        yield
    except BaseException as error:
        if not gone:
            raise
        if gone[0]:
            raise KeyboardInterrupt from error
        raise StudyError(
            f"ray address {address}: the cluster's head is gone, no answer for {seconds:g} s; "
            "trials stay as they are, the same command continues"
        ) from error
    finally:
        over.set()


def _watch(
    address: str, seconds: float, over: threading.Event, gone: list[bool], draining: threading.Event | None
) -> None:
    """Note in `gone`, once the head is, whether an end was asked for before."""
    heard = time.monotonic()
    while not over.wait(seconds / 10):
        with suppress(ConfigError):
            check_reachable(address)
            heard = time.monotonic()
        main = threading.main_thread().ident
        if main and time.monotonic() - heard > seconds:
            gone.append(bool(draining and draining.is_set()))
            signal.pthread_kill(main, signal.SIGINT)  # again and again: the first lets epochs finish, the second ends


class ClusterResources(NamedTuple):
    """What a cluster has."""

    nodes: int
    cpus: float
    gpus: float


@contextmanager
def joined(address: str) -> Iterator[ClusterResources]:
    """Be a driver of a cluster while the block runs.

    Raises:
        ConfigError, StudyError: see `start` and `cluster_info`.
    """
    with short_folder() as folder:
        start(address, 0, folder)
        try:
            yield cluster_info(address)
        finally:
            stop()


def cluster_info(address: str, patience: float = 0) -> ClusterResources:
    """Count the nodes of a cluster that this process has joined, and what they have.

    Args:
        patience: seconds to wait for a first node that can run a trial.
    Raises:
        ConfigError: none of them can run a trial.
    """
    import ray

    deadline = time.monotonic() + patience
    while True:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(each.get(kind, 0) for each in alive) for kind in ("CPU", "GPU"))
        room = ClusterResources(len(alive), cpus, gpus)
        if room.cpus or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if not room.cpus:
        raise ConfigError(f"ray address {address}: {room.nodes} nodes and no CPU among them; add a worker")
    return room


def require_token() -> None:
    """Make a token for a cluster that starts here: without one, other users of this machine could run code in it.

    The token is of this process and its children, and on no disk; Ray's own way is a file in HOME that everyone on
    the machine may read, and that cannot be made where HOME cannot be written. What the user has set stays.

    Raises:
        ConfigError: Ray is imported already, and so has read its environment.
    """
    if "RAY_AUTH_MODE" not in os.environ and "ray" in sys.modules:
        raise ConfigError("ray: imported before erpe could give it a token; set RAY_AUTH_MODE=token before the import")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
