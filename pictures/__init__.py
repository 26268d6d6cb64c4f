"""Pictures of any kind, seen in one way: read, upright, in sRGB, as tensors; and pairs of them (pairs.py)."""

from pictures.colour import to_rgb
from pictures.files import FORMATS, ImageError, TableImage, load_image, path_inside
from pictures.tensors import (
    check_finite,
    fit_panel,
    from_bytes,
    image_to_tensor,
    misfit,
    tensor_to_image,
    to_bytes,
    to_panel,
    unfit,
)
