"""Where the client's private batch comes from: embedded photographs, CIFAR, folders of images, arrays."""

from __future__ import annotations

import contextlib
import importlib.resources
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gradleak.archive import DAMAGE, open_archive, open_member
from gradleak.errors import DataError, nearest
from gradleak.files import open_regular
from gradleak.network import announce
from gradleak.observation import MAX_LABEL, Truth, check_labels
from gradleak.spec import DataSpec
from gradleak.targets import are_classes

if sys.version_info >= (3, 11):
    from importlib.resources.abc import Traversable
else:
    from importlib.abc import Traversable

Box = tuple[float, float, float]
"""A square of a photograph: (left, top, side) in units of the photograph's height."""

#: Photographs in the scikit-image wheel (CC0, public domain or without known restrictions), and squares of them that
#: show something each.
PHOTOGRAPHS: dict[str, tuple[Box, ...]] = {
    "astronaut.png": (
        (0.00, 0.00, 1.00),
        (0.23, 0.00, 0.42),  # face
        (0.56, 0.10, 0.44),  # space shuttle
        (0.20, 0.64, 0.28),  # mission patch
    ),
    "coffee.png": (
        (0.20, 0.00, 1.00),
        (0.38, 0.00, 0.70),  # cup
        (0.78, 0.48, 0.36),  # spoon
        (0.43, 0.10, 0.50),  # coffee
    ),
    "chelsea.png": (
        (0.20, 0.00, 1.00),
        (0.40, 0.16, 0.78),  # face
        (0.37, 0.22, 0.42),  # one eye
        (0.62, 0.58, 0.40),  # nose
    ),
    "rocket.jpg": (
        (0.25, 0.00, 1.00),
        (0.48, 0.28, 0.55),  # rocket
        (0.08, 0.64, 0.36),  # lamps, left
        (0.66, 0.26, 0.24),  # nose cone
    ),
    "camera.png": (
        (0.00, 0.00, 1.00),
        (0.20, 0.06, 0.50),  # head and camera
        (0.14, 0.40, 0.60),  # coat and tripod
        (0.52, 0.34, 0.44),  # buildings
    ),
    "retina.jpg": (
        (0.00, 0.00, 1.00),
        (0.02, 0.26, 0.48),  # optic disc
        (0.28, 0.30, 0.44),  # macula
        (0.50, 0.10, 0.45),  # vessels
    ),
    "coins.png": (
        (0.13, 0.00, 1.00),
        (0.00, 0.00, 0.50),
        (0.72, 0.00, 0.55),
        (0.30, 0.48, 0.52),
    ),
    "ihc.png": (
        (0.00, 0.00, 1.00),
        (0.00, 0.00, 0.55),
        (0.45, 0.40, 0.55),
        (0.50, 0.00, 0.45),
    ),
}

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_BATCH_BYTES = 4 << 30
MAX_IMAGE_PIXELS = 100_000_000


def available() -> dict[str, str]:
    """Source -> what it is, in one line."""
    return {
        "sample": "32 crops of eight photographs inside the scikit-image wheel; no download",
        "noise": "independent uniform noise in [0, 1], as many images as asked for; 10 classes (data.seed)",
        "cifar10": "CIFAR-10, training images (torchvision; data.root, data.download)",
        "cifar100": "CIFAR-100, training images (torchvision; data.root, data.download)",
        "folder:PATH": "PATH/<class>/<image>: one folder per class, or per class number",
        "npz:PATH": "NumPy archive: x (N x H x W x C or N x C x H x W, uint8 or [0, 1]) and y (N classes, or targets N x ...)",
    }


def load(spec: DataSpec) -> Truth:
    """Images ``start .. start + batch - 1`` of a source, with labels and names. Only these are decoded.

    A size other than the stored one means: the largest central part of that shape (a square for one number), resized by
    Lanczos' antialiased filter. Without a size, ``sample`` and ``noise`` give 32 pixels, ``folder`` 224, the others what is
    stored.

    Returns:
        Images B x C x H x W, float32 in [0, 1], and labels B, int64; from ``npz`` also targets B x ..., int64 or float32.

    Raises:
        DataError: The source is unknown, missing or damaged, or has fewer than ``start + batch`` images.
    """
    kind, colon, path = spec.source.partition(":")
    sources: dict[str, Callable[[DataSpec], Truth]] = {
        "sample": _sample,
        "noise": _noise,
        "cifar10": _cifar,
        "cifar100": _cifar,
    }
    readers: dict[str, Callable[[DataSpec, Path], Truth]] = {"folder": _folder, "npz": _npz}
    if kind in sources and not colon:
        return sources[kind](spec)
    if kind in readers and path:
        return readers[kind](spec, Path(path).expanduser())
    there = Path(spec.source).expanduser()
    prefix = "folder" if there.is_dir() else "npz" if there.is_file() and there.suffix == ".npz" else None
    hint = nearest(spec.source, available()) if prefix is None else f"; did you mean '{prefix}:{spec.source}'?"
    raise DataError(f"unknown data.source {spec.source!r}{hint}")


def following(spec: DataSpec, count: int) -> Tensor:
    """The ``count`` images of a source that follow the batch, or as many as there are: decoys for an evaluation.

    Returns:
        M x C x H x W, float32 in [0, 1]; M is 0 at the end of the source.

    Raises:
        DataError: As :func:`load`, but for there being fewer images.
    """
    start = spec.start + spec.batch
    try:
        return load(spec.model_copy(update={"start": start, "batch": max(1, count)})).images[:count]
    except _TooFewError as error:
        left = error.there - start
        return load(spec.model_copy(update={"start": start, "batch": left})).images if left > 0 else torch.empty(0)


class _TooFewError(DataError):
    """The source ends before the batch does."""

    def __init__(self, message: str, *, there: int) -> None:
        super().__init__(message)
        self.there = there


def _sample(spec: DataSpec) -> Truth:
    files = list(PHOTOGRAPHS)
    # the first crop of every photograph, then the second of every photograph, ...
    crops = [(label, box) for boxes in zip(*PHOTOGRAPHS.values(), strict=True) for label, box in enumerate(boxes)]
    chosen = [crops[row] for row in _rows(spec, len(crops))]
    labels = [label for label, _ in chosen]
    photographs = {}
    for label in set(labels):
        photographs[label] = _decode(importlib.resources.files("skimage") / "data" / files[label])
    images = []
    for label, (left, top, side) in chosen:
        photograph = photographs[label]
        unit = photograph.height
        box = (left * unit, top * unit, min((left + side) * unit, photograph.width), min((top + side) * unit, unit))
        images.append(_resize(photograph, box, spec.size or 32))
    return Truth(torch.stack(images), torch.tensor(labels), tuple(Path(files[label]).stem for label in labels))


def _noise(spec: DataSpec) -> Truth:
    """Independent U(0, 1); an image depends on its index and the seed. Every ten in a row have the ten classes once each."""
    shape = (spec.channels, *_sides(spec.size or 32))
    wanted = 4 * spec.batch * math.prod(shape)
    if wanted > MAX_BATCH_BYTES:
        raise DataError(f"noise: {spec.batch} images of shape {shape} are {wanted} bytes, at most {MAX_BATCH_BYTES}")
    rows = range(spec.start, spec.start + spec.batch)
    images = np.stack([np.random.default_rng([spec.seed, row]).random(shape, np.float32) for row in rows])
    classes = np.random.default_rng(spec.seed).permutation(10)
    labels = [int(classes[row % 10]) for row in rows]
    return Truth(torch.from_numpy(images), torch.tensor(labels), tuple(f"noise {row}" for row in rows))


def _cifar(spec: DataSpec) -> Truth:
    from torchvision import datasets  # slow to import, needed here only
    from torchvision.datasets.utils import check_integrity

    dataset = datasets.CIFAR10 if spec.source == "cifar10" else datasets.CIFAR100
    root = (spec.root or _cache()).expanduser()
    archive = root / dataset.filename
    try:
        # torchvision reads the pickles inside only after their checksums have matched
        try:
            data = dataset(root, train=True)
        except RuntimeError:  # not there, or another checksum
            if not spec.download:
                raise
            if not check_integrity(archive, dataset.tgz_md5):
                announce(dataset.url, what=f"{spec.source} (170 MB)", file=archive, error=DataError)
            with contextlib.redirect_stdout(sys.stderr):
                data = dataset(root, train=True, download=True)
    except DataError:
        raise
    except Exception as cause:  # from the network, the archive or the disk
        raise DataError(
            f"{spec.source}: no intact {root / dataset.base_folder} ({cause}). Set data.download = true; without a "
            f"network, put {dataset.filename} into {root} first, then it is only unpacked. Or name the folder that "
            f"holds {dataset.base_folder} with data.root, or use data.source = npz:PATH"
        ) from None
    rows = _rows(spec, len(data.data))
    images = torch.from_numpy(data.data[rows.start : rows.stop]).permute(0, 3, 1, 2).contiguous() / 255
    labels = data.targets[rows.start : rows.stop]
    return Truth(_fit(images, spec.size), torch.tensor(labels), tuple(data.classes[label] for label in labels))


def _folder(spec: DataSpec, root: Path) -> Truth:
    expected = f"expected {root}/<class>/<image>"
    if not root.is_dir():
        raise DataError(f"{spec.source}: no such folder; {expected}")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    # os.walk does not follow links to folders, so a link in a loop costs nothing
    walks = ((folder, names) for name in classes for folder, _, names in os.walk(root / name))
    files = [Path(folder, name) for folder, names in walks for name in names if Path(name).suffix.lower() in SUFFIXES]
    files.sort(key=lambda file: file.relative_to(root).parts)
    if spec.order == "shuffled":
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(spec.seed))
        files = [files[i] for i in order.tolist()]
    if not files:
        raise DataError(f"{spec.source}: no images; {expected}, an image being one of {', '.join(sorted(SUFFIXES))}")
    numbered = all(name.isdecimal() for name in classes)
    if numbered and (largest := max(classes, key=lambda name: (len(name.lstrip("0")), name))) and len(largest) > 9:
        raise DataError(f"{spec.source}: class number {largest} is larger than {MAX_LABEL}")
    images, labels, names = [], [], []
    inside = Path(os.path.realpath(root))
    for file in [files[row] for row in _rows(spec, len(files))]:
        if not Path(os.path.realpath(file)).is_relative_to(inside):
            raise DataError(f"{file}: is a symbolic link that leads out of {root}; copy the image there")
        image = _decode(file, mode="RGB" if spec.channels == 3 else "L")
        images.append(_resize(image, (0, 0, image.width, image.height), spec.size or 224))
        name = file.relative_to(root).parts[0]
        labels.append(int(name) if numbered else classes.index(name))
        names.append(file.stem if numbered else f"{name}/{file.stem}")  # a class number says nothing to people
    return Truth(torch.stack(images), torch.tensor(labels), tuple(names))


def _npz(spec: DataSpec, path: Path) -> Truth:
    try:
        with open_regular(path, what="a .npz archive", error=DataError) as file, open_archive(file) as archive:
            stored, count = _read_rows(archive, path, ("x", "images"), spec, ndim=4, kinds="uf")
            labels, labelled = _read_rows(archive, path, ("y", "labels"), spec, ndim=None, kinds="uif")
    except DAMAGE as cause:
        raise DataError(f"{path}: not a readable .npz archive: {cause}") from None
    if count != labelled:
        raise DataError(f"{path}: {count} images but {labelled} labels")
    if labels.dtype.kind != "f" and labels.max() > MAX_LABEL:  # before a uint64 becomes negative
        raise DataError(f"{path}: label {labels.max()} is larger than {MAX_LABEL}")
    targets = torch.from_numpy(labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64))
    check_labels(targets, where=str(path))
    images = torch.from_numpy(stored.astype(np.float32))
    if stored.dtype == np.uint8:
        images /= 255
    elif not (images.min() >= 0 and images.max() <= 1):  # NaN fails it too
        raise DataError(
            f"{path}: {stored.dtype} images must lie in [0, 1], found [{stored.min()}, {stored.max()}]; "
            "store uint8, or divide them by 255"
        )
    if images.shape[3] <= images.shape[1]:  # there are fewer channels than pixels
        images = images.permute(0, 3, 1, 2)
    images = images.contiguous()
    if targets.ndim > 2 and spec.size is not None and images.shape[2:] != _sides(spec.size):
        raise DataError(
            f"{path}: targets of shape {tuple(targets.shape)} look like maps of pixels, which data.size does not resize; store "
            "images and targets at the size that the model takes"
        )
    names = tuple(str(label) for label in labels) if are_classes(targets) else ()
    return Truth(_fit(images, spec.size), targets, names)


def _read_rows(
    archive: zipfile.ZipFile, path: Path, keys: tuple[str, ...], spec: DataSpec, *, ndim: int | None, kinds: str
) -> tuple[np.ndarray, int]:
    """The rows that ``spec`` asks for of the first array among ``keys``, and how many rows there are.

    np.load would decompress and allocate whole arrays; this reads the header, skips, and reads those rows.
    """
    member = next((f"{key}.npy" for key in keys if f"{key}.npy" in archive.namelist()), None)
    if member is None:
        there = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:8])
        raise DataError(f"{path}: no array {' or '.join(map(repr, keys))}; found: {there or 'nothing'}")
    where = f"{path}: array {member.removesuffix('.npy')!r}"
    with open_member(archive, member, where=where, error=DataError) as (stream, (shape, fortran_order, dtype)):
        if dtype.kind not in kinds or (dtype.kind == "u" and ndim == 4 and dtype != np.uint8):
            raise DataError(f"{where}: type {dtype}; expected {'uint8 or float' if ndim == 4 else 'integers or floats'}")
        if len(shape) != (ndim or max(1, len(shape))) or not all(isinstance(n, int) and 0 < n < 1 << 48 for n in shape):
            raise DataError(
                f"{where}: shape {shape}; expected {'N x H x W x C or N x C x H x W' if ndim == 4 else 'N, or N x ...'}"
            )
        if fortran_order and len(shape) > 1:
            raise DataError(f"{where}: in Fortran order; save np.ascontiguousarray of it")
        rows = _rows(spec, shape[0])
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        wanted = len(rows) * row_bytes
        if wanted > MAX_BATCH_BYTES:
            raise DataError(f"{where}: {len(rows)} rows of shape {shape[1:]} are {wanted} bytes, at most {MAX_BATCH_BYTES}")
        stream.seek(stream.tell() + rows.start * row_bytes)
        content = stream.read(wanted)
    if len(content) < wanted:
        raise DataError(f"{where}: truncated: shape {shape} needs more bytes than there are")
    return np.frombuffer(content, dtype).reshape(len(rows), *shape[1:]), shape[0]


def _rows(spec: DataSpec, count: int) -> range:
    stop = spec.start + spec.batch
    if stop > count:
        message = f"{spec.source} has {count} images; data.start + data.batch = {stop} must not exceed that"
        raise _TooFewError(message, there=count)
    return range(spec.start, stop)


def _decode(file: Traversable, *, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    opened = open_regular(file, what="an image", error=DataError) if isinstance(file, Path) else file.open("rb")
    try:
        # these formats only: others of Pillow's run programs (EPS) or are seldom tested
        with opened as stream, _no_warnings(), Image.open(stream, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{file}: more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first")
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DataError(f"{file}: {image.width} x {image.height} pixels, at most {MAX_IMAGE_PIXELS} in all")
            return image.convert(mode)
    except DataError:
        raise
    except Exception as cause:  # Pillow's decoders raise many kinds on damaged files
        raise DataError(f"{file}: not a readable image: {type(cause).__name__}: {cause}") from None


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Pillow warns of what it then refuses or repairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _centre(box: tuple[float, float, float, float], sides: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest central part of a box (left, top, right, bottom) that has the shape of an image of ``sides`` (H, W)."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    inner_width, inner_height = min(width, height * (sides[1] / sides[0])), min(height, width * (sides[0] / sides[1]))
    left, top = left + (width - inner_width) / 2, top + (height - inner_height) / 2
    return left, top, left + inner_width, top + inner_height


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W)."""
    return (size, size) if isinstance(size, int) else size


def _resize(image: Image.Image, box: tuple[float, float, float, float], size: int | tuple[int, int]) -> Tensor:
    """The central part of a box of a photograph as C x H x W in [0, 1]; C is 3, or 1 for a grey one."""
    height, width = _sides(size)
    pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=_centre(box, (height, width))))
    return torch.from_numpy(pixels).view(height, width, -1).permute(2, 0, 1).contiguous() / 255


def _fit(images: Tensor, size: int | tuple[int, int] | None) -> Tensor:
    """The largest central part of images B x C x H x W, resized to ``size``; as they are if they have it already."""
    count, channels, height, width = images.shape
    if size is None or (height, width) == _sides(size):
        return images
    rows, columns = _sides(size)
    box = _centre((0, 0, width, height), (rows, columns))
    planes = [Image.fromarray(plane) for plane in images.reshape(-1, height, width).numpy()]
    resized = [np.array(plane.resize((columns, rows), Image.Resampling.LANCZOS, box=box)) for plane in planes]
    # Lanczos overshoots at edges
    return torch.from_numpy(np.stack(resized)).view(count, channels, rows, columns).clamp(0, 1)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gradleak"
