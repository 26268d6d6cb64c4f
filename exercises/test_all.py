"""The tests of the fourteen exercises; `pytest exercises -k 05 -s` prints what those of one measure.

Each takes the module that it tests as its argument, see conftest.py; with `--answers`, it is the answer.
"""

import math
import random
from functools import cache
from itertools import permutations
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch.testing import assert_close

import backbone
import esm
import sam_loss
from apps.pipeline import InstructGIEPipeline
from dataset import compose_grid, mask_query
from liu import InstructionUnifier
from pictures import image_to_tensor
from rcldm import RCLDM, cross_scan, selective_scan
from toy import world


@cache
def stable_diffusion():
    return backbone.load_stable_diffusion("toy/weights/stable-diffusion")


def tensor(scene):
    """A scene's picture (1, 3, P, P) in [-1, 1]."""
    return image_to_tensor(world.render(scene))[None]


def scenes(seed, count, *edits):
    """Scenes of which all these edits can be made."""
    rng, found = random.Random(seed), []
    for _ in range(10_000):
        scene = world.random_scene(rng)
        found += [scene] * all(edit.apply(scene) is not None for edit in edits)
        if len(found) == count:
            break
    assert len(found) == count, f"no scene allows {edits}: does the rule return the edited scene?"
    return found


# --- 01 The visual prompt -----------------------------------------------------------------------------------


def test_01_the_condition_is_the_grid_without_its_answer(exercise):
    before, after, query = panels = torch.rand(3, 2, 5, 3, 6, 6) * 2 - 1
    untouched = panels.clone()
    grid = exercise.condition(before, after, query)
    assert grid.shape == (2, 5, 3, 12, 12)
    assert torch.equal(grid[..., :6, :], torch.cat([before, after], -1)), "the example's row"
    assert torch.equal(grid[..., 6:, :6], query), "the query"
    assert (grid[..., 6:, 6:] == 0).all(), "grey is halfway between black, -1, and white, 1"
    assert torch.equal(panels, untouched), "the panels that came in were changed"


def test_01_the_answer_is_cut_out(exercise):
    panels = torch.rand(4, 2, 16, 8, 8)  # latents
    grid = compose_grid(*panels)
    assert torch.equal(exercise.answer(grid), panels[3])
    assert torch.equal(exercise.answer(grid[0]), panels[3, 0]), "a single grid, without a batch"


# --- 02 What a noise prediction says of the picture ---------------------------------------------------------


def test_02_the_true_noise_gives_the_true_latent(exercise):
    clean, noise = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)  # B = W: a wrong axis of ᾱ shows
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.01], dtype=torch.float64)
    signal, sigma = (x.sqrt().view(4, 1, 1, 1) for x in (alpha_bar, 1 - alpha_bar))
    assert_close(exercise.predict_x0(signal * clean + sigma * noise, noise, alpha_bar), clean)


def test_02_it_is_what_esm_computes(exercise):
    scheduler, t = DDIMScheduler(), torch.tensor([10, 500, 900])
    noisy, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = exercise.predict_x0(noisy, noise, scheduler.alphas_cumprod[t])
    assert_close(ours, esm.predict_x0(noisy, noise, t, scheduler), atol=1e-4, rtol=1e-4)


def test_02_how_much_an_error_grows(exercise):
    alpha_bar = torch.tensor([0.95, 0.5, 0.2, 0.02], dtype=torch.float64)
    gain = exercise.error_gain(alpha_bar)
    noisy, noise, error = torch.randn(3, 4, 3, 4, 4, dtype=torch.float64)
    off = exercise.predict_x0(noisy, noise + error, alpha_bar) - exercise.predict_x0(noisy, noise, alpha_bar)
    assert_close(gain, off.flatten(1).norm(dim=1) / error.flatten(1).norm(dim=1))


# --- 03 Guidance by words and by example --------------------------------------------------------------------

BRANCHES = (False, False), (False, True), (True, True)


def test_03_the_weighted_sum_is_the_formula(exercise):
    for s_text, s_visual in ((1, 1), (1.5, 1), (1.5, 1.5), (7.5, 1.5), (0, 2), (0, 0)):
        weights = exercise.branch_weights(s_text, s_visual)
        assert set(weights) <= set(BRANCHES) and 0 not in weights.values()
        assert sum(weights.values()) == pytest.approx(1)
        none, pair, both = torch.randn(3, 2, 4, 8, 8)
        predictions = {branch: e for branch, e in zip(BRANCHES, (none, pair, both)) if branch in weights}
        guided = none + s_visual * (pair - none) + s_text * (both - pair)
        assert_close(exercise.guide(weights, predictions), guided, rtol=1e-4, atol=1e-5)


def test_03_no_pass_is_for_nothing(exercise):
    passes = {
        1: [(0, 0), (0, 1), (1, 1)],
        2: [(1.5, 1), (0, 1.5), (1.5, 1.5)],
        3: [(1, 1.5), (1, 0), (7.5, 1.5)],
    }
    for count, scales in passes.items():
        assert [len(exercise.branch_weights(*both)) for both in scales] == [count] * 3


# --- 04 A picture as four sequences -------------------------------------------------------------------------


def test_04_the_four_orders(exercise):
    x = torch.randn(2, 3, 4, 5)
    assert_close(exercise.cross_scan(x), cross_scan(x))


def test_04_the_merge_is_the_adjoint(exercise):
    x, ys = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 4, 3, 20).double()
    merged = exercise.cross_merge(ys, 4, 5)
    assert merged.shape == x.shape
    assert_close((exercise.cross_scan(x) * ys).sum(), (x * merged).sum())
    assert_close(exercise.cross_merge(exercise.cross_scan(x), 4, 5), 4 * x)


def test_04_how_far_twins_lie_apart(exercise):
    assert exercise.steps((0, 1), (1, 2), 2, 3) == [4, 3, -4, -3]
    assert exercise.steps((1, 2), (0, 1), 2, 3) == [-4, -3, 4, 3]
    p, (y, x) = 8, (3, 5)
    query, answer, after = (p + y, x), (p + y, p + x), (y, p + x)
    for name, pixels in (("query → answer", (query, answer)), ("example after → answer", (after, answer))):
        apart = exercise.steps(*pixels, 2 * p, 2 * p)
        print(f"{name}: {apart} steps")
        assert sorted(map(abs, apart)) == [8, 8, 128, 128]


# --- 05 The selective scan ----------------------------------------------------------------------------------


def scan_inputs(batch=2, channels=5, state=3, length=17, seed=0):
    """u, delta, A, B, C, D of a scan, in float64, that require gradients."""
    g = torch.Generator().manual_seed(seed)
    u, delta = torch.randn(2, batch, channels, length, generator=g, dtype=torch.float64)
    B, C = torch.randn(2, batch, state, length, generator=g, dtype=torch.float64)
    A = -3 * torch.rand(channels, state, generator=g, dtype=torch.float64)
    D = torch.randn(channels, generator=g, dtype=torch.float64)
    return [w.requires_grad_() for w in (u, delta.exp().detach(), A, B, C, D)]


def test_05_it_is_the_specification(exercise):
    inputs = [w.detach() for w in scan_inputs()]
    assert_close(exercise.scan(*inputs), selective_scan(*inputs, backend="reference"))


def test_05_one_step_is_a_gate_and_a_direct_path(exercise):
    inputs = [w.detach() for w in scan_inputs(length=1)]
    u, delta, _, B, C, D = inputs
    assert_close(exercise.scan(*inputs), delta * u * (B * C).sum(1, keepdim=True) + D[:, None] * u)


def test_05_half_of_an_impulse_is_left_after_its_half_life(exercise):
    step, rate = math.log(2) / 16, 2.0
    ones = torch.ones(1, 1, 20)
    u = torch.zeros(1, 1, 20)
    u[..., 0] = 1
    y = exercise.scan(u, step * ones, torch.tensor([[-rate]]), ones, ones, torch.zeros(1))[0, 0]
    half = exercise.half_life(step, rate)
    assert half == pytest.approx(8)
    assert y[round(half)] / y[0] == pytest.approx(0.5, rel=1e-5)
    ends = [exercise.half_life(step, 1) for step in (0.1, 0.001)]
    print(f"half is forgotten after {ends[0]:.0f} … {ends[1]:.0f} pixels")
    assert ends == pytest.approx([6.93, 693], rel=1e-3)


# --- 06 Why the links start at zero -------------------------------------------------------------------------


@cache
def grid_of_noise():
    """A grid of scenes: its latents, those with noise, their timestep, no text, and the condition."""
    edit, sd = world.Edit("invert"), stable_diffusion()
    panels = torch.cat([tensor(s) for scene in scenes(0, 2, edit) for s in (scene, edit.apply(scene))])
    clean = compose_grid(*backbone.encode_images(sd.vae, panels))[None]
    noise, t = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([100])
    noisy, text = sd.scheduler.add_noise(clean, noise, t), backbone.encode_text(sd, [""])
    return clean, noisy, 100, text, mask_query(compose_grid(*panels))[None]


def untrained():
    torch.manual_seed(0)
    return RCLDM.from_unet(stable_diffusion().unet)


def test_06_with_the_zero_no_bit_changes(exercise):
    _, noisy, t, text, grid = grid_of_noise()
    with torch.no_grad():
        output = exercise.steered(stable_diffusion().unet, untrained(), noisy, t, text, grid)
        assert torch.equal(output, stable_diffusion().unet(noisy, t, text).sample)


def test_06_without_it_the_picture_is_ruined(exercise):
    (clean, *inputs), unet = grid_of_noise(), stable_diffusion().unet
    errors = []
    for deviation in (0, 0.01, 0.1, 0.3):
        rcldm = untrained()
        before = {name: weight.clone() for name, weight in rcldm.state_dict().items()}
        exercise.break_zero(rcldm, deviation)
        changed = {n: w for n, w in rcldm.state_dict().items() if not torch.equal(w, before[n])}
        links = {n for n in before if n.startswith("trainable_copy.") and n.endswith("zero_proj.weight")}
        assert set(changed) == (links if deviation else set()), "the links' weights alone are to change"
        for weight in changed.values():  # normal noise: its mean is 0, and some of it is large
            assert 0.9 < weight.std() / deviation < 1.1 and weight.mean().abs() < deviation / 10
            assert weight.abs().max() > 2 * deviation
        with torch.no_grad():
            output = exercise.steered(unet, rcldm, *inputs)
            down, middle = rcldm(*inputs, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            assert_close(output, unet(*inputs[:3], **residuals).sample)
        errors.append((output - clean).square().mean().item())
        print(f"noise of {deviation:4} in the projections: x̂_0 is off by {errors[-1]:.3f} (mean square)")
    assert errors[-1] > 10 * errors[0]


def test_06_who_learns_at_the_first_step(exercise):
    (clean, *inputs), unet = grid_of_noise(), stable_diffusion().unet
    for deviation in (0, 0.1):
        rcldm = untrained()
        exercise.break_zero(rcldm, deviation)
        (exercise.steered(unet, rcldm, *inputs) - clean).square().mean().backward()
        names, learners = {name for name, _ in rcldm.named_parameters()}, exercise.learners(rcldm)
        print(f"noise of {deviation} in the projections: {len(learners)} of {len(names)} parameters learn")
        copy = {name for name in names if name.startswith("trainable_copy.")}
        entry = {"prompt_encoder.zero_proj.weight", "prompt_encoder.zero_proj.bias"}  # a zero of its own
        assert learners == (copy | entry if deviation else {n for n in copy if "zero_proj" in n})


# --- 07 What a cosine does not see --------------------------------------------------------------------------


def test_07_both_losses_on_shifts_of_known_angle_and_length(exercise):
    true = torch.tensor([[0.6, 0.8, 0.0]]).expand(6, 3)
    turned = torch.tensor([[-0.8, 0.6, 0.0]])  # at a right angle
    shift = torch.cat([true[:1], 0.5 * true[:1], 10 * true[:1], turned, -true[:1], 0 * turned])
    assert_close(exercise.cosine_loss(shift, true), torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 1.0]))
    expected = torch.tensor([0.0, 0.2, 81 / 101, 1.0, 2.0, 1.0])
    assert_close(exercise.relative_loss(shift, true, eps=0), expected)
    small = exercise.relative_loss(0.01 * shift, 0.01 * true, eps=0)
    assert_close(small, expected, msg="it must not matter how large an edit is")
    assert torch.all(exercise.relative_loss(0.01 * shift, 0.01 * true)[3:] < 0.5), "eps for the smallest"


def test_07_the_cosine_is_deceived(exercise):
    true = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    shift = exercise.deceptive(true)
    assert shift.shape == true.shape
    assert (exercise.cosine_loss(shift, true) < 0.001).all()
    assert (exercise.relative_loss(shift, true) > 0.9).all()


def test_07_a_picture_left_alone_is_told_where_to_go(exercise):
    true = torch.tensor([[0.3, -0.4]])
    for name, loss in (("cosine", exercise.cosine_loss), ("relative", exercise.relative_loss)):
        shift = torch.zeros(1, 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(shift, true).sum(), shift)
        print(f"no edit: the gradient of the {name} loss has length {gradient.norm():.3g}")
    assert_close(-gradient / gradient.norm(), true / true.norm())
    assert gradient.norm() < 10


def test_07_an_edit_made_in_part(exercise):
    edit, clip = world.Edit("night"), backbone.load_clip("toy/weights/clip")
    found = scenes(1, 8, edit)
    before = torch.cat([tensor(scene) for scene in found])
    after = torch.cat([tensor(edit.apply(scene)) for scene in found])
    true = esm.editing_shift(clip, before, after)
    for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
        part = torch.lerp(before, after, share)
        shift = esm.editing_shift(clip, before, part)
        cosine = exercise.cosine_loss(shift, true).mean()
        relative = exercise.relative_loss(shift, true).mean()
        print(f"edit made to {share:4.0%}: cosine loss {cosine:z.2f}, relative loss {relative:.2f}")
        assert_close(relative, esm.editing_shift_loss(clip, before, part, after))
        assert relative > 1.2 * cosine or share in (0, 1)


# --- 08 A loss that looks at the face -----------------------------------------------------------------------


def test_08_a_place_counts_by_its_share(exercise):
    area = torch.zeros(1, 1, 8, 8)
    area[..., :2, :3] = 1
    expected = torch.zeros(1, 1, 4, 4)
    expected[..., 0, 0], expected[..., 0, 1] = 1, 0.5
    assert_close(exercise.latent_area(area, 4), expected)


def masked_batch():
    g = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 4, 4, 8, 8, generator=g)
    area = torch.zeros(4, 1, 32, 32)
    area[0, :, 8:14, 8:16] = 1  # 1.5 by 2 places
    area[1, :, :24, :24] = 1  # a larger one; sample 2 has none
    area[3, :, 8:10, 8:11] = 1  # less than one place
    return predicted.requires_grad_(), target, area


def test_08_it_is_the_loss_of_the_project(exercise):
    predicted, target, area = masked_batch()
    ours = exercise.selective_area_loss(predicted, target, area)
    assert ours.shape == ()
    assert_close(ours, sam_loss.selective_area_loss(predicted, target, area))


def test_08_gradients_stay_inside(exercise):
    predicted, target, area = masked_batch()
    (gradient,) = torch.autograd.grad(exercise.selective_area_loss(predicted, target, area), predicted)
    inside = exercise.latent_area(area, 8).expand_as(gradient) > 0
    assert (gradient[~inside] == 0).all() and (gradient[inside] != 0).all()


def test_08_a_small_face_weighs_as_much_as_a_large_one(exercise):
    target, area = torch.zeros(1, 4, 8, 8), torch.zeros(1, 1, 8, 8)
    losses = []
    for side in (2, 6):
        area[..., :side, :side] = 1
        losses.append(exercise.selective_area_loss(target + 3, target, area).item())
    assert losses == pytest.approx([9, 9])


def test_08_no_face_no_loss_and_no_nan(exercise):
    predicted, target = torch.randn(2, 2, 4, 8, 8)
    predicted.requires_grad_()
    loss = exercise.selective_area_loss(predicted, target, torch.zeros(2, 1, 16, 16))
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert loss == 0 and (gradient == 0).all()


def two_mouths():
    """Eight faces: latents with a smile, latents with a frown, and where the faces are, in pixels."""
    smile, frown = world.Edit("smile", "face"), world.Edit("frown", "face")
    found = scenes(2, 8, smile, frown)
    right, wrong = (torch.cat([tensor(edit.apply(scene)) for scene in found]) for edit in (smile, frown))
    classes = np.stack([world.render_classes(smile.apply(scene)) for scene in found])
    area = torch.from_numpy(classes == world.CLASSES.index("face"))[:, None].float()
    return *(backbone.encode_images(stable_diffusion().vae, x) for x in (right, wrong)), area


def test_08_a_wrong_mouth(exercise):
    target, predicted, area = two_mouths()
    face, panel = exercise.selective_area_loss(predicted, target, area), (predicted - target).square().mean()
    print(f"the face covers {area.mean():.1%} of the panel; L {face:.4f}, mean over the panel {panel:.4f}")
    print(f"the loss is {face / panel:.1f} times as large; 1 / share is {1 / area.mean():.1f}")
    assert_close(face, sam_loss.selective_area_loss(predicted, target, area))
    assert face > 3 * panel


# --- 09 Is one command one form? ----------------------------------------------------------------------------

GROUPS = [["night!", "make it night", "night please", "at night"], ["a hat!", "add a hat"], ["add a cat"]]
FORMS = dict.fromkeys(GROUPS[0], "make it night") | dict.fromkeys(GROUPS[1], "add a hat")


def measures(exercise, unify, groups=GROUPS):
    return tuple(m(unify, groups) for m in (exercise.consistency, exercise.distinctness, exercise.stability))


def test_09_a_bad_unifier_is_noticed(exercise):
    def table(forms):
        return lambda texts: [forms.get(text, text) for text in texts]

    for name, unify, marks in (
        ("a good one", table(FORMS), (1, 1, 1)),
        ("the identity", table({}), (3 / 7, 1, 1)),
        ("a hasty one", table(FORMS | {"night!": "make it day", "at night": "add a hat"}), (5 / 7, 1, 1)),
        ("one that takes a cat for a hat", table(FORMS | {"add a cat": "add a hat"}), (1, 1 / 3, 1)),
        ("a constant", lambda texts: ["make it night"] * len(texts), (1, 0, 1)),
        ("one too polite", lambda texts: [f"please {FORMS.get(text, text)}" for text in texts], (1, 1, 0)),
    ):
        assert measures(exercise, unify) == pytest.approx(marks), name

    groups = [[*GROUPS[0], "by night"], GROUPS[1]]
    twice = dict.fromkeys(("night please", "at night"), "do night")
    unify = table(FORMS | twice | {"do night": "make it night", "by night": "make it night"})
    name = "a form that does not stay, of two wordings and not the commonest"
    assert measures(exercise, unify, groups) == pytest.approx((5 / 7, 1, 5 / 7)), name


def test_09_the_toy_language_model(exercise):
    unify = InstructionUnifier(*backbone.load_llm("toy/weights/llm")).unify
    rng, groups = random.Random(0), []
    for name, family in world.FAMILIES.items():
        edit = world.Edit(name, *rng.choice(family.arguments))
        groups.append([edit.worded(saying) for saying in family.held_out_sayings] + [edit.instruction])
    marks = measures(exercise, unify, groups)
    print(f"{sum(map(len, groups))} wordings of {len(groups)} edits:", end=" ")
    print("consistency {:.2f}, distinctness {:.2f}, stability {:.2f}".format(*marks))
    for wording, form in zip(groups[0], unify(groups[0])):
        print(f"    {wording!r} → {form!r}")
    assert all(0.5 < mark <= 1 for mark in marks)


# --- 10 The scan's gradient, by hand ------------------------------------------------------------------------


def test_10_it_is_what_autograd_finds(exercise):
    for length in (1, 2, 19):
        inputs = scan_inputs(batch=3, length=length, seed=length)
        y = selective_scan(*inputs, backend="reference")
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ours = exercise.scan_backward(dy, *[w.detach() for w in inputs])
        theirs = torch.autograd.grad(y, inputs, dy)
        for name, one, other in zip(("u", "delta", "A", "B", "C", "D"), ours, theirs):
            assert one.shape == other.shape, name
            assert torch.allclose(one, other), f"length {length}: the gradient by {name} is another"


# --- 11 An edit of your own ---------------------------------------------------------------------------------


def scene(*things, background="white"):
    places = list(world.PLACES)
    return world.Scene(background, tuple(world.Thing(*t, places[i]) for i, t in enumerate(things)))


def test_11_the_rule_changes_one_colour(exercise):
    def pair(circle, star):
        return scene(("circle", circle), ("star", star), ("face", "tan"))

    before = pair("red", "blue")
    assert exercise.rule(before, "circle", "star") == pair("blue", "blue")
    assert exercise.rule(before, "star", "circle") == pair("red", "red")
    assert before == pair("red", "blue")
    assert exercise.rule(before, "circle", "heart") is None and exercise.rule(before, "heart", "star") is None


def test_11_every_edit_has_words_of_its_own(exercise):
    family = exercise.family()
    assert set(family.arguments) == set(permutations(world.SHAPES, 2)) and len(family.arguments) == 30
    templates = family.canonical, *family.sayings
    assert len(set(templates)) == len(templates) >= 6
    assert all("{target}" in text and "{value}" in text for text in templates)
    theirs = {edit.instruction for edit in world.every_edit()}
    with patch.dict(world.FAMILIES, {"borrow": family}):
        ours = [world.Edit("borrow", *arguments).instruction for arguments in family.arguments]
    assert len(set(ours)) == 30 and not theirs & set(ours), "an instruction must mean one edit"


def test_11_a_difference_is_one_of_any_channel_and_of_any_sign(exercise):
    one, other = np.zeros((2, 2, 5, 3), np.uint8)
    one[0, :, 1], other[0, :, 1] = (0, 255, 8, 0, 9), (255, 0, 0, 9, 0)
    expected = [[True, True, False, True, True], [False] * 5]
    found = exercise.changed(Image.fromarray(one), Image.fromarray(other))
    assert found.dtype == bool and found.tolist() == expected


def test_11_pairs_differ_in_the_target_and_nowhere_else(exercise):
    with patch.dict(world.FAMILIES, {"borrow": exercise.family()}):
        for target, value in (("circle", "star"), ("heart", "square"), ("cross", "triangle")):
            edit = world.Edit("borrow", target, value)
            for before in scenes(target, 4, edit):
                after = edit.apply(before)
                assert edit.apply(after) is None, "done twice, it would change nothing"
                assert before.caption() != after.caption()
                found = exercise.changed(world.render(before), world.render(after))
                shape = world.render_classes(before) == world.CLASSES.index(target)
                assert not found[~shape].any(), "a change outside of the target"
                assert found.sum() > 0.8 * shape.sum(), "the target has hardly changed"


# --- 12 The wrong example -----------------------------------------------------------------------------------

STRIPES = world.Edit("stripes", "", "red horizontal")
INVERT, NIGHT = world.Edit("invert"), world.Edit("night")
WHITE, NAVY, MEADOW = (world.Edit("background", "", name) for name in ("white", "navy", "meadow"))


def test_12_verdicts(exercise):
    query = scene(("circle", "red"), ("star", "blue"), background="desert")
    answers = {
        "nothing": query,
        "shown": STRIPES.apply(query),
        "told": INVERT.apply(query),
        "both": INVERT.apply(STRIPES.apply(query)),
    }
    noise = np.random.default_rng(0).integers(-9, 10, (64, 64, 3))
    for expected, after in answers.items():
        picture = world.render(after)
        assert exercise.verdict(picture, query, STRIPES, INVERT) == (expected, 0)
        pixels = np.asarray(picture).astype(int)
        rough = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
        name, distance = exercise.verdict(rough, query, STRIPES, INVERT)
        assert name == expected
        assert distance == pytest.approx(np.abs(np.asarray(rough).astype(int) - pixels).mean())


def test_12_verdicts_where_edits_cannot_be_made_or_agree(exercise):
    query = scene(("circle", "red"), background="navy")
    assert exercise.verdict(world.render(query), query, NAVY, NAVY) == ("nothing", 0)
    assert exercise.verdict(world.render(STRIPES.apply(query)), query, STRIPES, STRIPES) == ("shown", 0)
    assert exercise.verdict(world.render(MEADOW.apply(query)), query, NAVY, MEADOW) == ("told", 0)


class Listener:
    """In place of a pipeline: makes the edit that the example shows of the queries, or that of the words."""

    def __init__(self, known, edits, to_words):
        self.known, self.edits, self.to_words = known, edits, to_words

    def scene(self, picture):
        shown = [scene for scene in self.known if world.render(scene).tobytes() == picture.tobytes()]
        assert shown, "neither the example before its edit nor a query"
        return shown[0]

    def __call__(self, prompt, image, prompt_pair, num_inference_steps, generator):
        once = isinstance(prompt, str) and isinstance(prompt_pair, tuple)
        assert once, "the words and the pair are given once, and hold for all queries"
        assert isinstance(generator, torch.Generator), "one generator, of seed 0, for all queries"
        assert num_inference_steps == 7 and generator.initial_seed() == 0
        before, after = prompt_pair
        example = self.scene(before)
        assert example not in map(self.scene, image), "the example needs a scene of its own"
        told = {edit.instruction: edit for edit in self.edits}
        shown = {world.render(edit.apply(example)).tobytes(): edit for edit in self.edits}
        assert after.tobytes() in shown, "no edit of the example"
        edit = told[prompt] if self.to_words else shown[after.tobytes()]
        self.images = [world.render(edit.apply(self.scene(picture))) for picture in image]
        return self


def test_12_the_survey_asks_what_it_should(exercise):
    example, *queries = known = scenes(3, 4, STRIPES, INVERT)
    for to_words, name in ((False, "shown"), (True, "told")):
        pipe = Listener(known, (STRIPES, INVERT), to_words)
        assert exercise.survey(pipe, example, queries, STRIPES, INVERT, steps=7) == [(name, 0)] * 3


def test_12_who_wins(exercise):
    query = scene(("circle", "red"))
    exercise.verdict(world.render(query), query, STRIPES, INVERT)  # before anything is loaded
    pipe = InstructGIEPipeline.from_pretrained("toy/weights/editor")
    pipe.set_progress_bar_config(disable=True)
    for shown, told in ((STRIPES, INVERT), (NIGHT, WHITE), (NAVY, MEADOW)):
        example, *queries = scenes(0, 7, shown, told)
        for words in (shown, told):
            found = exercise.survey(pipe, example, queries, shown, words, steps=10)
            names, distances = zip(*found)
            counts = ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names)))
            print(f"shown {shown.instruction!r}, told {words.instruction!r}:", end=" ")
            print(f"{counts} of {len(names)}; {np.mean(distances):.1f} levels away")
            assert words is told or names.count("shown") >= 5, "where the two agree, it does as it is asked"


# --- 13 One bit of rounding ---------------------------------------------------------------------------------


def exact_step(x_t, x_0, z, now, later, eta):
    """By the formula, in twice the digits."""
    x_t, x_0, z, now, later = (x.double() for x in (x_t, x_0, z, now, later))
    now, later = now.view(-1, 1, 1, 1), later.view(-1, 1, 1, 1)
    noise = (x_t - now.sqrt() * x_0) / (1 - now).sqrt()
    variance = eta**2 * (1 - later) / (1 - now) * (1 - now / later)
    rest = (1 - later - variance).clamp(min=0)  # of the same rounding, 1e-16 of it
    return (later.sqrt() * x_0 + rest.sqrt() * noise + variance.sqrt() * z).float()


def test_13_a_step_is_ddims(exercise):
    g = torch.Generator().manual_seed(0)
    x_t, x_0, z = torch.randn(3, 50, 2, 3, 4, generator=g)
    now, later = torch.rand(50, generator=g) * 0.4, torch.rand(50, generator=g) * 0.5 + 0.45
    for eta in (0.0, 0.6, 1.0):
        assert_close(exercise.step(x_t, x_0, z, now, later, eta), exact_step(x_t, x_0, z, now, later, eta))


def test_13_no_rounding_spoils_it(exercise):
    g = torch.Generator().manual_seed(0)
    x_t, x_0, z = torch.randn(3, 999, 1, 2, 2, generator=g)
    now, later = torch.zeros(999), torch.arange(1, 1000) / 1000
    found = exercise.step(x_t, x_0, z, now, later, 1.0)
    assert found.isfinite().all(), "NaN: a root of what is below zero"
    assert_close(found, exact_step(x_t, x_0, z, now, later, 1.0), atol=2e-3, rtol=0)


def test_13_how_often(exercise):
    later = torch.arange(1, 1000) / 1000
    count = exercise.below_zero(later)
    print(f"below zero: {count} of {len(later)}")
    assert count == ((1 - later) < (1 - later).sqrt().square()).sum() and 0 < count < len(later)
    assert exercise.below_zero(torch.tensor([0.75])) == 0, "the root of a quarter is exact"


# --- 14 The draft that hides a loss -------------------------------------------------------------------------


def apart_by(distances):
    """A draft of zeros, and what is drawn so far from it: (1, 2, 2, 2)."""
    distances = torch.tensor(distances).view(1, 1, 2, 2)
    return torch.zeros(1, 2, 2, 2), torch.cat([distances, -distances], 1)


def test_14_close_places_are_the_drafts(exercise):
    draft, drawn = apart_by([0.1, 0.5, 0.6, 2.0])
    for close, kept in ((0.0, [1, 1, 1, 1]), (0.5, [0, 0, 1, 1]), (3.0, [0, 0, 0, 0])):
        assert_close(exercise.settle(drawn, draft, close), drawn * torch.tensor(kept).view(1, 1, 2, 2))
    drawn[0, 1] = 0  # one channel of two: the root of half the square
    assert_close(exercise.settle(drawn, draft, 0.4)[0, 0].flatten(), torch.tensor([0, 0, 0.6, 2.0]))


def test_14_a_loss_is_heard_where_the_drawing_stands(exercise):
    draft, drawn = apart_by([0.1, 0.5, 0.6, 2.0])
    for close, share in ((0.0, 1), (0.2, 0.75), (0.55, 0.5), (3.0, 0)):
        assert exercise.heard(lambda x: (x - 9).square().sum(), drawn, draft, close) == share
    assert exercise.heard(lambda x: x[:, :, 0, 0].sum(), drawn, draft, 0.05) == 0.25
    assert exercise.heard(lambda x: x[:, 0].sum(), drawn, draft, 0.05) == 1, "one channel of two is enough"


def test_14_what_an_ablation_still_sees(exercise):
    draft, untaught = apart_by([0.1, 0.5, 0.6, 2.0])
    taught, truth = 0.5 * untaught, draft
    errors = torch.tensor([0.1, 0.5, 0.6, 2.0]).square()
    for close in (0.0, 0.55, 1.5, 3.0):
        left = (errors * (errors.sqrt() > close)).sum() - 0.25 * (errors * (errors.sqrt() > 2 * close)).sum()
        expected = (left / (0.75 * errors.sum())).item()
        assert exercise.seen(taught, untaught, truth, draft, close) == pytest.approx(expected, abs=1e-6)


def test_14_wrong_mouths_under_a_draft(exercise):
    truth, frowning, area = two_mouths()
    noise = 0.1 * torch.randn(2, *truth.shape, generator=torch.Generator().manual_seed(0))
    taught, draft = truth + noise[0], truth + noise[1]
    untaught = frowning + noise[0]
    shares = []
    for close in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0):
        face = exercise.heard(
            lambda x: sam_loss.selective_area_loss(x, truth, area), untaught, draft, close
        ) / exercise.heard(lambda x: sam_loss.selective_area_loss(x, truth, area), untaught, draft, 0.0)
        shares.append((face, exercise.seen(taught, untaught, truth, draft, close)))
        print(f"c = {close:4.2f}: L_sam is heard at {face:4.0%} of the face; an ablation sees", end=" ")
        print(f"{shares[-1][1]:4.0%} of the difference")
    assert shares[0] == pytest.approx((1, 1)) and shares[-1] == pytest.approx((0, 0), abs=0.01)
