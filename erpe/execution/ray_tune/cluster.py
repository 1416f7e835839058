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
from erpe.execution import COMMAND
from erpe.execution.ray_tune.sooner import starting_sooner
from erpe.openmp import WAITING
from erpe.surroundings import bypass_proxies, require_loopback
from erpe.text import first_line

OBJECT_STORE_BYTES = 100 * 2**20
"""Trials exchange a few numbers; Ray's default is 30 % of the memory."""

HEAD_SECONDS = 45.0
"""How long a cluster's head may be silent; Ray's patience is 60."""


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
        raise ConfigError(f"ray address {address}: no response ({error}); is the cluster up?") from None


def start(address: str | None, cpus: int, folder: str) -> None:
    """Start Ray with a number of CPUs, or join the cluster at an address.

    Args:
        folder: an empty folder of this run alone, where a Ray that starts here keeps its sockets and logs.
    Raises:
        ConfigError: no cluster answers, or this machine cannot run one.
        StudyError: Ray did not start; another try may help.
    """
    import erpe.execution.ray_tune.environment  # isort: skip  # noqa: F401  before Ray
    import ray

    if address:
        cluster_info(address)
    else:
        require_loopback()
        bypass_proxies()
        require_token()
        os.environ.update(WAITING)  # inherited: for a runtime_env Ray would leave the workers it starts first idle
    there: dict[str, Any] = {"runtime_env": {"env_vars": WAITING}}
    here: dict[str, Any] = {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": folder,
    }
    try:
        with ending_at_once(), leaving_the_users_folder(folder), nullcontext() if address else starting_sooner():
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **(there if address else here),
            )
    except ray.exceptions.AuthenticationError:
        raise _wants_token(address) from None
    except (ConnectionError, ValueError) as error:
        if not address:
            raise
        raise ConfigError(f"ray address {address}: no cluster answers ({error})") from None
    except OSError as error:
        why = f"cannot write {error.filename} ({error.strerror})" if error.filename else str(error)
        raise ConfigError(
            f"ray: {why}; use a HOME and a TMPDIR that can be written, or --executor inline instead"
        ) from None
    except Exception as error:  # Ray's own, of no class, where a machine is too busy for its patience
        said = first_line(error)
        raise StudyError(
            f"ray: did not start ({said}); nothing is lost, the same command tries again, "
            "and --executor inline needs no Ray"
        ) from error


@contextmanager
def leaving_the_users_folder(folder: str) -> Iterator[None]:
    """While the block runs, be in another folder: Ray has its workers import from the one in which it is started.

    There, a `statistics.py` of the user's would take the place of Python's own. A folder from which this process
    imports, too, is left to Ray: a notebook's, or that of a source tree.
    """
    here = Path.cwd()
    with nullcontext() if any(Path(each or ".").resolve() == here for each in sys.path) else chdir(folder):
        yield


def _wants_token(address: str | None) -> ConfigError:
    return ConfigError(
        f"ray address {address}: it asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    )


def require_node(address: str) -> None:
    """Make sure that this machine is a node of a cluster, as the driver's must be: Ray would look for half a minute.

    It may be about to become one: `ERPE_RAY_START` is the id of a child of this process that makes it one, as
    infra/docker/bin/erpe-node has it.

    Raises:
        ConfigError: it is none.
    """
    from ray._private.services import find_node_ids

    if child := os.environ.pop("ERPE_RAY_START", None):
        with suppress(ChildProcessError):
            os.waitpid(int(child), 0)
    if not find_node_ids():
        raise ConfigError(
            f"ray address {address}: this machine is no node of that cluster; "
            f"`ray start --address={address} --num-cpus=0` makes it one that runs no trials"
        )


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
def watch_head(address: str | None, seconds: float = HEAD_SECONDS) -> Iterator[None]:
    """While the block runs: if the cluster's head is silent for so long, SIGINT ends what the main thread waits for.

    Ray would end the process a little later, in its own words: a command whose main thread does not wake ends itself
    before. A block outside of the main thread cannot be woken.

    Raises:
        StudyError: the head was silent, and the block ended for that.
    """
    over, gone = threading.Event(), threading.Event()
    wakes = threading.current_thread() is threading.main_thread()
    if address:
        threading.Thread(target=_mind, args=(address, seconds, over, gone, wakes), daemon=True).start()
    try:
        yield
    except BaseException as error:
        if not gone.is_set():
            raise
        raise StudyError(_away(address, seconds)) from error
    finally:
        over.set()


def _away(address: str | None, seconds: float) -> str:
    gone = f"ray address {address}: the cluster's head is gone, no answer for {seconds:g} s"
    return f"{gone}; trials stay as they are, the same command continues"


def _mind(address: str, seconds: float, over: threading.Event, gone: threading.Event, wakes: bool) -> None:
    heard = time.monotonic()
    while not over.wait(seconds / 10):
        with suppress(ConfigError):
            check_reachable(address)
            heard = time.monotonic()
        if time.monotonic() - heard > seconds:
            gone.set()
        main = threading.main_thread().ident
        if gone.is_set() and wakes and main:  # twice: the first asks a search to finish its epochs, the second ends it
            signal.pthread_kill(main, signal.SIGINT)
        if gone.is_set() and COMMAND.is_set() and time.monotonic() - heard > 1.3 * seconds:
            print(f"erpe: {_away(address, seconds)}", file=sys.stderr, flush=True)
            os._exit(1)


class ClusterResources(NamedTuple):
    """What a cluster has."""

    nodes: int
    cpus: float
    gpus: float


def cluster_info(address: str) -> ClusterResources:
    """Ask a cluster as a driver would, without joining it: `ray.init` would take its time over a wrong token.

    Raises:
        ConfigError: no response, a wrong token, this machine is not a node of it, or it cannot run a trial.
    """
    import erpe.execution.ray_tune.environment  # noqa: F401  before Ray

    import ray  # isort: skip
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    check_reachable(address)
    try:
        with _without_its_warnings():
            nodes = GcsClient(address=address).get_all_node_info(timeout=10).values()
    except ray.exceptions.AuthenticationError:
        raise _wants_token(address) from None
    except ray.exceptions.RayError as error:
        raise ConfigError(f"ray address {address}: no cluster answers ({error})") from None
    alive = [node.resources_total for node in nodes if node.state == 0]
    room = ClusterResources(
        len(alive), sum(each.get("CPU", 0) for each in alive), sum(each.get("GPU", 0) for each in alive)
    )
    if not room.cpus:
        raise ConfigError(f"ray address {address}: {room.nodes} nodes and no CPU among them; add a worker")
    require_node(address)
    return room


def require_token() -> None:
    """Make a token for a cluster that starts here: without one, other users of this machine could run code in it.

    The token is of this process and its children, and on no disk; Ray's own way is a file in HOME that everyone on
    the machine may read, and that cannot be made where HOME cannot be written. What the user has set stays.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    Config.initialize("")  # Ray read its environment when it was imported
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While Ray starts there is no epoch to finish: SIGINT and SIGTERM end the command, and are told to who asked.

    Ray would put a handler of SIGTERM in place that raises SystemExit wherever the signal lands, which Python may lose.
    """
    from ray._private import utils

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: int, frame: Any) -> None:
        told = before[signal.Signals(number)]
        if callable(told):
            told(number, frame)
        raise KeyboardInterrupt

    theirs, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        utils.set_sigterm_handler = theirs
        for number, handler in before.items():
            signal.signal(number, handler)
