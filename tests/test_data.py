"""Data sets: the published files and no others, splits that are fixed, a test part that stays closed."""

import gzip
import hashlib
import http.server
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from trials import TINY

from erpe.config import DataConfig, defaults
from erpe.datasets import DATASETS
from erpe.errors import DataError
from erpe.training import download
from erpe.training.data import batches, load_test, load_training, normalise
from erpe.training.download import find_data_dir, missing_files, prepare
from erpe.training.trial import Trial
from erpe.training.vision import torchvision

REAL = os.environ.get("ERPE_DATA")
real = pytest.mark.skipif(not REAL, reason="ERPE_DATA names no folder with MNIST and CIFAR-10")


@pytest.fixture(
    scope="module", params=["digits", pytest.param("mnist", marks=real), pytest.param("cifar10", marks=real)]
)
def dataset(request):
    """Each data set in turn, so that each is read once."""
    return request.param


def refusal(make, *args) -> str:
    """The one line with which data is refused."""
    with pytest.raises(DataError) as refused:
        make(*args)
    text = str(refused.value)
    assert text and "\n" not in text
    return text


# Small files of the published formats. Each image tells its place: its first two pixels are the number.


def numbered(count, size):
    """(count, size) uint8 whose first two entries are the number of the row."""
    pixels = np.random.default_rng(0).integers(256, size=(count, size), dtype=np.uint8)
    pixels[:, 0], pixels[:, 1] = divmod(np.arange(count), 256)
    return pixels


def places(images):
    return (images.pixels[:, 0, 0, 0].int() * 256 + images.pixels[:, 0, 0, 1].int()).tolist()


def write_mnist(folder, part, count):
    pixels, labels = numbered(count, 784), (np.arange(count) * 7 % 10).astype(np.uint8)
    header = b"".join(number.to_bytes(4) for number in (0x803, count, 28, 28))
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    header = b"".join(number.to_bytes(4) for number in (0x801, count))
    (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))


def publish(monkeypatch, folder):
    """Let the files in a folder be the published ones."""
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    monkeypatch.setitem(download.MD5, "cifar10" if "batches.meta" in sums else "mnist", sums)
    monkeypatch.setattr(torchvision().datasets.MNIST, "resources", list(sums.items()))  # for downloads


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """400 training images and 100 test images; returns `--data-dir` and the folder of the files."""
    folder = tmp_path / "data" / "mnist" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    write_mnist(folder, "train", 400)
    write_mnist(folder, "t10k", 100)
    publish(monkeypatch, folder)
    return tmp_path / "data", folder


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Five batches of 40 training images and one of 30 test images."""
    folder = tmp_path / "data" / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    train, test = numbered(200, 3072), numbered(30, 3072)
    parts = {f"data_batch_{i + 1}": train[40 * i : 40 * i + 40] for i in range(5)} | {"test_batch": test}
    for name, pixels in parts.items():
        content = {"data": pixels, "labels": [i % 10 for i in range(len(pixels))], "filenames": [], "batch_label": ""}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(DATASETS["cifar10"].names)}, protocol=2))
    publish(monkeypatch, folder)
    return tmp_path / "data", folder


@pytest.fixture
def offline(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)


# What the data sets are

CLASSES = {
    ("digits", "train"): np.bincount(load_digits().target) - [36, 36, 35, 37, 36, 37, 36, 36, 35, 36],
    ("digits", "test"): [36, 36, 35, 37, 36, 37, 36, 36, 35, 36],
    ("mnist", "train"): [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    ("mnist", "test"): [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    ("cifar10", "train"): [5000] * 10,
    ("cifar10", "test"): [1000] * 10,
}


@pytest.mark.slow
def test_pictures_are_what_the_facts_say(dataset):
    facts = DATASETS[dataset]
    train, test = load_training(DataConfig(dataset=dataset, validation=0)).train, load_test(dataset)
    for images, count, part in ((train, facts.train, "train"), (test, facts.test, "test")):
        assert images.pixels.shape == (count, *facts.image) and images.pixels.dtype == torch.uint8
        assert images.labels.shape == (count,) and images.labels.dtype == torch.int64
        assert images.labels.bincount().tolist() == [*CLASSES[dataset, part]]
    for channel, mean, std in zip(train.pixels.numpy().swapaxes(0, 1), facts.mean, facts.std, strict=True):
        shares = np.bincount(channel.ravel(), minlength=256) / channel.size
        values = np.arange(256) / 255
        assert shares @ values == pytest.approx(mean, abs=6e-5)
        assert np.sqrt(shares @ values**2 - (shares @ values) ** 2) == pytest.approx(std, abs=6e-5)


def test_normalised_pixels_have_mean_zero_and_deviation_one(dataset):
    pixels = normalise(load_training(DataConfig(dataset=dataset)).train.pixels[:5000], dataset)
    assert pixels.dtype == torch.float32
    assert pixels.mean((0, 2, 3)).abs().max() < 0.03
    assert (pixels.std((0, 2, 3)) - 1).abs().max() < 0.03


def test_pictures_show_what_their_labels_say(dataset):
    """The mean image of each class is nearest to unseen images of that class, far more often than chance."""
    split = load_training(DataConfig(dataset=dataset, train_limit=1000))
    train, unseen = (normalise(x.pixels[:1000], dataset).flatten(1) for x in (split.train, split.validation))
    means = torch.stack([train[split.train.labels == label].mean(0) for label in range(10)])
    hits = torch.cdist(unseen, means).argmin(1) == split.validation.labels[:1000]
    assert hits.double().mean() > {"digits": 0.85, "mnist": 0.75, "cifar10": 0.2}[dataset]


def test_digits_are_scikit_learn_s_each_once():
    pixels, labels = load_digits(return_X_y=True)
    train, test = load_training(DataConfig(dataset="digits", validation=0)).train, load_test("digits")
    ours = torch.cat([train.pixels, test.pixels]).flatten(1).numpy(), torch.cat([train.labels, test.labels]).numpy()
    ours, theirs = (
        np.unique(np.column_stack(x), axis=0, return_counts=True) for x in (ours, (np.rint(pixels * 255 / 16), labels))
    )
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_the_small_files_of_these_tests_are_read_in_order(mnist, cifar10):
    for dataset, count in (("mnist", 400), ("cifar10", 200)):
        root = mnist[0]
        train = load_training(DataConfig(dataset=dataset, validation=0), root).train
        assert places(train) == [*range(count)]
        assert len(load_test(dataset, root).labels) == {"mnist": 100, "cifar10": 30}[dataset]
    assert torch.equal(train.pixels.flatten(1), torch.from_numpy(numbered(200, 3072)))


# Splits


@pytest.mark.parametrize("validation", [0.1, 0.15, 0.5])
def test_a_split_is_disjoint_complete_and_stratified(mnist, validation):
    split = load_training(DataConfig(dataset="mnist", validation=validation), mnist[0])
    assert sorted(places(split.train) + places(split.validation)) == [*range(400)]
    assert split.validation.labels.bincount().tolist() == [400 * validation / 10] * 10


def test_without_validation_all_images_are_trained_on(mnist):
    split = load_training(DataConfig(dataset="mnist", validation=0), mnist[0])
    assert (len(split.train.labels), len(split.validation.labels)) == (400, 0)


def test_a_split_depends_on_its_seed_alone(mnist):
    splits = [load_training(DataConfig(dataset="mnist", split_seed=seed), mnist[0]) for seed in (0, 0, 1)]
    assert places(splits[0].validation) == places(splits[1].validation) != places(splits[2].validation)
    assert splits[0].split_digest == splits[1].split_digest != splits[2].split_digest
    augmented = load_training(DataConfig(dataset="mnist", augment="rand", mixup=1, train_limit=50), mnist[0])
    assert augmented.split_digest == splits[0].split_digest
    assert len({split.digest for split in splits}) == 1


@pytest.mark.parametrize("limit", [10, 50, 300])
def test_a_train_limit_takes_a_stratified_part_and_leaves_validation_alone(mnist, limit):
    whole, part = (
        load_training(DataConfig(dataset="mnist", validation=0.2, train_limit=x), mnist[0]) for x in (None, limit)
    )
    assert places(part.validation) == places(whole.validation)
    assert len({*places(part.train)} & {*places(whole.train)}) == len(part.train.labels) == limit
    assert part.train.labels.bincount().tolist() == [limit // 10] * 10


def test_a_train_limit_beyond_the_data_is_none(mnist):
    split = load_training(DataConfig(dataset="mnist", train_limit=10**6), mnist[0])
    assert len(split.train.labels) == 360


DIGESTS = {
    "digits": (
        "cf523fcf146ab6c4a2fc65ac83b5a8f7bbca3d816b439954e27c285d3462cf27",
        "292becf10e12e92cee7cc839935c7a66d4a7bc7c4e283d5cb767e25c435fa70e",
    ),
    "mnist": (
        "d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c",
        "e36371dbccd914272d44e6f7c0a4c7d8ac6336082e278dc4224ae9cb246d2764",
    ),
    "cifar10": (
        "973ef2abb5897efc795681a4d79a6f5f642fa2bcb1a828f7476017c89db53a57",
        "481cb67ad1926e38d014460e74bbe2fb41cccdb80e4d566fc0567d4bdd10bca9",
    ),
}


def test_data_and_splits_are_the_same_everywhere_and_for_ever(dataset):
    split = load_training(DataConfig(dataset=dataset))
    assert (split.digest, split.split_digest) == DIGESTS[dataset]
    assert split.digest == DATASETS[dataset].sha256, "what a trial is tagged with"


@pytest.mark.parametrize("batch", [1, 64, 100, 1000])
def test_an_epoch_takes_each_image_once_in_an_order_of_its_own(batch):
    orders = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, again, other = ([*batches(100, batch, order)] for order in orders)
    assert sorted(torch.cat(first).tolist()) == [*range(100)]
    assert {len(rows) for rows in first[:-1]} <= {batch} and len(first[-1]) == (100 % batch or min(batch, 100))
    assert torch.cat(first).tolist() == torch.cat(again).tolist() != torch.cat(other).tolist()


# The test part stays closed


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_training_reads_nothing_of_the_test_part(dataset, request, monkeypatch, tmp_path):
    root, folder = request.getfixturevalue(dataset)
    for path in folder.iterdir():
        if path.name.startswith(("t10k", "test")):
            path.write_bytes(b"neither images nor labels")
    publish(monkeypatch, folder)
    config = defaults("relu_general", dataset).replace(TINY | {"data.train_limit": 30, "train.epochs": 1})
    trial = Trial(config, tmp_path / "trial", data_dir=root)
    trial.epoch()
    assert "val/accuracy" in trial.finish()
    with pytest.raises((OSError, pickle.UnpicklingError)):
        load_test(dataset, root)


def test_the_test_part_of_digits_depends_on_nothing(monkeypatch):
    before = load_test("digits")
    for seed in (0, 1):
        load_training(DataConfig(dataset="digits", split_seed=seed, validation=0.3, train_limit=100))
    assert torch.equal(before.pixels, load_test("digits").pixels)


# Where files lie


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
@pytest.mark.parametrize("nested", [True, False])
def test_both_layouts_are_found(dataset, nested, request):
    root, _ = request.getfixturevalue(dataset)
    root = root if nested else root / dataset
    assert missing_files(dataset, root) == []
    assert len(load_training(DataConfig(dataset=dataset), root).train.labels) == {"mnist": 360, "cifar10": 180}[dataset]


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
@pytest.mark.parametrize("up", [0, 1])
def test_the_files_own_folder_is_found(dataset, up, request):
    _, folder = request.getfixturevalue(dataset)
    root = [folder, folder.parent][up]
    prepare(dataset, root)
    assert len(load_training(DataConfig(dataset=dataset), root).train.labels) == {"mnist": 360, "cifar10": 180}[dataset]


@pytest.mark.parametrize("dot", [".", "-"])
@pytest.mark.parametrize("own", [True, False])
def test_unpacked_files_of_mnist_are_checked_and_read(mnist, monkeypatch, own, dot):
    root, folder = mnist
    packed = load_training(DataConfig(dataset="mnist"), root)
    sums = {}
    for path in sorted(folder.iterdir()):
        content = gzip.decompress(path.read_bytes())
        sums[path.stem] = hashlib.md5(content).hexdigest()
        path.with_name(path.stem.replace("-idx", f"{dot}idx")).write_bytes(content)
        path.unlink()
    monkeypatch.setattr(download, "UNPACKED", sums)
    given = folder if own else root / "mnist"
    found = load_training(DataConfig(dataset="mnist"), given)
    assert found.digest == packed.digest and torch.equal(found.train.pixels, packed.train.pixels)
    victim = max(folder.iterdir())
    victim.write_bytes(b"other")
    assert str(victim) in refusal(prepare, "mnist", given)


@real
def test_the_sums_of_unpacked_files_are_those_of_the_published_ones():
    folder = Path(REAL) / "mnist/MNIST/raw"
    for name, expected in download.UNPACKED.items():
        assert hashlib.md5(gzip.decompress((folder / f"{name}.gz").read_bytes())).hexdigest() == expected


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_reading_leaves_the_folder_as_it_is(dataset, request):
    root, _ = request.getfixturevalue(dataset)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    load_training(DataConfig(dataset=dataset), root)
    load_test(dataset, root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_folder_is_the_one_given_else_that_of_the_environment_else_data(monkeypatch):
    monkeypatch.setenv("ERPE_DATA", "/elsewhere")
    assert find_data_dir("~/x") == Path.home() / "x"
    assert find_data_dir(None) == Path("/elsewhere")
    monkeypatch.delenv("ERPE_DATA")
    assert find_data_dir(None) == Path("data")
    assert "--data-dir names another" in refusal(find_data_dir, "~nobody-of-that-name")


# Wrong files


def damage(path, how):
    content = path.read_bytes()
    path.unlink()  # it may be a link to the real one
    if how == "folder":
        path.mkdir()
    else:
        path.write_bytes({"truncated": content[:-1], "altered": content[:-1] + b"?", "empty": b""}[how])


def link(source, target):
    """A folder of links to real files, of which one can be damaged."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    return target


@pytest.mark.parametrize("how", ["truncated", "altered", "empty", "folder"])
@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_a_damaged_file_is_refused_with_its_name_and_expected_sum(dataset, how, request):
    root, folder = request.getfixturevalue(dataset)
    for path in sorted(folder.iterdir()):
        shutil.copy(path, root)
        expected = hashlib.md5(path.read_bytes()).hexdigest()
        damage(path, how)
        for text in (refusal(prepare, dataset, root), refusal(load_training, DataConfig(dataset=dataset), root)):
            assert str(path) in text and expected in text
        path.rmdir() if how == "folder" else path.unlink()
        shutil.move(root / path.name, path)


@real
@pytest.mark.parametrize(
    ("name", "md5"),
    [
        ("mnist/MNIST/raw/train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        ("mnist/MNIST/raw/t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        ("cifar10/cifar-10-batches-py/data_batch_1", "c99cafc152244af753f735de768cd75f"),
    ],
)
def test_a_real_file_that_is_cut_off_is_refused_with_its_published_sum(name, md5, tmp_path):
    folder = link((Path(REAL) / name).parent, (tmp_path / name).parent)
    damage(tmp_path / name, "truncated")
    text = refusal(load_training, DataConfig(dataset=name.split("/")[0]), tmp_path)
    assert str(folder / Path(name).name) in text and f"expected {md5}" in text and "delete it" in text


# Missing files


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_missing_files_without_network_are_one_line_that_says_what_would_do(dataset, offline, tmp_path):
    text = refusal(load_training, DataConfig(dataset=dataset), tmp_path / "nowhere")
    names = missing_files(dataset, tmp_path / "nowhere")
    assert len(names) == {"mnist": 4, "cifar10": 7}[dataset]
    assert all(name in text for name in [*names, str(tmp_path / "nowhere"), "--data-dir", "--dataset digits"])
    assert not re.search(r"Traceback|File \"", text)
    assert not (tmp_path / "nowhere").exists(), "nothing is made but what is downloaded"


def test_one_missing_file_is_named_alone(mnist, offline):
    root, folder = mnist
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    text = refusal(load_training, DataConfig(dataset="mnist"), root)
    assert text.startswith(f"mnist: t10k-labels-idx1-ubyte.gz not in {folder}")


def test_digits_need_no_file_and_no_network(offline, tmp_path):
    assert missing_files("digits", tmp_path / "nowhere") == []
    assert len(load_training(DataConfig(dataset="digits"), tmp_path / "nowhere").train.labels) == 1293


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision().datasets.MNIST, "mirrors", [address])
        assert "no download (timed out)" in refusal(load_training, DataConfig(dataset="mnist"), tmp_path)
    assert socket.getdefaulttimeout() is None


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder that stands for the server of MNIST."""
    served = tmp_path / "served"
    served.mkdir()
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=served)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(torchvision().datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield served
        server.shutdown()


def test_what_is_verified_is_what_torchvision_downloads():
    known = torchvision().datasets
    assert download.MD5["mnist"] == dict(known.MNIST.resources)
    parts = dict([*known.CIFAR10.train_list, *known.CIFAR10.test_list])
    assert download.MD5["cifar10"] == parts | {known.CIFAR10.meta["filename"]: known.CIFAR10.meta["md5"]}
    parts = dict([*known.CIFAR100.train_list, *known.CIFAR100.test_list])
    assert download.MD5["cifar100"] == parts | {known.CIFAR100.meta["filename"]: known.CIFAR100.meta["md5"]}
    assert download.MD5["fashion_mnist"] == dict(known.FashionMNIST.resources)
    assert download.MD5["kmnist"] == dict(known.KMNIST.resources)
    assert download.MD5["svhn"] == {name: md5 for _, name, md5 in map(known.SVHN.split_list.get, ("train", "test"))}


def test_missing_files_are_downloaded_and_verified(mirror, monkeypatch, tmp_path):
    write_mnist(mirror, "train", 400)
    write_mnist(mirror, "t10k", 100)
    publish(monkeypatch, mirror)
    split = load_training(DataConfig(dataset="mnist"), tmp_path / "new")
    assert len(split.train.labels) == 360
    assert missing_files("mnist", tmp_path / "new") == []


def test_a_download_of_something_else_is_refused(mirror, monkeypatch, tmp_path):
    write_mnist(mirror, "train", 400)
    write_mnist(mirror, "t10k", 100)
    publish(monkeypatch, mirror)
    for path in mirror.iterdir():
        path.write_text("<html>Please log in</html>")
    for _ in range(2):
        assert str(tmp_path / "new") in refusal(load_training, DataConfig(dataset="mnist"), tmp_path / "new")


def test_a_folder_that_cannot_be_made_is_one_line(offline, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file: is a file; --data-dir names the folder" in refusal(
        load_training, DataConfig(dataset="mnist"), tmp_path / "file"
    )
    assert "no download ([Errno" in refusal(load_training, DataConfig(dataset="mnist"), tmp_path / "file/data")


@pytest.mark.slow
def test_a_worker_has_its_images_without_torchvision():
    datasets = ["digits", "mnist", "cifar10"] if REAL else ["digits"]
    script = f"""
import sys
from erpe.training.download import prepare
for name in {datasets!r}:
    prepare(name)
print("torch" in sys.modules)
import erpe.training.trial
from erpe.config import DataConfig
from erpe.training.data import load_training
for name in {datasets!r}:
    load_training(DataConfig(dataset=name))
print("torchvision" in sys.modules)
"""
    told = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert told == "False\nFalse\n"
