import itertools
import random

import pytest

from meswitch_cli.compression.budget import Allocation, Point, allocate, least_nbytes, lower_hull

Items = list[list[Point]]


def _random_items(seed: int, tensors: int, points: int) -> Items:
    drawn = random.Random(seed)
    return [
        [
            Point(drawn.randint(1, 40), drawn.choice([drawn.random(), 2.0 ** -drawn.randint(0, 12)]))
            for _ in range(points)
        ]
        for _ in range(tensors)
    ]


def _best(items: Items, budget: int) -> float:
    totals = (
        (sum(point.nbytes for point in choice), sum(point.cost for point in choice))
        for choice in itertools.product(*items)
    )
    return min(cost for nbytes, cost in totals if nbytes <= budget)


def _check_sums(items: Items, found: Allocation) -> None:
    points = [own[index] for own, index in zip(items, found.chosen, strict=True)]
    assert found.nbytes == sum(point.nbytes for point in points)
    assert found.cost == pytest.approx(sum(point.cost for point in points))


@pytest.mark.parametrize("seed", range(40))
def test_allocation_fits_and_no_choice_is_below_its_bound(seed: int) -> None:
    items = _random_items(seed, tensors=4, points=6)
    least, most = least_nbytes(items), sum(max(point.nbytes for point in points) for points in items)
    for budget in {least, (2 * least + most) // 3, (least + 2 * most) // 3, most}:
        found = allocate(items, budget)
        best = _best(items, budget)
        _check_sums(items, found)
        assert found.nbytes <= budget
        assert found.bound <= best + 1e-12
        assert best <= found.cost + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_with_many_tensors_little_is_left_to_gain(seed: int) -> None:
    items = _random_items(seed, tensors=200, points=8)
    found = allocate(items, 2000)
    _check_sums(items, found)
    assert found.nbytes <= 2000
    assert found.bound <= found.cost <= 1.01 * found.bound


def test_more_than_everything_takes_is_spent_on_the_least_cost() -> None:
    items = [[Point(1, 3.0), Point(5, 1.0), Point(9, 2.0)], [Point(2, 1.0), Point(3, 0.0)]]
    assert allocate(items, 10**6) == Allocation((1, 1), 8, 1.0, 1.0)


def test_a_point_off_the_hull_fills_what_is_left() -> None:
    items = [[Point(0, 10.0), Point(6, 6.0), Point(10, 0.0)]]
    assert lower_hull(items[0]) == [0, 2]
    found = allocate(items, 7)
    assert (found.chosen, found.cost) == ((1,), 6.0)
    assert found.bound == pytest.approx(3.0)


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes at least, 2 allowed"):
        allocate([[Point(3, 1.0), Point(4, 0.0)]], 2)


def test_equal_tensors_are_served_in_order() -> None:
    points = [Point(0, 1.0), Point(1, 0.0)]
    assert allocate([points] * 4, 2).chosen == (1, 1, 0, 0)
