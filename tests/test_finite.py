"""What is not finite is never written: no picture, weight, checkpoint, embedding, metric or table row."""

import json
import math
import sys
from types import SimpleNamespace

import gradio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import P, save_clip, save_data
from torch import nn

import backbone
import edit
import train
from apps import page as app
from apps.pipeline import InstructGIEPipeline
from dataset import VisualPromptDataset
from evaluation import baselines, evaluate, metrics
from pictures import tensor_to_image, to_bytes
from pictures.pairs import read_pairs
from toy import score
from toy.pretrain.loop import save
from toy.world import drawing
from training.checkpoint import load_checkpoint, save_checkpoint
from training.precompute import Frozen, precompute, read_instructions

NAN, INFINITY = math.nan, math.inf


@pytest.fixture
def pipe(folders):
    """Of its own, so that a test may spoil it."""
    pipe = InstructGIEPipeline.from_pretrained(folders / "editor")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pictures(tmp_path):
    """Example before and after, and a query."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.png" for name in ("before", "after", "x")]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (P, P, 3), dtype=np.uint8)).save(path)
    return paths


def spoil(module, value=NAN):
    """One of its weights, of the last tensor, is no number any more."""
    with torch.no_grad():
        list(module.parameters())[-1].view(-1)[0] = value


# --- Pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_picture_is_refused(value):
    tensor = torch.zeros(3, 8, 8)
    tensor[1, 2, 3] = value
    for write in (to_bytes, tensor_to_image):
        with pytest.raises(ValueError, match="NaN or infinity in a picture"):
            write(tensor)


def spoil_scheduler(pipe):
    step = pipe.scheduler.step

    def spoilt(*args, **options):
        result = step(*args, **options)
        result.prev_sample[..., 0] = NAN
        return result

    pipe.scheduler.step = spoilt


SPOILT = {
    "text_encoder": lambda p: spoil(p.text_encoder),
    "prompt_encoder": lambda p: spoil(p.rcldm.prompt_encoder),
    "links": lambda p: spoil(p.rcldm.trainable_copy.controlnet_mid_block),
    "unet": lambda p: spoil(p.unet.conv_out),
    "scheduler": spoil_scheduler,
}


@pytest.mark.parametrize("part", SPOILT)
def test_the_pipeline_names_the_step(pipe, pictures, part):
    before, after, query = map(Image.open, pictures)
    SPOILT[part](pipe)
    with pytest.raises(ValueError, match="step 1 of 3: NaN or infinity; take float32"):
        pipe("add a hat", query, (before, after), num_inference_steps=3)


def test_a_later_step_is_named(pipe, pictures):
    count = []

    def fail_late(module, inputs, output):
        count.append(1)
        output.sample[:] = NAN if len(count) == 3 else output.sample

    pipe.unet.register_forward_hook(fail_late)
    with pytest.raises(ValueError, match="step 3 of 4: NaN or infinity"):
        pipe("add a hat", Image.open(pictures[2]), num_inference_steps=4)


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_the_decoder(pipe, pictures, value):
    query = Image.open(pictures[2])
    spoil(pipe.vae.decoder.conv_out, value)
    for kind in ("pil", "pt"):  # a clip alone would make infinity white
        with pytest.raises(ValueError, match="NaN or infinity in the VAE's picture"):
            pipe("add a hat", query, output_type=kind)


def test_edit_ends_with_one_line_and_writes_nothing(folders, pipe, pictures, tmp_path, monkeypatch, refused):
    spoil(pipe.unet.conv_out)
    sd = backbone.StableDiffusion(*(pipe.components[name] for name in backbone.StableDiffusion._fields))
    parts = backbone.Parts(sd, pipe.rcldm, None, {**pipe.settings, "panel": pipe.panel})
    monkeypatch.setattr(backbone, "load_parts", lambda *_, **__: parts)
    output = tmp_path / "out.png"
    words = ["--instruction", "add a hat", "--input", str(pictures[2]), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["edit.py", *words, "--device", "cpu"])
    assert refused(edit.main).startswith("edit.py: error: step 1 of 2: NaN or infinity; take float32")
    assert not output.exists()


def test_the_page_says_it_and_shows_no_step(pipe, pictures, tmp_path):
    spoil(pipe.unet.conv_out)
    *_, query = map(str, pictures)
    (tmp_path / "served").mkdir()
    wish = None, None, query, "add a hat", 0, 2, 1.0, 1.0, "ddim"
    editor = app.Editor(pipe, "tiny", tmp_path / "served")
    with pytest.raises(gradio.Error, match="step 1 of 2: NaN or infinity"):
        list(editor.edit(*wish))
    assert not list((tmp_path / "served").rglob("*.png"))


def test_a_baseline_names_its_latents_and_its_picture(folders):
    queries = torch.zeros(1, 3, P, P)
    for part, named in (("unet", "the latents after 2 steps"), ("vae", "the VAE's picture")):
        editor = baselines.SDEdit.load(str(folders / "sd"), "cpu", P)
        spoil(getattr(editor.sd, part).conv_out if part == "unet" else editor.sd.vae.decoder.conv_out)
        with pytest.raises(ValueError, match=f"NaN or infinity in {named}"):
            editor.answer(None, None, queries, ["a hat"], [0], 7.5, strength=1.0, steps=2)


# --- Weights and checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_a_checkpoint_is_not_written_and_the_one_before_it_stays(tmp_path, value):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, 1, {"model": model}, optimizer, keep=1)
    for spoilt in (optimizer.state[model.bias]["exp_avg_sq"], model.bias.data):
        before = spoilt[0].item()
        spoilt[0] = value
        with pytest.raises(ValueError, match=r"in .*(bias|exp_avg_sq): .*checkpoint-0000002 is not written"):
            save_checkpoint(tmp_path, 2, {"model": model}, optimizer, keep=1)
        spoilt[0] = before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0000001"]
    assert load_checkpoint(tmp_path, {"model": model}, optimizer) == 1


def test_an_editor_is_not_written_and_the_older_one_stays(folders, pipe, tmp_path):
    args = SimpleNamespace(output=tmp_path, data="d", stable_diffusion="sd", llm=None, panel=P, batch=2)
    args.accumulate = 1
    for name in ("rcldm", "esm", "liu", "sam"):
        setattr(args, f"no_{name}", True)
    train.save_editor(pipe.rcldm, args, 1, {})
    spoil(pipe.rcldm)
    with pytest.raises(ValueError, match=r"NaN or infinity in .*: .*editor is not written"):
        train.save_editor(pipe.rcldm, args, 2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]
    assert json.loads((tmp_path / "editor" / "instructgie.json").read_text())["trained_steps"] == 1


def test_a_toy_part_whose_weights_half_precision_cannot_hold(tmp_path):
    weights = {"weight": torch.full((2, 2), 1e6).half()}
    part = SimpleNamespace(save_pretrained=lambda folder: save_file(weights, folder / "x.safetensors"))
    with pytest.raises(ValueError, match=r"NaN or infinity in weight: .*clip is not written"):
        save(tmp_path / "clip", part)
    assert not (tmp_path / "clip").exists()


# --- Embeddings ---------------------------------------------------------------------------------------------


def test_facts_are_checked_as_half_precision_holds_them(folders, tmp_path):
    data = save_data(tmp_path / "data")
    sd = backbone.load_stable_diffusion(str(folders / "sd"))
    args = SimpleNamespace(data=data, cache=tmp_path / "cache", workers=0)
    pairs = VisualPromptDataset(read_pairs(data), P)
    sd.vae.register_to_config(scaling_factor=1e7)
    with pytest.raises(ValueError, match=r"NaN or infinity in .*: the latents"):
        precompute(pairs, Frozen(sd.vae, None, None), args, torch.device("cpu"))
    assert not (tmp_path / "cache").exists()
    spoil(sd.text_encoder)
    with pytest.raises(ValueError, match="NaN or infinity in an instruction's embedding"):
        read_instructions(pairs, sd, None)


# --- Metrics and tables -------------------------------------------------------------------------------------


def test_an_embedding_that_is_measured(tmp_path, pictures):
    save_clip(tmp_path / "clip")
    clip = backbone.load_clip(str(tmp_path / "clip"))
    with torch.no_grad():
        clip.visual.proj[:] = NAN
    before, after, query = map(str, pictures)
    record = {"input": before, "output": after, "answer": query, "input_caption": "a", "output_caption": "b"}
    tokenizer = lambda texts: torch.zeros(len(texts), 16, dtype=torch.long)  # noqa: E731
    with pytest.raises(ValueError, match=r"NaN or infinity in .*: the embeddings of input"):
        metrics.embed_all([record], tmp_path, clip, tokenizer, None, "cpu")


def test_equal_clouds_are_no_less_than_nothing_apart():
    """What vanishes on paper rounds to either side of zero."""
    for seed in range(20):
        cloud = torch.randn(50, 8, generator=torch.Generator().manual_seed(seed))
        assert 0 <= metrics.frechet_distance(cloud, cloud.flip(0)) < 1e-12


def test_a_line_of_answers_is_json(tmp_path):
    """NaN in the metadata, as a table has where a number is missing, becomes null."""
    data = save_data(tmp_path / "data")
    path = data / "train" / "metadata.jsonl"
    rows = [
        json.loads(line) | {"score": NAN, "more": [INFINITY, 1]} for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = VisualPromptDataset(read_pairs(data), P)
    line = evaluate.describe(pairs, evaluate.Query(0, 1, 0), tmp_path)
    json.dumps(line, allow_nan=False)
    assert line["score"] is None and line["more"] == line["example"]["more"] == [None, 1]


# --- What a rounding or a tie decided -----------------------------------------------------------------------


def test_the_nearest_candidate_is_found_in_whole_numbers():
    """Single precision holds sums beyond 2^24 in steps, and processors choose the order of summing."""
    answer = np.zeros((64, 64, 3), np.uint8)
    answer[0, 0, 0] = 100
    pictures = np.full((3, 64, 64, 3), 201, np.uint8)
    pictures[:, 0, 0, 0] = 101, 99, 100  # of 500 million, one less
    assert score.Truth.nearest(SimpleNamespace(pictures=pictures), answer) == 2
    pictures[1] = pictures[2]
    assert score.Truth.nearest(SimpleNamespace(pictures=pictures), answer) == 1  # the first of two alike


def test_the_renderer_mixes_colours_as_every_processor_does():
    """A matrix product may add in any order, and a level of a picture hang on its last bit."""
    levels = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3), -1).reshape(-1, 1, 3).astype(np.float32)
    weights = [np.float32(w) for w in (0.299, 0.587, 0.114)]
    wanted = [[(r * weights[0] + g * weights[1]) + b * weights[2]] for r, g, b in levels[:, 0]]
    assert np.array_equal(drawing._mix(levels, drawing._GREY)[:, 0], np.array(wanted, np.float32))
