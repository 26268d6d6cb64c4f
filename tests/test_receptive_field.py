"""evaluation/receptive_field.py: fields whose extent is known beforehand."""

import pytest
import torch
from tiny import new_unet

from evaluation import receptive_field as erf
from evaluation.vit import ViTRCLDM
from rcldm import RCLDM


def test_the_area_is_that_of_the_smallest_part():
    field = torch.tensor([[0.5, 0.25], [0.125, 0.125]])
    assert [erf.area(field, share) for share in (0.4, 0.5, 0.7, 0.8, 1.0)] == [0.25, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("design", ["vmamba", "conv", "vit"])
def test_convolutions_see_their_neighbourhood_and_the_others_everything(design):
    sizes = dict(block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8)
    unet = new_unet(**sizes)
    kind = ViTRCLDM if design == "vit" else RCLDM
    model = kind.from_unet(unet, design, prompt_encoder_depth=2)
    grids = torch.rand(2, 3, 128, 128) * 2 - 1
    field = erf.receptive_field(model, grids)
    assert field.shape == (128, 128) and field.sum() == pytest.approx(1, abs=1e-4)
    middle = torch.zeros(128, 128, dtype=torch.bool)
    middle[44:92, 44:92] = True
    assert (field[~middle] > 0).all() if design != "conv" else not field[~middle].any()
    assert field[60:76, 60:76].mean() > 2 * field.mean()
    true = erf.receptive_field(model.double(), grids.double())
    assert (field - true).abs().sum() < 1e-3  # it is no rounding
