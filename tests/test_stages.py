"""toy.stages: what the stages show is what the editor does."""

import pytest
import torch

import backbone
from apps.pipeline import InstructGIEPipeline, seeded
from dataset import VisualPromptDataset
from pictures.pairs import read_pairs
from toy import stages, world


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.write_split(folder / "seen", world.draw_split("seen", 2, 2, seed=0))
    return folder


def test_the_stages_are_the_editors_own(data):
    editor = InstructGIEPipeline.from_pretrained(backbone.preset("toy").editor, llm=None)
    pairs = VisualPromptDataset(read_pairs(data, "seen"), size=64, seed=0)
    panels = torch.stack([pairs.load_panels(0, 1), pairs.load_panels(2, 3)])
    texts, seeds = [pairs.pairs[i].instruction for i in (1, 3)], [5, 6]
    found = stages.stages(editor, panels, "both", texts, seeds)
    drawn = editor.sample(panels[:, :2], None, panels[:, 2], texts, seeded(seeds))
    assert torch.equal(found["all steps"], editor.decode_answers(drawn))
    assert list(found) == list(stages.STAGES[1:])
    apart = [(found["u-net"] - panels[:, k]).abs().mean() for k in (2, 3)]  # from the query and the truth
    assert apart[1] < apart[0]
    differ = [(found[a] - found[b]).abs().max() for a, b in zip(stages.STAGES[1:], stages.STAGES[2:])]
    assert min(differ) > 0.01
    alone = stages.stages(editor, panels, "pair", texts, seeds)
    assert not torch.equal(alone["one step"], found["one step"])  # it was told, too


def test_the_table_has_a_row_for_each_mode_and_stage(data, capsys):
    stages.main(["--data", str(data), "--count", "3", "--mode", "pair", "instruction"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0][2:], row[1], row[2]) for row in rows] == [
        (mode, stage, "3") for mode in ("pair", "instruction") for stage in stages.STAGES
    ]
    assert rows[0][3] == "100.0"  # the truth itself is nearest to the truth


@pytest.mark.parametrize(
    "wrong, message", [(["--count", "0"], "--count must be at least 1, not 0"), (["nowhere"], "nowhere")]
)
def test_errors_are_one_line(refused, wrong, message):
    assert message in refused(stages.main, wrong)
