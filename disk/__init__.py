"""Files, folders and settings that are whole or not there at all."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` makes the file under another name, which becomes `path` when it is done. Raises OSError, also
    for what safetensors makes of one."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text whole or not at all, and makes its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write_text(text, encoding="utf-8"))


def as_lines(rows: Iterable[dict]) -> str:
    """JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def digest(folder: Path, files: Iterable[Path]) -> str:
    """A file of up to 64 MiB counts whole; a larger one by its size and 256 evenly spread blocks, which takes
    a fraction of a second. Training moves every block; a change of single weights may fall between two."""
    sha256 = hashlib.sha256()
    for file in sorted(files):
        size, block = file.stat().st_size, 1 << 18
        sha256.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(block, math.ceil(size / 256))):
                content.seek(start)
                sha256.update(content.read(block))
    return sha256.hexdigest()[:16]


WORLD_NOTE = "toy-world.txt"  # in a dataset that toy/world wrote: the version of its sources


def version(program: Path) -> str:
    """Of a program's folder: another after every change of its sources."""
    return digest(program, [*program.glob("*.py"), *program.glob("*.txt")])


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `path` when all is written, and only then.

    What a killed process has left of such folders is cleared away. Raises OSError, also for what safetensors
    makes of one, and ValueError for weights that are not finite, and then leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (no dict)
                    if not weights.get_tensor(name).isfinite().all():
                        raise ValueError(f"NaN or infinity in {name}: {path} is not written")
        for file in temporary.rglob("*"):  # on the disk before its name is, should the power fail
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder to this process while it is entered. The operating system drops the lock when the
    process ends, however that ends. Raises ValueError where another process holds it, and OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / "lock").acquire(blocking=False)
    except Timeout:
        reason = "another process writes there; wait for its end, or give another folder"
        raise ValueError(f"{folder}: {reason}") from None
    with lock:
        yield


def other_settings(path: Path, settings: dict[str, Any], anew: bool = False) -> dict[str, tuple[Any, Any]]:
    """Notes settings beside the work they are of, unless some are there (`anew`: even then); returns those
    that differ from what is there, as name → (there, now). Raises ValueError where that holds no settings."""
    settings = json.loads(json.dumps(settings))
    if anew or not path.exists():
        write_text(path, json.dumps(settings, indent=2) + "\n")
    try:
        there = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: holds no settings ({error}); remove its folder, or give another") from None
    pairs = {name: (there.get(name), settings.get(name)) for name in {**settings, **there}}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}
