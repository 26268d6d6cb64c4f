"""docs/instructgie.ipynb: what is committed is whole, and is what the notebook gives when it runs.

python tests/test_notebook.py       # runs it, and writes what it gave
"""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image, ImageChops, ImageStat

HERE = Path(__file__).resolve().parents[1]
NOTEBOOK = HERE / "docs" / "instructgie.ipynb"
SILENT = {"root", "imports", "show"}  # cells that only make things ready
TRAINED = {"curves", "compare"}  # cells that tell of a training, in which all roundings add up


def run(folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs that it gives when it is run in a folder; what differs from run to run
    or from machine to machine besides them is left out."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    metadata = dict(notebook.metadata)
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options).execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        cell.metadata = {}
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell: nbformat.NotebookNode) -> list[Image.Image]:
    files = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(file))).convert("L") for file in files]


def words_and_numbers(text: str) -> tuple[str, list[str]]:
    number = r"\d+(?:\.\d+)?"
    return " ".join(re.sub(number, "#", text).split()), re.findall(number, text)


def near(number: str, share: float) -> object:
    """What equals a printed number but for a share of it, or one in its last digit."""
    digit = 10 ** -len(number.partition(".")[2])
    return pytest.approx(float(number), rel=share, abs=1.01 * digit)


def test_it_is_committed_as_it_ran():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 400_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from the top"
    for cell in cells:
        compile(cell.source, cell.id, "exec")
        assert cell.outputs or cell.id in SILENT, f"{cell.id} shows nothing"
        for output in cell.outputs:
            assert output.output_type != "error", f"{cell.id} failed"
            assert output.get("name") != "stderr", f"{cell.id} has warnings or progress bars"
    assert not any(cell.metadata for cell in notebook.cells)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}, "versions differ from machine to machine"


def test_it_names_nothing_that_is_only_here():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    texts = [cell.source for cell in notebook.cells] + [printed(cell) for cell in code_cells(notebook)]
    for text in texts:
        assert not re.search(r"(?<![\w./:*])/\w+/|\b[A-Z]:\\", text), f"an absolute path in: {text}"
        for target in re.findall(r"\]\(([^)\s#]+)\)", text):
            assert "://" in target or (NOTEBOOK.parent / target).exists(), f"{target} leads nowhere"


@pytest.mark.slow
def test_it_gives_what_is_committed(tmp_path):
    """In docs/ of a folder of links to this one, without data or runs, as in a fresh clone."""
    for path in HERE.iterdir():
        if not path.name.startswith(".") and path.name not in ("data", "docs", "my", "out", "runs"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    now, committed = run(tmp_path / "docs"), nbformat.read(NOTEBOOK, as_version=4)
    assert not list((tmp_path / "docs").iterdir()) and not (tmp_path / "data").exists(), "it leaves something"
    for cell, then in zip(code_cells(now), code_cells(committed), strict=True):
        words, numbers = words_and_numbers(printed(cell))
        words_then, numbers_then = words_and_numbers(printed(then))
        assert words == words_then, cell.id
        share = 0.15 if cell.id in TRAINED else 0.02
        assert list(map(float, numbers)) == [near(number, share) for number in numbers_then], cell.id
        for picture, picture_then in zip(pictures(cell), pictures(then), strict=True):
            picture = picture.resize(picture_then.size)  # a plot's may differ by a pixel
            assert ImageStat.Stat(ImageChops.difference(picture, picture_then)).mean[0] < 8, cell.id


if __name__ == "__main__":
    nbformat.write(run(HERE), NOTEBOOK)
