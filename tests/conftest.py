"""What several test files share: tiny parts, and train.py run on them."""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from numpy.lib import NumpyVersion

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # scan_kernels/triton_gpu.py runs on a CPU; read as Triton is imported
    )
    new_numpy = NumpyVersion(np.__version__) >= "2.5.0"
    if find_spec("triton") and version("triton").startswith("3.6.") and new_numpy:
        sys.modules["triton"] = None  # torch 2.11's; its interpreter has no loops with this NumPy

from tiny import options, save_all, save_parts

import backbone
import train
from training import validation


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folders of `save_parts`, not to be written to."""
    return save_parts(tmp_path_factory.mktemp("editor"))


@pytest.fixture
def refused(capsys):
    """Calls what has to end with exit code 2 → the last line that it says, an error in our form."""

    def call(program, *args, **more):
        with pytest.raises(SystemExit) as stopped:
            program(*args, **more)
        (*_, line) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and ": error: " in line
        return line

    return call


@pytest.fixture
def nan_until_written():
    """New memory holds NaN: weights that were left on the disk cannot be right by accident."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run(parts, monkeypatch, tmp_path):
    """Runs train.py's main in this process; options override the tiny defaults."""

    monkeypatch.setattr(validation, "PICTURES", 2)
    monkeypatch.setitem(backbone.SAMPLING, "steps", 2)

    def start(*more, output=None, **paths):
        argv = [*options(parts, output or tmp_path / "run", **paths), *more]
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        train.main()

    return start
