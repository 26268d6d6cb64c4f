"""Metrics: each formula against another's, and the metrics of answers whose worth is known beforehand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from test_evaluate import FakeEditor

import backbone
from evaluation import evaluate, metrics
from pictures import load_image
from pictures.pairs import read_pairs
from toy import world

COUNT = 104  # enough for 64 features and their bootstrap


def cloud(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) @ torch.rand(
        dim, dim, generator=torch.Generator().manual_seed(seed + 1)
    )


def textbook(one, other):
    """The formula as it is printed, with scipy's matrix root."""
    one, other = one.double().numpy(), other.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(one.T) @ np.cov(other.T)).real
    apart = np.square(one.mean(0) - other.mean(0)).sum()
    return apart + np.trace(np.cov(one.T)) + np.trace(np.cov(other.T)) - 2 * np.trace(root)


@pytest.mark.parametrize("counts", [(200, 150), (200, 30)])
def test_the_distance_is_that_of_the_textbook(counts):
    one, other = (cloud(count, 12, seed) + seed for count, seed in zip(counts, (0, 5)))
    assert metrics.frechet_distance(one, other) == pytest.approx(textbook(one, other), rel=1e-6)
    few, others = cloud(8, 12), cloud(9, 12, 3)  # fewer pictures than features
    assert metrics.frechet_distance(few, others) == pytest.approx(textbook(few, others), rel=1e-3)


def test_the_distance_is_that_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    features = torch.nn.Identity()
    features.num_features = 12
    theirs = fid.FrechetInceptionDistance(feature=features)
    one, other = cloud(200, 12), cloud(150, 12, 5)
    theirs.update(one, real=True)
    theirs.update(other, real=False)
    assert metrics.frechet_distance(one, other) == pytest.approx(theirs.compute().item(), rel=1e-3)


def test_directional_similarity_is_the_cosine_of_two_changes():
    before, after, said_before, said_after = cloud(20, 8).chunk(4)
    ours = metrics.directional_similarity(before, after, said_before, said_after)
    for k in range(5):
        a, b = (after - before)[k].double().numpy(), (said_after - said_before)[k].double().numpy()
        assert ours[k].item() == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-5)
    assert not metrics.directional_similarity(before, before, said_before, said_after).any()


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    values = cloud(400, 1)[:, 0].double()
    draws = metrics.bootstrap(lambda i: values[i].mean().item(), range(len(values)), draws=4000)
    middle, half = values.mean().item(), 1.96 * values.std().item() / 20
    assert metrics.interval(middle, draws) == pytest.approx((middle - half, middle + half), abs=0.15 * half)


def test_of_queries_that_share_an_instruction_one_tells_as_much_as_all():
    values = cloud(100, 1)[:, 0].double()
    single, fourfold = (
        metrics.bootstrap(lambda i, v=v: v[i].mean().item(), [*map(float, v)], draws=50)
        for v in (values, values.repeat(4))
    )
    torch.testing.assert_close(single, fourfold)


def test_two_bootstraps_of_as_many_queries_are_of_the_same_draws():
    one = cloud(50, 1)[:, 0].double()
    draws = [
        metrics.bootstrap(lambda i, v=v: v[i].mean().item(), range(50), draws=20) for v in (one, one + 3)
    ]
    torch.testing.assert_close(draws[1] - draws[0], torch.full((20,), 3.0, dtype=torch.float64))


@pytest.fixture
def answers(tmp_path):
    """Writes a folder of answers: to grey pictures whose truth is of many colours."""

    def write(name, answer, count=COUNT, **changes):
        folder = tmp_path / "seen" / name
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        lines = []
        for k in range(count):
            grey = Image.new("RGB", (64, 64), "grey")
            truth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64), 0)
            grey.save(tmp_path / f"{k}-in.png")
            truth.save(tmp_path / f"{k}-out.png")
            (truth if answer == "truth" else grey).save(folder / f"{k}.png")
            line = {"answer": f"{k}.png", "input_caption": "a grey picture", "output_caption": "a red star"}
            line |= {"input": str(tmp_path / f"{k}-in.png"), "output": str(tmp_path / f"{k}-out.png")}
            line["instruction"] = f"instruction {k}"
            lines.append(json.dumps({k: v for k, v in (line | changes).items() if v is not None}))
        (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
        return str(folder)

    return write


def test_perfect_answers_and_copies_of_the_input(answers, tmp_path, capsys):
    out = tmp_path / "out" / "metrics.json"
    metrics.main([answers("right", "truth"), answers("copies", "input"), "--json", str(out)])
    right, copies = json.loads(out.read_text())["results"]
    assert right["fid"] == pytest.approx(0, abs=1e-6) and copies["fid"] > 0.1
    assert right["directional_similarity"] == right["true_directional_similarity"] != 0
    assert copies["directional_similarity"] == pytest.approx(0, abs=1e-6)
    low, high = right["directional_similarity_interval"]
    assert low < right["directional_similarity"] < high
    table = capsys.readouterr().out.splitlines()
    assert "FID (clip)" in table[0] and table[2].startswith(f"| seen, right | {COUNT} | ")


def parquet(folder):
    """The pictures and texts of a folder dataset, as a table."""
    rows = []
    for pair in read_pairs(folder, "seen"):
        files = {"original_image": pair.input, "edited_image": pair.output}
        row = {column: {"bytes": Path(file).read_bytes(), "path": None} for column, file in files.items()}
        row |= {"original_prompt": pair.input_caption, "edited_prompt": pair.output_caption}
        rows.append(row | {"edit_prompt": pair.instruction})
    table = datasets.Dataset.from_list(rows)
    for column in files:
        table = table.cast_column(column, datasets.Image())
    data = folder.parent / "table" / "data"
    data.mkdir(parents=True)
    table.to_parquet(data / "seen-00000-of-00001.parquet")  # as the hub names a split's files
    return "table"


@pytest.mark.parametrize("as_table", [False, True])
def test_answers_are_measured_from_anywhere_whatever_layout_they_came_from(tmp_path, monkeypatch, as_table):
    world.write_dataset(tmp_path / "toy", seed=2, sizes={"seen": (12, 9)})
    monkeypatch.chdir(tmp_path)
    editor = FakeEditor("toy")  # answers with the truth
    ours = evaluate.METHODS["instructgie"]._replace(load=lambda *_, **__: editor)
    monkeypatch.setitem(evaluate.METHODS, "instructgie", ours)
    source = parquet(tmp_path / "toy") if as_table else "toy"
    evaluate.main(["model", "--data", source, "--output", "out"])
    if as_table:
        shutil.rmtree("toy"), shutil.rmtree("table")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move("out", elsewhere)
    monkeypatch.chdir("/")
    metrics.main([str(elsewhere / "out/seen/both"), "--json", str(tmp_path / "metrics.json")])
    (result,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert result["n"] == 108 and result["fid"] == pytest.approx(0, abs=1e-6)
    assert result["directional_similarity"] == result["true_directional_similarity"] > 0
    for line in (elsewhere / "out/seen/both/answers.jsonl").read_text().splitlines():
        row = json.loads(line)
        files = [elsewhere / "out/seen/both" / row[k] for k in ("answer", "output", "example_input")]
        answer, truth, shown = (load_image(file).tobytes() for file in files)
        assert answer == truth != shown


def test_answers_are_measured_by_the_clip_of_their_preset(answers, monkeypatch, refused):
    folder = Path(answers("right", "truth"))
    (folder / "settings.json").write_text(json.dumps({"backbone": "other"}))
    toy = backbone.preset("toy")
    monkeypatch.setitem(backbone.PRESETS, "other", replace(toy, clip_eval="no/such/folder"))
    assert "no/such/folder" in refused(metrics.main, [str(folder)])
    metrics.main([str(folder), "--clip", toy.clip_eval])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": 64}, "64 answers are too few for an FID on 64 features"),
        ({"input_caption": None}, "answers.jsonl:1: has no 'input_caption'"),
        ({"output_caption": ""}, "needs both captions"),
        ({"mode": "other-pair"}, "no true outputs"),
        ({"output": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_what_cannot_be_measured_is_one_line(answers, refused, changes, message):
    line = refused(metrics.main, [answers("folder", "truth", **changes)])
    assert message in line and line.startswith("evaluation.metrics: ")


def test_the_paper_sized_features_are_refused_in_one_line_without_their_library(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.fid", None)
    with pytest.raises(SystemExit), backbone.one_line_errors("evaluation.metrics"):
        metrics.inception(backbone.pick_device("cpu"))
    assert capsys.readouterr().err.endswith("; pip install -r requirements-dev.txt\n")
