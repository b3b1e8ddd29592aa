import gzip

import numpy as np
import pytest

from hessinit.experiments import data, make_mini

FULL = next(data._on_disk(), None)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No full set on disk and no download."""
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.delenv("HESSINIT_DATA", raising=False)
    return tmp_path


@pytest.fixture
def small_files(monkeypatch, nowhere):
    """Four IDX files of 20 and 10 images with the right checksums, and their folder."""
    rng = np.random.default_rng(0)
    folder, files = nowhere / "idx", {}
    folder.mkdir()
    for name, (shape, _) in data.FILES.items():
        count = 20 if name.startswith("train") else 10
        array = rng.integers(0, 256 if len(shape) == 3 else 10, (count, *shape[1:])).astype(np.uint8)
        content = bytes(4 + 4 * len(shape)) + array.tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        files[name] = (array.shape, data.hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data, "FILES", files)
    return folder


def test_mini_is_class_balanced_and_preprocessed():
    mini = data.load("fashion_mnist_mini")
    assert (mini.x_train.shape, mini.x_test.shape) == ((6000, 784), (1000, 784))
    assert np.bincount(mini.y_train).tolist() == [600] * 10
    assert np.bincount(mini.y_test).tolist() == [100] * 10
    assert mini.x_train.dtype == np.float32
    assert np.abs(mini.x_train.mean(0)).max() < 1e-6
    assert np.ptp(mini.x_train) <= 2
    raw = data.read_npz(data.MINI)
    mean = raw[0].reshape(6000, -1).mean(0) / 255
    assert np.allclose(mini.x_test, raw[2].reshape(1000, -1) / 255 - mean, rtol=0, atol=1e-6)


def test_mini_is_under_four_megabytes():
    assert data.MINI.stat().st_size < 4_000_000


def test_the_script_takes_the_first_of_each_class(tmp_path, monkeypatch):
    labels = np.array([0, 1] * 700 + list(range(2, 10)) * 700)
    images = np.arange(len(labels)).reshape(-1, 1, 1)
    monkeypatch.setattr(make_mini, "_full", lambda: ((images, labels, images, labels), ""))
    make_mini.make(tmp_path / "one.npz")
    make_mini.make(tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    x_train, y_train, _, y_test = data.read_npz(tmp_path / "one.npz")
    assert np.bincount(y_train).tolist() == [600] * 10
    assert np.bincount(y_test).tolist() == [100] * 10
    assert x_train[:4].ravel().tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(FULL is None, reason="the full set is not on disk")
def test_mini_is_part_of_the_full_set(tmp_path):
    make_mini.make(tmp_path / "again.npz")
    for ours, made in zip(data.read_npz(data.MINI), data.read_npz(tmp_path / "again.npz"), strict=True):
        assert np.array_equal(ours, made)
    full = data.load("fashion_mnist")
    assert full.x_train.shape == (60000, 784)
    assert np.bincount(full.y_test).tolist() == [1000] * 10


def test_auto_takes_the_full_set_where_it_is_and_says_which(small_files, monkeypatch):
    assert data.load("auto").name == "fashion_mnist_mini"
    monkeypatch.setenv("HESSINIT_DATA", str(small_files))
    found = data.load("auto")
    assert (found.name, found.source, len(found.x_train)) == ("fashion_mnist", str(small_files), 20)


def test_folders_are_searched_in_order(small_files, monkeypatch, nowhere):
    cache = nowhere / "keras" / "datasets" / "fashion-mnist"
    cache.parent.mkdir(parents=True)
    small_files.rename(cache)
    assert data.load("fashion_mnist").source == str(cache)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", cache)
    (nowhere / "plain").mkdir()
    for name in data.FILES:  # uncompressed files do as well
        (nowhere / "plain" / name).write_bytes(gzip.decompress((cache / f"{name}.gz").read_bytes()))
    monkeypatch.setenv("HESSINIT_DATA", str(nowhere / "plain"))
    assert data.load("fashion_mnist").source == str(nowhere / "plain")


def test_download_is_the_last_way(small_files, monkeypatch):
    from keras import datasets

    raw = data.read_npz(data.MINI)
    monkeypatch.setattr(datasets.fashion_mnist, "load_data", lambda: (raw[:2], raw[2:]))
    assert data.load("fashion_mnist").source == "keras.datasets"


def test_one_error_names_all_four_ways(nowhere, monkeypatch):
    from keras import datasets

    def fails():
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(datasets.fashion_mnist, "load_data", fails)
    with pytest.raises(FileNotFoundError) as raised:
        data.load("fashion_mnist")
    for way in ("HESSINIT_DATA", "dataset-fashion-mnist", ".keras/datasets", "keras.datasets", "no route to host"):
        assert way in str(raised.value)


def test_damaged_files_are_refused(small_files, monkeypatch):
    monkeypatch.setenv("HESSINIT_DATA", str(small_files))
    labels = small_files / "train-labels-idx1-ubyte.gz"
    content = gzip.decompress(labels.read_bytes())
    labels.write_bytes(gzip.compress(content[:-1] + b"\x07"))
    with pytest.raises(ValueError, match="checksum is another"):
        data.load("fashion_mnist")
    labels.write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(ValueError, match="must be a whole IDX file"):
        data.load("auto")
    labels.unlink()
    with pytest.raises(ValueError, match="HESSINIT_DATA must be a folder with train-images"):
        data.load("auto")


def arrays(**changed):
    x, y = np.full((10, 4, 4), 3.0), np.arange(10)
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_train": np.full((10, 4, 4), np.nan)}, "train images of own must be finite"),
        ({"y_test": np.arange(10) + 1}, r"test labels of own must be integers 0 … 9; got int64 in \[1, 10\]"),
        ({"y_train": np.arange(10) - 1}, r"in \[-1, 8\]"),
        ({"y_train": np.linspace(0, 1, 10)}, "got float64"),
        ({"y_train": np.arange(9)}, "one label an image"),
        ({"x_train": np.zeros((0, 4, 4)), "y_train": np.arange(0)}, "one label an image"),
        ({"x_test": np.zeros((10, 5, 5))}, "images of own must have one shape"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, changed, message):
    np.savez(tmp_path / "own.npz", **arrays(**changed))
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "own.npz"))


def test_own_arrays_files_and_names(tmp_path):
    np.savez(tmp_path / "own.npz", **arrays())
    assert data.load(str(tmp_path / "own.npz")).x_train.shape == (10, 16)
    np.savez(tmp_path / "part.npz", x_train=np.zeros(3))
    for path in ("part.npz", "none.npz"):
        with pytest.raises(ValueError, match="must be an .npz file of x_train, y_train"):
            data.load(str(tmp_path / path))
    with pytest.raises(ValueError, match="dataset must be one of auto, fashion_mnist, .*; got 'mnist'"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "loss"),
    [("digits", 64, 10, "cross_entropy"), ("friedman", 10, 1, "mse"), ("topics", 32, None, "cross_entropy")],
)
def test_small_sets_need_no_download(name, inputs, outputs, loss):
    found = data.load(name)
    assert found.x_train.shape[1] == found.x_test.shape[1] == inputs
    assert found.loss == loss
    assert outputs in (found.outputs, None)
    if loss == "mse":
        assert found.y_train.shape == (len(found.x_train), 1)
        assert abs(found.y_train.mean()) < 1e-6
        assert found.y_train.std() == pytest.approx(1, rel=1e-5)
    else:
        assert sorted(np.unique(found.y_train)) == list(range(found.outputs)) or name == "topics"
        assert found.y_train.max() < found.outputs
    assert np.array_equal(data.load(name).x_train, found.x_train)


def test_every_character_of_a_text_is_labelled_with_the_next():
    texts = data.load("topics")
    assert np.array_equal(texts.x_train[:, 1:], texts.y_train[:, :-1])
    assert np.array_equal(texts.x_train[1:, 0], texts.y_train[:-1, -1])
    assert texts.x_train.max() < texts.outputs < 200
