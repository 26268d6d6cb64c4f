"""edit.py: the command, its pictures and its errors."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from tiny import P

import backbone
import edit
from apps.pipeline import InstructGIEPipeline


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with an example pair and an input of 60×30 pixels."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, size in (("before", (40, 40)), ("after", (40, 40)), ("x", (30, 60))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(f"{name}.png")
    return tmp_path


PAIR = ("--prompt-pair", "before.png", "after.png")


@pytest.fixture
def command(here, folders, monkeypatch):
    """edit.py in this process, with the tiny editor unless the options name another."""

    def run(*options):
        model = () if "--model" in options else ("--model", str(folders / "editor"))
        monkeypatch.setattr(sys, "argv", ["edit.py", *options, *model])
        edit.main()

    return run


def test_pair_alone_instruction_alone_and_both(command, capsys):
    command(*PAIR, "--input", "x.png", "--output", "pair.png")
    assert capsys.readouterr().out == "pair.png\n"
    command("--instruction", "add  a hat ", "--input", "x.png", "--output", "words.png")
    assert capsys.readouterr().out == 'instruction: "add a hat" -> "add a hat"\nwords.png\n'
    command(*PAIR, "--instruction", "add a hat", "--input", "x.png", "--output", "both.png")
    answers = [np.asarray(Image.open(f"{name}.png")) for name in ("pair", "words", "both")]
    assert [a.shape for a in answers] == [(P // 2, P, 3)] * 3  # the input's own aspect ratio
    assert len({a.tobytes() for a in answers}) == 3


def test_an_example_of_two_frames_is_named(command, capsys):
    command("--prompt-pair", "before.png", "x.png", "--input", "x.png", "--output", "out.png")
    told = capsys.readouterr().err
    assert "x.png: 60 × 30 pixels, where the picture before has 40 × 40: not one frame" in told
    command(*PAIR, "--input", "x.png", "--output", "out.png")
    assert "frame" not in capsys.readouterr().err


def test_the_command_edits_by_the_unified_form(command, monkeypatch):
    load = backbone.load_parts
    monkeypatch.setattr(backbone, "load_parts", lambda *a, **k: load(*a, **k)._replace(llm=(None, None)))
    unifier = SimpleNamespace(unify=lambda texts: ["add a hat"])
    monkeypatch.setattr(edit.liu, "InstructionUnifier", lambda *_: unifier)
    for words, name in (("a hat would suit him", "a.png"), ("add a hat", "b.png")):
        command("--instruction", words, "--input", "x.png", "--output", name)
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()


def test_settings_are_stored_and_make_the_answer_again(command):
    options = "--steps", "3", "--guidance-text", "2", "--guidance-visual", "1.25", "--scheduler", "euler-a"
    common = *PAIR, "--instruction", "add a hat", "--input", "x.png"
    command(*common, "--seed", "7", *options, "--output", "a.png")
    record = json.loads(Image.open("a.png").text["instructgie"])
    wanted = {"instruction": "add a hat", "unified": "add a hat", "input": "x.png", "seed": 7, "steps": 3}
    wanted |= {"guidance_text": 2.0, "guidance_visual": 1.25, "scheduler": "euler-a", "dtype": "float32"}
    wanted |= {"prompt_pair": ["before.png", "after.png"]}
    assert wanted.items() <= record.items() and record["model"].endswith("editor")
    command(*common, "--seed", "7", *options, "--output", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    command(*common, "--output", "c.png")  # the editor's own settings, and the class's where it has none
    record = json.loads(Image.open("c.png").text["instructgie"])
    assert (record["steps"], record["guidance_text"], record["guidance_visual"]) == (2, 1.5, 1.0)


def test_folders_clashing_stems_several_images_and_grids(command, here):
    for name in ("photos/b.jpg", "photos/a.png", "photos/.hidden.png", "other/a.bmp"):
        (here / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), "red").save(here / name)
    (here / "photos" / "notes.txt").write_text("not a picture")
    many = "--num-images", "2", "--grid", "--steps", "1"
    command(*PAIR, "--input", "photos", "other/a.bmp", *many, "--output", "out")
    stems = [f"{stem}_{k}" for stem in ("a", "b", "a-2") for k in (0, 1)]
    wanted = {f"{stem}{end}.png" for stem in stems for end in ("", "_grid")}
    assert {path.name for path in (here / "out").iterdir()} == wanted
    assert Image.open("out/a_1_grid.png").size == (2 * 192, 2 * 192 + 40)
    seeds = [json.loads(Image.open(f"out/a_{k}.png").text["instructgie"])["seed"] for k in (0, 1)]
    assert seeds == [0, 1]
    assert Path("out/a_0.png").read_bytes() != Path("out/a_1.png").read_bytes()
    command(*PAIR, "--input", "photos/a.png", "--seed", "1", "--steps", "1", "--output", "one.png")
    alone, together = (np.asarray(Image.open(name)).astype(int) for name in ("one.png", "out/a_1.png"))
    assert np.array_equal(alone, together)


def test_of_a_folder_what_can_be_edited_is_and_the_rest_is_named(command, here, capsys):
    (here / "photos" / "more").mkdir(parents=True)
    whole = (here / "x.png").read_bytes()
    files = {
        "a.png": whole,
        "b.heic": b"\0\0\0 ftypheic" + bytes(50),
        "c.jpg": whole,
        "scan.pdf": b"%PDF-1.4",
    }
    files |= {"cut.png": whole[:500], ".DS_Store": b"", "._a.png": b"", "notes.txt": b"seen"}
    for name, data in files.items():
        (here / "photos" / name).write_bytes(data)
    command(*PAIR, "--input", "photos", "x.png", "--steps", "1", "--output", "out")
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["out/a.png", "out/c.png", "out/x.png"]
    left_out = dict(re.findall(r"^left out: (.*?): (.*)$", shown.err, re.MULTILINE))
    assert set(left_out) == {
        f"photos/{name}" for name in ("b.heic", "cut.png", "more", "notes.txt", "scan.pdf")
    }
    assert shown.err.count("left out: ") == 5 and left_out["photos/more"] == "is a folder"
    assert "not a picture that is read here (PNG, JPEG" in left_out["photos/scan.pdf"]
    assert "corrupt or truncated" in left_out["photos/cut.png"]


def test_what_is_left_out_is_not_overwritten(command, here, refused):
    (here / "photos").mkdir()
    Image.open("x.png").save("photos/a.jpg")
    (here / "photos" / "a.png").write_bytes(b"broken")
    line = refused(command, *PAIR, "--input", "photos", "--steps", "1", "--output", "photos")
    assert "overwrite" in line
    assert (here / "photos" / "a.png").read_bytes() == b"broken"


def test_a_folder_in_which_nothing_can_be_edited(command, here, capsys):
    (here / "photos").mkdir()
    (here / "photos" / "scan.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(SystemExit) as exit:
        command(*PAIR, "--input", "x.png", "photos", "--output", "out")
    errors = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and not (here / "out").exists()
    assert errors[0].startswith("left out: photos/scan.pdf: not a picture")
    assert errors[1:] == ["edit.py: error: photos: no picture in this folder"]


# ------------------------------------------------------------------------------------------- errors

INPUT, OUTPUT = ("--input", "x.png"), ("--output", "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ((*INPUT, *OUTPUT), "--prompt-pair, --instruction or both"),
        ((*INPUT, *OUTPUT, "--instruction", " "), "--prompt-pair, --instruction or both"),
        ((*PAIR, "--input", "missing.png", *OUTPUT), "missing.png: no such file"),
        ((*PAIR, "--input", "x.png", "corrupt.png", *OUTPUT), "corrupt.png: "),
        ((*PAIR, "--input", "empty", *OUTPUT), "empty: no picture in this folder"),
        (("--prompt-pair", "before.png", "no.png", *INPUT, *OUTPUT), "no.png: no such file"),
        ((*PAIR, *INPUT, *OUTPUT, "--model", "nowhere/at/all"), "nowhere/at/all: no such folder"),
        ((*PAIR, *INPUT, *OUTPUT, "--model", "empty"), "empty: not an editor's folder"),
        ((*PAIR, *INPUT, *OUTPUT, "--steps", "0"), "--steps must be at least 1"),
        ((*PAIR, *INPUT, *OUTPUT, "--steps", "1001"), "1 … 1000, not 1001"),
        ((*PAIR, *INPUT, *OUTPUT, "--num-images", "0"), "--num-images must be 1 … 10000, not 0"),
        ((*PAIR, *INPUT, *OUTPUT, "--guidance-text", "nan"), "--guidance-text must be a finite number"),
        ((*PAIR, *INPUT, *OUTPUT, "--guidance-visual", "inf"), "--guidance-visual must be a finite number"),
        ((*PAIR, *INPUT, *OUTPUT, "--seed", "-1"), "--seed must be 0 … 4611686018427387904, not -1"),
        ((*PAIR, *INPUT, "--output", "out.png", "--num-images", "2"), "several go to a folder"),
        ((*PAIR, *INPUT, "--output", "out.jpg"), "one answer goes to a .png file"),
        ((*PAIR, *INPUT, "--output", "notes"), "notes is a file; give a folder's name"),
        ((*PAIR, *INPUT, "--output", "taken"), "cannot be written, a folder is there"),
        ((*PAIR, *INPUT, "--output", "notes/a.png"), "notes is a file; give a folder's name"),
        ((*PAIR, *INPUT, "--output", "x.png"), "overwrite a picture that is read"),
        ((*PAIR, *INPUT, "--output", "X.png"), "overwrite a picture that is read"),  # on macOS the same file
        (("--instruction", "a \udcff hat", *INPUT, *OUTPUT), "codec can't encode"),
        ((*PAIR, *INPUT, "--output", "."), "overwrite a picture that is read"),
        pytest.param(
            (*PAIR, *INPUT, *OUTPUT, "--model", "EDITOR", "--device", "cuda"),
            "--device cuda: no such device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there"),
        ),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(command, here, folders, capsys, options, message):
    (here / "corrupt.png").write_bytes((here / "x.png").read_bytes()[:500])
    (here / "notes").write_text("")
    (here / "empty").mkdir()
    (here / "taken" / "x.png").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    options = [f"{folders}/./editor" if option == "EDITOR" else option for option in options]
    with pytest.raises(SystemExit) as exit:
        command(*options)
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and errors.startswith("edit.py: error: ") and message in errors
    assert errors.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_the_command_offers_every_sampler(command, refused):
    told = refused(command, *PAIR, *INPUT, *OUTPUT, "--scheduler", "nothing")
    assert all(name in told for name in backbone.SAMPLERS)


def test_an_interrupted_write_leaves_no_file(here, monkeypatch):
    def stumble(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", stumble)
    with pytest.raises(OSError):
        edit.save_png(Image.new("RGB", (4, 4)), here / "out" / "a.png", {})
    assert not list((here / "out").iterdir())


@pytest.mark.parametrize(
    "program, usage, option",
    [(("edit.py",), "edit.py", "--prompt-pair"), (("-m", "apps.page"), "apps.page", "--port")],
)
def test_help_comes_before_the_slow_imports(program, usage, option):
    asked = [sys.executable, "-X", "importtime", *program, "--help"]
    done = subprocess.run(asked, cwd=backbone.HERE, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {usage} ") and option in done.stdout
    assert "argparse" in done.stderr and not re.search("torch|diffusers|gradio", done.stderr)


def test_the_command_draws_what_the_pipeline_draws(command, folders):
    own = "--steps", "3", "--guidance-text", "3", "--guidance-visual", "1.25", "--scheduler", "euler"
    command(*PAIR, "--instruction", "add a hat", "--input", "x.png", "--seed", "7", *own, "--output", "a.png")
    pipe = InstructGIEPipeline.from_pretrained(folders / "editor")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    before, after, query = (Image.open(f"{name}.png") for name in ("before", "after", "x"))
    wanted = pipe("add a hat", query, (before, after), 3, 3.0, 1.25, edit.seeded([7])).images[0]
    assert Image.open("a.png").tobytes() == wanted.tobytes()
