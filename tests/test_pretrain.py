"""The toy parts' tokenizer: the same in every process, and still the tokenizer that was trained; the editor's
runs; the report."""

import hashlib
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

import backbone
import train
from data_making.texts import as_reply
from toy import world
from toy.pretrain import editor, loop, report, words


def test_the_tokenizer_is_a_function_of_the_seed_alone():
    tokenizer = words.new_tokenizer(0)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    alphabet = [token for token in vocabulary if len(token.removesuffix("</w>")) == 1]
    assert vocabulary[: 2 + len(alphabet)] == [*tokenizer.all_special_tokens, *sorted(alphabet)]
    assert tokenizer.get_vocab() == words.new_tokenizer(0).get_vocab()


def test_the_tokenizer_knows_the_words_of_every_instruction():
    tokenizer = words.new_tokenizer(0)
    instructions = [edit.instruction for edit in world.every_edit()]
    assert tokenizer.model_max_length == words.CONTEXT
    for instruction, ids in zip(instructions, tokenizer(instructions).input_ids):
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert len(ids) == len(instruction.split()) + 2 and tokenizer.decode(ids[1:-1]) == instruction


def test_the_writers_tokenizer_gives_every_text_back():
    tokenizer = words.new_writer_tokenizer(0)
    assert tokenizer.get_vocab() == words.new_writer_tokenizer(0).get_vocab()
    for text in (
        "Caption: a big red star, on a navy background\nEdited: nothing\n",
        "Ünknown  words\tand\n\n",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("a small purple heart at the bottom right").input_ids) == 8


def test_the_shipped_writers_tokenizer_knows_this_world():
    """It was learnt from other scenes; it needs no more tokens than one that is learnt anew."""
    _, shipped = backbone.load_llm(backbone.preset("toy").writer)
    rng, anew = random.Random(5), words.new_writer_tokenizer(0)
    texts = [as_reply(world.random_texts(rng)) for _ in range(50)]
    assert [shipped.decode(ids) for ids in shipped(texts).input_ids] == texts
    lengths = [sum(map(len, tokenizer(texts).input_ids)) for tokenizer in (shipped, anew)]
    assert lengths[0] <= 1.01 * lengths[1]


def test_a_stage_does_not_go_on_from_a_run_of_another_seed(tmp_path):
    def go(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(1, 1)
        loss = lambda step: {"loss": model.weight.square().sum()}  # noqa: E731
        loop.fit("part", model, loss, runs=tmp_path, steps=2, lr=0.1)

    go(0)
    go(0)
    with pytest.raises(ValueError, match="its seed is 0, not 1; remove it"):
        go(1)


def test_the_report_tells_losses_hours_and_hashes(tmp_path, monkeypatch):
    runs, weights, page = tmp_path / "runs", tmp_path / "weights", tmp_path / "page.md"
    for start, name in ((2e6, "editor"), (1e6, "pretrain/unet"), (0, "pretrain/vae")):
        with SummaryWriter(runs / name / "tensorboard") as log:
            for step in range(20, 2001, 20):
                log.add_scalar("loss/loss", 1 / step, step, walltime=start + 3.6 * step)
    (weights / "unet").mkdir(parents=True)
    (weights / "unet" / "config.json").write_text("{}")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "WEIGHTS", weights)
    report.main(["--runs", str(runs)])
    lines = page.read_text().splitlines()
    rows = [line for line in lines if "| 2,000 |" in line]
    assert [line.split()[1] for line in rows] == ["vae", "unet", "editor"]
    assert rows[0] == "| vae | 2,000 | 1.98 | 0.0500 | 0.0050 | 0.0010 | 0.0005 |"
    assert f"| `unet/config.json` | `{hashlib.sha256(b'{}').hexdigest()[:16]}` |" in lines


def test_the_editor_learns_single_edits_and_then_mixtures(folders, tmp_path, monkeypatch):
    commands, written = [], []

    def run(command, cwd):
        assert cwd == tmp_path
        commands.append(train.settings(command[2:]))
        shutil.copytree(folders / "editor", tmp_path / commands[-1].output / "editor", dirs_exist_ok=True)
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(editor, "HERE", tmp_path)
    monkeypatch.setattr(editor.subprocess, "run", run)
    monkeypatch.setattr(editor.world, "write_dataset", lambda *where, **how: written.append((where, how)))
    where = {"runs": Path("runs/pretrain"), "out": Path("weights"), "device": torch.device("cpu"), "seed": 3}
    editor.train_editor(SimpleNamespace(**where))
    first, second, longer, last = commands
    assert (first.data, first.init, first.resume, first.seed) == (None, None, False, 3)
    assert second.init == str(first.output / "editor") and second.data == "data/toy-mixtures"
    assert not second.resume and longer.resume and longer.output == second.output != first.output
    assert (second.seed, second.steps, longer.seed, longer.steps) == (4, 4000, 4, 6000)
    assert last.init == str(second.output / "editor") and last.data == second.data and not last.resume
    assert (last.output not in (first.output, second.output)) and (last.seed, last.steps) == (5, 3000)
    assert written == [((tmp_path / "data/toy-mixtures",), {"mixtures": editor.world.TRAINED_MIXTURES})]
    weights = load_file(tmp_path / "weights/editor/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float16}
    assert {command.llm for command in commands} == {"weights/llm"}
    assert str(tmp_path) not in (tmp_path / "weights/editor/config.json").read_text()
