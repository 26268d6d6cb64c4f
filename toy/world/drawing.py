"""Pictures of scenes, and which class each of their pixels shows."""

import math

import numpy as np
from PIL import Image, ImageDraw

from toy.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    HATS,
    OUTLINES,
    PANEL,
    PLACES,
    RADII,
    SHAPES,
    SKINS,
    Scene,
    Thing,
)

SUPERSAMPLING = 4  # drawn larger by this factor, then averaged: smooth edges
CLASSES = ("background", "face", *SHAPES)  # what the segment masks tell apart; the index is the class id


def _heart(t: float) -> tuple[float, float]:
    up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -up / 15


# Corners, in radii of a thing away from its middle: of shapes, and of what faces wear.
_STAR = [(math.pi * k / 5, 0.42 if k % 2 else 1) for k in range(10)]  # angle, radius
POLYGONS = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "star": [(q * math.sin(a), -q * math.cos(a)) for a, q in _STAR],
    "heart": [_heart(2 * math.pi * k / 40) for k in range(40)],
    "cross": [
        *[(-0.33, -0.95), (0.33, -0.95), (0.33, -0.33), (0.95, -0.33), (0.95, 0.33), (0.33, 0.33)],
        *[(0.33, 0.95), (-0.33, 0.95), (-0.33, 0.33), (-0.95, 0.33), (-0.95, -0.33), (-0.33, -0.33)],
    ],
}
_CROWN = [(-0.7, -0.65), (-0.7, -1.3), (-0.35, -0.95), (0, -1.35), (0.35, -0.95), (0.7, -1.3), (0.7, -0.65)]
_BAND = [(-0.88, -0.7), (0.88, -0.7), (0.95, -0.42), (-0.95, -0.42)]
_SCARF = [(-0.8, 0.75), (0.8, 0.75), (0.8, 1.4), (0.35, 1.4), (0.35, 1.1), (-0.8, 1.1)]
_BOW = [(0, -0.95), (0.6, -1.3), (0.6, -0.6)]  # its right half, as of the horns
_HORN = [(0.85, -0.5), (1.0, -1.3), (0.4, -0.85)]
_PEAK = [(-0.2, -0.7), (1.3, -0.7), (1.3, -0.5), (-0.2, -0.5)]
CLOTHES = {  # a colour and polygons
    "a crown": (COLOURS["yellow"], [_CROWN]),
    "a headband": (COLOURS["red"], [_BAND]),
    "a bow": (COLOURS["pink"], [_BOW, [(-u, v) for u, v in _BOW]]),
    "horns": ((250, 145, 20), [_HORN, [(-u, v) for u, v in _HORN]]),
    "a scarf": (COLOURS["green"], [_SCARF]),
    "a blue cap": (COLOURS["blue"], [_PEAK]),
}
HAIR = {"brown": (120, 72, 36), "yellow": COLOURS["yellow"]}  # of heads, beards and moustaches


def _draw_polygon(
    draw: ImageDraw.ImageDraw, corners: list, x: float, y: float, r: float, fill: tuple
) -> None:
    draw.polygon([(x + r * u, y + r * v) for u, v in corners], fill=fill)


def _draw_face(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    dark = (250, 250, 250) if thing.colour == "dark" else (30, 20, 20)
    skin, pen, worn = SKINS[thing.colour], round(0.17 * r), thing.features

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
        """In pixels, of a box in radii of the face away from its middle."""
        return x + left * r, y + top * r, x + right * r, y + bottom * r

    def disc(u: float, v: float, radius: float, **style: object) -> None:
        draw.ellipse(box(u - radius, v - radius, u + radius, v + radius), **style)

    head = box(-1, -1, 1, 1)
    hair = next((HAIR[feature.split()[0]] for feature in worn if feature.endswith("hair")), None)
    if hair:
        disc(0, -0.12, 1.12, fill=hair)
    if "ears" in worn:
        disc(-1, 0, 0.32, fill=skin)
        disc(1, 0, 0.32, fill=skin)
    draw.ellipse(head, fill=skin)
    if hair:
        draw.pieslice(head, 205, 335, fill=hair)
    if "a beard" in worn:
        draw.chord(head, 15, 165, fill=HAIR["brown"])
    for side in (-0.4, 0.4):
        disc(side, -0.22, 0.15, fill=dark)
        if "glasses" in worn:
            disc(side, -0.22, 0.34, outline=(20, 60, 200), width=pen)
        if "pink cheeks" in worn:
            disc(1.4 * side, 0.2, 0.22, fill=COLOURS["pink"])
    if thing.mouth == "plain":
        draw.line(box(-0.4, 0.5, 0.4, 0.5), fill=dark, width=pen)
    elif thing.mouth == "smile":
        draw.arc(box(-0.5, -0.15, 0.5, 0.72), 20, 160, fill=dark, width=pen)
    elif thing.mouth == "frown":
        draw.arc(box(-0.5, 0.38, 0.5, 1.2), 205, 335, fill=dark, width=pen)
    else:
        disc(0, 0.52, 0.24, fill=dark)
    if "a moustache" in worn:
        draw.rectangle(box(-0.5, 0.2, 0.5, 0.38), fill=HAIR["brown"])
    if "a red nose" in worn:
        disc(0, 0.12, 0.22, fill=COLOURS["red"])
    if "a blue cap" in worn:
        draw.pieslice(box(-0.9, -1.3, 0.9, 0.3), 180, 360, fill=COLOURS["blue"])
    for fill, polygons in (CLOTHES[feature] for feature in worn if feature in CLOTHES):
        for corners in polygons:
            _draw_polygon(draw, corners, x, y, r, fill)
    for hat in (feature for feature in worn if feature in HATS):  # the last put on lies above
        colour = (60, 20, 90) if "purple" in hat else COLOURS[hat.split()[1]]
        draw.rectangle(box(-0.62, -1.3, 0.62, -0.62), fill=colour)
        draw.rectangle(box(-1.0, -0.8, 1.0, -0.58), fill=colour)


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, fill: tuple) -> None:
    if kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        _draw_polygon(draw, POLYGONS[kind], x, y, r, fill)


def _draw_thing(image: Image.Image, thing: Thing) -> None:
    s, draw = SUPERSAMPLING, ImageDraw.Draw(image)
    x, y = (s * c for c in PLACES[thing.place])
    r = s * RADII[thing.size]
    if thing.kind == "face":
        _draw_face(draw, thing, x, y, r)
        return
    if thing.outline:
        _draw_shape(draw, thing.kind, x, y, r, OUTLINES[thing.outline])
        r -= 2 * s
    _draw_shape(draw, thing.kind, x, y, r, COLOURS[thing.colour])


def _draw_overlay(image: Image.Image, overlay: str) -> None:
    """Something over everything, from a frame to stripes; its colour is a word of `overlay`."""
    words, side, draw = overlay.split(), image.width, ImageDraw.Draw(image)
    fill = next(COLOURS[word] for word in words if word in COLOURS)
    step, width = side // 4, side // 16
    if "frame" in words:
        draw.rectangle((0, 0, side, side), outline=fill, width=3 * width // 2)
    elif "bar" in words:
        bars = {"top": (0, 0, side, 3 * width), "bottom": (0, side - 3 * width, side, side)}
        bars |= {"left": (0, 0, 3 * width, side), "right": (side - 3 * width, 0, side, side)}
        draw.rectangle(bars[words[-1]], fill=fill)
    elif "dots" in words:
        for x in range(step // 2, side, step):
            for y in range(step // 2, side, step):
                draw.ellipse((x - width, y - width, x + width, y + width), fill=fill)
    elif "diagonal" in words:
        for i in range(-side, side, step):
            draw.polygon([(i, 0), (i + width, 0), (i + width + side, side), (i + side, side)], fill=fill)
    else:  # stripes that are horizontal or vertical
        for i in range(0, side, step):
            draw.rectangle(
                (0, i, side, i + width) if "horizontal" in words else (i, 0, i + width, side), fill=fill
            )


_GREY = np.array([[0.299], [0.587], [0.114]], np.float32)


def _mix(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """pixels @ weights, of three channels (H, W, 3): term by term, because what a matrix product rounds to
    differs from machine to machine, and a level may hang on it."""
    return sum(pixels[..., k, None] * weights[k] for k in range(3))


def _apply_look(image: Image.Image, look: str) -> Image.Image:
    what, _, value = look.partition(" ")
    pixels = np.asarray(image, np.float32)
    grey = _mix(pixels, _GREY)
    if what == "night":
        pixels = pixels * np.array([0.28, 0.32, 0.55], np.float32) + np.array([0, 0, 18], np.float32)
    elif what == "inverted":
        pixels = 255 - pixels
    elif what == "grey":
        pixels = np.repeat(grey, 3, axis=-1)
    elif what == "sepia":
        pixels = grey * np.array([1.05, 0.86, 0.62], np.float32)
    elif what == "tinted":
        pixels = 0.55 * pixels + 0.45 * np.array(COLOURS[value], np.float32)
    else:  # toned
        pixels = grey * np.array(COLOURS[value], np.float32) / max(COLOURS[value])
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def render(scene: Scene) -> Image.Image:
    """Draws a scene: an RGB picture of PANEL × PANEL pixels."""
    side = SUPERSAMPLING * PANEL
    upper, lower = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (side, side), upper)
    if lower != upper:
        ImageDraw.Draw(image).rectangle((0, side // 2, side, side), fill=lower)
    for thing in scene.things:
        _draw_thing(image, thing)
    if scene.overlay:
        _draw_overlay(image, scene.overlay)
    image = image.reduce(SUPERSAMPLING)
    return _apply_look(image, scene.look) if scene.look else image


def render_classes(scene: Scene) -> np.ndarray:
    """Which class each pixel shows: (PANEL, PANEL) uint8 indices into CLASSES. An overlay is seen through."""
    classes = np.zeros((PANEL, PANEL), np.uint8)
    for thing in scene.things:
        shown = Image.new("RGB", (SUPERSAMPLING * PANEL,) * 2)
        _draw_thing(shown, thing)
        covered = np.asarray(shown.reduce(SUPERSAMPLING)).any(axis=-1)
        classes[covered] = CLASSES.index(thing.kind)
    return classes
