"""Random access to the samples of JSONL and Parquet files and of Hugging Face datasets.

Samples stay where they are: of a JSONL file its lines' offsets are in memory, of a Parquet file one
group of rows, of a Hugging Face dataset nothing (it is memory-mapped).
"""

import bisect
import dataclasses
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
type Fingerprint = dict[str, Any]

_BLOCK = 2**20


class Samples(Protocol):
    """Samples by number. `where` says where a sample lies, for messages; `fingerprint`, a JSON
    value by the name of each file or dataset, changes with what it holds."""

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
    """The lines of a JSONL file, each a JSON object."""

    def __init__(self, file: pathlib.Path):
        self.file, offsets, digest = file, [], hashlib.blake2b(digest_size=16)
        position = 0
        with file.open("rb") as f:
            for number, line in enumerate(f, 1):
                digest.update(line)
                if line.strip():
                    _parse(line, f"{file}:{number}")
                    offsets.append((position, number))
                position += len(line)
        if not offsets:
            raise ConfigError(f"data file {file} holds no samples")
        # Where each sample begins, and the number of its line.
        self._offsets, self._numbers = np.array(offsets, np.int64).T
        self.fingerprint = _file_fingerprint(file, len(self), position, digest.hexdigest())

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        return f"{self.file}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> Sample:
        with self.file.open("rb") as f:  # anew: workers and threads read at once
            f.seek(self._offsets[index])
            line = f.readline()
        if not line.strip():
            raise ConfigError(
                f"{self.where(index)} has gone: {self.file} has shrunk to "
                f"{self.file.stat().st_size:,} bytes since it was opened; restore it"
            )
        return _parse(line, self.where(index))


def _parse(line: bytes, where: str) -> Sample:
    try:
        sample = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError, too
        raise ConfigError(f"{where}: no JSON ({error}); mend or delete the line") from None
    if not isinstance(sample, dict):
        raise ConfigError(f"{where}: {type(sample).__name__} {str(sample)[:40]!r}, no JSON object")
    return sample


class ParquetRows:
    """The rows of a Parquet file; a group of rows is read at a time."""

    def __init__(self, file: pathlib.Path):
        self.file = file
        groups = self._reader().metadata
        rows = (groups.row_group(i).num_rows for i in range(groups.num_row_groups))
        self._ends = list(itertools.accumulate(rows))
        if not self._ends or not self._ends[-1]:
            raise ConfigError(f"data file {file} holds no samples")
        self._cache: tuple[int, Any] = (-1, None)
        digest, size = hashlib.blake2b(digest_size=16), 0
        with file.open("rb") as f:
            while block := f.read(_BLOCK):
                digest.update(block)
                size += len(block)
        self.fingerprint = _file_fingerprint(file, len(self), size, digest.hexdigest())

    def _reader(self):
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.file)
        except (OSError, pyarrow.ArrowException) as error:
            line = " ".join(str(error).split())
            raise ConfigError(f"{self.file} is no Parquet file that can be read: {line}") from None

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, index: int) -> str:
        return f"{self.file} row {index}"

    def __getitem__(self, index: int) -> Sample:
        group = bisect.bisect_right(self._ends, index)
        cached, table = self._cache
        if cached != group:
            table = self._reader().read_row_group(group)
            self._cache = (group, table)  # replaced as one: threads may read at once
        first = self._ends[group - 1] if group else 0
        return table.slice(index - first, 1).to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": (-1, None)}


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
        self.fingerprint = {
            f"{name} {split}": {"samples": len(self), "hash": self._dataset._fingerprint}
        }

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, index: int) -> str:
        return f"{self.name} {self.split} row {index}"

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[int(index)]


class Joined:
    """The samples of several sources, one after the other."""

    def __init__(self, parts: Sequence[Samples]):
        self.parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))
        self.fingerprint = {k: v for part in parts for k, v in part.fingerprint.items()}

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
        return self.samples.fingerprint | {"chosen": {"samples": len(self), "hash": digest}}

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
    """Raise ConfigError, naming the first difference, where data changed since a checkpoint."""
    way_out = "restore the data, or fork the run (config.checkpoint.fork)"
    for name in sorted(then.keys() | now.keys()):
        if name not in now or name not in then:
            had = "was read" if name in then else "was not read"
            has = "is" if name in now else "is not"
            raise ConfigError(
                f"{name} {had} when the checkpoint was written and {has} now; {way_out}"
            )
        if now[name]["samples"] != then[name]["samples"]:
            raise ConfigError(
                f"{name} had {then[name]['samples']:,} samples when the checkpoint was written and "
                f"has {now[name]['samples']:,}; {way_out}"
            )
        if now[name]["hash"] != then[name]["hash"]:
            raise ConfigError(
                f"{name} has other contents than when the checkpoint was written; {way_out}"
            )


def _file_fingerprint(file: pathlib.Path, samples: int, size: int, digest: str) -> Fingerprint:
    return {str(file): {"samples": samples, "bytes": size, "hash": digest}}
