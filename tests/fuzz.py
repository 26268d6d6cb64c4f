"""Feeds every reader what is broken or hostile, and judges what becomes of it.

    python tests/fuzz.py --cases 2000 --seed 0
    python tests/fuzz.py --only images datasets --cases 500
    python tests/fuzz.py --only models --case 17                # one of them again

A case is something valid that is damaged at random; seed, kind and number determine it. A reader may read it,
or refuse it with a ValueError or an OSError, of one line where the class is ours. All else is a failure:
another exception, a crash, more than 10 seconds or 2 GB, a file written where none should be, and a pickle, a
program or a module that is run.

A forked process, with all libraries loaded, goes through one case after another until one ends it.
It needs Linux.
"""

# ruff: noqa: E402  # the environment is set before the libraries read it

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import json
import os
import random
import re
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SCRATCH = Path("/nowhere")
if __name__ == "__main__":
    SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HOME": str(SCRATCH / "cache"), "TMPDIR": str(SCRATCH / "cache")}

import datasets
import gradio
import numpy as np
import open_clip
import tiny
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

import app
import backbone
import dataset as ds
import edit
import evaluate
import make_dataset
import metrics
import train
from checkpoint import load_checkpoint, save_checkpoint
from pipeline import InstructGIEPipeline
from rcldm import SS2D

SECONDS, MEGABYTES = 10, 2048  # of a case at most

# --- Damage -------------------------------------------------------------------------------------------------

NUMBERS = [-1, 0, 1, 7, 2**16, 2**31, 2**63, 10**9, 10**30, -(10**9), 0.5, 1e308, float("nan"), float("inf")]
TEXTS = [
    "",
    "\0",
    " ",
    "\n",
    "a" * 5000,
    "\ud800",
    "é\u202e",
    "C:\\a",
    "../../outside/secret.png",
    "/etc/passwd",
]
TEXTS += ["<|im_end|>", "{{ 1 }}", "$(touch x)", "-h", "file:///etc/passwd", "https://localhost/a", "None"]
DEEP = "@deep"  # stands for JSON too deep to write otherwise
ANYTHING = [*NUMBERS, *TEXTS, None, True, [], {}, [[]], {"": {}}, DEEP]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, spliced, or overwritten with what is often special."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 64])
        special = rng.choice(
            [b"\0", b"\xff", b"\x7f\xff", b"\xff\xff\xff\x7f", b"\xc3\x28", rng.randbytes(8)]
        )
        match rng.randrange(6):
            case 0:
                del data[at:]
            case 1 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 2:
                data[at : at + size] = (special * size)[:size]
            case 3:
                data[at:at] = special * size
            case 4:
                del data[at : at + size]
            case 5:
                data[at:at] = data[rng.randrange(len(data) + 1) :][: 16 * size]
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys or indices."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def damage_json(text: bytes, rng: random.Random) -> bytes:
    """Still JSON, mostly: values of other kinds and sizes, keys that are gone, there twice or new."""
    try:
        if text.count(b"[") > 9000:
            raise ValueError("too deep to walk through")
        value = [json.loads(text)]
    except ValueError:  # it is damaged already
        return damage(text, rng)
    for _ in range(rng.choice([1, 1, 2, 4])):
        container, key = rng.choice(list(places(value)))
        old = container[key]
        match rng.randrange(6):
            case 0 if container is not value:
                del container[key]
            case 1 if isinstance(old, int | float):
                container[key] = old * rng.choice([-1, 10, 1000, 10**6, 10**12])
            case 2 if isinstance(old, dict):
                old[rng.choice(HOSTILE_KEYS)] = copy.deepcopy(rng.choice([*ANYTHING, *HOSTILE_VALUES]))
            case 3 if isinstance(old, list):
                container[key] = old * rng.choice([0, 2, 1000])
            case _:
                container[key] = copy.deepcopy(rng.choice(ANYTHING))
    text = json.dumps(value)[1:-1].replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    if (keys := re.findall(r'"\w+":', text)) and rng.random() < 0.1:
        text = text.replace("{", "{" + f"{rng.choice(keys)} {json.dumps(rng.choice(NUMBERS))}, ", 1)
    return text.encode(rng.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]), "surrogatepass")


# What model folders may say to have code run, pickles read or the network asked.
HOSTILE_KEYS = ["auto_map", "trust_remote_code", "attn_implementation", "quantization_config", "_class_name"]
HOSTILE_KEYS += ["use_pretrained_backbone", "backbone", "hf_model_name", "timm_model_name", "custom_pipeline"]
HOSTILE_KEYS += ["tokenizer_kwargs", "tokenizer_class", "dtype", "torch_dtype", "device_map", "num_labels"]
HOSTILE_VALUES = [{"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}, "evil.Evil", "resnet50"]
HOSTILE_VALUES += [
    "owner/kernel",
    ["evil", "Evil"],
    {"trust_remote_code": True},
    {"quant_method": "bitsandbytes"},
]


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Its header, or its bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(4):
        case 0:
            header = damage_json(header, rng)
        case 1:
            return struct.pack("<Q", rng.choice([0, 2**40, 2**63, length + 9])) + header + body
        case 2:
            return data[: 8 + length] + damage(body, rng)
        case 3:
            return damage(data, rng)
    return struct.pack("<Q", len(header)) + header + body


def put_something_else(path: Path, rng: random.Random, outside: Path) -> str:
    """In a file's place what is no such file: a folder, a pipe, a link, a device, 5 GB of nothing."""
    path.unlink(missing_ok=True)
    kind = rng.choice(["folder", "pipe", "link", "device", "loop", "broken", "empty", "sparse", "gone"])
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(rng.choice([outside / "secret.png", outside / "secret.json", outside, "/"]))
        case "device":
            path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/environ"]))
        case "loop":
            path.symlink_to(path)
        case "broken":
            path.symlink_to(outside / "nowhere")
        case "empty":
            path.touch()
        case "sparse":
            with path.open("wb") as file:
                file.truncate(2**20 if path.suffix == ".safetensors" else 5 * 2**30)  # as weights may be
    return kind


def spoil(path: Path, rng: random.Random, outside: Path) -> str:
    """Damages a file in the way of its kind, or puts something else in its place; returns which."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 2**30:  # it is spoilt already
        return path.name
    if rng.random() < 0.15:
        return f"{path.name}: {put_something_else(path, rng, outside)}"
    data = path.read_bytes()
    if path.suffix == ".jsonl" and rng.random() < 0.8:
        lines = data.splitlines() or [b"{}"]
        k = rng.randrange(len(lines))
        lines[k] = damage_json(lines[k], rng)
        data = b"\n".join(lines)
    elif path.suffix == ".safetensors":
        data = damage_safetensors(data, rng)
    elif path.suffix == ".json" and rng.random() < 0.7:
        data = damage_json(data, rng)
    else:
        data = damage(data, rng)
    path.write_bytes(data)
    return f"{path.name}: damaged"


# --- Pictures -----------------------------------------------------------------------------------------------


def png(size: tuple[int, int], bits: int, colour: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of any claim: size, bits and type of colour, compressed data, chunks before it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)), *more, (b"IDAT", data)]
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed) + b"\0\0\0\0IEND\xaeB`\x82"


def progressive_jpeg(side: int, scans: int) -> bytes:
    """A flat grey JPEG in so many scans, of some hundred bytes each, all of which a decoder goes through."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    def bits(text: str) -> bytes:
        text += "1" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")

    blocks, one_code = (-(-side // 8)) ** 2, bytes([1] + [0] * 15)
    head = segment(0xDB, bytes([0]) + bytes([1] * 64))
    head += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\0")
    head += segment(0xC4, b"\x00" + one_code + b"\x00") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    first = segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + bits("0" * blocks)
    empty = segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + bits(("0" + "1" * 14) * -(-blocks // 32767))
    return b"\xff\xd8" + head + first + empty * scans + b"\xff\xd9"


def gif_with_comments(count: int) -> bytes:
    plain = encoded(Image.new("P", (4, 4)), "GIF")
    at = 13 + (3 << (plain[10] & 7) + 1 if plain[10] & 0x80 else 0)  # behind the palette
    return plain[:at] + b"\x21\xfe\x01A\0" * count + plain[at:]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def sound_pictures() -> list[bytes]:
    """A small one of every format and mode that matters, and some in formats that are not read."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    modes = [rgb.convert(mode) for mode in ("1", "L", "P", "RGBA", "LA")]
    found = [encoded(image, "PNG", exif=exif) for image in (rgb, *modes)]
    found += [encoded(rgb, "JPEG", exif=exif, progressive=p) for p in (False, True)]
    found += [encoded(rgb.convert("CMYK"), "JPEG"), encoded(rgb, "BMP"), encoded(modes[1], "BMP")]
    found += [encoded(rgb, "GIF"), encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(9)])]
    found += [encoded(rgb, "WEBP", lossless=flag, exif=exif) for flag in (False, True)]
    found += [encoded(rgb, "TIFF", compression=name) for name in (None, "tiff_deflate", "jpeg", "tiff_lzw")]
    greys = (np.float32(rng.random((40, 48))), rng.integers(0, 2**16, (40, 48)).astype(np.uint16))
    greys = [Image.fromarray(grey) for grey in (*greys, np.full((4, 4), np.nan, np.float32))]
    found += [encoded(greys[1], "PNG"), *(encoded(grey, "TIFF") for grey in greys)]
    found.append(encoded(rgb, "MPO", save_all=True, append_images=[rgb]))
    found += [encoded(rgb, form) for form in ("JPEG2000", "PPM", "TGA", "ICO", "PCX", "SGI", "EPS", "PDF")]
    return [
        *found,
        b"8BPS" + bytes(99),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\0 ftypheic" + bytes(50),
    ]


def claim_size(data: bytes, rng: random.Random) -> bytes:
    """The same with other sizes in its head."""
    sides = [0, 1, 255, 4096, 16383, 30000, 65535, 2**24, 2**31 - 1, 2**32 - 1]
    w, h = rng.choice(sides), rng.choice(sides)
    data = bytearray(data)

    def put(form: str, at: int, *values: int) -> None:
        most = 256 ** struct.calcsize(form[:2]) - 1
        data[at : at + struct.calcsize(form)] = struct.pack(form, *(value & most for value in values))

    if data.startswith(b"\x89PNG"):
        put(">II", 16, w, h)
        put(">I", 29, zlib.crc32(data[12:29]))
    elif data.startswith(b"GIF"):
        put("<HH", 6, w, h)
    elif data.startswith(b"BM"):
        put("<II", 18, w, h)
    elif data.startswith(b"RIFF"):
        put("<I", 24, w)
        put("<I", 27, h)
    elif data.startswith(b"\xff\xd8"):
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        put(">HH", at + 5, h, w)
    elif data.startswith(b"II"):
        for tag, value in ((256, w), (257, h), (278, h)):  # width, height, rows in a strip
            at = max(data.find(struct.pack("<HH", tag, kind)) for kind in (3, 4))
            put("<I", at + 8, value)
    return bytes(data)


def bomb(rng: random.Random) -> bytes:
    """Small files that promise, or make, much more than they are."""
    zeros = zlib.compress(bytes(rng.choice([10**6, 10**8])), 9)
    side = rng.choice([9000, 12000, 50000])
    return rng.choice(
        [
            lambda: png((side, side), 8, 0, zeros),
            lambda: png((64, 64), 8, 2, zeros),
            lambda: png((64, 64), 8, 2, zlib.compress(bytes(64 * 193)), (b"zTXt", b"a\0\0" + zeros)),
            lambda: png((64, 64), 8, 2, zlib.compress(bytes(64 * 193)), (b"iCCP", b"a\0\0" + zeros)),
            lambda: png((64, 64), 8, 2, b"", *[(b"teSt", b"")] * 200_000),
            lambda: encoded(Image.new("1", (side, side)), "PNG"),
            lambda: progressive_jpeg(4096, 2000),
            lambda: gif_with_comments(200_000),
            lambda: encoded(Image.new("RGBA", (9400, 9400), (1, 2, 3, 4)), "WEBP", lossless=True, method=0),
            lambda: encoded(Image.new("L", (side, 1)), "TIFF", compression="tiff_deflate"),
        ]
    )()


class Column(list):
    """Stands for the column of a `datasets` table, which reads its pictures from the same bytes."""

    column_names = ("image",)


def image_case(rng: random.Random, folder: Path, seeds: SimpleNamespace) -> tuple[str, Callable[[], Any]]:
    path, data = folder / rng.choice(["a.png", "a.jpg", "a"]), rng.choice(seeds.pictures)
    draw, what = rng.random(), "damaged"
    if draw < 0.04:
        data, what = bomb(rng), "bomb"
    elif draw < 0.25:
        data, what = claim_size(data, rng), "size"
    elif draw < 0.9:
        data = damage(data, rng)
    if draw < 0.8:
        path.write_bytes(data)
    elif draw < 0.9:
        cell = rng.choice([{"bytes": data, "path": None}, {"bytes": None, "path": str(seeds.outside)}, None])
        return f"table, {what}", lambda: ds.load_image(ds.TableImage(Column([{"image": cell}]), 0))
    else:
        what = put_something_else(path, rng, seeds.outside)

    def look() -> None:
        image = ds.load_image(path)
        assert image.mode == "RGB" and ds.to_panel(image, 16).isfinite().all()

    return f"{data[:4]!r}, {what}", look


# --- Datasets -----------------------------------------------------------------------------------------------

LAYOUTS = ("folder", "folder", "shards", "pix2pix", "pix2pix", "parquet", "arrow", "saved", "splits")
SPLITS = ["train"] * 200 + [*TEXTS, "../train", "/train", ".", "..", "*", "[a"]


def dataset_case(rng: random.Random, folder: Path, seeds: SimpleNamespace) -> tuple[str, Callable[[], Any]]:
    layout, split, root = rng.choice(LAYOUTS), rng.choice(SPLITS), folder / "data"
    shutil.copytree(seeds.root / layout, root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix not in (".png", ".jpg")]
    folders = [path for path in root.rglob("*") if path.is_dir()]
    what = [layout, split[:20]]
    draw = rng.randrange(12)
    if draw == 0 and layout in ("folder", "shards"):
        filling = rng.choice([b"[]," * 70_000_000, b"\0" * 200_000_000, b"a " * 100_000_000])
        with texts[0].open("ab") as file:
            file.write(b"\n" + filling)
        what.append("a line of 200 MB")
    elif draw == 1 and folders:
        inner = rng.choice(folders)
        shutil.rmtree(inner)
        inner.symlink_to(rng.choice([seeds.root / layout, seeds.outside, "/"]))
        what.append(f"{inner.name} is a link out")
    elif draw == 2:
        extra = root / rng.choice(["evil.py", "data.py", "README.md", "train.zip", "a.pkl", "a.tar", "x.csv"])
        card = f"---\nconfigs:\n- config_name: default\n  data_files: {seeds.outside}/*\n---\n"
        extra.write_text(card if extra.suffix == ".md" else seeds.evil)
        what.append(extra.name)
    else:
        what += [spoil(rng.choice(texts), rng, seeds.outside) for _ in range(rng.choice([1, 1, 2]))]
    if rng.random() < 0.1:
        what.append(spoil(rng.choice(files), rng, seeds.outside))

    def read() -> None:
        pairs = ds.read_pairs(root, split)
        for pair in pairs:
            for source in (pair.input, pair.output, *(pair.classes or ())):
                file = os.path.realpath(source if isinstance(source, str) else root)
                assert Path(file).is_relative_to(root.resolve()), f"{source} lies outside"
        data = ds.VisualPromptDataset(pairs, 8)
        for i in range(min(2, len(data))):
            assert data[i]["panels"].isfinite().all()
            data.load_classes(i)

    return ", ".join(what), read


# --- Models -------------------------------------------------------------------------------------------------


def draw_once(folder: Path) -> None:
    pipe = InstructGIEPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (20, 30), "red")
    pipe("add a hat", picture, (picture, picture), num_inference_steps=1, unify=False)


def load_clip(folder: Path) -> None:
    backbone.load_clip_tokenizer(str(folder))(["a hat"])
    backbone.load_clip(str(folder))


VAE = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
LOADERS: dict[str, Callable[[Path], Any]] = {
    "sd": lambda folder: backbone.encode_text(backbone.load_stable_diffusion(str(folder)), ["a hat"]),
    "editor": draw_once,
    "pipeline": draw_once,
    "clip": load_clip,
    "segmenter": lambda folder: backbone.load_segmenter(str(folder)),
    "llm": lambda folder: backbone.load_llm(str(folder)),
    "taesd": lambda folder: backbone.load_tiny_decoder(str(folder), VAE),
}


def model_case(rng: random.Random, folder: Path, seeds: SimpleNamespace) -> tuple[str, Callable[[], Any]]:
    kind, root = rng.choice(list(LOADERS)), folder / "model"
    shutil.copytree(seeds.root / kind, root)
    files, what = sorted(path for path in root.rglob("*") if path.is_file()), [kind]
    for path in rng.sample(files, rng.choice([1, 1, 2])):
        draw = rng.random() if path.suffix == ".safetensors" else 1
        if draw < 0.2:
            shutil.copy(rng.choice(sorted(seeds.root.rglob("*.safetensors"))), path)
            what.append(f"{path.name} is another's")
        elif draw < 0.4:
            name = rng.choice([path.with_suffix(".bin").name, "../../outside/secret.bin", "/etc/passwd"])
            path.rename(path.with_suffix(".bin"))
            index = {"metadata": {}, "weight_map": {"a": name}}
            path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
            what.append(f"an index that names {name}")
        else:
            what.append(spoil(path, rng, seeds.outside))
    for parent in {path.parent for path in files}:
        (parent / "evil.py").write_text(seeds.evil)
    return ", ".join(what), lambda: LOADERS[kind](root)


# --- Checkpoints, and what else the programs write and read again -------------------------------------------


def resume(root: Path) -> None:
    layer = torch.nn.Linear(4, 4)
    load_checkpoint(root, {"layer": layer}, torch.optim.AdamW(layer.parameters()))


def read_answers(root: Path) -> None:
    for row in evaluate.read_answers(root, {"answer", *metrics.TEXTS}):
        inside = (root / row["answer"]).resolve().is_relative_to(root.resolve())
        assert inside, f"{row['answer']} lies outside"
    evaluate.finished(root / "answers.jsonl")


FILES: dict[str, Callable[[Path], Any]] = {
    "step.json": resume,
    "state.safetensors": resume,
    "answers.jsonl": read_answers,
    "settings.json": lambda root: evaluate.check_settings(root, {"seed": 0, "model": "toy"}),
    "texts.jsonl": lambda root: make_dataset.read_texts(root / "texts.jsonl"),
    "seeds.txt": lambda root: make_dataset.read_seeds(root / "seeds.txt"),
    "00000.jsonl": make_dataset.read_replies,
}


def checkpoint_case(rng: random.Random, folder: Path, seeds: SimpleNamespace) -> tuple[str, Callable]:
    root, name = folder / "run", rng.choice(list(FILES))
    shutil.copytree(seeds.root / "run", root)
    paths = sorted(root.rglob(name))
    what = [spoil(path, rng, seeds.outside) for path in rng.sample(paths, rng.randint(1, len(paths)))]
    return ", ".join(what), lambda: FILES[name](root)


# --- Commands -----------------------------------------------------------------------------------------------

COMMANDS = (
    "edit.py --prompt-pair before.png after.png --input x.png --output out --instruction hat --model editor "
    "--num-images 1 --seed 0 --steps 1 --guidance-text 1 --guidance-visual 1 --scheduler ddim "
    "--device cpu --dtype float32 --grid",
    "evaluate.py editor --data data --split train --output out --mode pair --told instruction --count 2 "
    "--batch 2 --steps 1 --guidance-text 1 --guidance-visual 1 --seed 0 --device cpu --sheet 1",
    "metrics.py run --clip clip --features clip --device cpu --batch 2 --json out/a --markdown out/b",
    "train.py --data data --split train --validation-split train --output out --seed 0 --device cpu "
    "--steps 1 --batch 2 --accumulate 1 --lr 0.1 --warmup 1 --encoder-steps 1 --encoder-batch 1 "
    "--encoder-lr 0.1 --encoder-width 8 --auxiliary-weight 0.3 --noise-power 1 --weight-decay 0.01 "
    "--clip-norm 1 --ema 0.9 --answer-weight 4 --edit-weight 1 --es-weight 0.05 --es-samples 4 "
    "--sam-weight 0.1 --drop-text 0.5 --drop-example 0.2 --drop-both 0.05 --panel 32 --workers 0 "
    "--cache cache --checkpoint-every 1 --keep 1 --validate-every 1 --validation-pictures 1",
    "make_dataset.py check data --split train --thin 2 --sheet a.png",
    "make_dataset.py texts --seeds run/seeds.txt --out new --llm llm --further 1 --tries 1 --temperature 0.7 "
    "--batch 2 --finetune run/texts.jsonl --epochs 1 --finetune-lr 0.1 --finetune-batch 2 --seed 0 "
    "--device cpu",
    "make_dataset.py images --out run --stable-diffusion sd --clip clip --split train --size 32 --samples 2 "
    "--keep 1 --steps 2 --guidance 1 2 --injection 0.1 0.9 --cross 0.8 --min-caption 0 --min-image 0 "
    "--min-direction 0 --batch 2 --seed 0 --device cpu",
)
MAINS = {"edit.py": edit, "evaluate.py": evaluate, "metrics.py": metrics, "train.py": train}
PATHS = ["/dev/zero", "/dev/null", "pipe", "..", ".", "/", "a/b", "nowhere", "data", "loop.png"]
PATHS += ["run/settings.json", "\udcff", "cpu:x", "cpu:9", "cuda:0", "x" * 300, "/tmp/../x", "**", "../data"]


def command_case(rng: random.Random, folder: Path, seeds: SimpleNamespace) -> tuple[str, Callable[[], Any]]:
    """One of `COMMANDS` with a word or two replaced, gone or new, till it would load a model or train."""
    for name in ("editor", "clip"):
        os.symlink(seeds.root / name, folder / name)
    shutil.copytree(seeds.root / "folder", folder / "data")
    shutil.copytree(seeds.root / "run", folder / "run")
    for name in ("before", "after", "x"):
        shutil.copy(folder / "data/train/0_after.png", folder / f"{name}.png")
    os.mkfifo(folder / "pipe")
    os.symlink("loop.png", folder / "loop.png")
    program, *words = rng.choice(COMMANDS).split()
    for _ in range(rng.choice([1, 1, 2])):
        k = rng.randrange(len(words))
        is_number = words[k].replace(".", "").isdigit() and rng.random() < 0.9
        value = rng.choice([*map(str, NUMBERS), "٣", "1_0"] if is_number else [*TEXTS, *PATHS])
        if words[k - 1] in ("--output", "--out", "--json", "--markdown", "--sheet", "--cache"):
            value = value.replace("..", "").lstrip("/")  # where to write is the caller's choice
        draw = rng.randrange(10)
        if draw == 0 and words[k - 1] != "--data":  # without it the toy world would be written
            del words[k]
        elif draw == 1:
            words.insert(k, value)
        elif not words[k].startswith("--"):
            words[k] = value

    def start() -> None:
        sys.argv = [program, *words]
        MAINS.get(program, make_dataset).main()

    return f"{program} {words}"[:2000], start


# --- The page -----------------------------------------------------------------------------------------------


def page_case(rng: random.Random, folder: Path, seeds: SimpleNamespace) -> tuple[str, Callable[[], Any]]:
    """A wish as a browser, or another program, may send it; Gradio has seen to the numbers' bounds."""
    names = [folder / f"{name}.png" for name in ("before", "after", "x", "y")]
    for path in names:
        path.write_bytes(rng.choice(seeds.pictures[:8]))
    what = [spoil(path, rng, seeds.outside) for path in rng.sample(names, rng.choice([0, 0, 1, 2]))]
    before, after, *inputs = map(str, names)
    odd = [None, 1.5, 0.0, 1.0, float("nan")]
    wish = app.Wish(before, after, [(file, None) for file in inputs], "add a hat", 0, 1, 2, 1.0, 1.0, "ddim")
    for _ in range(rng.choice([0, 1, 1, 2])):
        name = rng.choice(wish._fields)
        values = {"before": [None, *PATHS], "inputs": [None, [], [(path, None) for path in PATHS]]}
        values |= {"after": values["before"], "instruction": [None, *TEXTS, "hat " * 200]}
        values |= {"scheduler": list(app.SCHEDULERS), "answers": [0, 2, 4, None, float("nan")]}
        wish = wish._replace(**{name: rng.choice(values.get(name, odd))})
        what.append(f"{name} {getattr(wish, name)!r}"[:80])

    def ask() -> None:
        try:
            for _ in app.Editor(seeds.pipe, "editor", folder).edit(SimpleNamespace(session_hash="a"), *wish):
                pass
        except gradio.Error as error:
            if "terminal says more" in error.message:  # what nobody expected
                raise RuntimeError(error.message) from error
            raise backbone.BackboneError(error.message) from None

    return ", ".join(what), ask


class Reached(BaseException):
    """All that a command checks is checked: it would load large models or train."""


def reached(*_: Any, **__: Any) -> None:
    raise Reached


def go_no_further(editor: Path) -> None:
    """Commands then take a loaded editor for the folder of that name, and stop where training would begin."""
    load, ready = InstructGIEPipeline.from_pretrained, InstructGIEPipeline.from_pretrained(editor)

    def once(_: type, model: Any, **options: Any) -> InstructGIEPipeline:
        if str(model) != editor.name:
            return load(model, **options)
        return InstructGIEPipeline(**ready.components, panel=ready.panel, settings=ready.settings)

    InstructGIEPipeline.from_pretrained = classmethod(once)
    train.Accelerator = backbone.load_llm = backbone.load_stable_diffusion = reached


# --- Seeds --------------------------------------------------------------------------------------------------

CASES = {  # and their shares
    "images": (image_case, 0.35),
    "datasets": (dataset_case, 0.25),
    "models": (model_case, 0.15),
    "checkpoints": (checkpoint_case, 0.1),
    "commands": (command_case, 0.1),
    "page": (page_case, 0.05),
}


def make_models(root: Path) -> None:
    torch.manual_seed(0)
    tiny.save_parts(root)
    InstructGIEPipeline.from_pretrained(root / "editor").save_pretrained(root / "pipeline")
    tiny.save_segmenter(root / "segmenter")
    tiny.save_llm(root / "llm")
    sizes = {f"{part}_block_out_channels": (8,) * 4 for part in ("encoder", "decoder")}
    AutoencoderTiny(latent_channels=4, **sizes).save_pretrained(root / "taesd")
    tiny.save_clip(root / "clip")  # and with a tokenizer of its own:
    tokenizer, file = AutoTokenizer.from_pretrained(root / "llm"), root / "clip" / "open_clip_config.json"
    config = json.loads(file.read_text())
    own = {"hf_tokenizer_name": "local", "tokenizer_kwargs": {}, "vocab_size": len(tokenizer)}
    config["model_cfg"]["text_cfg"] |= own
    file.write_text(json.dumps(config))
    tokenizer.save_pretrained(root / "clip")
    weights = open_clip.CLIP(**config["model_cfg"]).state_dict()
    save_file(weights, root / "clip" / "open_clip_model.safetensors")


def make_datasets(root: Path) -> None:
    tiny.save_data(root / "folder", pairs=2)
    metadata = root / "folder/train/metadata.jsonl"
    more = {"input_caption": "a cup", "output_caption": "a hat", "score": 1.5}
    more |= {"input_classes_file_name": "0_before.png", "output_classes_file_name": "0_after.png"}
    rows = [json.loads(line) | more for line in metadata.read_text().splitlines()]
    metadata.write_text("\n".join(map(json.dumps, rows)))
    for shard in ("a", "b"):
        shutil.copytree(root / "folder/train", root / "shards/train" / shard)
    listing = [["a", ["1", "2"]], ["b", ["1"]]]
    for name, seeds in listing:
        folder = root / "pix2pix" / name
        folder.mkdir(parents=True)
        prompt = {"input": "a cup", "edit": "add a hat", "output": "a hat"}
        (folder / "prompt.json").write_text(json.dumps(prompt))
        for file in (f"{seed}_{k}.jpg" for seed in seeds for k in (0, 1)):
            Image.new("RGB", (40, 30), "red").save(folder / file)
    (root / "pix2pix/seeds.json").write_text(json.dumps(listing))
    images = [Image.new("RGB", (20, 30), (k, 0, 0)) for k in range(4)]
    kinds = dict.fromkeys(("original_image", "edited_image"), datasets.Image())
    kinds["edit_prompt"] = datasets.Value("string")
    columns = (images, images[::-1], ["a", "a", "b", "b"])
    table = datasets.Dataset.from_dict(dict(zip(kinds, columns)), datasets.Features(kinds))
    table.save_to_disk(str(root / "saved"))
    datasets.DatasetDict(train=table).save_to_disk(str(root / "splits"))
    for kind in ("parquet", "arrow"):
        (root / kind / "data").mkdir(parents=True)
    table.to_parquet(str(root / "parquet/data/train-00000-of-00001.parquet"))
    shutil.copy(next((root / "saved").glob("*.arrow")), root / "arrow/data/train-00000-of-00001.arrow")


def make_run(root: Path) -> None:
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    for step in (1, 2):
        save_checkpoint(root, step, {"layer": layer}, optimizer, keep=2)
    Image.new("RGB", (32, 32)).save(root / "0.png")
    answer = {"answer": "0.png", "mode": "both", "seed": 0, "instruction": "add a hat"}
    answer |= dict.fromkeys(("input", "output"), str(root / "0.png"))
    answer |= {"input_caption": "a cup", "output_caption": "a hat"}
    text = {"instruction": "add a hat", "pairs": [["a cup", "a cup and a hat"], ["a dog", "a dog and a hat"]]}
    reply = {"caption": "a cup", "reply": "Caption: a hat"}
    (root / "replies").mkdir()
    for name, row in (("answers", answer), ("texts", text), ("replies/00000", reply)):
        (root / f"{name}.jsonl").write_text(2 * f"{json.dumps(row)}\n")
    (root / "settings.json").write_text(json.dumps({"seed": 0, "model": "toy"}))
    (root / "seeds.txt").write_text("a cup\na dog\n")


# --- The judge ----------------------------------------------------------------------------------------------

# Whether a case is at work, where it may write, and what it did that it must not.
watched: dict[str, Any] = {"works": False, "may": (), "crimes": []}
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")


def watch(event: str, arguments: tuple) -> None:
    """An audit hook: notes what no reader may do."""
    if not watched["works"]:
        return
    written = None
    if event == "open":
        path, mode, flags = arguments
        if set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written = path
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod") and arguments[-1] != -1:
        pass  # in a folder that is open already, as a whole tree's removal has it
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"):
        written = arguments[0]
    elif event in ("os.rename", "os.link", "os.symlink"):
        written = arguments[1]
    elif event in PROGRAMS:
        watched["crimes"].append(f"{event} {arguments}"[:300])
    elif event == "exec" and "evil" in arguments[0].co_filename:
        watched["crimes"].append(f"{arguments[0].co_filename} was run")
    if isinstance(written, str | bytes | os.PathLike):
        full = os.path.abspath(os.fsdecode(written))
        if not full.startswith(watched["may"]) and full != "/dev/null":
            watched["crimes"].append(f"{event} {full}")


def no_pickle(*_: Any, **__: Any) -> None:
    watched["crimes"].append("torch.load was called")
    raise ValueError("no pickles")


def megabytes(pid: int | str, name: str) -> float:
    """Of a process, by its line in /proc: VmRSS now, VmHWM at the peak; 0 where it has gone."""
    try:
        return int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        return 0


def judge(call: Callable[[], Any]) -> dict[str, Any]:
    """What became of a case: its `outcome` is "read", "refused" or "FAILED"."""
    errors, failed, refused = io.StringIO(), None, None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = megabytes("self", "VmRSS"), time.monotonic()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, also out of a library's depths
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watched["works"] = True
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            call()
    except Reached:
        pass
    except SystemExit as error:
        refused = errors.getvalue().strip() if error.code else None
        if error.code not in (None, 0, 1, 2) or (error.code == 2 and ": error: " not in refused):
            failed = f"exit {error.code}: {refused}"
    except (ValueError, OSError) as error:
        refused = str(error)
        ours = isinstance(error, ds.DatasetError | ds.ImageError | backbone.BackboneError)
        if not refused or (ours and "\n" in refused):
            failed = f"{type(error).__name__} of no or many lines: {refused!r}"
    except BaseException:
        failed = traceback.format_exc()[-1500:]
    watched["works"] = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, grown = time.monotonic() - start, megabytes("self", "VmHWM") - before
    if grown > MEGABYTES:
        failed = failed or f"{grown:.0f} MB"
    failed = "; ".join(watched["crimes"]) or failed
    outcome = "FAILED" if failed else "read" if refused is None else "refused"
    return {"outcome": outcome, "why": failed or refused or "", "seconds": seconds, "megabytes": grown}


def work(kind: str, numbers: list[int], seed: int, seeds: SimpleNamespace, pipe: int) -> None:
    """In a process of its own: case after case; a line before and after each."""
    if kind == "commands":
        go_no_further(seeds.root / "editor")
    if kind == "page":
        seeds.pipe = InstructGIEPipeline.from_pretrained(seeds.root / "editor")
        seeds.pipe.set_progress_bar_config(disable=True)
    torch.load = no_pickle
    warnings.simplefilter("ignore")
    gc.freeze()  # the libraries' objects need not be gone through before every case
    sys.addaudithook(watch)
    log = os.open(SCRATCH / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, file in ((0, os.open("/dev/null", os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(file, stream)

    def tell(line: dict[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace")
        os.write(pipe, text + b"\n")

    for number in numbers:
        folder = SCRATCH / "case" / f"{kind}-{number}"
        folder.mkdir(parents=True)
        os.chdir(folder)
        what, call = CASES[kind][0](random.Random(f"{seed} {kind} {number}"), folder, seeds)
        gc.collect()
        may = [SCRATCH / "cache", *([folder] if kind in ("checkpoints", "commands", "page") else [])]
        watched.update(may=tuple(map(str, may)), crimes=[])
        outside = sorted(seeds.outside.rglob("*"))
        tell({"number": number, "what": what})
        found = judge(call)
        if sorted(seeds.outside.rglob("*")) != outside:
            found |= {"outcome": "FAILED", "why": "something was written outside"}
        tell({"number": number} | found)
        os.chdir(SCRATCH)
        shutil.rmtree(folder)


def run(kind: str, numbers: list[int], seed: int, seeds: SimpleNamespace) -> Iterator[dict[str, Any]]:
    """Results of the cases, each as `judge` has it, with its `number`, and `what` was done."""
    while numbers:
        reading, writing = os.pipe()
        pid = fork(work, kind, numbers, seed, seeds, writing)
        os.close(writing)
        begun, start, too_much = None, 0.0, False
        with open(reading, "rb", buffering=0) as lines:
            while True:
                while not select.select([lines], [], [], 0.02)[0]:
                    if megabytes(pid, "VmRSS") > 3 * MEGABYTES:
                        os.kill(pid, signal.SIGKILL)
                        too_much = True
                if not (line := lines.readline()):
                    break
                told = json.loads(line)
                if "outcome" in told:
                    yield begun | told
                begun, start = None if "outcome" in told else told, time.monotonic()
        _, end = os.waitpid(pid, 0)
        if begun is None:
            if end:
                raise RuntimeError(f"a case could not be made: {(SCRATCH / 'log').read_text()[-2000:]}")
            return
        killer = signal.Signals(os.WTERMSIG(end)).name if os.WIFSIGNALED(end) else f"exit {end}"
        why = "too much memory" if too_much else f"{SECONDS} seconds" if killer == "SIGALRM" else killer
        yield begun | {"outcome": "FAILED", "why": why, "seconds": time.monotonic() - start, "megabytes": 0}
        numbers = numbers[numbers.index(begun["number"]) + 1 :]
        shutil.rmtree(SCRATCH / "case")


def fork(function: Callable, *arguments: Any) -> int:
    """Calls it in a process of its own, whose exit status is 0 where all goes well → the process's id."""
    if pid := os.fork():
        return pid
    try:
        function(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


# --- The program --------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="KIND")
    parser.add_argument("--case", type=int, help="this number alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    SS2D(4)(torch.zeros(1, 2, 2, 4))  # or each case would have Numba look for a place for what it compiles
    root, outside = SCRATCH / "seeds", SCRATCH / "outside"
    for folder in (root, outside, SCRATCH / "cache"):
        folder.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    (outside / "secret.json").write_text("{}")
    for make, folder in ((make_models, root), (make_datasets, root), (make_run, root / "run")):
        if os.waitpid(fork(make, folder), 0)[1]:  # no thread of theirs may be there when cases are forked
            raise SystemExit("the seeds could not be made")
    evil = f"open({str(outside / 'pwned')!r}, 'w')\nclass Evil: pass\n"
    seeds = SimpleNamespace(root=root, outside=outside, evil=evil, pictures=sound_pictures())
    whole, failures = sum(CASES[kind][1] for kind in args.only), 0
    print("kind          cases   read refused failed   slowest   most memory     all")
    for kind in args.only:
        numbers = list(range(round(args.cases * CASES[kind][1] / whole)))
        if args.case is not None:
            numbers = [args.case]
        counts, slowest, most, start = {"read": 0, "refused": 0, "FAILED": 0}, 0.0, 0.0, time.monotonic()
        for found in run(kind, numbers, args.seed, seeds):
            counts[found["outcome"]] += 1
            slowest, most = max(slowest, found["seconds"]), max(most, found["megabytes"])
            if found["outcome"] == "FAILED" or args.case is not None:
                again = f"--only {kind} --seed {args.seed} --case {found['number']}"
                print(f"{again}: {found['outcome']}: {found['what']}\n    {found['why']}", flush=True)
        failures += counts["FAILED"]
        read, refused, failed = counts.values()
        row = f"{kind:12} {len(numbers):6} {read:6} {refused:7} {failed:6} {slowest:7.1f} s {most:10.0f} MB"
        print(f"{row} {time.monotonic() - start:5.0f} s", flush=True)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
