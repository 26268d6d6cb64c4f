"""The paper's comparison: ViT in place of VMamba, all else equal.

    python -m evaluation.vit --output runs/vit       # trains it; the options are those of train.py
    python -m evaluation.evaluate runs/vit/editor    # edits with it

[paper] Its figure of receptive fields sets ViT beside VMamba. Attention sees the whole grid too, at a cost of
(H·W)². [ours] Stem, depth, width and MLP ratio are those of `VisualPromptEncoder`; the links are ControlNet's
zero convolutions. `backbone.load_editor` knows such editors where this module is imported (evaluate.py).
"""

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import train
from rcldm import RCLDM, VisualPromptEncoder


class ViTBlock(nn.TransformerEncoderLayer):
    """The pre-norm transformer block, channels last: (B, H, W, C) → (B, H, W, C)."""

    def __init__(self, dim: int):
        heads = dim // next(size for size in range(min(64, dim), 0, -1) if dim % size == 0)
        super().__init__(
            dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).reshape(x.shape)


class ViTRCLDM(RCLDM):
    """RCLDM of design "vit": its own prompt encoder, and zero convolutions as links."""

    def new_prompt_encoder(self, channels: int) -> nn.Module:
        config = self.config
        encoder = VisualPromptEncoder(channels, 0, config.prompt_encoder_width, factor=config.factor)
        (dim,) = encoder.norm.normalized_shape
        encoder.blocks = nn.ModuleList(ViTBlock(dim) for _ in range(config.prompt_encoder_depth))
        return encoder

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, design: str = "vit", **options) -> "ViTRCLDM":
        """`train.py` asks for "vmamba", in whose place ViT stands. Raises ValueError for "conv"."""
        if design == "conv":
            raise ValueError("--no-rcldm: this program trains ViT in that place; use train.py")
        return super().from_unet(unet, "vit", **options)


if __name__ == "__main__":
    train.main(new_model=ViTRCLDM.from_unet)
