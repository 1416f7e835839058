"""Pictures of a search."""

import numpy as np
import optuna

from erpe.tracking.figures import save
from erpe.tracking.search_plots import draw_search


def searched(trials):
    def value(trial):
        kind = trial.suggest_categorical("kind", ["a", "b"])
        depth = trial.suggest_int("depth", 2, 6) if kind == "a" else 0
        return 0.9 - trial.suggest_float("lr", 1e-4, 1e-1, log=True) - 0.01 * depth

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
    study.optimize(value, n_trials=trials)
    return study


def test_a_plot_shows_each_trial_and_the_best_so_far():
    study = searched(8)
    axes = draw_search(study)["history"].axes[0]
    values = [trial.value for trial in study.trials]
    assert np.array_equal(axes.lines[0].get_ydata(), values)
    assert np.array_equal(axes.lines[1].get_ydata(), np.maximum.accumulate(values))


def test_a_line_of_the_parallel_coordinates_is_a_trial_at_its_place_in_the_ranges():
    study = searched(8)
    lines = draw_search(study)["parallel_coordinates"].axes[0].lines
    for line, trial in zip(lines, study.trials, strict=True):
        depth, kind, lr = line.get_ydata()
        assert np.isclose(1e-4 * 1000**lr, trial.params["lr"])
        assert kind == (trial.params["kind"] == "b")
        assert np.isnan(depth) if "depth" not in trial.params else np.isclose(2 + 4 * depth, trial.params["depth"])


def test_one_trial_has_a_history_alone_and_none_has_nothing():
    assert list(draw_search(searched(1))) == ["history"]
    assert draw_search(searched(0)) == {}


def test_the_pictures_of_a_search_are_small(tmp_path):
    for name, figure in draw_search(searched(20)).items():
        save(figure, tmp_path / f"{name}.png")
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 3 and sum(sizes) < 100_000


def test_where_all_trials_of_two_objectives_have_one_value_no_setting_matters():
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(0))
    study.optimize(lambda trial: (0.5 + 0 * trial.suggest_float("lr", 0, 1), 3), n_trials=2)
    (bar,) = draw_search(study)["importances"].axes[0].patches
    assert bar.get_width() == 0


def test_a_search_of_two_objectives_has_its_front_too(tmp_path):
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(0))
    study.optimize(lambda trial: (lr := trial.suggest_float("lr", 0, 1), (lr - 0.6) ** 2), n_trials=6)
    found = draw_search(study)
    best = sorted((trial.values[1], trial.values[0]) for trial in study.best_trials)
    assert sorted(found) == ["front", "history", "importances", "parallel_coordinates"] and 1 < len(best) < 6
    assert [tuple(point) for point in found["front"].axes[0].lines[1].get_xydata()] == best
    found["front"].draw_without_rendering()
    ticks = [label.get_text() for label in found["front"].axes[0].get_xticklabels()]
    assert ticks and not any(text.endswith("m") for text in ticks), "0.2, not 200 m"
