"""The pages that are to be run as they stand: their blocks of commands, in a folder of links to this one."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
import backbone  # noqa: E402
from docs import check  # noqa: E402
from evaluation import ablations  # noqa: E402

BUILT = {  # not spelt out there
    "train.py": {"--stable-diffusion", "--clip", "--segmenter", "--llm"},
    "data_making.texts": {"--out", "--backbone"},
    "data_making.pictures": {"--out", "--backbone"},
}


def test_pages_show_commands():
    assert sum(len(check.commands(page)) for page in check.PAGES) > 50


@pytest.mark.parametrize("page", check.PAGES, ids=lambda page: page.name)
def test_commands_name_programs_and_options_that_are_there(page):
    """`make docs-check` runs them all; this finds at once what was renamed."""
    for command in check.commands(page):
        words = check.smaller(command).split(";")[-1].split()
        program = next((word for word in words if word.endswith(".py")), None)
        if program is None and "-m" in words and words[0] in ("python", "accelerate"):
            program = words[words.index("-m") + 1]  # a module of a room
        if program is None or program in ("pip", "pytest"):
            continue
        path = HERE / (program if program.endswith(".py") else f"{program.replace('.', '/')}.py")
        path = path if path.exists() else path.with_suffix("") / "__main__.py"
        source = path.read_text(encoding="utf-8")
        if "train.main(" in source:  # its options are those of train.py
            source += (HERE / "train.py").read_text(encoding="utf-8")
        options = {word.split("=")[0] for word in words[words.index(program) :] if word.startswith("--")}
        known = {option for option in options if f'"{option}"' in source} | BUILT.get(program, set())
        assert options <= known | {"--help"}, f"{page.name}: {command}"


def test_tests_that_a_page_names_are_there():
    files = {f"tests/{path.name}": path.read_text() for path in Path(HERE, "tests").glob("*.py")}
    tests = set(re.findall(r"def (test_\w+)", "".join(files.values()))) | set(files)
    named = re.findall(r"`((?:tests/)?test_[\w.]+)`", "".join(page.read_text() for page in check.PAGES))
    assert len(named) > 40 and set(named) <= tests


def test_what_is_shown_at_paper_size_is_run_at_the_toys():
    shown = (
        "accelerate launch --num_processes 8 train.py --backbone sd15 --data FOLDER --precision bf16  # eight"
    )
    run = check.smaller(shown)
    assert "sd15" not in run and "FOLDER" not in run and "#" not in run and "--data tiny --steps 2" in run
    assert run.startswith("rm -rf runs/train; accelerate launch --cpu --num_processes 1 train.py")


@pytest.fixture
def run(tmp_path):
    """Runs all blocks of a page → what they printed. What they write is under tmp_path."""
    for path in HERE.iterdir():
        if not path.name.startswith(".") and path.name not in ("my", "out", "runs"):
            (tmp_path / path.name).symlink_to(path)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(page):
        printed = []
        for block in re.findall(r"```bash\n(.*?)```", (HERE / "docs" / page).read_text(), re.DOTALL):
            command = ["bash", "-e", "-c", block]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            printed.append(done.stdout)
        return printed

    return run


@pytest.mark.slow
def test_ten_pairs_of_ones_own_teach_an_edit(run, tmp_path):
    last = run("your-own-pictures.md")[-1]
    away = {
        name: float(levels) for name, levels in re.findall(r"^(\S+): ([\d.]+) levels", last, re.MULTILINE)
    }
    assert list(away) == ["new_before", "answer-before-training", "answer"]
    assert away["answer"] < 0.7 * away["answer-before-training"]
    assert (tmp_path / "my" / "sheet.png").exists()


@pytest.mark.slow
def test_the_dataset_is_made_again_on_the_toy_parts(run, tmp_path):
    made = run("dataset.md")
    assert int(re.search(r"captions: (\d+) instructions", made[0])[1]) >= 20
    assert int(re.search(r"^instructions +(\d+)", made[2], re.MULTILINE)[1]) >= 10


def marks_of_ours():
    """Each `[ours]` in the code: its file, and the functions and classes round it."""
    for path in HERE.rglob("*.py"):
        name = path.relative_to(HERE).as_posix()
        if name.split("/")[0] in {"tests", "docs", "exercises", "out", "runs", "data"} or name[0] == ".":
            continue
        text = path.read_text(encoding="utf-8")
        nodes = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        for n, line in enumerate(text.splitlines(), 1):
            if re.search(r"(^|\W)\[ours\]", line):
                yield name, {node.name for node in nodes if node.lineno <= n <= node.end_lineno}


def test_every_choice_of_ours_is_marked_in_the_code_and_listed_with_its_reason():
    page = (HERE / "docs" / "choices.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+\.py)` ?([^|]*?) \| .+ \| .+ \| .+ \|$", page, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", page, re.MULTILINE)), "a row lacks a cell"
    listed = [(file, {name.strip() for name in names.split(",")}) for file, names in rows]
    marks = list(marks_of_ours())
    for file, around in marks:
        found = [names for other, names in listed if other == file and (not around or around & names)]
        assert found, f"{file}: [ours] in {around or 'the module'} has no row in docs/choices.md"
    for file, names in listed:
        assert any(file == other for other, _ in marks), f"{file} has no mark"
        words = set(re.findall(r"\w+", (HERE / file).read_text(encoding="utf-8")))
        assert names - {""} <= words, f"{file}: {names}"


def sentences(page):
    """Those of its paragraphs and lists, without code, formulas, tables, headings, marks and addresses."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"`[^`]*`|\$[^$]*\$", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\[(paper|figure|ours)\]", "", text)
    text = re.sub(r"^(#|\||<).*$", "", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text):
        yield from re.split(r"(?<=[.!?:])\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("page", [*check.PAGES, HERE / "training" / "card.md"], ids=lambda page: page.name)
def test_a_sentence_has_25_words_at_most(page):
    long = [sentence for sentence in sentences(page) if len(re.findall(r"[\w'’-]+", sentence)) > 25]
    assert not long


def test_the_pages_tell_of_the_shipped_parts_and_of_one_measurement():
    kept, toy = HERE / "docs" / "results", backbone.preset("toy")
    budget = json.loads((kept / "budget.json").read_text())
    for part in ablations.FROZEN:
        assert budget[part] == backbone.fingerprint(getattr(toy, part), part)
    page, readme = ((HERE / name).read_text(encoding="utf-8") for name in ("docs/toy.md", "README.md"))
    measured = json.loads((kept / "shipped-0.json").read_text())
    assert measured.pop("command") == ["instructgie"]
    assert measured.pop("editor") == backbone.fingerprint(toy.editor, "editor")
    for split, row in measured.items():
        assert f"| {split} | both | {row['n']} | {100 * row['accuracy']:.1f} (" in page
    assert f"answers {100 * measured['seen']['accuracy']:.0f} of 100 queries" in " ".join(readme.split())
