"""Trains the toy parts from scratch, each saved in the layout of the library that loads the real one.

    python -m toy.pretrain                  # all of them, under toy/weights, resumable at any moment
    python -m toy.pretrain vae unet         # only these stages

    vae          AutoencoderKL, 64×64 pictures <-> 8×8 latents of 16 channels           (diffusers)
    unet         text encoder and text-to-image U-Net; single scenes, 2×2 collages      (diffusers)
    clip         a CLIP for editing-shift matching and the dataset filter                (open_clip)
    clip_eval    another of a different seed, for evaluation only                        (open_clip)
    segmenter    Mask2Former                                                             (transformers)
    llm          a Llama that maps what people say to the canonical instruction          (transformers)
    writer       a Llama that writes captions and instructions, for data_making.texts    (transformers)
    editor       InstructGIE itself, by train.py

What the backbone has seen: pictures of the toy world, edited ones too, alone and in collages whose panels may
show the same scene again with something changed, as the pages of comics do.  It has seen no instruction and
no two rows that share an edit, so the editor still has everything about editing left to learn.
"""

from functools import partial
from pathlib import Path

import torch

import backbone
from toy.pretrain.clip import train_clip
from toy.pretrain.editor import train_editor
from toy.pretrain.language import train_llm, train_writer
from toy.pretrain.segmenter import train_segmenter
from toy.pretrain.unet import train_unet
from toy.pretrain.vae import train_vae

WEIGHTS = Path(__file__).parents[1] / "weights"
STAGES = {
    "vae": train_vae,
    "unet": train_unet,
    "clip": train_clip,
    "clip_eval": partial(train_clip, name="clip-eval", seed=20),
    "segmenter": train_segmenter,
    "llm": train_llm,
    "writer": train_writer,
    "editor": train_editor,
}


@backbone.one_line_errors("toy.pretrain")
def main() -> None:
    parser = backbone.new_parser("toy.pretrain", __doc__)
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], default=[])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrain"), help="checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    args.device = backbone.pick_device(args.device)
    for name in args.stages or STAGES:
        torch.manual_seed(args.seed)
        STAGES[name](args)


if __name__ == "__main__":
    main()
