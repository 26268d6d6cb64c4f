"""What `make toy` did, as `docs/make-toy.md`: the losses and hours of each stage, and the files' SHA-256.

    python -m toy.pretrain.report

The losses are moving averages after a hundredth, a tenth, half and all of the steps. Hours leave pauses out.
"""

import hashlib
from pathlib import Path

import backbone
from disk import write_text
from toy.pretrain.__main__ import WEIGHTS
from training.curve import hours_of, read_scalars

PAGE = backbone.HERE / "docs" / "make-toy.md"
INTRODUCTION = """# What `make toy` printed

`python -m toy.pretrain.report` writes this page from the logs under `runs`. The losses are moving averages
after the given shares of the steps.
"""


def row(run: Path) -> tuple[float, list[str]]:
    """When a run began; and its name, its steps and hours, and its minimised loss over time."""
    scalars = read_scalars(run)
    logged = scalars["loss/loss"]
    last = max(logged)
    at = [min(logged, key=lambda step: abs(step - share * last)) for share in (0.01, 0.1, 0.5, 1)]
    cells = [
        run.name,
        f"{last:,}",
        f"{hours_of(logged)[last]:.2f}",
        *(f"{logged[step][1]:.4f}" for step in at),
    ]
    return min(time for time, _ in logged.values()), cells


def hashes(folder: Path) -> list[list[str]]:
    """Every file below, and the first 16 digits of its SHA-256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = (hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files)
    return [[f"`{path.relative_to(folder)}`", f"`{digest}`"] for path, digest in zip(files, digests)]


@backbone.one_line_errors("toy.pretrain.report")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("toy.pretrain.report", __doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where `make toy` ran")
    args = parser.parse_args(argv)
    logs = *args.runs.glob("pretrain/*/tensorboard"), *args.runs.glob("editor*/tensorboard")
    head = ["stage", "steps", "hours", "loss, 1 %", "10 %", "50 %", "100 %"]
    stages = backbone.markdown(head, [cells for _, cells in sorted(row(log.parent) for log in logs)])
    files = backbone.markdown(["file of `toy/weights`", "SHA-256, 16 digits"], hashes(WEIGHTS), words=2)
    write_text(PAGE, f"{INTRODUCTION}\n{stages}\n{files}")
    print(PAGE)


if __name__ == "__main__":
    main()
