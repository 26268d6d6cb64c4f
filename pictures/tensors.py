"""Pictures as tensors in [-1, 1] and back, square panels, and whether two pictures are one frame."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from pictures.colour import to_rgb


def image_to_tensor(image: Image.Image) -> Tensor:
    """PIL image of (H, W), of any mode, to float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))  # (H, W, 3) uint8
    return from_bytes(pixels.permute(2, 0, 1).contiguous())


def tensor_to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], of any float type on any device, to a PIL image; clips values beyond.

    The exact inverse of `image_to_tensor`. Raises ValueError for NaN and infinity.
    """
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

    [ours] They may differ by a uniform scale, and by a pixel of rounding.
    """
    (width, height), (w, h) = before.size, after.size
    if abs(width * h - height * w) > max(width, height, w, h):
        return f"{w} × {h} pixels, where the picture before has {width} × {height}: not one frame"
    return ""


def fit_panel(image: Image.Image, size: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The whole picture in a panel (3, P, P) in [-1, 1], and its box there: left, top, right, bottom.

    [ours] The long side is resized to P = `size` (Lanczos), the picture centred, and its border repeated
    to fill the square. Training crops instead; but whoever edits a picture wants all of it.
    """
    image = to_rgb(image)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    picture = image_to_tensor(image.resize((width, height), Image.Resampling.LANCZOS))
    border = (left, size - width - left, top, size - height - top)
    return F.pad(picture, border, mode="replicate"), (left, top, left + width, top + height)


def unfit(answer: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """The part (..., height, width) of a panel (..., P, P) that `fit_panel` filled with the picture.

    [ours] As drawn. It has the input's aspect ratio and a long side of P; enlarging would invent nothing.
    """
    left, top, right, bottom = box
    return answer[..., top:bottom, left:right]
