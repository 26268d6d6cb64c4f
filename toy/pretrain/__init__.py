"""Trains the toy parts from scratch, each saved in the layout of the library that loads the real one.

    python -m toy.pretrain                  # everything missing under toy/weights, resumable at any moment
    python -m toy.pretrain vae unet         # only these stages
    python -m toy.pretrain --report         # measure the saved parts on pictures they have not seen

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

from toy.pretrain.loop import save
from toy.pretrain.words import CONTEXT, new_tokenizer, new_writer_tokenizer
