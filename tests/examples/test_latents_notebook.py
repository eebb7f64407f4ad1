"""examples/latents.ipynb runs top to bottom in a fresh kernel, and is committed with what it showed."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "latents.ipynb"
LARGEST = 1_500_000  # bytes
A_MACHINE = re.compile(r"/(tmp|home|root|work|Users|var|opt|mnt|usr)/|site-packages|[A-Z]:\\")

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: the notebook is not tested")
pytest.importorskip("diffusers", reason="diffusers is not installed: the notebook needs seedpod[latents]")


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell showed: streams by name, data by type."""
    return sorted({getattr(output, "name", None) or "|".join(sorted(output.data)) for output in cell.outputs})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_top_to_bottom_and_shows_what_is_committed(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: the notebook is not run")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR", "TMPDIR"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("SEEDPOD_ROOTS", raising=False)
    committed = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_of(fresh):
        cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    for before, after in zip(code_of(committed), code_of(fresh), strict=True):
        assert kinds(before) == kinds(after), after.source
    assert not list((tmp_path / "tmpdir").glob("*/nano"))  # its own folder goes with its kernel


def test_is_committed_as_it_ran_without_an_error_or_a_path_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < LARGEST
    code = code_of(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error" and getattr(output, "name", "") != "stderr", output
            texts = [output.text] if "text" in output else []
            texts += [
                str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")
            ]
            assert not any(A_MACHINE.search(text) for text in texts), texts
    assert not A_MACHINE.search(str(notebook.metadata))


def test_its_pictures_show_something():
    from PIL import Image

    pictures = [
        Image.open(io.BytesIO(base64.b64decode(value)))
        for cell in code_of(nbformat.read(NOTEBOOK, as_version=4))
        for output in cell.outputs
        for kind, value in output.get("data", {}).items()
        if kind.startswith("image/")
    ]
    assert len(pictures) >= 10
    for picture in pictures:
        low, high = picture.convert("L").getextrema()
        assert high - low > 50
