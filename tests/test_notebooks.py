"""Every notebook runs from top to bottom in an interpreter of its own, in its fast version."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_runs(notebook):
    command = [sys.executable, "-c", f"from nbdev.test import nbdev_test; nbdev_test(path={notebook!r}, n_workers=0, do_print=True)"]
    environment = {**os.environ, "ARDM_FAST": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{notebook}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
