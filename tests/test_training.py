"Trainer: schedules, batches, averages, checkpoints under SIGKILL, NaN, accumulation, two processes."
import json, math, os, subprocess, sys, textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from ardm_course import training
from ardm_course.core import CourseError, seed_everything
from ardm_course.training import (EMA, Callback, LivePlot, Progress, TrainConfig, Trainer, TrainState, batch_stream, bucket_batches,
                                  checkpoint_tensors, clip_gradients, cosine, curve, held_out, last_checkpoint, learning_rate_at,
                                  load_weights, make_optimizer, padding_waste, read_log, speed, subnormals_as_zero, training_steps, wsd)

# A regression on rows of many lengths; shared with the child processes below.
COMMON = textwrap.dedent('''
    import torch
    from torch import nn

    class Rows:
        frame_rate = 10.0
        def __init__(self, count=60, seed=0):
            g = torch.Generator().manual_seed(seed)
            self.lengths = torch.randint(5, 40, (count,), generator=g).tolist()
            self.items = [torch.randn(length, 4, generator=g) for length in self.lengths]
        def __len__(self): return len(self.items)
        def __getitem__(self, number): return self.items[number]

    def collate(items):
        pad = nn.utils.rnn.pad_sequence
        return {"x": pad(items, batch_first=True), "mask": pad([torch.ones(len(x)) for x in items], batch_first=True)}

    class Model(nn.Module):
        def __init__(self, noise=0.1, width=16):
            super().__init__()
            self.noise, self.unused, self.progress = noise, nn.Linear(2, 2), 0.0
            self.net = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, 1))
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))
            self.register_buffer("table", torch.ones(3), persistent=False)
        def forward(self, batch):
            x, mask = batch["x"], batch["mask"]
            self.seen += self.training
            shaken = x + self.noise * torch.randn_like(x) if self.noise else x
            error = (self.net(shaken)[..., 0] - x.prod(-1)).square()
            return {"loss": (error * mask).sum() / mask.sum(), "weight": mask.sum(), "frames": mask.sum(), "size": 1.0, "told": self.progress}
''')
exec(COMMON)


def trainer_for(folder, make=Model, data=None, callbacks=(), validate=None, log_with=None, seed=0, **settings):
    seed_everything(seed)
    settings = {"steps": 40, "batch_frames": 200, "warmup": 5, "log_every": 7, "checkpoint_every": 10, "validate_every": 15, **settings}
    return Trainer(make(), data or Rows(), collate, TrainConfig(**settings), folder, callbacks, validate, log_with)


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same(a, b):
    a, b = checkpoint_tensors(a), checkpoint_tensors(b)
    return all(a[file].keys() == b[file].keys() and all(torch.equal(a[file][n], b[file][n]) for n in a[file]) for file in a)


# --- schedules, batches, averages ---

def test_schedules():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0, decay_share=0.2, final_learning_rate_share=0.1)
    rate = lambda step, kind: learning_rate_at(step / 100, step, TrainConfig(**{**vars(config), "schedule": kind}))
    for kind in ("wsd", "cosine"):
        assert rate(0, kind) == pytest.approx(0.1, rel=0.01) and rate(4, kind) < rate(9, kind)
        assert rate(100, kind) == pytest.approx(0.1)
    assert all(rate(step, "wsd") == 1.0 for step in range(10, 80))
    assert rate(90, "wsd") == pytest.approx(0.55) and cosine(0.5, config) == pytest.approx(0.55)
    assert wsd(1.5, config) == cosine(1.5, config) == pytest.approx(0.1)  # a clock may overshoot
    with pytest.raises(CourseError, match="wsd, cosine"):
        rate(3, "linear")


@pytest.mark.parametrize("seed", range(3))
def test_bucket_batches(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 400, (500,), generator=g).tolist()
    batches = bucket_batches(lengths, 4000, seed, 1)
    assert batches == bucket_batches(lengths, 4000, seed, 1) != bucket_batches(lengths, 4000, seed, 2)
    assert sorted(sum(batches, [])) == list(range(500))
    assert all(max(lengths[i] for i in b) * len(b) <= 4000 for b in batches)
    assert padding_waste(lengths, batches) <= 0.1
    firsts = [max(lengths[i] for i in b) for b in batches]
    assert firsts != sorted(firsts)
    assert sum(len(b) == 1 for b in batches) < 5


def test_bucket_batches_at_the_edges():
    assert bucket_batches([], 100) == [] and padding_waste([], []) == 0
    assert bucket_batches([500], 100) == [[0]]  # longer than the budget
    assert sorted(map(sorted, bucket_batches([10, 10, 900], 100))) == [[0, 1], [2]]
    assert padding_waste([1, 2, 4, 800], bucket_batches([1, 2, 4, 800], 10**6)) <= 0.1


def test_batch_stream_goes_on():
    config, lengths = TrainConfig(batch_frames=200), Rows().lengths
    state, stream = TrainState(), None
    straight = batch_stream(lengths, config, TrainState())
    for number in range(40):
        if number % 7 == 0:  # also right after an epoch's last batch
            stream = batch_stream(lengths, config, TrainState(**vars(state)))
            state = stream.gi_frame.f_locals["state"]
        assert next(stream) == next(straight)
    assert state.epoch > 1


def test_ema():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema, start = EMA(model, 0.9), model.weight.detach().clone()
    expected = start.clone()
    for step in range(30):
        model.weight.data += 1
        ema.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(ema.average[0], expected) and list(ema.state_dict()) == ["weight"]
    live = model.weight.detach().clone()
    with pytest.raises(RuntimeError), ema.swapped():
        assert torch.equal(model.weight, ema.average[0])
        raise RuntimeError
    assert torch.equal(model.weight, live)


def test_clip_and_groups():
    weights = [nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    for w in weights[:2]:
        w.grad = torch.randn_like(w)
    before = [w.grad.clone() for w in weights[:2]]
    norm = clip_gradients(weights, 2.0, 0.5)
    assert norm == pytest.approx(2 * torch.cat([g.flatten() for g in before]).norm().item(), rel=1e-5)
    assert torch.cat([w.grad.flatten() for w in weights[:2]]).norm() == pytest.approx(0.5, rel=1e-4)
    clip_gradients(weights, 1.0, math.inf)
    assert torch.cat([w.grad.flatten() for w in weights[:2]]).norm() == pytest.approx(0.5, rel=1e-4)
    decays, plain = make_optimizer(Model(), TrainConfig(weight_decay=0.3)).param_groups
    assert decays["weight_decay"] == 0.3 and all(w.dim() > 1 for w in decays["params"])
    assert plain["weight_decay"] == 0 and all(w.dim() == 1 for w in plain["params"])


# --- the run ---

def test_fit_equals_a_plain_loop(tmp_path):
    trainer = trainer_for(tmp_path, steps=25, accumulate=2)
    trainer.fit()
    seed_everything(0)
    model, config, state, data = Model(), trainer.config, TrainState(), Rows()
    optimizer, stream = make_optimizer(model, config), batch_stream(data.lengths, config, state)
    for step in range(25):
        training.seed_step(0, step, 0, torch.device("cpu"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step / 25, step, config)
        outs = [model(collate([data[i] for i in next(stream)])) for _ in range(2)]
        optimizer.zero_grad()
        (sum(o["loss"] * o["weight"] for o in outs) / sum(o["weight"] for o in outs)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_decay_takes_more_batches(tmp_path):
    "Twice the frames per step in the last part of a wsd run, none twice; and it resumes like any other run."
    plans = {"steps": 20, "decay_share": 0.5, "log_every": 1, "checkpoint_every": 7}
    frames = {}
    for times in (1, 3):
        trainer = trainer_for(tmp_path / str(times), decay_batches=times, **plans)
        frames[times] = curve(trainer.fit(), "frames")[1]
        stream = batch_stream(trainer.data.lengths, trainer.config, TrainState())
        taken = [sum(trainer.data.lengths[i] for i in next(stream)) for _ in range(11 + 9 * times)]
        assert frames[times][-1] == sum(taken)
    assert frames[1][:11] == frames[3][:11] and frames[3][-1] > 1.5 * frames[1][-1]
    for stop in (9, 15):
        trainer = trainer_for(tmp_path / "left", decay_batches=3, **plans)
        for _ in training_steps(trainer):
            if trainer.state.step == stop: break
    again = trainer_for(tmp_path / "left", decay_batches=3, **plans)
    again.fit()
    assert curve(again.history, "frames")[1] == frames[3]


def test_log_and_validation(tmp_path):
    moments = []
    class Watch(Callback):
        def after_validate(self, trainer): moments.append(trainer.state.step)
    validate = held_out(Rows(20, seed=1), collate, 300)
    def noisy(model):
        assert not model.training and not torch.is_grad_enabled()
        return {**validate(model), "draw": torch.randn(()), "gone": float("nan")}
    trainer = trainer_for(tmp_path / "a", callbacks=[Watch()], validate=noisy)
    history = trainer.fit()
    assert history == read_log(tmp_path / "a/log.jsonl") or any(math.isnan(v) for row in history for v in row.values())
    assert curve(history, "loss")[0] == [7, 14, 21, 28, 35, 40] and moments == curve(history, "valid_loss")[0] == [15, 30, 40]
    assert len(set(curve(history, "valid_draw")[1])) == 1  # the same numbers each time
    assert curve(history, "size")[1] == [1.0] * 6 and speed(history, 10.0) > 0
    assert json.loads((tmp_path / "a/log.jsonl").read_text().splitlines()[0])["frames"] > 500
    quiet = trainer_for(tmp_path / "b")
    quiet.fit()
    assert same(trainer, quiet)  # validation leaves no trace
    averaged = load_weights(Model(), tmp_path / "a").eval()
    training.seed_step(0, 0, 0, torch.device("cpu"))
    assert validate(averaged)["loss"] == pytest.approx(curve(history, "valid_loss")[1][-1], rel=1e-6)
    raw = load_weights(Model(), tmp_path / "a", ema=False)
    assert torch.equal(raw.net[0].weight, trainer.model.net[0].weight) and not torch.equal(raw.net[0].weight, averaged.net[0].weight)


def test_leave_and_resume(tmp_path):
    straight, noise = trainer_for(tmp_path / "a", steps=33), torch.nn.Dropout()
    straight.fit()
    for seed, stop in enumerate((3, 10, 24, 25)):  # a resumed model's own initial weights do not matter
        trainer = trainer_for(tmp_path / "b", seed=seed, steps=33)
        for _ in training_steps(trainer):
            noise(torch.ones(7))  # stray draws change nothing
            if trainer.state.step == stop:
                break
    again = trainer_for(tmp_path / "b", steps=33)
    again.fit()
    assert same(straight, again) and timeless(again.history) == timeless(straight.history)
    assert timeless(read_log(tmp_path / "b/log.jsonl")) == timeless(straight.history)
    assert again.fit() == again.history and again.state.step == 33  # nothing left to do


def test_minutes(tmp_path):
    trainer = trainer_for(tmp_path, steps=10**9, minutes=0.02, warmup=1)
    history = trainer.fit()
    assert 1.2 <= trainer.state.seconds and trainer.state.step < 10**9 and trainer.progress >= 1
    assert history[-1]["lr"] < 0.2 * trainer.config.learning_rate
    again = trainer_for(tmp_path, steps=10**9, minutes=0.02)
    again.fit()
    assert again.state.step == trainer.state.step  # the time is spent


# --- faults ---

class Poison(Rows):
    at = 13
    def __getitem__(self, number):
        return super().__getitem__(number) * (float("nan") if self.armed() else 1.0)


def test_nan_stops_and_keeps(tmp_path):
    data = Poison()
    trainer = trainer_for(tmp_path, data=data)
    data.armed = lambda: trainer.state.step + 1 == 13
    with pytest.raises(CourseError, match=r"At step 13 .*nan.*00000010"):
        trainer.fit()
    assert all(w.isfinite().all() for w in load_weights(Model(), tmp_path).parameters())
    data.armed = lambda: False
    trainer.fit()  # the same trainer goes on from the checkpoint
    straight = trainer_for(tmp_path / "clean")
    straight.fit()
    assert same(trainer, straight) and timeless(trainer.history) == timeless(straight.history)


def test_kept_checkpoint_on_a_full_disk(tmp_path, monkeypatch):
    import safetensors.torch as st
    trainer, save = trainer_for(tmp_path), st.save_file
    def full(tensors, path):
        if "00000020" in str(path) and "ema" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)
    monkeypatch.setattr(st, "save_file", full)
    with pytest.raises(CourseError, match="step 20.*No space"):
        trainer.fit()
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["00000010"]
    monkeypatch.undo()
    trainer.fit()
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["00000040"]


def test_damaged_or_foreign_checkpoints(tmp_path):
    with pytest.raises(CourseError, match="no checkpoint"):
        load_weights(Model(), tmp_path)
    trainer_for(tmp_path, steps=3).fit()
    with pytest.raises(CourseError, match="another model"):
        load_weights(Model(width=8), tmp_path)
    with pytest.raises(CourseError, match="another model"):
        trainer_for(tmp_path, make=lambda: nn.Linear(2, 2)).fit()
    file = last_checkpoint(tmp_path) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CourseError, match="cannot be read"):
        trainer_for(tmp_path).fit()


def test_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
        def forward(self, batch):
            return {"loss": (self.b(self.a(batch["x"])) - batch["x"]).square().mean()}  # no weight: items count
    trainer_for(tmp_path, make=Tied, steps=5).fit()
    model = load_weights(Tied(), tmp_path, ema=False)
    assert model.a.weight is model.b.weight


def test_trackers(tmp_path):
    from accelerate.tracking import GeneralTracker
    class Notes(GeneralTracker):
        name, requires_logging_directory = "notes", False
        rows, finished = [], False
        def __init__(self): super().__init__()
        @property
        def tracker(self): return self
        def store_init_configuration(self, values): self.config = values
        def log(self, values, step=None, **_): self.rows.append((step, values["loss"]))
        def finish(self): self.finished = True
    notes = Notes()
    trainer = trainer_for(tmp_path, log_with=notes)
    trainer.fit()
    assert notes.rows == list(zip(*curve(trainer.history, "loss"))) and notes.config["steps"] == 40 and notes.finished
    with pytest.raises(CourseError, match="not installed"), pytest.warns(UserWarning, match="no supported trackers"):
        trainer_for(tmp_path, log_with="aim")


def test_bar_and_plot(tmp_path, capsys, monkeypatch):
    trainer_for(tmp_path / "a", callbacks=[Progress()]).fit()
    shown = capsys.readouterr().err
    assert "100.0%" in shown and "step 40, loss" in shown and "audio s/s" in shown
    import IPython.display
    class Handle:
        pictures = []
        def update(self, picture): self.pictures.append(picture.data)
    monkeypatch.setattr(IPython.display, "display", lambda **_: Handle())
    trainer_for(tmp_path / "b", callbacks=[LivePlot(every=0.0)], steps=15).fit()
    assert len(Handle.pictures) == 16 and all(picture.startswith(b"\x89PNG") for picture in Handle.pictures)


# --- other processes ---

def child(tmp_path, code, *launch, **environment):
    script = tmp_path / "child.py"
    script.write_text(COMMON + textwrap.dedent(code))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, *launch, str(script), str(tmp_path)], env=environment, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr[:4000]
    return done.stdout


KILL = '''
    import os, random, signal, sys, time, shutil, json
    from pathlib import Path
    from ardm_course.core import seed_everything
    import accelerate, safetensors.torch, ardm_course.training as training
    from ardm_course.training import *
    torch.set_num_threads(1)
    home = Path(sys.argv[1])

    def train(folder, seed=0):
        seed_everything(seed)
        config = TrainConfig(steps=24, batch_frames=300, warmup=5, log_every=7, checkpoint_every=5, validate_every=10, accumulate=2)
        Trainer(Model(), Rows(), collate, config, folder, [], held_out(Rows(9), collate, 200)).fit()

    def forked(work):
        if (pid := os.fork()) == 0:
            work()
            os._exit(0)
        return pid

    def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def die_at(module, name, call, after):
        "Replace a function by one that kills its own process at the n-th call."
        inner, calls = getattr(module, name), []
        def deadly(*a, **k):
            calls.append(1)
            if len(calls) == call and not after: os.kill(os.getpid(), signal.SIGKILL)
            out = inner(*a, **k)
            if len(calls) == call: os.kill(os.getpid(), signal.SIGKILL)
            return out
        setattr(module, name, deadly)

    def content(folder):
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*.safetensors"))}
        state = json.loads((last_checkpoint(folder) / "state.json").read_text())
        log = read_log(folder / "log.jsonl")
        for row in [state, *log]: row.pop("seconds", None)
        return files, state, log

    start = time.monotonic()
    assert ended(forked(lambda: train(home / "straight"))) == 0
    took, expected = time.monotonic() - start, content(home / "straight")
    places = [(training, "seed_step", 1, False), (training, "train_step", 13, True), (safetensors.torch, "save_file", 3, False),
              (safetensors.torch, "save_file", 8, True), (os, "fsync", 10, False), (os, "replace", 3, False), (os, "replace", 3, True),
              (shutil, "rmtree", 4, True)]
    for number, place in enumerate(places):
        folder = home / f"place{number}"
        def doomed():
            die_at(*place)
            train(folder)
        assert ended(forked(doomed)) == -signal.SIGKILL, place
        assert ended(forked(lambda: train(folder, seed=0 if last_checkpoint(folder) is None else 5))) == 0, place
        assert content(folder) == expected, place
    draw, folder = random.Random(0), home / "random"
    for kill in range(4): # at random moments, again and again
        pid = forked(lambda: train(folder))
        time.sleep(draw.uniform(0.05, 0.6) * took)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    assert ended(forked(lambda: train(folder))) == 0
    assert content(folder) == expected
    with open(home / "straight" / "log.jsonl", "a") as log: log.write('{"step": 41, "lo')
    assert len(read_log(home / "straight" / "log.jsonl")) == len(expected[2])
    print("all equal")
'''


def test_kill_at_any_moment(tmp_path):
    assert "all equal" in child(tmp_path, KILL)


TWO = '''
    import sys
    from types import SimpleNamespace
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from ardm_course.core import seed_everything
    import ardm_course.training as training
    from ardm_course.training import *

    def trainer_for(name, seed):
        seed_everything(seed)
        data = Rows(31) # some batches hold one item: an idle process must take part
        config = TrainConfig(steps=30, batch_frames=70, warmup=5, log_every=5, checkpoint_every=10, validate_every=15,
                             accumulate=2 if name == "copied" else 1)
        return Trainer(Model(noise=0), data, collate, config, sys.argv[1] + "/" + name, [], held_out(Rows(9), collate, 200))

    def run(name):
        trainer = trainer_for(name, 0)
        assert trainer.accelerator.num_processes == 2 and hasattr(trainer.ema.average[0], "full_tensor") == (name == "sharded")
        for _ in training_steps(trainer):
            if trainer.state.step == 23: break
        trainer_for(name, 5).fit() # resumes from step 20

    run("copied")
    inner = training.make_accelerator
    def sharding(log_with, folder, config): # on a CPU accelerate does not shard: do it in its place
        accelerator = inner(log_with, folder, config)
        def prepare(model, optimizer):
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            return model, SimpleNamespace(optimizer=make_optimizer(model, config))
        accelerator.prepare = prepare
        return accelerator
    training.make_accelerator = sharding
    run("sharded")
'''


def test_two_processes_equal_one(tmp_path):
    child(tmp_path, TWO, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ACCELERATE_USE_CPU="true")
    assert min(map(len, bucket_batches(Rows(31).lengths, 70))) == 1
    for name, accumulate in (("copied", 2), ("sharded", 1)):  # DDP, FSDP2
        one = trainer_for(tmp_path / f"one {name}", make=lambda: Model(noise=0), data=Rows(31), steps=30, batch_frames=70, log_every=5,
                          accumulate=accumulate, validate=held_out(Rows(9), collate, 200))
        one.fit()
        for ema in (True, False):
            single, double = load_weights(Model(), one.folder, ema), load_weights(Model(), tmp_path / name, ema)
            assert max((a - b).abs().max().item() for a, b in zip(single.parameters(), double.parameters())) < 1e-6
        rows = timeless(read_log(tmp_path / name / "log.jsonl"))
        assert len(rows) == len(one.history)
        for a, b in zip(timeless(one.history), rows):
            assert a == pytest.approx(b, rel=1e-4)


def test_numbers_too_small_to_be_normal_are_zero_in_a_step_only(tmp_path):
    small = torch.full((4,), 1e-39)
    seen = []

    class Small(Model):
        def forward(self, batch):
            seen.append((small * 1).sum().item())
            return super().forward(batch)
    trainer_for(tmp_path, make=Small, steps=2).fit()
    assert seen == [0, 0] and (small * 1).sum() > 0


@pytest.mark.parametrize("before", [False, True])
def test_the_processor_is_left_as_it_was(before):
    torch.set_flush_denormal(before)
    try:
        with pytest.raises(ValueError):
            with subnormals_as_zero(): raise ValueError
        assert ((torch.tensor(1e-39) * 1).item() == 0) == before
    finally: torch.set_flush_denormal(False)
