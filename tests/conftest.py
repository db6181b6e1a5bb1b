"""Shared test settings: one thread per worker, a private cache, and a last line that counts."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    "Two workers on two cores: more threads would only wait for each other."
    import torch
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    "The line that `make test` promises."
    count = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")}
    terminalreporter.write_line(f"{count['passed']} passed, {count['failed'] + count['error']} failed, {count['skipped']} skipped")
