"""Pictures as tensors in [-1, 1] and back, square panels, and whether two pictures are one frame."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pictures.colour import to_rgb


def image_to_tensor(image: Image.Image) -> Tensor:
    """PIL image of (H, W), of any mode, to float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))  # (H, W, 3) uint8
    return from_bytes(pixels.permute(2, 0, 1).contiguous())


def tensor_to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], of any float type on any device, to a PIL image; clips values beyond.

    The exact inverse of `image_to_tensor`. Raises ValueError for another shape, and for NaN or infinity.
    """
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"an image is (3, H, W), not {tuple(tensor.shape)}")
    return Image.fromarray(to_bytes(tensor.detach()).permute(1, 2, 0).cpu().numpy())


def from_bytes(pixels: Tensor) -> Tensor:
    """Levels 0 … 255 of any shape, uint8, to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_bytes(tensor: Tensor) -> Tensor:
    """The inverse of `from_bytes`, for any float type; clips beyond [-1, 1]. Raises as `check_finite`."""
    return ((check_finite(tensor, "a picture").float().clamp(-1, 1) + 1) * 127.5).round().byte()


def check_finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself. Raises ValueError where it holds NaN or infinity; `what` names it in the message."""
    if not tensor.isfinite().all():
        raise ValueError(f"NaN or infinity in {what}")
    return tensor


def to_panel(image: Image.Image, size: int) -> Tensor:
    """The training crop: the largest centred square, resized to (3, P, P) in [-1, 1], P = `size` pixels.

    [ours] Lanczos, which antialiases, and no random crop: before and after keep one frame, and a panel's
    latent can be cached.
    """
    return image_to_tensor(ImageOps.fit(to_rgb(image), (size, size), method=Image.Resampling.LANCZOS))


def misfit(before: Image.Image, after: Image.Image) -> str:
    """Why two pictures of `load_image` cannot be one frame before and after an edit; "" where they can.

    [ours] They may differ by a uniform scale, and by a pixel of rounding. Where their files have different
    EXIF orientations, a program may have lost one: then none of the other seven may fit twice as well.
    """
    (width, height), (w, h) = before.size, after.size
    if abs(width * h - height * w) > max(width, height, w, h):
        return f"{w} × {h} pixels, where the picture before has {width} × {height}: not one frame"
    if before.info.get("orientation") != after.info.get("orientation"):
        before, after = (image.convert("L").resize((32, 32)) for image in (before, after))
        upright, *turned = (
            np.abs(np.subtract(before, image, dtype=np.float32)).mean()
            for image in (after, *map(after.transpose, Image.Transpose))
        )
        if 2 * min(turned) < upright:
            return "shows the picture before turned or mirrored, as one of the two lacks its EXIF orientation"
    return ""
