"""train.py from the command line to the editor: the switches, exact resume, and errors in one line."""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from tiny import P, save_data
from tiny import options as tiny_options
from torch.nn import functional as F

import backbone
import esm
import liu
import sam_loss
import train
from apps.pipeline import InstructGIEPipeline
from dataset import VisualPromptDataset, answer_panel, compose_grid, drop_example, mask_query
from pictures import from_bytes
from pictures.pairs import read_pairs
from training.draws import draw_order, draw_timesteps, keep_conditions
from training.precompute import Frozen, Precomputed, gather_batch, load_batches, precompute, read_instructions


def weights(folder):
    return load_file(folder / "editor" / "diffusion_pytorch_model.safetensors")


def test_a_run_makes_an_editor_with_pictures_and_checkpoints(run, tmp_path, capsys):
    run("--steps", "3", "--save-every", "1")
    output = tmp_path / "run"
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-0000002", "checkpoint-0000003"]
    picture = Image.open(output / "validation-0000003.png")
    assert picture.size == (5 * P, 2 * P)  # example before and after, input, answer, truth
    assert list((output / "tensorboard").iterdir())
    editor = InstructGIEPipeline.from_pretrained(output / "editor")
    assert editor.panel == P and editor.settings["trained_steps"] == 3
    card = (output / "editor" / "README.md").read_text()
    assert "\nlicense: other\n" in card and "trained for 3 steps. In each, a process took 2 grids" in card
    assert re.search(r"^\| validation error \| [\d.]+ \|$", card, re.M)
    said = capsys.readouterr()
    assert all(term in said.err for term in ("loss=", "dm=", "es=", "sam="))
    assert "selective areas: " in said.out and "validation is on training pairs" not in said.out


def test_help_tells_each_default_once(capsys):
    with pytest.raises(SystemExit):
        train.settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 64)" in text and "(default: None)" not in text and ") (default:" not in text


def test_a_folder_without_splits_is_validated_on_what_it_learnt_and_says_so(parts, run, tmp_path, capsys):
    run("--no-esm", "--no-liu", "--no-sam", "--steps", "1", data=parts / "data" / "train")
    assert "validation is on training pairs: " in capsys.readouterr().out
    card = (tmp_path / "run" / "editor" / "README.md").read_text()
    assert re.search(r"^\| error on training pairs \| [\d.]+ \|$", card, re.M)


@pytest.mark.parametrize("batches", ["1", "2"])
def test_resumed_is_bit_equal_to_uninterrupted(run, tmp_path, batches):
    options = ("--steps", "4", "--save-every", "2", "--accumulate", batches)
    run(*options, output=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for gone in ("checkpoint-0000004", "editor"):
        shutil.rmtree(tmp_path / "cut" / gone)
    run(*options, "--resume", output=tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)


def test_a_switched_off_contribution_loads_nothing(run, parts, tmp_path):
    nowhere = {name: parts / "nowhere" for name in ("clip", "segmenter", "llm")}
    switches = ("--no-rcldm", "--no-esm", "--no-liu", "--no-sam")
    run(*switches, "--steps", "1", **nowhere)
    settings = json.loads((tmp_path / "run" / "editor" / "instructgie.json").read_text())
    assert settings["llm"] is None
    assert json.loads((tmp_path / "run" / "editor" / "config.json").read_text())["design"] == "conv"


def test_pictures_in_memory_are_those_on_disk(parts, tmp_path):
    data = VisualPromptDataset(read_pairs(parts / "data"), P)
    args = argparse.Namespace(data="data", cache=tmp_path, workers=0)
    vae = backbone.load_stable_diffusion(str(parts / "sd")).vae
    frozen, device = Frozen(vae, None, None), torch.device("cpu")
    (_, fresh), (_, cached) = (precompute(data, frozen, args, device) for _ in range(2))
    for precomputed in (fresh, cached):
        assert (
            precomputed.embeddings is precomputed.areas is None and precomputed.pictures.dtype == torch.uint8
        )
        items = [data[3, i] for i in range(len(data))]
        batch = {key: torch.tensor([item[key] for item in items]) for key in ("index", "example_index")}
        panels, example, query = gather_batch(batch, precomputed, device)
        assert torch.equal(panels, torch.stack([item["panels"] for item in items]))
        assert example.latents.shape == query.latents.shape == precomputed.latents.shape


def test_training_goes_on_from_an_editor(run, tmp_path):
    quick = ("--no-esm", "--no-liu", "--no-sam", "--steps", "1")
    run(*quick, "--lr", "0.5", output=tmp_path / "first")
    run(*quick, "--lr", "1e-9", "--init", str(tmp_path / "first" / "editor"), output=tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert first["trainable_copy.controlnet_mid_block.zero_proj.weight"].abs().max() > 1e-4
    assert all(torch.allclose(first[k], second[k], atol=1e-6) for k in first)


def test_a_small_edit_weighs_as_much_as_a_large_one():
    before = torch.randn(3, 4, 8, 8)
    after = before.clone()
    after[0, :, 2:4, 2:4] += 1  # four latents of sixty-four; then all; then none
    after[1] -= 3
    weight = train.panel_weights(torch.stack([before, after], 1), answer=4.0, change=0.5)
    answer = answer_panel(weight)
    assert weight.shape == (3, 1, 16, 16) and (weight[..., :8] == 1).all() and (weight[:, :, :8] == 1).all()
    assert torch.allclose(answer[0, 0, 2:4, 2:4], torch.tensor(4 + 4 * 0.5 * 16.0))
    assert answer[0].min() == 4 and torch.allclose(answer[1], torch.tensor(6.0)) and (answer[2] == 4).all()
    assert torch.allclose(answer[:2].mean((1, 2, 3)), torch.tensor(6.0))


def test_dropout_has_the_shares_asked_for():
    text, example = keep_conditions(20_000, (0.2, 0.3, 0.05), torch.Generator().manual_seed(0))
    shares = {"neither": ~text & ~example, "pair": ~text & example, "words": text & ~example}
    shares = {name: found.float().mean().item() for name, found in shares.items()}
    assert shares == pytest.approx({"neither": 0.05, "pair": 0.2, "words": 0.3}, abs=0.015)
    text, example = keep_conditions(2000, (0.0, 0.1, 0.0), torch.Generator().manual_seed(0))
    assert text.all() and 0.05 < (~example).float().mean() < 0.15


def test_timesteps_are_the_noisy_ones_more_often():
    t = draw_timesteps(20_000, 1000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() == 999
    shares = [(t >= first).float().mean().item() for first in (500, 900)]
    assert shares == pytest.approx([1 - 0.5**4, 1 - 0.9**4], abs=0.015)


@pytest.mark.parametrize(
    ("options", "paths", "words"),
    [
        ((), {"data": "single"}, "second edit pair"),
        ((), {"data": "nowhere"}, "no such folder"),
        ((), {"stable_diffusion": "clip"}, "not a Stable Diffusion folder"),
        ((), {"stable_diffusion": "owner/no-such-model"}, "hub"),
        ((), {"segmenter": "llm"}, "not a Mask2Former folder"),
        (("--device", "cuda"), {}, "--device cuda"),
        (("--backbone", "sd16"), {}, "sd15"),
        (("--steps", "0"), {}, "--steps"),
        (("--save-every", "0"), {}, "--save-every"),
        (("--lr", "-1"), {}, "--lr"),
        (("--es-weight", "nan"), {}, "--es-weight"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    run, parts, tmp_path, refused, monkeypatch, options, paths, words
):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if not (parts / "single").exists():
        save_data(parts / "single", pairs=1)
    paths = {k: v if "/" in v else parts / v for k, v in paths.items()}
    line = refused(run, *options, **paths)
    assert line.startswith("train.py: error: ") and words in line
    assert not (tmp_path / "run").exists()


def test_an_editor_folder_of_another_architecture_is_refused(run, folders, refused):
    quick = "--no-rcldm", "--no-esm", "--no-liu", "--no-sam", "--steps", "1"
    line = refused(run, *quick, "--init", str(folders / "editor"))
    assert line.startswith("train.py: error: --init ") and "architecture" in line


def test_gradient_checkpointing_changes_nothing_that_is_learnt(run, tmp_path, monkeypatch):
    call, checkpointed = train.Losses.__call__, set()

    def watched(self, model, *more):
        checkpointed.add(model.prompt_encoder.gradient_checkpointing)
        return call(self, model, *more)

    monkeypatch.setattr(train.Losses, "__call__", watched)
    for name, more in (("plain", ()), ("checkpointed", ("--gradient-checkpointing",))):
        run("--steps", "3", "--no-liu", *more, output=tmp_path / name)
        assert checkpointed == {bool(more)}
        checkpointed.clear()
    assert_same_gradients(tmp_path / "plain", tmp_path / "checkpointed")


def test_bf16_learns_what_float32_does_and_on_a_cpu_without_the_fused_attention(run, tmp_path, monkeypatch):
    found, caches, encode = [], set(), train.RCLDM.encode_condition

    def encode_and_note(*inputs):
        caches.add((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return encode(*inputs)

    monkeypatch.setattr(train.RCLDM, "encode_condition", encode_and_note)
    quick = ("--no-liu", "--steps", "1")
    for precision, fused in (("bf16", False), ("no", True)):
        AcceleratorState._reset_state()  # of one precision for the whole process
        run(*quick, "--precision", precision, output=tmp_path / precision)
        assert torch.backends.cuda.flash_sdp_enabled() == fused
        state = load_file(tmp_path / precision / "checkpoint-0000001" / "state.safetensors")
        means = [state[key].flatten() for key in sorted(state) if key.endswith(("/mean", "/momentum"))]
        found.append(torch.cat(means))
    assert (True, False) in caches and (True, True) not in caches  # a CUDA graph would record a cache
    short, exact = found
    assert 0 < (short - exact).norm() < 0.1 * exact.norm()


def assert_same_gradients(one, two):
    """Of two runs after three steps, by their means; the optimisers' steps hide their sizes."""
    states = (folder / "checkpoint-0000003" / "state.safetensors" for folder in (one, two))
    one, two = map(load_file, states)
    gradients = [key for key in one if key.endswith(("/mean", "/momentum"))]
    assert sum(one[key].norm() > 0 for key in gradients) > 100
    apart = [(two[key] - one[key]).norm() <= 1e-3 * one[key].norm() + 1e-9 for key in gradients]
    assert one.keys() == two.keys() and all(apart)


def test_a_step_learns_the_mean_of_its_batches(run, tmp_path, monkeypatch):
    """Of two that are the same, as of one."""
    same = torch.Generator().manual_seed(0).get_state()
    call = train.Losses.__call__
    monkeypatch.setattr(
        train,
        "draw_order",
        lambda count, batch, seed, steps, *shares: ([(0, i) for i in range(batch)] for _ in steps),
    )
    monkeypatch.setattr(
        train.Losses, "__call__", lambda self, model, batch, g: call(self, model, batch, g.set_state(same))
    )
    monkeypatch.setattr(train, "DROP", (0, 0, 0))
    more = ("--no-liu", "--steps", "3")
    for name, batches in (("one", "1"), ("two", "2")):
        run(*more, "--accumulate", batches, output=tmp_path / name)
    assert_same_gradients(tmp_path / "one", tmp_path / "two")


def test_an_editor_finds_its_parts_from_anywhere_and_no_others(run, parts, tmp_path, monkeypatch):
    work, quick = tmp_path / "work", ("--no-esm", "--no-sam", "--steps", "1")
    for name in ("sd", "llm"):
        shutil.copytree(parts / name, work / name)
    other = tmp_path / "other"
    shutil.copytree(work / "sd", other / "sd")
    vae = AutoencoderKL.from_pretrained(other / "sd" / "vae")
    vae.decoder.conv_out.bias.data.add_(1)
    vae.save_pretrained(other / "sd" / "vae")
    monkeypatch.chdir(work)
    run(*quick, stable_diffusion="sd", llm="llm", output=Path("runs/train"))

    def bias(folder):
        return InstructGIEPipeline.from_pretrained(folder).vae.decoder.conv_out.bias

    right = bias("runs/train/editor")
    monkeypatch.chdir(other)  # where another lies under the same name
    assert torch.equal(bias(work / "runs/train/editor"), right)
    shutil.rmtree(work / "sd")
    with pytest.raises(backbone.BackboneError, match="no such folder"):
        bias(work / "runs/train/editor")
    shutil.move(other / "sd", work / "sd")
    with pytest.raises(
        backbone.BackboneError, match="not the weights that the editor was trained with"
    ) as told:
        bias(work / "runs/train/editor")
    assert "\n" not in str(told.value)


def test_the_shipped_editor_knows_its_parts(parts, tmp_path, monkeypatch):
    shutil.copytree(parts / "sd", tmp_path / "toy/weights/stable-diffusion")
    monkeypatch.chdir(tmp_path)
    settings = json.loads((backbone.HERE / "toy/weights/editor/instructgie.json").read_text())
    for part, name in (("stable_diffusion", "stable-diffusion"), ("llm", "llm")):
        assert backbone.find_part(settings, part) == backbone.HERE / "toy/weights" / name


def test_the_fingerprint_of_a_large_file_has_its_size_and_blocks_from_all_over(tmp_path):
    weights, size = tmp_path / "model.safetensors", 2**28
    weights.touch()
    os.truncate(weights, size)
    found = {backbone.fingerprint(tmp_path, "llm")}
    (tmp_path / "model.fp16.safetensors").write_bytes(b"which nothing here loads")
    assert {backbone.fingerprint(tmp_path, "llm")} == found
    for place in (0, size // 4, size - 2**20):
        with weights.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        found.add(backbone.fingerprint(tmp_path, "llm"))
    os.truncate(weights, size + 1)
    assert len({*found, backbone.fingerprint(tmp_path, "llm")}) == 5


def test_a_gpu_of_a_number_is_the_current_one(monkeypatch):
    """accelerate knows no other way to be told which."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert backbone.pick_device("auto") == torch.device("cuda") and chosen == []
    assert backbone.pick_device("cuda:1") == torch.device("cuda:1") == chosen[0]


TOGETHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_processes_share_a_step_as_if_they_were_one(run, parts, tmp_path):
    """Two processes learn what one does from two batches, however long the first takes to begin."""
    more = ("--no-liu", "--steps", "3")
    run(*more, "--accumulate", "2", output=tmp_path / "one")
    program = [str(backbone.HERE / "tests" / "slow_start.py"), *tiny_options(parts, tmp_path / "two")]
    done = subprocess.run([*TOGETHER, *program, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert_same_gradients(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("drop", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_a_steps_losses_are_those_of_the_paper(parts, monkeypatch, drop):
    numbers = {"answer_weight": 4.0, "change_weight": 1.0, "es_weight": 0.5, "sam_weight": 3.0}
    args = argparse.Namespace(panel=P, no_esm=False, no_sam=False, **numbers)
    monkeypatch.setattr(train, "DROP", drop)
    sd, clip = backbone.load_stable_diffusion(str(parts / "sd")), backbone.load_clip(str(parts / "clip"))
    latents, guess, noise = torch.randn(4, 2, 4, 4, 4), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    pictures = torch.randint(256, (4, 2, 3, P, P), dtype=torch.uint8)
    embeddings, areas = F.normalize(torch.randn(4, 2, 16), dim=2), torch.rand(4, 1, 4, 4)
    precomputed = Precomputed(latents, embeddings, areas, pictures)
    texts, rows, t = torch.randn(4, 16, 32), torch.tensor([1, 0, 2, 0]), torch.tensor([900, 10])
    losses_of, seen = train.Losses(args, sd, clip, precomputed, texts, rows), []
    losses_of.predict = lambda model, *inputs: seen.append(inputs) or guess
    monkeypatch.setattr(train, "draw_timesteps", lambda *_: t)
    monkeypatch.setattr(train, "draw_noise", lambda *_: noise)
    query, example = [0, 2], [1, 3]
    batch = {"index": torch.tensor(query), "example_index": torch.tensor(example)}
    found = losses_of(None, batch, torch.Generator().manual_seed(0))

    grids = compose_grid(*from_bytes(torch.cat([pictures[example], pictures[query]], 1)).unbind(1))
    x_0 = compose_grid(*latents[example].unbind(1), *latents[query].unbind(1))
    no_text, no_example = drop[0] + drop[2], drop[1] + drop[2]
    if no_example:
        grey = backbone.encode_images(sd.vae, torch.zeros(1, 3, P, P))[0]
        grids, x_0[:, :, :4] = drop_example(grids), torch.cat([grey, grey], -1)
    x_t = sd.scheduler.add_noise(x_0, noise, t)
    wanted = x_t, t, texts[[3, 3] if no_text else [1, 2]], mask_query(grids)
    assert all(map(torch.equal, seen[0], wanted))

    weight, trust = train.panel_weights(latents[query], 4.0, 1.0), esm.reliability(t, sd.scheduler)
    bound = sam_loss.noise_weight(t, sd.scheduler)
    clean, (before, after) = esm.predict_x0(x_t, guess, t, sd.scheduler), embeddings[2:3].unbind(1)
    answer = esm.decode_answer(sd.vae, clean[1:])
    dm = (weight * (guess - noise).square()).mean() / weight.mean()
    es = esm.editing_shift_loss(clip, before, answer, after, trust[1:]) / 2  # one of two is reliable
    sam = sam_loss.selective_area_loss(answer_panel(clean), answer_panel(x_0), areas[query], bound)
    told = torch.stack([found[name] for name in ("dm", "es", "sam", "loss")])
    torch.testing.assert_close(told, torch.stack([dm, es, sam, dm + 0.5 * es + 3.0 * sam]))


def test_the_editor_is_the_average_and_the_error_that_of_the_answers(run, tmp_path):
    run("--steps", "2", "--no-liu", "--no-esm", "--no-sam", "--save-every", "2")
    out = tmp_path / "run"
    state = load_file(out / "checkpoint-0000002" / "state.safetensors")
    saved = load_file(out / "editor" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(w, state[f"ema/module.{name}"]) for name, w in saved.items())
    assert not all(torch.equal(w, state[f"model/{name}"]) for name, w in saved.items())
    shown = np.asarray(Image.open(out / "validation-0000002.png")).astype(float)
    error = np.abs(shown[:, 3 * P : 4 * P] - shown[:, 4 * P :]).mean()
    told = re.search(r"\| validation error \| ([\d.]+) ", (out / "editor" / "README.md").read_text())
    assert float(told[1]) == pytest.approx(error, abs=0.5)


def test_an_epoch_has_every_pair_once_and_processes_share_it():
    whole = list(draw_order(6, 2, 0, range(6), 0, 1))
    first, second = (list(itertools.chain(*whole[k : k + 3])) for k in (0, 3))
    assert sorted(first) == [(0, i) for i in range(6)] and sorted(second) == [(1, i) for i in range(6)]
    drawn = [[i for _, i in epoch] for epoch in (first, second)]
    assert drawn[0] != sorted(drawn[0]) and drawn[0] != drawn[1]
    assert whole[4:] == list(draw_order(6, 2, 0, range(4, 6), 0, 1))
    shares = [list(draw_order(6, 1, 0, range(6), rank, 2)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*shares)] == whole


def test_the_rate_warms_up_and_falls():
    args = argparse.Namespace(lr=2.0, steps=1000)
    found = [train.learning_rate(step, args) for step in (0, 49, 500, 1000)]
    assert found == pytest.approx([0.04, 2.0, 1.0, 0.02], rel=0.01)


# --- What reaches a step ------------------------------------------------------------------------------------


def test_each_pair_is_told_its_own_unified_form(parts):
    sd = backbone.load_stable_diffusion(str(parts / "sd"))
    forms = {"a": "add a hat", "b": "remove the dog", "c": "add a hat"}
    unifier = SimpleNamespace(unify=lambda texts: [forms[text] for text in texts])
    data = SimpleNamespace(pairs=[SimpleNamespace(instruction=text) for text in "cabb"])
    texts, rows = read_instructions(data, sd, unifier)
    wanted = backbone.encode_text(sd, [*map(forms.get, "cabb"), ""])
    torch.testing.assert_close(torch.cat([texts[rows], texts[-1:]]), wanted)


def test_what_is_precomputed_is_of_its_own_picture(parts):
    vae = backbone.load_stable_diffusion(str(parts / "sd")).vae
    clip, panels = backbone.load_clip(str(parts / "clip")), torch.rand(3, 2, 3, P, P) * 2 - 1
    found = Frozen(vae, clip, lambda images: images[:, :1]).encode(panels)
    for k in (0, 1):
        torch.testing.assert_close(found.latents[:, k], backbone.encode_images(vae, panels[:, k]))
        torch.testing.assert_close(found.embeddings[:, k], esm.embed(clip, panels[:, k]))
    torch.testing.assert_close(found.areas, F.avg_pool2d(panels[:, 1, :1], 8))


@pytest.mark.parametrize("pictures", [None, torch.zeros(6)])
def test_a_batch_has_the_examples_of_its_epoch(parts, pictures):
    data = VisualPromptDataset(read_pairs(parts / "data"), P)
    order = [[(epoch, i) for i in range(6)] for epoch in range(4)]
    loader = load_batches(data, Precomputed(torch.zeros(6), pictures=pictures), order, 0)
    for epoch, batch in enumerate(loader):
        assert batch["example_index"].tolist() == [data.draw(i, epoch) for i in range(6)]


def test_with_liu_every_text_is_unified(run, tmp_path, monkeypatch):
    told, encode = set(), backbone.encode_text
    monkeypatch.setattr(liu.InstructionUnifier, "unify", lambda self, texts: ["add a hat" for _ in texts])
    monkeypatch.setattr(
        backbone, "encode_text", lambda sd, texts, *more: told.update(texts) or encode(sd, texts, *more)
    )
    run("--no-esm", "--no-sam", "--steps", "1")
    assert told == {"", "add a hat"}
    assert InstructGIEPipeline.from_pretrained(tmp_path / "run" / "editor").llm is not None


def test_each_step_has_its_own_rate(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "learning_rate", lambda step, args: asked.append(step) or 0.0)
    run("--no-esm", "--no-liu", "--no-sam", "--steps", "2", "--accumulate", "2")
    assert asked == sorted(asked) and asked.count(0) == asked.count(1) == len(asked) / 2  # for every group
    assert not weights(tmp_path / "run")["trainable_copy.controlnet_mid_block.zero_proj.weight"].any()


def test_the_seed_decides_weights_pairs_and_noise(run, tmp_path, monkeypatch):
    call, found = train.Losses.__call__, []

    def note(self, model, batch, g):
        query, example = (batch[name].tolist() for name in ("index", "example_index"))
        weight = model.prompt_encoder.place_proj.weight.sum().item()
        found.append((query, dict(zip(query, example)), g.initial_seed(), weight))
        return call(self, model, batch, g)

    monkeypatch.setattr(train.Losses, "__call__", note)
    for seed in "01":
        options = "--steps", "1", "--batch", "6", "--seed", seed
        run("--no-esm", "--no-liu", "--no-sam", *options, output=tmp_path / seed)
    assert all(one != other for one, other in zip(*found))


def test_validation_draws_what_the_pipeline_draws(folders, monkeypatch):
    monkeypatch.setitem(backbone.SAMPLING, "steps", 2)
    pipe = InstructGIEPipeline.from_pretrained(folders / "editor")
    sd = backbone.StableDiffusion(*(pipe.components[name] for name in backbone.StableDiffusion._fields))
    panels, texts = torch.rand(2, 4, 3, P, P) * 2 - 1, ["add a hat", "make it night"]
    plain = {"steps": 2, "guidance_text": 1.0, "guidance_visual": 1.0}
    wanted = pipe.answer(panels[:, :2], None, panels[:, 2], texts, seeds=[0, 1], **plain)
    torch.testing.assert_close(train.answer(sd, pipe.rcldm, panels, texts), wanted)
