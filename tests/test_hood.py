"""apps/hood.py: the picture of what an edit's parts see."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from apps.hood import Hood, show_shifts
from toy import world

SCENE = world.Scene(
    "cream", (world.Thing("face", "tan", "top left"), world.Thing("heart", "red", "top right"))
)


@pytest.fixture(scope="module")
def hood():
    return Hood({}, panel=64)


def test_it_shows_condition_areas_and_shifts(hood):
    before, after = world.render(SCENE), world.render(world.Edit("surprise", "face").apply(SCENE))
    pictures = [
        hood.draw(pair, before, after, "make the face look surprised") for pair in (None, (before, after))
    ]
    assert all(picture.size == pictures[0].size and picture.width > 1000 for picture in pictures)
    quarter = pictures[0].width // 4
    told, shown = (np.asarray(picture) for picture in pictures)
    assert (told[:, :quarter] != shown[:, :quarter]).any(), "the example stands in the condition"
    assert (told[:, 3 * quarter :] != shown[:, 3 * quarter :]).any(), "and has a shift of its own"
    tint = (np.abs(told.astype(int) - (0xD1, 0x49, 0x5B)).sum(-1) < 30)[:, quarter : 3 * quarter]
    assert tint.sum() > 100, "the face is framed in input and answer"
    plain = world.render(world.Edit("remove", "face").apply(SCENE))
    unframed = np.asarray(hood.draw(None, plain, plain, ""))[:, quarter : 3 * quarter]
    assert not (np.abs(unframed.astype(int) - (0xD1, 0x49, 0x5B)).sum(-1) < 30).any()
    assert hood.draw(None, plain, plain, r"for $5 make it $\frac$ night " * 20).size == pictures[0].size


def test_arrows_have_the_shifts_lengths_and_angle():
    ax = Figure().subplots()
    first, second = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    show_shifts(ax, {"made": first, "shown": second})
    ends = torch.tensor([text.xy for text in ax.texts])
    assert ends.norm(dim=1).tolist() == pytest.approx([first.norm().item(), second.norm().item()], rel=1e-5)
    assert torch.cosine_similarity(*ends, dim=0).item() == pytest.approx(
        torch.cosine_similarity(first, second, dim=0).item(), abs=1e-5
    )
    show_shifts(Figure().subplots(), {"nothing changed": torch.zeros(4), "shown": torch.ones(4)})
