"""Arenas are the process's: each count is taken in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ARENAS = """
import ctypes, sys, threading
from meswitch_cli.commands.host_memory import share_one_arena
if sys.argv[2] == "shared":
    share_one_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.fopen.restype, libc.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
together = threading.Barrier(3)
def allocate():
    together.wait()
    for _ in range(1000):
        libc.malloc(4096)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
report = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, report)
libc.fclose(report)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no arenas to share")
def test_threads_share_one_arena(tmp_path: Path) -> None:
    arenas = {}
    for how in ("shared", "apart"):
        report = tmp_path / how
        subprocess.run([sys.executable, "-c", ARENAS, str(report), how], check=True)
        arenas[how] = report.read_text().count("<heap nr=")
    assert arenas["shared"] == 1
    assert arenas["apart"] > 1
