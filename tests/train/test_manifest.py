"""A manifest lists every file of a folder, and itself cannot change unnoticed."""

import json

import pytest

from jaxrl.train import manifest
from jaxrl.train.manifest import Damaged, check_files, read_manifest, write_manifest

CONTENT = {"step": 2, "extra": {"at": [1, 0.1, None, "ä"]}}


def folder_with(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/data").write_bytes(bytes(range(256)) * 20000)  # several blocks
    (tmp_path / "empty").touch()
    write_manifest(tmp_path, CONTENT)
    return tmp_path


def test_content_comes_back_and_every_file_is_listed(tmp_path):
    found = read_manifest(folder_with(tmp_path))
    assert {key: found[key] for key in CONTENT} == CONTENT
    assert {name: size for name, (size, _) in found["files"].items()} == {
        "deep/er/data": 256 * 20000,
        "empty": 0,
    }
    check_files(tmp_path, found)
    (tmp_path / "deep/er/data").write_bytes(bytes(256 * 20000))
    with pytest.raises(Damaged, match=r"^deep/er/data is corrupted$"):
        check_files(tmp_path, found)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"step": 2', '"step": 3'), ("0.1", "0.2"), ("5120000", "5120001"), ("{", ""), ('"crc', '"c')],
)
def test_a_changed_manifest_is_damage(old, new, tmp_path):
    file = folder_with(tmp_path) / "manifest.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(Damaged, match=r"^manifest.json is corrupted$"):
        read_manifest(tmp_path)


def test_a_later_format_is_said(tmp_path, monkeypatch):
    folder_with(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["manifest"]["format"] == 1
    monkeypatch.setattr(manifest, "FORMAT", 0)
    with pytest.raises(Damaged, match="has format 1; this jaxrl reads 0"):
        read_manifest(tmp_path)
