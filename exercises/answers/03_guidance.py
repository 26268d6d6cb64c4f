"""The weights add up to 1 for any scales: where all branches predict the same, guidance must not change it.

Three passes, but one less for each of these: s_visual = 1 (nothing of e(0, 0) is left), s_text = s_visual
(nothing of e(0, pair)), s_text = 0 (nothing of e(text, pair)). With both scales 1, which is no guidance, that
leaves e(text, pair) alone."""

from torch import Tensor

Branch = tuple[bool, bool]  # whether it is given the text, and the pair


def branch_weights(s_text: float, s_visual: float) -> dict[Branch, float]:
    weights = {(False, False): 1 - s_visual, (False, True): s_visual - s_text, (True, True): s_text}
    return {branch: weight for branch, weight in weights.items() if weight != 0}


def guide(weights: dict[Branch, float], predictions: dict[Branch, Tensor]) -> Tensor:
    return sum(weight * predictions[branch] for branch, weight in weights.items())
