"""Variations of training images: each image its own, within bounds, decided by the generators."""

import pytest
import torch
from scipy.stats import ks_2samp

from erpe.config import DataConfig
from erpe.datasets import DATASETS
from erpe.training.augment import augmentation, erase, flip, mixing, shift
from erpe.training.data import load_training, normalise
from erpe.training.vision import torchvision

each_dataset = pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10"])
each_policy = pytest.mark.parametrize("augment", ["standard", "rand", "trivial"])


def pictures(dataset="digits", count=64):
    """Real digits, or noise in the format of the others."""
    if dataset == "digits":
        return load_training(DataConfig(dataset="digits")).train.pixels[:count]
    size = (count, *DATASETS[dataset].image)
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def vary(pixels, seed=0, **settings):
    return augmentation(DataConfig(**settings))(pixels, torch.Generator().manual_seed(seed))


def distinct(images):
    return len(torch.unique(images.flatten(1), dim=0))


# Images


@each_dataset
def test_without_augmentation_pixels_are_as_they_were(dataset):
    pixels = pictures(dataset)
    assert torch.equal(vary(pixels, dataset=dataset, augment="none"), pixels)


@each_policy
@each_dataset
def test_variations_are_pictures_of_the_same_kind_and_the_originals_stay(dataset, augment):
    pixels = pictures(dataset)
    before = pixels.clone()
    varied = vary(pixels, dataset=dataset, augment=augment)
    assert varied.shape == pixels.shape and varied.dtype == torch.uint8 and varied.device == pixels.device
    assert torch.equal(pixels, before)
    assert not torch.equal(varied, pixels)


@each_policy
@each_dataset
def test_each_image_of_a_batch_is_varied_on_its_own(dataset, augment):
    same = pictures(dataset, 1).expand(64, -1, -1, -1)
    assert distinct(vary(same, dataset=dataset, augment=augment)) >= {"digits": 6, "mnist": 15, "cifar10": 40}[dataset]


@each_policy
@each_dataset
def test_the_seed_decides_the_variations(dataset, augment):
    pixels = pictures(dataset)
    first, again, other = (vary(pixels, seed, dataset=dataset, augment=augment) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@each_policy
def test_the_global_generator_is_left_alone(augment):
    before = torch.get_rng_state()
    vary(pictures("cifar10"), dataset="cifar10", augment=augment, erase=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@each_policy
@each_dataset
def test_no_value_is_asked_of_the_device(dataset, augment):
    nowhere = pictures(dataset).to("meta")  # a device without values: whoever waits for one fails
    varied = vary(nowhere, dataset=dataset, augment=augment, erase=0.5)
    assert varied.shape == nowhere.shape and varied.dtype == torch.uint8 and varied.device == nowhere.device


@each_dataset
def test_the_last_batch_may_be_a_single_image(dataset):
    for augment in ("standard", "rand", "trivial"):
        for seed in range(10):
            varied = vary(pictures(dataset, 1), seed, dataset=dataset, augment=augment, erase=0.5)
            assert varied.shape == (1, *DATASETS[dataset].image)


def moved(pixels, dy, dx):
    """The image moved by explicit loops, black where nothing comes in."""
    result = torch.zeros_like(pixels)
    height, width = pixels.shape[-2:]
    for y in range(height):
        for x in range(width):
            if 0 <= y - dy < height and 0 <= x - dx < width:
                result[:, y, x] = pixels[:, y - dy, x - dx]
    return result


@pytest.mark.parametrize("largest", [1, 2, 4])
def test_every_shift_within_reach_occurs_and_no_other(largest):
    image = torch.randint(1, 256, (2, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shifts = range(-largest, largest + 1)
    allowed = torch.stack([moved(image, dy, dx) for dy in shifts for dx in shifts]).flatten(1)
    count = 40 * len(allowed)
    images = shift(image.expand(count, -1, -1, -1), largest, torch.Generator().manual_seed(0)).flatten(1)
    which = (images[:, None] == allowed).all(-1)  # (count, shifts)
    assert which.sum(1).eq(1).all()
    assert which.sum(0).min() > 10


@each_dataset
def test_no_image_moves_farther_than_its_data_set_allows(dataset):
    (channels, height, width), largest = DATASETS[dataset].image, DATASETS[dataset].shift
    dot = torch.zeros(2000, channels, height, width, dtype=torch.uint8)
    dot[:, :, height // 2, width // 2] = 255
    places = vary(dot, dataset=dataset, augment="standard")[:, 0].nonzero()
    assert len(places) == len(dot)
    away = places[:, 1:] - torch.tensor([height // 2, width // 2])
    if dataset == "cifar10":  # a mirrored dot lies one column to the left
        assert (away.min().item(), away.max().item()) == (-largest - 1, largest)
    else:
        assert (away.min().item(), away.max().item()) == (-largest, largest)


@each_dataset
def test_only_objects_are_mirrored_never_digits(dataset):
    channels, height, width = DATASETS[dataset].image
    pair = torch.zeros(1000, channels, height, width, dtype=torch.uint8)
    pair[:, :, height // 2, width // 2 : width // 2 + 2] = torch.tensor([100, 200], dtype=torch.uint8)
    row = vary(pair, dataset=dataset, augment="standard")[:, 0].amax(1).int()
    mirrored = row.argmax(1) < (row == 100).int().argmax(1)
    share = mirrored.double().mean()
    assert 0.4 < share < 0.6 if dataset == "cifar10" else share == 0


def test_half_of_the_images_are_mirrored_whole():
    pixels = pictures("cifar10", 400)
    flipped = flip(pixels, torch.Generator().manual_seed(0))
    mirrored = (flipped == pixels.flip(-1)).flatten(1).all(1)
    assert (mirrored | (flipped == pixels).flatten(1).all(1)).all()
    assert 150 < mirrored.sum() < 250


# Rectangles


def erased(size, count, probability=1.0):
    """Where rectangles are: (count, height, width) of truth, from white images and a black brush."""
    pixels = torch.full((count, 1, *size), 255, dtype=torch.uint8)
    return erase(pixels, probability, (0.0,), torch.Generator().manual_seed(0))[:, 0] == 0


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (9, 30)])
def test_what_is_erased_is_one_rectangle_inside_the_image(size):
    inside = erased(size, 500)
    rows, columns = inside.any(2), inside.any(1)  # (count, height), (count, width)
    assert torch.equal(inside, rows[:, :, None] & columns[:, None, :])
    assert inside.any((1, 2)).all() and not inside.all(1).any() and not inside.all(2).any()
    for ends in (rows, columns):
        assert ends.int().diff(dim=1).abs().sum(1).le(2).all()
        assert ends.any(0).all()  # every row and column has its turn


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (9, 30)])
def test_rectangles_are_as_large_and_lie_where_those_of_torchvision_do(size):
    torch.manual_seed(0)
    random_erasing = torchvision().transforms.v2.RandomErasing(p=1)
    theirs = torch.stack([random_erasing(torch.ones(1, *size))[0] == 0 for _ in range(1500)])
    ours = erased(size, 1500)
    for measure in (lambda x: x.sum((1, 2)), lambda x: x.any(2).sum(1), lambda x: x.any(2).int().argmax(1)):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-4  # areas, heights, first rows


def test_so_many_images_are_erased_as_are_asked_for():
    for probability in (0.0, 0.25, 1.0):
        share = erased((32, 32), 2000, probability).any((1, 2)).double().mean().item()
        assert share == pytest.approx(probability, abs=0.04 if 0 < probability < 1 else 0)


@each_dataset
def test_the_brush_has_the_mean_colour_of_the_data_set(dataset):
    pixels = torch.full((50, *DATASETS[dataset].image), 255, dtype=torch.uint8)
    varied = vary(pixels, dataset=dataset, augment="none", erase=1)
    seen = normalise(varied, dataset)[(varied != 255).any(1)[:, None].expand_as(varied)]
    assert len(seen) and seen.abs().max() < 0.5 / 255 / min(DATASETS[dataset].std) + 1e-6


@each_dataset
def test_erasing_is_written_down_only_where_it_is_on(dataset):
    assert "erase" not in DataConfig(dataset=dataset).model_dump()
    assert DataConfig(dataset=dataset, erase=0.25).model_dump()["erase"] == 0.25


# Mixtures


def mix(images, labels, seed=0, **settings):
    return mixing(DataConfig(dataset="digits", **settings))(images, labels, torch.Generator().manual_seed(seed))


def batch(count=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def test_without_mixing_images_and_labels_are_as_they_were():
    images, labels = batch()
    mixed = mix(images, labels)
    assert mixed[0] is images and mixed[1] is labels


@pytest.mark.parametrize("settings", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 0.8}])
@pytest.mark.parametrize("count", [1, 2, 32])
def test_labels_of_mixtures_are_probabilities_of_the_classes_mixed(settings, count):
    images, labels = batch(count)
    for seed in range(20):
        mixed, shares = mix(images, labels, seed, **settings)
        assert mixed.shape == images.shape and shares.shape == (count, 10)
        assert (shares >= 0).all() and torch.allclose(shares.sum(1), torch.ones(count))
        assert (shares.gt(0).sum(1) <= 2).all()
        torch.testing.assert_close(shares, mix(images, labels, seed, **settings)[1], rtol=0, atol=0)


def test_mixup_weighs_images_as_it_weighs_their_labels():
    images, _ = batch()
    mixed, shares = mix(images, torch.arange(32) % 10, mixup=1.0)
    kept = shares[torch.arange(32), torch.arange(32) % 10]
    assert 0 < kept[1] < 1
    partner = torch.roll(images, 1, 0)
    torch.testing.assert_close(mixed, kept[1] * images + (1 - kept[1]) * partner)


def test_cutmix_weighs_labels_by_area():
    images = torch.arange(32.0)[:, None, None, None].expand(-1, 1, 8, 8).clone()
    seen = set()
    for seed in range(30):
        mixed, shares = mix(images, torch.arange(32) % 10, seed, cutmix=1.0)
        own = (mixed == images).double().mean((1, 2, 3))
        torch.testing.assert_close(shares[torch.arange(32), torch.arange(32) % 10].double(), own, rtol=0, atol=1e-6)
        seen.add(own[1].item())
    assert len(seen) > 5


def test_with_both_each_batch_takes_one_of_them():
    images, labels = batch()
    blends = [mix(images, labels, seed, mixup=1.0, cutmix=1.0)[0] for seed in range(40)]
    pasted = sum(bool(((x == images) | (x == images.roll(1, 0))).all()) for x in blends)
    assert 8 < pasted < 32
