"""The wheel works without the checkout and without notebook tools: what `pip install ardm_course` gives an engineer."""
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("nbdev", "fastcore", "execnb", "nbformat", "nbconvert", "IPython", "jupyterlab", "pytest", "torchaudio", "transformers", "matplotlib", "ipywidgets")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A virtual environment that holds the wheel, and sees this one's other packages."
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *folder.glob("*.whl")], check=True, capture_output=True, cwd=folder)
    packages = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], check=True, capture_output=True, text=True).stdout.strip()
    (Path(packages) / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run(python, code, folder):
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_needs_no_notebook_tools(installed, tmp_path):
    block = f"import sys\nfor tool in {TOOLS}: sys.modules[tool] = None\n"
    out = run(installed, block + "import ardm_course; from ardm_course import TTS, checks, recipes; print(ardm_course.__file__)", tmp_path)
    assert str(ROOT) not in out and "site-packages" in out


def test_released_checkpoint_speaks(installed, tmp_path):
    pytest.importorskip("hibari")
    code = "from ardm_course import TTS; speech = TTS.from_pretrained('ditar-toy')('Good morning.', steps=1, guidance=1.0); speech.save('out.wav'); print(speech.stop_reason)"
    assert run(installed, code, tmp_path).strip() in ("stop head", "length limit") and (tmp_path / "out.wav").stat().st_size > 10_000


def test_exercises_answer_without_the_checkout(installed, tmp_path):
    code = "from ardm_course.checks import check, find; print(bool(check('00b.1', find('00b.1').reference)), check('00b.1', lambda a, b, tolerance: abs(a - b) <= tolerance).mistake)"
    out = run(installed, f"import os; os.environ['ARDM_CACHE'] = {str(tmp_path)!r}\n" + code, tmp_path)
    assert out.startswith("True Your tolerance is absolute")


def test_the_command_is_installed(installed, tmp_path):
    out = subprocess.run([Path(installed).parent / "ardm-course", "--help"], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "speak" in out and "evaluate" in out


def test_the_page_is_in_the_wheel(installed, tmp_path):
    out = run(installed, "import ardm_course; from pathlib import Path; print(Path(ardm_course.__file__).with_name('page.html').read_text(encoding='utf-8')[:15])", tmp_path)
    assert out.lower().startswith("<!doctype html>")
