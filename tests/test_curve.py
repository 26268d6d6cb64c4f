"""training/curve.py: the log of a training as a table."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from training import curve
from training.loop import fit


def write(folder, steps, start, loss):
    with SummaryWriter(folder / "tensorboard") as log:
        for step in steps:
            log.add_scalar("loss/dm", loss(step), step, walltime=start + 36 * step)
            if step % 10 == 0:
                log.add_scalar("validation error", step / 10, step, walltime=start + 36 * step)


def test_a_resumed_run_is_one_table_without_its_pause(tmp_path, capsys):
    write(tmp_path, range(1, 26), 1e6, lambda step: 1.0)
    (log,) = (tmp_path / "tensorboard").iterdir()
    log.rename(log.with_name("events.out.tfevents.0"))  # as of a second before the next one's
    write(tmp_path, range(21, 41), 1e6 + 9000, lambda step: 0.5)  # five steps again, after hours
    curve.main([str(tmp_path), "--rows", "3"])
    assert capsys.readouterr().out.splitlines() == [
        "| step | hours | dm | validation error |",
        "| ---: | ---: | ---: | ---: |",
        "| 10 | 0.1 | 1.0000 | 1.0 |",
        "| 30 | 0.3 | 0.5000 | 3.0 |",
        "| 40 | 0.4 | 0.5000 | 4.0 |",
    ]


def test_the_loop_of_the_parts_is_logged_through_a_stop(tmp_path, capsys):
    torch.manual_seed(0)
    line, x = nn.Linear(1, 1), torch.linspace(-1, 1, 9)[:, None]

    def losses_of(steps):  # one of them is no number, and is left out
        return ({"mse": (line(x) - 3 * x).square().mean() / (step != 50)} for step in steps)

    for steps in (40, 100):  # as if stopped
        fit("line", line, losses_of, tmp_path, steps=steps, lr=0.1, warmup=1)
    curve.main([str(tmp_path), "--rows", "3"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| step | hours | mse |" and rows[-1].startswith("| 100 |")
    losses = [float(row.split("|")[3]) for row in rows]
    assert losses[-1] < 0.1 * losses[0]


def test_a_run_of_two_steps_is_one_row(tmp_path, capsys):
    with SummaryWriter(tmp_path / "tensorboard") as log:
        log.add_scalar("loss/dm", 0.25, 2)
        log.add_scalar("error on training pairs", 9, 2)
    curve.main([str(tmp_path)])
    head, _, row = capsys.readouterr().out.splitlines()
    assert head == "| step | hours | dm | error on training pairs |" and row == "| 2 | 0.0 | 0.2500 | 9.0 |"


@pytest.mark.parametrize("logged", [None, "validation error"])
def test_a_folder_without_losses_is_one_line(tmp_path, capsys, logged):
    if logged:
        with SummaryWriter(tmp_path / "tensorboard") as log:
            log.add_scalar(logged, 9, 2)
    with pytest.raises(SystemExit):
        curve.main([str(tmp_path)])
    message = capsys.readouterr().err
    assert "no log of a training's losses" in message and message.count("\n") == 1


def test_what_is_fitted_ends_as_its_average(tmp_path):
    line, x = nn.Linear(1, 1), torch.linspace(-1, 1, 9)[:, None]
    fit(
        "line",
        line,
        lambda steps: ({"mse": (line(x) - 3 * x).square().mean()} for _ in steps),
        tmp_path,
        steps=9,
        lr=0.1,
    )
    (file,) = tmp_path.glob("checkpoint-*/state.safetensors")
    state = load_file(file)
    assert torch.equal(line.weight, state["average/module.weight"])
    assert not torch.equal(line.weight, state["model/weight"])
