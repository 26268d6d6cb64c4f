"""12 · The wrong example                                                        project, 2 hours

An editor that is shown one edit and told another faces a conflict, and its answer reveals which condition it
follows. The toy world can measure this, because it knows the result of every edit of every scene. For each
answer, find the nearest of these pictures, in mean absolute difference:

    "nothing"   the query as it was           "shown"   after the edit that the example shows
    "told"      after the edit in words       "both"    after the shown one, and then the told one

Edits that cannot be made (`Edit.apply` returns None) are left out; ties go to the first, in the order
nothing, shown, told, both. Then survey the shipped editor, with one call for all queries: the words and the
pair, given once, hold for all.

Question: which wins, words or example? Does it depend on the edits? Where they disagree, are the answers as
near to one of the four pictures as where they agree? Call the pipeline yourself once, and look at answers.

Read: `InstructGIEPipeline.__call__` in apps/pipeline.py; `Edit` and `render` in toy/world/.
Test: pytest exercises -k 12, and with -s to see what is measured
"""

from collections.abc import Callable

from PIL import Image

from toy.world import Edit, Scene


def verdict(answer: Image.Image, query: Scene, shown: Edit, told: Edit) -> tuple[str, float]:
    """Which of the four is nearest to the answer, and the difference, in levels of 255."""
    raise NotImplementedError


def survey(
    pipe: Callable, example: Scene, queries: list[Scene], shown: Edit, told: Edit, steps: int = 20
) -> list[tuple[str, float]]:
    """Edits the queries with the example pair of `shown` and the words of `told`, and judges each answer.

    pipe: an `InstructGIEPipeline`. Its noise comes from a generator of seed 0.
    """
    raise NotImplementedError
