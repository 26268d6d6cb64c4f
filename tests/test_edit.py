"""edit.py: guidance, seeds and batches of the sampler; pictures of any shape; the command and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import backbone
import edit
from dataset import compose_grid, repeat_query, split_grid
from edit import SCHEDULERS, Editor, fit_panel, unfit
from rcldm import RCLDM

P = 32  # so the grid has 64 pixels, and 8 latent pixels


def save_stable_diffusion(folder):
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
    UNet2DConditionModel(
        **sizes,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        sample_size=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    words = ["make it night", "add a hat", "remove the dog"]
    tokenizer = CLIPTokenizer().train_new_from_iterator(words, vocab_size=600)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **ids)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    return folder


def save_editor(folder, sd_folder, unet, trained=True, **settings):
    """An RCLDM as `train.py` saves it; `trained` means that its zeros have moved, at random."""
    torch.manual_seed(1)
    model = RCLDM.from_unet(unet, prompt_encoder_depth=1, prompt_encoder_latents=True)
    model.prompt_encoder.drawn.bias.data.fill_(9)  # a draft that keeps nothing of what is known
    if trained:
        for name, parameter in model.named_parameters():
            if "zero_proj" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    settings = {"stable_diffusion": str(sd_folder), "llm": None, "panel": P, "steps": 2} | settings
    (folder / "instructgie.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("editor")
    sd = save_stable_diffusion(root / "sd")
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    save_editor(root / "editor", sd, unet)
    save_editor(root / "untrained", sd, unet, trained=False)
    return root


@pytest.fixture(scope="module")
def editor(folders):
    return Editor.load(folders / "editor", "cpu")


@pytest.fixture(scope="module")
def edits():
    """Three edits: examples, queries and instructions."""
    g = torch.Generator().manual_seed(2)
    examples, queries = (torch.rand(3, *n, 3, P, P, generator=g) * 2 - 1 for n in ((2,), ()))
    return examples, queries, ["make it night", "add a hat", "remove the dog"]


def draw(editor, edits, which=(0, 1, 2), has_example=None, texts=None, seeds=None, **options):
    examples, queries, instructions = edits
    i = list(which)
    texts = [instructions[k] for k in i] if texts is None else texts
    return editor.sample(examples[i], has_example, queries[i], texts, seeds or i, **{"steps": 2} | options)


def apart(a, b):
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------- the sampler


def test_an_untrained_editor_is_the_bare_unet_to_the_last_bit(folders, edits):
    editor = Editor.load(folders / "untrained", "cpu")
    drawn = draw(editor, edits, guidance_text=1, steps=4, eta=0)
    sd, x = (
        editor.sd,
        torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]),
    )
    scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        states = backbone.encode_text(sd, edits[2])
        for t in scheduler.timesteps:
            x = scheduler.step(sd.unet(x, t, states).sample, t, x).prev_sample
    assert drawn.shape == (3, 4, 8, 8) and torch.equal(drawn, x)


def test_eta_is_fresh_noise_at_every_step(editor, edits):
    settled, fresh = (draw(editor, edits, steps=3, eta=eta) for eta in (0.0, 1.0))
    assert apart(settled, fresh) > 0.01
    assert torch.equal(fresh, draw(editor, edits, steps=3, eta=1.0))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_sample_depends_on_its_own_seed_alone(editor, edits, scheduler):
    options = dict(
        scheduler=scheduler, guidance_visual=1.5, guidance_text=2.0, has_example=[True, False, True]
    )
    together = draw(editor, edits, **options)
    assert together.isfinite().all() and together.dtype == torch.float32
    assert torch.equal(together, draw(editor, edits, **options))
    for k in (0, 1):
        alone = draw(editor, edits, [k], **options | {"has_example": options["has_example"][k : k + 1]})
        torch.testing.assert_close(alone[0], together[k], atol=1e-3, rtol=1e-3)
    assert apart(draw(editor, edits, seeds=[0, 1, 9], **options)[2], together[2]) > 0.1


def branches(editor, edits, monkeypatch, **options):
    """How many predictions for each sample a step takes, and how often the condition is encoded."""
    sizes, encoded = [], []
    encode = editor.rcldm.encode_condition
    hook = editor.sd.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(
        editor.rcldm, "encode_condition", lambda *inputs: encoded.append(len(inputs[0])) or encode(*inputs)
    )
    draw(editor, edits, **options)
    hook.remove()
    monkeypatch.undo()
    assert len(sizes) == 2 and len(set(sizes)) == 1 and encoded == sizes[:1]
    return sizes[0] // 3


def test_the_encoder_is_given_the_latents_it_was_trained_with(editor, edits, monkeypatch):
    given = []
    encode = editor.rcldm.encode_condition
    monkeypatch.setattr(
        editor.rcldm, "encode_condition", lambda *inputs: given.append(inputs) or encode(*inputs)
    )
    draw(editor, edits, has_example=[True, False, True])
    condition, _, known = given[0]
    with torch.no_grad():
        panels = [backbone.encode_images(editor.sd.vae, panel) for panel in split_grid(condition)]
        grey = backbone.encode_images(editor.sd.vae, torch.zeros(1, 3, P, P))
    torch.testing.assert_close(known, repeat_query(compose_grid(*panels)))
    torch.testing.assert_close(known[1:2], compose_grid(grey, grey, *[panels[2][1:2]] * 2))


def test_what_is_drawn_gives_way_to_a_draft_that_it_hardly_differs_from():
    drawn = torch.zeros(1, 4, 8, 8)
    known = torch.full_like(drawn, 9.0)  # the draft keeps nothing of it
    for difference, share in ((0.0, 1), (0.1, 0.75), (0.2, 0), (0.3, 0)):
        draft = torch.full_like(drawn, difference)
        assert torch.allclose(edit.settle(drawn, known, draft), share * draft, atol=1e-6)


def test_what_the_draft_keeps_stays_as_it_was(editor, edits, monkeypatch):
    def with_draft(change):
        def encode(*inputs):
            encoding, _ = given(*inputs)
            known.append(inputs[2])
            return encoding, inputs[2] + change**0.5

        monkeypatch.setattr(editor.rcldm, "encode_condition", encode)
        return draw(editor, edits)

    known, given = [], editor.rcldm.encode_condition
    kept, half, drawn, anew = (with_draft(change) for change in (0, 0.005, 0.0101, 1))
    torch.testing.assert_close(kept, known[0])
    torch.testing.assert_close(half, (known[0] + anew) / 2)
    assert torch.equal(drawn, anew) and apart(anew, known[0]) > 0.1


NO_PAIR, NO_TEXT = {"has_example": [False] * 3}, {"texts": [""] * 3}


@pytest.mark.parametrize(
    "text, visual, absent, count",
    [
        (1, 1, {}, 1),
        (2, 1, {}, 2),
        (2, 2, {}, 2),
        (1, 2, {}, 3),
        (2, 1.5, {}, 3),
        (2, 1.5, NO_PAIR, 2),
        (2, 1.5, NO_TEXT, 2),
        (2, 1, NO_TEXT, 1),
        (2, 1.5, NO_PAIR | NO_TEXT, 1),
        (2, 1.5, {"has_example": [False, True, False], "texts": ["", "", "add a hat"]}, 3),
    ],
)
def test_guidance_leaves_out_the_branches_that_nobody_needs(
    editor, edits, monkeypatch, text, visual, absent, count
):
    options = {"guidance_text": text, "guidance_visual": visual} | absent
    assert branches(editor, edits, monkeypatch, **options) == count


def test_guidance_is_the_formula(editor, edits):
    """One DDIM step is linear in the prediction: so is x_0 in the three branches' x_0."""
    # The first timestep is the noisiest, where x_0 depends most on the prediction.
    scheduler = DDIMScheduler.from_config(editor.sd.scheduler.config, timestep_spacing="trailing")
    editor = Editor(editor.sd._replace(scheduler=scheduler), editor.rcldm, None, P)
    e00 = draw(editor, edits, **NO_PAIR, **NO_TEXT, guidance_text=1, steps=1)
    e0v = draw(editor, edits, **NO_TEXT, guidance_text=1, steps=1)
    etv = draw(editor, edits, guidance_text=1, steps=1)
    assert min(apart(e00, e0v), apart(e0v, etv)) > 0.01
    guided = draw(editor, edits, guidance_text=3.0, guidance_visual=2.0, steps=1)
    torch.testing.assert_close(guided, e00 + 2 * (e0v - e00) + 3 * (etv - e0v), atol=1e-3, rtol=1e-5)


def test_pair_and_instruction_each_have_a_say_and_an_absent_pair_has_none(editor, edits):
    both = draw(editor, edits)
    pair, words = draw(editor, edits, **NO_TEXT), draw(editor, edits, **NO_PAIR)
    assert min(apart(both, pair), apart(both, words), apart(pair, words)) > 1e-3
    examples, *rest = edits
    assert torch.equal(words, draw(editor, (examples.flip(0), *rest), **NO_PAIR))


def test_the_answer_is_the_lower_right_panel_decoded_alone(editor, edits):
    latents = draw(editor, edits)
    grids, answers = editor.decode_grids(latents), editor.decode_answers(latents)
    assert grids.shape == (3, 3, 2 * P, 2 * P) and answers.abs().max() <= 1
    assert torch.equal(split_grid(grids)[3], answers)
    latents[..., :4, :] = 0  # another example row
    assert torch.equal(editor.decode_answers(latents), answers)


def test_wrong_calls_are_told_apart(editor, edits):
    with pytest.raises(ValueError, match="differ in length"):
        draw(editor, edits, texts=["add a hat"])
    with pytest.raises(ValueError, match=r"1 … 1000, not 1001"):
        draw(editor, edits, steps=1001)


def test_bfloat16(folders, edits):
    editor = Editor.load(folders / "editor", "cpu", torch.bfloat16)
    latents = draw(editor, edits, steps=1)
    assert latents.dtype == torch.float32 and editor.decode_answers(latents).isfinite().all()


class Shout:
    model = torch.nn.Identity()

    def unify(self, texts):
        return [text.upper() for text in texts]


def test_unify_needs_a_language_model_only_where_training_had_one(editor):
    assert editor.unify(["Add  a hat"]) == ["Add  a hat"]
    assert Editor(editor.sd, editor.rcldm, Shout(), P).unify(["add"]) == ["ADD"]


def test_an_editor_of_another_unet_is_refused(folders, editor):
    other = UNet2DConditionModel.from_config({**editor.sd.unet.config, "cross_attention_dim": 16})
    with pytest.raises(backbone.BackboneError, match="cross_attention_dim"):
        Editor(editor.sd, RCLDM.from_unet(other, prompt_encoder_depth=1), None, P)
    with pytest.raises(backbone.BackboneError, match="panels of 36 pixels"):
        Editor(editor.sd, editor.rcldm, None, 36)


# ------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [(64, 64), (100, 50), (50, 100), (20, 7), (1000, 1), (3, 3)])
def test_a_picture_of_any_shape_fills_the_panel_and_comes_back(size):
    image = Image.new("RGB", size, (10, 200, 30))
    panel, box = fit_panel(image, P)
    assert panel.shape == (3, P, P) and apart(panel, panel[:, :1, :1]) == 0  # its border is repeated
    *_, height, width = unfit(panel, box).shape
    assert max(height, width) == P
    assert abs(width / height - size[0] / size[1]) <= size[0] / size[1] / min(width, height)


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with an example pair and an input of 60×30 pixels."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, size in (("before", (40, 40)), ("after", (40, 40)), ("x", (30, 60))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(f"{name}.png")
    return tmp_path


PAIR = ("--prompt-pair", "before.png", "after.png")


@pytest.fixture
def command(here, folders, editor, monkeypatch):
    """edit.py in this process, with the editor that is loaded already where the options name it."""
    load = Editor.load
    known = str(folders / "editor")
    monkeypatch.setattr(
        Editor, "load", lambda model, *rest, **more: editor if model == known else load(model, *rest, **more)
    )

    def run(*options):
        model = () if "--model" in options else ("--model", known)
        monkeypatch.setattr(sys, "argv", ["edit.py", *options, *model])
        edit.main()

    return run


def test_pair_alone_instruction_alone_and_both(command, capsys):
    command(*PAIR, "--input", "x.png", "--output", "pair.png")
    assert capsys.readouterr().out == "pair.png\n"
    command("--instruction", "add  a hat ", "--input", "x.png", "--output", "words.png")
    assert capsys.readouterr().out == 'instruction: "add a hat" -> "add a hat"\nwords.png\n'
    command(*PAIR, "--instruction", "add a hat", "--input", "x.png", "--output", "both.png")
    answers = [np.asarray(Image.open(f"{name}.png")) for name in ("pair", "words", "both")]
    assert [a.shape for a in answers] == [(P // 2, P, 3)] * 3  # the input's own aspect ratio
    assert len({a.tobytes() for a in answers}) == 3


def test_settings_are_stored_and_make_the_answer_again(command):
    options = "--steps", "3", "--guidance-text", "2", "--guidance-visual", "1.25", "--scheduler", "euler-a"
    common = *PAIR, "--instruction", "add a hat", "--input", "x.png"
    command(*common, "--seed", "7", *options, "--output", "a.png")
    record = json.loads(Image.open("a.png").text["instructgie"])
    wanted = {"instruction": "add a hat", "unified": "add a hat", "input": "x.png", "seed": 7, "steps": 3}
    wanted |= {"guidance_text": 2.0, "guidance_visual": 1.25, "scheduler": "euler-a", "dtype": "float32"}
    wanted |= {"prompt_pair": ["before.png", "after.png"]}
    assert wanted.items() <= record.items() and record["model"].endswith("editor")
    command(*common, "--seed", "7", *options, "--output", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    command(*common, "--output", "c.png")  # the editor's own settings, and the class's where it has none
    record = json.loads(Image.open("c.png").text["instructgie"])
    assert (record["steps"], record["guidance_text"], record["guidance_visual"]) == (2, 1.0, 1.0)
    assert record["eta"] == 1.0


def test_folders_clashing_stems_several_images_and_grids(command, here):
    for name in ("photos/b.jpg", "photos/a.png", "photos/.hidden.png", "other/a.bmp"):
        (here / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), "red").save(here / name)
    (here / "photos" / "notes.txt").write_text("not a picture")
    many = "--num-images", "2", "--grid", "--batch", "3", "--steps", "1"
    command(*PAIR, "--input", "photos", "other/a.bmp", *many, "--output", "out")
    stems = [f"{stem}_{k}" for stem in ("a", "b", "a-2") for k in (0, 1)]
    wanted = {f"{stem}{end}.png" for stem in stems for end in ("", "_grid")}
    assert {path.name for path in (here / "out").iterdir()} == wanted
    assert Image.open("out/a_1_grid.png").size == (2 * 192, 2 * 192 + 40)
    seeds = [json.loads(Image.open(f"out/a_{k}.png").text["instructgie"])["seed"] for k in (0, 1)]
    assert seeds == [0, 1]
    assert Path("out/a_0.png").read_bytes() != Path("out/a_1.png").read_bytes()
    command(*PAIR, "--input", "photos/a.png", "--seed", "1", "--steps", "1", "--output", "one.png")
    alone, together = (np.asarray(Image.open(name)).astype(int) for name in ("one.png", "out/a_1.png"))
    assert abs(alone - together).max() <= 1


def test_orientation_and_modes(command, here):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (60, 30), "red").save("exif.jpg", exif=exif)
    Image.fromarray(np.linspace(0, 65535, 32 * 16).reshape(16, 32).astype(np.uint16)).save("grey16.png")
    Image.new("RGBA", (30, 30), (255, 0, 0, 100)).save("rgba.png")
    Image.new("P", (30, 60)).save("palette.gif")
    inputs = "exif.jpg", "grey16.png", "rgba.png", "palette.gif"
    command(*PAIR, "--input", *inputs, "--steps", "1", "--output", "out")
    sizes = [Image.open(f"out/{Path(name).stem}.png").size for name in inputs]
    assert sizes == [(16, 32), (32, 16), (32, 32), (16, 32)]


# ------------------------------------------------------------------------------------------- errors

INPUT, OUTPUT = ("--input", "x.png"), ("--output", "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ((*INPUT, *OUTPUT), "--prompt-pair, --instruction or both"),
        ((*INPUT, *OUTPUT, "--instruction", " "), "--prompt-pair, --instruction or both"),
        ((*PAIR, "--input", "missing.png", *OUTPUT), "missing.png: no such file"),
        ((*PAIR, "--input", "x.png", "corrupt.png", *OUTPUT), "corrupt.png: "),
        ((*PAIR, "--input", "empty", *OUTPUT), "empty: no picture in this folder"),
        (("--prompt-pair", "before.png", "no.png", *INPUT, *OUTPUT), "no.png: no such file"),
        ((*PAIR, *INPUT, *OUTPUT, "--model", "nowhere/at/all"), "nowhere/at/all: no such folder"),
        ((*PAIR, *INPUT, *OUTPUT, "--model", "empty"), "empty: not an editor's folder"),
        ((*PAIR, *INPUT, *OUTPUT, "--steps", "0"), "--steps must be at least 1"),
        ((*PAIR, *INPUT, *OUTPUT, "--steps", "1001"), "1 … 1000, not 1001"),
        ((*PAIR, *INPUT, *OUTPUT, "--num-images", "0"), "--num-images must be at least 1"),
        ((*PAIR, *INPUT, *OUTPUT, "--batch", "-1"), "--batch must be at least 1"),
        ((*PAIR, *INPUT, *OUTPUT, "--guidance-text", "nan"), "--guidance-text must be a finite number"),
        ((*PAIR, *INPUT, *OUTPUT, "--guidance-visual", "inf"), "--guidance-visual must be a finite number"),
        ((*PAIR, *INPUT, *OUTPUT, "--eta", "1.5"), "eta must be 0 … 1"),
        ((*PAIR, *INPUT, *OUTPUT, "--seed", "-1"), "--seed must be a whole number"),
        ((*PAIR, *INPUT, "--output", "out.png", "--num-images", "2"), "several go to a folder"),
        ((*PAIR, *INPUT, "--output", "out.jpg"), "one answer goes to a .png file"),
        ((*PAIR, *INPUT, "--output", "notes"), "--output notes: is a file"),
        ((*PAIR, *INPUT, "--output", "x.png"), "overwrite a picture that is read"),
        ((*PAIR, *INPUT, "--output", "taken"), "cannot be written"),
        ((*PAIR, *INPUT, "--output", "notes/a.png"), "cannot be written"),
        (("--instruction", "a \udcff hat", *INPUT, *OUTPUT), "codec can't encode"),
        ((*PAIR, *INPUT, "--output", "."), "overwrite a picture that is read"),
        pytest.param(
            (*PAIR, *INPUT, *OUTPUT, "--model", "EDITOR", "--device", "cuda"),
            "--device cuda: no such device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there"),
        ),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(command, here, folders, capsys, options, message):
    (here / "corrupt.png").write_bytes((here / "x.png").read_bytes()[:500])
    (here / "notes").write_text("")
    (here / "empty").mkdir()
    (here / "taken" / "x.png").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    options = [f"{folders}/./editor" if option == "EDITOR" else option for option in options]
    with pytest.raises(SystemExit) as exit:
        command(*options)
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and errors.startswith("edit.py: error: ") and message in errors
    assert errors.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_settings_that_lack_something(folders, command, here, capsys):
    (here / "editor").mkdir()
    for path in (folders / "editor").iterdir():
        (here / "editor" / path.name).write_bytes(path.read_bytes())
    (here / "editor" / "instructgie.json").write_text('{"panel": 32}')
    with pytest.raises(SystemExit):
        command(*PAIR, *INPUT, *OUTPUT, "--model", str(here / "editor"))
    assert "instructgie.json lacks llm, stable_diffusion" in capsys.readouterr().err
    wrong = {"panel": "32", "llm": None, "stable_diffusion": str(folders / "sd")}
    (here / "editor" / "instructgie.json").write_text(json.dumps(wrong))
    with pytest.raises(SystemExit):
        command(*PAIR, *INPUT, *OUTPUT, "--model", str(here / "editor"))
    assert "instructgie.json has panel '32'" in capsys.readouterr().err


def test_an_interrupted_write_leaves_no_file(here, monkeypatch):
    def stumble(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", stumble)
    with pytest.raises(OSError):
        edit.save_png(Image.new("RGB", (4, 4)), here / "out" / "a.png", {})
    assert not list((here / "out").iterdir())


def test_as_a_program(here, folders):
    program = [sys.executable, edit.__file__, "--model", folders / "editor", "--device", "cpu"]
    options = [*PAIR, "--input", "x.png", "--steps", "1", "--output", "answer.png"]
    done = subprocess.run([*program, *options], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "answer.png\n"), done.stderr
    assert Image.open("answer.png").size == (P, P // 2)


def test_help_comes_before_the_slow_imports():
    asked = [sys.executable, "-X", "importtime", edit.__file__, "--help"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: edit.py") and "--prompt-pair" in done.stdout
    assert "argparse" in done.stderr and "torch" not in done.stderr and "diffusers" not in done.stderr


def test_offloaded_parts_are_on_the_device_only_while_they_work(folders, edits, monkeypatch):
    """Without a GPU: what is moved where, and when."""
    plain, offloaded = (Editor.load(folders / "editor", "cpu", offload=offload) for offload in (False, True))
    assert torch.equal(draw(plain, edits), draw(offloaded, edits))
    moves = []
    for name in ("text_encoder", "vae"):
        part = getattr(offloaded.sd, name)
        monkeypatch.setattr(
            part, "to", lambda device, name=name, part=part: moves.append((name, "in")) or part
        )
        monkeypatch.setattr(part, "cpu", lambda name=name: moves.append((name, "out")))
    offloaded.answer(*edits[:1], None, *edits[1:3], [0] * len(edits[2]), steps=1)
    assert moves == [(name, way) for name in ("text_encoder", "vae", "vae") for way in ("in", "out")]


@pytest.mark.slow
def test_a_compiled_editor_draws_the_same(folders, edits):
    editor = Editor.load(folders / "editor", "cpu")
    plain = draw(editor, edits)
    editor.compile()
    assert apart(draw(editor, edits), plain) < 1e-3
