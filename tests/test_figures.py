import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from erpe.errors import ShapeError
from erpe.tracking.figures import _by_offset, attention_maps, confusion, learning_curves, save

HISTORY = [
    {"epoch": n, "train/loss": 2 / n, "val/loss": 2.1 / n, "val/accuracy": 1 - 1 / n, "lr": 1e-3 / n, "time/s": 3.0}
    for n in (1, 2, 3, 4)
]


def labels(axes):
    return [axes.get_xlabel(), axes.get_ylabel()]


def test_learning_curves_show_every_epoch_of_every_measure_with_its_unit():
    figure = learning_curves(HISTORY)
    loss, accuracy, rate = figure.axes
    assert [labels(axes) for axes in figure.axes] == [
        ["epoch", "loss (nats an image)"], ["epoch", "accuracy"], ["epoch", "learning rate"],
    ]  # fmt: skip
    assert {line.get_label(): list(line.get_ydata()) for line in loss.lines} == {
        "training": [2 / n for n in (1, 2, 3, 4)],
        "validation": [2.1 / n for n in (1, 2, 3, 4)],
    }
    assert list(accuracy.lines[0].get_xdata()) == [1, 2, 3, 4] and len(rate.lines) == 1


@pytest.mark.parametrize(
    "history", [[], HISTORY[:1], [{"epoch": 1, "train/loss": float("nan")}], [*HISTORY[:2], {"epoch": 3}]]
)
def test_learning_curves_of_little_are_drawn(history, tmp_path):
    save(learning_curves(history), tmp_path / "curves.png")


def test_confusion_shows_every_count_and_the_accuracy():
    matrix = [[90, 10, 0], [0, 50, 0], [0, 0, 0]]
    figure = confusion(matrix, ["cat", "dog", "axolotl of the lake"], "test")
    axes = figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {"90", "10", "50"}
    assert axes.get_title() == "test: 150 images, accuracy 0.9333"
    assert labels(axes) == ["predicted class", "true class"]
    shades = axes.images[0].get_array()
    np.testing.assert_allclose(shades, [[0.9, 0.1, 0], [0, 1, 0], [0, 0, 0]])


def test_confusion_of_the_wrong_size_is_refused():
    with pytest.raises(ShapeError, match="3 classes"):
        confusion([[1, 2], [3, 4]], ["a", "b", "c"], "test")


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 4), w=st.integers(1, 5), data=st.data())
def test_by_offset_is_the_mean_over_pairs_at_that_offset(h, w, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    weights = np.random.default_rng(seed).random((h * w, h * w))
    found = _by_offset(weights, h, w)
    pairs = {}
    for query in range(h * w):
        for key in range(h * w):
            dy, dx = key // w - query // w, key % w - query % w
            pairs.setdefault((dy + h - 1, dx + w - 1), []).append(weights[query, key])
    for place, values in pairs.items():
        assert found[place] == pytest.approx(np.mean(values))


def test_attention_of_the_middle_token_is_shown_in_multiples_of_uniform():
    h, w, blocks = 3, 4, 2
    maps = np.full((blocks, 5, h * w, h * w), 0.5 / (h * w))
    middle = (h // 2) * w + w // 2
    maps[1, :, middle, 7] = 4 / (h * w)
    figure = attention_maps(np.zeros((1, 6, 8)), maps, (h, w))
    image, first, second, *_ = figure.axes
    assert image.get_title() == "image and patches" and second.get_title() == "block 2"
    np.testing.assert_allclose(first.images[0].get_array(), 0.5)
    np.testing.assert_allclose(second.images[0].get_array()[7 // w, 7 % w], 4)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "cls"), [(1, 0), (3, 0), (3, 1)])
def test_attention_maps_are_drawn_with_a_class_token_and_with_negative_weights(channels, cls, tmp_path):
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(3, 2, 12 + cls, 12 + cls)).astype(np.float16)
    save(attention_maps(rng.random((channels, 6, 8)), maps, (3, 4)), tmp_path / "maps.png")


def test_attention_maps_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ShapeError, match=r"\(3, 4\) grid"):
        attention_maps(np.zeros((1, 6, 8)), np.zeros((1, 1, 9, 9)), (3, 4))


@pytest.mark.parametrize(
    "figure", [learning_curves(HISTORY), confusion(np.arange(100).reshape(10, 10), list("abcdefghij"), "test")]
)
def test_a_figure_is_saved_in_256_colours_and_looks_as_it_was_drawn(figure, tmp_path):
    save(figure, tmp_path / "figure.png")
    figure.savefig(tmp_path / "all.png", dpi=150)
    with Image.open(tmp_path / "figure.png") as saved, Image.open(tmp_path / "all.png") as drawn:
        pixels = [np.asarray(picture.convert("RGB"), float) for picture in (saved, drawn)]
        errors = abs(pixels[0] - pixels[1])
        assert saved.mode == "P" and errors.mean() < 1 and errors.max() <= 16
    assert (tmp_path / "figure.png").stat().st_size < (tmp_path / "all.png").stat().st_size / 2
