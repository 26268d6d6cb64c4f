"""The paper's comparisons in miniature: every arm trained, edited with and measured, seed by seed.

    make results                                         # all arms, three seeds; hours on a CPU, resumable
    python -m evaluation.ablations --seeds 0 --only full no-esm    # a part of it
    python -m evaluation.ablations --table    # only writes docs/results.md from what is measured

Each arm is a command of `train.py`, `vit.py` or `baselines.py`, each set of answers one of `evaluate.py`,
measured by `metrics.py` and `toy.score`. This file calls these programs and keeps what they measured in
`docs/results/`, so that the arms may be trained on different days. All arms of a seed see the same number of
grids, or of edits, drawn in the same order. InstructPix2Pix's steps are much the fastest: it is trained for
about as much CPU time, too.

Every contribution is measured where it should show: RCLDM where the instruction is withheld and only the
example tells, ESM on everything, LIU on paraphrases that no model has seen, SAM on faces.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

import backbone
from disk import digest, other_settings, write_text
from evaluation.metrics import interval
from train import DROP, ES_EVERY, settings

PAGE = backbone.HERE / "docs" / "results.md"
TOY = backbone.preset("toy")
FROZEN = ("stable_diffusion", "clip", "clip_eval", "segmenter", "llm")
KEPT = backbone.HERE / "docs" / "results"  # a file for each arm and seed: its measurements, by set of answers
UNTRAINED = 0  # the seed of an arm that is not trained
NOT_YET = "Not measured yet.\n"


# --- What is compared ---------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """label: in the tables. trainer: the command that trains it, once for each seed; an arm without one is
    asked once. method, sampling: of evaluate.py.

    paper: the paper's FID and CLIP directional similarity. times: the budget's steps, this often.
    """

    label: str
    trainer: tuple[str, ...] = ("train.py",)
    method: str = "instructgie"
    sampling: tuple[str, ...] = ()
    paper: tuple[float | None, float | None] = (None, None)
    times: int = 1


SETS = {
    "seen": ("--split", "seen"),
    "unseen_combination": ("--split", "unseen_combination"),
    "example": ("--split", "seen", "--mode", "pair"),
    "paraphrase": ("--split", "seen", "--mode", "instruction", "--told", "paraphrase"),
    "faces": ("--split", "seen", "--caption", "face"),
}

# [ours] The baselines' rates and guidance scales are chosen on `train` (docs/results.md); their authors' were
# made for photographs.
ARMS = {
    "full": Arm("InstructGIE", paper=(7.57, 0.27)),
    "no-rcldm": Arm("without RCLDM", ("train.py", "--no-rcldm"), paper=(10.15, 0.13)),
    "vit": Arm("ViT in place of VMamba", ("evaluation.vit",)),
    "no-esm": Arm("without ESM", ("train.py", "--no-esm"), paper=(9.23, 0.15)),
    "no-liu": Arm("without LIU", ("train.py", "--no-liu"), paper=(10.37, None)),
    "no-sam": Arm("without SAM", ("train.py", "--no-sam"), paper=(11.31, None)),
    "sdedit": Arm("SDEdit", (), "sdedit", ("--guidance-text", "4"), paper=(21.67, 0.11)),
    "instruct-pix2pix": Arm(
        "InstructPix2Pix",
        trainer=("evaluation.baselines", "instruct-pix2pix", "--lr", "0.005"),
        method="instruct-pix2pix",
        sampling=("--guidance-text", "1.5", "--guidance-visual", "1"),
        paper=(17.87, 0.17),
    ),
    "prompt-diffusion": Arm(
        "Prompt Diffusion",
        trainer=("evaluation.baselines", "prompt-diffusion", "--lr", "0.01"),
        method="prompt-diffusion",
        sampling=("--guidance-text", "1.5"),
        paper=(13.75, 0.21),
    ),
    # The baselines' loss has no weights by place either.
    "plain": Arm(
        "InstructGIE, L_dm without weights", ("train.py", "--answer-weight", "1", "--change-weight", "0")
    ),
    "shipped": Arm("InstructGIE as shipped, trained longer", trainer=()),
}
LONGER = "InstructPix2Pix, 3 × the steps"
ARMS["instruct-pix2pix-3x"] = ARMS["instruct-pix2pix"]._replace(label=LONGER, paper=(None, None), times=3)

# The tables, by their heading: which arms stand beside the full one on which answers.
COMPARED = "sdedit", "instruct-pix2pix", "instruct-pix2pix-3x", "prompt-diffusion", "full", "plain", "shipped"
TABLES = {
    "### Beside the baselines": {"seen": COMPARED, "unseen_combination": COMPARED},
    "### Without each contribution": {
        "example": ("full", "no-rcldm", "vit"),
        "seen": ("full", "no-esm", "no-rcldm", "vit", "no-liu", "no-sam"),
        "paraphrase": ("full", "no-liu"),
        "faces": ("full", "no-sam"),
    },
}
ROWS = [(each, name) for sets in TABLES.values() for each, names in sets.items() for name in names]
TITLES = {
    "seen": "New scenes, `seen`",
    "unseen_combination": "Combinations never trained, `unseen_combination`",
    "example": "The example pair alone, without words, where RCLDM should help",
    "paraphrase": "Words alone, in wordings new to every model, where LIU should help",
    "faces": "Pictures with faces, where SAM should help",
}


# These arms are told each query in five wordings, without an example: do the answers agree?
WORDED = ("full", "no-liu")
PARAPHRASES = ("paraphrase", *(f"paraphrase{k}" for k in range(2, 6)))  # of toy/world/splits.py
LEFT_OUT = ("folder", "answers", "families")  # of what the programs wrote, in docs/results


# --- Running it ---------------------------------------------------------------------------------------------


def call(*command: object) -> str:
    """A program of this repository; returns what it printed. Raises ValueError where it fails, as it says."""
    words = [str(word) for word in command]
    words = words if words[0].endswith(".py") else ["-m", *words]
    print("python", *words, flush=True)
    ended = subprocess.run([sys.executable, *words], cwd=backbone.HERE, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise ValueError(f"stopped: {command[0]} failed; mend what it says above and start again, it goes on")
    return ended.stdout


def check_budget(args: argparse.Namespace) -> None:
    """Notes the budget, the losses' weights, the frozen parts and the world's pairs beside the runs and the
    measurements. Raises ValueError where those of another lie there."""
    budget = {name: getattr(args, name) for name in ("steps", "batch", "precision", "count")}
    defaults = vars(settings([]))
    budget |= {name: value for name, value in defaults.items() if name.endswith("_weight")}
    budget |= {"lr": TOY.lr, "drop": DROP, "es_every": ES_EVERY}
    budget["sampling"] = backbone.SAMPLING
    world = Path(backbone.data_folder(TOY.data))
    parts = {part: backbone.fingerprint(getattr(TOY, part), part) for part in FROZEN}
    # Its pairs, not its sources: a remark there need not void hours of training.
    parts["world"] = digest(world, world.glob("*/metadata.jsonl"))
    for folder in (args.runs, args.kept):
        for name, (there, now) in other_settings(folder / "budget.json", budget | parts).items():
            was = f"{name} {there}, not {now}"
            raise ValueError(f"{folder} is of {was}; give other folders with --runs, --out and --kept")


def train(name: str, seed: int, args: argparse.Namespace) -> str | None:
    """Trains an arm unless it is trained; returns what `evaluate.py` is to load, None for its default."""
    arm, folder = ARMS[name], args.runs / f"{name}-{seed}"
    if not arm.trainer:
        return None
    ours, done = arm.method == "instructgie", folder / "done"
    if not done.exists():
        begun = ("--resume",) if ours and folder.exists() else ()
        budget = ("--steps", arm.times * args.steps, "--batch", args.batch, "--precision", args.precision)
        call(*arm.trainer, "--output", folder, *begun, "--seed", seed, *budget)
        write_text(done, " ".join(arm.trainer))
    if (other := done.read_text()) != " ".join(arm.trainer):
        raise ValueError(f"{folder} was trained by {other!r}; remove it, or give another folder with --runs")
    return str(folder / ("editor" if ours else "pipeline"))


def sets_of(name: str) -> list[str]:
    """The sets of answers that the tables show of an arm."""
    shown = dict.fromkeys(each for each, other in ROWS if other == name)
    return [*shown, *(["wordings"] if name in WORDED else [])]


def measure(name: str, seed: int, args: argparse.Namespace) -> None:
    """Trains the arm, answers its sets and measures the answers: whatever of it is not done."""
    arm, kept = ARMS[name], measured(name, seed, args)
    made = {"command": [*arm.trainer, arm.method, *arm.sampling]}  # measured anew where it is another
    if name == "shipped":
        made["editor"] = backbone.fingerprint(TOY.editor, "editor")
    if any(kept.get(key) != value for key, value in made.items()):
        kept = made
    missing = [each for each in sets_of(name) if each not in kept]
    model = train(name, seed, args) if missing else None
    for each in missing:
        out = args.out / f"{name}-{seed}" / each
        if each == "wordings":
            told, count = (*SETS["paraphrase"][:-1],), ("--count", math.ceil(args.count / 4))
            answers = [answer(name, model, out / key, *told, key, *count) for key in PARAPHRASES]
            call("toy.score", *answers, "--agreement", "--json", out / "score.json")
            kept[each] = json.loads((out / "score.json").read_text())
        else:
            answers = answer(name, model, out, *SETS[each], "--count", args.count)
            call("evaluation.metrics", answers, "--json", out / "metrics.json")
            call("toy.score", answers, "--json", out / "score.json")
            (found,) = json.loads((out / "metrics.json").read_text())["results"]
            (scored,) = json.loads((out / "score.json").read_text())
            found = {key: value for key, value in (found | scored).items() if key not in LEFT_OUT}
            for key in ("fid_draws", "directional_similarity_draws"):
                found[key] = [float(f"{draw:.5g}") for draw in found[key]]
            kept[each] = found
        write_text(args.kept / f"{name}-{seed}.json", json.dumps(kept, allow_nan=False) + "\n")


def answer(name: str, model: str | None, out: Path, *options: object) -> Path:
    """Answers queries below `out`; returns the folder of the answers."""
    arm = ARMS[name]
    options = (*([model] if model else []), "--output", out, *options, "--sheet", 24)
    call("evaluation.evaluate", *options, "--method", arm.method, *arm.sampling)
    (folder,) = (path.parent for path in out.rglob("answers.jsonl"))
    return folder


def seeds_of(name: str, args: argparse.Namespace) -> list[int]:
    """Those that an arm is measured at."""
    return args.seeds if ARMS[name].trainer else [UNTRAINED]


def measured(name: str, seed: int, args: argparse.Namespace) -> dict[str, dict]:
    """The measurements of an arm that there are, by set of answers."""
    file = args.kept / f"{name}-{seed}.json"
    return json.loads(file.read_text()) if file.exists() else {}


# --- The tables ---------------------------------------------------------------------------------------------


def gather(name: str, each: str, args: argparse.Namespace) -> dict[int, dict]:
    """What was measured of an arm's answers, by the seeds that are there."""
    rows = {seed: measured(name, seed, args) for seed in seeds_of(name, args)}
    return {seed: row[each] for seed, row in rows.items() if each in row}


def cell(rows: list[dict], key: str, digits: int, interval_key: str = "", unit: float = 1) -> str:
    """A metric over the seeds: its mean, and in brackets the ends of the widest 95 % interval; the least and
    the greatest seed where it has none."""
    values = [row[key] for row in rows]
    if None in values:
        return "–"
    ends = [end for row in rows for end in row[interval_key]] if interval_key else values
    mean, low, high = (f"{unit * x:.{digits}f}" for x in (fmean(values), min(ends), max(ends)))
    return f"{mean} ({low} … {high})" if min(ends) < max(ends) else mean


def table(each: str, names: tuple[str, ...], args: argparse.Namespace) -> str:
    """A row for every arm that was measured on this set, the paper's numbers last; then names the others."""
    head = ["", "seeds × answers", "FID (clip)", "CLIP DirSim", "right, %", "MAE inside", "outside", "face"]
    head += ["paper: FID", "DirSim"]
    rows, missing = [], []
    for name in names:
        found = [*gather(name, each, args).values()]
        if not found:
            missing.append(ARMS[name].label)
            continue
        cells = [
            cell(found, "fid", 4, "fid_interval"),
            cell(found, "directional_similarity", 3, "directional_similarity_interval"),
            cell(found, "accuracy", 1, "interval", unit=100),
        ]
        cells += [cell(found, f"mae_{region}", 1) for region in ("inside", "outside", "face")]
        cells += ["–" if number is None else f"{number:.2f}" for number in ARMS[name].paper]
        rows.append([ARMS[name].label, f"{len(found)} × {found[0]['n']}", *cells])
    left = f"\nNot measured yet: {'; '.join(missing)}.\n" if missing else ""
    return backbone.markdown(head, rows) + left if rows else NOT_YET


def agreement(args: argparse.Namespace) -> str:
    """The share of queries whose answers in five wordings are one and the same edit, and the right one."""
    rows = []
    for name in WORDED:
        if found := [*gather(name, "wordings", args).values()]:
            shares = cell(found, "accuracy", 1, "interval", unit=100), cell(found, "right", 1, unit=100)
            rows.append([ARMS[name].label, f"{len(found)} × {found[0]['n']}", *shares])
    head = ["", "seeds × queries", "one edit in five wordings, %", "the right one, %"]
    return backbone.markdown(head, rows) if rows else NOT_YET


def difference(
    rows: dict[int, dict],
    full: dict[int, dict],
    key: str,
    digits: int,
    paper: float | None,
    untrained: bool = False,
) -> tuple[str, str]:
    """How far a metric lies above the full arm's of the same seed: mean, interval, and how many seeds say so;
    and what that says of `paper`, the paper's own difference.

    The interval is a paired bootstrap of instructions and seeds. Three seeds still understate their own
    spread, and one does not show it: there is no verdict then.
    untrained: the arm has one seed, which meets all of the full one's.
    """
    only = next(iter(rows.values())) if untrained else None
    pairs = [(rows.get(seed, only), full[seed]) for seed in full if only or seed in rows]
    apart = [mine[key] - theirs[key] for mine, theirs in pairs]
    mean = fmean(apart)
    draws = torch.tensor([[row[f"{key}_draws"] for row in pair] for pair in pairs], dtype=torch.float64)
    each = draws[:, 0] - draws[:, 1]  # (seeds, draws)
    picked = torch.randint(len(each), each.shape, generator=torch.Generator().manual_seed(0))
    low, high = interval(mean, each.gather(0, picked).mean(0))
    alike = sum((value > 0) == (mean > 0) for value in apart)
    sign = "no difference" if low <= 0 <= high else "agrees" if mean * (paper or 0) > 0 else "disagrees"
    sign = sign if len(apart) > 1 else "one seed"
    text = f"{mean:+.{digits}f} ± {(high - low) / 2:.{digits}f} ({alike} of {len(apart)})"
    return text, "–" if paper is None else sign


def differences(args: argparse.Namespace) -> str:
    """A row for each arm and set: FID and directional similarity less those of the full arm."""
    head = ["", "answers", "FID (clip)", "CLIP DirSim", "paper: FID", "DirSim", "sign: FID", "DirSim"]
    rows = []
    for each, name in ROWS:
        arm = ARMS[name]
        full, found = gather("full", each, args), gather(name, each, args)
        untrained = not arm.trainer
        pairs = found and full if untrained else found.keys() & full.keys()
        if name in ("full", "shipped") or not pairs:
            continue
        paper = [a and a - b for a, b in zip(arm.paper, ARMS["full"].paper)]
        measured = ("fid", 4), ("directional_similarity", 3)
        compared = (difference(found, full, *metric, by, untrained) for metric, by in zip(measured, paper))
        texts, signs = zip(*compared)
        told = ("–" if by is None else f"{by:+.2f}" for by in paper)
        rows.append([arm.label, f"`{each}`", *texts, *told, *signs])
    return backbone.markdown(head, rows) if rows else NOT_YET


def receptive_fields(args: argparse.Namespace) -> str:
    """The paper's figure, of the first seed's encoders: draws it beside the page, and returns its table."""
    editors = [args.runs / f"{name}-{args.seeds[0]}" / "editor" for name in ("no-rcldm", "vit", "full")]
    figure, printed = PAGE.with_name("receptive_field.png"), args.kept / "receptive_field.md"
    if all((editor.parent / "done").exists() for editor in editors):
        write_text(printed, call("evaluation.receptive_field", *editors, "--out", figure))
    if not printed.exists():
        return NOT_YET
    return f"{printed.read_text()}\n![the fields in the order of the rows]({figure.name})\n"


def write_page(args: argparse.Namespace) -> None:
    """Puts the tables into the page, between its two marks; what is written around them stays."""
    start, end = "<!-- measured: by evaluation.ablations -->\n", "<!-- end of what is measured -->\n"
    parts = [f"{args.steps} steps of {args.batch}. Seeds {', '.join(map(str, args.seeds))}.\n"]
    for heading, sets in TABLES.items():
        parts.append(f"{heading}\n")
        parts += [f"{TITLES[each]}:\n\n{table(each, names, args)}" for each, names in sets.items()]
    title = "Words alone, in five wordings new to every model"
    parts.append(f"{title}:\n\n{agreement(args)}")
    parts.append(f"### Differences from the full method\n\n{differences(args)}")
    parts.append(f"### Receptive fields of the encoders\n\n{receptive_fields(args)}")
    page = PAGE.read_text(encoding="utf-8")
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"{PAGE}: its two marks are gone; restore {start.strip()} and {end.strip()}")
    before, rest = page.split(start)
    text = before + start + "\n" + "\n".join(parts) + "\n" + end + rest.split(end)[1]
    write_text(PAGE, text)
    print(f"the tables are in {PAGE}")


@backbone.one_line_errors("evaluation.ablations")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("evaluation.ablations", __doc__)
    add = parser.add_argument
    add("--only", nargs="+", default=list(ARMS), choices=ARMS, help="these arms")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=1000, help="of every arm's training")
    add("--batch", type=int, default=64)
    add("--count", type=int, default=512, help="answers of each set")
    add("--precision", default="no", choices=("no", "bf16"))
    add("--runs", type=Path, default=Path("runs/ablations"), help="what is trained")
    add("--out", type=Path, default=Path("out/ablations"), help="answers")
    add("--kept", type=Path, default=KEPT, help="measurements")
    add("--table", action="store_true", help="only write the page")
    args = parser.parse_args(argv)
    check_budget(args)
    for seed in dict.fromkeys([*args.seeds, UNTRAINED]) if not args.table else ():
        for name in args.only:
            if seed in seeds_of(name, args):
                measure(name, seed, args)
    write_page(args)


if __name__ == "__main__":
    main()
