"""The store folder: made, checked, and written whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from erpe.errors import StoreError
from erpe.io import read_json, write_atomic
from erpe.store import LAYOUT, Store, sqlite_path


def refusal(make, *args) -> str:
    with pytest.raises(StoreError) as refused:
        make(*args)
    text = str(refused.value)
    assert text and "\n" not in text
    return text


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_opening_makes_the_folder_and_opening_again_changes_nothing(tmp_path):
    store = Store.open(tmp_path / "deep" / "down")
    assert all(folder.is_dir() for folder in (store.artifacts, store.tracking, store.checkpoints))
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    assert Store.open(str(store.root)) == store
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_many_can_open_a_new_store_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        stores = [*pool.map(Store.open, [tmp_path / "store"] * 32)]
    assert len({*stores}) == 1
    assert json.loads((tmp_path / "store" / "erpe.json").read_text()) == {"layout": LAYOUT}
    assert not [*(tmp_path / "store").glob(".erpe.json*")]


@pytest.mark.parametrize("path", ["file", "file/below", "folder/erpe.json/x"])
def test_what_is_no_folder_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "erpe.json").write_text("{}")
    text = refusal(Store.open, tmp_path / path)
    assert str(tmp_path / path) in text and "--store names another" in text


def test_a_place_that_leads_nowhere_is_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for nowhere in ("~nobody-of-that-name/runs", loop):
        assert str(nowhere) in refusal(Store.open, nowhere)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refusal(Store.open, tmp_path / "store")


@pytest.mark.parametrize("refused", ["os.fsync", "tempfile.TemporaryFile"])
def test_a_full_or_read_only_disk_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(refused, lambda *_, **__: full())
    assert "No space left on device" in refusal(Store.open, tmp_path / "store")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1", b"\x00"])
def test_a_damaged_layout_file_is_refused(tmp_path, content):
    (Store.open(tmp_path).root / "erpe.json").write_bytes(content)
    assert "erpe.json is damaged" in refusal(Store.open, tmp_path)


@pytest.mark.parametrize("content", ['{"layout": 2}', "{}", "[]", "1", "null", '{"layout": "1"}'])
def test_a_store_of_another_layout_is_refused(tmp_path, content):
    (Store.open(tmp_path).root / "erpe.json").write_text(content)
    assert f"this erpe reads layout {LAYOUT}" in refusal(Store.open, tmp_path)


def test_addresses_come_from_the_environment_or_from_the_folder(tmp_path, monkeypatch):
    for name in ("ERPE_STORAGE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    store = Store.open(tmp_path)
    assert store.storage_url == f"sqlite:///{tmp_path}/optuna.db"
    assert store.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("ERPE_STORAGE_URL", "postgresql+psycopg://db/erpe")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert store.storage_url == "postgresql+psycopg://db/erpe"
    assert store.tracking_uri == "http://mlflow:5000"


def test_a_trial_has_one_folder_below_the_store(tmp_path):
    store = Store.open(tmp_path)
    assert store.trial_folder("study", 3, 7) == store.checkpoints / "study" / "0003-7"
    assert len({store.trial_folder("study", number, seed) for number in range(3) for seed in range(3)}) == 9


# Files


@pytest.mark.parametrize("content", ["text ü", b"\x00\xff", ""])
def test_a_file_is_written_whole(tmp_path, content):
    path = tmp_path / "file"
    for _ in range(2):
        write_atomic(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("refused", ["os.fsync", "os.replace", "os.fdopen"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, refused):
    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(refused, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr("os.replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_atomic(tmp_path / "file", "x")
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"])
def test_json_that_cannot_be_read_is_one_line_with_its_name(tmp_path, content):
    path: Path = tmp_path / "outcome.json"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refusal(read_json, path)


@pytest.mark.parametrize("name", ["job x", "job%20x", "a?b=c", "a#;&'\"", "new\nline", "é", "100%", "-x", "a@b:c"])
def test_the_databases_lie_in_the_store_whatever_it_is_called(name, tmp_path, monkeypatch, empty_database):
    from erpe.study.storage import Database
    from erpe.tracking.connection import connect, examine

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = Store.open(name)
    shutil.copy(empty_database, store.root / "mlflow.db")
    Database(store.storage_url).close()
    connect(store.tracking_uri).create_experiment("found")
    assert examine(store.tracking_uri).state == "well"
    with contextlib.closing(sqlite3.connect(store.root / "mlflow.db")) as database:
        assert ("found",) in database.execute("SELECT name FROM experiments").fetchall()
    assert {"optuna.db", "mlflow.db"} <= {path.name for path in store.root.iterdir()}
    assert [path.name for path in Path().iterdir()] == [name] and len([*tmp_path.iterdir()]) == 1
    assert sqlite_path(store.storage_url) == store.root / "optuna.db"
