"""evaluate.py with an editor that knows the answers, and toy.score on answers made by hand."""

import json
import re
import shutil
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import VisualPromptDataset
from evaluation import evaluate
from pictures import load_image, to_panel
from pictures.pairs import read_pairs
from toy import failures, score, world


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "toy"
    world.write_dataset(out, seed=2, sizes={"seen": (4, 2)})
    return out


class FakeEditor:
    """Answers with the truth, or with the query; notes what it was asked."""

    panel = 64

    def __init__(self, data, copies: bool = False) -> None:
        self.settings = {
            "stable_diffusion": "sd",
            "steps": 7,
            "guidance_text": 1.5,
            "guidance_visual": 1.0,
        }
        self.copies, self.calls, self.shown, self.stop_after = copies, [], [], None
        pairs = [
            [to_panel(load_image(picture), 64) for picture in (pair.input, pair.output)]
            for pair in read_pairs(data, "seen")
        ]
        self.answers = {before.numpy().tobytes(): after for before, after in pairs}

    def unify(self, texts):
        return [f"unified {text}" for text in texts]

    def answer(self, examples, has_example, queries, instructions, seeds, **sampling):
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        assert examples.shape == (len(queries), 2, 3, 64, 64)
        self.calls.append((has_example, instructions, seeds, sampling))
        self.shown += list(examples)
        if self.copies:
            return queries
        return torch.stack([self.answers[query.numpy().tobytes()] for query in queries])


@pytest.fixture
def editor(data, monkeypatch):
    fake = FakeEditor(data)
    monkeypatch.setitem(
        evaluate.METHODS, "instructgie", evaluate.METHODS["instructgie"]._replace(load=lambda *_, **__: fake)
    )
    return fake


def run(data, output, *more: str) -> None:
    evaluate.main(["model", "--data", str(data), "--output", str(output), "--batch", "3", *more])


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


# --- evaluate.py --------------------------------------------------------------------------------------------


def test_every_query_is_answered_once_with_what_it_answers(data, tmp_path, editor):
    run(data, tmp_path)
    records = lines(tmp_path / "seen" / "both")
    pairs = {pair.input: pair for pair in read_pairs(data, "seen")}
    assert sorted(record["input"] for record in records) == sorted(pairs)
    assert [record["answer"] for record in records] == [f"{k:05d}.png" for k in range(8)]
    for k, record in enumerate(records):
        pair = pairs[record["input"]]
        assert record["output"] == pair.output and record["instruction"] == pair.instruction
        assert record["example_input"] != record["input"]
        assert pairs[record["example_input"]].instruction == pair.instruction
        assert pairs[record["example_input"]].output == record["example_output"]
        assert record["unified"] == f"unified {pair.instruction}"
        assert (record["mode"], record["seed"]) == ("both", k)
        assert {key: record[key] for key in pair.extra} == pair.extra
        answer = load_image(tmp_path / "seen" / "both" / record["answer"])
        assert answer.tobytes() == load_image(pair.output).tobytes()  # lossless
    assert [len(call[0]) for call in editor.calls] == [3, 3, 2]
    assert editor.calls[0][3] == {k: v for k, v in editor.settings.items() if k != "stable_diffusion"}


def test_each_mode_withholds_what_it_says(data, tmp_path, editor):
    run(data, tmp_path, "--mode", "pair", "instruction", "--count", "2", "--guidance-text", "3")
    pair, instruction = editor.calls
    assert (pair[0], pair[1]) == ([True, True], ["", ""])
    assert instruction[0] == [False, False] and all(text.startswith("unified") for text in instruction[1])
    assert pair[3] == {"steps": 7, "guidance_text": 3.0, "guidance_visual": 1.0}
    assert [record["mode"] for record in lines(tmp_path / "seen" / "pair")] == ["pair"] * 2
    assert {record["unified"] for record in lines(tmp_path / "seen" / "pair")} == {""}


def test_another_text_of_the_metadata_may_be_told(data, tmp_path, editor):
    run(data, tmp_path, "--told", "paraphrase", "--count", "2")
    (call,) = editor.calls
    records = lines(tmp_path / "seen" / "both")
    assert call[1] == [f"unified {record['paraphrase']}" for record in records]
    assert all(record["paraphrase"] != record["instruction"] for record in records)
    run(data, tmp_path, "--columns", "input_file_name", "output_file_name", "canonical", "--count", "2")
    canonical = {pair.input: pair.extra["canonical"] for pair in read_pairs(data, "seen")}
    records = lines(tmp_path / "seen" / "both")
    assert editor.calls[1][1] == [f"unified {canonical[record['input']]}" for record in records]


def test_another_pair_is_of_other_words_and_scored_by_its_own_edit(data, tmp_path, editor):
    run(data, tmp_path, "--mode", "other-pair", "--sheet", "1")
    pairs = {pair.input: pair for pair in read_pairs(data, "seen")}
    folder = tmp_path / "seen" / "other-pair"
    records = lines(folder)
    assert len(records) == 8 and all(
        call[:2] == ([True] * len(call[0]), [""] * len(call[0])) for call in editor.calls
    )
    possible = 0
    for record, shown in zip(records, editor.shown):
        example = pairs[record["example_input"]]
        for panel, picture in zip(shown, (example.input, example.output)):
            assert torch.equal(panel, to_panel(load_image(picture), 64))
        assert example.instruction != record["instruction"] and record["example"] == example.extra
        scene = world.scene_from_json(json.loads(record["scene"]))
        edited = world.Edit(**json.loads(example.extra["edit"])).apply(scene)
        if edited is not None:
            world.render(edited).save(folder / record["answer"])
            possible += 1
    result = score.score(folder)
    assert possible > 0 and (result["n"], result["accuracy"]) == (possible, 1)
    with Image.open(folder / "sheet.png") as sheet:
        truth = np.asarray(sheet)[32 : 32 + 96, 12 + 4 * 96 : 12 + 5 * 96]
    assert (truth == 128).all()


def test_queries_of_a_word(data, tmp_path, editor, capsys):
    dataset = VisualPromptDataset(read_pairs(data, "seen"), size=64)
    whole = evaluate.draw_queries(dataset, 8, 0)
    words = [set(re.findall(r"\w+", pair.output_caption)) for pair in dataset.pairs]
    shared = {word for said in words for word in said if not all(word in other for other in words)}
    assert shared
    for word in shared:
        queries = evaluate.draw_queries(dataset, 8, 0, word=word)
        having = [query.index for query in whole if word in words[query.index]]
        assert [query.index for query in queries] == having
    with pytest.raises(SystemExit):
        run(data, tmp_path, "--caption", "aardvark")
    assert "--caption aardvark" in capsys.readouterr().err


def test_queries_are_the_seeds(data):
    dataset = VisualPromptDataset(read_pairs(data, "seen"), size=64)
    assert evaluate.draw_queries(dataset, 8, 0)[:3] == evaluate.draw_queries(dataset, 3, 0)
    assert evaluate.draw_queries(dataset, 8, 0) != evaluate.draw_queries(dataset, 8, 1)
    assert [query.index for query in evaluate.draw_queries(dataset, 8, 0)] != list(range(8))


def test_a_run_replaces_the_answers_of_another_and_a_stopped_one_leaves_none(data, tmp_path, editor):
    folder = tmp_path / "seen" / "both"
    run(data, tmp_path)
    run(data, tmp_path, "--count", "2", "--steps", "9")
    assert len(lines(folder)) == 2 and json.loads((folder / "settings.json").read_text())["steps"] == 9
    editor.calls.clear()
    editor.stop_after = 2
    with pytest.raises(SystemExit, match="130"):
        run(data, tmp_path)
    assert not (folder / "answers.jsonl").exists()


def test_a_query_that_cannot_be_read_is_left_out_and_a_key_that_is_not_there_loses_nothing(
    data, tmp_path, editor, capsys
):
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / "seen" / "000003_after.png").write_bytes(b"no picture")
    run(copy, tmp_path)
    folder = tmp_path / "seen" / "both"
    assert 5 <= len(lines(folder)) <= 7 and "left out: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(copy, tmp_path, "--told", "paraphrased")
    assert (folder / "answers.jsonl").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--count", "0"],
        ["--batch", "0"],
        ["--split", "none"],
        ["--data", "/nowhere/at/all"],
        ["--strength", "0.5"],
        ["--method", "sdedit", "--mode", "pair"],
        ["--backbone", "sd15", "--method", "sdedit"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(data, tmp_path, editor, capsys, more):
    with pytest.raises(SystemExit) as stopped:
        run(data, tmp_path / "out", *more)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("evaluation.evaluate: error: ")
    assert not (tmp_path / "out").exists()


def test_the_sheet_shows_the_first_queries(data, tmp_path, editor):
    run(data, tmp_path, "--sheet", "3", "--mode", "both", "instruction")
    with Image.open(tmp_path / "seen" / "both" / "sheet.png") as sheet:
        both = np.asarray(sheet)
    assert both.shape == (2 * (96 + 16) + 16 + 12, 2 * (5 * 96 + 12) + 12, 3)
    answer, truth = (both[32 : 32 + 96, 12 + 96 * j : 12 + 96 * (j + 1)] for j in (3, 4))
    assert np.array_equal(answer, truth) and len(np.unique(answer)) > 2
    with Image.open(tmp_path / "seen" / "instruction" / "sheet.png") as sheet:
        example = np.asarray(sheet)[32 : 32 + 96, 12 : 12 + 2 * 96]
    assert (example == 128).all()


# --- toy.score ----------------------------------------------------------------------------------------------


def make_answers(folder, answer, count: int = 4) -> list[world.Pair]:
    """A folder of answers: `answer(before, after)` of arrays (64, 64, 3)."""
    folder.mkdir(parents=True)
    pairs = world.draw_split("seen", count, 2, seed=3)[::2]
    with open(folder / "answers.jsonl", "w") as file:
        for k, pair in enumerate(pairs):
            before, after = (np.asarray(world.render(scene)) for scene in (pair.before, pair.after))
            Image.fromarray(answer(before, after)).save(folder / f"{k}.png")
            texts = {"scene": json.dumps(asdict(pair.before)), "edit": json.dumps(asdict(pair.edit))}
            file.write(json.dumps({"answer": f"{k}.png", "mode": folder.name, **texts}) + "\n")
    return pairs


def noisy(before, after):
    noise = np.random.default_rng(0).normal(0, 4, after.shape)
    return (after + noise).clip(0, 255).round().astype(np.uint8)


def test_truth_scores_1_a_copy_0_and_small_noise_1(tmp_path, capsys):
    answers = {"truth": lambda before, after: after, "copy": lambda before, after: before, "noisy": noisy}
    folders = [tmp_path / "seen" / name for name in answers]
    for folder in folders:
        pairs = make_answers(folder, answers[folder.name])
    out = tmp_path / "new" / "score.json"
    score.main([*map(str, folders), "--json", str(out)])
    truth, copy, noise = json.loads(out.read_text())

    families = {pair.edit.family for pair in pairs}
    assert [result["accuracy"] for result in (truth, copy, noise)] == [1, 0, 1]
    assert truth["mae_inside"] == truth["mae_outside"] == 0
    assert copy["mae_inside"] > 8 and copy["mae_outside"] < 1
    assert 2 < noise["mae_outside"] < 5
    assert truth["chance"] == pytest.approx(
        np.mean([1 / len(score.candidates(pair.before)[0]) for pair in pairs])
    )
    assert set(truth["families"]) == families
    assert all(row["nearest"] == "unedited" for row in copy["answers"])
    assert all(row["nearest"] == row["family"] for row in truth["answers"])
    assert truth["n"] == 4 and len(truth["answers"]) == 4

    whole, by_family = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert len(whole) == 5 and whole[2].startswith("| seen | truth | 4 | 100.0 (51.0 … 100.0) (VAE ")
    assert by_family[0] == "| right, by family | seen, truth | seen, copy | seen, noisy |"
    assert len(by_family) == 2 + len(families)
    family = pairs[0].edit.family
    n = truth["families"][family]["n"]
    assert f"| {family} | {n} of {n} | 0 of {n} | {n} of {n} |" in by_family


def test_answers_agree_where_all_are_nearest_to_one_edit(tmp_path, capsys):
    copy, right, wrong = (lambda *pair: pair[0]), (lambda *pair: pair[1]), (lambda *pair: 255 - pair[0])
    folders = {name: tmp_path / name / "pair" for name in ("right", "again", "copy", "mixed", "wrong")}
    make_answers(folders["right"], right)
    make_answers(folders["again"], noisy)
    make_answers(folders["copy"], copy)
    turns = iter((right, wrong, copy, right))
    make_answers(folders["mixed"], lambda *pair: next(turns)(*pair))

    def share(*names):
        return score.agreement([score.score(folders[name]) for name in names])["accuracy"]

    assert share("right", "again") == 1 and share("copy", "copy") == 0
    assert share("right", "mixed") == 0.5 and share("right", "copy") == 0
    out = tmp_path / "score.json"
    score.main([*(str(folders[name]) for name in ("right", "mixed")), "--agreement", "--json", str(out)])
    assert json.loads(out.read_text())["accuracy"] == json.loads(out.read_text())["right"] == 0.5
    assert capsys.readouterr().out.endswith("of 4 queries, 50.0 % on the right edit\n")
    make_answers(folders["wrong"], wrong)
    alike = score.agreement([score.score(folders["wrong"])] * 2)
    assert alike["accuracy"] > 0 and alike["right"] == 0  # one edit, but not the true one
    make_answers(tmp_path / "few" / "pair", right, count=2)
    folders["few"] = tmp_path / "few" / "pair"
    with pytest.raises(ValueError, match="different queries"):
        share("right", "few")


def test_a_mixture_is_measured_among_its_familys_edits():
    thing = world.Thing("circle", "red", "top left")
    scene = world.Scene("white", (thing, world.Thing("star", "blue", "bottom right")))
    edit = world.Mixture(world.Edit("remove", "circle"), world.Edit("dots", "", "green"))
    truth = score.Truth(scene, edit)
    one = score.Truth(scene, edit.second)
    assert truth.score(truth.picture)["right"] and truth.score(truth.picture)["family"] == "remove + dots"
    assert not truth.score(one.picture)["right"] and truth.score(one.picture)["nearest"] == "dots"
    other = world.Mixture(world.Edit("remove", "star"), edit.second).apply(scene)
    nearest = truth.score(np.asarray(world.render(other)))["nearest_edit"]
    assert nearest == "remove the star and draw green dots over it"
    assert len(one.edits) < len(truth.edits) <= len(one.edits) + 2 * len(world.COLOURS)


def test_the_floor_of_the_errors_is_the_vaes(tmp_path, monkeypatch):
    class Darkening(torch.nn.Module):
        device = torch.device("cpu")

        def encode(self, x):
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=x))

        def decode(self, z):
            return SimpleNamespace(sample=z - 20 / 127.5)

    monkeypatch.setattr(score.backbone, "load_stable_diffusion", lambda _: SimpleNamespace(vae=Darkening()))
    make_answers(tmp_path / "seen" / "pair", lambda before, after: after)
    result = score.score(tmp_path / "seen" / "pair")
    assert result["mae_outside"] == 0 and 10 < result["vae_outside"] <= 20.01
    assert "0.0 (VAE " in score.tables([result])
    assert 0 < result["vae_right"] <= 1
    assert f") (VAE {100 * result['vae_right']:.1f})" in score.tables([result])


def test_scores_of_an_evaluated_copy(data, tmp_path, editor):
    editor.copies = True
    run(data, tmp_path, "--count", "2")
    result = score.score(tmp_path / "seen" / "both")
    assert (result["split"], result["mode"], result["n"], result["accuracy"]) == ("seen", "both", 2, 0)


def test_edits_of_one_and_the_same_picture_are_one_candidate(monkeypatch):
    face = world.Thing("face", "pale", "top left")
    scene = world.Scene("white", (face,))
    edited = scene.put(face, mouth="smile")
    made = [(world.Edit("smile", "face"), edited), (world.Edit("frown", "face"), edited)]
    monkeypatch.setattr(world, "candidates", lambda scene, mixture: made)
    pictures, edits = score.candidates(scene)
    assert edits == [None, made[0][0]] and len(pictures) == 2


def test_face_error_is_that_of_the_face():
    face = world.Thing("face", "pale", "top left")
    scene = world.Scene("white", (face, world.Thing("star", "red", "bottom right")))
    truth = score.Truth(scene, world.Edit("smile", "face"))
    answer = truth.picture.copy()
    answer[32:] = 255 - answer[32:]  # all but the face
    scored = truth.score(answer)
    assert scored["mae_face"] == scored["mae_inside"] == 0 and scored["mae_outside"] > 50
    gone = score.Truth(scene, world.Edit("remove", "face"))
    assert gone.score(gone.picture)["mae_face"] is None


def test_the_page_of_failures_shows_the_first_of_each_family(data, tmp_path, editor):
    editor.copies = True  # all wrong, and nearest to the input
    run(data, tmp_path)
    folder, page = tmp_path / "seen" / "both", tmp_path / "new" / "page.md"
    failures.main([str(folder), "--out", str(page)])
    result = score.score(folder)
    text = page.read_text()
    for family, counts in result["families"].items():
        assert f"| {family} | 0 of {counts['n']} | unedited {counts['n']} |" in text
    rows = failures.first_failures(result)
    expected = {family: min(counts["n"], failures.EACH) for family, counts in result["families"].items()}
    assert [row["family"] for row in rows] == sorted(Counter(expected).elements())
    with Image.open(page.with_suffix(".png")) as sheet:
        panels = np.asarray(sheet)[32 : 32 + 96, 12 : 12 + 6 * 96].reshape(96, 6, 96, 3).swapaxes(0, 1)
    _, _, before, answer, truth, nearest = panels
    assert np.array_equal(before, answer) and np.array_equal(answer, nearest)
    assert not np.array_equal(truth, answer)


def test_the_page_of_failures_without_one_shows_no_picture(data, tmp_path, editor):
    run(data, tmp_path, "--count", "4")
    folder, page = tmp_path / "seen" / "both", tmp_path / "page.md"
    for record in lines(folder):
        shutil.copy(record["output"], folder / record["answer"])
    page.with_suffix(".png").write_bytes(b"of an older page")
    failures.main([str(folder), "--out", str(page)])
    text = page.read_text()
    assert "4 queries, 100.0 % right." in text and text.endswith(" – |\n")
    assert "png" not in text and not page.with_suffix(".png").exists()


def test_wilson_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and 0 of 20.
    for right, n, interval in ((81, 263, (0.2553, 0.3662)), (0, 20, (0, 0.1611))):
        rows = [{"right": k < right} for k in range(n)]
        assert score.accuracy(rows)["interval"] == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize("content", [None, "[]\n", '{"answer": "0.png"}\n', "{\n", "cut"])
def test_what_are_no_toy_answers_is_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        score.main([str(tmp_path), "--json", str(tmp_path / "out.json")])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("toy.score: error: ") and "answers.jsonl" in message
    assert not (tmp_path / "out.json").exists()
