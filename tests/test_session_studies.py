"""Which study a session opens, and what its database may be."""

import contextlib
import sqlite3

import optuna
import pytest
from sqlalchemy.exc import OperationalError
from test_session import SPEC, run

from erpe.errors import StoreError, StudyError
from erpe.store import Store
from erpe.study import storage
from erpe.study.lookup import identified, numbered
from erpe.study.reading import read_studies
from erpe.study.session import StudySession
from erpe.study.spec import StudySpec, define


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


def test_another_study_of_the_same_name_is_refused_with_the_difference(store):
    with StudySession.open(store, SPEC):
        pass
    other = define("relu_general", "digits", epochs=5, sampler="random", pruner="none", settings={"train.lr": 0.01})
    with pytest.raises(StudyError, match=r"\(train.epochs: 4, now 5; .*--new starts afresh"):
        StudySession.open(store, other)
    with StudySession.open(store, other, new=True) as session:
        assert session.name == "digits-relu_general-2"
    with StudySession.open(store, other) as session:
        assert session.name == "digits-relu_general-2", "the newest one is continued"
    with StudySession.open(store, other, new=True) as session:
        assert session.name == "digits-relu_general-3"
    assert [study.name for study in read_studies(store)] == [f"digits-relu_general{end}" for end in ("", "-2", "-3")]


def opened(store, spec, name, new=False):
    """The name of the study that is continued or made."""
    with StudySession.open(store, spec, name=name, new=new) as session:
        return session.name


def test_a_name_with_a_number_that_was_given_is_no_study_that_new_made(store):
    other = define("favor", "digits", sampler="random")
    assert opened(store, other, "a-2") == "a-2"
    assert opened(store, SPEC, "a") == "a", "a-2 was not made beside it"
    assert opened(store, SPEC, "a", new=True) == "a-3", "a-2 is taken"
    assert opened(store, other, "a-10", new=True) == "a-10"
    assert opened(store, SPEC, "a") == "a-3"
    assert opened(store, other, "a-2") == "a-2"
    assert opened(store, SPEC, "a", new=True) == "a-4" == opened(store, SPEC, "a-4")
    assert opened(store, other, "a-2", new=True) == "a-2-2" == opened(store, other, "a-2")


def test_studies_of_a_version_that_did_not_note_the_wanted_name_are_numbered_as_before(store):
    for name in ("a", "a-2"):
        with StudySession.open(store, SPEC, name=name) as session:
            about = session._study.user_attrs["erpe.study"]
            del about["asked"]
            session._study.set_user_attr("erpe.study", about | {"settings": {}})
    assert opened(store, SPEC, "a-2") == "a-2"
    assert opened(store, SPEC, "a") == "a-2" and opened(store, SPEC, "a", new=True) == "a-3"


def test_a_study_called_by_its_identity_is_found_by_what_it_means(store, monkeypatch):
    other = define("relu_general", "digits", epochs=5, sampler="random", pruner="none")
    first = identified(store, "train-a", SPEC)
    assert first == f"train-a-{SPEC.identity[:6]}" and not (store.root / "optuna.db").exists(), "looking makes nothing"
    opened(store, SPEC, first), opened(store, other, identified(store, "train-a", other))
    monkeypatch.setattr(StudySpec, "identity", "0" * 12)  # as another version would write it
    assert identified(store, "train-a", SPEC) == first != identified(store, "train-a", other)
    assert identified(store, "train-b", SPEC) == "train-b-000000"


def test_studies_of_one_configuration_each_are_numbered(store):
    other = define("relu_general", "digits", epochs=5, sampler="random", pruner="none")

    def made(spec, new=False):
        return opened(store, spec, numbered(store, "train-a", spec, new))

    assert numbered(store, "train-a", SPEC) == "train-a" and not (store.root / "optuna.db").exists()
    opened(store, SPEC, "train-a-0cf6a4")  # a confirmation's name counts for nothing
    assert [made(SPEC), made(other), made(SPEC), made(other)] == ["train-a", "train-a-2", "train-a", "train-a-2"]
    assert [made(SPEC, new=True), made(SPEC), made(other)] == ["train-a-3", "train-a-3", "train-a-2"]


def test_a_setting_that_did_not_exist_yet_makes_no_other_study(store):
    with StudySession.open(store, SPEC) as session:
        about = session._study.user_attrs["erpe.study"]
        del about["spec"]["base"]["train"]["ema"]
        session._study.set_user_attr("erpe.study", about)
    with StudySession.open(store, SPEC):
        pass


def test_reading_takes_no_lease_and_makes_no_file(store):
    assert read_studies(store) == [] and not (store.root / "optuna.db").exists()
    with pytest.raises(StudyError, match="it is empty"):
        read_studies(store, "nothing")
    with StudySession.open(store, SPEC) as session:
        run(session, session.ask(2))
        (study,) = read_studies(store)
        assert study.counts == {"COMPLETE": 1} and study.best.value == pytest.approx(0.54)
        assert study.about.uid == session.uid and study.trials[0].uid == f"{session.uid}-0"
        assert study.about.settings["sampler"] == {"name": "random"}
    with pytest.raises(StudyError, match="did you mean digits-relu_general"):
        read_studies(store, "digits-relu_genral")


def test_a_study_someone_else_made_is_left_alone(store):
    database = storage.Database(store.storage_url)
    study = optuna.create_study(storage=database.backend, study_name=SPEC.name)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    database.close()
    with pytest.raises(StudyError, match="not made by erpe"):
        StudySession.open(store, SPEC)


def _garbage(path):
    path.write_bytes(b"this is no database" * 100)


def _another_program(path):
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('0123456789ab')")


def _another_version(path):
    storage.Database(f"sqlite:///{path}").close()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'v9.9.9.a'")


@pytest.mark.parametrize("spoil", [_garbage, _another_program, _another_version])
def test_a_database_that_is_not_ours_is_refused_in_one_line(store, spoil):
    spoil(store.root / "optuna.db")
    before = (store.root / "optuna.db").read_bytes()
    with pytest.raises(StoreError) as error:
        StudySession.open(store, SPEC)
    assert "\n" not in str(error.value)
    if spoil is _garbage:
        assert (store.root / "optuna.db").read_bytes() == before


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense", "no address"),
        ("mysql://u:secret@h/d", "sqlite:///FILE or postgresql"),
        ("sqlite://", "sqlite:///FILE"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/d", "no answer for"),
        ("sqlite:////nowhere/at/all/optuna.db", "unable to open"),
    ],
)
def test_an_address_that_does_not_work_is_told_without_its_password(store, monkeypatch, address, said):
    monkeypatch.setenv("ERPE_STORAGE_URL", address)
    monkeypatch.setattr(storage, "OPENING_SECONDS", 0.0)
    with pytest.raises(StoreError, match=said) as error:
        StudySession.open(store, SPEC)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_database_that_is_locked_for_a_moment_is_waited_for(store):
    with StudySession.open(store, SPEC) as session:
        calls = []

        @storage.retry_while_unavailable
        def flaky():
            calls.append(1)
            if len(calls) < 3:
                raise OperationalError("x", {}, sqlite3.OperationalError("database is locked"))
            return session.ask(1)

        assert flaky().number == 0 and len(calls) == 3


def test_a_full_disk_is_not_waited_for():
    @storage.retry_while_unavailable
    def full():
        raise OperationalError("x", {}, sqlite3.OperationalError("database or disk is full"))

    with pytest.raises(StoreError, match="disk is full; nothing is lost"):
        full()
