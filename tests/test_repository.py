"""What the repository says of itself is true: READMEs, dependencies, scripts."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
import typer

from erpe.cli.app import app
from erpe.cli.doctor import PACKAGES
from erpe.config import defaults
from erpe.report.significance import signed
from erpe.study.search_space import load_space
from erpe.variants import VARIANTS

ROOT = Path(__file__).parent.parent
ANSWERS = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
READMES = {
    name: (ROOT / name / "README.md").read_text() for name in (".", "studies", "infra", "erpe", "erpe/bench", "tests")
    if (ROOT / name / "README.md").exists()
}  # fmt: skip
COMMANDS = [
    shlex.split(line)[1:]
    for text in READMES.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("erpe ")
]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_of_the_readmes_exists_with_its_options(words):
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):  # a group
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def test_the_readmes_show_every_command():
    assert {words[0] for words in COMMANDS} == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_the_files_that_the_architecture_names_are_there():
    named = set(re.findall(r"[`\"]([a-z_/]+\.py)\b", READMES["erpe"]))
    assert len(named) > 20 and not [
        name for name in named if not ((ROOT / "erpe" / name).exists() or (ROOT / name).exists())
    ]


def test_the_program_of_the_layers_alone_is_as_it_says():
    program = READMES["erpe"].partition("## The layers alone")[2].partition("```python\n")[2].partition("```")[0]
    found = dict(zip("qkv", torch.randn(3, 2, 4, 49, 16), strict=True))
    exec(program, found)
    torch.testing.assert_close(found["y"], found["A"] @ found["v"])


def test_a_newcomer_reads_200_lines_at_most():
    assert len(READMES["."].splitlines()) <= 200


@pytest.mark.parametrize("name", READMES)
def test_a_readme_has_no_gap_and_what_it_links_to_is_there(name):
    text = READMES[name]
    assert not re.search(r"<!-- output|^@[A-Z]+@$", text, re.MULTILINE)
    for picture, target in re.findall(r"(!?)\[[^]]*\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("https://"):
            assert (ROOT / name / target).exists(), target
            assert not picture or (ROOT / name / target).stat().st_size > 10_000


def test_the_table_of_performance_is_that_of_the_results():
    rewritten = runpy.run_path(str(ROOT / "infra/bench_table.py"))["rewritten"]
    assert rewritten(READMES["erpe/bench"], ROOT / "studies/results/bench") == READMES["erpe/bench"]


def test_the_page_of_performance_tells_precisions_and_overhead_as_they_were_measured():
    results, text = ROOT / "studies/results/bench", READMES["erpe/bench"]
    rows = pd.DataFrame(json.loads((results / "precisions-cpu.json").read_text())["rows"])
    speed = rows.pivot(index=["dataset", "variant"], columns="precision", values="images_per_second")
    gain = (speed["bfloat16"] / speed["float32"]).groupby("dataset").agg(["min", "max"]).map("{:.2f}".format)
    assert len(speed) == 24
    assert "{} to {} times as many images a second as float32 on CIFAR-10".format(*gain.loc["cifar10"]) in text
    assert "and {} to {} times on MNIST".format(*gain.loc["mnist"]) in text
    rows = pd.DataFrame(json.loads((results / "overhead-cpu.json").read_text())["rows"]).set_index("name")
    stacks = rows.loc[["+ Optuna", "+ tracker", "+ MLflow", "+ Ray"]]
    said = "{:.0f} ms with Optuna, {:.0f} ms with the tracker too, {:.0f} ms with MLflow too, and {:.0f} ms"
    assert said.format(*stacks["trial_ms"]) in text
    assert "an epoch costs {:.1f}, {:.1f}, {:.1f} and {:.1f} ms".format(*stacks["epoch_ms"]) in text


def test_the_readme_tells_what_a_layer_of_4096_tokens_costs_as_it_was_measured():
    rows = json.loads((ROOT / "studies/results/bench/layers-cpu.json").read_text())["rows"]
    ratios = {(row["name"], row["pass"]): row["ratio"] for row in rows if row["tokens"] == 4096}
    linear = {key: 100 * ratio for key, ratio in ratios.items() if key[0].startswith(("favor", "relu"))}
    general = [ratio for (name, _), ratio in linear.items() if name.endswith("_general")]
    others = [ratio for (name, _), ratio in linear.items() if not name.endswith("_general")]
    said = (
        "takes {:.0f} to {:.0f} % of the time of softmax attention, with the exact general encoding {:.0f} to {:.0f} %"
    )
    assert said.format(min(others), max(others), min(general), max(general)) in READMES["."]


@pytest.fixture(scope="module", params=ANSWERS)
def found(request):
    """Data set, folder of its study, what `infra/results.py` makes of that, and the comparison."""
    folder = ROOT / f"studies/results/{request.param}_positions"
    results = runpy.run_path(str(ROOT / "infra/results.py"))
    return request.param, folder, results, results["compared"](folder)


def answer(dataset):
    """What README says of one data set: sentences on CIFAR-10 come first, then those on MNIST."""
    text = READMES["."].partition("## The answer")[2].partition("<!-- grid")[0]
    parts = [line.partition("On MNIST") for line in re.findall(r"^\d\. .*$", text, re.MULTILINE)]
    return "\n".join(after if dataset == "mnist" else before for before, _, after in parts)


def test_the_readme_tells_the_answer_as_it_was_measured(found):
    dataset, _, _, comparison = found
    assert comparison.arms["finished"].all() and (comparison.arms["seeds"] == 8).all()
    pairs = comparison.differences[comparison.differences["measure"] == "test/accuracy"]
    known = {
        tuple(signed(100 * sign * value, digits) for value in ends)
        for pair in pairs.to_dict("records") for digits in (1, 2) for sign, ends in (
            (1, (pair["difference"], pair["all_low"], pair["all_high"])),
            (-1, (pair["difference"], pair["all_high"], pair["all_low"])),
        )
    }  # fmt: skip
    said = re.findall(r"(-?\d+\.\d+)[^0-9(]*\(95 % (-?\d+\.\d+) to (-?\d+\.\d+)\)", answer(dataset))
    assert len(said) > 8 and set(said) <= known
    of_switch = pairs[(pairs["kind"] == "switch") & pairs["arm"].str.match("(softmax|favor|relu)-")]
    lost = -100 * of_switch["difference"]
    assert len(lost) == 3 and f"lose {lost.min():.0f} to {lost.max():.0f} points" in answer(dataset)


def test_the_readme_tells_the_sizes_of_models_and_what_they_reach_as_they_were_measured(found):
    dataset, folder, _, _ = found
    runs, text = pd.read_csv(folder / "compare_runs.csv"), READMES["."].partition("## The answer")[2]
    sizes = f"{runs['params'].min():,.0f} to {runs['params'].max():,.0f} parameters"
    assert sizes in text.partition(f"**{ANSWERS[dataset]}**")[2].partition("**")[0]
    best = 100 * runs.groupby("arm")["test/accuracy"].mean().max()
    reached = re.search(r"trained to the end \((\d+) and (\d+) % are far from it\)", text)
    assert f"{best:.0f}" == reached[1 + [*ANSWERS].index(dataset)]


def test_the_readme_tells_what_inference_costs_as_it_was_measured(found):
    dataset, _, _, comparison = found
    table = comparison.ratios
    times = table[table["measure"] == "time/inference_ms_per_image"].set_index("arm")["ratio"].map("{:.2f}".format)
    relu, favor = (
        {kind: times[f"{attention}{kind}-learned"] for kind in ("", "_general", "_circulant", "_rope")}
        for attention in ("relu", "favor")
    )
    assert (
        f"ReLU {relu['']} times as long as softmax, with RoPE {relu['_rope']}, the general encoding "
        f"{relu['_general']}, circulant-STRING {relu['_circulant']}; FAVOR+ {favor['']}, with RoPE {favor['_rope']}, "
        f"circulant-STRING {favor['_circulant']}, the general encoding {favor['_general']}"
    ) in answer(dataset)


def test_the_tables_of_a_study_and_readmes_grid_are_those_of_the_files_beside_them(found):
    dataset, folder, results, comparison = found
    assert results["page"](folder, comparison) == (folder / "README.md").read_text()
    assert f"<!-- grid of {folder.name} -->\n| {ANSWERS[dataset]} |" in READMES["."]
    assert results["with_grid"](READMES["."], folder.name, comparison) == READMES["."]


def test_the_table_of_settings_is_that_of_the_configuration():
    config = defaults("relu_general", "mnist")
    rows = re.findall(r"^\| `((?:model|data|train)\.\w+)` \| (\S+) \| (.*) \|$", READMES["studies"], re.MULTILINE)
    given = {"model.plugin", "model.variant", "model.image", "model.classes", "data.dataset"}
    assert [name for name, _, _ in rows] == [name for name in config.flat() if "." in name and name not in given]
    for name, value, meaning in rows:
        section, field = name.split(".")
        found = config.flat()[name]
        assert value == ("none" if found is None else found if isinstance(found, str) else json.dumps(found)), name
        described = " ".join(type(getattr(config, section)).model_fields[field].description.split())
        assert meaning.lower() == described.lower(), name


def test_each_dependency_names_the_file_that_needs_it_and_is_locked():
    text = (ROOT / "pyproject.toml").read_text()
    listed = text[text.index("dependencies = [") : text.index("\nall = [")]
    lines = [line.strip() for line in listed.splitlines() if line.strip().startswith('"')]
    pinned = (ROOT / "infra/constraints.txt").read_text().splitlines()
    locked = {line.partition("==")[0].lower().replace("_", "-") for line in pinned}
    for line in lines:
        name, files = re.match(r'"([\w.-]+)', line)[1], re.findall(r"erpe/[\w/.]+", line)
        assert files and all((ROOT / file.rstrip(".:")).exists() for file in files), line
        assert name.lower().replace("_", "-") in locked, f"{name} is not locked"


def test_the_doctor_asks_for_nothing_that_the_product_does_not_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + [
        line for name in ("ray", "mlflow", "report", "postgres") for line in extras[name]
    ]
    assert set(PACKAGES) <= {re.match(r"[\w.-]+", line)[0] for line in needed}


def test_the_lock_names_no_host_and_no_folder():
    for line in (ROOT / "infra/constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.!]+", line), line


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_space_of_the_readme_fits_every_variant(variant):
    space = load_space(ROOT / "studies/space.toml", variant, "mnist")
    assert space.axes["train.lr"].high == 1e-2
    assert ("model.features" in space.axes) == (not variant.startswith("softmax"))


SCRIPTS = (
    "infra/run",
    "infra/test",
    "infra/bench",
    "infra/gpu-check",
    "infra/setup",
    "infra/secrets",
    "infra/tls/certificate",
    "infra/backup",
    "infra/restore",
    "infra/capacity",
    ".ci/run",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash_and_can_be_run(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    if script != "infra/setup":
        assert (ROOT / script).stat().st_mode & 0o111


def test_the_oldest_and_the_newest_versions_are_written_where_the_tests_install_from(tmp_path):
    """As infra/test does it: what is written is what `constraints` then names."""
    script = f'source {ROOT}/infra/setup; constraints={tmp_path}/ends.txt; ends $0 >"$constraints"; cat "$constraints"'
    pinned = {}
    for end in ("oldest", "newest"):
        done = subprocess.run(["bash", "-c", script, end], check=True, capture_output=True, text=True)
        pinned[end] = dict(line.split("==") for line in done.stdout.split() if "==" in line)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, asked in {"mlflow": extras["mlflow"][0], "ray": extras["ray"][0]}.items():
        assert f">={pinned['oldest'].pop(name).removesuffix('.*')}," in asked
    assert pinned["oldest"] == pinned["newest"] and "torch" in pinned["newest"]


def test_configuration_and_command_line_know_nothing_of_torch_ray_or_mlflow():
    heavy = r"^(?:import|from) (torch|ray|mlflow|optuna|numpy|pandas|sklearn|matplotlib)\b"
    for name in ("config", "errors", "io", "store", "cli/app", "cli/bench", "cli/options"):
        assert not re.search(heavy, (ROOT / f"erpe/{name}.py").read_text(), re.MULTILINE), name
