"""What lies around erpe: the user's folder, the environment, the network, the limits of the machine."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import erpe
from erpe.errors import ConfigError
from erpe.execution.executors import ResourceRequest, on_ray
from erpe.surroundings import SOCKET_FOLDER_BYTES, bypass_proxies, cores, proxy_of, require_loopback, short_folder

ROOT = Path(erpe.__file__).parents[1]
NAMES = ("statistics", "torch", "pandas", "rich", "typing", "random", "json", "ray")


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """The working directory, with modules of the user's that have the names of others."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text("raise RuntimeError('the module of the user')")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    return folder


@pytest.mark.slow
def test_the_command_line_imports_nothing_from_the_users_folder(users_folder):
    found = subprocess.run(
        [sys.executable, "-m", "erpe", "variants", "-d", "digits"], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr


def _found():
    import random
    import statistics

    return [statistics.__file__, random.__file__, os.environ.get("TMPDIR"), sys.path]


@pytest.mark.slow
def test_workers_import_nothing_from_the_users_folder_and_no_setting_of_the_environment_stops_ray(
    users_folder, monkeypatch, tmp_path
):
    deep = tmp_path / ("d" * 140)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.9:9")
    before = set(Path("/tmp").glob("erpe-ray-*"))
    sigterm = signal.signal(signal.SIGTERM, ours := lambda number, frame: None)
    try:
        with on_ray(ResourceRequest(1), 1, tmp_path / "store/ray/study") as workers:
            *modules, _, path = workers.call(_found)
            assert Path.cwd() == users_folder, "only Ray was started elsewhere"
            # Ray's own answer raises SystemExit wherever the signal lands, and Python may lose that.
            assert signal.getsignal(signal.SIGTERM) is ours, "our answer to SIGTERM is left alone"
            assert workers.call(signal.getsignal, signal.SIGTERM) is not ours
    finally:
        signal.signal(signal.SIGTERM, sigterm)
    assert not any(each.startswith(str(users_folder)) for each in [*modules, *path])
    assert set(Path("/tmp").glob("erpe-ray-*")) <= before, "nothing of Ray is left"


def test_tune_is_not_told_where_to_write_by_variables_that_it_refuses():
    code = "import os, erpe.execution.ray_tune.environment; print({*os.environ} & {*os.environ['REFUSED'].split()})"
    refused = {"RAY_AIR_LOCAL_CACHE_DIR": "/tmp", "TUNE_RESULT_DIR": "/tmp"}
    given = os.environ | refused | {"REFUSED": " ".join(refused), "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=given, text=True).strip() == "set()"


def test_the_folder_for_sockets_has_a_short_name(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for place in ("/tmp", tmp_path / ("d" * 140), tmp_path / "not there"):
        monkeypatch.setenv("TMPDIR", str(place))
        with short_folder() as folder:
            assert len(os.fsencode(folder)) <= SOCKET_FOLDER_BYTES and not os.listdir(folder)
            socket_name = f"{folder}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
            with socket.socket(socket.AF_UNIX) as server:
                Path(socket_name).parent.mkdir(parents=True)
                server.bind(socket_name)
        assert not os.path.exists(folder)


def test_a_temporary_folder_of_the_user_is_taken_if_it_can_be(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as place:
        monkeypatch.setenv("TMPDIR", place)
        with short_folder() as folder:
            assert os.path.dirname(folder) == place


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "900000000 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n1:name=systemd:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)  # fmt: skip
def test_cores_are_those_of_the_affinity_and_of_every_control_group(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == (expected or len(os.sched_getaffinity(0)))


def test_cores_follow_the_affinity():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from erpe.surroundings import cores;"
    given = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", f"{code} print(cores())"], env=given, text=True) == "1\n"


def test_no_proxy_is_asked_for_this_machine_itself(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "NO_PROXY", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://me:secret-word@proxy.example:3128")
    monkeypatch.setenv("ALL_PROXY", "http://all.example:1")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    assert proxy_of("http://127.0.0.1:5000")
    bypass_proxies()
    bypass_proxies()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "inside.example,localhost,127.0.0.1,::1"
    assert not any(map(proxy_of, ("http://127.0.0.1:5000", "http://localhost", "http://[::1]:5000", "sqlite:///x.db")))
    assert proxy_of("http://inside.example:5000") is None
    assert proxy_of("http://elsewhere.example:5000") == "http://proxy.example:3128"
    assert proxy_of("https://elsewhere.example") == "http://all.example:1"


def test_a_machine_without_loopback_is_told_in_one_line():
    require_loopback()
    code = (
        "from erpe.surroundings import require_loopback\nfrom erpe.errors import ErpeError\n"
        "try:\n    require_loopback()\nexcept ErpeError as error:\n    print(error)"
    )
    alone = ["unshare", "--net", "--map-root-user", sys.executable, "-c", code]
    found = subprocess.run(
        alone, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    if "unshare" in found.stderr:  # a machine that lets nobody make a network of their own
        return
    assert "127.0.0.1 does not work" in found.stdout and "lo up" in found.stdout, found.stderr


def test_no_folder_for_sockets_is_one_line(monkeypatch):
    monkeypatch.setattr("erpe.surroundings.SOCKET_FOLDER_BYTES", 5)
    monkeypatch.setenv("TMPDIR", "/tmp")
    with pytest.raises(ConfigError, match="use TMPDIR=FOLDER"):
        short_folder()
