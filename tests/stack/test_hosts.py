"""Two hosts that share nothing but a network and an object store: a study loses nothing when they are cut apart."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from books import Books, compare_books
from engine import ROOT, SPACE
from object_store import BUCKET, ObjectStore

from erpe.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NEAR, FAR, BETWEEN = "10.77.1.2", "10.77.2.2", ("10.77.1.1", "10.77.2.1")
HEAD = f"{NEAR}:6379"
RAY = str(Path(sys.executable).parent / "ray")
AWAIT = """
import sys, time
from ray._raylet import GcsClient
def alive():
    try:
        return sum(node.state == 0 for node in GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10).values())
    except Exception:
        return 0
while alive() != int(sys.argv[2]):
    time.sleep(0.2)
"""
TRIALS, EPOCHS = 3, 10
TUNE = f"tune -v relu -d digits --name far --trials {TRIALS} --epochs {EPOCHS} --pruner none --space space.toml"


def call(line):
    """A command that must end well."""
    subprocess.run(line.split(), check=True, capture_output=True, text=True)


class Network:
    """Namespaces `near` and `far`, and one between them that passes packets on, or does not; a store is in it."""

    def __init__(self):
        self.names = {name: f"erpe-{os.getpid()}-{name}" for name in ("near", "far", "between")}

    def make(self):
        for name in self.names.values():
            call(f"ip netns add {name}")
            call(f"ip -n {name} link set lo up")
        between = self.names["between"]
        for name, address, gate in (("near", NEAR, BETWEEN[0]), ("far", FAR, BETWEEN[1])):
            own, wire = self.names[name], f"erpe{os.getpid() % 10**6}{name[0]}"
            call(f"ip -n {between} link add {wire} type veth peer name eth0 netns {own}")
            call(f"ip -n {between} address add {gate}/24 dev {wire}")
            call(f"ip -n {between} link set {wire} up")
            call(f"ip -n {own} address add {address}/24 dev eth0")
            call(f"ip -n {own} link set eth0 up")
            call(f"ip -n {own} route add default via {gate}")
        self.join()

    def inside(self, name):
        """What a command begins with to run there."""
        return ["ip", "netns", "exec", self.names[name]]

    def _forward(self, value):
        subprocess.run(
            [*self.inside("between"), "sh", "-c", f"echo {value} >/proc/sys/net/ipv4/ip_forward"], check=True
        )

    def join(self):
        """Near and far reach each other."""
        self._forward(1)

    def cut(self):
        """They do not, and nobody tells them so; both reach the store."""
        self._forward(0)

    def end(self):
        for name in self.names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Hosts:
    """A cluster's head on the near host, and a node on the far one, which sees nothing of the near one's disk."""

    def __init__(self, folder, network, store):
        self.folder, self.network, self.started = folder, network, []
        (folder / "token").write_text("0123456789abcdef" * 4)
        (folder / "near").mkdir()
        (folder / "far").mkdir()
        (folder / "near/space.toml").write_text(SPACE)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ERPE_", "MLFLOW_", "RAY_", "AWS_"))}
        self.environment = kept | store.environment | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3",
        }  # fmt: skip

    def _at(self, name):
        own = str(self.folder / name)
        return self.environment | {"HOME": own, "TMPDIR": own, "RAY_TMPDIR": own}

    def start(self, name, *words, log):
        """In the background, its words in a file of the host's folder."""
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(
                [*self.network.inside(name), *words], env=self._at(name), cwd=self.folder / name,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def up(self):
        options = "--num-cpus=1 --num-gpus=0 --object-store-memory=104857600 --disable-usage-stats --block"
        head = f"{RAY} start --head --node-ip-address={NEAR} --port=6379 --include-dashboard=false {options}"
        self.start("near", *head.split(), log="head.log")
        # Processes of its own, so that all of them end with the first; and the near one's disk out of sight.
        node = f"mount -t tmpfs none {self.folder}/near && while :; do echo starting; {RAY} start --address={HEAD} "
        node += f"--node-ip-address={FAR} {options}; sleep 1; done"
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", node]
        self.start("far", *apart, log="far.log")
        self.await_nodes(2)

    def await_nodes(self, count):
        """Until the head counts so many alive."""
        asking = self.start("near", sys.executable, "-c", AWAIT, HEAD, str(count), log="await.log")
        assert not asking.wait(120), "waited too long"

    def erpe(self, line, **variables):
        """The words of a command on the near host."""
        given = {"ERPE_RAY_ADDRESS": HEAD} | variables
        variables = [f"{name}={value}" for name, value in given.items()]
        return ["env", *variables, sys.executable, "-m", "erpe", *line.split()]

    def say(self, line, **variables):
        """A command on the near host, in the foreground."""
        return subprocess.run(
            [*self.network.inside("near"), *self.erpe(line, **variables)], env=self._at("near"),
            cwd=self.folder / "near", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200,
        )  # fmt: skip

    def end(self):
        for process in reversed(self.started):
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
            process.wait()


def until(condition, seconds=120):
    """Wait; the condition's answer."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)
    return answer


@pytest.fixture(scope="module")
def hosts():
    network = Network()
    try:
        network.make()
    except (OSError, subprocess.CalledProcessError) as error:
        network.end()
        said = getattr(error, "stderr", None) or error
        pytest.skip(f"no network namespaces here: {said}")
    store = ObjectStore(5000, BETWEEN[0], network.inside("between"))
    with tempfile.TemporaryDirectory(prefix="erpe-hosts-") as name:
        hosts = Hosts(Path(name), network, store)
        try:
            hosts.up()
            yield hosts
        finally:
            hosts.end()
            store.end()
            network.end()


def test_a_host_that_shares_no_folder_is_named_before_anything_is_trained(hosts):
    said = hosts.say(TUNE)
    told = [line for line in said.stderr.splitlines() if line.startswith("erpe: ")]
    assert said.returncode == 1 and len(told) == 1, said.stderr
    assert f"node {FAR}: " in told[0] and "ERPE_CHECKPOINTS" in told[0], told
    doctor = hosts.say("doctor")
    (line,) = (line for line in doctor.stdout.splitlines() if FAR in line)
    assert "wrong" in line


def test_a_study_loses_nothing_when_its_hosts_are_cut_apart_and_joined_again(hosts, monkeypatch):
    """Both go on meanwhile: the far one trains and saves an epoch that nobody hears of, the near one its trial."""
    log, near = hosts.folder / "study.log", hosts.folder / "near"
    where = {"ERPE_CHECKPOINTS": f"s3://{BUCKET}/studies"}
    study = hosts.start("near", *hosts.erpe(TUNE, **where), log="study.log")

    def told(what):
        assert study.poll() is None, log.read_text()
        return re.findall(what, log.read_text())

    until(lambda: told("epoch") and list(hosts.folder.glob("far/erpe-trial-*/training.safetensors")))
    hosts.network.cut()
    hosts.await_nodes(1)
    before = len(told(r"trial +\d+  complete"))
    until(lambda: len(told(r"trial +\d+  complete")) > before)
    hosts.network.join()
    assert study.wait(200) in (0, 3), log.read_text()
    monkeypatch.delenv("ERPE_STORAGE_URL", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert compare_books(Store.open(near / "runs"), "far", TRIALS) == Books()
    until(lambda: (hosts.folder / "far.log").read_text().count("starting") > 1)
