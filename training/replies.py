"""The cache of a language model's replies: one wording is unified once, in whatever run it comes."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from liu import GREEDY, MAX_NEW_TOKENS, few_shot_prompt
from training.precompute import fingerprint


class ReplyCache:
    """Raw replies on disk, one JSON Lines file per model and prompt, to be read, and corrected, by hand.

    A batch is appended in a single write: processes can share the file, and a crash costs its last line at
    most. Raw, because `fault` may change, and a greedy model would only repeat itself.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        name = re.sub(r"[^\w.-]+", "_", Path(model.config._name_or_path or "model").name)
        self.path = folder / f"{name}-{_fingerprint(model, tokenizer, max_new_tokens)}.jsonl"

    def load(self) -> dict[str, str]:
        """Every whole entry of the file; broken lines are left out, with one warning for all of them."""
        replies, broken = {}, 0
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        for line in filter(None, lines):
            try:
                entry = json.loads(line)
                replies[str(entry["instruction"])] = str(entry["reply"])
            except (ValueError, TypeError, KeyError):
                broken += 1
        if broken:
            warnings.warn(f"{self.path}: {broken} broken lines left out, to be asked for again", stacklevel=3)
        return replies

    def append(self, replies: dict[str, str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"instruction": text, "reply": reply} for text, reply in replies.items()]
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        with open(self.path, "ab", buffering=0) as file:
            file.write(f"\n{lines}".encode())  # the first newline ends a line that a crash has cut short


def _fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int) -> str:
    """Differs where a weight, a config, the tokenizer, the prompt or the longest reply does."""
    generation = {**model.generation_config.to_dict(), "transformers_version": None}
    prompt = few_shot_prompt("")
    words = sorted(tokenizer.get_vocab().items()), tokenizer(prompt)["input_ids"], tokenizer.chat_template
    key = fingerprint(model), generation, words, prompt, longest, GREEDY
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]
