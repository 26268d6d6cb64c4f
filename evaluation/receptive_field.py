"""The paper's figure of effective receptive fields: how much of the grid each kind of encoder looks at.

    python -m evaluation.receptive_field                       # conv, vit and vmamba, as they start
    python -m evaluation.receptive_field toy/weights/editor    # and a trained editor's encoder
    python -m evaluation.receptive_field --out docs/receptive_field.png

The field of one place of the encoder's last features is the gradient of a random sum over channels by the
pixels of the condition grid, its size averaged over grids. (Luo et al., 2016, take the plain sum. Behind a
normalisation over channels, as here, that one is constant as long as the normalisation is untrained.) The
place is the middle of the grid, whose pixels belong to the answer's panel; what it sees of the other three it
must see from afar. Printed is the smallest share of the grid's pixels that holds 50, 90 and 99 % of the whole
gradient.
"""

import argparse
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import backbone
from dataset import VisualPromptDataset, compose_grid, mask_query
from evaluation.evaluate import draw_queries
from evaluation.vit import ViTRCLDM
from pictures.answers import panel_rows, save_png
from pictures.pairs import read_pairs
from rcldm import RCLDM

SHARES = (0.5, 0.9, 0.99)


def receptive_field(model: RCLDM, grids: Tensor) -> Tensor:
    """The field (H, W) of the place in the middle, its sum 1. grids: (B, 3, H, W) in [-1, 1]."""
    encoder, is_conv, features = model.prompt_encoder, model.config.design == "conv", []
    last = encoder.conv_out if is_conv else encoder.zero_proj
    last_input = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    grids = grids.clone().requires_grad_()
    model.encode_condition(grids)
    last_input.remove()
    x = features[0] if is_conv else features[0].movedim(-1, 1)  # (B, C, h, w)
    middle = x[:, :, x.shape[2] // 2, x.shape[3] // 2]
    weights = torch.randn(middle.shape[1], generator=torch.Generator().manual_seed(0)).to(middle)
    (gradient,) = torch.autograd.grad((middle @ weights).sum(), grids)
    field = gradient.abs().sum(1).mean(0)
    return field / field.sum()


def area(field: Tensor, share: float) -> float:
    """The smallest part of the pixels that holds `share` of the field."""
    held = field.flatten().sort(descending=True).values.cumsum(0)
    return ((held < share).sum() + 1).item() / field.numel()


def picture(field: Tensor) -> Image.Image:
    """White where nothing is seen, darker with the logarithm of what is, over four powers of ten."""
    shade = 1 + (field / field.max()).clamp(min=1e-4).log10() / 4
    return Image.fromarray((255 * (1 - shade)).round().to(torch.uint8).numpy())


def fields(args: argparse.Namespace) -> dict[str, Tensor]:
    """By name, the fields of every design as it starts and of the editors' encoders."""
    preset = backbone.preset("toy")
    sd = backbone.load_stable_diffusion(preset.stable_diffusion)
    data = read_pairs(backbone.data_folder(preset.data), "seen")
    data = VisualPromptDataset(data, preset.panel, seed=0)
    queries = draw_queries(data, args.count, seed=0)
    panels = torch.stack([data.load_panels(query.example, query.index) for query in queries])
    grids = mask_query(compose_grid(*panels.unbind(1)))
    models: dict[str, RCLDM] = {}
    for design, kind in (("conv", RCLDM), ("vit", ViTRCLDM), ("vmamba", RCLDM)):
        torch.manual_seed(0)
        models[f"{design}, untrained"] = kind.from_unet(sd.unet, design, factor=backbone.vae_factor(sd.vae))
    for folder in args.editors:
        model, _ = backbone.load_editor(folder)
        models[f"{model.config.design}, {folder}"] = model
    return {name: receptive_field(model, grids) for name, model in models.items()}


@backbone.one_line_errors("evaluation.receptive_field")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("evaluation.receptive_field", __doc__)
    add = parser.add_argument
    add("editors", nargs="*", metavar="EDITOR", help="folders of editors, as train.py saves them")
    add("--count", type=int, default=64, help="grids to average over")
    add("--out", type=Path, help="a .png of the fields")
    args = parser.parse_args(argv)
    backbone.check_numbers(args, {(1, math.inf): "count"})
    found = fields(args)
    head = ["encoder", *(f"{100 * share:g} % of it in" for share in SHARES)]
    rows = [[name, *(f"{100 * area(field, s):.2f} %" for s in SHARES)] for name, field in found.items()]
    print(backbone.markdown(head, rows), end="")
    if args.out:
        panels = [(name, [picture(field)]) for name, field in found.items()]
        save_png(panel_rows(panels, (), side=192, columns=len(panels)), args.out)


if __name__ == "__main__":
    main()
