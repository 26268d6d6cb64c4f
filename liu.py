"""Language instruction unification (LIU), the third contribution of InstructGIE. Training and editing use it.

[paper] [figure] A frozen, light language model rewrites every instruction in one standard form (summary,
section 2; figure 2, "Instruction Unification Module U"). The text encoder reads this form, so different
phrasings of one command become one condition:

    l' = U(l)          U("Maybe night view looks better") = U("turn day to night, please") = "make it night"

[ours] The second wording and this form are ours. The file defines the standard form and its prompt, then the
unifier, then the test of a reply.
"""

import re
import warnings
from collections.abc import Iterable
from functools import cached_property
from itertools import cycle
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# [ours] The paper gives neither the model nor its prompt. Our standard form is a bare imperative, because
# it names the object and the change and leaves out the speaker. Examples teach it to a small model better
# than rules do.
RULES = (
    "Rewrite the wish of a photo editor's customer as one short command in a standard form: English, "
    "imperative, present tense, lower case, no politeness, no reasons. Name the object and its change, and "
    "nothing that the customer did not ask for. Reply with the command alone."
)
EXAMPLES = (
    ("Maybe night view looks better", "make it night"),
    ("Could you please change the colour of the car so that it is red?", "make the car red"),
    ("I don't like the man on the left", "remove the man on the left"),
    ("the dog should be a cat instead", "replace the dog with a cat"),
    ("What if there were some snow on those mountains?", "add snow to the mountains"),
    ("Her expression is too serious, she ought to be smiling!", "make the woman smile"),
    ("would love to see this as if Van Gogh had painted it", "make it look like a van gogh painting"),
    ("let's move this whole scene to a beach", "change the background to a beach"),
    ("it's way too colourful for me, black and white would do", "make it black and white"),
    ("The house looks tiny, can it be larger?", "make the house bigger"),
    ("Das Auto im Hintergrund stört", "remove the car in the background"),
    ("get rid of the clouds and have the sky purple", "remove the clouds and make the sky purple"),
)


def chat_prompt(instruction: str) -> list[dict[str, str]]:
    """The prompt for a chat template: past turns are the examples, the last is the instruction.

    The rules open the first user turn, because some templates know no system role. A model trained for this
    one task may carry a template that renders the last turn only.
    """
    texts = [text for example in EXAMPLES for text in example] + [instruction]
    texts[0] = f"{RULES}\n\n{texts[0]}"
    return [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), texts)]


def few_shot_prompt(instruction: str) -> str:
    """The same prompt as one text, for a model without a chat template to continue."""
    shown = "".join(f"Wish: {wish}\nCommand: {command}\n\n" for wish, command in EXAMPLES)
    return f"{RULES}\n\n{shown}Wish: {instruction}\nCommand:"


# In full, because a model folder may hold settings of its own: sampling would give one wording many forms,
# and a repetition penalty would keep the instruction's own words out of the reply.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
GREEDY |= {"temperature": None, "top_p": None, "top_k": None}
MAX_NEW_TOKENS = 48  # of a reply
BATCH = 16  # instructions
CUT = "…"  # ends a reply that had more


class InstructionUnifier:
    """The module U: a frozen causal language model behind a cache, greedy, so that one wording has one form.

    model: any causal LM of transformers; it is put in evaluation mode and frozen. tokenizer: the model's
    own; its chat template is used where it has one, and `eos_token` pads where it has no `pad_token`.
    cache: stores raw replies, with `load` and `append`, as in training/replies.py; None keeps them only as
    long as this object lives. Control tokens are removed from an instruction, so it cannot alter the
    conversation.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Any = None):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.device: torch.device | None = None  # of execution, while offloading keeps the weights elsewhere
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._cache = cache
        self._replies: dict[str, str] = self._cache.load() if self._cache else {}
        self._unified = {"": ""}  # an edit by the example alone has no instruction, and needs no model

    def unify(self, instructions: Iterable[str]) -> list[str]:
        """The standard form l' of each instruction l, in the same order; an empty one stays empty.

        The model is asked once for each distinct instruction that the cache does not know. If its reply
        is unusable, the user's own words are kept, with single spaces, and a warning says so once per
        instruction.
        """
        instructions = [" ".join(text.split()) for text in instructions]
        distinct = [text for text in dict.fromkeys(instructions) if text not in self._unified]
        # By length, so that little of a batch is padding.
        missing = sorted((text for text in distinct if text not in self._replies), key=len)
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            replies = dict(zip(batch, self._generate(batch)))
            self._replies |= replies
            if self._cache:
                self._cache.append(replies)
        for text in distinct:
            reply = standard_form(self._replies[text])
            problem = fault(reply, text)
            if problem:
                kept = f"instruction {text!r} is used as it stands"
                warnings.warn(f"{kept}: the reply {reply[:60]!r} is unusable, {problem}", stacklevel=2)
            self._unified[text] = text if problem else reply
        return [self._unified[text] for text in instructions]

    @torch.no_grad()
    def _generate(self, instructions: list[str]) -> list[str]:
        """The raw replies to one batch. Padding is on the left: every prompt ends where its reply begins."""
        instructions = [self._without_control_tokens(text) for text in instructions]
        if self.tokenizer.chat_template:
            inputs = self.tokenizer.apply_chat_template(
                [chat_prompt(text) for text in instructions],
                add_generation_prompt=True,
                sanitize_control_tokens=True,
                enable_thinking=False,  # for the templates of reasoning models; the others ignore it
                padding=True,
                return_tensors="pt",
                tokenizer_kwargs={"padding_side": "left"},
            )
        else:
            prompts = [few_shot_prompt(text) for text in instructions]
            inputs = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        device = self.device or self.model.device
        tokens = inputs["input_ids"].to(device)
        output = self.model.generate(
            input_ids=tokens,
            attention_mask=inputs["attention_mask"].to(device),
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=self.tokenizer.pad_token_id,
            **GREEDY,
        )
        output = output[:, tokens.shape[1] :]
        ends = torch.tensor(self.tokenizer.all_special_ids, device=output.device)
        is_whole = torch.isin(output[:, -1:], ends).any(1) | (output.shape[1] < MAX_NEW_TOKENS)
        replies = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        replies = [reply if whole else reply + CUT for reply, whole in zip(replies, is_whole)]
        if not self.tokenizer.chat_template:  # a bare model goes on to invent examples
            replies = [reply.strip().split("\n")[0] for reply in replies]
        return replies

    @cached_property
    def _control_tokens(self) -> list[str]:
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return list(filter(str.strip, dict.fromkeys([*added, *self.tokenizer.all_special_tokens])))

    def _without_control_tokens(self, text: str) -> str:
        """The text without control tokens: a tokenizer would obey them, and a chat template refuse them."""
        # Removing one token may form another.
        while found := [token for token in self._control_tokens if token in text]:
            for token in found:
                text = text.replace(token, " ")
        return text


MAX_WORDS = 30
_TALK = re.compile(
    r"(i|i'm|sorry|sure|ok|okay|of course|certainly|unfortunately|yes|as an ai|here's|here is|please)\b"
)
_MARKUP = re.compile(r"<\||\|>|</?\w+>|\[/?inst\]|\b(wish|command|user|assistant|system):", re.IGNORECASE)


def standard_form(reply: str) -> str:
    """A reply without what small models like to add: quotes or markup around it, capitals, a full stop."""
    form = re.sub(r"^[\s\"'“”‘’`*#>-]*(\d+[.)]\s+)?|[\s\"'“”‘’`*.!]+$", "", reply)
    if re.search(r"[\"“”`]", form):  # quoted words at one of its ends
        form = reply.strip(" \t\n*#>-.!")
    return form.lower()


def fault(reply: str, instruction: str) -> str | None:
    """What is wrong with a `standard_form` of the instruction, or None. No rule can check its meaning.

    [ours] After a faulty reply the text encoder reads the user's own words.
    """
    words = len(reply.split())
    if not reply:
        return "it is empty"
    if reply.endswith(CUT):
        return "it is cut"
    if len(reply.splitlines()) > 1:
        return "it has more than one line"
    # A short wish may grow to a full command, "night" to "make it night"; a long one should hardly grow.
    if words > min(MAX_WORDS, max(12, 3 * len(instruction.split()))):
        return f"it is too long ({words} words)"
    if _MARKUP.search(reply) or (words > 3 and reply[:30] in RULES.lower()):
        return "it repeats the prompt"
    if _TALK.match(reply) or reply.endswith("?"):
        return "it talks instead of commanding"
    return None


def main() -> None:
    """A worked example without a model: the prompt for a wish, and what becomes of some replies to it."""
    wish = "Perhaps the sofa could be green?"
    print(few_shot_prompt(wish), "\n")
    replies = '"Make the sofa green."', "", "Sure, a green sofa!", "make it green\nWish: bigger", RULES[:60]
    for reply in replies:
        form = standard_form(reply)
        problem = fault(form, wish)
        print(f"{reply!r:65} → l' = {wish if problem else form!r}", f"({problem})" if problem else "")


if __name__ == "__main__":
    main()
