"""Passwords, tokens and keys go to whom they are for, and are written and shown nowhere. Real servers, real work."""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from mlflow_server import mlflow_server
from toys import work

from erpe.cli import app
from erpe.errors import ConfigError
from erpe.execution.ray_tune.cluster import require_token
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.spec import define
from erpe.text import redact, secrets

MARK = "hunter2-"
ENVIRONMENT = {
    "MLFLOW_TRACKING_PASSWORD": f"{MARK}mlflow", "MLFLOW_TRACKING_TOKEN": f"{MARK}token",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}cloud", "AWS_SESSION_TOKEN": f"{MARK}session", "WANDB_API_KEY": f"{MARK}api",
}  # fmt: skip
SMALL = ("-v", "relu", "-d", "digits", "--epochs", "1", "--set", "model.depth=1", "--set", "data.train_limit=100")


@pytest.fixture
def erpe(monkeypatch, capfd, tmp_path):
    """Run a command line with secrets in its environment; all that it says -> (exit code, text)."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def run(*words, storage="", tracking=""):
        for name, value in {"ERPE_STORAGE_URL": storage, "MLFLOW_TRACKING_URI": tracking}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["erpe", *words])
        code = 0
        try:
            app.main()
        except SystemExit as end:
            code = end.code or 0
        return code, "".join(capfd.readouterr())

    return run


def holders(*folders):
    """Files in which a marked secret stands."""
    files = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    return [path for path in files if MARK.encode() in path.read_bytes()]


@pytest.mark.slow
def test_no_byte_of_store_databases_or_output_holds_a_secret(erpe, postgres, empty_database, tmp_path):
    """A study on PostgreSQL and an MLflow server, both with a password in their address."""
    storage = postgres.url.replace("erpe@", f"erpe:{MARK}storage%2F@")
    (tmp_path / "server").mkdir()
    database = tmp_path / "server/mlflow.db"
    database.write_bytes(empty_database.read_bytes())
    where = ("--store", str(tmp_path / "store"))
    for name in ENVIRONMENT:
        os.environ.pop(name)  # the server is another's, and has no secrets of ours
    with mlflow_server(database, tmp_path / "server/artifacts") as url:
        os.environ.update(ENVIRONMENT)
        homes = {"storage": storage, "tracking": url.replace("http://", f"http://me:{MARK}tracking%40@")}
        for words in (("train", *SMALL), ("status",), ("sync",), ("doctor", "--json")):
            code, said = erpe(*words, *where, **homes)
            assert code == 0 and MARK not in said, said
    assert list((tmp_path / "server/artifacts").rglob("model.safetensors"))  # there was something to hide it in
    assert not holders(tmp_path, postgres.folder)


def refusing(status):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(f"no: {self.headers['Authorization']}".encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize(
    "storage",
    [
        f"postgresql+psycopg://me:{MARK}x@127.0.0.1:1/db", f"postgresql+psycopg://me@127.0.0.1:1/db?password={MARK}x",
        f"postgresql://me:{MARK}x/y@host/db", f"mysql://me:{MARK}x@host/db", f"://{MARK}x@",
    ],
)  # fmt: skip
def test_a_database_that_cannot_be_used_is_told_without_its_password(erpe, tmp_path, storage, monkeypatch):
    monkeypatch.setattr("erpe.study.storage.OPENING_SECONDS", 0)
    for words in (("train", *SMALL), ("status",)):
        code, said = erpe(*words, "--store", str(Store.open(tmp_path / "store").root), storage=storage)
        assert code == 1 and MARK not in said and "Traceback" not in said, said
    assert not holders(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_server_that_refuses_is_told_without_its_password(erpe, tmp_path, status):
    """Neither by us nor in what it says itself, which may repeat what we sent."""
    server = refusing(status)
    tune(define("relu", "digits", epochs=1), Store.open(tmp_path / "store"), trials=1, executor="inline", work=work())
    try:
        address = f"http://me:{MARK}x@127.0.0.1:{server.server_port}"
        for words in (("sync", "--store", f"{tmp_path}/store"), ("compare", "--server", address)):
            code, said = erpe(*words, tracking=address)
            assert code == 1 and MARK not in said and "Traceback" not in said, said
    finally:
        server.shutdown()
        server.server_close()
    assert not holders(tmp_path)


def leak(folder, number):
    raise RuntimeError(f"cannot open {os.environ['ERPE_TEST_URL']} with {os.environ['AWS_SECRET_ACCESS_KEY']}")


def test_a_trial_that_dies_of_its_secrets_does_not_tell_them(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{MARK}cloud")
    monkeypatch.setenv("ERPE_TEST_URL", f"s3://me:{MARK}x@host/bucket")
    store = Store.open(tmp_path / "store")
    result = tune(define("relu", "digits", epochs=1), store, trials=1, executor="inline", work=work(accident=leak))
    assert "cannot open s3://host/bucket with ***" in result.reasons[0]
    assert not holders(tmp_path) and MARK not in "".join(capfd.readouterr())


def test_a_secret_is_found_by_its_name_and_its_place(monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", "correct horse")
    monkeypatch.setenv("HOME_URL", "postgresql://me:battery%2Fstaple@host/db")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "public-identity")
    assert {"correct horse", "battery%2Fstaple", "battery/staple"} <= set(secrets())
    assert not {"/home/me/token", "public-identity"} & set(secrets())
    assert redact("said battery/staple and correct horse") == "said *** and ***"
    assert redact("http://me:pa/ss@host:5000/x and sqlite:////a/b@c.db") == "http://host:5000/x and sqlite:////a/b@c.db"


ENTER = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=None, timeout=10))
"""


CLUSTER = """
import json, os, subprocess, sys
from pathlib import Path
from erpe.execution.executors import ResourceRequest, on_ray
with on_ray(ResourceRequest(1), 1, Path("ray/study")) as workers:
    import ray
    assert workers.call(os.getpid) != os.getpid()
    address, token = ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"]
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    wrong = stranger | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    for environment in (stranger, wrong, wrong | {"RAY_AUTH_TOKEN": token}):
        call = [sys.executable, "-c", sys.argv[1], address]
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
        print(done.returncode, "RAY_AUTH_TOKEN" in done.stderr)
"""


@pytest.mark.slow
def test_a_local_ray_cluster_obeys_only_who_knows_its_token(tmp_path):
    """Where HOME cannot be written, too: the token is in no file."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", CLUSTER, ENTER]
    done = subprocess.run(command, env=own | {"HOME": "/proc/nobody"}, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["1 True", "1 True", "0 False"], done.stderr


def test_a_ray_that_was_imported_without_a_token_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "ray", sys)
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token before the import"):
        require_token()
