"""dataset.py: grids, pictures of every mode, the two readers with what they must refuse, and the draws."""

import csv
import json
import logging
import os
import random
import runpy
import shutil
import warnings
import zlib

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin
from torch.utils.data import DataLoader

import dataset as ds
import pictures
from evaluation import evaluate
from pictures import pairs as reading

torch.set_num_threads(1)


# --- Grids --------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
)
@settings(max_examples=25, deadline=None)
def test_a_mask_changes_its_panels_and_no_other(batch, channels, size, dtype):
    panels = torch.randint(1, 99, (4, *batch, channels, size, size)).to(dtype)
    grid = ds.compose_grid(*panels)
    assert grid.shape == (*batch, channels, 2 * size, 2 * size)
    assert torch.equal(ds.answer_panel(grid), panels[3])
    kept, grey = grid.clone(), torch.zeros_like(panels[0])
    assert torch.equal(ds.mask_query(grid), ds.compose_grid(*panels[:3], grey))
    assert torch.equal(ds.drop_example(grid), ds.compose_grid(grey, grey, *panels[2:]))
    assert torch.equal(grid, kept)  # a copy is masked, never the grid itself


def test_every_panel_has_its_place():
    grid = ds.compose_grid(*(torch.full((1, 1, 1), value) for value in (1.0, 2.0, 3.0, 4.0)))
    assert grid.tolist() == [[[1, 2], [3, 4]]]  # example before, example after; query, answer


@pytest.mark.parametrize("shape", [(3, 5, 5), (3, 4, 6), (4, 4), (3, 0, 0)])
def test_what_is_no_grid_is_refused(shape):
    for function in (ds.answer_panel, ds.mask_query, ds.drop_example):
        with pytest.raises(ValueError, match="even sides"):
            function(torch.zeros(shape))


def test_panels_must_be_square_and_alike():
    square = torch.zeros(3, 4, 4)
    with pytest.raises(ValueError, match="one shape"):
        ds.compose_grid(square, square, square, torch.zeros(3, 6, 6))
    with pytest.raises(ValueError, match="square"):
        ds.compose_grid(*[torch.zeros(3, 4, 6)] * 4)


# --- Pictures -----------------------------------------------------------------------------------------------


def picture(size=(12, 8), seed=0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def seen(path) -> Image.Image:
    """As `load_image` reads it, which is what `edit.py`, the page and the dataset show the model. What Pillow
    opens, and a user gives to the pipeline, is seen alike."""
    loaded = pictures.load_image(path)
    cropped, fitted = (lambda x: pictures.to_panel(x, 8)), (lambda x: pictures.fit_panel(x, 8)[0])
    for see in (pictures.image_to_tensor, cropped, fitted):
        assert torch.equal(see(Image.open(path)), see(loaded))
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_and_image_are_inverse(dtype):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    tensor = pictures.image_to_tensor(ramp)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 16, 16)
    assert tensor.min() == -1 and tensor.max() == 1
    assert pictures.tensor_to_image(tensor.to(dtype)).tobytes() == ramp.tobytes()
    assert pictures.tensor_to_image(tensor * 3).getpixel((15, 15)) == (255, 255, 255)  # clipped, not wrapped


def test_panel_is_the_centred_square():
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    for size in (4, 10, 16):
        panel = pictures.to_panel(image, size)
        assert panel.shape == (3, size, size)
    assert torch.equal(pictures.to_panel(image, 10)[:, 5, 5], torch.tensor([-1.0, -1.0, 1.0]))
    assert (pictures.to_panel(image, 10)[0] == -1).all()  # nothing of the red margins
    exact = picture((8, 8))
    assert torch.equal(
        pictures.to_panel(exact, 8), pictures.image_to_tensor(exact)
    )  # a panel of the right size stays as it is


def test_a_broken_exif_block_tells_no_orientation(tmp_path):
    picture().save(tmp_path / "photo.png", exif=b"Exif\0\0no TIFF header")
    assert pictures.load_image(tmp_path / "photo.png").tobytes() == picture().tobytes()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, ending):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))  # the upper-left corner, once the picture stands upright
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"photo.{ending}", exif=exif, quality=95)
    loaded = seen(tmp_path / f"photo.{ending}")
    assert loaded.size == (48, 32)
    red, green, _ = loaded.getpixel((4, 4))
    assert red > 200 and green < 60 and min(loaded.getpixel((40, 28))) > 200


MODES = {
    "1.png": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "l.png": (Image.new("L", (4, 4), 100), (100, 100, 100)),
    "la.png": (Image.new("LA", (4, 4), (100, 0)), (255, 255, 255)),
    "rgba.png": (Image.new("RGBA", (4, 4), (200, 0, 0, 128)), (227, 127, 127)),
    "clear.png": (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), (255, 255, 255)),
    "hidden.png": (Image.new("LA", (4, 4), (0, 128)), (127, 127, 127)),
    "cmyk.jpg": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (254, 0, 0)),
    "palette.gif": (Image.new("RGB", (4, 4), (255, 0, 0)).quantize(4), (255, 0, 0)),
    "sixteen.png": (Image.fromarray(np.full((4, 4), 25700, np.uint16)), (100, 100, 100)),
    "sixteen_big_endian.tiff": (Image.frombytes("I;16B", (4, 4), b"\x64\x64" * 16), (100, 100, 100)),
    "clear.gif": (Image.new("RGBA", (4, 4), (200, 0, 0, 0)), (255, 255, 255)),
    "sixteen.tiff": (Image.fromarray(np.full((4, 4), 65535, np.uint16)), (255, 255, 255)),
    "rgb.webp": (Image.new("RGB", (4, 4), (0, 0, 255)), (0, 0, 255)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(tmp_path, name):
    image, expected = MODES[name]
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    loaded = seen(str(tmp_path / name))
    assert loaded.mode == "RGB" and loaded.size == (4, 4)
    assert np.abs(np.subtract(loaded.getpixel((2, 2)), expected)).max() <= 2, loaded.getpixel((2, 2))


@pytest.mark.parametrize("shades, blue", [(0, (0, 0, 255)), (b"\x00\x80\xff", (127, 127, 255))])
def test_a_palette_with_transparency_shows_white_through(tmp_path, recwarn, shades, blue):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "p.png", transparency=shades)
    loaded = seen(tmp_path / "p.png")
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), blue, (0, 0, 0)]
    assert not recwarn.list


@pytest.mark.parametrize("size", [(1, 1), (1, 2999), (2999, 1)])
def test_a_picture_of_one_row_or_column_is_a_panel(tmp_path, size):
    Image.new("RGB", size, (255, 0, 255)).save(tmp_path / "line.png")
    panel = pictures.to_panel(pictures.load_image(tmp_path / "line.png"), 8)
    assert panel.shape == (3, 8, 8) and panel.mean((1, 2)).tolist() == [1, -1, 1]


# ICC profiles: tables of tags behind a head of 128 bytes that names the colour space and what it converts to.


def fixed(*numbers: float) -> bytes:
    return b"".join(round(number * 65536).to_bytes(4, "big", signed=True) for number in numbers)


def icc(space: bytes, target: bytes, tags: dict[bytes, bytes]) -> bytes:
    head = bytearray(128)
    head[8:12], head[12:16], head[36:40], head[68:80] = (
        b"\2\x40\0\0",
        b"prtr",
        b"acsp",
        fixed(0.9642, 1, 0.8249),
    )
    head[16:20], head[20:24] = space, target
    table, body, start = len(tags).to_bytes(4, "big"), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + (start + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data + bytes(-len(data) % 4)
    head[:4] = (start + len(body)).to_bytes(4, "big")
    return bytes(head) + table + body


def display_p3() -> bytes:
    """Little CMS's sRGB with the primaries of Display P3, D50-adapted."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189)}
    primaries |= {b"bXYZ": (0.15710, 0.06657, 0.78407)}
    for at in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12):
        if xyz := primaries.get(bytes(data[at : at + 4])):
            where = int.from_bytes(data[at + 4 : at + 8], "big") + 8
            data[where : where + 12] = fixed(*xyz)
    return bytes(data)


P3 = display_p3()
LINEAR_GREY = icc(
    b"GRAY", b"XYZ ", {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249), b"kTRC": b"curv" + bytes(8)}
)
# A press that prints white where there is all ink, and black where there is none, in Lab of 8 bits.
CORNERS = b"".join(bytes([255 * (k == 15), 128, 128]) for k in range(16))
RAMP = bytes(range(256))
NEGATIVE_CMYK = icc(
    b"CMYK",
    b"Lab ",
    {
        b"A2B0": b"mft1"
        + bytes(4)
        + b"\4\3\2\0"
        + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
        + RAMP * 4
        + CORNERS
        + RAMP * 3
    },
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def from_p3(levels: tuple[int, int, int]) -> np.ndarray:
    """By the formulas: Display P3 has sRGB's curve and white, and other primaries."""
    encoded = np.array(levels) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    matrix = [[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09828]]
    linear = np.clip(matrix @ linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff", "a.jpg", "rgba.png", "palette.png"])
def test_display_p3_becomes_srgb(tmp_path, name):
    levels = (200, 80, 60)
    image = Image.new("RGB", (8, 8), levels)
    if name == "rgba.png":
        image.putalpha(255)
        image.paste((9, 9, 9, 0), (0, 0, 4, 8))
    image = image.quantize(4) if name == "palette.png" else image
    lossless = {"quality": 100, "subsampling": 0} if name == "a.jpg" else {"lossless": True}
    image.save(tmp_path / name, icc_profile=P3, **lossless)
    loaded = seen(tmp_path / name)
    wanted = from_p3(levels)
    assert np.abs(wanted - levels).max() > 15 and np.abs(loaded.getpixel((6, 6)) - wanted).max() <= 2
    if name == "rgba.png":
        assert loaded.getpixel((1, 1)) == (255, 255, 255)  # the page itself is sRGB
    assert pictures.to_rgb(loaded).tobytes() == loaded.tobytes()  # not converted twice


def test_grey_and_cmyk_by_their_profiles(tmp_path):
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png", icc_profile=LINEAR_GREY)
    Image.new("LA", (4, 4), (128, 255)).save(tmp_path / "la.png", icc_profile=LINEAR_GREY)
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "16.png", icc_profile=LINEAR_GREY)
    for name in ("grey.png", "la.png", "16.png"):
        assert np.abs(np.subtract(pictures.load_image(tmp_path / name).getpixel((1, 1)), 188)).max() <= 1
    for ending in ("tiff", "jpg"):
        Image.new("CMYK", (8, 8), (255,) * 4).save(tmp_path / f"a.{ending}", icc_profile=NEGATIVE_CMYK)
        assert min(pictures.load_image(tmp_path / f"a.{ending}").getpixel((1, 1))) >= 250
        Image.new("CMYK", (8, 8), (255,) * 4).save(tmp_path / f"a.{ending}")
        assert max(pictures.load_image(tmp_path / f"a.{ending}").getpixel((1, 1))) <= 5


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_profile_of_srgb_or_of_no_use_changes_no_pixel(tmp_path, mode):
    image = picture((32, 32)).convert(mode)
    image.save(tmp_path / "plain.tiff")
    wanted = pictures.load_image(tmp_path / "plain.tiff").tobytes()
    others = {"RGB": [SRGB, LINEAR_GREY, NEGATIVE_CMYK], "L": [SRGB, P3], "CMYK": [SRGB, P3]}[mode]
    for profile in (b"broken", P3[:200], bytes(500), *others):
        image.save(tmp_path / "a.tiff", icc_profile=profile)
        assert pictures.load_image(tmp_path / "a.tiff").tobytes() == wanted


def test_sixteen_bits_keep_their_shades(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.array_equal(
        np.asarray(pictures.load_image(tmp_path / "ramp.png"))[..., 0], np.arange(256).reshape(16, 16)
    )


def bad_pictures(folder) -> dict[str, str]:
    """Broken files of many kinds, and a word that the message must hold."""
    picture((64, 64)).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"not a picture")
    (folder / "folder.png").mkdir()
    Image.new("1", (9500, 9500)).save(folder / "wide.png")  # 90 million pixels in a few kilobytes
    Image.new("1", (14000, 14000)).save(folder / "wider.png")
    for value in (np.nan, np.inf):
        Image.fromarray(np.full((4, 4), value, np.float32)).save(folder / f"{value}.tiff")
    Image.new("RGB", (8, 8)).save(folder / "other.jp2")
    (folder / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    note = PngImagePlugin.PngInfo()
    note.add_text("bomb", "a" * 4_000_000, zip=True)
    picture().save(folder / "text_bomb.png", pnginfo=note)
    return {
        "missing.png": "no such file",
        "folder.png": "is a folder",
        "truncated.png": "corrupt",
        "flipped.png": "corrupt",
        "empty.png": "not a picture",
        "text.png": "not a picture",
        "wide.png": "pixels",
        "wider.png": "pixels",
        "nan.tiff": "grey values",
        "inf.tiff": "grey values",
        "other.jp2": r"not a picture that is read here \(PNG, JPEG",
        "program.eps": "not a picture that is read here",
        "text_bomb.png": "text_bomb",
        "no\0name.png": "no such file",
    }


def test_a_transparent_grey_of_16_bits_shows_white(tmp_path):
    Image.fromarray(np.array([[1000, 1001]], np.uint16)).save(tmp_path / "grey.png", transparency=1000)
    data, at = (tmp_path / "grey.png").read_bytes(), 33  # behind the header
    clear = b"tRNS" + (1000).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + clear + zlib.crc32(clear).to_bytes(4, "big")
    (tmp_path / "grey.png").write_bytes(data[:at] + chunk + data[at:] if b"tRNS" not in data else data)
    loaded = pictures.load_image(tmp_path / "grey.png")
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (4, 4, 4)]


def test_a_bad_picture_is_one_line_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)  # no program is started, as Ghostscript would be
    for name, reason in bad_pictures(tmp_path).items():
        with pytest.raises(pictures.ImageError, match=reason) as caught:
            pictures.load_image(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with warnings.catch_warnings(record=True) as warned:  # none: the error says it
        warnings.resetwarnings()
        load_image = runpy.run_path(pictures.files.__file__)["load_image"]
        with pytest.raises(ValueError, match="pixels"):
            load_image(tmp_path / "wide.png")
    assert not warned


# --- Readers ------------------------------------------------------------------------------------------------

WORDS = ["make it night", "make it night", "add a hat", "add  a hat ", "make it night", "remove the cup"]


def save_pictures(folder, names) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture((16, 16), seed).save(folder / name)


def make_folder(root, instructions=WORDS, split="train"):
    """A dataset in the ImageFolder convention; returns the split's folder."""
    folder = root / split
    folder.mkdir(parents=True)
    rows = []
    for k, instruction in enumerate(instructions):
        row = {"input_file_name": f"images/{k}_in.png", "output_file_name": f"images/{k}_out.png"}
        rows.append({**row, "instruction": instruction, "input_caption": f"caption {k}", "score": k})
        save_pictures(folder, list(row.values()))
    write_rows(folder, rows)
    return folder


def write_rows(folder, rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def test_folder_reader(tmp_path):
    folder = make_folder(tmp_path)
    pairs = reading.read_pairs(tmp_path)
    assert pairs == reading.read_pairs(str(folder))
    assert [pair.instruction for pair in pairs] == [" ".join(words.split()) for words in WORDS]
    first = pairs[0]
    assert (first.input_caption, first.output_caption, first.extra) == ("caption 0", None, {"score": 0})
    assert os.path.samefile(first.input, folder / "images/0_in.png")
    assert pictures.load_image(first.output).tobytes() == picture((16, 16), 1).tobytes()
    make_folder(tmp_path, split="seen")
    assert "/seen/" in reading.read_pairs(tmp_path, split="seen")[0].input.replace("\\", "/")


def test_metadata_csv_is_read_as_jsonl(tmp_path, monkeypatch):
    """As the `datasets` library reads it, too."""
    words = [*WORDS[:-1], 'say "cheese",\nloudly', "2024", "2024"]
    folder = make_folder(tmp_path / "data", words)
    wanted = reading.read_pairs(tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0] |= {"ratio": 0.5, "note": "of a barn"}
    wanted[0].extra |= {"ratio": 0.5, "note": "of a barn"}
    for pair in wanted:  # a cell of a table is a text
        pair.extra = {key: str(value) for key, value in pair.extra.items()}
    (folder / "metadata.jsonl").unlink()
    with open(folder / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    assert reading.read_pairs(tmp_path / "data") == reading.read_pairs(folder) == wanted
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "data"), split="train")
    assert theirs[5]["output"].tobytes() == pictures.load_image(wanted[5].output).tobytes()
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(reading.DatasetError, match="lie in one folder; keep one of the two"):
        reading.read_pairs(tmp_path / "data")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("input_file_name,instruction\na.png,x\n", "2: has no 'output_file_name', only 'input_file_name'"),
        ("input_file_name,output_file_name,instruction\na.png,b.png,\n", "2: has no 'instruction'"),
        ("input_file_name,output_file_name,instruction\na.png,b.png,x,y\n", "2: more cells than columns"),
        ('input_file_name,output_file_name,instruction\na.png,b.png,"x\n', "2: unexpected end of data"),
        ("input_file_name,output_file_name,instruction\n../a.png,b.png,x\n", "2: .* relative path inside"),
        ("input_file_name,output_file_name,instruction\na.png,b.png,\udcff\n", "2: .*utf-8"),
        ("input_file_name,output_file_name,instruction\n", "split 'train' is empty"),
        ("", "split 'train' is empty"),
    ],
)
def test_a_bad_row_of_csv_is_named(tmp_path, text, reason):
    (tmp_path / "metadata.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(reading.DatasetError, match=reason) as caught:
        reading.read_pairs(tmp_path)
    assert "\n" not in str(caught.value)


def test_columns_by_other_names_in_folders(tmp_path):
    folder = make_folder(tmp_path)
    wanted = reading.read_pairs(folder)
    text = (folder / "metadata.jsonl").read_text()
    for ours, theirs in (
        ("input_file_name", "source"),
        ("output_file_name", "target"),
        ("instruction", "wish"),
    ):
        text = text.replace(f'"{ours}"', f'"{theirs}"')
    (folder / "metadata.jsonl").write_text(text)
    assert reading.read_pairs(tmp_path, columns=["source", "target", "wish"]) == wanted
    with pytest.raises(
        reading.DatasetError, match="1: has no 'input_file_name', only 'source', 'target', 'wish'"
    ):
        reading.read_pairs(tmp_path)
    with pytest.raises(reading.DatasetError, match="1: has no 'edited', only 'source', 'target', 'wish'"):
        reading.read_pairs(tmp_path, columns=["source", "edited", "wish"])


def make_table(before="original_image", instruction="edit_prompt", **more) -> datasets.Dataset:
    images = [picture((16, 16), seed) for seed in range(8)]
    columns = {before: images[:4], instruction: ["a", "a", "b", "b"], "edited_image": images[4:], **more}
    kinds = {name: datasets.Image() for name in (before, "edited_image")}
    kinds |= {
        name: datasets.Value("int64" if name == "score" else "string")
        for name in columns
        if name not in kinds
    }
    return datasets.Dataset.from_dict(columns, datasets.Features(kinds))


@pytest.mark.parametrize("names", [("original_image", "edit_prompt"), ("input_image", "instruction")])
def test_table_reader(names):
    table = make_table(*names, original_prompt=["c", "d", "e", None], score=[4, 5, 6, 7])
    pairs = reading.read_table(table)
    assert [(p.instruction, p.input_caption) for p in pairs][1:4:2] == [("a", "d"), ("b", None)]
    assert pictures.load_image(pairs[2].output).tobytes() == picture((16, 16), 6).tobytes()
    assert len(ds.VisualPromptDataset(pairs, 8)) == 4


def test_tables_of_magic_brush_and_of_any_names(tmp_path):
    plain = reading.read_table(make_table("original_image", "instruction"))
    table = make_table("original_image", "instruction", mask_img=["x"] * 4, turn_index=["1"] * 4)
    magic_brush = table.rename_columns({"original_image": "source_img", "edited_image": "target_img"})
    pairs = reading.read_table(magic_brush)
    assert [p.instruction for p in pairs] == ["a", "a", "b", "b"]
    for pair, known in zip(pairs, plain):
        assert pictures.load_image(pair.input).tobytes() == pictures.load_image(known.input).tobytes()
        assert pictures.load_image(pair.output).tobytes() == pictures.load_image(known.output).tobytes()
    other = table.rename_columns({"original_image": "x", "edited_image": "y", "instruction": "z"})
    with pytest.raises(
        reading.DatasetError, match=r"needs columns .* has x, z, y, mask_img, turn_index; .*--columns"
    ):
        reading.read_table(other)
    with pytest.raises(reading.DatasetError, match="needs columns x, yy, z; has x, z, y"):
        reading.read_table(other, ["x", "yy", "z"])
    (tmp_path / "data").mkdir()
    other.to_parquet(str(tmp_path / "data/train.parquet"))
    swapped = reading.read_pairs(tmp_path, columns=["y", "x", "z"])  # the order says which is which
    assert [pair.instruction for pair in swapped] == ["a", "a", "b", "b"]
    assert pictures.load_image(swapped[1].input).tobytes() == pictures.load_image(plain[1].output).tobytes()
    assert pictures.load_image(swapped[1].output).tobytes() == pictures.load_image(plain[1].input).tobytes()


def test_tables_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = make_table()
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "parquet/data").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "parquet/data/train-00000-of-00001.parquet"))
    for name in ("one", "splits", "parquet"):
        pairs = reading.read_pairs(tmp_path / name)
        assert [pair.instruction for pair in pairs] == ["a", "a", "b", "b"]
        assert pictures.load_image(pairs[3].input).tobytes() == picture((16, 16), 3).tobytes()
    for name in ("splits", "parquet"):
        with pytest.raises(reading.DatasetError, match="split 'seen'") as caught:
            reading.read_pairs(tmp_path / name, "seen")
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_hub_ids_go_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or make_table())
    assert len(reading.read_pairs("owner/name", "test")) == 4
    assert asked == [(("owner/name",), {"split": "test"})]

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(reading.DatasetError, match="owner/name: split 'train': cannot load it") as caught:
        reading.read_pairs("owner/name")
    assert "\n" not in str(caught.value)


def test_a_row_without_instruction_is_left_out_of_a_table(caplog):
    table = make_table().remove_columns("edit_prompt").add_column("edit_prompt", ["a", "", "b", "b"])
    pairs = reading.read_table(table)
    assert [pair.instruction for pair in pairs] == ["a", "b", "b"]
    assert [pair.input.row for pair in pairs] == [0, 2, 3]
    assert "rows left out: 1 (the first, row 1: the instruction is empty" in caplog.text


def test_table_refuses(tmp_path):
    with pytest.raises(reading.DatasetError, match="needs columns"):
        reading.read_table(make_table().rename_column("edit_prompt", "text"))
    with pytest.raises(reading.DatasetError, match="not columns of images"):
        reading.read_table(
            datasets.Dataset.from_dict({"input_image": [1], "instruction": ["a"], "edited_image": [2]})
        )
    with pytest.raises(reading.DatasetError, match="2 of 4 rows cannot be used; the first, row 2: the instr"):
        table = make_table().remove_columns("edit_prompt").add_column("edit_prompt", ["a", "a", None, " "])
        reading.read_table(table)
    save_pictures(tmp_path, ["secret.png"])
    data = (tmp_path / "secret.png").read_bytes()
    table = datasets.Dataset.from_dict({"input_image": [data], "instruction": ["a"], "edited_image": [data]})
    pair = reading.read_table(table)[0]  # raw bytes are a picture too
    assert pictures.load_image(pair.output).size == (16, 16)
    path = str(tmp_path / "secret.png")
    table = datasets.Dataset.from_dict({"input_image": [path], "instruction": ["a"], "edited_image": [path]})
    with pytest.raises(pictures.ImageError, match="column input_image, row 0: the row holds no image bytes"):
        pictures.load_image(
            reading.read_table(table)[0].input
        )  # a stranger's table may not name a file of ours


GOOD = {"input_file_name": "a.png", "output_file_name": "b.png", "instruction": "x"}


@pytest.mark.parametrize(
    "row, reason",
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (json.dumps(GOOD).encode().replace(b"x", b"\xff"), "can't encode"),
        (b"[]", "not a JSON object"),
        ({"input_file_name": "a.png", "instruction": "x"}, "'output_file_name'"),
        (GOOD | {"instruction": " "}, "instruction is empty"),
        (GOOD | {"instruction": None}, "instruction is empty"),
        (GOOD | {"instruction": "half \ud800"}, "surrogates not allowed"),
        (GOOD | {"instruction": "word " * 1000}, "more than 2000 letters"),
        (GOOD | {"output_caption": ["x"]}, "a caption is empty or not a text"),
        (GOOD | {"input_file_name": 3}, "a file name is empty or not a text"),
        (GOOD | {"input_file_name": ""}, "a file name is empty or not a text"),
        (GOOD | {"input_file_name": "/etc/passwd"}, "not a relative path inside the folder"),
        (GOOD | {"input_file_name": "../a.png"}, "not a relative path inside the folder"),
        (GOOD | {"input_file_name": "x/../../a.png"}, "not a relative path inside the folder"),
        (GOOD | {"input_file_name": "x\\..\\..\\a.png"}, "not a relative path inside the folder"),
        (GOOD | {"input_file_name": ".."}, "not a relative path inside the folder"),
        (GOOD | {"input_file_name": "link.png"}, "not a relative path inside the folder"),
        (GOOD | {"output_file_name": "out/a.png"}, "not a relative path inside the folder"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, reason):
    folder = tmp_path / "data"
    write_rows(folder, [GOOD, b"", row])
    picture().save(tmp_path / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(reading.DatasetError, match=reason) as caught:
        reading.read_pairs(folder)
    assert f"{folder / 'metadata.jsonl'}:3: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["../train", "/train", "..", "a/../../train"])
def test_a_split_is_a_folder_inside(tmp_path, split):
    make_folder(tmp_path)
    with pytest.raises(reading.DatasetError, match="is not a relative path inside the folder"):
        reading.read_pairs(tmp_path, split)


@pytest.mark.parametrize("link", ["train", "train/shard"])
def test_a_split_or_a_shard_may_not_lie_outside(tmp_path, link):
    make_folder(tmp_path / "elsewhere")
    (tmp_path / "data" / link).parent.mkdir(parents=True)
    (tmp_path / "data" / link).symlink_to(tmp_path / "elsewhere" / "train")
    with pytest.raises(reading.DatasetError, match="not a relative path inside the folder"):
        reading.read_pairs(tmp_path / "data", "train")


def test_links_inside_the_folder_are_welcome(tmp_path):
    picture().save(tmp_path / "real.png")
    (tmp_path / "a.png").symlink_to("real.png")
    write_rows(tmp_path, [b"\xef\xbb\xbf" + json.dumps(GOOD).encode()])  # and so is a byte order mark
    assert pictures.load_image(reading.read_pairs(tmp_path)[0].input).tobytes() == picture().tobytes()


def test_missing_and_empty_datasets(tmp_path):
    (tmp_path / "bare").mkdir()
    write_rows(tmp_path / "empty", [])
    for name, reason in {"none": "no such folder", "bare": "metadata.jsonl", "empty": "is empty"}.items():
        with pytest.raises(reading.DatasetError, match=reason) as caught:
            reading.read_pairs(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


# --- The dataset --------------------------------------------------------------------------------------------


def paths_only(instructions) -> list[reading.EditPair]:
    return [reading.EditPair(f"{k}_in.png", f"{k}_out.png", text) for k, text in enumerate(instructions)]


def test_single_pairs_are_left_out_and_reported(tmp_path, caplog):
    make_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        data = ds.VisualPromptDataset(reading.read_pairs(tmp_path), 8)
    assert data.left_out == ["remove the cup"] and len(data) == 5
    assert "of a single pair: 1 (remove the cup)" in caplog.text
    with pytest.raises(reading.DatasetError, match="second edit pair"):
        ds.VisualPromptDataset(paths_only(["a", "b"]), 8)
    with pytest.raises(reading.DatasetError, match="second edit pair"):
        ds.VisualPromptDataset([], 8)


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=30), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_example_is_another_pair_of_the_instruction(instructions, seed, epoch):
    instructions += ["a", "a"]
    data = ds.VisualPromptDataset(paths_only(instructions), 8, seed=seed)
    for i in range(len(data)):
        example = data.draw(i, epoch)
        assert example != i
        assert data.pairs[i].instruction == data.pairs[example].instruction


def test_every_other_pair_serves_as_the_example_equally_often():
    data = ds.VisualPromptDataset(paths_only(["b", "a", "a", "b", "a", "a", "a"]), 8)
    drawn = [data.draw(4, epoch) for epoch in range(800)]
    assert set(drawn) == {1, 2, 5, 6} and all(abs(drawn.count(i) - 200) < 50 for i in set(drawn))  # σ is 12
    with pytest.raises(IndexError):
        data.draw(7)
    assert data.draw(-1) == data.draw(6)


def test_item(tmp_path):
    make_folder(tmp_path)
    data = ds.VisualPromptDataset(reading.read_pairs(tmp_path), 8)
    for epoch in range(6):
        for i in range(len(data)):
            item, example = data[epoch, i], data.draw(i, epoch)
            assert (item["index"], item["example_index"]) == (i, example)
            assert item["instruction"] == data.pairs[i].instruction
            assert item["panels"].shape == (4, 3, 8, 8) and item["panels"].dtype == torch.float32
            assert torch.equal(item["panels"], torch.stack([*data.load_pair(example), *data.load_pair(i)]))
    assert torch.equal(data[i]["panels"], data[0, i]["panels"])


def test_draws_depend_on_seed_epoch_and_index_alone():
    instructions = [f"edit {k % 7}" for k in range(70)]
    data = ds.VisualPromptDataset(paths_only(instructions), 8, seed=3)
    first = [data.draw(i, 5) for i in range(70)]
    order = list(range(70))
    random.Random(0).shuffle(order)
    assert all(data.draw(i, 5) == first[i] for i in order)
    assert first != [data.draw(i, 6) for i in range(70)]
    assert first != [
        ds.VisualPromptDataset(paths_only(instructions), 8, seed=4).draw(i, 5) for i in range(70)
    ]


def test_workers_change_nothing(tmp_path):
    make_folder(tmp_path)
    data = ds.VisualPromptDataset(reading.read_pairs(tmp_path), 8, seed=1)
    order = [(epoch, i) for epoch in range(2) for i in range(len(data))]
    alone = DataLoader(data, sampler=order, batch_size=2)
    helped = DataLoader(data, sampler=order, batch_size=2, num_workers=2)
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one["panels"], two["panels"]) and one["instruction"] == two["instruction"]
        assert all(torch.equal(one[key], two[key]) for key in ("index", "example_index"))
    grid = ds.compose_grid(*one["panels"].unbind(1))
    assert grid.shape[1:] == (3, 16, 16)
    assert torch.equal(ds.answer_panel(grid), one["panels"][:, 3])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_through_a_worker(tmp_path, workers):
    folder = make_folder(tmp_path, ["x", "x"])
    (folder / "images/1_out.png").write_bytes(b"broken")
    loader = DataLoader(
        ds.VisualPromptDataset(reading.read_pairs(tmp_path), 8), batch_size=2, num_workers=workers
    )
    with pytest.raises(pictures.ImageError, match="not a picture") as caught:
        list(loader)
    assert str(caught.value).startswith(os.path.realpath(folder)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "before, after, is_fault",
    [
        ((48, 32), (48, 32), False),
        ((512, 512), (256, 256), False),
        ((1024, 683), (512, 341), False),  # rounded down
        ((1024, 683), (512, 342), False),
        ((1000, 2), (500, 1), False),
        ((48, 32), (32, 48), True),
        ((512, 512), (512, 384), True),
        ((512, 512), (256, 250), True),
    ],
)
def test_a_pair_is_one_frame_but_for_its_scale(before, after, is_fault):
    reason = pictures.misfit(Image.new("RGB", before), Image.new("RGB", after))
    assert bool(reason) == is_fault
    if is_fault:
        assert f"{after[0]} × {after[1]} pixels" in reason and f"{before[0]} × {before[1]}" in reason


def test_a_pair_of_two_frames_is_named(tmp_path):
    folder = make_folder(tmp_path, ["x", "x"])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((24, 16)).save(folder / "images/1_in.png")
    picture((24, 16), 1).save(folder / "images/1_out.png", exif=exif)
    data = ds.VisualPromptDataset(reading.read_pairs(tmp_path), 8)
    reason = f"^{data.pairs[1].output}: 16 × 24 pixels, where the picture before has 24 × 16"
    with pytest.raises(pictures.ImageError, match=reason):  # which training leaves out
        data.load_pair(1)


def test_columns_reach_training_and_evaluation(parts, run, tmp_path, capsys):
    data, columns = tmp_path / "data", ("--columns", "source_img", "target_img", "wish")
    shutil.copytree(parts / "data", data)
    for metadata in data.glob("*/metadata.jsonl"):
        rows = [json.loads(line) for line in metadata.read_text().splitlines()]
        keys = ("input_file_name", "output_file_name", "instruction")
        lines = [columns[1:], *([row[key] for key in keys] for row in rows)]
        metadata.with_suffix(".csv").write_text("\n".join(map(",".join, lines)))
        metadata.unlink()
    run("--no-esm", "--no-liu", "--no-sam", "--steps", "1", *columns, data=data)
    assert "validation is on training pairs" not in capsys.readouterr().out  # its split is read, too
    few = "--count", "2", "--steps", "1", "--device", "cpu", "--output", str(tmp_path / "eval")
    evaluate.main([str(tmp_path / "run" / "editor"), "--data", str(data), *few, *columns])
    assert "2 answers in" in capsys.readouterr().out


def test_a_split_of_shards_is_read_as_one(tmp_path):
    for shard, count in (("b", 2), ("a", 3), (".c.new", 2)):  # the last is not finished
        folder = tmp_path / "train" / shard
        folder.mkdir(parents=True)
        rows = [
            {"input_file_name": f"{k}.png", "output_file_name": "o.png", "instruction": shard}
            for k in range(count)
        ]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train" / "empty").mkdir()
    pairs = reading.read_pairs(tmp_path, "train")
    assert [pair.instruction for pair in pairs] == ["a"] * 3 + ["b"] * 2
    assert pairs[0].input == os.path.realpath(tmp_path / "train" / "a" / "0.png")
    (tmp_path / "train" / "b" / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(reading.DatasetError, match=r"train/b/metadata\.jsonl:1: has no 'input_file_name'"):
        reading.read_pairs(tmp_path, "train")
    # A split that is not there is not made of the others.
    with pytest.raises(reading.DatasetError, match=r"has neither seen/metadata\.jsonl"):
        reading.read_pairs(tmp_path, "seen")
