"""A page to talk to: frames, words, the line, limits, faults, and a job that ends when its page goes away."""
import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("websockets", reason="websockets is not installed: pip install websockets")
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from ardm_course import cli, page
from ardm_course.core import CourseError
from ardm_course.page import (Busy, Limits, Studio, converse, count_stalls, finished_words, open_studio, page_origins, pcm_frame, place_in_line, play_times, read_frame, read_message,
                              read_order, running)
from ardm_course.tts import TTS

START = json.dumps({"start": {"job": 1, "system": "beeper"}})


class Beeper:
    "A system without a model: 0.1 s of a ramp for every word; it can be slow, wait for a permit, break, and tell what it did."
    def __init__(self, cost=0.0, permits=None, broken=None):
        self.cost, self.permits, self.broken, self.codec = cost, permits, broken, SimpleNamespace(sample_rate=24000)
        self.words, self.options, self.closed = [], None, threading.Event()

    def stream(self, words, **options):
        self.options = options
        try:
            for word in words:
                if self.permits: self.permits.acquire()
                if self.broken: raise self.broken
                time.sleep(self.cost)
                self.words.append(word)
                yield torch.linspace(-0.5, 0.5, 2400) * (1 + len(self.words) % 7) / 8
        finally: self.closed.set()


def studio(beeper): return Studio({"beeper": [], "choir": ["anna", "ben"]}, load=lambda name: beeper)


def talk(address, origin=None): return connect(address.replace("http", "ws") + "/speak", origin=origin or address, compression=None, max_size=None, proxy=None)


def sends(ws, *messages):
    for message in messages: ws.send(message if isinstance(message, str) else json.dumps(message))


def until(ws, *kinds, patience=20):
    "Read until an answer of one of these kinds; sounds pass."
    while True:
        item = ws.recv(timeout=patience)
        if isinstance(item, str) and (found := json.loads(item))["kind"] in kinds: return found


# ---- parts

@pytest.mark.parametrize("seed", range(5))
def test_frames_come_back(seed):
    draws = torch.Generator().manual_seed(seed)
    wav = 0.6 * torch.randn(torch.randint(0, 4000, (), generator=draws), generator=draws)
    start, made, back = read_frame(pcm_frame(123456 + seed, 70000, wav))
    assert (start, made, len(back)) == (123456 + seed, 70000, len(wav))
    torch.testing.assert_close(back, wav.clamp(-1, 1), atol=0.5 / 32767 + 1e-7, rtol=0)
    assert len(pcm_frame(0, 0, wav)) == 8 + 2 * len(wav)


@pytest.mark.parametrize("seed", range(10))
def test_words_do_not_depend_on_where_the_text_is_cut(seed):
    draws = random.Random(seed)
    text = "".join(draws.choice(["ab", "c'd", "Wörter,", " ", "\n", "\t  ", "7."]) for _ in range(60))
    words, rest, left = [], "", text
    while left:
        cut = draws.randint(0, 9)
        found, rest = finished_words(rest, left[:cut])
        words, left = words + found, left[cut:]
    assert words + [rest] * bool(rest) == text.split()


@pytest.mark.parametrize("seed", range(5))
def test_chunks_sound_in_order_without_gaps_but_stalls(seed):
    draws = random.Random(seed)
    arrivals, seconds = sorted(draws.uniform(0, 3) for _ in range(20)), [draws.uniform(0.05, 0.3) for _ in range(20)]
    for lead in (0.0, 0.2, 5.0):
        starts = play_times(arrivals, seconds, lead)
        ends = [start + length for start, length in zip(starts, seconds)]
        assert all(start >= arrival for start, arrival in zip(starts, arrivals)) and starts[0] == arrivals[0] + lead
        gaps = [(start - end, arrival) for end, start, arrival in zip(ends, starts[1:], arrivals[1:])]
        assert all(abs(gap) < 1e-9 or gap > lead - 1e-9 for gap, _ in gaps) and count_stalls(starts, seconds) == sum(gap > 1e-9 for gap, _ in gaps)
    assert count_stalls(play_times(arrivals, seconds, 5.0), seconds) == 0


def test_the_line_has_an_end():
    assert [place_in_line(inside, 2) for inside in range(3)] == [0, 1, 2]
    with pytest.raises(Busy, match="busy"): place_in_line(3, 2)


def test_origins_are_our_own():
    assert set(page_origins("127.0.0.1", 80)) == set(page_origins("localhost", 80)) == {"http://127.0.0.1:80", "http://localhost:80"}
    assert page_origins("192.0.2.7", 81) == ["http://192.0.2.7:81"] and page_origins("::1", 9)[0] == "http://[::1]:9"


@pytest.mark.parametrize("raw", ["", "}{", "[]", "1", '"text"', "{}", '{"text": 1}', '{"text": "a", "end": null}', '{"heard": true}', '{"heard": "3"}', '{"start": "now"}', '{"sing": 1}', "[" * 9000, b'{"stop": null}'])
def test_messages_that_are_none(raw):
    with pytest.raises(CourseError, match="Load the page again"): read_message(raw)


@pytest.mark.parametrize("wish, said", [({"system": "nobody"}, "Choose one of: beeper, choir"), ({"system": ["choir"]}, "Choose one of"), ({"system": "choir", "voice": "carl"}, "anna, ben"), ({"system": "beeper", "voice": "anna"}, "its own"),
                                        ({"system": "beeper", "steps": 0}, "Steps is a number from 1 to 64"), ({"system": "beeper", "steps": 2.5}, "Steps"), ({"system": "beeper", "guidance": float("nan")}, "Guidance"),
                                        ({"system": "beeper", "guidance": "2"}, "Guidance"), ({"system": "beeper", "seed": True}, "Seed"), ({"system": "beeper", "temperature": 1e300}, "Temperature"), ({"system": "beeper", "job": "1"}, "Load the page")])
def test_orders_that_cannot_be(wish, said):
    with pytest.raises(CourseError, match=said): read_order({"job": 1, **wish}, {"beeper": [], "choir": ["anna", "ben"]})


def test_a_system_is_loaded_once_and_only_the_last_is_kept():
    loaded = []
    shelf = Studio({}, load=lambda name: loaded.append(name) or name.upper())
    assert [shelf.load(name) for name in "aabba"] == list("AABBA") and loaded == ["a", "b", "a"] and shelf.tts == "A"


def test_a_system_that_cannot_be_loaded_is_tried_again():
    tries = []
    def load(name):
        tries.append(name)
        if len(tries) < 2: raise CourseError("The checkpoint is damaged.")
        return "loaded"
    shelf = Studio({}, load)
    with pytest.raises(CourseError): shelf.load("a")
    assert shelf.load("a") == "loaded"


def test_released_systems_are_offered_and_codecs_are_not():
    names = open_studio().systems
    assert next(iter(names)) == page.FIRST and not {"vocoder", "wavevae"} & set(names)
    with pytest.raises(CourseError, match="nobody"): open_studio(["nobody"])


# ---- conversations

def test_choices_reach_the_system():
    beeper = Beeper()
    with running(studio(beeper)) as address:
        heard = converse(address, ["one", "two"], system="choir", voice="ben", guidance=3, steps=4, temperature=0.25, seed=7)
    assert heard.last["kind"] == "done" and beeper.words == ["one", "two"]
    assert beeper.options == {"voice": "ben", "guidance": 3.0, "steps": 4, "temperature": 0.25, "seed": 7}


def test_sound_comes_before_the_text_has_ended():
    permits = threading.Semaphore(0)
    with running(studio(Beeper(permits=permits))) as address, talk(address) as ws:
        sends(ws, START, {"text": "one tw"})
        permits.release()
        until(ws, "ready")
        assert read_frame(ws.recv(timeout=20))[0] == 0  # one beep, for the one finished word
        sends(ws, {"text": "o"}, {"end": None})
        permits.release(9)
        assert read_frame(ws.recv(timeout=20))[0] == 2400
        done = until(ws, "done")
    assert done["audio_s"] == pytest.approx(0.2) and 0 <= done["first_ms"] <= 1000 * done["total_s"] + 1


def test_streamed_sound_is_the_systems_own():
    torch.manual_seed(0)
    from test_cli import TINY, ARDM, MelCodec, replace
    model = ARDM(replace(TINY, codec=MelCodec().to_dict()))
    torch.nn.init.constant_(model.stop[-1].bias, 5.0)
    tts, words = TTS(model), "Good morning. Here I am.".split()
    direct = torch.cat(list(tts.stream(iter(words), steps=2, guidance=1.5, seed=3)))
    with running(Studio({"tiny": []}, load=lambda name: tts)) as address: heard = converse(address, words, system="tiny", steps=2, guidance=1.5, seed=3)
    assert heard.rate == tts.codec.sample_rate
    torch.testing.assert_close(heard.wav, direct.clamp(-1, 1), atol=0.5 / 32767 + 1e-6, rtol=0)
    assert [start for _, start, _ in heard.frames] == torch.tensor([0, *(len(wav) for _, _, wav in heard.frames)]).cumsum(0)[:-1].tolist()


def test_a_second_text_on_the_same_page():
    with running(studio(Beeper())) as address, talk(address) as ws:
        for job in (1, 2):
            sends(ws, {"start": {"job": job, "system": "beeper"}}, {"text": "a b"}, {"end": None})
            assert until(ws, "done")["job"] == job


# ---- limits and bad manners

def test_a_page_that_does_not_listen_is_not_served_ahead():
    beeper = Beeper()
    with running(studio(beeper), limits=Limits(ahead=1.0, idle=1.0)) as address:
        deaf = converse(address, ["word"] * 100, listen=False, system="beeper")
        assert 1.0 <= sum(deaf.seconds) <= 1.2 and deaf.last["kind"] == "error" and "no sound was heard" in deaf.last["message"]
        assert beeper.closed.wait(10) and len(beeper.words) <= 12
        assert converse(address, ["word"] * 100, system="beeper").last["audio_s"] == pytest.approx(10)


def test_a_page_that_says_nothing_loses_its_place():
    with running(studio(Beeper()), limits=Limits(idle=0.3)) as address, talk(address) as ws:
        sends(ws, START, {"text": "one "})
        assert "no word came" in until(ws, "error")["message"]
        sends(ws, START, {"text": "again"}, {"end": None})
        assert until(ws, "done")["audio_s"] == pytest.approx(0.1)


def test_the_line_and_the_busy_answer():
    permits = threading.Semaphore(0)
    with running(studio(Beeper(permits=permits)), limits=Limits(waiting=1)) as address, talk(address) as first, talk(address) as second, talk(address) as third:
        sends(first, START, {"text": "one"}, {"end": None})
        until(first, "ready")
        sends(second, START, {"text": "two"}, {"end": None})
        assert until(second, "waiting")["place"] == 1
        sends(third, START)
        assert "busy" in until(third, "busy")["message"]
        permits.release(9)
        assert until(first, "done") and until(second, "done")
        sends(third, START, {"text": "three"}, {"end": None})
        assert until(third, "done")


@pytest.mark.parametrize("how", ["stop", "close", "vanish", "start"])
def test_a_page_that_goes_frees_the_job(how):
    permits, beeper = threading.Semaphore(1), None
    beeper = Beeper(permits=permits)
    with running(studio(beeper)) as address, talk(address) as ws:
        sends(ws, START, {"text": "one two three four"}, {"end": None})
        until(ws, "ready")
        ws.recv(timeout=20)
        if how == "stop": sends(ws, {"stop": None})
        elif how == "close": ws.close()
        elif how == "vanish": ws.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
        else: sends(ws, {"start": {"job": 2, "system": "beeper"}})
        deadline = time.monotonic() + 20
        while not beeper.closed.wait(0.05):  # the thread ends at its next sound
            assert time.monotonic() < deadline
            permits.release()
        made = len(beeper.words)
        permits.release(100)
        if how == "start":
            sends(ws, {"text": "five"}, {"end": None})
            assert until(ws, "done")["job"] == 2
        elif how == "stop": assert until(ws, "stopped")["job"] == 1
        assert converse(address, ["next"], system="beeper").last["audio_s"] == pytest.approx(0.1)
    assert "four" not in beeper.words[:made]


def test_a_cancellation_that_comes_with_a_result_is_kept():
    import asyncio
    async def both():
        result = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(page.within(60, result))
        await asyncio.sleep(0)
        result.set_result("sound")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError): await waiting
        assert await page.within(60, asyncio.sleep(0, "in time")) == "in time"
        with pytest.raises(asyncio.TimeoutError): await page.within(0, asyncio.sleep(60))
    asyncio.run(both())


def test_stops_at_any_moment():
    with running(studio(Beeper())) as address, talk(address) as ws:
        for job in range(150):  # each stop meets the job at another moment
            sends(ws, {"start": {"job": job, "system": "beeper"}}, {"text": "one two"}, {"stop": None})
        sends(ws, {"start": {"job": -1, "system": "beeper"}}, {"text": "last"}, {"end": None})
        while until(ws, "done")["job"] != -1: pass


def test_who_waits_in_line_and_leaves_gives_up_the_place():
    permits = threading.Semaphore(0)
    with running(studio(Beeper(permits=permits)), limits=Limits(waiting=1)) as address, talk(address) as first:
        sends(first, START, {"text": "one"}, {"end": None})
        until(first, "ready")
        with talk(address) as second:
            sends(second, START)
            until(second, "waiting")
            sends(second, {"stop": None})
            until(second, "stopped")
        with talk(address) as third:
            sends(third, START, {"text": "three"}, {"end": None})
            assert until(third, "waiting", "busy")["kind"] == "waiting"
            permits.release(9)
            assert until(first, "done") and until(third, "done")


@pytest.mark.parametrize("messages, said", [([START, {"text": "a " * 60}], "longer than 100"), ([START, *[{"text": "a" * 30}] * 4], "longer than 100"), ([START, {"end": None}], "no word"), ([START, {"text": "  \n"}, {"end": None}], "no word"),
                                            (["nonsense"], "does not understand"), ([{"start": {"job": 1, "system": "../../data"}}], "no system"), ([{"start": {}}], "no system")])
def test_every_fault_is_one_sentence_and_the_page_may_go_on(messages, said):
    with running(studio(Beeper()), limits=Limits(text=100)) as address, talk(address) as ws:
        sends(ws, *messages)
        answer = until(ws, "error")
        assert said in answer["message"] and "Traceback" not in str(answer)
        sends(ws, START, {"text": "well?"}, {"end": None})
        assert until(ws, "done")


def test_late_words_of_a_text_that_has_ended_are_not_spoken():
    beeper = Beeper()
    with running(studio(beeper)) as address, talk(address) as ws:
        sends(ws, {"text": "early "}, {"heard": 5}, {"end": None}, {"stop": None}, START, {"text": "one"}, {"end": None})
        until(ws, "done")
        sends(ws, {"text": "late "}, {"heard": 10**9}, {"end": None}, {"stop": None}, START, {"text": "two"}, {"end": None})
        until(ws, "done")
    assert beeper.words == ["one", "two"]


@pytest.mark.parametrize("error, said", [(CourseError("This text cannot be spoken. Leave out the signs."), "Leave out the signs"), (RuntimeError("secret path /data"), "Something broke")])
def test_errors_of_a_system(error, said, caplog):
    with running(studio(Beeper(broken=error))) as address: answer = converse(address, ["word"], system="beeper").last
    assert answer["kind"] == "error" and said in answer["message"] and "secret" not in str(answer)
    assert ("secret" in caplog.text) == (said == "Something broke")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1", "https://127.0.0.1:{port}", "http://127.0.0.1:{port}.evil.example", None])
def test_other_pages_may_not_come_in(origin):
    with running(studio(Beeper())) as address:
        options = {} if origin is None else {"origin": origin.format(port=address.rsplit(":", 1)[1])}
        with pytest.raises(InvalidStatus) as refused, connect(address.replace("http", "ws") + "/speak", proxy=None, **options): pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize("message", ["x" * 40_000, b"x" * 40_000])
def test_a_message_that_is_too_long_ends_the_connection(message):
    with running(studio(Beeper())) as address:
        with pytest.raises(ConnectionClosed) as ended, talk(address) as ws:
            ws.send(message)
            while True: ws.recv(timeout=20)
        assert ended.value.rcvd.code == 1009 and converse(address, ["next"], system="beeper").last["kind"] == "done"


def test_a_longest_text_fits_into_a_message():
    limits = Limits()
    assert len(json.dumps({"text": "\x01" * limits.text})) < limits.message
    with running(studio(Beeper())) as address, talk(address) as ws:
        sends(ws, START, json.dumps({"text": "\U0001d11e" * limits.text}, ensure_ascii=False), {"end": None})  # as a browser writes it
        assert until(ws, "done")


def test_more_pages_than_chairs():
    with running(studio(Beeper()), limits=Limits(pages=1)) as address, talk(address) as ws:
        ws.recv(timeout=20)
        with pytest.raises(InvalidStatus) as refused, talk(address): pass
        assert refused.value.response.status_code == 503


def test_the_page_over_http():
    with running(studio(Beeper())) as address:
        with urllib.request.urlopen(address) as answer:
            assert answer.read().decode() == page.PAGE and answer.headers.get_all("Content-Type") == ["text/html; charset=utf-8"]
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and answer.headers["X-Content-Type-Options"] == "nosniff"
        for path, code in (("/data", 404), ("/../setup.py", 404), ("/speak", 426), ("/" + "x" * 10_000, 414)):
            with pytest.raises(urllib.error.HTTPError) as refused: urllib.request.urlopen(address + path)
            assert refused.value.code in (code, 400)


@pytest.mark.parametrize("request_text", [b"nonsense\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n", b"\x16\x03\x01\x02\x00"])
def test_requests_that_are_none(request_text):
    with running(studio(Beeper()), limits=Limits(patience=1.0)) as address:
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=20) as raw:
            raw.sendall(request_text)
            try: answer = raw.recv(4096)
            except ConnectionResetError: answer = b""
        assert b"Traceback" not in answer and b" 200 " not in answer
        assert converse(address, ["next"], system="beeper").last["kind"] == "done"


# ---- the address, and the command

@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7", "no such host"])
def test_addresses_that_cannot_be_had(host):
    with pytest.raises(CourseError), running(studio(Beeper()), host=host): pass


def test_a_port_that_is_taken():
    with running(studio(Beeper())) as address:
        with pytest.raises(CourseError, match="--port"), running(studio(Beeper()), port=int(address.rsplit(":", 1)[1])): pass


def test_the_command(monkeypatch, capsys):
    asked = []
    def forever(shelf, host, port):
        asked.append((list(shelf.systems), host, port))
        raise KeyboardInterrupt
    monkeypatch.setattr(page, "serve", forever)
    assert cli.main(["serve"]) == 130 and cli.main(["serve", "ditar-toy", "--host", "::1", "--port", "0"]) == 130
    assert asked[0][1:] == ("127.0.0.1", 8765) and len(asked[0][0]) > 1 and asked[1] == (["ditar-toy"], "::1", 0)
    assert cli.main(["serve", "nobody"]) == 2 and "nobody" in capsys.readouterr().err


def test_another_host_is_warned_about(monkeypatch, capsys):
    async def over(): raise KeyboardInterrupt
    monkeypatch.setattr(page, "is_loopback", lambda host: False)
    monkeypatch.setattr(page.asyncio, "Event", lambda: SimpleNamespace(wait=over))
    with pytest.raises(KeyboardInterrupt): page.serve(studio(Beeper()), port=0)
    assert "no password" in capsys.readouterr().out
