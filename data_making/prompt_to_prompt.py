"""Prompt-to-Prompt (Hertz et al., 2022): two pictures that differ in what their prompts differ in.

A U-Net of Stable Diffusion places things by its attention: each place of the picture attends to the tokens of
the prompt, and to the other places. Drawn side by side from the same noise, the second picture takes over the
attention maps M of the first, and fills them with the values V' of its own prompt:

    M'' = M A  for tokens that the first prompt has too, by the alignment A;   M'  for those that are new
    out = M'' V'

`pictures.py` draws the pairs of the Visual Prompt Dataset with it.

Symbols: B pairs of pictures; R = 4B rows of a U-Net batch; L latent pixels; T tokens of a prompt.
"""

from itertools import chain
from operator import eq
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

# --- Which token of one prompt stands for which of the other ------------------------------------------------


def align(source: str, target: str, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """How attention to the source's tokens becomes attention to the target's.

    Returns a matrix (T, T), source token to target token, and (T,) bool: whether a target token takes its
    attention over in this way, or is new and keeps its own.

    Words as in `seq_aligner.py` of google/prompt-to-prompt. Words replaced: the k-th word stands
    for the k-th; where the tokens are not as many, each gets its share of all. Otherwise the longest common
    subsequence of tokens: what is removed has no heir, what is added keeps to itself. In "a cat on a sofa" →
    "a fox on a sofa" the fox takes the cat's attention over; in → "a cat asleep on a sofa", `asleep` is new.
    [ours] Words are replaced where both prompts have as many, and no other alignment keeps more of them; the
    authors leave the choice to the user.
    [ours] The end token and padding keep their distance from the end. The authors align them by position, so
    that padding inherits the attention of a removed word.
    """
    split = [prompt.split() for prompt in (source, target)]
    words = [[tokenizer(word, add_special_tokens=False).input_ids for word in prompt] for prompt in split]
    first, last = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    old, new = ([first, *prompt, last] for prompt in words)
    length, ends = tokenizer.model_max_length, [sum(map(len, prompt)) for prompt in (old, new)]
    size = length + max(ends)  # what is beyond the length is cut off last
    matrix, known = torch.zeros(size, size), torch.ones(size, dtype=torch.bool)
    kept = sum(partner is not None for partner in common_subsequence(old, new))
    if len(old) == len(new) and kept == sum(map(eq, old, new)):
        sizes = [(len(one), len(other)) for one, other in zip(old, new)]
        blocks = [torch.eye(m) if m == n else torch.full((m, n), 1 / n) for m, n in sizes]
        matrix[: ends[0], : ends[1]] = torch.block_diag(*blocks)
    else:
        partners = common_subsequence(list(chain(*old)), list(chain(*new)))
        known[: ends[1]] = torch.tensor([partner is not None for partner in partners])
        for column, row in enumerate(partners):
            if row is not None:
                matrix[row, column] = 1
    for column in range(ends[1], length):  # the last token of the source stands in for those it has not
        matrix[min(column - ends[1] + ends[0], length - 1), column] = 1
    return matrix[:length, :length], known[:length]


def common_subsequence(one: list, other: list) -> list[int | None]:
    """For each item of `other` the index of its partner in `one`, or None; as many partners as can be."""
    best = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]  # how many, of what stands before i and j
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            best[i + 1][j + 1] = best[i][j] + 1 if a == b else max(best[i][j + 1], best[i + 1][j])
    partners: list[int | None] = [None] * len(other)
    i, j = len(one), len(other)
    while i and j:
        if best[i][j] == best[i][j - 1]:
            j -= 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            partners[j] = i
    return partners


# --- The attention of the first picture in the second -------------------------------------------------------


class PromptToPrompt:
    """An attention processor of diffusers for batches of rows in the order (2 guidance, 2 prompts, B pairs):
    without text before with text, the source's picture before the target's.

    matrix (T, T), known (T,): of `align`, for all pairs. To be set before each step: `replace_cross`,
    whether the target attends to the text as the source does; `replace_self` (B,) bool, for which pairs it
    attends to itself so.
    Source: Prompt-to-Prompt, section 3, which has both for the rows with text alone. [ours] As in
    InstructPix2Pix, self-attention is taken over in those without text too.
    """

    # [ours] Latent pixels up to which self-attention is taken over, as its authors do. Maps of finer layers
    # hold texture, which an edit may change.
    FINEST = 32 * 32

    def __init__(self, matrix: Tensor, known: Tensor) -> None:
        self.matrix, self.known = matrix[None, None], known  # (1, 1, T, T): for all pairs and heads
        self.replace_cross, self.replace_self = False, torch.tensor(False)
        self.plain = AttnProcessor2_0()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *rest,
        **more,
    ) -> Tensor:
        to_text = encoder_hidden_states is not None
        is_fine = hidden_states.shape[1] > self.FINEST
        if not (self.replace_cross if to_text else self.replace_self.any() and not is_fine):
            return self.plain(attn, hidden_states, encoder_hidden_states, *rest, **more)
        context = encoder_hidden_states if to_text else hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v)
        )  # (R, heads, L | T, d)
        if to_text:
            maps = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)  # (R, heads, L, T)
            source, target = maps.unflatten(0, (2, 2, -1))[1]  # (B, heads, L, T) each, with text
            mixed = torch.where(self.known, source @ self.matrix.to(maps.dtype), target)
            # [ours] As much attention in all as before, which the authors leave to chance.
            target.copy_(mixed * (source.sum(-1, keepdim=True) / mixed.sum(-1, keepdim=True)))
            out = maps @ v
        else:  # its maps are a function of queries and keys, so these are taken over in their place
            for x in (q, k):
                source, target = x.unflatten(0, (2, 2, -1)).unbind(1)  # (2, B, heads, L, d) each
                target.copy_(torch.where(self.replace_self[:, None, None, None], source, target))
            out = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2))) / attn.rescale_output_factor
