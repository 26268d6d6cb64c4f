"""train.py from the command line to the editor: the switches, exact resume, and errors in one line."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from PIL import Image
from safetensors.torch import load_file
from tiny import P, save_data
from tiny import options as tiny_options

import backbone
import esm
import train
from dataset import VisualPromptDataset, read_pairs
from pipeline import InstructGIEPipeline
from rcldm import VisualPromptEncoder
from training.checkpoint import load_checkpoint, save_checkpoint
from training.precompute import Facts, Frozen, Pairs, commonest_classes, look_up, observe_all


def weights(folder):
    return load_file(folder / "editor" / "diffusion_pytorch_model.safetensors")


@pytest.mark.filterwarnings("ignore:instruction")
def test_a_run_makes_an_editor_with_pictures_and_checkpoints(run, tmp_path, capsys):
    run("--steps", "3", "--checkpoint-every", "1", "--keep", "2", "--validate-every", "3")
    output = tmp_path / "run"
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-0000002", "checkpoint-0000003"]
    picture = Image.open(output / "validation-0000003.png")
    assert picture.size == (5 * P, 2 * P)  # example before and after, input, answer, truth
    assert list((output / "tensorboard").iterdir())
    editor = InstructGIEPipeline.from_pretrained(output / "editor")
    assert editor.panel == P and editor.settings["trained_steps"] == 3
    card = (output / "editor" / "README.md").read_text()
    assert "\nlicense: other\n" in card and "3 steps of" in card
    assert re.search(r"^\| validation error \| [\d.]+ \|$", card, re.M)
    progress = capsys.readouterr().err
    assert all(term in progress for term in ("loss=", "dm=", "es=", "sam="))


@pytest.mark.filterwarnings("ignore:instruction")
def test_resumed_is_bit_equal_to_uninterrupted(run, tmp_path):
    options = ("--steps", "4", "--checkpoint-every", "2", "--keep", "9", "--validate-every", "9")
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


@pytest.mark.parametrize("design", [(), ("--no-rcldm",), ("--encoder", "vit")])
def test_what_the_prompt_encoder_learns_alone_stays_behind_the_links(run, tmp_path, design):
    quick = ("--no-esm", "--no-liu", "--no-sam", "--steps", "1", "--lr", "0", *design)
    run(*quick, "--encoder-steps", "0", output=tmp_path / "without")
    run(*quick, "--encoder-steps", "3", output=tmp_path / "with")
    before, after = weights(tmp_path / "without"), weights(tmp_path / "with")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("prompt_encoder.") for name in moved)
    links = [name for name in after if "controlnet_" in name and ("zero_proj" in name or design)]
    assert links and not any(after[name].any() for name in links)


def test_an_encoder_without_latents_has_no_gate(run, tmp_path):
    quick = ("--no-esm", "--no-liu", "--no-sam", "--steps", "1", "--encoder-steps", "2")
    run(*quick, output=tmp_path / "with")
    run(*quick, "--no-encoder-latents", output=tmp_path / "without")
    gates = [{name for name in weights(tmp_path / k) if ".gate." in name} for k in ("with", "without")]
    assert len(gates[0]) == 2 and not gates[1]


@pytest.mark.parametrize("power", [0.05, 1.0, 1.7, 40.0])
def test_no_noise_level_is_out_of_range(power):
    random = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    u = torch.cat([torch.tensor([0, 1 - 2**-24]), random])
    t = train.draw_timesteps(u, power, 1000)
    assert t[0] == 0 and (t[1] == 999 or power < 1)
    assert ((t >= 0) & (t < 1000)).all()
    above = (t[2:] >= 500).float().mean().item()
    assert above == pytest.approx(0.5 ** (1 / power), abs=0.02)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_of_every_kind_of_prediction_tells_the_clean_latents(kind):
    scheduler = DDIMScheduler(prediction_type=kind)
    x_0, noise = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([1, 200, 600])
    target = train.prediction_target(x_0, noise, t, scheduler)
    told = esm.predict_x0(scheduler.add_noise(x_0, noise, t), target, t, scheduler)
    assert torch.allclose(told, x_0, atol=1e-4)


def test_an_edit_weighs_the_same_however_small_it_is():
    query = torch.zeros(3, 2, 4, 8, 8)
    query[0, 1, :, 2, 5] = 0.5  # one place
    query[1, 1, :, :2] = 3.0  # a quarter of the panel; the third is an edit that changes nothing
    weight = train.place_weights(query, query[:, 1], answer_weight=4.0, edit_weight=0.5)
    assert weight.shape == (3, 1, 16, 16)
    answer = weight[..., 8:, 8:].clone()
    weight[..., 8:, 8:] = 1
    assert (weight == 1).all()  # the given panels
    assert answer[1, 0, 0, 0] == 4 * (1 + 0.5 * 4) and answer[1, 0, 7, 7] == 4
    assert answer[0, 0, 2, 5] == 4 * (1 + 0.5 * 32)  # bounded: 64 times the mean otherwise
    assert (answer[2] == 4).all()
    assert answer[1].mean() == pytest.approx(4 * 1.5)
    flat = train.place_weights(query, query[:, 1], 4.0, 0.0)
    assert torch.equal(flat[..., 8:, 8:], torch.full((3, 1, 8, 8), 4.0))


def test_a_wrong_edit_weighs_as_much_as_a_missed_one():
    query = torch.zeros(1, 2, 4, 8, 8)
    query[0, 1, :, :2, :2] = 1.0  # the edit asked for
    drawn = torch.zeros(1, 4, 8, 8, requires_grad=True)
    with torch.no_grad():
        drawn[0, :, 6:, 6:] = 1.0  # one that was not
    answer = train.place_weights(query, drawn, 4.0, 1.0)[0, 0, 8:, 8:]
    assert answer[0, 0] == answer[7, 7] > answer[4, 4] == 4
    assert not answer.requires_grad  # else a large error could be had for a smaller weight


def save_classes(data, folder):
    """The same dataset, with class maps: the upper left eighth of each picture shows 2, the rest nothing."""
    shutil.copytree(data, folder)
    lines = (folder / "train" / "metadata.jsonl").read_text().splitlines()
    shown = np.zeros((P, P), np.uint8)
    shown[:4, :4] = 2
    Image.fromarray(shown).save(folder / "train" / "classes.png")
    names = dict.fromkeys(("input_classes_file_name", "output_classes_file_name"), "classes.png")
    lines = [json.dumps(json.loads(line) | names) for line in lines]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_the_classes_of_the_places(parts, tmp_path):
    untold = Pairs(VisualPromptDataset(read_pairs(parts / "data"), P))
    assert set(untold[0]) == {"panels", "broken"}
    told = Pairs(VisualPromptDataset(read_pairs(save_classes(parts / "data", tmp_path / "told")), P))
    levels = torch.stack([told[i]["classes"] for i in range(6)])
    places = commonest_classes(levels, 4)  # of 8 × 8 pixels, a quarter of the first is 2
    assert places.shape == (6, 2, 4, 4) and places[0, 1, 0, 0] == 2 and places.sum() == 2 * 12
    places[3] = 5
    facts = Facts(torch.zeros(6), classes=places).of(torch.tensor([1, 3, 2, 0]), torch.device("cpu"))
    grids = train.place_classes(facts)
    assert grids.shape == (2, 8, 8) and (grids[1, :4] == 5).all()
    assert grids[0, 0].tolist() == [2, 0, 0, 0] * 2 and grids[1, 4].tolist() == [2, 0, 0, 0] * 2


def test_pictures_in_memory_are_those_on_disk(parts, tmp_path):
    data = VisualPromptDataset(read_pairs(parts / "data"), P)
    args = argparse.Namespace(data="data", split="train", cache=tmp_path, workers=0)
    vae = backbone.load_stable_diffusion(str(parts / "sd")).vae
    frozen, device = Frozen(vae, None, None), torch.device("cpu")
    (_, fresh), (_, cached) = (observe_all(data, frozen, args, device) for _ in range(2))
    for facts in (fresh, cached):
        assert (
            facts.embeddings is facts.areas is facts.classes is None and facts.pictures.dtype == torch.uint8
        )
        items = [data[3, i] for i in range(len(data))]
        batch = {key: torch.tensor([item[key] for item in items]) for key in ("index", "example_index")}
        panels, of_batch = look_up(batch, facts, device)
        assert torch.equal(panels, torch.stack([item["panels"] for item in items]))
        assert of_batch.latents.shape == (12, 2, *facts.latents.shape[2:])


def test_the_changes_of_the_places():
    latents = torch.zeros(4, 2, 3, 4, 4)  # two examples, then their two queries
    latents[0, 1, :, 1, 2] = 0.3
    latents[2, 0, :, 3, 0] = 0.3
    latents[3, 1, :, 0, 0] = 0.2  # of square 0.04: as good as nothing
    changes = train.place_changes(Facts(latents, None, None))
    assert changes.shape == (2, 8, 8)
    assert changes[0].nonzero().tolist() == [[1, 2], [1, 6], [7, 0], [7, 4]] and not changes[1].any()


def test_the_auxiliary_heads_are_asked_only_what_can_be_known():
    encoder = VisualPromptEncoder(4, depth=6, width=8, factor=2)
    heads = train.AuxiliaryHeads(encoder, 3)
    encoder(torch.zeros(3, 3, 16, 16))
    assert set(heads.features) == {3, 5}  # half way, and every second block thereafter
    g = torch.Generator().manual_seed(0)
    features = {i: torch.randn(3, 8, 8, 8, generator=g, requires_grad=True) for i in heads.features}
    heads.features = features
    classes, changes = torch.ones(3, 8, 8, dtype=torch.long), torch.ones(3, 8, 8)
    told = torch.tensor([True, False, False]), torch.tensor([True, True, False])  # both, the pair, neither
    losses = heads(classes, changes, told)
    asked = {}
    for name, i in (("names", 3), ("compares", 3), ("points", 5)):
        mean, count = losses[name]
        gradient = torch.autograd.grad(mean, features[i], retain_graph=True)[0]
        asked[name] = gradient.abs().sum(-1) > 0
        assert count == asked[name].sum()
    nothing, example, query, answer = torch.zeros(4, 8, 8, dtype=torch.bool).unbind()
    example[:4], query[4:, :4], answer[4:, 4:] = True, True, True
    assert torch.equal(asked["names"], torch.stack([example | query, example | query, query]))
    assert torch.equal(asked["compares"], torch.stack([example, example, nothing]))
    assert torch.equal(asked["points"], torch.stack([query | answer, query | answer, nothing]))
    assert list(heads(None, changes, told)) == ["compares", "points"]
    unknowing = torch.zeros(3).bool(), torch.zeros(3).bool()
    assert all(mean == count == 0 for mean, count in heads(None, changes, unknowing).values())


def test_the_auxiliary_heads_teach_the_encoder_and_resume(run, parts, tmp_path):
    quick = ("--no-esm", "--no-liu", "--no-sam", "--steps", "1", "--lr", "0", "--checkpoint-every", "2")
    quick += ("--accumulate", "2")
    told = save_classes(parts / "data", tmp_path / "told")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*quick, "--encoder-steps", "4", data=told, output=whole)
    run(*quick, "--encoder-steps", "4", "--auxiliary-weight", "0", data=told, output=tmp_path / "unweighted")
    with pytest.MonkeyPatch.context() as patch:  # stops after the first checkpoint
        patch.setattr(train, "save_checkpoint", stopping(train.save_checkpoint))
        with pytest.raises(SystemExit):
            run(*quick, "--encoder-steps", "4", data=told, output=cut)
    run(*quick, "--encoder-steps", "4", "--resume", data=told, output=cut)
    one, other, resumed = (weights(tmp_path / k) for k in ("whole", "unweighted", "cut"))
    assert all(torch.equal(one[k], resumed[k]) for k in one)
    assert not torch.equal(one["prompt_encoder.stem.0.weight"], other["prompt_encoder.stem.0.weight"])


def stopping(save):
    def stop(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    return stop


def test_training_goes_on_from_an_editor_whose_width_need_not_be_told(run, tmp_path):
    quick = ("--no-esm", "--no-liu", "--no-sam", "--steps", "1")
    run(*quick, "--lr", "1e-2", "--encoder-width", "24", output=tmp_path / "first")
    run(*quick, "--lr", "1e-9", "--init", str(tmp_path / "first" / "editor"), output=tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.allclose(first[k], second[k], atol=1e-6) for k in first)


def test_teaching_goes_on_from_an_editors_prompt_encoder(run, tmp_path):
    quick = ("--no-esm", "--no-liu", "--no-sam", "--steps", "1", "--lr", "0")
    run(*quick, "--encoder-steps", "3", "--seed", "7", output=tmp_path / "first")
    start = ("--init-encoder", str(tmp_path / "first" / "editor"))
    run(*quick, "--encoder-steps", "0", output=tmp_path / "fresh")
    run(*quick, "--encoder-steps", "0", *start, output=tmp_path / "copied")
    run(*quick, "--encoder-steps", "3", *start, output=tmp_path / "taught")
    first, fresh, copied, taught = (weights(tmp_path / k) for k in ("first", "fresh", "copied", "taught"))
    for name in first:
        source = first if name.startswith("prompt_encoder.") else fresh
        assert torch.equal(copied[name], source[name])
    assert any(not torch.equal(taught[k], first[k]) for k in first if k.startswith("prompt_encoder.blocks"))


def test_a_taught_encoder_learns_at_its_own_rate(run, tmp_path):
    quick = ("--no-esm", "--no-liu", "--no-sam", "--steps", "4", "--encoder-steps", "2", "--lr", "1e-2")
    for share in "0", "1":
        run(*quick, "--encoder-lr", share, output=tmp_path / share)
    run(*quick, "--steps", "1", "--lr", "0", output=tmp_path / "before")
    before, still, moving = (weights(tmp_path / k) for k in ("before", "0", "1"))
    encoder = [name for name in before if name.startswith("prompt_encoder.")]
    assert encoder and all(torch.equal(before[k], still[k]) for k in encoder)
    assert not all(torch.equal(before[k], moving[k]) for k in encoder)
    assert any(not torch.equal(before[k], still[k]) for k in before if k not in encoder)


def test_dropout_has_the_shares_asked_for():
    text, example = train.dropout(20_000, (0.05, 0.2, 0.3), torch.Generator().manual_seed(0))
    shares = {"neither": ~text & ~example, "pair": ~text & example, "words": text & ~example}
    shares = {name: found.float().mean().item() for name, found in shares.items()}
    assert shares == pytest.approx({"neither": 0.05, "pair": 0.2, "words": 0.3}, abs=0.015)
    text, example = train.dropout(2000, (0.0, 0.0, 0.1), torch.Generator().manual_seed(0))
    assert text.all() and 0.05 < (~example).float().mean() < 0.15


@pytest.mark.parametrize(
    ("options", "paths", "words"),
    [
        ((), {"data": "single"}, "second edit pair"),
        ((), {"data": "nowhere"}, "no such folder"),
        ((), {"stable_diffusion": "clip"}, "not a Stable Diffusion folder"),
        ((), {"stable_diffusion": "owner/no-such-model"}, "hub"),
        ((), {"segmenter": "llm"}, "not a Mask2Former folder"),
        (("--sam-classes", "persn"), {}, "person"),
        (("--device", "cuda"), {}, "--device cuda"),
        (("--backbone", "sd16"), {}, "sd15"),
        (("--steps", "0"), {}, "--steps"),
        (("--encoder-steps", "-1"), {}, "--encoder-steps"),
        (("--encoder-width", "-5"), {}, "--encoder-width"),
        (("--encoder-batch", "0"), {}, "--encoder-batch"),
        (("--noise-power", "nan"), {}, "--noise-power"),
        (("--drop-text", "1.5"), {}, "--drop-text"),
        (("--lr", "-1"), {}, "--lr"),
        (("--encoder-lr", "nan"), {}, "--encoder-lr"),
        (("--tiny-decoder", "nowhere/at/all"), {}, "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    run, parts, tmp_path, capsys, monkeypatch, options, paths, words
):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if not (parts / "single").exists():
        save_data(parts / "single", pairs=1)
    paths = {k: v if "/" in v else parts / v for k, v in paths.items()}
    with pytest.raises(SystemExit) as stopped:
        run(*options, **paths)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error:")]
    assert stopped.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--init", "--init-encoder"])
def test_an_editor_folder_of_another_architecture_is_refused(run, tmp_path, capsys, option):
    quick = ("--no-esm", "--no-liu", "--no-sam", "--steps", "1")
    run(*quick, "--no-rcldm", output=tmp_path / "conv")
    with pytest.raises(SystemExit) as stopped:
        run(*quick, option, str(tmp_path / "conv" / "editor"))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"train.py: error: {option} " in error and "architecture" in error


@pytest.mark.parametrize("tiny", [False, True])
def test_gradient_checkpointing_changes_nothing_that_is_learnt(run, tmp_path, tiny, monkeypatch):
    options = ["--steps", "2", "--noise-power", "0.05", "--encoder-steps", "2", "--no-liu"]
    teach, checkpointed = train.teach_prompt_encoder, []

    def watched(model, *more):
        checkpointed.append(model.prompt_encoder.gradient_checkpointing)
        teach(model, *more)

    monkeypatch.setattr(train, "teach_prompt_encoder", watched)
    if tiny:
        sizes = dict(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
        AutoencoderTiny(**sizes, latent_channels=4).save_pretrained(tmp_path / "tiny")
        options += ["--tiny-decoder", str(tmp_path / "tiny")]
    for name, more in (("plain", ()), ("checkpointed", ("--gradient-checkpointing",))):
        run(*options, *more, output=tmp_path / name)
    assert checkpointed == [False, True]
    plain, same = weights(tmp_path / "plain"), weights(tmp_path / "checkpointed")
    for key in plain:
        torch.testing.assert_close(same[key], plain[key], rtol=1e-4, atol=1e-6)


def test_a_tiny_decoder_takes_the_place_of_the_vaes(run, tmp_path, monkeypatch, capsys):
    sizes = dict(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    AutoencoderTiny(**sizes, latent_channels=4).save_pretrained(tmp_path / "tiny")
    decoded = []
    decode = esm.decode_answer
    monkeypatch.setattr(esm, "decode_answer", lambda vae, x: decoded.append(type(vae)) or decode(vae, x))
    options = ("--steps", "1", "--noise-power", "0.05", "--encoder-steps", "0")
    run(*options, "--tiny-decoder", str(tmp_path / "tiny"))
    assert decoded == [AutoencoderTiny] and weights(tmp_path / "run")
    AutoencoderTiny(**sizes, latent_channels=16).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        run(*options, "--tiny-decoder", str(tmp_path / "other"), output=tmp_path / "again")
    assert "latents of 16 channels; this VAE's have 4" in capsys.readouterr().err


def test_eight_bits_need_their_library(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(SystemExit) as stopped:
        run("--steps", "1", "--optimizer", "adamw-8bit")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "pip install bitsandbytes" in error and error.count("\n") == 1


def test_eight_bits_resume_to_the_same_bits(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = ("--optimizer", "adamw-8bit", "--no-esm", "--no-liu", "--no-sam", "--checkpoint-every", "2")
    for name in ("whole", "cut"):
        run(*options, "--steps", "4", "--keep", "9", output=tmp_path / name)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-0000004")
    shutil.rmtree(tmp_path / "cut" / "editor")
    run(*options, "--steps", "4", "--resume", output=tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_bf16_learns_what_float32_does_and_on_a_cpu_without_the_fused_attention(run, tmp_path):
    found = []
    quick = ("--no-liu", "--steps", "1", "--encoder-steps", "0", "--validation-pictures", "0")
    for precision, fused in (("bf16", False), ("no", True)):
        AcceleratorState._reset_state()  # of one precision for the whole process
        run(*quick, "--precision", precision, output=tmp_path / precision)
        assert torch.backends.cuda.flash_sdp_enabled() == fused
        state = load_file(tmp_path / precision / "checkpoint-0000001" / "state.safetensors")
        found.append(torch.cat([state[key].flatten() for key in sorted(state) if key.endswith("/exp_avg")]))
    short, exact = found
    assert 0 < (short - exact).norm() < 0.1 * exact.norm()


def test_an_optimizer_of_nested_state_comes_back(tmp_path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    state = {"step": 3, "momentum": torch.ones(2), "quantized": {"codes": torch.zeros(2, dtype=torch.uint8)}}
    optimizer.state[layer.weight] = state
    save_checkpoint(tmp_path, 7, {"layer": layer}, optimizer, keep=1)
    again = torch.optim.SGD(layer.parameters())
    assert load_checkpoint(tmp_path, {"layer": layer}, again) == 7
    back = again.state[layer.weight]
    assert back["step"] == 3 and isinstance(back["step"], int)
    assert torch.equal(back["momentum"], torch.ones(2)) and not back["quantized"]["codes"].any()


def assert_same_gradients(one, two):
    """Of two runs after three steps, by their means; the optimisers' steps hide their sizes."""
    states = (folder / "checkpoint-0000003" / "state.safetensors" for folder in (one, two))
    one, two = map(load_file, states)
    gradients = [key for key in one if key.endswith(("/exp_avg", "/momentum_buffer"))]
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
    more = ("--no-liu", "--validation-pictures", "0", "--steps", "3", "--encoder-steps", "3")
    more += ("--drop-text", "0", "--drop-example", "0", "--drop-both", "0", "--noise-power", "0.3")
    for name, batches in (("one", "1"), ("two", "2")):
        run(*more, "--accumulate", batches, output=tmp_path / name)
    for stage in (".", "prompt-encoder"):
        assert_same_gradients(tmp_path / "one" / stage, tmp_path / "two" / stage)


def test_an_editor_finds_its_parts_from_anywhere_and_no_others(run, parts, tmp_path, monkeypatch):
    work, quick = tmp_path / "work", ("--no-esm", "--no-sam", "--steps", "1", "--encoder-steps", "0")
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
    work = work.rename(tmp_path / "moved")
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
    editor, settings = (
        backbone.HERE / "toy/weights/editor",
        json.loads((backbone.HERE / "toy/weights/editor/instructgie.json").read_text()),
    )
    for part, name in (("stable_diffusion", "stable-diffusion"), ("llm", "llm")):
        assert backbone.find_part(editor, settings, part) == backbone.HERE / "toy/weights" / name


def test_the_fingerprint_of_a_large_file_has_its_size_and_blocks_from_all_over(tmp_path):
    weights, size = tmp_path / "model.safetensors", 2**28
    weights.touch()
    os.truncate(weights, size)
    found = {backbone.fingerprint(tmp_path, "llm")}
    for place in (0, size // 4, size - 2**20):
        with weights.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        found.add(backbone.fingerprint(tmp_path, "llm"))
    os.truncate(weights, size + 1)
    assert len({*found, backbone.fingerprint(tmp_path, "llm")}) == 5


def test_a_launch_that_starts_one_process_where_two_were_asked_for_says_so(parts, tmp_path):
    quick = ("--no-esm", "--no-liu", "--no-sam", "--steps", "1", "--encoder-steps", "0")
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "no")
    for count in ("1", "2"):
        program = [str(backbone.HERE / "train.py"), *tiny_options(parts, tmp_path / count), *quick]
        command = [*launch, "--num_processes", count, *program, "--validation-pictures", "0"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("one process trains" in done.stdout) == (count == "2")


TOGETHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_processes_share_a_step_as_if_they_were_one(run, parts, tmp_path):
    """Two processes of two samples learn what one of four does, however long the first takes to begin."""
    more = ("--no-liu", "--validation-pictures", "0", "--steps", "3", "--encoder-steps", "3")
    more += ("--noise-power", "0.3", "--batch")
    told = save_classes(parts / "data", tmp_path / "told")
    run(*more, "4", data=told, output=tmp_path / "one")
    program = [
        str(backbone.HERE / "tests" / "slow_start.py"),
        *tiny_options(parts, tmp_path / "two", data=told),
    ]
    done = subprocess.run([*TOGETHER, *program, *more, "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    for stage in (".", "prompt-encoder"):
        assert_same_gradients(tmp_path / "one" / stage, tmp_path / "two" / stage)
