"""Any picture as upright 8-bit sRGB: orientation, colour profiles, transparency, 16 bits."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from PIL import Image, ImageCms, ImageOps

SRGB = ImageCms.createProfile("sRGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as upright 8-bit sRGB of mode "RGB".

    Applies the EXIF orientation and converts the colour profile. [ours] Transparency shows white, as on a
    page. [ours] A broken profile, or one of another mode, is ignored, as browsers do. The result has no
    `info`, so a second pass changes nothing. Raises ValueError for grey of more than 16 bits.
    """
    image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        if not image.mode.startswith("I;16"):
            raise ValueError("grey values of 32 bits or floats, which do not say what white is")
        # 0 … 65,535 to 8 bits; Pillow's own conversion clips all above 255 to white.
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")  # of its colours alone
    opacity = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opacity = image.getchannel("A")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            plain = image.convert(mode)
            image = ImageCms.profileToProfile(plain, io.BytesIO(profile), SRGB, outputMode="RGB")
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=opacity)
    return page
