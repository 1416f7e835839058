"""The files of published data sets: where they lie, whether they are unaltered, how they get there.

Without torch: a driver that looks whether all is there starts sooner.
"""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path
from textwrap import shorten

from erpe.errors import DataError

PATIENCE_S = 30.0
"""How long a download may stand still."""

MD5 = {
    "digits": {},
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "cifar10": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "kmnist": {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    },
    "cifar100": {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
    "svhn": {
        "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
        "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    },
}
"""Of each data set's files, as torchvision knows them; digits have none, for scikit-learn brings them."""

UNPACKED = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""MD5 of MNIST's files without their gzip."""

LAYOUT = {
    "mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "digits": "", "fashion_mnist": "FashionMNIST/raw",
    "kmnist": "KMNIST/raw", "cifar100": "cifar-100-python", "svhn": "svhn",
}  # fmt: skip
"""Where torchvision puts the files, below what it calls root."""


def find_data_dir(data_dir: str | Path | None) -> Path:
    """Return the folder given, else `ERPE_DATA`, else `data` here.

    Raises:
        DataError: it is a file, or begins with the home of a user that there is not.
    """
    given = data_dir or os.environ.get("ERPE_DATA") or "data"
    try:
        root = Path(given).expanduser()
    except RuntimeError as error:
        raise DataError(f"data folder {given}: no such place ({error}); --data-dir names another") from None
    if root.exists() and not root.is_dir():
        raise DataError(f"data folder {given}: is a file; --data-dir names the folder that holds the data sets")
    return root


TORCHVISION = {
    "mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100",
    "svhn": "SVHN",
}  # fmt: skip
"""Its class of each data set."""


def prepare(dataset: str, data_dir: str | Path | None = None) -> None:
    """Make sure that every file of the data set is there and unaltered; download what is missing.

    Raises:
        DataError: a file is missing and cannot be downloaded, or is not the published one.
    """
    root = find_data_dir(data_dir)
    if missing_files(dataset, root):
        _download(dataset, root)
    folder = folder_of(dataset, root)
    for name, packed in MD5[dataset].items():
        path = find_file(folder, name, dataset)
        expected = packed if path.name == name else UNPACKED[name.removesuffix(".gz")]
        try:
            found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}), expected MD5 {expected}") from None
        if found != expected:
            raise DataError(f"{path}: MD5 is {found}, expected {expected}; delete it to download it again")


def missing_files(dataset: str, root: Path) -> list[str]:
    """Names of the data set's files that are not below `root`; none for digits."""
    folder = folder_of(dataset, root)
    return sorted(name for name in MD5[dataset] if not find_file(folder, name, dataset).exists())


def folder_of(dataset: str, root: Path) -> Path:
    """Find the folder with most of the data set's files; without any, the one they are downloaded to.

    It is `root` itself, a part of torchvision's layout below `root`, or the same below `root/mnist`, `root/cifar10`.
    """
    layout = LAYOUT[dataset]
    below = [layout, Path(layout).name, ""]
    folders = [base / part for base in (root / dataset, root) for part in below]
    if dataset in ("fashion_mnist", "kmnist"):  # their files are called as MNIST's: the folder's name tells them apart
        folders = [each for each in folders if {dataset, layout.partition("/")[0]} & set(each.absolute().parts)]
    there = [sum(find_file(folder, name, dataset).exists() for name in MD5[dataset]) for folder in folders]
    if any(there):
        return folders[there.index(max(there))]
    return folders[0] if folders[0].exists() else root / layout


def find_file(folder: Path, name: str, dataset: str) -> Path:
    """Find a file as it was published; or, of MNIST, without its gzip, `.idx3` or `-idx3` in its name."""
    plain = name.removesuffix(".gz")
    names = [name, plain, plain.replace("-idx", ".idx")] if dataset == "mnist" else [name]
    return next((folder / each for each in names if (folder / each).exists()), folder / name)


def _download(dataset: str, root: Path) -> None:
    from erpe.training.vision import torchvision

    folder = folder_of(dataset, root)
    if not folder.match(LAYOUT[dataset]):
        folder = root / LAYOUT[dataset]  # torchvision knows no other
    home = folder.parents[LAYOUT[dataset].count("/")] if dataset != "svhn" else folder  # what torchvision calls root
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)  # torchvision would wait for a silent server for ever
    try:
        known = torchvision().datasets
        home.mkdir(parents=True, exist_ok=True)
        for part in ({"split": "train"}, {"split": "test"}) if dataset == "svhn" else ({},):
            getattr(known, TORCHVISION[dataset])(home, download=True, **part)
    except (OSError, RuntimeError) as error:
        for each in made:
            with suppress(OSError):
                each.rmdir()  # if nothing has come
        names = ", ".join(missing_files(dataset, root))
        said = shorten(str(error), 120, placeholder=" ...") or type(error).__name__
        raise DataError(
            f"{dataset}: {names} not in {folder_of(dataset, root)}, and no download ({said}); "
            "put the files there, name their folder with --data-dir, or try --dataset digits"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
