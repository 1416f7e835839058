"""A study has one name: users see studies, arms, trials and seeds, and nothing of what the database calls them."""

import json
import re

import pytest
from test_run_study import ARMS, play
from toys import work
from typer.testing import CliRunner

from erpe.cli.app import app
from erpe.cli.status import result_lines
from erpe.cli.tables import result_table
from erpe.errors import ErpeError, StudyError
from erpe.inference import find_folder
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study import naming
from erpe.study.lock import acquire
from erpe.study.lookup import find_trial, parts_of
from erpe.study.reading import read_studies
from erpe.study.spec import define
from erpe.study.storage import parse
from erpe.tracking.image import desired

INTERNAL = re.compile(r"digits-nine\.(?!toml|jsonl)|confirm-[0-9a-f]")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store.open(tmp_path_factory.mktemp("named") / "store")
    play(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "nowhere://")  # nothing is sent
        tune(define("relu", "digits", epochs=2, pruner="none"), store, trials=2, executor="inline", work=work())
    return store


def erpe(*words):
    """Exit code and all that was said; an error as `main` shows it."""
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception and not isinstance(done.exception, ErpeError | SystemExit):
        raise done.exception
    return done.exit_code, done.output + (str(done.exception) if done.exit_code == 1 else "")


COMMANDS = [
    "status", "status digits-nine", "status digits-nine/relu", "status digits-relu", "status nothing",
    "status digits-nine/nothing", "study status", "study status digits-nine", "study status nothing",
    "gc --failed --dry-run", "gc digits-nine --keep-best 1 --dry-run", "gc digits-nine/relu --keep-best 1 --dry-run",
    "gc nothing --failed", "predict digits-nine x.png", "predict nothing x.png", "predict digits-nine/relu/7 x.png",
    "predict digits-nine/relu/seed-9 x.png", "predict digits-nine/0 x.png", "predict digits-relu/1 x.png",
    "compare digits-nine", "compare nothing", "restore", "doctor",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("style", ["people", "scripts"])
def test_no_command_says_what_the_database_calls_a_part(store, words, style):
    if style == "scripts" and words.split()[0] in ("compare", "study"):
        return
    _, said = erpe(*words.split(), "--store", store.root, *(["--json"] if style == "scripts" else []))
    assert said and not INTERNAL.search(re.sub(r"\S*/checkpoints/\S*", "", said)), said  # a damaged file has a path


def test_status_is_a_line_a_study_and_shows_the_arms_of_one_and_the_trials_of_an_arm(store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # of a narrow terminal the times are left out first
    _, said = erpe("status", "--store", store.root)
    lines = [line for line in said.splitlines() if "digits-" in line]
    assert [line.split()[0] for line in lines] == ["digits-nine", "digits-relu"]
    assert all(re.search(r" 20\d\d-\d\d-\d\d \d\d:\d\d[+-]\d\d:\d\d *$", line) for line in lines), said
    _, said = erpe("status", "digits-nine", "--store", store.root)
    assert all(f"  {arm} " in said for arm in ARMS) and "2/2" in said
    _, said = erpe("status", "digits-nine/relu", "--store", store.root)
    assert "digits-nine/relu: 2 complete" in said and "digits-nine/relu/seeds: 2 complete" in said
    _, said = erpe("status", "digits-nine/relu", "--store", store.root, "--json")
    assert [(row["study"], row["arm"], row["phase"]) for row in json.loads(said)] == [
        ("digits-nine", "relu", "search"), ("digits-nine", "relu", "confirm"),
    ]  # fmt: skip


def test_every_trial_and_seed_is_found_by_its_name_and_a_study_by_its_best_arm(store):
    records = read_studies(store)
    for part in records:
        for trial in part.trials:
            place = naming.part_name(part.experiment, part.arm, "search")
            found, same = find_trial(records, naming.trial_name(place, part.phase, trial.number))
            assert (found.name, same) == (part.name, trial)
    searches = [part for part in parts_of(records, "digits-nine") if part.phase == "search"]
    best = max(searches, key=lambda part: part.best.value)
    found, trial = find_trial(records, "digits-nine")
    assert (found.arm, found.phase, trial.number) == (best.arm, "confirm", 0)
    assert find_trial(records, "digits-nine/softmax")[0].shown == "digits-nine/softmax/seeds"
    assert find_trial(records, "digits-relu")[1] == records[-1].best
    for name in ("digits-nine", "digits-nine/relu", "digits-nine/relu/1", "digits-nine/relu/seed-1", "digits-relu"):
        assert find_folder(name, store).is_dir()


def test_a_model_of_another_store_is_not_sought_in_this_one(store, tmp_path, monkeypatch):
    monkeypatch.setenv("ERPE_STORAGE_URL", store.storage_url)
    with pytest.raises(StudyError, match="digits-relu: none of its trials is in this store; use --store with the one"):
        find_folder("digits-relu", Store.open(tmp_path / "another"))


@pytest.mark.slow
def test_an_arm_that_is_not_confirmed_yet_is_its_best_trial(tmp_path):
    store = Store.open(tmp_path / "store")

    def accident(folder, number):
        if ".confirm" in str(folder):
            raise RuntimeError("no")

    play(store, work=work(accident=accident))
    found, trial = find_trial(read_studies(store), "digits-nine/relu")
    assert (found.shown, trial) == ("digits-nine/relu", found.best)


@pytest.mark.parametrize(
    ("name", "shown"),
    {
        "digits-nine.favor": "digits-nine/favor",
        "digits-nine.favor.confirm-0cf6a4": "digits-nine/favor/seeds",
        "a.softmax.relu_rope-patch2-dropout0.1": "a.softmax/relu_rope-patch2-dropout0.1",
        "a.relu_rope-dropout0.1.confirm-0cf6a4": "a/relu_rope-dropout0.1/seeds",
        "digits-relu_general": "digits-relu_general",
        "my.study-2": "my.study-2",
    }.items(),
)
def test_a_study_of_the_database_is_shown_as_users_know_it(name, shown):
    assert naming.shown(name) == shown


def test_a_study_that_had_ended_says_when_and_that_nothing_was_trained(store, monkeypatch, capsys):
    result = play(store)
    assert result.finished == max(part.ended for part in parts_of(read_studies(store), "digits-nine"))
    said = " ".join(result_lines(result, store.root))
    assert re.search(
        r"digits-nine: finished on 20\d\d-\d\d-\d\d \d\d:\d\d[+-]\d{4}, nothing was trained; --set name=", said
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
    spec = define("relu", "digits", epochs=2, pruner="none")
    result_table(tune(spec, store, trials=2, executor="inline", work=work()), spec, store.root)
    assert re.match(r"digits-relu: finished on .*, nothing was trained; --new trains afresh\n", capsys.readouterr().out)


def test_errors_of_a_part_name_the_arm(store):
    with pytest.raises(ErpeError, match=r"^study digits-nine/softmax: another erpe is running it"):
        lease = acquire(parse(store.storage_url), naming.search_name("digits-nine", ARMS[0]))
        try:
            play(store)
        finally:
            lease.release()
    with pytest.raises(ErpeError, match=r"^study digits-nine/softmax has other settings"):
        play(store, "search.sampler=random")


def test_runs_in_mlflow_have_the_names_that_predict_takes(store):
    records = read_studies(store)
    for study in ("digits-nine", "digits-relu"):
        names = {image.uid: image.name for image in desired(parts_of(records, study), store, running=False)}
        for part in parts_of(records, study):
            assert f"{study}/{names[part.about.uid]}" == part.shown or names[part.about.uid] == study
            for trial in part.trials:
                name = names[trial.uid].removeprefix(f"{study}/")
                assert find_trial(records, f"{study}/{name}")[1] == trial
