"""Sources of private batches: what they give, in which order, and what is said when they cannot."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradleak.data import available, following, load
from gradleak.errors import DataError
from gradleak.observation import Truth
from gradleak.spec import DataSpec


def check(truth: Truth, batch: int, channels: int, size: int) -> None:
    assert truth.images.shape == (batch, channels, size, size)
    assert truth.images.dtype == torch.float32
    assert truth.images.is_contiguous()
    assert truth.images.min() >= 0
    assert truth.images.max() <= 1
    assert truth.labels.shape == (batch,)
    assert truth.labels.dtype == torch.int64
    assert len(truth.names) == batch


@pytest.mark.parametrize("size", [None, 8, 64])
def test_sample(size: int | None) -> None:
    truth = load(DataSpec(batch=32, size=size))
    check(truth, 32, 3, size or 32)
    assert truth.names[:9] == ("astronaut", "coffee", "chelsea", "rocket", "camera", "retina", "coins", "ihc", "astronaut")
    assert truth.labels.tolist() == list(range(8)) * 4


def test_sample_crops_differ_and_show_something() -> None:
    images = load(DataSpec(batch=32)).images
    assert images.std(dim=(1, 2, 3)).min() > 0.05
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 1e3 * torch.eye(32)
    assert distances.min() > 1


@pytest.mark.parametrize(("start", "batch"), [(0, 1), (3, 6), (31, 1)])
def test_start_and_batch_are_a_slice(start: int, batch: int) -> None:
    part, whole = load(DataSpec(start=start, batch=batch)), load(DataSpec(batch=32))
    assert torch.equal(part.images, whole.images[start : start + batch])
    assert torch.equal(part.labels, whole.labels[start : start + batch])
    assert part.names == whole.names[start : start + batch]


@pytest.mark.parametrize(("channels", "size"), [(3, None), (1, 8)])
def test_noise(channels: int, size: int | None) -> None:
    """Uniform on [0, 1], a function of index and seed alone, every class once in ten images."""
    spec = DataSpec(source="noise", batch=20, channels=channels, size=size, seed=3)
    truth = load(spec)
    check(truth, 20, channels, size or 32)
    assert abs(float(truth.images.mean()) - 1 / 2) < 0.02
    assert abs(float(truth.images.var()) - 1 / 12) < 0.01
    labels = truth.labels.tolist()
    assert sorted(labels[:10]) == list(range(10))
    assert labels[:10] == labels[10:]
    part = load(spec.model_copy(update={"start": 7, "batch": 2}))
    assert torch.equal(part.images, truth.images[7:9])
    assert part.labels.tolist() == labels[7:9]
    other = load(spec.model_copy(update={"seed": 4}))
    assert not torch.equal(other.images, truth.images)
    assert other.labels.tolist() != labels
    assert len(following(spec, 5)) == 5


def test_noise_is_bounded() -> None:
    with pytest.raises(DataError, match="bytes, at most"):
        load(DataSpec(source="noise", batch=10**9))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of two images, one colour per image, so that each is known again."""
    for index, name in enumerate(["cat", "dog", "eel"]):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            colour = (50 * index, 100 * number, 7)
            Image.new("RGB", (60, 40), colour).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def test_folder_is_sorted_by_path(folder: Path) -> None:
    truth = load(DataSpec(source=f"folder:{folder}", batch=6, size=16))
    check(truth, 6, 3, 16)
    assert truth.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert truth.names == ("cat/0", "cat/1", "dog/0", "dog/1", "eel/0", "eel/1")
    colours = (truth.images.mean(dim=(2, 3)) * 255).round().int().tolist()
    assert colours == [[50 * i, 100 * j, 7] for i in range(3) for j in range(2)]
    check(load(DataSpec(source=f"folder:{folder}", batch=1)), 1, 3, 224)


def test_a_shuffled_folder_holds_the_same_images(folder: Path) -> None:
    """Another order for each seed, the same one each time; a batch and its decoys never overlap."""
    spec = DataSpec(source=f"folder:{folder}", batch=6, size=8, order="shuffled", seed=1)
    names = load(spec).names
    assert sorted(names) == sorted(load(spec.model_copy(update={"order": "path"})).names) != list(names)
    assert names == load(spec).names != load(spec.model_copy(update={"seed": 2})).names
    half = spec.model_copy(update={"batch": 3})
    assert load(half).names + load(half.model_copy(update={"start": 3})).names == names


def test_folder_names_that_are_numbers_are_labels(folder: Path) -> None:
    for old, new in {"cat": "0007", "dog": "0040", "eel": "0999"}.items():
        (folder / old).rename(folder / new)
    truth = load(DataSpec(source=f"folder:{folder}", start=1, batch=4, size=8))
    assert truth.labels.tolist() == [7, 40, 40, 999]
    assert truth.names == ("1", "0", "1", "0")


def test_the_crop_is_central_and_keeps_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 26, 3), dtype=np.uint8)
    (tmp_path / "class").mkdir()
    Image.fromarray(pixels).save(tmp_path / "class" / "a.png")
    np.savez(tmp_path / "a.npz", x=pixels[None], y=[0])
    expected = torch.from_numpy(pixels[:, 3:23]).permute(2, 0, 1) / 255
    for source in (f"folder:{tmp_path}", f"npz:{tmp_path / 'a.npz'}"):
        torch.testing.assert_close(load(DataSpec(source=source, batch=1, size=20)).images[0], expected)


def test_folder_decodes_only_what_is_asked_for(folder: Path) -> None:
    (folder / "eel" / "1.png").write_bytes(b"damaged")
    load(DataSpec(source=f"folder:{folder}", batch=5, size=8))
    with pytest.raises(DataError, match=r"1\.png: not a readable image"):
        load(DataSpec(source=f"folder:{folder}", batch=6, size=8))


def test_truncated_and_deep_images_are_refused(folder: Path) -> None:
    photo = folder / "cat" / "0.png"
    photo.write_bytes(photo.read_bytes()[:60])
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        load(DataSpec(source=f"folder:{folder}", batch=1))
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(photo)
    with pytest.raises(DataError, match="more than 8 bits"):
        load(DataSpec(source=f"folder:{folder}", batch=1))


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load(DataSpec(source=f"folder:{tmp_path / 'none'}"))
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    with pytest.raises(DataError, match=r"no images; expected .*<class>/<image>"):
        load(DataSpec(source=f"folder:{tmp_path}"))


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels")])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", ">f4"])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_layouts(tmp_path: Path, keys: tuple[str, str], channels_first: bool, dtype: str, compressed: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 10, 3), dtype=np.uint8)
    stored = pixels if dtype == "uint8" else (pixels / 255).astype(dtype)
    stored = np.ascontiguousarray(stored.transpose(0, 3, 1, 2)) if channels_first else stored
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "a.npz", **{keys[0]: stored, keys[1]: np.arange(9, dtype=np.uint8)})  # type: ignore[arg-type]
    truth = load(DataSpec(source=f"npz:{tmp_path / 'a.npz'}", start=4, batch=3))
    torch.testing.assert_close(truth.images, torch.from_numpy(pixels[4:7]).permute(0, 3, 1, 2) / 255)
    assert truth.images.dtype == torch.float32
    assert truth.labels.tolist() == [4, 5, 6]
    assert truth.names == ("4", "5", "6")


def test_npz_resizes(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((5, 20, 24, 1))
    np.savez(tmp_path / "a.npz", x=images, y=np.zeros(5, int))
    check(load(DataSpec(source=f"npz:{tmp_path / 'a.npz'}", batch=5, size=16)), 5, 1, 16)


GOOD = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": GOOD}, "no array 'y' or 'labels'; found: x"),
        ({"a": GOOD, "y": np.zeros(4, int)}, "no array 'x' or 'images'"),
        ({"x": GOOD, "y": np.zeros(3, int)}, "4 images but 3 labels"),
        ({"x": GOOD, "y": np.zeros(4, complex)}, "type complex128; expected integers or floats"),
        ({"x": GOOD, "y": np.full(4, np.inf)}, "targets must be finite"),
        ({"x": GOOD, "y": -np.ones(4, int)}, "labels must not be negative, found -1"),
        ({"x": GOOD[0], "y": np.zeros(8, int)}, r"shape \(8, 8, 3\); expected N x H x W x C"),
        ({"x": GOOD.astype(np.int32), "y": np.zeros(4, int)}, "type int32; expected uint8 or float"),
        ({"x": GOOD + 255.0, "y": np.zeros(4, int)}, r"must lie in \[0, 1\], found \[255.0, 255.0\]"),
        ({"x": GOOD + np.nan, "y": np.zeros(4, int)}, r"must lie in \[0, 1\]"),
        ({"x": np.asfortranarray(GOOD), "y": np.zeros(4, int)}, "Fortran order"),
        ({"x": np.array([{}] * 4, object).reshape(4, 1, 1, 1), "y": np.zeros(4, int)}, "type object"),
    ],
)
def test_npz_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=reason):
        load(DataSpec(source=f"npz:{tmp_path / 'a.npz'}", batch=2))


def member(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    """A .npy file that declares ``shape``, whatever it holds."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue() + content


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1 << 40, 1 << 20, 1 << 20, 3), "bytes, at most"),
        ((4, 100, 100, 3), "truncated"),
        ((4, -8, 8, 3), "shape"),
        ((-4, 8, 8, 3), "shape"),
    ],
)
def test_npz_declarations_are_checked_before_reading(tmp_path: Path, shape: tuple[int, ...], reason: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", member(shape, bytes(100)))
        archive.writestr("y.npy", member((4,), bytes(4)))
    with pytest.raises(DataError, match=reason):
        load(DataSpec(source=f"npz:{tmp_path / 'a.npz'}", batch=2))


def test_every_cut_of_an_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=GOOD, y=np.zeros(4, int))
    whole = (tmp_path / "whole.npz").read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.npz"):
            load(DataSpec(source=f"npz:{tmp_path / 'cut.npz'}", batch=4))


@pytest.mark.parametrize(
    ("source", "archive"),
    [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")],
)
def test_missing_cifar_says_where_to_put_it(tmp_path: Path, source: str, archive: str) -> None:
    with pytest.raises(DataError) as caught:
        load(DataSpec(source=source, root=tmp_path))
    assert all(part in str(caught.value) for part in (str(tmp_path), archive, "data.download = true", "npz:PATH"))


def test_cifar_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=str(tmp_path / "gradleak" / "cifar-10-batches-py")):
        load(DataSpec(source="cifar10"))


def test_more_images_than_there_are() -> None:
    with pytest.raises(DataError, match=r"sample has 32 images; data\.start \+ data\.batch = 33"):
        load(DataSpec(start=30, batch=3))


@pytest.mark.parametrize(("source", "meant"), [("cifra10", "cifar10"), ("folder", "folder:PATH"), ("npz:", "npz:PATH")])
def test_unknown_sources(source: str, meant: str) -> None:
    with pytest.raises(DataError, match=f"did you mean '{meant}'"):
        load(DataSpec(source=source))


def test_available_sources() -> None:
    assert list(available()) == ["sample", "noise", "cifar10", "cifar100", "folder:PATH", "npz:PATH"]


def test_first_cifar_images(shared: Path) -> None:
    truth = load(DataSpec(source=f"npz:{shared / 'data' / 'cifar10_train_first1024.npz'}", batch=16))
    check(truth, 16, 3, 32)
    assert truth.labels.tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3, 4, 7, 7, 2, 9, 9]


def test_imagenet_photographs(shared: Path) -> None:
    truth = load(DataSpec(source=f"folder:{shared / 'data' / 'imagenet40'}", batch=2, start=1, size=64))
    check(truth, 2, 3, 64)
    assert truth.labels.tolist() == [20, 43]


def test_following_images_are_those_after_the_batch() -> None:
    """As many as asked for, fewer at the end of the source, none beyond it."""
    spec = DataSpec(source="sample", batch=3, start=20, size=16)
    assert torch.equal(following(spec, 4), load(DataSpec(source="sample", batch=4, start=23, size=16)).images)
    assert torch.equal(following(spec, 100), load(DataSpec(source="sample", batch=9, start=23, size=16)).images)
    assert len(following(DataSpec(source="sample", batch=2, start=30, size=16), 5)) == 0
