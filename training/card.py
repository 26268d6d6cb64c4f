"""A trained editor's folder: weights, settings and the model card, after card.md."""

import argparse
import json
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from huggingface_hub import ModelCard, ModelCardData

import backbone
from disk import atomic_folder


def save_editor(model: ModelMixin, args: argparse.Namespace, step: int, measured: dict[str, float]) -> None:
    """The EMA weights, the settings and a model card, in the folder that `edit.py --model` takes."""
    llm = None if args.no_liu else args.llm
    record = vars(args) | {"llm": llm, "trained_steps": step} | backbone.SAMPLING
    with atomic_folder(args.output / "editor") as folder:
        model.save_pretrained(folder)
        (folder / "instructgie.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        (folder / "README.md").write_text(model_card(record, measured), encoding="utf-8")


def model_card(record: dict[str, Any], measured: dict[str, float]) -> str:
    """README.md of an editor: what it is, how it learnt, what was measured, its limits and licence."""
    source = record["stable_diffusion"]
    licences = {preset.stable_diffusion: preset.licence for preset in backbone.PRESETS.values()}
    head = ModelCardData(
        license=licences.get(source, "other"),
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["instructgie", "image-editing", "in-context"],
        base_model=None if backbone.local_folder(source) else source,
    )
    off = [name.upper() for name in ("rcldm", "esm", "liu", "sam") if record[f"no_{name}"]]
    contributions = f"without {' and '.join(off)}" if off else "with all four contributions"
    told = record | {"contributions": contributions, "measured": measured, "licence": head.license}
    return str(ModelCard.from_template(head, str(Path(__file__).with_name("card.md")), **told))
