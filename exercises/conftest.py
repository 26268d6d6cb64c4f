"""`pytest exercises -k 05` tests what stands in 05_scan.py; with `--answers`, the answer in its place."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--answers", action="store_true", help="test the answers instead of the exercises")


def load(number: str, answers: bool) -> ModuleType:
    """A new copy of the exercise of that number, "01" … "14", or of its answer."""
    (path,) = (HERE / "answers" if answers else HERE).glob(f"{number}_*.py")
    spec = spec_from_file_location(f"exercise_{path.stem}", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def exercise(request: pytest.FixtureRequest) -> ModuleType:
    """The exercise whose number is in the test's name, `test_05_…`."""
    return load(request.function.__name__[5:7], request.config.getoption("answers"))
