"""`python tests bench soak` in small: one code, so that the page shows what is tested."""

from __future__ import annotations

from server.family import Family

from benchmarks.soak import leaks, soak


def test_three_hundred_requests_leave_nothing_behind(family: Family) -> None:
    result = soak(family, requests=300, warm_up=100)
    assert leaks(result, memory_mb=25) == []
    assert sum(result["after"]["results"].values()) == 300 and len(result["after"]["results"]) == 6
    assert result["after"]["evictions"] > 0
