"""What several test files share: tiny parts, and train.py run on them."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # scan_triton.py's kernels run on a CPU; read as Triton is imported

from tiny import options, save_all

import train


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def run(parts, monkeypatch, tmp_path):
    """Runs train.py's main in this process; options override the tiny defaults."""

    def start(*more, output=None, **paths):
        argv = [*options(parts, output or tmp_path / "run", **paths), *more]
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        train.main()

    return start
