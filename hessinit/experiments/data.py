"""FashionMNIST, whole or as the small real subset that ships with the package."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CLASSES = 10
FOLDER_VARIABLE = "HESSINIT_DATA"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MINI = Path(__file__).with_name("fashion_mnist_mini.npz")
NAMES = ("auto", "fashion_mnist", "fashion_mnist_mini")

# IDX files with the shapes and the SHA-256 of their uncompressed bytes (Xiao, Rasul, Vollgraf 2017).
FILES = {
    "train-images-idx3-ubyte": ((60000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": ((60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": ((10000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": ((10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}

Raw = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True)
class Dataset:
    """Images as float32 rows with the per-pixel mean of the train images subtracted, labels as int64.

    Args:
        name: what was loaded.
        source: where from.
        x_train: shape (N, pixels).
        y_train: shape (N,), labels 0 … 9.
        x_test: shape (M, pixels).
        y_test: shape (M,).
    """

    name: str
    source: str
    x_train: npt.NDArray[np.float32]
    y_train: npt.NDArray[np.int64]
    x_test: npt.NDArray[np.float32]
    y_test: npt.NDArray[np.int64]


def load(name: str = "auto") -> Dataset:
    """A dataset, preprocessed as in the original study: divided by 255, per-pixel train mean subtracted.

    Args:
        name: ``"fashion_mnist"``: the full set, from the folder ``$HESSINIT_DATA``, the folder of Debian's package
            dataset-fashion-mnist, Keras's cache, or a download through ``keras.datasets``, in this order.
            ``"fashion_mnist_mini"``: 6,000 train and 1,000 test images of it, class-balanced, shipped with the package.
            ``"auto"``: the full set where it is on disk, else the subset. Or the path of an ``.npz`` file with arrays
            ``x_train, y_train, x_test, y_test``, pixels from 0 to 255.

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
    raise ValueError(f"load: dataset must be one of {', '.join(NAMES)}, or the path of an .npz file; got {name!r}.")


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
