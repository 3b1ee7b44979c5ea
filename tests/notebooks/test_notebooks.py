"""Every notebook runs from top to bottom, as committed."""

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.delenv("XLA_FLAGS")  # the tests': a notebook computes more than it compiles
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o.get("name") == "stderr"], "a cell printed to stderr"
    assert any("image/png" in o.get("data", {}) for o in outputs)
    said = [o["text"] for o in outputs if "text" in o]
    if path.stem == "02_rl":  # five steps teach little; both sides are to agree on what was drawn
        (kl,) = (text.split()[-1] for text in said if text.startswith("mismatch KL at most"))
        assert 0 <= float(kl) < 1e-3
        return
    losses = next(text for text in said if text.startswith("loss"))
    first, *_, last = map(float, losses.removeprefix("loss").strip(" []\n").split(","))
    assert last < first


def test_there_are_notebooks():
    assert NOTEBOOKS
