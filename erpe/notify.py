"""Send a message when a study ends, fails or stalls: through apprise (mail, Slack, ...), or by a command.

The address may hold passwords: it is kept nowhere and shown nowhere, also not in an error.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

from erpe.errors import ConfigError
from erpe.execution.callbacks import Progress, TrialProgress
from erpe.text import first_line, line

QUIET_SECONDS, TIMES = 600.0, 10
"""Nothing is heard for so long, and for so many times the longest pause so far: it stalls."""


class Watched(Progress):
    """Passes on what is told, and tells when nothing was told for long."""

    def __init__(self, inner: Progress, send: Sender, study: str, quiet: float = QUIET_SECONDS) -> None:
        self._inner, self._send, self._study, self._quiet = inner, send, study, quiet
        self._heard, self._longest, self._told, self.over = time.monotonic(), 0.0, False, threading.Event()
        self.end = "ended"
        self._moments: dict[tuple[str, str, int], TrialProgress] = {}

    def _beat(self, moment: TrialProgress | None = None) -> None:
        if moment:
            self._moments[moment.arm, moment.phase, moment.number] = moment
        now = time.monotonic()
        self._longest = self._longest if self._told else max(self._longest, now - self._heard)
        self._heard, self._told = now, False

    def watch(self) -> None:
        """Look again and again until it is over."""
        steps: list[float | None] = []
        while not self.over.wait(min(30.0, self._quiet / 4)):
            before, steps = steps, [each.trained for each in list(self._moments.values()) if each.state == "RUNNING"]
            if steps != before:  # an epoch may take hours
                self._beat()
            silent = time.monotonic() - self._heard
            if not self._told and silent > max(self._quiet, TIMES * self._longest):
                self._told = True
                self._send(f"{self._study}: stalled, silent for {silent / 60:.0f} min; erpe status shows more")

    def on_phase(self, phase: str) -> None:
        """Pass it on."""
        self._beat()
        self.end = "stopped, the same command continues it" if phase == "stopping" else self.end
        self._inner.on_phase(phase)

    def on_start(self, moment: TrialProgress) -> None:
        """Pass it on."""
        self._beat(moment)
        self._inner.on_start(moment)

    def on_epoch(self, moment: TrialProgress) -> None:
        """Pass it on."""
        self._beat(moment)
        self._inner.on_epoch(moment)

    def on_end(self, moment: TrialProgress) -> None:
        """Pass it on."""
        self._beat(moment)
        self._inner.on_end(moment)

    def on_warning(self, text: str) -> None:
        """Pass it on."""
        self._inner.on_warning(text)


class Sender:
    """Sends a line.

    Raises:
        ConfigError: apprise does not know the address, or is not installed; or there is no such command.
    """

    def __init__(self, target: str, progress: Progress) -> None:
        self._command, self._progress, self._apprise = shlex.split(target), progress, None
        if "://" not in target:
            if not self._command or not shutil.which(self._command[0]):
                raise ConfigError("notify: neither an address nor a command; use mailto://..., or a program's path")
            return
        if find_spec("apprise") is None:
            raise ConfigError("notify: apprise is not installed; use pip install 'erpe[notify]', or a command instead")
        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # it might name the address
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of modules that its senders import
            import apprise

            self._apprise = apprise.Apprise()
            known = self._apprise.add(target)
        if not known:
            raise ConfigError("notify: an address that apprise does not know; its documentation lists them")

    def __call__(self, text: str) -> None:
        """Send a message; that it cannot be sent is a warning."""
        text = line(text)
        try:
            if self._apprise:
                sent = bool(self._apprise.notify(body=text, title="erpe"))
            else:
                sent = subprocess.run([*self._command, text], capture_output=True, timeout=60).returncode == 0
        except (OSError, subprocess.SubprocessError):
            sent = False
        if not sent:
            self._progress.on_warning("notify: a message could not be sent")


@contextlib.contextmanager
def notified(target: str | None, study: str, progress: Progress, quiet: float = QUIET_SECONDS) -> Iterator[Progress]:
    """Tell an address or a command how the block ends, and when it stalls.

    Args:
        target: as `mailto://...`, or a command that gets the message as its last argument; default: nobody is told.
        quiet: seconds without a word after which it stalls, unless longer pauses are usual.
    """
    if not target:
        yield progress
        return
    send = Sender(target, progress)
    watched = Watched(progress, send, study, quiet)
    threading.Thread(target=watched.watch, daemon=True).start()
    try:
        yield watched
        send(f"{study}: {watched.end}; erpe status shows more")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        send(f"{study}: failed: {first_line(error)}")
        raise
    finally:
        watched.over.set()
