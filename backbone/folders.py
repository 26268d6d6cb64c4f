"""Where a model lies: a folder, or a hub id's snapshot; and that it is the one that was meant.

Weights are read from safetensors alone, and no code that comes with them is run.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from disk import digest

HERE = Path(__file__).resolve().parents[1]


class BackboneError(ValueError):
    """A part that cannot be loaded. The message is one line: which, why, and what to do."""


# What a model folder may consist of: weights as safetensors, and texts.
_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja")
_VARIANTS = ("*.fp16.*", "*.non_ema.*", "*.bf16.*")

# What of each part's folder is read.
FOLDERS = {
    "stable_diffusion": [f"{name}/*" for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")],
    **{part: ["*"] for part in ("llm", "clip", "clip_eval", "segmenter", "editor")},
}


def local_folder(source: str | Path) -> Path | None:
    """The folder of that path, seen from here or from this repository; None where there is none."""
    return next((folder.resolve() for folder in (Path(source), HERE / source) if folder.is_dir()), None)


def find_folder(source: str | Path, patterns: list[str] | None = None) -> Path:
    """A local folder, also relative to this repository; or a hub id's snapshot, of which only safe files."""
    if folder := local_folder(source):
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise BackboneError(f"{source}: no such folder; give a model's folder or a hub id, owner/name")
    from huggingface_hub import snapshot_download

    wanted = [p.replace("*", "") + f for p in patterns or [""] for f in _FILES]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted, ignore_patterns=list(_VARIANTS)))
    except (OSError, ValueError) as error:
        reason = f"the hub cannot be reached or does not give this model ({type(error).__name__})"
        way = "check the id, the network and the model's licence (`hf auth login`), or give a folder"
        raise BackboneError(f"{source}: {reason}; {way}") from None


def lasting_name(source: str) -> str:
    """A source by which it is found from any folder: a local one by its full path, or as this repository
    names it; a hub id as it is."""
    folder = local_folder(source)
    if folder is None:
        return source
    return folder.relative_to(HERE).as_posix() if folder.is_relative_to(HERE) else str(folder)


def fingerprint(source: str | Path, part: str) -> str:
    """Of the weights of a part, to know them again wherever they lie. Raises BackboneError."""
    folder = find_folder(source, FOLDERS[part])
    files = (file for pattern in FOLDERS[part] for file in folder.glob(f"{pattern}.safetensors"))
    return _digest(folder, files)


def fingerprint_of(model: Any) -> str:
    """Of all the files that `backbone` has loaded a model from: weights, configs, and a tokenizer's."""
    files = {file for kind in _FILES for file in model.source.glob(kind) if file.match(model.files)}
    return _digest(model.source, files)


def _digest(folder: Path, files: Iterable[Path]) -> str:
    return digest(folder, [file for file in files if not any(map(file.match, _VARIANTS))])


def find_part(settings: dict[str, Any], part: str) -> Path:
    """The folder of a part that an editor needs, "stable_diffusion" or "llm".

    It is looked for by its `lasting_name`. Raises BackboneError where there is none, or one of another
    fingerprint than the editor's settings have.
    """
    source, wanted = settings[part], settings.get("fingerprints", {}).get(part)
    folder = HERE / source  # a full path stays as it is
    folder = folder if folder.is_dir() else find_folder(source, FOLDERS[part])
    if wanted not in (None, fingerprint(folder, part)):
        raise BackboneError(
            f"{folder}: not the weights that the editor was trained with; put those there, "
            'or remove "fingerprints" from its instructgie.json'
        )
    return folder


@contextlib.contextmanager
def clear_errors(source: object, what: str, folder: Path) -> Iterator[None]:
    """Whatever a library makes of a broken model folder becomes one line."""
    try:
        for names in ("*config.json", "*.safetensors.index*.json"):
            for path in (*folder.glob(names), *folder.glob(f"*/{names}")):
                read_json(path)
        yield
    except BackboneError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise BackboneError(f"{source}: not {what} ({reason})") from None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), object_hook=_refuse_code)


def _refuse_code(config: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for shards that are no safetensors of the folder, and so may be read as pickles, and
    for attention that is code from the hub."""
    for key, value in config.items():
        if key == "weight_map":
            for name in value.values():
                if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                    raise ValueError(f"{name[:80]!r} is no safetensors file of the folder")
        if key.endswith("_implementation") and "/" in str(value):
            raise ValueError(f"{key} {str(value)[:80]!r} is code from elsewhere")
    return config


def check_parts(folder: Path) -> None:
    """Raises ValueError where a pipeline's `model_index.json` names a class of its own, or of a library that
    has no business there: to import one is to run it."""
    for name, part in read_json(folder / "model_index.json").items():
        if isinstance(part, list):
            library, kind = part
            known = library in (None, "diffusers", "transformers", "rcldm")
            automatic = library == "transformers" and str(kind).startswith("Auto")  # as a config has it
            if not known or automatic or (folder / name / f"{library}.py").exists():
                raise ValueError(f"{name} would be code from elsewhere, {str(part)[:80]}")
