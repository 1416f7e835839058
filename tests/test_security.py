"""What comes from a store or a server cannot run code, reach other files, or command a terminal; no secret goes out."""

import os
import resource
import shutil
import socket
import subprocess
import time
import zlib
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest
from mlflow_server import free_port
from outcomes import made_up
from toys import work
from trials import tiny

from erpe.cli.ui import server
from erpe.errors import DataError, StoreError, StudyError
from erpe.io import MOST_JSON, read_arrays, read_json
from erpe.report.comparison import compare
from erpe.report.tables import render
from erpe.search.tune import tune
from erpe.store import HISTORY, Store
from erpe.study.spec import define
from erpe.text import line, printable
from erpe.tracking.cursor import Cursor
from erpe.tracking.history import Journal
from erpe.tracking.tracker import Tracker
from erpe.tracking.waiting import lags

EVIL = "[/nothing]\x1b]0;owned\x07[red]x\u202e\x9b2J"


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store")


# ---- files of a store


@pytest.mark.parametrize("place", ["tracking/s-1.json", "spool/s.jsonl"])
def test_a_link_in_a_store_changes_no_file_elsewhere(store, tmp_path, place):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious\nlines\nwithout an end")
    (store.root / place).parent.mkdir(exist_ok=True)
    (store.root / place).symlink_to(victim)
    with suppress(StoreError):
        lags(store)
    with suppress(StoreError):
        Tracker(store, "s", send=False)
    assert victim.read_bytes() == b"precious\nlines\nwithout an end"


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_history_that_is_no_plain_file_is_one_line_at_once_and_changes_no_file(tmp_path, kind):
    (tmp_path / "victim").write_bytes(b"precious")
    path = tmp_path / HISTORY
    path.symlink_to(tmp_path / "victim") if kind == "link" else os.mkfifo(path)
    with pytest.raises(StoreError, match="cannot be written"):
        Journal(tmp_path).start({"version.erpe": "1"})
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_what_a_trial_file_or_cursor_of_someone_else_holds_is_read_or_passed_over(store):
    folder = store.checkpoints / "s"
    folder.mkdir()
    (folder / HISTORY).write_text(
        """[]\n{"at": -1}\n{"at": 1, "tags": [1]}\n{"at": 1, "tags": {"a": 1}}
        {"at": true}\n{"at": 1, "epoch": "x"}\n{"at": 1, "epoch": 1e99}\n"""
        + "[" * 10**5
    )
    Journal(folder).epoch({"epoch": 1.0})
    assert (folder / HISTORY).read_text().endswith('"epoch": 1.0}\n')
    for text in (
        "[]",
        '{"runs": [], "at": 1}',
        '{"runs": {"s": [1]}}',
        '{"runs": {"s": ["x", 1]}, "at": 0}',
        "[" * 10**5,
    ):
        Cursor(store, "s").path.write_text(text)
        assert Cursor(store, "s").runs == {}


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "deep", "large"])
def test_a_json_file_that_is_no_plain_small_file_is_one_line_at_once(tmp_path, kind):
    path = tmp_path / "outcome.json"
    make = {
        "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir,
        "deep": lambda: path.write_text("[" * 10**6), "large": lambda: path.touch() or os.truncate(path, MOST_JSON + 1),
    }  # fmt: skip
    make[kind]()
    with pytest.raises(StoreError, match=r"outcome\.json: cannot be read \("):
        read_json(path)


def npy(header):
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_arrays_that_claim_more_than_they_have_take_no_memory(tmp_path):
    import zipfile

    path = tmp_path / "predictions.npz"
    for shape, kind in (("(10**15,)", "|u1"), ("(1000000000000000,)", "<f8"), ("(1,)", "|S2000000000"), ("()", "|O")):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("predicted.npy", npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"))
        with pytest.raises(StoreError, match="missing or damaged"):
            read_arrays(path)


@pytest.fixture
def little_memory():
    """An allocation of gigabytes fails, and the machine does not."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("favor", {"model.width": 65528}),
        ("favor", {"model.mlp_ratio": 9000}),
        ("favor", {"model.depth": 999}),
        ("favor", {"model.features": 65535}),
        ("favor_general", {"model.width": 65528}),
        ("relu_circulant", {"model.width": 65408, "model.circulant_block": 64}),
    ],
)
def test_a_configuration_cannot_ask_for_more_memory_than_its_weights_have(tmp_path, variant, settings, little_memory):
    from erpe.model import build
    from erpe.training.checkpoint import load_model, save_model

    config = tiny(variant)
    save_model(tmp_path, build(config.model), config)
    (tmp_path / "config.json").write_text(config.replace(settings).model_dump_json())
    with pytest.raises(StoreError, match="its model has"):
        load_model(tmp_path)


def test_a_picture_is_read_by_pillow_alone(tmp_path, monkeypatch):
    """PostScript would go to another program; and a small file can unfold to any size."""
    from erpe.inference import predict
    from erpe.model import build
    from erpe.training.checkpoint import save_model

    config = tiny()
    save_model(tmp_path, build(config.model), config)
    script = tmp_path / "picture.png"
    script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n%%EOF\n")
    bomb = tmp_path / "bomb.png"
    chunk = b"IHDR" + (20_000).to_bytes(4) * 2 + b"\x08\x00\x00\x00\x00"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + zlib.crc32(chunk).to_bytes(4) + b"\0\0\0\0IEND\xaeB`\x82")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("erpe.pictures.PATIENCE", 0.1)
    for picture in (script, bomb, tmp_path / "pipe"):
        with pytest.raises(DataError, match="cannot be read as a picture"):
            predict(tmp_path, picture)


def test_artifacts_are_fetched_by_name_and_size_and_from_no_other_server(tmp_path, empty_database):
    from erpe.report.sources.mlflow import fetch, read
    from erpe.tracking.connection import connect

    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path)}"
    client, run = connect(uri), {}
    places = {"here": (tmp_path / "artifacts").as_uri()}
    places |= {kind: f"{kind}://evil.example/x" for kind in ("http", "mlflow-artifacts", "ftp")}
    for name, place in places.items():
        run[name] = client.create_run(client.create_experiment(name, place))
    files = tmp_path / "artifacts" / run["here"].info.run_id / "artifacts"
    files.mkdir(parents=True)
    for name in ("predictions.npz", "evil.pkl"):
        (files / name).write_bytes(b"x")
    assert [path.name for path in fetch(client, uri, run["here"], ["predictions.npz"]).iterdir()] == ["predictions.npz"]
    os.truncate(files / "predictions.npz", 2**30)
    with pytest.raises(StudyError, match=r"predictions\.npz has 1073741824 bytes"):
        fetch(client, uri, run["here"], ["predictions.npz"])
    for name in set(places) - {"here"}:
        with pytest.raises(StudyError, match="lie elsewhere"):
            fetch(client, uri, run[name], ["predictions.npz"])
    for tag, value in {"arm": EVIL, "seeds_planned": "many", "variant": "relu"}.items():
        client.set_tag(run["here"].info.run_id, tag, value)
    with pytest.raises(StudyError, match="not as erpe logs them"):
        read(uri, ["here"])


# ---- what is shown


def test_text_cannot_command_a_terminal():
    for text in (EVIL, EVIL.encode("utf-8", "surrogatepass").decode(errors="surrogateescape"), "\udcff\0\r\x85\u2028"):
        assert all(c.isprintable() for c in line(text))
    assert printable("α → β, naïve\tü\n") == "α → β, naïve\tü\n"


@pytest.mark.parametrize("style", ["terminal", "markdown", "latex", "csv"])
def test_hostile_names_are_text_in_every_table(style):
    text = render(compare(made_up(("softmax", "relu"), seeds=2, images=50, study=f"=cmd{EVIL}")), style)
    shown = text if style != "csv" else ""
    assert not {c for c in shown if not c.isprintable()} - {"\n"}
    assert style != "csv" or ("'=cmd" in text and ",=cmd" not in text)
    assert style != "terminal" or "[/nothing]" in "".join(text.split())


def test_a_reason_that_looks_like_markup_is_shown_as_it_is(store, capsys):
    from erpe.cli.trials import status_rows, status_table

    def accident(folder, number):
        raise RuntimeError(EVIL)

    tune(
        define("relu", "digits", epochs=1, pruner="none"),
        store,
        trials=1,
        executor="inline",
        work=work(accident=accident),
    )
    status_table(status_rows(store, None))
    out = capsys.readouterr().out
    assert "[/nothing]" in "".join(out.split()) and not {c for c in out if not c.isprintable()} - {"\n"}


# ---- the server of `erpe ui`


def ask(port, host, path="/api/2.0/mlflow/experiments/search?max_results=1", **headers):
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    with closing(connection):
        connection.putrequest("GET", path, skip_host=True)
        for name, value in {"Host": host, **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status


@contextmanager
def running(command, environment, port, folder):
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(3000):
            assert process.poll() is None, (folder / "server.log").read_text()
            with closing(socket.socket()) as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.1)
        else:
            raise TimeoutError((folder / "server.log").read_text())
        yield process
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
def test_the_ui_answers_to_this_machines_names_alone(store, empty_database, monkeypatch):
    shutil.copy(empty_database, store.root / "mlflow.db")
    for name, value in {"ALLOWED_HOSTS": "*", "DISABLE_SECURITY_MIDDLEWARE": "true"}.items():
        monkeypatch.setenv(f"MLFLOW_SERVER_{name}", value)
    port = free_port()
    command, environment = server(store, port)
    assert str(store.root / "mlflow.db") not in " ".join(command)  # where a password may stand
    with running(command, environment, port, store.root):
        assert [ask(port, f"{host}:{port}") for host in ("127.0.0.1", "localhost")] == [200, 200]
        foreign = ["evil.example", f"evil.example:{port}", f"10.evil.example:{port}", "192.168.0.1", f"10.0.0.1:{port}"]
        foreign += [f"localhost:{port}.evil.example", "localhost:1", "localhost", f"0.0.0.0:{port}", ""]
        assert {host: ask(port, host) for host in foreign} == dict.fromkeys(foreign, 403)
        with closing(socket.socket()) as outside:
            address = socket.gethostbyname(socket.gethostname())
            assert address.startswith("127.") or outside.connect_ex((address, port))
