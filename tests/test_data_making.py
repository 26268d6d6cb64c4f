"""data_making/: strict texts, pictures that survive any stop, and what `check` finds."""

import contextlib
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_liu import byte_tokenizer, tiny_llama
from tiny import Stopped, stop_after

import backbone
from data_making import check, stage
from data_making import pictures as drawing
from data_making import texts as writing
from data_making.texts import EXAMPLES, OWN_TASK, Refusal, as_prompt, as_reply, parse_reply
from dataset import VisualPromptDataset
from disk import locked
from pictures import load_image
from pictures.pairs import read_pairs
from toy import world
from toy.world import __main__ as world_command


def records(count, pairs=3, seed=0):
    rng, found = random.Random(seed), {}
    while len(found) < count:
        record = world.random_texts(rng, pairs)
        found[record["instruction"]] = record
    return list(found.values())


def write_texts(out, lines):
    out.mkdir(parents=True, exist_ok=True)
    (out / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- The form of the texts ----------------------------------------------------------------------------------


def test_the_examples_are_of_the_form_that_they_teach():
    for record in EXAMPLES:
        assert parse_reply(record["pairs"][0][0], as_reply(record)) == record
    more = as_reply(EXAMPLES[0]) + "Caption: a lake\nEdited: a lake at night\n"
    assert parse_reply(EXAMPLES[0]["pairs"][0][0], more) == EXAMPLES[0]


REPLY = as_reply(EXAMPLES[0])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (f"Sure!\n{REPLY}", "not in the form"),
        (REPLY.replace("Edited", "Result", 1), "not in the form"),
        ("", "fewer than 4"),
        (REPLY.rsplit("Caption", 1)[0], "fewer than 4"),
        (REPLY.replace("make it night", " "), "is empty"),
        (REPLY.replace("make it night", "very " * 31), "too long"),
        (
            REPLY.replace("Edited: a street market in Hanoi at night", "Edited: A street market in Hanoi."),
            "says",
        ),
        (REPLY.replace("two horses on a hill", "A street market in Hanoi"), "twice"),
    ],
)
def test_a_reply_that_is_no_use_is_refused_with_the_reason(reply, reason):
    with pytest.raises(Refusal, match=reason):
        parse_reply("a fishing boat in a small harbour", reply)


def test_files_of_texts_are_read_strictly(tmp_path):
    file = tmp_path / "texts.jsonl"
    for line in (
        "{",
        "[]",
        '{"pairs": [["a", "b"]]}',
        '{"instruction": "x", "pairs": [["a"]]}',
        '{"instruction": "x", "pairs": []}',
        '{"instruction": "x", "pairs": ["ab"]}',
        '{"instruction": "x", "pairs": [["a", "b"], "ab"]}',
        '{"instruction": null, "pairs": [["a", "b"]]}',
    ):
        file.write_text(json.dumps(EXAMPLES[0]) + "\n" + line + "\n")
        with pytest.raises(ValueError, match=r"texts\.jsonl:2: not an object of the form"):
            writing.read_texts(file)
    file.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        writing.read_texts(file)
    file.write_text(json.dumps(EXAMPLES[0]), encoding="utf-8-sig")  # as Windows writes it
    assert writing.read_texts(file) == EXAMPLES[:1]
    file.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"texts\.jsonl: not UTF-8; save it as UTF-8"):
        writing.read_texts(file)


def test_examples_of_too_few_pairs_teach_nothing(tmp_path, refused):
    (tmp_path / "seeds.txt").write_text("a lake")
    (tmp_path / "own.jsonl").write_text('{"instruction": "x", "pairs": [["a", "b"], ["c", "d"]]}')
    options = ["--seeds", "seeds.txt", "--out", "out", "--finetune", "own.jsonl"]
    options = [str(tmp_path / word) if "." in word or word == "out" else word for word in options]
    assert "own.jsonl: each example needs 5 pairs of captions" in refused(writing.main, options)
    assert not (tmp_path / "out").exists()


# --- The language model -------------------------------------------------------------------------------------


class Speaker:
    """A model that says what it is told to, as tokens."""

    device, generation_config = torch.device("cpu"), SimpleNamespace(eos_token_id=256)

    def __init__(self, tokenizer, *replies, pad=256):
        self.tokenizer, self.pad = tokenizer, pad
        self.replies = [tokenizer(reply).input_ids for reply in replies]
        self.asked = []

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        rows = zip(input_ids, attention_mask)
        self.asked += [self.tokenizer.decode(row[mask.bool()]) for row, mask in rows]
        length = min(max_new_tokens, max(len(reply) for reply in self.replies) + 1)
        said = [(reply + [256] * length)[:length] for reply in self.replies]
        return torch.cat([input_ids, torch.tensor(said)], 1)


def test_a_base_model_is_shown_rules_and_examples_and_stopped_after_one_reply():
    tokenizer = byte_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token
    unfinished = "Instruction: x\nEdited: unfinished"
    model = Speaker(tokenizer, f"{REPLY}\nCaption: a boat", unfinished + " and" * 200)
    replies = writing.write_replies(model, tokenizer, ["a lake", "a mountain"])
    assert model.asked[1].startswith(writing.RULES) and model.asked[1].endswith("Caption: a mountain\n")
    assert model.asked[0].count("Instruction:") == len(EXAMPLES)
    assert model.asked[0].count("\n\nCaption:") == len(EXAMPLES) + 1  # a blank line after each, and the rules
    assert replies == [REPLY.rstrip(), "Instruction: x"]  # the last line may have been cut anywhere


def test_a_chat_model_is_shown_them_as_turns():
    tokenizer = byte_tokenizer("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
    tokenizer.pad_token = tokenizer.eos_token
    model = Speaker(tokenizer, REPLY.rstrip())
    assert writing.write_replies(model, tokenizer, ["a lake"]) == [REPLY.rstrip()]
    assert model.asked[0].startswith(f"<user>{writing.RULES}\n\n{as_prompt(EXAMPLES[0]['pairs'][0][0])}")
    assert model.asked[0].count("<assistant>Instruction: ") == len(EXAMPLES)
    assert model.asked[0].endswith("<user>Caption: a lake\n")


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """texts() with replies from a table: caption → the replies that it gets, one after the other."""
    asked, table = [], {}
    monkeypatch.setattr(backbone, "load_llm", lambda *_: (None, SimpleNamespace(pad_token="x")))

    def write_replies(model, tokenizer, captions):
        asked.append(captions)
        if None in (
            given := [table[caption][sum(c == caption for b in asked for c in b) - 1] for caption in captions]
        ):
            raise KeyboardInterrupt
        return given

    monkeypatch.setattr(writing, "write_replies", write_replies)

    def run(*options):
        asked.clear()
        (tmp_path / "seeds.txt").write_text("\n\n ".join([*table, *table]))  # each counts once
        writing.main(["--seeds", str(tmp_path / "seeds.txt"), "--out", str(tmp_path / "out"), *options])
        return [*asked], writing.read_texts(tmp_path / "out" / "texts.jsonl")

    return table, run


def reply(instruction, caption):
    pairs = [[f"{caption} {k}", f"{caption} {k} {instruction}"] for k in range(4)]
    return as_reply({"instruction": instruction, "pairs": [[caption, f"{caption} {instruction}"], *pairs]})


def test_refused_replies_are_asked_for_again_and_counted(scripted, capsys, monkeypatch):
    table, run = scripted
    monkeypatch.setattr(writing, "TRIES", 2)
    table |= {
        "a": [reply("one", "a")],
        "bb": ["no", "no", reply("two", "bb")],
        "ccc": ["no", "no"],
        "dddd": [reply("One.", "dddd"), reply("ONE", "dddd")],
    }
    asked, texts = run("--batch", "2")
    assert asked == [["a", "bb"], ["ccc", "dddd"], ["bb", "ccc"], ["dddd"]]
    assert [text["instruction"] for text in texts] == ["one"]
    printed = capsys.readouterr().out
    assert "4 captions: 1 instructions with 5 pairs" in printed
    assert "refused     4 replies: it is not in the form of the examples" in printed
    assert "refused     2 replies: its instruction is there already" in printed
    monkeypatch.setattr(writing, "TRIES", 3)
    table |= {"bb": [reply("two", "bb")], "dddd": [reply("three", "dddd")]}
    asked, texts = run("--batch", "2")
    assert asked == [["bb", "ccc"], ["dddd"]] and len(texts) == 3
    table.clear()  # further seeds, in a file of their own, extend what is there
    table |= {"eeeee": [reply("four", "eeeee")], "f " * 61: [None]}
    asked, texts = run()
    assert asked == [["eeeee"]] and [text["instruction"] for text in texts][-1] == "four" and len(texts) == 4
    assert "left out 1 captions of more than 60 words" in capsys.readouterr().out


def test_an_instruction_stays_with_the_caption_that_had_it(scripted, tmp_path):
    """Whichever process writes the new replies, and whenever."""
    replies = {"a": ["no", reply("one", "a")], "bb": [reply("one", "bb")]}
    assert [*writing.usable(replies)[0]] == ["bb"]  # a first reply before a second one
    assert [*writing.usable(replies, ["a"])[0]] == ["a"]
    table, run = scripted
    table["bb"] = [reply("one", "bb")]
    _, texts = run()
    log = tmp_path / "out" / "replies" / "00000.jsonl"
    log.rename(log.with_name("00001.jsonl"))  # as the second of two processes would write it
    table["a"] = [reply("One.", "a"), reply("two", "a")]
    asked, more = run()
    assert (
        asked == [["a"], ["a"]]
        and more[:1] == texts
        and [text["instruction"] for text in more] == ["one", "two"]
    )


def test_a_folder_is_one_runs_at_a_time(scripted, painted, tmp_path, refused):
    table, run = scripted
    table["a"] = [reply("one", "a")]
    run()
    with locked(tmp_path / "out"):
        assert "another process writes there" in refused(run)
        assert "another process writes there" in refused(images, tmp_path / "out")
    images(tmp_path / "out")


def test_texts_go_on_where_they_were_stopped(scripted, tmp_path):
    table, run = scripted
    table |= {name: [reply(name * 2, name)] for name in ("a", "bb", "ccc")}
    table["ccc"] = [None]
    with pytest.raises(SystemExit, match="130"):
        run("--batch", "1")
    with open(tmp_path / "out" / "replies" / "00000.jsonl", "a") as file:
        file.write('{"caption": "bb", "reply": "cut of')  # as a killed run might leave it
    table["ccc"] = [reply("c", "ccc")]
    asked, texts = run("--batch", "1")
    assert asked == [["ccc"]] and len(texts) == 3
    asked, texts = run("--batch", "1")
    assert asked == [] and len(texts) == 3


def test_work_of_other_settings_is_not_mixed(scripted, refused):
    table, run = scripted
    table["a"] = [reply("one", "a")]
    run()
    assert "llm toy/weights/writer, now another" in refused(run, "--llm", "another")


def test_finetuning_teaches_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    lines = [
        {"instruction": "x", "pairs": [["a", "b"], ["c", "d"]]},
        {"instruction": "y", "pairs": [["e", "f"]]},
    ]
    tokenizer = byte_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token

    def teach(folder, epochs=3):
        model = tiny_llama()
        before = writing.writing_loss(model, tokenizer, lines).item()
        writing.finetune(model, tokenizer, lines, tmp_path / folder, epochs, 1e-2, 1)
        return before, writing.writing_loss(model, tokenizer, lines).item()

    before, after = teach("whole")
    assert after < before - 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]  # its checkpoints are gone
    model, taught = backbone.load_llm(str(tmp_path / "whole"))
    assert taught.chat_template == OWN_TASK
    stop_after(2, monkeypatch)
    with pytest.raises(Stopped):
        teach("cut")
    monkeypatch.undo()
    teach("cut")
    again, _ = backbone.load_llm(str(tmp_path / "cut"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_the_loss_is_of_the_reply_alone():
    tokenizer = byte_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token
    model, seen = tiny_llama(), {}
    real = model.forward
    model.forward = lambda **inputs: seen.update(inputs) or real(**inputs)
    lines = [{"instruction": "x", "pairs": [["a", "b"]]}, {"instruction": "yy", "pairs": [["longer", "b"]]}]
    writing.writing_loss(model, tokenizer, lines)
    for record, ids, labels in zip(lines, seen["input_ids"], seen["labels"]):
        learnt = tokenizer.decode(ids[labels != -100])
        assert learnt == as_reply(record) + "<eos>"
        assert tokenizer.decode(ids).startswith(as_prompt(record["pairs"][0][0]) + as_reply(record))
        assert (ids[labels != -100] == labels[labels != -100]).all()


# --- Pictures -----------------------------------------------------------------------------------------------


@pytest.fixture
def painted(monkeypatch, tmp_path):
    """images() with pictures of one colour that only the seed decides, and scores that it decides too."""
    drawn = tmp_path / "drawn.txt"  # outlives a process

    def draw_pairs(sd, captions, seeds, guidance, own, cross, steps, size):
        with open(drawn, "a") as file:
            file.write(f"{captions}\n")
        pictures = [torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(pictures).expand(-1, -1, -1, size, size) * 2 - 1

    def clip_scores(clip, tokenizer, pictures, captions):
        values = pictures[:, :, :2, 0, 0].flatten(1).T / 2 + 0.5  # (4, B)
        return dict(zip(("clip_before", "clip_after", "clip_image", "clip_direction"), values))

    monkeypatch.setattr(drawing, "draw_pairs", draw_pairs)
    monkeypatch.setattr(drawing, "clip_scores", clip_scores)
    return drawn


def images(out, *options):
    drawing.main(["--out", str(out), "--samples", "6", *options])


def tree(folder):
    """All files but what a killed process has left of the one it was writing to."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_best_samples_that_pass_are_kept_and_thin_instructions_left_out(painted, tmp_path, monkeypatch):
    texts, seen, clip_scores = records(6), [], drawing.clip_scores
    monkeypatch.setattr(drawing, "clip_scores", lambda *given: seen.append(clip_scores(*given)) or seen[-1])
    write_texts(tmp_path / "out", texts)
    images(tmp_path / "out", "--min-image", "0.8")
    pairs = read_pairs(tmp_path / "out", "train")
    counts = Counter(pair.instruction for pair in pairs)
    assert 1 <= len(counts) < len(texts) and set(counts.values()) <= {2, 3}
    reports = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("train/*/report.json")]
    assert sum((Counter(report["counts"]) for report in reports), Counter())["drawn"] == 18 * 6
    assert {report["instruction"] for report in reports if "thin" in report["counts"]} == {
        text["instruction"] for text in texts
    } - set(counts)
    best = []
    for scores in seen:
        rows = zip(*(value.tolist() for value in scores.values()))
        good = [row[3] for row in rows if min(row[0], row[1], row[3]) >= 0.2 and row[2] >= 0.8]
        best += [round(max(good), 4)] if good else []
    assert len(seen) == 18
    for kept in (pair.extra for pair in pairs):
        assert kept["clip_image"] >= 0.8 and min(kept["clip_before"], kept["clip_after"]) >= 0.2
        assert kept["clip_direction"] in best
        assert 7.5 <= kept["guidance"] <= 15 and 0.1 <= kept["injection"] <= 0.9
    for pair in pairs:  # what is painted tells its scores
        before, after = (load_image(file).getpixel((0, 0)) for file in (pair.input, pair.output))
        wanted = [pair.extra[f"clip_{name}"] for name in ("before", "after", "image", "direction")]
        assert [*before[:2], *after[:2]] == pytest.approx([255 * score for score in wanted], abs=1)
    told = {(text["instruction"], *pair) for text in texts for pair in text["pairs"]}
    assert all((p.instruction, p.input_caption, p.output_caption) in told for p in pairs)
    listed = {path for pair in pairs for path in (pair.input, pair.output)}
    there = {str(p) for p in (tmp_path / "out" / "train").rglob("*.png")}
    assert {os.path.realpath(p) for p in listed} == {os.path.realpath(p) for p in there}
    table = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "hub")
    )
    assert table["train"].num_rows == len(pairs) and table["train"][0]["input"].size == (64, 64)
    assert len(VisualPromptDataset(pairs, 32)) == len(pairs)


def test_killed_anywhere_it_loses_nothing_and_repeats_one_instruction_at_most(painted, tmp_path, monkeypatch):
    """A child process dies at its k-th step into the file system, for every k there is; another goes on."""
    texts = records(2, pairs=2, seed=1)
    options = ("--min-caption", "0", "--min-image", "0.2", "--min-direction", "0")
    toy = backbone.preset("toy")
    for name, source in (("load_stable_diffusion", toy.stable_diffusion), ("load_clip", toy.clip)):
        loaded = getattr(backbone, name)(source)
        monkeypatch.setattr(backbone, name, lambda *_, loaded=loaded: loaded)

    def child(out, die_at):
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        steps = 0

        def watch(event, arguments):
            nonlocal steps
            ours = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(out) in str(
                arguments
            )
            steps += ours
            if steps == die_at and ours:
                os._exit(9)

        try:
            sys.addaudithook(watch)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            images(out, *options)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)

    write_texts(tmp_path / "whole", texts)
    assert child(tmp_path / "whole", None) == 0
    whole, once = tree(tmp_path / "whole"), painted.read_text()
    assert once.count("\n") == 4 and len([name for name in whole if name.endswith(".png")]) == 8
    for die_at in range(1, 1000):
        out = tmp_path / f"cut{die_at}"
        write_texts(out, texts)
        painted.write_text("")
        code = child(out, die_at)
        assert code in (0, 9)
        begun, finished = painted.read_text().count("\n"), len([*out.glob("train/[!.]*/report.json")])
        assert child(out, None) == 0
        assert tree(out) == whole
        # At most the instruction of two pairs that the first process was at is drawn again.
        assert painted.read_text().count("\n") == begun + 2 * (2 - finished)
        if code == 0:
            break
    assert die_at > 30


def test_processes_share_the_work_and_make_what_one_would(painted, tmp_path, monkeypatch):
    texts = records(8, pairs=2)
    for out in ("one", "two"):
        write_texts(tmp_path / out, texts)
    images(tmp_path / "one", "--min-image", "0")
    alone = painted.read_text()
    painted.write_text("")
    shares = []
    for rank in (0, 1):
        state = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            is_main_process=rank == 0,
            device=torch.device("cpu"),
            wait_for_everyone=lambda: None,
            main_process_first=contextlib.nullcontext,
            destroy_process_group=lambda: None,
        )
        monkeypatch.setattr(stage, "PartialState", lambda state=state, **_: state)
        images(tmp_path / "two", "--min-image", "0")
        shares.append(painted.read_text().count("\n") - sum(shares))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert min(shares) > 0 and sum(shares) == alone.count("\n") == 16


def test_more_texts_are_added_to_what_is_there(painted, tmp_path, capsys):
    texts, out = records(6, pairs=2), tmp_path / "out"
    options = ("--min-direction", "0", "--min-caption", "0", "--min-image", "0")
    write_texts(out, [texts[0] | {"pairs": texts[0]["pairs"][:1]}, *texts[1:3]])
    images(out, *options)
    thin = {text["instruction"] for text in texts[:1]}
    assert thin.isdisjoint(pair.instruction for pair in read_pairs(out, "train"))
    write_texts(out, [*texts[::-1][:-1], texts[0] | {"pairs": texts[0]["pairs"][:1]}])
    painted.write_text("")
    images(out, *options)
    assert painted.read_text().count("\n") == 6
    write_texts(out, texts)  # another pair of captions for the thin one
    images(out, *options)
    assert Counter(pair.instruction for pair in read_pairs(out, "train")) == {
        text["instruction"]: 2 for text in texts
    }
    assert "no longer in texts.jsonl" not in capsys.readouterr().out
    write_texts(out, texts[1:])  # what was drawn of the first stays, and is named
    images(out, *options)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "no longer in texts.jsonl" in line)
    assert (Path(line.split(": its")[0]) / "report.json").exists()


def test_pictures_that_are_no_numbers_are_not_kept(painted, tmp_path, monkeypatch):
    names = ("clip_before", "clip_after", "clip_image", "clip_direction")
    nan = {name: torch.full((6,), float("nan")) for name in names}
    monkeypatch.setattr(drawing, "clip_scores", lambda *_: nan)
    write_texts(tmp_path / "out", records(2))
    images(tmp_path / "out")
    assert not list((tmp_path / "out" / "train").rglob("*.png"))


@pytest.mark.parametrize("batch", ["1", "6"])
def test_of_samples_that_are_not_finite_the_others_stay_and_all_are_an_error(
    painted, tmp_path, monkeypatch, capsys, refused, batch
):
    draw_pairs, first, spoil_all = drawing.draw_pairs, {}, False
    names = ("clip_before", "clip_after", "clip_image", "clip_direction")
    monkeypatch.setattr(
        drawing, "clip_scores", lambda c, t, pictures, _: dict.fromkeys(names, torch.ones(len(pictures)))
    )

    def spoilt(sd, captions, seeds, *rest):
        pictures = draw_pairs(sd, captions, seeds, *rest).clone()
        spoiled = first.setdefault(str(captions), seeds[0])
        pictures[[spoil_all or seed == spoiled for seed in seeds], :, 0] = float("nan")
        return pictures

    monkeypatch.setattr(drawing, "draw_pairs", spoilt)
    write_texts(tmp_path / "out", records(1))
    images(tmp_path / "out", "--batch", batch)
    assert "3 not finite" in capsys.readouterr().out  # of three pairs of captions the first sample
    pairs = read_pairs(tmp_path / "out", "train")
    assert len(pairs) == 3 and not {pair.extra["seed"] for pair in pairs} & set(first.values())
    spoil_all = True
    write_texts(tmp_path / "all", records(1))
    assert "NaN or infinite" in refused(images, tmp_path / "all", "--batch", batch)
    assert not list((tmp_path / "all" / "train").rglob("*.png"))


def test_a_pair_that_a_line_repeats_is_drawn_once(painted, tmp_path):
    write_texts(tmp_path / "out", [{"instruction": "x", "pairs": [["a circle", "a red circle"]] * 2}])
    images(tmp_path / "out")
    assert len(painted.read_text().splitlines()) == 1


def test_captions_that_the_text_encoder_would_cut_are_not_drawn(painted, tmp_path):
    long = " ".join(["circle"] * 70)
    write_texts(
        tmp_path / "out",
        [{"instruction": "x", "pairs": [[long, f"{long} {kind}"] for kind in ("red", "blue")]}],
    )
    images(tmp_path / "out")
    assert not painted.exists() and not list((tmp_path / "out").rglob("*.png"))
    (report,) = (tmp_path / "out" / "train").glob("*/report.json")
    assert json.loads(report.read_text())["counts"]["long"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "--samples must be at least 1, not 0"),
        (["--min-image", "nan"], "--min-image must be a finite number"),
        (["--out", "nowhere"], "nowhere/texts.jsonl"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, refused, options, message):
    write_texts(tmp_path, records(1))
    line = refused(drawing.main, ["--out", str(tmp_path), *options])
    assert line.startswith("data_making.pictures: error: ") and message in line


def test_the_four_scores_are_cosines_of_clip(tmp_path):
    clip, tokenizer = (
        load(backbone.preset("toy").clip) for load in (backbone.load_clip, backbone.load_clip_tokenizer)
    )
    scene = world.random_scene(random.Random(1))
    from pictures import image_to_tensor

    pictures = torch.stack([image_to_tensor(world.render(scene))] * 2)[None]
    scores = drawing.clip_scores(clip, tokenizer, pictures, [scene.caption(), "a red circle"])
    assert scores["clip_image"].item() == pytest.approx(1, abs=1e-5)
    assert scores["clip_direction"].item() == pytest.approx(0, abs=1e-3)
    assert scores["clip_before"].item() > scores["clip_after"].item() + 0.2


# --- Check --------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """A module's main, in this process and in tmp_path → its exit status, and what it printed."""

    def run(module, *command):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["program", *map(str, command)])
        capsys.readouterr()
        try:
            code = module.main()
        except SystemExit as end:
            code = end.code
        return code or 0, capsys.readouterr().out

    return run


def test_check_finds_what_is_broken_double_unchanged_and_thin(painted, tmp_path, program):
    out = tmp_path / "out"
    write_texts(out, records(3, pairs=4))
    images(out, "--min-image", "0", "--min-caption", "0", "--min-direction", "0")
    picture = sorted(out.rglob("*.png"))[0]
    assert program(check, out, "--sheet", picture)[0] == 2
    code, printed = program(check, out, "--sheet", tmp_path / "sheet.png")
    assert (
        code == 0
        and "pairs                        12" in printed
        and "instructions                  3" in printed
    )
    assert "good pairs of each            4 to 4, median 4" in printed and "clip_direction" in printed
    assert load_image(tmp_path / "sheet.png").width > 4 * 96
    pairs = read_pairs(out, "train")
    groups = {}
    for pair in pairs:
        groups.setdefault(pair.instruction, []).append(pair)
    one, two, three = groups.values()
    for pair in one[1:]:
        Path(pair.input).write_bytes(b"no picture")
    Path(two[0].output).write_bytes(Path(two[0].input).read_bytes())
    for a, b in zip((three[0].input, three[0].output), (three[1].input, three[1].output)):
        Path(b).write_bytes(Path(a).read_bytes())
    code, printed = program(check, out)
    assert code == 1
    assert "broken files: 3" in printed and f"{one[1].input}: not a picture" in printed
    assert "pairs without a change: 1" in printed and "duplicate pairs: 1" in printed
    assert f"instructions with fewer than 2 good pairs: 1\n    {one[0].instruction}" in printed
    assert program(check, out, "--sheet", "sheet") == (2, "")  # before the work


def test_two_wordings_of_one_edit_are_no_duplicates(tmp_path, program):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = ["input_file_name,output_file_name,instruction"]
    for k in range(2):
        for name in ("in", "out"):
            colour = (100 * k, 50, 50 if name == "in" else 150)
            Image.new("RGB", (8, 8), colour).save(folder / f"{k}_{name}.png")
        rows += [f"{k}_in.png,{k}_out.png,{words}" for words in ("make it blue", "more blue please")]
    (folder / "metadata.csv").write_text("\n".join(rows))
    code, printed = program(check, folder)
    assert code == 0 and "duplicate pairs: 0" in printed and "good pairs of each            2 to 2" in printed


def test_check_names_pairs_of_two_frames_and_reads_columns_of_any_name(tmp_path, program):
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    rows, exif = ["source,target,wish"], Image.Exif()
    exif[0x0112] = 6
    for k in range(5):
        for name in ("in", "out"):
            pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}_{name}.png")
        rows.append(f"{k}_in.png,{k}_out.png,make it night")
    Image.open(folder / "1_out.png").resize((24, 12)).save(folder / "1_out.png")
    Image.open(folder / "2_out.png").save(folder / "2_out.png", exif=exif)
    Image.open(folder / "3_out.png").resize((8, 6)).save(folder / "3_out.png")  # of one frame
    (folder / "metadata.csv").write_text("\n".join(rows))
    code, printed = program(check, folder, "--columns", "source", "target", "wish")
    assert code == 1 and "pairs of different frames: 2\n" in printed
    assert f"{folder / '1_out.png'}: 24 × 12 pixels, where the picture before has 16 × 12" in printed
    assert f"{folder / '2_out.png'}: 12 × 16 pixels, where the picture before has 16 × 12" in printed
    assert "good pairs of each            3 to 3" in printed
    assert program(check, folder)[0] == 2


# --- All of it, in small ------------------------------------------------------------------------------------


def test_from_captions_to_a_dataset_on_the_toy_parts(tmp_path, program):
    code, captions = program(world_command, "--captions", 6)
    assert code == 0
    (tmp_path / "captions.txt").write_text(captions)
    code, printed = program(writing, "--seeds", "captions.txt", "--out", "made")
    assert code == 0
    texts = writing.read_texts(tmp_path / "made" / "texts.jsonl")
    assert f"6 captions: {len(texts)} instructions with {5 * len(texts)} pairs" in printed and len(texts) >= 3
    seeds = (tmp_path / "captions.txt").read_text().splitlines()
    assert all(text["pairs"][0][0] in seeds for text in texts)
    few = ("--samples", 2, "--steps", 2, "--min-image", 0.3, "--min-caption", -1, "--min-direction", -1)
    assert program(drawing, "--out", "made", *few)[0] == 0
    pairs = read_pairs(tmp_path / "made", "train")
    assert len(VisualPromptDataset(pairs, 64)) == len(pairs) >= 2 * 3
    code, printed = program(check, "made")
    assert code in (0, 1)  # two steps may draw a pair of equals
    assert f"pairs                  {len(pairs):8}" in printed and "broken files: 0" in printed
