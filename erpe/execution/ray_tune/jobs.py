"""Jobs of a Ray cluster: commands of erpe that its head runs, even if the laptop that submitted them is closed.

Ray's Jobs API, a few routes of HTTP, asked directly: no Ray is needed here, and no answer is waited for without end.
Contract: https://docs.ray.io/en/releases-2.60.0/cluster/running-applications/job-submission/rest.html
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from erpe.errors import ErpeError
from erpe.surroundings import bypass_proxies
from erpe.text import reason, redact

PATIENCE = 20
"""Seconds for an answer."""
GRACE = {"RAY_JOB_STOP_WAIT_TIME_S": "900"}
"""Seconds a stopped job has for its running epochs; Ray's 3 would kill it in the middle of one."""
MOST_BYTES = 256 * 2**20
"""Of an answer; no log of ours is longer."""
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


class JobError(ErpeError):
    """The server of jobs does not respond, refuses us, or does not know the job."""


class Job(NamedTuple):
    """What the head knows of a job. Times: seconds since 1970; None: not yet."""

    id: str
    state: str
    command: str
    started: float | None
    ended: float | None
    code: int | None
    """Exit code of the command."""
    message: str


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the token would go along."""

    def redirect_request(self, *about: Any) -> None:
        """See `urllib.request.HTTPRedirectHandler`."""


class Jobs:
    """The jobs of the head that answers at an address, as http://HOST:8265.

    Every method raises `JobError`: no response, not a Ray head, a wrong token, or an unknown job.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise JobError(f"ray jobs {redact(address)!r}: use http://HOST:PORT of the head, the port mostly 8265")
        self.address = address.rstrip("/")
        self.name = f"ray jobs {redact(self.address)}"
        bypass_proxies()
        token = _token()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def submit(self, words: list[str]) -> str:
        """Hand over a command of erpe -> the id of the job.

        The command goes to everyone who may look at the cluster, so it must hold no secret; those lie at the head.
        """
        command = f"exec erpe {shlex.join(words)}"  # exec: the signal of a stop goes to erpe, not to a shell
        if redact(command) != command:
            raise JobError("the command has a secret in it, which the whole cluster could read; the head has its own")
        about = {"entrypoint": command, "submission_id": f"erpe-{secrets.token_hex(4)}"}
        return str(self._ask("POST", "/api/jobs/", about | {"runtime_env": {"env_vars": GRACE}})["submission_id"])

    def all(self) -> list[Job]:
        """Return submitted jobs, the newest first."""
        found = [_job(each) for each in self._ask("GET", "/api/jobs/") if each.get("submission_id")]
        return sorted(found, key=lambda job: job.started or float("inf"), reverse=True)

    def check_token(self) -> None:
        """Raise JobError if the head refuses us; one that does not respond says nothing about the token."""
        try:
            self.all()
        except JobError as error:
            if error.__cause__ is None:
                raise

    def one(self, name: str) -> Job:
        """Return a job by its id."""
        return _job(self._ask("GET", f"/api/jobs/{_safe(name)}", job=name))

    def log(self, name: str) -> str:
        """All that its command has printed so far."""
        return str(self._ask("GET", f"/api/jobs/{_safe(name)}/logs", job=name)["logs"])

    def follow(self, name: str) -> Iterator[str]:
        """Yield what a job prints, until it has ended; a head that is away for a while is asked again."""
        seen, missed = 0, 0
        while True:
            began = time.monotonic()
            try:
                ended, text = self.one(name).state in ENDED, self.log(name)  # in this order: nothing is missed
            except JobError as error:
                missed += 1
                if error.__cause__ is None or missed > 5:
                    raise
                time.sleep(PATIENCE)
                continue
            missed = 0
            yield text[seen:]
            seen = len(text)
            if ended:
                return
            time.sleep(1 + 10 * (time.monotonic() - began))  # a long log is requested less often

    def stop(self, name: str) -> bool:
        """Ask it to finish its running epochs and end -> whether it ran."""
        return bool(self._ask("POST", f"/api/jobs/{_safe(name)}/stop", job=name)["stopped"])

    def _ask(self, method: str, path: str, body: Any = None, job: str = "") -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        try:
            request = urllib.request.Request(self.address + path, data, headers | self._headers, method=method)
            with urllib.request.build_opener(_Stay).open(request, timeout=PATIENCE) as answer:
                return json.loads(answer.read(MOST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, job) from None
        except ValueError:
            raise JobError(f"{self.name}: answers, but is not the head of a Ray cluster") from None
        except OSError as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                advice = "set SSL_CERT_FILE to a certificate to trust"
                raise JobError(f"{self.name}: certificate not trusted ({cause.verify_message}); {advice}") from None
            raise JobError(
                f"{self.name}: no response ({reason(cause)}); is the head up, with its dashboard?"
            ) from error

    def _refused(self, error: urllib.error.HTTPError, job: str) -> JobError:
        if error.code in (401, 403):
            what = "it does not know our token" if self._headers else "it asks for a token"
            return JobError(f"{self.name}: {what} ({error.code}); set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")
        if error.code == 404 and job:
            return JobError(f"{self.name}: no job {job}; `erpe jobs list` shows those that it knows")
        said = (error.read(4096).decode(errors="replace").strip().splitlines() or [error.reason])[-1]
        return JobError(f"{self.name}: answers {error.code} ({said})")


def _token() -> str:
    """As Ray finds it: by value, or in a file."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(path).read_text().strip() if path else ""
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise JobError(f"RAY_AUTH_TOKEN_PATH {path}: cannot be read ({why}); name a file with the token") from None


def _safe(name: str) -> str:
    return quote(name, safe="")


def _job(about: dict[str, Any]) -> Job:
    started, ended = (about[key] / 1000 if about.get(key) else None for key in ("start_time", "end_time"))
    command = about["entrypoint"].removeprefix("exec ")
    name = about.get("submission_id") or about.get("job_id") or ""
    message = (about.get("message") or "").strip().splitlines() or [""]
    return Job(name, about["status"], command, started, ended, about.get("driver_exit_code"), message[0])
