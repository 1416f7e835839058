import dataclasses

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from outcomes import made_up

from erpe.config import defaults
from erpe.report.charts import CHARTS, NARROW, parts, save_all, write
from erpe.report.charts.captions import CAPTIONS, told
from erpe.report.charts.costs import COSTS, tradeoffs
from erpe.report.charts.curves import attention_examples, attention_maps, best_trials, brightest_patch, confirmed_losses
from erpe.report.charts.forest import differences
from erpe.report.charts.intervals import LANES, accuracy, gap_closed, lanes
from erpe.report.charts.style import COLOURS, COLUMN, FULL, marks
from erpe.report.charts.tokens import break_even, layer_flops, method_told
from erpe.report.comparison import compare
from erpe.report.gaps import gap_closed as gaps_of
from erpe.report.labels import label
from erpe.report.statistics import summary
from erpe.variants import VARIANTS

NINE = tuple(variant for variant in VARIANTS if not variant.startswith("softmax_"))
FEW = ("softmax", "relu", "relu_general")
TABLES = ("arms", "runs", "trials", "epochs")
LONG = "-patch2-position_none"


def changed(outcomes, arm=lambda name: name, study=None):
    """The same outcomes with other names."""
    tables = {}
    for name in TABLES:
        table = getattr(outcomes, name)
        tables[name] = table.assign(arm=table["arm"].map(arm), **({"study": study} if study else {}))
    return dataclasses.replace(outcomes, **tables)


def unfinished(outcomes, arm, seeds):
    """The same outcomes with only some seeds of an arm."""
    arms, runs = outcomes.arms.copy(), outcomes.runs
    arms.loc[arms["arm"] == arm, ["seeds", "finished"]] = [seeds, False]
    gone = runs.index[runs["arm"] == arm][seeds:]
    return dataclasses.replace(outcomes, arms=arms, runs=runs.drop(gone))


def switched(outcomes, *switches):
    """The same outcomes once for each value of a switch."""
    parts = [changed(outcomes, lambda arm, switch=switch: f"{arm}-{switch}") for switch in switches]
    renamed = [
        {name: getattr(part, name).assign(uid=getattr(part, name)["uid"] + switch) for name in TABLES[1:]}
        | {"arms": part.arms}
        for part, switch in zip(parts, switches, strict=True)
    ]
    said = {uid + switch: found for uid, found in outcomes.predictions.items() for switch in switches}
    tables = {name: pd.concat([part[name] for part in renamed], ignore_index=True) for name in TABLES}
    return dataclasses.replace(outcomes, predictions=said, **tables)


def with_attention(outcomes, folder, grid=(2, 4), cls=0, image=None):
    """The same outcomes with an attention.npz a run: every patch looks at itself only."""
    image = np.zeros((1, 8, 8), np.float32) if image is None else image
    maps = np.broadcast_to(np.eye(grid[0] * grid[1] + cls, dtype=np.float16), (3, 2, *[grid[0] * grid[1] + cls] * 2))
    folders = {uid: folder / uid for uid in outcomes.runs["uid"]}
    for place in folders.values():
        place.mkdir()
        np.savez_compressed(place / "attention.npz", image=image, maps=maps, grid=np.array(grid))
    return dataclasses.replace(outcomes, folders=folders)


def drawn_inside(figure):
    """Nothing that is drawn reaches out of the figure."""
    figure.draw_without_rendering()
    box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    width, height = figure.get_size_inches()
    return box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    outcomes = with_attention(made_up(NINE), tmp_path_factory.mktemp("nine"))
    return outcomes, compare(outcomes)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """All that makes a figure crowded: twelve arms with long names, one of them unfinished."""
    outcomes = changed(made_up(images=100), lambda arm: arm + LONG)
    outcomes = with_attention(unfinished(outcomes, "relu_rope" + LONG, 2), tmp_path_factory.mktemp("twelve"))
    return outcomes, compare(outcomes)


@pytest.fixture(scope="module")
def eighteen():
    """The nine with and without learned positions, one of them unfinished."""
    outcomes = unfinished(switched(made_up(NINE), "learned", "position_none"), "relu-position_none", 2)
    return outcomes, compare(outcomes)


def test_every_chart_has_a_caption_that_says_how_many():
    assert set(CHARTS) == set(CAPTIONS)
    without = {name for name, caption in CAPTIONS.items() if "{n}" not in caption.text}
    assert without == {"attention_maps", "cost_against_tokens", "search_effort", "fronts"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arms", "chart"),
    [
        *(("twelve", chart) for chart in CHARTS),
        *(("nine", chart) for chart in ("tradeoffs", "critical_difference")),
        *(("eighteen", chart) for chart in ("differences", "accuracy", "tradeoffs", "learning_curves")),
    ],
)
def test_every_chart_is_drawn_with_nothing_outside_the_figure(arms, chart, request):
    assert drawn_inside(CHARTS[chart](*request.getfixturevalue(arms)))


def test_every_chart_is_drawn_for_the_nine(nine):
    assert all(chart(*nine) for name, chart in CHARTS.items() if name != "tradeoffs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variants", "seeds", "missing"),
    [
        (("relu",), 3, {"differences", "gap_closed", "critical_difference", "attention_maps"}),
        (
            ("softmax",),
            3,
            {"differences", "gap_closed", "critical_difference", "attention_maps", "cost_against_tokens"},
        ),
        (FEW, 1, {"gap_closed", "critical_difference", "attention_maps"}),
    ],
)
def test_a_chart_whose_data_are_missing_is_none(variants, seeds, missing):
    outcomes = made_up(variants, seeds=seeds, images=50)
    comparison = compare(outcomes)
    assert {name for name, chart in CHARTS.items() if chart(outcomes, comparison) is None} == missing


def test_a_study_without_epochs_and_times_is_drawn_without_them():
    outcomes = made_up(FEW, images=2000)
    bare = dataclasses.replace(
        outcomes,
        runs=outcomes.runs.drop(columns=[*COSTS, "aic", "bic"]),
        trials=pd.DataFrame(),
        epochs=pd.DataFrame(),
    )
    comparison = compare(bare)
    found = {name for name, chart in CHARTS.items() if chart(bare, comparison)}
    assert found == {"differences", "accuracy", "gap_closed", "critical_difference", "cost_against_tokens"}


def test_a_front_joins_what_no_trial_of_its_arm_dominates(nine):
    first = CHARTS["fronts"](*nine).axes[0]
    (line,) = [line for line in first.lines if line.get_color() == COLOURS["softmax"] and line.get_marker() != "."]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1e5, 2e6], pytest.approx([80, 82]))
    assert first.get_xscale() == "log"
    plain = made_up(FEW, images=50)
    plain = dataclasses.replace(plain, arms=plain.arms.drop(columns=["objective", "at_most"]))
    assert compare(plain).fronts.empty and CHARTS["fronts"](plain, compare(plain)) is None


def test_curves_of_another_objective_say_which():
    outcomes = made_up(FEW, images=50)
    sought = outcomes.arms.assign(objective="log_likelihood")
    losses = outcomes.epochs.rename(columns={"val/accuracy": "val/loss"})
    worth = outcomes.trials.assign(value=outcomes.trials["value"] - 2)
    found = dataclasses.replace(outcomes, arms=sought, epochs=losses, trials=worth)
    for name in ("learning_curves", "search_effort"):
        axes = CHARTS[name](found, compare(found)).axes[0]
        assert "log-likelihood" in axes.get_ylabel() and max(axes.lines[0].get_ydata()) < 0


def spans(axes):
    """(low, high) of the intervals, by the colour and in the order they were drawn."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]]
    return [tuple(line.get_xdata()) for line in lines]


def test_the_intervals_drawn_are_those_of_the_tables(nine):
    outcomes, _ = nine
    table = summary(outcomes)
    rows = 100 * table[table["measure"] == "test/accuracy"][["low", "high"]]
    assert spans(accuracy(*nine).axes[0]) == list(rows.itertuples(index=False, name=None))
    closed = 100 * gaps_of(outcomes)[["low", "high"]]
    assert spans(gap_closed(*nine).axes[0])[: len(closed)] == list(closed.itertuples(index=False, name=None))
    assert closed.notna().all(axis=None)


def test_a_caption_tells_of_intervals_only_where_they_are_drawn():
    for seeds, words in {1: "No intervals", 3: "Bar: 95 %"}.items():
        comparison = compare(made_up(FEW, seeds=seeds, images=50))
        assert all(words in told(name, comparison) for name in ("accuracy", "criteria"))
        assert ("Thin lines" in told("tradeoffs", comparison)) == (seeds == 3)


@pytest.mark.parametrize("shown", [True, False])
def test_a_caption_names_the_attentions_without_a_gap_and_the_figure_has_no_bar_for_them(nine, shown):
    outcomes, comparison = nine
    gaps = comparison.gaps.assign(shown=comparison.gaps["shown"] & (shown | (comparison.gaps["baseline"] != "favor")))
    changed = dataclasses.replace(comparison, gaps=gaps)
    assert ("From FAVOR+: no gap shown." in told("gap_closed", changed)) == (not shown)
    assert len(spans(gap_closed(outcomes, changed).axes[0])) >= (6 if shown else 3)
    names = [text.get_text() for text in gap_closed(outcomes, changed).axes[0].get_yticklabels()]
    assert any(name.startswith("FAVOR+") for name in names) == shown


def test_nothing_is_drawn_beyond_the_possible():
    outcomes = made_up(FEW, seeds=2, images=50)
    outcomes.runs["test/accuracy"] = [0.99, 1.0] * 3
    outcomes.runs["time/inference_ms_per_image"] = [0.1, 0.9] * 3
    comparison = compare(outcomes)
    table = comparison.summary.set_index("measure")
    assert table.loc["test/accuracy", "high"].max() > 1 and table.loc["time/inference_ms_per_image", "low"].min() < 0
    axes = accuracy(outcomes, comparison).axes[0]
    assert axes.get_xlim()[1] <= 100 and all(low >= 0 and high <= 100 for low, high in spans(axes))
    for panel in tradeoffs(outcomes, comparison).axes:
        assert panel.get_ylim()[1] <= 100
        assert not any((np.asarray(line.get_xdata()) < 0).any() for line in panel.lines)


def test_long_intervals_of_few_seeds_leave_the_points_apart():
    outcomes = made_up(FEW, seeds=2, images=50)
    outcomes.runs["test/accuracy"] = [0.90, 0.50, 0.91, 0.51, 0.92, 0.52]
    low, high = tradeoffs(outcomes, compare(outcomes)).axes[0].get_ylim()
    assert high - low < 6  # of means 0.70, 0.71 and 0.72; their intervals are longer than 2


def test_the_curve_of_a_general_encoding_names_its_method():
    assert method_told("relu_general", "digits").startswith(" (dense")
    assert method_told("relu", "digits") == method_told("softmax_general", "digits") == ""


def test_every_seed_is_a_dot_above_its_arm(nine):
    axes = accuracy(*nine).axes[0]
    heights = {text.get_text(): y for text, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    dots = np.concatenate([group.get_offsets() for group in axes.collections])
    for arm, runs in nine[0].runs.groupby("arm"):
        own = dots[(dots[:, 1] > heights[label(arm, arm)]) & (dots[:, 1] < heights[label(arm, arm)] + 0.7), 0]
        assert sorted(own) == sorted(100 * runs["test/accuracy"])


def test_small_dots_of_equal_seeds_hide_nothing():
    assert sorted(lanes([0.9] * LANES, 0.01)) == list(range(LANES)) and lanes([0.1, 0.5, 0.9], 0.2) == [0, 0, 0]
    close = [0.900, 0.905, 0.930, 0.901]
    found = lanes(close, 0.01)
    assert len({found[0], found[1], found[3]}) == 3 and found[2] == 0


def test_a_forest_shows_that_an_interval_goes_on_and_has_room_for_those_of_new_images(nine):
    outcomes, comparison = nine
    table = comparison.differences.copy()
    accurate = (table["measure"] == "test/accuracy").to_numpy()
    wide = table.assign(images_low=table["difference"] - 0.09, images_high=table["difference"] + 0.09)
    axes = differences(outcomes, dataclasses.replace(comparison, differences=wide)).axes[0]
    assert axes.get_xlim()[0] < 100 * wide.loc[accurate, "images_low"].min()
    assert not any(text.get_text() == "" for text in axes.texts)
    wide.loc[wide.index[accurate][0], "images_low"] = -9
    axes = differences(outcomes, dataclasses.replace(comparison, differences=wide)).axes[0]
    assert [text.get_text() for text in axes.texts].count("") == 1 and axes.get_xlim()[0] > -50


@pytest.mark.slow
def test_every_figure_is_as_wide_as_both_columns_of_a_paper(nine):
    assert {chart(*nine).get_figwidth() for chart in CHARTS.values()} == {FULL}


def test_an_unfinished_arm_says_how_many_seeds_it_has(twelve):
    names = [text.get_text() for text in accuracy(*twelve).axes[0].get_yticklabels()]
    assert [name for name in names if "seeds" in name] == ["ReLU + RoPE (no positions, patch2) (2 of 5 seeds)"]


def test_an_endless_interval_leaves_the_figure_with_an_arrow(nine):
    outcomes, comparison = nine
    gaps = comparison.gaps.assign(high=[1e6, *comparison.gaps["high"][1:]])
    axes = gap_closed(outcomes, dataclasses.replace(comparison, gaps=gaps)).axes[0]
    assert axes.get_xlim()[1] < 2000
    assert [line.get_marker() for line in axes.lines].count(">") == 1


@pytest.mark.slow
def test_names_beside_points_cover_nothing_and_stay_inside():
    outcomes = changed(made_up(images=100), lambda arm: arm + LONG)
    runs = outcomes.runs.copy()
    place = runs["variant"].map(VARIANTS.index)
    runs["test/accuracy"] = 0.9 + 0.004 * place + 0.001 * (runs["seed"] - 1002)  # all twelve are on each front
    outcomes = dataclasses.replace(outcomes, runs=runs)
    figure = tradeoffs(outcomes, compare(outcomes))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    for axes in figure.axes:
        names = [text for text in axes.texts if isinstance(text, Annotation)]
        boxes = [name.get_window_extent(renderer) for name in names]
        dots = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
        assert len(names) >= 1 and len(dots) == 12  # those of the other attentions are pale
        for place, box in enumerate(boxes):
            assert axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            assert axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1)
            assert not any(box.overlaps(other) for other in boxes[:place])
            assert not any(box.overlaps(dot.get_window_extent(renderer)) for dot in dots)


def test_every_mark_is_named_or_in_a_legend():
    outcomes = made_up(FEW, images=100)
    fine = {"softmax": (0.95, 3.0), "relu": (0.90, 1.0), "relu_general": (0.89, 2.0)}
    runs = outcomes.runs.copy()
    runs["test/accuracy"] = runs["arm"].map(lambda arm: fine[arm][0])
    runs[list(COSTS)] = np.array([[fine[arm][1]] * len(COSTS) for arm in runs["arm"]])
    apart = dataclasses.replace(outcomes, runs=runs)
    figure = tradeoffs(apart, compare(apart))
    named = [{text.get_text() for text in axes.texts} for axes in figure.axes]
    assert not figure.legends and named == [{"no encoding"}, {"no encoding", "general RPE"}] * len(COSTS)
    assert figure.axes[0].get_xscale() == "log" and figure.axes[0].get_xlim()[0] > 0


@pytest.mark.slow
def test_where_a_name_has_no_room_there_is_a_legend(twelve):
    (legend,) = tradeoffs(*twelve).legends
    assert {text.get_text().strip() for text in legend.get_texts()} >= {"ReLU + RoPE (no positions, patch2)"}


def test_the_twelve_variants_look_different_and_a_colour_is_an_attention():
    found = marks(made_up(seeds=1, images=10).arms)
    assert list(found) == list(VARIANTS)
    assert len({(mark.colour, mark.marker) for mark in found.values()}) == 12
    assert len({(mark.colour, str(mark.dashes)) for mark in found.values()}) == 12
    assert {mark.colour for mark in found.values()} == set(COLOURS.values())


@pytest.mark.slow
@pytest.mark.parametrize("chart", ["tradeoffs", "learning_curves", "search_effort"])
def test_a_filling_is_a_switch_where_there_is_one_and_the_legend_tells_both(eighteen, chart):
    shown = marks(eighteen[0].arms)
    assert {(mark.switch, mark.fill) for mark in shown.values()} == {
        ("learned positions", "full"),
        ("no positions", "none"),
    }
    assert len({(mark.colour, mark.marker, mark.fill) for mark in shown.values()}) == 18
    (legend,) = CHARTS[chart](*eighteen).legends
    names = [text.get_text() for text in legend.get_texts()]
    encodings = ["no encoding", "general RPE", "circulant-STRING", "RoPE"]
    assert names == [*encodings, "learned positions", "no positions"]


def test_encodings_of_plug_ins_have_markers_of_their_own():
    arms = made_up(FEW[:3], images=50).arms
    arms["encoding"], arms["arm"] = ["none", "alibi", "cayley"], ["relu", "relu_alibi", "relu_cayley"]
    assert len({mark.marker for mark in marks(arms).values()}) == 3


def test_arms_of_one_variant_look_different():
    arms = made_up(FEW, seeds=1, images=10).arms
    found = marks(pd.concat([arms.assign(arm=arms["arm"] + f"-{switch}") for switch in "abcdefgh"]))
    assert [arm.partition("-")[0] for arm in found] == [variant for variant in FEW for _ in "abcdefgh"]
    looks = [(mark.colour, mark.marker, mark.fill, mark.edge) for mark in found.values()]
    assert len(set(looks)) == len(looks) and {mark.colour for mark in found.values()} <= set(COLOURS.values())


def test_a_search_shows_its_best_finished_trial():
    outcomes = made_up(FEW, images=10)
    trials = outcomes.trials.copy()
    trials.loc[trials["number"] == 3, "value"] = 0.99  # pruned: its value is not that of a last epoch
    epochs = outcomes.epochs.copy()
    epochs.loc[epochs["uid"] == "made-up-relu-t2", "val/accuracy"] = [0.1, 0.2, 0.3, 0.4, 0.5]
    curve = best_trials(dataclasses.replace(outcomes, trials=trials, epochs=epochs))
    assert list(curve.loc[curve["arm"] == "relu", "middle"]) == pytest.approx([10, 20, 30, 40, 50])


def test_the_band_of_the_training_loss_holds_every_seed():
    epochs = made_up(("relu",), seeds=3, images=10).epochs.copy()
    first = (epochs["phase"] == "confirm") & (epochs["epoch"] == 1)
    epochs.loc[first, "train/loss"] = [1.0, 2.0, 6.0]
    row = confirmed_losses(epochs).iloc[0]
    assert (row["low"], row["middle"], row["high"]) == (1.0, 3.0, 6.0)


@pytest.mark.parametrize("cls", [0, 1])
def test_an_attention_map_shows_the_asking_patch_in_multiples_of_uniform(cls, tmp_path):
    image = np.zeros((1, 8, 8), np.float32)
    image[0, 5, 3] = 1  # patch (1, 1) of the (2, 4) grid
    outcomes = with_attention(made_up(FEW, seeds=2, images=10), tmp_path, cls=cls, image=image)
    maps = [
        axes.images[0].get_array()
        for axes in attention_maps(outcomes).axes
        if axes.images and axes.get_title() != "image"
    ]
    assert len(maps) == 3
    for shown in maps:
        assert shown.shape == (2, 4) and shown[1, 1] == shown.max() == 8


def test_the_patch_that_asks_is_the_brightest_or_the_middle():
    grey = np.zeros((1, 4, 4))
    grey[0, 3, 0] = 1
    assert brightest_patch(grey, (2, 2)) == (0.75, 0.25)
    assert brightest_patch(np.zeros((3, 4, 4)), (2, 2)) == (0.75, 0.75)


def test_damaged_attention_and_other_images_are_left_out(tmp_path):
    outcomes = with_attention(made_up(FEW, seeds=2, images=10), tmp_path)
    (tmp_path / "made-up-relu-c0/attention.npz").write_bytes(b"PK\x03\x04 torn")
    for seed in (0, 1):
        np.savez(
            tmp_path / f"made-up-relu_general-c{seed}/attention.npz", image=np.ones((1, 8, 8)),
            maps=np.ones((1, 1, 4, 4)), grid=np.array((2, 2)),
        )  # fmt: skip
    assert set(attention_examples(outcomes)) == {"softmax", "relu"}


def test_linear_attention_breaks_even_where_the_formulas_cross():
    config = defaults("favor", "digits").model
    m = config.feature_count(config.head_dim)
    exact = 2 * m  # 4 N m D + 4 N D m = 4 N^2 D
    found = break_even(layer_flops("favor", "digits"), layer_flops("softmax", "digits"))
    assert found == pytest.approx(exact, rel=0.01)
    n = np.arange(1.0, 6.0)
    assert break_even(np.stack([n, n], 1), np.stack([n, 2 * n], 1)) == 1
    assert break_even(np.stack([n, 2 * n], 1), np.stack([n, n], 1)) is None


def test_each_study_is_drawn_by_itself():
    one, two = made_up(FEW, seeds=2, images=20), made_up(("softmax", "favor"), seeds=3, images=20, dataset="mnist")
    two = changed(two, study="other")
    tables = {name: pd.concat([getattr(one, name), getattr(two, name)]) for name in TABLES}
    both = dataclasses.replace(one, **tables)
    found = parts(both, compare(both))
    assert list(found) == ["made-up", "other"]
    outcomes, comparison = found["other"]
    assert list(outcomes.runs["arm"].unique()) == list(comparison.arms["arm"]) == ["softmax", "favor"]
    assert set(outcomes.trials["study"]) == set(comparison.summary["study"]) == {"other"}


@pytest.mark.slow
def test_equal_outcomes_give_equal_files(tmp_path, monkeypatch):
    outcomes = made_up(FEW, seeds=2, images=20)
    comparison = compare(outcomes)
    for charts in (CHARTS, NARROW):
        for name in set(charts) - {"accuracy"}:
            monkeypatch.delitem(charts, name)
    first, second = (save_all(outcomes, comparison, tmp_path / name) for name in "ab")
    names = [f"{name}.{kind}" for name in ("accuracy", "accuracy_column") for kind in ("pdf", "svg")]
    assert [path.name for path in first] == names
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("arms", ["nine", "eighteen"])
@pytest.mark.parametrize("name", NARROW)
def test_a_figure_of_one_column_lies_within_it_and_its_axes_have_room(name, arms, request):
    figure = NARROW[name](*request.getfixturevalue(arms), width=COLUMN)
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert box.x0 >= -0.02 and box.x1 <= COLUMN + 0.02 and figure.get_figwidth() == COLUMN
    assert figure.axes[0].get_position().width > 0.35


@pytest.mark.parametrize("kind", ["pdf", "png", "svg"])
def test_ctrl_c_leaves_no_half_figure(tmp_path, monkeypatch, kind):
    class Pressed(Figure):
        def savefig(self, *args, **settings):
            super().savefig(*args, **settings)
            raise KeyboardInterrupt

    write(Figure(), tmp_path / f"whole.{kind}")
    with pytest.raises(KeyboardInterrupt):
        write(Pressed(), tmp_path / f"half.{kind}")
    assert [path.name for path in tmp_path.iterdir()] == [f"whole.{kind}"]
