"""Where things stand in the report's drawings: plain geometry, no text of its own and no HTML.

The template draws what these give. Units are SVG user units; the y axis points down, as in SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 640.0, 440.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 20.0, 16.0, 56.0
SMALLEST, LOST_AREA = 30.0, 400.0  # squared radius of a marker with nothing lost, and what all of it lost adds
LETTER, LINE = 7.2, 15.0  # room that a letter and a line of label text take


@dataclass(frozen=True)
class Estimate:
    """A share with its interval, all in [0, 1]."""

    value: float
    low: float
    high: float


@dataclass
class Point:
    """A system in the trade-off plot; positions are filled in by `trade_off`.

    lost: share of usefulness lost, which the marker's area shows; None where it is not known.
    """

    name: str
    x: Estimate
    y: Estimate
    base: bool = False
    lost: float | None = None
    radius: float = 6.0
    cx: float = 0.0
    cy: float = 0.0
    bar_x: tuple[float, float] = (0.0, 0.0)
    bar_y: tuple[float, float] = (0.0, 0.0)
    label: tuple[float, float, str] = (0.0, 0.0, "start")


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Plot:
    points: list[Point]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def trade_off(points: Sequence[Point]) -> Plot:
    """False refusals (x) against harmful compliance (y), both from 0 to the highest interval's end."""
    reach_x, reach_y = _reach([p.x for p in points]), _reach([p.y for p in points])

    def across(value: float) -> float:
        return LEFT + value / reach_x * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - value / reach_y * (HEIGHT - TOP - BOTTOM)

    for point in points:
        point.radius = min(SMALLEST + LOST_AREA, SMALLEST + LOST_AREA * (point.lost or 0.0)) ** 0.5
        point.cx, point.cy = across(point.x.value), down(point.y.value)
        point.bar_x = across(point.x.low), across(point.x.high)
        point.bar_y = down(point.y.low), down(point.y.high)
    _place_labels(points)
    x_ticks = [Tick(across(v), _percent(v)) for v in _ticks(reach_x)]
    return Plot(list(points), x_ticks, [Tick(down(v), _percent(v)) for v in _ticks(reach_y)])


@dataclass(frozen=True)
class Cell:
    x: float
    y: float
    layer: int
    head: int
    value: float
    strength: float
    positive: bool
    chosen: bool


@dataclass(frozen=True)
class HeadMap:
    """A heat map with a row per layer. strength in [0, 1] is |value| over the largest one."""

    name: str
    cells: list[Cell]
    chosen: list[tuple[int, int]]
    size: tuple[float, float]
    cell: tuple[float, float]
    largest: float
    layer_ticks: list[Tick] = field(default_factory=list)
    head_ticks: list[Tick] = field(default_factory=list)
    left: float = 40.0
    top: float = 22.0


def head_map_figure(name: str, effects: Sequence[Sequence[float]], heads: Sequence[Sequence[int]]) -> HeadMap:
    """Indirect effects `[layers][heads]` as cells; `heads` are the chosen (layer, head) pairs."""
    layers, width = len(effects), len(effects[0])
    cell = (max(7.0, min(34.0, 560.0 / width)), max(7.0, min(18.0, 620.0 / layers)))
    largest = max((abs(v) for row in effects for v in row), default=0.0)
    chosen = {(int(layer), int(head)) for layer, head in heads}
    left, top = 40.0, 22.0
    cells = [
        Cell(
            left + h * cell[0],
            top + i * cell[1],
            i,
            h,
            v,
            abs(v) / largest if largest else 0.0,
            v >= 0,
            (i, h) in chosen,
        )
        for i, row in enumerate(effects)
        for h, v in enumerate(row)
    ]
    every_layer, every_head = -(-layers // 16), -(-width // 32)
    return HeadMap(
        name,
        cells,
        sorted(chosen),
        (left + width * cell[0] + 8, top + layers * cell[1] + 8),
        cell,
        largest,
        [Tick(top + (i + 0.5) * cell[1], str(i)) for i in range(0, layers, every_layer)],
        [Tick(left + (h + 0.5) * cell[0], str(h)) for h in range(0, width, every_head)],
    )


def _reach(estimates: Sequence[Estimate]) -> float:
    highest = max((e.high for e in estimates), default=1.0)
    return next(step for step in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0) if step >= min(1.0, highest) - 1e-9)


def _ticks(reach: float) -> list[float]:
    step = 0.02 if reach <= 0.1 else 0.05 if reach <= 0.3 else 0.1 if reach <= 0.6 else 0.2
    return [i * step for i in range(round(reach / step) + 1)]


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _place_labels(points: Sequence[Point]) -> None:
    """Each label beside its point, in the first of several places where it covers no other label or point."""
    taken = [(p.cx - p.radius, p.cy - p.radius, p.cx + p.radius, p.cy + p.radius) for p in points]
    for point in points:
        out = point.radius - SMALLEST**0.5  # a larger marker pushes its label away
        width = LETTER * len(point.name)
        best: tuple[float, tuple[float, float, str], tuple[float, float, float, float]] | None = None
        for dx, dy, anchor in _PLACES:
            x = point.cx + dx + (out if anchor == "start" else -out)
            y = point.cy + dy + (-out if dy < 0 else out)
            left = x if anchor == "start" else x - width
            box = (left, y - LINE + 3, left + width, y + 3)
            outside = left < LEFT or box[2] > WIDTH or box[1] < 0 or box[3] > HEIGHT - BOTTOM
            cost = sum(_overlap(box, other) for other in taken) + (1e6 if outside else 0)
            if best is None or cost < best[0]:
                best = (cost, (x, y, anchor), box)
            if cost == 0:
                break
        if best is not None:
            point.label = best[1]
            taken.append(best[2])


_PLACES = [
    (dx, dy, anchor)
    for dy in (-9.0, 18.0, -25.0, 34.0, -41.0, 50.0, -57.0, 66.0)
    for dx, anchor in ((9.0, "start"), (-9.0, "end"))
]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
