"""Packaging for ardm_course: everything that can change lives in settings.ini."""
from configparser import ConfigParser
from pathlib import Path
import shlex
from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {name: shlex.split(cfg[f"{name}_requirements"]) for name in ("eval", "data", "serve", "dev") if f"{name}_requirements" in cfg}
# Released checkpoints travel with the wheel; corpora stay in the repository.
checkpoints = sorted(path for path in (root / "data" / "checkpoints").rglob("*") if path.is_file())
data_files = [(f"share/ardm_course/{path.parent.relative_to(root / 'data').as_posix()}", [path.relative_to(root).as_posix()]) for path in checkpoints]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    license="Apache-2.0",
    url=cfg["git_url"],
    packages=find_packages(include=["ardm_course", "ardm_course.*"]),
    package_data={"ardm_course": ["*.html"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"]), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    data_files=data_files,
    zip_safe=False,
)
