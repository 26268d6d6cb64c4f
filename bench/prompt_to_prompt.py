"""What Prompt-to-Prompt keeps: pairs of pictures drawn with and without it, from the same noise.

    python -m bench.prompt_to_prompt

Captions of toy scenes that differ in the thing of one quarter (recoloured, reshaped, resized, added,
removed), drawn by the toy Stable Diffusion. Where the edit is, is known from the captions alone; how much
else changes from the first picture to the second is measured in the other three quarters, in levels of 255.
Beside it, what CLIP says: how alike the pictures are, and whether their change is that of the captions. ±
is a 95 % interval of the difference from the first row, which draws the same pairs without it.
"""

from __future__ import annotations

import argparse
import random

import torch
from tqdm import tqdm

import backbone
from data_making.pictures import clip_scores, draw_pairs
from toy import world

HALF = world.PANEL // 2
QUARTERS = {
    place: (
        slice(HALF * (y > HALF), HALF * (y > HALF) + HALF),
        slice(HALF * (x > HALF), HALF * (x > HALF) + HALF),
    )
    for place, (x, y) in world.PLACES.items()
}
# Parts of the steps: attention to the text, attention to itself.
STRENGTHS = ((0.0, 0.0), (0.8, 0.0), (0.0, 0.4), (0.8, 0.4), (1.0, 1.0))


def local_edits(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Captions before and after an edit in one quarter, and the name of the quarter."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = world.random_scene(rng)
        edited = world.random_edit(scene, rng)
        before, after = ({thing.place: thing for thing in one.things} for one in (scene, edited))
        places = [place for place in world.PLACES if before.get(place) != after.get(place)]
        rest = [(one.background, one.overlay, one.look) for one in (scene, edited)]
        if len(places) == 1 and rest[0] == rest[1]:
            found.append((scene.caption(), edited.caption(), places[0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prompt_to_prompt", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--count", type=int, default=128, help="pairs of captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    toy = backbone.preset("toy")
    sd, clip = backbone.load_stable_diffusion(toy.stable_diffusion), backbone.load_clip(toy.clip)
    tokenizer = backbone.load_clip_tokenizer(toy.clip)
    edits = local_edits(args.count, seed=0)
    names = "change outside, levels", "inside", "CLIP: images", "direction"
    print(f"| attention to the text | to itself | {' | '.join(names)} |\n| ---: | ---: {'| ---: ' * 4}|")
    without = None
    for cross, own in STRENGTHS:
        rows = []
        for first in tqdm(range(0, args.count, args.batch), leave=False):
            batch = edits[first : first + args.batch]
            captions, n = [edit[:2] for edit in batch], len(batch)
            seeds, same = list(range(first, first + n)), ([args.guidance] * n, [own] * n)
            pictures = draw_pairs(sd, captions, seeds, *same, cross, args.steps, world.PANEL)
            change = (pictures[:, 1] - pictures[:, 0]).abs().mean(1) * 127.5  # (B, H, W)
            for k, (*said, place) in enumerate(batch):
                inside = torch.zeros(world.PANEL, world.PANEL, dtype=torch.bool)
                inside[QUARTERS[place]] = True
                scores = clip_scores(clip, tokenizer, pictures[k : k + 1], said)
                cosines = scores["clip_image"].item(), scores["clip_direction"].item()
                rows.append([change[k][~inside].mean().item(), change[k][inside].mean().item(), *cosines])
        rows = torch.tensor(rows)  # (pairs, 4)
        means, cells = rows.mean(0).tolist(), []
        without = rows if without is None else without
        spread = (1.96 * (rows - without).std(0) / len(rows) ** 0.5).tolist()
        for mean, half, digits in zip(means, spread, (2, 2, 3, 3)):
            cells.append(f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if rows is not without else ""))
        print(f"| {cross:g} | {own:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
