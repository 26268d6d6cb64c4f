"""The cache of a language model's replies: one wording is unified once, in whatever run it comes."""

import hashlib
import json
import re
import warnings
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import backbone
from liu import GREEDY, MAX_NEW_TOKENS, few_shot_prompt


class ReplyCache:
    """Raw replies on disk, one JSON Lines file per model and prompt, to be read, and corrected, by hand.

    A batch is appended in a single write: processes can share the file, and a crash costs its last line at
    most. Raw, because `fault` may change, and a greedy model would only repeat itself.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        prompt = tokenizer(few_shot_prompt(""), verbose=False)["input_ids"]  # however long
        key = repr((backbone.fingerprint_of(model), prompt, MAX_NEW_TOKENS, GREEDY))
        name = re.sub(r"[^\w.-]+", "_", model.source.name)
        self.path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"

    def load(self) -> dict[str, str]:
        """Every whole entry of the file; a broken line is left out, with a warning, and asked for again."""
        replies = {}
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                if line:
                    entry = json.loads(line)
                    replies[str(entry["instruction"])] = str(entry["reply"])
            except (ValueError, TypeError, KeyError):
                warnings.warn(f"{self.path}:{number}: broken, and left out", stacklevel=3)
        return replies

    def append(self, replies: dict[str, str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"instruction": text, "reply": reply} for text, reply in replies.items()]
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        with open(self.path, "ab", buffering=0) as file:
            file.write(f"\n{lines}".encode())  # the first newline ends a line that a crash has cut short
