"""bench/: each comparison prints its rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]


def rows(program, *options):
    command = [sys.executable, "-m", f"bench.{program}", "--device", "cpu", *options]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return {cells[0]: cells for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines[2:])}


@pytest.mark.slow
def test_a_step_is_compiled_whole():
    ours = "ours without ESM and SAM"
    options = "--batch", "2", "--repeat", "1", "--only", ours, "--ways", "compiled"
    assert list(rows("train_step", *options)) == [f"{ours}, compiled"]


@pytest.mark.slow
def test_the_rows_of_a_gpu_are_rehearsed_on_a_cpu(tmp_path):
    """Every section has its table, no row is missing, and none is said to have failed."""
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu", "BACKBONE": "toy"}
    environment |= {"ERRORS": str(tmp_path / "errors"), "PARITY": "small_steps", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "bench/gpu.sh"], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Not within" not in done.stdout, done.stdout + done.stderr
    step, edit, scan, parity, graphs = done.stdout.split("\n### ")[1:]
    names = [
        [line.split("|")[column].strip() for line in text.splitlines() if line.startswith("| ")][1:]
        for text, column in ((step, 1), (edit, 1), (scan, 2))
    ]
    assert names[0][1:] == ["ControlNetModel", "ours without ESM and SAM", "ours, all four"]
    assert names[1][1:] == ["StableDiffusionControlNetPipeline", "ours"] and names[2][1:] == [
        "numba",
        "chunked",
    ]
    assert " passed" in parity and " passed" in graphs
