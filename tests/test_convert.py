"""data_making/convert.py: InstructPix2Pix's raw layout becomes a dataset folder, whole or not at all."""

import json
import os
import re

import pytest
from test_dataset import save_pictures

import dataset as ds
from data_making import convert
from pictures import pairs as reading


def make_instruct_pix2pix(root, prompts: int = 20):
    listing = []
    for k in range(prompts):
        seeds = [str(1000 + k), str(2000 + k)]
        listing.append([f"{k:07d}", seeds])
        save_pictures(root / f"{k:07d}", [f"{seed}_{end}.png" for seed in seeds for end in (0, 1)])
        for file in (root / f"{k:07d}").glob("*.png"):
            file.rename(file.with_suffix(".jpg"))
        prompt = {"input": f"a house {k}", "edit": f"edit {k}", "output": f"a castle {k}", "url": "x"}
        (root / f"{k:07d}" / "prompt.json").write_text(json.dumps(prompt))
    (root / "seeds.json").write_text(json.dumps(listing))


@pytest.mark.parametrize("links", [True, False])
def test_the_raw_layout_becomes_a_dataset(tmp_path, monkeypatch, capsys, refused, links):
    source, output = tmp_path / "source", tmp_path / "output"
    make_instruct_pix2pix(source)
    (source / "0000003" / "1003_1.jpg").unlink()
    if not links:  # as between two file systems
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(OSError("Invalid cross-device link"))
        )
    convert.main([str(source), str(output)])
    printed = capsys.readouterr().out
    assert "train: 35 pairs\nval: 2 pairs\ntest: 2 pairs\n" in printed
    assert f"left out: {source / '0000003' / '1003_1.jpg'}: no such file" in printed
    train = reading.read_pairs(output)
    wanted = [f"edit {k}" for k in range(18) for seed in (1, 2) if (k, seed) != (3, 1)]
    assert [pair.instruction for pair in train] == wanted
    assert train[3].input.endswith("train/0000001/2001_0.jpg")
    assert train[3].output.endswith("train/0000001/2001_1.jpg")
    assert (train[0].input_caption, train[0].output_caption) == ("a house 0", "a castle 0")
    splits = [reading.read_pairs(output, split) for split in ("train", "val", "test")]
    assert len({pair.input for part in splits for pair in part}) == sum(map(len, splits)) == 39
    assert len(ds.VisualPromptDataset(train, 8)[4]["panels"]) == 4
    assert os.path.samefile(train[0].input, source / "0000000" / "1000_0.jpg") == links
    assert "exists already" in refused(convert.main, [str(source), str(output)])


@pytest.mark.parametrize(
    "listing, prompt, reason",
    [
        ("{", "{}", "seeds.json: Expecting"),
        ("[[1, 2, 3]]", "{}", "seeds.json: too many values"),
        ('[["../x", ["1"]]]', "{}", "seeds.json: .* is not a relative path inside"),
        ('[["b", ["1"]]]', "{}", "b/prompt.json"),
        ('[["a", ["/../../1"]]]', '{"edit": "e"}', "prompt.json: .* is not a relative path inside"),
        ('[["a", ["1"]]]', '{"input": "e"}', "a/prompt.json: has no 'edit'"),
        ('[["a", ["1"]]]', '{"edit": " "}', "a/prompt.json: the instruction is empty"),
        ("[]", "{}", "no pairs"),
    ],
)
def test_what_is_broken_is_said_in_one_line_and_nothing_is_written(
    tmp_path, refused, listing, prompt, reason
):
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    (source / "a/prompt.json").write_text(prompt)
    (source / "seeds.json").write_text(listing)
    line = refused(convert.main, [str(source), str(tmp_path / "output")])
    assert line.startswith("data_making.convert: error: "), line
    assert re.search(reason, line), line
    assert os.listdir(tmp_path) == ["source"]
