"""What a search begins with: own points, the best of an earlier study, and what of it fits another space."""

from __future__ import annotations

from functools import partial

import pytest
from toys import work
from trials import Notes

from erpe.errors import ConfigError, StudyError
from erpe.search.tune import tune
from erpe.store import Store
from erpe.study.distributions import Choices, Floats, Space
from erpe.study.reading import read_studies
from erpe.study.session import StudySession
from erpe.study.spec import define
from erpe.study.starting_points import START, Start, from_file, from_study
from erpe.tracking.tracker import Tracker

LR = Floats(low=1e-4, high=1e-1, log=True)


def spec(objective="accuracy", **axes):
    space = Space(axes={"train.lr": LR, "model.patch": Choices(values=(1, 2, 4)), **axes})
    return define("softmax", "digits", space=space, epochs=2, pruner="none", objective=objective)


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Search with toys, whose value is their learning rate -> (the study's record, what was said)."""
    monkeypatch.setattr("erpe.tracking.tracker.Tracker", partial(Tracker, send=False))
    store = Store.open(tmp_path / "runs")

    def run(spec, trials=4, **how):
        notes = Notes()
        result = tune(spec, store, trials=trials, executor="inline", progress=notes, work=work(), **how)
        return read_studies(store, result.study)[0], notes.said

    run.store = store
    return run


def test_own_points_come_first_then_the_defaults_and_the_same_call_continues(search, tmp_path):
    file = tmp_path / "points.toml"
    file.write_text("[[points]]\ntrain.lr = 0.05\nmodel.patch = 4\n[[points]]\ntrain.lr = 0.001\n")
    start = from_file(file, spec())
    found, said = search(spec(), start=start)
    drawn = [(trial.config.train.lr, trial.config.model.patch) for trial in found.trials]
    assert (
        drawn[0] == (0.05, 4) and drawn[1][0] == 0.001 and drawn[2] == (spec().base.train.lr, spec().base.model.patch)
    )
    assert not said
    again, said = search(spec(), trials=5, start=start)
    assert [trial.config for trial in again.trials[:4]] == [trial.config for trial in found.trials] and not said
    _, said = search(spec(), trials=5, start=Start(({"train.lr": 0.02},)))
    assert said == ["study digits-softmax had begun before: it keeps its own starting points"]
    with pytest.raises(ConfigError, match="trials: 1 given; use 2 or more instead"):
        search(spec(), trials=1, start=start)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[points]]\ntrain.lrr = 1", r"points\[0\]: train.lrr is not searched; did you mean train.lr"),
        ("[[points]]\ntrain.lr = 1e-3\n[[points]]\ntrain.lr = 7", r"points\[1\]: train.lr: 7 given; use 0.0001"),
        ("[[points]]\nmodel.patch = 3", r"model.patch: 3 given; use one of \[1, 2, 4\] instead"),
        ("[points]\nmodel.patch = 2", r"use \[\[points\]\] tables"),
        ("points = 3", r"use \[\[points\]\] tables"),
        ("a = [", "cannot be read"),
    ],
)  # fmt: skip
def test_points_are_checked_against_the_space_in_one_line(tmp_path, text, said):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        from_file(tmp_path / "p.toml", spec())
    assert "p.toml: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["accuracy", "accuracy,flops"])
def test_a_changed_space_says_how_to_go_on_and_keeps_what_fits(search, objective):
    before, _ = search(spec(objective), trials=6)
    lows = sorted(trial.config.train.lr for trial in before.trials)
    narrow = spec(objective, **{"train.lr": Floats(low=lows[1], high=0.1, log=True)})
    with pytest.raises(StudyError, match="--new starts afresh beside it, --new --warm-start digits-softmax with what"):
        search(narrow)
    start = from_study(read_studies(search.store), "digits-softmax", narrow)
    assert len(start.known) == 5, "one lies outside"
    assert {len(values) for _, values in start.known} == {objective.count(",") + 1}
    after, said = search(narrow, trials=3, start=start, new=True)
    assert after.name == "digits-softmax-2" and len(after.trials) == 3, "what is known is no trial of this study"
    assert after.trials[0].config.train.lr == before.best.config.train.lr
    assert "5 of its 6 complete trials fit" in said[0]
    assert len({trial.uid for trial in after.trials}) == 3


def test_of_another_space_what_fits_is_kept_and_what_does_not_is_said(search):
    search(spec(), trials=1)
    space = Space(axes={"train.lr": LR, "model.patch": Choices(values=(8, 4))})
    other = define("relu", "digits", epochs=3, space=space)
    start = from_study(read_studies(search.store), "digits-softmax", other)
    assert set(start.points[0]) == {"train.lr"} and not start.known, "its values are of another variant"
    assert "model.patch is sampled: 2 of that trial is not in this space" in start.notes[0]
    with pytest.raises(StudyError, match="did you mean digits-softmax"):
        from_study(read_studies(search.store), "digits-softmx", other)


def test_an_ask_that_was_cut_short_loses_no_starting_point(search):
    points = ({"train.lr": 0.05}, {"train.lr": 0.02})
    with StudySession.open(search.store, spec(), trials=4, start=Start(points)) as session:
        for number, point in enumerate(points[:1]):  # killed: queued in part, and one taken without a configuration
            session._study.enqueue_trial(point, user_attrs={START: number})
        session._study.ask()
    with StudySession.open(search.store, spec(), trials=4) as session:
        drawn = [session.ask(4).config.train.lr for _ in range(3)]
    assert sorted(drawn) == sorted([0.05, 0.02, spec().base.train.lr])
