"""training/curve.py: the log of a training as a table."""

import time

import pytest
from torch.utils.tensorboard import SummaryWriter

from training import curve


def write(folder, steps, start, loss):
    with SummaryWriter(folder / "tensorboard") as log:
        for step in steps:
            log.add_scalar("loss/dm", loss(step), step, walltime=start + 36 * step)
            if step % 10 == 0:
                log.add_scalar("validation error", step / 10, step, walltime=start + 36 * step)


def test_a_resumed_run_is_one_table_without_its_pause(tmp_path, capsys):
    write(tmp_path, range(1, 26), 1e6, lambda step: 1.0)
    time.sleep(1.1)  # the file's name has the second
    write(tmp_path, range(21, 41), 1e6 + 9000, lambda step: 0.5)  # five steps again, after hours
    curve.main([str(tmp_path), "--rows", "3"])
    assert capsys.readouterr().out.splitlines() == [
        "| step | hours | dm | validation error |",
        "| ---: | ---: | ---: | ---: |",
        "| 10 | 0.1 | 1.0000 | 1.0 |",
        "| 30 | 0.3 | 0.5000 | 3.0 |",
        "| 40 | 0.4 | 0.5000 | 4.0 |",
    ]


def test_a_folder_without_a_log_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        curve.main([str(tmp_path)])
    assert "no log of a training" in capsys.readouterr().err
