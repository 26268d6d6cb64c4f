"""What README's commands draw with the shipped weights: the toy world's renderer knows what is right."""

import contextlib
import copy
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

import backbone
import train
from apps import page as app
from apps.pipeline import InstructGIEPipeline
from docs import check
from evaluation import evaluate
from pictures import load_image
from toy import doctor, score, stages, world

HERE = check.HERE
README = (HERE / "README.md").read_text(encoding="utf-8")
QUERIES = 32
DEMO = {name: HERE / "examples" / f"{name}.png" for name in ("before", "after", "input")}


def readme(start, *more):
    """The words of the first command of README's that starts so; of `more`, which win, behind them."""
    line = next(line for line in check.commands(HERE / "README.md") if line.startswith(start))
    return [*shlex.split(line, comments=True), *map(str, more)]


def in_process(monkeypatch, program, command):
    """Runs a command's program here, in the repository's folder."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", command[1:])
    program.main()


def assert_right(answer, truth):
    right, numbers = doctor.judge(answer, truth)
    assert right, numbers


def answer_of(grid):
    """The answer in a labelled grid: the lower right square, 192 pixels for its 64."""
    return np.asarray(grid)[232:424:3, 192:384:3]


@pytest.fixture(scope="module")
def truth():
    return score.Truth(doctor.SCENE, doctor.EDIT)


def test_the_examples_are_of_the_scenes_by_which_answers_are_judged():
    scenes = {"before": doctor.EXAMPLE, "after": doctor.EDIT.apply(doctor.EXAMPLE), "input": doctor.SCENE}
    for name, scene in scenes.items():
        assert world.render(scene).tobytes() == load_image(DEMO[name]).tobytes()


# --- The demo's edit ----------------------------------------------------------------------------------------


def test_make_demo_is_the_command_that_readme_shows():
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (HERE / "Makefile").read_text(), re.MULTILINE)[1]
    assert shlex.split(recipe.replace("$(RUN)", "python").replace("\\\n", "")) == readme("python edit.py")


def test_by_the_command_as_readme_prints_it(truth, tmp_path):
    output = tmp_path / "answer.png"
    command = readme("python edit.py", "--output", output)
    subprocess.run([sys.executable, *command[1:]], cwd=HERE, check=True, capture_output=True)
    assert_right(load_image(output), truth)
    assert_right(answer_of(load_image(tmp_path / "answer_grid.png")), truth)


@pytest.fixture(scope="module")
def python():
    """What README's block of Python has made."""
    names = {}
    torch.manual_seed(0)  # of the noise, which README leaves to chance
    with contextlib.chdir(backbone.HERE):
        exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    return SimpleNamespace(**{name: names[name] for name in ("pipe", "edited")})


@pytest.fixture(scope="module")
def pipe(python):
    python.pipe.set_progress_bar_config(disable=True)
    return python.pipe


def test_by_python_as_readme_prints_it(python, truth):
    assert_right(python.edited, truth)


@pytest.fixture(scope="module")
def drawn(pipe):
    return {way: doctor.demo(pipe, way) for way in doctor.WAYS}


@pytest.mark.parametrize("way", doctor.WAYS)
def test_by_the_pipeline(drawn, truth, way):
    assert_right(drawn[way], truth)


def test_by_the_page(pipe, truth, tmp_path):
    """What a click on Edit calls, with all settings as the page has them."""
    page = app.build(app.Editor(pipe, "toy", tmp_path), [])
    click = next(function for function in page.fns.values() if function.api_name == "edit")
    wish = {place.label: place.value for place in click.inputs}
    wish |= {"Input": str(DEMO["input"]), "Instruction": doctor.WAYS["both"][0]}
    wish |= {"Example before": str(DEMO["before"]), "Example after": str(DEMO["after"])}
    *_, (_, steps, answer, grid, _) = click.fn(*wish.values())
    assert_right(load_image(answer), truth)
    assert_right(answer_of(load_image(grid)), truth)
    assert len(steps) == 10 and truth.score(np.asarray(load_image(steps[-1][0])))["right"]


# --- Accuracy, and training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The first instructions of the toy world's own splits, with all their pairs of `seen`."""
    out = tmp_path_factory.mktemp("data") / "toy"
    world.write_dataset(out, sizes={"seen": (QUERIES, 2), "unseen_task": (QUERIES, 2), "train": (4, 2)})
    return out


def evaluated(monkeypatch, toy, output, *more):
    """Scenes, edits and answers of README's `evaluate.py`."""
    command = readme("python -m evaluation.evaluate", "--data", toy, "--output", output, *more)
    in_process(monkeypatch, SimpleNamespace(main=lambda: evaluate.main(command[3:])), command)
    (folder,) = (path.parent for path in output.rglob("answers.jsonl"))
    records = score.read_queries(folder)
    truths = [(record["scene"], record["edit"]) for record in records]
    return truths, [np.asarray(load_image(folder / record["answer"])) for record in records]


@pytest.fixture(scope="module")
def both(toy, tmp_path_factory):
    """Truths and answers of the first queries, told and shown."""
    with pytest.MonkeyPatch.context() as patch:
        output = tmp_path_factory.mktemp("answers")
        asked, answers = evaluated(patch, toy, output, "--count", QUERIES)
    return [score.Truth(*query) for query in asked], answers


def rights(answers, truths):
    return [truth.score(answer)["right"] for truth, answer in zip(truths, answers)]


def is_as_claimed(right, mode, split="seen"):
    """Whether so many right answers are not too few for the accuracy that docs/toy.md claims.

    right: a bool for each query. Such a number or a smaller one must not be rarer than one in a thousand.
    """
    page = (HERE / "docs" / "toy.md").read_text(encoding="utf-8")
    claimed = float(re.search(rf"^\| {split} \| {mode} \| \d+ \| ([\d.]+) ", page, re.MULTILINE)[1]) / 100
    return binomtest(sum(right), len(right), claimed, alternative="less").pvalue > 1e-3


def test_the_accuracy_is_the_one_that_is_claimed(both):
    truths, answers = both
    assert len(answers) == QUERIES and is_as_claimed(rights(answers, truths), "both")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pair", "instruction"])
def test_the_accuracy_of_other_modes(monkeypatch, both, toy, tmp_path, mode):
    _, answers = evaluated(monkeypatch, toy, tmp_path, "--count", QUERIES, "--mode", mode)
    assert is_as_claimed(rights(answers, both[0]), mode)


@pytest.mark.slow
def test_the_accuracy_of_mixtures_that_were_never_trained(monkeypatch, toy, tmp_path):
    few = "--split", "unseen_task", "--mode", "pair", "--count", QUERIES
    asked, answers = evaluated(monkeypatch, toy, tmp_path, *few)
    assert is_as_claimed(rights(answers, [score.Truth(*query) for query in asked]), "pair", "unseen_task")


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """The shipped editor after two steps of README's `train.py`."""
    folder = tmp_path_factory.mktemp("train")
    options = ["--init", HERE / "toy" / "weights" / "editor", "--steps", 2, "--batch", 4, "--workers", 0]
    options += ["--data", toy, "--cache", folder / "cache"]
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, train, readme("python train.py", *options, "--output", folder))
    return folder / "editor"


def test_two_steps_of_training_leave_the_editor_as_right_as_it_was(
    pipe, trained, both, truth, toy, tmp_path, monkeypatch
):
    learnt = InstructGIEPipeline.from_pretrained(trained)
    learnt.set_progress_bar_config(disable=True)
    weights = zip(pipe.rcldm.parameters(), learnt.rcldm.parameters())
    assert any(not torch.equal(before, after) for before, after in weights)
    for way in doctor.WAYS:
        assert_right(doctor.demo(learnt, way), truth)
    command = monkeypatch, toy, tmp_path, "--count", 8
    monkeypatch.setattr(InstructGIEPipeline, "from_pretrained", lambda _: learnt)
    _, answers = evaluated(*command)
    truths, before = (some[:8] for some in both)
    # Two steps move an answer that lay between two candidates, but no more than one of the eight.
    assert sum(rights(answers, truths)) >= sum(rights(before, truths)) - 1


# --- The judges bite ----------------------------------------------------------------------------------------


def flat(picture):
    return np.broadcast_to(picture.mean((0, 1)).round().astype(np.uint8), picture.shape)


def without_residuals(pipe):
    """What the frozen Stable Diffusion draws by itself: the condition reaches the answer by no other way."""
    with pipe.rcldm.register_forward_hook(stages.zero_after(0)):
        return np.asarray(doctor.demo(pipe, "both"))


WRONG = {
    "black": lambda pipe, truth: np.zeros_like(truth.picture),
    "the input": lambda pipe, truth: truth.pictures[0],
    "no residuals": lambda pipe, truth: without_residuals(pipe),
    "the mean of the truth": lambda pipe, truth: flat(truth.picture),
    "the mean of all edits": lambda pipe, truth: truth.pictures.mean(0).round().astype(np.uint8),
    "another query's answer": lambda pipe, truth: np.asarray(load_image(DEMO["after"])),
    "a shade off": lambda pipe, truth: truth.picture - np.uint8(31) * truth.edited[..., None],
    "half of it": lambda pipe, truth: np.where(np.arange(64)[:, None, None] < 24, 0, truth.picture),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_of_the_demo_is_found(pipe, truth, wrong):
    assert_right(truth.picture, truth)
    answer = WRONG[wrong](pipe, truth)
    assert answer.shape == truth.picture.shape
    with pytest.raises(AssertionError, match="nearest of"):
        assert_right(answer.astype(np.uint8), truth)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda truths, answers: [np.zeros_like(answer) for answer in answers],
        lambda truths, answers: [truth.pictures[0] for truth in truths],
        lambda truths, answers: [flat(answer) for answer in answers],
        lambda truths, answers: [np.mean(answers, axis=0).round().astype(np.uint8)] * len(answers),
        lambda truths, answers: [*answers[1:], answers[0]],
        lambda truths, answers: [*answers[6:], *map(flat, answers[:6])],
    ],
    ids=["black", "the input", "its mean", "the mean of all", "another query's", "six are means"],
)
def test_wrong_answers_lower_the_accuracy_by_more_than_chance(both, wrong):
    truths, answers = both
    assert not is_as_claimed(rights(wrong(truths, answers), truths), "both")


def test_an_editor_that_training_has_spoilt_is_found(pipe, truth):
    spoilt = InstructGIEPipeline(**{**pipe.components, "rcldm": copy.deepcopy(pipe.rcldm)}, panel=pipe.panel)
    spoilt.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in spoilt.rcldm.prompt_encoder.parameters():
            parameter += 0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=g)
    assert not doctor.judge(doctor.demo(spoilt, "example"), truth)[0]


# --- The command that a bug report wants ------------------------------------------------------------------


@pytest.fixture
def diagnose(monkeypatch, capsys):
    """Runs toy.doctor with a pipeline → its exit code, and what it printed."""

    def run(pipe):
        monkeypatch.setattr(InstructGIEPipeline, "from_pretrained", lambda _: pipe)
        try:
            doctor.main(["--device", "cpu"])
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, capsys.readouterr().out

    return run


def test_a_machine_that_edits_right(pipe, drawn, diagnose, monkeypatch):
    monkeypatch.setattr(doctor, "demo", lambda pipe, way: drawn[way])
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    code, out = diagnose(pipe)
    assert code == 0 and out.endswith("\nverdict: right\n")
    assert f"PyTorch version: {torch.__version__}\n" in out
    assert f"CPU capability usage: {torch.backends.cpu.get_cpu_capability()}\n" in out
    assert (
        "KMP_BLOCKTIME=0" in out
        and f" diffusers=={diffusers.__version__} " in out
        and "\ndevice: cpu\n" in out
    )
    assert "\nscan: numba, because" in out or "\nscan: chunked, because" in out
    assert out.count("right; nearest of 161 pictures") == 3


def test_a_machine_that_draws_black(pipe, diagnose, monkeypatch):
    black = [Image.new("RGB", (64, 64))]
    monkeypatch.setattr(InstructGIEPipeline, "__call__", lambda *_, **__: SimpleNamespace(images=black))
    code, out = diagnose(pipe)
    assert code == 1 and out.endswith("\nverdict: WRONG by example, by words, by both\n")
    assert 'WRONG; nearest of 161 pictures: "invert the colours"; levels off: 161.1 inside' in out


def test_a_device_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        doctor.main(["--device", "abacus"])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
