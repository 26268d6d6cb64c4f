"""data_making/prompt_to_prompt.py: alignments as published, and pictures that share what they should."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import backbone
from data_making import prompt_to_prompt
from data_making.pictures import draw_pairs
from data_making.prompt_to_prompt import align, common_subsequence

SOURCE = "a big red circle at the top left, on a white background"
TARGET = "a big blue circle at the top left, on a white background"
LONGER = "a big red circle at the top left, on a white background, night"


@pytest.fixture(scope="module")
def sd():
    return backbone.load_stable_diffusion(backbone.preset("toy").stable_diffusion)


def read(matrix, known, count):
    """For each of the first tokens of the target: where its attention comes from, None for a new one."""
    column = [[(i, round(w, 3)) for i, w in enumerate(matrix[:, j].tolist()) if w] for j in range(count)]
    return [taken if known[j] else None for j, taken in enumerate(column)]


def one(*rows):
    return [None if row is None else [(row, 1.0)] for row in rows]


# What `get_replacement_mapper` (as many words) and `get_mapper` (otherwise) of google/prompt-to-prompt's
# seq_aligner.py return with this tokenizer: "zebra" is five tokens, "horse" three, "rhinoceros" eight.
PUBLISHED = {
    "equal": ("a red circle", "a red circle", one(0, 1, 2, 3, 4)),
    "replaced": ("a red circle", "a blue circle", one(0, 1, 2, 3, 4)),
    "added": ("a red circle", "a big red circle", one(0, 1, None, 2, 3, 4)),
    "removed": ("a big red circle", "a red circle", one(0, 1, 3, 4, 5)),
    "more removed": ("a red circle and a green star", "a green star", one(0, 1, 6, 7, 8)),
    "tokens added": (
        "a red cat at the top",
        "a red cat and a zebra at the top",
        one(*range(5), *[None] * 7, 5, 6, 7, 8),
    ),
    "as many tokens": ("the horse and a cat", "the tiger and a cat", one(*range(10))),
    "more tokens": (
        "the zebra and the cat",
        "the rhinoceros and the hen",
        one(0, 1) + [[(row, 0.125) for row in range(2, 7)]] * 8 + one(7, 8, 9, 10),
    ),
    "fewer tokens": (
        "the zebra and the cat",
        "the horse and the hen",
        one(0, 1) + [[(row, 0.333) for row in range(2, 7)]] * 3 + one(7, 8, 9, 10),
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_alignment_is_the_published_one(sd, case):
    source, target, expected = PUBLISHED[case]
    matrix, known = align(source, target, sd.tokenizer)
    assert matrix.shape == (64, 64) and known.shape == (64,)
    assert read(matrix, known, len(expected)) == expected


def test_what_follows_the_words_stays_with_them(sd):
    # The published matrices go by position there: 10, 11, 12, 13 for "at the top" and the end.
    matrix, known = align("a zebra at the top", "a rhinoceros at the top", sd.tokenizer)
    assert read(matrix, known, 64)[10:] == one(*range(7, 61))
    matrix, known = align("a red circle and a green star", "a green star", sd.tokenizer)
    assert read(matrix, known, 64)[5:] == one(*range(9, 64), *[63] * 4)


def test_one_word_removed_and_another_added_are_no_replacement(sd):
    """Though the prompts have as many words: word by word, all but the first would inherit a neighbour's."""
    matrix, known = align("a small red circle", "a red circle green", sd.tokenizer)
    assert read(matrix, known, 6) == one(0, 1, 3, 4, None, 5)


def test_a_prompt_longer_than_the_text_encoder_reads_is_cut(sd):
    long = " ".join(["circle"] * 100)
    for target in (long, long + " red"):
        matrix, known = align(long, target, sd.tokenizer)
        assert torch.equal(matrix, torch.eye(64)) and known.all()


def test_attention_to_the_text_keeps_its_sum(sd, monkeypatch):
    # Without that, what is removed takes its share with it, and what is added brings its own.
    seen = []
    for case in ("removed", "tokens added"):
        source, target, _ = PUBLISHED[case]
        control = prompt_to_prompt.PromptToPrompt(*align(source, target, sd.tokenizer))
        control.replace_cross = True
        layer = next(m for name, m in sd.unet.named_modules() if name.endswith("attn2"))
        text = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(0))
        value = torch.ones(1, 64, layer.to_v.out_features)  # the same everywhere: out is the sum of the maps
        monkeypatch.setattr(layer.to_v, "forward", lambda x, value=value: value.expand(len(x), -1, -1))
        hidden = torch.randn(4, 16, layer.to_q.in_features, generator=torch.Generator().manual_seed(1))
        seen.append(control(layer, hidden, text))
        monkeypatch.undo()
    for out in seen:
        torch.testing.assert_close(out, out[:1, :1].expand_as(out), atol=1e-4, rtol=1e-4)


def test_the_common_subsequence_is_as_long_as_can_be():
    assert common_subsequence([1, 2, 3, 4], [2, 9, 4]) == [1, None, 3]
    assert common_subsequence([], [1]) == [None] and common_subsequence([1], []) == []


def test_equal_prompts_with_all_attention_replaced_make_equal_pictures(sd):
    for text in (SOURCE, LONGER, TARGET):
        pictures = draw_pairs(sd, [SOURCE, text], [1, 2], [5.0, 9.0], [1.0, 1.0], 1.0, 4, 64)
        assert pictures.shape == (2, 2, 3, 64, 64) and pictures.abs().max() <= 1
        assert torch.equal(pictures[:, 0], pictures[:, 1]) == (text == SOURCE)


def test_with_none_replaced_it_samples_plainly(sd):
    drawn = draw_pairs(sd, [SOURCE, TARGET], [1, 2], [7.0, 7.0], [0.0, 0.0], 0.0, 4, 64)
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**sd._asdict(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.stack([torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (1, 2)])
    options = {
        "guidance_scale": 7.0,
        "num_inference_steps": 4,
        "height": 64,
        "width": 64,
        "output_type": "pt",
    }
    plain = pipeline([SOURCE, SOURCE, TARGET, TARGET], latents=torch.cat([noise] * 2), **options).images
    assert torch.equal(drawn / 2 + 0.5, plain.unflatten(0, (2, 2)).transpose(0, 1))
    assert all(type(p) is not prompt_to_prompt.PromptToPrompt for p in sd.unet.attn_processors.values())


def test_the_first_picture_does_not_depend_on_the_second(sd):
    drawn = [draw_pairs(sd, [SOURCE, text], [1], [7.0], [0.5], 0.8, 4, 64)[0, 0] for text in (TARGET, LONGER)]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4


def test_a_sample_has_its_own_strength_in_a_batch(sd):
    def draw(own):
        return draw_pairs(sd, [SOURCE, LONGER], [1, 1], [7.0, 7.0], own, 0.0, 4, 64)

    mixed = draw([0.0, 1.0])
    assert (mixed[0] - draw([0.0, 0.0])[0]).abs().max() < 1e-4
    assert (mixed[1] - draw([1.0, 1.0])[1]).abs().max() < 1e-4
    assert (mixed[0, 1] - mixed[1, 1]).abs().max() > 0.01
