"""Any picture as upright 8-bit sRGB: orientation, colour profiles, transparency, 16 bits."""

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as upright 8-bit sRGB of mode "RGB".

    Applies the EXIF orientation and converts the colour profile. [ours] Transparency shows white, as on a
    page. The result has no `info`, so a second pass changes nothing. Raises ValueError for grey of more than
    16 bits.
    """
    image = _upright(image)
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")  # of its colours alone
    opacity = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opacity = image.getchannel("A")
    if profile and (to_srgb := _to_srgb(profile, mode)):
        image = to_srgb.apply(image.convert(mode))
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=opacity)
    return page


_T = Image.Transpose
_TURNED = {  # by EXIF orientation
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE,
    6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip


def _upright(image: Image.Image) -> Image.Image:
    """Pillow's own `exif_transpose` also writes the EXIF data anew, and fails where these are broken."""
    image.load()
    try:
        turned = _TURNED.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, KeyError, OSError, struct.error):
        turned = None  # [ours] broken EXIF data tell no orientation
    return image if turned is None else image.transpose(turned)


@lru_cache(maxsize=16)  # the pictures of a dataset share a few
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a mode's pixels from their ICC profile to sRGB; None where they stay as they are.

    [ours] A broken profile, or one of another mode, is ignored, as browsers do. A profile that moves no
    colour by more than two levels is sRGB under another name.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        to_srgb = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    cube = 17 * np.indices((16, 16, 16), np.uint8).reshape(3, -1, 1).T  # (1, 4096, 3)
    colours = Image.fromarray(cube).convert(mode)
    before, after = (np.asarray(x, np.int16) for x in (colours.convert("RGB"), to_srgb.apply(colours)))
    return to_srgb if np.abs(after - before).max() > 2 else None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 0 … 65,535, to 8 bits; Pillow's own conversion clips all above 255 to white."""
    if not image.mode.startswith("I;16"):
        raise ValueError("grey values of 32 bits or floats, which do not say what white is")
    values = np.asarray(image)
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    clear = values == image.info.get("transparency")
    if np.any(clear):
        grey.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return grey
