"""The sampler at every number of steps, whatever the last bits of its noise levels."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import backbone

T = 1000
SD15 = {  # stable-diffusion-v1-5/stable-diffusion-v1-5, scheduler/scheduler_config.json
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": T,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
TOY = DDIMScheduler.load_config(backbone.HERE / "toy" / "weights" / "stable-diffusion" / "scheduler")
SCHEDULES = {"toy": TOY, "sd15": SD15}
UNITS = (-2, -1, 0, 1, 2)  # in the last place
SHARE = 0.8  # of x_t that the prediction is


def scheduler_of(name, kind="DDIMScheduler"):
    """As edit.py makes it: by way of the DDIMScheduler that is loaded."""
    return getattr(diffusers, kind).from_config(DDIMScheduler.from_config(SCHEDULES[name]).config)


def moved(levels, units):
    """Noise levels ᾱ, each `units` in the last place away; none leaves [0, 1]."""
    for _ in range(abs(int(units))):
        levels = torch.nextafter(levels, torch.tensor(float(units > 0)))
    return levels


def move_all(levels):
    """All by so many units together, then each by its own at random: (T,) → (T, 12)."""
    g = torch.Generator().manual_seed(0)
    together = [moved(levels, units) for units in UNITS]
    moves = torch.randint(-2, 3, (7, len(levels)), generator=g)
    by_units = torch.stack(together)
    return torch.stack([*together, *(by_units.gather(0, move[None] + 2)[0] for move in moves)], 1)


def exact_factor(levels, last, kind, t, before):
    """By how much a step of DDIM multiplies an x_t that its prediction is a share of, in float64."""
    now = levels[t]
    then = torch.where(before >= 0, levels[before.clamp(min=0)], last)
    if kind == "sample":
        x_0, noise = SHARE, (1 - now.sqrt() * SHARE) / (1 - now).sqrt()
    else:
        x_0, noise = (1 - (1 - now).sqrt() * SHARE) / now.sqrt(), SHARE
    return then.sqrt() * x_0 + (1 - then).sqrt() * noise


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_is_finite_and_exact_at_every_number_of_steps(name):
    """Of a prediction that is a share of x_t a step makes a multiple of x_t, and an edit their product."""
    scheduler = scheduler_of(name)
    levels, last = scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
    all_levels = move_all(levels)
    scheduler.alphas_cumprod = all_levels.view(T, -1, 1, 1, 1)
    if last < 1:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    x_t = torch.ones(all_levels.shape[1], 1, 1, 1)
    factors, refused = {}, []
    for steps in range(1, T + 1):
        try:
            backbone.set_timesteps(scheduler, steps)
        except ValueError:
            refused.append(steps)
            continue
        timesteps, gap = scheduler.timesteps, T // steps
        assert len(timesteps) == steps and timesteps.min() >= 0 and (timesteps.diff() < 0).all()
        for t in timesteps.tolist():
            if (t, gap) not in factors:
                factors[t, gap] = scheduler.step(SHARE * x_t, t, x_t).prev_sample.flatten()
        trajectory = torch.stack([factors[t, gap] for t in timesteps.tolist()]).cumprod(0)
        assert trajectory.isfinite().all(), steps
        exact = levels.double(), last.double(), scheduler.config.prediction_type, timesteps, timesteps - gap
        wanted = exact_factor(*exact).cumprod(0)[:, None]
        assert ((trajectory - wanted).abs() <= 1e-3 * wanted + 1e-6).all(), steps
    assert refused == ([] if name == "toy" else [T])  # Stable Diffusion's would begin at timestep 1000


OTHERS = [kind for kind in backbone.SAMPLERS.values() if kind != "DDIMScheduler"]


def draw(scheduler, steps):
    """What becomes of pure noise where the prediction is a share of what the U-Net is shown."""
    backbone.set_timesteps(scheduler, steps)
    g = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 1, 2, 2, generator=g) * scheduler.init_noise_sigma
    extra = {"generator": g} if "Ancestral" in type(scheduler).__name__ else {}
    for t in scheduler.timesteps:
        prediction = SHARE * scheduler.scale_model_input(x_t, t)
        x_t = scheduler.step(prediction, t, x_t, **extra).prev_sample
        assert x_t.isfinite().all(), (steps, t)
    return x_t


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", OTHERS)
def test_the_other_samplers_are_finite_at_every_number_of_steps(name, kind):
    """Noise levels at every number of steps, which decide all else; whole edits at some of them."""
    scheduler = scheduler_of(name, kind)
    levels, refused = scheduler.alphas_cumprod, set()
    *together, apart = move_all(levels)[:, : len(UNITS) + 1].unbind(1)
    for scheduler.alphas_cumprod in (levels, apart):
        for steps in range(1, T + 1):
            try:
                backbone.set_timesteps(scheduler, steps)
            except ValueError:
                refused.add(steps)
                continue
            sigmas = scheduler.sigmas.numpy()
            assert len(sigmas) == steps + 1 and np.isfinite(sigmas).all() and sigmas[-1] == 0, steps
            assert (np.diff(sigmas) < 0).all() and scheduler.timesteps.min() >= 0, steps
            square, following = sigmas[:-1] ** 2, sigmas[1:] ** 2
            fresh = np.sqrt(following * (square - following) / square)  # an ancestral step's noise
            assert (following >= fresh**2).all(), steps
    assert refused <= {T}
    if name == "toy" and "Ancestral" in kind:
        with pytest.raises(NotImplementedError, match="sample"):  # of which edit.py makes one line
            draw(scheduler, 2)
        return
    for steps in (*range(1, 10), 15, 16, 20, 61):
        scheduler.alphas_cumprod = levels
        wanted = draw(scheduler, steps)
        for scheduler.alphas_cumprod in (*together, apart):
            torch.testing.assert_close(draw(scheduler, steps), wanted, rtol=1e-2, atol=1e-3)
