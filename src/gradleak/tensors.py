"""Named tensors in safetensors files: bounded reading, atomic writing, and the comparison with what a model expects."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradleak.errors import GradleakError, ObservationError
from gradleak.files import machine_memory, open_regular, parse_json, write_atomically

MAX_HEADER_BYTES = 32_000_000
MAX_TENSORS = 100_000
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def read_tensors(path: Path, *, error: type[GradleakError] = ObservationError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata. Nothing is ever unpickled.

    The header (its length, at most 32 MB; at most 100,000 tensors; plain types of numbers; the place of every tensor inside
    the file; a file no larger than the machine's memory) is checked before a tensor is allocated, so a damaged or hostile
    file costs no memory.

    Args:
        path: The file.
        error: Class of the error, for the reader of the message.

    Raises:
        GradleakError: Of class ``error``; names the file, and says whether it is missing, truncated or another format.
    """
    _check_header(path, error)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # copies: safe_open maps the file, and a map of a file that shrinks later kills the process
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError) as cause:
        raise error(f"{path}: not a readable safetensors file: {cause}. Was it truncated on its way?") from None


def read_checkpoint(path: Path, *, error: type[GradleakError] = ObservationError) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote of a state_dict, or of a dict with one in it; on the CPU.

    Read by torch's restricted unpickler (``weights_only=True``), which builds tensors and plain containers and calls nothing
    else. A file with anything else in it is refused.

    Args:
        path: The file.
        error: Class of the error.

    Raises:
        GradleakError: Of class ``error``; says what was found, and how to save weights instead.
    """
    mend = "save the weights alone: torch.save(model.state_dict(), path), or better as safetensors"
    with open_regular(path, what="a file of torch.save", error=error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > machine_memory():
            raise error(f"{path}: has {size} bytes, this machine has {machine_memory()} bytes of memory")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as cause:  # the zip format, the unpickler and torch raise many kinds
            # torch's own text advises to load it unsafely
            raise error(f"{path}: is no file of plain tensors alone ({type(cause).__name__}); {mend}") from None
    while isinstance(found, Mapping) and not any(isinstance(t, Tensor) for t in found.values()):
        inner = next(
            (found[key] for key in ("state_dict", "model_state_dict", "model", "net", "weights") if key in found), None
        )
        if inner is None:
            break
        found = inner
    tensors = {str(k): t for k, t in found.items() if isinstance(t, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise error(f"{path}: holds {type(found).__name__}, expected a state_dict: names and tensors; {mend}")
    # a view can be far larger than what is stored of it
    if any(t.layout != torch.strided or t.is_quantized for t in tensors.values()) or size < sum(
        {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors.values()}.values()
    ):
        raise error(f"{path}: has tensors that are sparse, quantised, or larger than the file; {mend}")
    return {name: t.detach().clone() for name, t in tensors.items()}


def read_metadata(path: Path, *, error: type[GradleakError]) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises as :func:`read_tensors`."""
    metadata = _check_header(path, error).get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"{path}: the header's metadata are not texts")
    return metadata


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, keep: Path | None = None) -> None:
    """Write a safetensors file atomically: readers see the old file or the whole new one, also after a power cut.

    Equal tensors and metadata give equal bytes.

    Args:
        path: The file; its folder must exist.
        tensors: Name -> tensor, on any device.
        metadata: Short strings for the file's header.
        keep: Where the old file goes (:func:`gradleak.files.write_atomically`).

    Raises:
        OutputError: The folder is missing, full or not writable.
    """
    # separate contiguous copies: the format has no views and no shared storage
    copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_atomically(path, _encode(copies, metadata), keep=keep)


def check_state(
    found: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    *,
    where: str,
    error: type[GradleakError] = ObservationError,
) -> None:
    """Check that ``found`` has exactly the names and shapes of ``expected``, and finite values.

    Args:
        found: Name -> tensor, for example from :func:`read_tensors`.
        expected: Name -> shape, for example of a model's parameters.
        where: What the message begins with: a file name.
        error: Class of the error.

    Raises:
        GradleakError: Of class ``error``; names the tensor, what was expected and what was found.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        faults = [f"lacks {_first(missing)}"] * bool(missing) + [f"has unexpected {_first(unexpected)}"] * bool(unexpected)
        raise error(f"{where}: {' and '.join(faults)}; the model expects {len(expected)} tensors. {_HINT}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise error(f"{where}: {name!r} has shape {tuple(found[name].shape)}, the model expects {tuple(shape)}. {_HINT}")
    for name, tensor in found.items():
        if bad := int((~tensor.isfinite()).sum()):
            raise error(f"{where}: {name!r} has {bad} values of {tensor.numel()} that are NaN or infinite")


_HINT = "Was it taken from another architecture, width or number of classes?"


def _first(names: Iterable[str], *, most: int = 3) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _encode(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, bytes, memoryview]:
    # safetensors writes metadata in a random order: put it, sorted, in front of the tensors' entries ourselves
    encoded = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(encoded[:8], "little")
    entries = {"__metadata__": dict(sorted(metadata.items())), **json.loads(encoded[8:start])}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little"), header, memoryview(encoded)[start:]


def _check_header(path: Path, error: type[GradleakError]) -> dict[str, Any]:
    with open_regular(path, what="a safetensors file", error=error) as file:
        size = os.fstat(file.fileno()).st_size
        beginning = file.read(9)
        length = int.from_bytes(beginning[:8], "little")
        if size < 10 or beginning[8:] != b"{" or length > MAX_HEADER_BYTES:
            raise error(
                f"{path}: not a safetensors file. PyTorch's .pt and .pth files are pickles, which are not read here: write the "
                "weights anew with safetensors.torch.save_file(torch.load('model.pth', weights_only=True), 'model.safetensors')"
            )
        if length > size - 8:
            raise error(f"{path}: truncated: its header says {length} bytes, the file has {size}")
        if size > machine_memory():
            raise error(f"{path}: has {size} bytes, this machine has {machine_memory()} bytes of memory")
        file.seek(8)
        header = parse_json(file.read(length), where=f"{path}: the header", error=error)
    if len(header) > MAX_TENSORS:
        raise error(f"{path}: {len(header)} tensors, at most {MAX_TENSORS}")
    for name, entry in header.items():
        if name != "__metadata__" and (not isinstance(entry, dict) or entry.get("dtype") not in DTYPES):
            found = entry.get("dtype") if isinstance(entry, dict) else entry
            raise error(f"{path}: {name!r} is of type {found!r}; expected one of {', '.join(DTYPES)}")
    return dict(header)
