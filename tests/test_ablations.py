"""ablations.py without the hours: which commands it gives, that it goes on, and the page it writes."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import backbone
from evaluation import ablations
from toy import world

PAGE = "Before.\n<!-- measured: by evaluation.ablations -->\nold\n<!-- end of what is measured -->\nAfter.\n"


TRAINERS = "train.py", "evaluation.vit", "evaluation.baselines"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Stands in for the programs: notes each command, and leaves what the program would."""
    calls = []
    page = tmp_path / "results.md"
    page.write_text(PAGE)
    monkeypatch.setattr(ablations, "PAGE", page)
    monkeypatch.setattr(backbone, "data_folder", lambda source: str(tmp_path / "world"))

    def call(*command):
        words = [str(word) for word in command]
        calls.append(words)

        def option(name):
            return Path(words[words.index(name) + 1])

        if words[0] in TRAINERS:
            name = "pipeline" if words[0] == "evaluation.baselines" else "editor"
            (option("--output") / name).mkdir(parents=True)
        elif words[0] == "evaluation.evaluate":
            folder = option("--output") / "seen" / "both"
            folder.mkdir(parents=True)
            (folder / "answers.jsonl").write_text("")
        elif words[0] == "evaluation.receptive_field":
            assert option("--out") == tmp_path / "receptive_field.png"
            return "| encoder | half in |\n| --- | ---: |\n"
        elif words[0] == "evaluation.metrics":
            better = "full" in words[1]
            interval = {"fid_interval": [0.01, 0.02], "directional_similarity_interval": [0.4, 0.6]}
            row = {"n": 9, "fid": 0.0123 if better else 0.5, "directional_similarity": 0.5, **interval}
            row |= {"fid_draws": [1.0, 2.0, 3.0] if better else [1.5, 2.5, 3.5]}
            row |= {"directional_similarity_draws": [0.5, 0.6] if better else [0.6, 0.5]}
            option("--json").write_text(json.dumps({"results": [row]}))
        elif "--agreement" in words:
            assert len(words) == 1 + 5 + 3
            found = {"n": 3, "accuracy": 0.25, "interval": [0.1, 0.5], "right": 0.2}
            option("--json").write_text(json.dumps(found))
        else:
            row = {"n": 9, "accuracy": 0.75, "interval": [0.7, 0.8]}
            row |= {"mae_inside": 3.0, "mae_outside": 1.0, "mae_face": None}
            option("--json").write_text(json.dumps([row]))

    monkeypatch.setattr(ablations, "call", call)

    def run(*options):
        calls.clear()
        places = [word for name in ("runs", "out", "kept") for word in (f"--{name}", str(tmp_path / name))]
        ablations.main([*places, *options])
        return [list(words) for words in calls], page.read_text()

    return run


def trained(calls):
    return [words for words in calls if words[0] in TRAINERS]


def test_every_arm_is_trained_once_a_seed_on_one_budget(programs):
    calls, _ = programs("--steps", "20", "--batch", "4")
    assert [sum(words[0] == program for words in calls) for program in TRAINERS] == [6 * 3, 3, 3 * 3]
    for words in trained(calls):
        given = dict(pairwise(words))
        assert given["--steps"] == ("60" if "3x" in given["--output"] else "20") and given["--batch"] == "4"
    switches = {word for words in trained(calls) for word in words if word.startswith("--no")}
    assert switches == {"--no-rcldm", "--no-esm", "--no-liu", "--no-sam"}
    asked = [words for words in calls if words[0] == "evaluation.evaluate"]
    assert sum("sdedit" in words for words in asked) == 2  # not trained: once on each split
    for words in asked:  # each set as its name says
        given, name = dict(pairwise(words)), Path(words[words.index("--output") + 1]).name
        assert (given.get("--mode") == "pair") == (name == "example")
        assert (given.get("--caption") == "face") == (name == "faces")
        assert given["--split"] == ("unseen_combination" if name == "unseen_combination" else "seen")
    told = [words for words in asked if "paraphrase" in words]
    assert len(told) == 2 * 3 * (1 + 1)  # the full one and that without LIU
    assert {words[words.index("--told") + 1] for words in asked if "--told" in words} == {*world.PARAPHRASES}


def test_it_goes_on_where_it_stood(programs, tmp_path):
    first, page = programs("--only", "full", "no-esm", "--seeds", "0")
    assert len(trained(first)) == 2
    again, same = programs("--only", "full", "no-esm", "--seeds", "0")
    assert again == [] and same == page
    shutil.rmtree(tmp_path / "runs")  # another day, on another machine: the measurements are enough
    more, _ = programs("--only", "full", "--seeds", "0", "1")
    assert len(trained(more)) == 1


def test_the_page_keeps_what_is_written_around_the_tables(programs):
    _, page = programs("--only", "full", "no-rcldm", "instruct-pix2pix", "--seeds", "0", "1")
    assert page.startswith("Before.\n<!-- measured") and page.endswith("what is measured -->\nAfter.\n")
    assert "old" not in page
    line = "| InstructGIE | 2 × 9 | 0.0123 (0.0100 … 0.0200) | 0.500 (0.400 … 0.600) | 75.0 (70.0 … 80.0) |"
    assert line + " 3.0 | 1.0 | – | 7.57 | 0.27 |" in page
    assert "| InstructGIE | 2 × 3 | 25.0 (10.0 … 50.0) | 20.0 |" in page
    assert "| without RCLDM | 2 × 9 | 0.5000" in page and "| without SAM" not in page
    assert "\nNot measured yet: without LIU.\n" in page and "; without SAM.\n" in page
    # Paired: a spread that both share says nothing of their difference.
    line = (
        "| without RCLDM | `example` | +0.4877 ± 0.0000 (2 of 2) | +0.000 ± 0.277 (2 of 2) | +2.58 | -0.14 |"
        " agrees | no difference |"
    )
    assert line in page and "| InstructPix2Pix | `unseen_combination` | +0.4877 ± 0.0000 (2 of 2) |" in page
    assert "### Receptive fields of the encoders\n\nNot measured yet.\n" in page


def test_a_run_by_another_command_is_not_taken_for_the_arms(programs, tmp_path, monkeypatch, capsys):
    programs("--only", "no-sam", "--seeds", "0")
    shutil.rmtree(tmp_path / "kept")
    arm = ablations.ARMS["no-sam"]
    monkeypatch.setitem(ablations.ARMS, "no-sam", arm._replace(trainer=(*arm.trainer, "--no-esm")))
    with pytest.raises(SystemExit):
        programs("--only", "no-sam", "--seeds", "0")
    assert "no-sam-0 was trained by 'train.py --no-sam'" in capsys.readouterr().err


def test_the_figure_is_drawn_when_its_three_encoders_are_trained(programs):
    calls, page = programs("--only", "full", "no-rcldm", "vit", "--seeds", "4")
    folders = [Path(word).parent.name for word in calls[-1] if word.endswith("editor")]
    assert folders == ["no-rcldm-4", "vit-4", "full-4"]
    assert "| encoder | half in |\n| --- | ---: |\n\n![" in page


def test_an_editor_of_a_run_that_goes_on_is_in_no_figure(programs, tmp_path):
    programs("--only", "full", "no-rcldm", "vit", "--seeds", "4")
    (tmp_path / "runs" / "vit-4" / "done").unlink()
    calls, _ = programs("--table", "--seeds", "4")
    assert calls == []


def test_runs_of_another_budget_are_not_mixed(programs, capsys):
    programs("--only", "full", "--seeds", "0", "--steps", "20")
    with pytest.raises(SystemExit) as stopped:
        programs("--only", "full", "--seeds", "0", "--steps", "30")
    assert stopped.value.code == 2 and "runs is of steps 20, not 30" in capsys.readouterr().err


def test_the_shipped_editor_is_measured_again_when_it_is_another(programs, tmp_path, monkeypatch):
    assert programs("--only", "shipped")[0] and not programs("--only", "shipped")[0]
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(ablations, "TOY", replace(ablations.TOY, editor=ablations.TOY.llm))
    assert programs("--only", "shipped")[0] and not programs("--only", "shipped")[0]


def test_nor_are_those_of_other_weights_in_the_loss(programs, monkeypatch, capsys):
    programs("--only", "full", "--seeds", "0")
    monkeypatch.setattr(ablations, "ES_EVERY", 8)
    with pytest.raises(SystemExit):
        programs("--only", "full", "--seeds", "0")
    assert "runs is of es_every 32, not 8" in capsys.readouterr().err


def test_an_arm_that_samples_otherwise_is_measured_again_and_not_trained(programs, tmp_path, monkeypatch):
    name = "instruct-pix2pix"
    programs("--only", name, "--seeds", "0")
    shutil.rmtree(tmp_path / "out")
    other = ablations.ARMS[name]._replace(sampling=("--guidance-text", "2"))
    monkeypatch.setitem(ablations.ARMS, name, other)
    calls, _ = programs("--only", name, "--seeds", "0")
    assert calls and not trained(calls) and "--guidance-text" in calls[0]


def test_an_arm_that_is_not_trained_counts_once(programs):
    _, page = programs("--only", "sdedit", "--seeds", "1")
    assert "| SDEdit | 1 × 9 |" in page
    calls, page = programs("--only", "sdedit", "--seeds", "0", "1", "2")
    assert not calls and "| SDEdit | 1 × 9 |" in page


def test_a_page_without_marks_is_left_alone(programs, tmp_path, capsys):
    (tmp_path / "results.md").write_text("Mine.\n")
    with pytest.raises(SystemExit) as stopped:
        programs("--table")
    assert stopped.value.code == 2 and "two marks" in capsys.readouterr().err
    assert (tmp_path / "results.md").read_text() == "Mine.\n"


def test_a_program_that_fails_stops_it(tmp_path):
    with pytest.raises(ValueError, match=r"toy\.world failed"):
        ablations.call("toy.world", "--out", tmp_path)  # which exists already


@pytest.mark.parametrize(
    ("spread", "paper", "sign"),
    [(0.1, 2.5, "agrees"), (0.1, -2.5, "disagrees"), (4.0, 2.5, "no difference"), (0.1, None, "–")],
)
def test_the_sign_beside_the_papers(spread, paper, sign):
    full = {seed: {"fid": 1.0, "fid_draws": [1.0, 1.0, 1.0]} for seed in range(2)}
    rows = {seed: {"fid": 2.0, "fid_draws": [2.0 - spread, 2.0, 2.0 + spread]} for seed in range(2)}
    assert ablations.difference(rows, full, "fid", 1, paper)[1] == sign
    del rows[1]
    assert ablations.difference(rows, full, "fid", 1, paper)[1] == ("one seed" if paper else "–")


def test_seeds_that_disagree_make_no_difference():
    apart = {0: 3.0, 1: 3.0, 2: -4.5}
    full = {seed: {"fid": 5.0, "fid_draws": [5.0] * 500} for seed in apart}
    rows = {seed: {"fid": 5 + x, "fid_draws": [5 + x] * 500} for seed, x in apart.items()}
    text, sign = ablations.difference(rows, full, "fid", 1, 2.5)
    assert sign == "no difference" and text.startswith("+0.5 ± ") and text.endswith("(2 of 3)")
    one = {1: rows[1]}
    assert ablations.difference(one, full, "fid", 1, 2.5)[0].endswith("(1 of 1)")
    assert ablations.difference(one, full, "fid", 1, 2.5, untrained=True)[0].endswith("(3 of 3)")
