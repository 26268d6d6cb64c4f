"""requirements.txt is all that training and editing need: they run with its packages alone."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from tiny import options

HERE = Path(__file__).resolve().parents[1]


def names(requirements: list[str]) -> set[str]:
    """The packages of some requirements that hold on this machine, without optional extras."""
    kept = [line.split("#")[0] for line in requirements if "extra ==" not in line]
    return {found[0].lower().replace("_", "-") for line in kept if (found := re.findall(r"[\w.-]+", line))}


def installed(package: str):
    try:
        return distribution(package)
    except PackageNotFoundError:  # for another platform
        return None


def test_training_and_editing_need_no_other_package(parts, tmp_path):
    wanted, known = names((HERE / "requirements.txt").read_text().splitlines()), set()
    site = tmp_path / "site"
    site.mkdir()
    while wanted - known:
        package = (wanted - known).pop()
        known.add(package)
        if found := installed(package):
            wanted |= names(found.requires or [])
            for top in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}:
                if not (site / top).exists():
                    (site / top).symlink_to(found.locate_file(top))
    assert "pytest" not in known and (site / "torch").exists()

    def run(*words) -> str:
        command = [sys.executable, "-S", *map(str, words)]  # -S: without what else is installed
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train.py", *options(parts, tmp_path / "run"), "--steps", "1")
    pair, query = ("examples/before.png", "examples/after.png"), "examples/input.png"
    command = ["--prompt-pair", *pair, "--instruction", "make it night", "--input", query, "--device", "cpu"]
    answer = tmp_path / "answer.png"
    run("edit.py", "--model", tmp_path / "run" / "editor", *command, "--output", answer, "--steps", "1")
    assert answer.stat().st_size > 0
