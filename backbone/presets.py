"""The presets of pretrained parts, and the toy world's dataset."""

import subprocess
import sys
from dataclasses import dataclass

from backbone.folders import HERE, BackboneError
from disk import WORLD_NOTE, version


@dataclass(frozen=True)
class Preset:
    """Where the parts lie, and what goes with them.

    writer: the language model that writes a dataset's texts. picture: pixels along the side of the pictures
    drawn for one. panel: P, pixels along a panel's side. classes: of the segmenter, for selective-area
    matching; None lets the language model propose them. lr: peak learning rate that suits the U-Net's size.
    licence: of the Stable Diffusion. data: the dataset to train on, None where there is no default. editor: a
    trained editor's folder, likewise.
    """

    stable_diffusion: str
    clip: str
    clip_eval: str
    segmenter: str
    llm: str
    writer: str
    picture: int
    panel: int
    classes: tuple[str, ...] | None
    lr: float
    licence: str
    data: str | None = None
    editor: str | None = None


PRESETS = {
    "toy": Preset(
        stable_diffusion="toy/weights/stable-diffusion",
        clip="toy/weights/clip",
        clip_eval="toy/weights/clip-eval",
        segmenter="toy/weights/segmenter",
        llm="toy/weights/llm",
        writer="toy/weights/writer",
        picture=64,
        panel=64,
        classes=("face",),
        lr=2e-2,
        licence="mit",
        data="data/toy",
        editor="toy/weights/editor",
    ),
    # [ours] Panels of 256 pixels, so that the grid has the 512 that Stable Diffusion 1.5 was trained at. A
    # language model small enough to stand beside it on one GPU. A segmenter whose repository has safetensors.
    "sd15": Preset(
        stable_diffusion="stable-diffusion-v1-5/stable-diffusion-v1-5",
        clip="timm/vit_large_patch14_clip_224.openai",
        clip_eval="laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        segmenter="facebook/mask2former-swin-small-coco-panoptic",
        llm="Qwen/Qwen2.5-1.5B-Instruct",
        writer="Qwen/Qwen2.5-7B-Instruct",
        picture=512,
        panel=256,
        classes=None,
        lr=1e-5,  # [ours] ControlNet's
        licence="creativeml-openrail-m",
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises BackboneError, which lists the names."""
    if name not in PRESETS:
        raise BackboneError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def data_folder(source: str) -> str:
    """A dataset's folder or hub id as it is; the toy world's folder is written first where it is missing.

    Raises BackboneError where it cannot be written, and where another version of `toy/world` wrote it.
    """
    folder, is_toy = HERE / source, HERE / source == HERE / PRESETS["toy"].data
    if is_toy and not folder.exists():
        print(f"writing the toy world to {folder}, once", flush=True)
        command = [sys.executable, "-m", "toy.world", "--out", folder]
        done = subprocess.run(command, cwd=HERE, stderr=subprocess.PIPE, text=True)
        if not folder.is_dir():  # where another process was faster, its folder is as good
            reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
            way = "python -m toy.world --out FOLDER writes it elsewhere, for --data FOLDER"
            raise BackboneError(f"the toy world cannot be written ({reason}); {way}")
    written = (folder / WORLD_NOTE).read_text() if (folder / WORLD_NOTE).exists() else ""
    if (is_toy or written) and written != version(HERE / "toy" / "world"):
        raise BackboneError(f"{folder} is of another version of toy/world; remove it, and write it anew")
    return str(folder) if is_toy else source
