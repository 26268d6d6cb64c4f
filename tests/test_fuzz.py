"""Pictures, metadata and command lines that are damaged at random: each is read, or refused in one line."""

import csv
import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import save_data

import backbone
import edit
import pictures
import train
from apps import pipeline
from data_making import check
from evaluation import evaluate
from pictures import pairs as reading

quick = settings(
    max_examples=100,
    deadline=None,  # the machine may be busy
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
TEXTS = ["", "\0", " ", "\n", "a" * 3000, "é\u202e", "C:\\a", "../x.png", "/etc/passwd", "-h", "None"]
NUMBERS = [-1, 0, 1, 7, 2**16, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")]
SPECIAL = [b"\0", b"\xff", b"\x7f\xff", b"\xff\xff\xff\x7f", b"\xc3\x28"]


@st.composite
def damaged(draw, data):
    """The bytes, cut, flipped, spliced or overwritten."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, len(data))), draw(st.sampled_from([1, 2, 4, 64]))
        special = draw(st.sampled_from(SPECIAL)) * size
        match draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "remove"])):
            case "cut":
                del data[at:]
            case "flip":
                data[at : at + 1] = bytes(x ^ 1 << draw(st.integers(0, 7)) for x in data[at : at + 1])
            case "overwrite":
                data[at : at + len(special)] = special
            case "insert":
                data[at:at] = special
            case "remove":
                del data[at : at + size]
    return bytes(data)


def in_one_line(error):
    return str(error) and "\n" not in str(error)


# --- Pictures -----------------------------------------------------------------------------------------------


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def sound_pictures():
    """A small one of every format and mode that is read, and some of others."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = [encoded(rgb.convert(mode), "PNG", exif=exif) for mode in ("RGB", "1", "L", "P", "RGBA", "LA")]
    found += [encoded(rgb, "JPEG", exif=exif, progressive=p) for p in (False, True)]
    found += [encoded(rgb.convert("CMYK"), "JPEG"), encoded(rgb, "BMP"), encoded(rgb, "GIF")]
    found += [encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(9)])]
    found += [encoded(rgb, "WEBP", lossless=flag, exif=exif) for flag in (False, True)]
    found += [encoded(rgb, "TIFF", compression=name) for name in (None, "tiff_deflate", "jpeg")]
    grey = Image.fromarray(rng.integers(0, 2**16, (20, 24)).astype(np.uint16))
    found += [encoded(grey, "PNG"), encoded(Image.fromarray(np.float32(rng.random((20, 24)))), "TIFF")]
    return [*found, *(encoded(rgb, form) for form in ("JPEG2000", "PPM", "TGA", "ICO", "EPS", "PDF"))]


PICTURES = sound_pictures()


@quick
@given(st.sampled_from(PICTURES).flatmap(lambda data: st.just(data) | damaged(data)))
def test_a_picture_is_read_or_refused_in_one_line(tmp_path, data):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = pictures.load_image(path)
        except pictures.ImageError as error:
            assert in_one_line(error)
        else:
            assert image.mode == "RGB" and pictures.to_panel(image, 8).isfinite().all()


# --- Metadata -----------------------------------------------------------------------------------------------

KEYS = ("input_file_name", "output_file_name", "instruction", "input_caption", "output_caption", "more")
LEAVES = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=9)
ANYTHING = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=3), LEAVES, max_size=3)
GOOD = dict(zip(KEYS, ("0_before.png", "0_after.png", "make it night", "a cup", "a hat", "")))
ROWS = st.lists(  # good ones, of which some lack a key or say something else under it
    st.just(GOOD) | st.fixed_dictionaries({}, optional={key: st.just(GOOD[key]) | ANYTHING for key in KEYS}),
    max_size=4,
)


def as_jsonl(rows):
    return "\n".join(map(json.dumps, rows)).encode()


def as_csv(rows):
    buffer = io.StringIO()
    csv.writer(buffer).writerows([KEYS, *([str(row.get(key, "")) for key in KEYS] for row in rows)])
    return buffer.getvalue().encode("utf-8", "replace")


@quick
@given(ROWS, st.booleans(), st.data())
@pytest.mark.parametrize("form", [as_jsonl, as_csv])
def test_metadata_is_read_or_refused_in_one_line(data, form, rows, is_damaged, choose):
    text = form(rows)
    name = "metadata.jsonl" if form is as_jsonl else "metadata.csv"
    (data / "train" / name).write_bytes(choose.draw(damaged(text)) if is_damaged else text)
    try:
        pairs = reading.read_pairs(data)
    except reading.DatasetError as error:
        assert in_one_line(error)
        return
    for pair in pairs:
        assert pair.instruction.strip()
        assert Path(pair.input).resolve().is_relative_to(data.resolve())
        assert Path(pair.output).resolve().is_relative_to(data.resolve())


@pytest.fixture
def data(tmp_path):
    """A dataset without metadata."""
    folder = save_data(tmp_path / "data", pairs=2)
    (folder / "train" / "metadata.jsonl").unlink()
    return folder


# --- Command lines ------------------------------------------------------------------------------------------

COMMANDS = [
    "edit.py --prompt-pair x.png x.png --input x.png --output out --instruction hat --model editor "
    "--num-images 1 --seed 0 --steps 1 --guidance-text 1 --guidance-visual 1 --scheduler ddim --device cpu",
    "evaluation/evaluate.py editor --data data --split train --mode pair --told instruction --count 2 "
    "--batch 2 --steps 1 --guidance-text 1 --guidance-visual 1 --seed 0 --device cpu --sheet 1",
    "train.py --data data --seed 0 --device cpu --steps 1 --batch 2 --accumulate 1 --lr 0.1 "
    "--answer-weight 4 --change-weight 1 --es-weight 0.05 --sam-weight 0.1 --panel 32 "
    "--workers 0 --save-every 1",
    "data_making/check.py data --split train",
]
MAINS = {
    "edit.py": edit,
    "evaluation/evaluate.py": evaluate,
    "train.py": train,
    "data_making/check.py": check,
}


@st.composite
def commands(draw):
    """One of `COMMANDS`, of which a word or two are replaced, gone or new."""
    program, *words = draw(st.sampled_from(COMMANDS)).split()
    odd = st.sampled_from(
        [*map(str, NUMBERS), *TEXTS, "..", "nowhere", "data", "cpu:9", "cuda:0", "٣", "1_0"]
    )
    for _ in range(draw(st.integers(1, 2))):
        k = draw(st.integers(0, len(words) - 1))
        match draw(st.sampled_from(["gone", "new", "replaced", "replaced"])):
            case "gone" if words[k - 1] != "--data":  # without it the toy world would be written
                del words[k]
            case "new":
                words.insert(k, draw(odd))
            case "replaced" if not words[k].startswith("--"):
                words[k] = draw(odd)
    return [program, *words]


class Reached(BaseException):
    """All that a command checks is checked: it would load models or train."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where commands run, which stop where they would load a model."""

    def reached(*_, **__):
        raise Reached

    for name in ("load_clip", "load_clip_tokenizer", "load_llm", "load_stable_diffusion"):
        monkeypatch.setattr(backbone, name, reached)
    monkeypatch.setattr(train, "Accelerator", reached)
    monkeypatch.setattr(pipeline.InstructGIEPipeline, "from_pretrained", reached)
    save_data(tmp_path / "data", pairs=2)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@quick
@given(commands())
def test_a_command_line_is_taken_or_refused_in_one_line(folder, capsys, words):
    before = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        try:
            MAINS[words[0]].main()
        except Reached:
            pass
        except SystemExit as end:
            error = capsys.readouterr().err
            # argparse quotes an argument as it is: one that holds a line break breaks the line.
            last = error if any("\n" in word for word in words) else error.rstrip("\n").split("\n")[-1]
            assert end.code in (None, 0, 1) or (end.code == 2 and ": error: " in last)
    assert sorted(folder.rglob("*")) == before
