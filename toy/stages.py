"""Where an editor loses its accuracy: the same queries' answers, measured after each stage that makes them.

    python -m toy.stages --mode both pair --count 192

    vae          the truth, through the VAE and back: no editor gets further
    u-net        the truth's grid without noise, through the frozen U-Net alone: what its decoder can draw
    one step     what U-Net and RCLDM draw of it from pure noise at once
    cut          what they draw when the RCLDM's residuals end after half of the steps
    all steps    what they draw in all steps of the sampler: the answer that `edit.py` gives

The first two are shown the truth. "cut" tells how much of the edit the first half of the steps settles. The
metrics are those of `toy.score`, and so is what is right.
"""

import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import backbone
import esm
from apps.pipeline import InstructGIEPipeline, seeded
from dataset import VisualPromptDataset, compose_grid
from evaluation.evaluate import draw_queries
from pictures import tensor_to_image
from pictures.pairs import read_pairs
from toy import score, world

STAGES = ("vae", "u-net", "one step", "cut", "all steps")
MODES = ("both", "pair", "instruction")
BATCH = 32  # queries, edited at a time


@torch.no_grad()
def stages(
    pipe: InstructGIEPipeline, panels: Tensor, mode: str, texts: list[str], seeds: list[int]
) -> dict[str, Tensor]:
    """The answers (B, 3, P, P) in [-1, 1] to queries (B, 4, 3, P, P) after every stage but the first."""
    told = [""] * len(panels) if mode == "pair" else texts
    inputs = panels[:, :2], [mode != "instruction"] * len(panels), panels[:, 2], told
    steps = pipe.settings["steps"]
    found = {"u-net": redrawn(pipe, panels, told)}
    found["one step"] = pipe.sample(*inputs, seeded(seeds), steps=1)
    with pipe.rcldm.register_forward_hook(zero_after(steps // 2)):
        found["cut"] = pipe.sample(*inputs, seeded(seeds), steps=steps)
    found["all steps"] = pipe.sample(*inputs, seeded(seeds), steps=steps)
    return {name: pipe.decode_answers(latents) for name, latents in found.items()}


def zero_after(steps: int) -> Callable:
    """A hook of the RCLDM: all its calls but the first `steps` return residuals of zero."""
    calls = itertools.count(1)

    def cut(_: nn.Module, __: tuple, output: tuple[list[Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
        down, mid = output
        return output if next(calls) <= steps else ([0 * residual for residual in down], 0 * mid)

    return cut


def redrawn(sd: InstructGIEPipeline, panels: Tensor, texts: list[str]) -> Tensor:
    """The grids' own latents (B, C, 2p, 2p), as the bare U-Net tells them at timestep 0."""
    device, t = sd.unet.device, torch.zeros(len(panels), dtype=torch.long, device=sd.unet.device)
    x_0 = compose_grid(*(backbone.encode_images(sd.vae, panel.to(device)) for panel in panels.unbind(1)))
    prediction = sd.unet(x_0.to(sd.unet.dtype), t, backbone.encode_text(sd, texts)).sample.float()
    return esm.predict_x0(x_0, prediction, t, sd.scheduler)


def measure(pipe: InstructGIEPipeline, data: VisualPromptDataset, mode: str, count: int) -> dict[str, list]:
    """The scores of every query's answer after each stage."""
    queries = draw_queries(data, count, seed=0, mode=mode)
    texts = pipe.unify([data.pairs[query.index].instruction for query in queries])
    scores: dict[str, list[dict]] = {name: [] for name in STAGES}
    for start in tqdm(range(0, len(queries), BATCH), desc=mode, unit="batch"):
        now = queries[start : start + BATCH]
        panels = torch.stack([data.load_panels(query.example, query.index) for query in now])
        found = stages(pipe, panels, mode, texts[start : start + BATCH], [query.seed for query in now])
        for k, query in enumerate(now):
            extra = data.pairs[query.index].extra
            scene = world.scene_from_json(json.loads(extra["scene"]))
            truth = score.Truth(scene, world.edit_from_json(json.loads(extra["edit"])))
            pictures = {name: np.asarray(tensor_to_image(answers[k])) for name, answers in found.items()}
            pictures["vae"] = score.reconstruct(pipe.vae, truth.picture)
            for name, picture in pictures.items():
                scores[name].append(truth.score(picture))
    return scores


def table(scores: dict[str, dict[str, list[dict]]]) -> str:
    rows = []
    for mode, by_stage in scores.items():
        for name, found in by_stage.items():
            errors = (score.mean(row[f"mae_{region}"] for row in found) for region in ("inside", "outside"))
            share = f"{100 * score.mean(row['right'] for row in found):.1f}"
            cells = ("–" if error is None else f"{error:.1f}" for error in errors)
            rows.append([mode, name, str(len(found)), share, *cells])
    head = ["mode", "stage", "n", "accuracy, %", "MAE inside", "MAE outside"]
    return backbone.markdown(head, rows, words=2)


@backbone.one_line_errors("toy.stages")
def main(argv: list[str] | None = None) -> None:
    toy = backbone.preset("toy")
    parser = backbone.new_parser("toy.stages", __doc__)
    add = parser.add_argument
    add("model", nargs="?", default=toy.editor, metavar="MODEL", help="an editor's folder, of train.py")
    add("--data", default=toy.data, help="a dataset of the toy world")
    add("--mode", nargs="+", default=["both"], choices=MODES, help="what is given besides the input")
    add("--count", type=int, default=192, help="queries")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    backbone.check_numbers(args, {(1, math.inf): "count"})
    pipe = InstructGIEPipeline.from_pretrained(args.model).to(backbone.pick_device(args.device))
    pipe.set_progress_bar_config(disable=True)
    data = read_pairs(backbone.data_folder(args.data), "seen")
    data = VisualPromptDataset(data, size=pipe.panel, seed=0)
    scores = {m: measure(pipe, data, m, args.count) for m in dict.fromkeys(args.mode)}
    print(table(scores), end="")


if __name__ == "__main__":
    main()
