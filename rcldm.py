"""Contribution 1 of InstructGIE: the Reformed Conditioned Latent Diffusion Model (RCLDM).

The visual prompt is a 2×2 grid: an example pair above, the query and its grey answer panel below. To infer
the edit from the example, the network must relate panels that lie half an image apart. [paper] VMamba encodes
the visual prompt, because its effective receptive field is larger.
A mark stands before its statement: [paper] from the paper's public summary, [figure] from its figures, [ours]
our own choice.

    condition grid → VisualPromptEncoder → + → trainable copy of the U-Net's encoder → ZeroVMamba links
                        (0 at the start)   ↑                                            (0 at the start)
                             conv_in(noisy latents)                         residuals of the frozen U-Net ↲

VMamba (Liu et al., 2024) runs Mamba's selective state space model (Gu and Dao, 2023) over the pixels in four
orders, at linear cost. Each channel keeps a state h of N numbers; Δ, B and C are computed from the input:

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t        A < 0: the state forgets

Shapes: B batch · C image channels · H, W height, width · L = H·W length of a scan · K = 4 directions
        D channels of a scan · G groups of P = D/G channels, which share B and C · R rank of Δ
B, C and D also name Mamba's parameters; shapes always stand in brackets. `python rcldm.py` prints an example.
Img_VPcon is the condition grid, G_ven its encoder, l the instruction, l' its form as unified by liu.py.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ControlNetModel, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets import controlnet
from torch import Tensor, nn

# -------- 1. The selective scan ---------------------------------------------------------------------


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The recurrence above along the last axis, with mamba-ssm's shapes. Returns y, of u's shape and dtype.

    u, delta (B, D, L) or (B, G, P, L); A (D, N); B, C (B, G, N, L) or (B, N, L); D, delta_bias (D,) or None.
    Δ is delta + delta_bias, and with `delta_softplus` log(1 + exp(·)) of that, which is always positive.
    backend: "reference", the specification, written out here, or one of scan_kernels/ ("auto": the fastest
    that runs). The state is float32, or float64 if u is. Raises: see `scan_kernels.fast_scan`.
    """
    if backend != "reference":
        from scan_kernels import fast_scan

        return fast_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend)
    wide, groups = torch.promote_types(u.dtype, torch.float32), B.shape[1] if B.dim() == 4 else 1
    x, delta = (v.to(wide).reshape(len(v), groups, -1, 1, v.shape[-1]) for v in (u, delta))  # (B, G, P, 1, L)
    B, C = (w.to(wide).reshape(len(w), groups, 1, *w.shape[-2:]) for w in (B, C))  # (B, G, 1, N, L)
    A = A.to(wide).unflatten(0, (groups, -1))  # (G, P, N)
    if delta_bias is not None:
        delta = delta + delta_bias.to(wide).view(groups, -1, 1, 1)
    if delta_softplus:
        delta = F.softplus(delta)
    h, ys = torch.zeros_like(A), []
    # unbind, not indexing: the gradient of x[..., t] is a tensor as large as x, at every step.
    for u_t, delta_t, B_t, C_t in zip(*(v.unbind(-1) for v in (x, delta, B, C))):
        h = torch.exp(delta_t * A) * h + delta_t * B_t * u_t  # (B, G, P, N)
        ys.append((C_t * h).sum(-1))
    y = torch.stack(ys, dim=-1)  # (B, G, P, L)
    if D is not None:
        y = y + D.to(wide).view(groups, -1, 1) * x[:, :, :, 0]
    return y.reshape(u.shape).to(u.dtype)


# -------- 2. Four orders over an image --------------------------------------------------------------


def _in_scan_order(x: Tensor) -> Tensor:
    """An image for each direction, (4, B, H, W, C) → (4, B, L, C): rows, columns, and both from the end."""
    rows, columns, rows_back, columns_back = x.unbind(0)
    rows, rows_back = rows.flatten(1, 2), rows_back.flatten(1, 2)
    columns, columns_back = (c.transpose(1, 2).flatten(1, 2) for c in (columns, columns_back))
    return torch.stack([rows, columns, rows_back.flip(1), columns_back.flip(1)])


def cross_scan(x: Tensor) -> Tensor:
    """An image as four sequences, in VMamba's orders: (B, C, H, W) → (B, 4, C, H·W)."""
    return _in_scan_order(x.permute(0, 2, 3, 1).expand(4, -1, -1, -1, -1)).permute(1, 0, 3, 2)


def cross_merge(ys: Tensor, height: int, width: int) -> Tensor:
    """The adjoint of `cross_scan`: each pixel sums its four scans. (B, 4, C, H·W) → (B, C, H, W)."""
    rows, columns = (ys[:, :2] + ys[:, 2:].flip(3)).unbind(1)  # a scan and its reverse
    return rows.unflatten(2, (height, width)) + columns.unflatten(2, (width, height)).mT


def four_scans(x: Tensor, *parameters: Tensor) -> Tensor:
    """Scans the image x (B, P, H, W) in four orders, and sums the scans at each pixel: (B, P, H, W).

    parameters: Δ, A, B, C, D and Δ's bias of `selective_scan`, with a group for each direction, in its order.
    """
    from scan_kernels import scan_image, scans_images_in_place

    if scans_images_in_place(x):  # the same sum by a kernel that needs no copies of the image
        return scan_image(x, cross_scan, *parameters, delta_softplus=True)  # reads the orders off cross_scan
    return cross_merge(selective_scan(cross_scan(x), *parameters, delta_softplus=True), *x.shape[2:])


# -------- 3. The VMamba block -----------------------------------------------------------------------


class _PerDirection(nn.Linear):
    """K linear layers without bias, their weights stacked (K·P, R): (K, ·, R) → (K, ·, P).

    It is a module of its own, so the hooks that cast, move or load a layer's weights reach it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.unflatten(0, (len(x), -1)).mT.contiguous()  # contiguous() halves the time


class SS2D(nn.Module):
    """VMamba's 2-D selective scan: (B, H, W, C) → (B, H, W, C), every pixel reading from every other.

    d_model: C. A direction scans P = `ssm_ratio`·C channels, so D = K·P. d_state: N. R is C/16, rounded up.

    As in VMamba's released weights: no gate, and a depthwise convolution without bias before the scan.
    Parameters have VMamba's names, with the directions' weights stacked: x_proj.weight (K·(R+2N), P),
    dt_projs.weight (K·P, R), dt_projs_bias (K, P), A_logs (K·P, N), Ds (K·P,).
    """

    def __init__(self, d_model: int, d_state: int = 1, ssm_ratio: float = 2.0):
        super().__init__()
        inner, rank, k = int(ssm_ratio * d_model), math.ceil(d_model / 16), 4
        self.split = [rank, d_state, d_state]
        self.in_proj = nn.Linear(d_model, inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.x_proj = nn.Linear(inner, k * sum(self.split), bias=False)
        self.dt_projs = _PerDirection(rank, k * inner, bias=False)
        nn.init.uniform_(self.dt_projs.weight, -(rank**-0.5), rank**-0.5)
        # Mamba's start: softplus(bias) is a step between 0.001 and 0.1, uniform in its logarithm, so that
        # some channels remember ten pixels and some a thousand; and A = -1, -2, …, -N in every channel.
        step = torch.exp(torch.empty(k, inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_projs_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_logs = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(k * inner, 1))
        self.Ds = nn.Parameter(torch.ones(k * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x).permute(0, 3, 1, 2)  # channels first in shape, last in memory
        x = F.silu(self.conv2d(x))

        # Each pixel yields Δ, B and C four times, once for each direction. Δ has rank R: dt_projs widens it.
        by_direction = self.x_proj(x.permute(0, 2, 3, 1)).unflatten(3, (4, -1)).permute(3, 0, 1, 2, 4)
        in_order = _in_scan_order(by_direction).flatten(1, 2)  # (K, B, H, W, R+2N) → (K, B·L, R+2N)
        delta, B, C = in_order.split(self.split, dim=2)
        # (K, B·L, ·) → (B, K, ·, L)
        delta, B, C = (w.unflatten(1, (len(x), -1)).permute(1, 0, 3, 2) for w in (self.dt_projs(delta), B, C))
        A = -self.A_logs.float().exp()
        y = four_scans(x, delta, A, B, C, self.Ds, self.dt_projs_bias.flatten())
        return self.out_proj(self.out_norm(y.permute(0, 2, 3, 1)))


class VSSBlock(nn.Module):
    """VMamba's block, channels last: x + SS2D(norm(x)), then x + MLP(norm(x)). (B, H, W, C) → (B, H, W, C).

    Arguments and parameters have VMamba's names, so the blocks of its released ImageNet weights (v2; tiny,
    small, base) load with `strict=True`. ssm_ratio is 1 in those called s1, and 2 in s2. No MLP at ratio 0.
    """

    def __init__(self, hidden_dim: int, ssm_d_state: int = 1, ssm_ratio: float = 2.0, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.op = SS2D(hidden_dim, ssm_d_state, ssm_ratio)
        self.norm2 = self.mlp = None
        if mlp_ratio > 0:
            wide = int(mlp_ratio * hidden_dim)
            layers = {
                "fc1": nn.Linear(hidden_dim, wide),
                "act": nn.GELU(),
                "fc2": nn.Linear(wide, hidden_dim),
            }
            self.norm2, self.mlp = nn.LayerNorm(hidden_dim), nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.op(self.norm(x))
        return x if self.mlp is None else x + self.mlp(self.norm2(x))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """VMamba's weights stack the directions, (K, out, in), and may hold layers as 1×1 convolutions."""
        for part in ("x_proj", "dt_projs"):
            if (stacked := state_dict.pop(f"{prefix}op.{part}_weight", None)) is not None:
                state_dict[f"{prefix}op.{part}.weight"] = stacked.flatten(0, 1)
        for part in ("op.in_proj", "op.out_proj", "mlp.fc1", "mlp.fc2"):
            weight = state_dict.get(f"{prefix}{part}.weight")
            if weight is not None and weight.shape[2:] == (1, 1):
                state_dict[f"{prefix}{part}.weight"] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


# -------- 4. Zero-VMamba ----------------------------------------------------------------------------


class ZeroVMamba(nn.Module):
    """Zero-VMamba behind the trainable copy: zero_proj(VSSBlock(x)), (B, C, H, W) → (B, C, H, W).

    [figure] One block stands behind the copy. [ours] We put one in the place of each zero convolution.
    [ours] A linear layer that starts at zero follows the block, and no skip connection bypasses the two: the
    residual is exactly 0 at the start. If SS2D returned 0, the link would be ControlNet's zero convolution.
    [ours] N = 1, ratio 1, no MLP.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.block = VSSBlock(channels, ssm_d_state=1, ssm_ratio=1.0, mlp_ratio=0.0)
        self.zero_proj = controlnet.zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.zero_proj(self.block(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


# -------- 5. The visual prompt encoder --------------------------------------------------------------


def panel_places(height: int, width: int, device: torch.device) -> Tensor:
    """The code of each place of a 2×2 grid, (H, W, 27): sine and cosine of y and of x within the panel, of
    wavelengths p, p/2, … p/32, where p is its side; ±1 for its row and its column of panels; their product.
    """
    codes = []
    for side in (height, width):
        position = torch.arange(side, device=device)
        panel = 1 - 2 * (position >= side / 2).float()
        phase = 4 * torch.pi * position[:, None] / side * 2 ** torch.arange(6, device=device)
        codes.append(torch.cat([phase.sin(), phase.cos(), panel[:, None]], 1))  # (side, 13)
    rows, columns = codes[0][:, None].expand(-1, width, -1), codes[1].expand(height, -1, -1)
    return torch.cat([rows, columns, rows[..., -1:] * columns[..., -1:]], 2)


class VisualPromptEncoder(nn.Module):
    """G_ven, which the figure labels Zero-VMamba too: the condition grid (B, 3, H, W) in [-1, 1] →
    (B, out_channels, H/factor, W/factor), zero at the start. [figure] It stands before the trainable copy.

    [ours] A patch embedding of log2(factor) convolutions of stride 2 (like VMamba v2's), `depth` VMamba
    blocks, and a linear projection that starts at zero. Every place can read the whole grid from the first
    block on. Depth 4, blocks at latent resolution, ratio 1, MLP ratio 2; the width of the U-Net's first
    level, but at least 64.
    [ours] A positional encoding gives the position within the panel, and identifies the panel. Corresponding
    positions of the four panels share most of it.
    [ours] N = 4 numbers of state, where VMamba v2 classifies with one. A position reads another by C · B, its
    query and the other's key, both of length N, as in linear attention.
    """

    def __init__(
        self, out_channels: int, depth: int = 4, width: int | None = None, d_state: int = 4, factor: int = 8
    ):
        super().__init__()
        width = width or max(64, out_channels)
        halvings = factor.bit_length() - 1
        widths = [3, *(max(16, width >> i) for i in range(halvings - 1, 0, -1)), width]  # SD: 3, 80, 160, 320
        stride = min(2, factor)  # factor 1: diffusion of pixels
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 3, stride, padding=1) for a, b in pairwise(widths))
        self.stem_norms = nn.ModuleList(nn.LayerNorm(b) for b in widths[1:])
        self.place_proj = nn.Linear(27, width, bias=False)  # of `panel_places`
        self.blocks = nn.ModuleList(VSSBlock(width, d_state, 1.0, mlp_ratio=2.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.zero_proj = controlnet.zero_module(nn.Linear(width, out_channels))
        self.gradient_checkpointing = False  # diffusers' ModelMixin sets this attribute

    def forward(self, grid: Tensor) -> Tensor:
        x = grid.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.stem, self.stem_norms):
            x = x if conv is self.stem[0] else F.gelu(x).permute(0, 3, 1, 2)
            x = norm(conv(x).permute(0, 2, 3, 1))  # (B, H, W, C)
        x = x + self.place_proj(panel_places(*x.shape[1:3], x.device).to(x.dtype))
        for block in self.blocks:
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
            x = self._gradient_checkpointing_func(block, x) if checkpointed else block(x)
        return self.zero_proj(self.norm(x)).permute(0, 3, 1, 2)


# -------- 6. RCLDM ----------------------------------------------------------------------------------


class RCLDM(ModelMixin, ConfigMixin):
    """[paper] [figure] A ControlNet whose two additions are VMamba: the condition's encoder before the copy
    of the U-Net's encoder, and the links behind it. It is called as `ControlNetModel` is.

    Args:
        unet_encoder: configuration of the trainable copy, as `ControlNetModel` takes it; `from_unet` has it.
        design: type of encoder and links. "vmamba", the paper's: `VisualPromptEncoder` and `ZeroVMamba`;
            [ours] "conv": ControlNet's own encoder and zero convolutions replace both (`--no-rcldm`).
        factor: image pixels per latent along a side, a power of two (8 for Stable Diffusion).
        prompt_encoder_depth, _width, _d_state: of the `VisualPromptEncoder`.
        panel: training panel size in pixels; None if unknown.

    Before training, every design leaves the U-Net's output exactly unchanged, because the links' projections
    start at zero. The encoder's zero projection leaves the copy's input unchanged. The first gradient reaches
    the links' projections; the second, the links, the copy and the encoder's projection; the third, the rest.
    """

    _supports_gradient_checkpointing = True
    # What diffusers offloads block by block: each loads what its own `forward` needs.
    _group_offload_block_modules = ("prompt_encoder", "trainable_copy")

    @register_to_config
    def __init__(
        self,
        unet_encoder: dict,
        design: str = "vmamba",
        factor: int = 8,
        prompt_encoder_depth: int = 4,
        prompt_encoder_width: int | None = None,
        prompt_encoder_d_state: int = 4,
        panel: int | None = None,
    ):
        super().__init__()
        if factor < 1 or factor & (factor - 1):
            raise ValueError(f"factor must be a power of two, got {factor}")
        # diffusers builds and runs the copy. We replace its condition embedding and zero convolutions.
        self.trainable_copy = copy = ControlNetModel(**unet_encoder)
        copy.controlnet_cond_embedding = nn.Identity()  # `forward` passes encoded conditions
        self.prompt_encoder = self.new_prompt_encoder(copy.config.block_out_channels[0])
        if design == "vmamba":
            links = [*copy.controlnet_down_blocks, copy.controlnet_mid_block]  # zero convolutions until here
            *down, copy.controlnet_mid_block = [ZeroVMamba(link.in_channels) for link in links]
            copy.controlnet_down_blocks = nn.ModuleList(down)

    def new_prompt_encoder(self, channels: int) -> nn.Module:
        """The encoder of this design; evaluation/vit.py has another. channels: of the U-Net's first level."""
        config = self.config
        if config.design == "vmamba":
            size = config.prompt_encoder_depth, config.prompt_encoder_width, config.prompt_encoder_d_state
            return VisualPromptEncoder(channels, *size, config.factor)
        if config.design == "conv":
            levels = config.factor.bit_length()  # ControlNet's own widths at factor 8
            widths = (16, 32, 96, *[256] * levels)[:levels]
            return controlnet.ControlNetConditioningEmbedding(channels, block_out_channels=widths)
        raise ValueError(f"unknown design {config.design!r}: choose one of vmamba, conv")

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, design: str = "vmamba", **options) -> RCLDM:
        """A model for `unet`, whose trainable copy starts from its weights. `options`: those of the class."""
        copy = ControlNetModel.from_unet(unet)
        config = {name: copy.config[name] for name in sorted(copy.config) if not name.startswith("_")}
        model = cls(config, design, **options)
        weights = {name: w for name, w in copy.state_dict().items() if not name.startswith("controlnet_")}
        model.trainable_copy.load_state_dict(weights, strict=False)  # these lack what we replace
        return model

    def encode_condition(self, grid: Tensor) -> Tensor:
        """The condition grid (B, 3, H, W) in [-1, 1] → its encoding (B, C0, H/factor, W/factor).

        `forward` takes it in the grid's place, so that an edit encodes its grid once. To leave the example
        out, encode a grid whose example row is grey (`dataset.drop_example`): no zero encoding was trained.
        """
        sides = 2 * self.config.factor  # two panels, each a whole number of latents
        if grid.dim() != 4 or grid.shape[1] != 3 or grid.shape[2] % sides or grid.shape[3] % sides:
            wanted = f"(B, 3, H, W) with H and W multiples of {sides}"
            raise ValueError(f"the condition grid must be {wanted}, got {(*grid.shape,)}")
        return self.prompt_encoder(grid.to(self.dtype))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        return_dict: bool = True,
        **kwargs,
    ) -> controlnet.ControlNetOutput | tuple[list[Tensor], Tensor]:
        """The residuals that `UNet2DConditionModel` adds to its skip features and its middle block's output.

        sample: noisy latents of the whole grid (B, latent channels, h, w). timestep: one, or (B,).
        encoder_hidden_states: l' as embeddings (B, T, cross_attention_dim). controlnet_cond: condition grids
        (B or 1, 3, factor·h, factor·w) in [-1, 1], or `encode_condition` of them (B or 1, C0, h, w).
        conditioning_scale: factor on all residuals. kwargs: for `ControlNetModel.forward`.

        Returns `ControlNetOutput`, or without `return_dict` (down_block_res_samples, mid_block_res_sample).
        Raises ValueError for a condition of another size.
        """
        is_picture = controlnet_cond.shape[1] == 3
        features = self.encode_condition(controlnet_cond) if is_picture else controlnet_cond
        if features.shape[2:] != sample.shape[2:] or len(features) not in (1, len(sample)):
            shapes = f"{(*controlnet_cond.shape,)} to latents {(*sample.shape,)}"
            raise ValueError(f"the condition does not fit: {shapes}, factor {self.config.factor}")
        inputs = sample, timestep, encoder_hidden_states, features.to(sample.dtype)
        return self.trainable_copy(*inputs, conditioning_scale, return_dict=return_dict, **kwargs)


# -------- A worked example --------------------------------------------------------------------------


def main() -> None:
    torch.manual_seed(0)
    print("1. Four orders over the image [[0, 1, 2], [3, 4, 5]]")
    image = torch.arange(6.0).view(1, 1, 2, 3)
    for name, sequence in zip(("rows", "columns", "rows, back", "columns, back"), cross_scan(image)[0, :, 0]):
        print(f"   {name:14}{sequence.int().tolist()}")
    print(f"   merged, each pixel four times: {cross_merge(cross_scan(image), 2, 3)[0, 0].tolist()}")

    print("2. RCLDM on a small U-Net of random weights")
    levels = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32}
    levels |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4}
    unet = UNet2DConditionModel(**levels, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    inputs, grid = (torch.randn(1, 4, 16, 16), 500, torch.randn(1, 5, 32)), torch.rand(1, 3, 128, 128) * 2 - 1
    model = RCLDM.from_unet(unet)
    with torch.no_grad():
        down, mid = model(*inputs, grid, return_dict=False)
        residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        same = torch.equal(unet(*inputs, **residuals).sample, unet(*inputs).sample)
    print(f"   {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    print(f"   residuals {[(*r.shape[1:],) for r in (*down, mid)]}")
    print(f"   untrained, the U-Net's output is unchanged to the last bit: {same}")


if __name__ == "__main__":
    main()
