"""The toy world: edits are exact, splits hold out what they say, and the folder is in the public format."""

import json
import random
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backbone
from pictures import load_image
from pictures.pairs import read_pairs
from toy import world
from toy.world.__main__ import main

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
VISIBLE = 8  # levels of 255: what toy.score takes for a change
PICTURE = ("overlay", "look")  # what lies over a scene, and its colours
SIZES = {split: (6, 2) for split in world.SPLITS}


def pixels(scene: world.Scene) -> np.ndarray:
    return np.asarray(world.render(scene)).astype(int)


# --- Scenes and edits ---------------------------------------------------------------------------------------


@few
@given(seeds)
def test_every_family_changes_the_scene_and_its_picture(seed):
    rng = random.Random(seed)
    scene = world.random_scene(rng)
    by_family = {}
    for edit, edited in world.candidates(scene):
        by_family.setdefault(edit.family, []).append((edit, edited))
    for made in by_family.values():
        edit, edited = rng.choice(made)
        assert edited == edit.apply(scene) != scene
        assert np.abs(pixels(edited) - pixels(scene)).max() > VISIBLE, edit


def test_every_family_can_be_made_of_some_scene():
    rng = random.Random(0)
    scenes = [world.random_scene(rng) for _ in range(60)]
    families = {edit.family for scene in scenes for edit, _ in world.candidates(scene)}
    assert families == set(world.FAMILIES) and len(families) == 25
    assert len(world.HELD_OUT_FAMILIES & families) == 4


@few
@given(seeds)
def test_an_edit_changes_what_it_names_and_nothing_else(seed):
    rng = random.Random(seed)
    scene = world.random_scene(rng)
    edit, edited = rng.choice(world.candidates(scene))
    thing = scene.find(edit.target)
    changed = {
        "recolour": lambda: scene.put(thing, colour=edit.value),
        "reshape": lambda: scene.put(thing, kind=edit.value),
        "remove": lambda: replace(scene, things=tuple(t for t in scene.things if t.kind != edit.target)),
        "move": lambda: scene.put(thing, place=edit.value),
        "resize": lambda: scene.put(thing, size=edit.value),
        "background": lambda: replace(scene, background=edit.value),
        "smile": lambda: scene.put(thing, mouth="smile"),
        "frown": lambda: scene.put(thing, mouth="frown"),
        "surprise": lambda: scene.put(thing, mouth="open"),
        "wear": lambda: scene.put(thing, features=(*thing.features, edit.value)),
        "hat": lambda: scene.put(thing, features=(*thing.features, edit.value)),
        "outline": lambda: scene.put(thing, outline=edit.value),
    }
    if edit.family in changed:
        assert edited == changed[edit.family]()
    elif edit.family == "add":
        assert edited.things[:-1] == scene.things
        assert edited.things[-1].place == edit.value and edited.things[-1].kind == edit.target.split()[1]
    elif edit.family == "swap":
        for old, new in ((edit.target, edit.value), (edit.value, edit.target)):
            assert edited.find(new) == replace(scene.find(new), colour=scene.find(old).colour)
    elif edit.family == "repaint":
        assert {thing.colour for thing in edited.things if thing.kind != "face"} == {edit.value}
        for old, new in zip(scene.things, edited.things, strict=True):
            assert replace(new, colour=old.colour) == old
    else:  # of the whole picture
        assert len(made := [name for name in PICTURE if getattr(edited, name)]) == 1
        assert replace(edited, **{made[0]: ""}) == scene


def test_edits_that_cannot_be_made_are_none():
    scene = world.Scene("white", (world.Thing("circle", "red", "top left"),))
    for edit in (
        world.Edit("recolour", "circle", "red"),
        world.Edit("recolour", "star", "blue"),
        world.Edit("reshape", "star", "heart"),
        world.Edit("remove", "face"),
        world.Edit("add", "red circle", "top right"),
        world.Edit("add", "red star", "top left"),
        world.Edit("move", "circle", "top left"),
        world.Edit("smile", "face"),
        world.Edit("swap", "circle", "star"),
        world.Edit("background", "", "white"),
    ):
        assert edit.apply(scene) is None, edit


def test_every_query_has_many_candidates_and_all_differ():
    for seed in range(50):
        edits = world.candidates(world.random_scene(random.Random(seed)))
        assert len(edits) >= 100
        assert len({edit for edit, _ in edits}) == len(edits)


@few
@given(seeds, st.sampled_from(list(world.SPLITS)))
def test_candidates_include_the_truth(seed, split):
    for pair in world.draw_split(split, 2, 2, seed):
        assert (pair.edit, pair.after) in world.candidates(pair.before, pair.edit.family)


@few
@given(seeds, st.sampled_from(["train", "seen_mixture"]))
def test_scenes_and_edits_come_back_from_json(seed, split):
    (pair, *_) = world.draw_split(split, 1, 2, seed)
    record = json.loads(json.dumps(asdict(pair.before)))
    assert world.scene_from_json(record) == pair.before
    assert world.edit_from_json(json.loads(json.dumps(asdict(pair.edit)))) == pair.edit


# --- Mixtures -----------------------------------------------------------------------------------------------


@few
@given(seeds, st.sampled_from(world.MIXTURES))
def test_a_mixture_makes_both_edits_in_either_order_and_both_show(seed, family):
    rng = random.Random(seed)
    scene, edit = world.random_scene(rng), rng.choice(world.edits_of(family))
    edited = edit.apply(scene)
    alone = edit.first.apply(scene), edit.second.apply(scene)
    if edited is None:
        both = None if None in alone else edit.second.apply(alone[0])
        assert both is None or any(np.abs(pixels(both) - pixels(one)).max() <= VISIBLE for one in alone)
        return
    assert edited == edit.second.apply(alone[0]) == edit.first.apply(alone[1])
    assert all(np.abs(pixels(edited) - pixels(one)).max() > VISIBLE for one in (scene, *alone))


def test_a_mixture_that_hides_one_of_its_edits_is_none():
    thing = world.Thing("circle", "red", "top left", "small")
    scene = world.Scene("white", (thing, world.Thing("star", "blue", "bottom right")))
    remove, bar = world.Edit("remove", "circle"), world.Edit("bar", "", "red bar at the left")
    hidden = world.render(bar.apply(scene)).crop((0, 0, 12, 64))
    assert set(hidden.getdata()) == {world.COLOURS["red"]}
    assert world.Mixture(remove, bar).apply(scene) is not None  # the circle looks out from behind the bar
    assert world.Mixture(world.Edit("recolour", "star", "blue"), bar).apply(scene) is None


def test_mixtures_are_of_trained_families_and_four_are_held_out():
    halves = {half for mixture in world.MIXTURES for half in mixture.split(" + ")}
    assert halves <= set(world.FAMILIES) - world.HELD_OUT_FAMILIES
    assert len(world.MIXTURES) == len(set(world.MIXTURES)) == 75
    assert len(world.HELD_OUT_MIXTURES & set(world.MIXTURES)) == 4
    trained = {half for mixture in world.families_of("train_mixture") for half in mixture.split(" + ")}
    assert trained == halves  # each half of a held-out mixture occurs in trained ones


def test_a_mixture_is_said_in_both_sayings():
    rng = random.Random(0)
    edit = world.Mixture(world.Edit("remove", "star"), world.Edit("dots", "", "red"))
    assert edit.instruction == "remove the star and draw red dots over it"
    for held_out in (False, True):
        said = world.say(edit, rng, held_out)
        for part in (edit.first, edit.second):
            family = world.FAMILIES[part.family]
            sayings = family.held_out_sayings if held_out else family.trained_sayings
            assert any(part.worded(saying) in said for saying in sayings), said


# --- Pictures -----------------------------------------------------------------------------------------------


def test_a_picture_is_rgb_and_the_same_every_time():
    for seed in range(5):
        scene = world.random_picture(random.Random(seed))
        picture = world.render(scene)
        assert picture.mode == "RGB" and picture.size == (64, 64)
        again = world.render(world.scene_from_json(json.loads(json.dumps(asdict(scene)))))
        assert picture.tobytes() == again.tobytes()


def test_of_two_hats_the_last_put_on_lies_above():
    bare = world.Scene("white", (world.Thing("face", "tan", "top left"),))
    purple, red = (world.Edit("hat", "face", hat) for hat in ("a purple hat", "a red hat"))
    assert np.array_equal(pixels(red.apply(purple.apply(bare))), pixels(red.apply(bare)))
    assert np.array_equal(pixels(purple.apply(red.apply(bare))), pixels(purple.apply(bare)))


@few
@given(seeds)
def test_classes_are_where_things_are_painted(seed):
    scene = world.random_scene(random.Random(seed))
    classes = world.render_classes(scene)
    assert classes.shape == (64, 64) and classes.dtype == np.uint8
    kinds = {world.CLASSES[index] for index in np.unique(classes)}
    assert kinds == {"background", *(thing.kind for thing in scene.things)}
    empty = pixels(replace(scene, things=()))
    painted = (pixels(scene) != empty).any(axis=-1)
    assert not (painted & (classes == 0)).any()  # whatever is painted has a class
    for thing in scene.things:
        without = pixels(replace(scene, things=tuple(t for t in scene.things if t is not thing)))
        shown = (pixels(scene) != without).any(axis=-1)
        labelled = classes == world.CLASSES.index(thing.kind)
        # All but the faintest pixels of its smoothed edge, where a sixteenth of colour rounds to nothing.
        assert (shown & labelled).sum() >= 0.95 * max(shown.sum(), labelled.sum())


# --- Wording ------------------------------------------------------------------------------------------------


def test_canonical_wording_fills_its_places():
    assert world.Edit("add", "red star", "top left").instruction == "add a red star at the top left"
    assert world.Edit("recolour", "star", "pink").instruction == "make the star pink"
    assert world.Edit("swap", "heart", "cross").instruction == "swap the colours of the heart and the cross"
    for edit in world.every_edit():
        assert "{" not in edit.instruction
        for word in (edit.target, edit.value):
            assert word in edit.instruction


def test_canonical_wordings_differ():
    wordings = Counter(edit.instruction for edit in world.every_edit())
    assert max(wordings.values()) == 1


def test_sayings_of_training_and_held_out_ones_are_disjoint():
    for name, family in world.FAMILIES.items():
        assert len(family.held_out_sayings) >= 2, name
        assert len(family.trained_sayings) >= 2, name
        assert (*family.trained_sayings, *family.held_out_sayings) == family.sayings
        assert len({*family.sayings, family.canonical}) == len(family.sayings) + 1, name
        for saying in family.sayings:
            for placeholder in ("{target}", "{value}"):
                assert (placeholder in saying) == (placeholder in family.canonical), saying


def test_training_splits_never_say_a_held_out_saying():
    rng = random.Random(0)
    for edit in world.every_edit()[::7]:
        family = world.FAMILIES[edit.family]
        trained = [edit.worded(saying) for saying in family.trained_sayings]
        held_out = [edit.worded(saying) for saying in family.held_out_sayings]
        assert world.say(edit, rng).endswith(tuple(trained))
        assert world.say(edit, rng, held_out=True).endswith(tuple(held_out))


# --- Splits -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits() -> dict[str, list[world.Pair]]:
    return {split: world.draw_split(split, 30, 2, seed=1) for split in world.SPLITS}


def combinations(scene: world.Scene) -> set:
    return {(thing.colour, thing.kind) for thing in scene.things} & world.HELD_OUT_COMBINATIONS


@pytest.mark.parametrize("split", [split for split in world.SPLITS if split != "unseen_combination"])
def test_held_out_combinations_are_held_out(splits, split):
    assert not any(combinations(pair.before) | combinations(pair.after) for pair in splits[split])


def test_unseen_combinations_are_in_every_pair(splits):
    assert all(combinations(pair.before) | combinations(pair.after) for pair in splits["unseen_combination"])


def test_held_out_families_are_held_out(splits):
    for split, pairs in splits.items():
        families = {pair.edit.family for pair in pairs}
        held_out = {"unseen_family": world.HELD_OUT_FAMILIES, "unseen_task": world.HELD_OUT_MIXTURES}
        if split in held_out:
            assert families == held_out[split]
        else:
            assert not families & (world.HELD_OUT_FAMILIES | world.HELD_OUT_MIXTURES)
            assert ("mixture" in split) == (not families & set(world.FAMILIES))


def test_training_covers_every_edit_and_no_family_is_rare():
    instructions, _ = world.SPLITS["train"]
    pairs = world.draw_split("train", instructions, 2, seed=0)
    trained = {pair.edit for pair in pairs}
    assert {pair.edit for pair in world.draw_split("seen", *world.SPLITS["seen"], seed=0)} <= trained
    families = Counter(pair.edit.family for pair in pairs)
    assert set(families) == set(world.FAMILIES) - world.HELD_OUT_FAMILIES
    assert min(families.values()) >= 0.008 * len(pairs) and max(families.values()) <= 0.1 * len(pairs)


def test_pairs_are_what_they_say_and_every_instruction_has_two(splits):
    for pairs in splits.values():
        assert all(pair.edit.apply(pair.before) == pair.after for pair in pairs)
        assert min(Counter(pair.instruction for pair in pairs).values()) >= 2


def test_held_out_combinations_leave_every_colour_and_shape():
    assert len(world.HELD_OUT_COMBINATIONS) == 6
    assert {colour for colour, _ in world.HELD_OUT_COMBINATIONS} == set(world.COLOURS)
    assert max(Counter(shape for _, shape in world.HELD_OUT_COMBINATIONS).values()) < len(world.COLOURS) / 2


def test_a_split_is_the_seeds():
    assert world.draw_split("seen", 3, 2, 5) == world.draw_split("seen", 3, 2, 5)
    assert world.draw_split("seen", 3, 2, 5) != world.draw_split("seen", 3, 2, 6)


# --- The folder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "toy"
    world.write_dataset(out, seed=1, sizes=SIZES, mixtures=(3, 2))
    return out


def test_our_reader_reads_it(folder):
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(SIZES)
    for split in SIZES:
        pairs = read_pairs(folder, split)
        assert len(pairs) == (12 + 6 if split == "train" else 12)
        assert min(Counter(pair.instruction for pair in pairs).values()) >= 2
        for pair in pairs:
            scene = world.scene_from_json(json.loads(pair.extra["scene"]))
            edit = world.edit_from_json(json.loads(pair.extra["edit"]))
            assert load_image(pair.input).tobytes() == world.render(scene).tobytes()
            assert load_image(pair.output).tobytes() == world.render(edit.apply(scene)).tobytes()
            assert sorted(pair.extra) == ["canonical", "edit", "family", *world.PARAPHRASES, "scene"]
            assert len({pair.extra[key] for key in world.PARAPHRASES} - {pair.instruction}) == 5
            assert pair.input_caption == scene.caption()
            assert pair.output_caption == edit.apply(scene).caption()
            assert (pair.extra["family"], pair.extra["canonical"]) == (edit.family, edit.instruction)


def test_the_datasets_library_reads_it(folder, tmp_path):
    import datasets

    table = datasets.load_dataset(
        "imagefolder", data_dir=str(folder / "seen"), split="train", cache_dir=str(tmp_path)
    )
    assert len(table) == 12
    assert table[0]["input"].size == table[0]["output"].size == (64, 64)
    assert [row["instruction"] for row in table] == [p.instruction for p in read_pairs(folder, "seen")]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def stop_in_the_second_split(folder, pairs):
        if written:
            raise KeyboardInterrupt
        written.append(folder)
        folder.mkdir(parents=True)

    monkeypatch.setattr("toy.world.splits.write_split", stop_in_the_second_split)
    with pytest.raises(KeyboardInterrupt):
        world.write_dataset(tmp_path / "toy", sizes=SIZES)
    assert written and not list(tmp_path.iterdir())


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository whose toy world is small, and not yet written."""
    copy = tmp_path / "toy" / "world"
    shutil.copytree(Path(world.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    program = re.sub(r"(?m)^SPLITS = .*", f"SPLITS = {SIZES}", (copy / "splits.py").read_text())
    (copy / "splits.py").write_text(program)
    shutil.copytree(backbone.HERE / "disk", tmp_path / "disk", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("backbone.presets.HERE", tmp_path)
    return tmp_path


def test_two_first_runs_write_one_world(checkout):
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(backbone.data_folder, ["data/toy"] * 2))
    assert folders == [str(checkout / "data" / "toy")] * 2
    assert len(read_pairs(folders[0], "train")) == 12
    assert [path.name for path in (checkout / "data").iterdir()] == ["toy"]


def test_a_world_of_another_version_is_refused(checkout):
    folder = backbone.data_folder("data/toy")
    assert backbone.data_folder("data/toy") == folder
    sayings = checkout / "toy" / "world" / "sayings.txt"
    sayings.write_text("# A remark\n" + sayings.read_text())
    with pytest.raises(backbone.BackboneError, match=r"data.toy is of another version.*remove it"):
        backbone.data_folder("data/toy")
    shutil.rmtree(folder)
    assert backbone.data_folder("data/toy") == folder


def test_where_another_was_faster_its_world_stays(tmp_path, monkeypatch):
    out = tmp_path / "toy"

    def write_and_be_late(folder, pairs):
        folder.mkdir(parents=True)
        out.mkdir(exist_ok=True)
        (out / "first").touch()

    monkeypatch.setattr("toy.world.splits.write_split", write_and_be_late)
    world.write_dataset(out, sizes=SIZES)
    assert [path.name for path in tmp_path.rglob("*")] == ["toy", "first"]


def test_a_world_that_cannot_be_written_is_one_line(checkout, capfd):
    (checkout / "data").write_text("a file in the folder's place, as no right to write would be")
    with pytest.raises(backbone.BackboneError, match=r"cannot be written \(.*: error: .*data.*--data"):
        backbone.data_folder("data/toy")
    assert not capfd.readouterr().err


def test_a_folder_that_exists_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr("sys.argv", ["toy.world", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_texts_tell_the_same_edit_of_several_scenes(capsys):
    texts = [world.random_texts(random.Random(seed)) for seed in range(40)]
    assert texts[0] == world.random_texts(random.Random(0)) != texts[1]
    for text in texts:
        assert len(text["pairs"]) == 5 and all(before != after for before, after in text["pairs"])
    held_out = {word for text in texts for _, after in text["pairs"] for word in after.split()}
    assert not held_out & {"sepia", "frame", "hat"}
