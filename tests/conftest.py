import gc
import os
import secrets
import shutil
import signal
import tempfile
import uuid
from collections import Counter
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: no machine of the tests has a GPU

import pytest
import scipy.linalg  # noqa: F401  its threads can be limited only once it is loaded
import threadpoolctl
import torch
from browsing import chromium, programs, tidy
from mlflow_server import mlflow_server
from postgres import PROGRAMS, Postgres


def has_room_in_memory(place="/dev/shm"):
    """Whether files of the tests can lie in memory."""
    try:
        about = os.statvfs(place)
    except OSError:
        return False
    runs = not about.f_flag & os.ST_NOEXEC
    return runs and os.access(place, os.W_OK) and about.f_bavail * about.f_frsize > 4 * 2**30


if "TMPDIR" not in os.environ and has_room_in_memory():  # a database on a disk waits for it at each write: 20 ms
    kept = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"  # torch's own place, which outlives the tests
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", kept)
    os.environ["TMPDIR"], tempfile.tempdir = "/dev/shm", None

# Ray reads its token once a process.
if "RAY_AUTH_TOKEN_PATH" not in os.environ:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Small matrices: more threads would only wait for each other. And sums are added in one order.
torch.set_num_threads(1)
threadpoolctl.threadpool_limits(1)


class Failures:
    """Says which test failed as soon as it has: a run that is ended from outside prints no summary."""

    def __init__(self, plugins):
        self.plugins = plugins

    def pytest_runtest_logreport(self, report):
        if report.failed:
            terminal = self.plugins.get_plugin("terminalreporter")
            terminal.write_line(f"\nFAILED ({report.when}) {report.nodeid}")


def pytest_configure(config):
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        config.pluginmanager.register(Failures(config.pluginmanager))


def pytest_collection_modifyitems(items):
    """The stack, then files with many slow tests: what is long begins early, so that all workers end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.parent.name != "stack", -slow[item.path]))


def pytest_collection_finish():
    """What was imported stays: later collections need not look at it again, each for a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def migrations_read_once():
    """Optuna has alembic import all versions of its tables, three times for each database that a test makes."""
    from alembic.script import ScriptDirectory

    read, found = ScriptDirectory.from_config, {}

    def from_config(config):
        place = config.get_main_option("script_location"), config.get_main_option("version_locations")
        if place not in found:
            found[place] = read(config)
        return found[place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "from_config", from_config)
        yield


@pytest.fixture(autouse=True)
def no_database_of_another_test():
    """`mlflow.set_tracking_uri` writes into the environment, where the next test's store would read it."""
    yield
    for name in ("MLFLOW_TRACKING_URI", "ERPE_STORAGE_URL"):
        os.environ.pop(name, None)


@pytest.fixture
def hangup():
    """SIGHUP does what it does by default, under `nohup`, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def without_mlflow(monkeypatch):
    """Everything is recorded, nothing is sent to MLflow."""
    from erpe.tracking.tracker import Tracker

    monkeypatch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))


@pytest.fixture(scope="session")
def postgres_server():
    if not shutil.which("initdb", path=PROGRAMS):
        pytest.skip("no PostgreSQL on this machine")
    # Not below pytest's own folder: another pytest that starts closes that to all users but its own.
    with tempfile.TemporaryDirectory(prefix="erpe-postgres-") as folder:
        server = Postgres(Path(folder))
        yield server
        server.stop()


@pytest.fixture
def postgres(postgres_server):
    """A server with a database of this test alone, at `.url`."""
    postgres_server.url = postgres_server.create(f"test-{uuid.uuid4().hex[:12]}")
    return postgres_server


def made_once(tmp_path_factory, name, make):
    """A folder that one worker of pytest-xdist makes, and then a copy of it for this worker alone."""
    from filelock import FileLock

    own = tmp_path_factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    whole = common / f"whole-{name}"
    with FileLock(common / f"{name}.lock"):
        if not whole.exists():
            make(common / name)
            shutil.copytree(common / name, whole)
    return Path(shutil.copytree(whole, own / f"own-{name}"))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's tables take seconds to make: make them once."""

    def make(folder):
        from erpe.tracking.connection import connect

        folder.mkdir()
        connect(f"sqlite:///{folder}/mlflow.db").search_experiments(max_results=1)

    return made_once(tmp_path_factory, "mlflow", make) / "mlflow.db"


@pytest.fixture(scope="session")
def digits_study(tmp_path_factory):
    """The store of a whole small study of real digits, `digits-nine`; change a copy, not it."""
    from trials import small_study

    from erpe.store import Store

    return Store.existing(made_once(tmp_path_factory, "study", small_study))


@pytest.fixture(scope="module")
def ui(store):
    """Where MLflow's own server shows the `store` of a test file."""
    with mlflow_server(store.root / "mlflow.db", store.artifacts) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not all(programs()):
        assert not os.environ.get("CI"), "no chromium and chromedriver on the PATH; CI needs both"
        pytest.skip("no chromium and chromedriver on the PATH")
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def photograph(browser, tmp_path):
    """Save what the browser shows."""

    def take(name):
        tidy(browser)
        folder = Path(os.environ.get("ERPE_SCREENSHOTS", tmp_path))
        folder.mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(folder / f"{name}.png"))
        assert (folder / f"{name}.png").stat().st_size > 10_000

    return take
