"""Draws the figures of the pages on the contributions, from the code and the shipped toy weights.

    python docs/figures.py                                # all of them, into docs/
    python docs/figures.py --only esm --output out        # one, elsewhere

    rcldm    the four orders in which a scan reads the grid
    esm      editing shifts of real pairs in a plane, and what L_es says of right and wrong answers
    liu      a dozen ways to ask for four edits, before unification and after
    sam      the areas that the segmenter finds, and what they weigh in the latent
    dataset  two pairs of an instruction as a grid, as its condition, and as the condition without an example

The four edits of `liu` are picked; all else that is shown is chosen by a rule that its function tells. Each
prints the numbers that its page quotes, a line each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import backbone
import esm
import liu
import rcldm
import sam_loss
from dataset import VisualPromptDataset, compose_grid, drop_example, mask_query
from disk import atomic_write
from pictures import image_to_tensor, tensor_to_image
from pictures.pairs import EditPair, read_pairs
from toy import world

INK, GREY, PALE = "#2b2f36", "#868c96", "#e4e6ea"
WRONG = "#c0392b"
MARK = "#d6246e"  # on pictures of any colour
COLOURS = "#4d8c57", "#c8862a", "#2f9aa0", "#8a5a9e", "#3a6ea5"
BLUES = LinearSegmentedColormap.from_list("blues", ("#eef3f8", "#3a6ea5", "#14304d"))
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelcolor": INK,
    "text.color": INK,
    "figure.constrained_layout.use": True,
}
WIDTH, DPI = 8, 200  # inches, and dots each: two dots a pixel on a page of 800


def read(args: argparse.Namespace) -> VisualPromptDataset:
    """New scenes of the toy world under trained edits."""
    pairs = read_pairs(backbone.data_folder(args.data), "seen")
    return VisualPromptDataset(pairs, backbone.preset("toy").panel)


def which_equal(items: list) -> tuple[Tensor, Tensor]:
    """Which pairs of different items are of one kind, and which of two kinds: both (N, N), bool."""
    kinds = {item: k for k, item in enumerate(dict.fromkeys(items))}
    kind = torch.tensor([kinds[item] for item in items])
    same = kind[:, None] == kind
    return same & ~torch.eye(len(items), dtype=torch.bool), ~same


def bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def show_picture(ax: Axes, picture: Tensor) -> None:
    """picture: (3, P, P) in [-1, 1]."""
    bare(ax)
    ax.imshow(np.asarray(tensor_to_image(picture)), interpolation="nearest")


# --- RCLDM --------------------------------------------------------------------------------------------------


def scan_orders(side: int) -> Tensor:
    """(4, side²): the pixel of the grid that each scan reads at each step, told by `cross_scan` itself."""
    return rcldm.cross_scan(torch.arange(side * side).view(1, 1, side, side))[0, :, 0]


def twin_steps(side: int) -> float:
    """Steps from a place of a panel to the same place of the panel beside or below it, in the mean."""
    steps = scan_orders(side).argsort(1).unflatten(1, (2, side // 2, 2, side // 2))
    beside, below = steps[:, :, :, 1] - steps[:, :, :, 0], steps[:, 1] - steps[:, 0]
    return torch.cat([beside.flatten(), below.flatten()]).abs().float().mean().item()


def draw_rcldm(args: argparse.Namespace) -> Figure:
    """Grids of 2 × 2 panels, shaded by the step at which a place is read; in the same place of each panel the
    step is written."""
    side, column, row = 8, 2, 1
    figure, axes = plt.subplots(1, 4, figsize=(WIDTH, 2.25))
    names = "by rows", "by columns", "by rows, from the end", "by columns, from the end"
    for ax, name, order in zip(axes, names, scan_orders(side)):
        steps = order.argsort().view(side, side)
        ax.imshow(steps, BLUES, interpolation="nearest")
        ax.plot(order % side, order // side, color="white", linewidth=0.8)
        ax.set_title(name)
        for y in (row, row + side // 2):
            for x in (column, column + side // 2):
                ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color="white"))
                ax.text(x, y, steps[y, x].item(), ha="center", va="center_baseline")
        for between_panels in (ax.axhline, ax.axvline):
            between_panels(side / 2 - 0.5, color="white", linewidth=4)
        bare(ax)
    # The toy's latents of a grid are 16 × 16.
    print(f"rcldm: steps to the same place of the next panel: {twin_steps(16):g}")
    return figure


# --- ESM ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_esm(args: argparse.Namespace) -> Figure:
    """The five commonest edits, the first six pairs of each; then of the edit whose shifts are longest the
    first query, and among its wrong answers the edit whose shifts are next in length."""
    data = read(args)
    clip = backbone.load_clip(backbone.preset("toy").clip)
    panels = torch.stack([torch.stack(data.load_pair(i)) for i in range(len(data))])  # (N, 2, 3, P, P)
    before, after = embed(clip, panels[:, 0]), embed(clip, panels[:, 1])  # (N, E)
    shifts = esm.editing_shift(clip, before, after)
    edits = [pair.extra["canonical"] for pair in data.pairs]

    cosines = F.normalize(shifts, dim=-1) @ F.normalize(shifts, dim=-1).mT
    same, different = which_equal(edits)
    print(f"esm: mean cosine of two shifts of one edit: {cosines[same].mean():.2f}")
    print(f"esm: mean cosine of two shifts of two edits: {cosines[different].mean():.2f}")
    answers = {
        "half the edit": embed(clip, panels.mean(1)),
        "another pair's answer": after.roll(len(after) // 2, 0),
        "the input unchanged": before,
    }
    for name, answer in answers.items():
        print(f"esm: mean L_es of {name}: {esm.editing_shift_loss(clip, before, answer, after):.2f}")

    figure = plt.figure(figsize=(WIDTH, 4.9))
    upper, lower = figure.subfigures(2, 1, height_ratios=(3.1, 1.5))
    left, right = upper.subplots(1, 2, width_ratios=(1.3, 1))
    common = [edit for edit, _ in Counter(edits).most_common(len(COLOURS))]
    chosen = {edit: [i for i, one in enumerate(edits) if one == edit][:6] for edit in common}
    shown = shifts[[i for indices in chosen.values() for i in indices]]
    two, held = plane(shown)
    print(f"esm: the plane of the pairs shown holds {held:.0%} of their shifts' squared length")
    lengths = {edit: shifts[indices].norm(dim=1).mean().item() for edit, indices in chosen.items()}
    for colour, (edit, indices) in zip(COLOURS, chosen.items()):
        for end in shifts[indices] @ two:
            draw_arrow(left, end, colour)
        cosine = cosines[indices][:, indices][same[indices][:, indices]].mean()
        print(f"esm: {edit}: mean cosine {cosine:z.2f}, mean length {lengths[edit]:.2f}")
        left.plot([], [], color=colour, linewidth=2, label=edit)
    show_plane(left, shown @ two, 1.3)
    left.legend(edgecolor="white", framealpha=1, loc="upper left", borderaxespad=0)

    far, *others = sorted(chosen, key=lengths.get, reverse=True)
    query, another = chosen[far][:2]
    scene = world.scene_from_json(json.loads(data.pairs[query].extra["scene"]))
    told = {edit: json.loads(data.pairs[chosen[edit][0]].extra["edit"]) for edit in others}
    edited = {edit: world.Edit(**arguments).apply(scene) for edit, arguments in told.items()}
    near = next(edit for edit in others if edited[edit])
    start, true = panels[query]
    pictures = {
        "true answer": true,
        "half of it": (start + true) / 2,
        "another pair's answer": panels[another, 1],
        near: image_to_tensor(world.render(edited[near])),
        "input, unchanged": start,
    }
    begin, points = embed(clip, start[None]), embed(clip, torch.stack(list(pictures.values())))
    two, held = plane(points - begin)
    print(f"esm: the plane of the answers shown holds {held:.0%} of their shifts' squared length")
    ends = (points - begin) @ two
    show_plane(right, ends, 1)
    strip = lower.subplots(1, len(pictures))
    for ax, letter, (name, picture), point, end in zip(strip, "abcde", pictures.items(), points, ends):
        loss = esm.editing_shift_loss(clip, begin, point[None], points[:1])
        print(f"esm: {far}, answered with {name}: L_es = {loss:.2f}")
        if picture is not start:  # which is no arrow
            draw_arrow(right, end, INK if picture is true else WRONG)
        beside = (-9, -9) if picture is start else (3, 3)
        right.annotate(letter, end.tolist(), beside, textcoords="offset points", weight="bold")
        show_picture(ax, picture)
        ax.set_title(f"$\\bf{{{letter}}}$  {name}", fontsize=7.5)
        ax.set_xlabel(f"$L_{{es}}$ = {loss:.2f}")
    return figure


def embed(clip: nn.Module, images: Tensor) -> Tensor:
    """`esm.embed`, a few at a time."""
    return torch.cat([esm.embed(clip, some) for some in images.split(64)])


def plane(vectors: Tensor) -> tuple[Tensor, float]:
    """The plane in which vectors (N, E) are longest: two directions (E, 2), and its share of their squares.

    Principal components, but from the origin, where nothing has changed, not from the mean. The sum over the
    vectors of what each direction holds is positive.
    """
    _, strengths, directions = torch.linalg.svd(vectors, full_matrices=False)
    two = directions[:2].mT
    two = two * torch.where((vectors @ two).sum(0) < 0, -1.0, 1.0)
    return two, (strengths[:2].square().sum() / strengths.square().sum()).item()


def draw_arrow(ax: Axes, end: Tensor, colour: str) -> None:
    """From the origin."""
    style = {"arrowstyle": "-|>,head_width=0.16,head_length=0.35", "color": colour, "linewidth": 1.1}
    ax.annotate("", end.tolist(), (0, 0), arrowprops=style | {"shrinkA": 0, "shrinkB": 0})


def show_plane(ax: Axes, points: Tensor, aspect: float) -> None:
    """Limits that hold the points (N, 2) and the origin; where it is wider than high, space at the left."""
    points = torch.cat([points, torch.zeros(1, 2)])
    low, high = points.amin(0), points.amax(0)
    side, (x, y) = 1.15 * (high - low).max(), (low + high) / 2
    bare(ax)
    ax.set(xlim=(x + (0.5 - aspect) * side, x + side / 2), ylim=(y - side / 2, y + side / 2), aspect="equal")
    ax.axhline(0, color=PALE, linewidth=0.8, zorder=0)
    ax.axvline(0, color=PALE, linewidth=0.8, zorder=0)
    ax.plot(0, 0, "o", color=INK, markersize=3)


# --- LIU ----------------------------------------------------------------------------------------------------

EDITS = (
    world.Edit("night"),
    world.Edit("smile", "face"),
    world.Edit("recolour", "circle", "pink"),
    world.Edit("invert"),
)


@torch.no_grad()
def draw_liu(args: argparse.Namespace) -> Figure:
    """Of each of four edits the first saying that the language model was taught, grey, and the first two that
    it was not; beside them how far the texts lie apart, white: not at all."""
    toy = backbone.preset("toy")
    sd = backbone.load_stable_diffusion(toy.stable_diffusion)
    unifier = liu.InstructionUnifier(*backbone.load_llm(toy.llm))
    pairs = read(args).pairs
    taught = {pair.instruction: pair.extra["canonical"] for pair in pairs}
    new = {pair.extra["paraphrase"]: pair.extra["canonical"] for pair in pairs}
    for name, meant in (("taught", taught), ("new", new)):
        forms = unifier.unify(meant)
        right = sum(form == edit for form, edit in zip(forms, meant.values()))
        counts = f"{len(meant)} ({len(set(meant.values()))} edits) → {len(set(forms))} forms"
        print(f"liu: {name} sayings: {counts}, {right} of them right")

    families = [world.FAMILIES[edit.family] for edit in EDITS]
    sayings = [(*family.trained_sayings[:1], *family.held_out_sayings[:2]) for family in families]
    said = [edit.worded(text) for edit, texts in zip(EDITS, sayings) for text in texts]
    meant = [edit.instruction for edit in EDITS for _ in range(3)]
    forms = unifier.unify(said)
    colours = {
        "as people say it": [INK if k % 3 else GREY for k in range(len(said))],
        "unified": [INK if form == edit else WRONG for form, edit in zip(forms, meant)],
    }
    figure, axes = plt.subplots(1, 4, figsize=(WIDTH, 2.3), width_ratios=(1, 1, 0.95, 1), sharey=True)
    same, different = which_equal(meant)
    for (words, matrix), texts, name in zip(axes.reshape(2, 2), (said, forms), colours):
        apart = text_distances(sd, texts)
        means = f"one edit {apart[same].mean():.2f}, of two edits {apart[different].mean():.2f}"
        print(f"liu: {name}: distance of two texts of {means}")
        matrix.imshow(apart, BLUES, vmin=0, vmax=2**0.5, interpolation="nearest", aspect="auto")
        for between_edits in (matrix.axhline, matrix.axvline):
            for k in range(3, len(said), 3):
                between_edits(k - 0.5, color="white", linewidth=2)
        bare(matrix)
        bare(words)
        words.set_title(name, loc="right")
        for y, (text, colour) in enumerate(zip(texts, colours[name])):
            words.text(1, y, text, color=colour, ha="right", va="center_baseline", fontsize=7.5)
    return figure


def text_distances(sd: backbone.StableDiffusion, texts: list[str]) -> Tensor:
    """Between the text encoder's states of all texts, each channel normalised over the words: (N, N).

    The root mean square of what differs; √2 where nothing is alike.
    """
    states = F.instance_norm(backbone.encode_text(sd, texts).mT).flatten(1)
    distances = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / states.shape[1] ** 0.5


# --- SAM ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_sam(args: argparse.Namespace) -> Figure:
    """Of the true answers with a face those whose area is best, at the quartiles and worst; one without face.

    Above, outlines of the area found, thin, and of the face, white; below, what it weighs in the latent.
    """
    data, toy = read(args), backbone.preset("toy")
    areas = sam_loss.SelectiveAreas(*backbone.load_segmenter(toy.segmenter), toy.classes)
    after = torch.stack([data.load_pair(i)[1] for i in range(len(data))])  # (N, 3, P, P)
    found = torch.cat([areas(some) for some in after.split(64)])[:, 0] > 0  # (N, P, P)
    true = torch.stack([face_of_answer(pair) for pair in data.pairs])
    both, either = (mask.flatten(1).sum(1) for mask in (found & true, found | true))
    overlap = both / either.clamp(min=1)
    shows, finds = (mask.flatten(1).any(1) for mask in (true, found))
    print(f"sam: answers with a face: {shows.sum()}, an area found in {(shows & finds).sum()}")
    print(f"sam: their mean overlap (IoU) of area and face: {overlap[shows].mean():.2f}")
    print(f"sam: answers without a face: {(~shows).sum()}, an area found in {(~shows & finds).sum()}")

    by_overlap = shows.nonzero()[:, 0][overlap[shows].argsort(descending=True, stable=True)]
    ranks = {"best": 0, "upper quartile": 0.25, "median": 0.5, "lower quartile": 0.75, "worst": 1}
    shown = {name: by_overlap[round(rank * (len(by_overlap) - 1))] for name, rank in ranks.items()}
    shown["no face"] = (~shows).nonzero()[0, 0]
    figure, axes = plt.subplots(2, len(shown), figsize=(WIDTH, 2.95))
    side = after.shape[-1] // backbone.vae_factor(backbone.load_stable_diffusion(toy.stable_diffusion).vae)
    edge = after.shape[-1] - 0.5
    for (upper, lower), (name, i) in zip(axes.T, shown.items()):
        show_picture(upper, after[i])
        for mask, colour, width in ((true[i], "white", 2.2), (found[i], MARK, 1.0)):
            if mask.any():
                upper.contour(mask.float(), levels=[0.5], colors=colour, linewidths=width)
        weight = F.interpolate(found[i][None, None].float(), (side, side), mode="area")[0, 0]
        show_picture(lower, (after[i] + 2) / 3)  # paler
        covered = {"extent": (-0.5, edge, edge, -0.5), "alpha": (weight > 0).float().numpy()}
        lower.imshow(weight, BLUES, vmin=0, vmax=1, interpolation="nearest", **covered)
        upper.set_title(name, fontsize=7.5)
        lower.set_xlabel(f"IoU {overlap[i]:.2f}" if shows[i] else " ")
    axes[0, 0].set_ylabel("area")
    axes[1, 0].set_ylabel("its weight")
    return figure


def face_of_answer(pair: EditPair) -> Tensor:
    """Where the true answer shows a face, as the renderer knows it: (P, P), bool."""
    scene, edit = world.scene_from_json(json.loads(pair.extra["scene"])), json.loads(pair.extra["edit"])
    classes = world.render_classes(world.Edit(**edit).apply(scene))
    return torch.from_numpy(classes == world.CLASSES.index("face"))


# --- The dataset --------------------------------------------------------------------------------------------


def draw_dataset(args: argparse.Namespace) -> Figure:
    """The first pairs of the first two edits as queries, each with the example that epoch 0 draws."""
    data = read(args)
    instructions = {pair.instruction for pair in data.pairs}
    print(f"dataset: {len(data)} pairs of {len(instructions)} instructions, {len(data.left_out)} left out")
    first: dict[str, int] = {}  # edit -> its first pair
    for i, pair in enumerate(data.pairs):
        first.setdefault(pair.extra["canonical"], i)
    queries = list(first.values())[:2]
    figure, axes = plt.subplots(1, 3 * len(queries), figsize=(WIDTH, 1.75))
    for i, row in zip(queries, axes.reshape(len(queries), 3)):
        instruction, example = data.pairs[i].instruction, data.draw(i)
        print(f"dataset: {instruction}: query {i}, example {example}")
        grid = compose_grid(*data.load_panels(example, i))
        condition = mask_query(grid)
        grids = {"Img_train": grid, "Img_VPcon": condition, "no example": drop_example(condition)}
        for ax, (name, picture) in zip(row, grids.items()):
            show_picture(ax, picture)
            ax.set_title(name)
        row[1].set_xlabel(instruction)
    return figure


# --- The command --------------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[argparse.Namespace], Figure]] = {
    "rcldm": draw_rcldm,
    "esm": draw_esm,
    "liu": draw_liu,
    "sam": draw_sam,
    "dataset": draw_dataset,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of the pages on the contributions.")
    parser.add_argument("--only", choices=FIGURES, metavar="NAME", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    parser.add_argument("--data", default=backbone.preset("toy").data, help="a dataset of the toy world")
    args = parser.parse_args(argv)
    with backbone.one_line_errors("figures.py"):
        args.output.mkdir(parents=True, exist_ok=True)
        for name in [args.only] if args.only else FIGURES:
            with plt.rc_context(STYLE):
                figure = FIGURES[name](args)
                # The same bytes every time: matplotlib would name its version in the file.
                options = {"format": "png", "dpi": DPI, "metadata": {"Software": None}}
                path = args.output / f"{name}-figure.png"
                atomic_write(path, lambda file: figure.savefig(file, **options))  # noqa: B023  run at once
                plt.close(figure)


if __name__ == "__main__":
    main()
