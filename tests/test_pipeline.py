"""apps/pipeline.py: the sampler's guidance, seeds and batches; what diffusers asks of its own pipelines."""

import copy
import json
import shutil
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from tiny import P

import backbone
import edit
import liu
from apps.pipeline import InstructGIEPipeline, fit_panel, seeded, unfit
from dataset import answer_panel
from pictures import load_image, tensor_to_image
from rcldm import RCLDM
from training import precompute
from training.card import model_card


def load(folder, **options):
    pipe = InstructGIEPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def editor(folders):
    return load(folders / "editor")


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
    noise = seeded(seeds or i)
    usual = {"steps": 2, "guidance_text": 1.0, "guidance_visual": 1.0}
    return editor.sample(examples[i], has_example, queries[i], texts, noise, **usual | options)


def apart(a, b):
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------- the sampler


def test_an_untrained_editor_is_the_bare_unet_to_the_last_bit(folders, edits):
    editor = load(folders / "untrained")
    drawn = draw(editor, edits, guidance_text=1, steps=4)
    x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)])
    scheduler = DDIMScheduler.from_config(editor.scheduler.config)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        states = backbone.encode_text(editor, edits[2])
        for t in scheduler.timesteps:
            x = scheduler.step(editor.unet(x, t, states).sample, t, x).prev_sample
    assert drawn.shape == (3, 4, 8, 8) and torch.equal(drawn, x)


@pytest.mark.parametrize("name", backbone.SAMPLERS)
def test_every_sampler_draws_as_diffusers_has_it(folders, edits, name):
    """Scaled noise, scaled inputs, fresh noise: all of which DDIM does without."""
    editor, (g,) = load(folders / "untrained"), seeded([0])
    editor.scheduler = scheduler = backbone.new_sampler(name, editor.scheduler)
    drawn, states = draw(editor, edits, [0], steps=4), backbone.encode_text(editor, edits[2][:1])
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8, generator=g) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            prediction = editor.unet(scheduler.scale_model_input(x, t), t, states).sample
        x = backbone.sampler_step(scheduler, prediction, t, x, g).prev_sample
    torch.testing.assert_close(drawn, x)


@pytest.mark.parametrize("scheduler", backbone.SAMPLERS.values())
def test_a_sample_depends_on_its_own_seed_alone(pipe, edits, scheduler):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    options = dict(guidance_visual=1.5, guidance_text=2.0, has_example=[True, False, True])
    together = draw(pipe, edits, **options)
    assert together.isfinite().all() and together.dtype == torch.float32
    assert torch.equal(together, draw(pipe, edits, **options))
    for k in (0, 1):
        alone = draw(pipe, edits, [k], **options | {"has_example": options["has_example"][k : k + 1]})
        torch.testing.assert_close(alone[0], together[k], atol=1e-3, rtol=1e-3)
    assert apart(draw(pipe, edits, seeds=[0, 1, 9], **options)[2], together[2]) > 0.1


def branches(editor, edits, monkeypatch, **options):
    """How many predictions for each sample a step takes, and how often the condition is encoded."""
    sizes, encoded = [], []
    encode = editor.rcldm.encode_condition
    hook = editor.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(
        editor.rcldm, "encode_condition", lambda *inputs: encoded.append(len(inputs[0])) or encode(*inputs)
    )
    draw(editor, edits, **options)
    hook.remove()
    monkeypatch.undo()
    assert len(sizes) == 2 and len(set(sizes)) == 1 and set(encoded) == {3}
    return sizes[0] // 3, len(encoded)


NO_PAIR, NO_TEXT = {"has_example": [False] * 3}, {"texts": [""] * 3}


@pytest.mark.parametrize(
    "text, visual, absent, count, grids",
    [
        (1, 1, {}, 1, 1),
        (2, 1, {}, 2, 1),
        (2, 2, {}, 2, 2),
        (1, 2, {}, 3, 2),
        (2, 1.5, {}, 3, 2),
        (2, 1.5, NO_PAIR, 2, 1),
        (2, 1.5, NO_TEXT, 2, 2),
        (2, 1, NO_TEXT, 1, 1),
        (2, 1.5, NO_PAIR | NO_TEXT, 1, 1),
        (2, 1.5, {"has_example": [False, True, False], "texts": ["", "", "add a hat"]}, 3, 2),
    ],
)
def test_guidance_leaves_out_the_branches_that_nobody_needs(
    editor, edits, monkeypatch, text, visual, absent, count, grids
):
    """grids: that are encoded of each edit, for all its branches."""
    options = {"guidance_text": text, "guidance_visual": visual} | absent
    assert branches(editor, edits, monkeypatch, **options) == (count, grids)


def test_guidance_is_the_formula(editor, edits):
    """One DDIM step is linear in the prediction: so is x_0 in the three branches' x_0."""
    # The first timestep is the noisiest, where x_0 depends most on the prediction.
    scheduler = DDIMScheduler.from_config(editor.scheduler.config, timestep_spacing="trailing")
    editor = InstructGIEPipeline(**editor.components | {"scheduler": scheduler}, panel=P)
    editor.set_progress_bar_config(disable=True)
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
    answers = editor.decode_answers(latents)
    assert answers.shape == (3, 3, P, P) and answers.abs().max() <= 1
    assert torch.equal(backbone.decode_latents(editor.vae, answer_panel(latents)), answers)
    latents[..., :4, :] = 0  # another example row
    assert torch.equal(editor.decode_answers(latents), answers)


def test_unify_needs_a_language_model_only_where_training_had_one(editor, monkeypatch):
    assert editor.unify(["Add  a hat"]) == ["Add  a hat"]
    monkeypatch.setattr(liu, "InstructionUnifier", lambda model, tokenizer: Shout())
    stand_ins = {"llm": editor.text_encoder, "llm_tokenizer": editor.tokenizer}
    told = InstructGIEPipeline(**editor.components | stand_ins, panel=P)
    assert told.unify(["add"]) == ["ADD"]


class Shout:
    def unify(self, texts):
        return [text.upper() for text in texts]


def test_an_editor_of_another_unet_is_refused(folders, editor):
    other = UNet2DConditionModel.from_config({**editor.unet.config, "cross_attention_dim": 16})
    with pytest.raises(backbone.BackboneError, match="cross_attention_dim"):
        parts = editor.components | {"rcldm": RCLDM.from_unet(other, prompt_encoder_depth=1)}
        InstructGIEPipeline(**parts, panel=P)
    with pytest.raises(backbone.BackboneError, match="panels of 36 pixels"):
        InstructGIEPipeline(**editor.components, panel=36)


# ------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [(64, 64), (100, 50), (50, 100), (20, 7), (1000, 1), (3, 3)])
def test_a_picture_of_any_shape_fills_the_panel_and_comes_back(size):
    image = Image.new("RGB", size, (10, 200, 30))
    panel, box = fit_panel(image, P)
    assert panel.shape == (3, P, P) and apart(panel, panel[:, :1, :1]) == 0  # its border is repeated
    *_, height, width = unfit(panel, box).shape
    assert max(height, width) == P and box[:2] == ((P - width) // 2, (P - height) // 2)
    assert abs(width / height - size[0] / size[1]) <= size[0] / size[1] / min(width, height)


# ------------------------------------------------------------------------------------- diffusers' own checks


@pytest.fixture(scope="module")
def pictures():
    """Example before and after, and two queries of other shapes."""
    rng = np.random.default_rng(0)
    sizes = (40, 40), (40, 40), (30, 60), (50, 20)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture
def pipe(editor):
    """Of its own, so that a test may change it."""
    own = InstructGIEPipeline(**editor.components, panel=P, settings=editor.settings)
    own.set_progress_bar_config(disable=True)
    return own


def call(pipe, pictures, prompt="add a hat", seed=0, **options):
    before, after, query, _ = pictures
    given = {"prompt": prompt, "image": query, "prompt_pair": (before, after), "output_type": "pt"}
    given |= {"generator": seeded([seed])[0], "num_inference_steps": 2}
    return pipe(**given | options)


def answers(*args, **options):
    return call(*args, **options).images


@pytest.fixture(scope="module")
def saved(editor, tmp_path_factory):
    """The folder of the whole pipeline."""
    editor.save_pretrained(folder := tmp_path_factory.mktemp("pipeline"))
    return folder


def test_saved_and_loaded_it_edits_the_same(pipe, saved, pictures):
    again = load(saved)
    assert torch.equal(answers(again, pictures), answers(pipe, pictures))
    assert (again.panel, again.settings, again.llm) == (P, pipe.settings, None)
    suffixes = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt"}


def test_diffusers_finds_the_class_by_its_custom_pipeline(pipe, saved, pictures):
    here = str(backbone.HERE / "apps")
    again = DiffusionPipeline.from_pretrained(str(saved), custom_pipeline=here, trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert type(again).__name__ == "InstructGIEPipeline"
    assert torch.equal(answers(again, pictures), answers(pipe, pictures))


def test_parts_can_be_given_and_left_out(folders, pipe, saved, pictures):
    given = load(folders / "editor", vae=pipe.vae, llm=None, llm_tokenizer=None)
    assert given.vae is pipe.vae and given.llm is None
    given = load(saved, vae=pipe.vae)
    assert given.vae is pipe.vae and torch.equal(answers(given, pictures), answers(pipe, pictures))


def test_variants(pipe, pictures, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert list((tmp_path / "rcldm").glob("*.fp16.safetensors"))
    assert torch.equal(answers(load(tmp_path, variant="fp16"), pictures), answers(pipe, pictures))
    with pytest.raises(ValueError, match="variant"):
        load(tmp_path, variant="fp64")


def test_every_part_may_have_a_dtype_of_its_own(saved):
    for given, unet, others in (
        ({"unet": torch.bfloat16, "default": torch.float32}, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
    ):
        parts = load(saved, torch_dtype=given).components
        kinds = {name: part.dtype for name, part in parts.items() if hasattr(part, "dtype")}
        assert kinds == {"vae": others, "text_encoder": others, "unet": unet, "rcldm": others}


def test_a_language_model_is_never_in_float16(parts, folders, tmp_path):
    """It would overflow."""
    llm, tokenizer = backbone.load_llm(str(parts / "llm"))
    load(folders / "editor", llm=llm, llm_tokenizer=tokenizer).save_pretrained(tmp_path)
    pipe = load(tmp_path, torch_dtype=torch.float16)
    assert (pipe.rcldm.dtype, pipe.llm.dtype) == (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("own, used", [("bfloat16", torch.bfloat16), ("float16", torch.float32)])
def test_a_language_model_runs_in_the_precision_of_its_files(parts, tmp_path, own, used):
    shutil.copytree(parts / "llm", tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"dtype": own}))
    model, _ = backbone.load_llm(tmp_path / "llm")
    assert {parameter.dtype for parameter in model.parameters()} == {used}


def test_made_of_anothers_parts(pipe, pictures):
    parts = {k: pipe.components[k] for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    blind = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    other = diffusers.StableDiffusionPipeline(**parts, **blind)
    made = InstructGIEPipeline.from_pipe(other, rcldm=pipe.rcldm, panel=P)
    made.set_progress_bar_config(disable=True)
    assert torch.equal(answers(made, pictures), answers(pipe, pictures))


def test_its_components_make_it_again(pipe, pictures):
    """The RCLDM tells its panels' size, as it does where `train.py` has made it."""
    rcldm = copy.deepcopy(pipe.rcldm)
    rcldm.register_to_config(panel=P)
    again = InstructGIEPipeline(**pipe.components | {"rcldm": rcldm})
    again.set_progress_bar_config(disable=True)
    assert again.panel == P
    assert torch.equal(
        answers(again, pictures, num_inference_steps=3), answers(pipe, pictures, num_inference_steps=3)
    )


def test_a_latent_is_not_clipped_as_stable_diffusion_pipeline_does_not(folders, pictures, tmp_path):
    """A scheduler's config need not name what its own class does not know, or has another default for."""
    folder = shutil.copytree(folders / "sd", tmp_path / "sd")
    config = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True}
    config |= {"beta_start": 0.00085, "beta_end": 0.012}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    blind = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    sd = backbone.load_stable_diffusion(str(folder))
    pndm = PNDMScheduler.from_pretrained(folder / "scheduler")
    theirs = diffusers.StableDiffusionPipeline(**sd._asdict() | {"scheduler": pndm}, **blind)
    ours = diffusers.StableDiffusionPipeline(**sd._asdict(), **blind)
    assert sd.scheduler.config.clip_sample is False and sd.scheduler.config.steps_offset == 1
    drawn = []
    for pipe in (theirs, ours):  # in one step, PNDM's is DDIM's
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
        drawn.append(pipe("a hat", generator=seeded([0])[0], **options).images)
    assert drawn[0].abs().max() > 1
    torch.testing.assert_close(drawn[1], drawn[0], atol=1e-4, rtol=1e-4)


def test_an_answer_is_the_same_alone_and_in_a_batch(pipe, pictures):
    before, after, *queries = pictures
    words, pairs = ["make it night", "add a hat"], [(before, after), None]
    together = answers(pipe, pictures, words, image=queries, prompt_pair=pairs, generator=seeded([3, 4]))
    for k in (0, 1):
        alone = answers(pipe, pictures, words[k], image=queries[k], prompt_pair=pairs[k], seed=3 + k)
        torch.testing.assert_close(alone[0], together[k], atol=1e-4, rtol=1e-4)
    for_all = answers(pipe, pictures, [*words, "hat"], generator=seeded([0, 1, 2]))
    assert for_all.shape == (3, 3, P, P)


def test_output_types_agree(pipe, pictures):
    pt, images, latents = (answers(pipe, pictures, output_type=kind) for kind in ("pt", "pil", "latent"))
    assert pt.min() >= 0 and pt.max() <= 1 and pt.shape == (1, 3, P, P) and latents.shape == (1, 4, 8, 8)
    assert images[0].size == (P, P // 2)  # the query's aspect ratio
    _, box = fit_panel(pictures[2], P)
    assert images[0].tobytes() == tensor_to_image(unfit(2 * pt[0] - 1, box)).tobytes()
    torch.testing.assert_close(pipe.decode_answers(latents), 2 * pt - 1, atol=1e-6, rtol=1e-6)


def test_a_picture_is_seen_alike_as_a_file_and_as_an_image(pipe, pictures, tmp_path):
    """And so are those of all kinds by `fit_panel`: see `seen` in test_dataset.py."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[2].save(tmp_path / "exif.jpg", exif=exif)
    opened = Image.open(tmp_path / "exif.jpg")
    assert torch.equal(*(answers(pipe, pictures, image=one) for one in (opened, load_image(opened.filename))))
    assert opened.getexif()[0x0112] == 6  # the user's own stays as it is


def test_generators_decide(pipe, pictures):
    first = answers(pipe, pictures)
    assert torch.equal(first, answers(pipe, pictures)) and apart(first, answers(pipe, pictures, seed=1)) > 0
    torch.manual_seed(5)
    free = answers(pipe, pictures, generator=None)
    assert apart(free, answers(pipe, pictures, generator=None)) > 0


def test_callbacks(pipe, pictures):
    seen = []

    def look(pipeline, i, t, tensors):
        assert pipeline is pipe and set(tensors) == {"latents", "pred_original_sample"}
        assert tensors["latents"].shape == tensors["pred_original_sample"].shape == (1, 4, 8, 8)
        seen.append((i, int(t)))
        return tensors

    wanted = answers(pipe, pictures)
    watched = answers(pipe, pictures, callback_on_step_end=look)
    assert torch.equal(watched, wanted) and [i for i, _ in seen] == [0, 1]
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))

    def zero(pipeline, i, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else None

    nothing = answers(pipe, pictures, callback_on_step_end=zero, output_type="latent")
    assert nothing.abs().max() == 0


def test_a_callback_can_stop_it(pipe, pictures):
    count = []

    def stop(pipeline, i, t, tensors):
        count.append(i)
        pipeline._interrupt = True
        return tensors

    answers(pipe, pictures, num_inference_steps=5, callback_on_step_end=stop)
    assert count == [0]
    answers(pipe, pictures, callback_on_step_end=lambda pipeline, i, t, tensors: count.append(i))
    assert count == [0, 0, 1]  # the next edit is whole


def test_schedulers_are_swapped_as_usual(pipe, pictures):
    """All that diffusers holds compatible; its own check of them asks for no more than pictures."""
    config, drawn = pipe.scheduler.config, {}
    for kind in pipe.scheduler.compatibles:
        if kind.__name__ != "DPMSolverSDEScheduler":  # needs a library of its own
            pipe.scheduler = kind.from_config(config)
            drawn[kind.__name__] = answers(pipe, pictures, num_inference_steps=4)
            assert pipe.config.scheduler == ("diffusers", kind.__name__)
    assert set(backbone.SAMPLERS.values()) <= set(drawn) and len(drawn) >= 12
    assert all(found.isfinite().all() for found in drawn.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folders, pipe, pictures, dtype):
    half, moved = load(folders / "editor", torch_dtype=dtype), load(folders / "editor").to(dtype)
    assert {p.dtype for part in (half, moved) for p in part.rcldm.parameters()} == {dtype}
    wanted, found, again = (answers(one, pictures) for one in (pipe, half, moved))
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.05 and (again - found).abs().mean() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("way", ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_on_a_gpu_whole_and_offloaded(folders, pictures, way):
    wanted = answers(load(folders / "editor"), pictures)
    pipe = load(folders / "editor")
    pipe.to("cuda") if way == "to" else getattr(pipe, way)()
    for _ in range(2):
        found = answers(pipe, pictures).cpu()
        torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)


def test_offloading_draws_the_same(folders, pictures):
    """The hooks at work, though from the CPU to itself; twice, as they have to be set again."""
    pipe = load(folders / "editor")
    wanted = answers(pipe, pictures)
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.vae, "_hf_hook") and not hasattr(pipe.rcldm, "_hf_hook")
    for _ in range(2):
        torch.testing.assert_close(answers(pipe, pictures), wanted, atol=1e-5, rtol=1e-5)


BY_GROUPS = [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}]


@pytest.mark.usefixtures("nan_until_written")
@pytest.mark.parametrize("how", BY_GROUPS)
def test_offloaded_in_groups_it_draws_the_same(folders, pictures, how, tmp_path):
    pipe = load(folders / "editor")
    wanted = answers(pipe, pictures)
    pipe.enable_group_offload(torch.device("cpu"), **how, offload_to_disk_path=str(tmp_path))
    assert all(p.isnan().all() for p in [*pipe.rcldm.parameters(), *pipe.unet.parameters()])
    for _ in range(2):
        torch.testing.assert_close(answers(pipe, pictures), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("how", BY_GROUPS)
def test_on_a_gpu_offloaded_in_groups(folders, pictures, how, use_stream):
    wanted = answers(load(folders / "editor"), pictures)
    pipe = load(folders / "editor")
    pipe.enable_group_offload(torch.device("cuda"), **how, use_stream=use_stream)
    for _ in range(2):
        torch.testing.assert_close(answers(pipe, pictures).cpu(), wanted, atol=1e-2, rtol=1e-2)


def test_the_progress_bar_can_be_set(pipe, pictures, capsys):
    pipe.set_progress_bar_config(disable=False, desc="editing")
    answers(pipe, pictures)
    assert "editing: 100%" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    answers(pipe, pictures)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------- instructions longer than what is read

LONG = "make it night and add a hat and remove the dog and "


def words_that_fit(pipe):
    """As many words of `LONG`, over and over, as the text encoder reads."""
    words = (LONG * 9).split()
    lengths = [len(pipe.tokenizer(" ".join(words[:n])).input_ids) for n in range(len(words))]
    return words[: max(n for n, length in enumerate(lengths) if length <= pipe.tokenizer.model_max_length)]


def test_what_is_cut_off_is_what_no_embedding_knows_of(pipe):
    fits = " ".join(words_that_fit(pipe))
    assert backbone.cut_off(pipe.tokenizer, []) == backbone.cut_off(pipe.tokenizer, ["", fits]) == {}
    longer = f"{fits}\nZoë  &  all"
    ((text, line),) = backbone.cut_off(pipe.tokenizer, ["", fits, longer, longer]).items()
    assert text == longer and line.startswith("the text encoder reads 16 tokens") and "\n" not in line
    end = line.split("cut off: ")[1].strip('"')
    assert end and "Zoë & all".endswith(end)
    states = backbone.encode_text(
        pipe, [longer, longer.removesuffix("& all") + "and a moustache", fits[:-1] + "x"]
    )
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_cut_instruction_is_logged_once(pipe, pictures, caplog):
    told = [" ".join([*words_that_fit(pipe), "blue", f"hat{k}"]) for k in (1, 2)]
    for _ in range(2):
        answers(pipe, pictures, told, guidance_scale=2.0)
    ends = [record.message.split()[-1] for record in caplog.records if record.name == "apps.pipeline"]
    assert ends == ['hat1"', 'hat2"']
    answers(pipe, pictures, "make it night", guidance_scale=2.0)
    assert sum(record.name == "apps.pipeline" for record in caplog.records) == 2


def test_the_users_words_that_no_reply_replaces_may_be_cut(pipe, pictures, caplog, monkeypatch):
    monkeypatch.setattr(liu.InstructionUnifier, "_generate", lambda self, texts: [""] * len(texts))
    stand_ins = {"llm": pipe.text_encoder, "llm_tokenizer": pipe.tokenizer}
    told = InstructGIEPipeline(**pipe.components | stand_ins, panel=P)
    with pytest.warns(UserWarning, match="used as it stands"):
        answers(told, pictures, " ".join([*words_that_fit(pipe), "green", "hat"]))
    assert 'cut off: "green hat"' in caplog.text


def test_training_tells_how_many_instructions_are_cut(pipe, capsys):
    fits = " ".join(words_that_fit(pipe))
    told = ["night", fits, f"{fits} red", f"{fits} red hat", f"{fits} red"]
    data = SimpleNamespace(pairs=[SimpleNamespace(instruction=text) for text in told])
    precompute.read_instructions(data, pipe, unifier=None)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("2 instructions are too long; of the first, ") and line.endswith('cut off: "red"')


def test_the_command_prints_where_it_cuts_in_a_line(pipe, folders, pictures, tmp_path, monkeypatch, capsys):
    pictures[2].save(tmp_path / "x.png")
    told = " ".join([*words_that_fit(pipe), "and", "blue"])
    command = ["edit.py", "--model", folders / "editor", "--instruction", told, "--device", "cpu"]
    command += ["--input", tmp_path / "x.png", "--output", tmp_path / "y.png"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    edit.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if "cut off" in line]
    assert lines == ['the text encoder reads 16 tokens of an instruction; cut off: "and blue"']


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prompt": ["a", "b"], "image": [None] * 3}, "have 2, 3, 1 entries: give one or equally many"),
        ({"prompt": "", "prompt_pair": None}, "nothing says which edit"),
        ({"prompt": None, "prompt_pair": None}, "nothing says which edit"),
        ({"prompt": ["a", " "], "prompt_pair": None}, "of 2, edit 2: nothing says which edit"),
        ({"output_type": "jpg"}, "output_type"),
        ({"num_inference_steps": 0}, "1 … 1000"),
        (
            {"num_inference_steps": 1000},
            "1000 steps are more than this sampler has timesteps for: take fewer",
        ),
        ({"generator": [torch.Generator()] * 2}, "2 generators, where there are 1 answers"),
    ],
)
def test_a_wrong_call_is_told(pipe, pictures, wrong, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, pictures, **wrong)


def test_a_broken_folder_is_one_error(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(backbone.BackboneError, match="not an InstructGIE pipeline's folder"):
        load(folder)


def test_the_card_tells_licence_and_numbers():
    settings = {
        "stable_diffusion": backbone.preset("sd15").stable_diffusion,
        "panel": 256,
        "batch": 32,
        "accumulate": 2,
    }
    settings |= {"trained_steps": 9, "data": "d", **dict.fromkeys(("no_rcldm", "no_esm", "no_liu", "no_sam"))}
    settings["no_esm"] = True
    card = model_card(settings, {"dm": 0.12345})
    assert "license: creativeml-openrail-m" in card and "base_model: stable-diffusion-v1-5/" in card
    assert "a process took 64 grids" in card and "without ESM" in card and "| dm | 0.1235 |" in card
    assert "long side of an answer has 256 pixels" in card
    toy = model_card(settings | {"stable_diffusion": backbone.preset("toy").stable_diffusion}, {})
    assert "license: mit" in toy and "base_model" not in toy


@pytest.mark.slow
def test_compiled_it_draws_the_same(folders, edits):
    editor = load(folders / "editor")
    plain = draw(editor, edits)
    editor.unet.compile()
    editor.rcldm.compile()
    assert apart(draw(editor, edits), plain) < 1e-3
