"""What a picture of the toy world shows: things in four places before a background, said in a caption.

A scene is a background and one to three things, each in its own quarter of a 64×64 picture; a thing is a
flat shape or a face.
"""

import random
from dataclasses import dataclass, replace

PANEL = 64  # pixels along a side of a picture
COLOURS = {
    "red": (222, 40, 40),
    "yellow": (248, 222, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 225),
    "purple": (140, 50, 170),
    "pink": (255, 130, 190),
}
BACKGROUNDS = {  # colour of the upper half, of the lower half
    "white": ((245, 245, 245), (245, 245, 245)),
    "grey": ((150, 150, 150), (150, 150, 150)),
    "black": ((25, 25, 25), (25, 25, 25)),
    "cream": ((250, 232, 190), (250, 232, 190)),
    "turquoise": ((80, 205, 200), (80, 205, 200)),
    "navy": ((25, 35, 95), (25, 35, 95)),
    "meadow": ((150, 205, 250), (115, 185, 95)),
    "desert": ((190, 220, 240), (225, 190, 130)),
}
SKINS = {"pale": (250, 222, 196), "tan": (224, 172, 105), "dark": (110, 70, 45)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
# [ours] Things stand 32 pixels apart, in the middle of four latents by four: wherever a thing is, it has the
# same latents. So a small model need not learn each thing anew for every place.
PLACES = {"top left": (16, 16), "top right": (48, 16), "bottom left": (16, 48), "bottom right": (48, 48)}
RADII = {"small": 7, "big": 12}
FEATURES = (
    "glasses",
    "a beard",
    "a moustache",
    "a red nose",
    "pink cheeks",
    "ears",
    "brown hair",
    "yellow hair",
    "a crown",
    "a blue cap",
    "a headband",
    "a bow",
    "horns",
    "a scarf",
)
HATS = ("a purple hat", "a green hat", "a red hat")
OUTLINES = {"white": (250, 250, 250), "black": (10, 10, 10)}

# No training picture holds one of these (every colour and every shape still occurs often).
HELD_OUT_COMBINATIONS = frozenset((colour, SHAPES[(5 * i + 1) % 6]) for i, colour in enumerate(COLOURS))


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.  `colour` is a key of COLOURS, or of SKINS for a face."""

    kind: str
    colour: str
    place: str
    size: str = "big"
    outline: str = ""  # of a shape: a key of OUTLINES
    mouth: str = "plain"  # of a face: plain, smile, frown, open
    features: tuple[str, ...] = ()  # of a face: of FEATURES and HATS

    def caption(self) -> str:
        parts = [*self.features, *([f"a {self.outline} outline"] if self.outline else [])]
        details = " with " + " and ".join(parts) if parts else ""
        if self.kind != "face":
            return f"a {self.size} {self.colour} {self.kind}{details} at the {self.place}"
        mood = {"plain": "", "smile": "smiling ", "frown": "frowning ", "open": "surprised "}[self.mouth]
        return f"a {self.colour} {mood}face{details} at the {self.place}"


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    overlay: what lies over everything. look: what is done to its pixels at last. Both are said in words, and
    drawing.py has the pictures of them.
    """

    background: str
    things: tuple[Thing, ...]
    overlay: str = ""
    look: str = ""

    def find(self, kind: str) -> Thing | None:
        return next((thing for thing in self.things if thing.kind == kind), None)

    def put(self, old: Thing, **changes: object) -> "Scene":
        """The scene with some properties of one thing changed."""
        things = (replace(thing, **changes) if thing is old else thing for thing in self.things)
        return replace(self, things=tuple(things))

    def empty_places(self) -> list[str]:
        taken = {thing.place for thing in self.things}
        return [place for place in PLACES if place not in taken]

    def caption(self) -> str:
        things = [thing.caption() for thing in self.things] or ["nothing"]
        extras = [f", {part}" for part in (self.overlay and f"with {self.overlay}", self.look) if part]
        return f"{' and '.join(things)}, on a {self.background} background{''.join(extras)}"

    def is_held_out(self) -> bool:
        return any((thing.colour, thing.kind) in HELD_OUT_COMBINATIONS for thing in self.things)


def scene_from_json(record: dict) -> Scene:
    things = tuple(Thing(**{**thing, "features": tuple(thing["features"])}) for thing in record["things"])
    return Scene(**{**record, "things": things})


def random_thing(rng: random.Random, kind: str, place: str) -> Thing:
    if kind == "face":
        mouth = rng.choice(("plain", "smile", "frown"))
        features = (rng.choice(FEATURES),) if rng.random() < 0.3 else ()
        return Thing(kind, rng.choice(list(SKINS)), place, "big", mouth=mouth, features=features)
    return Thing(kind, rng.choice(list(COLOURS)), place, rng.choice(list(RADII)))


def random_scene(rng: random.Random) -> Scene:
    """One to three things of different kinds in different places; a face in about half of the scenes."""
    count = rng.choice((1, 2, 2, 3))
    kinds = rng.sample(SHAPES, count)
    if rng.random() < 0.45:
        kinds[0] = "face"
    places = rng.sample(list(PLACES), count)
    things = tuple(random_thing(rng, kind, place) for kind, place in zip(kinds, places))
    return Scene(rng.choice(list(BACKGROUNDS)), things)
