"""Own images: a folder or an .npz is a data set like any other, known by its content; what is wrong is one line."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from trials import TINY

from erpe.config import DataConfig, TrialConfig, defaults
from erpe.datasets import DATASETS, Dataset, facts_of, kind_of, read_grid
from erpe.errors import ConfigError, DataError
from erpe.inference import predict
from erpe.study.plan import Plan
from erpe.study.plan_file import load_plan
from erpe.study.search_space import default_space
from erpe.study.spec import StudySpec, define, differences_from
from erpe.training.augment import augmentation
from erpe.training.confirmation import Confirmation
from erpe.training.data import load_test, load_training
from erpe.training.own import described, doubt_of, find_dataset, location, summary

FORM = (8, 12)
"""(height, width): no square."""


def picture(seed, channels=3, form=FORM):
    """Noise on a mean colour, which tells the class."""
    return np.random.default_rng(seed).integers(1, 255, size=(*form, channels), dtype=np.uint8)


def write(folder, count=5, classes=("ant", "bee"), channels=3, form=FORM, first=0):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for place in range(count):
            pixels = picture(first + 100 * number + place, channels, form)
            Image.fromarray(pixels.squeeze()).save(folder / name / f"{place}.png")


@pytest.fixture
def flowers(tmp_path):
    """Ten training images of two classes, four test images."""
    write(tmp_path / "flowers" / "train")
    write(tmp_path / "flowers" / "test", count=2, first=1000)
    return tmp_path / "flowers"


def arrays(count=20, classes=2, **changed):
    images = np.stack([picture(seed) for seed in range(count)])
    return {"images": images, "labels": np.arange(count) % classes} | changed


def npz(path, **changed):
    np.savez(path, **{name: found for name, found in arrays(**changed).items() if found is not None})
    return path


def refusal(make, *args, **more):
    with pytest.raises((DataError, ConfigError)) as refused:
        make(*args, **more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# What own images are


def test_a_folder_is_described_by_what_is_in_it(flowers, tmp_path):
    found = find_dataset(flowers, cache=tmp_path / "cache")
    assert (found.name, found.image, found.names) == ("flowers", (3, *FORM), ("ant", "bee"))
    assert (found.train, found.test, found.part) == (10, 4, False)
    train = load_training(DataConfig(dataset=found, validation=0)).train
    expected = np.asarray(Image.open(flowers / "train" / "bee" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(train.pixels[5].numpy(), expected) and train.labels.tolist() == [0] * 5 + [1] * 5
    values = train.pixels.double() / 255
    assert found.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=6e-5)
    assert found.std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=6e-5)
    assert load_test(found).labels.tolist() == [0, 0, 1, 1]


def test_grey_pictures_have_one_channel(tmp_path):
    write(tmp_path / "grey" / "train", channels=1)
    assert find_dataset(tmp_path / "grey", cache=tmp_path / "cache").image == (1, *FORM)


def test_without_a_test_set_a_fixed_stratified_fifth_is_one_and_that_is_said(tmp_path):
    write(tmp_path / "a" / "train", count=10)
    found = find_dataset(tmp_path / "a", cache=tmp_path / "cache")
    assert (found.train, found.test, found.part) == (16, 4, True) and "fifth" in summary(found)
    assert load_test(found).labels.tolist() == [0, 0, 1, 1]
    train = load_training(DataConfig(dataset=found, validation=0)).train.pixels
    assert not any(torch.equal(one, other) for one in train for other in load_test(found).pixels)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_an_npz_has_channels_last_or_first(tmp_path, axes):
    images = arrays()["images"]
    found = find_dataset(npz(tmp_path / "x.npz", images=images.transpose(axes), names=np.array(["ant", "bee"])))
    assert (found.image, found.names) == ((3, *FORM), ("ant", "bee"))
    train, test = load_training(DataConfig(dataset=found, validation=0)).train, load_test(found)
    kept = {image.tobytes() for image in torch.cat([train.pixels, test.pixels]).permute(0, 2, 3, 1).numpy()}
    assert kept == {image.tobytes() for image in images}


def test_resize_makes_all_alike_and_no_square(flowers, tmp_path):
    Image.fromarray(picture(7, form=(30, 17))).save(flowers / "train" / "ant" / "other.png")
    found = find_dataset(flowers, resize=(6, 10), cache=tmp_path / "cache")
    assert found.image == (3, 6, 10) and load_test(found).pixels.shape == (4, 3, 6, 10)


@pytest.mark.parametrize(("given", "grid"), [("32x48", (32, 48)), (32, (32, 32)), ("32", (32, 32)), (None, None)])
def test_a_size_is_height_and_width(given, grid):
    assert read_grid(given) == grid


@pytest.mark.parametrize("given", ["32x", "x", "0", "3x4x5", "wide", -3])
def test_what_is_no_size_is_refused(given):
    assert "HEIGHTxWIDTH" in refusal(read_grid, given)


# The content is what counts, not the place


def test_the_same_images_elsewhere_are_the_same_study_and_others_are_not(flowers, tmp_path):
    before = define("favor", find_dataset(flowers, cache=tmp_path / "cache"))
    moved = flowers.rename(tmp_path / "roses")
    for cache in (tmp_path / "cache", tmp_path / "another"):
        after = define("favor", find_dataset(moved, cache=cache))
        assert after.identity == before.identity
        assert not differences_from(before.model_dump(mode="json"), after)
    assert str(moved) not in before.model_dump_json() and str(tmp_path) not in after.model_dump_json()
    assert find_dataset(moved, cache=tmp_path / "cache").name == "flowers", "known by its content under this name"
    Image.fromarray(picture(9)).save(moved / "train" / "ant" / "0.png")
    changed = define("favor", find_dataset(moved, cache=tmp_path / "cache"))
    assert changed.identity != before.identity
    assert any("data.dataset" in line for line in differences_from(before.model_dump(mode="json"), changed))


def test_pictures_are_decoded_once(flowers, tmp_path, monkeypatch):
    first = find_dataset(flowers, cache=tmp_path / "cache")
    monkeypatch.setattr("erpe.training.own.read_folder", lambda *_: pytest.fail("read again"))
    assert find_dataset(flowers, cache=tmp_path / "cache") == first
    assert [facts for facts, path in described(tmp_path / "cache")] == [first]


def test_a_file_that_changed_since_is_refused_where_it_is_read(tmp_path):
    found = find_dataset(npz(tmp_path / "x.npz"), cache=tmp_path / "cache")
    npz(tmp_path / "x.npz", images=arrays()["images"] // 2)
    assert str(tmp_path / "x.npz") in refusal(load_training, DataConfig(dataset=found), location(found))


def test_a_folder_called_as_a_published_set_has_a_name_of_its_own(flowers, tmp_path):
    named = flowers.rename(tmp_path / "mnist")
    assert find_dataset(named, cache=tmp_path / "cache").name == "own-mnist"
    assert find_dataset("mnist") == "mnist"


# What is wrong, in one line with the file's name


def spoil_mixed(folder):
    Image.fromarray(picture(1, form=(9, 12))).save(folder / "train" / "bee" / "odd.png")
    return "odd.png: 9 x 12 pixels", "--resize 8x12"


def spoil_unreadable(folder):
    (folder / "train" / "ant" / "broken.png").write_bytes(b"not a picture")
    return "broken.png: cannot be read as a picture", ""


def spoil_single(folder):
    write(folder / "train", count=1, classes=("wasp",), first=500)
    return "class wasp has one image", ""


def spoil_twin(folder):
    shutil.copy(folder / "train" / "bee" / "3.png", folder / "test" / "bee" / "copy.png")
    return os.path.join("test", "bee", "copy.png"), os.path.join("train", "bee", "3.png")


def spoil_class(folder):
    write(folder / "test", count=1, classes=("wasp",), first=500)
    return "wasp: a class that train/ has not", ""


def spoil_layout(folder):
    (folder / "train").rename(folder / "training")
    return "no train/CLASS folders", ""


@pytest.mark.parametrize("spoil", [value for name, value in sorted(globals().items()) if name.startswith("spoil_")])
def test_a_bad_folder_is_refused_with_the_file_s_name(flowers, tmp_path, spoil):
    expected = spoil(flowers)
    text = refusal(find_dataset, flowers, cache=tmp_path / "cache")
    assert all(part in text for part in expected) and str(flowers) in text


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"labels": np.arange(20) % 2 + 1, "names": np.array(["ant", "bee"])}, "images[1]: label 2; use 0 to 1"),
        ({"labels": np.arange(20) % 2 - 1}, "label -1; use 0 or more"),
        ({"labels": np.zeros(20, int)}, "classes: 1 given; use 2 to 256"),
        ({"labels": np.arange(20) % 2 * 2}, "images[1] has label 2; a class needs"),
        ({"labels": np.arange(20) / 2}, "labels are float64"),
        ({"images": arrays()["images"] / 255}, "use uint8 from 0 to 255"),
        ({"labels": None}, "no array 'labels'"),
        ({"test_images": arrays()["images"][:2], "test_labels": np.array([0, 1])}, "test_images[0]: also in the train"),
        ({"test_images": np.ones((2, 9, 12, 3), np.uint8), "test_labels": np.arange(2)}, '"8x12") makes all'),
        ({"names": np.array(["ant", {}], dtype=object)}, "cannot be read as an .npz"),
    ],
)  # fmt: skip
def test_a_bad_npz_is_refused_with_its_name(tmp_path, changed, told):
    path = npz(tmp_path / "x.npz", **changed)
    text = refusal(find_dataset, path)
    assert told in text and str(path) in text


def test_one_picture_in_two_classes_is_a_warning_with_both_names_every_time(flowers, tmp_path):
    assert not doubt_of(find_dataset(flowers, cache=tmp_path / "cache"))
    shutil.copy(flowers / "train" / "ant" / "3.png", flowers / "train" / "bee" / "copy.png")
    shutil.copy(flowers / "train" / "ant" / "3.png", flowers / "train" / "ant" / "twice.png")
    for _ in range(2):  # read, and then known
        told = doubt_of(find_dataset(flowers, cache=tmp_path / "cache"))
        for place, name in ("train/bee/copy.png", "bee"), ("train/ant/3.png", "ant"):
            assert f"{flowers / place} (class {name})" in told
        assert "more such" not in told, "twins of one class are none"


def test_what_is_neither_a_name_nor_a_path_is_refused(tmp_path):
    assert "did you mean digits?" in refusal(find_dataset, "digit")
    assert "unknown data set ''" in refusal(find_dataset, ""), "not the current folder"
    assert "own images alone are resized" in refusal(find_dataset, "mnist", resize=(8, 8))
    (tmp_path / "x.npz").write_bytes(b"zip?")
    assert str(tmp_path / "x.npz") in refusal(find_dataset, tmp_path / "x.npz")


# Everything asks the description


def test_a_configuration_survives_json_and_shows_the_data_as_one_setting(flowers, tmp_path):
    found = find_dataset(flowers, cache=tmp_path / "cache")
    config = defaults("relu_rope", found)
    assert TrialConfig.model_validate_json(config.model_dump_json()) == config
    assert config.flat()["data.dataset"] == f"flowers@{found.fingerprint[:12]}"
    assert set(config.flat()) == set(defaults("relu_rope", "digits").flat())
    spec = define("relu_rope", found)
    assert StudySpec(**spec.model_dump(mode="json")) == spec and spec.name == "flowers-relu_rope"


@pytest.mark.parametrize("image", [(1, 8, 12), (3, 30, 20), (1, 28, 28), (3, 224, 160), (3, 7, 7), (1, 45, 60)])
def test_images_of_any_form_have_a_space_whose_patches_divide_them(image):
    known = {"names": ("a", "b"), "train": 40, "test": 10, "mean": (0.5,) * image[0], "std": (0.2,) * image[0]}
    facts = Dataset(name="x", image=image, like=kind_of(image), shift=1, fingerprint="f" * 64, **known)
    define("favor_rope", facts)  # refuses a space that could draw what does not fit
    axis = default_space("favor_rope", facts).axes["model.patch"]
    assert all(image[1] % side == image[2] % side == 0 for side in axis.values)


def test_images_are_mirrored_where_their_data_set_allows_it():
    pixels = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    pixels[..., :4] = 255  # white on the left

    def mirrored(dataset, **settings):
        facts = facts_of(dataset)
        config = DataConfig(dataset=dataset, augment="standard", **settings)
        small = pixels[:, : facts.image[0], : facts.image[1], : facts.image[2]]
        varied = augmentation(config)(small, torch.Generator().manual_seed(0))
        return bool((varied[..., -1] > 0).any())

    assert {name for name in DATASETS if mirrored(name)} == {"cifar10", "cifar100", "fashion_mnist"}
    assert mirrored("svhn", flips=True) and not mirrored("cifar10", flips=False)


def test_a_study_file_names_own_images_relative_to_itself(flowers, tmp_path, monkeypatch):
    file = tmp_path / "studies" / "x.toml"
    file.parent.mkdir()
    file.write_text('dataset = "../flowers"\nresize = "6x10"\nvariants = ["softmax"]\n')
    monkeypatch.chdir("/")
    plan = load_plan(file, cache=tmp_path / "cache")
    assert plan.dataset.name == "flowers" and plan.dataset.image == (3, 6, 10)
    stored = Plan(**plan.model_dump(mode="json"))
    assert stored.dataset == plan.dataset and str(tmp_path) not in plan.model_dump_json()


def test_a_model_of_own_images_is_trained_tested_and_used_without_them(flowers, tmp_path):
    found = find_dataset(flowers, cache=tmp_path / "cache")
    own = {"train.epochs": 1, "model.patch": 4, "data.validation": 0.0}
    config = defaults("favor_rope", found).replace(TINY | own)
    trial = Confirmation(config, tmp_path / "trial", data_dir=location(found))
    trial.epoch()
    measured = trial.finish()
    assert 0 <= measured["test/accuracy"] <= 1
    shown = flowers / "test" / "bee" / "0.png"
    shutil.rmtree(tmp_path / "cache")
    assert set(predict(tmp_path / "trial", shown)) == {"ant", "bee"}
