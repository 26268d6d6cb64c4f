"""A training's log as a table: `python -m training.curve runs/train`.

Read from the TensorBoard files of `train.py` or `training.loop`: the losses, each a moving average, and of
`train.py` the error of the validation pictures' answers in levels of 0 … 255. Hours leave pauses out.
"""

from itertools import pairwise
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import backbone

PAUSE = 300  # seconds without a line in the log are no training


def read_scalars(folder: Path) -> dict[str, dict[int, tuple[float, float]]]:
    """Name → step → (wall time in seconds, value), of all files in a run's `tensorboard`.

    A step that was done twice, after a resume, counts as it was done last. Raises ValueError without files.
    """
    scalars: dict[str, dict[int, tuple[float, float]]] = {}
    for path in sorted((folder / "tensorboard").glob("events.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            new = {event.step: (event.wall_time, event.value) for event in events.Scalars(name)}
            scalars[name] = scalars.get(name, {}) | new
    if not any(name.startswith("loss/") for name in scalars):
        raise ValueError(f"{folder}: no log of a training's losses; name the folder of its checkpoints")
    return scalars


def hours_of(scalar: dict[int, tuple[float, float]]) -> dict[int, float]:
    """By step, the hours since the first one that is logged, without pauses."""
    hours, spent = {min(scalar): 0.0}, 0.0
    for (_, (before, _)), (step, (now, _)) in pairwise(sorted(scalar.items())):
        spent += now - before if 0 < now - before < PAUSE else 0
        hours[step] = spent / 3600
    return hours


def table(folder: Path, rows: int) -> str:
    """Markdown, `rows` steps of those whose answers' error was measured, if any was, the last among them."""
    scalars = read_scalars(folder)
    losses = sorted(name for name in scalars if name.startswith("loss/"))
    hours = hours_of(scalars[losses[0]])
    measured = [name for name in scalars if "error" in name][-1:]  # of validation pictures or training pairs
    errors = {step: f"{error:.1f}" for name in measured for step, (_, error) in scalars[name].items()}
    steps = sorted(hours.keys() & errors.keys() if errors else hours)
    shown = sorted({steps[-1 - k * (len(steps) - 1) // max(1, rows - 1)] for k in range(rows)})
    head = ["step", "hours", *(name.removeprefix("loss/") for name in losses)]
    head += measured
    lines = []
    for step in shown:
        values = (scalars[name][step][1] for name in losses)
        error = [errors[step]] if measured else []
        lines.append([f"{step:,}", f"{hours[step]:.1f}", *(f"{v:.4f}" for v in values), *error])
    return backbone.markdown(head, lines, words=0)


@backbone.one_line_errors("training.curve")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("training.curve", __doc__)
    parser.add_argument("run", type=Path, help="the folder of its checkpoints")
    parser.add_argument("--rows", type=int, default=12)
    args = parser.parse_args(argv)
    print(table(args.run, args.rows), end="")


if __name__ == "__main__":
    main()
