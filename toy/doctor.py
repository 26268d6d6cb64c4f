"""Tells what this machine computes with, and whether it edits right: all of it belongs in a bug report.

    python -m toy.doctor        # or `make doctor`

The edit is that of `make demo`: by the example alone, by words alone, and by both. The renderer knows the
right answer, so no one has to look: of all pictures that one edit makes of the input, the right one must be
nearest to the answer, and the mean absolute errors inside and outside the edit within `MOST`. The exit code
is 0 where all three answers are right, and 1 where one is not.
"""

import importlib.metadata
import os
import shutil
import subprocess

import numpy as np
import torch
from PIL import Image
from torch.utils import collect_env

import backbone
import scan_kernels
from apps.pipeline import InstructGIEPipeline, seeded
from toy import score, world

# --- The edit, and what is right ----------------------------------------------------------------------------

# What examples/ shows: before and after are EXAMPLE, unedited and edited, and the input is SCENE.
EXAMPLE = world.Scene(
    "meadow", (world.Thing("star", "red", "top left"), world.Thing("face", "tan", "bottom right"))
)
SCENE = world.Scene(
    "cream",
    (
        world.Thing("heart", "green", "top right"),
        world.Thing("circle", "pink", "bottom left"),
    ),
)
EDIT = world.Edit("background", "", "turquoise")
WORDS = "could the background be turquoise?"
WAYS = {"example": ("", True), "words": (WORDS, False), "both": (WORDS, True)}  # words; with the example?

# Variables that begin so may change numbers.
NUMERIC = ("ATEN_", "ONEDNN_", "DNNL_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "VECLIB_", "NUMBA_")
NUMERIC += ("CUDA_VISIBLE_DEVICES", "CUBLAS_", "NVIDIA_TF32_", "PYTORCH_", "TORCH_ALLOW_", "TRITON_INTERPRET")

# Mean absolute errors, in levels of 0 … 255. The shipped editor reaches at most 6.2 inside and 24.1 outside.
MOST = {"inside": 25.0, "outside": 30.0}


def judge(answer: Image.Image | np.ndarray, truth: score.Truth) -> tuple[bool, str]:
    """Whether an answer (P, P, 3) uint8 is right, and the numbers that say so."""
    found = truth.score(np.asarray(answer))
    off = {region: found[f"mae_{region}"] for region in MOST if found[f"mae_{region}"] is not None}
    right = found["right"] and all(error <= MOST[region] for region, error in off.items())
    told = (f"{error:.1f} {region} the edit (at most {MOST[region]:g})" for region, error in off.items())
    nearest = f'nearest of {found["candidates"]} pictures: "{found["nearest_edit"]}"'
    return right, f"{nearest}; levels off: {', '.join(told)}"


def demo(pipe: InstructGIEPipeline, way: str) -> Image.Image:
    """The answer to the input of examples/, in one of `WAYS`."""
    words, is_shown = WAYS[way]
    pair = (world.render(EXAMPLE), world.render(EDIT.apply(EXAMPLE))) if is_shown else None
    return pipe(words, world.render(SCENE), pair, generator=seeded([0])).images[0]


def tell_machine(device: torch.device) -> None:
    print(collect_env.get_pretty_env_info())  # system, processor, GPUs, PyTorch and what belongs to it
    print(torch.__config__.show(), torch.__config__.parallel_info(), sep="\n")
    print("packages:", *sorted(f"{x.name}=={x.version}" for x in importlib.metadata.distributions()))
    set_here = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(NUMERIC)]
    print("environment:", *set_here)
    if shutil.which("git"):
        git = ["git", "-C", backbone.HERE, "describe", "--always", "--dirty"]
        print("commit:", subprocess.run(git, capture_output=True, text=True).stdout.strip() or "none")
    print("device:", device)
    print("scan:", ", because ".join(scan_kernels.scan_backend(torch.empty(1, device=device))), flush=True)


@backbone.one_line_errors("toy.doctor")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("toy.doctor", __doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    device = backbone.pick_device(args.device)
    tell_machine(device)
    backbone.hide_progress_bars()
    pipe = InstructGIEPipeline.from_pretrained(backbone.PRESETS["toy"].editor).to(device)
    pipe.set_progress_bar_config(disable=True)
    truth = score.Truth(SCENE, EDIT)
    wrong = []
    for way in WAYS:
        right, numbers = judge(demo(pipe, way), truth)
        print(f"by {way}: {'right' if right else 'WRONG'}; {numbers}", flush=True)
        wrong += [] if right else [f"by {way}"]
    print("verdict:", f"WRONG {', '.join(wrong)}" if wrong else "right")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
