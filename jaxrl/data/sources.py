"""Random access to the samples of JSONL and Parquet files and of Hugging Face datasets.

Samples stay where they are: of a JSONL file its lines' offsets are in memory, of Parquet files the
groups of rows read last, of a Hugging Face dataset nothing (it is memory-mapped).
"""

import array
import bisect
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxrl.options import ConfigError

type Sample = Mapping[str, Any]
type Fingerprint = list[dict[str, Any]]

_BLOCK = 2**20
_GROUPS_KEPT = 4


class Samples(Protocol):
    """Samples by number, read anew each time, by several threads and processes at once.

    `where` says where a sample lies, for messages. `fingerprint`, a JSON value, has of each file or
    dataset its name, number of samples and a hash of its contents, in order.
    """

    @property
    def fingerprint(self) -> Fingerprint: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def where(self, index: int) -> str: ...


def open_samples(names: Sequence[str], split: str = "train") -> Samples:
    """The samples of these files (JSONL, Parquet; patterns with `*` are filled in, sorted) and
    Hugging Face datasets (`owner/name`, of which `split` is read), one after the other.

    Reads JSONL files once, from beginning to end. Raises ConfigError for a name that is nothing of
    this, an empty file, and a line that is no JSON object (with its number).
    """
    parts = [part for name in names for part in _open(name, split)]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _open(name: str, split: str) -> list[Samples]:
    if pathlib.Path(name).is_file():  # whose name may hold brackets
        return [_open_file(pathlib.Path(name))]
    files = [pathlib.Path(file) for file in sorted(glob.glob(name, recursive=True))]
    files = [file for file in files if file.is_file()]
    if files:
        return [_open_file(file) for file in files]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not re.search(r"\.(jsonl?|parquet)$", name):
        return [HubSamples(name, split)]
    raise ConfigError(
        f"no data file {name!r}; give JSONL or Parquet files, or a Hugging Face dataset owner/name"
    )


def _open_file(file: pathlib.Path) -> Samples:
    match file.suffix:
        case ".jsonl" | ".json" | ".ndjson":
            return JsonLines(file)
        case ".parquet":
            return ParquetRows(file)
    raise ConfigError(f"data file {file} is neither .jsonl nor .parquet")


class JsonLines:
    """The lines of a JSONL file, each a JSON object; blank ones are passed over."""

    def __init__(self, file: pathlib.Path):
        self.file, digest = file, hashlib.blake2b(digest_size=16)
        # Where each sample begins, and the number of its line.
        offsets, numbers = array.array("q"), array.array("q")
        self._size = 0
        with file.open("rb") as f:
            for number, line in enumerate(f, 1):
                digest.update(line)
                if line.strip():
                    _parse(line, f"{file}:{number}")
                    offsets.append(self._size)
                    numbers.append(number)
                self._size += len(line)
        if not offsets:
            raise ConfigError(f"data file {file} holds no samples")
        self._offsets, self._numbers = np.array(offsets), np.array(numbers)
        self.fingerprint = _file_fingerprint(file, len(self), self._size, digest)

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        return f"{self.file}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> Sample:
        try:
            with self.file.open("rb") as f:
                f.seek(self._offsets[index])
                return _parse(f.readline(), self.where(index))
        except (OSError, ConfigError) as error:
            raise _changed(self.file, self._size, self.where(index), error) from None


def _parse(line: bytes, where: str) -> Sample:
    try:
        sample = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError, too
        raise ConfigError(f"{where}: no JSON ({error}); mend or delete the line") from None
    if not isinstance(sample, dict):
        raise ConfigError(f"{where}: {type(sample).__name__} {str(sample)[:40]!r}, no JSON object")
    return sample


def _changed(file: pathlib.Path, size: int, where: str, error: Exception) -> ConfigError:
    """What to say of a file that could be read when it was opened."""
    had = f"{file} had {size:,} bytes when the run began"
    if not file.is_file():
        return ConfigError(f"{where}: {had}, and is gone; restore it and run again")
    if file.stat().st_size != size:
        return ConfigError(
            f"{where}: {had} and has {file.stat().st_size:,} now; restore it and run again"
        )
    return ConfigError(f"{where} cannot be read any more ({error}); restore it and run again")


class ParquetRows:
    """The rows of a Parquet file; a group of rows is read at a time."""

    def __init__(self, file: pathlib.Path):
        self.file = file
        groups = _parquet_file(file).metadata
        rows = (groups.row_group(i).num_rows for i in range(groups.num_row_groups))
        self._ends = list(itertools.accumulate(rows))
        if not self._ends or not self._ends[-1]:
            raise ConfigError(f"data file {file} holds no samples")
        digest, self._size = hashlib.blake2b(digest_size=16), 0
        with file.open("rb") as f:
            while block := f.read(_BLOCK):
                digest.update(block)
                self._size += len(block)
        self.fingerprint = _file_fingerprint(file, len(self), self._size, digest)

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, index: int) -> str:
        return f"{self.file} row {index}"

    def __getitem__(self, index: int) -> Sample:
        group = bisect.bisect_right(self._ends, index)
        first = self._ends[group - 1] if group else 0
        try:
            size = self.file.stat().st_size
            rows = _row_group(self.file, size, group)
            return without_nulls(rows.slice(index - first, 1).to_pylist()[0])
        except (OSError, IndexError, ConfigError) as error:
            raise _changed(self.file, self._size, self.where(index), error) from None


def _parquet_file(file: pathlib.Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{file} is no Parquet file that can be read: {line}") from None


@functools.lru_cache(maxsize=_GROUPS_KEPT)  # of all files together
def _row_group(file: pathlib.Path, size: int, group: int):
    """A group of rows as a table; `size` of the file, so that a changed one is read anew."""
    import pyarrow

    with _parquet_file(file) as reader:
        try:
            return reader.read_row_group(group)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(" ".join(str(error).split())) from None


def without_nulls(value: Any) -> Any:
    """Without the keys that a column's type gives to every row."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(v) for v in value]
    return value


class HubSamples:
    """A split of a Hugging Face dataset, through the package `datasets`."""

    def __init__(self, name: str, split: str):
        if importlib.util.find_spec("datasets") is None:
            raise ConfigError(
                f"data {name!r} is no file here; to read it as a Hugging Face dataset: "
                "pip install 'jaxrl[hub]'"
            )
        import datasets  # type: ignore[reportMissingImports]

        try:
            self._dataset = datasets.load_dataset(name, split=split)
        except Exception as error:  # of many kinds: no such name or split, no connection
            line = " ".join(str(error).split())[:200]
            raise ConfigError(f"Hugging Face dataset {name!r}, split {split!r}: {line}") from error
        self.name, self.split = name, split
        if not len(self):
            raise ConfigError(f"Hugging Face dataset {name!r}, split {split!r}, holds no samples")
        self.fingerprint = [
            {"name": f"{name} {split}", "samples": len(self), "hash": self._dataset._fingerprint}
        ]

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, index: int) -> str:
        return f"{self.name} {self.split} row {index}"

    def __getitem__(self, index: int) -> Sample:
        return without_nulls(self._dataset[int(index)])


class Joined:
    """The samples of several sources, one after the other."""

    def __init__(self, parts: Sequence[Samples]):
        self.parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))
        self.fingerprint = [one for part in parts for one in part.fingerprint]

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[Samples, int]:
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0)

    def where(self, index: int) -> str:
        part, i = self._find(index)
        return part.where(i)

    def __getitem__(self, index: int) -> Sample:
        part, i = self._find(index)
        return part[i]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Those samples whose numbers are in `indices`, in that order."""

    samples: Samples
    indices: np.ndarray

    @property
    def fingerprint(self) -> Fingerprint:
        digest = hashlib.blake2b(self.indices.tobytes(), digest_size=16).hexdigest()
        chosen = {"name": "held-out samples' choice", "samples": len(self), "hash": digest}
        return [*self.samples.fingerprint, chosen]

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int) -> str:
        return self.samples.where(int(self.indices[index]))

    def __getitem__(self, index: int) -> Sample:
        return self.samples[int(self.indices[index])]


def hold_out(samples: Samples, count: int, seed: int) -> tuple[Samples, Samples]:
    """(the other samples, `count` of them drawn with `seed`), each in their order."""
    if count >= len(samples):
        raise ConfigError(
            f"config.data.hold_out is {count}, and there are {len(samples)} samples; hold out fewer"
        )
    drawn = np.random.default_rng(seed).permutation(len(samples))
    return Chosen(samples, np.sort(drawn[count:])), Chosen(samples, np.sort(drawn[:count]))


def check_fingerprint(now: Fingerprint, then: Fingerprint) -> None:
    """Raise ConfigError, naming the first difference, where data changed since a checkpoint. A file
    that was only moved is the same."""
    at, way_out = "when the checkpoint was written", "restore it, or fork the run"
    way_out += " (config.checkpoint.fork)"
    for new, old in itertools.zip_longest(now, then):
        if new is None:
            raise ConfigError(f"{old['name']} was part of the data {at} and is not now; {way_out}")
        if old is None:
            raise ConfigError(f"{new['name']} was no part of the data {at} and is now; {way_out}")
        if new["hash"] == old["hash"]:
            continue
        if new["name"] != old["name"]:
            raise ConfigError(
                f"{old['name']} was read {at}, and {new['name']}, which holds something else, is "
                f"now; {way_out}"
            )
        if new["samples"] != old["samples"]:
            raise ConfigError(
                f"{new['name']} had {old['samples']:,} samples {at} and has {new['samples']:,} "
                f"now; {way_out}"
            )
        raise ConfigError(f"{new['name']} has other contents than {at}; {way_out}")


def _file_fingerprint(file: pathlib.Path, samples: int, size: int, digest) -> Fingerprint:
    return [{"name": str(file), "samples": samples, "bytes": size, "hash": digest.hexdigest()}]
