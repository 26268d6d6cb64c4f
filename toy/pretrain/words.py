"""The tokenizers, learnt from the toy world's captions and instructions."""

import random
from collections import Counter
from itertools import pairwise

import torch
from torch import Tensor

from data_making.texts import as_prompt, as_reply
from toy import world

CONTEXT = 64  # tokens of a prompt


def new_tokenizer(seed: int):
    """CLIP's kind of tokenizer (byte-level BPE), learnt from the toy world's captions and instructions.

    The merges are learnt here: the library's trainer breaks ties in a hash table's order, another each time.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    rng = random.Random(seed)
    texts = [world.random_picture(rng).caption() for _ in range(2000)]
    for edit in world.every_edit():
        texts += [edit.instruction] + [world.say(edit, rng) for _ in range(3)]
    empty = CLIPTokenizer()
    normalize, split = (getattr(empty.backend_tokenizer, k) for k in ("normalizer", "pre_tokenizer"))
    counts = Counter(
        word for text in texts for word, _ in split.pre_tokenize_str(normalize.normalize_str(text))
    )
    words = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts}
    ends = {f"{c}</w>" for word in words for c in word}
    alphabet = [*empty.all_special_tokens, *sorted({*ByteLevel.alphabet(), *ends})]
    numbers, merges = learn_merges(words, counts, alphabet)
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=CONTEXT)


def learn_merges(
    words: dict[str, list[str]], counts: Counter, vocabulary: list[str], size: int = 1024
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding: words in parts, and how often each occurs → tokens by number, and merges."""
    vocabulary, merges = list(vocabulary), []
    while len(vocabulary) < size:
        pairs = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        vocabulary.append("".join(merges[-1]))
        for parts in words.values():
            for i in reversed(range(len(parts) - 1)):
                if (parts[i], parts[i + 1]) == merges[-1]:
                    parts[i : i + 2] = vocabulary[-1:]
    return {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, merges


def new_writer_tokenizer(seed: int):
    """GPT-2's kind of tokenizer, which gives every text back as it was: lines, capitals, blanks."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer

    rng = random.Random(seed)
    records = [world.random_texts(rng) for _ in range(1500)]
    texts = [as_prompt(record["pairs"][0][0]) + as_reply(record) for record in records]
    split = ByteLevel(add_prefix_space=False)
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    alphabet = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    numbers, merges = learn_merges({word: [*word] for word in counts}, counts, alphabet)
    return GPT2Tokenizer(vocab=numbers, merges=merges, pad_token="<|endoftext|>")


def tokenize(tokenizer, texts: list[str], device: torch.device) -> Tensor:
    padding = {"padding": "max_length", "truncation": True, "max_length": CONTEXT}
    return tokenizer(texts, return_tensors="pt", **padding).input_ids.to(device)
