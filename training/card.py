"""A trained editor's folder: weights, settings and the model card."""

from __future__ import annotations

import argparse
import json
from typing import Any

from diffusers import ModelMixin
from huggingface_hub import ModelCardData

import backbone
from backbone import SAMPLING
from disk import atomic_folder


def save_editor(model: ModelMixin, args: argparse.Namespace, step: int, measured: dict[str, float]) -> None:
    """The EMA weights, the settings and a model card, in the folder that `edit.py --model` takes."""
    record = vars(args) | {"llm": None if args.no_liu else args.llm, "trained_steps": step} | SAMPLING
    with atomic_folder(args.output / "editor") as folder:
        model.save_pretrained(folder)
        (folder / "instructgie.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        (folder / "README.md").write_text(model_card(record, measured), encoding="utf-8")


def model_card(settings: dict[str, Any], measured: dict[str, float] | None = None) -> str:
    """README.md of an editor: what it is, how it learnt, what was measured, its limits and licence.

    settings: what `train.py` records. measured: numbers by name, of the training's end.
    """
    source = settings.get("stable_diffusion", "unknown")
    licences = {preset.stable_diffusion: preset.licence for preset in backbone.PRESETS.values()}
    on_the_hub = backbone.local_folder(source) is None and source.count("/") == 1
    head = ModelCardData(
        license=licences.get(source, "other"),
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["instructgie", "image-editing", "in-context"],
        base_model=source if on_the_hub else None,
    )
    off = [name for name in ("rcldm", "esm", "liu", "sam") if settings.get(f"no_{name}")]
    left_out = f"without {' and '.join(off).upper()}" if off else "with all four contributions"
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in (measured or {}).items())
    rows = rows or "| nothing | |\n"
    return f"""---
{head.to_yaml()}
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

It learnt in {settings.get("trained_steps", "?")} steps of {settings.get("batch", "?")} grids of
`{settings.get("data", "unknown")}`.

## Measured

At the end of training, moving averages of the losses and, on a few queries of the validation split, the mean
absolute error of the answers in levels of 0 … 255.

| | |
|---|---:|
{rows}
## Limits

- Answers have a long side of {settings.get("panel", "P")} pixels, whatever the input's.
- Everything drawn passes the frozen autoencoder, and loses what that loses.
- Edits unlike those of the data may be made wrongly, in part, or not at all; whatever biases Stable Diffusion
  and the data have, the answers have too.

## Licence

That of the weights this was trained on, `{source}`: {head.license}.
"""
