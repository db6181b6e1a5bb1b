"""The judges of notebook 12: what they answer, that they agree with their peers, and what they say when they are missing."""
import json
import sys

import pytest
import torch
from torch.nn import functional as F

from ardm_course import evaluation
from ardm_course.audio import import_torchaudio, resample
from ardm_course.core import CourseError
from ardm_course.corpus import decode, load_corpus
from ardm_course.evaluation import (JUDGES, MosPredictor, Recogniser, Sample, SpeakerEncoder, available, bootstrap_interval, codec_row, equal_error_rate,
                                    equal_lengths, error_rates, evaluate, f0_rmse, f0_track, load_recogniser, log_mel_distance, measure,
                                    measure_codec, pesq, real_time_factor, similarity, slaney_filterbank, slaney_mel, speech_16k, split_speech, stoi, stop_reasons, summarise,
                                    time_stream, transcript_normaliser, voice_windows)


def needs(*judges):
    "Skip where a judge is not installed, and say how to install it."
    missing = [judge for judge in judges if not available()[judge]]
    return pytest.mark.skipif(bool(missing), reason="; ".join(JUDGES[judge][1] for judge in missing))


@pytest.fixture(scope="module")
def librivox():
    rows = list(load_corpus("librivox", "test"))
    return [row["text_normalized"] for row in rows], [decode(row, 24000) for row in rows]


SAME = [ # what is said; how somebody writes it
    ("the bus leaves at nine fifteen", "The bus leaves at 9:15."),
    ("the bus leaves at nine fifteen", "The bus leaves at 915."),
    ("the bus leaves at nine oh five", "The bus leaves at 9:05"),
    ("the bus leaves at nine oh five", "The bus leaves at 9.05"),
    ("ten oh five", "10:05"), ("ten fifteen", "10:15"), ("ten ten", "1010"), ("twelve twenty", "12:20"), ("one fifty eight", "158"),
    ("three o'clock", "3:00"), ("three o’clock", "3 o'clock"), ("three oclock", "3 O'Clock."),
    ("nine in the morning, at seven pm", "9 in the morning, at 7 p.m."), ("at seven pm", "at 7pm"),
    ("four zero seven", "407"), ("zero zero seven", "007"), ("zero seven two", "0-7-2"), ("my number is seven four nine two", "My number is 7, 4, 9, 2."),
    ("five five seven three three seven nine", "557-3379"), ("eight three five", "Eight, three, five."), ("six two six zero zero zero", "626000"),
    ("room four oh four", "Room four, o four."), ("four seven eight", "For seven, eight."),
    ("thirty eight lamps", "30 8 lamps"), ("thirty one doors", "30-1 Doors"), ("forty four red doors", "4,4 red doors"), ("fifty two", "fifty-two"),
    ("call me on sunday february ten", "Call me on Sunday, February 10."), ("on march seventh", "on March 7th"), ("on march the seventh", "on March 7"),
    ("the twenty first of june", "the 21st of June"), ("the third of may two thousand and ten", "the third of May 2010"),
    ("born in nineteen eighty four", "Born in 1984."), ("the nineteen sixties", "the 1960s"),
    ("one hundred and twenty three people", "123 people"), ("a thousand", "1,000"), ("two thousand five hundred", "2,500"),
    ("seven percent of two thousand", "7% of 2000"), ("version three point five", "Version 3.5"), ("minus five degrees", "-5 degrees"),
    ("fifty four dollars and fifty one cents", "$54.51"), ("eight dollars", "$8"), ("five dollars and fifty cents", "$5.50."),
    ("mister dashwood", "Mr. Dashwood"), ("cold hearted", "cold-hearted"), ("well it is fine", "Well... it's fine"), ("half past seven", "half-past 7"),
    ("the colour", "the color"), ("yes", "YES!"),
]
DIFFERENT = [("fifteen", "fifty"), ("nine fifteen", "nine fifty"), ("the third of may", "the fourth of may"), ("eight dollars", "eight cents"),
             ("three point five", "three five"), ("one oh five", "one five"), ("lamp", "lamps"), ("seven percent", "seven")]


@needs("normaliser")
@pytest.mark.parametrize("said, written", SAME)
def test_same_when_read_aloud(said, written):
    assert transcript_normaliser(said) == transcript_normaliser(written)
    assert transcript_normaliser(transcript_normaliser(said)) == transcript_normaliser(said)


@needs("normaliser")
@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different_when_read_aloud(one, other):
    assert transcript_normaliser(one) != transcript_normaliser(other)


@needs("normaliser")
@pytest.mark.parametrize("corpus, split", [("phrases", "dev"), ("phrases", "test"), ("stories", "test"), ("real", "dev")])
def test_written_and_spoken_form_of_the_corpora_agree(corpus, split):
    rows = load_corpus(corpus, split).select_columns(["text_original", "text_normalized"])
    wrong = [row for row in rows if transcript_normaliser(row["text_original"]) != transcript_normaliser(row["text_normalized"])]
    assert not wrong, f"{len(wrong)} of {len(rows)}, first {wrong[0]}"


def edit_distance(reference, heard):
    "Wagner and Fischer, one row at a time."
    row = list(range(len(heard) + 1))
    for i, true in enumerate(reference, 1):
        before, row[0] = row[0], i
        for j, found in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (true != found))
    return row[-1]


@needs("normaliser", "error rates")
def test_error_rates_agree_with_an_edit_distance():
    generator = torch.Generator().manual_seed(0)
    words = "red blue green lamp door chair near under".split()
    draw = lambda least: " ".join(words[i] for i in torch.randint(len(words), (int(torch.randint(least, 9, (), generator=generator)),), generator=generator))
    references, heard = [draw(1) for _ in range(40)], [draw(0) for _ in range(40)]
    rates = error_rates(references, heard)
    for name, split in (("wer", str.split), ("cer", list)):
        expected = sum(edit_distance(split(a), split(b)) for a, b in zip(references, heard)) / sum(len(split(a)) for a in references)
        assert rates[name] == pytest.approx(expected)
        low, high = rates["intervals"][name]
        assert low < rates[name] < high
    assert rates["n"] == 40 and error_rates(references, references)["wer"] == 0
    assert error_rates(["one lamp"], ["a b c d e"])["wer"] == 2.5 and error_rates(["one lamp"], [""])["wer"] == 1


@needs("normaliser", "error rates")
def test_error_rates_refuse():
    for references, heard, message in (([], [], "0 references"), (["a"], [], "1 references and 0"), (["lamp", "..."], ["lamp", "x"], "'...' has no words")):
        with pytest.raises(CourseError, match=message):
            error_rates(references, heard)


def test_bootstrap():
    values, words = torch.tensor([0.0, 1, 0, 3, 0, 0, 2, 0]), torch.tensor([4.0, 5, 6, 7, 8, 9, 3, 2])
    assert bootstrap_interval(values, words) == bootstrap_interval(values, words)
    assert bootstrap_interval(values, words, seed=1) != bootstrap_interval(values, words)
    low, high = bootstrap_interval(values, words)
    assert 0 <= low < values.sum() / words.sum() < high
    assert bootstrap_interval(torch.full((9,), 3.0)) == [3.0, 3.0] and bootstrap_interval(torch.tensor([2.0])) == [2.0, 2.0]


def test_bootstrap_covers_the_truth():
    generator, inside = torch.Generator().manual_seed(1), 0
    for _ in range(200):
        low, high = bootstrap_interval(torch.randn(60, generator=generator) + 5, draws=400)
        inside += low <= 5 <= high
    assert 0.90 <= inside / 200 <= 0.99


def test_missing_judges_say_what_to_install(monkeypatch):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(evaluation, "standing_judge", evaluation.standing_judge.__wrapped__) # without what is loaded already
    evaluation.whisper_normaliser.cache_clear()
    assert not any(available().values())
    build = {"moonshine": evaluation.moonshine, "whisper": evaluation.whisper, "similarity": SpeakerEncoder, "mos": MosPredictor,
             "hub": lambda: evaluation.from_hub("some/model"), "normaliser": lambda: transcript_normaliser("a"),
             "error rates": lambda: error_rates(["a"], ["a"]), "pesq": lambda: pesq(torch.randn(9), torch.randn(9), 16000),
             "stoi": lambda: stoi(torch.randn(9), torch.randn(9), 16000)}
    assert set(build) == set(JUDGES)
    for judge, call in build.items():
        with pytest.raises(CourseError, match="not measured.*pip install") as error:
            call()
        assert JUDGES[judge][1] in str(error.value)
    row = evaluate([Sample("a lamp", torch.randn(16000), 16000, torch.randn(16000))])
    assert row.pop("n") == 1 and set(row) == {"wer_moonshine", "cer_moonshine", "wer_whisper", "cer_whisper", "similarity", "mos", "intervals"}
    assert all(value is None for name, value in row.items() if name != "intervals") and not any(row["intervals"].values())
    beside = codec_row(["a lamp"], [torch.randn(16000)], [torch.randn(16000)], 16000)
    assert set(beside) - set(row) == {"n", "pesq", "stoi", "log_mel_db", "log_mel_low_db"}
    assert [name for name in beside if name not in ("n", "intervals") and beside[name] is not None] == ["log_mel_db", "log_mel_low_db"] # ours needs no package
    json.dumps([row, beside])


def test_unknown_recogniser():
    pytest.importorskip("transformers")
    with pytest.raises(CourseError, match="No recogniser"):
        load_recogniser("./no such folder")


def test_recogniser_of_transformers_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    import_torchaudio() # as from_hub does; parts of transformers import it
    (tmp_path / "vocab.json").write_text(json.dumps({character: place for place, character in enumerate(["<pad>", "<unk>", "|", *"abcdef"])}))
    transformers.Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    config = transformers.Wav2Vec2Config(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0,
                                         conv_dim=(8, 8), conv_stride=(10, 8), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    torch.manual_seed(0)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    recogniser = load_recogniser(str(tmp_path))
    text = recogniser(torch.randn(24000) * 0.1, 24000)
    assert recogniser.name == str(tmp_path) and isinstance(text, str) and recogniser(torch.zeros(9), 24000) == ""


def test_recogniser_contract():
    seen = []
    recogniser = Recogniser("echo", lambda pieces: [seen.append(len(piece)) or f"p{len(seen)}" for piece in pieces])
    assert recogniser(torch.zeros(0), 24000) == recogniser(torch.zeros(48000), 24000) == recogniser(1e-5 * torch.randn(48000), 24000) == "" and not seen
    assert recogniser.many([torch.randn(24000), torch.zeros(99), torch.randn(24000 * 40)], 24000) == ["p1", "", "p2 p3"]
    assert sum(seen[1:]) == 16000 * 40 and max(seen) <= 16000 * 30
    for wav, message in ((torch.full((9,), torch.nan), "NaN"), (torch.zeros(2, 9), "one channel")):
        with pytest.raises(CourseError, match=message):
            recogniser(wav, 24000)


def test_long_speech_is_cut_in_pauses():
    wav = torch.randn(16000 * 70, generator=torch.Generator().manual_seed(0)) * 0.1
    for start in (20, 45): wav[16000 * start : 16000 * start + 8000] = 0
    pieces = split_speech(wav)
    assert torch.equal(torch.cat(pieces), wav) and [round(len(piece) / 16000) for piece in pieces] == [20, 25, 25]


def test_batches_of_equal_length():
    wavs = [torch.randn(length) for length in (100, 8000, 8001, 15999, 16001, 30 * 16000, 30 * 16000, 30 * 16000)]
    batches = list(equal_lengths(wavs))
    assert sorted(place for places, _ in batches for place in places) == list(range(len(wavs)))
    for places, batch in batches:
        assert batch.shape[1] % 8000 == 0 and batch.numel() <= 60 * 16000
        for place, row in zip(places, batch):
            assert torch.equal(row[: len(wavs[place])], wavs[place]) and not row[len(wavs[place]) :].any() and batch.shape[1] - len(wavs[place]) < 8000


@pytest.mark.parametrize("name", ["moonshine", "whisper"])
def test_recognisers_understand_real_speech(name, librivox):
    if not available()[name]: pytest.skip(JUDGES[name][1])
    texts, wavs = librivox
    recogniser = load_recogniser(name)
    heard = recogniser.many(wavs, 24000)
    if available()["normaliser"] and available()["error rates"]:
        assert error_rates(texts, heard)["wer"] < 0.10, heard
    assert recogniser(wavs[1], 24000) == heard[1], "a transcript depends on its neighbours"
    assert recogniser(torch.zeros(0), 24000) == recogniser(torch.zeros(24000), 24000) == ""
    assert isinstance(recogniser(0.1 * torch.sin(torch.arange(2400) * 0.1), 24000), str) # a beep of 0.1 s


def test_filterbank_and_mel_agree_with_librosa():
    librosa = pytest.importorskip("librosa")
    wav = torch.randn(7777, generator=torch.Generator().manual_seed(0)) * 0.1
    for mels in (40, 80):
        assert torch.allclose(slaney_filterbank(mels), torch.tensor(librosa.filters.mel(sr=16000, n_fft=400, n_mels=mels)), atol=1e-6)
        peer = librosa.feature.melspectrogram(y=wav.numpy(), sr=16000, n_fft=400, hop_length=160, n_mels=mels)
        assert torch.allclose(slaney_mel(wav, mels, "constant"), torch.tensor(peer), rtol=1e-3, atol=1e-6)


@needs("similarity")
def test_speaker_encoder_agrees_with_its_package(librivox):
    try: from resemblyzer import VoiceEncoder, preprocess_wav
    except ImportError as error: pytest.skip(f"the package itself needs more: {error}")
    peer, own = VoiceEncoder("cpu", verbose=False), SpeakerEncoder()
    for wav in librivox[1]:
        clean = preprocess_wav(speech_16k(wav, 24000).numpy())
        clean = clean * 10 ** (-30 / 20) / (clean**2).mean() ** 0.5 # the package raises quiet speech to this level and leaves the rest
        with torch.no_grad(): _, (states, _) = own.lstm(voice_windows(torch.tensor(clean)))
        same_input = F.normalize(F.normalize(own.linear(states[-1]).relu()).mean(0), dim=0)
        theirs = torch.tensor(peer.embed_utterance(clean))
        assert torch.allclose(same_input, theirs, atol=1e-4) # the network
        assert similarity(own(wav, 24000), theirs) > 0.96 # and its other way to find the pauses


@needs("similarity")
def test_voices(librivox):
    encoder, (_, wavs) = SpeakerEncoder(), librivox
    one, other = encoder(wavs[0], 24000), encoder(wavs[3], 24000)
    stranger = encoder(decode(load_corpus("phrases", "dev")[0]), 24000)
    assert one.shape == (256,) and one.norm() == pytest.approx(1, abs=1e-5) and not one.requires_grad
    assert similarity(one, other) > 0.8 > similarity(one, stranger) + 0.1
    assert similarity(encoder(0.3 * wavs[0], 24000), one) > 0.99 # loudness is not voice
    for wav in (torch.zeros(0), torch.zeros(24000), torch.randn(240)): assert encoder(wav, 24000).isfinite().all()


def test_equal_error_rate():
    assert equal_error_rate(torch.tensor([0.8, 0.9]), torch.tensor([0.1, 0.2])) == (0.0, pytest.approx(0.8))
    generator = torch.Generator().manual_seed(0)
    same, different = torch.randn(4000, generator=generator) + 2, torch.randn(4000, generator=generator)
    rate, threshold = equal_error_rate(same, different)
    assert rate == pytest.approx(0.1587, abs=0.01) and threshold == pytest.approx(1, abs=0.1) # two unit Gaussians two apart


@needs("mos")
def test_mos(librivox):
    before = "torchaudio" in sys.modules
    quality, wav = MosPredictor(), librivox[1][1]
    assert ("torchaudio" in sys.modules) == before # the stand-in is gone
    noise = torch.randn(len(wav), generator=torch.Generator().manual_seed(0)) * wav.square().mean().sqrt()
    scores = [quality(wav + share * noise, 24000) for share in (0, 0.1, 1)]
    assert 5 >= scores[0] > scores[1] > scores[2] >= 1 and quality(wav, 24000) == scores[0]
    for odd in (torch.zeros(0), torch.zeros(24000)): assert 1 <= quality(odd, 24000) <= 5


@pytest.mark.parametrize("pitch", [70.0, 110.0, 220.0, 440.0])
@pytest.mark.parametrize("rate", [16000, 24000])
def test_pitch_of_a_tone(pitch, rate):
    phase = 2 * torch.pi * pitch * torch.arange(rate) / rate
    tone = 0.2 * sum(torch.sin(k * phase) / k for k in range(1, 6))
    track = f0_track(torch.cat([tone, torch.zeros(rate)]), rate)
    assert abs(len(track) - 200) <= 2 and not track[105:].any()
    assert (1200 * (track[3:96] / pitch).log2()).abs().max() < 10 # cents
    assert f0_rmse(track, 2 * track) == pytest.approx(1200, abs=1e-2) and f0_rmse(track, torch.zeros(9)) is None


def test_pitch_of_no_voice():
    assert not f0_track(torch.zeros(16000), 16000).any()
    assert (f0_track(torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1, 16000) > 0).float().mean() < 0.1
    assert f0_track(torch.zeros(0), 16000).shape == (1,) or not f0_track(torch.zeros(0), 16000).any()


BESIDE = {"pesq": pesq, "stoi": stoi, "log_mel_db": log_mel_distance}
SAME_SCORE = {"pesq": 4.64, "stoi": 1.0, "log_mel_db": 0.0}


def beside(name):
    "One of the three measures that need the original, if it is there."
    if name in JUDGES and not available()[name]: pytest.skip(JUDGES[name][1])
    return BESIDE[name]


@pytest.mark.parametrize("name", BESIDE)
def test_beside_the_original(name, librivox):
    judge, wav = beside(name), librivox[1][1]
    noise = torch.randn(len(wav), generator=torch.Generator().manual_seed(0)) * wav.square().mean().sqrt()
    scores = [judge(wav, wav + share * noise, 24000) for share in (0, 0.03, 0.1, 0.3, 1)]
    assert scores[0] == pytest.approx(SAME_SCORE[name], abs=0.01) and all(isinstance(score, float) for score in scores)
    assert scores == sorted(scores, reverse=name != "log_mel_db") and len(set(scores)) == 5
    assert judge(wav, wav[:-5000], 24000) == judge(wav[:-5000], wav, 24000) == pytest.approx(SAME_SCORE[name], abs=0.01) # the shorter one counts


@pytest.mark.parametrize("name", BESIDE)
def test_beside_the_original_where_there_is_little_to_compare(name, librivox):
    judge, wav = beside(name), librivox[1][1]
    for odd in (torch.zeros(0), torch.zeros(1), torch.full((1,), 0.5), torch.zeros(48000), wav[12000:12100]):
        answer = judge(odd, odd, 24000)
        assert answer == 0 if name == "log_mel_db" and len(odd) else answer is None or (not len(odd) and answer == 0), (len(odd), answer)
        other = judge(wav, odd, 24000)
        assert other is None or other >= 0
    assert judge(torch.zeros(len(wav)), wav, 24000) is None or name == "log_mel_db"
    for bad, message in ((torch.full((48000,), torch.nan), "NaN"), (torch.zeros(2, 48000), "one channel")):
        with pytest.raises(CourseError, match=message): judge(bad, wav, 24000)


@pytest.mark.parametrize("name", ["pesq", "stoi"])
def test_beside_a_long_original(name, librivox):
    judge, wav = beside(name), torch.cat(librivox[1] * 6) # three minutes: too many utterances for the package at once
    noise = 0.01 * torch.randn(len(wav), generator=torch.Generator().manual_seed(0))
    assert judge(wav, wav, 24000) == pytest.approx(SAME_SCORE[name], abs=0.01)
    assert judge(wav, wav + noise, 24000) < judge(wav, wav, 24000) - 0.02


def test_a_distance_in_decibel():
    wav = 0.1 * torch.randn(24000, generator=torch.Generator().manual_seed(0))
    assert log_mel_distance(wav, 2 * wav, 24000) == pytest.approx(20 * torch.tensor(2.0).log10().item(), abs=1e-3)
    assert log_mel_distance(wav, 0.5 * wav, 24000) == log_mel_distance(0.5 * wav, wav, 24000)
    narrow = resample(resample(wav, 24000, 16000), 16000, 24000)  # the upper band is gone
    assert log_mel_distance(wav, narrow, 24000) > 5 > 0.1 > log_mel_distance(wav, narrow, 24000, high=7000)


@needs("normaliser", "error rates")
def test_a_row_of_a_codec(librivox, monkeypatch):
    texts, wavs = librivox[0][:3], librivox[1][:3]
    monkeypatch.setattr(evaluation, "standing_judge", lambda name: Recogniser(name, lambda pieces: ["one lamp"] * len(pieces)) if name == "echo" else None)
    answers = measure_codec(["one lamp", None, ""], wavs, [0.5 * wav for wav in wavs], 24000, ["echo"])
    assert len(answers["log_mel_db"]) == 3 and answers["similarity"] is None
    row = codec_row(["one lamp", None, ""], wavs, [0.5 * wav for wav in wavs], 24000, ["echo"])
    assert row["n"] == 3 and row["wer_echo"] == 0 and row["log_mel_db"] > 1 and len(row["intervals"]["log_mel_db"]) == 2
    assert set(row["intervals"]) == set(row) - {"n", "intervals"} == {"wer_echo", "cer_echo", "similarity", "mos", "pesq", "stoi", "log_mel_db", "log_mel_low_db"}
    silent = codec_row([None, None], [torch.zeros(24000)] * 2, [torch.zeros(24000)] * 2, 24000, ["echo"])
    assert silent["wer_echo"] is silent["pesq"] is silent["stoi"] is silent["intervals"]["pesq"] is None and silent["log_mel_db"] == 0
    json.dumps([row, silent])


def test_clock(monkeypatch):
    now = iter([0.0, 0.25, 0.75, 3.0, 3.0])
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(now))
    times = time_stream([torch.zeros(24000)] * 3, 24000) # heard from 0.25 to 2.25, then silence until 3
    assert times.first_audio_ms == 250 and times.rtf == 1 and times.stalled_s == pytest.approx(0.75)
    assert real_time_factor(1, 4) == 0.25 and real_time_factor(1, 0) == float("inf")


def test_stream_without_sound():
    for chunks in ([], [torch.zeros(0)]):
        with pytest.raises(CourseError, match="no sound"): time_stream(chunks, 24000)


def test_stop_reasons():
    assert list(stop_reasons(["length", "end", "end"]).items()) == [("end", 2), ("length", 1)] and stop_reasons([]) == {}


@needs("moonshine", "normaliser", "error rates", "similarity", "mos")
def test_a_row_of_the_report(librivox):
    texts, wavs = librivox
    samples = [Sample(texts[1], wavs[1], 24000, wavs[0]), Sample("paint the blue door", wavs[4], 24000)]
    answers = measure(samples, ["moonshine"])
    assert len(answers["moonshine"]) == len(answers["mos"]) == 2 and answers["similarity"][1] is None
    row = summarise(answers)
    assert list(row) == ["n", "intervals", "wer_moonshine", "cer_moonshine", "similarity", "mos"]
    assert row["n"] == 2 and row["wer_moonshine"] > 0.4 and row["similarity"] > 0.7 and set(row["intervals"]) == set(row) - {"n", "intervals"}
    json.dumps(row)


def test_import_is_light():
    code = "import ardm_course.evaluation, sys; print(sorted({'onnxruntime', 'ctranslate2', 'transformers', 'jiwer', 'distillmos', 'datasets'} & set(sys.modules)))"
    import subprocess
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
