"""Two Llamas: one maps what people say to the canonical instruction, one writes a dataset's texts."""

import argparse
import random

import torch
from torch import Tensor, nn

from data_making.texts import OWN_TASK, reply_loss, writing_loss
from toy import world
from toy.pretrain.loop import fit, save
from toy.pretrain.words import new_tokenizer, new_writer_tokenizer


def new_llama(tokenizer, **sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    numbers = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **numbers, **sizes)
    )


def train_llm(args: argparse.Namespace) -> None:
    tokenizer = new_tokenizer(args.seed)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|say|>"]})
    # The model knows one task, so its template renders the wish alone, without examples for larger models.
    tokenizer.chat_template = "{{ messages[-1]['content'] }}<|say|>"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = new_llama(tokenizer, max_position_embeddings=128, **sizes).to(args.device)
    edits = world.every_edit()
    families = [world.edits_of(family) for family in world.FAMILIES]
    mixtures = [world.edits_of(family) for family in world.families_of("train_mixture")]
    say = tokenizer.convert_tokens_to_ids("<|say|>")
    batch = 64

    def loss(step: int) -> dict[str, Tensor]:
        rng = random.Random(args.seed * 1_000_003 + step)
        rows = []
        for _ in range(batch):
            kinds = [edits], families, mixtures
            edit = rng.choice(rng.choice(rng.choice(kinds)))
            wish = world.say(edit, rng) if rng.random() < 0.9 else edit.instruction
            prompt = [*tokenizer(wish, add_special_tokens=False).input_ids, say]
            rows.append((prompt, tokenizer(edit.instruction, add_special_tokens=False).input_ids))
        return {"loss": reply_loss(model, tokenizer, rows)}

    fit("llm", model, loss, steps=4000, lr=2e-3, runs=args.runs, weight_decay=0.05)
    save(args.out / "llm", model.half(), tokenizer)


def train_writer(args: argparse.Namespace) -> None:
    tokenizer = new_writer_tokenizer(args.seed)
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 5}
    model = new_llama(tokenizer, max_position_embeddings=512, **sizes).to(args.device)

    def loss(step: int) -> dict[str, Tensor]:
        rng = random.Random(args.seed * 1_000_003 + step)
        with torch.autocast(args.device.type, torch.bfloat16):
            return {"loss": writing_loss(model, tokenizer, [world.random_texts(rng) for _ in range(16)])}

    fit("writer", model, loss, steps=700, lr=1e-2, runs=args.runs, weight_decay=0.05, muon=True)
    tokenizer.chat_template = OWN_TASK
    save(args.out / "writer", model.half(), tokenizer)
