"""The splits of the toy world: pairs of scenes with an instruction, written as a dataset folder.

`train`; `seen`: new scenes, trained edits; `unseen_combination`: the scene before or after the edit holds a
(colour, shape) combination that no training picture holds; `seen_mixture`: new scenes, trained mixtures;
`unseen_task`: new mixtures of trained edits; `unseen_family`: single edits of families never trained. The
single edits of `train` are enough for a first lesson; `python -m toy.world --mixtures` adds mixtures.
"""

import itertools
import json
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from disk import WORLD_NOTE, version, write_text
from toy.world.drawing import render
from toy.world.edits import FAMILIES, MIXTURES, Edit, Mixture, edits_of, say
from toy.world.scenes import Scene, random_scene

HELD_OUT_FAMILIES = frozenset({"sepia", "frame", "hat", "swap"})
# Of four of the six pairs of kinds one each; each half occurs in mixtures that are trained.
HELD_OUT_MIXTURES = frozenset(
    {"resize + surprise", "remove + bar", "smile + background", "background + dots"}
)
# Instructions and pairs of each. The paper has about 2,000, and 12,000 images; of ours in train some repeat,
# since there are only so many ways to ask for a smile.
MEASURED = ("seen", "unseen_combination", "seen_mixture", "unseen_task", "unseen_family")
SPLITS = {"train": (2000, 6)} | dict.fromkeys(MEASURED, (300, 2))
PARAPHRASES = ("paraphrase", *(f"paraphrase{k}" for k in range(2, 6)))  # keys of the metadata
TRAINED_MIXTURES = (1000, 6)  # with --mixtures, added to `train`


@dataclass(frozen=True)
class Pair:
    before: Scene
    after: Scene
    edit: Edit | Mixture
    instruction: str


def _applies(edit: Edit | Mixture, scene: Scene, split: str) -> Scene | None:
    """The edited scene if this edit of this scene belongs to the split, else None."""
    after = edit.apply(scene)
    if after is None:
        return None
    held_out = scene.is_held_out() or after.is_held_out()
    return after if held_out == (split == "unseen_combination") else None


def _draw_pairs(
    edit: Edit | Mixture, instruction: str, count: int, split: str, rng: random.Random
) -> list[Pair]:
    """`count` pairs of one instruction, or fewer where this split has hardly a scene for it."""
    pairs: list[Pair] = []
    for _ in range(4000):
        if len(pairs) == count:
            break
        scene = random_scene(rng)
        after = _applies(edit, scene, split)
        if after is not None:
            pairs.append(Pair(scene, after, edit, instruction))
    return pairs


def families_of(split: str) -> list[str]:
    """The families, or the mixtures, whose edits are in a split."""
    if split in ("seen_mixture", "train_mixture"):
        return [name for name in MIXTURES if name not in HELD_OUT_MIXTURES]
    if split == "unseen_task":
        return [name for name in MIXTURES if name in HELD_OUT_MIXTURES]
    return [name for name in FAMILIES if (name in HELD_OUT_FAMILIES) == (split == "unseen_family")]


def draw_split(split: str, instructions: int, pairs_each: int, seed: int) -> list[Pair]:
    """The pairs of one split: a family drawn at random, its next edit, in a new wording while one is found.

    [ours] A family's chance grows with the fourth root of the number of its edits: a smile takes as many
    examples to learn as a colour does. A family's edits come in one order in all splits, and `train`, the
    largest, takes first what the others take.
    """
    rng = random.Random(f"{split} {seed}")  # a string seeds the same on every machine
    edits = {name: edits_of(name) for name in families_of(split)}
    for name, family in edits.items():
        random.Random(name).shuffle(family)
    shares = [len(family) ** (1 / 4) for family in edits.values()]
    pairs: list[Pair] = []
    said: set[str] = set()
    drawn = 0
    while drawn < instructions:
        family = edits[rng.choices(list(edits), shares)[0]]
        edit = family[0]
        family.append(family.pop(0))
        sayings = [say(edit, rng) for _ in range(20)]
        instruction = next((words for words in sayings if words not in said), sayings[0])
        group = _draw_pairs(edit, instruction, pairs_each, split, rng)
        if len(group) >= 2:  # an example and a query
            said.add(instruction)
            pairs += group
            drawn += 1
    return pairs


def random_texts(rng: random.Random, pairs: int = 5) -> dict:
    """An instruction and captions of scenes before and after it, as a line of `texts.jsonl`."""
    after = None
    while after is None:
        before = random_scene(rng)
        edit = rng.choice(edits_of(rng.choice(families_of("train"))))
        after = _applies(edit, before, "train")
    drawn = [Pair(before, after, edit, ""), *_draw_pairs(edit, "", pairs - 1, "train", rng)]
    said = [[pair.before.caption(), pair.after.caption()] for pair in drawn]
    return {"instruction": say(edit, rng), "pairs": said}


def write_split(folder: Path, pairs: list[Pair]) -> None:
    """One folder with `metadata.jsonl` and pictures, in the public dataset format.

    Beyond the format's own keys each line keeps what `toy.score` needs: the family, the canonical wording,
    and the scene before the edit together with the edit's arguments; and five paraphrases of the instruction,
    in sayings that no model has seen.
    """
    folder.mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        lines = pool.map(_write_pair, itertools.repeat(folder), itertools.count(), pairs, chunksize=64)
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _paraphrases(edit: Edit | Mixture, rng: random.Random) -> dict[str, str]:
    said: list[str] = []
    while len(said) < len(PARAPHRASES):
        words = say(edit, rng, held_out=True)
        said += [words] if words not in said else []
    return dict(zip(PARAPHRASES, said))


def _write_pair(folder: Path, i: int, pair: Pair) -> str:
    """Writes the pictures of pair number `i`; returns its line of the metadata."""
    names = f"{i:06d}_before.png", f"{i:06d}_after.png"
    for name, scene in zip(names, (pair.before, pair.after)):
        render(scene).save(folder / name, compress_level=1)
    return json.dumps(
        {
            "input_file_name": names[0],
            "output_file_name": names[1],
            "instruction": pair.instruction,
            "input_caption": pair.before.caption(),
            "output_caption": pair.after.caption(),
            "family": pair.edit.family,
            "canonical": pair.edit.instruction,
            **_paraphrases(pair.edit, random.Random(f"{folder.name} {i}")),
            "edit": json.dumps(asdict(pair.edit)),
            "scene": json.dumps(asdict(pair.before)),
        }
    )


def write_dataset(
    out: Path,
    seed: int = 0,
    sizes: dict[str, tuple[int, int]] = SPLITS,
    mixtures: tuple[int, int] = (0, 0),
) -> None:
    """All splits below `out`; written beside it first, so that a killed run leaves nothing half-written.

    sizes, mixtures: instructions and pairs of each; mixtures are added to `train`. Where another process has
    made `out` meanwhile, that stays. Raises OSError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        new = Path(temporary, out.name)
        for split, size in sizes.items():
            pairs = draw_split(split, *size, seed)
            if split == "train":
                pairs += draw_split("train_mixture", *mixtures, seed)
            write_split(new / split, pairs)
        write_text(new / WORLD_NOTE, version(Path(__file__).parent))
        try:
            new.rename(out)
        except OSError:
            if not out.is_dir():
                raise
