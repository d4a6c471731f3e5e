import threading

import pytest
import torch

from meswitch_cli.delta.sweep import in_order


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _threads_of_a_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_results_come_in_order(two_threads: None) -> None:
    assert list(in_order(lambda item: item * item, range(20), parallel=True)) == [n * n for n in range(20)]


def test_later_threads_get_the_threads_that_torch_was_set_to(two_threads: None) -> None:
    assert list(in_order(lambda item: torch.get_num_threads(), range(4), parallel=True)) == [1, 1, 1, 1]
    assert torch.get_num_threads() == 2
    assert _threads_of_a_new_thread() == 2
