"""Carries a spool to MLflow: as often as it takes, in bounded memory, one process at a time."""

from __future__ import annotations

import logging
import threading
import traceback
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from erpe.errors import ErpeError
from erpe.store import Store
from erpe.tracking.server import examine, redact, redact_text
from erpe.tracking.spool import Ack, Event, Spool

if TYPE_CHECKING:
    from erpe.tracking.projection import Projection

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts while the server is down: doubled each time."""


class Sender:
    """Sends one study's events in order; what has arrived is acknowledged in `STUDY.ack`."""

    def __init__(self, store: Store, study: str) -> None:
        self.store, self.study = store, study
        self.spool = Spool(store.spool, study)
        self.uri = redact(store.tracking_uri)
        self.problem: str | None = None
        """What someone must do before anything more can arrive; nothing while the server is merely down."""
        self._projection: Projection | None = None
        self._lock = FileLock(store.spool / f"{study}.sender", thread_local=False)

    @property
    def acknowledged(self) -> Ack:
        """How far this destination has everything; another destination has nothing yet."""
        ack = self.spool.ack
        return ack if ack.uri == self.uri else Ack(self.uri)

    def run(self, stop: threading.Event, wake: threading.Event, last: threading.Event) -> None:
        """Send until `stop`; after `last`, until all is sent or a problem needs someone."""
        pause = FIRST_PAUSE
        while not stop.is_set():
            wake.clear()
            moved = self.step()
            if last.is_set() and (moved is None or self.problem):
                break
            if moved:
                pause = FIRST_PAUSE
            elif moved is None:
                wake.wait(1)  # another process may write, too
            else:
                stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self._lock.release()

    def step(self) -> bool | None:
        """Send one batch: True if it arrived, False if it did not, None if there was nothing to send."""
        try:
            ack = self.acknowledged
            events, offset = self.spool.read(ack.offset)
            if not events:
                return None
            self._lock.acquire(timeout=0)
            self._send(events, ack, offset)
            self.problem = None
            return True
        except Timeout:
            return False  # another process is sending
        except ErpeError as error:
            self.problem = str(error)
            return False
        except Exception as error:
            return self._understand(error)
