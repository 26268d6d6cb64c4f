"""exercises/: the answers pass, what is delivered is unwritten, and the likeliest mistakes are caught."""

import dataclasses
import itertools
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from exercises import test_all
from exercises.conftest import load
from toy import world

FOLDER = Path(__file__).resolve().parents[1] / "exercises"
NUMBERS = [f"{k:02d}" for k in range(1, 15)]
TESTS = {name: test for name, test in vars(test_all).items() if re.match(r"test_\d\d_", name)}


@pytest.mark.parametrize("name", TESTS)
def test_the_answer_passes(name):
    TESTS[name](load(name[5:7], answers=True))


@pytest.mark.parametrize("name", TESTS)
def test_as_delivered_it_is_unwritten_and_nothing_else(name):
    with pytest.raises(NotImplementedError):
        TESTS[name](load(name[5:7], answers=False))


@pytest.mark.parametrize("number", NUMBERS)
def test_the_answer_has_what_the_exercise_asks_for(number):
    asked, given = (
        {
            name: function.__annotations__
            for name, function in vars(module).items()
            if getattr(function, "__module__", "") == module.__name__
        }
        for module in (load(number, answers=False), load(number, answers=True))
    )
    assert asked and asked.items() <= given.items()


def test_the_readme_lists_what_there_is():
    row = r"^\| (\d\d) \| \[(.*)\]\((.*)\) \| (.*), (\d+) (min|h) \|"
    rows = re.findall(row, (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert [number for number, *_ in rows] == NUMBERS
    for folder in (FOLDER, FOLDER / "answers"):
        assert {path.name for path in folder.glob("[0-9]*.py")} == {file for _, _, file, *_ in rows}
    for number, title, file, level, time, unit in rows:
        head = (FOLDER / file).read_text().splitlines()[0]
        unit = {"min": "minutes", "h": "hours"}[unit]
        assert re.fullmatch(rf'"""{number} · {re.escape(title)} +{level}, {time} {unit}', head)


@pytest.mark.slow
def test_one_command_tests_one_exercise():
    twice = "import pytest; [pytest.main(['exercises', '-k', '04', *more]) for more in ([], ['--answers'])]"
    done = subprocess.run([sys.executable, "-c", twice], cwd=FOLDER.parent, capture_output=True, text=True)
    assert re.findall(r"^3 (failed|passed)", done.stdout, re.MULTILINE) == ["failed", "passed"], done.stdout


# By exercise, what its answer quotes of the trained weights.
QUOTED = {
    "06": ("14 of 355", "268"),
    "07": ("0.49", "0.89"),
    "08": ("12.1%", "6.5 times"),
    "09": ("consistency 0.80", "distinctness 0.88", "stability 0.96"),
    "12": ("6 of 6", "both 4, nothing 2 of 6", "22.8 levels", "4.1 levels"),
    "14": ("41%", "15%", "93%", "61%"),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", QUOTED)
def test_an_answer_quotes_what_its_test_prints(number, capsys):
    answer = load(number, answers=True)
    for name, test in TESTS.items():
        if name[5:7] == number:
            test(answer)
    texts = capsys.readouterr().out, answer.__doc__
    printed, told = (" ".join(text.split()).replace(" %", "%") for text in texts)
    for quote in QUOTED[number]:
        assert quote in printed and quote in told


# --- Wrong answers: each takes the right module, then what the function takes that it stands in for ---------


def black_for_grey(m, before, after, query):
    grid = m.condition(before, after, query)
    m.answer(grid).fill_(-1)
    return grid


def alpha_along_the_columns(m, noisy, noise, alpha_bar):
    return (noisy - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


def text_alone(m, s_text, s_visual):
    return {(False, False): 1 - s_text, (True, True): s_text}


def a_branch_for_nothing(m, s_text, s_visual):
    return {(False, False): 1 - s_visual, (False, True): s_visual - s_text, (True, True): s_text}


def rows_for_columns(m, x):
    rows = x.flatten(2)
    return torch.stack([rows, rows, rows.flip(-1), rows.flip(-1)], 1)


def mean_for_sum(m, ys, height, width):
    return m.cross_merge(ys, height, width) / 4


def distance_for_steps(m, a, b, height, width):
    return [abs(steps) for steps in m.steps(a, b, height, width)]


def decay_by_euler(m, u, delta, A, B, C, D):
    h, ys = u.new_zeros(len(u), *A.shape), []
    for t in range(u.shape[-1]):
        h = h + delta[..., t, None] * (A * h + u[..., t, None] * B[:, None, :, t])
        ys.append((h * C[:, None, :, t]).sum(-1) + D * u[..., t])
    return torch.stack(ys, -1)


def input_without_its_step(m, u, delta, *rest):
    return m.scan(u / delta, delta, *rest)


def middle_forgotten(m, unet, rcldm, *inputs):
    down, _ = rcldm(*inputs, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": 0}
    return unet(*inputs[:3], **residuals).sample


def every_zero_broken(m, rcldm, deviation):
    m.break_zero(rcldm, deviation)
    torch.nn.init.normal_(rcldm.prompt_encoder.zero_proj.weight, std=deviation)


def gradients_of_zero_too(m, rcldm):
    return {name for name, parameter in rcldm.named_parameters() if parameter.grad is not None}


def plain_distance(m, shift, true_shift, eps=1e-3):
    return (shift - true_shift).square().sum(-1)


def lengths_ignored(m, shift, true_shift, eps=1e-3):
    return m.relative_loss(F.normalize(shift), F.normalize(true_shift), eps)


def nearest_pixel(m, area, side):
    return F.interpolate(area, (side, side))


def mean_over_the_panel(m, predicted, target, area):
    return (m.latent_area(area, predicted.shape[-1]) * (predicted - target).square()).mean()


def mean_over_all_faces(m, predicted, target, area):
    area = m.latent_area(area, predicted.shape[-1])
    return (area * (predicted - target).square().mean(1, True)).sum() / area.sum().clamp_min(1e-6)


def one_place_at_least(m, predicted, target, area):
    area = m.latent_area(area, predicted.shape[-1])
    error = (area * (predicted - target).square().mean(1, True)).sum((1, 2, 3))
    return (error / area.sum((1, 2, 3)).clamp_min(1)).mean()


def forms_counted(m, unify, groups):
    return len({m.commonest(unify(group)) for group in groups}) / len(groups)


def wordings_that_stay(m, unify, groups):
    return np.mean([unify([wording]) == [wording] for group in groups for wording in group])


def each_form_once(m, unify, groups):
    forms = sorted({form for group in groups for form in unify(group)})
    return np.mean([form == again for form, again in zip(forms, unify(forms))])


def commonest_forms_alone(m, unify, groups):
    forms = [m.commonest(unify(group)) for group in groups]
    return np.mean([form == again for form, again in zip(forms, unify(forms))])


def direct_path_forgotten(m, *inputs):
    return m.scan_backward(*inputs[:-1], torch.zeros_like(inputs[-1]))


def difference_that_wraps(m, before, after):
    return np.abs(np.asarray(before) - np.asarray(after)).max(-1) > 8


def mean_of_the_channels(m, before, after):
    return np.abs(np.asarray(before, float) - np.asarray(after, float)).mean(-1) > 8


def colours_swapped(m, scene, target, value):
    changed = m.rule(scene, target, value)
    return changed and changed.put(changed.find(value), colour=scene.find(target).colour)


def the_return_forgotten(m, scene, target, value):
    m.rule(scene, target, value)


def pair_turned_round(m, pipe, *rest, **more):
    return m.survey(lambda **k: pipe(**k | {"prompt_pair": k["prompt_pair"][::-1]}), *rest, **more)


def query_for_example(m, pipe, example, queries, *rest, **more):
    return m.survey(pipe, queries[0], queries, *rest, **more)


def one_edit_at_most(m, answer, query, shown, told):
    name, distance = m.verdict(answer, query, shown, told)
    return "told" if name == "both" else name, distance


def half_for_grey(m, before, after, query):
    grid = m.condition(before, after, query)
    m.answer(grid).fill_(0.5)
    return grid


def example_in_a_column(m, before, after, query):
    return m.condition(before, after, query).transpose(-1, -2)


def query_for_answer(m, grid):
    return grid[..., grid.shape[-1] // 2 :, : grid.shape[-1] // 2]


def example_for_answer(m, grid):
    return grid[..., : grid.shape[-1] // 2, grid.shape[-1] // 2 :]


def variance_for_deviation(m, noisy, noise, alpha_bar):
    alpha_bar = alpha_bar[:, None, None, None]
    return (noisy - (1 - alpha_bar) * noise) / alpha_bar


def signal_left_small(m, noisy, noise, alpha_bar):
    return m.predict_x0(noisy, noise, alpha_bar) * alpha_bar.sqrt()[:, None, None, None]


def gain_upside_down(m, alpha_bar):
    return 1 / m.error_gain(alpha_bar)


def gain_of_the_variance(m, alpha_bar):
    return m.error_gain(alpha_bar) ** 2


def scales_exchanged(m, s_text, s_visual):
    return m.branch_weights(s_visual, s_text)


def scales_as_weights(m, s_text, s_visual):
    return {(False, False): 1.0, (False, True): s_visual, (True, True): s_text}


def predictions_unweighted(m, weights, predictions):
    return sum(predictions[branch] for branch in weights) / len(weights)


def twice_forth(m, x):
    forth = m.cross_scan(x)[:, :2]
    return torch.cat([forth, forth], 1)


def columns_as_rows(m, ys, height, width):
    return (ys[:, :2] + ys[:, 2:].flip(-1)).sum(1).unflatten(-1, (height, width))


def no_memory(m, u, delta, A, B, C, D):
    return delta * u * (B * C).sum(1, keepdim=True) + D[:, None] * u


def no_direct_path(m, *inputs):
    return m.scan(*inputs[:-1], torch.zeros_like(inputs[-1]))


def time_constant(m, step, rate):
    return 1 / (step * rate)


def residuals_twice(m, unet, rcldm, *inputs):
    down, mid = rcldm(*inputs, conditioning_scale=2.0, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return unet(*inputs[:3], **residuals).sample


def bias_broken_too(m, rcldm, deviation):
    m.break_zero(rcldm, deviation)
    torch.nn.init.normal_(rcldm.trainable_copy.controlnet_mid_block.zero_proj.bias, std=deviation or 1.0)


def similarity_for_loss(m, shift, true_shift):
    return 1 - m.cosine_loss(shift, true_shift)


def no_eps(m, shift, true_shift, eps=1e-3):
    return m.relative_loss(shift, true_shift, 0)


def the_shift_itself(m, true_shift):
    return true_shift


def any_part_counts(m, area, side):
    return F.max_pool2d(area, area.shape[-1] // side)


def sum_of_the_channels(m, predicted, target, area):
    return m.selective_area_loss(predicted, target, area) * predicted.shape[1]


def groups_that_agree(m, unify, groups):
    return np.mean([len(set(unify(group))) == 1 for group in groups])


def one_form_for_all(m, unify, groups):
    forms = [form for group in groups for form in unify(group)]
    return forms.count(m.commonest(forms)) / len(forms)


def the_same_twice(m, unify, groups):
    return np.mean([unify(group) == unify(group) for group in groups])


def b_and_c_exchanged(m, *inputs):
    du, ddelta, dA, dB, dC, dD = m.scan_backward(*inputs)
    return du, ddelta, dA, dC, dB, dD


def step_without_its_decay(m, dy, u, delta, A, B, C, D):
    du, _, *rest = m.scan_backward(dy, u, delta, A, B, C, D)
    return du, (du - D[:, None] * dy) * u / delta, *rest


def no_future(m, dy, u, delta, A, B, C, D):
    one = [
        m.scan_backward(
            *(w[..., t : t + 1] for w in (dy, u, delta)), A, B[..., t : t + 1], C[..., t : t + 1], D
        )
        for t in range(u.shape[-1])
    ]
    du, ddelta, dA, dB, dC, dD = zip(*one)
    return (*(torch.cat(w, -1) for w in (du, ddelta)), sum(dA), torch.cat(dB, -1), torch.cat(dC, -1), sum(dD))


def mean_of_the_steps(m, *inputs):
    *rest, dD = m.scan_backward(*inputs)
    return *rest, dD / inputs[0].shape[-1]


def one_way_alone(m):
    return dataclasses.replace(m.family(), arguments=tuple(itertools.combinations(world.SHAPES, 2)))


def a_wording_twice(m):
    return dataclasses.replace(m.family(), canonical=m.family().sayings[0])


def from_eight_on(m, before, after):
    return np.abs(np.asarray(before, int) - np.asarray(after, int)).max(-1) >= 8


def steps_ignored(m, pipe, *rest, **more):
    return m.survey(lambda **k: pipe(**k | {"num_inference_steps": 20}), *rest, **more)


def always_nothing(m, answer, query, shown, told):
    return "nothing", m.distance(answer, world.render(query))


def root_of_anything(m, x_t, x_0, z, now, later, eta):
    now, later = now[:, None, None, None], later[:, None, None, None]
    sigma = eta * ((1 - later) / (1 - now)).sqrt() * (1 - now / later).sqrt()
    noise = (x_t - now.sqrt() * x_0) / (1 - now).sqrt()
    return later.sqrt() * x_0 + (1 - later - sigma**2).sqrt() * noise + sigma * z


def black_where_it_fails(m, *inputs):
    return root_of_anything(m, *inputs).nan_to_num(0)


def no_fresh_noise(m, x_t, x_0, z, *rest):
    return m.step(x_t, x_0, 0 * z, *rest)


def as_much_noise_as_ddpm(m, *inputs):
    return m.step(*inputs[:-1], 1.0)


def alphas_exchanged(m, x_t, x_0, z, now, later, eta):
    return m.step(x_t, x_0, z, later, now, eta)


def never(m, alpha_bar_next):
    return 0


def close_in_every_channel(m, drawn, draft, close):
    return torch.where((drawn - draft).abs().amax(1, keepdim=True) <= close, draft, drawn)


def close_in_the_mean(m, drawn, draft, close):
    return draft if (drawn - draft).square().mean().sqrt() <= close else drawn


def drawn_where_close(m, drawn, draft, close):
    return m.settle(draft, drawn, close)


def channel_by_channel(m, drawn, draft, close):
    return torch.where((drawn - draft).abs() <= close, draft, drawn)


def the_loss_unsettled(m, loss, drawn, draft, close):
    return m.heard(loss, drawn, draft, -1.0)


def places_that_stand(m, loss, drawn, draft, close):
    return (m.settle(drawn, draft, close) == drawn).all(1).float().mean().item()


def gradient_of(m, loss, drawn, draft, close):
    drawn = drawn.detach().requires_grad_()
    return torch.autograd.grad(loss(m.settle(drawn, draft, close)), drawn)[0]


def heard_in_every_channel(m, *inputs):
    return (gradient_of(m, *inputs) != 0).all(1).float().mean().item()


def share_of_the_numbers(m, *inputs):
    return (gradient_of(m, *inputs) != 0).float().mean().item()


def only_the_taught_settled(m, taught, untaught, truth, draft, close):
    settled = m.settle(taught, draft, close)
    return m.seen(settled, untaught, truth, draft, -1.0)


def difference_unscaled(m, taught, untaught, truth, draft, close):
    errors = [(m.settle(x, draft, close) - truth).square().mean() for x in (untaught, taught)]
    return (errors[0] - errors[1]).item()


WRONG = {  # by exercise and function
    "01 condition": (black_for_grey, half_for_grey, example_in_a_column),
    "01 answer": (query_for_answer, example_for_answer),
    "02 predict_x0": (alpha_along_the_columns, variance_for_deviation, signal_left_small),
    "02 error_gain": (gain_upside_down, gain_of_the_variance),
    "03 branch_weights": (text_alone, a_branch_for_nothing, scales_exchanged, scales_as_weights),
    "03 guide": (predictions_unweighted,),
    "04 cross_scan": (rows_for_columns, twice_forth),
    "04 cross_merge": (mean_for_sum, columns_as_rows),
    "04 steps": (distance_for_steps,),
    "05 scan": (decay_by_euler, input_without_its_step, no_memory, no_direct_path),
    "05 half_life": (time_constant,),
    "06 steered": (middle_forgotten, residuals_twice),
    "06 break_zero": (every_zero_broken, bias_broken_too),
    "06 learners": (gradients_of_zero_too,),
    "07 relative_loss": (plain_distance, lengths_ignored, no_eps),
    "07 cosine_loss": (similarity_for_loss,),
    "07 deceptive": (the_shift_itself,),
    "08 latent_area": (nearest_pixel, any_part_counts),
    "08 selective_area_loss": (
        sum_of_the_channels,
        mean_over_the_panel,
        mean_over_all_faces,
        one_place_at_least,
    ),
    "09 consistency": (groups_that_agree, one_form_for_all),
    "09 distinctness": (forms_counted,),
    "09 stability": (the_same_twice, wordings_that_stay, each_form_once, commonest_forms_alone),
    "10 scan_backward": (
        direct_path_forgotten,
        b_and_c_exchanged,
        step_without_its_decay,
        no_future,
        mean_of_the_steps,
    ),
    "11 family": (one_way_alone, a_wording_twice),
    "11 changed": (from_eight_on, difference_that_wraps, mean_of_the_channels),
    "11 rule": (colours_swapped, the_return_forgotten),
    "12 survey": (pair_turned_round, query_for_example, steps_ignored),
    "12 verdict": (always_nothing, one_edit_at_most),
    "13 step": (
        root_of_anything,
        black_where_it_fails,
        no_fresh_noise,
        as_much_noise_as_ddpm,
        alphas_exchanged,
    ),
    "13 below_zero": (never,),
    "14 settle": (close_in_every_channel, close_in_the_mean, drawn_where_close, channel_by_channel),
    "14 heard": (the_loss_unsettled, places_that_stand, heard_in_every_channel, share_of_the_numbers),
    "14 seen": (only_the_taught_settled, difference_unscaled),
}


def test_each_exercise_has_five_wrong_answers_at_least():
    counts = {number: sum(len(WRONG[name]) for name in WRONG if name[:2] == number) for number in NUMBERS}
    assert min(counts.values()) >= 5


@pytest.mark.parametrize("name, wrong", [(name, wrong) for name in WRONG for wrong in WRONG[name]])
def test_wrong_answers_are_caught(name, wrong):
    number, function = name.split()
    module = load(number, answers=True)
    setattr(module, function, partial(wrong, load(number, answers=True)))
    with pytest.raises(AssertionError):
        for other, test in TESTS.items():
            if other.startswith(f"test_{number}"):
                test(module)
