"""Selective-area matching: areas by hand and by a tiny Mask2Former, the proposal, the loss."""

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_liu import byte_tokenizer
from tiny import new_segmenter
from transformers import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    PreTrainedTokenizerBase,
)

import esm
from sam_loss import SelectiveAreas, noise_weight, panoptic_area, propose_classes, selective_area_loss

AS_THEY_ARE = Mask2FormerImageProcessor(do_resize=False)
LABELS = ("person", "cat", "sky", "wall-other-merged")


@pytest.fixture(scope="module")
def segmenter() -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    model = new_segmenter(LABELS, size=64, queries=1)
    model.class_predictor.bias.data[0] = 9.0  # its one query takes whatever it finds for a person
    return model


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(3, 3, 64, 64) * 2 - 1


def queries(*found: tuple[int, float, slice, slice]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (Q, 5) and (Q, 8, 8) of queries; each: its class, the logit of that, its rows and columns."""
    class_logits, mask_logits = torch.zeros(len(found), len(LABELS) + 1), torch.full((len(found), 8, 8), -6.0)
    for query, (label, logit, rows, columns) in enumerate(found):
        class_logits[query, label] = logit
        mask_logits[query, rows, columns] = 6.0
    return class_logits, mask_logits


ALL, NOTHING = slice(None), len(LABELS)


def test_area_is_the_segment_and_not_the_pixels_nobody_claims():
    logits = queries((0, 9.0, slice(2, 4), slice(3, 6)), (NOTHING, 9.0, ALL, ALL))
    area = panoptic_area(*logits, torch.tensor([0]), (8, 8))
    assert area[2:4, 3:6].all() and area.sum() == 6


def test_area_unites_instances_and_classes():
    logits = queries((0, 9.0, slice(0, 2), ALL), (0, 9.0, slice(4, 5), ALL), (1, 9.0, slice(7, 8), ALL))
    assert panoptic_area(*logits, torch.tensor([0]), (8, 8)).sum() == 24
    assert panoptic_area(*logits, torch.tensor([0, 1]), (8, 8)).sum() == 32
    assert panoptic_area(*logits, torch.tensor([2]), (8, 8)).sum() == 0


def test_area_drops_improbable_and_hidden_segments():
    assert not panoptic_area(*queries((0, 0.5, ALL, ALL)), torch.tensor([0]), (8, 8)).any()
    hidden = queries(
        (0, 4.0, ALL, slice(0, 4)), (2, 9.0, ALL, slice(0, 3))
    )  # the sky takes 3/4 of the person
    assert not panoptic_area(*hidden, torch.tensor([0]), (8, 8)).any()
    assert panoptic_area(*hidden, torch.tensor([2]), (8, 8)).sum() == 24


def test_area_is_scaled_to_the_image():
    area = panoptic_area(*queries((0, 9.0, slice(0, 4), ALL)), torch.tensor([0]), (32, 16))
    assert area.shape == (32, 16) and area[:15].all() and not area[17:].any()


@pytest.mark.parametrize(
    "processor", [AS_THEY_ARE, Mask2FormerImageProcessor(size={"height": 96, "width": 96})]
)
def test_areas_of_images(segmenter, images, processor):
    areas = SelectiveAreas(segmenter, processor, LABELS, threshold=0.0)
    result = areas(images)
    assert result.shape == (3, 1, 64, 64) and result.dtype == torch.float32
    assert set(result.unique().tolist()) == {0.0, 1.0}
    for image, area in zip(images, result):  # the batch does not change the answer
        torch.testing.assert_close(areas(image[None])[0], area)


def test_an_unknown_class_is_named_with_those_it_knows(segmenter):
    with pytest.raises(ValueError, match=r"'persons'.*person"):
        SelectiveAreas(segmenter, AS_THEY_ARE, ["cat", "persons"])
    with pytest.raises(ValueError, match=r"'zebra'.*sky"):
        SelectiveAreas(segmenter, AS_THEY_ARE, ["zebra"])
    SelectiveAreas(segmenter, AS_THEY_ARE, ["Person"])


# --- The proposal -------------------------------------------------------------------------------------------


class ScriptedModel:
    """Replies as it is told; stands for a causal language model."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, reply: str):
        self.reply = tokenizer(reply, return_tensors="pt")["input_ids"]

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, self.reply], 1)


@pytest.fixture(params=[None, "{% for turn in messages %}{{ turn['content'] }}{% endfor %}:"])
def tokenizer(request) -> PreTrainedTokenizerBase:
    """One token per byte, with and without a chat template."""
    return byte_tokenizer(request.param)


@pytest.mark.parametrize(
    "reply, chosen",
    [
        ("person, cat", ("person", "cat")),
        ("Cat.\n- Person\n- dragon", ("person", "cat")),
        ("1. person; 2. wall-other-merged", ("person", "wall-other-merged")),
        ("person, person", ("person",)),
        ("Names: cat, and person.", ("person", "cat")),
    ],
)
def test_proposal_keeps_labels_only(tokenizer, reply, chosen):
    assert propose_classes(ScriptedModel(tokenizer, reply), tokenizer, LABELS) == chosen


def test_proposal_without_a_label_falls_back(tokenizer):
    model = ScriptedModel(tokenizer, "I would not choose any person at all")
    with pytest.warns(UserWarning, match="person"):
        assert propose_classes(model, tokenizer, LABELS) == ("person",)
    with pytest.raises(ValueError, match="circle, face"):
        propose_classes(model, tokenizer, ["circle", "face"])


# --- The loss -----------------------------------------------------------------------------------------------


def test_loss_by_hand():
    predicted, target = torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    predicted[0, 0, 0, 0], predicted[0, :, 3, 3], predicted[1, :, 1, 1] = 2.0, 100.0, 1.0
    area = torch.zeros(2, 1, 4, 4)
    area[0, 0, 0, :2] = 1  # two pixels, an error of 2 in one of the two channels: 4 / (2 · 2) = 1
    area[1, 0, 1, 1] = 1  # one pixel, an error of 1 in both channels: 1
    predicted[1, 0, 1, 1] = 3.0  # … of 3 and 1: (9 + 1) / 2 = 5
    assert selective_area_loss(predicted, target, area) == pytest.approx((1 + 5) / 2)
    assert selective_area_loss(predicted, target, area, torch.tensor([0.5, 0.0])) == pytest.approx(0.25)
    area[0] = 0
    assert selective_area_loss(predicted, target, area) == pytest.approx(5 / 2)


def test_a_batch_may_be_split():
    """Over processes, or over the batches of a step, some of which may hold no area at all."""
    g = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 4, 4, 8, 8, generator=g)
    area, weight = torch.zeros(4, 1, 16, 16), torch.tensor([0.0, 1.0, 0.5, 1.0])
    area[1:3, :, 2:9, 4:7] = 1
    whole = selective_area_loss(predicted, target, area, weight)
    for size in (1, 2):
        parts = [x.split(size) for x in (predicted, target, area, weight)]
        torch.testing.assert_close(torch.stack([*map(selective_area_loss, *parts)]).mean(), whole)


def test_loss_takes_the_share_that_the_area_covers():
    predicted, area = torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 16, 16)
    predicted[..., 0, 0], predicted[..., 0, 1] = 1.0, 2.0
    area[..., :8, :8], area[..., :8, 8:12] = 1, 1  # all of the first patch and half of the second
    expected = (1 * 1 + 0.5 * 4) / 1.5
    assert selective_area_loss(predicted, torch.zeros_like(predicted), area) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_weight_bounds_what_an_error_of_the_prediction_costs(kind):
    """At every noise level, down to none of the picture left."""
    scheduler = DDIMScheduler(prediction_type=kind, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    t = torch.arange(1000)
    noisy, prediction = torch.randn(2, 1000, 4, 8, 8)
    clean = [esm.predict_x0(noisy, prediction + error, t, scheduler) for error in (0, 1)]
    area, weight = torch.ones(1000, 1, 64, 64), noise_weight(t, scheduler)
    samples = zip(clean[1].split(1), clean[0].split(1), area.split(1), weight.split(1))
    each = [selective_area_loss(*sample) for sample in samples]
    costs, alpha_bar = torch.stack(each), scheduler.alphas_cumprod
    wanted = torch.ones(1000) if kind == "sample" else 1 - alpha_bar
    assert costs.isfinite().all() and alpha_bar[-1] < 1e-6  # where no x̂_0 can be told of a noise
    torch.testing.assert_close(costs[:-2], wanted[:-2], atol=1e-3, rtol=1e-3)


def test_empty_areas_give_zero_and_zero_gradients():
    predicted = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = selective_area_loss(predicted, torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 64, 64), torch.ones(2))
    loss.backward()
    assert loss == 0 and predicted.grad.abs().max() == 0


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 9)), st.integers(0, 99))  # B, C, P
def test_a_loss_on_areas_of_any_size(size, seed):
    b, c, p = size
    g = torch.Generator().manual_seed(seed)
    predicted, target = (torch.randn(b, c, p, p, generator=g, dtype=torch.float64) for _ in range(2))
    area = (torch.rand(b, 1, p, p, generator=g) < 0.5).double()
    predicted.requires_grad_()
    loss = selective_area_loss(predicted, target, area)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert (gradient * (1 - area)).abs().max() == 0
    assert ((gradient != 0) | (area.expand_as(gradient) == 0)).all()
    elsewhere = predicted + 100 * (1 - area)
    assert selective_area_loss(elsewhere, target, area) == loss
    error = predicted - target
    torch.testing.assert_close(selective_area_loss(target + 3 * error, target, area), 9 * loss)
    order = torch.randperm(b, generator=g)
    torch.testing.assert_close(selective_area_loss(predicted[order], target[order], area[order]), loss)
    fine = area.repeat_interleave(4, -1).repeat_interleave(4, -2)  # at the image's resolution
    torch.testing.assert_close(selective_area_loss(predicted, target, fine), loss)
