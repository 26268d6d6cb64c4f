"""What several test files share: tiny parts, and train.py run on them."""

import sys

import pytest
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
