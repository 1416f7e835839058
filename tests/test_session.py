"""The session: each number counted once, nothing decided twice, whatever is killed and repeated."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from erpe.errors import ConfigError, StoreError, StudyError, TrialError
from erpe.store import Store
from erpe.study import session as session_module
from erpe.study import storage
from erpe.study.reading import read_studies
from erpe.study.session import StudySession
from erpe.study.spec import define

SPEC = define("relu_general", "digits", epochs=4, sampler="random", pruner="none")


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def home(request, store, monkeypatch):
    """Both homes of a session."""
    if request.param == "postgres":
        monkeypatch.setenv("ERPE_STORAGE_URL", request.getfixturevalue("postgres").url)
    return store


def run(session, trial, value=0.5):
    """A trial from its first epoch to its end."""
    for epoch in range(1, trial.config.train.epochs + 1):
        session.report(trial.number, epoch, value + epoch / 100)
    session.decide(trial.number, "COMPLETE", {"params": 1.0})
    session.tell(trial.number)


def states(session):
    return [trial.state for trial in session.read().trials]


def test_commands_that_open_a_new_store_at_once_all_find_its_tables(store):
    gate = threading.Barrier(4)

    def look(_):
        gate.wait()
        with contextlib.closing(storage.Database(store.storage_url)) as database:
            return database.names()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(look, range(4))) == [[]] * 4


def test_a_budget_is_of_the_whole_study(home):
    name = f"budget-{os.path.basename(home.root)}"
    for budget, asked in ((3, 3), (3, 0), (5, 2), (4, 0)):
        with StudySession.open(home, SPEC, name=name) as session:
            count = 0
            while trial := session.ask(budget):
                run(session, trial)
                count += 1
            assert count == asked
    assert [trial.number for trial in read_studies(home, name)[0].trials] == [0, 1, 2, 3, 4]


def test_an_orphan_is_handed_out_again_with_its_number_and_configuration(home):
    name = f"orphan-{os.path.basename(home.root)}"
    with StudySession.open(home, SPEC, name=name) as session:
        first, second = session.ask(2), session.ask(2)
        session.report(first.number, 1, 0.3)
    with StudySession.open(home, SPEC, name=name) as session:
        again = [session.ask(2), session.ask(2)]
        assert [(t.number, t.uid, t.config) for t in again] == [(t.number, t.uid, t.config) for t in (first, second)]
        assert again[0].epochs == {1: 0.3} and session.ask(2) is None


def test_a_second_driver_is_refused_until_the_first_is_gone(home):
    name = f"lease-{os.path.basename(home.root)}"
    with StudySession.open(home, SPEC, name=name), pytest.raises(StudyError, match="another erpe is running it"):
        StudySession.open(home, SPEC, name=name)
    with StudySession.open(home, SPEC, name=name):
        pass


def test_a_driver_that_was_replaced_cannot_write(home):
    name = f"fence-{os.path.basename(home.root)}"
    with StudySession.open(home, SPEC, name=name) as old:
        trial = old.ask(2)
        old._lease.release()  # as when the database restarts, or the machine slept
        old._lease = old._lease._replace(check=lambda: None)
        with StudySession.open(home, SPEC, name=name) as new:
            same = new.ask(2)
            for write in (
                lambda: old.report(trial.number, 1, 0.1),
                lambda: old.decide(trial.number, "FAIL", {}),
                lambda: old.ask(2),
                lambda: old.record_crash(trial.number, "x"),
                lambda: old.record_final(trial.number, {}),
            ):
                with pytest.raises(StudyError, match="took over"):
                    write()
            run(new, same)
            assert states(new) == ["COMPLETE"]


WRITES = {
    "ask": lambda session, number: session.ask(3),
    "report": lambda session, number: session.report(number, 2, 0.1),
    "decide": lambda session, number: session.decide(number, "FAIL", {}),
    "tell": lambda session, number: session.tell(number),
    "crashed": lambda session, number: session.record_crash(number, "x"),
    "record_final": lambda session, number: session.record_final(number, {"test/accuracy": 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES)
def test_a_driver_that_is_replaced_between_its_check_and_its_write_says_so(home, write):
    with StudySession.open(home, SPEC) as old, contextlib.ExitStack() as opened:
        trial = old.ask(1)
        old.report(trial.number, 1, 0.5)
        if write == "tell":
            old.decide(trial.number, "PRUNED", {})
        guard = old.guard

        def replaced():
            guard()
            old.guard = guard
            old._lease.release()  # as when the machine slept
            new = opened.enter_context(StudySession.open(home, SPEC))
            run(new, new.ask(1))
            assert new.ask(1) is None
            new.record_final(trial.number, {"test/accuracy": 0.9})
            opened.close()

        old.guard = replaced
        with contextlib.suppress(StudyError):  # what was found before the write is an answer too
            WRITES[write](old, trial.number)
        with pytest.raises(StudyError, match="took over"):
            old.report(trial.number, 2, 0.1)
        trial = read_studies(home, SPEC.name)[0].trials[0]
        assert trial.state == ("PRUNED" if write == "tell" else "COMPLETE")
        assert trial.epochs == {1: 0.5, 2: 0.52, 3: 0.53, 4: 0.54}


def test_what_an_old_driver_still_asked_for_is_taken_up_by_the_new_one(home):
    with StudySession.open(home, SPEC) as new:
        run(new, new.ask(2))
        asked = new._study.ask()  # as an old driver does that had looked before
        new._trial(asked.number).set_user_attr("erpe.config", SPEC.base.model_dump(mode="json"))
        assert new.ask(2).number == asked.number and new.ask(2) is None


@pytest.mark.slow
def test_a_server_that_restarts_is_waited_for_and_the_lease_taken_again(store, postgres, monkeypatch):
    monkeypatch.setenv("ERPE_STORAGE_URL", postgres.url)
    with StudySession.open(store, SPEC, name="restart") as session:
        first = session.ask(2)
        postgres.stop()
        back = threading.Timer(2, postgres.start)
        back.start()
        assert not session.report(first.number, 1, 0.5), "waits"
        back.join()
        with pytest.raises(StudyError, match="another erpe is running it"):
            StudySession.open(store, SPEC, name="restart")
        run(session, first)
        run(session, session.ask(2))
        assert states(session) == ["COMPLETE", "COMPLETE"]


@pytest.mark.slow
def test_a_server_that_stays_away_stops_the_study_in_one_line(store, postgres, monkeypatch):
    monkeypatch.setenv("ERPE_STORAGE_URL", postgres.url)
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.5)
    with StudySession.open(store, SPEC, name="away") as session:
        trial = session.ask(1)
        postgres.stop()
        with pytest.raises(StoreError, match="nothing is lost"):
            session.report(trial.number, 1, 0.5)
        postgres.start()
    with StudySession.open(store, SPEC, name="away") as session:
        assert session.ask(1).number == trial.number


def test_a_trial_killed_before_its_configuration_was_written_is_void(store, monkeypatch):
    with StudySession.open(store, SPEC) as session:
        with monkeypatch.context() as patch:
            patch.setattr(optuna.Trial, "set_user_attr", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                session.ask(1)
        assert session._study.get_trials()[0].state == optuna.trial.TrialState.RUNNING
    with StudySession.open(store, SPEC) as session:
        trial = session.ask(1)
        assert session._study.get_trials()[0].state == optuna.trial.TrialState.FAIL
        assert trial.number == 1 and session.ask(1) is None
        run(session, trial)
        assert states(session) == ["COMPLETE"] and session.read().counts == {"COMPLETE": 1}


def test_the_first_trial_is_the_default_configuration(store):
    spec = define("favor_rope", "digits", epochs=4)
    with StudySession.open(store, spec) as session:
        first = session.ask(3).config
        seed, features = first.seed, first.model.features
        assert first == spec.base.replace({"seed": seed, "model.features": features})
        assert session.ask(3).config != first


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_a_restart_repeats_no_suggestion_and_a_seed_repeats_all(tmp_path, sampler):
    spec = define("relu_rope", "digits", epochs=1, sampler=sampler, pruner="none")

    def search(root, restart):
        found, store = [], Store.open(tmp_path / root)
        session = StudySession.open(store, spec)
        for i in range(10):
            trial = session.ask(99)
            found.append(trial.config)
            run(session, trial, trial.config.train.lr)
            if restart and i % 4 == 2:
                session.__exit__()
                session = StudySession.open(store, spec)
        session.__exit__()
        return found

    once = search("a", restart=True)
    assert len({config.model_dump_json() for config in once}) == 10
    assert len({config.seed for config in once}) == 10
    assert search("b", restart=False) == once


def test_pruned_trials_are_told_as_pruned_with_their_last_value(store):
    spec = define("softmax", "digits", epochs=9, sampler="random", pruner="asha")
    with StudySession.open(store, spec) as session:
        good, bad = session.ask(2), session.ask(2)
        for epoch in (1, 2):
            assert not session.report(good.number, epoch, 0.9) and not session.report(bad.number, epoch, 0.1)
        assert not session.report(good.number, 3, 0.9)
        assert session.report(bad.number, 3, 0.1)
        session.decide(bad.number, "PRUNED", {})
        session.tell(bad.number)
        trial = session._study.get_trials()[bad.number]
        assert trial.state == optuna.trial.TrialState.PRUNED and trial.value == 0.1
        assert session.report(bad.number, 4, 0.1), "a trial that was pruned stays pruned"
        assert session.read().best is None, "nothing is complete"


def test_the_last_epoch_is_never_pruned(store):
    spec = define("softmax", "digits", epochs=1, sampler="random", pruner="asha")
    with StudySession.open(store, spec) as session:
        for value in (0.9, 0.1):
            assert not session.report(session.ask(2).number, 1, value)


def test_the_first_word_counts(store):
    with StudySession.open(store, SPEC) as session:
        trial = session.ask(1)
        session.report(trial.number, 1, 0.25)
        session.report(trial.number, 1, 0.75)
        assert session.trial(trial.number).epochs == {1: 0.25}
        assert session.decide(trial.number, "COMPLETE", {"a": 1.0}).state == "COMPLETE"
        assert session.decide(trial.number, "FAIL", {}, "late").state == "COMPLETE"
        for _ in range(2):
            session.tell(trial.number)
        assert session.record_final(trial.number, {"test/accuracy": 0.5}) == {"test/accuracy": 0.5}
        assert session.record_final(trial.number, {"test/accuracy": 0.9}) == {"test/accuracy": 0.5}


@pytest.mark.parametrize("state", ["PRUNED", "FAIL"])
def test_a_trial_that_another_hand_ends_between_two_epochs_stops(store, state):
    with StudySession.open(store, SPEC) as session:
        number = session.ask(1).number
        assert session.report(number, 1, 0.1) is False
        theirs = optuna.load_study(study_name=session.name, storage=store.storage_url)  # as Optuna's dashboard does
        theirs.tell(number, state=optuna.trial.TrialState[state])
        assert session.report(number, 2, 0.2) is (state == "PRUNED") is session.report(number, 3, 0.2)
        assert session.trial(number).epochs == {1: 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_a_driver_that_remembers_prunes_as_one_that_reads_all_again(tmp_path, pruner):
    spec, decisions = define("relu", "digits", epochs=12, sampler="random", pruner=pruner), {}
    for forgets in (False, True):
        with StudySession.open(Store.open(tmp_path / str(forgets)), spec) as session:
            told = decisions[forgets] = []
            for value, slope in ((0.3, 0.02), (0.35, 0.0), (0.4, 0.001), (0.32, 0.01), (0.5, 0.0), (0.2, 0.0)):
                number = session.ask(6).number
                for epoch in range(1, 13):
                    told.append((number, epoch, prune := session.report(number, epoch, value + epoch * slope)))
                    if forgets:
                        session._running.clear()
                    if prune:
                        break
                session.decide(number, "PRUNED" if prune else "COMPLETE", {})
                session.tell(number)
    assert decisions[False] == decisions[True] and any(prune for *_, prune in decisions[True])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_fails_the_trial(store, value):
    with StudySession.open(store, SPEC) as session:
        trial = session.ask(1)
        with pytest.raises(TrialError, match="epoch 1"):
            session.report(trial.number, 1, value)
        assert session.decide(trial.number, "COMPLETE", {}).state == "FAIL", "it has no value"
        session.tell(trial.number)
        assert session.read().counts == {"FAIL": 1} and session.ask(1) is None, "its slot is used up"


def test_a_poisonous_configuration_ends_after_a_bounded_number_of_tries(store):
    with StudySession.open(store, SPEC) as session:
        trial = session.ask(1)
        again = [session.record_crash(trial.number, "Segmentation fault") for _ in range(session_module.MAX_ATTEMPTS)]
        assert again == [True] * (session_module.MAX_ATTEMPTS - 1) + [False]
        verdict = session.trial(trial.number).verdict
        assert verdict.state == "FAIL" and "Segmentation fault" in verdict.reason
        assert verdict.reason.endswith("(crashed 3 times without finishing an epoch)")


def test_a_crash_in_the_final_measures_is_told_with_the_last_epoch(store):
    with StudySession.open(store, SPEC) as session:
        trial = session.ask(1)
        session.report(trial.number, 1, 0.5)
        while session.record_crash(trial.number, "killed"):
            pass
        assert session.trial(trial.number).verdict.reason == "killed (crashed 3 times after epoch 1)"


def test_a_worker_that_dies_between_epochs_never_uses_up_its_tries(store):
    with StudySession.open(store, SPEC) as session:
        trial = session.ask(1)
        for epoch in range(1, 5):
            assert all(session.record_crash(trial.number, "killed") for _ in range(session_module.MAX_ATTEMPTS - 1))
            session.report(trial.number, epoch, 0.5)


@pytest.mark.slow
def test_a_killed_driver_lets_go_of_its_lease_at_once(store):
    code = (
        "import sys, os, signal; from erpe.store import Store; from erpe.study.session import StudySession;"
        "from erpe.study.spec import define;"
        "spec = define('relu_general', 'digits', epochs=4, sampler='random', pruner='none');"
        "session = StudySession.open(Store.open(sys.argv[1]), spec); session.ask(5)"
        "; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, store.root], check=False)
    with StudySession.open(store, SPEC) as session:
        assert session.ask(5).number == 0


class Killed(BaseException):
    """Stands for SIGKILL between two writes."""


class SessionMachine(RuleBasedStateMachine):
    """Any order of asking, reporting, deciding, telling, crashing in the middle of a write, and starting again."""

    folder = None
    budget = 5

    def __init__(self):
        super().__init__()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.store = Store.open(self.folder)
        shutil.copy(self.empty, self.store.root / "optuna.db")
        self.session = StudySession.open(self.store, SPEC)
        self.trials, self.model, self.ended = {}, {}, {}

    def teardown(self):
        self.session.__exit__()

    def running(self):
        return [number for number in self.trials if number not in self.ended]

    def attempt(self, call, kill_at):
        """Do it, or be killed before the n-th write of it and start again; True if it was done."""
        backend, writes = self.session._database.backend, 0
        names = [name for name in dir(type(backend)) if name.startswith(("set_trial", "create_new"))]

        def counted(write):
            def killed(*args, **kwargs):
                nonlocal writes
                writes += 1
                if writes == kill_at:
                    raise Killed
                return write(*args, **kwargs)

            return killed

        for name in names:
            setattr(backend, name, counted(getattr(backend, name)))
        try:
            call()
            return True
        except Killed:
            self.restart()
            return False
        finally:
            for name in names:
                backend.__dict__.pop(name, None)

    @rule()
    def restart(self):
        self.session.__exit__()
        self.session = StudySession.open(self.store, SPEC)
        orphans = list(self.running())
        waiting = {trial.number for trial in self.session.read().trials if trial.state == "RUNNING"}
        self.trials = {number: self.trials[number] for number in self.ended}
        seen = []
        for _ in waiting:
            trial = self.session.ask(self.budget)
            seen.append(trial.number)
            if trial.number in self.model:
                assert trial.config == self.model[trial.number]
            self.model[trial.number] = trial.config
            self.trials[trial.number] = trial
        assert set(orphans) <= waiting == set(seen) and len(seen) == len(waiting)

    @rule(kill_at=st.integers(0, 20))
    def ask(self, kill_at):
        def call():
            trial = self.session.ask(self.budget)
            if trial is None:
                assert len(self.model) >= self.budget
            else:
                assert trial.number not in self.model
                self.model[trial.number] = trial.config
                self.trials[trial.number] = trial

        self.attempt(call, kill_at)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), epoch=st.integers(1, 4), value=st.floats(0, 1), kill_at=st.integers(0, 2))
    def report(self, data, epoch, value, kill_at):
        number = data.draw(st.sampled_from(self.running()))
        before = self.session.trial(number).epochs
        self.attempt(lambda: self.session.report(number, epoch, value), kill_at)
        after = self.session.trial(number).epochs
        assert all(after[e] == v for e, v in before.items())

    @precondition(lambda self: self.running())
    @rule(data=st.data(), state=st.sampled_from(["COMPLETE", "PRUNED", "FAIL"]), kill_at=st.integers(0, 4))
    def end(self, data, state, kill_at):
        number = data.draw(st.sampled_from(self.running()))

        def call():
            self.session.decide(number, state, {})
            self.session.tell(number)
            self.session.tell(number)

        decided = self.session.trial(number).verdict
        if self.attempt(call, kill_at):
            trial = self.session.trial(number)
            assert trial.state == trial.verdict.state == (decided.state if decided else trial.state)
            self.ended[number] = trial.state

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def crash_of_a_worker(self, data):
        number = data.draw(st.sampled_from(self.running()))
        if not self.session.record_crash(number, "killed"):
            self.session.tell(number)
            self.ended[number] = self.session.trial(number).state

    @invariant()
    def each_number_is_counted_once(self):
        study = self.session.read()
        numbers = [trial.number for trial in study.trials]
        assert len(set(numbers)) == len(numbers) <= self.budget
        assert set(self.model) == set(numbers)
        for trial in study.trials:
            assert trial.config == self.model[trial.number]
            assert trial.state == self.ended.get(trial.number, trial.state if trial.verdict else "RUNNING")

    @invariant()
    def what_has_no_configuration_never_counts_and_never_stays(self):
        unwritten = [t for t in self.session._study.get_trials() if "erpe.config" not in t.user_attrs]
        running = [t for t in unwritten if t.state == optuna.trial.TrialState.RUNNING]
        assert len(running) <= 1


@pytest.mark.slow
def test_any_order_of_events_keeps_the_books(tmp_path):
    SessionMachine.folder = tmp_path / "store"
    SessionMachine.empty = tmp_path / "empty.db"
    storage.Database(f"sqlite:///{SessionMachine.empty}").close()
    SessionMachine.TestCase.settings = settings(
        max_examples=int(os.environ.get("ERPE_EXAMPLES", "5")),
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    SessionMachine.TestCase().runTest()


def test_a_bad_name_is_refused_before_anything_is_made(store):
    with pytest.raises(ConfigError, match="study name"):
        StudySession.open(store, SPEC, name="../elsewhere")
    assert not (store.root / "optuna.db").exists()
