"""FashionMNIST, whole or as the small real subset that ships with the package, and three sets without a download."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CLASSES = 10
FOLDER_VARIABLE = "HESSINIT_DATA"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MINI = Path(__file__).with_name("fashion_mnist_mini.npz")
NAMES = ("auto", "fashion_mnist", "fashion_mnist_mini")  # of images; SMALL has the others
CHARACTERS = 32  # a text

# IDX files with the shapes and the SHA-256 of their uncompressed bytes (Xiao, Rasul, Vollgraf 2017).
FILES = {
    "train-images-idx3-ubyte": ((60000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": ((60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": ((10000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": ((10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}

Samples = tuple[npt.NDArray[Any], npt.NDArray[Any]]
Raw = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True)
class Dataset:
    """Inputs as rows: float32 with the mean of the train rows subtracted, or characters as int64.

    Args:
        name: what was loaded.
        source: where from.
        x_train: shape (N, pixels), (N, features) or (N, characters).
        y_train: labels 0 … outputs - 1, int64 of shape (N,), or (N, characters) for texts; numbers, float32 of shape
            (N, outputs), for regression.
        x_test: as x_train, M rows.
        y_test: as y_train, M rows.
        outputs: of a net for it.
    """

    name: str
    source: str
    x_train: npt.NDArray[Any]
    y_train: npt.NDArray[Any]
    x_test: npt.NDArray[Any]
    y_test: npt.NDArray[Any]
    outputs: int = CLASSES

    @property
    def loss(self) -> str:
        """``"cross_entropy"`` or, for regression, ``"mse"``."""
        return "mse" if np.issubdtype(self.y_train.dtype, np.floating) else "cross_entropy"

    def first(self, samples: int) -> Dataset:
        """With the first train samples alone."""
        return replace(self, x_train=self.x_train[:samples], y_train=self.y_train[:samples])

    def split(self, validation: int) -> tuple[Dataset, Samples]:
        """Without some train samples, of this number, and these: drawn once, whatever the run's seed.

        Raises:
            ValueError: none would be left.
        """
        left = len(self.x_train) - validation
        if not 0 < left <= len(self.x_train):
            raise ValueError(
                f"compare: validation must leave samples to train on; got {validation} of {len(self.x_train)}."
            )
        order = np.random.default_rng(0).permutation(len(self.x_train))
        kept, held = np.sort(order[:left]), np.sort(order[left:])
        rest = replace(self, x_train=self.x_train[kept], y_train=self.y_train[kept])
        return rest, (self.x_train[held], self.y_train[held])


def load(name: str = "auto") -> Dataset:
    """A dataset, preprocessed as in the original study: divided by 255, per-pixel train mean subtracted.

    Args:
        name: ``"fashion_mnist"``: the full set, from the folder ``$HESSINIT_DATA``, the folder of Debian's package
            dataset-fashion-mnist, Keras's cache, or a download through ``keras.datasets``, in this order.
            ``"fashion_mnist_mini"``: 6,000 train and 1,000 test images of it, class-balanced, shipped with the package.
            ``"auto"``: the full set where it is on disk, else the subset. Or the path of an ``.npz`` file with arrays
            ``x_train, y_train, x_test, y_test``, pixels from 0 to 255. ``"digits"``: scikit-learn's 8×8 images;
            ``"friedman"``: its regression set ``make_friedman1`` of 4,000 + 1,000 samples, ten features; ``"topics"``:
            texts of 32 characters from the help pages that ship with Python.

    Raises:
        ValueError: unknown name; data that is not finite, has other shapes, a wrong checksum, or labels outside 0 … 9.
        FileNotFoundError: the full set cannot be had; the message names all four ways.
    """
    if name == "auto":
        found = next(_on_disk(), None)
        return _preprocess("fashion_mnist", *found) if found else load("fashion_mnist_mini")
    if name == "fashion_mnist":
        return _preprocess(name, *_full())
    if name == "fashion_mnist_mini":
        return _preprocess(name, read_npz(MINI), "the package")
    if name.endswith(".npz"):
        return _preprocess(Path(name).stem, read_npz(Path(name)), name)
    if name in SMALL:
        return SMALL[name]()
    raise ValueError(
        f"load: dataset must be one of {', '.join([*NAMES, *SMALL])}, or the path of an .npz file; got {name!r}."
    )


def _full() -> tuple[Raw, str]:
    tried = []
    try:
        for found in _on_disk():
            return found
        from keras import datasets

        (x_train, y_train), (x_test, y_test) = datasets.fashion_mnist.load_data()
        return (x_train, y_train, x_test, y_test), "keras.datasets"
    except ValueError:  # a file that is there and wrong
        raise
    except Exception as error:  # no Keras, no network, no disk, ...
        tried.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise FileNotFoundError(
        f"load: fashion_mnist was not found. Put its four IDX files into a folder and set {FOLDER_VARIABLE} to it, or "
        "apt-get install dataset-fashion-mnist, or put them into Keras's cache (~/.keras/datasets/fashion-mnist), or "
        f"let keras.datasets download it (which failed: {tried[0]}). The subset fashion_mnist_mini needs none of these."
    )


def _on_disk() -> Iterator[tuple[Raw, str]]:
    """The full set from each folder that holds it."""
    named = os.environ.get(FOLDER_VARIABLE)
    keras_home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    for folder in ([Path(named)] if named else []) + [DEBIAN_FOLDER, keras_home / "datasets" / "fashion-mnist"]:
        paths = [next((p for p in (folder / f"{f}.gz", folder / f) if p.is_file()), None) for f in FILES]
        if all(paths):
            x_train, y_train, x_test, y_test = (_read_idx(p) for p in paths if p is not None)
            yield (x_train, y_train, x_test, y_test), str(folder)
        elif named and folder == Path(named):
            raise ValueError(
                f"load: {FOLDER_VARIABLE} must be a folder with {', '.join(FILES)} (.gz or not); got {named}."
            )


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    shape, checksum = FILES[path.name.removesuffix(".gz")]
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"load: {path} must be a whole IDX file; {error}.") from error
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(f"load: {path} must be FashionMNIST's own file; its checksum is another.")
    header = 4 + 4 * len(shape)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_npz(path: Path) -> Raw:
    """The four arrays of an ``.npz`` file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["x_train"], file["y_train"], file["x_test"], file["y_test"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"load: {path} must be an .npz file of x_train, y_train, x_test, y_test; {error}.") from error


def _preprocess(name: str, raw: Raw, source: str) -> Dataset:
    x_train, y_train, x_test, y_test = raw
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.ndim < 2 or y.shape != (len(x),) or len(x) == 0:
            raise ValueError(f"load: {part} data of {name} must have one label an image; got {x.shape}, {y.shape}.")
        if not np.isfinite(x).all():
            raise ValueError(f"load: {part} images of {name} must be finite; got NaN or infinity.")
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= CLASSES:
            raise ValueError(
                f"load: {part} labels of {name} must be integers 0 … {CLASSES - 1}; got {y.dtype} in "
                f"[{y.min()}, {y.max()}]."
            )
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"load: images of {name} must have one shape; got {x_train.shape[1:]}, {x_test.shape[1:]}.")
    flat_train, flat_test = (x.reshape(len(x), -1).astype(np.float32) / np.float32(255) for x in (x_train, x_test))
    mean = flat_train.mean(axis=0, dtype=np.float64).astype(np.float32)
    return Dataset(name, source, flat_train - mean, y_train.astype(np.int64), flat_test - mean, y_test.astype(np.int64))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(x))
    x, y = x[rows].astype(np.float32) / np.float32(16), y[rows].astype(np.int64)
    x -= x[:1437].mean(axis=0)
    return Dataset("digits", "scikit-learn", x[:1437], y[:1437], x[1437:], y[1437:])


def _friedman() -> Dataset:
    """Friedman (1991), with features and targets of mean 0 and variance 1."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(5000, 10, noise=0.5, random_state=0)
    x, y = (x - 0.5) * 12**0.5, (y - y[:4000].mean()) / y[:4000].std()
    x, y = x.astype(np.float32), y.astype(np.float32)[:, None]
    return Dataset("friedman", "scikit-learn", x[:4000], y[:4000], x[4000:], y[4000:], outputs=1)


def _topics() -> Dataset:
    """Every character's label is the next one; the last tenth of the texts is the test set."""
    from pydoc_data.topics import topics

    text = " ".join(topics[key] for key in sorted(topics))
    characters = sorted(set(text))
    codes = np.searchsorted(characters, list(text)).astype(np.int64)
    count = (len(codes) - 1) // CHARACTERS
    x, y = (codes[start : start + count * CHARACTERS].reshape(count, CHARACTERS) for start in (0, 1))
    last = count - count // 10
    return Dataset("topics", "pydoc_data", x[:last], y[:last], x[last:], y[last:], outputs=len(characters))


SMALL = {"digits": _digits, "friedman": _friedman, "topics": _topics}
