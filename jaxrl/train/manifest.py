"""Whether a folder is as it was written: a manifest of its files, with sizes and CRC-32s.

CRC-32 finds flipped bytes, truncation and files of another write; it is no protection against
someone who means to deceive.
"""

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK = 2**22
_THREADS = 8  # zlib lets go of the interpreter's lock


class Damaged(Exception):
    """A folder is not as it was written: what of it, in one line."""


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the JSON `content` and the fingerprints of the folder's files beside them, atomically.

    Every file is on the disk when it returns. `content` comes back from `read_manifest`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        prints = pool.map(lambda file: _fingerprint(file, sync=True), files)
        found = {
            file.relative_to(folder).as_posix(): fingerprint
            for file, fingerprint in zip(files, prints, strict=True)
        }
    manifest = {**content, "files": found, "format": FORMAT}
    # One flipped digit of a data position would still be good JSON.
    text = json.dumps({"crc32": _crc(manifest), "manifest": manifest}, indent=1)
    partial = folder / f".{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(folder / MANIFEST)
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content that the folder's manifest was written with. Raises Damaged."""
    file = folder / MANIFEST
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        manifest, crc = whole["manifest"], whole["crc32"]
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{MANIFEST} is corrupted") from None
    if _crc(manifest) != crc:
        raise Damaged(f"{MANIFEST} is corrupted")
    if manifest["format"] != FORMAT:
        raise Damaged(f"{MANIFEST} has format {manifest['format']}; this jaxrl reads {FORMAT}")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Read all files that the manifest lists. Raises Damaged, naming the first that is another."""

    def problem(name: str) -> str:
        size, crc = manifest["files"][name]
        file = folder / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            return "" if _fingerprint(file) == [size, crc] else f"{name} is corrupted"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(problem, manifest["files"]):
            if found:
                raise Damaged(found)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(file: Path, *, sync: bool = False) -> list[int]:
    """[size, CRC-32]."""
    crc = size = 0
    with file.open("rb") as f:
        if sync:
            os.fsync(f.fileno())
        while block := f.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _crc(manifest: Any) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
