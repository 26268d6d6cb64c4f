"""Pictures from files and tables: six formats, a limit of pixels, errors of one line."""

import io
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from pictures.colour import to_rgb


class ImageError(ValueError):
    """A picture that cannot be read. The message is one line: `path: reason`."""

    def __init__(self, path: object, reason: str = "") -> None:
        # A DataLoader raises a worker's error again as ImageError(traceback), whose last line is the message.
        line = f"{path}: {reason}" if reason else str(path).strip().split("\n")[-1].split("ImageError: ")[-1]
        super().__init__(" ".join(line.split()))


class TableImage(NamedTuple):
    """Where a picture lies in a `datasets` table."""

    column: Any  # a datasets.Dataset of one column, its images still encoded
    row: int

    def __str__(self) -> str:
        return f"column {self.column.column_names[0]}, row {self.row}"

    def bytes(self) -> bytes:
        """The encoded picture. Raises ImageError for a mere path: a table may not name its reader's files."""
        (cell,) = self.column[self.row].values()
        if not (cell and cell["bytes"]):
            raise ImageError(self, "the row holds no image bytes")
        return cell["bytes"]


# The formats of photographs. Of Pillow's others EPS starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# What Pillow only warns of, `load_image` refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load_image(source: str | Path | TableImage) -> Image.Image:
    """A picture in one of `FORMATS`, the first frame of several, as `to_rgb` returns it.

    Raises ImageError, one line naming the file, for a missing, corrupt or truncated picture, and for more
    pixels than Pillow's `Image.MAX_IMAGE_PIXELS` (89 million), where Pillow alone would only warn.
    """
    try:  # `Image.open` reads the header alone
        with _image_file(source) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            return to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(source, f"not a picture that is read here ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ImageError(source, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise ImageError(source, f"corrupt or truncated picture ({error})") from None


def _image_file(source: str | Path | TableImage) -> io.IOBase:
    if isinstance(source, TableImage):
        return io.BytesIO(source.bytes())
    if not os.path.isfile(source):
        raise ImageError(source, "is a folder" if os.path.isdir(source) else "no such file")
    return open(source, "rb")


def path_inside(folder: Path, name: object) -> str:
    """The full path of `name` in a folder, whose own path is full and without links.

    Raises ValueError for a name that is absolute, or leads out of the folder by `..` or a symbolic link.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("a file name is empty or not a text")
    name.encode()  # raises ValueError where it was no UTF-8
    path = os.path.realpath(os.path.join(folder, name.replace("\\", "/")))
    if not path.startswith(os.path.join(folder, "")):
        raise ValueError(f"{name[:80]!r} is not a relative path inside the folder, free of links out of it")
    return path
