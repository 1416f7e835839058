"""Tables in a narrow terminal, and in a file."""

import io

import pytest
from rich.table import Table

import erpe
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
    assert {"load_study", "Study"} <= set(dir(erpe))
