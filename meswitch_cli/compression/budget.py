"""Which of its settings each tensor gets, so that all fit into so many bytes and cost as little as they can.

A knapsack with one choice a tensor. Where the points (bytes, cost) of each tensor are reduced to their lower convex
hull, taking steps along the hulls by cost saved a byte is optimal but for the last step (Everett 1963; Shoham and
Gersho 1988 for bits of quantisers); what any choice could still gain is at most what the Lagrangian dual says.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Point(NamedTuple):
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Allocation:
    """Attributes:
    chosen: by tensor, the index of its point.
    nbytes, cost: of all of them.
    bound: no choice that fits costs less.
    """

    chosen: tuple[int, ...]
    nbytes: int
    cost: float
    bound: float


class _Step(NamedTuple):
    """A step along a tensor's hull; the steepest sorts first, then the first tensor's."""

    slope: float
    item: int
    place: int


def least_nbytes(items: Sequence[Sequence[Point]]) -> int:
    return sum(min(point.nbytes for point in points) for points in items)


def allocate(items: Sequence[Sequence[Point]], budget: int) -> Allocation:
    """Choose a point of each tensor.

    Raises:
        ValueError: not even the smallest points fit.
    """
    hulls = [lower_hull(points) for points in items]
    spent = sum(points[hull[0]].nbytes for points, hull in zip(items, hulls, strict=True))
    if spent > budget:
        raise ValueError(f"{spent} bytes at least, {budget} allowed")
    places = [0] * len(items)

    def points_of(item: int, place: int) -> tuple[Point, Point]:
        hull = hulls[item]
        return items[item][hull[place]], items[item][hull[place + 1]]

    def step(item: int) -> list[_Step]:
        place = places[item]
        if place + 1 == len(hulls[item]):
            return []
        now, then = points_of(item, place)
        return [_Step((then.cost - now.cost) / (then.nbytes - now.nbytes), item, place)]

    waiting = [found for item in range(len(items)) for found in step(item)]
    heapq.heapify(waiting)
    bound: float | None = None
    while waiting:
        slope, item, place = heapq.heappop(waiting)
        now, then = points_of(item, place)
        more = then.nbytes - now.nbytes
        if spent + more > budget:
            if bound is None:  # the dual's value at this slope: the step's part that would fit
                bound = _cost(items, hulls, places) + slope * (budget - spent)
            continue
        spent += more
        places[item] += 1
        for found in step(item):
            heapq.heappush(waiting, found)
    chosen = [hull[place] for hull, place in zip(hulls, places, strict=True)]
    spent = _fill(items, chosen, spent, budget)
    cost = sum(points[index].cost for points, index in zip(items, chosen, strict=True))
    return Allocation(tuple(chosen), spent, cost, cost if bound is None else min(cost, bound))


def lower_hull(points: Sequence[Point]) -> list[int]:
    """Indices of the points on the lower convex hull, by bytes: from the smallest to the one that costs least."""
    order = sorted(range(len(points)), key=lambda index: (points[index].nbytes, points[index].cost, index))
    hull: list[int] = []
    for index in order:
        point = points[index]
        if hull and (point.cost >= points[hull[-1]].cost or point.nbytes == points[hull[-1]].nbytes):
            continue
        while len(hull) > 1:
            first, second = points[hull[-2]], points[hull[-1]]
            over = (second.cost - first.cost) * (point.nbytes - first.nbytes)
            if over < (point.cost - first.cost) * (second.nbytes - first.nbytes):
                break
            hull.pop()
        hull.append(index)
    return hull


def near_hull(points: Sequence[Point], margin: float) -> list[bool]:
    """Which points cost at most `margin` times what the lower convex hull does at their bytes."""
    hull = [points[index] for index in lower_hull(points)]

    def hull_cost(nbytes: int) -> float:
        place = bisect.bisect([point.nbytes for point in hull], nbytes)
        if place == len(hull):
            return hull[-1].cost
        now, then = hull[place - 1], hull[place]
        return now.cost + (then.cost - now.cost) * (nbytes - now.nbytes) / (then.nbytes - now.nbytes)

    return [point.cost <= margin * hull_cost(point.nbytes) for point in points]


def _cost(items: Sequence[Sequence[Point]], hulls: Sequence[Sequence[int]], places: Sequence[int]) -> float:
    return sum(points[hull[place]].cost for points, hull, place in zip(items, hulls, places, strict=True))


def _fill(items: Sequence[Sequence[Point]], chosen: list[int], spent: int, budget: int) -> int:
    """Spend what is left where one tensor's other point fits and saves most, as often as there is one."""
    while True:
        best: tuple[float, int, int] | None = None
        for item, points in enumerate(items):
            now = points[chosen[item]]
            for index, point in enumerate(points):
                saved = now.cost - point.cost
                if saved > 0 and spent + point.nbytes - now.nbytes <= budget and (best is None or saved > best[0]):
                    best = saved, item, index
        if best is None:
            return spent
        _, item, index = best
        spent += items[item][index].nbytes - items[item][chosen[item]].nbytes
        chosen[item] = index
