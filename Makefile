# Two commands on a fresh machine: `make run` and `make test`. Both make the environment first.
PYTHON ?= python3
# constraints.txt pins the torch that this course was tested with; CONSTRAINTS=/dev/null lets pip choose (another GPU, a newer torch).
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help env run test check lab docs slides bench codecs exercises editions timing notebooks readme clean-env

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(VENV)/.ready  ## make the virtual environment in .venv

$(VENV)/.ready: settings.ini setup.py constraints.txt requirements-no-deps.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "ardm_course needs Python 3.10 or newer; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[data,eval,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-no-deps.txt
	@$(BIN)/python -m pip install --quiet pesq==0.0.4 >/dev/null 2>&1 || \
		echo "The package pesq could not be compiled (it needs a C compiler and Python's headers). PESQ will be 'not measured'; everything else works."
	touch $@

run: env  ## the main job: train, speak, evaluate, report (TEXT="..." adds a sentence, TIER=small uses LibriTTS)
	TEXT='$(subst ','\'',$(TEXT))' ARDM_TIER=$(or $(TIER),toy) $(BIN)/ipython nbs/21_libritts.ipynb

test: env  ## every test and every notebook, in parallel
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

check: env  ## what CI asks of a commit: exporting and cleaning the notebooks changes nothing
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && git diff --exit-code -- nbs ardm_course

lab: env  ## open the course in JupyterLab (ARGS="--allow-root --no-browser" in a container)
	$(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

bench: env  ## speed of training and of generation, written to build/bench-*.json
	mkdir -p build
	$(BIN)/ardm-course bench train --json build/bench-train.json
	$(BIN)/ardm-course bench generate --json build/bench-generate.json

codecs: env  ## judge the released codecs on voices they know, voices they do not, and real people; written to data/results/codecs-*.json
	$(BIN)/ardm-course resynthesise stories --speakers 4001 4002 4003 4004 4006 4007 --out build/codecs/trained --json data/results/codecs-trained.json
	$(BIN)/ardm-course resynthesise stories --split train --speakers 3004 3008 4005 --limit 24 --out build/codecs/held-out --json data/results/codecs-held-out.json
	$(BIN)/ardm-course resynthesise real --limit 24 --out build/codecs/real --json data/results/codecs-real.json
	$(BIN)/ardm-course resynthesise librivox --codec griffin-lim --codec vocoder --codec wavevae --noise 0.1 0.2 0.3 0.5 --out build/codecs/librivox --json data/results/codecs-librivox.json

exercises: env  ## write the answer sheets' exercises into the notebooks
	$(BIN)/python -c "from ardm_course.editions import write_exercises; print(write_exercises())"

editions: env  ## learner's and instructor's notebooks, in build/
	$(BIN)/python -c "from ardm_course.editions import make_editions; print(make_editions('build'))"

timing: env  ## run every notebook in its fast version, and keep the seconds in data/results/timing.json
	$(BIN)/python -c "from ardm_course.editions import time_notebooks; print(time_notebooks()['total_s'])"

notebooks: env  ## run every notebook again and keep its outputs
	for notebook in nbs/[0-9]*.ipynb nbs/appendix/*.ipynb nbs/index.ipynb; do \
		$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=600 $$notebook && $(BIN)/nbdev_clean --fname $$notebook || exit 1; done

docs: env  ## the documentation site, in build/docs (open index.html; no network needed)
	rm -rf build/docs
	$(BIN)/python -c "from ardm_course.site import make_docs; print(make_docs('build/docs'))"

slides: env  ## reveal.js slides of the tagged cells, in build/slides
	rm -rf build/slides
	$(BIN)/python -c "from ardm_course.site import make_slides; print(make_slides('build/slides'))"

readme: env  ## render README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --to markdown --output-dir . --output README --NbConvertApp.output_files_dir=nbs/images \
		--TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=hide-input nbs/index.ipynb
	sed -i.bak -E 's#\]\(([0-9a-z][^):]*)\)#](nbs/\1)#g; s#\]\(\.\./#](#g; s#\]\(nbs/nbs/#](nbs/#g; s#!\[png\]#![The course map]#' README.md && rm README.md.bak

clean-env:  ## remove the virtual environment
	rm -rf $(VENV)
