"""A trained editor's folder: weights, settings and the model card."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from huggingface_hub import ModelCardData

import backbone
from backbone import SAMPLING
from disk import atomic_folder


def save_editor(model: ModelMixin, args: argparse.Namespace, step: int, measured: dict[str, float]) -> None:
    """The EMA weights, the settings and a model card, in the folder that `edit.py --model` takes."""
    folders = {part: backbone.local_folder(getattr(args, part)) for part in args.fingerprints}
    beside = (args.output / "editor").resolve()
    relative = {part: os.path.relpath(folder, beside) for part, folder in folders.items() if folder}
    record = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record |= {"llm": None if args.no_liu else args.llm, "trained_steps": step} | SAMPLING
    record["relative"] = relative  # where the parts lie, seen from the editor
    with atomic_folder(args.output / "editor") as folder:
        model.save_pretrained(folder)
        (folder / "instructgie.json").write_text(json.dumps(record, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(record, measured), encoding="utf-8")


def model_card(settings: dict[str, Any], measured: dict[str, float] | None = None) -> str:
    """README.md of an editor: what it is, how it learnt, what was measured, its limits and licence.

    settings: what `train.py` records. measured: numbers by name, of the training's end.
    """
    source, data = str(settings.get("stable_diffusion", "unknown")), str(settings.get("data", "unknown"))
    licences = {preset.stable_diffusion: preset.licence for preset in backbone.PRESETS.values()}
    head = {"license": licences.get(source, "other"), "library_name": "diffusers"}
    head |= {"pipeline_tag": "image-to-image", "tags": ["instructgie", "image-editing", "in-context"]}
    if backbone.local_folder(source) is None and source.count("/") == 1:
        head["base_model"] = source
    off = [name for name in ("rcldm", "esm", "liu", "sam") if settings.get(f"no_{name}")]
    left_out = f"without {' and '.join(off).upper()}" if off else "with all four contributions"
    learnt = f"{settings.get('trained_steps', 'an unknown number of')} steps of {settings.get('batch', '?')}"
    numbers = "".join(f"| {name} | {value:.4g} |\n" for name, value in (measured or {}).items())
    numbers = f"| | |\n|---|---:|\n{numbers}" if numbers else "Nothing.\n"
    rows = "".join(f"| `{name}` | {json.dumps(value)} |\n" for name, value in sorted(settings.items()))
    return f"""---
{ModelCardData(**head).to_yaml()}
---

# InstructGIE editor

Shown one finished edit, or told in words, or both, it makes the same edit of another picture: a reading of
*InstructGIE: Towards Generalizable Image Editing* (Meng et al., ECCV 2024,
[arXiv 2403.05018](https://arxiv.org/abs/2403.05018)), {left_out}, on the frozen Stable Diffusion `{source}`.

```python
from apps.pipeline import InstructGIEPipeline

pipe = InstructGIEPipeline.from_pretrained("this folder")
edited = pipe("make it night", image, prompt_pair=(before, after)).images[0]
```

## Data

`{data}`, split `{settings.get("split", "unknown")}`: {learnt} grids.

## Measured

At the end of training, moving averages of the losses and, on a few queries of the validation split, the mean
absolute error of the answers in levels of 0 … 255. `evaluate.py` and `metrics.py` measure more.

{numbers}
## Limits

- Answers have a long side of {settings.get("panel", "P")} pixels, whatever the input's.
- Everything drawn passes the frozen autoencoder, and loses what that loses.
- Edits unlike those of the data may be made wrongly, in part, or not at all; whatever biases Stable Diffusion
  and the data have, the answers have too.

## Licence

That of the weights this was trained on, `{source}`: {head["license"]}.

## Settings

| | |
|---|---|
{rows}"""
