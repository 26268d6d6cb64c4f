"""Selective-area matching (SAM), the fourth contribution of InstructGIE. Only training uses it.

[paper] People notice corrupted detail first in some areas, such as faces, which get a loss of their own
(summary, section 2; figure 2, "Mask2Former" and "LLM", "masked GT" and "masked output"). [ours] A language
model names the segmenter's classes for such areas. [figure] The segmenter finds them in the training images,
and the loss compares prediction and truth only there. [ours] The compared area is the true answer's; the loss
is a mean square over latents:

    L_sam = w · Σ m · |x̂_0 − x_0|² / Σ m    over the answer panel's latent; m: the area, 0 … 1
                                            |·|²: the mean over channels; w: of the noise level

This file selects the classes, finds them in an image, and defines the loss.
"""

import re
import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Tensor
from transformers import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# --- Class selection ----------------------------------------------------------------------------------------


@torch.no_grad()
def propose_classes(
    llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: Iterable[str]
) -> tuple[str, ...]:
    """The segmenter's classes that a language model considers worth a closer look.

    labels: `segmenter.config.id2label.values()`. Returns some of them, and drops the rest of the reply. If
    none is left, returns ("person",) with a warning, or raises ValueError if `labels` has no person.

    [ours] The figure draws an LLM here, and the paper does not say what it decides. Without an image it can
    decide one thing: in which kinds of thing people notice corrupted detail.
    """
    labels = tuple(labels)
    request = (
        f"An image editor can tell these classes apart: {', '.join(labels)}.\n"
        "Which of them have fine detail, such as faces, hands or writing, that people notice at once when it "
        "is corrupted? Reply with their names alone, separated by commas."
    )
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": request}]
        options = {"add_generation_prompt": True, "enable_thinking": False}
        inputs = tokenizer.apply_chat_template(turn, return_tensors="pt", **options)
    else:
        inputs = tokenizer(f"{request}\nNames:", return_tensors="pt")
    tokens = inputs["input_ids"].to(llm.device)  # (1, T)
    # In full, because a model folder may hold settings of its own, such as a penalty on repeated words.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 96}
    output = llm.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **greedy)
    reply = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
    named = {_plain(name) for name in re.split(r"[,;:\n]|\band\b", reply)}
    chosen = tuple(label for label in labels if _plain(label) in named)
    if chosen:
        return chosen
    if "person" not in labels:
        raise ValueError(f"the LLM names no class of the segmenter; choose from: {', '.join(labels)}")
    warnings.warn("the LLM names no class of the segmenter; 'person' is used", stacklevel=2)
    return ("person",)


def _plain(name: str) -> str:
    """A name without the dots, numbers and bullets of a list."""
    return name.strip(" \t*-.'\"0123456789").lower()


# --- Area detection -----------------------------------------------------------------------------------------


class SelectiveAreas:
    """Finds the areas of the chosen classes: `areas = SelectiveAreas(…)(images)`.

    model: a Mask2Former for panoptic segmentation; it is put in evaluation mode and frozen. processor: its
    own. classes: names in `model.config.id2label`. threshold: the least probability of a segment's class.
    Raises ValueError for a class that the model does not know.
    """

    def __init__(
        self,
        model: Mask2FormerForUniversalSegmentation,
        processor: Mask2FormerImageProcessor,
        classes: Iterable[str],
        threshold: float = 0.5,
    ):
        self.model = model.eval().requires_grad_(False)
        self.processor, self.classes, self.threshold = processor, tuple(classes), threshold
        ids = {label.lower(): index for index, label in model.config.id2label.items()}
        for name in self.classes:
            if name.lower() not in ids:
                raise ValueError(f"the segmenter knows no class {name!r}; it knows {', '.join(ids)}")
        self._ids = torch.tensor([ids[name.lower()] for name in self.classes])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → areas (B, 1, H, W), float32, 0 or 1, on the images' device."""
        inputs = self.processor(images=list((images.float() + 1) / 2), do_rescale=False, return_tensors="pt")
        output = self.model(pixel_values=inputs["pixel_values"].to(self.model.device, self.model.dtype))
        logits = zip(output.class_queries_logits.float(), output.masks_queries_logits.float())
        size = images.shape[-2:]
        areas = [panoptic_area(*both, self._ids, size, self.threshold) for both in logits]
        return torch.stack(areas)[:, None].to(images.device, torch.float32)


def panoptic_area(
    class_logits: Tensor, mask_logits: Tensor, classes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """The pixels of some classes in one image's panoptic segmentation → (H, W), bool.

    class_logits: (Q, K + 1), of Q queries, "no object" last. mask_logits: (Q, h, w). classes: (C,), each
    below K. size: (H, W). MaskFormer's panoptic inference (Cheng et al. 2021, section 3.4): each pixel
    goes to the query with the largest product of class and mask probability. A query that loses over a fifth
    of its mask to others is dropped.

    `post_process_panoptic_segmentation` of transformers does not serve here. It also assigns the pixels that
    no query claims, so a face that is found alone can get the whole image.
    """
    probability, label = class_logits.softmax(-1).max(-1)  # (Q,)
    kept = (label != class_logits.shape[-1] - 1) & (probability > threshold)
    if not kept.any():
        return torch.zeros(size, dtype=torch.bool, device=mask_logits.device)
    probability, label = probability[kept], label[kept]
    mask = F.interpolate(mask_logits[kept][None], size, mode="bilinear")[0].sigmoid()  # (Q', H, W)
    owner = (probability[:, None, None] * mask).argmax(0)  # (H, W)
    claimed = mask >= 0.5
    owned = claimed & (owner == torch.arange(len(mask), device=mask.device)[:, None, None])
    whole = owned.sum((1, 2)) >= 0.8 * claimed.sum((1, 2))
    return owned[whole & torch.isin(label, classes.to(label.device))].any(0)


# --- The loss -----------------------------------------------------------------------------------------------


def noise_weight(timestep: Tensor, scheduler: SchedulerMixin) -> Tensor:
    """w: the weight of x̂_0's squared error at each timestep. (B,) → (B,), in [0, 1].

    [ours] The paper does not say at which noise levels its image losses act. This one acts at all: an editor
    decides what to draw while the noise is strong. A predicted ε enlarges its error in x̂_0 by
    √((1 − ᾱ) / ᾱ), without bound; the weight ᾱ undoes this. Predictions of x_0 or v do not, and weigh 1.
    """
    alpha_bar = scheduler.alphas_cumprod.to(timestep.device, torch.float32)[timestep.long()]
    return alpha_bar if scheduler.config.prediction_type == "epsilon" else torch.ones_like(alpha_bar)


def selective_area_loss(
    predicted: Tensor, target: Tensor, area: Tensor, weight: Tensor | None = None
) -> Tensor:
    """L_sam: the squared error of the answer's latent inside the selected area. A scalar ≥ 0.

    predicted, target: (B, C, h, w), x̂_0 and x_0 of the answer panel. area: (B, 1, H, W) in [0, 1], of the
    image or of the latent. weight: (B,) ≥ 0, see `noise_weight`.
    Returns the mean over all B samples, so that a batch may be split; an empty area adds 0, with zero
    gradients.

    [ours] Pass the area of the true answer: the loss protects the desired content, not the input's.
    [ours] Latents are compared, not pixels: nothing is decoded. For a U-Net that predicts x_0, the unit is
    that of the diffusion loss. A latent pixel counts by the share of its patch that the area covers.
    [ours] The mean over the area, not the panel, so that a small face counts as much as a large one.
    """
    area = F.interpolate(area.float(), predicted.shape[-2:], mode="area")  # (B, 1, h, w)
    covered = area.sum((1, 2, 3))  # (B,), in latent pixels
    square = (predicted.float() - target.float()).square().mean(1, keepdim=True)  # (B, 1, h, w)
    error = (area * square).sum((1, 2, 3)) / covered.clamp_min(1e-6)  # (B,)
    return (error if weight is None else weight * error).mean()


def main() -> None:
    """A worked example with logits made by hand: a face is found, and an error counts only inside it."""
    class_logits = 5 * torch.eye(3)  # three queries, of a face, of the sky, of no object
    mask_logits = torch.full((3, 8, 8), -4.0)
    mask_logits[0, 2:5, 3:6] = 4.0
    mask_logits[1, :2] = 4.0
    area = panoptic_area(class_logits, mask_logits, torch.tensor([0]), (8, 8))
    print("the face's area:", *("".join(".#"[int(pixel)] for pixel in row) for row in area), sep="\n")
    target, area = torch.zeros(1, 4, 8, 8), area[None, None].float()
    for place, row, column in (("face", 3, 4), ("sky", 0, 0)):
        predicted = target.clone()
        predicted[..., row, column] = 3.0
        loss = selective_area_loss(predicted, target, area)
        print(f"L_sam of an error of 3 at one latent pixel of the {place}: {loss:.3f}")


if __name__ == "__main__":
    main()
