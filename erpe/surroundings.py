"""What the machine and the environment allow: CPUs, proxies, a loopback, a folder for sockets."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from erpe.errors import ConfigError
from erpe.text import redact

LOOPBACK = ("localhost", "127.0.0.1", "::1")

SOCKET_FOLDER_BYTES = 40
"""Longest name of Ray's folder: below it, 66 bytes name a socket, and Linux allows 107 in all (104 on macOS)."""


def cores(system: Path = Path("/")) -> int:
    """Count the CPUs this process may use: its affinity, and the quota of its control groups (version 1 or 2).

    Args:
        system: root of the file system, with `proc` and `sys`.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) for quota in _quotas(system))]))


def _quotas(system: Path) -> Iterator[float]:
    """CPUs that each control group around this process allows; a container may see its own group as the root."""
    try:
        groups = [line.split(":", 2) for line in (system / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inside = Path(path.lstrip("/"))
        for folder in {top / inside, *(top / above for above in inside.parents), top}:
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if float(quota) > 0:
                    yield float(quota) / float(period)
            except (OSError, ValueError):  # no such file, or "max"
                continue


def bypass_proxies() -> None:
    """Let no client of this process, or of its children, ask a proxy for an address of this machine itself."""
    for name in ("no_proxy", "NO_PROXY"):
        known = [host.strip() for host in os.environ.get(name, os.environ.get(name.swapcase(), "")).split(",")]
        if "*" not in known:
            os.environ[name] = ",".join(filter(None, dict.fromkeys([*known, *LOOPBACK])))


def proxy_of(url: str) -> str | None:
    """Return the proxy, without its password, through which clients ask for a URL; None: they ask directly."""
    try:
        address = urlsplit(url)
        proxies = getproxies()
        found = proxies.get(address.scheme) or proxies.get("all")
        return redact(found) if found and address.hostname and not proxy_bypass(address.hostname) else None
    except ValueError:
        return None


def require_loopback() -> None:
    """Make sure that processes of this machine reach each other; Ray would try for minutes.

    Raises:
        ConfigError: nothing can be bound to, or reached at, 127.0.0.1.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"network: 127.0.0.1 does not work ({error.strerror or error}); use `ip link set lo up`, "
            "or --executor inline instead"
        ) from None


def short_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is removed at the end, with a name short enough for sockets in it.

    Raises:
        ConfigError: no temporary folder can be written, or all their names are too long.
    """
    wanted = [os.environ[name] for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    tried = []
    for place in dict.fromkeys([*wanted, "/tmp", "/var/tmp", "/dev/shm"]):
        made = os.path.join(os.path.realpath(place), "erpe-ray-")
        if len(os.fsencode(made)) + 8 > SOCKET_FOLDER_BYTES:  # 8: what tempfile adds
            tried.append(f"{place} (name too long)")
            continue
        try:
            return tempfile.TemporaryDirectory(
                prefix="erpe-ray-", dir=made.rpartition("/")[0], ignore_cleanup_errors=True
            )
        except OSError as error:
            tried.append(f"{place} ({error.strerror})")
    raise ConfigError(
        f"ray: no folder for its sockets in {', '.join(tried)}; "
        "use TMPDIR=FOLDER with a short name that can be written, or --executor inline instead"
    )
