"""Runs every command that the README and the pages of docs/ show: `make docs-check`.

    python docs/check.py                # all pages, a quarter of an hour on two cores
    python docs/check.py README.md

Each page's commands run in their order, in an empty folder that shows this repository by links. Each runs in
small: `SMALLER` has the words that are changed and the options that are added. What is marked `bash` on a
page is run as it stands, by tests/test_docs.py, and left out here.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
from toy import world  # noqa: E402

PROGRAMS = "python|make|pip|accelerate|pytest"
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md")), *sorted(HERE.glob("exercises/*.md"))]

TRAINER = r"(?:(?<![a-z])train\.py|evaluation\.(?:vit|readings))"
# What is changed of a command, in this order.
SMALLER = {
    r"\s+#.*$": "",
    r" …$": "",
    r"--backbone sd15": "",  # the toy parts go the same way
    r"killing\.py FOLDER.*": "killing.py killed --kills 1",
    r"FOLDER": "tiny",
    r"data/visual-prompts": "made",
    r"SPLIT": "seen",
    r"MODE": "both",
    r"--count N": "--count 4",
    r"--guidance-text S --guidance-visual V": "--guidance-text 1.5",
    r"--device cuda": "--device auto",
    r"--out docs/": "--out out/",
    r"^make (?!demo)": "make -n ",
    r"^make demo": "make -o .venv/installed demo",
    r"^pip install": "pip install --dry-run --quiet",
    r"^accelerate launch( --num_processes \d+)?": "accelerate launch --cpu --num_processes 1",
    rf"^(?!.*--resume)(.*{TRAINER}.*)": r"rm -rf runs/train; \1",  # where a page's last one trained, too
    rf"({TRAINER}.*)": r"\1 --data tiny --steps 2 --batch 4 --accumulate 1 --workers 0",
    r"(edit\.py --model runs/train/editor)$": r"\1 --instruction 'make it night' --input examples/input.png"
    " --output out",
    r"^(python -m toy\.failures)": r"python -m evaluation.evaluate; \1",
    r"(evaluation\.evaluate[^;]*)": r"\1 --data tiny --count 4 --sheet 0 --steps 2",
    r"(evaluation\.metrics.*)": r"\1 --help",  # four answers are too few for an FID
    r"(toy\.stages.*)": r"\1 --data tiny --count 4",
    r"(data_making\.pictures.*)": r"\1 --steps 2 --samples 2"
    " --min-caption -1 --min-image -1 --min-direction -1",
    r"(data_making\.check made.*)": r"\1 || test $? = 1",  # so few pairs leave something to complain of
    r"(toy\.pretrain.*)": r"\1 --help",  # hours
    r"(data_making\.convert).*": r"\1 --help",  # there is no such dataset in small
    r"^.*bash bench/gpu\.sh.*": "DEVICE=cpu BACKBONE=toy PARITY=small_steps bash bench/gpu.sh",
    r"(bench\.paper_size).*": r"\1 --backbone toy --device cpu",
    r"(bench\.scan.*)": r"\1 --sizes 1,16,4,64 --repeat 1",
    r"(bench\.train_step.*)": r"\1 --batch 2 --repeat 1",
    r"(bench\.edit_time.*)": r"\1 --batch 1 --steps 2 --repeat 1",
    r"(evaluation\.receptive_field.*)": r"\1 --count 2",
    r"(figures\.py.*)": r"\1 --output out",
    r"^(pytest exercises(?!.*--answers).*)": r"\1 --answers",  # a student's to be solved first
    r"(-m apps\.page.*)": r"\1 --help",  # it serves until it is stopped: tests/test_app.py starts it
}


def commands(page: Path) -> list[str]:
    """Those of its code blocks, then those within its lines; each once."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [
        line for kind, block in blocks if kind != "bash" for line in re.sub(r"\\\n", "", block).splitlines()
    ]
    shown = [line.removeprefix("$ ") for line in lines]
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    shown += re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", text.replace("\n", " "))
    return list(dict.fromkeys(line for line in shown if re.match(rf"(?:{PROGRAMS}) ", line)))


def smaller(command: str) -> str:
    for words, others in SMALLER.items():
        command = re.sub(words, others, command)
    return " ".join(command.split())


def prepare(folder: Path) -> None:
    """Links to all of this repository, a tiny dataset, and captions."""
    for path in HERE.iterdir():
        if path.name not in ("out", "runs", "my", "data", ".git", "tiny"):
            (folder / path.name).symlink_to(path)
    for split in ("train", "seen"):
        world.write_split(folder / "tiny" / split, world.draw_split(split, 4, 2, seed=0))
    told = [sys.executable, "-m", "toy.world", "--captions", "6"]
    printed = subprocess.run(told, cwd=HERE, capture_output=True, check=True).stdout
    (folder / "captions.txt").write_bytes(printed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--limit", type=int, default=300, help="seconds for each command")
    args = parser.parse_args()
    wrong = 0
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for page in args.pages:
        shown = commands(page)
        if not shown:
            continue
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            for command in map(smaller, shown):
                start = time.monotonic()
                call = ["timeout", str(args.limit), "bash", "-c", command]
                done = subprocess.run(
                    call, cwd=folder, env=os.environ | {"PATH": paths}, capture_output=True, text=True
                )
                ok = "ok  " if done.returncode == 0 else "FAIL"
                print(f"{ok} {time.monotonic() - start:5.1f} s  {page.name}: {command}", flush=True)
                if done.returncode:
                    wrong += 1
                    print("\n".join(f"     {line}" for line in done.stderr.splitlines()[-8:]), flush=True)
    raise SystemExit(f"{wrong} commands failed" if wrong else None)


if __name__ == "__main__":
    main()
