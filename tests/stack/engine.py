"""Compose without containers: starts what docker-compose.yml says as processes of this machine.

The same commands, environment, health checks, order and secrets; what differs is the place. `SERVICE:PORT` becomes a
free port on 127.0.0.1, and a path inside a container a path in this stack's folder. A container is all processes that
inherited its mark, and ends as one. State lies in the folder, so that each command may be a process of its own.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SPACE = """
[space]
"train.lr" = {low = 1e-4, high = 1e-2, log = true}
"model.width" = 16
"model.depth" = 2
"model.heads" = 2
"train.batch" = 50
"""
PORTS = {
    "postgres": "postgres:5432",
    "mlflow": "mlflow:5000",
    "ray-head": "ray-head:6379",
    "jobs": "ray-head:8265",
    "agent": "ray-head:52365",
    "tls": "proxy:5443",
    "tls-jobs": "proxy:8443",
    "optuna-dashboard": "optuna-dashboard:8080",
}
MARK = "ERPE_STACK_CONTAINER"
PROGRAMS = [str(Path(sys.executable).parent), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))[::-1])]
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:?[-?])([^}]*))?\})")


class Refused(Exception):
    """Compose would not start this."""


def interpolated(text, variables):
    """`${NAME:-default}`, `${NAME:?message}` and `$$` as compose reads them."""

    def value(match):
        dollar, name, sign, rest = match.groups()
        if dollar:
            return "$"
        given = variables.get(name)
        if given or (given is not None and not (sign or "").startswith(":")):
            return given
        if sign and sign.endswith("?"):
            raise Refused(f"{name}: {rest}")
        return rest or ""

    return _VARIABLE.sub(value, text)


def everywhere(change, node):
    """A tree of YAML with every text changed."""
    if isinstance(node, dict):
        return {key: everywhere(change, value) for key, value in node.items()}
    if isinstance(node, list):
        return [everywhere(change, value) for value in node]
    return change(node) if isinstance(node, str) else node


def seconds(text):
    """`90s` -> 90."""
    return int(text.removesuffix("s"))


def free_ports(count):
    """Different ones: all are held until the last is found."""
    with ExitStack() as held:
        sockets = [held.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


class Stack:
    """The services of a project's docker-compose.yml, their state in a folder."""

    def __init__(self, project, folder):
        self.project, self.folder = Path(project), Path(folder)
        saved = self.project / ".env"
        lines = saved.read_text().splitlines() if saved.exists() else []
        variables = dict(line.split("=", 1) for line in lines if "=" in line) | os.environ
        tree = yaml.safe_load((self.project / "docker-compose.yml").read_text())
        self.tree = everywhere(lambda text: interpolated(text, variables), tree)
        self.services = self.tree["services"]
        self.ports = self._ports()
        self._locks = {name: threading.RLock() for name in self.services}

    def _ports(self):
        path = self.folder / "ports.json"
        if not path.exists():
            ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
            path.write_text(json.dumps(ports))
        return json.loads(path.read_text())

    # Where things are

    def here(self, text, service):
        """What a container would read -> what a process of this machine reads."""
        for name, address in PORTS.items():
            text = re.sub(rf"(?<![\w.-]){address}\b", f"127.0.0.1:{self.ports[name]}", text)
            host, port = address.split(":")
            if service == host:
                text = re.sub(rf"((?:port|listen)[= ]){port}\b", rf"\g<1>{self.ports[name]}", text)
        text = text.replace("host=0.0.0.0", "host=127.0.0.1")
        for inside, outside in self.mounts(service):
            text = re.sub(rf"(?<![\w/.-]){re.escape(inside)}(?=$|[/\s'\"$;)])", str(outside), text)
        return text

    def mounts(self, service):
        """(path in the container, path here) of secrets, volumes and what the image brings."""
        own = self.folder / service
        yield "/run/secrets", own / "secrets"
        yield "/etc/erpe", own / "etc"
        yield "/run/nginx", own / "home"
        for volume in self.services[service].get("volumes", []):
            source, target = volume.removesuffix(":ro").split(":")
            within = self.project / source if source.startswith(("./", "/")) else self.folder / "volumes" / source
            yield target, within.resolve()

    def home(self, service, container):
        """Of a container, new for each command that is run; who looks into a service is in the one that it has."""
        return self.folder / service / (container if ".run" in container else "home")

    def prepare(self, service, container):
        """What its image and its mounts bring, with places as they are here."""
        own, image, home = self.folder / service, self.project / "infra/docker", self.home(service, container)
        for place in (*(own / name for name in ("bin", "etc", "init", "secrets", "home")), home):
            place.mkdir(parents=True, exist_ok=True)
        brought = [(image / "databases.sh", "init"), (image / "signin.ini", "etc")]
        brought.append((self.project / "infra/tls/nginx.conf", "etc"))
        for source, place in [*brought, *((each, "bin") for each in (image / "bin").iterdir())]:
            target = own / place / source.name
            target.write_text(self.here(source.read_text(), service))
            target.chmod(source.stat().st_mode)
        for name in self.services[service].get("secrets", []):
            source = self.project / self.tree["secrets"][name]["file"]
            if not source.is_file():
                raise Refused(f"{source}: no such secret")
            shutil.copyfile(source, own / "secrets" / name)
        for inside, outside in self.mounts(service):
            if not outside.exists():
                outside.mkdir(parents=True)
            if inside.startswith("/home/erpe/"):  # the image's working folder
                link = home / Path(inside).name
                link.unlink(missing_ok=True)
                link.symlink_to(outside)

    def environment(self, service, container):
        """What a process of this container finds."""
        own = self.folder / service
        given = self.services[service].get("environment", {})
        return {
            "PATH": os.pathsep.join([str(own / "bin"), *PROGRAMS, "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin"]),
            "HOME": str(self.home(service, container)), "RAY_TMPDIR": str(self.folder / "ray"),
            "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", MARK: f"{self.folder}/{container}",
            **{name: self.here(str(value), service) for name, value in given.items()},
            **self._as_image(service),
        }  # fmt: skip

    def _as_image(self, service):
        """What only this place needs to know."""
        if service != "postgres":
            return {}
        return {
            "PGDATA": str(self.folder / "volumes/pgdata/data"), "PGHOST": str(self.folder / "volumes/pgdata"),
            "PGPORT": str(self.ports["postgres"]), "ERPE_INIT_SCRIPTS": str(self.folder / "postgres/init"),
            "ERPE_LISTEN": "127.0.0.1",
        }  # fmt: skip

    def command(self, service, arguments=None):
        """Entrypoint and command, or other arguments in the place of the command."""
        about = self.services[service]
        words = about.get("command", []) if arguments is None else arguments
        if service == "postgres" and "entrypoint" not in about:
            return [str(ROOT / "tests/stack/postgres-image")]
        return [self.here(word, service) for word in [*about["entrypoint"], *words]]

    # Containers

    def containers(self, service=None):
        """Name -> processes, the oldest first."""
        found = {}
        for pid, mark in marks(self.folder).items():
            folder, _, name = mark.rpartition("/")
            if folder == str(self.folder) and service in (None, name.rpartition(".")[0]):
                found.setdefault(name, []).append(pid)
        return found

    def _launch(self, service, container, command, variables=None, **how):
        return subprocess.Popen(
            command, env=self.environment(service, container) | (variables or {}), cwd=self.home(service, container),
            start_new_session=True, **how,
        )  # fmt: skip

    def _start(self, service, container):
        (self.folder / f"{service}.healthy").unlink(missing_ok=True)
        self.prepare(service, container)
        log = self.folder / f"{container}.log"
        with log.open("ab") as out:
            process = self._launch(service, container, self.command(service), stdin=-3, stdout=out, stderr=out)
        (self.folder / f"{container}.first").write_text(f"{process.pid} {stat(process.pid)[BEGAN]}")
        if "restart" not in self.services[service]:  # a job: it ends, and must end well
            if process.wait(300):
                raise Refused(f"{service}: ended with {process.returncode}:\n{log.read_text()[-3000:]}")
            (self.folder / f"{service}.done").touch()

    def healthy(self, service):
        """What its health check says, once."""
        kind, *words = self.services[service]["healthcheck"]["test"]
        words = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        words = [self.here(word, service) for word in words]
        limit = seconds(self.services[service]["healthcheck"]["timeout"])
        try:
            return self._launch(service, f"{service}.health", words, stdout=-3, stderr=-3).wait(limit) == 0
        except subprocess.TimeoutExpired:
            return False

    def await_healthy(self, service):
        """Until its health check passes; compose would give it up after interval times retries."""
        about = self.services[service]["healthcheck"]
        deadline = time.monotonic() + seconds(about["interval"]) * about["retries"]
        while not self.healthy(service):
            if time.monotonic() > deadline:
                logs = [path.read_text()[-3000:] for path in self.folder.glob(f"{service}.*.log")]
                raise Refused(f"{service}: not healthy\n{''.join(logs)}")
            time.sleep(1)  # who asks takes the time of who starts
        (self.folder / f"{service}.healthy").touch()

    def depend(self, service):
        """Everything it waits for, as its conditions ask; an engine knows who is healthy and does not ask again."""
        for name, about in self.services[service].get("depends_on", {}).items():
            self.up(name)
            if about["condition"] == "service_healthy" and not (self.folder / f"{name}.healthy").exists():
                self.await_healthy(name)

    def up(self, service, count=None):
        """So many containers of it; none given: as many as there are, at least one."""
        with self._locks[service]:
            if self._is_done(service):
                return
            running = {name for name in self.containers(service) if name.rpartition(".")[2].isdigit()}
            if not running:
                self.depend(service)
            names = [f"{service}.{number}" for number in range(1, (count or max(1, len(running))) + 1)]
            for name in names:
                if name not in running:
                    self._start(service, name)
            for name in running - set(names):
                self._end(name)

    def _is_done(self, service):
        """Whether it is a job, which is never started again, and was done."""
        return (self.folder / f"{service}.done").exists()

    def up_all(self, services, scale):
        """These services, or every one without a profile, each as soon as its conditions are met."""
        chosen = services or [name for name, about in self.services.items() if "profiles" not in about]
        with ThreadPoolExecutor(len(chosen)) as pool:
            for started in [pool.submit(self.up, name, scale.get(name)) for name in chosen]:
                started.result()

    def run(self, service, arguments, variables):
        """A command in a container of its own, with more variables, in the foreground -> its exit code."""
        self.depend(service)
        container = f"{service}.run{os.getpid()}"
        self.prepare(service, container)
        return self._foreground(service, container, self.command(service, arguments or None), variables)

    def execute(self, service, arguments):
        """A command beside a service that runs -> its exit code."""
        if not self.containers(service):
            raise Refused(f"{service}: is not running")
        words = [self.here(word, service) for word in arguments]
        return self._foreground(service, f"{service}.exec{os.getpid()}", words, {})

    def _foreground(self, service, container, command, variables):
        process = self._launch(service, container, command, variables)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: process.send_signal(number))
        code = process.wait()
        self._kill(container)  # with its first process a container ends
        return code

    def stop(self, service):
        """As the engine does: its signal to the first process, and after the grace period SIGKILL to all."""
        for name in self.containers(service):
            self._end(name)

    def _end(self, container):
        service = container.rpartition(".")[0]
        asking = signal.Signals[self.services[service].get("stop_signal", "SIGTERM")]
        all_of_it = self.containers(service).get(container, [])
        deadline = time.monotonic() + seconds(self.services[service].get("stop_grace_period", "10s"))
        for pid in all_of_it[:1]:
            send(pid, asking)
            while alive(pid) and time.monotonic() < deadline:
                time.sleep(0.1)
        self._kill(container, all_of_it)

    def _kill(self, container, all_of_it=()):
        service = container.rpartition(".")[0]
        while left := {*filter(alive, all_of_it), *self.containers(service).get(container, [])}:
            for pid in left:
                send(pid, signal.SIGKILL)
            time.sleep(0.05)

    def down(self, volumes=False):
        """End everything, who needs others before them; with `volumes`, what it kept goes, too."""
        left = dict(self.services)
        with ThreadPoolExecutor() as pool:
            while left:
                needed = {name for about in left.values() for name in about.get("depends_on", {})}
                last = left.keys() - needed
                list(pool.map(self.stop, last))
                for name in last:
                    del left[name]
        for path in (*self.folder.glob("*.done"), *self.folder.glob("*.healthy")):
            path.unlink()
        shutil.rmtree(self.folder / "ray", ignore_errors=True)
        if volumes:
            shutil.rmtree(self.folder / "volumes", ignore_errors=True)


def marks(folder):
    """Process -> its container: by its own mark or, if a title has overwritten that, as its first process or by its
    parent's.
    """
    found, first = {}, {path.read_text(): f"{folder}/{path.stem}" for path in folder.glob("*.first")}
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            about = stat(pid)
        except OSError:
            continue
        own = (each.decode().partition("=")[2] for each in variables if each.startswith(f"{MARK}=".encode()))
        found[pid] = next(own, first.get(f"{pid} {about[BEGAN]}", found.get(int(about[PARENT]), "")))
    return found


STATE, PARENT, BEGAN = 0, 1, 19


def stat(pid):
    """What the kernel says of a process, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def command_line(pid):
    """Of a process, or its title; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def send(pid, number):
    """A signal; a process that is gone needs none."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def alive(pid):
    """Whether it runs; one that nobody waited for does not."""
    try:
        return stat(pid)[STATE] != "Z"
    except OSError:
        return False
