"""What the frozen parts make of a dataset, computed once: latents, CLIP's embeddings, areas, text embeddings.

Symbols: N edit pairs; B of a batch; P panel size in pixels, p in latent pixels; C latent channels.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import backbone
import esm
import liu
import sam_loss
from dataset import VisualPromptDataset
from disk import atomic_write
from pictures import ImageError, TableImage, check_finite, from_bytes, to_bytes
from pictures.pairs import DatasetError, too_many
from training.hardware import on_all_threads
from training.stopping import begin_worker


class Precomputed(NamedTuple):
    """What training needs to know of N edit pairs.

    latents: (N, 2, C, p, p), of before and after. embeddings: (N, 2, E), CLIP's, or None without ESM.
    areas: (N, 1, p, p) in [0, 1], the after picture's selected area on the latent's raster, or None.
    pictures: (N, 2, 3, P, P) uint8, or None where they are too many for the memory.
    """

    latents: Tensor
    embeddings: Tensor | None = None
    areas: Tensor | None = None
    pictures: Tensor | None = None

    def of(self, index: Tensor, device: torch.device) -> "Precomputed":
        """Those of some pairs, index (B,), on a device; all but the bytes as float32."""
        index = index.to(self.latents.device)
        rows = (None if column is None else column[index].to(device) for column in self)
        return Precomputed(
            *(row.float() if row is not None and row.dtype == torch.half else row for row in rows)
        )


class Frozen(NamedTuple):
    """The frozen parts that look at pictures."""

    vae: nn.Module
    clip: nn.Module | None
    areas: sam_loss.SelectiveAreas | None

    @torch.no_grad()
    def encode(self, panels: Tensor) -> Precomputed:
        """Latents, embeddings and areas of pairs of pictures (N, 2, 3, P, P) in [-1, 1].

        [ours] Each panel passes the VAE by itself, where the figure encodes the grid. The latents tile to
        the same grid, panels do not leak into each other at their borders, and a picture is encoded once,
        in whatever grid it appears.
        """
        flat = panels.flatten(0, 1)
        latents = backbone.encode_images(self.vae, flat)
        embeddings = areas = None
        if self.clip is not None:
            embeddings = esm.embed(self.clip, flat).unflatten(0, panels.shape[:2])
        if self.areas is not None:
            areas = F.interpolate(self.areas(panels[:, 1]), latents.shape[-2:], mode="area")
        return Precomputed(latents.unflatten(0, panels.shape[:2]), embeddings, areas)

    def key(self) -> list[Any]:
        """What the result depends on besides the pictures: all that the frozen parts compute by."""
        models = (self.vae, self.clip, self.areas and self.areas.model)
        files = [None if model is None else backbone.fingerprint_of(model) for model in models]
        return [*files, self.areas and (self.areas.classes, self.areas.threshold)]


def fingerprint_pictures(data: VisualPromptDataset) -> str:
    """SHA-256 of which picture each pair has, row by row, and of each file's name, size and times.

    [ours] Not of the pixels, for which a large dataset would have to be read whole. A file that is written
    again has another time of change, even where its size and its time of modification are set to the old.
    """
    digest = hashlib.sha256()
    for pair in data.pairs:
        digest.update(f"{_picture_state(pair.input)}\n{_picture_state(pair.output)}\n\n".encode())
    return digest.hexdigest()


def _picture_state(source: str | TableImage) -> str:
    if isinstance(source, TableImage):  # the library's fingerprint of a table has its files' times
        return f"{source.column._fingerprint} {source.column.column_names} {source.row}"
    try:
        state = os.stat(source)
    except OSError:
        return f"{source!r} is missing"
    return f"{source!r} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def load_pairs(data: VisualPromptDataset, chosen: list[int]) -> tuple[Tensor, dict[int, str]]:
    """On a worker: the pictures of some pairs, (B, 2, 3, P, P), and by index what of them is broken."""
    panels, broken = torch.zeros(len(chosen), 2, 3, data.size, data.size), {}
    for k, i in enumerate(chosen):
        try:
            panels[k] = torch.stack(data.load_pair(i))
        except ImageError as error:
            broken[i] = str(error)
    return panels, broken


IN_MEMORY = 4 << 30  # bytes of pictures, or of text embeddings, that are kept on the device
PAIRS_IN_A_FILE = 16384  # of the cache: a run that is killed keeps the files that it has finished


@on_all_threads()
def precompute(
    data: VisualPromptDataset, frozen: Frozen, args: argparse.Namespace, device: torch.device
) -> tuple[VisualPromptDataset, Precomputed]:
    """The dataset without the pairs that cannot be read, and what is precomputed of all others, from the
    cache on disk as far as an earlier run has filled it. Where a picture, a row or a frozen part has changed
    since, it is computed anew. Raises DatasetError where the unreadable pairs are more than one in twenty."""
    side = data.size
    key = [fingerprint_pictures(data), side, frozen.key(), Precomputed._fields]
    folder = args.cache / f"precomputed-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    in_memory = len(data) * 2 * 3 * side**2 <= IN_MEMORY
    paths = {start: folder / f"{start:08d}.safetensors" for start in range(0, len(data), PAIRS_IN_A_FILE)}
    for start, path in paths.items():
        if path.exists():
            continue
        columns: dict[str, list[Tensor]] = {name: [] for name in Precomputed._fields}
        broken: dict[int, str] = {}
        for panels in read_all(data, args, broken, start):
            precomputed = frozen.encode(panels.to(device))
            if in_memory:
                precomputed = precomputed._replace(pictures=to_bytes(panels))
            for name, column in precomputed._asdict().items():
                if column is not None:
                    column = column.half() if column.is_floating_point() else column
                    columns[name].append(check_finite(column, f"{args.data}: the {name}").cpu())
        tensors = {name: torch.cat(column) for name, column in columns.items() if column}
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, partial(save_file, tensors, metadata={"broken": json.dumps(broken)}))
    broken, columns = {}, {}
    for path in paths.values():
        try:
            with safe_open(path, "pt") as file:
                broken |= {int(k): reason for k, reason in json.loads(file.metadata()["broken"]).items()}
                for name in file.keys():  # noqa: SIM118 (no dict)
                    columns.setdefault(name, []).append(file.get_tensor(name))
        except SafetensorError:
            raise ValueError(f"{path}: damaged; remove it, and it is computed anew") from None
    tensors = {name: torch.cat(column) for name, column in columns.items()}
    if broken:
        data, rows = drop_broken(data, broken)
        tensors = {name: column[rows] for name, column in tensors.items()}
    if in_memory:
        tensors = {name: column.to(device) for name, column in tensors.items()}
    return data, Precomputed(**tensors)


def read_all(
    data: VisualPromptDataset, args: argparse.Namespace, broken: dict[int, str], start: int = 0
) -> Iterator[Tensor]:
    """The pictures of a cache file's pairs, from `start` on, in batches (B, 2, 3, P, P); those that cannot be
    read are noted in `broken`, by their index."""
    pairs = range(start, min(start + PAIRS_IN_A_FILE, len(data)))
    options = {"batch_size": max(1, 2**20 // data.size**2), "collate_fn": partial(load_pairs, data)}
    loader = DataLoader(pairs, num_workers=args.workers, worker_init_fn=begin_worker, **options)
    part = f"precompute, from pair {start} of {len(data)}"
    for panels, unreadable in tqdm(loader, desc=part, mininterval=2, unit="batch"):
        broken |= unreadable
        yield panels


def drop_broken(data: VisualPromptDataset, broken: dict[int, str]) -> tuple[VisualPromptDataset, Tensor]:
    """The dataset without some of its pairs, and which of them stay.

    Each is named. Raises DatasetError where they are more than one in twenty. [ours] A picture in a thousand
    that is broken is the web's; one in twenty is a fault of the copy.
    """
    for reason in broken.values():
        print(f"left out: {reason}", flush=True)
    said = f"{len(broken)} of {len(data)} pairs cannot be used"
    if too_many(len(broken), len(data)):
        raise DatasetError(f"{said}, more than one in twenty; the first: {next(iter(broken.values()))}")
    print(said, flush=True)
    row = {id(pair): k for k, pair in enumerate(data.pairs)}
    whole = [pair for k, pair in enumerate(data.pairs) if k not in broken]
    whole = VisualPromptDataset(whole, data.size, data.seed)  # leaves out single pairs, too
    return whole, torch.tensor([row[id(pair)] for pair in whole.pairs])


class Draws(Dataset):
    """The indices of each item's query and example, for pictures that are at hand already."""

    def __init__(self, data: VisualPromptDataset) -> None:
        self.data = data

    def __getitem__(self, item: tuple[int, int]) -> dict[str, int]:
        epoch, i = item
        return {"index": i, "example_index": self.data.draw(i, epoch)}


def load_batches(
    data: VisualPromptDataset, precomputed: Precomputed, order: Iterable[list], workers: int
) -> DataLoader:
    """The items of each step in `order`, their pictures among them where they are not at hand already."""
    items = data if precomputed.pictures is None else Draws(data)
    return DataLoader(items, batch_sampler=order, num_workers=workers, worker_init_fn=begin_worker)


def gather_batch(
    batch: dict, precomputed: Precomputed, device: torch.device
) -> tuple[Tensor, Precomputed, Precomputed]:
    """A batch's panels (B, 4, 3, P, P), and what is precomputed of its example and of its query pairs."""
    example, query = (precomputed.of(batch[name], device) for name in ("example_index", "index"))
    if query.pictures is None:
        return batch["panels"].to(device), example, query
    return from_bytes(torch.cat([example.pictures, query.pictures], 1)), example, query


@torch.no_grad()
def read_instructions(
    data: VisualPromptDataset, sd: backbone.StableDiffusion, unifier: liu.InstructionUnifier | None
) -> tuple[Tensor, Tensor]:
    """Every distinct instruction through U, and every unified form through the text encoder, once.

    Returns the text embeddings (K + 1, T, D) of the K forms, then of no text, and the row of each pair (N,).
    Both are on the CPU, but the embeddings of a small dataset are where the text encoder is.
    """
    instructions = list(dict.fromkeys(pair.instruction for pair in data.pairs))
    unified = dict(zip(instructions, unifier.unify(instructions) if unifier else instructions))
    texts = [text for text in dict.fromkeys(unified.values()) if text]
    row = {text: k for k, text in enumerate([*texts, ""])}
    if unifier:
        print(f"{len(instructions)} instructions unified to {len(texts)} forms", flush=True)
    if cut := backbone.cut_off(sd.tokenizer, texts):
        print(f"{len(cut)} instructions are too long; of the first, {next(iter(cut.values()))}", flush=True)
    empty = backbone.encode_text(sd, [""])
    states = torch.empty(len(row), *empty.shape[1:])  # not a list to join, which would take twice the memory
    states[-1:] = empty
    for k in range(0, len(texts), 64):
        batch = texts[k : k + 64]
        states[k : k + len(batch)] = backbone.encode_text(sd, batch)
    check_finite(states, "an instruction's embedding")
    states = states.to(empty.device if states.nbytes < IN_MEMORY else "cpu")
    return states, torch.tensor([row[unified[pair.instruction]] for pair in data.pairs])
