"""Editing-shift matching, from x̂_0 to the loss, on a tiny random CLIP and VAE."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from open_clip import CLIP

import backbone
import esm


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 16, "layers": 1, "width": 32, "heads": 2}
    return CLIP(32, vision, text).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = {"block_out_channels": (8, 8), "norm_num_groups": 4, "scaling_factor": 0.5, "latent_channels": 4}
    return AutoencoderKL(**config, **blocks).eval().requires_grad_(False)


@pytest.fixture
def edit() -> tuple[torch.Tensor, torch.Tensor]:
    """Two inputs and their true answers, (2, 3, 32, 32) in [-1, 1]."""
    torch.manual_seed(1)
    before = torch.rand(2, 3, 32, 32) * 2 - 1
    after = before.clone()
    after[..., 8:24, 8:24] = 0.9
    return before, after


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predict_x0_inverts_the_forward_process(kind):
    scheduler = DDIMScheduler(prediction_type=kind)
    clean, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timestep = torch.tensor([3, 400, 900])
    noisy = scheduler.add_noise(clean, noise, timestep)
    exact = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, timestep),
        "sample": clean,
    }
    assert torch.equal(backbone.prediction_target(clean, noise, timestep, scheduler), exact[kind])
    torch.testing.assert_close(
        esm.predict_x0(noisy, exact[kind], timestep, scheduler), clean, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_predict_x0_is_finite_where_no_signal_is_left(kind):
    scheduler = DDIMScheduler(prediction_type=kind, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert scheduler.alphas_cumprod[-1] < 1e-6
    prediction = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    clean = esm.predict_x0(torch.randn(1, 4, 8, 8), prediction, torch.tensor(999), scheduler)
    clean.square().sum().backward()
    assert clean.dtype == torch.float32
    assert clean.isfinite().all() and prediction.grad.isfinite().all()


def test_predict_x0_names_an_unknown_prediction_type():
    with pytest.raises(ValueError, match="flow"):
        esm.predict_x0(*torch.zeros(2, 1, 4, 8, 8), torch.tensor([1]), DDIMScheduler(prediction_type="flow"))


def test_reliability_falls_with_noise_and_ends_at_zero():
    scheduler = DDIMScheduler()
    signal = scheduler.alphas_cumprod  # ᾱ
    weight = esm.reliability(torch.arange(1000), scheduler)
    assert torch.equal(weight, torch.where(signal >= 0.2, signal, 0.0)) and 0 < weight.count_nonzero() < 1000


def test_decode_answer_decodes_the_lower_right_panel_alone(vae):
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    image = esm.decode_answer(vae, latents)
    expected = vae.decode(latents[:, :, 4:, 4:] / 0.5).sample
    torch.testing.assert_close(image, expected)
    image.sum().backward()
    assert latents.grad[:, :, 4:, 4:].abs().min() > 0
    assert latents.grad[:, :, :4].abs().max() == 0 and latents.grad[:, :, 4:, :4].abs().max() == 0


def test_clip_preprocess_uses_the_models_own_size_and_statistics(clip):
    clip.visual.image_mean, clip.visual.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    try:
        pixels = esm.clip_preprocess(clip, torch.full((1, 3, 48, 80), 0.5))
    finally:
        del clip.visual.image_mean, clip.visual.image_std
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels, torch.ones_like(pixels))  # 0.5 in [-1, 1] is 0.75 in [0, 1]


def test_editing_shift_takes_images_or_embeddings(clip, edit):
    before, after = edit
    shift = esm.editing_shift(clip, before, after)
    assert shift.shape == (2, 32)
    torch.testing.assert_close(
        shift, esm.editing_shift(clip, esm.embed(clip, before), esm.embed(clip, after))
    )
    torch.testing.assert_close(esm.embed(clip, before).norm(dim=-1), torch.ones(2))


def test_loss_by_hand_in_embedding_space(clip):
    def loss(*shift: float) -> float:
        return esm.editing_shift_loss(
            clip, start, start + torch.tensor([shift]), start + true, eps=0.0
        ).item()

    start, true = torch.zeros(1, 2), torch.tensor([[0.6, 0.0]])
    assert loss(0.6, 0.0) == 0  # the true edit
    assert loss(0.0, 0.0) == pytest.approx(1)  # a copy of the input
    assert loss(0.0, 0.6) == pytest.approx(1)  # another edit of the same strength
    assert loss(-0.6, 0.0) == pytest.approx(2)  # the opposite
    assert loss(0.3, 0.0) == pytest.approx(0.09 / 0.45) == loss(1.2, 0.0)  # half as strong is as bad as twice


def test_loss_falls_as_the_edit_is_made(clip, edit):
    before, after = edit
    losses = [esm.editing_shift_loss(clip, before, before.lerp(after, share), after) for share in (0, 0.5, 1)]
    assert losses[0] > losses[1] > losses[2] == 0


def test_copy_of_the_input_gets_a_gradient_towards_the_edit(clip, edit):
    before, after = edit
    answer = before.clone().requires_grad_()
    loss = esm.editing_shift_loss(clip, before, answer, after)
    loss.backward()
    assert 0 < answer.grad.abs().max() < float("inf")
    moved = answer.detach() - 1e-2 * answer.grad / answer.grad.norm()
    assert esm.editing_shift_loss(clip, before, moved, after) < loss


def test_no_true_change_asks_for_no_change(clip, edit):
    before, after = edit
    answer = before.clone().requires_grad_()
    loss = esm.editing_shift_loss(clip, before, answer, before)
    loss.backward()
    assert loss < 1e-6 and answer.grad.isfinite().all()
    assert esm.editing_shift_loss(clip, before, after, before) > 0.5


def test_weights_leave_samples_out(clip, edit):
    before, after = edit
    answer = before.clone().requires_grad_()
    loss = esm.editing_shift_loss(clip, before, answer, after, weight=torch.tensor([0.5, 0.0]))
    alone = esm.editing_shift_loss(clip, before[:1], before[:1], after[:1])
    torch.testing.assert_close(loss, (0.5 * alone + 0 * alone) / 2)  # the mean of both
    loss.backward()
    assert answer.grad[0].abs().max() > 0 and answer.grad[1].abs().max() == 0

    nothing = esm.editing_shift_loss(clip, before, answer, after, weight=torch.zeros(2))
    answer.grad = None
    nothing.backward()
    assert nothing == 0 and answer.grad.abs().max() == 0


def test_gradient_reaches_the_noise_prediction(clip, vae):
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    prediction = torch.randn(1, 4, 32, 32, requires_grad=True)
    latents = esm.predict_x0(torch.randn(1, 4, 32, 32), prediction, torch.tensor([100]), scheduler)
    before, after = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    esm.editing_shift_loss(clip, before, esm.decode_answer(vae, latents), after).backward()
    assert prediction.grad.isfinite().all() and prediction.grad[..., 16:, 16:].abs().max() > 0
