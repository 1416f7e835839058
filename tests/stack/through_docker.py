"""`infra/test --docker`: the commands of infra/README.md through Docker itself, from nothing.

Where no engine runs: installs Debian's docker.io and docker-compose, starts an engine of its own in a temporary folder
and, since there may be no registry, makes the images that the Dockerfiles start from with debootstrap. Needs root,
Debian and about twenty minutes on two cores; everything but the packages and iptables' chains is removed at the end.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from engine import ROOT
from readme import commands

PACKAGES = "docker.io docker-compose debootstrap iptables iproute2"
PYTHON, POSTGRES = "python:3.11-slim-bookworm", "postgres:16-bookworm"
PLUGIN = """#!/bin/sh
if [ "$1" = docker-cli-plugin-metadata ]; then
  echo '{"SchemaVersion": "0.1.0", "Vendor": "Debian", "Version": "1.29.2"}'
  exit
fi
shift
exec docker-compose "$@"
"""


def call(*words, **how):
    """A command that must end well, shown as a shell would."""
    print("+", *words, flush=True)
    return subprocess.run(words, check=True, **how)


def ask(*words, **how):
    """What a command prints; nothing if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, **how)
    return done.stdout.strip() if done.returncode == 0 else ""


@contextmanager
def engine(folder):
    """An engine that answers: the machine's, or one of our own for as long as the block runs."""
    if ask("docker", "info", "--format", "{{.ServerVersion}}"):
        yield
        return
    if os.geteuid() or not shutil.which("apt-get"):
        sys.exit("infra/test --docker: no engine answers, and starting one needs root on Debian")
    os.environ["PATH"] = f"/usr/sbin:/usr/bin:{os.environ['PATH']}"  # Debian's client before others, which lack compose
    if not all(map(shutil.which, ("dockerd", "docker-compose", "debootstrap"))):
        call("apt-get", "update", "-qq")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        call("apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES.split(), env=environment)
    plugin = folder / "config/cli-plugins/docker-compose"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(PLUGIN)
    plugin.chmod(0o755)
    address = f"unix://{folder}/socket"
    os.environ |= {"DOCKER_HOST": address, "DOCKER_CONFIG": str(folder / "config"), "DOCKER_BUILDKIT": "1"}
    os.environ["COMPOSE_DOCKER_CLI_BUILD"] = "1"
    places = ("--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid")
    with (folder / "engine.log").open("wb") as log:
        running = subprocess.Popen(["dockerd", *places, "-H", address], stdout=log, stderr=log)
    try:
        await_engine(running, folder / "engine.log")
        make_images(folder)
        yield
    finally:
        running.terminate()
        running.wait()
        subprocess.run(["iptables", "-P", "FORWARD", "ACCEPT"], check=False)  # which the engine has set to DROP
        subprocess.run(["ip", "link", "delete", "docker0"], check=False)


def await_engine(running, log):
    """Until it answers; the end of its log if it does not."""
    deadline = time.monotonic() + 60
    while not ask("docker", "info", "--format", "{{.ServerVersion}}"):
        if running.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"infra/test --docker: the engine did not start\n{log.read_text()[-2000:]}")
        time.sleep(0.5)


def make_images(folder):
    """What the Dockerfiles and docker-compose.yml name, as near as Debian comes to it."""
    root = folder / "root"
    include = "--include=ca-certificates,python3,python3-venv,python3-pip"
    call("debootstrap", "--variant=minbase", include, "bookworm", root, stdout=subprocess.DEVNULL)
    (root / "usr/bin/python").symlink_to("python3")
    for path in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        path.unlink()
    certificates = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    shutil.copy(certificates, root / "etc/ssl/certs/ca-certificates.crt")
    lines = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt"]
    pip = (sys.executable, "-m", "pip", "config", "get", "global.find-links")
    if wheels := ask(*pip):  # of this machine: a registry may not have them
        shutil.copytree(wheels, root / "opt/wheels")
        lines.append("find-links = /opt/wheels")
        os.environ["TORCH_INDEX"] = ""
    (root / "etc/pip.conf").write_text("\n".join(lines) + "\n")
    paths = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
        call("docker", "import", "-c", paths, "-", PYTHON, stdin=tar.stdout)
    shutil.rmtree(root)
    context = folder / "postgres"
    context.mkdir()
    shutil.copy(ROOT / "tests/stack/postgres-image", context / "start")
    (context / "Dockerfile").write_text(
        f"FROM {PYTHON}\n"
        "RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
        " postgresql && rm -rf /var/lib/postgresql/*\n"
        "ENV PATH=/usr/lib/postgresql/15/bin:$PATH\n"
        "COPY start /usr/local/bin/start\n"
        'ENTRYPOINT ["start"]\n'
    )
    call("docker", "build", "-q", "-t", POSTGRES, context)


def walk(clone):
    """The README's commands, and after each that takes the stack down and up again the same studies as before."""

    def shell(line):
        print("\n$", line, flush=True)
        subprocess.run(["bash", "-c", line], cwd=clone, check=True, stdin=subprocess.DEVNULL)

    def studies():
        command = ["docker", "compose", "run", "--rm", "erpe", "status", "--json"]
        said = subprocess.run(command, cwd=clone, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return json.loads(said.stdout.strip().splitlines()[-1])

    refused = subprocess.run(["docker", "compose", "up", "-d"], cwd=clone, capture_output=True, text=True)
    assert refused.returncode and "run infra/secrets first" in refused.stderr, "it starts without secrets"
    before = None
    for line in commands():
        if line == "docker compose down":
            before = studies()
            shell(line)
            shell("docker compose up -d")
            assert studies() == before, "down and up lost something"
            shell("docker compose down -v")  # and now everything, which the backup must bring back
            continue
        shell(line)
        if line == "infra/secrets":
            shell("docker compose build")  # `up` takes images that are there, of whatever code
    assert before and studies() == before, "the backup lacks something"
    shell("docker compose run --rm erpe compare digits-nine")
    shell("docker compose ps; docker images")
    print("\ninfra/test --docker: every command of the README ended well; the studies are there after down and up,")
    print("and after deleting every volume and restoring the backup", flush=True)


def main():
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="erpe-docker-") as name, engine(Path(name)):
        clone = Path(name) / "erpe"
        call("git", "clone", "-q", ROOT, clone)
        try:
            walk(clone)
        finally:
            with suppress(subprocess.CalledProcessError):
                call("docker", "compose", "down", "-v", cwd=clone)
    print(f"infra/test --docker: {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
