"""Under the hood of one edit, for a lecture: what the parts of the method see of it, in one picture.

    hood = Hood(pipe.settings, pipe.panel)
    hood.draw(pair, query, answer, "make it night").save("hood.png")

Two shifts span a plane, and in it they are drawn as arrows, of their true lengths and with their true angle.
SENTENCES explain each part, on the page.
"""

import io
import textwrap
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import backbone
import edit
import esm
from pictures import fit_panel
from sam_loss import SelectiveAreas

INK, TINT = "#1f4e9c", "#d1495b"
SENTENCES = """
- **Instruction, unified** (LIU): the language model rewords your instruction; the text encoder reads this l'.
- **Condition** (RCLDM): the prompt encoder reads this grid; the answer forms at the lower right.
- **Areas** (SAM): red lines frame the segmenter's chosen class, where L_sam looks in training.
- **Shifts** (ESM): arrows show how an edit moves a picture in CLIP's space; L_es compares such shifts.
- **Steps** (above): each step predicts the whole answer x̂_0; the picture forms from the first to the last.
"""


class Hood:
    """settings: what `train.py` recorded, whose CLIP and segmenter look; the preset's where it names none, at
    the preset's classes, or at `person`. panel: P, pixels along a panel's side."""

    def __init__(self, settings: dict[str, Any], panel: int, device: torch.device | str = "cpu") -> None:
        preset = backbone.preset(settings.get("backbone", "toy"))
        self.panel, self.device = panel, device
        self.clip = backbone.load_clip(settings.get("clip") or preset.clip, device)
        parts = backbone.load_segmenter(settings.get("segmenter") or preset.segmenter, device)
        self.areas = SelectiveAreas(*parts, preset.classes or ("person",))

    @torch.no_grad()
    def draw(
        self,
        pair: tuple[Image.Image, Image.Image] | None,
        query: Image.Image,
        answer: Image.Image,
        unified: str = "",
    ) -> Image.Image:
        """The picture. pair: the example, None where there was none. unified: the instruction as U has it."""
        pictures = [*(pair or ()), query, answer]
        panels = torch.stack([fit_panel(picture, self.panel)[0] for picture in pictures]).to(self.device)
        example = panels[None, :2] if pair else torch.zeros_like(panels[None, :2])
        condition = edit.condition_grids(example, panels[None, -2], torch.tensor([pair is not None]))
        shifts = {"input → answer": esm.editing_shift(self.clip, panels[-2:-1], panels[-1:])[0]}
        if pair:
            shifts["example"] = esm.editing_shift(self.clip, panels[:1], panels[1:2])[0]

        figure = Figure(figsize=(11, 3.5), layout="constrained")
        axes = figure.subplots(1, 4)
        words = textwrap.shorten(unified, 120, placeholder=" …")
        figure.suptitle(f"l' = “{words}”" if words else "no instruction", fontsize=13, parse_math=False)
        show(axes[0], condition[0], "condition")
        for ax, panel, area, name in zip(
            axes[1:3], panels[-2:], self.areas(panels[-2:]), ("input", "answer"), strict=True
        ):
            show(ax, panel, f"{name}: {area.mean():.0%} {' or '.join(self.areas.classes)}")
            if area.any():
                ax.contour(area[0].cpu(), levels=[0.5], colors=TINT, linewidths=1.5)
        show_shifts(axes[3], shifts)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        return Image.open(file).convert("RGB")


def show(ax: Axes, image: Tensor, title: str) -> None:
    """An image (3, H, W) in [-1, 1], pixel by pixel."""
    ax.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).float().cpu(), interpolation="nearest")
    ax.set_title(title, fontsize=12)
    ax.set_axis_off()


def show_shifts(ax: Axes, shifts: dict[str, Tensor]) -> None:
    """One shift or two (E,) as arrows from one point, the first along the axis."""
    first, *rest = shifts.values()
    ends = [(first.norm().item(), 0.0)]
    for shift in rest:
        along = (shift @ first / first.norm().clamp_min(1e-6)).item()
        ends.append((along, max(0.0, shift.norm().item() ** 2 - along**2) ** 0.5))
    for (name, shift), end, colour in zip(shifts.items(), ends, (INK, TINT)):
        ax.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2})
        ax.plot([], [], color=colour, label=f"{name}, length {shift.norm():.2f}")
    reach = 1.15 * max(1e-3, *(abs(part) for end in ends for part in end))
    ax.set(xlim=(-reach, reach), ylim=(-0.35 * reach, 1.65 * reach), aspect="equal", xticks=[], yticks=[])
    title = "the editing shift"
    if rest:
        title = f"editing shifts, cosine {torch.cosine_similarity(first, rest[0], dim=0):.2f}"
    ax.set_title(title, fontsize=12)
    ax.legend(fontsize=10, loc="upper center", frameon=False)
