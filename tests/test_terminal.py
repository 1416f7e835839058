"""Tables in a narrow terminal, and in a file."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.table import Table

import erpe
from erpe.cli.plan import plan_notes, plan_rows, plan_table
from erpe.config import defaults
from erpe.execution.callbacks import ProgressNote, TrialProgress
from erpe.live import SearchProgress, StudyProgress, epochs_told, state_told
from erpe.store import let_go
from erpe.study.plan_file import load_plan
from erpe.text import Terminal


def shown(width):
    table = Table()
    for name in ("arm", "accuracy", "loss", "seconds"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    table.add_row("softmax", "0.98765 +- 0.00012", "1.2345e-05", "123,456.7")
    file = io.StringIO()
    Terminal(file=file, width=width, force_terminal=True, color_system=None).print_table(table)
    return file.getvalue()


@pytest.mark.parametrize("width", range(33, 80))
def test_a_narrow_table_leaves_columns_out_and_says_which_but_cuts_no_number(width):
    text = shown(width)
    assert "…" not in text
    for name, cell in {"accuracy": "0.98765 +- 0.00012", "loss": "1.2345e-05", "seconds": "123,456.7"}.items():
        assert (cell in text) != (name in text.partition("left out: ")[2])


def test_no_line_of_a_table_in_a_file_ends_with_blanks(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(title="a", title_justify="left", box=None)
    table.add_column("x")
    table.add_row("1" * 300)
    Terminal().print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [line.rstrip() for line in lines] and "1" * 300 in lines[-1]


def test_dir_names_what_is_imported_later():
    assert set(erpe.__all__) <= set(dir(erpe))


def moment_of(plan, arm, number=7):
    config = defaults(arm.variant, plan.dataset)
    return TrialProgress(
        arm=arm.name, phase="search", number=number, state="COMPLETE", epoch=10, epochs=10, value=0.98765, reason=None,
        config=config, counts={"COMPLETE": 8}, budget=16, best=0.99, lag=1234,
    )  # fmt: skip


@pytest.mark.parametrize("width", [80, 60, 45])
@pytest.mark.parametrize("kind", ["tune", "study run"])
def test_the_tables_of_running_studies_cut_no_number_and_no_name(kind, width, tmp_path):
    plan = load_plan(Path(__file__).parent.parent / "studies/digits_nine.toml")
    shows = SearchProgress(plan.search_spec(plan.arms()[0])) if kind == "tune" else StudyProgress(plan)
    shows.console = Terminal(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    for arm in plan.arms():
        shows.on_end(moment_of(plan, arm))
    shows.on_phase("search")
    shows.console.print(shows.table())
    text = shows.console.file.getvalue()
    assert "…" not in text and ("98.7" in text or width < 60)


def test_a_running_trial_shows_the_part_of_its_epoch_that_its_worker_noted_and_the_time_left(tmp_path):
    plan = load_plan(Path(__file__).parent.parent / "studies/digits_nine.toml")
    arm, shows = plan.arms()[0], SearchProgress(plan.search_spec(plan.arms()[0]))
    running = moment_of(plan, arm)._replace(state="RUNNING", epoch=0, counts={"RUNNING": 1}, folder=tmp_path)
    shows.on_phase("search")
    shows.on_start(running)
    assert (state_told(running), epochs_told(running), shows.left()) == ("starting", "0/10", "")
    note = ProgressNote(tmp_path)
    note(1, 8)  # the model is not built
    assert running.trained is None
    note.training = SimpleNamespace(history=[{"epoch": 1.0}])
    note(2, 8)
    assert (state_told(running), epochs_told(running)) == ("running", "1.2/10")
    shows.entered -= 125  # 1/8 of a trial of 16 has taken as long
    assert shows.left() == "about 4 h 25 min left" and "4 h" in shows.caption()
    (tmp_path / "progress").write_text("half a number")
    assert epochs_told(running._replace(epoch=2)) == "2/10"


def test_a_note_of_progress_follows_no_link_and_goes_with_its_trial(tmp_path):
    (tmp_path / "elsewhere").touch()
    (tmp_path / "progress").symlink_to(tmp_path / "elsewhere")
    note = ProgressNote(tmp_path)
    note.training = SimpleNamespace(history=[])
    note(1, 2)
    assert not (tmp_path / "elsewhere").read_text()
    let_go(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("width", [80, 60])
def test_the_arms_of_a_plan_and_the_list_of_jobs_are_not_cut(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    plan = load_plan(Path(__file__).parent.parent / "studies/encoding_axes.toml")
    rows = plan_rows(plan)
    plan_table(plan, rows, [])
    listed = [each for each in capsys.readouterr().out.splitlines() if each.startswith("# ")][2:]
    assert [each.split()[1] for each in listed][: len(rows)] == [row["arm"] for row in rows]
    assert all(len(each) <= width for each in listed[:-1])


def test_a_title_is_one_line_and_axes_that_arms_share_are_told_once(capsys):
    table = Table(title="a study with a long title", title_justify="left")
    table.add_column("x")
    table.add_row("1")
    Terminal().print_table(table)
    assert "a study with a long title" in capsys.readouterr().out.splitlines()
    plan = load_plan(Path(__file__).parent.parent / "studies/encoding_axes.toml")
    notes = plan_notes(plan, plan_rows(plan), 0.7)
    assert sum("model.relu_projection" in note for note in notes) == 1
