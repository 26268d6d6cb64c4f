"""Pictures as tensors in [-1, 1] and back, square panels, and whether two pictures are one frame."""

from __future__ import annotations

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


def pixels_of(picture: np.ndarray | Tensor) -> Tensor:
    """An array (H, W, 3) or a tensor (3, H, W) to float32 (3, H, W) in [-1, 1], on the CPU.

    Floats are in [0, 1], integers in 0 … 255, booleans black or white. Raises ValueError for another shape,
    and for values outside: of such a picture nobody can tell which range it means.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype.kind not in "buif":
            raise ValueError(f"a picture is an array of numbers, not of {picture.dtype}")
        has_levels, values = picture.dtype.kind in "ui", torch.from_numpy(picture.astype(np.float32))
        values = values.permute(2, 0, 1) if values.ndim == 3 else values
    else:
        has_levels = not (picture.is_floating_point() or picture.dtype == torch.bool)
        values = picture.detach().float().cpu()
    if values.ndim != 3 or len(values) != 3 or values.numel() == 0:
        raise ValueError(f"a picture is (3, H, W) or an array (H, W, 3), not {tuple(picture.shape)}")
    if not values.isfinite().all():
        raise ValueError("a picture holds values that are no finite numbers")
    low, high = (extreme.item() for extreme in values.aminmax())
    kind, white = ("integers", 255) if has_levels else ("floats", 1)
    if low < -1e-3 or high > white + 1e-3:  # floats may have been rounded
        raise ValueError(f"a picture of {kind} has a range of 0 … {white}, this one of {low:g} … {high:g}")
    return values.clamp(0, white) / (white / 2) - 1


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
