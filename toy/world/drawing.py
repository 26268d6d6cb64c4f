"""Pictures of scenes, and which class each of their pixels shows."""

from __future__ import annotations

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
HAIR = {"brown": (120, 72, 36), "yellow": COLOURS["yellow"]}  # of heads, beards and moustaches
CROWN = [(-0.7, -0.65), (-0.7, -1.3), (-0.35, -0.95), (0, -1.35), (0.35, -0.95), (0.7, -1.3), (0.7, -0.65)]
HALF_BOW = [(0, -0.95), (0.6, -1.3), (0.6, -0.6)]
HORN = [(0.85, -0.5), (1.0, -1.3), (0.4, -0.85)]
CLOTHES = {  # of faces: a colour and polygons, whose corners are in radii of the face away from its middle
    "a crown": (COLOURS["yellow"], [CROWN]),
    "a headband": (COLOURS["red"], [[(-0.88, -0.7), (0.88, -0.7), (0.95, -0.42), (-0.95, -0.42)]]),
    "a bow": (COLOURS["pink"], [HALF_BOW, [(-u, v) for u, v in HALF_BOW]]),
    "horns": ((250, 145, 20), [HORN, [(-u, v) for u, v in HORN]]),
    "a scarf": (
        COLOURS["green"],
        [[(-0.8, 0.75), (0.8, 0.75), (0.8, 1.4), (0.35, 1.4), (0.35, 1.1), (-0.8, 1.1)]],
    ),
    "a blue cap": (COLOURS["blue"], [[(-0.2, -0.7), (1.3, -0.7), (1.3, -0.5), (-0.2, -0.5)]]),
}
CLASSES = ("background", "face", *SHAPES)  # what the segment masks tell apart; the index is the class id


def _polygon(kind: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape around (x, y) with radius r."""
    if kind == "square":
        s = 0.86 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if kind == "triangle":
        return [(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)]
    if kind == "star":
        points = [(math.pi * k / 5, 0.42 * r if k % 2 else r) for k in range(10)]  # angle, radius
        return [(x + q * math.sin(a), y - q * math.cos(a)) for a, q in points]
    if kind == "cross":
        a, b = 0.33 * r, 0.95 * r
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a)]
        return [(x + u, y + v) for u, v in [*corners, (-b, -a), (-a, -a)]]
    # A heart.
    turns = [2 * math.pi * k / 40 for k in range(40)]
    across = [16 * math.sin(t) ** 3 for t in turns]
    up = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(x + r * u / 16, y - r * v / 15) for u, v in zip(across, up)]


def _draw_face(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    dark = (250, 250, 250) if thing.colour == "dark" else (30, 20, 20)
    skin, pen = SKINS[thing.colour], round(0.17 * r)

    def disc(u: float, v: float, radius: float, **style: object) -> None:
        """Centred so many radii of the face away from its middle."""
        draw.ellipse(
            (x + (u - radius) * r, y + (v - radius) * r, x + (u + radius) * r, y + (v + radius) * r), **style
        )

    hair = next((f.split()[0] for f in thing.features if f.endswith("hair")), None)
    if hair:
        disc(0, -0.12, 1.12, fill=HAIR[hair])
    if "ears" in thing.features:
        disc(-1, 0, 0.32, fill=skin)
        disc(1, 0, 0.32, fill=skin)
    disc(0, 0, 1, fill=skin)
    if hair:
        draw.pieslice((x - r, y - r, x + r, y + r), 205, 335, fill=HAIR[hair])
    if "a beard" in thing.features:
        draw.chord((x - r, y - r, x + r, y + r), 15, 165, fill=HAIR["brown"])
    for side in (-0.4, 0.4):
        disc(side, -0.22, 0.15, fill=dark)
        if "glasses" in thing.features:
            disc(side, -0.22, 0.34, outline=(20, 60, 200), width=pen)
        if "pink cheeks" in thing.features:
            disc(1.4 * side, 0.2, 0.22, fill=COLOURS["pink"])
    if thing.mouth == "plain":
        draw.line((x - 0.4 * r, y + 0.5 * r, x + 0.4 * r, y + 0.5 * r), fill=dark, width=pen)
    elif thing.mouth == "smile":
        draw.arc((x - 0.5 * r, y - 0.15 * r, x + 0.5 * r, y + 0.72 * r), 20, 160, fill=dark, width=pen)
    elif thing.mouth == "frown":
        draw.arc((x - 0.5 * r, y + 0.38 * r, x + 0.5 * r, y + 1.2 * r), 205, 335, fill=dark, width=pen)
    else:
        disc(0, 0.52, 0.24, fill=dark)
    if "a moustache" in thing.features:
        draw.rectangle((x - 0.5 * r, y + 0.2 * r, x + 0.5 * r, y + 0.38 * r), fill=HAIR["brown"])
    if "a red nose" in thing.features:
        disc(0, 0.12, 0.22, fill=COLOURS["red"])
    _draw_clothes(draw, thing, x, y, r)
    for hat in (feature for feature in thing.features if feature in HATS):  # the last put on lies above
        colour = (60, 20, 90) if "purple" in hat else COLOURS[hat.split()[1]]
        draw.rectangle((x - 0.62 * r, y - 1.3 * r, x + 0.62 * r, y - 0.62 * r), fill=colour)
        draw.rectangle((x - 1.0 * r, y - 0.8 * r, x + 1.0 * r, y - 0.58 * r), fill=colour)


def _draw_clothes(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    if "a blue cap" in thing.features:
        draw.pieslice((x - 0.9 * r, y - 1.3 * r, x + 0.9 * r, y + 0.3 * r), 180, 360, fill=COLOURS["blue"])
    for fill, polygons in (CLOTHES[feature] for feature in thing.features if feature in CLOTHES):
        for corners in polygons:
            draw.polygon([(x + u * r, y + v * r) for u, v in corners], fill=fill)


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, fill: object) -> None:
    if kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        draw.polygon(_polygon(kind, x, y, r), fill=fill)


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
