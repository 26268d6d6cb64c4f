"""09 · Is one command one form?                                                core, 60 minutes

In language instruction unification, a frozen language model U rewrites every wording to one standard form.
"maybe night view looks better" and "show it at night" both become "make it night". How well it does so can be
measured without knowing the right form: give U groups of wordings, each group of one edit, and see which
forms agree.

But a U that answers "make it night" to everything agrees best of all. Write three measures, each for a fault
that the others may miss:

    consistency    the share of all wordings that U brings to the form that is commonest in their group
    distinctness   the share of groups whose commonest form is the commonest of no other group
    stability      the share of all wordings' forms that U leaves as they are when it is given them again

Question: which of the three notices the identity? A constant? A U that puts "please" before every form, and
so a second one before its own forms? Which bad U still has 1 in all three? What does the toy language model
score on the canonical wordings and those held out of its training?

Read: liu.py; `Family.held_out_sayings` in toy/world/edits.py.
Test: pytest exercises -k 09, and with -s to see what is measured
"""

from collections.abc import Callable

Unify = Callable[[list[str]], list[str]]  # wordings → their forms, in the same order
Groups = list[list[str]]  # wordings of one edit each


def consistency(unify: Unify, groups: Groups) -> float:
    raise NotImplementedError


def distinctness(unify: Unify, groups: Groups) -> float:
    raise NotImplementedError


def stability(unify: Unify, groups: Groups) -> float:
    raise NotImplementedError
