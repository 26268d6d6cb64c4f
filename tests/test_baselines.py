"""The baselines: each is trained for a few steps, saved, loaded by evaluate.py, and reads what it should."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train import save_data
from tiny import P, Stopped, save_stable_diffusion, stop_after

import backbone
import train
from evaluation import baselines, evaluate
from evaluation.baselines import InstructPix2Pix, Learner, PromptDiffusion, SDEdit

WEIGHTS = "diffusion_pytorch_model.safetensors"
METHODS = {"instruct-pix2pix": InstructPix2Pix, "prompt-diffusion": PromptDiffusion}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    save_stable_diffusion(root / "sd")
    save_data(root / "data")
    for split in ("train", "seen"):
        path = root / "data" / split / "metadata.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"input_caption": "a dog", "output_caption": "a dog at night"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def run(parts):
    """Trains a baseline on the tiny parts; returns the pipeline's folder."""
    tiny = backbone.Preset(
        str(parts / "sd"), "", "", "", "", "", P, P, (), 1e-3, "mit", data=str(parts / "data")
    )

    def start(method, *options, output):
        argv = [method, "--backbone", "tiny", "--output", str(output), "--cache", str(parts / "cache")]
        baselines.main([*argv, "--workers", "0", "--device", "cpu", "--batch", "2", *options])
        return output / "pipeline"

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbone.PRESETS, "tiny", tiny)
        yield start


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The folder of each method's pipeline after two steps."""
    folder = tmp_path_factory.mktemp("trained")
    return {method: run(method, "--steps", "2", output=folder / method) for method in METHODS}


def inputs(seed=0, count=2):
    g = torch.Generator().manual_seed(seed)
    examples, queries = torch.rand(count, 2, 3, P, P, generator=g), torch.rand(count, 3, P, P, generator=g)
    return examples * 2 - 1, [True] * count, queries * 2 - 1, ["make it night"] * count, list(range(count))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_is_what_evaluate_loads(trained, tmp_path, method):
    argv = [str(trained[method]), "--method", method, "--backbone", "tiny", "--count", "2", "--steps", "2"]
    evaluate.main([*argv, "--output", str(tmp_path / "out")])
    mode = evaluate.METHODS[method].modes[0]
    answers = sorted((tmp_path / "out" / "seen" / mode).glob("*.png"))
    assert [Image.open(answer).size for answer in answers] == [(P, P)] * 2
    settings = json.loads((tmp_path / "out" / "seen" / mode / "settings.json").read_text())
    assert settings["method"] == method and settings["steps"] == 2 and settings["strength"] is None


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, tmp_path, method):
    whole = run(method, "--steps", "3", output=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_after(2, patch)
        run(method, "--steps", "3", output=tmp_path / "stopped")
    stopped = run(method, "--steps", "3", output=tmp_path / "stopped")
    one, other = (load_file(folder / "unet" / WEIGHTS) for folder in (whole, stopped))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_prompt_diffusion_is_given_what_ours_is_given_in_training():
    assert baselines.DROP["prompt-diffusion"] == train.DROP


def test_a_run_of_other_settings_is_not_gone_on_with(run, tmp_path, refused):
    run("prompt-diffusion", "--steps", "2", output=tmp_path / "run")
    again = ["prompt-diffusion", "--backbone", "tiny", "--device", "cpu", "--steps", "2", "--batch", "2"]
    line = refused(baselines.main, [*again, "--seed", "1", "--output", str(tmp_path / "run")])
    assert "a run with seed 0, not 1" in line


def test_scales_that_the_pipeline_would_ignore_are_refused(trained):
    editor = baselines.InstructPix2Pix.load(str(trained["instruct-pix2pix"]), "cpu", P)
    with pytest.raises(ValueError, match="--guidance-text above 1"):
        editor.answer(*inputs(), guidance_text=1, guidance_visual=1.5, steps=2)


def test_untrained_instruct_pix2pix_draws_as_stable_diffusion(parts):
    sd = backbone.load_stable_diffusion(str(parts / "sd"))
    learner = Learner("instruct-pix2pix", sd)
    x_t, states = torch.randn(2, 4, 4, 4), torch.randn(2, 16, 32)
    query, t = torch.randn(2, 4, 4, 4), torch.tensor([3, 700])
    with torch.no_grad():
        drawn = learner(x_t, t, states, torch.zeros(2, 4, 3, P, P), query, torch.tensor([True, False]))
        assert torch.allclose(drawn, sd.unet(x_t, t, states).sample, atol=1e-5)
        learner.unet.conv_in.weight[:, 4:] = 0.1
        read = learner(x_t, t, states, torch.zeros(2, 4, 3, P, P), query, torch.tensor([True, False]))
    assert not torch.allclose(read[0], drawn[0]) and torch.allclose(read[1], drawn[1], atol=1e-5)


def test_prompt_diffusion_adds_two_embeddings_of_the_pair_and_of_the_query(trained):
    folder = trained["prompt-diffusion"]
    weights = load_file(folder / "controlnet" / WEIGHTS)
    assert weights["controlnet_cond_embedding.pair.conv_in.weight"].shape[1] == 6
    assert weights["controlnet_cond_embedding.query.conv_in.weight"].shape[1] == 3
    editor = PromptDiffusion.load(str(folder), "cpu", P)
    embedding = editor.pipeline.controlnet.controlnet_cond_embedding
    condition = torch.rand(2, 9, P, P)
    both = embedding.pair(condition[:, :6]) + embedding.query(condition[:, 6:])
    assert torch.equal(embedding(condition), both)


@pytest.mark.parametrize("method", ["sdedit", *METHODS])
def test_an_answer_is_the_seeds_and_not_the_batchs(trained, parts, method):
    kind = METHODS.get(method, SDEdit)
    folder = trained.get(method, parts / "sd")
    editor = kind.load(str(folder), "cpu", P)
    sampling = kind.settings | {"steps": 3}
    examples, given, queries, texts, seeds = inputs()
    both = editor.answer(examples, given, queries, texts, seeds, **sampling)
    alone = editor.answer(examples[1:], given[1:], queries[1:], texts[1:], seeds[1:], **sampling)
    assert both.shape == (2, 3, P, P) and both.abs().max() <= 1
    assert torch.allclose(both[1:], alone, atol=1e-3)
    other = editor.answer(examples[1:], given[1:], queries[1:], texts[1:], [7], **sampling)
    assert not torch.allclose(other, alone, atol=1e-2)


def test_what_is_not_given_is_not_seen(trained):
    editor = PromptDiffusion.load(str(trained["prompt-diffusion"]), "cpu", P)
    with torch.no_grad():
        for block in editor.pipeline.controlnet.controlnet_down_blocks:  # zeros that two steps hardly moved
            torch.nn.init.normal_(block.weight)
        torch.nn.init.normal_(editor.pipeline.controlnet.controlnet_cond_embedding.pair.conv_out.weight)
    examples, _, queries, texts, seeds = inputs()
    sampling = {"steps": 2, "guidance_text": 1.0}
    shown, hidden, other = (
        editor.answer(pair, given, queries, texts, seeds, **sampling)
        for pair, given in ((examples, [True, True]), (examples, [True, False]), (-examples, [True, False]))
    )
    assert torch.equal(shown[0], hidden[0]) and not torch.allclose(shown[1], hidden[1], atol=1e-3)
    assert torch.equal(hidden[1], other[1]) and not torch.allclose(hidden[0], other[0], atol=1e-3)


def test_little_noise_leaves_the_query_and_full_noise_does_not(parts):
    editor = SDEdit.load(str(parts / "sd"), "cpu", P)
    _, _, queries, texts, seeds = inputs()
    vae = editor.sd.vae
    with torch.no_grad():
        kept = vae.decode(vae.encode(queries).latent_dist.mean).sample.clamp(-1, 1)
    weak, strong = (
        editor.answer(None, None, queries, texts, seeds, 7.5, strength, steps=20) for strength in (0.05, 1.0)
    )
    assert (weak - kept).abs().mean() < 0.8 * (strong - kept).abs().mean()


def test_sdedit_is_told_the_captions_and_says_when_there_are_none(run, tmp_path, refused):
    more = ["--method", "sdedit", "--backbone", "tiny", "--count", "2", "--steps", "2"]
    evaluate.main([*more, "--output", str(tmp_path / "out")])
    lines = (tmp_path / "out" / "seen" / "instruction" / "answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["unified"] for line in lines} == {"a dog at night"}
    save_data(tmp_path / "bare")
    bare = "--data", str(tmp_path / "bare"), "--output", str(tmp_path / "out2")
    assert "no 'output_caption' for some queries" in refused(evaluate.main, [*more, *bare])


def test_a_folder_of_another_kind_is_one_line(run, parts, tmp_path, refused):
    for options in (["--steps", "0"], ["--data", "/nowhere/at/all"]):
        line = refused(run, "prompt-diffusion", *options, output=tmp_path / "new")
        assert line.startswith("evaluation.baselines: error: ")
    with pytest.raises(backbone.BackboneError, match="sd: not a pipeline of Prompt Diffusion"):
        PromptDiffusion.load(str(parts / "sd"), "cpu", P)
