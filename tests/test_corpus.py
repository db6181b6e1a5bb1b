"""Faults and journeys of the corpus loader and the feature cache that the notebook cannot show."""
import hashlib
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from ardm_course.audio import save_audio
from ardm_course.core import CourseError, data_dir
from ardm_course.corpus import (ROW_FIELDS, FeatureCache, Skipped, decode, finished_rows, load_corpus, load_phones,
                                parquet_files, readable, seconds, shard, statistics)

sys.path.insert(0, str(Path(__file__).parent))
from hub_stand_in import serve  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
EMBEDDED_SPLITS = {"phrases": ("train", "dev", "test"), "stories": ("train", "dev", "test"), "real": ("dev", "test"), "librivox": ("test",)}


def run(script, *arguments, **environment):
    "Run Python in a fresh interpreter."
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], env=variables, capture_output=True, text=True, timeout=120)


def words(text):
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


# ---- the embedded data


def test_checksums_cover_every_file():
    lines = (data_dir() / "SHA256SUMS").read_text().splitlines()
    sums = {name: value for value, name in (line.split("  ", 1) for line in lines)}
    there = {path.relative_to(data_dir()).as_posix() for path in (data_dir() / "corpus").rglob("*") if path.is_file()}
    assert there == {name for name in sums if name.startswith("corpus/")}
    wrong = [name for name in there if hashlib.sha256((data_dir() / name).read_bytes()).hexdigest() != sums[name]]
    assert not wrong


def test_size_and_licences():
    assert sum(path.stat().st_size for path in (data_dir() / "corpus").rglob("*") if path.is_file()) <= 24e6
    assert sum(path.stat().st_size for path in (data_dir() / "corpus" / "phrases").iterdir()) <= 15.5e6
    for folder in ("phrases", "stories", "real", "librivox", "texts"):
        assert (data_dir() / "corpus" / folder / "LICENSE").stat().st_size > 200
    assert "CC-BY-SA" in (data_dir() / "corpus" / "real" / "LICENSE").read_text()
    assert "Allison Smith" in (data_dir() / "README.md").read_text()


def test_splits_share_no_sentence():
    for name, splits in EMBEDDED_SPLITS.items():
        sets = [{words(text) for text in load_corpus(name, split)["text_normalized"]} for split in splits]
        for a, b in itertools.combinations(sets, 2):
            assert not a & b, name
    held = {words(text) for name, splits in EMBEDDED_SPLITS.items() for split in splits if split != "train"
            for text in load_corpus(name, split)["text_normalized"]}
    held |= {words(text) for text in (data_dir() / "corpus" / "texts" / "unseen.txt").read_text().splitlines()}
    for name in ("phrases", "stories"):
        assert not held & {words(text) for text in load_corpus(name, "train")["text_normalized"]}


def test_phrases_is_a_closed_language():
    texts = {split: load_corpus("phrases", split)["text_normalized"][:] for split in EMBEDDED_SPLITS["phrases"]}
    vocabulary = {split: {word for text in rows for word in words(text).split()} for split, rows in texts.items()}
    assert 110 <= len(vocabulary["train"]) <= 150
    assert vocabulary["dev"] | vocabulary["test"] <= vocabulary["train"]
    assert len(texts["dev"]) == 60 and len(texts["test"]) == 100
    assert not any(re.search(r"\d", text) for rows in texts.values() for text in rows)


@pytest.mark.parametrize("name", EMBEDDED_SPLITS)
def test_every_embedded_row_is_whole(name):
    for split in EMBEDDED_SPLITS[name]:
        rows, skipped = load_corpus(name, split), Skipped()
        ids = []
        for row in rows:
            assert set(row) == set(ROW_FIELDS) and all(isinstance(row[field], str) and row[field] for field in ROW_FIELDS if field != "audio")
            assert 0.3 < seconds(row) < 16, row["id"]
            ids.append(row["id"])
        assert len(set(ids)) == len(ids)
        sample = rows.select(range(0, len(rows), max(1, len(rows) // 12)))
        assert sum(1 for _, wav in readable(sample, skipped=skipped) if wav.abs().max() > 0.1) == len(sample) and not skipped.count


def test_phones_end_where_the_sound_ends():
    phones = load_phones("phrases")
    for split in EMBEDDED_SPLITS["phrases"]:
        for row in load_corpus("phrases", split).select(range(40)):
            spoken = phones[row["id"]]
            assert "".join(spoken["phones"][1:-1]) == spoken["phonemes"] and spoken["phones"][0] == spoken["phones"][-1] == "_"
            assert spoken["ends"] == sorted(spoken["ends"]) and abs(spoken["ends"][-1] - seconds(row)) < 0.06
    with pytest.raises(CourseError, match="phones"):
        load_phones("real")


# ---- one loader, three sources


@pytest.fixture
def tree(tmp_path):
    "A LibriTTS tree with two readable sentences, a truncated one, a missing one, and one without original text."
    source = load_corpus("phrases", "test")
    for number, name in enumerate(("10_20_000000_000000", "10_20_000001_000000", "10_21_000002_000000", "11_30_000003_000000", "11_30_000004_000000")):
        speaker, chapter = name.split("_")[:2]
        base = tmp_path / "train-clean-100" / speaker / chapter / name
        save_audio(base.with_suffix(".wav"), decode(source[number]), 24000)
        base.with_suffix(".normalized.txt").write_text(source[number]["text_normalized"] + "\n")
        base.with_suffix(".original.txt").write_text(source[number]["text_original"] + "\n")
    base.with_suffix(".original.txt").unlink()
    cut = tmp_path / "train-clean-100/10/20/10_20_000001_000000.wav"
    cut.write_bytes(cut.read_bytes()[:5000])
    (tmp_path / "train-clean-100/11/30/11_30_000003_000000.wav").unlink()
    return tmp_path


def test_libritts_tree(tree):
    rows = load_corpus(tree, "train-clean-100")
    assert len(rows) == 5 and rows.column_names == list(ROW_FIELDS)
    assert rows[0]["speaker_id"] == "10" and rows[2]["chapter_id"] == "21" and not rows[0]["text_normalized"].endswith("\n")
    assert rows[4]["text_original"] == rows[4]["text_normalized"]
    assert load_corpus(str(tree), "train.clean.100")["id"][:] == rows["id"][:]
    skipped = Skipped()
    assert [row["id"][:5] for row, _ in readable(rows, skipped=skipped)] == ["10_20", "10_21", "11_30"]
    assert skipped.count == 2 and "truncated" in skipped.reasons[0] and "no audio file" in skipped.reasons[1]
    with pytest.warns(UserWarning, match="2 rows"):
        list(readable(rows))
    assert statistics(rows)["skipped"] == 1  # the header of the truncated file is still readable
    with pytest.raises(CourseError, match="train-clean-100"):
        load_corpus(tree, "dev-clean")


def test_a_row_without_sound_is_counted():
    rows = [{"id": "a", "audio": None}, {"id": "b", "audio": {"bytes": None, "path": None}}, {"id": "c", "audio": {"bytes": b"no sound", "path": None}}]
    skipped = Skipped()
    assert list(readable(rows, skipped=skipped)) == [] and skipped.count == 3
    with pytest.raises(CourseError, match="no audio"):
        decode(rows[0])
    with pytest.raises(CourseError, match="readable"):
        statistics(rows)


def test_truncated_embedded_audio_is_counted():
    row = load_corpus("phrases", "dev")[0]
    half = row | {"audio": {"bytes": row["audio"]["bytes"][:len(row["audio"]["bytes"]) // 2], "path": None}}
    skipped = Skipped()
    assert len(list(readable([half, row], skipped=skipped))) == 1 and skipped.count == 1


def test_what_is_no_corpus():
    for source, split, message in (("nothing here", "train", "no corpus"), ("phrases", "train2", "dev, test, train"), ("librivox", "train", "test")):
        with pytest.raises(CourseError, match=message):
            load_corpus(source, split)


def test_a_corpus_with_missing_columns_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet
    parquet.write_table(pyarrow.table({"id": ["a"], "text": ["b"]}), tmp_path / "train.parquet")
    with pytest.raises(CourseError, match="text_normalized"):
        load_corpus(tmp_path, streaming=True)
    with pytest.raises(CourseError, match="Choose one of: train"):
        load_corpus(tmp_path, "test")


def hub_folder(folder, shards=2):
    "The dev split as a hub repository: numbered shards, and speakers as numbers to see that they become strings."
    import pyarrow
    import pyarrow.parquet as parquet
    table = parquet.read_table(data_dir() / "corpus" / "phrases" / "dev.parquet")
    speaker = table.schema.get_field_index("speaker_id")
    table = table.set_column(speaker, "speaker_id", pyarrow.array([4001] * len(table), pyarrow.int64()))
    files = folder / "data" / "train.clean.100"
    files.mkdir(parents=True)
    for number in range(shards):
        part = table.slice(number * 20, 20).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {
            name: {"sampling_rate": 24000, "_type": "Audio"} if name == "audio" else
            {"dtype": "int64" if name == "speaker_id" else "string", "_type": "Value"} for name in table.column_names}}})})
        parquet.write_table(part, files / f"train.clean.100-{number:05d}-of-{shards:05d}.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: clean\n  data_files:\n  - split: train.clean.100\n"
                                      "    path: data/train.clean.100/train.clean.100*.parquet\n---\n")
    return table.slice(0, 20 * shards)["id"].to_pylist()


def test_folder_in_hub_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path / "cache"))
    ids = hub_folder(tmp_path / "corpus")
    assert len(parquet_files(tmp_path / "corpus", "train.clean.100")) == 2 and not parquet_files(tmp_path / "corpus", "train")
    for streaming in (None, True):
        rows = load_corpus(tmp_path / "corpus", "train.clean.100", streaming=streaming)
        found = list(rows)
        assert [row["id"] for row in found] == ids and found[0]["speaker_id"] == "4001" and len(decode(found[3])) > 10000
    parts = [[row["id"] for row in shard(rows, index, 2)] for index in range(2)]
    assert parts[0] + parts[1] == ids


STREAM = """
import json, sys
from ardm_course.corpus import decode, load_corpus, shard
rows = load_corpus("mythicinfinity/libritts", "train.clean.100", "clean")
first = next(iter(rows))
parts = [[row["id"] for row in shard(rows, index, 2)] for index in range(2)]
odd = [[row["id"] for row in shard(rows, index, 3)] for index in range(3)]
print(json.dumps({"kind": type(rows).__name__, "fields": sorted(first), "speaker": first["speaker_id"],
                  "samples": len(decode(first)), "parts": parts, "odd": odd}))
try:
    load_corpus("mythicinfinity/nothing", "train")
except ValueError as error:
    print(type(error).__name__, error)
"""


def test_streaming_from_the_hub(tmp_path):
    ids = hub_folder(tmp_path / "hub" / "mythicinfinity" / "libritts")
    with serve(tmp_path / "hub") as (address, requests):
        result = run(STREAM, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"), NO_PROXY="127.0.0.1")
    assert result.returncode == 0, result.stderr[-2000:]
    report, missing = result.stdout.strip().splitlines()
    report = json.loads(report)
    assert report["kind"] == "IterableDataset" and report["fields"] == sorted(ROW_FIELDS)
    assert report["speaker"] == "4001" and report["samples"] > 10000
    assert report["parts"][0] + report["parts"][1] == ids and len(report["parts"][0]) == 20
    assert sorted(sum(report["odd"], [])) == sorted(ids) and all(report["odd"])
    assert missing.startswith("CourseError") and "nothing" in missing
    assert any(path.endswith(".parquet") for _, path, _ in requests)


def test_hub_out_of_reach(tmp_path):
    script = "from ardm_course.corpus import load_corpus\ntry: load_corpus('some/corpus', 'train')\nexcept ValueError as error: print(type(error).__name__, error)"
    result = run(script, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.stdout.startswith("CourseError") and "did not answer" in result.stdout, result.stderr[-2000:]


# ---- the feature cache

BUILD = """
import sys, time
from pathlib import Path
from ardm_course.corpus import FeatureCache, load_corpus
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
def encode(wav):
    with open(folder / "calls", "a") as file: file.write("x")
    time.sleep(pause)
    return wav[:4800].reshape(-1, 80)
cache = FeatureCache.build(load_corpus("phrases", "dev"), encode, "key", folder=folder, progress=False)
print(len(cache), float(sum(cache[i].abs().sum() for i in range(len(cache)))))
"""


def first_frames(wav):
    return wav[:4800].reshape(-1, 80)


def test_cache_returns_what_was_encoded(tmp_path):
    rows = load_corpus("phrases", "dev")
    cache = FeatureCache.build(rows, first_frames, "key", folder=tmp_path, progress=False)
    assert cache.ids == rows["id"][:] and cache.lengths == [60] * 60 and len(cache) == 60 and cache.dim == 80
    assert cache[5].dtype == torch.float32 and torch.allclose(cache[5], first_frames(decode(rows[5])), atol=1e-3)
    assert torch.equal(cache[-1], cache[59])
    with pytest.raises(IndexError):
        cache[60]
    small = pickle.dumps(cache)
    assert len(small) < 1000 and torch.equal(pickle.loads(small)[5], cache[5])
    again = FeatureCache.build(rows, lambda wav: 1 / 0, "key", folder=tmp_path, progress=False)
    assert torch.equal(again[5], cache[5])
    with pytest.raises(ZeroDivisionError):
        FeatureCache.build(rows, lambda wav: 1 / 0, "another key", folder=tmp_path, progress=False)


def test_cache_skips_and_says_so(tree, tmp_path):
    rows = load_corpus(tree, "train-clean-100")
    with pytest.warns(UserWarning, match="2 of 5"):
        cache = FeatureCache.build(rows, first_frames, "key", folder=tmp_path / "cache", progress=False)
    assert len(cache) == 3 and cache.skipped == 2 and "10_20_000001_000000" not in cache.ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureCache.build(rows, first_frames, "key", folder=tmp_path / "cache", progress=False)
    with pytest.raises(CourseError, match="Not one row"):
        FeatureCache.build(rows.select([1, 3]), first_frames, "key", folder=tmp_path / "cache", progress=False)


def test_cache_refuses_numbers_it_cannot_hold(tmp_path):
    for bad in (float("nan"), 1e6):
        with pytest.raises(CourseError, match="float16"):
            FeatureCache.build(load_corpus("phrases", "dev"), lambda wav: first_frames(wav) + bad, "key", folder=tmp_path, progress=False)


def test_full_disk_and_impossible_folder_are_explained(tmp_path, monkeypatch):
    import errno
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="ARDM_CACHE"):
        FeatureCache.build(load_corpus("phrases", "dev"), first_frames, "key", folder=tmp_path / "file", progress=False)

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CourseError, match="No space left"):
        patch.setattr(os, "fsync", full)
        FeatureCache.build(load_corpus("phrases", "dev"), first_frames, "key", folder=tmp_path, progress=False)
    assert len(FeatureCache.build(load_corpus("phrases", "dev"), lambda wav: 1 / 0, "key", folder=tmp_path, progress=False)) == 60


def test_changed_file_gets_a_new_cache(tree, tmp_path):
    rows = load_corpus(tree, "train-clean-100").select([0])
    first = FeatureCache.build(rows, first_frames, "key", folder=tmp_path / "cache", progress=False)
    save_audio(rows[0]["path"], torch.ones(24000) * 0.5, 24000)
    second = FeatureCache.build(rows, first_frames, "key", folder=tmp_path / "cache", progress=False)
    assert first.folder != second.folder and float(second[0].mean()) == pytest.approx(0.5, abs=1e-3)


def start(folder, pause):
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", BUILD, str(folder), str(pause)], env=variables, stdout=subprocess.PIPE, text=True)


def test_cache_survives_a_kill(tmp_path):
    process = start(tmp_path, 0.05)
    deadline = time.time() + 100
    while not (tmp_path / "calls").exists() or (tmp_path / "calls").stat().st_size < 12:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (private,) = tmp_path.glob("*.part")
    assert not private.with_suffix("").exists()  # nothing half finished under the final name
    done, calls = len(finished_rows(private)), (tmp_path / "calls").stat().st_size
    assert 10 <= done < 60
    with open(private / "features.bin", "ab") as file:
        file.write(b"torn")
    with open(private / "journal.jsonl", "a") as file:
        file.write('{"id": "torn", "len')
    rows, count = load_corpus("phrases", "dev"), []
    cache = FeatureCache.build(rows, lambda wav: count.append(1) or first_frames(wav), "key", folder=tmp_path, progress=False)
    assert len(count) == 60 - done and calls - done <= 1
    fresh = FeatureCache.build(rows, first_frames, "key", folder=tmp_path / "fresh", progress=False)
    assert (cache.folder / "features.bin").read_bytes() == (fresh.folder / "features.bin").read_bytes() and cache.ids == fresh.ids


def test_a_journal_without_its_data_is_not_believed(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"id": "a", "length": 10, "dim": 4}\n')
    (tmp_path / "features.bin").write_bytes(b"too short")
    assert finished_rows(tmp_path) == []


def test_two_processes_build_one_cache(tmp_path):
    processes = [start(tmp_path, 0.01) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert outputs[0] == outputs[1] and outputs[0].startswith("60 ")
    assert (tmp_path / "calls").stat().st_size == 60  # the second waited instead of computing
