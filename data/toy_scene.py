"""What the toy cities look like: painters of street scenes under a pinhole camera, and the styles of the domains.

Each domain is drawn by the same painters under another `Style`; the differences between the styles are the domain gap.
Coordinates are metres with the camera at x = 0, z = 0: x to the right, y up from the ground, z ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data.taxonomy import IGNORE

# Train ids.
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN = range(10)
SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)
RARE = (WALL, TRAIN, BICYCLE, TERRAIN, MOTORCYCLE, BUS, FENCE, TRUCK, RIDER)  # classes shown in turn
FAR = 90.0  # metres: where streets end; also the distance given to the sky


class Look(NamedTuple):
    """How the surface of one class looks. Colours are RGB, 0 to 255."""

    gta5: tuple[int, int, int]
    synthia: tuple[int, int, int]
    cityscapes: tuple[int, int, int]
    spread: int  # standard deviation of the colour from object to object
    grain: float  # contrast of the surface texture, relative to the colour
    cell: int  # size of a texture cell in pixels


LOOKS = (
    Look((88, 88, 96), (70, 66, 82), (108, 102, 104), 5, 0.05, 1),  # road
    Look((184, 170, 148), (160, 128, 118), (152, 138, 132), 6, 0.06, 2),  # sidewalk
    Look((196, 150, 110), (206, 186, 176), (128, 120, 116), 20, 0.07, 4),  # building
    Look((150, 88, 66), (112, 112, 130), (134, 102, 84), 8, 0.14, 2),  # wall
    Look((128, 90, 48), (168, 168, 176), (106, 92, 70), 8, 0.10, 1),  # fence
    Look((112, 118, 126), (70, 96, 78), (128, 128, 120), 6, 0.02, 1),  # pole
    Look((34, 36, 30), (60, 58, 30), (40, 48, 42), 4, 0.02, 1),  # traffic light
    Look((40, 90, 200), (30, 120, 160), (60, 84, 140), 8, 0.02, 1),  # traffic sign
    Look((56, 122, 36), (40, 104, 74), (104, 104, 56), 10, 0.24, 2),  # vegetation
    Look((150, 156, 70), (120, 140, 80), (128, 132, 76), 6, 0.16, 4),  # terrain
    Look((112, 172, 236), (172, 200, 226), (188, 196, 202), 10, 0.06, 8),  # sky
    Look((170, 70, 70), (110, 80, 130), (116, 74, 80), 30, 0.04, 2),  # person
    Look((200, 110, 40), (130, 110, 60), (140, 94, 60), 24, 0.04, 2),  # rider
    Look((150, 40, 44), (90, 96, 140), (92, 92, 102), 50, 0.02, 4),  # car
    Look((222, 214, 196), (190, 190, 150), (164, 164, 158), 16, 0.04, 4),  # truck
    Look((236, 180, 36), (210, 110, 70), (190, 138, 72), 10, 0.02, 4),  # bus
    Look((40, 132, 120), (90, 150, 170), (84, 124, 116), 10, 0.02, 4),  # train
    Look((46, 34, 52), (70, 40, 40), (58, 50, 54), 8, 0.06, 1),  # motorcycle
    Look((40, 60, 120), (50, 80, 70), (56, 60, 84), 10, 0.10, 1),  # bicycle
)


@dataclass(frozen=True)
class Style:
    """How one domain looks: every field is a knob of the domain gap. A pair is a (low, high) range.

    `severity` is drawn once per image: at 0 the image has the colours and the neutral optics of the GTA5 toy,
    at 1 those of its own domain. A wide range gives easy and hard images, thus something to self-train from.
    """

    size: tuple[int, int]  # width, height in pixels: the aspect ratios follow the real sets
    look: int  # which colour of `Look` counts: no global colour change repairs shifts that differ by class
    severity: tuple[float, float]
    # Geometry: the layout of the street is not repaired by photometric tricks
    focal: float = 0.75  # focal length in image widths: larger shows larger objects
    horizon: tuple[float, float] = (0.40, 0.46)  # height of the horizon in image heights from the top
    camera: float = 1.6  # metres above the ground: a high camera sees roofs and more road
    road: tuple[float, float] = (4.0, 5.5)  # metres from the middle of the road to the kerb
    sidewalk: tuple[float, float] = (3.5, 5.5)  # metres: narrow ones bring the facades close
    floors: tuple[int, int] = (2, 5)  # storeys of a building: tall ones leave little sky
    openness: float = 0.25  # share of plots without a building: more greenery and more sky
    cars: float = 4.0  # mean number per image
    people: float = 3.0  # mean number per image
    # Surfaces and optics at severity 1; only the sun does not depend on it
    sun: float = 0.22  # brightness difference of sunny and shaded faces; also darkens cast shadows
    grain: float = 1.0  # factor on the contrast of surface textures
    cell: float = 1.0  # factor on the size of texture cells: shifts what the first filters see
    haze: float = 0.0  # extinction per metre: far things fade, so the colour of a class depends on depth
    haze_colour: tuple[float, float, float] = (0.72, 0.77, 0.80)  # RGB, 0 to 1
    saturation: float = 1.0  # factor on the distance to grey
    contrast: float = 1.0  # factor on the distance to mid-grey
    cast: tuple[float, float, float] = (1.0, 1.0, 1.0)  # gain per RGB channel
    vignette: float = 0.0  # darkening of the corners, relative
    blur: float = 0.0  # standard deviation in pixels: softens the thin classes most
    noise: float = 0.01  # standard deviation of the sensor noise, of 1
    hood: float = 0.2  # chance of a void strip along the lower edge (the hood of the own car)


STYLES = {
    "GTA5": Style(size=(240, 132), look=0, severity=(0.0, 1.0), saturation=1.1, sun=0.28, cars=3.0),
    "SYNTHIA": Style(
        size=(256, 152),
        look=1,
        severity=(0.5, 1.0),
        focal=0.65,
        horizon=(0.28, 0.38),
        camera=3.2,
        road=(5.0, 7.5),
        sidewalk=(4.0, 6.0),
        floors=(2, 4),
        openness=0.3,
        people=6.0,
        sun=0.03,
        grain=0.5,
        cell=2.0,
        contrast=0.9,
        cast=(1.0, 0.97, 1.04),
    ),
    "Cityscapes": Style(
        size=(256, 128),
        look=2,
        severity=(0.75, 1.0),
        focal=0.85,
        horizon=(0.36, 0.44),
        camera=1.35,
        road=(3.2, 4.4),
        sidewalk=(2.5, 3.5),
        floors=(3, 6),
        openness=0.2,
        people=4.0,
        sun=0.02,
        grain=1.3,
        cell=1.6,
        haze=0.009,
        haze_colour=(0.70, 0.75, 0.80),
        saturation=0.3,
        contrast=0.65,
        cast=(0.66, 0.87, 1.08),
        vignette=0.2,
        blur=0.7,
        noise=0.03,
        hood=0.5,
    ),
}


class Canvas:
    """The image, the label map and the depth map of one scene under a pinhole camera.

    All three are drawn by the same calls without anti-aliasing, so the label map fits the image to the pixel.
    """

    def __init__(self, style: Style, size: tuple[int, int], rng: np.random.Generator):
        self.style, self.rng, self.severity = style, rng, rng.uniform(*style.severity)
        self.focal = style.focal * size[0]  # pixels
        self.horizon = rng.uniform(*style.horizon) * size[1]  # row
        self.middle = (0.5 + rng.normal(0, 0.04)) * size[0]  # column of the vanishing point
        self.lit_side = rng.choice((-1, 1))
        self.asphalt = self.tint(ROAD)
        self.image = Image.new("RGB", size, self.tint(SKY))
        self.label = Image.new("L", size, SKY)
        self.depth = Image.new("F", size, FAR)  # metres; 0 stands for the ground, whose rows tell the depth
        self.pens = [ImageDraw.Draw(layer) for layer in (self.image, self.label, self.depth)]

    def blend(self, neutral, full):
        """From the value at severity 0 to that at severity 1."""
        return np.float32(neutral) + (np.float32(full) - np.float32(neutral)) * self.severity

    def tint(self, train_id: int) -> tuple[int, ...]:
        """RGB colour, 0 to 255, for a new object of a class."""
        look = LOOKS[train_id]
        offset = self.rng.normal(0, look.spread, 3) + self.rng.normal(0, look.spread / 2)
        return shade((self.blend(look.gta5, look[self.style.look]) + offset).tolist())

    def draw(self, shape: str, points, colour, train_id: int | None, depth: float) -> None:
        """Paint a Pillow shape given in pixels; without a train id only its colours change (a decoration)."""
        fills = (colour,) if train_id is None else (colour, train_id, depth)
        for pen, fill in zip(self.pens, fills):
            getattr(pen, shape)(points, fill=fill)

    def pixel(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Column and row of a point in metres; the near plane keeps what is beside the camera finite."""
        scale = self.focal / max(z, 0.8)
        return self.middle + x * scale, self.horizon + (self.style.camera - y) * scale

    def polygon(self, points, colour, train_id: int | None = None) -> None:
        depth = 0.0 if all(y == 0 for _, y, _ in points) else sum(z for *_, z in points) / len(points)
        self.draw("polygon", [self.pixel(*point) for point in points], colour, train_id, depth)

    def level(self, x0, x1, y, z0, z1, colour, train_id: int | None = None) -> None:
        """A level face: a piece of ground if y is 0, else a roof."""
        self.polygon([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], colour, train_id)

    def side(self, x, y0, y1, z0, z1, colour, train_id: int | None = None) -> None:
        """An upright face along the street."""
        self.polygon([(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)], colour, train_id)

    def front(self, x0, x1, y0, y1, z, colour, train_id: int | None = None) -> None:
        """An upright face across the street, at least two pixels wide so that thin things stay learnable."""
        left, top, right, bottom = map(round, self.pixel(x0, y1, z) + self.pixel(x1, y0, z))
        self.draw("rectangle", [left, top, max(right, left + 1), max(bottom, top)], colour, train_id, z)

    def disc(self, x, y, radius, z, colour, train_id: int | None = None) -> None:
        (column, row), r = self.pixel(x, y, z), max(radius * self.focal / z, 0.6)
        self.draw("ellipse", [column - r, row - r, column + r, row + r], colour, train_id, z)

    def block(self, x0, x1, y0, y1, z0, z1, colour, train_id: int) -> float | None:
        """A cuboid: its top, side and front as far as visible. Returns the x of the visible side, if any."""
        if y1 < self.style.camera:
            self.level(x0, x1, y1, z0, z1, shade(colour, 1.15), train_id)
        x = x0 if x0 > 0 else x1 if x1 < 0 else None
        if x is not None:
            self.side(x, y0, y1, z0, z1, shade(colour, self.light(x)), train_id)
        self.front(x0, x1, y0, y1, z0, colour, train_id)
        return x

    def light(self, x: float) -> float:
        """Brightness of a face along the street at x."""
        return 0.88 + self.style.sun * (1 if x * self.lit_side > 0 else -1)


def shade(colour, factor: float = 1.0) -> tuple[int, ...]:
    return tuple(max(0, min(255, int(value * factor))) for value in colour)


# Painters of the street


def street(c: Canvas, road: float, edge: float, verge: bool) -> None:
    """Road with lane marks, kerbs, paved sidewalks, a strip of grass if `verge`, and the far end."""
    paving = c.tint(SIDEWALK)
    c.level(-60, 60, 0, 0.8, 4 * FAR, c.tint(TERRAIN), TERRAIN)
    c.level(-edge, edge, 0, 0.8, 4 * FAR, paving, SIDEWALK)
    for z in np.arange(2.0, 30.0, 1.6):
        c.level(-edge, edge, 0, z, z + 0.12, shade(paving, 0.82))
    if verge:
        c.level(c.lit_side * road, c.lit_side * (road + 3 * edge) / 4, 0, 0.8, 4 * FAR, c.tint(TERRAIN), TERRAIN)
    c.level(-road - 0.2, road + 0.2, 0, 0.8, 4 * FAR, shade(paving, 1.1))
    c.level(-road, road, 0, 0.8, 4 * FAR, c.asphalt, ROAD)
    for z in np.arange(c.rng.uniform(0, 5), FAR, 6.0):
        c.level(-0.1, 0.1, 0, z, z + 3.0, shade(c.asphalt, 2.0))
    for x in np.arange(-60, 60, 12):
        if c.rng.random() < 0.6:
            c.front(x, x + 12, 0, c.rng.uniform(6, 16), FAR, c.tint(BUILDING), BUILDING)
        else:
            foliage(c, x + 6, 5, 6, FAR)


def plots(c: Canvas, edge: float, barriers: list[int]) -> None:
    """Both sides of the street from far to near: houses, or gardens behind a wall, a fence or nothing."""
    for side in (-1, 1):
        starts = np.cumsum(c.rng.uniform(8, 14, 9))
        gardens = c.rng.choice((WALL, FENCE, VEGETATION), 9)
        kinds = np.where(c.rng.random(9) < c.style.openness, gardens, BUILDING)
        if side == c.lit_side:
            kinds[: len(barriers)] = barriers  # at middle distance, where they are seen
        for z, kind in sorted(zip(starts.tolist(), kinds.tolist()), reverse=True):
            if kind == BUILDING:
                house(c, side * edge, z, z + 12)
                continue
            for bush in np.arange(z + 12, z, -3.0):
                foliage(c, side * (edge + 5), c.rng.uniform(1.5, 3.5), 2.2, bush)
            if kind in (WALL, FENCE):
                barrier(c, side * edge, z, z + 12, kind)


def house(c: Canvas, x: float, z0: float, z1: float) -> None:
    """Rows of windows under a dark cornice; x is that of the facade."""
    height, colour = 3.2 * c.rng.integers(*c.style.floors, endpoint=True) + 1.0, c.tint(BUILDING)
    glass = shade(colour, 0.45) if c.rng.random() < 0.7 else shade(colour, 1.3)
    c.block(*sorted((x, x + np.sign(x) * 12)), 0, height, z0, z1, colour, BUILDING)
    for y in np.arange(1.0, height - 2, 3.2):
        for z in np.arange(z0 + 0.9, z1 - 1.5, 2.7):
            c.side(x, y, y + 1.7, z, z + 1.4, glass)
    c.side(x, height - 0.5, height, z0, z1, shade(colour, 0.65))


def barrier(c: Canvas, x: float, z0: float, z1: float, train_id: int) -> None:
    """A wall of courses, or a fence of pickets with a rail."""
    height, colour = 2.3 if train_id == WALL else 1.6, c.tint(train_id)
    c.side(x, 0, height, z0, z1, shade(colour, c.light(x)), train_id)
    if train_id == WALL:
        for y in np.arange(0.4, height, 0.45):
            c.side(x, y, y + 0.1, z0, z1, shade(colour, 0.7))
    else:
        for z in np.arange(z0, z1, 0.5):
            c.side(x, 0, height, z, z + 0.22, shade(colour, 0.5))
    c.side(x, height - 0.35, height - 0.1, z0, z1, shade(colour, 1.25))


def foliage(c: Canvas, x: float, y: float, radius: float, z: float) -> None:
    """A crown of overlapping leaf clumps, lighter towards the top."""
    colour = c.tint(VEGETATION)
    for dx, dy in c.rng.uniform(-0.7, 0.7, (7, 2)).tolist():
        c.disc(x + dx * radius, y + dy * radius, 0.55 * radius, z, shade(colour, 1.0 + 0.35 * dy), VEGETATION)


# Painters of objects that stand on the ground at x and z


def tree(c: Canvas, x: float, z: float) -> None:
    height = c.rng.uniform(3.5, 6.0)
    c.front(x - 0.25, x + 0.25, 0, height, z, (84, 66, 50), VEGETATION)
    foliage(c, x, height, c.rng.uniform(1.8, 2.6), z)


def lamp_post(c: Canvas, x: float, z: float) -> None:
    colour = c.tint(POLE)
    c.front(x - 0.2, x + 0.2, 0, 6.5, z, colour, POLE)
    c.front(*sorted((x, x - np.sign(x) * 2.0)), 6.0, 6.5, z, colour, POLE)


def traffic_light(c: Canvas, x: float, z: float) -> None:
    """A dark box on a pole, one of its three lamps lit."""
    c.front(x - 0.2, x + 0.2, 0, 4.0, z, c.tint(POLE), POLE)
    c.front(x - 0.7, x + 0.7, 2.4, 5.4, z, c.tint(LIGHT), LIGHT)
    lit = c.rng.integers(3)
    for i, colour in enumerate(((40, 230, 90), (250, 190, 30), (250, 40, 30))):
        c.disc(x, 2.95 + 0.95 * i, 0.4, z, shade(colour, 1.0 if i == lit else 0.25))


def traffic_sign(c: Canvas, x: float, z: float) -> None:
    """A red-rimmed triangle, a blue disc or a blue square on a pole."""
    c.front(x - 0.2, x + 0.2, 0, 2.8, z, c.tint(POLE), POLE)
    colour, shape = c.tint(SIGN), c.rng.integers(3)
    if shape == 0:
        for size, fill in ((1.3, (205, 40, 40)), (0.7, (240, 236, 225))):
            foot = 3.0 - 0.5 * size
            c.polygon([(x - size, foot, z), (x + size, foot, z), (x, 3.0 + size, z)], fill, SIGN)
    elif shape == 1:
        c.disc(x, 3.2, 1.0, z, shade(colour, 1.7), SIGN)
        c.disc(x, 3.2, 0.75, z, colour)
    else:
        c.front(x - 0.9, x + 0.9, 2.2, 4.0, z, colour, SIGN)
        c.front(x - 0.4, x + 0.4, 2.7, 3.5, z, (235, 235, 230))


def person(c: Canvas, x: float, z: float, train_id: int = PERSON, foot: float = 0.0) -> None:
    """Two legs, which end at the height `foot`, a body and a head."""
    clothes, trousers, taller = c.tint(train_id), shade(c.tint(train_id), 0.45), c.rng.uniform(-0.1, 0.1)
    c.front(x - 0.36, x - 0.04, foot, 1.1, z, trousers, train_id)
    c.front(x + 0.04, x + 0.36, foot, 1.1, z, trousers, train_id)
    c.front(x - 0.5, x + 0.5, 1.05, 1.9 + taller, z, clothes, train_id)
    c.disc(x, 2.12 + taller, 0.27, z, (206, 160, 130), train_id)


def bicycle(c: Canvas, x: float, z: float) -> None:
    """Two wheels, a light frame and a handlebar, from the side."""
    for wheel in (x - 0.75, x + 0.75):
        c.disc(wheel, 0.55, 0.55, z, (26, 26, 30), BICYCLE)
        c.disc(wheel, 0.55, 0.3, z, (150, 150, 150))
    frame = [(x - 0.75, 0.4, z), (x - 0.4, 1.25, z), (x + 0.55, 1.3, z), (x + 0.15, 0.4, z)]
    c.polygon(frame, c.tint(BICYCLE), BICYCLE)
    c.front(x + 0.4, x + 0.75, 1.3, 1.5, z, (30, 30, 34), BICYCLE)


def motorcycle(c: Canvas, x: float, z: float) -> None:
    """Thick wheels under a heavy body with a tank and a lamp, from the side."""
    colour = c.tint(MOTORCYCLE)
    for wheel in (x - 0.95, x + 0.95):
        c.disc(wheel, 0.5, 0.5, z, (22, 20, 22), MOTORCYCLE)
    c.front(x - 1.15, x + 0.75, 0.5, 1.25, z, colour, MOTORCYCLE)
    c.front(x + 0.45, x + 0.95, 1.05, 1.55, z, shade(colour, 1.6), MOTORCYCLE)
    c.disc(x + 0.95, 1.3, 0.18, z, (250, 240, 190))


def rider(c: Canvas, x: float, z: float) -> None:
    """A helmeted person on a bicycle or, less often, on a motorcycle."""
    (bicycle if c.rng.random() < 0.6 else motorcycle)(c, x, z)
    person(c, x - 0.1, z, RIDER, foot=0.6)
    c.disc(x - 0.1, 2.25, 0.3, z, (235, 230, 60), RIDER)


def car(c: Canvas, x: float, z: float) -> None:
    """From behind with its red lamps or, one in four, from the side."""
    across = c.rng.random() < 0.25
    half, length, radius = (2.1, 1.7, 0.36) if across else (0.9, 4.2, 0.25)
    colour, ends = c.tint(CAR), (x - 0.65 * half, x + 0.65 * half)
    c.level(x - half - 0.2, x + half + 0.2, 0, z - 0.3, z + length, shade(c.asphalt, 0.75 - c.style.sun))
    c.block(x - half, x + half, 0.3, 0.9, z, z + length, colour, CAR)
    c.block(x - 0.75 * half, x + 0.75 * half, 0.9, 1.45, z + 0.1, z + 0.75 * length, shade(colour, 0.9), CAR)
    c.front(*ends, 0.95, 1.32, z + 0.1, (44, 52, 62))
    for end in ends:
        c.disc(end, radius, radius, z, (24, 24, 26), CAR)
        if not across:
            c.disc(end, 0.74, 0.13, z, (220, 30, 30))


def large_vehicle(c: Canvas, x: float, z: float, train_id: int) -> None:
    """Truck: a ribbed box with a cab. Bus: many panes. Train: long, striped, no wheels."""
    across = train_id == TRAIN or c.rng.random() < 0.5
    half = {TRUCK: 3.2, BUS: 4.5, TRAIN: 9.0}[train_id] if across else 1.25
    length, colour, dark = 2.5 if across else 8.0, c.tint(train_id), (42, 50, 60)
    x0, x1 = x - half, x + half
    c.level(x0, x1, 0, z - 0.3, z + length, shade(c.asphalt, 0.75 - c.style.sun))
    side = c.block(x0, x1, 0.7 if train_id == TRUCK else 0.3, 3.3, z, z + length, colour, train_id)
    if train_id == TRUCK:
        for rib in np.arange(x0 + 0.5, x1, 0.8):
            c.front(rib, rib + 0.1, 1.0, 3.2, z, shade(colour, 0.82))
        if across:
            c.front(x1, x1 + 1.6, 0.5, 2.7, z, shade(c.tint(CAR), 0.9), TRUCK)
            c.front(x1 + 0.5, x1 + 1.5, 1.6, 2.5, z, dark)
    else:
        c.front(x0 + 0.15, x1 - 0.15, 1.6, 2.6, z, dark)
        if side is not None:
            c.side(side, 1.6, 2.6, z + 0.4, z + length - 0.4, dark)
        for bar in np.arange(x0 + 1.3, x1 - 0.5, 1.2 if train_id == BUS else 3.0):
            c.front(bar, bar + 0.2, 0.4, 3.2, z, shade(colour, 1.0 if train_id == BUS else 1.5))
    if train_id == TRAIN:
        c.front(x0, x1, 1.0, 1.3, z, shade(colour, 1.9))
        c.front(x0, x1, 3.2, 3.6, z, shade(colour, 0.6), TRAIN)
    else:
        for wheel in (x - 0.7 * half, x + 0.7 * half):
            c.disc(wheel, 0.45, 0.45, z, (24, 24, 26), train_id)


# From a scene to an image


def draw_scene(style: Style, size: tuple[int, int], index: int, rng: np.random.Generator):
    """One street scene: RGB image (H, W, 3) uint8 and its map of train ids (H, W) uint8, void 255."""
    c = Canvas(style, size, rng)
    # Two rare classes in turn: of any nine images in a row each of the nine classes is in two.
    wanted = {RARE[index % 9], RARE[(4 * index + 2) % 9]}
    wanted |= {train_id for train_id in RARE if rng.random() < 0.06}
    road = rng.uniform(*style.road)
    edge = road + rng.uniform(*style.sidewalk)
    street(c, road, edge, TERRAIN in wanted)
    plots(c, edge, [train_id for train_id in (WALL, FENCE) if train_id in wanted])

    lanes, kerbs = (-0.75 * road, -0.3 * road, 0.3 * road, 0.75 * road), (-road - 0.4, road + 0.4)
    paths = ((road + edge) / 2, edge - 1)  # where people walk on the sidewalk
    walks = (*paths, *np.negative(paths), rng.uniform(-road, road))
    objects = []  # (z, painter, x, more arguments)

    def place(painter, number, nearest, farthest, places, *more):
        for _ in range(number):
            objects.append((rng.uniform(nearest, farthest), painter, rng.choice(places), *more))

    place(car, rng.poisson(style.cars), 7, 32, lanes)
    place(person, rng.poisson(style.people), 7, 18, walks)
    place(tree, rng.poisson(3.0), 10, 34, (0.5 - edge, edge - 0.5))
    place(lamp_post, rng.poisson(1.5), 9, 20, kerbs)
    place(traffic_light, rng.poisson(1.0), 9, 20, kerbs)
    place(traffic_sign, rng.poisson(1.2), 9, 20, kerbs)
    place(motorcycle, MOTORCYCLE in wanted, 7, 14, lanes)
    place(rider, RIDER in wanted, 7, 12, lanes)
    place(bicycle, BICYCLE in wanted, 7, 12, (-paths[0], paths[0]))
    place(large_vehicle, TRUCK in wanted, 12, 24, lanes, TRUCK)
    place(large_vehicle, BUS in wanted, 12, 24, lanes, BUS)
    place(large_vehicle, TRAIN in wanted, 20, 30, (-6, 6), TRAIN)
    for z, painter, x, *more in sorted(objects, key=lambda item: -item[0]):
        painter(c, x, z, *more)

    label = np.array(c.label)
    image = develop(c, label)
    if rng.random() < style.hood:
        top = size[1] - rng.integers(3, 9)
        image[top:], label[top:] = (30, 32, 34), IGNORE
    return image, label


def develop(c: Canvas, label: np.ndarray) -> np.ndarray:
    """The optics over the flat colours: texture, haze, grading, vignette, blur, noise; (H, W, 3) uint8."""
    style, (height, width) = c.style, label.shape
    image = np.asarray(c.image, np.float32) / 255
    for cell in sorted({look.cell for look in LOOKS}):
        grain = np.zeros(256, np.float32)
        grain[:19] = [look.grain * (look.cell == cell) for look in LOOKS]
        blobs = cell * c.blend(1, style.cell)  # pixels
        noise = c.rng.standard_normal((int(height / blobs) + 1, int(width / blobs) + 1), np.float32)
        noise = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR))
        image *= (1 + c.blend(1, style.grain) * grain[label] * noise)[..., None]

    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    depth = np.asarray(c.depth)
    ground = np.minimum(c.focal * style.camera / np.maximum(rows - c.horizon, 0.1), FAR)
    clear = np.exp(-c.blend(0, style.haze) * np.where(depth == 0, ground, depth))[..., None]
    image = image * clear + np.float32(style.haze_colour) * (1 - clear)

    grey = image.mean(2, keepdims=True)
    image = grey + (image - grey) * c.blend(1, style.saturation)
    image = (0.5 + (image - 0.5) * c.blend(1, style.contrast)) * c.blend((1, 1, 1), style.cast)
    corners = 2 * ((rows / height - 0.5) ** 2 + (columns / width - 0.5) ** 2)
    image *= (1 - c.blend(0, style.vignette) * corners)[..., None]

    picture = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(float(c.blend(0, style.blur))))
    noise = c.rng.standard_normal((height, width, 3), np.float32) * c.blend(0.005, style.noise) * 255
    return (np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)
