"""A folder of safetensors files: what is in it, one stacked parameter of it, and a new one."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrl.models.hf_config import CheckpointError, read_json
from jaxrl.options import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies and its shape there.

    `tensor` is its name in the file, where it is the whole tensor of that name or (`_split`) those
    rows of its number `expert` that begin with `first_row`.
    """

    file: Path
    tensor: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor still to be written: its name, its size in bytes, and how to get it."""

    name: str
    nbytes: int
    make: Callable[[], np.ndarray]


def list_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's model.safetensors, or of the shards that its index names.

    Reads headers only. Experts that a file holds stacked are listed one by one. A missing,
    truncated or inconsistent file is a `CheckpointError`.
    """
    index: Mapping[str, str] = {}
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map") or {}
        if not index:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
            raise CheckpointError(f"{folder / INDEX}: weight_map gives tensors no files' names")
        names = sorted(set(index.values()))
    else:
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors files are read"
        )
    found: dict[str, Stored] = {}
    for name in names:
        file = folder / name
        if file.parent != folder:
            raise CheckpointError(f"{folder / INDEX} names {name!r}, outside its own folder")
        if not file.is_file():
            tensor = next(t for t, shard in index.items() if shard == name)
            raise CheckpointError(f"{file} is missing; {INDEX} says that it holds {tensor}")
        with opened(file) as f:
            for tensor in f.keys():  # noqa: SIM118 (not a dict)
                view = f.get_slice(tensor)
                if view.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"tensor {tensor} in {file} is {view.get_dtype()}; "
                        f"supported: {', '.join(_DTYPES)}"
                    )
                found[tensor] = Stored(file, tensor, tuple(view.get_shape()))
    for tensor, shard in index.items():
        if tensor not in found:
            raise CheckpointError(
                f"tensor {tensor} is not in {folder / shard}, where {INDEX} has it"
            )
    return {name: each for tensor, whole in found.items() for name, each in _split(tensor, whole)}


def _split(tensor: str, whole: Stored) -> Iterator[tuple[str, Stored]]:
    """A tensor, or the experts that it stacks: transformers 5 has them so in memory, and writes
    them so with save_original_format=False: gate_up_proj [E, 2F, D] and down_proj [E, D, F]."""
    prefix, _, kind = tensor.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
    if not prefix.endswith(".mlp.experts") or parts is None or len(whole.shape) != 3:
        yield tensor, whole
        return
    E, rows, columns = whole.shape
    rows //= len(parts)
    for e in range(E):
        for part, projection in enumerate(parts):
            yield (
                f"{prefix}.{e}.{projection}.weight",
                dataclasses.replace(whole, shape=(rows, columns), expert=e, first_row=part * rows),
            )


@contextlib.contextmanager
def opened(file: Path) -> Iterator:
    """A safetensors file open for reading numpy arrays; a broken one is a `CheckpointError`."""
    try:
        with safe_open(file, framework="numpy") as f:
            yield f
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}); download or save it again"
        ) from None


def read_into(
    out: np.ndarray,
    slots: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    window: Sequence[slice] | None = None,
    *,
    transposed: bool,
) -> None:
    """Fill `out` from the tensors named in `slots`: out[i, ...] for i, the whole of it for ().

    window: the part of each tensor that is wanted, in the dimensions of `out`; default all of it.
    transposed: swap each tensor's last two dimensions on the way. Files are opened anew for each
    call, so that no more than this parameter's pages stay mapped.
    """
    files: dict[Path, list[str]] = {}
    for name in slots:
        files.setdefault(stored[name].file, []).append(name)
    for file in sorted(files):
        with opened(file) as f:
            for name in files[file]:
                part = [slice(0, n) for n in stored[name].shape]
                if window is not None:
                    part = [*window]
                    if transposed:
                        part[-2:] = part[:-3:-1]
                tensor = _read(f, stored[name], part)
                out[slots[name]] = tensor.swapaxes(-1, -2) if transposed else tensor


def _read(f, stored: Stored, part: Sequence[slice]) -> np.ndarray:
    if stored.expert is None:
        if all(p == slice(0, n) for p, n in zip(part, stored.shape, strict=True)):
            return f.get_tensor(stored.tensor)
        return f.get_slice(stored.tensor)[*part]
    rows = slice(part[0].start + stored.first_row, part[0].stop + stored.first_row)
    return f.get_slice(stored.tensor)[stored.expert, rows, *part[1:]]


def check_new(path: Path) -> None:
    """Raises ConfigError for a `path` that already holds something: nothing is ever overwritten."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{path} already exists and is not an empty folder; name a new one")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` at the end, or is removed if an error comes first.
    Raises ConfigError as `check_new`."""
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_tensors(folder: Path, tensors: Sequence[Pending], max_shard_bytes: int) -> None:
    """Write the tensors, in order, to shards of at most `max_shard_bytes` (or one tensor).

    Host memory holds one shard at a time, and safetensors' copy of it. With more than one shard an
    index is written too.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes} must be at least 1")
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Contiguous: save_file writes a strided view's memory as it lies, without a word.
        arrays = {t.name: np.ascontiguousarray(t.make()) for t in shard}
        # transformers 4 refuses a file that does not say which framework's layout it has.
        save_file(arrays, folder / file, metadata={"format": "pt"})
        # Some versions leave the file readable to its owner only, whatever the umask.
        (folder / file).chmod(folder.stat().st_mode & 0o666)
        weight_map |= {name: file for name in arrays}
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def write_json(file: Path, value: Mapping) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
