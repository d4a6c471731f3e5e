import gc

import torch

from meswitch_cli.checkpoint.buffers import SMALLEST, BufferPool

SIZE = 4 * SMALLEST


def test_memory_of_a_dropped_tensor_is_lent_again() -> None:
    pool = BufferPool()
    first = pool.empty(SIZE)
    address = first.data_ptr()
    del first
    assert pool.empty(SIZE - 10).data_ptr() == address


def test_a_view_holds_its_buffer() -> None:
    pool = BufferPool()
    first = pool.empty(SIZE)
    view = first.view(torch.float32)[7:9]
    view.fill_(3.0)
    del first
    gc.collect()
    other = pool.empty(SIZE)
    other.zero_()
    assert view.tolist() == [3.0, 3.0]
    parameter = torch.nn.Parameter(view, requires_grad=False)
    del view, other
    pool.empty(SIZE).zero_()
    assert parameter.tolist() == [3.0, 3.0]


def test_idle_buffers_make_room_for_those_that_fit() -> None:
    pool = BufferPool()
    held = [pool.empty(SIZE) for _ in range(3)]
    del held
    assert len(pool._idle) == 3
    assert pool.empty(3 * SIZE).nbytes == 3 * SIZE
    assert [buffer.nbytes for buffer in pool._idle] == [3 * SIZE]


def test_a_buffer_much_too_large_makes_room_too() -> None:
    pool = BufferPool()
    pool.empty(SIZE)
    assert pool.empty(SIZE // 2 - 1).nbytes == SIZE // 2 - 1
    assert [buffer.nbytes for buffer in pool._idle] == [SIZE // 2 - 1]
