"""Nothing lost: kills, ends that are asked for, damaged checkpoints, full disks, and steps of no number."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import P, options, save_data, save_parts
from torch import nn

import backbone
import edit
import rcldm
import sam_loss
import train
import training.precompute as cache_module
from dataset import VisualPromptDataset
from disk import atomic_folder, atomic_write
from pictures.pairs import read_pairs
from training import validation
from training.checkpoint import load_checkpoint, save_checkpoint
from training.monitor import LossMonitor
from training.precompute import Frozen, precompute
from training.stopping import Stop

TESTS = Path(__file__).parent
QUICK = ("--no-esm", "--no-liu", "--no-sam")


def state(folder):
    (last,) = sorted(folder.glob("checkpoint-*"))[-1:]
    return load_file(last / "state.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- Kills --------------------------------------------------------------------------------------------------


def killed(folder, kills):
    program = [sys.executable, str(TESTS / "killing.py"), str(folder), "--kills", str(kills)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    counted = killed(tmp_path, 4)
    assert counted["kills"] == 4 and counted["ends"] == counted["equal"] >= 1


@pytest.mark.slow
def test_fifty_kills_at_random_instants_lose_nothing(tmp_path):
    counted = killed(tmp_path, 50)
    assert counted["kills"] == 50 and counted["ends"] == counted["equal"] >= 1
    assert min(counted[way] for way in ("instant", "file", "tensors")) >= 5


# --- Ends that are asked for --------------------------------------------------------------------------------


def test_asked_to_end_it_finishes_the_step_and_saves(run, tmp_path, monkeypatch, capsys):
    steps = (*QUICK, "--steps", "4", "--save-every", "9")
    run(*steps, output=tmp_path / "whole")
    draw = train.Losses.compose
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        drawn, output = [], tmp_path / number.name

        def ask(self, *inputs, number=number, drawn=drawn):
            drawn.append(None)
            if len(drawn) == 2:
                os.kill(os.getpid(), number)
            return draw(self, *inputs)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(train.Losses, "compose", ask)
            run(*steps, output=output)
        assert stopped.value.code == code
        said = capsys.readouterr().err
        assert f"{number.name}: ends after this step" in said and "--resume goes on after step 2" in said
        assert [path.name for path in output.glob("*-*")] == ["checkpoint-0000002"]
        run(*steps, "--resume", output=output)
        assert equal(state(output), state(tmp_path / "whole"))


def test_asked_in_the_last_step_it_ends_with_its_editor(run, tmp_path, monkeypatch):
    draw = train.Losses.compose
    monkeypatch.setattr(
        train.Losses, "compose", lambda *inputs: os.kill(os.getpid(), signal.SIGTERM) or draw(*inputs)
    )
    run(*QUICK, "--steps", "1")
    assert (tmp_path / "run" / "editor" / "config.json").exists()
    assert len(state(tmp_path / "run")) > 0


def test_signals_are_as_before_when_all_is_done():
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        stop.at_work = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


# train.py with pictures that are decoded at every step, as those of a large dataset are.
ON_DISK = "import training.precompute as p; p.IN_MEMORY = 0; import train; train.main()"
WITH_A_WORKER = [sys.executable, "-c", ON_DISK]


def test_ctrl_c_at_a_terminal_reaches_the_workers_too_and_does_no_harm(parts, tmp_path):
    """As a program in a process group of its own, with a worker that decodes pictures; all get the signal."""
    command = [*WITH_A_WORKER, *options(parts, tmp_path / "run"), *QUICK, "--steps", "100000"]
    command += ["--workers", "1", "--cache", str(tmp_path / "cache")]
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, cwd=TESTS.parent
        )
        deadline = time.monotonic() + 120
        while "train:" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()[-2000:]
    text = log.read_text()
    assert "--resume goes on after step" in text and "Traceback" not in text
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_asked_before_it_is_at_work_or_twice_it_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Stop():
        os.kill(os.getpid(), signal.SIGTERM)
    with Stop() as stop:
        stop.at_work = True
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [143]
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [143, 130]


# --- Checkpoints --------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, empty, os.remove])
@pytest.mark.parametrize("name", ["state.safetensors", "step.json"])
def test_a_damaged_checkpoint_is_named_and_removed_the_one_before_it_is_taken(tmp_path, damage, name):
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    for step in (1, 2, 3):
        layer.weight.data.fill_(step)
        save_checkpoint(tmp_path, step, {"layer": layer}, optimizer, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-0000002", "checkpoint-0000003"]
    shutil.copytree(tmp_path / "checkpoint-0000002", tmp_path / "checkpoint-best")  # a user's own
    save_checkpoint(tmp_path, 3, {"layer": layer}, optimizer, keep=2)
    assert (tmp_path / "checkpoint-best").exists()
    damage(tmp_path / "checkpoint-0000003" / name)
    with pytest.raises(ValueError, match=r"checkpoint-0000003: damaged \(.*\); remove it"):
        load_checkpoint(tmp_path, {"layer": layer}, optimizer)
    shutil.rmtree(tmp_path / "checkpoint-0000003")
    assert load_checkpoint(tmp_path, {"layer": layer}, optimizer) == 2 and (layer.weight == 2).all()


def test_changed_settings_are_said(run, tmp_path, capsys):
    run(*QUICK, "--steps", "1")
    capsys.readouterr()
    run(*QUICK, "--steps", "2", "--lr", "0.5", "--resume", "--save-every", "5")
    said = [line for line in capsys.readouterr().out.splitlines() if "when this run began" in line]
    assert said == [
        "--steps was 1 when this run began, and is 2",
        "--lr was 1e-05 when this run began, and is 0.5",
    ]
    settings = tmp_path / "run" / "settings.json"
    settings.write_text(settings.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    run(*QUICK, "--steps", "2", "--resume")
    assert "--device was cuda when this run began, and is cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run(*QUICK, "--steps", "2", "--no-rcldm", "--resume")
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and "--no-rcldm was False" in shown.out
    assert "of another architecture; resume with the settings it began with" in shown.err


# --- Full disks ---------------------------------------------------------------------------------------------


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "editor"
    with atomic_folder(target) as new:
        (new / "a").write_text("1")
    with pytest.raises(OSError), atomic_folder(target) as new:
        (new / "a").write_text("2")
        raise OSError("no space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["editor"] and (target / "a").read_text() == "1"
    (tmp_path / ".editor.new").mkdir()  # as a killed process leaves it
    with atomic_folder(target) as new:
        (new / "b").write_text("3")
    assert [path.name for path in tmp_path.rglob("*")] == ["editor", "b"]


def end_of(process):
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in out + err, (out + err)[-3000:]
    return process.returncode, out, err


def start(parts, output, *more, limit=None, program=(sys.executable, str(TESTS.parent / "train.py"))):
    """train.py as a program; limit: bytes that a file may have."""

    def little():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [*program, *options(parts, output), *QUICK, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # As from a shell: Python then keeps what it prints to a pipe until it is told to flush it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, preexec_fn=little if limit else None, env=env, cwd=TESTS.parent, **pipes)


def test_on_a_full_disk_it_ends_in_a_line_and_the_last_checkpoint_stays(run, parts, tmp_path, monkeypatch):
    """A quota, by the limit that a process may have: no further editor or checkpoint fits."""
    monkeypatch.setattr(train, "CHECKPOINTS", 9)
    steps = ("--steps", "4", "--save-every", "1")
    run(*QUICK, *steps, output=tmp_path / "whole")
    output = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in (3, 4):
        shutil.rmtree(output / f"checkpoint-000000{step}")
    code, _, err = end_of(start(parts, output, *steps, "--resume", limit=2**17))
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("train.py: error: ") and "File too large" in last
    assert f"{output}/" in last
    assert all(value.isfinite().all() for value in state(output).values())
    assert (output / "editor" / "config.json").read_bytes()  # the one of before
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]
    run(*QUICK, *steps, "--resume")
    assert equal(state(output), state(tmp_path / "whole"))


def test_a_damaged_cache_is_a_line(run, tmp_path, refused):
    run(*QUICK, "--steps", "1", "--cache", str(tmp_path / "cache"))
    for path in (tmp_path / "cache").glob("precomputed-*/*"):
        path.write_bytes(b"")
    again = "--steps", "1", "--cache", str(tmp_path / "cache")
    assert "damaged; remove it" in refused(run, *QUICK, *again, output=tmp_path / "other")


def test_a_cache_that_cannot_be_written_is_a_line(run, tmp_path, refused):
    (tmp_path / "cache").write_text("a file where the folder should be")
    line = refused(run, "--no-esm", "--no-sam", "--steps", "1", "--cache", str(tmp_path / "cache"))
    assert line.startswith("train.py: error: ") and str(tmp_path / "cache") in line


def test_a_full_disk_under_safetensors_is_an_oserror(tmp_path):
    def write(file):
        file.touch()
        raise SafetensorError("No space left on device")

    with pytest.raises(OSError, match="weights: No space left on device"):
        atomic_write(tmp_path / "weights", write)
    assert not list(tmp_path.iterdir())


# --- Steps that are no numbers ------------------------------------------------------------------------------


def test_a_step_that_is_no_number_is_not_learnt_from(run, tmp_path, monkeypatch, capsys):
    loss, calls = sam_loss.selective_area_loss, []

    def sometimes_nan(*inputs):
        calls.append(None)
        return loss(*inputs) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(sam_loss, "selective_area_loss", sometimes_nan)
    monkeypatch.setattr(train, "CHECKPOINTS", 9)
    run("--no-liu", "--no-esm", "--save-every", "1", "--steps", "4")
    one, two, three = (
        load_file(tmp_path / "run" / f"checkpoint-000000{k}" / "state.safetensors") for k in (1, 2, 3)
    )
    names = [name for name in one if name.startswith(("model/", "ema/", "optimizer/"))]
    assert all(torch.equal(one[name], two[name]) for name in names)
    assert not all(torch.equal(two[name], three[name]) for name in names)
    assert int(two["monitor/skipped"]) == 1 and "skipped=1" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in state(tmp_path / "run").values())


def test_too_many_in_a_row_are_the_end_and_the_last_good_state_is_saved(run, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(LossMonitor, "LIMIT", 3)
    loss, calls = sam_loss.selective_area_loss, []

    def nan_from_now_on(*inputs):
        calls.append(None)
        return loss(*inputs) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(sam_loss, "selective_area_loss", nan_from_now_on)
    line = refused(run, "--no-liu", "--no-esm", "--steps", "50")
    assert line.startswith("train.py: error: 3 steps in a row were no numbers")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0000005"]
    assert all(value.isfinite().all() for value in state(tmp_path / "run").values())


def test_a_step_that_explodes_is_told_from_a_hard_one():
    watch, one = LossMonitor(), torch.tensor(1.0)
    watch.add({"loss": one})
    assert watch.is_sound(one)
    for loss, norm, wanted in (
        (50.0, 1.0, True),
        (1e4, 1.0, False),
        (1.0, float("inf"), False),
        (1.0, 9.0, True),
    ):
        watch.add({"loss": torch.tensor(loss)})
        assert watch.is_sound(torch.tensor(norm)) == wanted
    assert watch.skipped == 2 and watch.in_a_row == 0
    again = LossMonitor()
    again.load_state_dict(watch.state_dict())
    assert again.skipped == 2 and torch.equal(again.averages["loss"], watch.averages["loss"])
    watch.add({"loss": one})
    watch.add({"loss": torch.tensor(float("nan"))})  # a part of the same step
    assert not watch.is_sound(one)


# --- Broken pictures ----------------------------------------------------------------------------------------


def test_a_broken_picture_among_many_is_named_counted_and_left_out(run, tmp_path, monkeypatch, capsys):
    data = save_data(tmp_path / "data", pairs=12)  # of each of two instructions
    broken = data / "train" / "3_after.png"
    truncate(broken)
    empty(data / "seen" / "0_before.png")  # in the validation split
    monkeypatch.setattr(validation, "PICTURES", 24)
    for _ in range(2):  # looked at, then from the cache
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run(*QUICK, "--steps", "1", data=data)
        out = capsys.readouterr().out
        assert out.count(f"left out: {broken}: corrupt") == 1 and "1 of 24 pairs cannot be used" in out
        assert "left out: " + str(data / "seen" / "0_before.png") in out
        assert "23 pairs" in out


def test_the_others_facts_stay_with_them(parts, tmp_path):
    data = save_data(tmp_path / "data", pairs=12)
    args = SimpleNamespace(data="data", cache=tmp_path, workers=0)
    vae = backbone.load_stable_diffusion(str(parts / "sd")).vae
    frozen, device = Frozen(vae, None, None), torch.device("cpu")
    _, all_precomputed = precompute(VisualPromptDataset(read_pairs(data), P), frozen, args, device)
    empty(data / "train" / "3_after.png")
    args.cache = tmp_path / "again"
    kept, precomputed = precompute(VisualPromptDataset(read_pairs(data), P), frozen, args, device)
    rows = [k for k in range(24) if k != 3]
    assert [Path(pair.input).name for pair in kept.pairs] == [f"{k}_before.png" for k in rows]
    assert torch.equal(precomputed.pictures, all_precomputed.pictures[rows])
    assert torch.equal(precomputed.latents, all_precomputed.latents[rows])


def test_more_than_one_in_twenty_stop_it(run, tmp_path, capsys):
    data = save_data(tmp_path / "data", pairs=12)
    for k in (3, 20):
        empty(data / "train" / f"{k}_before.png")
    with pytest.raises(SystemExit) as stopped:
        run(*QUICK, "--steps", "1", data=data)
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out.count("left out: ") == 2
    assert "2 of 24 pairs cannot be used, more than one in twenty; the first: " in shown.err


# --- Caches -------------------------------------------------------------------------------------------------


def draw(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (P, P, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def redraw(data, models):
    """In the middle, under the same name, of the same size and time of modification."""
    path = data / "train" / "9_after.png"
    times = path.stat().st_mtime_ns
    draw(path, 7)
    os.utime(path, ns=(times, times))


def exchange_rows(data, models):
    path = data / "train" / "metadata.jsonl"
    lines = path.read_text().splitlines()
    lines[8], lines[9] = lines[9], lines[8]
    path.write_text("\n".join(lines))


def mend(data, models):
    draw(data / "train" / "3_after.png", 8)


def save_table(folder, order):
    """24 pairs of two instructions as a Parquet file, their pictures in some order."""
    rng, image = np.random.default_rng(0), datasets.Image()
    images = list(rng.integers(0, 256, (2, 24, P, P, 3), dtype=np.uint8))
    rows = {name: [Image.fromarray(side[k]) for k in order] for name, side in zip(SIDES, images)}
    rows["instruction"] = [("make it night", "remove the dog")[k // 12] for k in range(24)]
    features = datasets.Features(dict.fromkeys(SIDES, image) | {"instruction": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")


SIDES = ("input_image", "edited_image")


def rewrite_the_table(data, models):
    save_table(data, [0, 2, 1, *range(3, 24)])


def change_a_weight(data, models):
    file = models / "sd/vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).mul_(1.1)
    save_file(weights, file)


def change_json(file, **more):
    return lambda data, models: (models / file).write_text(
        json.dumps(json.loads((models / file).read_text()) | more)
    )


def write_captions(data, models):
    path = data / "train" / "metadata.jsonl"
    rows = [json.loads(line) | {"input_caption": "a street"} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, rows)))


def download_the_tokenizer(data, models):
    (models / "clip/tokenizer.json").write_text("{}")


CHANGES = {"picture": redraw, "rows": exchange_rows, "mended": mend, "table": rewrite_the_table}
CHANGES |= {"weight": change_a_weight, "scaling": change_json("sd/vae/config.json", scaling_factor=0.5)}
LIGHTER = {"mean": [0.4] * 3, "std": [0.5] * 3}
CHANGES |= {"CLIP's mean": change_json("clip/open_clip_config.json", preprocess_cfg=LIGHTER)}
CHANGES |= {"threshold": change_json("areas.json", threshold=0.0)}
HARMLESS = {"captions": write_captions, "tokenizer": download_the_tokenizer}


@pytest.mark.parametrize("what", [*CHANGES, *HARMLESS])
def test_the_cache_knows_every_picture_row_and_weight(parts, tmp_path, monkeypatch, what):
    """What has changed is computed anew, as without a cache."""
    change = (CHANGES | HARMLESS)[what]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    data = save_data(tmp_path / "data", pairs=12)
    if change is mend:
        empty(data / "train" / "3_after.png")
    if change is rewrite_the_table:
        save_table(data, range(24))
        shutil.rmtree(data / "train")
    models, seen = tmp_path / "models", []
    for name in ("sd", "clip", "segmenter"):
        shutil.copytree(parts / name, models / name)
    (models / "areas.json").write_text('{"classes": ["person"]}')
    read_all = cache_module.read_all
    monkeypatch.setattr(cache_module, "read_all", lambda *args: seen.append(None) or read_all(*args))

    def precomputed(cache):
        args = SimpleNamespace(data="data", cache=tmp_path / cache, workers=0)
        vae, clip = backbone.load_stable_diffusion(models / "sd").vae, backbone.load_clip(models / "clip")
        chosen = json.loads((models / "areas.json").read_text())
        areas = sam_loss.SelectiveAreas(*backbone.load_segmenter(models / "segmenter"), **chosen)
        frozen = Frozen(vae, clip, areas)
        kept, found = precompute(VisualPromptDataset(read_pairs(data), P), frozen, args, torch.device("cpu"))
        return [str(pair.output) for pair in kept.pairs], found

    precomputed("cache")
    names, _ = precomputed("cache")
    assert len(seen) == 1
    change(data, models)
    (again, after), (_, fresh) = precomputed("cache"), precomputed("another")
    assert len(seen) == (2 if what in HARMLESS else 3)
    assert (again != names) == (change in (mend, exchange_rows)) and len(again) == 24
    columns = [(one, other) for one, other in zip(after, fresh) if one is not None]
    assert len(columns) == 4 and all(torch.equal(one, other) for one, other in columns)


def test_precomputing_goes_on_where_it_was_killed(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PAIRS_IN_A_FILE", 10)
    data = save_data(tmp_path / "data", pairs=12)
    empty(data / "train" / "13_after.png")
    frozen = Frozen(backbone.load_stable_diffusion(parts / "sd").vae, None, None)
    starts, read_all = [], cache_module.read_all

    def read(data, args, broken, start):
        starts.append(start)
        if len(starts) == 2:
            raise KeyboardInterrupt
        return read_all(data, args, broken, start)

    def precomputed(cache):
        args = SimpleNamespace(data="data", cache=tmp_path / cache, workers=0)
        return precompute(VisualPromptDataset(read_pairs(data), P), frozen, args, torch.device("cpu"))

    monkeypatch.setattr(cache_module, "read_all", read)
    with pytest.raises(KeyboardInterrupt):
        precomputed("cache")
    kept, found = precomputed("cache")
    assert starts == [0, 10, 10, 20] and len(kept) == 23
    monkeypatch.setattr(cache_module, "PAIRS_IN_A_FILE", 100)
    whole, at_once = precomputed("another")
    assert kept.pairs == whole.pairs
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(found, at_once))


# --- Two at once, and nothing there -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_training_into_one_folder_is_refused_until_the_first_is_gone(run, parts, tmp_path, refused):
    endless = ("--steps", "100000", "--save-every", "100000")
    worker = ("--workers", "1", "--cache", str(tmp_path / "cache"))
    first = start(parts, tmp_path / "run", *endless, *worker, program=WITH_A_WORKER)
    assert any("parameters to train" in line for line in iter(first.stdout.readline, ""))
    try:
        for more in ((), ("--resume",)):
            line = refused(run, *QUICK, "--steps", "1", *more)
            assert f"{tmp_path / 'run'}: another process writes there" in line
    finally:
        first.kill()
        first.wait()
    run(*QUICK, "--steps", "1", "--resume")  # though a worker of the first may still be there
    assert (tmp_path / "run" / "editor").exists()


def test_resuming_where_nothing_lies_is_refused(run, tmp_path, refused):
    for folder in (tmp_path / "typo", tmp_path):
        line = refused(run, *QUICK, "--steps", "1", "--resume", output=folder)
        assert line.startswith(f"train.py: error: --resume: --output {folder} holds no run")
    assert not list(tmp_path.iterdir())


# --- Numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["chunked", "numba"])
@pytest.mark.parametrize("length", [1, 4097, 65_536])
@pytest.mark.parametrize("delta", [1e-6, 1.0, 1e2, None])
def test_the_scan_stays_finite(length, delta, backend):
    """Of any length and at any step size; None: all sizes in turn, from 1e-6 to 1e2."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 2, 997)[torch.arange(length) % 997] if delta is None else torch.tensor(delta)
    deltas = sizes.expand(1, 2, length).clone()
    u, B, C = torch.randn(1, 2, length, generator=g), *torch.randn(2, 1, 1, 4, length, generator=g)
    A = -torch.arange(1, 5).float().expand(2, 4)
    inputs = [x.clone().requires_grad_() for x in (u, deltas, A, B, C)]
    y = rcldm.selective_scan(*inputs, backend=backend)
    gradients = torch.autograd.grad(y.sum(), inputs)
    assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_an_answer_is_the_same_to_the_last_bit_whatever_else_is_edited(tmp_path, monkeypatch):
    folder = save_parts(tmp_path / "parts") / "editor"
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    program = ["edit.py", "--model", str(folder), "--instruction", "hat"]
    found = []
    for names in ("abc", "ca", "b"):
        out = tmp_path / names
        inputs = [str(tmp_path / f"{name}.png") for name in names]
        monkeypatch.setattr(sys, "argv", [*program, "--input", *inputs, "--output", f"{out}/"])
        edit.main()
        found.append({name: Image.open(out / f"{name}.png").tobytes() for name in names})
    assert found[0] == {**found[1], **found[2]}


@pytest.mark.slow
def test_it_saves_though_nobody_listens_any_more(parts, tmp_path):
    process = start(parts, tmp_path / "run", "--steps", "100000")
    lines = iter(process.stdout.readline, "")
    assert any("parameters to train" in line for line in lines)
    process.stdout.close()
    time.sleep(2)
    process.stderr.close()
    process.terminate()
    assert process.wait(60) == 143
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) >= 1
