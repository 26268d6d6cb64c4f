"""03 · Guidance by words and by example                                         warm-up, 20 minutes

The model sees an example pair, a picture before and after the edit, and words. Classifier-free guidance can
push an edit in two ways: away from the U-Net's prediction without the example pair, and away from its
prediction without the words. With a prediction e(text, pair), in which 0 stands for "left out",

    e = e(0, 0) + s_visual · (e(0, pair) - e(0, 0)) + s_text · (e(text, pair) - e(0, pair))

Every e costs a forward pass of the U-Net. Collected by the e's, this is a weighted sum, and an e of weight 0
need not be computed. Write the weights, and the sum.
Question: what do the weights add up to, and why must they? Which scales need one pass, two, three?

Read: InstructPix2Pix (Brooks et al., 2023), section 3.2.1, has the formula; `guidance_weights` in edit.py,
after you have tried.
Test: pytest exercises -k 03
"""

from torch import Tensor

Branch = tuple[bool, bool]  # whether it is given the text, and the pair


def branch_weights(s_text: float, s_visual: float) -> dict[Branch, float]:
    """The weight of each branch, without those whose weight is 0."""
    raise NotImplementedError


def guide(weights: dict[Branch, float], predictions: dict[Branch, Tensor]) -> Tensor:
    """The guided prediction. predictions: for each branch that has a weight, all of one shape."""
    raise NotImplementedError
