"""docs/: the figures and the numbers beside them, the worked examples as they are quoted, and all links."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from docs import figures
from toy import world

HERE = Path(__file__).resolve().parents[1]
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")


def quoted(command: str) -> list[tuple[str, list[str]]]:
    """All that the pages quote of a command: the page, and the lines that stand under it."""
    block = re.compile(rf"```\n\$ {re.escape(command)}\n(.*?)```", re.DOTALL)
    return [
        (page.name, text.splitlines()) for page in PAGES for text in block.findall(page.read_text("utf-8"))
    ]


# --- Figures ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The toy world's split that the figures are drawn from, as `toy.world` writes it."""
    folder = tmp_path_factory.mktemp("toy")
    world.write_split(folder / "seen", world.draw_split("seen", *world.SPLITS["seen"], seed=0))
    return folder


def without_numbers(line: str) -> tuple[str, list[float]]:
    number = r"-?\d+(?:\.\d+)?"
    return re.sub(number, "#", line), [float(one) for one in re.findall(number, line)]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_drawn_and_its_page_quotes_what_it_prints(name, data, tmp_path, capsys):
    figures.main(["--only", name, "--output", str(tmp_path), "--data", str(data)])
    drawn = tmp_path / f"{name}-figure.png"
    shipped = HERE / "docs" / drawn.name
    assert drawn.stat().st_size < 150_000 and shipped.stat().st_size < 150_000
    pictures = (Image.open(path).convert("L") for path in (drawn, shipped))
    assert ImageStat.Stat(ImageChops.difference(*pictures)).mean[0] < 8  # libraries may set text otherwise
    printed = [without_numbers(line) for line in capsys.readouterr().out.splitlines()]
    ((page, lines),) = quoted(f"python docs/figures.py --only {name}")
    assert page == f"{name}.md"
    assert [words for words, _ in map(without_numbers, lines)] == [words for words, _ in printed]
    for line, (_, now) in zip(lines, printed):  # another processor may round otherwise
        assert without_numbers(line)[1] == pytest.approx(now, rel=0.02, abs=0.011)


def test_scans_go_where_they_say():
    rows, columns, back, _ = figures.scan_orders(4)
    assert rows.tolist() == list(range(16)) and back.tolist() == list(range(15, -1, -1))
    assert columns[:5].tolist() == [0, 4, 8, 12, 1]
    assert figures.twin_steps(4) == (2 + 8) / 2  # half a row; half the grid's rows


# --- Worked examples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["rcldm", "esm", "liu", "sam_loss"])
def test_a_worked_example_prints_what_its_page_quotes(module, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runpy.run_path(str(HERE / f"{module}.py"), run_name="__main__")
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    ((page, lines),) = quoted(f"python {module}.py")
    assert page == f"{module.removesuffix('_loss')}.md"
    at = 0
    for before, line in zip(["", *lines], lines):
        if line != "…":
            at = printed.index(line, at) if before == "…" else at
            assert printed[at] == line
            at += 1
    assert at == len(printed)


def test_what_pages_say_of_the_results_stands_there():
    results = " ".join((HERE / "docs" / "results.md").read_text("utf-8").split())
    quotes = {page.name: re.findall(r"^> (.+)$", page.read_text("utf-8"), re.MULTILINE) for page in PAGES}
    for name in ("rcldm.md", "esm.md", "liu.md", "sam.md"):
        (quote,) = quotes[name]
        assert quote in results, f"docs/{name} quotes what docs/results.md no longer says: {quote}"


# --- Links --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_pages_have_links():
    assert sum(len(LINK.findall(page.read_text("utf-8"))) for page in PAGES) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_headings_and_names(page):
    for link in LINK.finditer(page.read_text("utf-8")):
        path, _, anchor = link["target"].partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link[0]} leads nowhere"
        if target.suffix == ".md" and anchor:
            assert anchor in anchors(target), f"{page.name}: {link[0]}: no such heading"
        name = link["text"].strip("`")
        if target.suffix == ".py" and not name.endswith(".py"):  # not of a file, but of something in it
            assert not anchor, f"{page.name}: {link[0]}: lines move; link the file and name the symbol"
            if link["text"] == f"`{name}`":
                assert name in target.read_text("utf-8"), f"{page.name}: {link[0]}: nothing of that name"
