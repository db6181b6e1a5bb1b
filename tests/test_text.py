"Text: what the notebook cannot show, case by case."
import contextlib
import random
import string
import sys
import time
import warnings

import pytest
import torch

from ardm_course.core import CourseError
from ardm_course.text import (BYTES, END, LONGEST_TEXT, PAD, SPACE, SYMBOLS, VOCABULARY_SIZE, BytePairEncoder, TextConfig,
                              TextTokenizer, g2p, has_g2p, learn_merges, load_encoder, load_g2p, normalise,
                              save_encoder, tidy_phonemes, token_rate)

needs_g2p = pytest.mark.skipif(not has_g2p(), reason="hibari-tts is not installed")

READINGS = {
    # numbers
    "7 dogs": "seven dogs",
    "1,234,567": "one million two hundred and thirty four thousand five hundred and sixty seven",
    "3.14 and .5": "three point one four and point five",
    "3.10": "three point one zero",
    "It is -5 or −3.2.": "It is minus five or minus three point two.",
    "007": "zero zero seven",
    "12345678901234567890": "one two three four five six seven eight nine zero " * 2,
    "1st, 2nd, 23rd, 101st": "first, second, twenty third, one hundred and first",
    "1/2, 3/4 and 2½": "one half, three quarters and two and one half",
    "24/7": "twenty four slash seven",
    "version 1.2.3": "version one point two point three",
    "pages 5-6": "pages five to six",
    "a 21-year-old": "a twenty one-year-old",
    "No. 5 and #6": "number five and number six",
    "call 555-1234": "call five five five, one two three four",
    "３５": "thirty five",
    "٣ cats": "three cats",
    # years and dates
    "In 1905 and 2024.": "In nineteen oh five and twenty twenty four.",
    "2005": "two thousand and five",
    "1914–1918": "nineteen fourteen to nineteen eighteen",
    "the 1990s and '80s": "the nineteen nineties and eighties",
    "2024-03-05": "March fifth, twenty twenty four",
    "3/5/2024": "March fifth, twenty twenty four",
    "March 5, 2024": "March fifth, twenty twenty four",
    "Dec. 25": "December twenty fifth",
    "the 5th of May": "the fifth of May",
    "5 March": "the fifth of March",
    # times
    "at 9:15.": "at nine fifteen.",
    "at 9:05": "at nine oh five",
    "at 9:00": "at nine o'clock",
    "at 13:00": "at thirteen hundred",
    "9 a.m. now": "nine AM now",
    "at 12:30 p.m.": "at twelve thirty PM.",
    "10:30pm": "ten thirty PM",
    "12:30:15": "twelve thirty and fifteen seconds",
    "3:1 or 21:75": "three to one or twenty one to seventy five",
    # money, percent, units
    "$1, $5 and $5.20": "one dollar, five dollars and five dollars and twenty cents",
    "$0.99": "ninety nine cents",
    "-$5": "minus five dollars",
    "$1.5 million, €2m": "one point five million dollars, two million euros",
    "£3.50 or 10 €": "three pounds and fifty pence or ten euros",
    "5–10%": "five to ten percent",
    "1 kg, 2 km, 6 ft": "one kilogram, two kilometers, six feet",
    "20°C, -4 °F, 98.6°": "twenty degrees Celsius, minus four degrees Fahrenheit, ninety eight point six degrees",
    # abbreviations and names
    "Dr. Smith met Mr. Jones and Mrs Brown.": "Doctor Smith met Mister Jones and Missus Brown.",
    "St. Paul lives on Main St.": "Saint Paul lives on Main Street.",
    "J. K. Rowling": "J K Rowling",
    "the U.S.A.": "the USA.",
    "e.g. this, i.e. that, etc.": "for example this, that is that, et cetera.",
    # symbols and addresses
    "salt & pepper": "salt and pepper",
    "1 + 1 = 2": "one plus one equals two",
    "https://www.example.com/path/": "example dot com slash path",
    "mail a.b@c.com": "mail a dot b at c dot com",
    "B2B mp3": "B two B mp three",
    # marks
    "“Curly” ‘quotes’ don’t": "Curly quotes don't",
    "Wait... what? Well… Yes...": "Wait, what? Well. Yes.",
    "well-known--and then—no - yes": "well-known, and then, no, yes",
    "(no reason) why? [yes] ok": "no reason, why? yes, ok",
    "one- or two-faced": "one or two-faced",
    "What?! Really!!! ,yes": "What? Really! yes",
    "hello,world.Next": "hello, world. Next",
    "the dogs' bone": "the dogs bone",
    "naïve café, Łódź, ﬁne": "naive cafe, Lodz, fine",
    "  two \t lines\nhere ": "two lines here",
}


@pytest.mark.parametrize("text, reading", READINGS.items())
def test_reading(text, reading):
    assert normalise(text) == reading.strip()


def test_normalise_twice_changes_nothing():
    for text in READINGS:
        assert normalise(normalise(text)) == normalise(text)


def test_any_input_gives_clean_text_or_a_course_error():
    rng = random.Random(0)
    signs = string.printable + "“”‘’—–…½²€£°éß🙂你ˈə"
    for _ in range(300):
        text = "".join(rng.choices(signs, k=rng.randint(0, 60)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reading = normalise(text)
            except CourseError:
                continue
            assert set(reading) <= set(string.ascii_letters + " .,?!;:'-"), text
            assert reading == reading.strip() and "  " not in reading and normalise(reading) == reading, text


@pytest.mark.parametrize("symbol", ["🙂", "♥", "你", "∑"])
def test_unknown_symbols_are_dropped_with_a_warning(symbol):
    with pytest.warns(UserWarning, match=symbol):
        assert normalise(f"I {symbol} tea") == "I tea"


def test_no_input_within_the_limit_keeps_the_rules_busy():
    start = time.process_time()
    for sign in " .-,1$'(/:A":
        with contextlib.suppress(CourseError):  # some signs become long words
            normalise("a" + sign * 900 + "a")
    assert time.process_time() - start < 60  # nested repeats in a rule would take hours


def test_plain_text_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert normalise('He said: "Yes (perhaps)!"') == "He said: Yes, perhaps!"


@pytest.mark.parametrize("text", ["", "   ", "?!...", "🙂🙂", "你好", "—"])
def test_nothing_to_read(text):
    with pytest.raises(CourseError, match="no English word"):
        normalise(text)


@pytest.mark.parametrize("text", ["x" * 5000, "hello " * 834, "7 " * 400, "." * 200_000 + "a", "a" + "- " * 100_000])
def test_too_long(text):
    with pytest.raises(CourseError, match=f"limit is {LONGEST_TEXT}.*Split"):
        normalise(text)


def test_vocabulary_is_frozen():
    "Checkpoints hold one embedding per symbol: a changed order would make them speak gibberish."
    assert VOCABULARY_SIZE == TextTokenizer.vocabulary == len(SYMBOLS) == 112
    assert (PAD, END, SPACE) == (0, 1, 2)
    assert "".join(SYMBOLS[2:95]) == (" .,?!;:'-" "abcdefghijklmnopqrstuvwxyz" "ˈˌAIOQWYaeiouyæɐɑɒɔəɚɛɜɪʊʌᵊᵻ"
                                      "bdfhjklmnprstvwxzðŋɡɹɾʃʒʔʤʧθTː")
    assert TextTokenizer().encode("Hi, you.") == [18, 19, 4, 2, 35, 25, 31, 3, 1]


@pytest.mark.parametrize("text", READINGS)
def test_characters_round_trip(text):
    tokenizer = TextTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalise(text).lower()
    assert ids[-1] == END and PAD not in ids and max(ids) < tokenizer.vocabulary


TEXT, SOUND = "The cough went through, didn't it?", "ðə kˈɔf wˈɛnt θɹu, dˈɪdᵊnt ɪt?"


def phones(share=1.0):
    return TextTokenizer(TextConfig("phonemes", share))


def draw(share, seed, text=TEXT, sound=SOUND):
    tokenizer = phones(share)
    return tokenizer.decode(tokenizer.encode(text, torch.Generator().manual_seed(seed), phonemes=sound))


def test_phonemes_round_trip_and_need_no_generator():
    assert phones(0.0).decode(phones(0.0).encode(TEXT, phonemes=SOUND)) == SOUND


def test_replacement_edges():
    for seed in range(20):
        assert draw(0.0, seed) == TEXT.lower()
        assert draw(1.0, seed) == SOUND


def test_replacement_is_by_word_and_repeats_with_the_seed():
    rows = [draw(0.5, seed) for seed in range(50)]
    assert rows == [draw(0.5, seed) for seed in range(50)]
    assert len(set(rows)) > 20
    for row in rows:
        assert all(word in pair for word, pair in zip(row.split(), zip(TEXT.lower().split(), SOUND.split()), strict=True))
    share = sum(word in SOUND.split() for row in rows for word in row.split()) / (50 * 6)
    assert 0.4 < share < 0.6


def test_replacement_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(0.5, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_unequal_word_counts_replace_the_whole_row():
    sound = "ðə kˈɔf wˈɛnt θɹu, dˈɪd ᵊnt ɪt?"
    assert {draw(0.5, seed, sound=sound) for seed in range(20)} == {TEXT.lower(), sound}


def test_foreign_signs_in_phonemes():
    assert tidy_phonemes("“wˈɛl—nˈO” … (jˈɛs) 1") == "wˈɛl, nˈO. jˈɛs"
    assert draw(1.0, 0, "Well, no.", "“wˈɛl—nˈO.”") == "wˈɛl, nˈO."


@pytest.mark.parametrize("config", [TextConfig("letters"), TextConfig("phonemes", -0.1), TextConfig("phonemes", 1.1)])
def test_bad_config(config):
    with pytest.raises(CourseError, match="kind 'characters' or 'phonemes'"):
        TextTokenizer(config)


def test_without_hibari(monkeypatch):
    load_g2p.cache_clear()
    monkeypatch.setitem(sys.modules, "hibari", None)
    monkeypatch.setattr("ardm_course.text.find_spec", lambda name: None)
    assert not has_g2p()
    with pytest.raises(CourseError, match="pip install hibari-tts"):
        phones().encode("Hello there.")
    assert phones().encode("Hello.", phonemes="həlˈO.")[-1] == END
    assert TextTokenizer().encode("Hello.")[-1] == END


@needs_g2p
def test_g2p_keeps_words_marks_and_the_alphabet():
    for text in READINGS:
        words, sounds = normalise(text).split(), g2p(text).split()
        assert [word[-1] for word in words if word[-1] in ".,?!;:"] == [sound[-1] for sound in sounds if sound[-1] in ".,?!;:"]
        assert set("".join(sounds)) <= set(SYMBOLS)
    assert g2p("The train leaves at 9:15.") == "ðə tɹˈAn lˈivz æt nˈIn fˌɪftˈin."
    assert phones().decode(phones().encode("Hello there.")) == g2p("Hello there.") == "həlˈO ðˈɛɹ."


BOOK = (" ".join(READINGS.values()) + " " + " ".join(READINGS)).replace("½", "")  # the one piece where GPT-2 cuts differently


@pytest.mark.parametrize("text", ["", " ", "plain words", "  spaces \n\n and\ttabs ", "naïve 你好 🙂 ½", "_a__b 12ab's", BOOK])
def test_byte_pairs_round_trip(text):
    encoder = BytePairEncoder.train([BOOK], 400)
    assert encoder.decode(encoder.encode(text)) == text


def test_byte_pairs_by_hand():
    encoder = BytePairEncoder.train(["ab ab ab abc"], 259)
    a, b, space = BYTES.index(ord("a")), BYTES.index(ord("b")), BYTES.index(ord(" "))
    assert list(encoder.ranks) == [(a, b), (space, 256), (257, BYTES.index(ord("c")))]
    assert encoder.encode("ab abc") == [256, 258]


def test_training_stops_when_nothing_is_left_to_merge():
    assert len(learn_merges(["abab"], 1000)) == 2 and learn_merges([], 300) == []


@pytest.mark.parametrize("vocabulary", [300, 700])
def test_byte_pairs_agree_with_tokenizers(vocabulary):
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.pre_tokenizers.ByteLevel
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = level(add_prefix_space=False)
    peer.train_from_iterator([BOOK], tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=level.alphabet(), show_progress=False))
    encoder = BytePairEncoder.train([BOOK], vocabulary)
    assert len(encoder.tokens) == peer.get_vocab_size() == vocabulary
    for text in (BOOK, "Unseen words, didn't  you?\n 你好 🙂 12ab_c"):
        assert encoder.encode(text) == peer.encode(text).ids


def test_encoder_file(tmp_path):
    encoder, file = BytePairEncoder.train([BOOK], 300), tmp_path / "encoder.json"
    save_encoder(encoder, file)
    assert load_encoder(file).encode(BOOK) == encoder.encode(BOOK)
    for content in ("", "{}", '{"merges": [[1, 9999]]}', '{"merges": 3}'):
        file.write_text(content)
        with pytest.raises(CourseError, match="not a byte-pair encoder"):
            load_encoder(file)
    with pytest.raises(CourseError, match="not a byte-pair encoder"):
        load_encoder(tmp_path / "missing.json")


def test_token_rate():
    assert token_rate([1] * 25, 4.0) == 6.25
    assert token_rate(TextTokenizer().encode(TEXT), 2.0) > 6.25 > token_rate(TEXT.split(), 2.0)
