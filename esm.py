"""Editing-shift matching (ESM), the second contribution of InstructGIE. Only training uses it.

[paper] The model's edit must *mean* the same as the true one (summary, section 2). [figure] CLIP maps every
image to a point T(image) (figure 2, "editing shift module"). An edit moves the image to another point, and
this movement is its editing shift. [ours] The loss compares the query's predicted shift with its true shift:

    s = T(answer) − T(input)                               the editing shift; T has unit length
    L_es = |s_pred − s_true|² / (|s_pred|² + |s_true|²)    0: the true edit, 1: nothing done, 2: the opposite

A training step has no answer yet, only the U-Net's prediction. This file follows the differentiable path
between the two: prediction → x̂_0 → answer panel → VAE decoder → CLIP → shift → loss.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin
from open_clip import CLIP
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor


def predict_x0(noisy: Tensor, prediction: Tensor, timestep: Tensor, scheduler: SchedulerMixin) -> Tensor:
    """The clean latent x̂_0 that the U-Net's output implies (Ho et al. 2020; Salimans & Ho 2022, app. D).

    noisy, prediction: (B, C, H, W), x_t and the output for it. timestep: (B,) or (), integers. scheduler:
    any of diffusers with `alphas_cumprod` and `config.prediction_type`. Returns (B, C, H, W), float32.
    Raises ValueError for a prediction type other than epsilon, v_prediction and sample.
    """
    noisy, prediction = noisy.float(), prediction.float()
    alpha_bar = _alpha_bar(timestep, scheduler).expand(len(noisy))[:, None, None, None]  # (B, 1, 1, 1)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # x_t = signal · x_0 + sigma · ε
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        # Where ᾱ = 0, x_t says nothing of x_0. The clamp keeps x̂_0 finite, so that a weight of 0 can
        # discard it.
        return (noisy - sigma * prediction) / signal.clamp_min(1e-4)
    if kind == "v_prediction":
        return signal * noisy - sigma * prediction
    if kind == "sample":
        return prediction
    raise ValueError(f"unknown prediction type {kind!r}: expected epsilon, v_prediction or sample")


def reliability(timestep: Tensor, scheduler: SchedulerMixin, min_alpha_bar: float = 0.2) -> Tensor:
    """Reliability of x̂_0 at each timestep: ᾱ_t, or 0 below `min_alpha_bar`. (B,) → (B,), in [0, 1].

    [ours] The paper does not say at which noise levels its image losses act. At high noise x̂_0 is the
    average of many answers, a blur that CLIP misreads, so matching it would teach nothing. Drop samples of
    weight 0 before `decode_answer`, so that they cost nothing.
    """
    alpha_bar = _alpha_bar(timestep, scheduler)
    return torch.where(alpha_bar >= min_alpha_bar, alpha_bar, 0.0)


def _alpha_bar(timestep: Tensor, scheduler: SchedulerMixin) -> Tensor:
    return scheduler.alphas_cumprod.to(timestep.device, torch.float32)[timestep.long()]


def decode_answer(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The answer panel's image: latents of grids (B, C, 2h, 2w) → (B, 3, H, W), about [-1, 1], not clamped.

    Only the lower-right quarter passes through the decoder, at a quarter of the memory and time. The VAE is
    frozen, but gradients pass through it to the latents.
    """
    panel = latents[..., latents.shape[-2] // 2 :, latents.shape[-1] // 2 :]
    return vae.decode((panel / vae.config.scaling_factor).to(vae.dtype)).sample.float()


def clip_preprocess(clip: CLIP, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] → (B, 3, S, S), float32, with the size, mean and deviation of `clip`.

    [ours] The panel is squeezed to CLIP's square where open_clip would crop it: an edit at the border
    counts too.
    """
    size = clip.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    mean = torch.tensor(getattr(clip.visual, "image_mean", None) or OPENAI_DATASET_MEAN, device=images.device)
    std = torch.tensor(getattr(clip.visual, "image_std", None) or OPENAI_DATASET_STD, device=images.device)
    unit = (images.float() + 1) / 2
    if unit.shape[-2:] != size:
        unit = F.interpolate(unit, size, mode="bicubic", antialias=True)
    return (unit - mean[:, None, None]) / std[:, None, None]


def embed(clip: CLIP, images: Tensor) -> Tensor:
    """T(image): images (B, 3, H, W) in [-1, 1] → embeddings (B, E) of unit length, float32.

    A (B, E) tensor is returned unchanged, so a dataset can be embedded once and passed as embeddings.
    """
    if images.ndim == 2:
        return images
    convolution = next(p for p in clip.visual.parameters() if p.ndim == 4)  # CLIP's input has its dtype
    return F.normalize(clip.encode_image(clip_preprocess(clip, images).to(convolution.dtype)).float(), dim=-1)


def editing_shift(clip: CLIP, before: Tensor, after: Tensor) -> Tensor:
    """The editing shift T(after) − T(before): images (B, 3, H, W) in [-1, 1] or embeddings → (B, E)."""
    return embed(clip, after) - embed(clip, before)


def editing_shift_loss(
    clip: CLIP,
    before: Tensor,
    predicted: Tensor,
    after: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-3,
) -> Tensor:
    """L_es: relative squared distance between the predicted and the true shift. A scalar in [0, 2].

    before, predicted, after: the query's input, the answer decoded from x̂_0, the true answer; each as
    images (B, 3, H, W) in [-1, 1] or as embeddings (B, E). Gradients flow to `predicted` alone.
    weight: (B,) in [0, 1], see `reliability`. Returns the mean of weight · distance over all B samples, so
    that a batch may be split.

    [ours] The figure embeds all four panels and does not name the compared shifts. The example row is given,
    not predicted, and teaches nothing: the query row's two shifts are compared.
    [ours] Their cosine alone would rate a tenth of an edit like the whole edit, and has no defined gradient
    at a copy of the input. Their plain distance would let large edits drown small ones. The distance relative
    to both lengths measures direction and strength, and is smooth even at a zero shift. For shifts of length
    ratio r it is 1 − cosine · 2r / (1 + r²). `eps` bounds the gradient for small shifts, and halves
    the cost of an unchanged input where the true shift's length is 0.03.
    """
    with torch.no_grad():
        before, after = embed(clip, before), embed(clip, after)
    shift, true_shift = editing_shift(clip, before, predicted), editing_shift(clip, before, after)  # (B, E)
    squares = shift.square().sum(-1) + true_shift.square().sum(-1)
    distance = (shift - true_shift).square().sum(-1) / (squares + eps)  # (B,)
    return (distance if weight is None else weight * distance).mean()


def main() -> None:
    """A worked example with a tiny random CLIP: the loss of an edit made in part, in full, and backwards."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 16, "layers": 1, "width": 32, "heads": 2}
    clip = CLIP(32, vision, text).eval().requires_grad_(False)
    before = torch.rand(1, 3, 64, 64) * 2 - 1
    after = before.clone()
    after[..., 16:48, 16:48] = torch.tensor([0.9, -0.6, -0.8])[:, None, None]  # the edit: add a red square
    print(f"the true editing shift has length {editing_shift(clip, before, after).norm():.3f}")
    for share in (0.0, 0.25, 0.5, 1.0, -0.5):
        answer = (before + share * (after - before)).requires_grad_()
        loss = editing_shift_loss(clip, before, answer, after)
        (gradient,) = torch.autograd.grad(loss, answer)
        print(f"edit made to {share:4.0%}: L_es = {loss:.3f}, gradient of length {gradient.norm():.3f}")


if __name__ == "__main__":
    main()
