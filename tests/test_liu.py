"""Language instruction unification: rules and cache by scripted replies, generation by a tiny Llama."""

import warnings

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import backbone
import liu
from liu import EXAMPLES, GREEDY, RULES, InstructionUnifier, fault, few_shot_prompt, standard_form
from training.replies import ReplyCache

LAST_TURN = "{{ messages[-1]['content'] }}<sep>"
ALL_TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<sep>"


def byte_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """One token per byte, so that every instruction has a length of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE({character: index for index, character in enumerate([*alphabet, "<eos>", "<sep>"])}, [])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>", "additional_special_tokens": ["<sep>"]}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **special)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    # Larger initial weights than usual, so that different prompts have clearly different replies.
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, eos_token_id=256, initializer_range=0.3, **size))


class Scripted(InstructionUnifier):
    """Replies from a table in place of the model's, and notes what was asked."""

    def __init__(self, replies: dict[str, str], cache=None, seed: int = 0):
        parts = tiny_llama(seed), byte_tokenizer(LAST_TURN)
        if cache:  # as `backbone.load_llm` leaves the model, whose files the cache knows it by
            parts[0].source, parts[0].files = cache.parent / f"model-{seed}", "*"
            parts[0].source.mkdir(exist_ok=True)
            (parts[0].source / "config.json").write_text(f'{{"seed": {seed}}}')
        super().__init__(*parts, cache=cache and ReplyCache(cache, *parts))
        self.replies, self.asked = replies, []

    def _generate(self, instructions: list[str]) -> list[str]:
        self.asked.append(instructions)
        return [self.replies[text] for text in instructions]


NIGHT = {
    "Maybe night view looks better": "make it night",
    "night please": "Make it night.",
    "hat!": "add a hat",
}


# --- Unify --------------------------------------------------------------------------------------------------


def test_order_is_kept_and_each_instruction_asked_once(monkeypatch):
    monkeypatch.setattr(liu, "BATCH", 2)
    unifier = Scripted(NIGHT)
    asked = ["night please", "hat!", "Maybe night view looks better", "  night \n please ", "hat!"]
    expected = ["make it night", "add a hat", "make it night", "make it night", "add a hat"]
    assert unifier.unify(asked) == expected
    assert unifier.asked == [["hat!", "night please"], ["Maybe night view looks better"]]
    assert unifier.unify(reversed(asked)) == expected[::-1] and len(unifier.asked) == 2


def test_an_empty_instruction_asks_no_model():
    unifier = Scripted({})
    assert unifier.unify(["", "  \n"]) == ["", ""] and unifier.unify([]) == []
    assert unifier.asked == []


@pytest.mark.parametrize(
    "reply, why",
    [
        ("", "empty"),
        (' "" ', "empty"),
        ("make it night\nmake it day", "line"),
        ("make " + "very " * 11 + "dark", "long"),
        ("Instruction unified. Wish: night please", "prompt"),
        (RULES, "long"),
        (RULES[:60], "prompt"),
        ("make it night<|im_end|>", "prompt"),
        ("Sure, I can do that", "talks"),
        ("I'm sorry, but no", "talks"),
        ("which night do you mean?", "talks"),
    ],
)
def test_an_unusable_reply_falls_back_to_the_users_words(reply, why):
    unifier = Scripted({"Night, please": reply})
    with pytest.warns(UserWarning, match=f"'Night, please'.*{why}") as caught:
        assert unifier.unify([" Night,  please", "Night, please"]) == ["Night, please"] * 2
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per instruction
        unifier.unify(["Night, please"])


def test_what_is_usable():
    assert fault("make it night", "night") is None
    assert fault("invert the colours", "could I have the inverse of these colours") is None
    assert standard_form('  "Make the sky Purple."\n') == "make the sky purple"
    assert standard_form("‘make it 1.5 times larger’") == "make it 1.5 times larger"
    assert standard_form('Change the sign to "OPEN".') == 'change the sign to "open"'
    for marked in ("**make it night**", "- make it night!", "1. make it night", '"make it night'):
        assert standard_form(marked) == "make it night"
    for wish, command in EXAMPLES:  # the examples keep the rules that they teach
        assert standard_form(command) == command and fault(command, wish) is None


# --- Cache --------------------------------------------------------------------------------------------------


def test_a_cache_hit_asks_no_model(tmp_path):
    first = Scripted(NIGHT, tmp_path / "replies")
    assert first.unify(NIGHT) == ["make it night", "make it night", "add a hat"]
    again = Scripted({}, tmp_path / "replies")
    assert again.unify(NIGHT) == ["make it night", "make it night", "add a hat"]
    assert again.asked == []


def test_the_cache_knows_the_model_and_the_prompt(tmp_path, monkeypatch):
    Scripted(NIGHT, tmp_path).unify(NIGHT)
    other_weights = Scripted(NIGHT, tmp_path, seed=1)
    other_weights.unify(NIGHT)
    assert len(other_weights.asked) == 1
    monkeypatch.setattr("liu.RULES", "Rewrite.")
    other_prompt = Scripted(NIGHT, tmp_path)
    other_prompt.unify(NIGHT)
    assert len(other_prompt.asked) == 1 and len(list(tmp_path.iterdir())) == 3


def test_a_prompt_longer_than_a_model_of_one_task_reads_is_no_warning(tmp_path, caplog):
    transformers.logging.enable_propagation()
    tokenizer = byte_tokenizer(LAST_TURN)
    tokenizer.model_max_length = 8
    assert Scripted(NIGHT, tmp_path).unify(["hat!"]) == ["add a hat"]
    ReplyCache(tmp_path, Scripted(NIGHT, tmp_path).model, tokenizer)
    assert "longer than the specified maximum" not in caplog.text


def test_the_cache_knows_every_file_of_the_model(tmp_path):
    found, source = set(), tmp_path / "model"
    tiny_llama().save_pretrained(source)
    byte_tokenizer(LAST_TURN).save_pretrained(source)
    model, tokenizer = backbone.load_llm(source)
    for name in (
        None,
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        if name:
            with open(source / name, "r+b") as file:
                file.seek(0, 2)
                file.write(b" ")
        found.add(ReplyCache(tmp_path, model, tokenizer).path)
    assert len(found) == 6


def test_a_cached_fallback_warns_again(tmp_path):
    for _ in range(2):
        with pytest.warns(UserWarning, match="empty"):
            assert Scripted({"hm": ""}, tmp_path).unify(["hm"]) == ["hm"]


def test_a_corrupt_cache_costs_its_broken_lines_alone(tmp_path):
    Scripted(NIGHT, tmp_path).unify(NIGHT)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes().strip()
    file.write_bytes(
        b'\x89PNG\n[1, 2]\n{"reply": 1}\n' + whole[:-5]
    )  # the last entry is cut short, as by a crash
    with pytest.warns(UserWarning, match="jsonl:1: broken, and left out") as caught:
        unifier = Scripted(NIGHT, tmp_path)
    assert len(caught) == 4
    assert unifier.unify(NIGHT) == ["make it night", "make it night", "add a hat"]
    assert unifier.asked == [["Maybe night view looks better"]]  # the longest, hence the last in the file
    with pytest.warns(UserWarning, match="broken"):
        repaired = Scripted({}, tmp_path)
    repaired.unify(NIGHT)
    assert repaired.asked == []


def test_two_processes_share_a_cache(tmp_path):
    one, two = Scripted(NIGHT, tmp_path), Scripted(NIGHT, tmp_path)
    one.unify(["hat!"])
    two.unify(["night please", "hat!"])
    three = Scripted({}, tmp_path)
    assert three.unify(["hat!", "night please"]) == ["add a hat", "make it night"]


# --- Generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [LAST_TURN, ALL_TURNS, None], ids=["last turn", "all turns", "few-shot"])
def test_a_batch_replies_as_one_by_one(template, monkeypatch):
    monkeypatch.setattr(liu, "MAX_NEW_TOKENS", 12)
    unifier = InstructionUnifier(tiny_llama(), byte_tokenizer(template))
    asked = ["a", "make it night", "turn the big red circle on the left blue, please"]
    together = unifier._generate(asked)
    assert together == [unifier._generate([text])[0] for text in asked]
    assert len(set(together)) > 1
    if template:  # this model knows no end
        with pytest.warns(UserWarning, match="it is cut"):
            assert unifier.unify(asked) == asked


def test_the_model_is_frozen_and_reads_the_prompt(monkeypatch):
    def prompts(template: str | None, text: str) -> str:
        unifier = InstructionUnifier(tiny_llama().train(), byte_tokenizer(template))
        model, seen = unifier.model, []
        assert not model.training and not any(p.requires_grad for p in model.parameters())

        def generate(input_ids, **options):
            assert GREEDY.items() <= options.items()
            seen.append(input_ids)
            return input_ids

        monkeypatch.setattr(model, "generate", generate)
        assert unifier._generate([text]) == [""]
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        return unifier.tokenizer.decode(seen[0][0])

    assert prompts(LAST_TURN, "hat!") == "hat!<sep>"
    chat = prompts(ALL_TURNS, "hat!")
    assert chat.startswith(f"<user>{RULES}") and chat.endswith("<user>hat!<sep>")
    assert all(f"{wish}<assistant>{command}" in chat for wish, command in EXAMPLES)
    assert prompts(None, "hat!") == few_shot_prompt("hat!")


def test_a_bare_model_is_cut_where_its_next_example_begins(monkeypatch):
    tokenizer = byte_tokenizer(None)
    unifier = InstructionUnifier(tiny_llama(), tokenizer)
    reply = tokenizer(" add a hat\n\nWish: and then", return_tensors="pt")["input_ids"]
    monkeypatch.setattr(unifier.model, "generate", lambda input_ids, **_: torch.cat([input_ids, reply], 1))
    assert unifier.unify(["hat!"]) == ["add a hat"]
