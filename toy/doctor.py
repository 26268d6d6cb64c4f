"""Tells what this machine computes with, and whether it edits right: all of it belongs in a bug report.

    python -m toy.doctor        # or `make doctor`

The edit is that of `make demo`: by the example alone, by words alone, and by both. The renderer knows the
right answer, so no one has to look: of all pictures that one edit makes of the input, the right one must be
nearest to the answer, and the mean absolute errors inside and outside the edit within `MOST`. The exit code
is 0 where all three answers are right, and 1 where one is not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "safetensors", "numba")
PACKAGES += ("llvmlite", "numpy", "Pillow", "gradio", "triton", "mamba-ssm")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toy.doctor", description="Tell what this machine computes with, and try an edit."
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def say(name: str, text: object) -> None:
    print(f"{name:<13}{text}", flush=True)


def tell_versions() -> None:
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "none"
    say("commit", commit)
    say("Python", f"{platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            say(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            say(package, "not installed")


if __name__ == "__main__":
    arguments()  # answers --help and misspelt options
    tell_versions()  # before the imports below, which may be what fails

import os
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import diffusers
import numpy as np
import psutil
import torch
import transformers
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

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

# Mean absolute errors, in levels of 0 … 255. The shipped editor has up to 17 inside and 14 outside, by way.
MOST = {"inside": 25.0, "outside": 20.0}


class Verdict(NamedTuple):
    """Whether an answer is right, and the numbers that say so."""

    right: bool
    numbers: str


def judge(answer: Image.Image | np.ndarray, truth: score.Truth) -> Verdict:
    """answer: (P, P, 3) uint8; of another shape it is wrong."""
    answer = np.asarray(answer)
    if answer.shape != truth.picture.shape or answer.dtype != np.uint8:
        return Verdict(False, f"an answer of shape {answer.shape} and type {answer.dtype}")
    found = truth.score(answer)
    off = {region: found[f"mae_{region}"] for region in MOST if found[f"mae_{region}"] is not None}
    told = ", ".join(
        f"{error:.1f} {region} the edit (at most {MOST[region]:g})" for region, error in off.items()
    )
    right = found["right"] and all(error <= MOST[region] for region, error in off.items())
    nearest = f'nearest of {found["candidates"]} pictures: "{found["nearest_edit"]}"'
    return Verdict(right, f"{nearest}; levels off: {told}")


def demo(pipe: InstructGIEPipeline, way: str, **options: object) -> Image.Image:
    """The answer to the input of examples/, in one of `WAYS`. options: the pipeline's."""
    words, is_shown = WAYS[way]
    pair = (world.render(EXAMPLE), world.render(EDIT.apply(EXAMPLE))) if is_shown else None
    return pipe(words, world.render(SCENE), pair, generator=seeded([0]), **options).images[0]


# --- The machine --------------------------------------------------------------------------------------------

FEATURES = ("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512vnni", "avx512bf16", "avx512fp16", "amx-tile")
FEATURES += ("amx-int8", "amx-bf16", "neon", "dotprod", "bf16", "sve", "sve2", "sme")
NUMERIC = ("ATEN_", "ONEDNN_", "DNNL_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "VECLIB_", "NUMBA_")
NUMERIC += ("CUDA_VISIBLE_DEVICES", "CUBLAS_", "NVIDIA_TF32_", "PYTORCH_", "TORCH_ALLOW_", "TRITON_INTERPRET")


def tell_machine(device: torch.device) -> None:
    gigabytes = [f"{number / 2**30:.1f}" for number in psutil.virtual_memory()[1::-1]]
    set_here = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(NUMERIC)]
    cores = f"{psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} logical"
    say("processor", "; ".join(processor()))
    say("levels", f"ATen {torch.backends.cpu.get_cpu_capability()}, {', '.join(libraries())}")
    say("threads", f"{torch.get_num_threads()} of PyTorch's, on {cores}")
    say("memory", "{} of {} GiB free".format(*gigabytes))
    say("GPU", "; ".join(gpus()) or "none")
    say("environment", " ".join(set_here) or "nothing set that changes numbers")
    say("device", device)
    products = {
        "CPU": torch.backends.mkldnn.matmul.fp32_precision,
        "CUDA": torch.backends.cuda.matmul.fp32_precision,
        "cuDNN's convolutions": torch.backends.cudnn.conv.fp32_precision,
    }
    products = ", ".join(f"{where} {how}" for where, how in products.items())
    say("precision", f"float32, as edit.py has it without --dtype; fp32_precision: {products}")
    say("scan", ", because ".join(scan_kernels.scan_backend(torch.empty(1, device=device))))


def processor() -> Iterator[str]:
    """Its name, as the system and as LLVM have it, and which of `FEATURES` it has."""
    name = platform.processor()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    elif sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or name
    yield name or platform.machine()
    try:
        from llvmlite import binding

        yield f"LLVM's {binding.get_host_cpu_name()}"
        has = binding.get_host_cpu_features()
        yield " ".join(feature for feature in FEATURES if has.get(feature))
    except (ImportError, RuntimeError) as error:  # LLVM does not know every processor
        yield f"features unknown ({error})"


def libraries() -> Iterator[str]:
    for name, library in (("oneDNN", torch.backends.mkldnn), ("MKL", torch.backends.mkl)):
        yield f"{name} {'used' if library.is_available() else 'missing'}"


def gpus() -> Iterator[str]:
    for k in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(k)
        yield f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    if torch.backends.mps.is_available():
        yield "Apple's, by Metal"


class Ran(TorchDispatchMode):
    """Notes the names of PyTorch's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None) -> object:
        self.names.add(operator.name())
        return operator(*args, **(kwargs or {}))


def attention(pipe: InstructGIEPipeline) -> str:
    """Which kernels of PyTorch's attention a step of the edit runs, and which PyTorch chooses among."""
    with Ran() as ran:
        demo(pipe, "example", num_inference_steps=1)
    start = "aten::_scaled_dot_product_"
    kernels = sorted(name.removeprefix(start) for name in ran.names if name.startswith(start))
    kinds = ("flash", "mem_efficient", "math", "cudnn")
    allowed = [kind for kind in kinds if getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()]  # CPUs', too
    backbone.choose_attention(pipe.device, "bf16")
    fused = torch.backends.cuda.flash_sdp_enabled()
    backbone.choose_attention(pipe.device, "no")
    return (
        f"{', '.join(kernels) or 'none of its own'}: PyTorch's choice of {', '.join(allowed)}; "
        f"in training in bf16 {'the same choice' if fused else 'without flash, which is slower there'}"
    )


# --- The command --------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Raises SystemExit where an answer is wrong."""
    with backbone.one_line_errors("toy.doctor"):
        device = backbone.pick_device(arguments(argv).device)
    tell_machine(device)
    transformers.logging.disable_progress_bar()  # of every part's loading
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipe = InstructGIEPipeline.from_pretrained(backbone.PRESETS["toy"].editor).to(device)
        pipe.set_progress_bar_config(disable=True)
        say("attention", attention(pipe))
        truth = score.Truth(SCENE, EDIT)
        verdicts = {way: judge(demo(pipe, way), truth) for way in WAYS}
    except Exception:  # whatever it is, the report is to have it
        traceback.print_exc(file=sys.stdout)
        say("verdict", "WRONG: the edit was not made")
        raise SystemExit(1) from None
    for way, (right, numbers) in verdicts.items():
        say(f"by {way}", f"{'right' if right else 'WRONG'}; {numbers}")
    wrong = [f"by {way}" for way, verdict in verdicts.items() if not verdict.right]
    say("verdict", f"WRONG {', '.join(wrong)}" if wrong else "right")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
