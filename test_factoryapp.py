"""Tests through the front doors: HTTP to a real server, a small real Bot API server in Telegram's
place, the program itself. What these stand-ins are made of is at the end of the file."""

import ast
import base64
import encodings
import errno
import gzip
import hashlib
import ipaddress
import itertools
import json
import math
import os
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import tomllib
import unicodedata
import warnings
from collections import defaultdict, deque
from contextlib import closing, contextmanager, nullcontext, suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urljoin, urlsplit

import jwt
import pytest
import urllib3
from waitress import wasyncore

# The mark "long" (see only_when_asked_for), and WebTest's WebOb on Python 3.11 and 3.12.
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)
warnings.filterwarnings("ignore", message="'cgi' is deprecated")
from webtest import AppError, TestApp  # noqa: E402

import factoryapp  # noqa: E402

HERE = Path(__file__).parent
PASSWORD = "S3cure-pass-91"
BOT_TOKEN = "4242:AAtest-token-of-nobody"
BOT_ID = 4242
JSON = "application/json"
JSON_ANSWER = "application/json; charset=utf-8"
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=x"


# --- Fixtures -------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """Start the program on this test's database, as often as wanted."""
    programs = []

    def start(*arguments, **env):
        programs.append(Program(tmp_path, *arguments, **env))
        return programs[-1]

    yield start
    for program in programs:
        program.close()


@pytest.fixture
def http(request, tmp_path, monkeypatch, breaking):
    """A client of the server on a fresh database, with cheap hashes and the bot in the terminal."""
    monkeypatch.setattr(factoryapp.settings, "db", str(tmp_path / "factoryapp.db"))
    monkeypatch.setattr(factoryapp, "SCRYPT", {"n": 16, "r": 8, "p": 1})
    for what in ("login", "registration", "message", "said"):
        monkeypatch.setattr(factoryapp, f"{what}_limiter", factoryapp.Limiter())
    monkeypatch.setattr(factoryapp, "used_keys", set())
    factoryapp.open_store()
    factoryapp.turns.open(0, ())
    client = CLIENTS[getattr(request, "param", "alone")]
    with serving() as server, closing(client(server)) as http:
        yield http


@pytest.fixture
def bot_api():
    """Telegram's servers."""
    with closing(BotApi()) as bot_api:
        yield bot_api


# --- What users do --------------------------------------------------------------------------------


def register(http, username, password=PASSWORD):
    return http.post_json("/api/users/register/", {"username": username, "password": password}).json


def log_in(http, username, password=PASSWORD):
    """The headers of a signed-in request."""
    tokens = http.post_json("/auth/token/", {"username": username, "password": password}).json
    return {"Authorization": f"Bearer {tokens['access']}"}


def join(http, username):
    """Register and log in."""
    register(http, username)
    return log_in(http, username)


def post(http, headers, text, **fields):
    return http.post_json("/api/messages/", {"text": text, **fields}, headers=headers).json


def list_messages(http, headers):
    return http.get("/api/messages/", headers=headers).json


def list_scheduled(http, headers):
    return http.get("/api/messages/?delivery=scheduled", headers=headers).json


def cancel(http, headers, message_id=1):
    """The status of the answer."""
    return http.delete(f"/api/messages/{message_id}/", headers=headers, status="*").status_int


def make_key(http, headers, name="cron", **fields):
    """The headers of a request by a new API key."""
    sent = {"name": name, **fields}
    key = http.post_json("/api/users/keys/", sent, headers=headers, status=201).json["key"]
    return {"Authorization": f"Bearer {key}"}


def list_keys(http, headers):
    return http.get("/api/users/keys/", headers=headers).json


def link_token(http, headers):
    return http.get("/api/users/get-telegram-token/", headers=headers).json["telegram_token"]


# --- The whole journey ----------------------------------------------------------------------------


def test_whole_journey_in_the_terminal(start, tmp_path):
    program = start()
    assert str(tmp_path / "factoryapp.db") in program.said
    program.wait_for("bot: this terminal")
    headers = join(program.http, "alice")
    program.type("/start")
    program.wait_for("Пришлите мне токен")
    answer = program.http.get("/api/users/get-telegram-token/", headers=headers).json
    assert answer["link"] is None
    program.type(answer["telegram_token"])
    program.wait_for("успешно привязаны")
    post(program.http, headers, "при\x1b[2Jвет")
    program.wait_for("alice, я получил от тебя сообщение:\n\nпри\ufffd\\[2Jвет\n")
    program.type("написано боту")
    program.wait_for("alice, я получил от тебя сообщение:\n\nнаписано боту\n")
    cron = make_key(program.http, headers)
    assert program.end() == (0, pytest.approx(0, abs=2))
    program = start()  # a link, a login and the messages outlive the process
    assert [(m["text"], m["source"]) for m in list_messages(program.http, headers)] == [
        ("при\x1b[2Jвет", "api"),
        ("написано боту", "telegram"),
    ]
    post(program.http, cron, "снова")
    program.wait_for("снова")
    assert program.end(signal.SIGINT) == (0, pytest.approx(0, abs=2))
    assert not re.search("WARNING|ERROR", program.log())
    check_database(tmp_path / "factoryapp.db")


def test_whole_journey_in_telegram(start, bot_api, tmp_path):
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN, TELEGRAM_API_URL=bot_api.url)
    program.wait_for("bot: @factory_test_bot on Telegram")
    headers = join(program.http, "alice")
    answer = program.http.get("/api/users/get-telegram-token/", headers=headers).json
    bot_api.write(7, "/start " + answer["link"].partition("?start=")[2])
    bot_api.wait_for(lambda: "успешно привязаны" in "".join(bot_api.texts(7)))
    post(program.http, headers, "я" * 16_384)
    bot_api.wait_for_texts(7, 6)
    assert program.end() == (0, pytest.approx(0, abs=2))  # with a long poll in flight
    check_database(tmp_path / "factoryapp.db")


def test_program_asks_a_person_and_goes_on_with_the_answer(start, bot_api, tmp_path):
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN, TELEGRAM_API_URL=bot_api.url)
    script, bob = (join(program.http, name) for name in ("script", "bob"))
    bot_api.write(8, link_token(program.http, bob))
    bot_api.wait_for_texts(8, 1)
    question = post(program.http, script, "Стоп?", recipient="bob", choices=["Да", "Нет"])
    bot_api.wait_for(lambda: bot_api.keyboards)
    waiting = HTTPConnection(*program.address, timeout=60)
    waiting.request("GET", f"/api/messages/?reply_to={question['id']}&wait=50", headers=script)
    pressed = bot_api.press(8, 2, 1)
    [answer] = json.loads(waiting.getresponse().read())
    waiting.close()
    assert (answer["sender"], answer["text"]) == ("bob", "Нет")
    bot_api.wait_for(lambda: bot_api.answers == [(pressed, None)] and not bot_api.keyboards)
    assert program.end()[0] == 0
    check_database(tmp_path / "factoryapp.db")


# --- What the rooms' tests share ------------------------------------------------------------------

RETRY_AFTER_9 = {
    "error_code": 429,
    "description": "Too Many Requests",
    "parameters": {"retry_after": 9},
}
BLOCKED = {"error_code": 403, "description": "Forbidden: bot was blocked by the user"}
CHAT_NOT_FOUND = {"error_code": 400, "description": "Bad Request: chat not found"}
TOO_LONG = {"error_code": 400, "description": "Bad Request: message is too long"}
UNAUTHORIZED = {"error_code": 401, "description": "Unauthorized"}
NOT_FOUND = {"error_code": 404, "description": "Not Found"}
ANOTHER_POLLS = {
    "error_code": 409,
    "description": "Conflict: terminated by other getUpdates request",
}
EMPTY = {"error_code": 400, "description": "Bad Request: message text is empty"}
NO_QUERY = {"error_code": 400, "description": "Bad Request: query is too old or its ID is invalid"}
NOT_MODIFIED = {"error_code": 400, "description": "Bad Request: message is not modified"}
NO_REPLIED = {"error_code": 400, "description": "Bad Request: message to be replied not found"}
BAD_BUTTON = {"error_code": 400, "description": "Bad Request: BUTTON_DATA_INVALID"}
NO_THREAD = {"error_code": 400, "description": "Bad Request: message thread not found"}
WEBHOOK_IS_ACTIVE = {
    "error_code": 409,
    "description": "Conflict: can't use getUpdates method while webhook is active",
}
BREAKS, BREAKS_AT_ONCE = "breaks a constraint later", "breaks a constraint"
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
as_root = pytest.mark.skipif(
    not shutil.which("setpriv")
    or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="needs Linux and root",
)
alone_and_crowded = pytest.mark.parametrize("http", ["alone", "crowded"], indirect=True)


@pytest.fixture
def breaking(monkeypatch):
    """A message of the text BREAKS is stored, then breaks a constraint; BREAKS_AT_ONCE before."""
    real = factoryapp.add_message

    def break_constraint(db):
        db.execute("INSERT INTO users (username) VALUES (NULL)")

    def add_message(db, *users, text, **columns):
        if text == BREAKS_AT_ONCE:
            break_constraint(db)
        message = real(db, *users, text=text, **columns)
        if text == BREAKS:
            break_constraint(db)
        return message

    monkeypatch.setattr(factoryapp, "add_message", add_message)


@pytest.fixture
def lost_commits(monkeypatch):
    """From now on no round can be committed."""
    real = factoryapp.commit

    def lose_it_on_the_serving_thread(db):
        if threading.current_thread().name == "serving":
            db.execute("ROLLBACK")
        return real(db)

    def begin():
        monkeypatch.setattr(factoryapp, "commit", lose_it_on_the_serving_thread)

    return begin


def note_threads(monkeypatch, owner, name):
    """The names of the threads that call a function from now on."""
    threads, real = [], getattr(owner, name)

    def noted(*args, **kwargs):
        threads.append(threading.current_thread().name)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)
    return threads


@pytest.fixture
def telegram(http, bot_api, monkeypatch):
    """The bot in Telegram; no thread of its own runs, tests call poll() and deliver_next()."""
    monkeypatch.setattr(factoryapp, "SENDS_BURST", factoryapp.SENDS_PER_SECOND)
    home = factoryapp.Telegram(BOT_TOKEN, bot_api.url)
    factoryapp.turns.open(home.id, ())
    monkeypatch.setattr(factoryapp.running, "home", home)
    home.introduce()
    return home


@pytest.fixture
def clock(monkeypatch):
    """The time, which moves only when told to."""
    clock = Clock()
    monkeypatch.setattr(factoryapp, "now", lambda: clock.seconds)
    monkeypatch.setattr(factoryapp, "ticks", lambda: clock.ticks)
    factoryapp.turns.open(factoryapp.turns.bot_id, ())  # by this clock
    factoryapp.running.home.started = clock.ticks
    return clock


@pytest.fixture
def linked(http, telegram, bot_api):
    """Alice, whose chat is 7."""
    headers = join(http, "alice")
    link_chat(http, telegram, bot_api, headers, 7)
    bot_api.sent.clear()
    return headers


@pytest.fixture
def pair(http, telegram, bot_api):
    """Alice, whose chat is 7, and Bob, whose chat is 8."""
    alice, bob = join(http, "alice"), join(http, "bob")
    link_chat(http, telegram, bot_api, alice, 7)
    link_chat(http, telegram, bot_api, bob, 8)
    bot_api.sent.clear()
    return alice, bob


@pytest.fixture
def running(telegram, bot_api):
    """The same with its polling thread and senders at work."""
    stop = threading.Event()
    factoryapp.start_thread("polling", telegram.run, stop)
    factoryapp.start_thread("outbox", factoryapp.run_outbox, telegram, stop)
    yield telegram
    stop.set()
    bot_api.hung_up.set()
    factoryapp.turns.close()
    assert not factoryapp.turns.busy


def message_request(headers, text):
    """A POST of a message as Client.ask() takes it."""
    return "POST", "/api/messages/", json.dumps({"text": text}), {**headers, "Content-Type": JSON}


def deliver_next(home):
    """Deliver the head of the chat whose turn it is. Returns False if it is nobody's."""
    chat_id = factoryapp.turns.take()
    if chat_id is None:
        return False
    factoryapp.deliver_to(home, chat_id)
    return True


def deliver_all(home):
    while factoryapp.publish_due():
        pass
    while deliver_next(home):
        pass


def reopen_turns(telegram):
    """As a restart does."""
    queues = factoryapp.list_queues(factoryapp.connection(), telegram.id)
    factoryapp.turns.open(telegram.id, queues)


def queue(*chat_ids, text="text"):
    """Queue a text for each of these chats, whoever is linked there."""
    with factoryapp.transaction() as db:
        for chat_id in chat_ids:
            factoryapp.queue_text(db, (BOT_ID, chat_id), text)


def queue_by_another_process(*chat_ids):
    """The same, written behind this process's back."""
    with closing(sqlite3.connect(factoryapp.settings.db)) as db, db:
        row = "INSERT INTO outbox (bot_id, chat_id, text, queued_at) VALUES (?, ?, 'text', 0)"
        db.executemany(row, [(BOT_ID, chat_id) for chat_id in chat_ids])


def too_many_requests(retry_after):
    return {**RETRY_AFTER_9, "parameters": {"retry_after": retry_after}}


def tries(bot_api, chat_id):
    """How often a send to the chat has reached Telegram."""
    return sum(chat == chat_id for _, chat, _ in bot_api.attempts)


def during_send(bot_api, chat_id, act):
    """Act while a send to the chat is in flight."""
    real = bot_api.sendMessage

    def send_message(parameters):
        if int(parameters["chat_id"]) == chat_id:
            act()
        return real(parameters)

    bot_api.sendMessage = send_message


def serve_until(http, condition):
    """Have rounds served until it is true."""
    ends_at = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < ends_at
        http.get("/x", status=404)


@pytest.fixture
def wait(http):
    """Ask on a connection of one's own, which is returned once its request waits."""
    connections = []

    def wait(headers, query="?wait=50", method="GET"):
        waiting = len(http.server.waiting)
        connections.append(HTTPConnection(*http.address, timeout=5))
        connections[-1].request(method, f"/api/messages/{query}", headers=headers)
        serve_until(http, lambda: len(http.server.waiting) > waiting)
        return connections[-1]

    yield wait
    for connection in connections:
        connection.close()


@pytest.fixture
def wait_for_a_wake_up(http, wait, monkeypatch):
    """The same, and the server looks at nothing until something wakes it."""
    monkeypatch.setattr(http.server, "time_to_wait", lambda: 600)
    return wait


def is_answered(http, connection):
    """Whether an answer has come, once what was known before has been served."""
    for _ in range(2):
        http.get("/x", status=404)
    return select.select([connection.sock], [], [], 0)[0] != []


def errors(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def say(telegram, bot_api, chat_id, text=None, **content):
    """Write to the bot, let it receive that and answer; what it sent to the chat since."""
    before = len(bot_api.texts(chat_id))
    bot_api.write(chat_id, text, **content)
    telegram.poll()
    deliver_all(telegram)
    return bot_api.texts(chat_id)[before:]


def link_chat(http, telegram, bot_api, headers, chat_id):
    assert "успешно привязаны" in say(telegram, bot_api, chat_id, link_token(http, headers))[-1]


def refuse_thread(*arguments):
    """What start_thread() does where the system allows no more threads."""
    raise factoryapp.BadSetting("can't start new thread")


def end_presses():
    """Wait until the presses that were taken in are answered."""
    for thread in threading.enumerate():
        if thread.name == "press":
            thread.join(10)


def press(telegram, bot_api, chat_id, message_id, n=0, **fields):
    """Press a button, let the bot take that in; what it says to that."""
    pressed = bot_api.press(chat_id, message_id, n, **fields)
    telegram.poll()
    end_presses()
    deliver_all(telegram)
    return [said for query, said in bot_api.answers if query == pressed]


def ask(http, telegram, headers, recipient="bob", text="Стоп?", **fields):
    """Post a question and have it sent; its id."""
    fields = {"choices": ["Да", "Нет"], **fields}
    question = post(http, headers, text, recipient=recipient, **fields)
    deliver_all(telegram)
    return question["id"]


def copies(bot_api, chat_id, text):
    """The ids of the Telegram messages in a chat that have this text in them."""
    return [n for n, (chat, said) in enumerate(bot_api.sent, 1) if chat == chat_id and text in said]


def links(http, headers):
    """(sender, recipient, text, reply_to) of all messages of a user."""
    fields = "sender", "recipient", "text", "reply_to"
    return [tuple(m[name] for name in fields) for m in list_messages(http, headers)]


@pytest.fixture
def configure(monkeypatch, caplog):
    """Read settings as a start does; what they were comes back when the test ends."""
    caplog.set_level("WARNING")
    for name in ("db", "secret", "trusted_proxies", "registration", "keep_days"):
        monkeypatch.setattr(factoryapp.settings, name, getattr(factoryapp.settings, name))

    def configure(*arguments, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return factoryapp.read_settings(["--db", factoryapp.settings.db, *arguments])

    return configure


# --- Texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "я" * 16_384,
        "слово " * 2000,
        "строка\n" * 2000,
        "👨‍👩‍👧‍👦" * 1500,
        "🇷🇺" * 5000,
        "x" + "🇷🇺" * 5000,
        "é" * 6000,
        "👍🏽" * 4000,
        "각" * 4000,
        "क्षि" * 3000,
        " \n" * 100 + "x" + "\r\n" * 5000,
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿" * 1000,
    ],
)
def test_long_text_is_split_without_loss_between_characters(text):
    first, *later = factoryapp.split_text(text, "alice")
    assert all(0 < len(part) <= 4096 and part.strip() for part in (first, *later))
    parts = [first]
    for n, part in enumerate(later, 2):
        header = f"alice ({n}/{len(later) + 1}):\n\n"
        assert part.startswith(header)
        parts.append(part.removeprefix(header))
    assert "".join(parts).rstrip() == unicodedata.normalize("NFC", text).rstrip()
    for part in parts[1:]:
        assert not part.startswith(("\u200d", "\ufe0f", "🏽", "\U000e0067"))
        assert not unicodedata.combining(part[0])
    if "🇷" in text:
        assert all(part.startswith("🇷") for part in parts[1:])
    if text[0] in "сc" and len(parts) > 1:
        assert all(part[-1].isspace() for part in parts[:-1])


@pytest.mark.parametrize("character", ["🇷🇺", "👍🏽", "q\u0301", "กำ", "👨‍👩‍👧‍👦"])
def test_character_on_the_border_of_two_parts_goes_whole_into_the_second(character):
    for offset in range(1, len(character)):
        text = "x" * (4096 - offset) + character * 20
        first, second = factoryapp.split_text(text, "alice")
        second = second.removeprefix("alice (2/2):\n\n")
        assert first + second == text and second.startswith(character)


def test_text_of_nothing_but_accents_is_split_where_it_must_be():
    first, *later = factoryapp.split_text("a" + "\u0323" * 9000, "alice")
    assert len(first) == 4096 and len(later) == 2
    assert sum(part.count("\u0323") for part in (first, *later)) == 9000 - 1  # one joined the a


@pytest.mark.parametrize(
    "text, parts",
    [
        ("start" + "\u202e" * 9000 + "end", 2),
        ("start" + "\u2029\u0333\x07" * 3000 + "end", 2),
        ("start" + " \n\u00a0" * 4000, 1),
    ],
)
def test_part_of_what_telegram_strips_is_none(text, parts):
    split = factoryapp.split_text(text, "alice")
    assert len(split) == parts and split[0].startswith("start")


def test_letters_are_sent_as_telegram_keeps_them():
    assert factoryapp.split_text("A\u030angstro\u0308m") == ["Ångström"]


@pytest.mark.parametrize(
    "text",
    [
        "안녕하세요" * 300,
        "안녕하세요 세계입니다 " * 150,
        "ガギグゲゴパピプ" * 300,
        "Tiếng Việt rất đẹp " * 100,
        "শোকৌ" * 300,
        "கொகோகௌ" * 300,
        "ཀཱི" * 500,
        "آأؤإئ" * 300,
        "ᾧᾂΐ" * 300,
        "≠∄⊈" * 300,
        "👨‍👩‍👧‍👦é" * 300,
        ("e" + "\u0301\u0323" * 20) * 50,
    ],
)
def test_letters_are_composed_in_any_script_wherever_they_stand(text):
    for offset in range(5):
        decomposed = unicodedata.normalize("NFD", "!" * offset + text)
        assert factoryapp.split_text(decomposed) == [unicodedata.normalize("NFC", decomposed)]


@pytest.mark.parametrize(
    "text",
    ["a" + "\u0315" * 8000 + "\u0300" * 8000, "\u1100" + "\u1161" * 16_000, "=\u0338" * 8000],
)
def test_no_more_than_300_letters_are_composed_at_once(text, monkeypatch):
    real, lengths = unicodedata.normalize, []

    def normalize(form, text):
        lengths.append(len(text))
        return real(form, text)

    monkeypatch.setattr(factoryapp.unicodedata, "normalize", normalize)
    parts = factoryapp.split_text(text, "alice")
    assert max(lengths) <= 300 and sum(lengths) == len(text)
    assert max(map(len, parts)) <= 4096


@pytest.mark.parametrize(
    "text",
    [
        ("🇦" * 200 + "\u0301") * 90,
        "🇦" * 3900 + "\u0301" * 12_000,
        "🏴" + "\U000e0067" * 16_000,
        "\u0301\u200d" * 8000,
        "\r\n" * 4096 + "x" * 8000,
    ],
)
def test_long_text_is_split_in_no_time(text):
    started_at = time.thread_time()
    factoryapp.split_text("x" + text[:16_383], "alice")
    assert time.thread_time() - started_at < 0.2


# --- Turns ----------------------------------------------------------------------------------------


def test_too_many_requests_waits_as_long_as_told(http, telegram, bot_api, clock, linked):
    bot_api.failures[7].append(RETRY_AFTER_9)
    headers = log_in(http, "alice")
    post(http, headers, "one")
    post(http, headers, "two")
    deliver_all(telegram)
    clock.move(8.9)
    factoryapp.turns.hurry()
    deliver_all(telegram)
    assert bot_api.sent == []
    clock.move(0.2)
    deliver_all(telegram)
    clock.move(1)
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == ["one", "two"]


def test_new_message_does_not_end_the_pause_that_telegram_asked_for(
    http, telegram, bot_api, clock, linked
):
    bot_api.failures[7].append(RETRY_AFTER_9)
    post(http, linked, "one")
    deliver_all(telegram)
    clock.move(8.9)
    post(http, linked, "two")
    deliver_all(telegram)
    assert bot_api.sent == []
    clock.move(0.2)
    deliver_all(telegram)
    assert bot_api.texts(7)[0].endswith("one")


def test_send_in_flight_while_telegram_comes_back_is_tried_soon_again(http, telegram, clock):
    factoryapp.turns.wake(telegram.id, 7)
    assert factoryapp.turns.take() == 7
    factoryapp.turns.hurry()
    factoryapp.turns.give_back(7, factoryapp.Again(300, "failed"))
    clock.move(1)
    assert factoryapp.turns.take() == 7


def test_chat_that_was_hurried_once_waits_out_its_later_pauses(http, telegram, clock):
    factoryapp.turns.wake(telegram.id, 7)
    assert factoryapp.turns.take() == 7
    factoryapp.turns.hurry()
    for pause in (1, 300):
        factoryapp.turns.give_back(7, factoryapp.Again(300, "failed"))
        clock.move(pause - 0.5)
        assert factoryapp.turns.take() is None
        clock.move(0.5)
        assert factoryapp.turns.take() == 7


def test_when_telegram_comes_back_its_absence_is_not_waited_out(
    http, telegram, bot_api, clock, linked
):
    bot_api.failures[7].extend(["reset"])
    headers = log_in(http, "alice")
    post(http, headers, "one")
    deliver_all(telegram)
    factoryapp.turns.hurry()
    deliver_all(telegram)
    assert len(bot_api.texts(7)) == 1


def test_message_that_comes_as_a_sender_leaves_its_chat_is_sent_at_once(
    http, telegram, bot_api, linked, monkeypatch
):
    headers, real = log_in(http, "alice"), factoryapp.deliver_head

    def post_behind_its_back(home, chat_id):
        monkeypatch.setattr(factoryapp, "deliver_head", real)
        again = real(home, chat_id)
        post(http, headers, "two")
        return again

    post(http, headers, "one")
    monkeypatch.setattr(factoryapp, "deliver_head", post_behind_its_back)
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == ["one", "two"]


def test_clock_set_back_holds_up_nothing(http, telegram, bot_api, clock, linked):
    headers = log_in(http, "alice")
    post(http, headers, "one")
    deliver_all(telegram)
    clock.move(-3600)
    post(http, log_in(http, "alice"), "two")
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == ["one", "two"]


def test_no_more_than_thirty_sends_a_second(http, telegram, bot_api, clock, linked, monkeypatch):
    monkeypatch.setattr(factoryapp, "SENDS_BURST", 5)
    factoryapp.turns.open(telegram.id, ())
    headers = log_in(http, "alice")
    for n in range(70):
        post(http, headers, str(n))
    clock.move(1)
    for _ in range(15):
        deliver_all(telegram)
        clock.move(1 / 6 + 1e-6)
    assert len(bot_api.sent) == 70
    counts = [len(bot_api.sent)]
    clock.move(10)
    for n in range(40):
        post(http, log_in(http, "alice"), str(n))
    for _ in range(100):
        deliver_all(telegram)
        counts.append(len(bot_api.sent))
        clock.move(0.01)
    assert counts[1] == 75 and counts[100] == 100  # five at once, thirty in a second


def test_sender_that_waits_is_woken_only_for_what_comes_earlier_than_it_knows(http, clock):
    turns, waits = factoryapp.turns, []
    turns.sent_at.extend([clock.ticks + 0.01] * factoryapp.SENDS_BURST)  # the bot may not speak yet
    turns.wake(0, 1)
    real = turns.changed.wait

    def wait(seconds):
        waits.append(seconds)
        return real(5) if len(waits) > 1 else True

    turns.changed.wait = wait
    try:
        sender = threading.Thread(target=turns.take, args=(5,))
        sender.start()
        while len(waits) < 2:
            time.sleep(0.001)
        for chat_id in range(2, 100):
            turns.wake(0, chat_id)
        time.sleep(0.05)
        assert len(waits) == 2
        turns.close()
        sender.join(5)
        assert not sender.is_alive()
    finally:
        del turns.changed.wait


def test_chats_that_wait_are_taken_in_the_order_of_their_times(http, clock):
    turns = factoryapp.turns
    turns.open(0, [(chat_id, factoryapp.Again(10 - chat_id, "told")) for chat_id in range(1, 6)])
    turns.wake(0, 9)
    turns.wake(0, 3)  # waits out its pause
    taken = [turns.take()]
    for _ in range(10):
        clock.move(1)
        taken.append(turns.take())
    assert [chat_id for chat_id in taken if chat_id] == [9, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("retry_after", [1.5, 5, 3601, 10_072, 86_401.5, 10**10])
@pytest.mark.parametrize("interruption", [None, "restart", "restart, and Telegram was away"])
def test_retry_after_is_obeyed_exactly_however_long_and_across_a_restart(
    http, telegram, bot_api, clock, retry_after, interruption
):
    bot_api.failures[7].append(too_many_requests(retry_after))
    queue(7)
    deliver_all(telegram)
    clock.move(retry_after / 2)
    queue(7, text="later")
    if interruption:
        reopen_turns(telegram)
    if interruption == "restart, and Telegram was away":
        factoryapp.turns.hurry()
    deliver_all(telegram)
    clock.move(retry_after / 2 - 0.1)
    deliver_all(telegram)
    assert bot_api.sent == []
    clock.move(0.1 + 1e-4)
    deliver_all(telegram)
    assert bot_api.sent[0] == (7, "text")


@pytest.mark.parametrize(
    "step, left", [(-86_400, 10_072), (-3600, 8672), (0, 5072), (600, 4472), (86_400, 0)]
)
def test_no_pause_across_a_restart_is_longer_than_it_was_whatever_the_clock_does(
    http, telegram, bot_api, clock, step, left
):
    bot_api.failures[7].append(too_many_requests(10_072))
    queue(7)
    deliver_all(telegram)
    clock.move(5000)
    clock.seconds += step
    reopen_turns(telegram)
    clock.move(max(0, left - 0.1))
    deliver_all(telegram)
    assert left == 0 or bot_api.sent == []
    clock.move(0.1 + 1e-4)
    deliver_all(telegram)
    assert bot_api.sent == [(7, "text")]


def test_new_text_before_one_that_waits_does_not_end_the_pause_at_a_restart(
    http, telegram, bot_api, clock
):
    bot_api.failures[7].append(too_many_requests(10_072))
    queue(7, text="due at noon")
    deliver_all(telegram)
    queue(7, text="at once")
    reopen_turns(telegram)
    clock.move(10_071)
    deliver_all(telegram)
    assert bot_api.sent == []
    clock.move(3)
    deliver_all(telegram)
    clock.move(3)
    deliver_all(telegram)
    assert sorted(bot_api.sent) == [(7, "at once"), (7, "due at noon")]


def test_pause_that_was_over_comes_not_back_when_the_clock_is_set_back_across_a_restart(
    http, telegram, bot_api, clock
):
    bot_api.failures[7].extend([too_many_requests(3600), too_many_requests(200)])
    queue(7, text="due at noon")
    deliver_all(telegram)
    queue(7, text="at once")
    clock.move(3600)
    deliver_all(telegram)
    clock.move(-86_400)
    reopen_turns(telegram)
    clock.move(199)
    deliver_all(telegram)
    assert bot_api.sent == []
    clock.move(1.1)
    deliver_all(telegram)
    assert bot_api.sent == [(7, "due at noon"), (7, "at once")]


@pytest.mark.parametrize("answer_seconds, slow_seconds", [(0.7, 60), (0, 10)])
def test_chat_gets_one_message_a_second_for_a_minute_after_a_429_then_all_at_once(
    http, telegram, bot_api, clock, monkeypatch, answer_seconds, slow_seconds
):
    real, sent_at, more = bot_api.sendMessage, [], [7] * 60

    def answer_slowly(parameters):
        sent_at.append((int(parameters["chat_id"]), clock.ticks - refused_at))
        clock.move(answer_seconds)
        return real(parameters)

    monkeypatch.setattr(factoryapp, "SENDS_PER_SECOND", 400)
    monkeypatch.setattr(factoryapp, "SENDS_BURST", 400)
    if slow_seconds != 60:
        monkeypatch.setattr(factoryapp, "SLOW_SECONDS", slow_seconds)
    factoryapp.turns.open(telegram.id, ())
    bot_api.failures[7].append(too_many_requests(5))
    bot_api.sendMessage, refused_at = answer_slowly, clock.ticks
    queue(*[7] * 8, *[8] * 3)
    deliver_all(telegram)
    assert [chat_id for chat_id, _ in sent_at] == [8] * 3  # nobody else is slowed down
    sent_at.clear()
    clock.move(refused_at + 5 - clock.ticks)
    while clock.ticks < refused_at + 5 + slow_seconds:
        deliver_all(telegram)
        clock.move(0.25)
        if len(sent_at) == 8:  # nothing is left: what comes now keeps the pace, too
            queue(*more)
            more.clear()
    times = [at for _, at in sent_at if at < 5 + slow_seconds]
    assert times[0] == 5 and slow_seconds / 2 <= len(times) < 60
    assert all(b - a >= 1 + answer_seconds for a, b in zip(times, times[1:], strict=False))
    deliver_all(telegram)
    clock.move(1)
    deliver_all(telegram)
    assert len(sent_at) == 68  # the rest at once
    assert sent_at[-1][1] - sent_at[len(times) + 1][1] == pytest.approx(
        answer_seconds * (66 - len(times))
    )


def link_strangers(*chat_ids):
    """Link each of these chats to a user of its own."""
    with factoryapp.transaction() as db:
        for chat_id in chat_ids:
            user_id = factoryapp.add_user(db, f"user{chat_id}", "no password")
            factoryapp.link_chat(db, (BOT_ID, chat_id), user_id, "token")


def refuse_in_turn(telegram, bot_api, clock, refusals):
    """(chat id, what its send gets) in this order; None is that it passes."""
    for chat_id, retry_after in refusals:
        if retry_after is not None:
            is_told = isinstance(retry_after, (int, float))
            failure = too_many_requests(retry_after) if is_told else retry_after
            bot_api.failures[chat_id].append(failure)
        queue(chat_id)
        assert deliver_next(telegram)


@pytest.mark.parametrize(
    "refusals, barred_for",
    [
        ([(1, 30), (2, 20), (3, 40)], 20),
        ([(1, 12), (2, 12), (3, 11.5)], 11.5),
        ([(1, 30), (2, 20), (2, "reset"), (3, 40)], 20),  # what fails otherwise is no pass
        ([(9, None), (1, 30), (2, 20), (3, 40)], 20),
        ([(1, 30), (2, 20)], 0),
        ([(1, 30), (2, 20), (9, None), (3, 40)], 0),
        ([(1, 30), (2, 20), (9, TOO_LONG), (3, 40)], 0),  # Telegram looked at it
    ],
)
def test_three_refusals_in_a_row_of_three_chats_mean_the_whole_bot(
    http, telegram, bot_api, clock, refusals, barred_for
):
    link_strangers(1, 2, 3)
    # A chat that has failed waits: its next failure comes from another one.
    refuse_in_turn(
        telegram, bot_api, clock, [(90 if why == "reset" else n, why) for n, why in refusals]
    )
    queue(50, 51)
    if barred_for:
        clock.move(barred_for - 0.1)
        deliver_all(telegram)
        assert tries(bot_api, 50) == tries(bot_api, 51) == 0
        clock.move(0.1 + 1e-6)
    deliver_all(telegram)
    assert bot_api.texts(50) == bot_api.texts(51) == ["text"]
    passed = barred_for + 1e-6
    told = {n: why for n, why in refusals if isinstance(why, (int, float))}
    for pause in sorted(set(told.values()) - {barred_for}):  # each keeps its own
        clock.move(pause - 0.1 - passed)
        deliver_all(telegram)
        assert not any(bot_api.texts(n) for n in told if told[n] >= pause)
        clock.move(0.2)
        passed = pause + 0.1
        deliver_all(telegram)
        assert all(bot_api.texts(n) == ["text"] for n in told if told[n] == pause)


@pytest.mark.parametrize("linked_chats, barred_for", [([], 0), ([1, 2], 0), ([2, 3, 4], 20)])
def test_refusals_of_chats_that_are_not_linked_mean_them_alone(
    http, telegram, bot_api, clock, linked_chats, barred_for
):
    link_strangers(*linked_chats)
    refuse_in_turn(telegram, bot_api, clock, [(1, 30), (2, 30), (3, 40), (4, 20)])
    queue(50)
    if barred_for:
        clock.move(barred_for - 0.1)
        deliver_all(telegram)
        assert tries(bot_api, 50) == 0
        clock.move(0.1 + 1e-6)
    deliver_all(telegram)
    assert bot_api.texts(50) == ["text"]


def test_refusals_of_one_chat_hold_up_no_other(http, telegram, bot_api, clock):
    bot_api.failures[1].extend([too_many_requests(3)] * 4)
    bot_api.failures[2].extend([too_many_requests(3)] * 4)
    queue(1, 2)
    for _ in range(4):
        deliver_all(telegram)
        queue(50)
        deliver_all(telegram)
        clock.move(3.01)
    assert bot_api.texts(50) == ["text"] * 4


def test_chats_refused_thrice_between_two_of_them_bar_nobody(http, telegram, bot_api, clock):
    bot_api.failures[1].extend([too_many_requests(3)] * 3)
    bot_api.failures[2].extend([too_many_requests(3)] * 3)
    queue(1, 2)
    for _ in range(3):
        deliver_all(telegram)
        clock.move(3.01)
    clock.move(-0.01)
    queue(50)
    factoryapp.turns.take()
    assert factoryapp.turns.barred_until == 0


def test_chat_that_turns_has_forgotten_is_served_in_a_second(http, telegram, bot_api, clock):
    queue(7)
    factoryapp.turns.open(telegram.id, ())
    factoryapp.wake_all(telegram)
    deliver_all(telegram)
    assert bot_api.sent == [(7, "text")]


def test_what_another_process_queues_is_sent_within_a_second(http, telegram, bot_api, clock):
    for count in (1, 2, 3):
        queue_by_another_process(7)
        factoryapp.wake_all(telegram)
        deliver_all(telegram)
        assert len(bot_api.texts(7)) == count


def test_what_another_process_queues_ends_no_pause_and_is_sent_once(
    http, telegram, bot_api, clock, monkeypatch
):
    bot_api.failures[1].append(too_many_requests(10_072))
    bot_api.failures[2].append(too_many_requests(58))
    queue(1, *[2] * 30)
    deliver_all(telegram)
    queue(4)
    assert factoryapp.turns.take() == 4  # a sender is at it
    real = factoryapp.list_queued_chats

    def list_queued_chats(*args):
        # What is sent while the outbox is looked at.
        chat_ids = real(*args)
        deliver_all(telegram)
        return chat_ids

    monkeypatch.setattr(factoryapp, "list_queued_chats", list_queued_chats)
    for _ in range(5):
        queue(6)
        queue_by_another_process(1, 4, 5)
        clock.move(61)
        factoryapp.wake_all(telegram)
        deliver_all(telegram)
    assert [len(bot_api.texts(chat_id)) for chat_id in range(1, 7)] == [0, 30, 0, 0, 5, 5]
    assert tries(bot_api, 1) == 1
    factoryapp.turns.give_back(4, factoryapp.Again(0, "early"))
    deliver_all(telegram)
    clock.move(1)
    deliver_all(telegram)
    assert len(bot_api.texts(4)) == 6


def test_what_another_process_queues_waits_while_the_whole_bot_was_told_to(
    http, telegram, bot_api, clock
):
    link_strangers(1, 2, 3)
    for chat_id in (1, 2, 3):
        bot_api.failures[chat_id].append(RETRY_AFTER_9)
    queue(1, 2, 3)
    deliver_all(telegram)
    for _ in range(8):
        queue_by_another_process(1, 7)
        factoryapp.wake_all(telegram)
        clock.move(1.1)
        deliver_all(telegram)
        assert bot_api.sent == []
    clock.move(1)
    deliver_all(telegram)
    assert bot_api.texts(7)


@pytest.mark.parametrize("step", [3, 3600, 86_400, 29 * 86_400])
def test_send_at_is_kept_when_the_clock_steps_forward(
    http, telegram, bot_api, clock, linked, caplog, step
):
    clock.move(40)
    post(http, linked, "after", send_at=factoryapp.iso(clock.seconds + step))
    post(http, linked, "much later", send_at=factoryapp.iso(clock.seconds + step + 10))
    deliver_all(telegram)
    clock.seconds += step  # or the machine slept
    deliver_all(telegram)
    assert bot_api.texts(7) == [own_copy("after")] and errors(caplog) == []


@pytest.mark.parametrize("step", [-86_400, 3600, 86_400])
def test_step_of_the_clock_neither_ends_nor_prolongs_a_pause(
    http, telegram, bot_api, clock, monkeypatch, caplog, step
):
    monkeypatch.setattr(factoryapp.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(factoryapp, "backoff", lambda attempts, longest: 250)
    bot_api.failures[1].append(too_many_requests(10_072))
    bot_api.failures[2].append("reset")
    queue(1, 2)
    deliver_all(telegram)
    clock.move(100)
    clock.seconds += step
    for chat_id, left in ((2, 150), (1, 9822)):
        for _ in range(3):
            clock.move((left - 0.3) / 3)
            factoryapp.wake_all(telegram)
            deliver_all(telegram)
            assert bot_api.texts(chat_id) == []
        clock.move(0.3 + 1e-4)
        deliver_all(telegram)
        assert bot_api.texts(chat_id) == ["text"]
    assert errors(caplog) == []


def test_clock_set_back_sends_nothing_before_its_send_at(
    http, telegram, bot_api, clock, linked, caplog
):
    post(http, linked, "text", send_at=factoryapp.iso(clock.seconds + 60))
    clock.seconds -= 3600
    for _ in range(60):
        clock.move(60)
        deliver_all(telegram)
        assert bot_api.sent == []
    clock.move(61)
    deliver_all(telegram)
    assert bot_api.texts(7) == [own_copy("text")] and errors(caplog) == []


# --- Store ----------------------------------------------------------------------------------------


def replace(path):
    (path.parent / "new").write_bytes(path.read_bytes())
    (path.parent / "new").rename(path)


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("harm", [Path.unlink, replace])
def test_nothing_is_acknowledged_into_a_file_that_is_gone(http, tmp_path, harm, suffix):
    headers = join(http, "alice")
    harm(tmp_path / f"factoryapp.db{suffix}")
    assert http.post_json("/api/messages/", {"text": "a"}, headers=headers, status=503).json[
        "detail"
    ]
    assert "removed or replaced" in http.get("/health/", status=503).json["reason"]


def test_file_that_goes_while_others_write_is_noticed(http, tmp_path):
    headers, answers = join(http, "alice"), []
    posting = threading.Thread(
        target=lambda: answers.extend(http.ask(message_request(headers, "one")))
    )
    with another_writer(tmp_path / "factoryapp.db"):
        posting.start()
        posting.join(0.2)
        (tmp_path / "factoryapp.db-wal").unlink()
    posting.join()
    assert [answer.status for answer in answers] == [503]


def test_write_ahead_log_shrinks_once_it_was_copied(http, tmp_path):
    log = tmp_path / "factoryapp.db-wal"
    queue(*range(2500), text="x" * 4096)
    assert log.stat().st_size > factoryapp.WAL_KEPT_BYTES
    factoryapp.checkpoint(factoryapp.connection())
    queue(7)
    assert log.stat().st_size <= factoryapp.WAL_KEPT_BYTES


def test_threads_and_other_programs_are_waited_for_five_seconds_together(http, clock, monkeypatch):
    factoryapp.checkpoint(factoryapp.connection())  # which waits less
    waits = []
    monkeypatch.setattr(factoryapp, "write_lock", SlowLock(clock, 3))
    for _ in range(2):
        with factoryapp.transaction() as db:
            waits.append(db.one("PRAGMA busy_timeout")[0])
        monkeypatch.setattr(factoryapp, "write_lock", threading.Lock())
    assert waits == [2000, 5000]


class SlowLock:
    """A lock that others have for so many seconds."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def acquire(self, timeout):
        assert timeout == factoryapp.PATIENCE_SECONDS
        self.clock.move(self.seconds)
        return True

    def release(self):
        pass


def test_commit_is_on_disk_on_macos_too(http):
    db = factoryapp.connection()
    pragmas = ("synchronous", "fullfsync", "checkpoint_fullfsync")
    assert [db.one(f"PRAGMA {pragma}")[0] for pragma in pragmas] == [2, 1, 1]


@pytest.mark.parametrize("name", ["factoryapp.db", "symlink.db"])
def test_database_with_a_second_hard_link_is_refused_and_not_touched(http, tmp_path, name):
    (tmp_path / "link.db").hardlink_to(tmp_path / "factoryapp.db")
    (tmp_path / "symlink.db").symlink_to("link.db")
    code, _, error = run_program("--port", "0", "--db", str(tmp_path / name))
    assert code == 2 and "mount the folder, not the file" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.lock"))


@as_root
def test_database_that_is_mounted_alone_is_refused_by_both_names(tmp_path):
    own, other = tmp_path / "own.db", tmp_path / "a b\\040.db"
    for file in (own, other):
        file.touch()
    mounting = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', own, other]
    for name in (own, other):
        prefix = ["unshare", "-m", *mounting]
        code, _, error = run_program("--port", "0", "--db", str(name), prefix=prefix)
        assert code == 2 and "mount the folder, not the file" in error


@as_root
def test_folder_that_is_mounted_is_no_reason_to_refuse(tmp_path):
    # Refused for its address, which is looked at after the database.
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "own" / "a.db").touch()
    mounting = 'mount --bind "$0/own" "$0/other" && exec "$@"'
    code, _, error = run_program(
        *["--db", str(tmp_path / "other" / "a.db"), "--host", "256.1.1.1"],
        prefix=["unshare", "-m", "sh", "-c", mounting, tmp_path],
    )
    assert code == 2 and "Cannot listen" in error


def test_two_that_start_at_once_do_not_both_refuse(http):
    # As far as another gets before it sees that it is too late.
    path = factoryapp.settings.db + ".lock"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM sqlite_master")
        threading.Timer(0.02, other.rollback).start()
        factoryapp.lock_database().close()


@as_root
@pytest.mark.parametrize(
    "foreign, mode, names",
    [
        ("factoryapp.db", 0o666, "factoryapp.db belongs to another user"),
        ("factoryapp.db.lock", 0o666, "factoryapp.db.lock belongs to another user"),
        ("factoryapp.db.lock", 0o600, "Permission denied: '.*factoryapp.db.lock'"),
    ],
)
def test_file_of_another_owner_is_named(tmp_path, foreign, mode, names):
    (tmp_path / foreign).touch()
    (tmp_path / foreign).chmod(mode)
    os.chown(tmp_path / foreign, 65534, 65534)
    # Root as others are.
    prefix = ["setpriv", "--bounding-set=-fowner,-dac_override,-dac_read_search"]
    code, _, error = run_program(
        "--port", "0", "--db", str(tmp_path / "factoryapp.db"), prefix=prefix
    )
    assert code == 2 and re.search(names, error) and error.count("\n") == 1


@pytest.fixture
def version_5(tmp_path, monkeypatch):
    """A database that version 5 of the schema has made and filled."""
    path = str(tmp_path / "factoryapp.db")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_5)
    monkeypatch.setattr(factoryapp.settings, "db", path)
    return path


def describe_tables(path):
    """Everything that SQLite knows of the tables and indexes, but for how they are spelled."""
    with closing(sqlite3.connect(path)) as db:
        names = db.execute("SELECT type, name FROM sqlite_master ORDER BY type, name").fetchall()
        about = "table_list", "table_xinfo", "foreign_key_list", "index_list", "index_xinfo"
        return names, [
            # An index's place in the list tells when it was made.
            sorted(
                (row[what == "index_list" :] for row in db.execute(f"PRAGMA {what}({name})")),
                key=repr,
            )
            for _, name in names
            for what in about
        ]


def read_back(path, dump):
    """Replace a database by what `sqlite3 .dump` would write of another."""
    with closing(sqlite3.connect(dump)) as db:
        script = "\n".join(db.iterdump())
    for suffix in ("", "-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)


@pytest.mark.parametrize("is_dumped", [False, True])
def test_database_of_version_5_is_brought_up_with_all_that_is_in_it(
    version_5, start, bot_api, tmp_path, is_dumped
):
    if is_dumped:
        os.rename(version_5, tmp_path / "old.db")
        read_back(version_5, tmp_path / "old.db")
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN, TELEGRAM_API_URL=bot_api.url)
    bot_api.wait_for(lambda: len(bot_api.sent) == 10)
    assert bot_api.texts(10) == ["переезд"] and bot_api.texts(11) == []
    assert [text[:5] for text in bot_api.texts(8)] == ["сейча", "слово"]
    alice = log_in(program.http, "alice")
    assert {m["id"]: m["delivery"] for m in list_messages(program.http, alice)} == {
        **dict.fromkeys((1, 2, 3, 8, 9, 10, 12), "sent"),
        **dict.fromkeys((7, 11), "failed"),
        5: "unlinked",
    }
    first, second = list_scheduled(program.http, alice)
    assert (first["id"], first["choices"], second["id"]) == (4, ["Да", "Нет"], 6)
    assert first["text"].startswith("Сюрприз? слово") and first["send_at"][:4] == "2099"
    assert cancel(program.http, alice, 4) == 200
    assert [m["failure"] for m in list_messages(program.http, alice) if m["id"] in (7, 11)] == [
        "403 Forbidden",
        "the chat was unlinked with /stop",
    ]
    assert [u["username"] for u in program.http.get("/api/users/", headers=alice).json] == [
        *("alice", "bob", "BOB", "carol", "dave")
    ]
    assert log_in(program.http, "BOB") != log_in(program.http, "bob")
    program.http.get("/api/users/me/", headers={"Authorization": "Bearer fa_key"})
    assert post(program.http, alice, "new")["id"] == 41
    bot_api.write(7, "ответ", reply_to=2)
    bot_api.wait_for(lambda: len(bot_api.texts(8)) == 3)
    assert program.end()[0] == 0
    check_database(version_5)


def test_database_of_version_5_gets_the_tables_of_a_fresh_one(version_5, tmp_path, monkeypatch):
    factoryapp.open_store()
    monkeypatch.setattr(factoryapp.settings, "db", str(tmp_path / "fresh.db"))
    factoryapp.open_store()
    assert describe_tables(version_5) == describe_tables(tmp_path / "fresh.db")


@pytest.mark.parametrize(
    "statement, sentence",
    [
        ("INSERT INTO users (id) VALUES (9)", "NOT NULL"),
        ("DELETE FROM users WHERE id = 1", "FOREIGN KEY"),
        ("UPDATE users SET folded = '' WHERE id > 1", "UNIQUE"),
    ],
)
def test_step_that_cannot_be_taken_leaves_the_database_as_it_was(
    version_5, monkeypatch, statement, sentence
):
    with closing(sqlite3.connect(version_5)) as db:
        before = list(db.iterdump())
    real = factoryapp.apply

    def apply(db, *arguments):
        real(db, *arguments)
        db.execute(statement)

    with monkeypatch.context() as patch, pytest.raises(factoryapp.BadSetting, match=sentence):
        patch.setattr(factoryapp, "apply", apply)
        factoryapp.open_store()
    with closing(sqlite3.connect(version_5)) as db:
        assert list(db.iterdump()) == before
    factoryapp.open_store()
    check_database(version_5)


def test_database_that_is_read_back_from_a_dump_starts(start, tmp_path):
    program = start()
    alice = join(program.http, "alice")
    post(program.http, alice, "text")
    assert program.end()[0] == 0
    os.rename(tmp_path / "factoryapp.db", tmp_path / "old.db")
    read_back(str(tmp_path / "factoryapp.db"), tmp_path / "old.db")
    program = start()
    assert [m["text"] for m in list_messages(program.http, alice)] == ["text"]
    assert program.end()[0] == 0
    check_database(tmp_path / "factoryapp.db")


def test_database_of_an_older_version_is_refused_by_the_version_that_brings_it_up(version_5):
    with closing(sqlite3.connect(version_5)) as db:
        db.executescript("DROP TABLE leftovers; PRAGMA user_version = 4")
    with pytest.raises(factoryapp.BadSetting, match="old version: .*start version 1.1.0 with it"):
        factoryapp.open_store()


def test_link_token_is_stored_as_a_hash_alone(http):
    token = link_token(http, join(http, "alice"))
    dump = "\n".join(factoryapp.connection().iterdump())
    assert "link_tokens" in dump and token not in dump


def test_api_key_is_stored_as_a_hash_alone(http):
    key = make_key(http, join(http, "alice"))["Authorization"].split()[1]
    dump = "\n".join(factoryapp.connection().iterdump())
    assert hashlib.sha256(key.encode()).hexdigest().upper() in dump and key[3:] not in dump


def test_last_use_of_a_key_is_written_once_a_day(http, clock, monkeypatch):
    alice = join(http, "alice")
    cron, _ = make_key(http, alice), make_key(http, alice, "unused")
    writes, dates = note_threads(monkeypatch, factoryapp, "set_keys_used"), []
    for hours in (0, 15.9, 0.1, 0, 48):  # from 8 o'clock on
        clock.move(hours * 3600)
        http.get("/api/users/me/", headers=cron)
        factoryapp.note_used_keys()
        dates.append([key["last_used_on"] for key in list_keys(http, cron)])
    assert dates == [[f"2027-01-{day}", None] for day in (15, 15, 16, 16, 18)]
    assert len(writes) == 3


def test_use_of_a_key_is_written_down_once_the_database_takes_it(http, tmp_path):
    cron = make_key(http, join(http, "alice"))
    factoryapp.connection().execute("PRAGMA busy_timeout = 0")
    with another_writer(tmp_path / "factoryapp.db"):
        http.get("/api/users/me/", headers=cron)  # waits for nobody who writes
        with pytest.raises(sqlite3.OperationalError):
            factoryapp.note_used_keys()
    factoryapp.note_used_keys()
    assert list_keys(http, cron)[0]["last_used_on"] is not None


def test_token_for_the_terminal_has_no_link(http):
    headers = join(http, "alice")
    assert http.get("/api/users/get-telegram-token/", headers=headers).json["link"] is None


def count(table):
    return factoryapp.connection().execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def forget(days, monkeypatch):
    """Forget what is older, all of it; how long it would be until the next search."""
    monkeypatch.setattr(factoryapp.settings, "keep_days", days)
    monkeypatch.setattr(factoryapp, "PORTION_PAUSE_SECONDS", 0)
    stop = StopAtPause()
    factoryapp.run_upkeep(factoryapp.running.home, stop)
    return stop.pauses[-1]


@pytest.mark.parametrize(
    "table, seconds",
    [
        ("link_tokens", factoryapp.LINK_TOKEN_SECONDS),
        ("blacklisted_tokens", factoryapp.REFRESH_TOKEN_SECONDS),
        ("idempotency_keys", factoryapp.IDEMPOTENCY_SECONDS),
        ("heard", factoryapp.HEARD_SECONDS),
    ],
)
def test_what_has_had_its_time_is_forgotten(
    http, telegram, bot_api, clock, linked, monkeypatch, table, seconds
):
    tokens = http.post_json("/auth/token/", {"username": "alice", "password": PASSWORD}).json
    http.post_json("/auth/token/blacklist/", {"refresh": tokens["refresh"]})
    post(http, {**linked, "Idempotency-Key": "a-key"}, "a")
    link_token(http, linked)
    clock.move(seconds - 1)
    forget(0, monkeypatch)
    assert count(table) == 1
    clock.move(2)
    forget(0, monkeypatch)
    assert count(table) == 0


@pytest.mark.parametrize("rows", [2, 50])
def test_old_messages_go_unless_they_are_queued_and_take_along_what_stands_on_them(
    http, telegram, bot_api, clock, monkeypatch, pair, rows
):
    monkeypatch.setattr(factoryapp, "PORTION_ROWS", rows)
    alice, _ = pair
    later = factoryapp.iso(clock.seconds + 3 * 86_400)
    post(http, alice, "sent", recipient="bob")
    post(http, alice, "later", recipient="bob", send_at=later)
    post(http, alice, "cancelled", recipient="bob")
    assert cancel(http, alice, 3) == 200
    bot_api.failures[8].extend([None, TOO_LONG])
    post(http, alice, "failed", recipient="bob")
    deliver_all(telegram)
    clock.move(1)
    post(http, alice, "own copy waits", recipient="bob")
    bot_api.failures[7].append(too_many_requests(999_999))
    deliver_all(telegram)
    clock.move(86_400 - 1)
    alice = log_in(http, "alice")
    post(http, alice, "young")
    assert forget(1, monkeypatch) <= 3600
    assert [m["id"] for m in list_messages(http, alice)] == [1, 3, 4, 5, 6]
    clock.move(2)
    forget(1, monkeypatch)
    assert [m["text"] for m in list_messages(http, alice)] == ["own copy waits", "young"]
    assert [m["text"] for m in list_scheduled(http, alice)] == ["later"]
    stand = "SELECT message_id FROM {} WHERE message_id NOT IN (5, 6)"
    for table in ("relayed", "outbox"):
        assert factoryapp.connection().execute(stand.format(table)).fetchall() == []
    check_database(factoryapp.settings.db)


def test_old_messages_that_wait_keep_none_behind_them(http, clock, monkeypatch, pair):
    monkeypatch.setattr(factoryapp, "PORTION_ROWS", 2)
    carol = join(http, "carol")
    for headers in [pair[0]] * 3 + [carol] * 3:
        post(http, headers, "a note to oneself")
    clock.move(86_400 + 1)
    forget(1, monkeypatch)
    assert factoryapp.connection().list("SELECT id FROM messages") == [1, 2, 3]


def test_reply_to_what_was_forgotten_is_said_to_be_so(
    http, telegram, bot_api, clock, monkeypatch, pair
):
    post(http, pair[0], "old", recipient="bob")
    deliver_all(telegram)
    [old] = copies(bot_api, 8, "old")
    clock.move(86_400 + 1)
    forget(1, monkeypatch)
    # Somebody else may have the name that stands there by now.
    assert say(telegram, bot_api, 8, "ответ", reply_to=old) == [factoryapp.UNKNOWN_REPLY]
    assert list_messages(http, log_in(http, "bob")) == []


def test_reply_finds_its_message_years_later(http, telegram, bot_api, clock, monkeypatch, pair):
    post(http, pair[0], "old", recipient="bob")
    deliver_all(telegram)
    [old] = copies(bot_api, 8, "old")
    clock.move(1000 * 86_400)
    forget(0, monkeypatch)
    say(telegram, bot_api, 8, "ответ", reply_to=old)
    assert links(http, log_in(http, "bob"))[1:] == [("bob", "alice", "ответ", 1)]


def test_what_is_old_is_searched_for_each_hour(http, clock, monkeypatch):
    searched, stop = [], StopAtPause(90)
    monkeypatch.setattr(factoryapp, "forget_some", lambda db: searched.append(clock.ticks))
    monkeypatch.setattr(stop, "wait", lambda seconds: clock.move(60) or StopAtPause.wait(stop, 60))
    factoryapp.run_upkeep(factoryapp.running.home, stop)
    assert [round(at - searched[0], -2) for at in searched] == [0, 3600]


def test_answers_outlive_the_question_that_was_forgotten(
    http, telegram, bot_api, clock, monkeypatch, pair
):
    ask(http, telegram, pair[0])
    [question] = copies(bot_api, 8, "Стоп?")
    clock.move(86_400 + 1)
    alice, bob = log_in(http, "alice"), log_in(http, "bob")
    press(telegram, bot_api, 8, question)
    assert links(http, alice)[1:] == [("bob", "alice", "Да", 1)]
    forget(1, monkeypatch)
    assert press(telegram, bot_api, 8, question, 1) == [factoryapp.TOO_LATE]
    assert say(telegram, bot_api, 8, "ответ", reply_to=question) == [factoryapp.UNKNOWN_REPLY]
    assert links(http, bob) == [("bob", "alice", "Да", None)]


def test_message_that_is_forgotten_while_it_is_in_flight_holds_up_nothing(
    http, telegram, bot_api, clock, monkeypatch, pair
):
    bot_api.failures[7].append(too_many_requests(2 * 86_400))
    bot_api.failures[8].append(too_many_requests(4 * 86_400))
    post(http, pair[0], "old", recipient="bob")
    deliver_all(telegram)
    clock.move(2 * 86_400)
    alice = log_in(http, "alice")
    during_send(bot_api, 7, lambda: (cancel(http, alice), forget(1, monkeypatch)))
    monkeypatch.setattr(factoryapp.log, "exception", pytest.fail)
    deliver_all(telegram)
    assert list_messages(http, alice) == [] and len(bot_api.texts(7)) == 1


def test_id_of_a_message_is_never_used_twice(http, clock, monkeypatch):
    headers = join(http, "alice")
    last = [post(http, headers, "text")["id"] for _ in range(3)][-1]
    clock.move(2 * 86_400)
    forget(1, monkeypatch)
    headers = log_in(http, "alice")
    assert list_messages(http, headers) == []
    assert post(http, headers, "text")["id"] == last + 1


def test_old_message_goes_though_the_clock_was_set_back_after_later_ones(http, clock, monkeypatch):
    headers = join(http, "alice")
    clock.move(86_400 - 60)
    late = post(http, log_in(http, "alice"), "late")
    clock.move(60 - 86_400)
    post(http, headers, "early")
    clock.move(86_400 + 1)
    forget(1, monkeypatch)
    assert list_messages(http, log_in(http, "alice")) == [late]


def test_forgetting_goes_on_after_a_failure(http, clock, monkeypatch, caplog):
    post(http, join(http, "alice"), "text")
    clock.move(2 * 86_400)
    with monkeypatch.context() as failing:
        failing.setattr(factoryapp.settings, "db", "/nowhere/factoryapp.db")
        assert forget(1, monkeypatch) == factoryapp.UPKEEP_SECONDS
    assert "upkeep failed" in errors(caplog)[0] and count("messages") == 1
    forget(1, monkeypatch)
    assert count("messages") == 0


def test_program_forgets_old_messages_once_it_runs(start, tmp_path):
    program = start()
    alice = join(program.http, "alice")
    for text in ("old", "older"):
        post(program.http, alice, text)
    assert program.end()[0] == 0
    with closing(sqlite3.connect(tmp_path / "factoryapp.db")) as db, db:
        db.execute("UPDATE messages SET created_at = '2020-01-01T00:00:00.000000Z'")
    program = start("--keep-days", "1")
    ends_at = time.monotonic() + 10
    while list_messages(program.http, alice) and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert list_messages(program.http, alice) == []
    assert post(program.http, alice, "new")["id"] == 3


def test_pause_that_telegram_asked_for_outlives_a_restart(http, telegram, bot_api, clock, linked):
    bot_api.failures[7].append(RETRY_AFTER_9)
    post(http, linked, "one")
    deliver_all(telegram)
    reopen_turns(telegram)
    clock.move(8.9)
    post(http, linked, "two")
    deliver_all(telegram)
    assert bot_api.sent == []
    clock.move(0.2)
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == ["one", "two"]


def test_restart_with_the_clock_set_back_makes_no_pause_longer_than_it_was(
    http, telegram, bot_api, clock, linked
):
    bot_api.failures[7].append(RETRY_AFTER_9)
    post(http, linked, "one")
    deliver_all(telegram)
    clock.move(-365 * 86_400)
    reopen_turns(telegram)
    clock.move(9)
    deliver_all(telegram)
    assert len(bot_api.texts(7)) == 1


def test_what_waits_for_an_account_moves_with_it_to_its_new_chat(
    http, telegram, bot_api, clock, linked
):
    headers = log_in(http, "alice")
    bot_api.failures[7].append(RETRY_AFTER_9)
    post(http, headers, "one")
    deliver_all(telegram)
    assert "успешно" in say(telegram, bot_api, 9, link_token(http, headers))[-1]
    assert bot_api.texts(7) == [] and bot_api.texts(9)[0].endswith("one")
    assert list_messages(http, headers)[0]["delivery"] == "sent"


@pytest.mark.parametrize("is_sent", [True, False])
def test_what_is_in_flight_is_sent_to_the_new_chat_only_if_it_failed(
    http, telegram, bot_api, clock, linked, is_sent
):
    headers = log_in(http, "alice")
    post(http, headers, "one")
    post(http, headers, "two")
    chat_id = factoryapp.turns.take()
    head = factoryapp.find_head(factoryapp.connection(), telegram.id, chat_id)
    assert chat_id == 7 and factoryapp.turns.claim(7, head)  # a sender is at it
    assert say(telegram, bot_api, 9, link_token(http, headers)) == []
    elsewhere = factoryapp.LINKED_ELSEWHERE.format(username="alice")
    if is_sent:
        factoryapp.settle(factoryapp.settle_sent, head, 55)
        factoryapp.turns.give_back(7, None)
    else:
        factoryapp.settle(factoryapp.unlink_chat, (telegram.id, 7), "403 Forbidden")
        factoryapp.turns.give_back(7, None)
    clock.move(1)
    deliver_all(telegram)
    *moved, answer = bot_api.texts(9)
    assert [text[-3:] for text in moved] == ["one", "two"][is_sent:] and "успешно" in answer
    assert bot_api.texts(7) == ([elsewhere] if is_sent else [])


def test_what_waits_for_a_chat_stays_when_it_is_linked_again_to_its_account(
    http, telegram, bot_api, clock, linked
):
    headers = log_in(http, "alice")
    post(http, headers, "waits")
    link_chat(http, telegram, bot_api, headers, 7)
    assert bot_api.texts(7)[0] == own_copy("waits")
    assert list_messages(http, headers)[0]["delivery"] == "sent"


@alone_and_crowded
def test_chat_of_another_account_is_linked_only_after_stop(http, telegram, bot_api):
    alice, bob = join(http, "alice"), join(http, "bob")
    link_chat(http, telegram, bot_api, alice, 7)
    token = link_token(http, bob)
    for text in (token, f"/start {token}"):
        [answer] = say(telegram, bot_api, 7, text)
        assert answer == factoryapp.STOP_FIRST.format(username="alice")
    assert post(http, alice, "a")["delivery"] == "queued"
    say(telegram, bot_api, 7, "/stop")
    assert "успешно привязаны" in say(telegram, bot_api, 7, token)[-1]  # it was not spent
    assert post(http, alice, "a")["delivery"] == "unlinked"
    assert post(http, bob, "b")["delivery"] == "queued"
    link_chat(http, telegram, bot_api, bob, 9)  # and an account has one chat
    assert "неверный или устарел" in say(telegram, bot_api, 7, "hello")[-1]


def test_token_that_linked_the_chat_is_answered_as_start_is(http, telegram, bot_api):
    token = link_token(http, join(http, "alice"))
    assert "успешно привязаны" in say(telegram, bot_api, 7, token)[0]
    for text in (f"/start {token}", token):
        assert say(telegram, bot_api, 7, text) == [factoryapp.LINKED_TO.format(username="alice")]


def test_who_has_waited_for_other_threads_waits_for_other_programs_the_less(
    http, clock, monkeypatch
):
    real = factoryapp.write_lock

    class SlowLock:
        release = real.release

        def acquire(self, timeout):
            clock.ticks += 4
            return real.acquire(timeout=timeout)

    monkeypatch.setattr(factoryapp, "write_lock", SlowLock())
    with factoryapp.transaction() as db:
        assert db.one("PRAGMA busy_timeout")[0] == 1000


# --- Passwords and tokens -------------------------------------------------------------------------


def test_password_is_kept_as_scrypt_with_its_parameters(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "SCRYPT", {"n": 2**15, "r": 8, "p": 3})
    register(http, "alice")
    kept = factoryapp.find_user_by_name(factoryapp.connection(), "alice")["password"]
    assert kept.startswith("scrypt$32768$8$3$") and PASSWORD not in kept
    monkeypatch.setattr(factoryapp, "SCRYPT", {"n": 16, "r": 8, "p": 1})
    assert log_in(http, "alice")


def test_same_password_of_two_users_is_kept_as_two_hashes(http):
    for name in ("alice", "bob"):
        register(http, name)
    kept = factoryapp.connection().execute("SELECT password FROM users").fetchall()
    assert len({row["password"] for row in kept}) == 2


def composed(text):
    return unicodedata.normalize("NFC", text)


def decomposed(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    "password", ["ёлка-йод", "A\u030angstro\u0308m", "한국어-비밀번호", "ᾯ" * 200]
)
def test_password_is_one_however_its_accents_are_typed(http, password):
    for name, first, then in (("a", composed, decomposed), ("b", decomposed, composed)):
        register(http, name, first(password))
        headers = log_in(http, name, then(password))
        sent = {"current_password": then(password), "new_password": PASSWORD}
        http.post_json("/api/users/set-password/", sent, headers=headers, status=204)


def test_longest_password_is_known_by_its_accents_too(http):
    register(http, "alice", "ᾯ" * 1024)
    assert log_in(http, "alice", decomposed("ᾯ" * 1024))


@pytest.mark.parametrize(
    "typed", ["ёлка-Йод", "елка-иод", "ёлка-йод ", "ё\u00adлка-йод", "ёлка‐йод"]
)
def test_password_that_only_looks_like_it_is_wrong(http, typed):
    register(http, "alice", "ёлка-йод")
    try_password(http, "alice", typed)


def test_access_token_lives_5_minutes_and_refresh_token_a_day(http, clock):
    register(http, "alice")
    tokens = http.post_json("/auth/token/", {"username": "alice", "password": PASSWORD}).json
    headers = {"Authorization": f"Bearer {tokens['access']}"}
    clock.move(299)
    http.get("/api/users/", headers=headers)
    clock.move(1)
    expired = http.get("/api/users/", headers=headers, status=401).json
    assert expired["messages"][0]["message"] == "Token is expired"
    clock.move(24 * 3600 - 301)
    http.post_json("/auth/token/refresh/", {"refresh": tokens["refresh"]})
    clock.move(1)
    assert http.post_json(
        "/auth/token/refresh/", {"refresh": tokens["refresh"]}, status=401
    ).json == {"detail": "Token is expired", "code": "token_not_valid"}


def test_claims_are_those_of_simplejwt(http):
    user = register(http, "alice")
    tokens = http.post_json("/auth/token/", {"username": "alice", "password": PASSWORD}).json
    for kind, seconds in (("access", 300), ("refresh", 86_400)):
        claims = jwt.decode(tokens[kind], options={"verify_signature": False})
        assert list(claims) == [*("token_type", "exp", "iat", "jti", "user_id", "hash_password")]
        assert claims["token_type"] == kind and claims["exp"] - claims["iat"] == seconds
        assert re.fullmatch("[0-9a-f]{32}", claims["jti"]) and claims["user_id"] == str(user["id"])


def test_memory_for_access_tokens_is_bounded(http):
    headers = join(http, "alice")
    known = factoryapp.verify_signature.cache_info()
    for _ in range(2):
        http.get("/api/users/me/", headers=headers)
    cached = factoryapp.verify_signature.cache_info()
    assert (cached.hits - known.hits, cached.misses - known.misses) == (1, 1)
    assert cached.maxsize == factoryapp.TOKENS_REMEMBERED


def try_password(http, username, password="wrong", address="192.0.2.1", status=401, **headers):
    return http.post_json(
        "/auth/token/",
        {"username": username, "password": password},
        headers=headers,
        extra_environ={"REMOTE_ADDR": address},
        status=status,
    )


def test_ten_failures_for_a_name_are_enough_then_one_in_thirty_seconds(http, clock, caplog):
    register(http, "alice")
    for _ in range(10):
        try_password(http, "alice")
        clock.move(1)
    refused = try_password(http, "alice", PASSWORD, status=429)
    assert refused.json == {"detail": "Request was throttled. Expected available in 20 seconds."}
    assert refused.headers["Retry-After"] == "20"
    try_password(http, "bob")
    try_password(http, "alice", PASSWORD, address="192.0.2.2", status=200)
    clock.move(20)
    try_password(http, "alice")
    clock.move(29)
    try_password(http, "alice", PASSWORD, status=429)
    clock.move(1)
    try_password(http, "alice", PASSWORD, status=200)
    assert [("192.0.2.1" in r.message, PASSWORD in r.message) for r in caplog.records] == [
        (True, False)
    ] * 14


def test_hundred_failures_of_an_address_are_enough(http, clock):
    register(http, "alice")
    for n in range(100):
        try_password(http, f"user{n}")
    assert try_password(http, "alice", PASSWORD, status=429).headers["Retry-After"] == "3"
    try_password(http, "alice", PASSWORD, address="192.0.2.2", status=200)


def test_right_password_forgives_the_failures_before(http):
    register(http, "alice")
    for _ in range(3):
        for _ in range(9):
            try_password(http, "alice")
        try_password(http, "alice", PASSWORD, status=200)


def test_right_passwords_do_not_count_towards_the_limit_of_their_address(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LOGIN_FAILURES_PER_ADDRESS", (5, 60))
    register(http, "alice")
    for n in range(4):
        try_password(http, f"user{n}")
    for _ in range(5):
        try_password(http, "alice", PASSWORD, status=200)
    try_password(http, "bob")
    try_password(http, "alice", PASSWORD, status=429)


def test_memory_for_failed_logins_is_bounded(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LIMITER_KEYS", 50)
    for n in range(100):
        try_password(http, "x" * 1000, address=f"192.0.2.{n}")
    assert len(factoryapp.login_limiter.spent_until) == 50
    assert all(len(str(key)) < 250 for key in factoryapp.login_limiter.spent_until)


def test_whoever_comes_when_the_memory_for_failed_logins_is_full_is_throttled(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LIMITER_KEYS", 50)
    for n in range(50):
        try_password(http, "bob", address=f"192.0.2.{n}")
    for status in [401] * 10 + [429]:
        try_password(http, "alice", address="192.0.2.99", status=status)


@pytest.mark.parametrize("is_forwarded", [False, True])
@pytest.mark.parametrize(
    "one, same, other",
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "2001:db8:1:3::1"),
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2"),
        ("fe80::1%a", "fe80::1%b", "fe80:0:0:1::1%a"),
    ],
)
def test_addresses_of_one_client_are_throttled_as_one(
    http, monkeypatch, one, same, other, is_forwarded
):
    monkeypatch.setattr(factoryapp, "LOGIN_FAILURES_PER_ADDRESS", (1, 300))
    monkeypatch.setattr(factoryapp, "REGISTRATIONS_PER_ADDRESS", (1, 300))
    trust(monkeypatch, "127.0.0.1")
    for path, refused in (("/auth/token/", 401), ("/api/users/register/", 400)):
        answered = []
        for address in (one, same, other):
            where = {"headers": {"X-Forwarded-For": address}}
            if not is_forwarded:
                where = {"extra_environ": {"REMOTE_ADDR": address}}
            sent = {"username": "bob", "password": "1"}
            answered.append(http.post_json(path, sent, status="*", **where).status_int)
        assert answered == [refused, 429, refused]


def test_unknown_name_costs_the_hash_of_a_wrong_password(http, monkeypatch):
    costs, real = [], factoryapp.hashlib.scrypt

    def noted(*args, **kwargs):
        costs.append((kwargs["n"], kwargs["r"], kwargs["p"]))
        return real(*args, **kwargs)

    register(http, "alice")
    monkeypatch.setattr(factoryapp.hashlib, "scrypt", noted)
    try_password(http, "alice")
    try_password(http, "nobody")
    assert costs == [(16, 8, 1)] * 2


# --- Outbox ---------------------------------------------------------------------------------------


@alone_and_crowded
def test_message_is_relayed_to_its_senders_chat_word_for_word(http, telegram, bot_api):
    headers = join(http, "alice")
    link_chat(http, telegram, bot_api, headers, 7)
    text = "*не* <b>разметка</b>\nhttps://example.org"
    assert post(http, headers, text)["delivery"] == "queued"
    deliver_all(telegram)
    assert bot_api.texts(7)[1:] == [f"alice, я получил от тебя сообщение:\n\n{text}"]
    assert list_messages(http, headers)[0]["delivery"] == "sent"


@alone_and_crowded
def test_message_to_another_reaches_both_chats(http, telegram, bot_api):
    alice, bob = join(http, "alice"), join(http, "bob")
    link_chat(http, telegram, bot_api, alice, 7)
    link_chat(http, telegram, bot_api, bob, 8)
    post(http, alice, "привет", recipient="bob")
    deliver_all(telegram)
    assert bot_api.texts(7)[1:] == ["alice, я получил от тебя сообщение для bob:\n\nпривет"]
    assert bot_api.texts(8)[1:] == ["Сообщение от alice:\n\nпривет"]
    assert list_messages(http, bob)[0]["delivery"] == "sent"


@alone_and_crowded
def test_long_message_goes_out_in_parts_in_order(http, telegram, bot_api):
    headers, text = join(http, "alice"), "слово " * 2700
    link_chat(http, telegram, bot_api, headers, 7)
    post(http, headers, text)
    deliver_next(telegram)
    assert list_messages(http, headers)[0]["delivery"] == "queued"
    deliver_all(telegram)
    _, first, *later = bot_api.raw
    assert [part.split("\n")[0] for part in later] == [f"alice ({n}/4):" for n in range(2, 5)]
    parts = [first, *(part.split("\n\n", 1)[1] for part in later)]
    assert "".join(parts) == f"alice, я получил от тебя сообщение:\n\n{text}"
    assert list_messages(http, headers)[0]["delivery"] == "sent"


@alone_and_crowded
def test_nothing_comes_between_the_parts_of_a_text(http, telegram, bot_api, clock, linked):
    headers = log_in(http, "alice")
    post(http, headers, "длинно " * 1500, send_at=factoryapp.iso(clock.seconds + 60))
    clock.move(61)
    factoryapp.publish_due()
    deliver_next(telegram)
    post(http, headers, "кратко")
    deliver_all(telegram)
    assert [text.split()[-1] for text in bot_api.texts(7)] == ["длинно"] * 3 + ["кратко"]


@pytest.mark.parametrize("send_at", [None, "2027-01-15T08:00:09Z"])
def test_first_part_of_an_answer_appears_as_a_reply_where_the_bot_knows_to_what(
    http, telegram, bot_api, clock, pair, send_at
):
    alice, bob = pair
    link_chat(http, telegram, bot_api, join(http, "carol"), 9)
    post(http, alice, "вопрос " * 1000, recipient="bob")
    deliver_all(telegram)
    later = {"send_at": send_at} if send_at else {}
    post(http, bob, "ответ " * 1000, reply_to=1, **later)
    post(http, bob, "третьим", reply_to=1, recipient="carol", **later)
    for _ in range(15):
        clock.move(1)
        deliver_all(telegram)
    asked, answered = (
        [copies(bot_api, n, text)[0] for n in (7, 8)] for text in ("вопрос", "ответ")
    )
    [passed_on] = copies(bot_api, 8, "третьим")
    assert len(copies(bot_api, 9, "третьим")) == len(copies(bot_api, 7, "bob (2/2)")) == 1
    assert bot_api.replied == {**dict(zip(answered, asked, strict=True)), passed_on: asked[1]}


def test_answer_to_what_was_deleted_in_telegram_is_sent_all_the_same(
    http, telegram, bot_api, linked
):
    post(http, linked, "вопрос")
    deliver_all(telegram)
    bot_api.deleted.add(len(bot_api.sent))
    post(http, linked, "ответ", reply_to=1)
    deliver_all(telegram)
    assert bot_api.texts(7)[1:] == [own_copy("ответ")] and bot_api.replied == {}


@pytest.mark.parametrize("recipient", ["bob", "alice"])
def test_buttons_are_below_the_last_part_of_the_recipients_copy_alone(
    http, telegram, bot_api, clock, pair, recipient
):
    factoryapp.connection().execute("UPDATE sqlite_sequence SET seq = 99999999999999999")
    choices = [letter * 64 for letter in "яжфцшщыю"]
    ask(http, telegram, pair[0], recipient, "слово " * 1000, choices=choices)
    clock.move(1)
    deliver_all(telegram)
    last = copies(bot_api, 8 if recipient == "bob" else 7, "(2/2)")
    assert list(bot_api.keyboards) == last
    assert [button["text"] for button in bot_api.keyboards[last[0]]] == choices


@alone_and_crowded
def test_silent_message_comes_without_a_sound(http, telegram, bot_api, linked):
    yes = (True, 1, 1.0, "true", "True", "t", "YES", "y", "on", "1")
    no = (False, 0, 0.0, "false", "FALSE", "F", "no", "N", "Off", "0")
    for silent in yes + no:
        post(http, linked, "a", silent=silent)
    deliver_all(telegram)
    # The first is the answer to linking.
    assert bot_api.silent == [False] + [True] * len(yes) + [False] * len(no)


def schedule(http, headers, text="later", **fields):
    """A message that is due in a minute."""
    fields = {"recipient": "bob", "send_at": factoryapp.iso(factoryapp.now() + 60), **fields}
    return post(http, headers, text, **fields)


def test_scheduled_message_is_its_senders_alone_until_it_is_due(
    http, telegram, bot_api, clock, pair
):
    alice, bob = pair
    message = schedule(http, alice)
    assert message["delivery"] == "scheduled" and message["created_at"] < message["send_at"]
    assert list_scheduled(http, alice) == [message]
    assert http.get("/api/messages/1/", headers=alice).json == message
    assert list_messages(http, alice) == list_messages(http, bob) == list_scheduled(http, bob) == []
    http.get("/api/messages/1/", headers=bob, status=404)
    assert cancel(http, bob) == 404
    answers = [{"text": "a", "reply_to": 1}] * 2
    for headers, answer in zip(pair, answers, strict=True):
        http.post_json("/api/messages/", answer, headers=headers, status=400)
    clock.move(60)
    deliver_all(telegram)
    assert bot_api.texts(8) == ["Сообщение от alice:\n\nlater"]
    assert list_scheduled(http, alice) == [] and factoryapp.publish_due() is False


def test_scheduled_message_is_published_behind_what_was_posted_before(
    http, telegram, bot_api, clock, pair
):
    alice, bob = pair
    scheduled = schedule(http, alice, choices=["a", "b"], silent=True)
    assert post(http, alice, "before", recipient="bob")["id"] == 2
    clock.move(60)
    deliver_all(telegram)
    published = http.get("/api/messages/?after=2", headers=bob).json
    now = factoryapp.iso(clock.seconds)
    assert published == [{**scheduled, "id": 3, "created_at": now, "delivery": "sent"}]
    assert http.get("/api/messages/1/", headers=alice).json == published[0]
    http.get("/api/messages/1/", headers=bob, status=404)
    assert bot_api.silent[-2:] == [True, True] and len(bot_api.keyboards) == 1
    assert post(http, alice, "answer", reply_to=1)["reply_to"] == 3
    answers = http.get("/api/messages/?reply_to=1", headers=alice).json
    assert [answer["text"] for answer in answers] == ["answer"]
    assert cancel(http, alice) == 409


def test_id_of_what_was_scheduled_and_cancelled_is_never_used_again(http, pair):
    alice, _ = pair
    assert [schedule(http, alice)["id"], schedule(http, alice)["id"]] == [1, 2]
    assert [cancel(http, alice, n) for n in (2, 1, 1)] == [200, 200, 404]
    assert post(http, alice, "text")["id"] == 3


def test_cancelled_scheduled_message_is_gone_and_stays_so_when_its_post_is_repeated(
    http, telegram, bot_api, clock, pair
):
    alice = {**pair[0], "Idempotency-Key": "a-key"}
    at = factoryapp.iso(clock.seconds + 60)
    first = schedule(http, alice, send_at=at, recipient=["bob", "alice"])
    assert len(list_scheduled(http, alice)) == 2
    gone = http.delete("/api/messages/1/", headers=alice).json
    assert gone == {**first[0], "delivery": "cancelled"}
    assert schedule(http, alice, send_at=at, recipient=["bob", "alice"]) == first
    clock.move(60)
    deliver_all(telegram)
    assert schedule(http, alice, send_at=at, recipient=["bob", "alice"]) == first
    assert bot_api.sent == [(7, own_copy("later"))]


@pytest.mark.parametrize("linked_since", [None, "then"])
def test_scheduled_message_goes_to_the_chat_that_is_linked_when_it_is_due(
    http, telegram, bot_api, clock, linked, linked_since
):
    bob = join(http, "bob")
    schedule(http, linked)
    if linked_since:
        link_chat(http, telegram, bot_api, bob, 8)
    clock.move(60)
    deliver_all(telegram)
    [message] = list_messages(http, log_in(http, "bob"))
    assert message["delivery"] == ("sent" if linked_since else "unlinked")


def test_scheduled_answers_to_a_message_are_listed_by_their_delivery(http, clock, pair):
    question = post(http, pair[0], "question", recipient="bob")["id"]
    answer = schedule(http, pair[1], "answer", recipient="alice", reply_to=question)
    schedule(http, pair[1], "other", recipient="alice")
    path = f"/api/messages/?delivery=scheduled&reply_to={question}"
    assert http.get(path, headers=pair[1]).json == [answer]
    assert http.get(path + "0", headers=pair[1]).json == http.get(path, headers=pair[0]).json == []


def test_as_many_may_be_scheduled_as_may_be_queued(http, clock, monkeypatch, pair):
    monkeypatch.setattr(factoryapp, "MAX_QUEUED", 2)
    alice, bob = pair
    later = {"send_at": factoryapp.iso(clock.seconds + 60), "recipient": "bob", "text": "text"}
    for sender, recipient in ((alice, "bob"), (alice, "alice"), (bob, "alice")):
        sent = {**later, "recipient": recipient}
        statuses = [
            http.post_json("/api/messages/", sent, headers=sender, status="*").status_int
            for _ in range(3)
        ]
        assert statuses == [201, 201, 429]
        # They do not count for each other.
        assert post_statuses(http, sender, 1, recipient) == [201]


def test_much_that_is_due_is_published_in_portions(http, clock, monkeypatch, pair):
    monkeypatch.setattr(factoryapp, "PUBLISH_ROWS", 1)
    texts = [schedule(http, pair[0], f"{n}")["text"] for n in range(5)]
    clock.move(60)
    portions = 0
    while factoryapp.publish_due():
        portions += 1
    assert portions == 5
    assert [message["text"] for message in list_messages(http, pair[1])] == texts


def test_scheduled_message_that_cannot_be_published_holds_up_no_other(
    http, telegram, bot_api, clock, pair, caplog
):
    for text in ("one", BREAKS, BREAKS_AT_ONCE, "two"):
        schedule(http, pair[0], text)
    clock.move(60)
    deliver_all(telegram)
    assert [m["text"] for m in list_messages(http, pair[1])] == ["one", "two"]
    again = factoryapp.iso(clock.seconds + 3600)
    waiting = list_scheduled(http, log_in(http, "alice"))
    assert [(m["text"], m["send_at"]) for m in waiting] == [
        (BREAKS, again),
        (BREAKS_AT_ONCE, again),
    ]
    assert [line.endswith("is scheduled again") for line in errors(caplog)] == [True, True]
    assert BREAKS not in caplog.text


@pytest.mark.parametrize("killed_at", ["before", "meanwhile", "after"])
def test_scheduled_messages_are_published_once_whenever_the_server_is_killed(
    start, bot_api, tmp_path, killed_at
):
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN, TELEGRAM_API_URL=bot_api.url)
    alice, bob = join(program.http, "alice"), join(program.http, "bob")
    bot_api.write(8, link_token(program.http, bob))
    bot_api.wait_for_texts(8, 1)
    due = factoryapp.now() + 1
    for n in range(100):
        post(program.http, alice, f"{n}", recipient="bob", send_at=factoryapp.iso(due))
    if killed_at != "before":
        ids = []
        while len(ids) < (1 if killed_at == "meanwhile" else 100):
            ids = program.http.get("/api/messages/?wait=10", headers=bob).json
    program.end(signal.SIGKILL)
    time.sleep(max(0, due - factoryapp.now()))
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN, TELEGRAM_API_URL=bot_api.url)
    published, ends_at = [], time.monotonic() + 10
    while len(published) < 100 and time.monotonic() < ends_at:
        published = list_messages(program.http, bob)
    assert [m["text"] for m in published] == [f"{n}" for n in range(100)]
    assert [m["id"] for m in published] == list(range(101, 201))
    assert list_scheduled(program.http, alice) == []


def test_who_waits_for_news_gets_a_scheduled_message_within_a_second_of_its_time(start):
    program = start()
    alice, bob = join(program.http, "alice"), join(program.http, "bob")
    due = factoryapp.now() + 1.2
    post(program.http, alice, "soon", recipient="bob", send_at=factoryapp.iso(due))
    assert post(program.http, alice, "at once", recipient="bob")["id"] == 2
    [message] = program.http.get("/api/messages/?after=2&wait=10", headers=bob).json
    assert message["text"] == "soon" and 0 <= factoryapp.now() - due < 1
    assert program.http.get("/api/messages/1/?wait=10", headers=alice).json == message


def test_scheduled_message_follows_its_recipient_to_another_chat(
    http, telegram, bot_api, clock, pair
):
    schedule(http, pair[0])
    link_chat(http, telegram, bot_api, pair[1], 9)
    clock.move(60)
    deliver_all(telegram)
    assert copies(bot_api, 9, "later") and not copies(bot_api, 8, "later")


def test_what_a_disabled_account_has_scheduled_is_never_published(http, clock, pair, caplog):
    schedule(http, pair[0])
    caplog.set_level("WARNING", factoryapp.log.name)  # it is set back when the test ends
    factoryapp.administer("alice", None)
    clock.move(60)
    assert factoryapp.publish_due() is False and list_messages(http, pair[1]) == []


@alone_and_crowded
def test_send_at_waits_and_lets_others_pass(http, telegram, bot_api, clock, linked):
    headers = log_in(http, "alice")
    post(http, headers, "tomorrow", send_at=factoryapp.iso(clock.seconds + 86_400))
    post(http, headers, "in an hour", send_at="2027-01-15T12:00:00.500+03:00")
    post(http, headers, "now")
    post(http, headers, "yesterday", send_at="2027-01-14T08:00:00.123456789+0000")
    deliver_all(telegram)
    assert [text.split("\n")[-1] for text in bot_api.texts(7)] == ["now", "yesterday"]
    clock.move(3599)
    deliver_all(telegram)
    assert len(bot_api.sent) == 2
    clock.move(2)
    deliver_all(telegram)
    assert bot_api.texts(7)[-1].endswith("in an hour")
    reopen_turns(telegram)
    deliver_all(telegram)
    clock.move(86_400)
    deliver_all(telegram)
    assert bot_api.texts(7)[-1].endswith("tomorrow") and len(bot_api.sent) == 4


@pytest.mark.parametrize(
    "failure",
    [
        {"error_code": 500, "description": "Internal Server Error"},
        {"error_code": 401, "description": "Unauthorized"},
        {"error_code": 429, "description": "Too Many Requests"},
        *[
            {"error_code": 429, "description": "Too Many Requests", "parameters": parameters}
            for parameters in (None, [9], 9, "x", {}, {"retry_after_too": 9})
        ],
        *[
            {**RETRY_AFTER_9, "parameters": {"retry_after": value}}
            for value in (
                -1,
                -0.5,
                "x",
                "-9",
                None,
                math.inf,
                -math.inf,
                math.nan,
                1e300,
                True,
                [9],
            )
        ],
        b"<html>502 Bad Gateway</html>",
        (403, b"<html>403 Forbidden</html>"),
        (404, b""),
        (200, b"<html>Log in</html>"),
        {},
        [1],
        "reset",
    ],
)
def test_failed_send_is_tried_again_after_the_pause(
    http, telegram, bot_api, clock, linked, failure
):
    bot_api.failures[7].extend([failure] * 3)
    headers = log_in(http, "alice")
    post(http, headers, "one")
    post(http, headers, "two")
    for attempts in range(3):
        deliver_all(telegram)
        assert len(bot_api.attempts) == 2 + attempts  # the answer to linking, then one a pause
        clock.move(2**attempts * 0.49)
        deliver_all(telegram)
        assert len(bot_api.attempts) == 2 + attempts
        assert list_messages(http, headers)[0]["delivery"] == "queued"
        clock.move(2**attempts * 0.52)
    deliver_all(telegram)
    clock.move(1)
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == ["one", "two"]


@pytest.mark.parametrize(
    "function",
    [
        "find_head",
        "deliver",
    ],
)
def test_chat_comes_up_again_after_a_round_that_failed(
    http, telegram, bot_api, clock, linked, monkeypatch, function
):
    failures, real = [sqlite3.OperationalError("disk I/O error")], getattr(factoryapp, function)

    def fail_once(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(factoryapp, function, fail_once)
    post(http, linked, "one")
    deliver_next(telegram)
    assert failures == bot_api.sent == []
    clock.move(60)
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == ["one"]


def test_fault_of_ours_in_a_delivery_ends_no_sender(
    http, linked, running, bot_api, monkeypatch, caplog
):
    real, faults = factoryapp.deliver, [ZeroDivisionError()]

    def deliver(*args):
        if faults:
            raise faults.pop()
        return real(*args)

    monkeypatch.setattr(factoryapp, "deliver", deliver)
    post(http, linked, "one")
    bot_api.wait_for(lambda: len(bot_api.sent) == 1)
    assert "ZeroDivisionError" in caplog.text


ODD_EXCEPTIONS = [
    OSError("Could not find a suitable TLS CA certificate bundle, invalid path: /gone.pem"),
    PermissionError(13, "Permission denied"),
    ValueError("Invalid IPv6 URL"),
    UnicodeError("label too long"),
    KeyError("ok"),
    AttributeError("'NoneType' object has no attribute 'readline'"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    RecursionError("maximum recursion depth exceeded"),
    AssertionError(),
    Exception("anything"),
]


@pytest.mark.parametrize("error", ODD_EXCEPTIONS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["in the network", "around it"])
def test_any_exception_of_a_send_is_a_failed_attempt(
    http, telegram, bot_api, clock, monkeypatch, caplog, where, error
):
    caplog.set_level("WARNING")
    owner, name = factoryapp.apihelper, "send_message"
    if where == "in the network":
        owner, name = owner.requests.Session, "request"
    calls, real = [], getattr(owner, name)

    def fail_thrice(*args, **kwargs):
        calls.append(clock.ticks)
        if len(calls) <= 3:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail_thrice)
    queue(7, 7)
    for attempts in range(3):
        deliver_all(telegram)
        assert len(calls) == attempts + 1
        clock.move(2**attempts * 0.49)
        deliver_all(telegram)
        assert len(calls) == attempts + 1
        clock.move(2**attempts * 0.52)
    deliver_all(telegram)
    assert bot_api.texts(7) == ["text", "text"]
    if where != "around it":  # foreseen: one line each, and no traceback
        assert len(caplog.records) == 3 and not any(r.exc_info for r in caplog.records)
        assert all(type(error).__name__ in r.getMessage() for r in caplog.records)
        assert str(error) == "" or str(error) not in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("disk I/O error"),
        sqlite3.DatabaseError("database disk image is malformed"),
        sqlite3.InterfaceError("bad parameter"),
        MemoryError(),
        OSError(24, "Too many open files"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_chat_whose_next_text_could_not_be_read_comes_up_again(
    http, telegram, bot_api, clock, monkeypatch, call, error
):
    calls, real = [], factoryapp.find_head

    def fail_once(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args)

    monkeypatch.setattr(factoryapp, "find_head", fail_once)
    queue(7, text="one")
    queue(7, text="two")
    for _ in range(4):  # rounds of run_outbox()
        with suppress(type(error)):
            deliver_all(telegram)
        clock.move(1.01)
    assert len(calls) > call and bot_api.texts(7) == ["one", "two"]


def test_pause_grows_to_five_minutes_with_jitter():
    pauses = [factoryapp.backoff(attempts, 300) for attempts in range(2000)]
    assert all(150 <= pause <= 300 for pause in pauses[9:]) and 0.5 <= pauses[0] <= 1
    assert len(set(pauses[9:])) > 100


@pytest.mark.parametrize("message_id", ["x", [1], 1.5, 2**70, None, True, -1])
def test_odd_answer_to_a_send_counts_as_sent_once(http, telegram, bot_api, linked, message_id):
    bob = join(http, "bob")
    bot_api.sendMessage, real = (
        (lambda p: {**real(p), "message_id": message_id}),
        bot_api.sendMessage,
    )
    post(http, bob, "one", recipient="alice")
    deliver_all(telegram)
    assert len(bot_api.sent) == 1 and list_messages(http, bob)[0]["delivery"] == "sent"


@pytest.mark.parametrize(
    "description, is_final",
    [
        ("Bad Request: message text is empty", True),
        ("Bad Request: text must be non-empty", True),
        ("Bad Request: message is too long", True),
        ("Bad Request: MESSAGE_TOO_LONG", True),
        ("Bad Request: can't parse entities: unexpected end", True),
        ("Bad Request: ENTITY_BOUNDS_INVALID", True),
        ("Bad Request: BUTTON_DATA_INVALID", True),
        ("Bad Request: REPLY_MARKUP_TOO_LONG", True),
        ("Bad Request: strings must be encoded in UTF-8", True),
        ("Logged out", False),
        ("Bad Request: FROZEN_METHOD_INVALID", False),
        ("Bad Request: Group send failed", False),
        ("Bad Request: method is not allowed now", False),
        ("Bad Request: not enough rights to send text messages to the chat", False),
        ("Bad Request: chat_id is empty", False),
        ("Bad Request", False),
    ],
)
def test_only_a_400_that_blames_the_text_is_final(
    http, telegram, bot_api, clock, linked, description, is_final
):
    bot_api.failures[7].append({"error_code": 400, "description": description})
    post(http, linked, "one")
    deliver_all(telegram)
    clock.move(2)
    deliver_all(telegram)
    assert list_messages(http, linked)[0]["delivery"] == ("failed" if is_final else "sent")


def test_odd_description_is_kept_as_the_reason(http, telegram, bot_api, linked):
    bot_api.failures[7].append({"error_code": 400, "description": "text is \ud800"})
    post(http, linked, "one")
    deliver_all(telegram)
    assert list_messages(http, linked)[0]["delivery"] == "failed"


@pytest.mark.parametrize(
    "why",
    [
        "Forbidden: bot was blocked by the user",
        "Forbidden: user is deactivated",
        "Forbidden: bot can't initiate conversation with a user",
        "",
    ],
)
@alone_and_crowded
def test_chat_that_is_gone_is_unlinked_and_its_queue_given_up(http, telegram, bot_api, linked, why):
    bot_api.failures[7].append({"error_code": 403, "description": why})
    post(http, linked, "one")
    post(http, linked, "two")
    deliver_all(telegram)
    assert bot_api.sent == []
    messages = list_messages(http, linked)
    assert [m["delivery"] for m in messages] == ["failed", "failed"]
    assert [m["failure"] for m in messages] == [f"403 {why}"] * 2
    assert post(http, linked, "three")["delivery"] == "unlinked"
    assert count("outbox") == 0


CHAT_NOT_FOUND_TOO = {"error_code": 400, "description": "Bad Request: Chat not found"}


@pytest.mark.parametrize("missing", [CHAT_NOT_FOUND, CHAT_NOT_FOUND_TOO])
def test_chat_not_found_is_believed_when_it_is_still_said_ten_minutes_later(
    http, telegram, bot_api, clock, linked, missing
):
    bot_api.failures[7].extend([missing] * 1000)
    first, second = post(http, linked, "one"), post(http, linked, "two")
    since = clock.seconds
    deliver_all(telegram)
    while clock.seconds < since + 590:
        clock.move(9)
        deliver_all(telegram)
        assert factoryapp.find_chat(factoryapp.connection(), 1)
    assert 7 <= tries(bot_api, 7) < 20  # with the growing pause; one was the answer to linking
    reopen_turns(telegram)
    while clock.seconds < since + 910:
        clock.move(9)
        deliver_all(telegram)
    headers = log_in(http, "alice")
    assert [m["delivery"] for m in list_messages(http, headers)] == ["failed", "failed"]
    assert not factoryapp.find_chat(factoryapp.connection(), 1)
    assert first["delivery"] == second["delivery"] == "queued"


@pytest.mark.parametrize(
    "otherwise",
    ["reset", RETRY_AFTER_9, {"error_code": 500, "description": "oops"}, b"<html>", None],
)
def test_chat_not_found_counts_from_anew_when_something_else_was_said(
    http, telegram, bot_api, clock, linked, monkeypatch, otherwise
):
    monkeypatch.setattr(factoryapp, "backoff", lambda attempts, longest: 100)
    answers = [CHAT_NOT_FOUND] * 5 + ([otherwise] if otherwise else []) + [CHAT_NOT_FOUND] * 5
    bot_api.failures[7].extend(answers)
    post(http, linked, "one")
    if otherwise is None:
        bot_api.failures[7].clear()
        bot_api.failures[7].extend([CHAT_NOT_FOUND] * 6)
    deliver_all(telegram)
    for _ in range(12):
        clock.move(100.1)
        deliver_all(telegram)
    assert bot_api.texts(7)[-1].endswith("one") and not bot_api.failures[7]
    assert post(http, log_in(http, "alice"), "two")["delivery"] == "queued"


OOPS = {"error_code": 500, "description": "Internal Server Error"}


@pytest.mark.parametrize(
    "failure, reason, pause, given_up_after",
    [
        (OOPS, "500 Internal Server Error", 100, 3600),
        (OOPS, "500 Internal Server Error", 300, 5700),
        (
            "reset",
            "Telegram cannot be reached at 127.0.0.1: Connection reset by peer, ConnectionError",
            180,
            3600,
        ),
        ((403, b"<html>"), "Telegram answered 403, which makes no sense", 300, 5700),
        ({}, "Telegram answered 200, which makes no sense", 180, 3600),
    ],
)
def test_delivery_that_fails_while_others_pass_is_given_up_after_20_failures_and_an_hour(
    http, telegram, bot_api, clock, monkeypatch, linked, failure, reason, pause, given_up_after
):
    monkeypatch.setattr(factoryapp, "backoff", lambda attempts, longest: pause)
    bot_api.failures[7].extend([failure] * (given_up_after // pause + 1))
    post(http, linked, "one")
    post(http, linked, "two")
    deliver_all(telegram)
    for seconds in range(pause, given_up_after + 1, pause):
        queue(8)
        clock.move(pause)
        assert bot_api.texts(7) == []
        deliver_all(telegram)
        message = list_messages(http, log_in(http, "alice"))[0]
        assert (message["delivery"] == "failed") == (seconds >= given_up_after), seconds
    one, two = list_messages(http, log_in(http, "alice"))
    assert (one["delivery"], one["failure"], two["delivery"]) == ("failed", reason, "sent")
    assert any("Не доставлено" in text for text in bot_api.texts(7))


@pytest.mark.parametrize("passed", ["none", "before", "at first", "at last"])
def test_delivery_that_fails_while_no_other_passes_is_not_given_up(
    http, telegram, bot_api, clock, monkeypatch, passed
):
    monkeypatch.setattr(factoryapp, "backoff", lambda attempts, longest: 300)
    if passed == "before":
        queue(6)
        deliver_all(telegram)
    clock.move(1)
    bot_api.away = OOPS
    queue(7)
    deliver_all(telegram)
    if passed == "at first":  # it was on its way when Telegram's trouble began
        bot_api.away = None
        queue(6)
        deliver_all(telegram)
        bot_api.away = OOPS
    queue(8)
    for _ in range(50):
        clock.move(300.1)
        deliver_all(telegram)
    assert tries(bot_api, 7) == 51 and tries(bot_api, 8) == 50
    bot_api.away = None
    if passed == "at last":  # Telegram is back: one more failure says nothing
        factoryapp.turns.hurry()
        bot_api.failures[7].append(OOPS)
        queue(6)
        deliver_all(telegram)
        assert [chat_id for _, chat_id, _ in bot_api.attempts[-3:]] == [6, 7, 8]
    clock.move(300.1)
    deliver_all(telegram)
    assert bot_api.texts(7) == bot_api.texts(8) == ["text"]


def test_delivery_given_up_is_no_evidence_against_another(
    http, telegram, bot_api, clock, monkeypatch, caplog
):
    monkeypatch.setattr(factoryapp, "backoff", lambda attempts, longest: 300)
    bot_api.failures[7].extend([OOPS] * 30)
    bot_api.failures[8].extend([OOPS] * 30)
    for seconds in range(0, 6150, 50):
        if seconds in (0, 400, 5750):  # two that fail, one that passes
            queue({0: 7, 400: 8, 5750: 6}[seconds])
        deliver_all(telegram)
        clock.move(50)
    assert (tries(bot_api, 7), tries(bot_api, 8)) == (21, 20)
    assert factoryapp.connection().list("SELECT chat_id FROM outbox") == [8]
    assert len(given_up_lines(caplog)) == 1


@alone_and_crowded
def test_text_that_can_never_be_sent_is_given_up_alone(http, telegram, bot_api, linked):
    bot_api.failures[7].append(TOO_LONG)
    post(http, linked, "one " * 2000)
    post(http, linked, "two")
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == [
        "one",
        "two",
        "бщ.",
    ]  # the rest of the first is sent all the same
    assert bot_api.texts(7)[2] == factoryapp.NOT_DELIVERED.format(username="alice", count=1)
    assert [m["delivery"] for m in list_messages(http, linked)] == ["failed", "sent"]


@alone_and_crowded
def test_sender_is_told_once_what_cannot_be_delivered(http, telegram, bot_api):
    alice, bob = join(http, "alice"), join(http, "bob")
    link_chat(http, telegram, bot_api, alice, 7)
    link_chat(http, telegram, bot_api, bob, 8)
    bot_api.failures[8].append(BLOCKED)
    for n in range(3):
        post(http, alice, str(n), recipient="bob")
    deliver_all(telegram)
    told = [text for text in bot_api.texts(7) if "Не доставлено" in text]
    assert told == [factoryapp.NOT_DELIVERED.format(username="bob", count=3)]
    assert bot_api.texts(8)[1:] == []


@alone_and_crowded
def test_sender_is_told_once_of_a_message_none_of_whose_parts_can_be_delivered(
    http, telegram, bot_api
):
    alice, bob = join(http, "alice"), join(http, "bob")
    link_chat(http, telegram, bot_api, alice, 7)
    link_chat(http, telegram, bot_api, bob, 8)
    bot_api.failures[8].extend([TOO_LONG] * 3)
    post(http, alice, "слово " * 2000, recipient="bob")
    deliver_all(telegram)
    told = [text for text in bot_api.texts(7) if "Не доставлено" in text]
    assert len(bot_api.failures[8]) == 0 and len(bot_api.texts(8)) == 1
    assert told == [factoryapp.NOT_DELIVERED.format(username="bob", count=1)]


def post_statuses(http, headers, count, recipient):
    """What so many posts in a row to this recipient are answered."""
    sent = {"text": "text", "recipient": recipient}
    return [
        http.post_json("/api/messages/", sent, headers=headers, status="*").status_int
        for _ in range(count)
    ]


def test_to_another_go_a_hundred_messages_at_once_and_then_one_a_second(http, clock):
    alice, bob, _ = (join(http, name) for name in ("alice", "bob", "carol"))
    assert post_statuses(http, alice, 102, "bob") == [201] * 100 + [429] * 2
    assert len(list_messages(http, bob)) == 100
    sent = {"text": "text", "recipient": "bob"}
    refused = http.post_json("/api/messages/", sent, headers=alice, status=429)
    assert refused.headers["Retry-After"] == "1"
    assert refused.json == {"detail": "Request was throttled. Expected available in 1 seconds."}
    assert post_statuses(http, alice, 101, "alice") == [201] * 101
    assert (
        post_statuses(http, alice, 1, "carol") + post_statuses(http, bob, 1, "alice") == [201] * 2
    )
    clock.move(3)
    assert post_statuses(http, log_in(http, "alice"), 4, "bob") == [201] * 3 + [429]


def test_retry_of_what_was_stored_is_answered_while_its_sender_is_too_fast(
    http, monkeypatch, clock
):
    monkeypatch.setattr(factoryapp, "MESSAGES_TO_ANOTHER", (2, 1))
    alice, sent = join(http, "alice"), {"text": "text", "recipient": "bob"}
    register(http, "bob")

    def send(key):
        headers = {**alice, "Idempotency-Key": key}
        answer = http.post_json("/api/messages/", sent, headers=headers, status="*")
        return answer.status_int, "Idempotency-Replayed" in answer.headers

    assert [send(key) for key in "aaabcab"] == [
        (201, False),
        (201, True),
        (201, True),
        (201, False),
        (429, False),
        (201, True),
        (201, True),
    ]
    clock.move(1)
    assert send("c") == (201, False)


def test_message_to_several_goes_to_none_while_it_is_too_fast_for_one(http, monkeypatch, clock):
    monkeypatch.setattr(factoryapp, "MESSAGES_TO_ANOTHER", (1, 1))
    alice, bob, carol = (join(http, name) for name in ("alice", "bob", "carol"))
    assert post_statuses(http, alice, 1, ["bob", "alice"]) == [201]
    assert post_statuses(http, alice, 2, ["carol", "bob", "alice"]) == [429] * 2
    assert (len(list_messages(http, bob)), list_messages(http, carol)) == (1, [])
    assert post_statuses(http, alice, 1, "carol") == [201]  # nothing of those counted


def test_while_as_much_waits_for_somebody_as_may_no_more_is_taken_for_them(
    http, telegram, bot_api, clock, monkeypatch, pair
):
    monkeypatch.setattr(factoryapp, "MAX_QUEUED", 2)
    alice, bob = pair
    bot_api.failures[8].append(RETRY_AFTER_9)
    assert post_statuses(http, alice, 2, "bob") == [201] * 2
    deliver_all(telegram)
    sent = {"text": "text", "recipient": ["alice", "bob"]}
    refused = http.post_json("/api/messages/", sent, headers=alice, status=429)
    assert refused.headers["Retry-After"] == "60"
    assert (
        post_statuses(http, alice, 1, "alice") + post_statuses(http, bob, 1, "alice") == [201] * 2
    )
    deliver_all(telegram)
    from_bob = copies(bot_api, 7, "Сообщение от bob")[-1]
    too_fast = factoryapp.TOO_FAST.format(username="bob", seconds=60)
    assert say(telegram, bot_api, 7, "text", reply_to=from_bob) == [too_fast]
    clock.move(9)
    deliver_all(telegram)
    assert post_statuses(http, alice, 1, "bob") == [201]


def test_one_may_have_more_wait_for_oneself_than_for_others(
    http, telegram, bot_api, clock, monkeypatch, pair
):
    monkeypatch.setattr(factoryapp, "MAX_QUEUED", 2)
    monkeypatch.setattr(factoryapp, "MAX_QUEUED_TO_ONESELF", 4)
    alice, bob = pair
    for _ in range(2):
        assert post_statuses(http, alice, 5, "alice") == [201] * 4 + [429]
        # What others send between them counts for nothing.
        assert post_statuses(http, bob, 3, "alice") == [201] * 2 + [429]
        assert post_statuses(http, alice, 3, "bob") == [201] * 2 + [429]
        deliver_all(telegram)
        clock.move(10)
        deliver_all(telegram)


def test_long_texts_to_oneself_count_as_those_to_others(http, monkeypatch, linked):
    monkeypatch.setattr(factoryapp, "MAX_QUEUED", 2)
    statuses = []
    for length in (1000, 1001, 1001, 1000, 1000):
        sent = {"text": "ы" * length}
        answer = http.post_json("/api/messages/", sent, headers=linked, status="*")
        statuses.append(answer.status_int)
    assert statuses == [201, 201, 429, 201, 201]


def test_memory_for_paces_is_bounded(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LIMITER_KEYS", 2)
    monkeypatch.setattr(factoryapp, "MESSAGES_TO_ANOTHER", (1, 1))
    alice = join(http, "alice")
    for name in ("bob", "carol", "dave"):
        register(http, name)
        assert post_statuses(http, alice, 1, name) == [201]
    assert list(factoryapp.message_limiter.spent_until) == [(1, 3), (1, 4)]
    assert post_statuses(http, alice, 1, "dave") == [429]


def given_up_lines(caplog):
    texts = [record.getMessage() for record in caplog.records]
    return [text.partition(" (")[::2] for text in texts if "deliveries given up" in text]


FROM_1_TO_2 = "message 1 from user 1 to user 2"


@pytest.mark.parametrize(
    "text, chat_id, failures, lines",
    [
        ("text", 8, [BLOCKED], ["403 Forbidden: bot was blocked by the user): " + FROM_1_TO_2]),
        ("text", 7, [BLOCKED], ["403 Forbidden: bot was blocked by the user): " + FROM_1_TO_2]),
        (
            "слово " * 2000,
            8,
            [TOO_LONG] * 3,
            ["400 Bad Request: message is too long): " + FROM_1_TO_2] * 3,
        ),
    ],
    ids=["recipient", "own copy", "each part"],
)
def test_line_of_a_given_up_delivery_names_message_sender_and_recipient(
    http, telegram, bot_api, caplog, pair, text, chat_id, failures, lines
):
    bot_api.failures[chat_id].extend(failures)
    post(http, pair[0], text, recipient="bob")
    deliver_all(telegram)
    assert given_up_lines(caplog) == [("1 deliveries given up", line) for line in lines]
    [message] = list_messages(http, pair[1])
    assert message["delivery"] == ("sent" if chat_id == 7 else "failed")


def test_line_of_many_given_up_deliveries_is_short(http, telegram, bot_api, caplog, pair):
    for _ in range(30):
        post(http, pair[0], "слово " * 2000, recipient="bob")
    http.post("/api/users/unlink-telegram/", headers=pair[1])
    [(many, names)] = given_up_lines(caplog)
    assert many == "90 deliveries given up"
    assert names.count("message 1 ") == 1 and len(names) < 400


def refuse_third_part(http, telegram, bot_api, bob):
    bot_api.failures[8].extend([None, None, TOO_LONG])


def stop_bot(http, telegram, bot_api, bob):
    bot_api.failures[8].append(RETRY_AFTER_9)
    say(telegram, bot_api, 8, "/stop")


def unlink(http, telegram, bot_api, bob):
    http.post("/api/users/unlink-telegram/", headers=bob)


def block(http, telegram, bot_api, bob):
    bot_api.failures[8].append(BLOCKED)


@pytest.fixture
def much(http, clock, pair):
    """Alice, whose chat is 7, and Bob, for whose chat 8 messages of hers are queued."""
    for n in range(5):
        post(http, pair[0], f"text {n}", recipient="bob")
    return pair


def numbers(bot_api, chat_id):
    """Which of these a chat got."""
    return [int(n) for text in bot_api.texts(chat_id) for n in re.findall(r"text (\d)", text)]


@pytest.mark.parametrize("give_up", [stop_bot, unlink, block])
def test_chat_that_is_left_with_much_is_gone_at_once_and_its_senders_are_told_once(
    http, telegram, bot_api, much, give_up
):
    alice, bob = much
    give_up(http, telegram, bot_api, bob)
    deliver_all(telegram)
    assert post(http, alice, "late", recipient="bob")["delivery"] == "unlinked"
    reopen_turns(telegram)
    deliver_all(telegram)
    assert cancel(http, alice, 5) == 409
    assert numbers(bot_api, 8) == []
    assert [m["delivery"] for m in list_messages(http, alice)][:5] == ["failed"] * 5
    assert [text for text in bot_api.texts(7) if "Не доставлено" in text] == [
        factoryapp.NOT_DELIVERED.format(username="bob", count=5)
    ]


@pytest.mark.parametrize("is_moved", [False, True])
def test_much_is_given_up_or_moved_in_statements_that_fit_into_memory(
    http, telegram, bot_api, monkeypatch, much, is_moved
):
    lengths, real = [], factoryapp.Connection.run

    def run(db, sql, *values, **named):
        lengths.extend(len(value) for value in values if isinstance(value, list))
        return real(db, sql, *values, **named)

    monkeypatch.setattr(factoryapp, "PORTION_ROWS", 2)
    monkeypatch.setattr(factoryapp.Connection, "run", run)
    if is_moved:
        link_chat(http, telegram, bot_api, much[1], 9)
    else:
        unlink(http, telegram, bot_api, much[1])
    assert sorted(lengths) == sorted([2, 2, 1] * (1 if is_moved else 2))
    deliver_all(telegram)
    assert numbers(bot_api, 8) == [] and numbers(bot_api, 9) == [*range(5)][: 5 * is_moved]


def test_chat_that_was_left_and_is_linked_again_gets_what_is_new_and_nothing_old(
    http, telegram, bot_api, much
):
    alice, bob = much
    unlink(http, telegram, bot_api, bob)
    bot_api.write(8, link_token(http, bob))
    telegram.poll()
    post(http, alice, "text 9", recipient="bob")
    deliver_all(telegram)
    assert numbers(bot_api, 8) == [9]


@pytest.mark.parametrize("chats", [[9], [9, 10], [9, 8], [9, 10, 8], [9, 8, 9]])
def test_much_moves_to_the_last_of_the_new_chats_in_order(http, telegram, bot_api, much, chats):
    alice, bob = much
    for chat_id in chats:
        bot_api.write(chat_id, link_token(http, bob))
        telegram.poll()
    post(http, alice, "text 9", recipient="bob")
    deliver_all(telegram)
    assert numbers(bot_api, chats[-1]) == [0, 1, 2, 3, 4, 9]
    assert {chat for chat, text in bot_api.sent if "text" in text} == {7, chats[-1]}


@pytest.mark.parametrize(
    "give_up, failure",
    [
        (block, "403 Forbidden: bot was blocked by the user"),
        (refuse_third_part, "400 Bad Request: message is too long"),
        (stop_bot, "the chat was unlinked with /stop"),
        (unlink, "the user unlinked the chat"),
    ],
)
def test_message_says_why_its_copy_was_given_up(http, telegram, bot_api, pair, give_up, failure):
    alice, bob = pair
    post(http, alice, "слово " * 2000, recipient="bob")
    give_up(http, telegram, bot_api, bob)
    deliver_all(telegram)
    link_chat(http, telegram, bot_api, bob, 9)  # it is about the copy that was
    with factoryapp.transaction() as db:
        db.execute("DELETE FROM outbox")
    for headers in pair:
        message = http.get("/api/messages/1/", headers=headers).json
        assert (message["delivery"], message["failure"]) == ("failed", failure)
        assert http.get("/api/messages/?delivery=failed", headers=headers).json == [message]


def test_sent_message_is_not_sent_again_when_settling_fails(
    http, telegram, bot_api, linked, monkeypatch
):
    failures, real = [sqlite3.OperationalError("disk full")] * 2, factoryapp.settle_sent

    def fail_twice(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(factoryapp, "settle_sent", fail_twice)
    monkeypatch.setattr(factoryapp.time, "sleep", lambda seconds: None)
    post(http, linked, "one")
    deliver_all(telegram)
    assert len(bot_api.attempts) == 2 and len(bot_api.sent) == 1
    assert list_messages(http, linked)[0]["delivery"] == "sent"


def test_chat_that_hangs_delays_no_other(http, running, bot_api, monkeypatch):
    monkeypatch.setattr(factoryapp, "SEND_TIMEOUT_SECONDS", 1.5)
    people = {}
    for chat_id, name in ((7, "alice"), (8, "bob")):
        people[name] = join(http, name)
        bot_api.write(chat_id, link_token(http, people[name]))
        bot_api.wait_for_texts(chat_id)
    bot_api.failures[7].append(1.5)
    post(http, people["alice"], "hangs")
    started_at = time.monotonic()
    for n in range(20):
        post(http, people["bob"], str(n))
    bot_api.wait_for_texts(8, 21)
    assert time.monotonic() - started_at < 1.3
    assert len(bot_api.texts(7)) == 1


def test_forty_chats_that_hang_in_one_moment_hold_up_no_other(http, running, bot_api, monkeypatch):
    monkeypatch.setattr(factoryapp, "SENDS_PER_SECOND", 400)
    factoryapp.turns.open(running.id, ())
    for chat_id in range(1, 41):
        bot_api.failures[chat_id].append(10)
    try:
        queue(*range(1, 41))
        bot_api.wait_for(lambda: len(bot_api.attempts) == 40, seconds=5)
        for n in range(5):
            started_at = time.monotonic()
            queue(99, text=str(n))
            bot_api.wait_for_texts(99, n + 1, seconds=5)
            assert time.monotonic() - started_at < 1
    finally:
        bot_api.hung_up.set()


def test_answers_that_drip_hold_up_no_other_chat(http, running, bot_api):
    for chat_id in range(100, 120):
        bot_api.failures[chat_id].append("drips")
    queue(*range(100, 120))
    bot_api.wait_for(lambda: all(tries(bot_api, chat_id) for chat_id in range(100, 120)))
    queue(8)
    bot_api.wait_for_texts(8, seconds=3)


def test_two_people_and_a_bad_day(http, running, bot_api, monkeypatch):
    # 200 messages between two chats; trouble on the way, and at the end one chat blocks the bot.
    monkeypatch.setattr(factoryapp, "SEND_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(factoryapp, "SENDS_PER_SECOND", 400)
    monkeypatch.setattr(factoryapp, "SLOW_SECONDS", 0)
    monkeypatch.setattr(factoryapp, "backoff", lambda attempts, longest: 0.2)
    factoryapp.turns.open(running.id, ())
    people, chats = {}, {"alice": 7, "bob": 8}
    for name, chat_id in chats.items():
        people[name] = join(http, name)
        bot_api.write(chat_id, link_token(http, people[name]))
        bot_api.wait_for_texts(chat_id)
    bot_api.sent.clear()
    trouble = [
        {**RETRY_AFTER_9, "parameters": {"retry_after": 0.5}},
        "reset",
        {"error_code": 500, "description": "Internal Server Error"},
        1.0,
    ]
    names = list(chats)
    for n in range(200):
        if n in (20, 60, 100, 140):
            bot_api.failures[chats[names[n // 20 % 2]]].append(trouble.pop())
        post(http, people[names[n % 2]], str(n), recipient=names[(n + 1) % 2])
    bot_api.wait_for(lambda: len(bot_api.sent) == 400, seconds=20)
    for chat_id in chats.values():
        numbers = [int(text.split()[-1]) for text in bot_api.texts(chat_id)]
        assert numbers == list(range(200))
    assert {m["delivery"] for m in list_messages(http, people["alice"])} == {"sent"}
    bot_api.failures[8].append(BLOCKED)
    post(http, people["alice"], "last", recipient="bob")
    bot_api.wait_for_texts(7, 201)
    bot_api.wait_for(lambda: len(bot_api.attempts) > 405)
    for _ in range(100):
        if (delivery := list_messages(http, people["alice"])[-1]["delivery"]) == "failed":
            break
        time.sleep(0.02)
    assert delivery == "failed" and post(http, people["bob"], "gone")["delivery"] == "unlinked"


@pytest.mark.parametrize(
    "away",
    [
        "refused",
        "black-holed",
        "reset",
        b"<html>502 Bad Gateway</html>",
        {},
        [1],
        {**RETRY_AFTER_9, "parameters": {"retry_after": 0.5}},
        0.6,
    ],
)
def test_telegram_may_be_away_as_long_as_it_likes(http, running, bot_api, monkeypatch, away):
    monkeypatch.setattr(factoryapp, "SEND_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(factoryapp, "SLOW_SECONDS", 0)
    monkeypatch.setattr(factoryapp, "SENDS_BURST", 5)
    monkeypatch.setattr(factoryapp, "backoff", lambda attempts, longest: 0.2)
    factoryapp.turns.open(running.id, ())
    headers = join(http, "alice")
    bot_api.write(7, link_token(http, headers))
    bot_api.wait_for_texts(7)
    with socket.create_server(("127.0.0.1", 0)) as black_hole:
        if away == "black-holed":  # connections are made, nobody answers
            monkeypatch.setattr(
                factoryapp.apihelper,
                "API_URL",
                f"http://127.0.0.1:{black_hole.getsockname()[1]}/bot{{0}}/{{1}}",
            )
        elif away == "refused":
            monkeypatch.setattr(factoryapp.apihelper, "API_URL", "http://127.0.0.1:9/bot{0}/{1}")
        else:
            bot_api.away = away
        durations = []
        for n in range(12):
            started_at = time.monotonic()
            post(http, headers, str(n))
            durations.append(time.monotonic() - started_at)
        time.sleep(0.3)
        assert len(bot_api.sent) == 1 and sorted(durations)[6] < 0.25
        bot_api.away = None
        monkeypatch.setattr(factoryapp.apihelper, "API_URL", bot_api.url + "/bot{0}/{1}")
        # Not before: a send to the black hole would hang for as long.
        monkeypatch.setattr(factoryapp, "SEND_TIMEOUT_SECONDS", 15)
        bot_api.wait_for(lambda: len(bot_api.sent) == 13)
    assert [text.split()[-1] for text in bot_api.texts(7)[1:]] == [str(n) for n in range(12)]
    times = [at for at, _, _ in bot_api.attempts[-12:]]
    assert all(b - a > 0.3 for a, b in zip(times, times[10:], strict=False))  # no storm


def test_backlog_does_not_wait_out_its_pauses_when_telegram_is_back(
    http, running, bot_api, monkeypatch
):
    monkeypatch.setattr(
        factoryapp,
        "backoff",
        lambda attempts, longest: 60 if longest == factoryapp.BACKOFF_MAX_SECONDS else 0.1,
    )
    headers = join(http, "alice")
    bot_api.write(7, link_token(http, headers))
    bot_api.wait_for_texts(7)
    bot_api.away = "reset"
    post(http, headers, "one")
    bot_api.write(7, "/start")  # ends the poll in flight: the next ones fail
    bot_api.wait_for(lambda: len(bot_api.attempts) == 2)
    time.sleep(0.3)
    bot_api.away = None
    bot_api.wait_for_texts(7, 3, seconds=5)
    assert bot_api.texts(7)[1].endswith("one")


# --- Bot ------------------------------------------------------------------------------------------


def test_link_token_links_the_chat_once(http, telegram, bot_api):
    headers = join(http, "alice")
    answer = http.get("/api/users/get-telegram-token/", headers=headers).json
    assert answer["link"] == f"https://t.me/factory_test_bot?start={answer['telegram_token']}"
    said = say(telegram, bot_api, 7, f"/start {answer['telegram_token']}")
    assert len(said) == 1 and "успешно привязаны" in said[0] and "alice" in said[0]
    assert "неверный или устарел" in say(telegram, bot_api, 8, answer["telegram_token"])[0]
    stored = factoryapp.connection().execute("SELECT * FROM link_tokens").fetchall()
    assert stored == []


def test_link_token_lives_10_minutes_and_a_new_one_replaces_it(http, telegram, bot_api, clock):
    headers = join(http, "alice")
    old, new = link_token(http, headers), link_token(http, headers)
    assert "неверный или устарел" in say(telegram, bot_api, 7, old)[0]
    clock.move(600)
    assert "неверный или устарел" in say(telegram, bot_api, 7, new)[0]
    headers = log_in(http, "alice")
    answer = http.get("/api/users/get-telegram-token/", headers=headers).json
    assert answer["expires_at"] == factoryapp.iso(clock.seconds + 600)
    clock.move(599)
    assert "успешно привязаны" in say(telegram, bot_api, 7, answer["telegram_token"])[0]


def test_bot_answers_as_agreed(http, telegram, bot_api):
    headers = join(http, "alice")
    (greeting,) = say(telegram, bot_api, 7, "/start")
    assert "токен" in greeting and "get-telegram-token" in greeting
    for wrong in ("hello", "/stop", "/start nonsense", "/foo", "x" * 43):
        assert "неверный или устарел" in say(telegram, bot_api, 7, wrong)[0]
    assert "/stop" in say(telegram, bot_api, 7, "/help")[0]
    link_chat(http, telegram, bot_api, headers, 7)
    assert "alice" in say(telegram, bot_api, 7, "/start@factory_test_bot")[0]
    assert "не знаю" in say(telegram, bot_api, 7, "/foo")[0]
    assert "неверный или устарел" in say(telegram, bot_api, 7, "/start nonsense")[0]
    assert say(
        telegram,
        bot_api,
        7,
        sticker={
            "file_id": "a",
            "file_unique_id": "b",
            "width": 1,
            "height": 1,
            "type": "regular",
            "is_animated": False,
            "is_video": False,
        },
    ) == [factoryapp.TEXT_ONLY]
    assert list_messages(http, headers) == []
    assert "отвязан" in say(telegram, bot_api, 7, "/stop")[0]
    assert post(http, headers, "to nobody")["delivery"] == "unlinked"
    assert "неверный или устарел" in say(telegram, bot_api, 7, "hello")[0]


@pytest.mark.parametrize("text", ["  \n ", "\u2003", "\0", ""])
def test_blank_text_to_the_bot_is_no_message(http, telegram, bot_api, linked, caplog, text):
    assert say(telegram, bot_api, 7, text) == []
    assert list_messages(http, linked) == [] and caplog.text == ""


def test_text_to_the_bot_over_the_limit_is_refused(http, telegram, bot_api, linked):
    assert say(telegram, bot_api, 7, "я" * 16_385) == [factoryapp.TOO_LONG]
    assert list_messages(http, linked) == []


def test_notice_of_telegrams_own_in_a_chat_is_not_answered(http, telegram, bot_api, linked):
    timer = {"message_auto_delete_time": 86_400}
    assert say(telegram, bot_api, 7, message_auto_delete_timer_changed=timer) == []


def test_terminal_gets_no_control_characters_but_tabs_and_line_ends(capsys):
    controls = {chr(code) for code in (*range(32), *range(127, 160))} - {"\t", "\n"}
    text = "a\tb\nc" + "".join(controls)
    factoryapp.Terminal().send({"text": text, "message_id": None, "choices": None})
    assert capsys.readouterr().out == "a\tb\nc" + "\ufffd" * len(controls) + "\n\n"


@pytest.fixture
def terminal(http, clock, capsys):
    """Alice has typed her token; what is printed after a typed line."""

    def terminal(line=""):
        capsys.readouterr()
        factoryapp.running.home.hear(line)
        deliver_all(factoryapp.running.home)
        return capsys.readouterr().out

    return terminal


def test_line_with_the_number_of_a_message_answers_it(http, terminal):
    alice, bob = join(http, "alice"), join(http, "bob")
    terminal(link_token(http, alice))
    post(http, bob, "слово " * 1000, recipient="alice", choices=["Да", "Н\x1bет"])
    [first, later] = terminal().split("слово \n\n")
    assert first.startswith("#1\nСообщение от bob:\n\n") and "[Да]" not in first
    assert later.startswith("#1\nbob (2/2):\n\n") and later.endswith("\n[Да]\n[Н\ufffdет]\n\n")
    assert terminal("#1 Да").startswith("#2\nalice, я получил от тебя сообщение для bob:\n\nДа")
    for line in ("#01   Да", "#2 Да ", "#1  ", "#1", " #1 Да", "#1\tДа", "#x Да", "#-1 Да", "#1Да"):
        terminal(line)
    assert links(http, alice)[1:] == [
        ("alice", "bob", "Да", 1),
        ("alice", "bob", "Да", 1),
        ("alice", "bob", "Да ", 2),
        *(("alice", "alice", text, None) for text in ("#1", " #1 Да", "#1\tДа", "#x Да")),
        *(("alice", "alice", text, None) for text in ("#-1 Да", "#1Да")),
    ]


@pytest.mark.parametrize(
    "number", ["2", "3", "0", "0" * 17 + "10", "9" * 18, "1" + "0" * 18, "9" * 5000]
)
def test_line_with_a_number_that_is_not_theirs_is_not_stored(http, terminal, number):
    alice, bob = join(http, "alice"), join(http, "bob")
    assert factoryapp.NOT_LINKED in terminal(f"#{number} Да")
    terminal(link_token(http, alice))
    post(http, alice, "her own")
    post(http, bob, "not hers")
    terminal()
    assert terminal(f"#{number} Да") == factoryapp.NO_SUCH_NUMBER + "\n\n"
    assert links(http, alice) == [("alice", "alice", "her own", None)]


def test_command_or_token_behind_a_number_is_one_as_in_a_reply_in_telegram(http, terminal):
    token = link_token(http, join(http, "alice"))
    assert "успешно привязаны" in terminal(f"#1 {token}")
    assert terminal("#1 /help") == factoryapp.HELP + factoryapp.ANSWER_BY_NUMBER + "\n\n"
    assert "Чат отвязан" in terminal("#1 /stop")


def test_menu_shows_the_commands(telegram, bot_api):
    assert bot_api.commands == ["start", "stop", "help"]


def test_bot_without_a_menu_works_all_the_same(http, bot_api, capsys):
    bot_api.failures["setMyCommands"].append({"error_code": 400, "description": "Bad Request"})
    factoryapp.Telegram(BOT_TOKEN, bot_api.url).introduce()
    assert capsys.readouterr().out == "bot: @factory_test_bot on Telegram\n"


@alone_and_crowded
def test_text_to_the_bot_is_a_message_and_a_reply_goes_to_the_author(http, telegram, bot_api):
    alice, bob = join(http, "alice"), join(http, "bob")
    link_chat(http, telegram, bot_api, alice, 7)
    link_chat(http, telegram, bot_api, bob, 8)
    assert say(telegram, bot_api, 8, "заметка") == ["bob, я получил от тебя сообщение:\n\nзаметка"]
    own_copy = len(bot_api.sent)
    post(http, alice, "привет " * 1000, recipient="bob")
    deliver_all(telegram)
    last_part = max(n for n, (chat, _) in enumerate(bot_api.sent, 1) if chat == 8)
    say(telegram, bot_api, 8, "ответ", reply_to=last_part)
    say(telegram, bot_api, 8, "себе", reply_to=own_copy)
    assert bot_api.texts(7)[-1] == "Сообщение от bob:\n\nответ"
    assert [
        (m["recipient"], m["text"], m["source"])
        for m in list_messages(http, bob)
        if m["sender"] == "bob"
    ] == [
        ("bob", "заметка", "telegram"),
        ("alice", "ответ", "telegram"),
        ("bob", "себе", "telegram"),
    ]


def spoil(value, path=()):
    """(path, copy) of a JSON value for each place of it and each thing that should not be there."""
    for bad in (None, 5, -(2**70), True, "x", "\ud800\0", [], {}, [5], {"x": 5}):
        yield path, bad
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            for inner_path, spoiled in spoil(inner, (*path, key)):
                copy = value.copy()
                copy[key] = spoiled
                yield inner_path, copy


NEEDED = {("chat",), ("chat", "id"), ("chat", "type"), ("text",), ("message_id",)}


@pytest.mark.parametrize("kind", ["message", "callback_query"])
def test_whatever_is_odd_in_an_update_no_text_is_lost(
    http, telegram, bot_api, linked, monkeypatch, caplog, kind
):
    monkeypatch.setattr(factoryapp, "MAX_QUEUED", 10_000)
    chat, me = {"id": 7, "type": "private"}, {"id": 7, "is_bot": False}
    link = {"type": "text_link", "offset": 0, "length": 1, "url": "https://a.b"}
    message = {
        **{"message_id": 1, "date": 0, "chat": chat, "from": me, "text": "words"},
        **{"entities": [link], "caption_entities": [link], "caption": "x", "media_group_id": "1"},
        **{"forward_origin": {"type": "user"}, "forward_date": 1, "photo": [{"file_id": "x"}]},
        **{"message_thread_id": 1, "is_topic_message": True, "migrate_from_chat_id": -5},
        "reply_to_message": {"message_id": 9, "date": 0, "chat": chat, "from": me, "text": "x"},
    }
    if kind == "callback_query":
        message = {"id": "5", "from": me, "data": "1:0", "message": message}
    heard = 0
    for n, (path, spoiled) in enumerate(spoil(message), 1):
        if kind == "message" and isinstance(spoiled, dict) and spoiled.get("message_id") == 1:
            spoiled["message_id"] = n
        _, answer = factoryapp.receive_or_skip(BOT_ID, {"update_id": n, kind: spoiled})
        if kind == "message":
            heard += path not in NEEDED and path != ()
            assert count("messages") >= heard, (path, spoiled)
        else:
            assert answer in (None, factoryapp.TOO_LATE)
        assert "skipped" not in caplog.text, (path, spoiled)
    assert heard > 200 or kind != "message"


def test_reply_to_anything_that_the_bot_repeated_is_linked(http, telegram, bot_api, pair):
    alice, bob = pair
    post(http, alice, "слово " * 1000, recipient="bob")
    post(http, alice, "заметка")
    deliver_all(telegram)
    own, own_later = (copies(bot_api, 7, text)[0] for text in ("для bob", "(2/2)"))
    for chat_id, message_id in (
        (8, copies(bot_api, 8, "от alice")[0]),
        (8, copies(bot_api, 8, "(2/2)")[0]),
        (7, own),
        (7, own_later),
        (7, copies(bot_api, 7, "заметка")[0]),
    ):
        say(telegram, bot_api, chat_id, "ответ", reply_to=message_id)
    say(telegram, bot_api, 7, "и снова", reply_to=len(bot_api.sent))  # the copy of an answer
    assert links(http, alice)[2:] == [
        ("bob", "alice", "ответ", 1),
        ("bob", "alice", "ответ", 1),
        ("alice", "bob", "ответ", 1),
        ("alice", "bob", "ответ", 1),
        ("alice", "alice", "ответ", 2),
        ("alice", "alice", "и снова", 7),
    ]


def test_reply_in_a_chat_to_what_another_account_got_there_is_said_to_be_nobodys(
    http, telegram, bot_api, pair
):
    ask(http, telegram, pair[0])
    carol = join(http, "carol")
    [asked] = copies(bot_api, 8, "Стоп?")
    say(telegram, bot_api, 8, "/stop")
    link_chat(http, telegram, bot_api, carol, 8)
    assert say(telegram, bot_api, 8, "ответ", reply_to=asked) == [factoryapp.UNKNOWN_REPLY]
    assert press(telegram, bot_api, 8, asked) == [factoryapp.TOO_LATE]
    assert links(http, carol) == []


def test_press_is_an_answer_once_and_then_the_buttons_go(http, telegram, bot_api, pair):
    alice, bob = pair
    ask(http, telegram, alice)
    [asked] = copies(bot_api, 8, "Стоп?")
    say(telegram, bot_api, 8, "сейчас", reply_to=asked)  # typing ends nothing
    assert press(telegram, bot_api, 8, asked, id="5") == [None] and bot_api.keyboards == {}
    assert press(telegram, bot_api, 8, asked, id="5") == [None, factoryapp.TOO_LATE]
    assert press(telegram, bot_api, 8, asked, 1) == [factoryapp.TOO_LATE]
    assert links(http, alice)[1:] == links(http, bob)[1:]
    assert links(http, bob)[1:] == [("bob", "alice", "сейчас", 1), ("bob", "alice", "Да", 1)]
    assert list_messages(http, bob)[-1]["source"] == "telegram"
    assert bot_api.texts(7)[-1] == "Сообщение от bob:\n\nДа"


@pytest.mark.parametrize(
    "text, by, is_answer", [("Да", "bob", True), ("да", "bob", False), ("Да", "alice", False)]
)
def test_reply_that_is_a_choice_ends_the_question_for_the_buttons_too(
    http, telegram, bot_api, pair, text, by, is_answer
):
    ask(http, telegram, pair[0])
    [asked] = copies(bot_api, 8, "Стоп?")
    post(http, log_in(http, by), text, reply_to=1)
    said = [factoryapp.TOO_LATE if is_answer else None]
    assert press(telegram, bot_api, 8, asked, 1) == said


def test_question_to_oneself_is_answered_to_oneself(http, telegram, bot_api, linked):
    ask(http, telegram, linked, "alice")
    assert press(telegram, bot_api, 7, 1, 1) == [None]
    assert links(http, linked)[1:] == [("alice", "alice", "Нет", 1)]


LATE = [
    {"data": data}
    for data in "1:2 1:9 2:0 3:0 4:0 0:0 -1:0 01:00 1 1: :1 x 1:0:0 1:-1 1:٠ １:0".split()
] + [
    {"data": "9" * 18 + ":0"},
    {"data": "9" * 60 + ":0"},
    {"data": ""},
    {"data": "1:0\n"},
    {"data": "\ud800\0"},
    {"data": None},
    {"data": 5},
    {"data": ["1:0"]},
    {"game_short_name": "x", "data": None},
    {"message": None},
    {"message": None, "inline_message_id": "x"},
    {"message": 5},
    {"message": {}},
    {"message": {"chat": {"id": 9}, "message_id": 2}},
    {"message": {"chat": {"id": 7}, "message_id": 1}},
    {"message": {"chat": {"id": -8, "type": "group"}, "message_id": 2}},
    {"message": {"chat": {"id": 2**70}, "message_id": 2}},
    {"message": {"chat": {"id": "8"}, "message_id": 2}},
]


def test_press_of_what_waits_for_no_answer_of_theirs_says_so_alone(
    http, telegram, bot_api, pair, caplog
):
    alice, bob = pair
    ask(http, telegram, alice)
    post(http, alice, "no question", recipient="bob")  # 2
    ask(http, telegram, alice, "alice", "Чужой?")  # 3
    post(http, alice, "Отменён?", recipient="bob", choices=["Да", "Нет"])  # 4
    cancel(http, alice, 4)
    [asked], before = copies(bot_api, 8, "Стоп?"), links(http, bob)
    for fields in LATE:
        assert press(telegram, bot_api, 8, asked, **fields) == [factoryapp.TOO_LATE], fields
    assert links(http, bob) == before and len(bot_api.keyboards) == 2 and caplog.text == ""
    # What Telegram knows no more of such a message, and what there will be next year.
    inaccessible = {"message_id": asked, "date": 0, "chat": {"id": 8}, "of_2027": [{}]}
    assert press(telegram, bot_api, 8, asked, message=inaccessible, of_2027={}) == [None]


@pytest.mark.parametrize(
    "method, failure, said",
    [
        ("answerCallbackQuery", NO_QUERY, []),
        ("answerCallbackQuery", RETRY_AFTER_9, []),
        ("answerCallbackQuery", b"<html>502 Bad Gateway</html>", []),
        ("answerCallbackQuery", "reset", []),
        ("editMessageReplyMarkup", NOT_MODIFIED, [None]),
        ("editMessageReplyMarkup", "reset", [None]),
    ],
)
def test_press_counts_once_whatever_telegram_says_to_what_the_bot_does_then(
    http, telegram, bot_api, pair, method, failure, said
):
    ask(http, telegram, pair[0])
    [asked] = copies(bot_api, 8, "Стоп?")
    bot_api.failures[method].append(failure)
    assert press(telegram, bot_api, 8, asked) == said
    assert bool(bot_api.keyboards) == (method == "editMessageReplyMarkup")
    assert press(telegram, bot_api, 8, asked) == [factoryapp.TOO_LATE]
    assert links(http, pair[1])[1:] == [("bob", "alice", "Да", 1)]


def test_answers_to_presses_that_hang_hold_up_nobody(http, telegram, bot_api, monkeypatch, pair):
    monkeypatch.setattr(factoryapp, "PRESSES_AT_ONCE", 3)
    telegram.__init__(BOT_TOKEN, bot_api.url)
    ask(http, telegram, pair[0])
    [asked] = copies(bot_api, 8, "Стоп?")
    hanging = bot_api.failures["answerCallbackQuery"]
    hanging.extend([600] * 2)
    pressed = [bot_api.press(8, asked, data=f"1:{n + 2}") for n in range(2)]
    began_at = time.monotonic()
    assert len(say(telegram, bot_api, 7, "слышно?")) == 1  # behind the presses
    bot_api.wait_for(lambda: not hanging)
    pressed.append(bot_api.press(8, asked, data="1:4"))
    telegram.poll()
    bot_api.wait_for(lambda: bot_api.answers == [(pressed[2], factoryapp.TOO_LATE)])
    assert time.monotonic() - began_at < 5
    # More threads than may hang are not started; what is pressed is taken in all the same.
    hanging.append(600)
    bot_api.press(8, asked, data="1:5")
    telegram.poll()
    bot_api.wait_for(lambda: not hanging)
    bot_api.press(8, asked)
    telegram.poll()
    assert links(http, pair[1])[1:] == [("bob", "alice", "Да", 1)]
    assert sum(thread.name == "press" for thread in threading.enumerate()) == 3
    bot_api.hung_up.set()
    end_presses()
    assert len(bot_api.answers) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_press_whose_answer_fails_in_an_unknown_way_leaves_its_place_to_the_next(
    http, telegram, bot_api, monkeypatch, pair
):
    ask(http, telegram, pair[0])
    [asked] = copies(bot_api, 8, "Стоп?")
    with monkeypatch.context() as patch:
        patch.setattr(factoryapp.apihelper, "answer_callback_query", lambda *args: {}["unknown"])
        for _ in range(factoryapp.PRESSES_AT_ONCE):
            assert press(telegram, bot_api, 8, asked, data="1:9") == []
    assert press(telegram, bot_api, 8, asked, data="1:9") == [factoryapp.TOO_LATE]


def test_press_for_which_there_is_no_thread_holds_up_nothing(
    http, telegram, bot_api, monkeypatch, caplog, pair
):
    ask(http, telegram, pair[0])
    [asked] = copies(bot_api, 8, "Стоп?")
    for _ in range(factoryapp.PRESSES_AT_ONCE + 1):
        bot_api.press(8, asked, data="1:9")
    bot_api.press(8, asked)
    with monkeypatch.context() as patch:
        patch.setattr(factoryapp, "start_thread", refuse_thread)
        assert own_copy("x") in say(telegram, bot_api, 7, "x")
    assert links(http, pair[1])[1:] == [("bob", "alice", "Да", 1)] and "thread" in caplog.text
    assert press(telegram, bot_api, 8, asked) == [factoryapp.TOO_LATE]


def test_press_that_cannot_be_stored_comes_again_and_is_answered_then(
    http, telegram, bot_api, monkeypatch, pair
):
    ask(http, telegram, pair[0])
    [asked] = copies(bot_api, 8, "Стоп?")
    with monkeypatch.context() as trouble:
        trouble.setattr(factoryapp, "commit", lambda db: db.execute("SELECT * FROM nowhere"))
        bot_api.press(8, asked, id="5")
        with pytest.raises(sqlite3.OperationalError):
            telegram.poll()
    assert bot_api.answers == [] and len(bot_api.keyboards) == 1
    telegram.poll()
    end_presses()
    assert bot_api.answers == [("5", None)] and len(list_messages(http, pair[0])) == 2


def test_buttons_stay_below_a_question_whose_press_is_skipped(http, telegram, bot_api, pair):
    ask(http, telegram, pair[0], choices=[BREAKS, "Нет"])
    [asked] = copies(bot_api, 8, "Стоп?")
    assert press(telegram, bot_api, 8, asked) == [factoryapp.TOO_LATE]
    assert press(telegram, bot_api, 8, asked, 1) == [None]


def test_whoever_answers_too_fast_in_the_bot_is_told_so_and_nothing_is_stored(
    http, telegram, bot_api, clock, pair, monkeypatch
):
    monkeypatch.setattr(factoryapp, "MESSAGES_TO_ANOTHER", (1, 1))
    alice, bob = pair
    ask(http, telegram, alice)
    [question] = copies(bot_api, 8, "Стоп?")
    said = [factoryapp.TOO_FAST.format(username="alice", seconds=1)]
    assert say(telegram, bot_api, 8, "раз", reply_to=question)[-1].endswith("раз")
    assert say(telegram, bot_api, 8, "два", reply_to=question) == said
    assert press(telegram, bot_api, 8, question) == said
    clock.move(1)
    assert press(telegram, bot_api, 8, question) == [None]
    assert say(telegram, bot_api, 8, "себе") != said
    texts = [(m["sender"], m["text"]) for m in list_messages(http, bob)]
    assert texts == [("alice", "Стоп?"), ("bob", "раз"), ("bob", "Да"), ("bob", "себе")]


@alone_and_crowded
def test_reply_to_somebody_without_a_chat_says_so(http, telegram, bot_api):
    alice, bob = join(http, "alice"), join(http, "bob")
    link_chat(http, telegram, bot_api, bob, 8)
    post(http, alice, "привет", recipient="bob")
    deliver_all(telegram)
    said = say(telegram, bot_api, 8, "ответ", reply_to=len(bot_api.sent))
    assert said == [
        "bob, я получил от тебя сообщение для alice:\n\nответ",
        factoryapp.NO_CHAT.format(username="alice"),
    ]
    assert list_messages(http, alice)[-1]["text"] == "ответ"


def test_group_is_told_once_that_linking_is_for_private_chats(http, telegram, bot_api):
    assert say(telegram, bot_api, -100, "hello", chat_type="group") == [factoryapp.PRIVATE_ONLY]
    assert say(telegram, bot_api, -100, "hello", chat_type="group") == []


# What Telegram hands over beside a text, most of it newer, older or worse than anybody foresaw.
SOMEBODY = {"id": 99, "is_bot": False, "first_name": "Carol"}
PRIVATE = {"id": 7, "type": "private"}
REPLIED = {"message_id": 9, "date": 0, "chat": PRIVATE, "from": SOMEBODY}
SIDE_FIELDS = [
    {"forward_origin": {"type": "new_kind", "date": 1}},
    {"forward_origin": {"type": "user", "date": 1}},
    {"forward_origin": "unknown"},
    {"forward_date": "yesterday", "forward_from": 5},
    {"reply_to_message": {**REPLIED, "poll": {"id": "1", "question": "of an older server?"}}},
    {"reply_to_message": {**REPLIED, "gift": {"gift": {"id": "g"}, "is_private": True}}},
    {"reply_to_message": {**REPLIED, "unique_gift": {}}},
    {"reply_to_message": {**REPLIED, "checklist": {"title": "t", "tasks": [{"id": 1}]}}},
    {"reply_to_message": {**REPLIED, "paid_media": {"star_count": 1, "paid_media": [{}]}}},
    {"reply_to_message": {**REPLIED, "giveaway": {"chats": None}}},
    {"reply_to_message": {"message_id": "9", "from": []}},
    {"reply_to_message": {"message_id": 2**70, "from": {"id": 2**70}}},
    {"reply_to_message": {}},
    {"reply_to_message": 5},
    {"reply_to_message": None},
    {"reply_to_story": {"chat": PRIVATE, "id": 1}},
    {"reply_to_checklist_task_id": 2},
    {"external_reply": {"origin": {"type": "new_kind"}, "message_id": 9}},
    {"quote": {"position": 0}},
    {"quote": {"text": "x"}},
    {"via_bot": {"id": 5, "is_bot": True}},
    {"via_bot": "gif"},
    {"from": None},
    {"from": {"id": 7}},
    {"from": "alice"},
    {"sender_chat": {"id": 7}},
    {"sender_business_bot": {}, "business_connection_id": 5},
    {"entities": 5},
    {"entities": {"type": "bold"}},
    {"entities": "bold"},
    {"entities": [None, 5, "bold", [], {}]},
    {"entities": [{"type": "new_kind", "offset": 0, "length": 1, "emoji_status": {}}]},
    {"entities": [{"type": "text_mention", "offset": 0, "length": 1, "user": {"id": 5}}]},
    {"entities": [{"type": "custom_emoji", "offset": 0, "length": 1}]},
    {"entities": [{"type": "date_time", "offset": "0", "length": None}]},
    {"link_preview_options": {"is_disabled": "?"}},
    {"reply_markup": {"inline_keyboard": [[{"text": "x"}]]}},
    {"message_id": "17"},
    {"message_id": 2**70},
    {"message_id": -(2**70)},
    {"message_id": 1.5},
    {"message_id": True},
    {"message_id": None},
    {"message_id": 0},
    {"date": "today"},
    {"date": 2**70, "edit_date": -1},
    {"message_thread_id": "5", "is_topic_message": True},
    {"message_thread_id": 2**70},
    {"media_group_id": 5},
    {"media_group_id": "\ud800"},
    {"author_signature": "\ud83d"},
    {"effect_id": "a\0b"},
    {"hologram": {"of": [2027] * 50}},
    {"photo": None, "sticker": []},
    {"suggested_post_info": {"state": "approved"}, "paid_star_count": "many"},
    {"chat": {**PRIVATE, "first_name": "\udfff\0", "type_of_2027": {}}},
]


def own_copy(text):
    return factoryapp.OWN_COPY.format(username="alice", text=text)


def stored_texts(http, headers):
    return [message["text"] for message in list_messages(http, headers)]


def test_text_is_a_message_whatever_stands_beside_it(
    http, telegram, bot_api, clock, linked, caplog
):
    for content in SIDE_FIELDS:
        clock.move(1)
        assert say(telegram, bot_api, 7, "x", **content) == [own_copy("x")], content
    assert stored_texts(http, linked) == ["x"] * len(SIDE_FIELDS) and caplog.text == ""


def test_text_that_cannot_be_kept_as_it_is_loses_no_more_than_that(http, telegram, bot_api, linked):
    for sent, stored in (
        ("a\ud800b", "a?b"),
        ("\udfff\ud83d", "??"),
        ("a\0b", "ab"),
        ("👍\ud83d", "👍?"),
        ("a\u202eb\x07\x1b[2J", "a\u202eb\x07\x1b[2J"),
    ):
        assert len(say(telegram, bot_api, 7, sent)) == 1
        assert stored_texts(http, linked)[-1] == stored


def test_text_that_is_none_is_silence(http, telegram, bot_api, linked):
    for text in (None, 5, ["x"], {"x": 1}, True):
        bot_api.push({"message": {"message_id": 5, "date": 0, "chat": PRIVATE, "text": text}})
        bot_api.push({"message": [text], "edited_message": text})
    assert say(telegram, bot_api, 7, "/help") == [factoryapp.HELP]
    assert stored_texts(http, linked) == []


UNKNOWN_CONTENT = [
    {"checklist": {"title": "t", "tasks": []}},
    {"giveaway": {}},
    {"game": {"title": "chess"}},
    {"invoice": {"title": "bill", "total_amount": 5}},
    {"hologram": {"of": 2027}},
    {"hologram": "x", "caption": "/stop"},
    {"photo": []},
    {"rich_message": {"blocks": [{"type": "photo", "photo": [{"file_id": "a"}]}]}},
    {"rich_message": {"blocks": 5}},
    {"service_of_2027": {"text": "x"}},
    {},
]
SERVICE = [
    {"pinned_message": {"message_id": 1, "date": 0, "chat": PRIVATE, "text": "/stop"}},
    {"new_chat_members": [SOMEBODY], "new_chat_member": SOMEBODY},
    {"left_chat_member": SOMEBODY},
    {"new_chat_title": "Factory"},
    {"new_chat_photo": [{"file_id": "a"}]},
    {"delete_chat_photo": True},
    {"group_chat_created": True},
    {"supergroup_chat_created": True},
    {"channel_chat_created": True},
    {"message_auto_delete_timer_changed": {"message_auto_delete_time": 86_400}},
    {"successful_payment": {"currency": "XTR"}},
    {"users_shared": {"request_id": 1}},
    {"chat_shared": {"request_id": 1}},
    {"connected_website": "example.org"},
    {"write_access_allowed": {}},
    {"passport_data": {}},
    {"proximity_alert_triggered": {}},
    {"boost_added": {"boost_count": 1}},
    {"chat_background_set": {}},
    {"forum_topic_created": {"name": "t"}, "message_thread_id": 5, "is_topic_message": True},
    {"forum_topic_closed": {}},
    {"general_forum_topic_hidden": {}},
    {"video_chat_started": {}},
    {"video_chat_ended": {"duration": 5}},
    {"web_app_data": {"data": "x", "button_text": "y"}},
    {"checklist_tasks_done": {}},
    {"direct_message_price_changed": {}},
    {"gift": {"gift": {"id": "g"}}},
    {"unique_gift": {}},
    {"giveaway_winners": {}},
]


@pytest.mark.parametrize("chat_type", ["private", "group", "supergroup", "channel"])
def test_what_telegram_says_itself_is_silence(http, telegram, bot_api, caplog, chat_type):
    for content in SERVICE:
        assert say(telegram, bot_api, 7, chat_type=chat_type, **content) == [], content
    assert caplog.text == "" and not count("heard")
    # And a group has not used up its one answer.
    answers = {"private": factoryapp.NOT_LINKED, "channel": None}
    said = say(telegram, bot_api, 7, "hello", chat_type=chat_type)
    assert said == [
        answer for answer in [answers.get(chat_type, factoryapp.PRIVATE_ONLY)] if answer
    ]


def test_whatever_a_person_sends_without_words_is_answered_that_the_bot_reads_text_only(
    http, telegram, bot_api, clock, linked, caplog
):
    for content in UNKNOWN_CONTENT:
        clock.move(6)
        assert say(telegram, bot_api, 7, **content) == [factoryapp.TEXT_ONLY], content
        clock.move(6)
        assert say(telegram, bot_api, 7, **content, **{"from": None}) == []
    assert stored_texts(http, linked) == [] and caplog.text == ""


PARAGRAPH = {"type": "paragraph", "text": "Смена"}
BOLD = {"type": "bold", "text": ["4", {"type": "italic", "text": "Б"}]}
RICH = [
    ([PARAGRAPH], "Смена"),
    (
        [PARAGRAPH, {"type": "heading", "size": 1, "text": ["Линия ", BOLD, "!"]}],
        "Смена\nЛиния 4Б!",
    ),
    (
        [
            {
                "type": "list",
                "items": [
                    {"label": "1.", "blocks": [PARAGRAPH, PARAGRAPH]},
                    {
                        "label": "2.",
                        "blocks": [{"type": "list", "items": [{"blocks": [PARAGRAPH]}]}],
                    },
                ],
            }
        ],
        "1. Смена\nСмена\n2. Смена",
    ),
    (
        [
            {
                "type": "table",
                "cells": [
                    [{"align": "left", "text": "a"}, {"text": BOLD}],
                    [{"valign": "top"}, {"text": "b"}],
                ],
                "caption": "c",
            }
        ],
        "a 4Б\n b\nc",
    ),
    ([{"type": "details", "summary": "s", "blocks": [PARAGRAPH], "is_open": True}], "s\nСмена"),
    ([{"type": "blockquote", "blocks": [PARAGRAPH], "credit": BOLD}], "Смена\n4Б"),
    (
        [{"type": "photo", "photo": [{"file_id": "x"}], "caption": {"text": "t", "credit": "c"}}],
        "t\nc",
    ),
    ([{"type": "pre", "text": "x = 1", "language": "python"}, {"type": "divider"}], "x = 1\n"),
    ([{"type": "mathematical_expression", "expression": "x^2"}], "x^2"),
    ([{"type": "paragraph", "text": [{"type": "custom_emoji", "alternative_text": "👍"}]}], "👍"),
    ([{"type": "buttons", "buttons": [{"text": "да"}, {"text": "нет"}]}], "да\nнет"),
    ([{"type": "paragraph", "text": {"type": "button", "button": {"text": "да"}}}], "да"),
    (
        [
            {
                "type": "paragraph",
                "text": ["к ", {"type": "url", "text": "сайту", "url": "https://a.b"}],
            }
        ],
        "к сайту (https://a.b)",
    ),
    ([{"type": "block_of_2027", "blocks": [PARAGRAPH]}, 5, None, "x"], "Смена\n\n\nx"),
]


def test_words_of_a_rich_message_are_a_text(http, telegram, bot_api, clock, linked):
    for blocks, text in RICH:
        clock.move(1)
        said = say(telegram, bot_api, 7, rich_message={"blocks": blocks})
        assert said == [own_copy(text).strip()], blocks
    assert stored_texts(http, linked) == [text for _, text in RICH]
    token = link_token(http, join(http, "bob"))
    rich = {"blocks": [{"type": "paragraph", "text": ["мой ", {"type": "code", "text": token}]}]}
    assert say(telegram, bot_api, -1, chat_type="group", rich_message=rich) == [
        factoryapp.TOKEN_SEEN
    ]
    assert say(telegram, bot_api, 8, token) == [factoryapp.NOT_LINKED]
    token = link_token(http, log_in(http, "bob"))
    rich = {
        "blocks": [
            {
                "type": "paragraph",
                "text": {"type": "url", "text": "ссылка", "url": f"https://t.me/b?start={token}"},
            }
        ]
    }
    assert say(telegram, bot_api, 8, rich_message=rich) == [
        factoryapp.LINKED.format(username="bob")
    ]
    edit = {"edit": bot_api.message_id, "rich_message": {"blocks": [PARAGRAPH]}}
    assert say(telegram, bot_api, 8, **edit) == [factoryapp.EDITED]


def test_update_that_cannot_be_read_is_skipped(http, telegram, bot_api, linked, caplog):
    nested = "x"
    for _ in range(2000):
        nested = {"type": "bold", "text": nested}
    bot_api.write(7, rich_message={"blocks": [nested]})
    heard = bot_api.updates.pop()
    factoryapp.receive_or_skip(BOT_ID, heard)
    assert "is skipped" in caplog.text
    assert factoryapp.find_offset(factoryapp.connection(), BOT_ID) == heard["update_id"] + 1
    assert say(telegram, bot_api, 7, "x") == [own_copy("x")]


def test_link_token_is_found_wherever_it_stands_in_a_private_text(http, telegram, bot_api, clock):
    alice = join(http, "alice")
    for around in (
        '"{}"',
        "https://t.me/factory_test_bot?start={}",
        '{{"telegram_token":"{}","expires_at":"2026-11-23T18:18:26Z"}}',
        "{}\u200b",
        "токен: {}, вот",
        "/start  {}\n",
        "/stop {}",
        "x" * 60 + "{}",
        "x" * 500 + " {}",
    ):
        clock.move(1)
        said = say(telegram, bot_api, 7, around.format(link_token(http, alice)))
        assert said[-1] == factoryapp.LINKED.format(username="alice"), around
    assert list_messages(http, alice) == []
    token = link_token(http, alice)
    say(telegram, bot_api, -1, "x" * 500 + " " + token, chat_type="group")
    assert say(telegram, bot_api, 9, token) == [factoryapp.NOT_LINKED]
    bobs, link = (
        link_token(http, join(http, "bob")),
        {"type": "text_link", "offset": 0, "length": 4},
    )
    link["url"] = f"https://t.me/factory_test_bot?start={bobs}"
    assert say(telegram, bot_api, 7, "сюда", entities=[link]) == [
        factoryapp.STOP_FIRST.format(username="alice")
    ]
    assert say(telegram, bot_api, 8, "сюда", entities=[link]) == [
        factoryapp.LINKED.format(username="bob")
    ]


def test_bots_are_not_answered_and_cannot_link(http, telegram, bot_api, linked):
    a_bot = {"from": {"id": 7, "is_bot": True, "first_name": "Bot"}}
    token = link_token(http, join(http, "bob"))
    for chat_id in (7, 8):
        for text in ("hello", "/start", "/stop", token, None):
            assert say(telegram, bot_api, chat_id, text, **a_bot) == []
        assert say(telegram, bot_api, chat_id, photo=[{"file_id": "a"}], **a_bot) == []
        bot_api.write(chat_id, "again", edit=bot_api.message_id, **a_bot)
        assert say(telegram, bot_api, chat_id, "x", chat_type="group", **a_bot) == []
    assert stored_texts(http, linked) == []
    assert say(telegram, bot_api, 7, "x") == [own_copy("x")]


def test_stop_with_words_behind_it_stops_nothing(http, telegram, bot_api, clock, linked):
    for text in ("/stop линию 4", "/STOP now", "/stop@factory_test_bot x", "/stop\nx"):
        clock.move(1)
        assert say(telegram, bot_api, 7, text) == [factoryapp.UNKNOWN_COMMAND]
    assert stored_texts(http, linked) == []
    assert "отвязан" in say(telegram, bot_api, 7, " /Stop@factory_test_bot ")[0]


def test_text_is_as_old_as_telegram_says_and_never_of_the_future(
    http, telegram, bot_api, clock, linked
):
    at = int(clock.seconds)
    for date, seconds in (
        (at - 5 * 3600, at - 5 * 3600),
        (1, 1),
        (at + 60, None),
        (0, None),
        (-5, None),
        (2**62, None),
        (-(2**62), None),
        ("x", None),
        (None, None),
    ):
        clock.move(1)
        say(telegram, bot_api, 7, "x", date=date)
        written_at = list_messages(http, linked)[-1]["created_at"]
        assert written_at == factoryapp.iso(clock.seconds if seconds is None else seconds), date


def test_reply_to_ones_own_words_goes_where_they_went(http, telegram, bot_api, pair):
    say(telegram, bot_api, 7, "себе")
    alone = bot_api.message_id
    post(http, pair[1], "привет", recipient="alice")
    deliver_all(telegram)
    [hello] = copies(bot_api, 7, "привет")
    say(telegram, bot_api, 7, "ответ", reply_to=hello)
    mine = {"message_id": bot_api.message_id, "date": 0, "chat": PRIVATE, "text": "ответ"}
    mine["from"] = {"id": 7, "is_bot": False}
    assert "и ещё" in say(telegram, bot_api, 7, "и ещё", reply_to_message=mine)[0]
    say(telegram, bot_api, 7, "себе же", reply_to_message={**mine, "message_id": alone})
    say(telegram, bot_api, 7, "неизвестно", reply_to_message={**mine, "message_id": 9})
    assert links(http, pair[0]) == [
        ("alice", "alice", "себе", None),
        ("bob", "alice", "привет", None),
        ("alice", "bob", "ответ", 2),
        ("alice", "bob", "и ещё", 3),
        ("alice", "alice", "себе же", 1),
        ("alice", "alice", "неизвестно", None),
    ]
    assert bot_api.texts(8)[-1].endswith("и ещё")


def test_earlier_chat_of_an_account_is_told_that_it_is_linked_elsewhere(
    http, telegram, bot_api, linked
):
    link_chat(http, telegram, bot_api, linked, 9)
    elsewhere = factoryapp.LINKED_ELSEWHERE.format(username="alice")
    assert bot_api.texts(7)[-1] == elsewhere
    link_chat(http, telegram, bot_api, linked, 9)
    assert bot_api.texts(7).count(elsewhere) == 1 and elsewhere not in bot_api.texts(9)
    with factoryapp.transaction() as db:
        factoryapp.link_chat(db, (5, 9), 1, "of another bot")
    deliver_all(telegram)
    assert elsewhere not in bot_api.texts(9)


MEDIA = {
    "animation": {"file_id": "a"},
    "audio": {"file_id": "a"},
    "contact": {"phone_number": "1"},
    "dice": {"value": 6},
    "document": {"file_id": "a"},
    "location": {"latitude": 0},
    "paid_media": {"star_count": 1},
    "photo": [{"file_id": "a"}],
    "poll": {"question": "of an older server?"},
    "sticker": {"emoji": "👍"},
    "story": {"id": 1},
    "venue": {"title": "t"},
    "video": {"file_id": "a", "qualities_of_2027": []},
    "video_note": {"file_id": "a"},
    "voice": {"file_id": "a"},
}


def test_media_is_answered_that_the_bot_reads_text_only(http, telegram, bot_api, clock, linked):
    for kind, value in MEDIA.items():
        clock.move(6)
        for content in ({}, {"caption": "/stop"}):
            said = say(telegram, bot_api, 7, **{kind: value}, **content)
            assert said == ([] if content else [factoryapp.TEXT_ONLY]), kind
    assert say(telegram, bot_api, 7, "x") == [own_copy("x")]


@pytest.mark.parametrize("message_id", [{}, {"message_id": "x"}, {"message_id": 2**70}])
def test_text_only_is_said_once_in_five_seconds(http, telegram, bot_api, clock, linked, message_id):
    def show(chat_id=7, **content):
        return say(telegram, bot_api, chat_id, photo=[{}], **content, **message_id)

    for n in range(10):
        assert show(media_group_id="1") == [factoryapp.TEXT_ONLY][n:]
    assert show(8) == [factoryapp.TEXT_ONLY]  # another chat
    clock.move(4.9)
    assert show() == []
    clock.move(0.2)
    assert show() == [factoryapp.TEXT_ONLY]


def reopen(telegram):
    """What a restart forgets, is forgotten."""
    telegram.__init__(BOT_TOKEN, factoryapp.apihelper.API_URL.partition("/bot")[0])
    reopen_turns(telegram)


@pytest.mark.parametrize("restarts", [False, True])
def test_message_under_two_update_ids_is_heard_once(http, telegram, bot_api, linked, restarts):
    for text in ("x", "/start", "/help", "/nonsense", "TOKEN", "/start TOKEN", None, "/stop"):
        text = text and text.replace("TOKEN", link_token(http, linked))
        content = {} if text else {"photo": [{}]}
        assert len(say(telegram, bot_api, 7, text, **content)) == 1, text
        again = {"message_id": bot_api.message_id}
        for update_id in (bot_api.next_update_id, bot_api.next_update_id + 500):
            if restarts:
                reopen(telegram)
            bot_api.next_update_id = update_id
            assert say(telegram, bot_api, 7, text, **again, **content) == [], text
    assert stored_texts(http, linked) == ["x"]
    assert len(say(telegram, bot_api, 8, "x", **again)) == 1  # in another chat it is another


def test_messages_that_cannot_be_told_apart_are_all_heard(http, telegram, bot_api, linked):
    for message_id in (None, "5", 2**70, 0, None):
        assert say(telegram, bot_api, 7, "x", message_id=message_id) == [own_copy("x")]
    assert say(telegram, bot_api, 7, "x") == say(telegram, bot_api, 7, "x") == [own_copy("x")]


@pytest.mark.parametrize("chat_id", [7, 8])  # the second is not linked
def test_edit_is_answered_once_and_never_run(http, telegram, bot_api, clock, linked, chat_id):
    token, edits = link_token(http, linked), 0
    for text in ("y", "/stop", "/help", "/start", "/nope", token, f"/start {token}", "x" * 5000):
        clock.move(1)
        say(telegram, bot_api, chat_id, "x")
        message_id, edits = bot_api.message_id, edits + 1
        assert say(telegram, bot_api, chat_id, text, edit=message_id) == [factoryapp.EDITED]
        for later in (text, "z", "x", "/stop"):
            assert say(telegram, bot_api, chat_id, later, edit=message_id) == [], text
    assert stored_texts(http, linked) == ["x"] * (edits if chat_id == 7 else 0)
    assert say(telegram, bot_api, 7, "/start") == [factoryapp.LINKED_TO.format(username="alice")]
    assert say(telegram, bot_api, 8, token) == [factoryapp.LINKED.format(username="alice")]


SILENT_EDITS = [
    {"text": "x"},
    {"text": "x", "entities": [{"type": "bold", "offset": 0, "length": 1}]},
    {"text": "x", "link_preview_options": {"is_disabled": True}},
    {"text": "x", "reactions_of_2027": [{}]},
    {"text": "/stop", "edit": 4000},
    {"text": "/help", "edit": 2**70},
    {"text": "y", "edit": "5001"},
    {"text": "y", "edit": 0},
    {"text": "y", "message_id": None},
    {"text": ""},
    {"text": 5},
    {"photo": [{}], "caption": "y"},
    {"location": {"latitude": 1, "live_period": 60}},
    {"poll": {"question": "?", "is_closed": True}},
    {"checklist": {"title": "t"}},
    {},
]


def test_edit_that_changes_no_text_or_of_what_was_never_heard_is_silence(
    http, telegram, bot_api, linked, caplog
):
    say(telegram, bot_api, 7, "x")
    for content in SILENT_EDITS:
        said = say(telegram, bot_api, 7, **{"edit": bot_api.message_id, **content})
        assert said == [], content
    assert stored_texts(http, linked) == ["x"] and caplog.text == ""


def test_edit_of_media_is_silence(http, telegram, bot_api, linked):
    assert say(telegram, bot_api, 7, photo=[{}], caption="x") == [factoryapp.TEXT_ONLY]
    for content in ({"caption": "y", "photo": [{}]}, {"video": {}}, {"text": "y"}):
        assert say(telegram, bot_api, 7, edit=bot_api.message_id, **content) == []


def test_edit_in_a_group_or_channel_is_silence(http, telegram, bot_api):
    for chat_id, chat_type, kind in (
        (-1, "group", "message"),
        (-2, "supergroup", "message"),
        (-3, "channel", "channel_post"),
    ):
        say(telegram, bot_api, chat_id, "x", chat_type=chat_type, kind=kind)
        sent = len(bot_api.sent)
        for chat in (chat_id, chat_id - 100):  # that was told, and that was not
            for text, message_id in (("y", bot_api.message_id), ("/stop", 4000)):
                for content in ({"text": text}, {"caption": text, "photo": [{}]}):
                    where = {"chat_type": chat_type, "kind": kind, "edit": message_id}
                    assert say(telegram, bot_api, chat, **where, **content) == []
        assert len(bot_api.sent) == sent


FORWARDED = [
    {"forward_origin": {"type": "user", "date": 1, "sender_user": SOMEBODY}},
    {"forward_origin": {"type": "hidden_user", "date": 1, "sender_user_name": "Carol"}},
    {"forward_origin": {"type": "chat", "date": 1, "sender_chat": {"id": -5}}},
    {"forward_origin": {"type": "channel", "date": 1, "chat": {"id": -5}, "message_id": 1}},
    {"forward_origin": {"type": "new_kind", "date": 1}},
    {"forward_date": 1, "forward_from": SOMEBODY},
    {"forward_date": 1, "forward_sender_name": "Carol"},
    {"forward_date": 1, "forward_from_chat": {"id": -5}, "forward_from_message_id": 1},
]


def test_what_was_forwarded_is_a_message_and_never_a_command_or_token(
    http, telegram, bot_api, clock, linked
):
    bobs = link_token(http, join(http, "bob"))
    texts = ["/stop", "/help", "/start", "/x", bobs, f"/start {bobs}", "hello"]
    for content in FORWARDED:
        clock.move(1)
        for text in texts:
            assert say(telegram, bot_api, 7, text, **content) == [own_copy(text)], content
            is_token = bobs in text
            answer = factoryapp.FORWARDED_TOKEN if is_token else factoryapp.NOT_LINKED
            assert say(telegram, bot_api, 9, text, **content) == [answer]
    assert stored_texts(http, linked) == texts * len(FORWARDED)
    assert say(telegram, bot_api, 9, bobs) == [factoryapp.LINKED.format(username="bob")]


def test_chat_in_the_terminal_changes_hands_only_after_stop(start):
    program = start()
    token, bobs = (link_token(program.http, join(program.http, name)) for name in ("alice", "bob"))
    program.type(token)
    program.wait_for("аккаунт alice успешно привязаны")
    for text in (bobs, f"/start {bobs}"):
        program.said = ""
        program.type(text)
        program.wait_for(re.escape(factoryapp.STOP_FIRST.format(username="alice")))
    program.type("/stop")
    program.wait_for("Чат отвязан от аккаунта alice")
    program.type(bobs)  # it was not spent
    program.wait_for("аккаунт bob успешно привязаны")


@pytest.mark.parametrize("chat_id", [7, 8])
def test_token_of_a_link_pressed_again_says_whose_the_chat_is_only_where_it_linked(
    http, telegram, bot_api, chat_id
):
    headers = join(http, "alice")
    token = link_token(http, headers)
    start = f"/start@factory_test_bot {token}"
    link_chat(http, telegram, bot_api, join(http, "bob"), 8)
    say(telegram, bot_api, 7, start)
    answer = {7: factoryapp.LINKED_TO.format(username="alice"), 8: factoryapp.WRONG_TOKEN}
    assert say(telegram, bot_api, chat_id, start) == [answer[chat_id]]
    say(telegram, bot_api, chat_id, "/stop")
    assert say(telegram, bot_api, chat_id, start) == [factoryapp.NOT_LINKED]
    link_chat(http, telegram, bot_api, headers, chat_id)  # with another token
    assert say(telegram, bot_api, chat_id, start) == [factoryapp.WRONG_TOKEN]


def link(offset, length, url):
    return {"type": "text_link", "offset": offset, "length": length, "url": url}


SEEN = [
    {"text": "TOKEN"},
    {"text": "/start TOKEN"},
    {"text": "/start@factory_test_bot TOKEN"},
    {"text": "мой токен: TOKEN!"},
    {"text": "(TOKEN)\nи ещё TOKEN"},
    {"text": "https://t.me/factory_test_bot?start=TOKEN&x=1"},
    {"text": "_TOKEN_, -TOKEN-, token=-TOKEN"},
    {"text": "жми", "entities": [link(0, 3, "https://t.me/factory_test_bot?start=TOKEN")]},
    {"caption": "TOKEN", "photo": [{}]},
    {"caption": "вот он: TOKEN.", "video_of_2027": {}},
    {"caption": "жми", "caption_entities": [link(0, 3, "t.me/x?start=TOKEN")], "voice": {}},
    {"text": "TOKEN", "edit": 17},
    {"caption": "TOKEN", "edit": 17, "document": {}},
    {"text": "TOKEN", "forward_origin": {"type": "user", "date": 1}},
]


@pytest.mark.parametrize("chat_type", ["group", "supergroup", "channel"])
def test_link_token_that_others_have_seen_is_dead(http, telegram, bot_api, clock, chat_type):
    headers = join(http, "alice")
    kind = "channel_post" if chat_type == "channel" else "message"
    told = [] if chat_type == "channel" else [factoryapp.TOKEN_SEEN]
    say(telegram, bot_api, -1, "hello", chat_type=chat_type, kind=kind)
    for content in SEEN:
        clock.move(1)
        token = link_token(http, headers)
        content = json.loads(json.dumps(content).replace("TOKEN", token))
        for answer in (told, []):  # in a chat that was told already; and only once
            said = say(telegram, bot_api, -1, chat_type=chat_type, kind=kind, **content)
            assert said == answer, content
        assert say(telegram, bot_api, 7, token) == [factoryapp.NOT_LINKED], content


def test_group_that_shows_a_token_first_is_told_once(http, telegram, bot_api):
    for _ in range(2):
        token = link_token(http, join(http, secrets.token_hex(4)))
        for answer in ([factoryapp.TOKEN_SEEN], []):
            assert say(telegram, bot_api, -1, token, chat_type="supergroup") == answer


def test_dead_or_foreign_token_in_a_group_is_a_text_like_any_other(http, telegram, bot_api):
    old = link_token(http, headers := join(http, "alice"))
    token = link_token(http, headers)
    for text in (old, "x" * 43, token[:-1], token[1:], "x" * 4096):
        say(telegram, bot_api, -1, text, chat_type="group")
    assert bot_api.texts(-1) == [factoryapp.PRIVATE_ONLY]


TOPICS = [
    ({"message_thread_id": 5, "is_topic_message": True}, 5),
    ({"message_thread_id": 5, "is_topic_message": True, "reply_to_message": REPLIED}, 5),
    ({"message_thread_id": 5, "is_topic_message": True, "reply_to_message": None}, 5),
    ({"message_thread_id": 9, "reply_to_message": REPLIED}, None),
    ({"message_thread_id": 9, "reply_to_message": REPLIED, "is_topic_message": False}, None),
    ({"message_thread_id": 9, "reply_to_message": REPLIED, "is_topic_message": "x"}, None),
    ({"message_thread_id": "5", "is_topic_message": True}, None),
    ({"message_thread_id": 2**70, "is_topic_message": True}, None),
    ({"message_thread_id": True, "is_topic_message": True}, None),
    ({"message_thread_id": 0, "is_topic_message": True}, None),
    ({"is_topic_message": True, "reply_to_message": REPLIED}, None),
    ({}, None),
]


def test_group_is_answered_in_the_topic_where_it_spoke(http, telegram, bot_api, clock):
    headers = join(http, "alice")
    for chat_id, (content, thread) in enumerate(TOPICS, -100):
        clock.move(1)
        bot_api.topics.add((chat_id, 5))
        bot_api.write(chat_id, "hello", chat_type="supergroup", **content)
        token = link_token(http, headers)
        said = say(telegram, bot_api, chat_id, token, chat_type="supergroup", **content)
        assert said == [factoryapp.PRIVATE_ONLY, factoryapp.TOKEN_SEEN], content
        assert bot_api.threads[-2:] == [thread, thread], content


def test_senseless_migration_of_a_group_is_none(http, telegram, bot_api, caplog):
    say(telegram, bot_api, -1, "x", chat_type="group")
    for chat_id, value in enumerate(["-1", 2**70, None, True, []], -9):
        where = {"migrate_from_chat_id": value, "migrate_to_chat_id": value}
        assert say(telegram, bot_api, -1, chat_type="group", **where) == []
        said = say(telegram, bot_api, chat_id, "x", chat_type="supergroup", **where)
        assert said == [factoryapp.PRIVATE_ONLY], value
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["channel_post", "edited_channel_post", "message"])
def test_in_a_channel_the_bot_is_silent(http, telegram, bot_api, kind):
    contents = [{"text": text} for text in ("x", "/start", "/help", "/stop", "x" * 43)]
    for content in (*contents, {"photo": [{}]}, {"caption": "x", "video": {}}, {"poll": {}}):
        say(telegram, bot_api, -1, chat_type="channel", kind=kind, **content)
        say(telegram, bot_api, -1, chat_type="new_kind", kind=kind, **content)
    assert bot_api.sent == []


URL = "https://example.org/a"


LINKS = [
    ("жми", [link(0, 3, URL)], f"жми ({URL})"),
    ("жми сюда!", [link(4, 4, URL)], f"жми сюда ({URL})!"),
    ("👍👍 жми сюда", [link(5, 3, URL)], f"👍👍 жми ({URL}) сюда"),
    ("👨‍👩‍👧‍👦🇷🇺 жми 👍", [link(16, 3, URL)], f"👨‍👩‍👧‍👦🇷🇺 жми ({URL}) 👍"),
    ("👍", [link(0, 2, URL)], f"👍 ({URL})"),
    ("𝕏 é\nжми", [link(5, 3, URL)], f"𝕏 é\nжми ({URL})"),
    (
        "один, 👍два, три",
        [link(0, 4, URL), link(6, 5, "http://b.org/?c=d"), link(13, 3, "tg://user?id=5")],
        f"один ({URL}), 👍два (http://b.org/?c=d), три (tg://user?id=5)",
    ),
    ("a b", [link(2, 1, "http://b.org"), link(0, 1, URL)], f"a ({URL}) b (http://b.org)"),
    ("a b", [link(0, 1, URL), link(2, 1, URL)], f"a ({URL}) b ({URL})"),
    (
        "жирно и жми",
        [{"type": "bold", "offset": 0, "length": 11}, link(8, 3, URL)],
        f"жирно и жми ({URL})",
    ),
    (
        "вокруг жми тут",
        [link(0, 14, "http://b.org"), link(7, 3, URL)],
        f"вокруг жми ({URL}) тут (http://b.org)",
    ),
    (URL, [link(0, 21, URL)], URL),
    ("example.org/a", [link(0, 13, URL)], "example.org/a"),
    (URL, [link(0, 21, URL + "/")], URL),
    ("example.org", [link(0, 11, "http://example.org/")], "example.org"),
    ("example.org", [link(0, 11, URL)], f"example.org ({URL})"),
    (
        "bank.org",
        [link(0, 8, "https://evil.org/?to=https://bank.org")],
        "bank.org (https://evil.org/?to=https://bank.org)",
    ),
    ("a", [link(0, 1, "https://b.org/\ud800\0")], "a (https://b.org/?)"),
    (URL, [{"type": "url", "offset": 0, "length": 21}], URL),
    *(
        ("жми сюда", [entity], "жми сюда")
        for entity in (
            link(0, 9, URL),
            link(8, 1, URL),
            link(2**62, 2**62, URL),
            link(2**70, 1, URL),
            link(0, 2**70, URL),
            link(-3, 6, URL),
            link(4, -1, URL),
            link(4, 0, URL),
            link("0", 3, URL),
            link(None, 3, URL),
            link(0.0, 3, URL),
            link(True, 3, URL),
            link(4, None, URL),
            link(0, "3", URL),
            link(0, 3, None),
            link(0, 3, ""),
            link(0, 3, [URL]),
            {"type": "text_link", "url": URL},
            [URL, 0, 3],
            URL,
        )
    ),
]


def test_address_of_a_link_stands_behind_its_words_unless_it_shows(
    http, telegram, bot_api, clock, linked
):
    for text, entities, stored in LINKS:
        clock.move(1)
        [said] = say(telegram, bot_api, 7, text, entities=entities)
        assert said == own_copy(stored)
    assert stored_texts(http, linked) == [stored for _, _, stored in LINKS]


def test_link_that_ends_inside_a_character_loses_nothing(http, telegram, bot_api, linked):
    [said] = say(telegram, bot_api, 7, "👍x", entities=[link(0, 1, URL)])
    assert said.replace(f" ({URL})", "") in (own_copy("👍x"), own_copy("👍x").replace("\n\n", "\n"))


def test_text_that_is_too_long_with_its_addresses_is_refused(http, telegram, bot_api, linked):
    entities = [link(2 * n, 1, f"{URL}/{n}" + "x" * 900) for n in range(20)]
    assert say(telegram, bot_api, 7, "a " * 40, entities=entities) == [factoryapp.TOO_LONG]
    assert stored_texts(http, linked) == []


def quoted(text, who=BOT_ID, **fields):
    """What a reply carries of the message that it answers."""
    replied = {"message_id": 900, "date": 0, "chat": PRIVATE, "text": text, **fields}
    return {"reply_to_message": {**replied, "from": {"id": who, "first_name": "x"}}}


def test_reply_to_a_copy_whose_send_timed_out_is_said_to_be_nobodys(
    http, telegram, bot_api, clock, linked
):
    bot_api.hung_up.set()  # what is lost is so at once
    bot_api.failures[7].append("lost")
    post(http, join(http, "bob"), "привет", recipient="alice")
    deliver_all(telegram)
    clock.move(2)
    deliver_all(telegram)
    assert bot_api.texts(7) == ["Сообщение от bob:\n\nпривет"] * 2
    assert say(telegram, bot_api, 7, "ответ", reply_to=1) == [factoryapp.UNKNOWN_REPLY]
    assert len(say(telegram, bot_api, 7, "ответ", reply_to=2)) == 2
    senders = [(m["sender"], m["recipient"]) for m in list_messages(http, linked)]
    assert senders == [("bob", "alice"), ("alice", "bob")]


BOTS_OWN_WORDS = [
    "GREETING LINKED WRONG_TOKEN NOT_LINKED LINKED_TO STOP_FIRST TOKEN_SEEN UNLINKED HELP "
    "UNKNOWN_COMMAND TOO_LONG TEXT_ONLY NO_CHAT EDITED UNKNOWN_REPLY PRIVATE_ONLY NOT_DELIVERED"
][0].split()


NOBODYS = [
    "Сообщение от nobody:\n\nпривет",
    "alice, я получил от тебя сообщение для nobody:\n\nпривет",
    "nobody (2/3):\n\nпривет",
    "Сообщение от bob",
    "> Сообщение от bob:\n\nпривет",
    "привет\nСообщение от bob:\n\nпривет",
    "Сообщение от bob carol:\n\nпривет",
    "bob (2/):\n\nпривет",
    "",
    None,
    5,
    ["Сообщение от bob:\n\nпривет"],
    "\ud800\0",
]


def test_reply_to_what_is_nobodys_message_is_said_so_and_not_stored(
    http, telegram, bot_api, clock, linked
):
    register(http, "bob")
    own = [getattr(factoryapp, name).format(username="bob", count=3) for name in BOTS_OWN_WORDS]
    for text in own + NOBODYS:
        clock.move(1)
        said = say(telegram, bot_api, 7, "ответ", **quoted(text))
        assert said == [factoryapp.UNKNOWN_REPLY], text
        assert say(telegram, bot_api, 7, "/help", **quoted(text)) == [factoryapp.HELP]
    assert list_messages(http, linked) == []


def test_reply_to_what_the_bot_said_itself_is_said_to_be_nobodys(http, telegram, bot_api, linked):
    for text in ("/help", "/nonsense", "/start"):
        say(telegram, bot_api, 7, text)
        said = say(telegram, bot_api, 7, "ответ", reply_to=len(bot_api.sent))
        assert said == [factoryapp.UNKNOWN_REPLY]
    assert list_messages(http, linked) == []


HEADED = "Сообщение от bob:\n\nпривет"


NOT_THE_BOTS = [
    quoted(HEADED, 7),
    quoted(HEADED, 99),
    quoted(HEADED, str(BOT_ID)),
    quoted(HEADED, None),
    quoted(HEADED, float(BOT_ID)),
    quoted(HEADED, 2**70),
    {"reply_to_message": {"message_id": 900, "text": HEADED}},
    {"reply_to_message": {"message_id": 900, "text": HEADED, "from": BOT_ID}},
    {"reply_to_message": {"message_id": 900, "text": HEADED, "from": [{"id": BOT_ID}]}},
    {"reply_to_message": [quoted(HEADED)]},
    {"reply_to_message": HEADED},
    {"external_reply": quoted(HEADED)["reply_to_message"]},
    {"quote": {"text": HEADED}},
    {"pinned_message": quoted(HEADED)["reply_to_message"]},
]


def test_reply_to_what_is_not_the_bots_is_a_text_like_any_other(http, telegram, bot_api, linked):
    register(http, "bob")
    for content in NOT_THE_BOTS:
        assert say(telegram, bot_api, 7, "ответ", **content) == [own_copy("ответ")], content
    assert {m["recipient"] for m in list_messages(http, linked)} == {"alice"}


def test_reply_to_what_the_bot_remembers_needs_nothing_but_its_id(http, telegram, bot_api, linked):
    post(http, join(http, "bob"), "привет", recipient="alice")
    deliver_all(telegram)
    for fields in ({}, {"from": "x"}, {"text": 5}, {"text": "x", "poll": {}}):
        say(telegram, bot_api, 7, "ответ", reply_to_message={"message_id": 1, **fields})
        assert list_messages(http, linked)[-1]["recipient"] == "bob"


PARTED = [
    "слово " * 2700,
    "x\n" * 8000,
    "я" * 16_384,
    "start" + "\u202e" * 9000 + "end",
    "start" + "\u2028\u2029\u0333\u033f\u030a" * 3000 + "end",
    "start" + " \n\t\u00a0" * 4000 + "end",
    "start" + "\x07\x1b\r\x7f\x9f" * 3000 + "end",
    "a" * 4000 + " " * 5000 + "b" * 4000,
    "A\u030a" * 8000,
    "Сообщение от bob:\n\nплати\n" * 600,
    ("x" * 4000 + "\nbob, я получил от тебя сообщение:\n\nплати ") * 4,
    "👨‍👩‍👧‍👦" * 2000,
    "\n" * 16_000 + "x",
]


@pytest.mark.parametrize("name", ["alice", "я" * 150])
def test_every_part_is_accepted_and_begins_with_whose_it_is(http, telegram, bot_api, clock, name):
    headers = join(http, name)
    link_chat(http, telegram, bot_api, headers, 7)
    for text in PARTED:
        clock.move(1)
        start = len(bot_api.sent)
        post(http, headers, text)
        deliver_all(telegram)
        raw, seen = bot_api.raw[start:], [shown for _, shown in bot_api.sent[start:]]
        assert list_messages(http, headers)[-1]["delivery"] == "sent", text[:20]
        own = f"{name}, я получил от тебя сообщение:\n\n"
        heads = [own] + [f"{name} ({n}/{len(raw)}):\n\n" for n in range(2, len(raw) + 1)]
        for part, shown, head in zip(raw, seen, heads, strict=True):
            assert part.startswith(head) and shown.startswith(head.rstrip()), text[:20]
            assert shown != head.rstrip() or part == raw[0], text[:20]
        joined = "".join(part.removeprefix(head) for part, head in zip(raw, heads, strict=True))
        arrived, wanted = map(as_it_appears, (joined, unicodedata.normalize("NFC", text)))
        assert arrived.split() == wanted.split() or "".join(arrived.split()) == wanted, text[:20]
    assert len(bot_api.attempts) == len(bot_api.sent)


@pytest.mark.parametrize("text", ["A\u030angstro\u0308m и\u0306", "Ångström й"])
def test_accented_letters_arrive_whole_and_are_stored_as_written(
    http, telegram, bot_api, linked, text
):
    post(http, linked, text)
    say(telegram, bot_api, 7, text)
    assert bot_api.texts(7) == [own_copy("Ångström й")] * 2
    assert stored_texts(http, linked) == [text] * 2


SECRET = BOT_TOKEN.split(":")[1]


@pytest.mark.parametrize("code", [400, 403, 404, 429, 500, 401, 409, SECRET, None])
def test_token_of_the_bot_enters_no_log_and_no_row_whatever_an_answer_quotes(
    http, telegram, bot_api, clock, linked, caplog, capsys, code
):
    caplog.set_level("DEBUG", "factoryapp")
    quotes = [
        f"Bad Request: {bot_api.url}/bot{BOT_TOKEN}/sendMessage",
        f"{SECRET} and {BOT_TOKEN}: chat not found",
        f"4242%3A{SECRET}\n{SECRET}\ud800",
        {"url": [f"/bot{BOT_TOKEN}"]},
        [BOT_TOKEN],
        f"webhook at {BOT_TOKEN}",
    ]
    for description in quotes:
        failure = {"error_code": code, "description": description, "parameters": {SECRET: SECRET}}
        clock.move(1000)
        link_chat(http, telegram, bot_api, headers := log_in(http, "alice"), 7)
        bot_api.failures[7].append(failure)
        post(http, headers, "x")
        deliver_all(telegram)
        for method in ("getMe", "setMyCommands", "getUpdates"):
            bot_api.failures[method].append(failure)
        for _ in range(2):
            telegram.run(StopAtPause())
        assert not any(bot_api.failures.values())
    rows = "\n".join(factoryapp.connection().iterdump())
    assert "failed" in caplog.text + rows and "…" in caplog.text + rows
    assert not any(SECRET in said for said in (caplog.text, rows, *capsys.readouterr()))


def test_update_that_fails_is_skipped(http, telegram, bot_api, caplog, monkeypatch):
    headers, real = join(http, "alice"), factoryapp.converse

    def fail_at_first(db, heard):
        if heard.chat == (BOT_ID, 6):
            raise KeyError(bot_api.updates)  # which has the text
        return real(db, heard)

    monkeypatch.setattr(factoryapp, "converse", fail_at_first)
    bot_api.write(6, "a secret")
    bot_api.push({"some_new_kind": {}})
    assert "успешно привязаны" in say(telegram, bot_api, 7, link_token(http, headers))[0]
    assert "update 100 is skipped" in caplog.text and "a secret" not in caplog.text
    assert factoryapp.find_offset(factoryapp.connection(), BOT_ID) == 103


def test_update_that_the_database_refuses_comes_again(http, telegram, bot_api, monkeypatch):
    headers = join(http, "alice")
    bot_api.write(7, link_token(http, headers))
    monkeypatch.setattr(
        factoryapp,
        "link_chat",
        lambda *args: (_ for _ in ()).throw(sqlite3.OperationalError("disk full")),
    )
    with pytest.raises(sqlite3.OperationalError):
        telegram.poll()
    monkeypatch.undo()
    monkeypatch.setattr(factoryapp.settings, "db", factoryapp.local.path)
    telegram.poll()
    deliver_all(telegram)
    assert "успешно привязаны" in bot_api.texts(7)[0]


def test_update_ids_may_restart_lower(http, telegram, bot_api):
    bot_api.write(7, "/start")
    bot_api.next_update_id = 5
    assert len(say(telegram, bot_api, 7, "/start")) == 2
    assert factoryapp.find_offset(factoryapp.connection(), BOT_ID) == 6


def test_updates_that_make_no_sense_are_not_asked_for_at_once_again(http, telegram, bot_api):
    bot_api.failures["getUpdates"].append({"ok": True, "result": [None, {}, 5, {"update_id": "x"}]})
    assert telegram.poll() is False


def test_polling_waits_as_long_as_telegram_tells_it_to(telegram, bot_api):
    bot_api.failures["getUpdates"].append(RETRY_AFTER_9)
    stop = StopAtPause()
    telegram.run(stop)
    assert stop.pauses[-1] == pytest.approx(9, abs=1)


@pytest.mark.parametrize("retry_after", [10_072, 10**10, 9e18])
def test_polling_outlives_the_longest_pause(telegram, bot_api, monkeypatch, retry_after):
    bot_api.failures["getUpdates"].append(too_many_requests(retry_after))
    pauses, real = [], threading.Event.wait

    class Stop(threading.Event):
        def wait(self, seconds=None):
            if seconds:
                self.set()
                pauses.append(seconds)
            return real(self, seconds)

    telegram.run(Stop())
    assert pauses == [min(retry_after, threading.TIMEOUT_MAX)]


@pytest.mark.parametrize("retry_after", [-1, "x", None, math.inf, math.nan, 1e300, True, [9]])
def test_senseless_retry_after_leaves_polling_its_own_pause(telegram, bot_api, retry_after):
    bot_api.failures["getUpdates"].append(too_many_requests(retry_after))
    stop = StopAtPause()
    telegram.run(stop)
    assert 1 <= stop.pauses[-1] <= 2


@pytest.mark.parametrize(
    "told",
    [
        {"parameters": {"retry_after": "9"}},
        {"parameters": {"retry_after": 9.0}},
        {"parameters": {"retry_after": "9"}, "description": "Flood: retry after 5"},
        {"parameters": {}, "description": "Too Many Requests: retry after 9"},
        {"parameters": None, "description": "Too Many Requests: Retry after 9 seconds"},
        {"parameters": {"retry_after": None}, "description": "retry after 9"},
    ],
)
def test_seconds_to_wait_are_obeyed_wherever_they_stand(
    http, telegram, bot_api, clock, linked, told
):
    refused = {"error_code": 429, "description": "Too Many Requests", **told}
    bot_api.failures["getUpdates"].append(refused)
    stop = StopAtPause()
    telegram.run(stop)
    assert stop.pauses == [9]
    bot_api.failures[7].append(refused)
    post(http, linked, "one")
    for seconds, attempts in ((0, 1), (8.9, 1), (0.2, 2)):
        clock.move(seconds)
        deliver_all(telegram)
        assert tries(bot_api, 7) == 1 + attempts


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl for a certificate")
def test_bot_api_server_of_ones_own_is_reached_by_its_certificate(
    telegram, bot_api, monkeypatch, tmp_path
):
    pem = str(tmp_path / "pem")
    make = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x"
    )
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", pem, "-out", pem + ".crt"]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem + ".crt", pem)
    bot_api.server.socket = context.wrap_socket(bot_api.server.socket, server_side=True)
    url = bot_api.url.replace("http:", "https:") + "/bot{0}/{1}"
    monkeypatch.setattr(factoryapp.apihelper, "API_URL", url)
    bot_api.failures["getUpdates"].append(NOTHING_NEW)
    with pytest.raises(factoryapp.TelegramError, match="SSLError: is the certificate"):
        telegram.poll()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", pem + ".crt")
    telegram.poll()


class StopAtPause(threading.Event):
    """A stop event that is set once somebody would have had to wait for it so many times."""

    def __init__(self, count=1):
        super().__init__()
        self.count, self.pauses = count, []

    def wait(self, seconds=None):
        if seconds:
            self.pauses.append(seconds)
        if len(self.pauses) == self.count:
            self.set()
        return self.is_set()


@pytest.mark.parametrize(
    "env, hint",
    [
        ({"REQUESTS_CA_BUNDLE": "/nonexistent"}, "OSError: is REQUESTS_CA_BUNDLE"),
        ({"CURL_CA_BUNDLE": "/nonexistent"}, "CURL_CA_BUNDLE"),
        ({"HTTPS_PROXY": "socks5h://127.0.0.1:9"}, "InvalidSchema: a SOCKS proxy needs"),
        ({"ALL_PROXY": "socks4://127.0.0.1:9"}, "PySocks"),
        ({"HTTPS_PROXY": "http://127.0.0.1:9"}, "ProxyError: is HTTPS_PROXY right"),
        ({}, "SSLError: is the certificate"),
    ],
)
def test_what_keeps_the_network_away_is_one_line_that_says_what_to_do(
    http, telegram, bot_api, clock, monkeypatch, caplog, env, hint
):
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    url = bot_api.url.replace("http:", "https:") + "/bot{0}/{1}"
    monkeypatch.setattr(factoryapp.apihelper, "API_URL", url)
    factoryapp.apihelper._get_req_session(reset=True)
    caplog.set_level("WARNING")
    stop = StopAtPause(6)
    telegram.run(stop)
    queue(7)
    for attempts in range(6):
        deliver_all(telegram)
        clock.move(2**attempts * 0.49)
        deliver_all(telegram)
        clock.move(2**attempts * 0.52)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 12 and all(hint in line for line in lines)
    assert not any(record.exc_info or "\n" in record.getMessage() for record in caplog.records)
    assert all(min(30, 2**n) * 0.5 <= pause <= 30 for n, pause in enumerate(stop.pauses, 1))


@pytest.mark.parametrize("error", ODD_EXCEPTIONS, ids=lambda error: type(error).__name__)
def test_whatever_the_network_raises_polling_says_it_in_a_line_and_waits_longer_each_time(
    http, telegram, bot_api, monkeypatch, caplog, error
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(factoryapp.apihelper.requests.Session, "request", fail)
    caplog.set_level("WARNING")
    stop = StopAtPause(5)
    telegram.run(stop)
    kind = type(error).__name__
    assert len(caplog.records) == 5 and all(kind in r.getMessage() for r in caplog.records)
    assert not any(record.exc_info for record in caplog.records)
    assert all(min(30, 2**n) * 0.5 <= pause <= 30 for n, pause in enumerate(stop.pauses, 1))


@pytest.mark.parametrize(
    "error, words",
    [
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "Name or service not known",
        ),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (TimeoutError("?"), "TimeoutError"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "Connection timed out"),
    ],
)
def test_telegram_that_cannot_be_reached_is_logged_with_its_host_and_what_failed(
    http, bot_api, monkeypatch, caplog, error, words
):
    def fail(*args):
        raise error

    home = factoryapp.Telegram(BOT_TOKEN, "http://user:password@bot.test:81/path")
    factoryapp.apihelper._get_req_session(reset=True)
    monkeypatch.setattr(socket.socket, "connect", fail)
    caplog.set_level("WARNING")
    home.run(StopAtPause())
    [line] = [record.getMessage() for record in caplog.records]
    assert f"Telegram cannot be reached at bot.test: {words}, Conn" in line
    assert not any(secret in line for secret in ("AAtest", "password", "path"))


def test_webhook_that_keeps_the_bot_from_polling_is_deleted(telegram, bot_api, monkeypatch):
    monkeypatch.setattr(factoryapp, "backoff", lambda *args: 0.01)
    bot_api.webhook = "https://factory.example/hook"
    bot_api.write(7, "/start")
    with polling(telegram):
        bot_api.wait_for(lambda: not bot_api.updates)
    deliver_all(telegram)
    assert bot_api.webhook is None and bot_api.texts(7) == [factoryapp.GREETING]


def test_webhook_that_another_program_sets_again_is_named_for_an_hour(
    http, telegram, bot_api, clock, caplog
):
    def run(pauses):
        # Each webhook takes a pause; so does each poll that brings nothing.
        bot_api.failures["getUpdates"].extend([NOTHING_NEW] * 5)
        telegram.run(StopAtPause(pauses))
        bot_api.failures.clear()
        return http.get("/health/").json

    bot_api.webhook = "https://factory.example/hook"
    assert run(3)["bot_error"] is None  # the first may be an old one of ours
    clock.move(1800)
    telegram.answered = clock.seconds
    bot_api.webhook = "https://factory.example/hook"
    health = run(4)
    assert "another program sets a webhook" in health["bot_error"]
    assert (health["status"], health["bot_reachable"]) == ("degraded", False)
    clock.move(3601)
    assert run(3)["bot_error"] is None


def test_gateway_that_cuts_each_long_poll_is_no_outage(telegram, bot_api, clock, caplog):
    caplog.set_level("WARNING")
    hurried = factoryapp.turns.back_at
    bot_api.failures["getUpdates"].append(NOTHING_NEW)
    telegram.run(StopAtPause())  # reached for the first time
    for _ in range(5):
        bot_api.failures["getUpdates"].extend([(504, b"<html>"), NOTHING_NEW])
        telegram.run(StopAtPause(2))
    assert caplog.text == "" and factoryapp.turns.back_at == hurried
    bot_api.failures["getUpdates"].extend([(504, b"<html>")] * 3 + [NOTHING_NEW])
    telegram.run(StopAtPause(4))
    assert "answered 504" in caplog.text and "answers again" in caplog.text
    assert factoryapp.turns.back_at > hurried


@pytest.fixture
def two_families(monkeypatch, bot_api):
    """Telegram has two addresses: what is sent to the IPv6 one is swallowed, until told."""
    tried, swallowing, port = [], {"::1"}, bot_api.server.server_port

    class IPv6(BotApiServer):
        address_family = socket.AF_INET6

    server = IPv6(("::1", port), BotApiHandler)
    server.bot_api = bot_api
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def look_up(host, _, family=0, *args, **kwargs):
        addresses = [(socket.AF_INET6, ("::1", port, 0, 0)), (socket.AF_INET, ("127.0.0.1", port))]
        return [(of, socket.SOCK_STREAM, 6, "", a) for of, a in addresses if family in (0, of)]

    class Socket(socket.socket):
        def connect(self, address):
            tried.append(address[0])
            if address[0] in swallowing:
                time.sleep(self.gettimeout())
                raise TimeoutError("timed out")
            super().connect(address)

    monkeypatch.setattr(factoryapp, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "socket", Socket)
    yield tried, swallowing
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not urllib3.util.connection.HAS_IPV6, reason="needs IPv6 on loopback")
def test_address_family_that_works_is_used_by_all(telegram, two_families):
    tried, swallowing = two_families
    telegram.__init__(BOT_TOKEN, "http://api.telegram.test")

    def call_anew():
        """The addresses that a sender without a connection tries."""
        tried.clear()
        factoryapp.apihelper._get_req_session(reset=True)
        factoryapp.apihelper.get_me(BOT_TOKEN)
        return tried

    assert call_anew() == ["::1", "127.0.0.1"]
    assert call_anew() == ["127.0.0.1"] == call_anew()
    swallowing.add("127.0.0.1")  # the other way round
    with pytest.raises(factoryapp.TelegramError):
        call_anew()
    swallowing.remove("::1")
    assert call_anew() == ["::1"] == call_anew()  # what has failed is looked at again


@contextmanager
def polling(telegram):
    """The bot's polling thread at work; it may be in its last long poll when this ends."""
    stop = threading.Event()
    threading.Thread(target=telegram.run, args=(stop,), daemon=True).start()
    yield
    stop.set()


@pytest.mark.parametrize(
    "failure",
    [
        WEBHOOK_IS_ACTIVE,
        ANOTHER_POLLS,
        UNAUTHORIZED,
        {"error_code": 500, "description": "Internal Server Error"},
        b"<html>502 Bad Gateway</html>",
        {},
        [1],
        "reset",
        0.1,
    ],
)
def test_polling_goes_on_after_a_failure(http, telegram, bot_api, monkeypatch, failure):
    monkeypatch.setattr(factoryapp, "backoff", lambda *args: 0.01)
    bot_api.failures["getMe"].append(failure)
    bot_api.failures["getUpdates"].extend([failure, failure])
    bot_api.write(7, "/start")
    with polling(telegram):
        bot_api.wait_for(lambda: not bot_api.updates)
    deliver_all(telegram)
    assert bot_api.texts(7) == [factoryapp.GREETING]


@pytest.mark.parametrize("mode", [None, "r", "w"], ids=["closed", "ended", "as nohup has it"])
def test_nobody_to_talk_to_is_a_warning(http, monkeypatch, caplog, mode):
    with open(os.devnull, mode) if mode else nullcontext() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        factoryapp.Terminal().run(StopAtPause())
    [line] = [record.getMessage() for record in caplog.records]
    assert "nobody can write to the bot" in line and "TELEGRAM_BOT_TOKEN" in line


def test_terminal_that_is_told_to_stop_complains_of_nothing(http, monkeypatch, caplog):
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(sys, "stdin", None)
    factoryapp.Terminal().run(stop)
    assert caplog.records == []


# --- Page -----------------------------------------------------------------------------------------


def test_page_allows_its_own_style_and_script_alone(http):
    response = http.get("/")
    policy = response.headers["Content-Security-Policy"]
    assert response.content_type == "text/html"
    assert "default-src 'none'" in policy and "unsafe" not in policy
    # Nor may others frame it, move its links or send its forms elsewhere.
    for rule in ("base-uri", "form-action", "frame-ancestors"):
        assert f"{rule} 'none'" in policy
    for element in ("script", "style"):
        (text,) = re.findall(f"<{element}>(.*?)</{element}>", response.text, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert not re.search(
        r"""(src|href)="(?!#"|data:,")|style="|[ ]on\w+="|url\(|@import"""
        "|innerHTML|cookie",
        response.text,
    )


def test_page_works_under_a_path(http):
    page = http.get("/").text
    asked = re.findall(r"""["`'](/?(?:api|auth|health)/[^"`'?]*)""", page)
    assert len(asked) > 9 and not [path for path in asked if path.startswith("/")]
    assert not re.search(r"""(["'`]|=)/[a-z]""", page)


class Browser:
    """Headless Chromium with one tab. Speaks its protocol, JSON that ends with NUL, over pipes."""

    def __init__(self, folder, url):
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        self.folder, self.input, self.output = folder, ours_out, os.fdopen(ours_in, "rb")
        # The protocol is spoken over the descriptors 3 and 4.
        pipes = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec chromium "$@" 2>/dev/null'
        switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync "
        switches += "disable-background-networking disable-component-update remote-debugging-pipe"
        self.process = subprocess.Popen(
            [
                *("bash", "-c", pipes, "chromium"),
                *(f"--{switch}" for switch in switches.split()),
                f"--user-data-dir={folder / 'chromium'}",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
            pass_fds=(theirs_in, theirs_out),
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.said, self.calls, self.received, self.session = [], 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.calls:
                return answer.get("result", {})

    def receive(self):
        """The next message; of what the page complains of, a note is kept."""
        while b"\0" not in self.received:
            chunk = self.output.read1()
            assert chunk, "Chromium has ended"
            self.received += chunk
        text, _, self.received = self.received.partition(b"\0")
        message = json.loads(text)
        method = message.get("method")
        if method == "Runtime.exceptionThrown" or (
            method == "Log.entryAdded" and message["params"]["entry"]["source"] == "security"
        ):
            self.said.append(message["params"])
        return message

    def evaluate(self, script):
        """The value of an expression, None where it fails or the page is being loaded.

        As if a person did it: a page may copy then.
        """
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, userGesture=True
        )
        return answer.get("result", {}).get("value") if "exceptionDetails" not in answer else None

    def until(self, script, seconds=10):
        """Wait until the expression is true. Answers its value."""
        ends_at = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            page = self.evaluate("document.body.innerText")
            assert time.monotonic() < ends_at, f"not so: {script}, in {page}, {self.said}"
            time.sleep(0.02)
        return value

    def reload(self):
        self.evaluate("window.isOld = true; location.reload()")
        self.until("!window.isOld && document.readyState === 'complete'")

    def type(self, name, text):
        """Type into the field of this name."""
        self.until(f"document.querySelector('[name={name}]').checkVisibility()")
        self.evaluate(f"document.querySelector('[name={name}]').select()")
        self.call("Input.insertText", text=text)

    def key(self, key):
        """Press a key, Enter or Escape."""
        text = "\r" if key == "Enter" else ""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def open(self, name):
        """Open the conversation with this user."""
        self.until(f"(location.hash = addressOf('{name}')) && other === '{name}'")

    def search(self, text):
        self.evaluate("$('search').focus()")
        self.call("Input.insertText", text=text)

    def press(self, name):
        """Press the button of this name that can be seen."""
        buttons = f"[...document.querySelectorAll('[name={name}]')]"
        self.until(f"{buttons}.some((button) => button.checkVisibility() && !button.click())")

    def sign_in(self, name, button="log_in", password=PASSWORD):
        self.type("username", name)
        self.type("password", password)
        self.press(button)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.input)
        self.output.close()


@pytest.fixture
def browse(http, tmp_path):
    """Open the page in a browser."""
    with browser(tmp_path, "http://{}:{}/".format(*http.address)) as opened:
        yield opened


@contextmanager
def browser(folder, url):
    if not shutil.which("chromium") or not shutil.which("bash"):
        pytest.skip("needs Chromium")
    with closing(Browser(folder, url)) as opened:
        yield opened
        assert opened.said == []


COMPLAINT = "$('complaint').textContent"
SHOWN, SCHEDULED = (
    f"[...document.querySelectorAll('#{place} .text')].map((text) => text.textContent).join()"
    for place in ("messages", "scheduled")
)
LISTED = """[...$('list').children].map((item) =>
    [...item.querySelectorAll('b, span, mark')].map((part) => part.textContent).join(' ').trim()
    ).join()"""
CHOICES = (
    "[...document.querySelectorAll('[name=choose]')].map((b) => b.disabled + b.ariaPressed).join()"
)
LOSE_ANSWER = """
    window.real = fetch; window.fetch = async (...request) => {
    await real(...request); if (request[1].method === "POST") { window.fetch = real; throw 1; }
    return real(...request); }; 0"""


def test_page_takes_a_visitor_from_registration_to_logout(http, browse):
    text = '<b onclick="x">жирно</b> https://example.org/?a=1&b=(2).'
    browse.sign_in("alice", "register", "short")
    assert "too short" in browse.until(COMPLAINT)
    browse.sign_in("alice", "register")
    assert "Telegram" in browse.until("$('linking').innerText")
    browse.press("link")
    # While one press is at work, others are ignored.
    browse.until("$('code').innerText.includes('the terminal') && !document.body.ariaBusy")
    browse.press("copy")
    browse.until("$('code').innerText.includes('Copied')")
    browse.open("alice")
    browse.until("$('nothing').checkVisibility() && !$('earlier').checkVisibility()")
    browse.press("send")
    assert browse.until(COMPLAINT) == "Write something first."
    browse.type("text", text)
    assert browse.evaluate(COMPLAINT) == ""
    # The first answer is lost on its way: the second try is the same message.
    browse.evaluate(LOSE_ANSWER)
    browse.key("Enter")
    assert "cannot be reached" in browse.until(COMPLAINT)
    browse.reload()
    browse.until(f"text.value && {SHOWN}")
    browse.evaluate("$('send').focus()")
    browse.press("send")
    browse.until("text.value === '' && document.activeElement === text")
    headers = log_in(http, "alice")
    assert [m["text"] for m in list_messages(http, headers)] == [text] == [browse.evaluate(SHOWN)]
    assert browse.evaluate("document.querySelector('.text a').href").endswith("/?a=1&b=(2")
    assert "alice reads here only" in browse.until("$('hint').textContent")
    refresh = browse.evaluate("session.refresh")
    assert refresh not in browse.evaluate("JSON.stringify(localStorage)")
    browse.evaluate("$('me').click()")
    browse.press("log_out")
    browse.until("document.querySelector('.out').checkVisibility()")
    browse.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    assert "alice" not in browse.evaluate(
        "document.body.innerHTML + JSON.stringify([sessionStorage, localStorage]) + location"
    )
    http.post_json("/auth/token/refresh/", {"refresh": refresh}, status=401)
    browse.sign_in("alice", password="wrong-password")
    assert browse.until(COMPLAINT) == "Wrong username or password."
    browse.type("username", "")
    browse.press("log_in")
    browse.until(f"{COMPLAINT} === 'This field may not be blank.'")


def test_page_changes_the_password_and_logs_out_though_the_server_is_away(http, browse):
    browse.sign_in("alice", "register")
    browse.until("$('list').children.length")
    browse.evaluate("$('me').click()")
    browse.type("current_password", PASSWORD)
    browse.type("new_password", "another-pass-92")
    browse.press("reveal")
    assert browse.evaluate("$('passwords').elements.new_password.type") == "text"
    browse.press("change_password")
    assert "password is changed" in browse.until(f"document.body.className == 'out' && {COMPLAINT}")
    browse.sign_in("alice", password="another-pass-92")
    browse.until("$('list').children.length")
    browse.evaluate("$('me').click(); window.fetch = async () => { throw 1; }; 0")
    browse.press("log_out")
    assert "cannot be reached" in browse.until(f"document.body.className == 'out' && {COMPLAINT}")
    assert "refresh" not in browse.evaluate("JSON.stringify(sessionStorage)")


def test_page_shows_conversations_and_what_is_unread_in_them(http, browse):
    bob, carol = join(http, "bob"), join(http, "carol")
    register(http, "alice")
    register(http, "ЖанНа")
    post(http, bob, "read long ago", recipient="alice")
    browse.sign_in("alice")
    browse.until(f"{LISTED} === 'bob read long ago,Notes to yourself'")
    post(http, carol, "one", recipient="alice")
    post(http, carol, "two", recipient="alice")
    post(http, bob, "three", recipient="alice")
    unread = "bob three 1 new,carol two 2 new,Notes to yourself"
    browse.until(f"{LISTED} === '{unread}' && document.title === '(3) FactoryApp'")
    browse.reload()
    browse.until(f"{LISTED} === '{unread}'")
    browse.evaluate("$('list').querySelectorAll('a')[1].click()")
    browse.until(f"{SHOWN} === 'one,two' && document.title === '(1) FactoryApp'")
    browse.type("text", "for carol")
    browse.search("аНн")
    browse.until(f"{LISTED} === 'ЖанНа'")
    browse.key("Enter")
    browse.until("other === 'ЖанНа' && $('nothing').checkVisibility()")
    browse.search("BO")
    browse.until(f"{LISTED} === 'bob three 1 new'")
    browse.key("Enter")
    browse.until(f"{SHOWN} === 'read long ago,three' && text.value === ''")
    browse.type("text", "for bob")
    browse.key("Enter")
    browse.until(f"{SHOWN} === 'read long ago,three,for bob' && document.title === 'FactoryApp'")
    browse.reload()
    browse.until(f"{LISTED}.startsWith('bob for bob,carol two,Notes')")
    assert browse.evaluate("document.title") == "FactoryApp"
    browse.evaluate("history.go(-2)")
    browse.until(f"{SHOWN} === 'one,two' && text.value === 'for carol'")
    # On a phone one or the other.
    browse.call(
        "Emulation.setDeviceMetricsOverride",
        width=375,
        height=400,
        deviceScaleFactor=1,
        mobile=True,
    )
    browse.until("!$('people').checkVisibility() && $('back').checkVisibility()")
    assert browse.evaluate("$('send').getBoundingClientRect().bottom") <= 400
    browse.evaluate("$('back').click()")
    browse.until("$('people').checkVisibility() && !$('talk').checkVisibility()")


def test_page_keeps_the_place_of_who_reads_what_was_written_before(http, browse):
    bob = join(http, "bob")
    register(http, "alice")
    with factoryapp.transaction() as db:
        users = {name: factoryapp.find_user_by_name(db, name) for name in ("alice", "bob")}
        for n in range(250):
            factoryapp.relay(db, users["bob"], users["alice"], f"number {n}", "telegram")
    browse.sign_in("alice")
    browse.open("bob")
    browse.until(f"{SHOWN}.split(',').length === 100")
    assert "by the bot" in browse.evaluate("$('messages').innerText")
    browse.press("earlier")
    browse.until(f"{SHOWN}.split(',').length === 200")
    browse.evaluate("$('stream').scrollTop = -3000")
    place = "Math.round($('m150').getBoundingClientRect().top)"
    before = browse.until(place)
    post(http, bob, "news", recipient="alice")
    browse.until(f"{SHOWN}.endsWith('news') && $('below').checkVisibility()")
    assert abs(browse.evaluate(place) - before) < 3
    browse.press("below")
    browse.until("isAtEnd() && !$('below').checkVisibility()")
    # At the end the earlier ones are forgotten.
    post(http, bob, "more", recipient="alice")
    browse.until(f"{SHOWN}.split(',').length === 100")


def test_page_asks_and_is_answered_by_a_tap_once(http, browse):
    alice, bob = join(http, "alice"), join(http, "bob")
    browse.sign_in("alice")
    browse.open("bob")
    post(http, alice, "Lunch?", recipient="bob", choices=["Yes", "No"])
    browse.until(f"{CHOICES} === 'truefalse,truefalse'")
    post(http, bob, "No", recipient="alice", reply_to=1)
    browse.until(f"{CHOICES} === 'truefalse,truetrue'")
    post(http, bob, "Coffee?", recipient="alice", choices=["Now", "Later"])
    browse.until(f"{CHOICES}.endsWith('falsefalse,falsefalse')")
    browse.evaluate(LOSE_ANSWER)
    browse.evaluate("$('m3').querySelector('[name=choose]').click()")
    browse.until(f"{CHOICES}.endsWith('truetrue,truefalse')")
    browse.evaluate("post({text: 'Now', recipient: 'bob', reply_to: 3}, 'choice-3')")
    texts = "Lunch?,No,Coffee?,Now"
    browse.until(f"{SHOWN} === '{texts}' && !document.body.ariaBusy")
    sent = list_messages(http, bob)
    assert ",".join(m["text"] for m in sent) == texts and sent[-1]["reply_to"] == 3


def test_page_keeps_what_is_scheduled_above_the_writing_line(http, browse):
    headers = join(http, "alice")
    post(http, headers, "soon", send_at=factoryapp.iso(factoryapp.now() + 3))
    browse.sign_in("alice")
    browse.open("alice")
    browse.until(f"{SCHEDULED} === 'soon'")
    browse.evaluate("$('later').firstElementChild.click()")
    browse.evaluate(
        "const in2 = new Date(Date.now() + 7.2e6 - new Date().getTimezoneOffset() * 6e4);"
        "send_at.value = in2.toISOString().slice(0, 16);"
        "send_at.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    browse.type("text", "far")
    browse.until("$('send').textContent === 'Schedule'")
    browse.key("Enter")
    browse.until(f"{SCHEDULED} === 'soon,far' && !$('later').open")
    assert browse.evaluate(f"{SHOWN} === ''")
    browse.evaluate("document.querySelector('#scheduled button').focus()")
    post(http, headers, "news")
    browse.until(f"{SHOWN} === 'news' && document.activeElement.name === 'cancel'")
    [_, far] = list_scheduled(http, headers)
    assert factoryapp.iso(factoryapp.now() + 7000) < far["send_at"]
    browse.evaluate("$('scheduled').querySelectorAll('[name=cancel]')[1].click()")
    browse.until(f"{SCHEDULED} === 'soon'")
    [soon] = list_scheduled(http, headers)
    while factoryapp.iso(factoryapp.now()) < soon["send_at"]:
        time.sleep(0.1)
    assert factoryapp.publish_due()
    browse.until(f"{SHOWN} === 'news,soon' && {SCHEDULED} === ''")


def test_page_shows_what_others_write_at_once_and_outlives_its_access_token(http, browse):
    bob = join(http, "bob")
    browse.sign_in("alice", "register")
    browse.open("bob")
    browse.until("$('nothing').checkVisibility()")
    ends_at = time.monotonic() + 5
    while len(http.server.waiting) != 1:
        # Its one request that waits.
        assert browse.evaluate("1") and time.monotonic() < ends_at
    question = post(http, bob, "Come?", recipient="alice")
    posted_at = time.monotonic()
    browse.until(f"{SHOWN} === 'Come?'")
    assert time.monotonic() - posted_at < 0.3
    browse.press("reply")
    browse.until("$('answering').innerText.includes('bob: Come?')")
    browse.key("Escape")
    browse.until("!$('answering').checkVisibility()")
    browse.press("reply")
    browse.type("text", "Yes")
    browse.evaluate("session.access = 'too old'")
    browse.press("send")
    browse.until(f"{SHOWN} === 'Come?,Yes'")
    with factoryapp.transaction() as db:
        # Whatever changes is shown, though nothing waits any more.
        factoryapp.fail_messages(db, [2], "lost its way")
    browse.until("document.querySelector('.failed')?.textContent === 'not delivered: lost its way'")
    answer = list_messages(http, bob)[-1]
    assert (answer["text"], answer["recipient"], answer["reply_to"]) == (
        "Yes",
        "bob",
        question["id"],
    )
    assert "Come?" in browse.until("document.querySelector('.mine .quote').textContent")
    browse.type("text", "later")
    browse.evaluate("session.access = session.refresh = 'dead'")
    browse.press("send")
    assert "session has ended" in browse.until(f"document.body.className == 'out' && {COMPLAINT}")
    browse.sign_in("alice")
    browse.until("text.value === 'later'")


def test_page_sends_what_is_typed_once_whatever_happens_meanwhile(http, browse):
    headers = join(http, "alice")
    browse.sign_in("alice")
    browse.open("alice")
    browse.until("$('nothing').checkVisibility()")
    # An answer that is slow.
    browse.evaluate(
        "window.real = fetch; window.fetch = async (...request) => {"
        "const answer = await real(...request); if (request[1].method !== 'POST') return answer;"
        "await new Promise((go) => { window.go = go; }); window.fetch = real; return answer; }; 0"
    )
    browse.type("text", "one")
    browse.key("Enter")
    browse.until("!!window.go")
    browse.call("Input.insertText", text=" two")
    browse.evaluate("window.go(); 0")
    browse.until("text.value === ' two'")
    # An answer that is lost, and then another message.
    browse.evaluate(LOSE_ANSWER)
    browse.key("Enter")
    browse.until(COMPLAINT)
    browse.type("text", "three")
    browse.key("Enter")
    browse.until(f"{SHOWN} === 'one, two,three'")
    assert [message["text"] for message in list_messages(http, headers)] == ["one", " two", "three"]
    # An older copy of the database is put in its place.
    with factoryapp.transaction() as db:
        db.execute("DELETE FROM messages WHERE id > 1")
        db.execute("UPDATE sqlite_sequence SET seq = 1 WHERE name = 'messages'")
    browse.until(f"{SHOWN} === 'one'")


def test_page_notifies_of_news_while_it_is_hidden(http, browse):
    bob = join(http, "bob")
    browse.sign_in("alice", "register")
    browse.until("$('list').children.length && etag")
    browse.evaluate(
        "window.Notification = class { static permission = 'granted';"
        "constructor(...said) { window.noted = this; this.said = JSON.stringify(said); } };"
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    post(http, bob, "Come!", recipient="alice")
    said = browse.until("window.noted?.said")
    assert json.loads(said) == ["bob", {"body": "Come!", "tag": "bob"}]
    assert browse.evaluate("document.title + $('news').textContent") == "(1) FactoryAppbob: Come!"
    browse.evaluate("window.noted.onclick()")
    browse.until(f"{SHOWN} === 'Come!'")
    # Unread until somebody can see it.
    assert browse.evaluate("document.title") == "(1) FactoryApp"
    browse.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    browse.until("document.title === 'FactoryApp'")
    post(http, bob, "Now!", recipient="alice")
    browse.until(f"{SHOWN} === 'Come!,Now!'")
    assert "Come!" in browse.evaluate("window.noted.said")


def test_page_outlives_the_server(start, tmp_path):
    program = start()
    bob = join(program.http, "bob")
    register(program.http, "alice")
    with browser(tmp_path, program.url) as browse:
        browse.sign_in("alice")
        browse.open("bob")
        browse.until("$('nothing').checkVisibility()")
        program.end(signal.SIGKILL)
        browse.until("$('trouble').textContent")
        browse.type("text", "written meanwhile")
        browse.key("Enter")
        assert "cannot be reached" in browse.until(COMPLAINT)
        program = start("--port", str(program.address[1]))
        browse.until("$('trouble').textContent === ''")
        browse.key("Enter")
        browse.until(f"{SHOWN} === 'written meanwhile'")
        post(program.http, bob, "welcome back", recipient="alice")
        browse.until(f"{SHOWN} === 'written meanwhile,welcome back'")


def test_page_shows_what_is_closed_or_elsewhere_or_not_reached_yet(
    http, telegram, bot_api, linked, monkeypatch, browse
):
    monkeypatch.setattr(factoryapp.settings, "registration", "closed")
    restart_as(monkeypatch, factoryapp.Telegram("77:another", bot_api.url))
    post(http, linked, "Nobody came")
    with factoryapp.transaction() as db:
        db.execute("UPDATE messages SET delivery = 'failed', failure = '403 Forbidden: blocked'")
    browse.reload()
    browse.until("document.querySelector('.closed') !== null")
    said = browse.evaluate("$('sign-in').innerText")
    assert "egister" not in said and "Ask whoever runs this server" in said
    browse.sign_in("alice")
    browse.open("alice")
    browse.until("$('linking').checkVisibility()")
    browse.until("document.querySelector('.failed')?.textContent === 'not delivered: blocked'")
    browse.press("again")
    browse.until(f"{SHOWN} === 'Nobody came,Nobody came'")
    browse.until("document.querySelector('[name=again]') === null")
    browse.press("link")
    assert "Telegram is not reached yet" in browse.until(COMPLAINT)
    browse.evaluate("window.confirm = (words) => { window.asked = words; return true; }; 0")
    browse.evaluate("$('me').click()")
    browse.press("unlink")
    assert "given up" in browse.until("window.asked")
    browse.until("!document.querySelector('[name=unlink]').checkVisibility()")


# --- HTTP -----------------------------------------------------------------------------------------


def not_for_any(message):
    return {
        "detail": "Given token not valid for any token type",
        "code": "token_not_valid",
        "messages": [{"token_class": "AccessToken", "token_type": "access", "message": message}],
    }


NO_CREDENTIALS = {"detail": "Authentication credentials were not provided."}
TWO_VALUES = {
    "detail": "Authorization header must contain two space-delimited values",
    "code": "bad_authorization_header",
}
NO_USER_ID = {
    "detail": "Token contained no recognizable user identification",
    "code": "token_not_valid",
}
NO_USER = {"detail": "User not found", "code": "user_not_found"}
LATER = 4_000_000_000


@pytest.mark.filterwarnings(
    "ignore::jwt.warnings.InsecureKeyLengthWarning"
)  # we sign with HS512 what is to be refused
@pytest.mark.parametrize(
    "header, answer",
    [
        (None, NO_CREDENTIALS),
        ("Basic YTpi", NO_CREDENTIALS),
        ("", NO_CREDENTIALS),
        ("Bearer", TWO_VALUES),
        ("Bearer a b", TWO_VALUES),
        ("bearer junk", not_for_any("Token is invalid")),
        ("Bearer junk", not_for_any("Token is invalid")),
        ("Bearer \xff\xfe", not_for_any("Token is invalid")),
        ({"alg": "none"}, not_for_any("Token is invalid")),
        ({"key": b"another key that is long enough to sign"}, not_for_any("Token is invalid")),
        ({"alg": "HS512"}, not_for_any("Token is invalid")),
        ({"token_type": "refresh"}, not_for_any("Token has wrong type")),
        ({"token_type": None}, not_for_any("Token has wrong type")),
        ({"token_type": ...}, not_for_any("Token has no type")),
        ({"exp": 1}, not_for_any("Token is expired")),
        ({"exp": ...}, not_for_any("Token has no 'exp' claim")),
        ({"exp": "soon"}, not_for_any("Token is invalid")),
        ({"exp": [1]}, not_for_any("Token is invalid")),
        ({"exp": float("inf")}, not_for_any("Token is invalid")),
        ({"exp": 2**70}, not_for_any("Token is invalid")),
        ({"iat": LATER}, not_for_any("Token is invalid")),
        ({"jti": ...}, not_for_any("Token has no id")),
        ({"user_id": ...}, NO_USER_ID),
        *[
            ({"user_id": odd}, NO_USER)
            for odd in ("77", "", "-1", "1e3", "９", None, [1], {}, True, 2**63, "9" * 400)
        ],
    ],
)
def test_wrong_credentials_are_refused_as_by_the_original(http, header, answer):
    join(http, "alice")
    if isinstance(header, dict):
        claims = {
            "token_type": "access",
            "exp": LATER,
            "iat": 1,
            "jti": "0" * 32,
            "user_id": "1",
            **header,
        }
        key, algorithm = claims.pop("key", factoryapp.settings.key), claims.pop("alg", "HS256")
        claims = {name: value for name, value in claims.items() if value is not ...}
        header = "Bearer " + jwt.encode(
            claims, None if algorithm == "none" else key, algorithm=algorithm
        )
    headers = {} if header is None else {"Authorization": header}
    for request in (
        lambda: http.get("/api/users/", headers=headers, status=401),
        lambda: http.post("/api/messages/", "{", content_type=JSON, headers=headers, status=401),
        lambda: http.put("/api/messages/", "{", headers=headers, status=401),
    ):
        response = request()
        assert response.json == answer
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="api"'


def test_deleted_user_is_not_found(http):
    headers = join(http, "alice")
    refresh = factoryapp.issue_token("refresh", {"id": 1, "password": ""})
    factoryapp.connection().execute("DELETE FROM users")
    assert http.get("/api/users/", headers=headers, status=401).json == NO_USER
    assert http.post_json("/auth/token/refresh/", {"refresh": refresh}, status=401).json == {
        "detail": "No active account found for the given token.",
        "code": "no_active_account",
    }
    assert register(http, "mallory")["id"] == 2  # the old token must not become hers


def test_registration_with_a_wrong_token_is_refused(http):
    sent = {"username": "alice", "password": PASSWORD}
    response = http.post_json(
        "/api/users/register/", sent, headers={"Authorization": "Bearer junk"}, status=401
    )
    assert response.json == not_for_any("Token is invalid")


@pytest.mark.parametrize(
    "body, headers",
    [
        ({"username": "bob", "password": PASSWORD}, {}),
        ({"username": "bob", "password": PASSWORD}, {"Authorization": "Bearer junk"}),
        ({"username": "alice", "password": PASSWORD}, {}),
        ({}, {}),
        ([], {}),
    ],
)
def test_closed_registration_is_said_whatever_is_sent(http, monkeypatch, body, headers):
    join(http, "alice")
    monkeypatch.setattr(factoryapp.settings, "registration", "closed")
    answer = http.post_json("/api/users/register/", body, headers=headers, status=403)
    assert answer.json == {"detail": "Registration is closed: ask whoever runs this server."}
    log_in(http, "alice")


def test_wrong_method_costs_no_registration(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "REGISTRATIONS_PER_ADDRESS", (1, 60))
    for _ in range(3):
        http.get("/api/users/register/", status=405)
    assert register(http, "alice")["id"] == 1


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_wrong_method_and_unknown_url_answer_json(http):
    headers = join(http, "alice")
    response = http.put_json("/api/messages/", {"text": "a"}, headers=headers, status=405)
    assert response.body == b'{"detail":"Method \\"PUT\\" not allowed."}'
    assert response.headers["Allow"] == "GET, POST, HEAD, OPTIONS"
    assert http.request("/api/messages/", method="FOO", headers=headers, status=405).json == {
        "detail": 'Method "FOO" not allowed.'
    }
    assert http.get("/api/users/register/", status=405).headers["Allow"] == "POST, OPTIONS"
    assert http.get("/auth/token/", headers={"Authorization": "Bearer junk"}, status=405).json == {
        "detail": 'Method "GET" not allowed.'
    }
    options = http.options("/api/messages/", status=204)
    assert options.headers["Allow"] == "GET, POST, HEAD, OPTIONS" and options.body == b""
    assert http.get("/api/nothing/", status=404).body == b'{"detail":"Not found."}'


def test_wrong_method_while_the_database_fails_answers_json(http, monkeypatch):
    headers = join(http, "alice")
    monkeypatch.setattr(factoryapp.settings, "db", "/nonexistent/factoryapp.db")
    answer = http.put("/api/messages/", headers=headers, status=503).json
    assert "Nothing was stored" in answer["detail"]


def test_whoever_meets_a_failing_database_is_told_when_to_try_again(http, monkeypatch):
    headers = join(http, "alice")
    monkeypatch.setattr(factoryapp.settings, "db", "/nonexistent/factoryapp.db")
    assert http.get("/api/users/", headers=headers, status=503).headers["Retry-After"] == "5"


@pytest.mark.parametrize("is_in_server", [False, True])
def test_fault_of_ours_leaves_its_traceback_in_the_log_under_the_id_of_the_answer(
    http, monkeypatch, caplog, is_in_server
):
    headers = join(http, "alice")
    if is_in_server:
        monkeypatch.setattr(factoryapp.Answer, "make_environ", lambda answer: {}["IntegrityError"])
    answer = http.post_json("/api/messages/", {"text": BREAKS}, headers=headers, status=500).json
    assert f"'/api/messages/' failed: {answer['id']}" in caplog.text
    assert "IntegrityError" in caplog.text and "log" in answer["detail"]


def test_path_without_its_slash_is_served(http):
    sent, alice = {"username": "alice", "password": PASSWORD}, {"id": 1, "username": "alice"}
    assert http.post_json("/api/users/register", sent, status=201).json == alice
    assert http.get("/api/users", headers=log_in(http, "alice")).json == [alice]


def trust(monkeypatch, *networks):
    networks = [ipaddress.ip_network(network) for network in networks]
    monkeypatch.setattr(factoryapp.settings, "trusted_proxies", networks)


def test_forwarded_address_is_believed_only_from_the_trusted_proxy(http, monkeypatch, caplog):
    for trusted, forwarded, believed in (
        ([], "203.0.113.9", "192.0.2.1"),
        (["192.0.2.1"], "1.1.1.1, 203.0.113.9", "203.0.113.9"),
        (["192.0.2.9"], "203.0.113.9", "192.0.2.1"),
        (["192.0.2.1"], "junk\\nline", "192.0.2.1"),
    ):
        trust(monkeypatch, *trusted)
        try_password(http, "nobody", **{"X-Forwarded-For": forwarded})
        assert f"from {believed}:" in caplog.records[-1].message


@pytest.mark.parametrize(
    "said, believed",
    [
        ("203.0.113.7:51234", "203.0.113.7"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("2001:0DB8:0::1", "2001:db8::1"),
        ('"203.0.113.7"', "203.0.113.7"),
        ('"[2001:db8::1]:443"', "2001:db8::1"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("[::FFFF:cb00:7107]:80", "203.0.113.7"),
        ("1.1.1.1, 203.0.113.7 , 192.0.2.5,", "203.0.113.7"),
        ("1.1.1.1, 203.0.113.7:80, [::ffff:192.0.2.5]:80", "203.0.113.7"),
        ("192.0.2.6, 192.0.2.5", "192.0.2.6"),
        ("unknown, 203.0.113.7", "203.0.113.7"),
        ("203.0.113.7, unknown, 192.0.2.5", "192.0.2.5"),
    ],
)
def test_forwarded_address_is_read_in_every_spelling(http, monkeypatch, caplog, said, believed):
    trust(monkeypatch, "192.0.2.0/24")
    try_password(http, "nobody", **{"X-Forwarded-For": said})
    assert f"from {believed}:" in caplog.records[-1].message


def test_client_behind_a_proxy_is_throttled_alone_whatever_its_port(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LOGIN_FAILURES_PER_ADDRESS", (3, 100))
    trust(monkeypatch, "192.0.2.1")
    for port, status in enumerate([401, 401, 401, 429]):
        headers = {"X-Forwarded-For": f"203.0.113.7:{port}"}
        try_password(http, f"user{port}", status=status, **headers)
    try_password(http, "nobody", **{"X-Forwarded-For": "203.0.113.8:1"})


def test_forwarded_address_that_cannot_be_read_is_logged_once(http, monkeypatch, caplog):
    factoryapp.warn_of_unreadable_address.cache_clear()
    trust(monkeypatch, "192.0.2.1")
    for said in ("unknown", "_hidden", "unknown"):
        try_password(http, "nobody", **{"X-Forwarded-For": said})
    assert [r.message for r in caplog.records if "X-Forwarded-For" in r.message] == [
        "no address is in X-Forwarded-For: 'unknown'; its clients count as one"
    ]


def test_of_many_forwarded_addresses_few_are_read(http, monkeypatch):
    read, real = [], factoryapp.read_address
    monkeypatch.setattr(factoryapp, "read_address", lambda text: read.append(text) or real(text))
    trust(monkeypatch, "192.0.2.0/24", "::1")
    try_password(http, "nobody", **{"X-Forwarded-For": "::1," * 3000})
    assert len(read) < 300


@pytest.mark.parametrize(
    "setting, trusted, strangers",
    [
        ("172.16.0.0/12", ["172.16.0.1", "172.31.255.254", "::ffff:172.20.0.1"], ["172.32.0.1"]),
        ("10.0.0.5, 172.18.5.1/16,", ["10.0.0.5", "172.18.0.1"], ["10.0.0.6", "172.17.0.1"]),
        ("10.0.0.5 fd00::/8", ["10.0.0.5", "fd00::7"], ["fc00::7", "127.0.0.1"]),
        ("::ffff:10.0.0.5,[::1]", ["10.0.0.5", "::ffff:10.0.0.5", "::1"], ["10.0.0.6", "::2"]),
        (" ", [], ["127.0.0.1", "::1"]),
    ],
)
def test_trusted_proxies_are_networks_and_lists(
    http, configure, caplog, setting, trusted, strangers
):
    configure("--db", factoryapp.settings.db, FACTORYAPP_TRUSTED_PROXY=setting)
    for address in trusted + strangers:
        try_password(http, "nobody", address=address, **{"X-Forwarded-For": "203.0.113.7"})
    believed = ["from 203.0.113.7:" in record.message for record in caplog.records]
    assert believed == [True] * len(trusted) + [False] * len(strangers)


@pytest.mark.parametrize(
    "site, is_foreign",
    [("cross-site", True), ("same-site", False), ("same-origin", False), ("none", False)],
)
def test_what_another_site_has_a_browser_post_is_refused(http, site, is_foreign):
    headers, sent = join(http, "alice"), {"username": "bob", "password": PASSWORD, "text": "a"}
    said, answered = {**headers, "Sec-Fetch-Site": site}, {}
    for path in ("/api/users/register", "/auth/token/", "/api/messages/", "/api/users/keys/"):
        answered[path] = http.post(path, sent, headers=said, status="*").status_int
    assert (set(answered.values()) == {403}) == is_foreign
    assert len(list_messages(http, headers)) == (0 if is_foreign else 1)
    http.get("/", headers=said, status=200)


@pytest.mark.parametrize(
    "path, status",
    [
        ("/%ff", 400),
        ("/api/users/me%FF/", 400),
        ("/%80/health/", 400),
        ("/health/%c3%28", 400),
        ("/%ed%a0%80", 400),
        ("/%c0%af", 400),
        ("/%d1%86%d0%b5%d1%85", 404),
        ("/%00%f0%9f%98%80", 404),
    ],
)
def test_path_that_is_not_utf_8_is_refused(http, path, status):
    answer = talk(http, raw("GET", path, version="1.0"))
    assert statuses(answer) == [status] and b'{"detail":' in answer


def test_every_answer_is_private_and_nothing_but_json(http):
    headers = join(http, "alice")
    listed = http.get("/api/messages/", headers=headers)
    # An HTTP cache of the client's own asks with the ETag.
    assert listed.headers["Cache-Control"] == "private, no-cache" and listed.headers["ETag"]
    known = {**headers, "If-None-Match": listed.headers["ETag"]}
    unchanged = http.get("/api/messages/", headers=known, status=304)
    assert unchanged.headers["Cache-Control"] == "private, no-cache"
    for response in (
        http.get("/api/users/", headers=headers),
        http.get("/api/users/", status=401),
        http.get("/x", status=404),
        http.put("/api/messages/", status=405, headers=headers),
        http.post_json("/auth/token/", {}, status=400),
    ):
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Content-Type"] == JSON_ANSWER and "Server" not in response.headers


@pytest.mark.parametrize(
    "path, field, status",
    [
        ("/api/users/register/", "username", 400),
        ("/auth/token/", "username", 401),
        ("/api/messages/", "recipient", 400),
    ],
)
def test_name_of_thousands_of_marks_takes_no_time(http, path, field, status):
    headers, name = join(http, "alice"), "a" + "\u0315" * 16_000 + "\u0300" * 16_000
    sent, started_at = {"password": PASSWORD, "text": "a", field: name}, time.monotonic()
    body = json.dumps(sent, ensure_ascii=False).encode()
    http.post(path, body, content_type=JSON, headers=headers, status=status)
    assert time.monotonic() - started_at < 1


def test_multipart_form_is_read(http):
    response = http.post(
        "/api/users/register/",
        {"username": "Анна", "password": PASSWORD},
        upload_files=[("x", "x.txt", b"x")],
    )
    assert response.json == {"id": 1, "username": "Анна"}


def part(value, *lines):
    """A multipart body, for the boundary x, of one field."""
    header = b"\r\n".join([b'Content-Disposition: form-data; name="text"', *lines])
    return b"--x\r\n" + header + b"\r\n\r\n" + value + b"\r\n--x--\r\n"


def post_body(http, headers, media_type, body, path="/api/messages/"):
    """The status and the JSON that a POST of just these bytes is answered."""
    [answer] = http.ask(("POST", path, body, {**headers, "Content-Type": media_type}))
    return answer.status, json.loads(answer.body)


@pytest.mark.parametrize(
    "value",
    [
        "при".encode("cp1251"),
        b"\xff\xfe\0a",
        b"cut \xd0",
        b"surrogate \xed\xa0\xbd",
        b"overlong \xc0\xaf",
    ],
)
def test_bytes_that_are_not_utf_8_are_refused(http, value):
    headers = join(http, "alice")
    for media_type, body in (
        (JSON, b'{"text":"%b"}' % value),
        (FORM, b"text=%b" % value),
        (FORM, b"%b=a&text=a" % value),
        (MULTIPART, part(value)),
        (MULTIPART, part(b"a", b"X: %b" % value)),
    ):
        status, refused = post_body(http, headers, media_type, body)
        assert status == 400 and "parse error - 'utf-8' codec can't decode" in refused["detail"]
    assert list_messages(http, headers) == []


@pytest.mark.parametrize("value", ["%cf%f0%e8%cf", "%D0", "a%80", "%ED%A0%BD", "я%ff"])
def test_percent_encoded_bytes_that_are_not_utf_8_are_refused(http, value):
    for form in (f"username=a{value}&password={PASSWORD}", f"username=a&password={value * 8}"):
        status, refused = post_body(http, {}, FORM, form.encode(), "/api/users/register/")
        assert status == 400 and "'utf-8' codec can't decode byte" in refused["detail"]
    assert count("users") == 0


@pytest.mark.parametrize(
    "media_type, body",
    [
        (f"{MULTIPART}; charset=cp1251", part("Цех №4".encode("cp1251"))),
        (MULTIPART, part("Цех №4".encode("cp1251"), b"Content-Type: text/plain; charset=cp1251")),
    ],
    ids=str,
)
def test_part_in_a_charset_that_it_names_is_read(http, media_type, body):
    status, message = post_body(http, join(http, "alice"), media_type, body)
    assert status == 201 and message["text"] == "Цех №4"


@pytest.mark.parametrize(
    "charset", ["utf-8", '"UTF-8"', "us-ascii", "iso-8859-1", "cp1251", "nonsense", "", "..", "hex"]
)
def test_body_is_utf_8_whatever_charset_it_names(http, charset):
    headers = join(http, "alice")
    for media_type, body in (
        (JSON, '{"text":"я"}'),
        (FORM, "text=я"),
        (FORM, "text=%d1%8f"),
        ("text/plain", "я"),
    ):
        media_type = f"{media_type}; charset={charset}"
        assert post_body(http, headers, media_type, body.encode())[1]["text"] == "я"


def test_charsets_that_clients_make_up_are_not_kept(http):
    headers, odd_part = join(http, "alice"), part(b"a", b"Content-Type: text/x; charset=made-up-1")
    for media_type, body, expected in (
        (MULTIPART, odd_part, 400),
        (f"{MULTIPART}; charset=made-up-2", part(b"a"), 400),
        (f"{JSON}; charset=made-up-3", b'{"text":"a"}', 201),
        (f"{FORM}; charset=made-up-4", b"text=a", 201),
    ):
        assert post_body(http, headers, media_type, body)[0] == expected
        assert not [name for name in encodings._cache if name.startswith("made")]


@pytest.mark.parametrize(
    "body", [b'{"text":"hi"}', b' \r\n{"text": "hi"}\n', b'\xef\xbb\xbf{"text":"hi"}']
)
def test_json_object_is_read_though_it_is_called_a_form(http, body):
    headers = join(http, "alice")
    for media_type in (FORM, f"{FORM}; charset=utf-8", FORM.title(), JSON):
        assert post_body(http, headers, media_type, body)[1]["text"] == "hi"


@pytest.mark.parametrize(
    "body", [b'{"text":"hi",}', b"{text: hi}", b"{'text':'hi'}", b'{"text":"\xff"}', b"{"]
)
def test_malformed_json_is_called_so_though_it_is_called_a_form(http, body):
    status, refused = post_body(http, join(http, "alice"), FORM, body)
    assert status == 400 and refused["detail"].startswith("JSON parse error - ")


@pytest.mark.parametrize("body", [b'["text"]', b'"text"', b"a={&b=1", b'\'{"text":"hi"}\''])
def test_form_that_is_no_json_object_stays_a_form(http, body):
    refused = post_body(http, join(http, "alice"), FORM, body)
    assert refused == (400, {"text": ["This field is required."]})


@pytest.mark.parametrize(
    "body, text",
    [
        (b"hi", "hi"),
        (b"hi\n", "hi"),
        (b"hi\r\n", "hi"),
        (b"hi\n\n", "hi\n"),
        (b"hi\r\n\r\n", "hi\r\n"),
        (b"hi\n\r", "hi\n\r"),
        (b"\r100 %\r", "\r100 %\r"),
        (b"\n hi ", "\n hi "),
        (b'{"text": "a"}', '{"text": "a"}'),
        (b"text=a&recipient=b+c%20", "text=a&recipient=b+c%20"),
        ("я".encode() * 16_384 + b"\n", "я" * 16_384),
    ],
    ids=range(11),
)
def test_plain_text_is_a_message_as_it_is_but_for_its_final_line_break(http, body, text):
    headers = join(http, "alice")
    for media_type in ("text/plain", "Text/PLAIN; format=flowed"):
        status, message = post_body(http, headers, media_type, body)
        assert (status, message["text"], message["recipient"]) == (201, text, "alice")


def test_query_beside_a_plain_text_is_read_as_utf_8(http):
    path = f"/api/messages/?recipient={quote('Анна')}&text=no&x=y"
    status, message = post_body(http, join(http, "Анна"), "text/plain", "Цех №4\n".encode(), path)
    assert (status, message["text"], message["recipient"]) == (201, "Цех №4", "Анна")


def test_other_fields_of_a_plain_text_are_in_its_query(http, clock):
    alice = join(http, "alice")
    register(http, "b+b")
    first = post(http, alice, "one", recipient="b+b")
    query = f"recipient=b%2Bb&send_at=2027-01-15T12:00:00%2B03:00&reply_to={first['id']}&silent=1"
    path, key = f"/api/messages/?{query}", {**alice, "Idempotency-Key": "a-key"}
    status, message = post_body(http, key, "text/plain", b"two\n", path)
    assert status == 201 and message["recipient"] == "b+b" and message["reply_to"] == first["id"]
    sent = {"send_at": message["send_at"], "reply_to": first["id"], "silent": True}
    assert post(http, key, "two", recipient="b+b", **sent) == message


@pytest.mark.parametrize(
    "query, body, status, said",
    [
        ("", b"", 400, "This field is required."),
        ("", b"\n", 400, "may not be blank"),
        ("text=a", b" \r\n", 400, "may not be blank"),
        ("", b"a" * 16_385, 400, "no more than 16384 characters"),
        ("", b"a\0", 400, "Null characters"),
        ("", b"\xff\xfeh\0i\0", 400, "Form parse error - 'utf-8' codec can't decode byte 0xff"),
        ("recipient=%ff", b"a", 400, "Form parse error - 'utf-8' codec can't decode byte 0xff"),
        ("recipient=nobody", b"a", 400, "No such user."),
        ("recipient=bob&recipient=nobody", b"a", 400, "No such user: nobody."),
        ("silent=maybe", b"a", 400, "'silent': "),
        ("send_at=soon", b"a", 400, "'send_at': "),
        ("choices=one", b"a", 400, "'choices': "),
        ("&".join(["a=b"] * 1001), b"a", 400, "more than 1000 fields"),
        ("", b"a" * 201_000, 413, "too large"),
    ],
    ids=range(14),
)
def test_plain_text_that_does_not_fit_is_refused_and_not_cut(http, query, body, status, said):
    headers, path = join(http, "alice"), f"/api/messages/?{query}"
    register(http, "bob")
    answer = post_body(http, headers, "text/plain", body, path)
    assert answer[0] == status and said in str(answer[1])
    assert list_messages(http, headers) == []


def test_plain_text_is_taken_for_messages_alone(http):
    headers, answers = join(http, "alice"), []
    for route in factoryapp.app.routes:
        if factoryapp.declared(route.callback).body:
            path = f"{route.rule}?username=bob&password={PASSWORD}&name=cron&token=a&refresh=a"
            answers.append(post_body(http, headers, "text/plain", b"a", path)[0])
    assert sorted(answers) == [201] + [415] * 7 and count("users") == 1


@pytest.mark.parametrize("media_type", [FORM, MULTIPART, "text/plain"])
def test_field_that_may_be_a_list_is_one_where_a_form_or_a_query_repeats_it(http, media_type):
    alice, path = join(http, "alice"), "/api/messages/"
    register(http, "bob")
    pairs = "recipient=bob&recipient=alice&silent=maybe&silent=1&choices=Yes&choices=No"
    body = f"text=none&text=a&{pairs}".encode()
    if media_type == "text/plain":
        path, body = f"{path}?{pairs}", b"a"
    elif media_type == MULTIPART:
        parts = [
            f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in parse_qsl(body.decode())
        ]
        body = f"{''.join(parts)}--x--\r\n".encode()
    status, messages = post_body(http, alice, media_type, body, path)
    assert status == 201 and [(m["recipient"], m["text"], m["choices"]) for m in messages] == [
        (name, "a", ["Yes", "No"]) for name in ("bob", "alice")
    ]


def test_body_that_does_not_say_what_it_is_is_refused(http):
    headers = join(http, "alice")
    [answer] = http.ask(("POST", "/api/messages/", b'{"text":"hi"}', headers))
    assert answer.status == 415 and b"Unsupported media type" in answer.body


@pytest.mark.parametrize(
    "media_type, body",
    [
        (FORM, b"text=a" + b"&a" * 1000),
        ("multipart/form-data", part(b"a")),
        (f"{MULTIPART}; odd", part(b"a")),
        (MULTIPART, part(b"a", b"Content-Length: odd")),
        (MULTIPART, b"text=a"),
    ],
    ids=range(5),
)
def test_malformed_form_is_refused_in_words_for_people(http, media_type, body):
    status, refused = post_body(http, join(http, "alice"), media_type, body)
    reason = "the body has more than 1000 fields, or does not follow RFC 7578."
    assert status == 400 and refused == {"detail": f"Form parse error - {reason}"}


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "x-gzip", "zstd", "identity, gzip"])
def test_encoded_body_is_refused_by_the_name_of_its_encoding(http, encoding):
    headers = {**join(http, "alice"), "Content-Encoding": encoding}
    for media_type in (JSON, FORM, MULTIPART):
        for body in (b'{"text":"hi"}', gzip.compress(b'{"text":"hi"}')):
            status, refused = post_body(http, headers, media_type, body)
            assert status == 415 and f'content encoding "{encoding}"' in refused["detail"]


@pytest.mark.parametrize("encoding", ["identity", "Identity", " identity ", ""])
def test_body_that_is_encoded_as_identity_is_read(http, encoding):
    headers = {**join(http, "alice"), "Content-Encoding": encoding}
    assert post_body(http, headers, JSON, b'{"text":"hi"}')[1]["text"] == "hi"


ODD_VALUES = [
    '"a\\u0000"',
    '"\\ud800"',
    "1e999",
    "-1e999",
    "null",
    "true",
    "[]",
    "{}",
    "[[1]]",
    "NaN",
    "1" * 5000,
    '""',
    '"\\t"',
]


ODD_BODIES = [
    b"{",
    b"",
    b"\xef\xbb\xbf{}",
    b'{"text":"\xff"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"1" * 5000,
    b'"text"',
    b"\0",
    b'{"text":"' + b"a" * 70_000 + b'"}',
]


@pytest.mark.parametrize(
    "path, field",
    [
        ("/api/messages/", "text"),
        ("/api/messages/", "recipient"),
        ("/auth/token/", "username"),
        ("/auth/token/", "password"),
        ("/auth/token/refresh/", "refresh"),
        ("/auth/token/verify/", "token"),
        ("/auth/token/blacklist/", "refresh"),
        ("/api/users/register/", "username"),
        ("/api/users/register/", "password"),
    ],
)
def test_odd_input_is_refused_in_json(http, path, field):
    headers = join(http, "alice")
    fields = (
        {"text": '"a"', "recipient": '"alice"'}
        if "messages" in path
        else {"username": '"bob"', "password": '"S3cure-pass-91"'}
    )
    bodies = ODD_BODIES + [
        json.dumps({**fields, field: "X"})
        .replace('"X"', value)
        .replace('"\\"', '"')
        .replace('\\""', '"')
        .encode()
        for value in ODD_VALUES
        if (value, field) != ("null", "recipient")  # which is optional
    ]
    for body in bodies:
        response = http.post(path, body, content_type=JSON, headers=headers, expect_errors=True)
        assert 400 <= response.status_int < 500, (body[:60], response)
        assert response.headers["Content-Type"] == JSON_ANSWER and response.json
    for media_type in (
        FORM,
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "multipart/form-data; boundary=x; charset=no",
    ):
        for body in (
            b"",
            b"%ff=%ff&=&&=",
            b"\xff\0",
            b"--x\r\n",
            b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n\xff\r\n--x--\r\n",
        ):
            response = http.request(
                path,
                method="POST",
                body=body,
                content_type=media_type,
                headers=headers,
                expect_errors=True,
            )
            assert response.status_int in (400, 401) and response.json
    for query in ("?a=%ff%00", "?" + "a&" * 1000, "?limit[]=1", "?%"):
        http.post(path + query, b"{", content_type=JSON, headers=headers, status=400)


def ask_if_changed(http, headers, etag, path="/api/messages/"):
    """The answer to who has what this ETag names."""
    return http.get(path, headers={**headers, "If-None-Match": etag}, expect_errors=True)


@pytest.mark.parametrize("path", ["/api/messages/", "/api/messages/1/", "/api/messages/?after=1"])
@pytest.mark.parametrize(
    "spelled, status",
    [
        ("{}", 304),
        ("W/{}", 304),
        ('"x", W/{},"y"', 304),
        (" * ", 304),
        ('"x", "{}"', 200),
        ('"*"', 200),
        ('""', 200),
        ("", 200),
    ],
)
def test_answer_that_the_client_has_is_not_sent_again(http, path, spelled, status):
    headers = join(http, "alice")
    post(http, headers, "text")
    etag = http.head(path, headers=headers).headers["ETag"]
    spelled = spelled.format(etag if status == 304 else etag.strip('"') + "0")
    answer = ask_if_changed(http, headers, spelled, path)
    assert (answer.status_int, answer.headers["ETag"]) == (status, etag)
    assert (answer.body == b"") == (status == 304)


def test_answer_has_another_etag_once_it_says_something_else(http, telegram, pair):
    alice, _ = pair
    etags = [ask_if_changed(http, alice, "", "/api/messages/?limit=1").headers["ETag"]]
    for act in (
        lambda: post(http, alice, "one", recipient="bob"),
        lambda: deliver_all(telegram),
        lambda: post(http, alice, "on the next page", recipient="bob"),
    ):
        act()
        answer = ask_if_changed(http, alice, etags[-1], "/api/messages/?limit=1")
        assert answer.status_int == 200
        etags.append(answer.headers["ETag"])
    assert len(set(etags)) == 4


def test_linking_and_unlinking_a_chat_change_the_etag(http, telegram, bot_api):
    alice, etags = join(http, "alice"), []
    for act in (
        lambda: None,
        lambda: link_chat(http, telegram, bot_api, alice, 7),
        lambda: say(telegram, bot_api, 7, "/stop"),
    ):
        act()
        etags.append(http.get("/api/messages/", headers=alice).headers["ETag"])
    assert len(set(etags)) == 3


def test_long_list_that_the_client_has_is_not_even_read(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LIST_ROWS", 2)
    headers = join(http, "alice")
    for text in ("one", "two", "three"):
        post(http, headers, text)
    etag = http.get("/api/messages/", headers=headers).headers["ETag"]
    reads = note_threads(monkeypatch, factoryapp, "read_piece")
    assert ask_if_changed(http, headers, etag).status_int == 304 and reads == []


def test_etag_of_before_a_restart_is_none(start):
    program = start()
    alice = join(program.http, "alice")
    etag = program.http.get("/api/messages/", headers=alice).headers["ETag"]
    program.end()
    assert ask_if_changed(start().http, alice, etag).status_int == 200


LISTS = ["", "?limit=3", "?before=20&limit=2", "?delivery=failed", "?delivery=scheduled"]
LISTS.append("?with=bob&limit=3")
TRIGGERS = re.findall(
    r"TRIGGER IF NOT EXISTS ((?:messages|scheduled)_\w+) AFTER", (HERE / "schema.sql").read_text()
)


@pytest.fixture
def chance():
    return random.Random(7)


@pytest.fixture
def deeds(http, telegram, bot_api, clock, monkeypatch, pair, chance, keys):
    """All that can change what somebody's lists show, each a function of two users' names."""
    chats = {"alice": 7, "bob": 8}

    def write(me, you, text="text", **fields):
        post(http, keys[me], text, recipient=you, **fields)

    def schedule(me, you):
        send_at = factoryapp.iso(clock.seconds + chance.choice([5, 500]))
        write(me, you, chance.choice(["later", BREAKS]), send_at=send_at)

    def press_any(me, you):
        if message_id := chance.choice([0, *bot_api.keyboards]):
            press(telegram, bot_api, bot_api.sent[message_id - 1][0], message_id)

    def cancel_any(me, you):
        for path in chance.choices(LISTS, k=2):
            for message in http.get(f"/api/messages/{path}", headers=keys[me]).json[-2:]:
                cancel(http, keys[me], message["id"])

    def age(me, you):
        with closing(sqlite3.connect(factoryapp.settings.db, timeout=5)) as db, db:
            db.execute("UPDATE messages SET created_at = '2020' WHERE id % 3 = 0")

    return [
        write,
        schedule,
        press_any,
        cancel_any,
        age,
        lambda me, you: forget(1, monkeypatch),
        lambda me, you: say(telegram, bot_api, chats[me], link_token(http, log_in(http, me))),
        lambda me, you: write(me, you, choices=["Да", "Нет"]),
        lambda me, you: say(telegram, bot_api, chats[me], "words", reply_to=len(bot_api.sent)),
        lambda me, you: say(telegram, bot_api, chats[me], "/stop"),
        lambda me, you: bot_api.failures[chats[you]].append(chance.choice([TOO_LONG, OOPS])),
        lambda me, you: clock.move(chance.choice([1, 10])),
        lambda me, you: deliver_all(telegram),
    ]


@pytest.fixture
def keys(http, pair):
    return {"alice": make_key(http, pair[0]), "bob": make_key(http, pair[1])}


@pytest.mark.parametrize("missing", [None, *TRIGGERS])
def test_whatever_changes_what_a_list_shows_changes_its_etag(http, keys, deeds, chance, missing):
    if missing:
        factoryapp.connection().execute(f"DROP TRIGGER {missing}")
    known, stale = {}, []
    while len(known) < 250 * len(LISTS) and not stale:
        chance.choice(deeds)(*chance.choices(["alice", "bob"], k=2))
        for name, path in itertools.product(keys, LISTS):
            answer = http.get(f"/api/messages/{path}", headers=keys[name])
            shown = answer.body + answer.headers.get("Link", "").encode()
            if known.setdefault((name, path, answer.headers["ETag"]), shown) != shown:
                stale.append((name, path))
    assert bool(stale) == bool(missing)


def test_what_there_is_or_has_changed_is_not_waited_for(http, monkeypatch):
    headers = join(http, "alice")
    post(http, headers, "text")
    waits = note_threads(monkeypatch, factoryapp.Server, "wait_for_news")
    for path, etag in (
        ("?wait=1", None),
        ("?wait=1", '"another"'),
        ("?after=1&wait=1", '"another"'),
        ("1/?wait=1", None),
        ("?after=1&wait=0", None),
        ("?wait=0", "*"),
    ):
        known = {"If-None-Match": etag} if etag else {}
        http.get(f"/api/messages/{path}", headers={**headers, **known}, status="*")
    assert waits == []


# --- Routes ---------------------------------------------------------------------------------------


ONLY_LETTERS = (
    "Enter a valid username. "
    "This value may contain only letters, numbers, and @/./+/-/_ characters."
)
TAKEN = '{"username":["A user with that username already exists."]}'
REQUIRED = '{"username":["This field is required."],"password":["This field is required."]}'
BLANK = '{"username":["This field may not be blank."],"password":["This field may not be blank."]}'
NULL = '{"username":["This field may not be null."],"password":["This field may not be null."]}'


@pytest.mark.parametrize(
    "sent, media_type, status, answer",
    [
        (
            '{"username": "anna", "password": "S3cure-pass-91"}',
            JSON,
            201,
            '{"id":2,"username":"anna"}',
        ),
        ('{"username": "alice", "password": "S3cure-pass-91"}', JSON, 400, TAKEN),
        ('{"username": " \\uff41lice ", "password": "S3cure-pass-91"}', JSON, 400, TAKEN),
        ("{}", JSON, 400, REQUIRED),
        ('{"username": "", "password": ""}', JSON, 400, BLANK),
        ('{"username": "  ", "password": "  "}', JSON, 400, BLANK),
        ('{"username": null, "password": null}', JSON, 400, NULL),
        (
            '{"username": ["a"], "password": {"a": 1}}',
            JSON,
            400,
            '{"username":["Not a valid string."],"password":["Not a valid string."]}',
        ),
        (
            '{"username": "a b!", "password": "S3cure-pass-91"}',
            JSON,
            400,
            f'{{"username":["{ONLY_LETTERS}"]}}',
        ),
        (
            f'{{"username": "{"a" * 151}", "password": "S3cure-pass-91"}}',
            JSON,
            400,
            '{"username":["Ensure this field has no more than 150 characters."]}',
        ),
        (
            '{"username": "a\\u0000b", "password": "S3cure-pass-91"}',
            JSON,
            400,
            f'{{"username":["{ONLY_LETTERS}","Null characters are not allowed."]}}',
        ),
        (
            '{"username":"ab\\ud800","password":"S3cure-pass-91"}',
            JSON,
            400,
            f'{{"username":["{ONLY_LETTERS}","Surrogate characters are not allowed: U+D800."]}}',
        ),
        (
            '{"username": "anna", "password": "12345"}',
            JSON,
            400,
            '{"password":["This password is too short. It must contain at least 8 characters.",'
            '"This password is entirely numeric."]}',
        ),
        (
            "[1, 2]",
            JSON,
            400,
            '{"non_field_errors":["Invalid data. Expected a dictionary, but got list."]}',
        ),
        ("null", JSON, 400, '{"non_field_errors":["No data provided"]}'),
        (
            '{"username":',
            JSON,
            400,
            '{"detail":"JSON parse error - Expecting value: line 1 column 13 (char 12)"}',
        ),
        (
            '{"username":NaN}',
            JSON,
            400,
            '{"detail":"JSON parse error - '
            "Out of range float values are not JSON compliant: 'NaN'\"}",
        ),
        (
            b'{"username":"\xff\xfe"}',
            JSON,
            400,
            '{"detail":"JSON parse error - '
            "'utf-8' codec can't decode byte 0xff in position 13: invalid start byte\"}",
        ),
        ("", JSON, 400, REQUIRED),
        ("", "text/plain", 400, REQUIRED),
        (
            "hi",
            "text/plain",
            415,
            '{"detail":"Unsupported media type \\"text/plain\\" in request."}',
        ),
        ("username=anna&password=S3cure-pass-91", FORM, 201, '{"id":2,"username":"anna"}'),
        (
            '{"username": "anna", "password": "S3cure-pass-91", "is_superuser": true, "id": 77}',
            JSON,
            201,
            '{"id":2,"username":"anna"}',
        ),
        (
            '{"username": "Иван", "password": "S3cure-pass-91"}'.encode(),
            "application/json; charset=utf-8",
            201,
            '{"id":2,"username":"Иван"}',
        ),
        ('{"username": 5, "password": "S3cure-pass-91"}', JSON, 201, '{"id":2,"username":"5"}'),
    ],
)
def test_registration_answers_as_the_original(http, sent, media_type, status, answer):
    register(http, "alice")
    response = http.post("/api/users/register/", sent, content_type=media_type, status=status)
    assert response.body.decode() == answer
    assert response.headers["Content-Type"] == JSON_ANSWER


def test_thirty_registrations_of_one_name_make_one_account(http):
    answers = []

    def try_to_register():
        sent = {"username": "alice", "password": PASSWORD}
        answers.append(http.post_json("/api/users/register/", sent, expect_errors=True))

    threads = [threading.Thread(target=try_to_register) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_int for answer in answers) == [201] + [400] * 29


MIXED = "Enter a valid username. This value mixes letters of two alphabets."
UNSEEN = "Enter a valid username. This value holds letters that cannot be seen."
NAME_IS_TAKEN = "A user with that username already exists."


@pytest.mark.parametrize(
    "first, name, sentence",
    [
        ("alice", "Alice", NAME_IS_TAKEN),
        ("Alice", "alice", NAME_IS_TAKEN),
        ("alice", " ＡＬＩＣＥ", NAME_IS_TAKEN),
        ("иван", "ИВАН", NAME_IS_TAKEN),
        ("straße", "STRASSE", NAME_IS_TAKEN),
        ("σίσυφος", "ΣΊΣΥΦΟΣ", NAME_IS_TAKEN),
        ("ꭰ", "Ꭰ", NAME_IS_TAKEN),
        ("alice", "\u0430lice", MIXED),
        ("alice", "alic\u0435", MIXED),
        ("alice", "\u03b1lice", MIXED),
        ("иван", "и\u0432aн", MIXED),
        ("alice", "x" * 149 + "\u0430", MIXED),
        ("bob", "b\u115fob", UNSEEN),
        ("bob", "bob\u1160", UNSEEN),
        ("bob", "bo\u3164b", UNSEEN),
        ("bob", "\uffa0bob", UNSEEN),
        ("bob", "\u115f", UNSEEN),
        ("bob", "bob\U00013441", UNSEEN),
        ("bob", "bo\u200db", ONLY_LETTERS),
        ("bob", "bo\u034fb", ONLY_LETTERS),
    ],
)
def test_new_name_that_passes_for_another_is_refused(http, first, name, sentence):
    headers, sent = join(http, first), {"username": name, "password": PASSWORD}
    refused = http.post_json("/api/users/register/", sent, status=400).json
    assert [*refused] == ["username"] and refused["username"][-1] == sentence
    try_password(http, name, PASSWORD)
    assert http.get("/api/users/", headers=headers).json == [{"id": 1, "username": first}]


def test_new_name_of_one_alphabet_is_shown_as_it_is_written(http):
    names = ["Bob.2@X-4", "Мария_1", "μαρία", "山田Taro", "Ünal", "王", "Ёж+Ўғ", "ALICES"]
    headers = [join(http, name) for name in names][0]
    assert [user["username"] for user in http.get("/api/users/", headers=headers).json] == names
    assert [post(http, headers, "a", recipient=name)["recipient"] for name in names] == names


def test_name_that_somebody_took_in_another_case_during_the_hash_is_refused(http, monkeypatch):
    real, sent = factoryapp.hash_password, {"username": "alice", "password": PASSWORD}

    def take_meanwhile(password):
        with factoryapp.transaction() as db:
            factoryapp.add_user(db, "Alice", real(password))
        return real(password)

    monkeypatch.setattr(factoryapp, "hash_password", take_meanwhile)
    assert http.post_json("/api/users/register/", sent, status=400).text == TAKEN
    assert http.get("/api/users/", headers=log_in(http, "Alice")).json[0]["username"] == "Alice"


def test_hundred_registrations_of_an_address_are_enough_and_count_apart_from_logins(
    http, monkeypatch, clock
):
    def try_to_register(status, address="192.0.2.1", **sent):
        where = {"extra_environ": {"REMOTE_ADDR": address}}
        return http.post_json("/api/users/register/", sent, status=status, **where)

    bob, carol = ({"username": name, "password": PASSWORD} for name in ("bob", "carol"))
    monkeypatch.setattr(factoryapp, "LOGIN_FAILURES_PER_ADDRESS", (1, 300))
    for status in (401, 429):
        try_password(http, "bob", status=status)
    try_to_register(201, **bob)
    for name in ("bob", "a b") * 49:
        try_to_register(400, username=name, password=PASSWORD)
    try_to_register(400)
    clock.move(1)
    refused = try_to_register(429, **carol)
    assert refused.headers["Retry-After"] == "2"
    assert refused.json == {"detail": "Request was throttled. Expected available in 2 seconds."}
    try_to_register(201, address="192.0.2.2", **carol)
    try_password(http, "carol", PASSWORD, address="192.0.2.2", status=200)
    clock.move(299)
    try_to_register(201, username="dave", password=PASSWORD)
    try_password(http, "dave", PASSWORD, status=200)


SIMILAR = "The password is too similar to the username."
SHORT = "This password is too short. It must contain at least 8 characters."
COMMON = "This password is too common."
NUMERIC = "This password is entirely numeric."


@pytest.mark.parametrize(
    "username, password, sentences",
    [
        ("operator", "operator", [SIMILAR]),
        ("Operator77", "12OPERATOR3", [SIMILAR]),
        ("оператор1", "Оператор", [SIMILAR]),
        ("ﬁremaster", "FIREMASTER9", [SIMILAR]),
        ("straßenbahn", "STRASSENBAHN", [SIMILAR]),
        ("12345678", "12345678", [SIMILAR, COMMON, NUMERIC]),
        ("monkey", "MONKEY", [SIMILAR, SHORT]),
        ("bob", "12345678", [COMMON, NUMERIC]),
        ("bob", "123456", [SHORT, NUMERIC]),
        ("bob", "QwertyUiop", [COMMON]),
        ("bob", "87654321", [NUMERIC]),
        ("12345678", "87654321", [NUMERIC]),
        ("12345678", "a12345678a", None),
        ("bob", "bob-the-first", None),
        ("bob", "1bobbob", [SHORT]),
        ("bob", "1b2o3b4567", None),
        ("bob", "password12", None),
    ],
)
def test_new_password_that_is_easily_guessed_is_refused(http, username, password, sentences):
    sent = {"username": username, "password": password}
    answer = http.post_json("/api/users/register/", sent, status="*").json
    assert answer.get("password") == sentences
    if sentences:
        headers = join(http, username)
        sent = {"current_password": PASSWORD, "new_password": password}
        refused = http.post_json("/api/users/set-password/", sent, headers=headers, status=400)
        assert refused.json == {"new_password": sentences}


def test_password_of_thousands_of_digits_takes_no_time(http):
    sent, started_at = {"username": "bob", "password": "a" + "1" * 60_000 + "a"}, time.monotonic()
    http.post_json("/api/users/register/", sent, status=400)
    assert time.monotonic() - started_at < 2


@pytest.mark.parametrize("spelling", ["alice", " alice ", "ａｌｉｃｅ"])
def test_username_is_normalised_at_login_too(http, spelling):
    register(http, "alice")
    assert log_in(http, spelling)


def test_password_is_kept_exactly(http):
    register(http, "alice", "  spaced out  ")
    assert log_in(http, "alice", "  spaced out  ")
    http.post_json("/auth/token/", {"username": "alice", "password": "spaced out"}, status=401)


def test_new_password_of_which_some_could_not_be_read_is_refused(http):
    headers, password = join(http, "alice"), "пароль-\ufffd\ufffd"
    registration = {"username": "bob", "password": password}
    change = {"current_password": PASSWORD, "new_password": password}
    for send in (http.post_json, http.post):
        for path, sent in (("register", registration), ("set-password", change)):
            refused = send(f"/api/users/{path}/", sent, headers=headers, status=400).json
            assert "U+FFFD" in "".join(refused.popitem()[1])


def test_login_is_overtaken_by_a_password_change(http, monkeypatch):
    headers, real = join(http, "alice"), factoryapp.password_matches

    def change_meanwhile(*args):
        monkeypatch.setattr(factoryapp, "password_matches", real)
        http.post_json(
            "/api/users/set-password/",
            {"current_password": PASSWORD, "new_password": "An0ther-pass"},
            headers=headers,
        )
        return real(*args)

    monkeypatch.setattr(factoryapp, "password_matches", change_meanwhile)
    http.post_json("/auth/token/", {"username": "alice", "password": PASSWORD}, status=401)


@pytest.mark.parametrize(
    "path, sent, status, answer",
    [
        (
            "/auth/token/",
            {"username": "alice", "password": "nope"},
            401,
            '{"detail":"No active account found with the given credentials"}',
        ),
        (
            "/auth/token/",
            {"username": "nobody", "password": "nope"},
            401,
            '{"detail":"No active account found with the given credentials"}',
        ),
        ("/auth/token/", {}, 400, REQUIRED),
        ("/auth/token/", {"username": "", "password": ""}, 400, BLANK),
        ("/auth/token/refresh/", {}, 400, '{"refresh":["This field is required."]}'),
        (
            "/auth/token/refresh/",
            {"refresh": None},
            400,
            '{"refresh":["This field may not be null."]}',
        ),
        (
            "/auth/token/refresh/",
            [1],
            400,
            '{"non_field_errors":["Invalid data. Expected a dictionary, but got list."]}',
        ),
        (
            "/auth/token/refresh/",
            {"refresh": "junk"},
            401,
            '{"detail":"Token is invalid","code":"token_not_valid"}',
        ),
        (
            "/auth/token/refresh/",
            {"refresh": "ACCESS"},
            401,
            '{"detail":"Token has wrong type","code":"token_not_valid"}',
        ),
        ("/auth/token/verify/", {"token": "ACCESS"}, 200, "{}"),
        ("/auth/token/verify/", {"token": "REFRESH"}, 200, "{}"),
        (
            "/auth/token/verify/",
            {"token": "junk"},
            401,
            '{"detail":"Token is invalid","code":"token_not_valid"}',
        ),
        ("/auth/token/blacklist/", {"refresh": "REFRESH"}, 200, "{}"),
        (
            "/auth/token/blacklist/",
            {"refresh": "ACCESS"},
            401,
            '{"detail":"Token has wrong type","code":"token_not_valid"}',
        ),
    ],
)
@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer junk"}]
)  # the token views ignore that header
def test_token_views_answer_as_the_original(http, path, sent, status, answer, headers):
    register(http, "alice")
    tokens = http.post_json(
        "/auth/token/", {"username": "alice", "password": PASSWORD}, headers=headers
    ).json
    assert list(tokens) == ["refresh", "access"]
    text = (
        json.dumps(sent).replace("ACCESS", tokens["access"]).replace("REFRESH", tokens["refresh"])
    )
    response = http.post(path, text, content_type=JSON, headers=headers, status=status)
    assert response.body.decode() == answer
    assert response.headers.get("WWW-Authenticate") == (
        'Bearer realm="api"' if status == 401 else None
    )


def test_refresh_makes_an_access_token_until_it_is_blacklisted(http):
    register(http, "alice")
    refresh = http.post_json("/auth/token/", {"username": "alice", "password": PASSWORD}).json[
        "refresh"
    ]
    answer = http.post_json("/auth/token/refresh/", {"refresh": refresh}).json
    assert list(answer) == ["access"]
    http.get("/api/users/", headers={"Authorization": f"Bearer {answer['access']}"})
    http.post_json("/auth/token/blacklist/", {"refresh": refresh})
    for path in ("refresh", "blacklist"):
        dead = http.post_json(f"/auth/token/{path}/", {"refresh": refresh}, status=401).json
        assert dead == {"detail": "Token is blacklisted", "code": "token_not_valid"}
    assert http.post_json("/auth/token/verify/", {"token": refresh}, status=401).json == dead


@pytest.mark.parametrize("token", ["{}\n", "{}\r\n", "  {}", "\t{} \n\n"])
def test_token_in_a_body_is_taken_with_the_blanks_around_it(http, token):
    register(http, "alice")
    for send in (http.post, http.post_json):
        tokens = send("/auth/token/", {"username": "alice", "password": PASSWORD}).json
        refresh, access = (token.format(tokens[kind]) for kind in ("refresh", "access"))
        assert "access" in send("/auth/token/refresh/", {"refresh": refresh}).json
        send("/auth/token/verify/", {"token": access}, status=200)
        send("/auth/token/blacklist/", {"refresh": refresh}, status=200)
        send("/auth/token/verify/", {"token": refresh}, status=401)


@alone_and_crowded
def test_unlinking_gives_up_what_waits_for_the_lost_phone(http, telegram, bot_api, linked):
    post(http, linked, "secret")
    assert http.post("/api/users/unlink-telegram/", headers=linked, status=204).body == b""
    http.post("/api/users/unlink-telegram/", headers=linked, status=204)
    deliver_all(telegram)
    assert bot_api.sent == [] and list_messages(http, linked)[0]["delivery"] == "failed"
    assert http.get("/api/users/me/", headers=linked).json["telegram_linked"] is False


def test_new_password_ends_every_token_issued_before(http, clock):
    register(http, "alice")
    tokens = http.post_json("/auth/token/", {"username": "alice", "password": PASSWORD}).json
    headers = {"Authorization": "Bearer " + tokens["access"]}
    http.get("/api/users/me/", headers=headers)  # it is remembered now
    link_token(http, headers)

    def change(status, **sent):
        return http.post_json(
            "/api/users/set-password/",
            {"current_password": PASSWORD, "new_password": "An0ther-pass", **sent},
            headers=headers,
            status=status,
        )

    assert change(400, current_password="wrong").json == {"current_password": ["Invalid password."]}
    assert "too short" in change(400, new_password="short").text
    assert change(204).body == b""
    gone = {"detail": "The user's password has been changed.", "code": "password_changed"}
    assert http.get("/api/users/me/", headers=headers, status=401).json == gone
    for path, field in (("refresh", "refresh"), ("verify", "token"), ("blacklist", "refresh")):
        sent = {field: tokens["refresh"]}
        assert http.post_json(f"/auth/token/{path}/", sent, status=401).json == gone
    assert count("link_tokens") == 0
    http.post_json("/auth/token/", {"username": "alice", "password": PASSWORD}, status=401)
    for step in (0, -600, 86_400):  # within the same second, with the clock set back and forth
        clock.seconds += step
        headers = log_in(http, "alice", "An0ther-pass")
        http.get("/api/users/me/", headers=headers)


def test_hash_of_version_1_1_0_is_valid(http):
    register(http, "alice")
    old = factoryapp.hash_with(factoryapp.new_salt(), PASSWORD, 2**5, 8, 3)
    with factoryapp.transaction() as db:
        db.execute("UPDATE users SET password = ?", [old])
    try_password(http, "alice")
    log_in(http, "alice")
    assert factoryapp.connection().one("SELECT password FROM users")[0] == old


def test_account_that_is_erased_while_its_login_is_hashed_is_refused(http, monkeypatch):
    register(http, "alice")
    real = factoryapp.password_matches

    def erase_meanwhile(*arguments):
        factoryapp.erase(factoryapp.find_user_by_name(factoryapp.connection(), "alice"))
        return real(*arguments)

    monkeypatch.setattr(factoryapp, "password_matches", erase_meanwhile)
    try_password(http, "alice", PASSWORD)


def test_waiting_of_an_account_that_is_erased_ends(http, wait):
    waiting = wait(join(http, "alice"))
    factoryapp.erase(factoryapp.find_user_by_name(factoryapp.connection(), "alice"))
    assert waiting.getresponse().status == 401


def test_tokens_of_version_1_1_0_end_at_the_upgrade(http, clock):
    register(http, "alice")
    claims = {
        "iat": int(clock.seconds),
        "exp": int(clock.seconds) + 300,
        "jti": "x",
        "user_id": "1",
    }
    old = {
        kind: jwt.encode({**claims, "token_type": kind}, factoryapp.settings.key, "HS256")
        for kind in ("access", "refresh")
    }
    headers = {"Authorization": "Bearer " + old["access"]}
    http.get("/api/users/me/", headers=headers, status=401)
    http.post_json("/auth/token/verify/", {"token": old["access"]}, status=401)
    http.post_json("/auth/token/refresh/", {"refresh": old["refresh"]}, status=401)


def test_password_change_is_not_overtaken_by_another(http, monkeypatch):
    headers, real = join(http, "alice"), factoryapp.hash_password

    def change_meanwhile(password):
        monkeypatch.setattr(factoryapp, "hash_password", real)
        http.post_json(
            "/api/users/set-password/",
            {"current_password": PASSWORD, "new_password": "The-f1rst-one"},
            headers=headers,
        )
        return real(password)

    monkeypatch.setattr(factoryapp, "hash_password", change_meanwhile)
    http.post_json(
        "/api/users/set-password/",
        {"current_password": PASSWORD, "new_password": "The-sec0nd-one"},
        headers=headers,
        status=401,
    )
    log_in(http, "alice", "The-f1rst-one")


def test_guessing_the_current_password_is_throttled_too(http):
    headers = join(http, "alice")
    for status in [400] * 10 + [429]:
        http.post_json(
            "/api/users/set-password/",
            {"current_password": "wrong", "new_password": "An0ther-pass"},
            headers=headers,
            status=status,
        )


def test_api_key_is_shown_once_and_listed_without(http, clock):
    alice, sent = join(http, "alice"), {"name": "cron", "expires_at": "2027-01-15T12:00:00+03:00"}
    made = http.post_json("/api/users/keys/", sent, headers=alice, status=201).json
    listed = {
        "id": 1,
        "name": "cron",
        "created_at": "2027-01-15T08:00:00.000000Z",
        "expires_at": "2027-01-15T09:00:00.000000Z",
        "last_used_on": None,
    }
    assert re.fullmatch(r"fa_[\w-]{43}", made.pop("key"), re.ASCII)
    assert made == listed and list_keys(http, alice) == [listed]


@alone_and_crowded
def test_api_key_does_what_an_access_token_does(http):
    alice = join(http, "alice")
    cron = make_key(http, alice)
    for method, path, sent, status in (
        ("POST", "/api/messages/", {"text": "hi"}, 201),
        ("GET", "/api/messages/", {}, 200),
        ("GET", "/api/messages/1/", {}, 200),
        ("DELETE", "/api/messages/1/", {}, 409),
        ("GET", "/api/users/", {}, 200),
        ("GET", "/api/users/me/", {}, 200),
        ("GET", "/api/users/keys/", {}, 200),
        ("POST", "/api/users/register/", {"username": "bob", "password": PASSWORD}, 201),
    ):
        body = json.dumps(sent).encode()
        http.request(path, method=method, headers=cron, body=body, content_type=JSON, status=status)
    assert list_messages(http, alice)[0]["sender"] == "alice"


@pytest.mark.parametrize(
    "method, path, sent",
    [
        ("POST", "/api/users/keys/", {"name": "another"}),
        ("DELETE", "/api/users/keys/1/", {}),
        ("DELETE", "/api/users/keys/9/", {}),
        ("GET", "/api/users/get-telegram-token/", {}),
        ("POST", "/api/users/unlink-telegram/", {}),
        (
            "POST",
            "/api/users/set-password/",
            {"current_password": PASSWORD, "new_password": "An0ther-pass"},
        ),
        ("POST", "/api/users/set-password/", {}),
    ],
)
def test_api_key_cannot_do_what_takes_a_login(http, telegram, bot_api, linked, method, path, sent):
    cron, body = make_key(http, linked), json.dumps(sent).encode()
    before = "\n".join(factoryapp.connection().iterdump())
    for status, headers in ((403, cron), (401, {"Authorization": "Bearer fa_x"})):
        refused = http.request(
            path, method=method, headers=headers, body=body, content_type=JSON, status=status
        )
        said = {"detail": "An API key cannot do this: log in."}
        assert (refused.json == said) == (status == 403)
    assert "\n".join(factoryapp.connection().iterdump()) == before


@pytest.mark.parametrize(
    "key",
    [
        "fa_",
        "fa_wrong",
        "fa_" + "a" * 43,
        "{}a",
        "{}=",
        "fa_{}",
        "fa_я",
        "fa_\xff\x80",
        "fa_" + "a" * 9000,
        "FA_" + "a" * 43,
        "%66a_" + "a" * 43,
    ],
    ids=ascii,
)
def test_wrong_api_key_is_answered_as_a_wrong_token(http, key):
    good = make_key(http, join(http, "alice"))["Authorization"].split()[1]
    key, answers = key.format(good).encode(), []
    for token in (b"junk", key, key):
        line = b"Authorization: Bearer %b\r\n\r\n" % token
        answer = talk(http, b"GET /api/users/ HTTP/1.0\r\n" + line)
        answers.append(re.sub(rb"Date: .*", b"", answer))
    assert b'"code":"token_not_valid"' in answers[0] and statuses(answers[0]) == [401]
    assert answers == [answers[0]] * 3


@pytest.mark.parametrize("header", ["Bearer {} x", "Bearer", "Token {}", "{}", "Basic {}"])
def test_header_around_an_api_key_is_read_as_around_a_token(http, header):
    alice = join(http, "alice")
    answers = [
        http.get("/api/users/", headers={"Authorization": header.format(credential)}, status=401)
        for credential in (
            alice["Authorization"].split()[1],
            make_key(http, alice)["Authorization"].split()[1],
        )
    ]
    assert answers[0].json == answers[1].json


def delete_key(http, alice, clock):
    http.delete("/api/users/keys/1/", headers=alice, status=204)


def let_it_expire(http, alice, clock):
    clock.move(0.5)


def change_password(http, alice, clock):
    sent = {"current_password": PASSWORD, "new_password": "An0ther-pass"}
    http.post_json("/api/users/set-password/", sent, headers=alice, status=204)


@pytest.mark.parametrize(
    "end, is_other_alive", [(delete_key, True), (let_it_expire, True), (change_password, False)]
)
def test_api_key_that_has_ended_is_answered_as_a_wrong_one(http, clock, end, is_other_alive):
    alice, bob = join(http, "alice"), join(http, "bob")
    clock.move(0.5)
    cron = make_key(http, alice, expires_at=factoryapp.iso(clock.seconds + 0.5))
    other, of_bob = make_key(http, alice, expires_at="9999-12-31T23:59:59Z"), make_key(http, bob)
    wrong = http.get("/api/users/", headers={"Authorization": "Bearer fa_x"}, status=401).json
    http.get("/api/users/", headers=cron)
    end(http, alice, clock)
    assert http.get("/api/users/", headers=cron, status=401).json == wrong
    http.get("/api/users/", headers=other, status=200 if is_other_alive else 401)
    http.get("/api/users/", headers=of_bob)


def test_password_that_is_not_changed_ends_no_key(http):
    alice = join(http, "alice")
    cron = make_key(http, alice)
    sent = {"current_password": "wrong", "new_password": "An0ther-pass"}
    http.post_json("/api/users/set-password/", sent, headers=alice, status=400)
    http.get("/api/users/", headers=cron)


def test_api_key_is_seen_and_deleted_by_its_owner_alone(http):
    alice, bob = join(http, "alice"), join(http, "bob")
    cron = make_key(http, alice)
    for key_id in ("1", "2", "0", "01x", "9" * 18, "9" * 19, "-1"):
        http.delete(f"/api/users/keys/{key_id}/", headers=bob, status=404)
    assert list_keys(http, bob) == [] and len(list_keys(http, cron)) == 1
    http.delete("/api/users/keys/1/", headers=alice, status=204)
    http.delete("/api/users/keys/1/", headers=alice, status=404)
    assert make_key(http, alice) != cron and list_keys(http, alice)[0]["id"] == 2


@pytest.mark.parametrize(
    "field, value",
    [
        ("name", None),
        ("name", ""),
        ("name", " \n"),
        ("name", "x" * 101),
        ("name", "a\0"),
        ("name", ["a"]),
        ("expires_at", ""),
        ("expires_at", "never"),
        ("expires_at", 1_900_000_000),
        ("expires_at", ["2099-01-01T00:00:00Z"]),
        ("expires_at", "2099-01-01T00:00:00"),
        ("expires_at", "2099-01-01"),
        ("expires_at", "2027-01-15T07:59:59.999999Z"),
        ("expires_at", "2027-01-15T10:59:59+03:00"),
        ("expires_at", "0001-01-01T00:00:00+23:59"),
        ("expires_at", "9999-12-31T23:59:59-00:01"),
        ("expires_at", "10000-01-01T00:00:00Z"),
    ],
)
def test_api_key_of_a_senseless_name_or_end_is_refused(http, clock, field, value):
    headers, sent = join(http, "alice"), {"name": "cron", field: value}
    refused = http.post_json("/api/users/keys/", sent, headers=headers, status=400).json
    assert list(refused) == [field] and count("api_keys") == 0


@pytest.mark.parametrize(
    "body, name, expires_at",
    [
        (b"name=cron", "cron", None),
        (b"name=cron&expires_at=", "cron", None),
        (b"name=cron&expires_at=2099-01-01T03:00:00+03:00", "cron", "2099-01-01T00:00:00.000000Z"),
        (
            b'{"name": "cron", "expires_at": "9999-12-31t23:59z"}',
            "cron",
            "9999-12-31T23:59:00.000000Z",
        ),
        (b'{"name": 5}', "5", None),
        (b"name=" + "я".encode() * 100, "я" * 100, None),
    ],
)
def test_api_key_takes_any_name_and_any_end_to_come(http, clock, body, name, expires_at):
    alice = join(http, "alice")
    status, made = post_body(http, alice, FORM, body, "/api/users/keys/")
    assert (status, made["name"], made["expires_at"]) == (201, name, expires_at)
    http.get("/api/users/", headers={"Authorization": f"Bearer {made['key']}"})


def test_account_has_fifty_api_keys_at_most(http):
    alice, bob = join(http, "alice"), join(http, "bob")
    for _ in range(48):
        make_key(http, alice)
    make, body = ("POST", "/api/users/keys/"), json.dumps({"name": "cron"})
    answers = http.ask(*[(*make, body, {**alice, "Content-Type": JSON})] * 5)
    assert sorted(answer.status for answer in answers) == [201, 201, 400, 400, 400]
    refused = http.post_json("/api/users/keys/", {"name": "cron"}, headers=alice, status=400)
    assert refused.json == {"detail": "There are 50 keys already: delete one first."}
    make_key(http, bob)
    delete_key(http, alice, None)
    make_key(http, alice)


def test_key_that_expires_while_it_is_made_is_answered_as_itself(http, monkeypatch):
    alice = join(http, "alice")
    make_key(http, alice, name="first")
    later, real = time.time() + 1000, factoryapp.now
    monkeypatch.setattr(
        factoryapp,
        "sha256",
        lambda text, of=factoryapp.sha256: (
            (
                monkeypatch.setattr(factoryapp, "now", lambda: later)
                if text.startswith("fa_")
                else None
            )
            or of(text)
        ),
    )
    sent = {"name": "short", "expires_at": factoryapp.iso(real() + 500)}
    made = http.post_json("/api/users/keys/", sent, headers=log_in(http, "alice"), status=201).json
    assert (made["id"], made["name"]) == (2, "short")


def test_expired_keys_do_not_count_and_are_forgotten(http, clock, monkeypatch):
    alice = join(http, "alice")
    for _ in range(50):
        make_key(http, alice, expires_at=factoryapp.iso(clock.seconds + 10))
    make_key(http, join(http, "bob"))
    clock.move(10.1)
    assert make_key(http, alice) and len(list_keys(http, alice)) == 1
    assert count("api_keys") == 52
    forget(0, monkeypatch)
    assert count("api_keys") == 2 and len(list_keys(http, alice)) == 1


def test_account_shows_whether_a_chat_is_linked(http, telegram, bot_api):
    headers = join(http, "alice")
    assert http.get("/api/users/me/", headers=headers).json == {
        "id": 1,
        "username": "alice",
        "telegram_linked": False,
        "telegram": "none",
    }
    link_chat(http, telegram, bot_api, headers, 7)
    account = http.get("/api/users/me/", headers=headers).json
    assert account["telegram_linked"] is True and account["telegram"] == "linked"


def restart_as(monkeypatch, home):
    """Another bot runs from now on, or the same again."""
    monkeypatch.setattr(factoryapp.running, "home", home)
    reopen_turns(home)
    return home


@pytest.mark.parametrize("token", [None, "77:another"])
def test_what_is_sent_to_somebody_linked_elsewhere_waits_for_that_bot_and_counts_for_it_alone(
    http, telegram, bot_api, linked, monkeypatch, token
):
    home = factoryapp.Telegram(token, bot_api.url) if token else factoryapp.Terminal()
    restart_as(monkeypatch, home)
    assert post(http, join(http, "bob"), "hi", recipient="alice")["delivery"] == "queued"
    account = http.get("/api/users/me/", headers=linked).json
    assert (account["telegram_linked"], account["telegram"]) == (False, "elsewhere")
    deliver_all(home)
    assert bot_api.attempts[1:] == [] and http.get("/health/").json["queued"] == 0
    home = restart_as(monkeypatch, factoryapp.Telegram(BOT_TOKEN, bot_api.url))
    assert http.get("/api/users/me/", headers=linked).json["telegram"] == "linked"
    assert http.get("/health/").json["queued"] == 1
    deliver_all(home)
    assert bot_api.texts(7) == ["Сообщение от bob:\n\nhi"]


def test_somebody_linked_elsewhere_can_unlink_that_chat(
    http, telegram, bot_api, linked, monkeypatch
):
    restart_as(monkeypatch, factoryapp.Terminal())
    post(http, linked, "waits")
    http.post("/api/users/unlink-telegram/", headers=linked, status=204)
    assert http.get("/api/users/me/", headers=linked).json["telegram"] == "none"
    assert list_messages(http, linked)[0]["delivery"] == "failed"


@pytest.mark.parametrize("bot", ["terminal", None, "@factory_test_bot"])
def test_link_token_comes_with_the_bot_that_takes_it(http, telegram, bot_api, monkeypatch, bot):
    if bot != telegram.name:
        not_reached = factoryapp.Telegram(BOT_TOKEN, bot_api.url)
        restart_as(monkeypatch, factoryapp.Terminal() if bot else not_reached)
    headers = join(http, "alice")
    answer = http.get("/api/users/get-telegram-token/", headers=headers).json
    assert answer["bot"] == http.get("/health/").json["bot"] == bot
    assert (answer["link"] is not None) == (bot == "@factory_test_bot")


@alone_and_crowded
@pytest.mark.parametrize(
    "sent, status, answer",
    [
        ('{"text": "  \\u043f\\u0440\\u0438\\u0432\\u0435\\u0442\\n"}', 201, "  привет\n"),
        ('{"text": 5}', 201, "5"),
        ('{"text": "5", "extra": [1]}', 201, "5"),
        ('{"text": "   "}', 400, '{"text":["This field may not be blank."]}'),
        ("{}", 400, '{"text":["This field is required."]}'),
        ('{"text": null}', 400, '{"text":["This field may not be null."]}'),
        ('{"text": true}', 400, '{"text":["Not a valid string."]}'),
        ('{"text": "a\\u0000"}', 400, '{"text":["Null characters are not allowed."]}'),
        (
            '{"text": "%s"}' % ("a" * 16_385),
            400,
            '{"text":["Ensure this field has no more than 16384 characters."]}',
        ),
        ('{"text": "a", "recipient": "nobody"}', 400, '{"recipient":["No such user."]}'),
        (
            '{"text": "a", "recipient": 1e999}',
            400,
            '{"detail":"JSON parse error - '
            "Out of range float values are not JSON compliant: '1e999'\"}",
        ),
    ],
)
def test_message_fields(http, sent, status, answer):
    headers = join(http, "alice")
    response = http.post(
        "/api/messages/", sent.encode(), content_type=JSON, headers=headers, status=status
    )
    if status == 201:
        assert response.json["text"] == answer == list_messages(http, headers)[0]["text"]
    else:
        assert response.body.decode() == answer and list_messages(http, headers) == []


@alone_and_crowded
def test_message_has_the_promised_fields(http, clock):
    headers = join(http, "alice")
    message = post(http, headers, "привет")
    assert message == {
        "id": 1,
        "sender": "alice",
        "recipient": "alice",
        "text": "привет",
        "source": "api",
        "created_at": "2027-01-15T08:00:00.000000Z",
        "delivery": "unlinked",
        "failure": None,
        "send_at": None,
        "reply_to": None,
        "choices": None,
    }
    assert list_messages(http, headers) == [message]


@pytest.mark.parametrize(
    "fields, shown",
    [
        ({"send_at": "2027-01-15T09:00:00Z"}, "2027-01-15T09:00:00.000000Z"),
        ({"send_at": "2027-01-15T12:00:00.1234567+03:00"}, "2027-01-15T09:00:00.123456Z"),
        ({"send_at": "2027-01-15T08:00:00Z"}, None),
        ({}, None),
    ],
)
def test_message_shows_when_it_is_to_be_sent_until_long_after(
    http, telegram, clock, linked, fields, shown
):
    headers = log_in(http, "alice")
    message = post(http, headers, "text", **fields)
    assert message["send_at"] == shown
    clock.move(3601)
    deliver_all(telegram)
    [sent] = list_messages(http, log_in(http, "alice"))
    assert sent["send_at"] == shown and sent["delivery"] == "sent"


@alone_and_crowded
@pytest.mark.parametrize("character", ["я", "👍"])
def test_longest_text_is_taken_in_any_encoding(http, character):
    headers, text = join(http, "alice"), character * 16_384
    assert http.post_json("/api/messages/", {"text": text}, headers=headers).json["text"] == text
    raw = json.dumps({"text": text}, ensure_ascii=False).encode()
    assert http.post("/api/messages/", raw, content_type=JSON, headers=headers).json["text"] == text
    form = {"text": text, "recipient": ""}
    assert http.post("/api/messages/", form, headers=headers).json["recipient"] == "alice"


@alone_and_crowded
@pytest.mark.parametrize(
    "field, value",
    [
        ("silent", "maybe"),
        ("silent", 5),
        ("silent", [1]),
        ("silent", {}),
        ("silent", ""),
        ("send_at", "soon"),
        ("send_at", "2027-01-15"),
        ("send_at", "12:00:00Z"),
        ("send_at", "2027-01-15T12:00:00  03:00"),
        ("send_at", 5),
        ("send_at", "2027-01-15T12:00:00"),
        ("send_at", True),
        ("send_at", "9999-12-31T23:59:59Z"),
        ("send_at", "2027-02-14T09:00:01Z"),
        ("send_at", {}),
        ("send_at", ""),
    ],
)
def test_senseless_silent_or_send_at_is_refused(http, clock, field, value):
    headers, sent = join(http, "alice"), {"text": "a", field: value}
    response = http.post_json("/api/messages/", sent, headers=headers, status=400)
    assert list(response.json) == [field]


@alone_and_crowded
@pytest.mark.parametrize(
    "send_at", ["2027-01-15T07:59:59Z", "1970-01-01T00:00Z", "0001-01-01T00:00:00+23:59"]
)
def test_send_at_that_has_passed_means_at_once(http, telegram, bot_api, clock, linked, send_at):
    post(http, log_in(http, "alice"), "late", send_at=send_at)
    deliver_all(telegram)
    assert bot_api.texts(7)[0].endswith("late")


@pytest.mark.parametrize(
    "typed", ["12:00:00+03:00", "12:00+0300", "12:00:00%2B03:00", "09:00:00z", "06:30:00-02:30"]
)
def test_send_at_in_a_form_is_the_time_that_was_typed(http, clock, typed):
    headers = {**join(http, "alice"), "Idempotency-Key": "a-key"}
    first = post(http, headers, "later", send_at="2027-01-15T09:00:00Z")
    form = f"text=later&send_at=2027-01-15T{typed}".encode()
    assert post_body(http, headers, FORM, form) == (201, first)
    assert post_body(http, headers, FORM, form.replace(b"15T", b"16T"))[0] == 422


@alone_and_crowded
def test_answer_goes_to_the_other_person_unless_somebody_is_named(http):
    alice, bob, carol = join(http, "alice"), join(http, "bob"), join(http, "carol")
    post(http, alice, "вопрос", recipient="bob")
    post(http, bob, "ответ", reply_to=1)
    post(http, alice, "к своему", reply_to="1")
    post(http, bob, "третьей", reply_to=2, recipient="carol")
    post(http, carol, "себе", recipient="carol", reply_to=4)
    post(http, carol, "себе", reply_to=5)
    http.post("/api/messages/", {"text": "form", "reply_to": "4", "recipient": ""}, headers=carol)
    assert links(http, bob) == [
        ("alice", "bob", "вопрос", None),
        ("bob", "alice", "ответ", 1),
        ("alice", "bob", "к своему", 1),
        ("bob", "carol", "третьей", 2),
        ("carol", "bob", "form", 4),
    ]
    assert [row[3] for row in links(http, carol)] == [2, 4, 5, 4]


OPTIONAL = ["recipient", "silent", "send_at", "reply_to", "choices"]


def test_optional_field_that_is_null_is_not_given(http):
    headers = join(http, "alice")
    sent = {"text": "a", **dict.fromkeys(OPTIONAL)}
    message = http.post_json("/api/messages/", sent, headers=headers, status=201).json
    assert (message["recipient"], message["choices"]) == ("alice", None)
    assert make_key(http, headers, expires_at=None) and list_keys(http, headers)
    for path, name in (("/api/messages/", "text"), ("/api/users/keys/", "name")):
        answer = http.post_json(path, {name: None}, headers=headers, status=400)
        assert answer.json == {name: ["This field may not be null."]}


def test_integer_may_be_written_as_a_float(http):
    headers = join(http, "alice")
    post(http, headers, "one")
    body = b'{"text": "x", "reply_to": 10e-1}'
    assert (
        http.post("/api/messages/", body, content_type=JSON, headers=headers).json["reply_to"] == 1
    )
    for n in (1.0, "1.", "1.00"):
        assert post(http, headers, "x", reply_to=n)["reply_to"] == 1
    assert [
        m["id"] for m in http.get("/api/messages/?limit=2.0&after=1.", headers=headers).json
    ] == [2, 3]


def test_blank_in_a_forms_username_is_told_to_be_sent_as_2b(http):
    def refuse(**sent):
        said = http.post("/api/users/register/", {"password": PASSWORD, **sent}, status=400)
        return said.json["username"]

    assert "%2B" in refuse(username="ivan ci@x.org")[-1]
    assert len(refuse(username="ivan!")) == 1
    sent = {"username": "ivan ci@x.org", "password": PASSWORD}
    assert len(http.post_json("/api/users/register/", sent, status=400).json["username"]) == 1
    body = b"username=ivan%2Bci@x.org&password=" + PASSWORD.encode()
    assert http.post("/api/users/register/", body).json["username"] == "ivan+ci@x.org"


NO_INTEGER = "A valid integer is required."


NO_MESSAGES = [
    (1, "No such message."),
    (99, "No such message."),
    (2**63 - 1, "No such message."),
    (2**63, "Ensure this value is less than or equal to 9223372036854775807."),
    (0, "Ensure this value is greater than or equal to 1."),
    (-1, "Ensure this value is greater than or equal to 1."),
    ("9" * 5000, NO_INTEGER),
    ("", NO_INTEGER),
    ("1 ", NO_INTEGER),
    (1.5, NO_INTEGER),
    (1e20, NO_INTEGER),
    ("1.0.0", NO_INTEGER),
    ("1e2", NO_INTEGER),
    (True, NO_INTEGER),
    ([1], NO_INTEGER),
    ({}, NO_INTEGER),
]


def test_answer_to_what_is_no_message_of_theirs_is_refused(http):
    alice, carol = join(http, "alice"), join(http, "carol")
    post(http, alice, "ей самой")
    for reply_to, sentence in NO_MESSAGES:
        sent = {"text": "x", "reply_to": reply_to, "recipient": "alice"}
        response = http.post_json("/api/messages/", sent, headers=carol, status=400)
        assert response.json == {"reply_to": [sentence]}, reply_to
    assert list_messages(http, carol) == []


@pytest.mark.parametrize(
    "choices, shown",
    [
        (["Да", "Нет"], ["Да", "Нет"]),
        ([" Да\n", 5, 1.5, '"\\'], ["Да", "5", "1.5", '"\\']),
        (["👍" * 64, "б" * 64, *"abcdef"], ["👍" * 64, "б" * 64, *"abcdef"]),
        (["да", "Да"], ["да", "Да"]),
    ],
)
def test_question_shows_its_choices(http, choices, shown):
    alice, bob = join(http, "alice"), join(http, "bob")
    assert post(http, alice, "?", recipient="bob", choices=choices)["choices"] == shown
    assert list_messages(http, bob)[0]["choices"] == shown
    assert http.get("/api/messages/1/", headers=bob).json["choices"] == shown


NOT_2_TO_8 = "Give 2 to 8 different items."


SENSELESS_CHOICES = [
    ([], NOT_2_TO_8),
    (["Да"], NOT_2_TO_8),
    ([*"abcdefghi"], NOT_2_TO_8),
    (["a"] * 5000, NOT_2_TO_8),
    (["a", "a"], NOT_2_TO_8),
    (["a", "b", " a "], NOT_2_TO_8),
    ([1, "1"], NOT_2_TO_8),
    (["a", "б" * 65], "Ensure this field has no more than 64 characters."),
    (["a", ""], "This field may not be blank."),
    (["a", " \u2028"], "This field may not be blank."),
    (["a", None], "Not a valid string."),
    (["a", True], "Not a valid string."),
    (["a", ["b"]], "Not a valid string."),
    (["a", {}], "Not a valid string."),
    (["a", "b\0"], "Null characters are not allowed."),
    ("ab", "Expected a list of items."),
    ({"a": "b", "c": "d"}, "Expected a list of items."),
    (5, "Expected a list of items."),
    *[
        (["Нет", unseen], "This field may not be blank.")
        for unseen in (
            "\u202e",
            "\u200b",
            " \u2060\ufeff",
            "\u3164",
            "\u2800 \xad",
            "\u202e\u030a",
            "\x07",
        )
    ],
]


def test_senseless_choices_are_refused(http):
    headers = join(http, "alice")
    for choices, sentence in SENSELESS_CHOICES:
        sent = {"text": "a", "choices": choices}
        response = http.post_json("/api/messages/", sent, headers=headers, status=400)
        assert response.json == {"choices": [sentence]}, choices
    assert list_messages(http, headers) == []


@pytest.mark.parametrize("field", ["choices", "recipient"])
def test_list_that_is_too_long_is_refused_without_reading_it(http, monkeypatch, field):
    headers = join(http, "alice")
    reads = note_threads(monkeypatch, factoryapp.Text, "read")
    http.post_json(
        "/api/messages/", {"text": "a", field: [1] * 60_000}, headers=headers, status=400
    )
    assert len(reads) <= 1 + 2 * factoryapp.MAX_RECIPIENTS and list_messages(http, headers) == []


@alone_and_crowded
def test_same_key_and_body_is_answered_the_same_and_stored_once(http, clock):
    alice, bob = join(http, "alice"), join(http, "bob")
    key = {"Idempotency-Key": "a-key"}
    first = http.post_json("/api/messages/", {"text": "one"}, headers={**alice, **key}, status=201)
    clock.move(10)
    again = http.post("/api/messages/", {"text": "one"}, headers={**alice, **key}, status=201)
    assert again.json == first.json and again.headers["Idempotency-Replayed"] == "true"
    assert "Idempotency-Replayed" not in first.headers
    for other in (
        {"text": "two"},
        {"text": "one", "recipient": "bob"},
        {"text": "one", "silent": True},
        {"text": "one", "send_at": "2027-01-15T12:00:00Z"},
        {"text": "one", "choices": ["a", "b"]},
        {"text": "one", "reply_to": 1},
    ):
        refused = http.post_json("/api/messages/", other, headers={**alice, **key}, status=422)
        assert "another message" in refused.json["detail"]
    http.post_json("/api/messages/", {"text": "one"}, headers={**bob, **key}, status=201)
    assert [m["text"] for m in list_messages(http, alice)] == ["one"]
    clock.move(24 * 3600)
    http.post_json(
        "/api/messages/", {"text": "two"}, headers={**log_in(http, "alice"), **key}, status=201
    )


@alone_and_crowded
def test_refused_request_does_not_use_up_its_key(http):
    headers = {**join(http, "alice"), "Idempotency-Key": "a-key"}
    http.post_json("/api/messages/", {"text": "a", "recipient": "bob"}, headers=headers, status=400)
    register(http, "bob")
    http.post_json("/api/messages/", {"text": "a", "recipient": "bob"}, headers=headers, status=201)


@alone_and_crowded
@pytest.mark.parametrize("key", ["", "a b", "ключ".encode().decode("latin-1"), "\xe9", "x" * 256])
def test_senseless_idempotency_key_is_refused(http, key):
    headers = {**join(http, "alice"), "Idempotency-Key": key}
    refused = http.post_json("/api/messages/", {"text": "a"}, headers=headers, status=400)
    assert list(refused.json) == ["Idempotency-Key"]


@pytest.mark.parametrize(
    "recipient, names",
    [
        (["bob", "alice"], ["bob", "alice"]),
        (["alice", "carol", "bob"], ["alice", "carol", "bob"]),
        (["bob"], ["bob"]),
        (["BoB", "bob", "CAROL"], ["bob", "carol"]),
        (["carol", " bob ", "ｂｏｂ", "carol", "bob"], ["carol", "bob"]),
        ([f"user{n}" for n in range(20)], [f"user{n}" for n in range(20)]),
        (["user1"] * 30 + ["bob"], ["user1", "bob"]),
        ([5], ["5"]),
    ],
    ids=range(8),
)
def test_message_to_several_is_one_to_each_in_their_order(http, recipient, names):
    alice = join(http, "alice")
    for name in ("bob", "carol", "5", *(f"user{n}" for n in range(20))):
        factoryapp.add_user(factoryapp.connection(), name, "a hash")
    sent = post(http, alice, "hi", recipient=recipient)
    assert [(m["id"], m["recipient"], m["text"]) for m in sent] == [
        (n, name, "hi") for n, name in enumerate(names, 1)
    ]
    assert list_messages(http, alice) == sent


def test_recipient_is_found_in_any_case_and_by_the_very_name_first(http):
    alice = join(http, "alice")
    for name in ("Bob", "ÆGIR", "STRASSE"):
        register(http, name)
    # As accounts of before names were unique whatever their case.
    factoryapp.connection().execute(
        "INSERT INTO users (username, password, created_at, folded) VALUES ('BOB', '', '', 'bob 5')"
    )
    found = [
        post(http, alice, "hi", recipient=name)["recipient"]
        for name in ("Bob", "bOB", "BOB", "ægir", "straße", "ALICE")
    ]
    assert found == ["Bob", "Bob", "BOB", "ÆGIR", "STRASSE", "alice"]
    http.post_json("/auth/token/", {"username": "bob", "password": PASSWORD}, status=401)


@pytest.mark.parametrize(
    "recipient, sentence",
    [
        (["bob", "nobody", "alice", "no one"], "No such user: nobody, no one."),
        (["nobody"], "No such user: nobody."),
        (["bob"] + [f"user{n}" for n in range(20)], "Give 1 to 20 different items."),
        ([], "Give 1 to 20 different items."),
        (["bob", None], "Not a valid string."),
        (["bob", ["alice"]], "Not a valid string."),
        (["bob", True], "Not a valid string."),
        ({"bob": 1}, "Not a valid string."),
        (["bob", " "], "This field may not be blank."),
        (["bob", "a\0"], "Null characters are not allowed."),
        (["bob", "\ud800"], "Surrogate characters are not allowed: U+D800."),
    ],
    ids=range(11),
)
def test_message_to_several_of_whom_one_is_wrong_goes_to_nobody(http, recipient, sentence):
    headers, sent = join(http, "alice"), {"text": "hi", "recipient": recipient}
    join(http, "bob")
    refused = http.post_json("/api/messages/", sent, headers=headers, status=400).json
    assert refused == {"recipient": [sentence]} and list_messages(http, headers) == []


def test_message_to_several_that_fails_half_way_goes_to_nobody(http, monkeypatch):
    headers, relay = join(http, "alice"), iter([factoryapp.relay])
    register(http, "bob")
    monkeypatch.setattr(factoryapp, "relay", lambda *args: next(relay)(*args))
    sent = {"text": "hi", "recipient": ["bob", "alice"]}
    http.post_json("/api/messages/", sent, headers=headers, status=500)
    assert list_messages(http, headers) == []


def test_copies_of_a_message_to_several_reach_their_chats(http, telegram, bot_api, clock, pair):
    register(http, "carol")
    sent = post(http, pair[0], "hi", recipient=["bob", "carol", "alice"])
    assert [m["delivery"] for m in sent] == ["queued", "unlinked", "queued"]
    for _ in range(4):
        deliver_all(telegram)
        clock.move(1)
    assert bot_api.texts(8) == ["Сообщение от alice:\n\nhi"]
    assert bot_api.texts(7) == [
        "alice, я получил от тебя сообщение для bob:\n\nhi",
        "alice, я получил от тебя сообщение для carol:\n\nhi",
        "alice, я получил от тебя сообщение:\n\nhi",
    ]


@pytest.mark.parametrize("recipient", [["bob", "alice"], ["bob"], "bob"])
def test_message_to_several_is_replayed_whole_whatever_became_of_it(http, clock, pair, recipient):
    alice = {**log_in(http, "alice"), "Idempotency-Key": "a-key"}
    sent = {"text": "hi", "recipient": recipient}
    first = http.post_json("/api/messages/", sent, headers=alice, status=201)
    stored = len(list_messages(http, alice))
    assert cancel(http, alice, stored) == 200
    again = http.post_json("/api/messages/", sent, headers=alice, status=201)
    assert again.json == first.json and again.headers["Idempotency-Replayed"] == "true"
    for other in (["alice", "bob"], ["alice"], "alice", ["bob", "carol"]):
        http.post_json("/api/messages/", {**sent, "recipient": other}, headers=alice, status=422)
    assert len(list_messages(http, alice)) == stored == len(first.json if stored > 1 else "1")


def test_message_to_several_that_is_posted_at_once_with_one_key_is_stored_once(http):
    headers = {**join(http, "alice"), "Idempotency-Key": "a-key", "Content-Type": JSON}
    register(http, "bob")
    body = json.dumps({"text": "hi", "recipient": ["bob", "alice"]})
    answers = http.ask(*[("POST", "/api/messages/", body, headers)] * 5)
    assert {answer.status for answer in answers} == {201}
    assert [m["id"] for m in list_messages(http, headers)] == [1, 2]


@alone_and_crowded
def test_list_has_what_one_sent_and_received_oldest_first(http):
    alice, bob, carol = join(http, "alice"), join(http, "bob"), join(http, "carol")
    post(http, alice, "to bob", recipient="bob")
    post(http, bob, "to myself")
    post(http, carol, "to alice", recipient=" alice ")
    post(http, bob, "back", recipient="alice")

    def texts(headers):
        return [(m["sender"], m["recipient"], m["text"]) for m in list_messages(http, headers)]

    assert texts(alice) == [
        ("alice", "bob", "to bob"),
        ("carol", "alice", "to alice"),
        ("bob", "alice", "back"),
    ]
    assert texts(bob) == [
        ("alice", "bob", "to bob"),
        ("bob", "bob", "to myself"),
        ("bob", "alice", "back"),
    ]
    assert texts(carol) == [("carol", "alice", "to alice")]


@alone_and_crowded
def test_long_lists_are_whole(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LIST_ROWS", 7)
    headers = join(http, "alice")
    for n in range(6):
        join(http, f"user{n}")
    for n in range(21):
        post(http, headers, str(n), **({"recipient": "user1"} if n % 3 else {}))
        assert [m["text"] for m in list_messages(http, headers)] == [str(i) for i in range(n + 1)]
    assert [u["id"] for u in http.get("/api/users/", headers=headers).json] == [1, 2, 3, 4, 5, 6, 7]


def follow_pages(http, headers, url):
    """The ids on each page, following the Link headers."""
    while url:
        response = http.get(url, headers=headers)
        yield [row["id"] for row in response.json]
        link = response.headers.get("Link")
        url = link and urljoin(url, re.fullmatch('<([?][^>]+)>; rel="next"', link)[1])


def test_cursor_from_before_a_restore_is_refused_and_one_that_was_given_is_not(http):
    headers = join(http, "alice")
    post(http, headers, "one")
    later = factoryapp.iso(time.time() + 3600)
    cancel(http, headers, post(http, headers, "2", send_at=later)["id"])
    for path, last in (("/api/messages/", 2), ("/api/users/", 1)):
        for after in (last + 1, 2**63 - 1):
            for query in ("", "&limit=1", "&wait=50", "&delivery=sent", "&reply_to=1"):
                if "=" in query and path == "/api/users/":
                    continue
                answer = http.get(f"{path}?after={after}{query}", headers=headers, status=400)
                assert "restored" in answer.json["after"][0]
        assert http.get(f"{path}?after={last}", headers=headers).json == []
    assert http.get("/api/messages/?after=1&before=1", headers=headers).json == []
    known = {**headers, "If-None-Match": "*"}
    http.get("/api/messages/?after=9", headers=known, status=304)


@alone_and_crowded
@pytest.mark.parametrize("page_rows", [2, 200])
@pytest.mark.parametrize(
    "path, ids", [("/api/messages/", [1, 3, 5, 7, 9, 11, 13]), ("/api/users/", range(1, 8))]
)
def test_pages_are_followed_by_their_links(http, monkeypatch, path, ids, page_rows):
    monkeypatch.setattr(factoryapp, "LIST_ROWS", page_rows)
    headers, bob = join(http, "alice"), join(http, "bob")
    for n in range(7):
        post(http, headers, str(n), **({"recipient": "bob"} if n % 2 else {}))
        post(http, bob, "not alice's")
    for n in range(5):
        register(http, f"user{n}")
    a, b, c, d, e, f, g = ids
    last = factoryapp.MAX_ID

    def pages(query):
        return list(follow_pages(http, headers, path + query))

    assert pages("?limit=3") == pages("?after=0&limit=3") == [[a, b, c], [d, e, f], [g]]
    assert pages(f"?after={c}&limit=2") == [[d, e], [f, g]]
    assert pages(f"?before={f}&limit=2") == [[d, e], [b, c], [a]]
    assert pages(f"?before={last}&limit=7") == pages("?limit=1000") == [[a, b, c, d, e, f, g]]
    assert pages(f"?after={a}&before={g}&limit=2") == [[b, c], [d, e], [f]]
    assert pages(f"?after={b}&before={d}") == [[c]]
    assert pages(f"?after={e}") == [[f, g]]
    assert pages(f"?before={c}") == [[a, b]]
    assert pages(f"?after={g}&limit=2") == pages("?before=0&limit=2") == [[]]
    assert pages(f"?after={g}&before={last}") == [[]]


@alone_and_crowded
@pytest.mark.parametrize(
    "query, field, sentence",
    [
        ("limit=0", "limit", "Ensure this value is greater than or equal to 1."),
        ("limit=1001", "limit", "Ensure this value is less than or equal to 1000."),
        ("limit=ten", "limit", "A valid integer is required."),
        ("limit=", "limit", "A valid integer is required."),
        ("after=-1", "after", "Ensure this value is greater than or equal to 0."),
        (
            f"before={2**63}",
            "before",
            "Ensure this value is less than or equal to 9223372036854775807.",
        ),
        ("after=%D9%A1", "after", "A valid integer is required."),
        ("after=" + "9" * 5000, "after", "A valid integer is required."),
    ],
)
def test_senseless_page_is_refused(http, query, field, sentence):
    headers = join(http, "alice")
    for path in ("/api/messages/?", "/api/users/?"):
        assert http.get(path + query, headers=headers, status=400).json == {field: [sentence]}


@pytest.mark.parametrize("value", ["-1", "51", "0.5", "", "1s"])
@pytest.mark.parametrize("path", ["/api/messages/", "/api/messages/1/"])
def test_senseless_wait_is_refused(http, path, value):
    answer = http.get(f"{path}?wait={value}", headers=join(http, "alice"), status=400)
    assert list(answer.json) == ["wait"]


@pytest.fixture
def one_of_each(http, telegram, bot_api, pair):
    """Alice and Bob, and Carol without a chat. A message in each state, each way and to oneself."""
    later = factoryapp.iso(factoryapp.now() + 3600)
    alice, bob = pair
    register(http, "carol")
    talks = (alice, "bob", 8), (bob, "alice", 7), (alice, "alice", 7)
    for sender, recipient, chat_id in talks:
        post(http, sender, "sent", recipient=recipient)
        deliver_all(telegram)
        bot_api.failures[chat_id].append(TOO_LONG)
        post(http, sender, "failed", recipient=recipient)
        deliver_all(telegram)
        deliver_all(telegram)
    for sender, recipient, _ in talks:
        post(http, sender, "queued", recipient=recipient)
        cancelled = post(http, sender, "cancelled", recipient=recipient)
        cancel(http, sender, cancelled["id"])
        post(http, sender, "unlinked", recipient="carol")
        post(http, sender, "scheduled", recipient=recipient, send_at=later)
    return pair


def test_list_is_of_one_delivery_where_that_is_asked_for(http, one_of_each):
    for headers in one_of_each:
        messages = list_messages(http, headers) + list_scheduled(http, headers)
        assert all(message["text"] == message["delivery"] for message in messages)
        for delivery in factoryapp.DELIVERIES:
            url = f"/api/messages/?delivery={delivery}"
            ids = [message["id"] for message in messages if message["text"] == delivery]
            assert [message["id"] for message in http.get(url, headers=headers).json] == ids
            assert list(follow_pages(http, headers, f"{url}&limit=1")) == [[n] for n in ids]
            before = follow_pages(http, headers, f"{url}&limit=1&before={factoryapp.MAX_ID}")
            assert list(before) == [[n] for n in reversed(ids)] and len(ids) >= 1


def test_list_is_of_one_conversation_where_that_is_asked_for(http, one_of_each):
    shown = 0
    for me, headers in zip(("alice", "bob"), one_of_each, strict=True):
        for delivery, other in itertools.product(
            ["", *factoryapp.DELIVERIES], ["AlicE", "ｂｏｂ", "CAROL"]
        ):
            name, query = factoryapp.fold(other), f"delivery={delivery}&" if delivery else ""
            ids = [
                message["id"]
                for message in http.get(f"/api/messages/?{query}", headers=headers).json
                if sorted([message["sender"], message["recipient"]]) == sorted([me, name])
            ]
            url = f"/api/messages/?{query}with={quote(other)}"
            assert [message["id"] for message in http.get(url, headers=headers).json] == ids
            pages = [[n] for n in ids] or [[]]
            assert list(follow_pages(http, headers, f"{url}&limit=1")) == pages
            before = follow_pages(http, headers, f"{url}&limit=1&before={factoryapp.MAX_ID}")
            assert list(before) == pages[::-1]
            shown += bool(ids)
    assert shown > 20


@alone_and_crowded
@pytest.mark.parametrize(
    "name, sentence",
    [("", "may not be blank"), ("nobody", "No such user"), ("a%00", "Null"), ("%FF", "No such")],
)
def test_conversation_with_nobody_is_refused(http, name, sentence):
    headers = join(http, "alice")
    answer = http.get(f"/api/messages/?with={name}", headers=headers, status=400)
    assert sentence in answer.json["with"][0]


def test_list_is_of_the_answers_to_one_message_where_that_is_asked_for(http):
    alice, bob, carol = join(http, "alice"), join(http, "bob"), join(http, "carol")
    post(http, alice, "вопрос", recipient="bob")
    post(http, alice, "себе")
    post(http, bob, "один", reply_to=1)
    post(http, alice, "о том же", reply_to=1, recipient="carol")
    post(http, bob, "два", reply_to=1)
    post(http, alice, "себе", reply_to=2)

    def answers(headers, query):
        messages = http.get(f"/api/messages/?reply_to={query}", headers=headers).json
        return [message["id"] for message in messages]

    assert [answers(alice, n) for n in (1, 2, 3, 2**63 - 1)] == [[3, 4, 5], [6], [], []]
    assert [answers(carol, n) for n in (1, 2)] == [[4], []]
    assert answers(bob, "1&delivery=unlinked") == [3, 5] and answers(bob, "1&delivery=sent") == []
    assert answers(alice, "1&after=3") == [4, 5]
    talks = [answers(alice, f"1&with={name}") for name in ("bob", "carol", "alice")]
    assert talks == [[3, 5], [4], []] and answers(alice, "2&with=Alice") == [6]
    pages = follow_pages(http, alice, "/api/messages/?reply_to=1&limit=2")
    assert list(pages) == [[3, 4], [5]]
    for query in ("0", "", "x", str(2**63)):
        answer = http.get(f"/api/messages/?reply_to={query}", headers=alice, status=400)
        assert list(answer.json) == ["reply_to"]


@pytest.mark.parametrize("delivery", ["", "FAILED", "failed,sent", "failed%0A"])
def test_senseless_delivery_is_refused(http, delivery):
    answer = http.get(
        f"/api/messages/?delivery={delivery}", headers=join(http, "alice"), status=400
    )
    assert list(answer.json) == ["delivery"]


@alone_and_crowded
def test_one_message_is_shown_to_its_sender_and_recipient_alone(http):
    alice, bob, carol = join(http, "alice"), join(http, "bob"), join(http, "carol")
    message = post(http, alice, "привет", recipient="bob")
    for headers in (alice, bob):
        for path in ("/api/messages/1/", "/api/messages/1"):
            assert http.get(path, headers=headers).json == message
    for path in ("1", "2", "0", str(2**63), "9" * 5000, "-1", "x", "1e3", "%00", "1/2"):
        answer = http.get(f"/api/messages/{path}/", headers=carol, status=404)
        assert answer.body == b'{"detail":"Not found."}'
    http.get("/api/messages/1/", status=401)
    answer = http.put("/api/messages/1/", headers=alice, status=405)
    assert answer.headers["Allow"] == "DELETE, GET, HEAD, OPTIONS"


def test_nothing_of_a_message_is_sent_between_its_cancelling_and_the_commit(
    http, telegram, bot_api, pair, monkeypatch
):
    real = factoryapp.commit

    def send_first(db):
        sender = threading.Thread(target=deliver_next, args=(telegram,))
        sender.start()
        sender.join(0.2)
        real(db)

    post(http, pair[0], "text", recipient="bob")
    monkeypatch.setattr(factoryapp, "commit", send_first)
    assert cancel(http, pair[0]) == 200
    monkeypatch.setattr(factoryapp, "commit", real)
    deliver_all(telegram)
    assert bot_api.sent == []


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize(
    "recipient, fields, failures",
    [("bob", {}, [RETRY_AFTER_9]), ("alice", {}, [RETRY_AFTER_9])],
    ids=["told to wait", "to oneself"],
)
def test_nothing_of_a_cancelled_message_is_ever_sent(
    http, telegram, bot_api, clock, pair, recipient, fields, failures, is_restarted
):
    text = "слово " * 2000
    alice, bob = log_in(http, "alice"), log_in(http, "bob")
    bot_api.failures[7].extend(failures)
    bot_api.failures[8].extend(failures)
    key = {"Idempotency-Key": "a-key"}
    first = post(http, {**alice, **key}, text, recipient=recipient, **fields)
    deliver_all(telegram)
    if is_restarted:
        reopen_turns(telegram)
    answer = http.delete(f"/api/messages/{first['id']}/", headers=alice).json
    assert answer == {**first, "delivery": "cancelled"}
    assert post(http, {**alice, **key}, text, recipient=recipient, **fields) == first
    post(http, alice, "next", recipient=recipient)
    clock.move(100)
    deliver_all(telegram)
    assert {sent[-4:] for _, sent in bot_api.sent} == {"next"}
    assert list_messages(http, alice if recipient == "alice" else bob)[0] == answer
    assert http.get("/health/").json["queued"] == 0


def test_message_that_is_queued_no_more_cannot_be_cancelled(http, one_of_each):
    alice, _ = one_of_each
    mine = [m for m in list_messages(http, alice) if m["sender"] == "alice"]
    statuses = {(m["delivery"], cancel(http, alice, m["id"])) for m in mine}
    assert statuses == {
        ("queued", 200),
        ("sent", 409),
        ("failed", 409),
        ("unlinked", 409),
        ("cancelled", 409),
    }
    again = http.delete(f"/api/messages/{mine[0]['id']}/", headers=alice, status=409).json
    assert "can be cancelled" in again["detail"]


def test_message_is_cancelled_by_its_sender_alone(http, clock, pair):
    alice, bob, carol = log_in(http, "alice"), log_in(http, "bob"), join(http, "carol")
    message = post(http, alice, "text", recipient="bob")
    assert cancel(http, bob) == 403
    for path in ("1", "2", "0", str(2**63), "9" * 19, "9" * 20, "-1", "x"):
        assert cancel(http, carol, path) == 404
    assert cancel(http, {}) == 401
    assert list_messages(http, bob) == [message]


def test_message_is_cancelled_once_though_it_is_asked_twice_at_once(http, pair):
    post(http, pair[0], "text", recipient="bob")
    ask = "DELETE", "/api/messages/1/", None, pair[0]
    assert sorted(answer.status for answer in http.ask(ask, ask, ask)) == [200, 409, 409]


def test_message_of_which_a_part_was_sent_cannot_be_cancelled(http, telegram, bot_api, pair):
    alice, _ = pair
    bot_api.failures[8].extend([None, RETRY_AFTER_9])
    post(http, alice, "слово " * 2000, recipient="bob")
    deliver_all(telegram)
    reopen_turns(telegram)
    assert len(bot_api.texts(8)) == 1 and cancel(http, alice) == 409
    assert list_messages(http, alice)[0]["delivery"] == "queued"


def test_message_on_its_way_to_its_recipient_cannot_be_cancelled(http, telegram, bot_api, pair):
    alice, bob = pair
    statuses = []
    during_send(bot_api, 8, lambda: statuses.append(cancel(http, alice)))
    post(http, alice, "слово " * 2000, recipient="bob")
    deliver_all(telegram)
    assert statuses == [409] * 3 and len(bot_api.texts(8)) == 3
    assert list_messages(http, bob)[0]["delivery"] == "sent"


@pytest.mark.parametrize(
    "text, failures",
    [("text", []), ("слово " * 2000, []), ("text", [TOO_LONG]), ("text", [BLOCKED])],
)
def test_message_is_cancelled_while_its_own_copy_is_in_flight_and_no_other_is_lost_by_that(
    http, telegram, bot_api, clock, pair, text, failures
):
    alice = log_in(http, "alice")
    statuses = []

    def cancel_and_post():
        if not statuses:
            statuses.append(cancel(http, alice))
            post(http, alice, "next", recipient="bob")
            if failures:
                raise Refused(failures[0])

    bot_api.failures[8].append(RETRY_AFTER_9)
    during_send(bot_api, 7, cancel_and_post)
    post(http, alice, text, recipient="bob")
    deliver_all(telegram)
    clock.move(100)
    deliver_all(telegram)
    assert statuses == [200] and [sent[-4:] for sent in bot_api.texts(8)] == ["next"]
    assert len(bot_api.texts(7)) == (failures == []) + (failures != [BLOCKED])
    deliveries = [m["delivery"] for m in list_messages(http, log_in(http, "alice"))]
    assert deliveries == ["cancelled", "sent"]


@pytest.mark.parametrize(
    "chat_id, status, sent", [(7, 200, [7]), (8, 409, [7, 8])], ids=["own copy", "copy"]
)
def test_cancelling_waits_for_a_sender_that_is_about_to_send(
    http, telegram, bot_api, monkeypatch, pair, chat_id, status, sent
):
    real, statuses, cancelling = factoryapp.find_head, [], []

    def find_head(db, bot_id, chat):
        head = real(db, bot_id, chat)
        if chat == chat_id and not cancelling:
            cancelling.append(
                factoryapp.start_thread(
                    "cancelling", lambda: statuses.append(cancel(http, pair[0]))
                )
            )
            cancelling[0].join(0.2)
            assert statuses == []
        return head

    monkeypatch.setattr(factoryapp, "find_head", find_head)
    during_send(bot_api, chat_id, lambda: cancelling[0].join(5))
    post(http, pair[0], "text", recipient="bob")
    deliver_all(telegram)
    assert statuses == [status] and sorted(chat for chat, _ in bot_api.sent) == sent


def test_health_tells_the_bot_and_the_queue(http, telegram, bot_api, clock, linked):
    headers = log_in(http, "alice")
    health = http.get("/health/").json
    assert (health["queued"], health["oldest_queued_seconds"]) == (0, 0)
    post(http, headers, "a")
    post(http, headers, "later", send_at=factoryapp.iso(clock.seconds + 60))
    clock.move(12.5)
    assert http.get("/health").json == {
        "status": "ok",
        "version": factoryapp.VERSION,
        "bot": "@factory_test_bot",
        "bot_reachable": True,
        "bot_error": None,
        "bot_answered_at": None,
        "queued": 1,
        "oldest_queued_seconds": 12.5,
    }


NOTHING_NEW = {"ok": True, "result": []}


@pytest.mark.parametrize("method, bot", [("getMe", None), ("getUpdates", "@factory_test_bot")])
@pytest.mark.parametrize(
    "failure, status, words",
    [
        (UNAUTHORIZED, "degraded", "Telegram refuses TELEGRAM_BOT_TOKEN (401 Unauthorized)"),
        (NOT_FOUND, "degraded", "Telegram refuses TELEGRAM_BOT_TOKEN (404 Not Found)"),
        (ANOTHER_POLLS, "degraded", "another process polls this bot"),
        ({"error_code": 500, "description": f"at {BOT_TOKEN}"}, "ok", "500 at 4242:…"),
        (RETRY_AFTER_9, "ok", "429 Too Many Requests"),
        (b"<html>", "ok", "Telegram answered 502, which makes no sense"),
        ("reset", "ok", "cannot be reached at 127.0.0.1: Connection reset"),
    ],
)
def test_health_says_what_is_wrong_with_the_bot_until_it_is_well(
    http, bot_api, telegram, clock, monkeypatch, method, bot, failure, status, words
):
    home = restart_as(monkeypatch, factoryapp.Telegram(BOT_TOKEN, bot_api.url))
    bot_api.failures[method].append(failure)
    home.run(StopAtPause())
    health = http.get("/health/").json
    assert (health["status"], health["bot"], health["bot_reachable"]) == (status, bot, False)
    assert words in health["bot_error"]
    clock.move(61)
    assert http.get("/health/").json["status"] == "degraded"
    bot_api.failures["getUpdates"].append(NOTHING_NEW)
    home.run(StopAtPause())
    assert http.get("/health/").json == {
        **health,
        "status": "ok",
        "bot": "@factory_test_bot",
        "bot_reachable": True,
        "bot_error": None,
        "bot_answered_at": factoryapp.iso(clock.seconds),
    }


def test_bot_that_another_process_polls_is_not_well_between_two_refusals(http, telegram, bot_api):
    bot_api.failures["getUpdates"].extend([ANOTHER_POLLS, NOTHING_NEW] * 2)
    telegram.run(StopAtPause(4))
    assert http.get("/health/").json["status"] == "degraded"
    bot_api.failures["getUpdates"].append(NOTHING_NEW)
    telegram.run(StopAtPause())
    assert http.get("/health/").json["status"] == "ok"


def test_token_that_is_taken_again_is_well_after_one_call(http, telegram, bot_api):
    bot_api.failures["getUpdates"].extend([UNAUTHORIZED, NOTHING_NEW])
    telegram.run(StopAtPause(2))
    assert http.get("/health/").json["status"] == "ok"


def test_health_is_degraded_a_minute_after_the_last_answer(http, telegram, bot_api, clock):
    clock.move(100)
    bot_api.failures["getUpdates"].append(NOTHING_NEW)
    telegram.run(StopAtPause())
    for seconds, status in ((59, "ok"), (2, "degraded")):
        clock.move(seconds)
        bot_api.failures["getUpdates"].append("reset")
        bot_api.failures["getMe"].append("reset")
        telegram.run(StopAtPause())
        assert http.get("/health/").json["status"] == status


def test_webhook_is_trouble_only_when_it_cannot_be_deleted(http, telegram, bot_api, clock):
    for failures, words in (([], "None"), ([UNAUTHORIZED], "refuses TELEGRAM_BOT_TOKEN")):
        bot_api.webhook = "https://factory.example/hook"
        bot_api.failures["deleteWebhook"].extend(failures)
        bot_api.failures["getUpdates"].append(NOTHING_NEW)
        telegram.run(StopAtPause(2))
        assert words in str(http.get("/health/").json["bot_error"])


def test_health_says_so_when_what_people_write_cannot_be_stored(
    http, telegram, bot_api, monkeypatch
):
    def lock_the_database(*args):
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(factoryapp, "receive_or_skip", lock_the_database)
    bot_api.write(7, "/start")
    telegram.run(StopAtPause())
    health = http.get("/health/").json
    assert not health["bot_reachable"] and "OperationalError" in health["bot_error"]


def test_terminal_is_always_well(http, clock):
    clock.move(3600)
    health = http.get("/health/").json
    assert (health["status"], health["bot"], health["bot_reachable"]) == ("ok", "terminal", True)
    assert health["bot_error"] is None and health["bot_answered_at"] is None


def test_health_does_not_count_what_was_given_up(http, telegram, bot_api, linked):
    bot_api.failures[7].append(BLOCKED)
    post(http, linked, "one")
    assert http.get("/health/").json["queued"] == 1
    deliver_all(telegram)
    assert http.get("/health/").json["queued"] == 0


def test_health_has_what_was_to_be_sent_later_wait_since_then(http, telegram, clock, linked):
    headers = log_in(http, "alice")
    post(http, headers, "слово " * 800, send_at=factoryapp.iso(clock.seconds + 60))
    clock.move(60)
    factoryapp.publish_due()
    clock.move(10)
    for queued in (2, 1):  # parts
        health = http.get("/health/").json
        assert (health["queued"], health["oldest_queued_seconds"]) == (queued, 10)
        deliver_next(telegram)


def test_health_without_a_database_says_so(http, monkeypatch, tmp_path):
    monkeypatch.setattr(factoryapp.settings, "db", str(tmp_path))
    answer = http.get("/health/", status=503).json
    assert answer["reason"].startswith("The database does not answer: ")
    assert answer["detail"] == answer["reason"]
    assert (answer["status"], answer["bot"], answer["bot_error"]) == ("error", "terminal", None)


# --- OpenAPI --------------------------------------------------------------------------------------


def described_operations(document):
    """(method, path, operation) of all that the OpenAPI document describes."""
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def fits(value, schema, named):
    """Whether a value is what a JSON schema of ours says; `named` are the document's schemas."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        schema = named[schema["$ref"].removeprefix("#/components/schemas/")]
    if "anyOf" in schema:
        return any(fits(value, one, named) for one in schema["anyOf"])
    if "oneOf" in schema:
        return sum(fits(value, one, named) for one in schema["oneOf"]) == 1
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    if "enum" in schema:
        return value in schema["enum"]
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(
        isinstance(value, kinds[t]) and (t == "boolean" or not isinstance(value, bool))
        for t in types
    ):
        return False
    if isinstance(value, list):
        return all(fits(item, schema["items"], named) for item in value)
    if isinstance(value, dict):
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(value) >= set(schema.get("required", [])) and all(
            fits(value[name], properties.get(name, more), named) for name in value
        )
    return True


def test_openapi_names_every_route_and_the_address(http):
    document = http.get(
        "/openapi.json", headers={"Host": "factory.example:8443", "X-Forwarded-Proto": "gopher"}
    ).json
    assert document["openapi"] == "3.1.0" and document["servers"] == [
        {"url": "http://factory.example:8443"}
    ]
    operations = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    readme = read_readme()
    for method, path in operations:
        assert f"\n- `{method} {re.sub('{.*}', 'ID', path)}`\n  " in readme
    assert len(operations) == len(factoryapp.app.routes) == 20


def test_openapi_tells_of_the_idempotency_key_in_words_alone(http):
    # As a parameter, Postman would send the same one with each message: only the first is stored.
    post_message = http.get("/openapi.json").json["paths"]["/api/messages/"]["post"]
    assert "Idempotency-Key" in post_message["description"]
    assert "Idempotency-Key" not in [p["name"] for p in post_message["parameters"]]


def test_openapi_says_where_to_sign_in_and_which_id_has_to_be_given(http):
    junk = {"Authorization": "Bearer junk"}
    for path, methods in http.get("/openapi.json").json["paths"].items():
        for method, operation in methods.items():
            security = operation["security"] or [{}]
            for headers, is_allowed, answer in (
                ({}, {} in security, NO_CREDENTIALS),
                (junk, {"Bearer": []} not in security, not_for_any("Token is invalid")),
            ):
                url = re.sub("{.*}", "1", path)
                response = http.request(url, method=method.upper(), headers=headers, status="*")
                assert (response.body != factoryapp.encode_json(answer)) == is_allowed, url
            required = [p["name"] for p in operation["parameters"] if p["required"]]
            assert required == re.findall(r"{(\w+)}", path)


def test_openapi_offers_to_register_without_a_token_first(http):
    # Postman takes the first.
    paths = http.get("/openapi.json").json["paths"]
    assert paths["/api/users/register/"]["post"]["security"] == [{}, {"Bearer": []}]
    assert paths["/api/users/me/"]["get"]["security"] == [{"Bearer": []}]
    assert paths["/health/"]["get"]["security"] == []


def test_openapi_describes_bodies_as_json_alone_and_says_that_forms_work(http):
    document = http.get("/openapi.json").json
    bodies = [each[2].get("requestBody") for each in described_operations(document)]
    assert {media_type for body in bodies if body for media_type in body["content"]} == {JSON}
    assert "forms" in document["info"]["description"]
    assert "text/plain" in document["paths"]["/api/messages/"]["post"]["description"]


def test_openapi_names_what_it_answers_and_refuses(http):
    document = http.get("/openapi.json").json
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references == set(document["components"]["schemas"])
    assert references >= {"User", "Message", "Key", "Detail", "FieldErrors"}
    detail, errors = ({"$ref": f"#/components/schemas/{n}"} for n in ("Detail", "FieldErrors"))
    for _, path, operation in described_operations(document):
        for status, answer in operation["responses"].items():
            if status >= "400":
                schema = {"anyOf": [detail, errors]} if status == "400" else detail
                assert answer["content"][JSON]["schema"] == schema, (path, status)
        assert {"400", "500", "503"} <= set(operation["responses"])


def test_openapi_names_the_refusals_of_what_is_too_much_or_from_another_site(http):
    throttled, foreign = set(), {"Sec-Fetch-Site": "cross-site"}
    for method, path, operation in described_operations(http.get("/openapi.json").json):
        if "429" in operation["responses"]:
            throttled.add(operation["operationId"])
        if method == "POST":
            http.post(path, headers=foreign, status=403)
            assert "403" in operation["responses"], path
    assert throttled == {"register", "log_in", "change_password", "post_message"}


def test_openapi_says_of_everything_what_it_is(http):
    document = http.get("/openapi.json").json
    for _, path, operation in described_operations(document):
        assert operation["tags"][0] in ("accounts", "tokens", "messages", "server"), path
        assert len(operation["summary"]) <= 50 and operation["summary"][-1] != ".", path
        assert operation["description"].endswith("."), path
        assert all(answer["description"] for answer in operation["responses"].values())
        for parameter in operation["parameters"]:
            assert parameter["description"].endswith("."), (path, parameter)
            assert fits(parameter["example"], parameter["schema"], {}), (path, parameter)
        if "requestBody" in operation:
            body = operation["requestBody"]["content"][JSON]["schema"]
            assert fits(body["example"], body, {}), path
            for name, field in body["properties"].items():
                assert "example" in field or "description" in field, (path, name)
                assert "example" not in field or fits(field["example"], field, {}), (path, name)
    tags = {path: operation["tags"] for _, path, operation in described_operations(document)}
    assert tags["/api/users/me/"] == ["accounts"] and tags["/auth/token/"] == ["tokens"]
    assert tags["/api/messages/{message_id}/"] == ["messages"] and tags["/health/"] == ["server"]


def test_openapi_names_the_headers_of_answers(http):
    document = http.get("/openapi.json").json
    headers = {
        (operation["operationId"], status): list(answer["headers"])
        for _, _, operation in described_operations(document)
        for status, answer in operation["responses"].items()
    }
    assert headers["list_own_messages", "200"] == ["Link", "ETag"]
    assert headers["list_all_users", "200"] == ["Link"]
    assert headers["show_message", "200"] == headers["show_message", "304"] == ["ETag"]
    assert headers["post_message", "201"] == ["Idempotency-Replayed"]
    assert headers["log_in", "429"] == headers["show_page", "503"] == ["Retry-After"]
    assert headers["show_page", "200"] == []


def test_openapi_names_one_type_for_each_field_though_more_is_taken(http):
    document = http.get("/openapi.json").json
    paths = document["paths"]["/api/messages/"]
    fields = paths["post"]["requestBody"]["content"][JSON]["schema"]["properties"]
    assert (fields["silent"]["type"], fields["text"]["type"]) == ("boolean", "string")
    assert "numbers, true and false may be written as text" in document["info"]["description"]
    said = post(http, join(http, "alice"), 17, silent="yes")
    assert said["text"] == "17"
    delivery = next(p["schema"] for p in paths["get"]["parameters"] if p["name"] == "delivery")
    assert (delivery["type"], delivery["enum"]) == ("string", list(factoryapp.DELIVERIES))


def test_openapi_allows_names_that_are_not_ascii(http):
    paths = http.get("/openapi.json").json["paths"]
    body = paths["/api/users/register/"]["post"]["requestBody"]["content"][JSON]["schema"]
    pattern = body["properties"]["username"]["pattern"]
    # JSON schema reads \w as ASCII.
    names = [name for name in ("Иван_1", "𠀀", "a b", "a/b") if re.search(pattern, name, re.ASCII)]
    assert names == ["Иван_1", "𠀀"]


def send_example(http, document, name, headers):
    """Send the operation of this name with the examples of all that it takes; its answer."""
    method, path, operation = next(
        each for each in described_operations(document) if each[2]["operationId"] == name
    )
    given = {"path": {}, "query": {}, "header": {}}
    for parameter in operation["parameters"]:
        given[parameter["in"]][parameter["name"]] = str(parameter["example"])
    body = b""
    if "requestBody" in operation:
        body = json.dumps(operation["requestBody"]["content"][JSON]["schema"]["example"]).encode()
    url = f"{path.format(**given['path'])}?{urlencode(given['query'])}"
    headers = {**headers, **given["header"]}
    return http.request(url, method=method, body=body, content_type=JSON, headers=headers)


def test_examples_of_the_openapi_document_are_a_journey(http):
    document = http.get("/openapi.json").json
    assert send_example(http, document, "register", {}).status_int == 201
    access = send_example(http, document, "log_in", {}).json["access"]
    headers = {"Authorization": f"Bearer {access}"}
    assert send_example(http, document, "get_telegram_token", headers).json["telegram_token"]
    message = send_example(http, document, "post_message", headers).json
    assert send_example(http, document, "show_message", headers).json == message
    assert send_example(http, document, "make_key", headers).json["name"] == "night report"
    listed = "list_own_messages list_all_users list_own_keys show_account show_health".split()
    for name in listed:
        assert send_example(http, document, name, headers).status_int == 200
    assert send_example(http, document, "end_key", headers).status_int == 204
    assert send_example(http, document, "change_password", headers).status_int == 204


@pytest.mark.parametrize(
    "said, address",
    [
        ({"Proto": "https"}, "https://app:8080"),
        ({"Proto": "HTTPS,http", "Host": "factory.example, inner"}, "https://factory.example"),
        ({"Host": '"factory.example:8443"'}, "http://factory.example:8443"),
        ({"Prefix": "/factory/"}, "http://app:8080/factory"),
        ({"Prefix": "factory/v1, /inner"}, "http://app:8080/factory/v1"),
        ({"Proto": "", "Host": " ,", "Prefix": "/"}, "http://app:8080"),
    ],
)
def test_openapi_names_the_address_that_the_trusted_proxy_says(http, monkeypatch, said, address):
    headers = {"Host": "app:8080", **{f"X-Forwarded-{name}": said[name] for name in said}}
    servers = []
    for network in ("127.0.0.0/8", "192.0.2.1"):
        trust(monkeypatch, network)
        servers += http.get("/openapi.json", headers=headers).json["servers"]
    assert servers == [{"url": address}, {"url": "http://app:8080"}]


@pytest.mark.parametrize("recipient", ["alice", ["alice"]])
def test_openapi_describes_one_message_and_several(http, recipient):
    document, answer = (
        http.get("/openapi.json").json,
        post(http, join(http, "alice"), "text", recipient=recipient),
    )
    operation = document["paths"]["/api/messages/"]["post"]
    asked = operation["requestBody"]["content"][JSON]["schema"]["properties"]["recipient"]
    answered = operation["responses"]["201"]["content"][JSON]["schema"]
    assert fits(recipient, asked, {})
    assert fits(answer, answered, document["components"]["schemas"])


def test_every_answer_is_in_the_openapi_document(http):
    # Each operation is sent what its schemas allow and what they do not.
    draw, seen = random.Random(1), set()
    document, headers = http.get("/openapi.json").json, join(http, "alice")
    key = http.post_json("/api/users/keys/", {"name": "x"}, headers=join(http, "bob")).json["key"]
    odd = [
        None,
        True,
        0,
        -1,
        2**63,
        1e308,
        "",
        " ",
        "a",
        "я" * 200,
        "a\0",
        "\ud800",
        [],
        {},
        ["a"],
        "x" * 17_000,
        "2026-11-23T18:08:27Z",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body_schema = (
                operation.get("requestBody", {})
                .get("content", {})
                .get(JSON, {})
                .get("schema", {"properties": {}, "example": {}})
            )
            for _ in range(60):
                body = {
                    name: draw.choice([*odd, 1]) if draw.random() < 0.2 else example
                    for name in body_schema["properties"]
                    if (example := body_schema["example"].get(name)) or draw.random() < 0.2
                }
                query = "&".join(
                    f"{p['name']}={draw.choice(['0', '-1', 'x', '1000', str(2**63)])}"
                    for p in operation["parameters"]
                    if p["in"] == "query" and draw.random() < 0.25
                )
                more = {
                    p["name"]: draw.choice(["*", "x"])
                    for p in operation["parameters"]
                    if p["in"] == "header" and draw.random() < 0.6
                }
                if operation["operationId"] == "post_message" and draw.random() < 0.6:
                    more["Idempotency-Key"] = draw.choice("*x")
                response = http.request(
                    re.sub("{.*}", draw.choice(["1", "7", "9" * 19]), path) + "?" + query,
                    method=method.upper(),
                    body=json.dumps(body).encode() if body_schema["properties"] else b"",
                    expect_errors=True,
                    content_type=draw.choice([JSON, JSON, JSON, "text/plain"]),
                    headers=more
                    | draw.choice(
                        [headers, headers, headers, {}]
                        + [{"Authorization": f"Bearer {token}"} for token in ("x", key)]
                    ),
                )
                if path.endswith("set-password/") and response.status_int == 204:
                    headers = log_in(http, "alice", str(body["new_password"]))
                seen.add((operation["operationId"], response.status_int))
                declared = operation["responses"].get(str(response.status_int))
                assert declared, (method, path, body, response)
                for media_type, content in declared.get("content", {}).items():
                    assert response.content_type == media_type
                    assert media_type != JSON or fits(
                        response.json, content["schema"], document["components"]["schemas"]
                    ), (method, path, response)
    assert {200, 201, 204, 304, 400, 401, 403, 404, 415, 422} <= {status for _, status in seen}
    assert {("list_own_messages", 304), ("show_message", 304), ("make_key", 403)} <= seen


# --- Server ---------------------------------------------------------------------------------------


def talk(server, *pieces, seconds=3):
    """Send raw bytes; all that is answered until time is up, or with EOF after it if it closes."""
    answer = b""
    with socket.create_connection(server.address, timeout=seconds) as sock:
        for piece in pieces:
            sock.sendall(piece)
        try:
            while chunk := sock.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
        except TimeoutError:
            return answer
    return answer + b"EOF"


def raw(method, path, headers=None, body=b"", version="1.1"):
    """A request as raw bytes."""
    lines = {"Content-Type": JSON, "Content-Length": len(body), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/{version}\r\n{head}\r\n".encode() + body


def raw_post(headers, text="one"):
    """A POST of a message as raw bytes."""
    return raw("POST", "/api/messages/", headers, json.dumps({"text": text}).encode())


def statuses(answer):
    """Those of all the answers in raw bytes, in order."""
    return [int(status) for status in re.findall(rb"HTTP/1.[01] (\d{3}) ", answer)]


@pytest.mark.parametrize(
    "after",
    [
        b"",
        b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_no_answer_leaves_before_what_it_acknowledges_is_stored(http, lost_commits, after):
    headers = join(http, "alice")
    lost_commits()
    answer = talk(http, raw_post(headers) + after)
    assert statuses(answer)[0] == 503 and b"Retry-After: 5" in answer and b"201" not in answer
    assert list_messages(http, headers) == []


def test_connection_is_closed_after_a_commit_that_failed(http, lost_commits):
    headers = join(http, "alice")
    lost_commits()
    answer = talk(http, raw_post(headers))
    assert statuses(answer) == [503] and answer.endswith(b"EOF")


def test_client_that_leaves_before_a_failed_commit_is_answered_ends_nothing(http, lost_commits):
    headers = join(http, "alice")
    lost_commits()
    for _ in range(20):
        with socket.create_connection(http.address) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.sendall(raw_post(headers))
    assert talk(http, b"GET /x HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 404")


def ask_statuses(http, headers, *texts):
    """What posts of these texts, served in one round, are answered."""
    requests = [message_request(headers, text) for text in texts]
    return [answer.status for answer in http.ask_in_one_round(*requests)]


def test_request_that_fails_half_way_takes_back_its_own_part_alone(http):
    headers = join(http, "alice")
    first, broken, refused, last = ask_statuses(http, headers, "first", BREAKS, "", "last")
    assert (first, refused, last) == (201, 400, 201)
    assert broken == 500
    stored = {(m["id"], m["text"]) for m in list_messages(http, headers)}
    assert stored in ({(1, "first"), (2, "last")}, {(1, "last"), (2, "first")})


def test_of_a_round_that_cannot_be_committed_all_who_wrote_are_told(http, lost_commits):
    headers = join(http, "alice")
    lost_commits()
    texts = ("first", BREAKS_AT_ONCE, "", "last")
    first, _, refused, last = ask_statuses(http, headers, *texts)
    assert (first, refused, last) == (503, 400, 503)
    assert list_messages(http, headers) == []


def test_replay_of_what_its_own_round_loses_is_no_success(http, lost_commits):
    headers = {**join(http, "alice"), "Idempotency-Key": "a-key"}
    lost_commits()
    assert ask_statuses(http, headers, "one", "one") == [503, 503]
    assert list_messages(http, headers) == []


@pytest.mark.parametrize("text", [BREAKS, BREAKS_AT_ONCE])
def test_broken_constraint_is_a_fault_of_ours(http, text):
    headers = join(http, "alice")
    assert ask_statuses(http, headers, "first", text, "last") == [201, 500, 201]


def test_fault_of_ours_stays_one_when_its_round_cannot_be_committed(http, lost_commits):
    headers = join(http, "alice")
    lost_commits()
    assert ask_statuses(http, headers, "first", BREAKS_AT_ONCE, "last") == [503, 500, 503]


def test_request_runs_once_however_long_another_program_writes(http, monkeypatch, tmp_path):
    headers, answers = join(http, "alice"), []
    calls = note_threads(monkeypatch, factoryapp, "read_idempotency_key")
    posting = threading.Thread(
        target=lambda: answers.extend(http.ask(message_request(headers, "one")))
    )
    with another_writer(tmp_path / "factoryapp.db"):
        posting.start()
        posting.join(0.2)
        assert answers == []
    posting.join()
    assert len(calls) == 1 and [answer.status for answer in answers] == [201]
    assert len(list_messages(http, headers)) == 1


@pytest.mark.parametrize("path", ["/auth/token/", "//auth/token/", "/auth/token"])
def test_passwords_are_never_hashed_on_the_serving_thread(http, monkeypatch, path):
    register(http, "alice")
    threads = note_threads(monkeypatch, factoryapp.hashlib, "scrypt")
    body = json.dumps({"username": "alice", "password": PASSWORD}).encode()
    answer = talk(http, raw("POST", path, body=body, version="1.0"))
    assert statuses(answer) == [200] and len(threads) == 1 and threads[0] != "serving"


def test_no_route_hashes_on_the_serving_thread(http, monkeypatch):
    threads = note_threads(monkeypatch, factoryapp.hashlib, "scrypt")
    post(http, join(http, "alice"), "message 1")
    for n, route in enumerate(factoryapp.app.routes):
        name = f"user{n}"
        register(http, name)
        sent = {"username": name, "password": PASSWORD, "text": "a", "name": "cron"}
        tokens = http.post_json("/auth/token/", sent).json
        sent.update(token=tokens["access"], refresh=tokens["refresh"], name="night report")
        sent.update(current_password=PASSWORD, new_password="An0ther-pass")
        if "register" in route.rule:
            sent["username"] = "somebody-new"
        user = "alice" if "<message_id" in route.rule else name
        http.request(
            re.sub("<.*?>", "1", route.rule),
            method=route.method,
            body=json.dumps(sent).encode() if route.method == "POST" else None,
            content_type=JSON,
            headers=log_in(http, user),
            status="*" if route.method == "DELETE" else None,
        )
    assert len(threads) > 2 * len(factoryapp.app.routes) and "serving" not in threads


@pytest.mark.parametrize(
    "path, media_type, body, pool",
    [
        ("/api/messages/", JSON, b'{"text":"a"}', None),
        ("/api/messages/", FORM, b"text=a", None),
        ("/api/messages/", MULTIPART, part(b"a"), "patient"),
        ("/api/messages/", MULTIPART.title(), part(b"a"), "patient"),
        ("/api/messages/", FORM, b"text=" + b"\xd1\x8f%" * 6000, "patient"),
        ("/auth/token/verify/", MULTIPART, part(b"a"), "patient"),
        ("/api/users/register/", MULTIPART, part(b"a"), "registering"),
    ],
    ids=range(7),
)
def test_body_that_is_slow_to_read_is_read_in_a_pool(
    http, monkeypatch, path, media_type, body, pool
):
    headers, pools, real = join(http, "alice"), [], factoryapp.read_body

    def noted(max_bytes):
        pools.append(factoryapp.local.answer.pool)
        return real(max_bytes)

    monkeypatch.setattr(factoryapp, "read_body", noted)
    post_body(http, headers, media_type, body, path)
    assert pools == [pool]


@pytest.mark.parametrize(
    "method, path, function",
    [
        ("POST", "/api/users/unlink-telegram/", "unlink_chat"),
        ("GET", "/api/users/get-telegram-token/", "add_link_token"),
        ("GET", "/health/", "count_waiting"),
        ("POST", "/api/messages/?recipient=alice&recipient=alice", "relay"),
    ],
)
def test_what_may_take_long_is_not_done_on_the_serving_thread(
    http, telegram, bot_api, linked, monkeypatch, method, path, function
):
    threads, headers = note_threads(monkeypatch, factoryapp, function), linked
    if method == "POST":
        headers = {**linked, "Content-Type": "text/plain"}
    http.request(path, method=method, headers=headers, body=b"a" if method == "POST" else b"")
    assert len(threads) == 1 and threads[0] != "serving"


@pytest.mark.parametrize("limits", [["LIST_ROWS"], ["LIST_BYTES", "LIST_PIECE_BYTES"]])
@pytest.mark.parametrize("path", ["/api/messages/", "/api/users/"])
def test_long_list_goes_on_in_a_pool_piece_by_piece(http, monkeypatch, path, limits):
    for limit in limits:
        monkeypatch.setattr(factoryapp, limit, 2 if limit == "LIST_ROWS" else 200)
    headers = join(http, "alice")
    for n in range(15):
        register(http, f"user{n}")
        post(http, headers, "x" * 20)
    threads = note_threads(monkeypatch, factoryapp, "read_piece")
    assert len(http.get(path, headers=headers).json) >= 15
    assert threads[0] == "serving" and len(threads) > 1 and set(threads[1:]) == {"lists"}


def test_list_of_one_piece_is_answered_in_its_round(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LIST_ROWS", 2)
    headers = join(http, "alice")
    post(http, headers, "one")
    post(http, headers, "two")
    threads = note_threads(monkeypatch, factoryapp, "read_piece")
    assert len(list_messages(http, headers)) == 2 and threads == ["serving"]


def test_lists_are_merged_in_the_order_of_their_indexes(http):
    db = factoryapp.connection()
    page = {"user": 1, "after": 0, "before": 9, "limit": 5, "delivery": "failed"}
    by_delivery = factoryapp.OWN_MESSAGES_BY_DELIVERY, factoryapp.CONVERSATION_BY_DELIVERY
    page["with"] = "bob"
    for listing in (
        factoryapp.OWN_MESSAGES,
        factoryapp.CONVERSATION,
        *by_delivery,
        factoryapp.USERS,
    ):
        for query in (listing.rows, f"{listing.ids} ORDER BY id DESC LIMIT 2"):
            plan = [row["detail"] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", page)]
            assert "SEARCH" in str(plan) and "TEMP B-TREE" not in str(plan), plan
            assert not [step for step in plan if step.startswith("SCAN")], plan
            assert str(plan).count("AND delivery=?") == 2 * (listing in by_delivery), plan
            pairs = str(plan).count("(sender_id=? AND recipient_id=? AND ")
            assert pairs == 2 * (listing in (factoryapp.CONVERSATION, by_delivery[1])), plan


@pytest.mark.parametrize("delivery", [None, "sent"])
def test_answers_to_a_message_are_listed_by_their_index(http, delivery):
    page = {"user": 1, "after": 0, "before": 9, "limit": 5, "delivery": delivery, "reply_to": 1}
    page["with"] = None
    listing = factoryapp.OWN_ANSWERS
    for query in (listing.rows, f"{listing.ids} ORDER BY id DESC LIMIT 2"):
        steps = factoryapp.connection().execute(f"EXPLAIN QUERY PLAN {query}", page)
        plan = str([step["detail"] for step in steps])
        assert "messages_by_answered (reply_to=? AND id>? AND id<?)" in plan, plan
        assert "TEMP B-TREE" not in plan and "SCAN" not in plan, plan


@pytest.mark.parametrize(
    "line", ["GET /x", "GET /x HTTP/0.9", "GET /x HTTP/1.2", "GET /x HTTP/2.0"]
)
def test_connection_of_an_unknown_version_ends_with_its_answer(http, line):
    answer = talk(http, f"{line}\r\nHost: x\r\n\r\n".encode())
    assert statuses(answer) == [404] and b"Connection: close\r\n" in answer


@pytest.mark.parametrize(
    "target, status", [("//health//", 404), ("///health/", 200), ("health/", 404)]
)
def test_path_begins_with_a_slash(http, target, status):
    assert statuses(talk(http, raw("GET", target, {"Connection": "close"}))) == [status]


@pytest.mark.parametrize("version, connection", [("1.1", None), ("1.1", "close"), ("1.0", None)])
@pytest.mark.parametrize("status", [204, 304])
def test_connection_stays_open_after_an_answer_without_a_body(http, version, connection, status):
    headers = join(http, "alice")
    etag = http.get("/api/messages/", headers=headers).headers["ETag"]
    sent = {"Connection": connection} if connection else {}
    request = raw("OPTIONS", "/api/messages/", sent, version=version)
    if status == 304:
        sent |= {**headers, "If-None-Match": etag}
        request = raw("GET", "/api/messages/", sent, version=version)
    last = raw("GET", "/x", {"Connection": "close"})
    is_open = version == "1.1" and not connection
    answer = talk(http, request + request + last)
    assert statuses(answer) == ([status, status, 404] if is_open else [status])
    assert answer.count(b"Connection: close") == 1


def test_pipelined_requests_are_answered_in_order(http):
    headers = join(http, "alice")
    get = raw("GET", "/api/messages/", headers)
    last = raw("GET", "/x", {"Connection": "close"})
    answer = talk(http, raw_post(headers, "1") + get + raw_post(headers, "2") + get + last)
    assert statuses(answer) == [201, 200, 201, 200, 404] and answer.endswith(b"EOF")
    assert [m["text"] for m in list_messages(http, headers)] == ["1", "2"]


def test_pipelined_requests_do_not_wait_for_others_to_arrive(http):
    get = raw("GET", "/api/users/", {"Connection": "keep-alive"})
    started_at = time.monotonic()
    answer = talk(http, get + get + raw("GET", "/x", {"Connection": "close"}))
    assert statuses(answer) == [401, 401, 404] and time.monotonic() - started_at < 1.5


EXPECT = {"Expect": "100-continue", "Connection": "close"}


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"GET /x HTTP/1.1\r\nConnection: close\r\nExpect: 100-continue\r\n\r\n", 404),
        (raw("GET", "/x", EXPECT), 404),
        (raw("POST", "/api/users/unlink-telegram/", EXPECT), 401),
        (raw("POST", "/auth/token/", EXPECT, b"{}"), 400),
        (raw("POST", "/auth/token/", {**EXPECT, "Content-Length": 50_000_000}), 413),
        (raw("POST", "/auth/token/", {**EXPECT, "Content-Length": "odd"}), 400),
        (raw("POST", "/auth/token/", {**EXPECT, "Transfer-Encoding": "chunked"}), 400),
        (raw("POST", "/auth/token/", {**EXPECT, "X": "y" * 20_000}), 431),
        (raw("POST", "/auth/token/", {**EXPECT, "Transfer-Encoding": "gzip"}), 501),
        (raw("GET", "/x", EXPECT, version="1.0"), 404),
    ],
    ids=range(10),
)
def test_nobody_is_told_to_continue_of_whom_nothing_more_is_wanted(http, request_bytes, status):
    assert statuses(talk(http, request_bytes)) == [status]


@pytest.mark.parametrize(
    "lines, body",
    [
        ({"Content-Length": 14}, b'{"text":"one"}'),
        (
            {"Transfer-Encoding": "chunked", "Content-Length": None},
            b'e\r\n{"text":"one"}\r\n0\r\n\r\n',
        ),
    ],
)
def test_whose_body_is_still_to_come_is_told_to_continue(http, lines, body):
    lines = {"Content-Type": JSON, **join(http, "alice"), **EXPECT, **lines}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    with socket.create_connection(http.address, timeout=3) as sock:
        sock.sendall(f"POST /api/messages/ HTTP/1.1\r\n{head}\r\n".encode())
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert statuses(sock.recv(65536)) == [201]


@contextmanager
def connection_of_who_takes_no_answers(http, pages, behind=b""):
    """A connection that asked for the page so often that the server waits for it to take some."""
    with socket.create_connection(http.address, timeout=3) as sock:
        sock.sendall(raw("GET", "/") * pages + behind)
        ends_at = time.monotonic() + 5
        while not untaken(http):
            assert time.monotonic() < ends_at
            http.get("/x", status=404)
        yield sock


def test_pipelined_requests_go_on_once_their_client_takes_the_answers(http):
    with connection_of_who_takes_no_answers(http, 800) as sock:
        answer = b""
        while answer.count(b"HTTP/1.1 200 ") < 800:
            answer += sock.recv(2**20)


def test_answer_that_took_long_to_make_has_its_own_time_to_be_taken(http, monkeypatch):
    register(http, "alice")
    real, ahead, left = time.monotonic, [0], []
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])
    scrypt, send = factoryapp.hashlib.scrypt, factoryapp.Channel.send

    def hash_for_long(*args, **kwargs):
        ahead[0] = 40
        return scrypt(*args, **kwargs)

    def send_a_little_later(channel, data):
        left.append(channel.closes_at - time.monotonic())
        return send(channel, data) if len(left) > 1 else 0

    monkeypatch.setattr(factoryapp.hashlib, "scrypt", hash_for_long)
    monkeypatch.setattr(factoryapp.Channel, "send", send_a_little_later)
    log_in(http, "alice")
    assert len(left) > 1 and 25 < min(left) <= max(left) <= factoryapp.STUCK_SECONDS


@pytest.fixture
def pass_seconds(http, monkeypatch):
    """Let so many seconds pass for the server, which looks at its connections in each."""
    real, ahead = time.monotonic, [0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    def pass_seconds(seconds):
        for _ in range(seconds):
            ahead[0] += 1
            for _ in range(2):
                # It looks once a round is over, the first of these.
                http.get("/x", status=404)

    return pass_seconds


def is_connected(http, sock):
    """Whether the server has not closed this connection."""
    channels = list(http.server.channels)
    return sock.getsockname() in [channel.addr for channel in channels]


def ask_for_a_long_list(http, headers, buffer=None):
    """A connection on which a list of megabytes was asked for, and nothing of it is taken."""
    sock = socket.socket()
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(5)
    sock.connect(http.address)
    sock.sendall(raw("GET", "/api/messages/", {**headers, "Connection": "close"}))
    return sock


def untaken(http):
    """Bytes of the answers that wait for their clients, one number for each who has some."""
    channels = list(http.server.channels)
    return [len(channel.unsent) for channel in channels if channel.unsent]


def take_all(sock):
    answer = bytearray()
    with suppress(ConnectionResetError):
        while chunk := sock.recv(2**20):
            answer += chunk
    return bytes(answer)


def test_answer_of_who_takes_three_kilobytes_a_second_is_not_cut(http, tmp_path, pass_seconds):
    headers = join(http, "alice")
    store_much(tmp_path, 100, 16_000)
    with socket.socket() as sock:
        # As far away: the kernel hands on small pieces.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(http.address)
        sock.sendall(raw("GET", "/api/messages/", headers))
        serve_until(http, lambda: untaken(http))
        for _ in range(60):
            pass_seconds(1)
            sock.recv(3_000, socket.MSG_WAITALL)
        assert is_connected(http, sock)


@pytest.mark.parametrize(
    "taken, seconds, is_cut",
    [
        ([0], 45, True),
        ([0], 25, False),
        ([0] * 24 + [500_000], 80, False),
        ([500_000] + [0] * 99, 70, True),
    ],
)
def test_answer_of_which_nothing_is_taken_for_thirty_seconds_is_cut(
    http, tmp_path, pass_seconds, taken, seconds, is_cut
):
    headers = join(http, "alice")
    store_much(tmp_path, 600, 16_000)
    with closing(ask_for_a_long_list(http, headers)) as sock:
        serve_until(http, lambda: untaken(http))
        left = []
        while left != (left := untaken(http)):
            # The kernel's buffers fill up.
            time.sleep(0.25)
        for second in range(seconds):
            pass_seconds(1)
            to_take = taken[second % len(taken)] * is_connected(http, sock)
            while to_take > 0:
                to_take -= len(sock.recv(to_take))
        for _ in range(10 * is_cut):
            if is_connected(http, sock):
                # The kernel has taken some more by itself.
                time.sleep(0.2)
                pass_seconds(31)
        assert is_connected(http, sock) is not is_cut
        assert take_all(sock).endswith(b"0\r\n\r\n") is not is_cut


@pytest.mark.parametrize(
    "sent, seconds", [(b"", 60), (b"\r\n", 60), (b"GET /half", 10), (raw("GET", "/x"), 60)]
)
def test_who_asks_for_nothing_is_closed_in_time_though_the_clock_is_set_back(
    http, monkeypatch, pass_seconds, sent, seconds
):
    with socket.create_connection(http.address, timeout=3) as sock:
        sock.sendall(sent)
        pass_seconds(1)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() - 3600)
        pass_seconds(seconds - 3)
        assert is_connected(http, sock)
        pass_seconds(5)
        assert not is_connected(http, sock)


HOLDING = {
    "idle": b"",
    "half": b"GET /half",
    "blank": b"\r\n",
    "answered": raw("GET", "/x"),
    "untaken": raw("GET", "/") * 300,
    "waits": None,
}


@pytest.mark.parametrize(
    "first, second, seconds, closed",
    [
        ("idle", "half", 2, 0),
        ("half", "idle", 2, 0),
        ("blank", "answered", 2, 0),
        ("answered", "blank", 2, 0),
        ("untaken", "half", 2, 1),
        ("untaken", "idle", 9, 1),
        ("untaken", "answered", 50, 0),
        ("waits", "half", 2, 1),
        ("waits with more", "half", 2, 0),
    ],
)
def test_of_all_connections_the_one_that_is_held_longest_is_closed_for_another(
    http, monkeypatch, pass_seconds, first, second, seconds, closed
):
    monkeypatch.setattr(factoryapp.settings, "connections", 3)
    monkeypatch.setattr(factoryapp, "STUCK_SECONDS", 60)
    HOLDING["waits"] = raw("GET", "/api/messages/?wait=50", join(http, "alice"))
    HOLDING["waits with more"] = HOLDING["waits"] + HOLDING["answered"]
    socks = []
    for kind in (first, second):
        socks.append(socket.create_connection(http.address, timeout=3))
        socks[-1].sendall(HOLDING[kind])
        serve_until(http, lambda: len(http.server.channels) > len(socks))
        pass_seconds(seconds)
    assert statuses(talk(http, raw("GET", "/x", {"Connection": "close"}))) == [404]
    assert [is_connected(http, sock) for sock in socks] == [closed != 0, closed != 1]
    for sock in socks:
        sock.close()


def test_who_takes_a_long_list_makes_room_for_another_though_it_waits_for_its_next_piece(
    http, tmp_path, monkeypatch
):
    headers, may_read, real = join(http, "alice"), threading.Event(), factoryapp.read_piece
    monkeypatch.setattr(factoryapp, "LIST_PIECE_BYTES", 20_000)
    store_much(tmp_path, 100, 16_000)

    def read_when_told(*args):
        if threading.current_thread().name != "serving":
            may_read.wait(5)
        return real(*args)

    monkeypatch.setattr(factoryapp, "read_piece", read_when_told)
    http.close()
    socks = [ask_for_a_long_list(http, headers) for _ in range(5)]
    serve_until(http, lambda: http.server.pools["lists"].qsize() == 3)
    http.close()
    monkeypatch.setattr(factoryapp.settings, "connections", 5)
    assert statuses(talk(http, raw("GET", "/x", {"Connection": "close"}))) == [404]
    may_read.set()
    assert sum(take_all(sock).endswith(b"0\r\n\r\n") for sock in socks) >= 3


def test_urgent_byte_ends_its_connection_and_is_not_told_of_again_and_again(http, caplog):
    with socket.create_connection(http.address, timeout=3) as sock:
        serve_until(http, lambda: is_connected(http, sock))
        sock.send(b"x", socket.MSG_OOB)
        serve_until(http, lambda: not is_connected(http, sock))
    assert caplog.messages == []


def test_who_is_let_in_for_another_that_has_just_sent_something_is_not_taken_for_it(
    http, monkeypatch
):
    may_poll, poll = threading.Event(), http.server.poll
    with socket.create_connection(http.address, timeout=3) as sock:
        serve_until(http, lambda: len(http.server.channels) == 2)
        monkeypatch.setattr(factoryapp.settings, "connections", 1)
        http.close()
        while len(http.server.channels) > 1:
            http.server.pull_trigger()
        monkeypatch.setattr(http.server, "poll", lambda *args: may_poll.wait(5) and poll(*args))
        http.server.pull_trigger()
        with socket.create_connection(http.address, timeout=3) as other:
            sock.sendall(b"GET /half")
            may_poll.set()
            other.sendall(raw("GET", "/x"))
            assert statuses(other.recv(65536)) == [404]


@pytest.fixture
def slow_logins(monkeypatch):
    """An event without which no login goes on, and the logins that wait for it."""
    may_hash, hashing, real = threading.Event(), [], factoryapp.check_password

    def check_when_told(*args):
        hashing.append(args)
        return may_hash.wait(10) and real(*args)

    monkeypatch.setattr(factoryapp, "check_password", check_when_told)
    return may_hash, hashing


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of ours")
@pytest.mark.parametrize(
    "others, answered",
    [
        ("login login", [[401], [], [401]]),  # the longest of who has most
        ("login", [[], [401]]),
        ("idle", [[401], []]),
    ],
)
def test_who_waits_for_a_pool_makes_room_late_and_of_an_address_that_has_most_connections_first(
    http, monkeypatch, pass_seconds, slow_logins, others, answered
):
    may_hash, hashing = slow_logins
    login = json.dumps({"username": "alice", "password": PASSWORD}).encode()
    socks = []
    for kind in ["login", *others.split()]:
        address = "127.0.0.1" if socks else "127.0.0.2"
        socks.append(socket.create_connection(http.address, 5, (address, 0)))
        if kind == "login":
            socks[-1].sendall(raw("POST", "/auth/token/", {"Connection": "close"}, login))
            while len(hashing) + http.server.pools["hashing"].qsize() < len(socks):
                http.server.pull_trigger()
        pass_seconds(2)
    http.close()
    while len(http.server.channels) > len(socks):
        http.server.pull_trigger()
    monkeypatch.setattr(factoryapp.settings, "connections", len(socks))
    with socket.create_connection(http.address, 5, ("127.0.0.3", 0)) as other:
        other.sendall(raw("GET", "/x", {"Connection": "close"}))
        assert statuses(take_all(other)) == [404]
    may_hash.set()
    socks[-1].shutdown(socket.SHUT_WR)
    assert [statuses(take_all(sock)) for sock in socks] == answered
    # The one that was closed has a thread that is at it still.
    while len(http.server.pools["hashing"].not_empty._waiters) < factoryapp.HASHES_AT_ONCE:
        time.sleep(0.01)


@pytest.mark.parametrize("sent, closed", [(b"\r\n", 0), (b"GET", 1)])
def test_blank_lines_begin_no_request(http, monkeypatch, pass_seconds, sent, closed):
    monkeypatch.setattr(factoryapp.settings, "connections", 3)
    socks = []
    for _ in range(2):
        socks.append(socket.create_connection(http.address, timeout=3))
        serve_until(http, lambda: len(http.server.channels) > len(socks))
        pass_seconds(2)
    socks[0].sendall(sent)
    pass_seconds(2)
    assert statuses(talk(http, raw("GET", "/x", {"Connection": "close"}))) == [404]
    assert [is_connected(http, sock) for sock in socks] == [closed != 0, closed != 1]
    for sock in socks:
        sock.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of ours")
def test_answer_that_takes_a_moment_is_not_cut_for_those_who_connect_and_say_nothing(
    http, monkeypatch, slow_logins
):
    may_hash, hashing = slow_logins
    login = json.dumps({"username": "alice", "password": PASSWORD}).encode()
    with socket.create_connection(http.address, timeout=5) as sock:
        sock.sendall(raw("POST", "/auth/token/", {"Connection": "close"}, login))
        while not hashing:
            http.server.pull_trigger()
        http.close()
        monkeypatch.setattr(factoryapp.settings, "connections", 3)
        silent = [
            socket.create_connection(http.address, 5, (f"127.0.0.{n % 4 + 2}", 0))
            for n in range(20)
        ]
        with socket.create_connection(http.address, 5, ("127.0.0.9", 0)) as other:
            other.sendall(raw("GET", "/x", {"Connection": "close"}))
            assert statuses(take_all(other)) == [404]
        may_hash.set()
        assert statuses(take_all(sock)) == [401]
    for sock in silent:
        sock.close()


def test_requests_that_wait_leave_half_of_the_connections_to_others(http, wait, monkeypatch):
    monkeypatch.setattr(factoryapp.settings, "connections", 4)
    headers = join(http, "alice")
    parked = [wait(headers), wait(headers)]
    asked = raw("GET", "/api/messages/?wait=50", {**headers, "Connection": "close"})
    assert statuses(talk(http, asked)) == [200]
    http.close()
    assert [is_connected(http, connection.sock) for connection in parked] == [True, True]


def test_all_who_want_to_connect_are_let_in_at_once(http, monkeypatch):
    may_poll, poll, polls = threading.Event(), http.server.poll, []

    def poll_when_told(*args):
        polls.append(may_poll.wait(5))
        poll(*args)

    http.close()
    monkeypatch.setattr(factoryapp.settings, "connections", 20)
    monkeypatch.setattr(http.server, "poll", poll_when_told)
    http.server.pull_trigger()
    socks = [socket.create_connection(http.address, timeout=3) for _ in range(6)]
    for sock in socks:
        sock.sendall(raw("GET", "/x", {"Connection": "close"}))
    may_poll.set()
    assert [statuses(take_all(sock)) for sock in socks] == [[404]] * 6
    assert len(polls) < 6


def test_nobody_is_closed_for_another_while_all_wait_for_the_server(http, wait, monkeypatch):
    headers = join(http, "alice")
    parked = [wait(headers), wait(headers)]
    monkeypatch.setattr(factoryapp.settings, "connections", 2)
    http.close()
    with socket.create_connection(http.address, timeout=3) as sock:
        sock.sendall(raw("GET", "/x"))
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert len(http.server.waiting) == 2
        parked[0].close()
        sock.settimeout(3)
        assert statuses(sock.recv(65536)) == [404]


def test_pipelined_request_is_served_once_the_answer_before_it_was_taken(http):
    headers = join(http, "alice")
    with connection_of_who_takes_no_answers(http, 400, raw_post(headers)) as sock:
        assert max(untaken(http)) <= len(http.get("/").body) + 500
        assert list_messages(http, headers) == []
        while not http.get("/api/messages/", headers=headers).json:
            sock.recv(2**20)


@pytest.fixture
def sums(http, monkeypatch):
    """How many bytes of answers wait for their clients, in all, after each piece that is sent."""
    sums, real = [], factoryapp.Channel.let_go

    def noted(channel, *args):
        real(channel, *args)
        sums.append(sum(untaken(http)))

    monkeypatch.setattr(factoryapp.Channel, "let_go", noted)
    return sums


def test_of_long_lists_no_more_is_made_than_is_taken(http, tmp_path, monkeypatch, sums):
    monkeypatch.setattr(factoryapp, "LIST_PIECE_BYTES", 50_000)
    headers = join(http, "alice")
    store_much(tmp_path, 200, 16_000)
    socks = [ask_for_a_long_list(http, headers, 4096) for _ in range(8)]
    serve_until(http, lambda: len(untaken(http)) == 8)
    assert max(sums) < 8 * 70_000
    answers = [take_all(sock) for sock in socks]
    assert all(answer.endswith(b"0\r\n\r\n") for answer in answers)
    assert {answer.count(b'"text":"x') for answer in answers} == {200}


def test_of_answers_that_nobody_reads_no_more_is_kept_than_a_bound(
    http, tmp_path, monkeypatch, sums
):
    monkeypatch.setattr(factoryapp, "UNSENT_BYTES", 1_000_000)
    monkeypatch.setattr(factoryapp, "LIST_PIECE_BYTES", 150_000)
    headers = join(http, "alice")
    store_much(tmp_path, 15, 16_000)
    socks = [ask_for_a_long_list(http, headers, 4096) for _ in range(30)]
    serve_until(http, lambda: len(sums) > 60 and max(sums) > 700_000)
    assert max(sums) <= 1_000_000
    assert 3 < sum(take_all(sock).count(b'"text":"x') == 15 for sock in socks) < 30


def test_long_list_comes_in_chunks_only_in_http_1_1(http, tmp_path):
    headers = join(http, "alice")
    store_much(tmp_path, 100, 16_000)
    for version in ("1.0", "1.1"):
        sent = {**headers, "Connection": "close"}
        answer = talk(http, raw("GET", "/api/messages/", sent, version=version))
        head, _, body = answer.removesuffix(b"EOF").partition(b"\r\n\r\n")
        assert (b"Transfer-Encoding: chunked" in head) == (version == "1.1")
        assert body.startswith(b"[" if version == "1.0" else b"1\r\n[\r\n")
        assert body.endswith(b"]" if version == "1.0" else b"1\r\n]\r\n0\r\n\r\n")
        if version == "1.0":
            assert len(json.loads(body)) == 100


def test_head_of_a_long_list_is_a_head_alone(http, tmp_path):
    headers = join(http, "alice")
    store_much(tmp_path, 100, 16_000)
    answer = talk(http, raw("HEAD", "/api/messages/", headers))
    assert statuses(answer) == [200] and answer.endswith(b"\r\n\r\nEOF")
    assert answer.count(b"\r\n\r\n") == 1


def test_nothing_is_kept_in_temporary_files(start, tmp_path):
    refuse = "lambda *args, **named: 1 / 0"
    names = "tempfile.TemporaryFile = tempfile.NamedTemporaryFile"
    at_start(tmp_path, "import tempfile", f"{names} = {refuse}")
    program = start(PYTHONPATH=str(tmp_path))
    headers, longest = join(program.http, "alice"), "\U0001f44d" * factoryapp.MAX_TEXT
    post(program.http, headers, longest)
    for sent in ({}, {"upload_files": [("x", "x", b"x" * 1000)]}):
        program.http.post("/api/messages/", {"text": longest}, headers=headers, **sent)
    store_much(tmp_path, 300, 16_000)
    assert len(list_messages(program.http, headers)) == 303
    assert "Traceback" not in program.log()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_list_that_fails_in_the_middle_is_cut(http, tmp_path, monkeypatch, caplog, version):
    monkeypatch.setattr(factoryapp, "LIST_ROWS", 10)
    headers, pieces, real = join(http, "alice"), [], factoryapp.read_piece
    monkeypatch.setattr(factoryapp, "LIST_PIECE_BYTES", 3000)
    store_much(tmp_path, 50, 100)

    def fail_at_the_third(*args):
        pieces.append(args)
        if len(pieces) == 3:
            raise sqlite3.OperationalError("disk I/O error")
        return real(*args)

    monkeypatch.setattr(factoryapp, "read_piece", fail_at_the_third)
    answer = talk(http, raw("GET", "/api/messages/", headers, version=version))
    assert statuses(answer) == [200] and 0 < answer.count(b'"text":"x') < 50
    assert answer.endswith(b"EOF") and b"0\r\n\r\n" not in answer
    assert "disk I/O error" in caplog.text and len(http.server.channels) == 1


def test_others_are_served_between_the_pieces_of_long_lists(http, tmp_path):
    headers = join(http, "alice")
    store_much(tmp_path, 3000, 16_000)
    socks = [ask_for_a_long_list(http, headers) for _ in range(4)]
    threads = [threading.Thread(target=take_all, args=(sock,)) for sock in socks]
    for thread in threads:
        thread.start()
    served, slowest = 0, 0
    while any(thread.is_alive() for thread in threads):
        started_at = time.monotonic()
        http.get("/x", status=404)
        served, slowest = served + 1, max(slowest, time.monotonic() - started_at)
    assert served > 3 and slowest < 1


@pytest.mark.parametrize("seconds, status", [(4, 200), (6, 503)])
def test_who_has_waited_in_a_pool_for_long_is_refused(
    http, monkeypatch, pass_seconds, seconds, status
):
    register(http, "alice")
    may_hash, real = threading.Event(), factoryapp.hashlib.scrypt

    def hash_when_told(*args, **kwargs):
        may_hash.wait(10)
        return real(*args, **kwargs)

    monkeypatch.setattr(factoryapp.hashlib, "scrypt", hash_when_told)
    hashes = note_threads(monkeypatch, factoryapp.hashlib, "scrypt")
    body = json.dumps({"username": "alice", "password": PASSWORD}).encode()
    socks = []
    for _ in range(factoryapp.HASHES_AT_ONCE + 1):
        socks.append(socket.create_connection(http.address, timeout=5))
        socks[-1].sendall(raw("POST", "/auth/token/", {"Connection": "close"}, body))
        while len(hashes) < min(len(socks), factoryapp.HASHES_AT_ONCE):
            http.get("/x", status=404)
    serve_until(http, lambda: http.server.pools["hashing"].qsize())
    pass_seconds(seconds)
    may_hash.set()
    answers = [take_all(sock) for sock in socks]
    assert [statuses(answer) for answer in answers] == [[200], [200], [status]]
    assert (b"Retry-After: 5" in answers[-1]) == (status == 503)


@pytest.mark.parametrize(
    "before, status", [(raw("GET", "/x"), 404), (raw_post({}), 401), (raw("GET", "/health/"), 200)]
)
def test_who_asks_behind_another_request_whether_to_continue_is_told_after_its_answer(
    http, before, status
):
    asked = raw_post({**join(http, "alice"), "Expect": "100-continue"})
    head, _, body = asked.partition(b"\r\n\r\n")
    with socket.create_connection(http.address, timeout=5) as sock:
        sock.sendall(before + head + b"\r\n\r\n")
        answer = b""
        while b" 100 Continue\r\n\r\n" not in answer:
            answer += sock.recv(65536)
        sock.sendall(body)
        while not answer.endswith(b"}"):
            answer += sock.recv(65536)
    assert statuses(answer) == [status, 100, 201]


TOMORROW = factoryapp.iso(time.time() + 86_400)


@pytest.mark.parametrize(
    "method, path, sent",
    [
        ("GET", "/api/users/get-telegram-token/", None),
        ("POST", "/api/users/keys/", {"name": "cron"}),
        ("POST", "/api/messages/", {"text": "later", "send_at": TOMORROW}),
        ("POST", "/api/messages/", {"text": "text", "recipient": ["alice"]}),
    ],
)
def test_request_that_waits_while_its_password_changes_stores_nothing(
    http, monkeypatch, method, path, sent
):
    headers, signed_in, real = join(http, "alice"), [], factoryapp.sign_in

    def noted():
        user = real()
        signed_in.append(factoryapp.local.answer.pool)
        return user

    monkeypatch.setattr(factoryapp, "sign_in", noted)
    body = json.dumps(sent).encode() if sent else b""
    with socket.create_connection(http.address, timeout=5) as sock:
        with factoryapp.transaction() as db:
            sock.sendall(raw(method, path, {**headers, "Connection": "close"}, body))
            serve_until(http, lambda: "patient" in signed_in)
            factoryapp.set_password(db, 1, *db.one("SELECT password, 'new' FROM users"))
        assert statuses(take_all(sock)) == [401]
    tables = "link_tokens", "api_keys", "scheduled", "messages"
    assert [count(table) for table in tables] == [0, 0, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of ours")
def test_addresses_take_turns_in_a_pool_whatever_one_of_them_asks(http, monkeypatch):
    may_hash, order = threading.Event(), []
    check, make = factoryapp.check_password, factoryapp.Answer.make

    def noted(answer, pool=None):
        if pool:
            order.append(answer.addr[0])
        make(answer, pool)

    monkeypatch.setattr(factoryapp.Answer, "make", noted)
    monkeypatch.setattr(
        factoryapp, "check_password", lambda *args: may_hash.wait(10) and check(*args)
    )
    body = json.dumps({"username": "alice", "password": PASSWORD}).encode()
    socks = []
    for n, address in enumerate(["127.0.0.1"] * 8 + ["127.0.0.2"], 1):
        socks.append(socket.create_connection(http.address, 5, (address, 0)))
        socks[-1].sendall(raw("POST", "/auth/token/", {"Connection": "close"}, body))
        while http.server.pools["hashing"].qsize() < n - factoryapp.HASHES_AT_ONCE:
            http.get("/x", status=404)
    may_hash.set()
    assert [statuses(take_all(sock)) for sock in socks] == [[401]] * 9
    assert order.index("127.0.0.2") <= 2 * factoryapp.HASHES_AT_ONCE


def test_no_more_is_read_while_what_was_sent_behind_a_request_waits(http, monkeypatch):
    lengths, real = [], factoryapp.Answer.make

    def noted(answer, *args):
        lengths.append(len(answer.asker.unread))
        real(answer, *args)

    monkeypatch.setattr(factoryapp.Answer, "make", noted)
    with socket.create_connection(http.address, timeout=5) as sock:
        sock.sendall(raw("GET", "/x") * 1500)
        answer = b""
        while len(lengths) < 1500 or answer.count(b"HTTP/1.1 404 ") < 1500:
            answer += sock.recv(2**20)
    assert 1000 < max(lengths) < 10_000


@pytest.mark.parametrize("size", [1, 7, 100, 8192])
def test_of_requests_that_come_at_once_one_is_read_at_a_time(http, monkeypatch, size):
    are_alone, real = [], factoryapp.Answer.make

    def noted(answer, *args):
        channel = answer.asker
        are_alone.append(channel.answer is answer and not channel.request)
        real(answer, *args)

    monkeypatch.setattr(factoryapp.Answer, "make", noted)
    asked = b" \r\n".join([raw("GET", "/x"), raw_post({}), raw("GET", "/health/")] * 9)
    with socket.create_connection(http.address, timeout=5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(asked), size):
            sock.sendall(asked[start : start + size])
        answer = b""
        while len(statuses(answer)) < 27:
            assert (chunk := sock.recv(65536))
            answer += chunk
    assert statuses(answer) == [404, 401, 200] * 9 and all(are_alone)


def test_only_the_first_round_waits_for_another_program_that_writes_for_long(
    http, tmp_path, monkeypatch
):
    headers, waits, real = join(http, "alice"), [], factoryapp.transaction

    def noted():
        if threading.current_thread().name == "serving":
            waits.append(factoryapp.patience())
        return real()

    monkeypatch.setattr(factoryapp, "transaction", noted)
    socks = []
    with another_writer(tmp_path / "factoryapp.db"):
        for _ in range(3):
            socks.append(socket.create_connection(http.address, timeout=5))
            socks[-1].sendall(raw_post(headers))
            serve_until(http, lambda: len(waits) == len(socks))
    assert [statuses(sock.recv(65536)) for sock in socks] == [[201]] * 3
    post(http, headers, "text")
    post(http, headers, "text")
    assert waits[:3] == [0.01, 0, 0] and waits[-1] == 0.01


def test_login_and_health_are_answered_while_all_else_waits_for_another_program(http, tmp_path):
    headers, waiting = join(http, "alice"), []
    body = {"username": "alice", "password": PASSWORD}
    with another_writer(tmp_path / "factoryapp.db"):
        for n in range(12):
            new = json.dumps({**body, "username": f"user{n}"}).encode()
            for request in (raw_post(headers), raw("POST", "/api/users/register/", {}, new)):
                waiting.append(socket.create_connection(http.address, timeout=5))
                waiting[-1].sendall(request)
        pools = [http.server.pools[pool] for pool in ("patient", "registering")]
        left = [12 - factoryapp.POOLS[pool] for pool in ("patient", "registering")]
        serve_until(http, lambda: [pool.qsize() for pool in pools] == left)
        http.post_json("/auth/token/", body, status=200)
        http.get("/health/", status=200)
        assert [pool.qsize() for pool in pools] == left
    assert [statuses(sock.recv(65536)) for sock in waiting] == [[201]] * 24


def test_request_behind_one_in_a_pool_is_answered_after_it_and_in_a_round(http, monkeypatch):
    headers, may_hash = join(http, "alice"), threading.Event()
    threads, real = note_threads(monkeypatch, factoryapp, "add_message"), factoryapp.hashlib.scrypt

    def hash_when_told(*args, **kwargs):
        may_hash.wait(10)
        return real(*args, **kwargs)

    monkeypatch.setattr(factoryapp.hashlib, "scrypt", hash_when_told)
    body = json.dumps({"username": "alice", "password": PASSWORD}).encode()
    with socket.create_connection(http.address, timeout=3) as sock:
        sock.sendall(raw("POST", "/auth/token/", body=body) + raw_post(headers))
        assert list_messages(http, headers) == []  # others are served meanwhile
        may_hash.set()
        answer = b""
        while len(statuses(answer)) < 2:
            answer += sock.recv(65536)
    assert statuses(answer) == [200, 201] and threads == ["serving"]


def post_in_a_pool(http, headers, text):
    part = f'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n{text}\r\n--x--\r\n'
    headers = {**headers, "Content-Type": MULTIPART}
    [answer] = http.ask(("POST", "/api/messages/", part.encode(), headers))
    assert answer.status == 201


def fail_to_deliver(telegram, bot_api, chat_id):
    bot_api.failures[chat_id].append(TOO_LONG)
    deliver_all(telegram)


@pytest.mark.parametrize(
    "query, act, told",
    [
        ("?after=1&wait=50", "post", "news"),
        ("?after=1&before=3&limit=1&wait=50", "post in a pool", "news"),
        ("?reply_to=1&wait=50", "reply", "news"),
        ("?after=1&wait=50", "write to the bot", "news"),
        ("?delivery=sent&wait=50", "deliver", "sent"),
        ("1/?wait=50", "deliver", "sent"),
        ("1/?wait=50", "fail to deliver", "failed"),
        ("?delivery=failed&wait=50", "unlink", "failed"),
        ("1/?wait=50", "cancel", "cancelled"),
        ("?wait=50", "deliver", "sent"),
        ("?wait=50", "post to another", "news"),
    ],
)
def test_who_waits_is_answered_once_there_is_something(
    http, telegram, bot_api, pair, wait_for_a_wake_up, query, act, told
):
    alice, bob = pair
    post(http, alice, "text", recipient="bob")
    known = http.get("/api/messages/", headers=alice).headers["ETag"]
    known = {"If-None-Match": known} if query == "?wait=50" else {}
    waiting = wait_for_a_wake_up({**alice, **known}, query)
    {
        "post": lambda: post(http, bob, "news", recipient="alice"),
        "post to another": lambda: post(http, alice, "news", recipient="bob"),
        "post in a pool": lambda: post_in_a_pool(http, alice, "news"),
        "reply": lambda: post(http, bob, "news", reply_to=1),
        "write to the bot": lambda: [bot_api.write(7, "news"), telegram.poll()],
        "deliver": lambda: deliver_all(telegram),
        "fail to deliver": lambda: fail_to_deliver(telegram, bot_api, 8),
        "cancel": lambda: cancel(http, alice),
        "unlink": lambda: http.post("/api/users/unlink-telegram/", headers=bob),
    }[act]()
    answer = waiting.getresponse()
    assert answer.status == 200 and f'"{told}"' in answer.read().decode()


def test_who_waits_is_answered_what_was_posted_in_its_own_round(http, monkeypatch):
    headers = join(http, "alice")
    monkeypatch.setattr(http.server, "time_to_wait", lambda: 600)
    waited, posted = http.ask_in_one_round(
        ("GET", "/api/messages/?wait=50", None, headers), message_request(headers, "news")
    )
    assert posted.status == 201 and json.loads(waited.body) == [json.loads(posted.body)]


def test_nothing_is_looked_up_for_who_waits_but_after_news_of_its_own(http, wait, monkeypatch):
    alice, bob = join(http, "alice"), join(http, "bob")
    lookups = note_threads(monkeypatch, factoryapp.Server, "wait_for_news")
    waiting = wait(alice, "?reply_to=1&wait=50")
    post(http, bob, "to himself")
    assert not is_answered(http, waiting) and len(lookups) == 1
    post(http, alice, "to herself, and no answer")
    assert not is_answered(http, waiting) and len(lookups) == 2


@pytest.mark.parametrize("step", [-3600, 120])
@pytest.mark.parametrize(
    "method, query, known, status, told",
    [
        ("GET", "?after=1&before=2&wait=50", {}, 200, b"[]"),
        ("GET", "?before=2&wait=50", {"If-None-Match": "*"}, 304, b""),
        ("GET", "1/?wait=50", {}, 200, b'"delivery":"queued"'),
        ("HEAD", "?reply_to=1&wait=50", {}, 200, b""),
    ],
)
def test_waiting_ends_with_its_time_whatever_the_clock_says_and_others_hear(
    http, linked, clock, wait, caplog, step, method, query, known, status, told
):
    headers = log_in(http, "alice")
    post(http, headers, "text")
    caplog.set_level("INFO")
    waiting = wait({**headers, **known}, query, method)
    clock.seconds += step
    clock.ticks += 49.75
    post(http, headers, "news to others")
    assert not is_answered(http, waiting) and http.server.time_to_wait() == 0.25
    clock.ticks += 0.25
    answer = waiting.getresponse()
    assert answer.status == status and told in answer.read()
    lines = [line for line in caplog.messages if line.startswith(f"{method} /api/messages/")]
    assert len(lines) == 1 and f" {status} " in lines[0]


def test_who_waits_again_on_its_connection_has_its_whole_time_again(http, clock, wait):
    headers = join(http, "alice")
    waiting = wait(headers)
    clock.ticks += 50
    assert waiting.getresponse().read() == b"[]"
    waiting.request("GET", "/api/messages/?wait=50", headers=headers)
    serve_until(http, lambda: http.server.waiting)
    assert 0 < http.server.time_to_wait()


def test_message_that_is_forgotten_while_it_is_waited_for_is_not_there_in_the_end(
    http, linked, clock, wait, monkeypatch
):
    headers, sent = log_in(http, "alice"), {"name": "cron"}
    key = http.post_json("/api/users/keys/", sent, headers=headers).json["key"]
    known = {"Authorization": f"Bearer {key}", "If-None-Match": "*"}
    post(http, headers, "text")
    cancel(http, headers)
    waiting = [wait(known, query) for query in ("?wait=50", "1/?wait=50")]
    clock.seconds += 2 * 86_400
    forget(1, monkeypatch)
    assert waiting[1].getresponse().status == 404 and not is_answered(http, waiting[0])
    clock.ticks += 50
    serve_until(http, lambda: not http.server.waiting)
    assert waiting[0].getresponse().status == 304


def test_whose_key_or_password_ends_while_it_waits_is_refused(http, wait_for_a_wake_up):
    headers = join(http, "alice")
    keys = [
        http.post_json("/api/users/keys/", {"name": name}, headers=headers).json["key"]
        for name in ("deleted", "ended by the new password")
    ]
    deleted, ended = [wait_for_a_wake_up({"Authorization": f"Bearer {key}"}) for key in keys]
    signed_in = wait_for_a_wake_up(headers)
    http.delete("/api/users/keys/1/", headers=headers)
    assert deleted.getresponse().status == 401 and not is_answered(http, ended)
    change = {"current_password": PASSWORD, "new_password": "An0ther-pass-17"}
    http.post_json("/api/users/set-password/", change, headers=headers)
    assert [ended.getresponse().status, signed_in.getresponse().status] == [401, 401]


def test_who_waits_hears_of_what_another_process_wrote(start, tmp_path):
    program = start()
    headers, answers = join(program.http, "alice"), []
    ask = "GET", "/api/messages/?wait=20", None, headers
    waiting = threading.Thread(target=lambda: answers.extend(Client(program).ask(ask)))
    waiting.start()
    time.sleep(0.2)
    started_at = time.monotonic()
    assert administer(tmp_path, "--disable", "alice")[0] == 0
    waiting.join()
    assert answers[0].status == 401 and time.monotonic() - started_at < 5


def leave_with_a_reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /half HTTP/1.1\r\nX"])
@pytest.mark.parametrize(
    "leave", [socket.socket.close, leave_with_a_reset, lambda sock: sock.shutdown(socket.SHUT_WR)]
)
def test_who_leaves_does_not_wait_any_more(http, wait_for_a_wake_up, leave, sent):
    headers = join(http, "alice")
    sock = wait_for_a_wake_up(headers).sock
    sock.sendall(sent)
    leave(sock)
    serve_until(http, lambda: not http.server.waiting)
    post(http, headers, "news to nobody")
    assert len(http.server.channels) == 1


def test_no_more_wait_than_may(http, wait_for_a_wake_up, monkeypatch):
    monkeypatch.setattr(factoryapp, "WAITING", 3)
    monkeypatch.setattr(factoryapp, "WAITING_OF_A_USER", 2)
    alice, bob, carol = join(http, "alice"), join(http, "bob"), join(http, "carol")
    first, _ = wait_for_a_wake_up(alice), wait_for_a_wake_up(alice)
    one_more = raw("GET", "/api/messages/?wait=50", {**alice, "Connection": "close"})
    assert talk(http, one_more).endswith(b"[]EOF")
    wait_for_a_wake_up(bob)
    one_more = raw("GET", "/api/messages/?wait=50", {**carol, "Connection": "close"})
    assert talk(http, one_more).endswith(b"[]EOF")
    first.close()
    serve_until(http, lambda: len(http.server.waiting) < 3)
    wait_for_a_wake_up(alice)
    assert len(http.server.waiting) == 3


@pytest.mark.parametrize(
    "behind, status",
    [
        ([raw("GET", "/x")], 404),
        ([b"GET /x HT", b"TP/1.1\r\n\r\n"], 404),
        ([b"\r\n" * 5000 + raw("GET", "/x")], 404),
        ([b"\0\xff no HTTP\r\n\r\n"], 400),
        ([raw("GET", "/api/messages/?wait=50")], 401),
    ],
)
def test_what_is_sent_behind_a_request_that_waits_is_answered_after_it(
    http, wait_for_a_wake_up, behind, status
):
    headers = join(http, "alice")
    waiting = wait_for_a_wake_up(headers)
    for piece in behind:
        waiting.sock.sendall(piece)
        assert not is_answered(http, waiting)
    post(http, headers, "news")
    answer = b""
    while len(statuses(answer)) < 2:
        answer += waiting.sock.recv(65536)
    assert statuses(answer) == [200, status]


def test_behind_a_request_that_waits_no_more_is_read_than_one_piece(http, wait):
    waiting = wait(join(http, "alice"))
    waiting.sock.setblocking(False)
    with suppress(BlockingIOError):
        waiting.sock.sendall(b"GET /x HTTP/1.1\r\n\r\n" * 50_000)
    for _ in range(9):
        assert not is_answered(http, waiting)
    [answer] = http.server.waiting
    assert 0 < len(answer.asker.unread) < 20_000


def test_all_who_wait_are_answered_when_the_program_ends_and_logged_then(start):
    program = start("--log-level", "info")
    headers, waiting = join(program.http, "alice"), []
    for _ in range(3):
        waiting.append(HTTPConnection(*program.address, timeout=5))
        waiting[-1].request("GET", "/api/messages/?wait=50", headers=headers)
        talk(program, raw("GET", "/x", {"Connection": "close"}))
    assert " 404 " in program.log() and "/api/messages/" not in program.log()
    assert program.end() == (0, pytest.approx(0, abs=2))
    assert [connection.getresponse().read() for connection in waiting] == [b"[]"] * 3
    assert program.log().count("GET /api/messages/ 200 ") == 3


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
        b"Content-Length: +2\r\n\r\n{}",
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"Transfer-Encoding: \x0bchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"X: a\nContent-Length: 2\r\n\r\n{}",
        b"Content-Length: -1\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"Content-Length: 99999999999999999999\r\n\r\n",
        b"Content-Length: 2\n\n{}",
    ],
)
def test_requests_that_others_might_read_otherwise_are_refused(http, lines):
    head = b"POST /auth/token/verify/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = talk(http, head + lines)
    assert statuses(answer)[0] in (400, 413, 501) and answer.endswith(b"EOF")
    header, _, body = answer.removesuffix(b"EOF").partition(b"\r\n\r\n")
    assert json.loads(body)["detail"] and b"Server" not in header and b"nosniff" in header


def test_chunks_in_http_1_0_are_refused(http):
    head = b"POST /auth/token/verify/ HTTP/1.0\r\nConnection: keep-alive\r\n"
    answer = talk(http, head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.0 400") and answer.endswith(b"EOF")


CHUNK = b"8000\r\n" + b" " * 0x8000 + b"\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [b"Content-Length: 65537\r\n\r\n", b" " * 65_537],
        [b"Content-Length: 300000\r\n\r\n"],
        [b"Transfer-Encoding: chunked\r\n\r\n", *[CHUNK] * 3, b"0\r\n\r\n"],
        [b"Transfer-Encoding: chunked\r\n\r\n", *[CHUNK] * 7],
    ],
)
def test_body_over_the_limit_is_refused_by_length_and_chunked(http, pieces):
    head = b"POST /auth/token/verify/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = talk(http, head, b"Connection: close\r\n", *pieces)
    assert answer.startswith(b"HTTP/1.1 413") and b'"detail"' in answer and answer.endswith(b"EOF")


def test_header_over_the_limit_is_refused(http):
    answer = talk(http, b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n")
    assert statuses(answer) == [431] and b'"detail"' in answer


@pytest.mark.parametrize("coding", ["chunked", "Chunked", " \tCHUNKED "])
def test_body_in_chunks_is_read_and_the_next_request_too(http, coding):
    headers = {**join(http, "alice"), "Transfer-Encoding": coding, "Content-Type": "text/plain"}
    head = raw("POST", "/api/messages/", headers).replace(b"Content-Length: 0\r\n", b"")
    answer = talk(http, head + b"2\r\nhi\r\n0\r\n\r\n" + raw("GET", "/x", version="1.0"))
    assert statuses(answer) == [201, 404] and b'"text":"hi"' in answer


@pytest.mark.parametrize(
    "codings",
    [
        ["chunked, chunked"],
        [","],
        [""],
        [" , "],
        ["chunked,"],
        [",chunked"],
        ["identity"],
        ["gzip, chunked"],
        ["xchunked"],
        ["chunked;q=1"],
        ["chunked\x0b"],
        ["chunked\x85"],
        ['"chunked"'],
        ["chun\u212aed"],
        ["chunked", "chunked"],
        ["", "chunked"],
        ["chunked", "identity"],
    ],
)
def test_transfer_encoding_that_others_may_read_in_another_way_is_refused(http, codings):
    lines = "".join(f"Transfer-Encoding: {coding}\r\n" for coding in codings).encode()
    head = b"POST /auth/token/ HTTP/1.1\r\n" + lines + b"Content-Type: application/json\r\n\r\n"
    answer = talk(http, head + b"2\r\n{}\r\n0\r\n\r\n" + raw("GET", "/x", version="1.0"))
    assert statuses(answer) in ([400], [501]) and answer.endswith(b"EOF")
    assert b'"detail":' in answer


@pytest.mark.parametrize(
    "line, status",
    [
        (b"GET http://[ HTTP/1.0", 400),
        (b"GET http://[x]/ HTTP/1.0", 400),
        (b"GET http://]/x HTTP/1.0", 400),
        (b"GET //[ HTTP/1.0", 404),
        (b"GET /x HTTP/1.0\r\nContent-Length: " + b"1" * 5000, 400),
        (b"GET /x HTTP/1.0\r\nContent-Length: " + b"0" * 5000, 400),
        (b"GET /x HTTP/1.0\r\nContent-Length: 1, 1", 400),
        (b"GET /x HTTP/1.0\r\nContent-Length: \xd9\xa3", 400),
    ],
    ids=range(8),
)
def test_what_is_no_request_is_refused_without_a_traceback(http, caplog, line, status):
    answer = talk(http, line + b"\r\n\r\n")
    assert statuses(answer) == [status] and b'{"detail":' in answer
    assert errors(caplog) == []


ODD_PIECES = [
    *(
        b"\x1b[2J",
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b"\x9b",
        b"\xc2\x9b",
        b"\xff",
        b"%ff",
        b"%0a",
        b"%1b",
    ),
    *(
        b"%c2%9b",
        b"[",
        b"]",
        b"://",
        b"\xe2\x80\xa8",
        b"9" * 5000,
        b"-1",
        b"\t",
        b":",
        b",",
        b'"',
        b"\\",
    ),
    *(
        b"{",
        b"%",
        b"?",
        b"#",
        b"//",
        b"\\ud800",
        b"\\u001b",
        b"NaN",
        b"1e400",
        b"utf-7",
        b"idna",
        b"rot13",
    ),
    *(b"undefined", b"utf-16", b"chunked", b"HTTP/1.1", b"\x7f", b"\x85"),
]


def odd_requests(headers, count):
    """Requests of every kind, with odd pieces in odd places; the first are odd by intent."""
    draw, name = random.Random(14), b'\r\nContent-Disposition: form-data; name="username"\r\n'
    part = b"--x" + name + b"Content-Type: text/plain; charset=%s\r\n\r\nbob\r\n--x--\r\n"
    multipart = {"Content-Type": MULTIPART}
    for charset in (b"\x1b[2J", b"\xc2\x9b2J", b"x\n2026-01-01 00:00:00,000 ERROR forged"):
        yield raw("POST", "/auth/token/", multipart, part % charset)
    sent = {"username": "bob\n\x1b[2J\x9b\u2028", "password": "x"}
    yield raw("POST", "/auth/token/", body=json.dumps(sent, ensure_ascii=False).encode())
    yield raw("GET", "/auth/%0a2026-01-01%20ERROR%1b[2J%c2%9b%e2%80%a8/")
    yield raw("GET", "/auth/token/", {"X-Forwarded-For": "\x85\u009b"})
    usual = [
        raw("GET", "/api/messages/?wait=0&limit=3", {**headers, "X-Forwarded-For": "1.2.3.4, ::1"}),
        raw("POST", "/api/users/register/", body=b'{"username":"bob","password":"S3cure"}'),
        raw("POST", "/auth/token/", multipart, part % b"utf-8"),
        raw("POST", "/auth/token/", {"Content-Type": FORM}, b"username=bob&password=%D0%B9"),
        raw("POST", "/api/messages/", headers, b'{"text":"hi","recipient":["alice"],"silent":1}'),
        raw("OPTIONS", "http://[::1]:80/api/messages/", {"Expect": "100-continue"}),
        raw("DELETE", "/api/messages/1/", headers),
    ]
    for _ in range(count):
        request = bytearray(draw.choice(usual))
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(draw.choice((60, len(request))))
            request[at : at + draw.choice((0, 1, 8))] = draw.choice(ODD_PIECES)
        yield bytes(request)


def test_nothing_that_clients_send_is_a_control_character_or_a_traceback_in_the_log(start):
    program = start("--log-level", "debug", "--trusted-proxy", "127.0.0.1")
    for request in odd_requests(join(program.http, "alice"), 600):
        with socket.create_connection(program.address, timeout=5) as sock, suppress(OSError):
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(65536)
    program.http.get("/x", status=404)
    assert program.end()[0] == 0
    lines = program.log().split("\n")[:-1]
    a_line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING) "
    assert len(lines) > 200 and all(line.isprintable() for line in lines)
    assert [line for line in lines if not re.match(a_line, line)] == []


@pytest.mark.parametrize(
    "header", [b"X:" + b" " * 16_000 + b"a", b"X:" + b"\t " * 50 + b"a", b"X: a\r\n b", b"X: \0"]
)
def test_header_that_takes_long_to_parse_is_refused_before(http, header):
    request, started_at = b"GET / HTTP/1.1\r\nHost: a\r\n" + header, time.monotonic()
    assert statuses(talk(http, request + b"\r\n\r\n")) == [400]
    assert time.monotonic() - started_at < 1


def test_thirty_logins_at_once_hold_up_nobody_and_fit_in_memory(start):
    program = start(PYTHONPATH="")
    headers = join(program.http, "alice")
    sent, done = {"username": "alice", "password": PASSWORD}, []
    logins = [
        threading.Thread(
            target=lambda: done.append(program.http.post_json("/auth/token/", sent, status="*"))
        )
        for _ in range(30)
    ]
    for login in logins:
        login.start()
    slowest = most = 0
    while any(login.is_alive() for login in logins):
        started_at = time.monotonic()
        program.http.get("/api/users/", headers=headers)
        slowest = max(slowest, time.monotonic() - started_at)
        most = max(most, program.megabytes())
        time.sleep(0.05)
    assert slowest < 2 and most < 96 and len(done) == 30
    # On a slow machine some wait for too long.
    assert done[0].status_int == 200 and {answer.status_int for answer in done} <= {200, 503}


def store_much(folder, count, length):
    """Store so many messages of alice's, past the server."""
    with closing(sqlite3.connect(folder / "factoryapp.db")) as db, db:
        db.execute(
            """
            WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?)
            INSERT INTO messages (sender_id, recipient_id, text, created_at, source, delivery)
            SELECT 1, 1, printf('%.*c', ?, 'x'), '2026-11-23T18:08:27Z', 'api', 'unlinked' FROM n
            """,
            (count, length),
        )


def test_memory_for_a_long_list_does_not_grow_with_it(start, tmp_path):
    program = start()
    headers = join(program.http, "alice")
    store_much(tmp_path, 300_000, 100)
    before, length = program.megabytes(), 0
    with socket.create_connection(program.address) as sock:
        sock.sendall(raw("GET", "/api/messages/", {**headers, "Connection": "close"}))
        while chunk := sock.recv(2**20):
            length += len(chunk)
    assert length > 60_000_000 and program.megabytes("VmHWM") - before < 50


def test_list_of_who_reads_slowly_holds_up_nobody(start, tmp_path):
    program = start()
    headers = join(program.http, "alice")
    store_much(tmp_path, 1500, 16_000)
    slow = []
    for _ in range(20):
        slow.append(socket.create_connection(program.address))
        slow[-1].sendall(raw("GET", "/api/messages/", headers))
        assert slow[-1].recv(100)
    started_at = time.monotonic()
    program.http.get("/health/")
    assert time.monotonic() - started_at < 5
    assert program.megabytes() < 300
    for sock in slow:
        sock.close()


def test_clients_that_trickle_do_not_keep_others_out(start):
    program = start()
    trickling = []
    for n in range(2 * factoryapp.CONNECTIONS):
        sock = socket.create_connection(program.address)
        sock.setblocking(False)
        trickling.append((sock, b"G" if n % 3 else b"\r\n\r\n"))
    stop = threading.Event()

    def trickle():
        while not stop.wait(0.3):
            for sock, piece in trickling:
                try:
                    sock.send(piece)
                except OSError:
                    pass  # closed: what is hoped for

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        time.sleep(0.5)
        started_at = time.monotonic()
        program.http.get("/api/users/", status=401)
        assert time.monotonic() - started_at < 10
    finally:
        stop.set()
        thread.join()
        for sock, _ in trickling:
            sock.close()


@pytest.mark.parametrize(
    "version, said, closes",
    [
        ("1.1", "close", True),
        ("1.1", "TE, close", True),
        ("1.1", "Close,TE", True),
        ("1.1", "TE", False),
        ("1.1", "close-not, keep-alive", False),
        ("1.1", "TE,\tclose\t", True),
        ("1.0", "TE, Keep-Alive", False),
        ("1.0", "keep-alive, close", True),
        ("1.0", "TE", True),
    ],
)
def test_each_word_of_the_connection_header_is_heeded(http, version, said, closes):
    answer = talk(http, raw("GET", "/x", {"Connection": said}, version=version), seconds=0.3)
    assert statuses(answer) == [404] and answer.endswith(b"EOF") == closes


def test_tls_on_the_plain_port_is_closed_at_once_and_told_once_a_minute(http, clock, caplog):
    caplog.set_level("WARNING")
    for seconds, lines in ((0, 1), (0, 1), (61, 2)):
        clock.move(seconds)
        refused = pytest.raises((ssl.SSLError, ConnectionError))
        with refused, socket.create_connection(http.address, timeout=3) as sock:
            ssl._create_unverified_context().wrap_socket(sock, server_hostname="localhost")
        assert talk(http, b"\x16") == b"EOF"  # the rest may come later
        assert len(caplog.messages) == lines and "plain HTTP" in caplog.text
    http.get("/x", status=404)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"\r\n\r\n"],
        [b"\r\n", b"\r\n"],
    ],
)
def test_blank_lines_do_not_keep_a_connection_open(http, monkeypatch, pieces):
    real, ahead = time.monotonic, [0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])
    with socket.create_connection(http.address, timeout=1) as sock:
        for ahead[0] in (0, 40):
            for piece in pieces:
                sock.sendall(piece)
                http.get("/x", status=404)  # once it is answered, the piece has been read
        ahead[0] = 80
        http.get("/x", status=404)
        assert sock.recv(1) == b""


# --- The program ----------------------------------------------------------------------------------


def check_database(path):
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []


@contextmanager
def another_writer(path):
    """Another program that is writing to the database."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


def run_program(*arguments, prefix=(), program=HERE / "factoryapp.py", typed=b"", **env):
    """The exit code, standard output and standard error of a run that ends by itself."""
    done = subprocess.run(
        [*prefix, sys.executable, program, *arguments],
        env={**os.environ, **env},
        input=typed,
        capture_output=True,
        timeout=10,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def at_start(folder, *lines):
    """Have each Python whose PYTHONPATH is this folder run these lines first."""
    (folder / "sitecustomize.py").write_text("\n".join(lines))


def allow_files(count):
    """A prefix of a command, which so may have so many files open."""
    return "sh", "-c", f'ulimit -n {count}; exec "$@"', "sh"


@pytest.mark.parametrize("files", [256, 248])
def test_with_few_files_it_works_by_fewer_connections(start, files):
    program = start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))
    headers = join(program.http, "alice")
    store_much(program.folder, 600, 16_000)
    lists = raw("GET", "/api/messages/", headers)
    socks = []
    for request in [b""] * 60 + [lists] * 10:
        socks.append(socket.create_connection(program.address))
        socks[-1].sendall(request)
        program.http.close()
        post(program.http, headers, "text")
    assert program.http.get("/health/").json["status"] == "ok"
    assert not re.search("Traceback|ERROR", program.log())
    for sock in socks:
        sock.close()


def test_without_threads_to_send_the_outbox_sends_itself(telegram, bot_api, monkeypatch, caplog):
    queue(7, 8)
    monkeypatch.setattr(factoryapp, "start_thread", refuse_thread)
    stop = threading.Event()
    outbox = threading.Thread(target=factoryapp.run_outbox, args=(telegram, stop))
    outbox.start()
    bot_api.wait_for(lambda: len(bot_api.sent) == 2)
    stop.set()
    outbox.join(5)
    assert "0 threads send" in caplog.text


@as_root
@pytest.mark.parametrize("threads, code", [(1, 2), (5, 2), (15, 0)])
def test_with_few_threads_it_says_so_or_works(start, tmp_path, threads, code):
    tmp_path.chmod(0o777)
    may_read = "=+dac_override,+dac_read_search"
    as_another = "--reuid=54321 --regid=54321 --clear-groups".split()
    prefix = ["setpriv", *as_another, f"--inh-caps{may_read}", f"--ambient-caps{may_read}"]
    prefix += ["prlimit", f"--nproc={threads}"]
    if code:
        database = str(tmp_path / "factoryapp.db")
        assert run_program("--db", database, "--port", "0", prefix=prefix) == (
            2,
            "",
            "factoryapp: can't start new thread: allow 100 more (ulimit -u, or TasksMax).\n",
        )
        return
    program = start(prefix=prefix)
    program.type(link_token(program.http, join(program.http, "alice")))
    program.wait_for("успешно привязаны")  # by the one sender that there is a thread for
    assert program.end()[0] == 0


def test_with_too_few_files_it_says_how_many_it_needs():
    code, _, err = run_program(prefix=allow_files(240))
    assert code == 2 and "240 open files are too few: allow 440 (ulimit" in err


def test_as_many_files_are_allowed_as_are_needed(start):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))

    program = start(preexec_fn=limit)
    limits = Path(f"/proc/{program.process.pid}/limits").read_text()
    assert re.search(r"Max open files +440 +4096", limits)


def test_help_explains_every_setting():
    code, out, _ = run_program("--help")
    assert code == 0
    for setting in (
        "--host",
        "--port",
        "--db",
        "FACTORYAPP_HOST",
        "FACTORYAPP_PORT",
        "FACTORYAPP_DB",
        "TELEGRAM_BOT_TOKEN",
        "TELEGRAM_API_URL",
        "FACTORYAPP_SECRET",
        "--trusted-proxy",
    ):
        assert setting in out


@pytest.mark.parametrize(
    "arguments, env, hint",
    [
        ([], {"TELEGRAM_BOT_TOKEN": "nonsense"}, "@BotFather"),
        ([], {"TELEGRAM_BOT_TOKEN": "0:terminal"}, "@BotFather"),
        *[
            ([], {"TELEGRAM_BOT_TOKEN": BOT_TOKEN, "TELEGRAM_API_URL": url}, "TELEGRAM_API_URL")
            for url in ("telegram", "http://[::1", "http://h:99999", "ftp://h")
        ],
        ([], {"FACTORYAPP_SECRET": "short"}, "at least 32 bytes"),
        ([], {"FACTORYAPP_PORT": "eighty"}, "--port"),
        (["--port", "99999"], {}, "--port"),
        (["--prot", "1"], {}, "--help"),
        (["--host", "256.1.1.1"], {}, "--host"),
        (["--port", "TAKEN"], {}, "--port"),
        (["--db", "/nonexistent/factoryapp.db"], {}, "--db"),
        (["--db", "FOLDER"], {}, "--db"),
        (["--db", "NEWER"], {}, "newer"),
        (["--db", "TEXT"], {}, "--db"),
        (["--db", "OTHER"], {}, "another program's"),
        (["--db", ""], {}, "--db"),
        (["--db", "/dev/null"], {}, "--db"),
        (["--host", ""], {}, "--host"),
        (["--trusted-proxy", "nginx"], {}, "--trusted-proxy"),
        (["--log-level", "loud"], {}, "--log-level"),
        ([], {"FACTORYAPP_HOST": "256.1.1.1"}, "--host"),
        ([], {"FACTORYAPP_DB": "data\x01.db"}, "FACTORYAPP_DB"),
        ([], {"TELEGRAM_API_URL": "http://h\x7f", "TELEGRAM_BOT_TOKEN": BOT_TOKEN}, "_API_URL"),
        (["--host", "h\n1"], {}, "host"),
        ([], {"FACTORYAPP_TRUSTED_PROXY": "nginx"}, "--trusted-proxy"),
        ([], {"FACTORYAPP_LOG_LEVEL": "loud"}, "--log-level"),
    ],
)
def test_bad_setting_ends_with_one_sentence(tmp_path, arguments, env, hint):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        sqlite3.connect(tmp_path / "newer.db") as newer,
    ):
        newer.execute("CREATE TABLE factoryapp AS SELECT 1 AS id, 999 AS schema_version")
        (tmp_path / "text").write_text("this is no database " * 100)
        (tmp_path / "text").chmod(0o644)
        with sqlite3.connect(tmp_path / "other.db") as other:
            other.execute("CREATE TABLE users (name TEXT)")
        names = {
            "TAKEN": str(taken.getsockname()[1]),
            "FOLDER": str(tmp_path),
            "NEWER": str(tmp_path / "newer.db"),
            "TEXT": str(tmp_path / "text"),
            "OTHER": str(tmp_path / "other.db"),
        }
        arguments = ["--port", "0", "--db", str(tmp_path / "factoryapp.db")] + [
            names.get(a, a) for a in arguments
        ]
        if "FACTORYAPP_PORT" in env:
            arguments = arguments[2:]
        code, out, error = run_program(*arguments, **env)
    assert code == 2 and out == "" and hint in error
    assert error.startswith("factoryapp: ") and error.count("\n") == 1
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o644 and not (
        tmp_path / "text.lock"
    ).exists()  # not ours: not touched
    assert not (tmp_path / "factoryapp.db").exists()


@pytest.mark.parametrize("name", ["FACTORYAPP_SECRET", "TELEGRAM_BOT_TOKEN"])
@pytest.mark.parametrize("value", ["4242:a\tb" + "c" * 40, "4242:a\n\u0085b" + "c" * 40])
def test_secret_with_a_control_character_is_refused(configure, tmp_path, name, value):
    (tmp_path / "held").write_text(value)
    for env in ({f"{name}_FILE": str(tmp_path / "held")}, {f"{name}_FILE": "", name: value}):
        with pytest.raises(factoryapp.BadSetting, match="control character"):
            configure(**env)


def test_blanks_around_a_setting_do_not_count_and_an_empty_variable_is_none(start, bot_api):
    env = {"TELEGRAM_BOT_TOKEN": f" {BOT_TOKEN}\n", "TELEGRAM_API_URL": bot_api.url + "\r"}
    program = start(
        FACTORYAPP_HOST=" ", FACTORYAPP_SECRET="", FACTORYAPP_LOG_LEVEL=" error\r", **env
    )
    program.wait_for("bot: @factory_test_bot on Telegram")


@pytest.mark.parametrize(
    "behind",
    ["", "/", "//", "/bot", "/bot/", "/bot<token>", f"/bot{BOT_TOKEN}/getMe", "/bot{0}/{1}"],
)
def test_api_url_that_was_copied_with_more_than_the_address_works(configure, bot_api, behind):
    env = {"TELEGRAM_BOT_TOKEN": BOT_TOKEN, "TELEGRAM_API_URL": bot_api.url + behind}
    _, home = configure(**env)
    home.introduce()
    assert home.name == "@factory_test_bot"
    for url in (
        "x.example/bots",
        "x.example/bot/v2",
        "h/bot1-proxy",
        "bot",
        "bot1:8081",
        "bot4u.example",
    ):
        configure(**{**env, "TELEGRAM_API_URL": f"https://{url}/"})
        assert factoryapp.apihelper.API_URL == f"https://{url}/bot{{0}}/{{1}}"


def test_secrets_may_be_in_files(start, bot_api, tmp_path):
    secret = "a secret of more than thirty-two bytes"
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbf" + BOT_TOKEN.encode() + b"\r\n")
    (tmp_path / "secret").write_text(f"{secret}\n")
    program = start(
        TELEGRAM_BOT_TOKEN_FILE=f" {tmp_path / 'token'}",
        TELEGRAM_BOT_TOKEN="",
        TELEGRAM_API_URL=bot_api.url,
        FACTORYAPP_SECRET_FILE=str(tmp_path / "secret"),
    )
    program.wait_for("bot: @factory_test_bot on Telegram")
    headers = join(program.http, "alice")
    jwt.decode(headers["Authorization"].split()[1], secret, algorithms=["HS256"])


@pytest.mark.parametrize(
    "env, hint",
    [
        ({"FACTORYAPP_SECRET_FILE": "/nonexistent"}, "SECRET_FILE names /nonexistent"),
        ({"FACTORYAPP_SECRET_FILE": "/"}, "SECRET_FILE names /"),
        ({"FACTORYAPP_SECRET_FILE": "SHORT"}, "at least 32 bytes"),
        ({"FACTORYAPP_SECRET_FILE": "BLANKS"}, "SECRET_FILE names an empty file"),
        (
            {"TELEGRAM_BOT_TOKEN_FILE": "SHORT", "TELEGRAM_BOT_TOKEN": BOT_TOKEN},
            "_TOKEN is set too",
        ),
        ({"TELEGRAM_BOT_TOKEN_FILE": "SHORT"}, "TELEGRAM_BOT_TOKEN is malformed"),
    ],
)
def test_file_of_a_secret_that_cannot_be_used_is_told(configure, monkeypatch, tmp_path, env, hint):
    monkeypatch.chdir(tmp_path)
    Path("SHORT").write_text("short")
    Path("BLANKS").write_text("\ufeff" + " " * 40 + "\n")
    with pytest.raises(factoryapp.BadSetting, match=hint):
        configure(**env)


@pytest.mark.parametrize(
    "name, spelled, read",
    [
        ("FACTORYAPP_DB", "data.db\r", "data.db"),
        ("FACTORYAPP_HOST", "\t::1 \n", "::1"),
        ("FACTORYAPP_PORT", " 81\r\n", "81"),
        ("FACTORYAPP_PORT", "", "8080"),
        ("FACTORYAPP_HOST", " ", "127.0.0.1"),
        ("FACTORYAPP_SECRET", " " * 40, None),
    ],
)
def test_variables_are_read_alike(monkeypatch, configure, tmp_path, name, spelled, read):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, spelled)
    arguments, _ = factoryapp.read_settings([])
    settings = factoryapp.settings
    assert read in (arguments.host, arguments.port, Path(settings.db).name, settings.secret)


@pytest.mark.parametrize(
    "arguments, env, registration, keep_days",
    [
        ([], {}, "open", 0),
        (
            [],
            {"FACTORYAPP_REGISTRATION": " Closed\n", "FACTORYAPP_KEEP_DAYS": "365"},
            "closed",
            365,
        ),
        (["--registration=OPEN"], {"FACTORYAPP_REGISTRATION": "closed"}, "open", 0),
        (["--keep-days=0"], {"FACTORYAPP_KEEP_DAYS": "never"}, "open", 0),
    ],
)
def test_registration_and_keep_days_are_settings_as_the_others(
    configure, arguments, env, registration, keep_days
):
    configure(*arguments, **env)
    settings = factoryapp.settings
    assert (settings.registration, settings.keep_days) == (registration, keep_days)


@pytest.mark.parametrize(
    "name, value",
    [("registration", "no"), ("registration", "closed|open")]
    + [("keep-days", value) for value in ("-1", "1.5", "99999", "year", "1e3", "+1")],
)
def test_registration_or_keep_days_that_make_no_sense_are_refused(configure, name, value):
    for given in ([f"--{name}={value}"], []):
        env = {} if given else {f"FACTORYAPP_{name.upper().replace('-', '_')}": value}
        with pytest.raises(factoryapp.BadSetting, match=f"--{name} cannot be '{re.escape(value)}'"):
            configure(*given, **env)


@pytest.mark.parametrize("option", ["--host", "--port", "--db", "--trusted-proxy", "--log-level"])
def test_option_given_empty_is_an_error(configure, option):
    for value in ("", " \t"):
        with pytest.raises(factoryapp.BadSetting, match=f"{option[2:]} cannot be|invalid networks"):
            configure(option, value)


@pytest.mark.parametrize(
    "host, client",
    [("::", "127.0.0.1"), ("::", "::1"), ("[::1]", "::1"), ("[127.0.0.1]", "127.0.0.1")],
)
def test_host_is_read_in_brackets_and_any_of_ipv6_is_any_of_ipv4(host, client):
    with (
        factoryapp.listen(host, 0) as sock,
        socket.socket(socket.AF_INET6 if ":" in client else socket.AF_INET) as own,
    ):
        own.connect((client, sock.getsockname()[1]))
        sock.accept()[0].close()


@pytest.mark.parametrize(
    "lack, sentence",
    [
        ("sys.version_info = (3, 10, 13)", "Python 3.11 or newer is needed"),
        (
            "del sys.modules['sqlite3'], sys.modules['sqlite3.dbapi2']; "
            "sys.modules['_sqlite3'] = None",
            "_sqlite3 is missing",
        ),
        ("sqlite3.sqlite_version_info = (3, 36, 9)", "SQLite 3.37 or newer is needed"),
    ],
)
def test_what_is_missing_is_said_before_anything_else(tmp_path, lack, sentence):
    at_start(
        tmp_path,
        "import sqlite3, sys",
        lack,
    )
    code, out, error = run_program("--port", "eighty", PYTHONPATH=str(tmp_path))
    assert (code, out, error.count("\n")) == (2, "", 1) and re.search(sentence, error)


def test_python_too_old_for_the_syntax_shows_what_is_needed():
    source = (HERE / "factoryapp.py").read_text()
    ast.parse(source, feature_version=(3, 8))
    with pytest.raises(SyntaxError) as raised:
        ast.parse(source, feature_version=(3, 7))
    assert "Python 3.11 or newer is needed" in source.splitlines()[raised.value.lineno - 1]


def test_program_runs_without_what_windows_lacks(start, tmp_path):
    at_start(
        tmp_path,
        "import select, signal, sys",
        "sys.modules['fcntl'] = sys.modules['resource'] = None",
        "del select.poll, signal.SIGTTIN",
        "if hasattr(select, 'epoll'): del select.epoll",
    )
    env = {"PYTHONPATH": str(tmp_path)}
    program = start(**env)
    headers = join(program.http, "alice")
    post(program.http, headers, "kept")
    code, _, error = run_program("--port", "0", "--db", str(tmp_path / "factoryapp.db"), **env)
    assert code == 2 and "already running" in error and error.count("\n") == 1
    program.end(signal.SIGKILL)
    program = start(**env)
    assert [m["text"] for m in list_messages(program.http, headers)] == ["kept"]
    assert program.end()[0] == 0


def test_version_is_the_same_wherever_it_is_said(http):
    code, out, error = run_program("--version")
    assert (code, out, error) == (0, f"FactoryApp {factoryapp.VERSION}\n", "")
    assert http.get("/health/").json["version"] == factoryapp.VERSION
    assert http.get("/openapi.json").json["info"]["version"] == factoryapp.VERSION


NEW_PASSWORD = "An0ther-pass"
SET, DISABLE = "its password is set, its tokens and keys have ended", "disabled"


def administer(folder, *arguments, typed=NEW_PASSWORD):
    """The exit code of --set-password or --disable, and the one line that it says."""
    database = str(folder / "factoryapp.db")
    code, out, error = run_program("--db", database, *arguments, typed=typed.encode("latin-1"))
    assert (out + error).count("\n") == 1 and (code == 0) == bool(out)
    return code, (out or error).rstrip("\n").removeprefix("factoryapp: ")


def test_account_is_made_and_changed_and_disabled_without_a_server(start, tmp_path):
    name = "  ﬁona@x "
    assert administer(tmp_path, "--set-password", name) == (0, "fiona@x: its account is made")
    assert administer(tmp_path, "--disable", name) == (0, "fiona@x: disabled")
    assert administer(tmp_path, "--set-password", name, typed="\xd0\xbf" * 8 + "\r\nmore") == (
        0,
        f"fiona@x: {SET}",
    )
    log_in(start("--registration", "closed").http, "fiona@x", "п" * 8)
    check_database(tmp_path / "factoryapp.db")


def test_account_that_is_disabled_ends_at_once_in_a_running_server(start, bot_api, tmp_path):
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN, TELEGRAM_API_URL=bot_api.url)
    alice, bob = join(program.http, "alice"), join(program.http, "bob")
    for headers, chat_id in ((alice, 7), (bob, 8)):
        bot_api.write(chat_id, link_token(program.http, headers))
        bot_api.wait_for_texts(chat_id)
    waiting, cron = link_token(program.http, alice), make_key(program.http, alice)
    bob = make_key(program.http, bob)
    bot_api.failures[7].append(too_many_requests(600))
    message = post(program.http, bob, "text", recipient="alice")
    bot_api.wait_for(lambda: tries(bot_api, 7) == 2 and len(bot_api.texts(8)) == 2)
    assert administer(tmp_path, "--disable", "alice") == (0, "alice: disabled")
    answer = program.http.get("/api/users/me/", headers=alice, status=401)
    assert answer.json["code"] == "password_changed"
    program.http.get("/api/users/me/", headers=cron, status=401)
    try_password(program.http, "alice", PASSWORD)
    bot_api.wait_for_texts(8, 3)
    assert bot_api.texts(8)[2] == "Не доставлено пользователю alice: 1 сообщ."
    shown = program.http.get(f"/api/messages/{message['id']}/", headers=bob).json
    assert (shown["delivery"], shown["failure"]) == ("failed", "the account was disabled")
    bot_api.write(9, waiting)
    bot_api.wait_for_texts(9)
    assert administer(tmp_path, "--set-password", "alice") == (0, f"alice: {SET}")
    alice = log_in(program.http, "alice", NEW_PASSWORD)
    assert program.http.get("/api/users/me/", headers=alice).json["telegram"] == "none"
    assert list_keys(program.http, alice) == []
    assert list_keys(program.http, bob)[0]["last_used_on"]


def test_account_that_is_erased_leaves_nothing_in_a_running_server(start, bot_api, tmp_path):
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN, TELEGRAM_API_URL=bot_api.url)
    alice, bob = join(program.http, "alice"), join(program.http, "bob")
    for headers, chat_id in ((alice, 7), (bob, 8)):
        bot_api.write(chat_id, link_token(program.http, headers))
        bot_api.wait_for_texts(chat_id)
    make_key(program.http, alice)
    link_token(program.http, alice)
    bot_api.failures[7].append(too_many_requests(600))
    kept = {**bob, "Idempotency-Key": "a-key"}
    post(program.http, kept, "secret of bob's", recipient="alice")
    post(program.http, alice, "secret of alice's", recipient="bob")
    later = factoryapp.iso(time.time() + 3600)
    post(program.http, alice, "secret, later", recipient="bob", send_at=later)
    post(program.http, bob, "secret, later, too", recipient="alice", send_at=later)
    first = post(program.http, bob, "bob's own")
    for n in range(2 * factoryapp.PORTION_ROWS):
        post(program.http, alice, f"secret {n}")
    bot_api.wait_for(lambda: len(bot_api.texts(8)) == 4)
    assert administer(tmp_path, "--erase", "alice", "--yes") == (0, "alice: erased")
    answer = program.http.get("/api/users/me/", headers=alice, status=401)
    assert answer.json["code"] == "user_not_found"
    assert [m["id"] for m in list_messages(program.http, bob)] == [first["id"]]
    assert list_scheduled(program.http, bob) == []
    assert [user["username"] for user in program.http.get("/api/users/", headers=bob).json] == [
        "bob"
    ]
    # Whoever takes the name is somebody else.
    assert list_messages(program.http, join(program.http, "alice")) == []
    assert program.end()[0] == 0
    check_database(tmp_path / "factoryapp.db")
    held = b"".join(path.read_bytes() for path in tmp_path.glob("factoryapp.db*"))
    assert b"secret" not in held and b"bob's own" in held


@pytest.mark.parametrize("typed, code", [("alice", 0), ("", 2), ("y", 2), ("bob", 2)])
def test_erasing_asks_first_at_a_terminal(tmp_path, alone_with_alice, typed, code):
    with prompt(tmp_path, "type the name:", ("--erase", "alice")) as (terminal, process):
        terminal.write(typed.encode() + b"\n")
        said = wait_for_prompt(terminal, "Nothing was erased" if code else "alice: erased")
        assert process.wait(10) == code, said
    assert len(list_accounts()) == bool(code)


def test_password_that_is_set_ends_all_tokens_in_a_running_server_and_keeps_the_chat(
    start, tmp_path
):
    program = start()
    headers = join(program.http, "alice")
    sent = {"username": "alice", "password": PASSWORD}
    refresh = program.http.post_json("/auth/token/", sent).json["refresh"]
    cron = make_key(program.http, headers)
    program.type(link_token(program.http, headers))
    program.wait_for("успешно привязаны")
    assert administer(tmp_path, "--set-password", "alice") == (0, f"alice: {SET}")
    program.http.get("/api/users/me/", headers=headers, status=401)
    program.http.get("/api/users/me/", headers=cron, status=401)
    program.http.post_json("/auth/token/refresh/", {"refresh": refresh}, status=401)
    headers = log_in(program.http, "alice", NEW_PASSWORD)
    assert program.http.get("/api/users/me/", headers=headers).json["telegram"] == "linked"


def list_accounts():
    return factoryapp.connection().execute("SELECT * FROM users").fetchall()


@pytest.fixture
def alone_with_alice(tmp_path, monkeypatch):
    """A database with her account, without a server; the rows of its accounts."""
    monkeypatch.setattr(factoryapp.settings, "db", str(tmp_path / "factoryapp.db"))
    factoryapp.open_store()
    factoryapp.add_user(factoryapp.connection(), "alice", "a hash")
    return list_accounts()


@pytest.mark.parametrize(
    "arguments, typed, sentence",
    [
        (["--set-password", "alice"], "", "may not be blank"),
        (["--set-password", "alice"], "short\n", "too short"),
        (["--set-password", "alice"], "secret-\xff-pass\n", "UnicodeDecodeError"),
        (["--set-password", "a b"], NEW_PASSWORD, "may contain only letters"),
        (["--set-password", "ALICE"], NEW_PASSWORD, "in another case"),
        (["--set-password", "\u0430lice"], NEW_PASSWORD, "two alphabets"),
        (
            ["--set-password", "alice"],
            "1Alice\n",
            "similar to the username. This password is too sh",
        ),
        (["--disable", "\udcff\n"], "", "U+DCFF"),
        (["--disable", "bob"], "", "no account bob"),
        (["--erase", "bob", "--yes"], "", "no account bob"),
        (["--erase", "alice"], "alice\n", "at a terminal, or add --yes"),
        (["--erase", "alice", "--disable", "alice"], "", "not allowed with"),
        (["--disable", "alice", "--set-password", "alice"], NEW_PASSWORD, "not allowed with"),
    ],
)
def test_administration_that_cannot_be_done_is_one_sentence_and_changes_nothing(
    tmp_path, alone_with_alice, arguments, typed, sentence
):
    code, said = administer(tmp_path, *arguments, typed=typed)
    assert code == 2 and sentence in said and "secret" not in said
    assert list_accounts() == alone_with_alice


def test_administration_while_a_server_of_another_schema_runs_is_refused(
    tmp_path, alone_with_alice
):
    version = factoryapp.SCHEMA_VERSION - 1
    factoryapp.connection().executescript(
        f"PRAGMA user_version = {version}; UPDATE factoryapp SET schema_version = {version}"
    )
    with closing(factoryapp.lock_database()):
        code, said = administer(tmp_path, "--set-password", "alice")
    assert code == 2 and "already running" in said
    assert list_accounts() == alone_with_alice and factoryapp.check_store() == version


@pytest.mark.parametrize("suffix", ["-wal", "-shm", ".lock"])
@pytest.mark.parametrize("is_there", [True, False])
def test_link_in_place_of_a_file_beside_the_database_is_not_followed(
    tmp_path, monkeypatch, capsys, caplog, suffix, is_there
):
    caplog.set_level("WARNING", factoryapp.log.name)  # it is set back when the test ends
    monkeypatch.setattr(factoryapp.settings, "db", str(tmp_path / "factoryapp.db"))
    target, link = tmp_path / "target", tmp_path / f"factoryapp.db{suffix}"
    if is_there:
        target.write_text("precious")
    link.symlink_to(target)
    assert factoryapp.main(["--db", factoryapp.settings.db, "--disable", "alice"]) == 2
    assert f"{link} is a symbolic link" in capsys.readouterr().err
    assert target.exists() == is_there and [*tmp_path.glob("factoryapp.db*")] == [link]
    assert not is_there or target.read_text() == "precious"


def test_disabling_in_a_database_that_is_not_there_makes_none(tmp_path):
    code, said = administer(tmp_path, "--disable", "alice")
    assert code == 2 and "no account alice" in said and not (tmp_path / "factoryapp.db").exists()


def test_administration_of_a_database_that_others_hold_gives_up_in_a_sentence(
    http, monkeypatch, tmp_path, caplog
):
    register(http, "alice")
    caplog.set_level("WARNING", factoryapp.log.name)  # it is set back when the test ends
    with another_writer(tmp_path / "factoryapp.db"), monkeypatch.context() as impatient:
        impatient.setattr(factoryapp, "PATIENCE_SECONDS", 0.01)
        assert factoryapp.main(["--db", factoryapp.settings.db, "--disable", "alice"]) == 2
    log_in(http, "alice")


def run_accounts(folder):
    """The exit code, standard output and standard error of --accounts."""
    return run_program("--db", folder / "factoryapp.db", "--accounts")


def test_accounts_are_listed_while_the_server_runs(start, tmp_path, monkeypatch):
    assert run_accounts(tmp_path)[1] == "" and not (tmp_path / "factoryapp.db").exists()
    program = start()
    for name in ("carol", "alice", "Боб"):
        register(program.http, name)
    program.type(f"/start {link_token(program.http, log_in(program.http, 'alice'))}")
    program.wait_for("успешно")
    monkeypatch.setattr(factoryapp.settings, "db", str(tmp_path / "factoryapp.db"))
    with factoryapp.transaction() as db:
        factoryapp.set_chat(db, (4242, 7), 1, "token")
    assert factoryapp.main(["--db", factoryapp.settings.db, "--disable", "Боб"]) == 0
    lines = [line.split("\t") for line in run_accounts(tmp_path)[1].splitlines()]
    assert [line[:2] + line[3:4] + line[5:] for line in lines] == [
        ["alice", "2", "terminal", "active"],
        ["carol", "1", "4242", "active"],
        ["Боб", "3", "-", "disabled"],
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\S+Z", lines[0][2]) and lines[2][4] == "-"


def test_accounts_are_a_table_on_a_terminal(http, capfd, monkeypatch):
    register(http, "alice")
    register(http, "bo")
    monkeypatch.setattr(factoryapp.settings, "db", factoryapp.settings.db)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert factoryapp.main(["--db", factoryapp.settings.db, "--accounts"]) == 0
    head, first, second = capfd.readouterr().out.splitlines()
    assert head.split() == ["name", "id", "since", "bot", "linked", "since", "state"]
    assert {line.index("20") for line in (first, second)} == {head.index("since")}


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_accounts_of_what_is_no_database_are_none_or_a_sentence(tmp_path, content):
    (tmp_path / "factoryapp.db").write_bytes(content)
    code, output, error = run_accounts(tmp_path)
    assert (code, output) == ((2 if content else 0), "")
    assert ("cannot be used" in error) == bool(content) and "Traceback" not in error


@contextmanager
def prompt(folder, question="Password: ", arguments=("--set-password", "alice")):
    """A run in a terminal, which has asked already; the terminal and the process."""
    terminal, its_end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, HERE / "factoryapp.py", "--db", folder / "factoryapp.db", *arguments],
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
        # As in a terminal, though the tests may run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(its_end)
    with open(terminal, "r+b", buffering=0) as terminal, process:
        try:
            wait_for_prompt(terminal, question)
            yield terminal, process
        finally:
            process.kill()


def wait_for_prompt(terminal, prompt, said=""):
    """Read what a terminal shows until that is there; all of it."""
    while prompt not in said:
        assert select.select([terminal], [], [], 10)[0], said
        said += terminal.read(4096).decode()
    return said


@pytest.mark.parametrize(
    "again, code, sentence",
    [
        (NEW_PASSWORD.encode() + b"\n", 0, "alice: its account is made"),
        (b"An0ther-poss\n", 2, "not the same"),
        (b"\x04", 2, "EOFError"),
        (None, 2, "KeyboardInterrupt"),
    ],
)
def test_password_is_asked_twice_at_a_terminal_and_not_shown(tmp_path, again, code, sentence):
    with prompt(tmp_path) as (terminal, process):
        terminal.write(NEW_PASSWORD.encode() + b"\n")
        said = wait_for_prompt(terminal, "The same again: ")
        if again:
            terminal.write(again)
        else:
            process.send_signal(signal.SIGINT)
        said = wait_for_prompt(terminal, sentence, said)
        assert process.wait(5) == code and NEW_PASSWORD not in said and "Traceback" not in said


def test_script_metadata_says_what_requirements_and_the_file_itself_say():
    text = (HERE / "factoryapp.py").read_text()
    # As PEP 723 has it.
    [block] = re.findall(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+?)^# ///$", text)
    metadata = tomllib.loads(re.sub("(?m)^# ?", "", block))
    needed = set((HERE / "requirements.txt").read_text().split())
    assert set(metadata["dependencies"]) == {
        name for name in needed if not name.startswith(("pytest", "webtest"))
    }
    least = re.search(r"sys\.version_info < \((\d+), (\d+)\)", text).groups()
    assert metadata["requires-python"] == f">={'.'.join(least)}"


def test_answer_that_is_being_sent_is_sent_to_its_end_before_the_server_ends(http):
    headers = join(http, "alice")
    for _ in range(7):
        post(http, headers, "x" * factoryapp.MAX_TEXT)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(http.address)
        sock.sendall(raw("GET", "/api/messages/", headers))
        while not any(channel.unsent for channel in http.server.channels):
            time.sleep(0.01)
        http.server.end()
        # A server that does not wait has ended by then.
        time.sleep(0.1)
        sock.settimeout(5)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
            if answer.endswith(b"}]"):
                break
    assert len(json.loads(answer.partition(b"\r\n\r\n")[2])) == 7


def test_requests_that_wait_outlive_a_database_that_fails(http, monkeypatch, caplog):
    alice, real = join(http, "alice"), factoryapp.list_changes
    failures = [sqlite3.OperationalError("disk I/O error")]

    def fail_once(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    with socket.create_connection(http.address, timeout=5) as sock:
        sock.sendall(raw("GET", "/api/messages/?wait=50", alice))
        while not http.server.waiting:
            time.sleep(0.01)
        monkeypatch.setattr(factoryapp, "list_changes", fail_once)
        post(http, alice, "news")
        assert b'"text":"news"' in sock.recv(65536)
    assert "hear of no news: disk I/O error" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_the_start_ends_it_in_silence(tmp_path, number):
    (tmp_path / "jwt.py").write_text(f"import os; os.kill(os.getpid(), {number:d})")
    process = subprocess.run(
        [sys.executable, HERE / "factoryapp.py", "--db", tmp_path / "factoryapp.db"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=10,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (process.returncode, process.stdout, process.stderr) == (-number, b"", b"")


def test_signals_in_any_number_end_it_cleanly(start):
    for _ in range(3):
        program = start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            program.process.send_signal(number)
            time.sleep(0.002)
        assert program.process.wait(5) == 0 and program.log() == ""


def test_server_may_start_while_a_password_is_being_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(factoryapp.settings, "db", str(tmp_path / "factoryapp.db"))
    with prompt(tmp_path):
        factoryapp.lock_database().close()


def test_program_starts_through_a_symlink_and_without_docstrings(start, tmp_path):
    (tmp_path / "app.py").symlink_to(HERE / "factoryapp.py")
    program = start(program=tmp_path / "app.py", PYTHONOPTIMIZE="2")
    document = program.http.get("/openapi.json").json
    assert document["info"]["description"]
    assert document["paths"]["/health/"]["get"]["summary"] == "show health"


@pytest.mark.parametrize("schema", [None, b"\xff"])
def test_schema_that_cannot_be_read_is_named(tmp_path, schema):
    program = shutil.copy(HERE / "factoryapp.py", tmp_path)
    if schema:
        (tmp_path / "schema.sql").write_bytes(schema)
    code, _, error = run_program("--port", "0", "--db", str(tmp_path / "a.db"), program=program)
    assert code == 2 and f"{tmp_path}/schema.sql cannot be read" in error
    assert error.count("\n") == 1 and not (tmp_path / "a.db").exists()


def test_output_is_utf_8_whatever_the_locale_says(start):
    program = start(PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    program.type("/start")
    program.wait_for("Токен выдаёт API")


@contextmanager
def in_a_shell(commands, **env):
    """A shell that runs these; what is left of it when the block ends is killed."""
    shell = subprocess.Popen(
        ["sh", "-c", commands],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield shell
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        shell.stdout.close()


@needs_curl
@pytest.mark.parametrize(
    "answer, said", [("Yes", "line 4 stops\n"), ("not now", "line 4 goes on\n")]
)
def test_scripts_of_the_readme_ask_in_the_terminal_and_get_the_answer(start, answer, said):
    program = start()
    alice = join(program.http, "alice")
    program.type(link_token(program.http, alice))
    program.wait_for("успешно привязаны")
    script = readme_scripts(program)
    with in_a_shell(script, TOKEN=alice["Authorization"].removeprefix("Bearer ")) as shell:
        question = r"(#\d+)\nalice, я получил от тебя сообщение:\n\nStop line 4\?\n\[Yes]\n\[No]\n"
        program.type(f"{program.wait_for(question)[1]} {answer}")
        heard = shell.communicate(timeout=10)[0]
    assert heard.endswith(said) and "night" not in heard and shell.returncode == 0


def read_readme():
    """Return the README, with each command that goes on in the next line in one."""
    return re.sub(r"\\\n +", "", (HERE / "README.md").read_text())


def readme_scripts(program, *starts):
    """The lines of *For scripts* that begin so, or all, against this program."""
    section = re.search("\n## For scripts\n.*?\n## ", read_readme(), re.DOTALL)
    section = (
        section[0].replace("http://127.0.0.1:8080", program.url).replace("after=17", "after=0")
    )
    lines = re.findall("^    (.*)", section, re.MULTILINE)
    return "\n".join(line for line in lines if line.startswith(starts or ""))


@needs_curl
@pytest.mark.parametrize(
    "line, sentence", [("date |", "not stored: curl ended with 22\n"), ("question=", "401\n")]
)
def test_scripts_of_the_readme_that_are_refused_say_so_and_fail(start, line, sentence):
    script = readme_scripts(start(), "API=", line).replace("--retry 5", "--retry 1")
    with in_a_shell(f"exec 2>&1\nAUTH=wrong\n{script}") as shell:
        heard = shell.communicate(timeout=10)[0]
    assert shell.returncode != 0 and heard.endswith(sentence) and heard.count("\n") == 1


@needs_curl
def test_script_of_the_readme_outlives_a_restart_and_is_silent(start):
    program = start()
    alice = join(program.http, "alice")
    script = readme_scripts(program, "API=", "date |")
    assert program.end()[0] == 0
    auth = f"AUTH='Authorization: {alice['Authorization']}'"
    with in_a_shell(f"exec 2>&1\n{auth}\n{script}") as shell:
        time.sleep(0.5)
        program = start("--port", str(program.address[1]))
        assert shell.communicate(timeout=20)[0] == "" and shell.returncode == 0
    assert len(list_messages(program.http, alice)) == 1


def test_second_process_on_a_database_is_refused(start, tmp_path):
    start()
    code, _, error = run_program("--port", "0", "--db", str(tmp_path / "factoryapp.db"))
    assert code == 2 and "already running" in error and error.count("\n") == 1


def test_second_process_on_a_database_by_another_name_is_refused(start, tmp_path):
    start()
    (tmp_path / "link.db").symlink_to(tmp_path / "factoryapp.db")
    code, _, error = run_program("--port", "0", "--db", str(tmp_path / "link.db"))
    assert code == 2 and "already running" in error


def test_database_and_its_companions_are_for_their_owner_alone(start, tmp_path):
    (tmp_path / "factoryapp.db").touch(0o644)
    join(start().http, "alice")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("factoryapp.db*")}
    suffixes = ("", "-wal", "-shm", ".lock", ".lock-journal")
    assert modes == {f"factoryapp.db{suffix}": 0o600 for suffix in suffixes}


def test_own_secret_signs_the_tokens(start):
    secret = "a secret of more than thirty-two bytes"
    headers = join(start(FACTORYAPP_SECRET=secret).http, "alice")
    jwt.decode(headers["Authorization"].split()[1], secret, algorithms=["HS256"])


def test_log_has_a_line_for_each_request(start):
    program = start("--log-level", "info")
    headers = join(program.http, "alice")
    program.http.get("/api/messages/?limit=5", headers=headers)
    program.http.get("/api/%D0%BF/%0A", headers=headers, status=404)
    assert program.end()[0] == 0
    lines = [re.sub(r"^\S+ \S+ |\d+\.\d ms", "", line) for line in program.log().splitlines()]
    assert lines == [
        "INFO POST /api/users/register/ 201 , user -, 127.0.0.1",
        "INFO POST /auth/token/ 200 , user -, 127.0.0.1",
        "INFO GET /api/messages/ 200 , user 1, 127.0.0.1",
        "INFO GET /api/%D0%BF/%0A 404 , user -, 127.0.0.1",
    ]


def test_log_at_debug_shows_no_secrets_while_telegram_fails_in_every_way(start, bot_api):
    env = {"TELEGRAM_BOT_TOKEN": BOT_TOKEN, "TELEGRAM_API_URL": bot_api.url}
    program = start("--log-level", "debug", **env)
    headers = join(program.http, "alice")
    try_password(program.http, "alice", "wrong-" + PASSWORD)
    token, cron = link_token(program.http, headers), make_key(program.http, headers)
    bot_api.write(7, "/start " + token)
    bot_api.wait_for_texts(7)
    failures = ["reset", b"<html>502</html>", {}, [1], BLOCKED]
    failures.append({"error_code": 500, "description": "Internal Server Error"})
    bot_api.failures[7].extend(failures[:1])
    bot_api.failures["getUpdates"].extend(random.sample(failures, 1))
    bot_api.push({"message": {"message_id": "?", "text": "text-of-a-message", "chat": "nonsense"}})
    post(program.http, headers, "text-of-a-message")
    bot_api.wait_for_texts(7, 2)
    bot_api.failures[7].append(BLOCKED)
    post(program.http, headers, "text-of-a-message")
    bot_api.wait_for(lambda: len(bot_api.attempts) == 4)
    program.http.get("/api/users/", headers={"Authorization": "Bearer " + token}, status=401)
    program.http.post("/api/users/unlink-telegram/", headers=cron, status=403)
    program.http.delete("/api/users/keys/1/", headers=headers)
    program.http.get("/api/users/", headers=cron, status=401)
    assert program.end()[0] == 0
    log = program.log()
    assert "failed" in log and "refused" in log
    secrets = [PASSWORD, token, "text-of-a-message"]
    secrets += [signed_in["Authorization"].split()[1] for signed_in in (headers, cron)]
    for secret in [BOT_TOKEN, BOT_TOKEN.split(":")[1], *secrets]:
        assert secret not in log


def test_log_that_nobody_reads_holds_up_nobody(start):
    reads, writes = os.pipe()
    program = start("--log-level", "info", preexec_fn=lambda: os.dup2(writes, 2))
    with closing(HTTPConnection(*program.address, timeout=5)) as client:
        for _ in range(factoryapp.LOG_LINES + 1500):  # the pipe takes 64 KiB
            client.request("GET", "/x")
            assert client.getresponse().read()
    assert program.end()[0] == 0
    os.close(writes)
    with open(reads, "rb") as log:
        assert log.read().count(b"GET /x 404") > 500


def test_what_is_logged_before_the_end_is_written(start):
    program = start("--log-level", "info")
    for _ in range(200):
        program.http.get("/x", status=404)
    assert program.end()[0] == 0 and program.log().count("GET /x 404") == 200


def test_what_looks_like_a_secret_is_masked_wherever_it_stands(start):
    program = start("--log-level", "debug", "--trusted-proxy", "127.0.0.1")
    headers = join(program.http, "alice")
    jwt_, key = (
        signed_in["Authorization"].split()[1]
        for signed_in in (headers, make_key(program.http, headers))
    )
    secrets = [*jwt_.split(".")[1:], key, link_token(program.http, headers)]
    for secret in secrets:
        for n, path in enumerate(
            (
                f"/{secret}",
                f"/x/{secret}?{secret}=1",
                f"/{secret[0]}%{ord(secret[1]):x}{secret[2:]}",
            )
        ):
            program.http.get(path, headers={"X-Forwarded-For": f"{n}, {secret}"}, status="*")
            program.http.get(
                "/api/users/", headers={"Authorization": f"Bearer {secret}"}, status="*"
            )
            program.http.post(path, "x", content_type=f"text/{secret}", status="*")
    program.http.get(f"/api/users/{jwt_}/", status=404)
    assert program.end()[0] == 0
    log = program.log()
    assert "GET /… 404" in log and not any(secret in log for secret in secrets)


def test_telegram_that_refuses_the_token_is_told_and_the_api_stays_up(start, bot_api):
    program = start(TELEGRAM_BOT_TOKEN="4242:wrong", TELEGRAM_API_URL=bot_api.url)
    join(program.http, "alice")
    ends_at = time.monotonic() + 10
    while "Telegram refuses TELEGRAM_BOT_TOKEN" not in program.log():
        assert time.monotonic() < ends_at
        time.sleep(0.02)
    assert "4242:wrong" not in program.log()
    assert program.end()[0] == 0


def test_telegram_that_cannot_be_reached_is_no_reason_not_to_start(start, tmp_path):
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN)
    join(program.http, "alice")
    assert "cannot be reached at 127.0.0.1: Connection refused" in (tmp_path / "log").read_text()
    assert BOT_TOKEN not in (tmp_path / "log").read_text()


def test_account_linked_in_the_terminal_moves_to_telegram_with_what_waits(start, bot_api):
    program = start()
    headers = join(program.http, "alice")
    program.type(link_token(program.http, headers))
    program.wait_for("успешно привязаны")
    assert program.end()[0] == 0 and "another bot" not in program.log()
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN, TELEGRAM_API_URL=bot_api.url)
    program.wait_for("@factory_test_bot")
    assert "WARNING 1 accounts are linked to another bot" in program.log()
    post(program.http, headers, "waits")
    assert program.http.get("/api/users/me/", headers=headers).json["telegram"] == "elsewhere"
    bot_api.write(7, link_token(program.http, headers))
    bot_api.wait_for_texts(7, 2)
    assert bot_api.texts(7)[0] == own_copy("waits") and "успешно" in bot_api.texts(7)[1]


def test_killed_program_loses_nothing_and_hears_nothing_twice(start, bot_api, tmp_path):
    env = {"TELEGRAM_BOT_TOKEN": BOT_TOKEN, "TELEGRAM_API_URL": bot_api.url}
    program = start(**env)
    headers = join(program.http, "alice")
    bot_api.write(7, link_token(program.http, headers))
    bot_api.wait_for_texts(7)
    bot_api.failures[7].append(5)
    for n in range(5):
        post(program.http, headers, str(n))
    bot_api.wait_for(lambda: len(bot_api.attempts) == 2)
    program.end(signal.SIGKILL)
    bot_api.write(7, "пока тебя не было")
    start(**env)
    bot_api.wait_for_texts(7, 7)
    last_lines = [text.split("\n")[-1] for text in bot_api.texts(7)[1:]]
    assert last_lines == ["0", "1", "2", "3", "4", "пока тебя не было"]
    check_database(tmp_path / "factoryapp.db")


def kill_loop(start, bot_api, seconds):
    """Kill the program under load and start it again, at random moments; then count."""
    env = {"TELEGRAM_BOT_TOKEN": BOT_TOKEN, "TELEGRAM_API_URL": bot_api.url}
    programs, written = [start(**env)], []
    writers = [KillLoopWriter(programs, bot_api, "alice", 7)]
    writers.append(KillLoopWriter(programs, bot_api, "bob", 8))
    bot_api.answer_seconds = 0.02
    for writer in writers:
        writer.start()
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        written.append(f"w{len(written)}")
        bot_api.write(7, written[-1])
        time.sleep(random.uniform(0.2, 1.2))
        programs[-1].end(signal.SIGKILL)
        started_at = time.monotonic()
        programs.append(start(**env))
        assert time.monotonic() - started_at < 5  # about 0.5 s; the promise is 2
    for writer in writers:
        writer.stop.set()
        writer.join()
    kills = len(programs) - 1
    writers[0].check(written, kills, seconds)
    writers[1].check([], kills, seconds)
    assert programs[-1].end() == (0, pytest.approx(0, abs=4))
    check_database(programs[-1].folder / "factoryapp.db")
    assert len(writers[0].acknowledged) > kills


class KillLoopWriter(threading.Thread):
    """Somebody who posts all the time to whatever program runs, and notes what was acknowledged."""

    def __init__(self, programs, bot_api, username, chat_id):
        super().__init__()
        self.programs, self.bot_api, self.username = programs, bot_api, username
        self.chat_id, self.acknowledged, self.stop = chat_id, [], threading.Event()
        self.headers = join(self.http, username)
        bot_api.write(chat_id, link_token(self.http, self.headers))
        bot_api.wait_for_texts(chat_id)

    @property
    def http(self):
        return self.programs[-1].http

    def run(self):
        number = 0
        while not self.stop.wait(0.12):
            text = f"p{number}"
            while not self.stop.is_set() and not self.is_acknowledged(text):
                # Whether that one was stored nobody knows: the next has another name.
                text += "'"
                time.sleep(0.01)
            number += 1

    def is_acknowledged(self, text):
        try:
            post(self.http, self.headers, text)
        except AppError:  # the access token lives only 5 minutes
            self.log_in()
            return False
        except (OSError, HTTPException):
            return False
        self.acknowledged.append(text)
        return True

    def log_in(self):
        try:
            self.headers = log_in(self.http, self.username)
        except (AppError, OSError, HTTPException):
            pass

    def check(self, written, kills, seconds):
        """Everything acknowledged, here or by Telegram's offset, has arrived in order."""
        wanted = {*self.acknowledged, *written}
        self.bot_api.wait_for(lambda: wanted <= set(self.arrived()), seconds=60 + seconds)
        once = list(dict.fromkeys(self.arrived()))
        assert len(self.arrived()) - len(once) <= kills  # one send a chat is in flight
        assert [t for t in once if t in self.acknowledged] == self.acknowledged
        self.log_in()
        stored = [m["text"] for m in list_messages(self.http, self.headers)]
        assert set(self.acknowledged) <= set(stored) and len(stored) == len(set(stored))
        assert [t for t in stored if t.startswith("w")] == written

    def arrived(self):
        return [text.split()[-1] for text in self.bot_api.texts(self.chat_id)[1:]]


def test_nothing_acknowledged_is_lost_when_killed_under_load(start, bot_api):
    kill_loop(start, bot_api, seconds=2)


@pytest.mark.long
def test_nothing_acknowledged_is_lost_when_killed_for_ten_minutes(start, bot_api):
    kill_loop(start, bot_api, seconds=600)


def test_foreign_writer_is_waited_for_and_readers_are_served(start, tmp_path):
    program = start()
    headers = join(program.http, "alice")
    posted, slowest = [], 0
    posting = [
        threading.Thread(target=lambda: posted.append(post(program.http, headers, "a")))
        for _ in range(12)
    ]
    with another_writer(tmp_path / "factoryapp.db"):
        for thread in posting:
            thread.start()
        ends_at = time.monotonic() + 2
        while time.monotonic() < ends_at:
            started_at = time.monotonic()
            assert list_messages(program.http, headers) == []
            slowest = max(slowest, time.monotonic() - started_at)
            time.sleep(0.05)
    for thread in posting:
        thread.join()
    assert slowest < 1
    assert len(posted) == len(list_messages(program.http, headers)) == 12


def test_stop_does_not_wait_for_foreign_writers(start, tmp_path):
    program = start()
    join(program.http, "alice")
    with another_writer(tmp_path / "factoryapp.db"):
        assert program.end() == (0, pytest.approx(0, abs=2))


def test_full_disk_acknowledges_nothing_and_breaks_nothing(start, tmp_path):
    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    program = start(preexec_fn=little_room)
    headers = join(program.http, "alice")
    stored, refused = [], 0
    for n in range(60):
        sent = {"text": f"{n} " + "x" * 10_000}
        response = program.http.post_json(
            "/api/messages/", sent, headers=headers, expect_errors=True
        )
        if response.status_int == 201:
            stored.append(response.json)
        else:
            refused += 1
            assert response.status_int == 503 and "Nothing was stored" in response.json["detail"]
    assert stored and refused > 10
    assert list_messages(program.http, headers) == stored
    program.end(signal.SIGKILL)
    check_database(tmp_path / "factoryapp.db")
    assert list_messages(start().http, headers) == stored


FAILING_FSYNC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
#define FAIL_OR(name) int name(int fd) { \
    if (access(getenv("FAIL_FSYNC"), F_OK) == 0) { errno = EIO; return -1; } \
    return ((int (*)(int)) dlsym(RTLD_NEXT, #name))(fd); }
FAIL_OR(fsync)
FAIL_OR(fdatasync)
"""


@pytest.mark.skipif(
    not shutil.which("cc") or sys.platform != "linux", reason="needs a C compiler to break the disk"
)
def test_failed_fsync_ends_the_process(start, tmp_path):
    (tmp_path / "fail.c").write_text(FAILING_FSYNC)
    compiled = ["-shared", "-fPIC", "-o", tmp_path / "fail.so", tmp_path / "fail.c", "-ldl"]
    subprocess.run(["cc", *compiled], check=True)
    program = start(LD_PRELOAD=str(tmp_path / "fail.so"), FAIL_FSYNC=str(tmp_path / "fail now"))
    headers = join(program.http, "alice")
    stored = post(program.http, headers, "stored")
    (tmp_path / "fail now").touch()
    with pytest.raises((ConnectionError, HTTPException)):  # no answer: nothing acknowledged
        post(program.http, headers, "lost?")
    assert program.process.wait(5) == 1 and "the disk failed to store" in program.log()
    check_database(tmp_path / "factoryapp.db")
    assert stored in list_messages(start().http, headers)


def load_with_readers(program, seconds):
    """Post and list from several clients for so long; the write-ahead log's largest size."""
    headers, largest, stop = join(program.http, "alice"), 0, threading.Event()
    database = program.folder / "factoryapp.db"

    def work(method, query, **sent):
        url = f"/api/messages/{query}"
        while not stop.is_set():
            program.http.request(url, method=method, headers=headers, expect_errors=True, **sent)

    text = {"body": b"text=" + b"x" * 2000, "content_type": FORM}
    threads = [threading.Thread(target=work, args=("POST", ""), kwargs=text) for _ in range(4)]
    # Pages: in an hour the whole list is gigabytes, too many for this process.
    threads += [threading.Thread(target=work, args=("GET", "?limit=1000")) for _ in range(2)]
    for thread in threads:
        thread.start()
    ends_at = time.monotonic() + seconds
    # On a slow machine it takes longer until the log has been copied into the database.
    at_last = ends_at + 20
    while time.monotonic() < ends_at or (
        database.stat().st_size < 1_000_000 and time.monotonic() < at_last
    ):
        largest = max(largest, (program.folder / "factoryapp.db-wal").stat().st_size)
        headers.update(log_in(program.http, "alice"))
        time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert database.stat().st_size > largest / 2  # it was copied into the database
    return largest


def test_write_ahead_log_stays_short_with_readers_present(start):
    assert load_with_readers(start(), seconds=1) < 20_000_000


@pytest.mark.long
def test_write_ahead_log_stays_short_for_an_hour(start):
    assert load_with_readers(start(), seconds=3600) < 20_000_000


# --- The tests' own ground ------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="session")
def cheap_hashes(tmp_path_factory):
    """Programs that tests start hash as cheaply as `http` does, if their PYTHONPATH is not set."""
    folder, cost = tmp_path_factory.mktemp("start"), "{**cost, 'n': 16, 'p': 1}"
    at_start(
        folder,
        "import hashlib",
        "real = hashlib.scrypt",
        f"hashlib.scrypt = lambda *args, **cost: real(*args, **{cost})",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch):
    """Telegram itself cannot be reached from a test, nor from a process that it starts."""
    for name in list(os.environ):
        if name.startswith(("TELEGRAM_", "FACTORYAPP_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TELEGRAM_API_URL", "http://127.0.0.1:9")
    connect = socket.socket.connect

    def connect_to_loopback(sock, address):
        is_network = sock.family in (socket.AF_INET, socket.AF_INET6)
        if is_network and address[0] not in ("127.0.0.1", "::1"):
            raise OSError(f"a test tried to reach {address}")
        return connect(sock, address)

    def look_up_nothing(host, port, *args, **kwargs):
        address = host if host == "127.0.0.1" else "203.0.113.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket.socket, "connect", connect_to_loopback)
    monkeypatch.setattr(socket, "getaddrinfo", look_up_nothing)


@pytest.fixture(autouse=True)
def only_when_asked_for(request):
    """What is marked long runs with `pytest -m long`."""
    if request.node.get_closest_marker("long") and "long" not in request.config.option.markexpr:
        pytest.skip("long: run it with -m long")


def test_no_test_can_reach_the_real_telegram():
    home = factoryapp.Telegram(BOT_TOKEN, "https://api.telegram.org")
    with pytest.raises(factoryapp.TelegramError, match="cannot be reached at api.telegram.org: "):
        home.introduce()


def test_ci_runs_the_test_command_of_the_readme():
    command = [line for line in (HERE / ".ci/run").read_text().splitlines() if "pytest" in line]
    assert len(command) == 1 and f"    {command[0]}\n" in read_readme()


# --- Stand-ins ------------------------------------------------------------------------------------


class Clock:
    """Both of the app's clocks: the one that may be set back, and the one that may not."""

    seconds = ticks = 1_800_000_000.0

    def move(self, seconds):
        self.seconds += seconds
        self.ticks += max(seconds, 0)


class Server(factoryapp.Server):
    """The server as it is, but that tests say where a request is from, and who make up a round."""

    company, waits_until, gathered = 0, 0, 0

    def __init__(self, sock):
        super().__init__(sock)
        del self.__dict__["application"]  # ours, below

    def gather(self, size):
        """Let the next round begin when so many have arrived; 5 seconds are the most it waits."""
        self.company, self.waits_until = size, time.monotonic() + 5

    def serve_round(self):
        if len(self.arrived) < self.company and time.monotonic() < self.waits_until:
            return
        if self.company:
            self.company, self.gathered = 0, len(self.arrived)
        super().serve_round()

    def application(self, environ, start_response):
        environ["REMOTE_ADDR"] = environ.pop("HTTP_X_TEST_ADDRESS", environ["REMOTE_ADDR"])
        return factoryapp.app(environ, start_response)


@contextmanager
def serving():
    """A server at work in a thread named "serving"."""
    sock = factoryapp.listen("127.0.0.1", 0)
    server = Server(sock)
    server.address = sock.getsockname()
    thread = threading.Thread(target=server.serve, name="serving")
    thread.start()
    try:
        yield server
    finally:
        server.end()
        thread.join()
        factoryapp.news.wake = lambda: None
        wasyncore.close_all(server.map)


class Client(TestApp):
    """WebTest on a real server: as many kept connections as there are requests at once."""

    def __init__(self, server):
        super().__init__(self.forward, extra_environ={"REMOTE_ADDR": "127.0.0.1"}, lint=False)
        self.server, self.address, self.idle = server, server.address, deque()

    def forward(self, environ, start_response):
        """The WSGI application that WebTest believes it tests."""
        [answer] = self.ask(as_request(environ))
        start_response(f"{answer.status} {answer.reason}", answer.getheaders())
        return [answer.body]

    def ask(self, *requests):
        """Send (method, url, body, headers) requests at once; their answers in the same order."""
        connections, answers = [self.connect() for _ in requests], []
        try:
            for connection, request in zip(connections, requests, strict=True):
                connection.request(*request)
            for connection in connections:
                answers.append(connection.getresponse())
                answers[-1].body = answers[-1].read()
        except BaseException:
            for connection in connections:
                connection.close()
            raise
        self.idle.extend(connections)
        return answers

    def ask_in_one_round(self, *requests):
        """The same, of requests that the server takes together."""
        self.server.gather(len(requests))
        answers = self.ask(*requests)
        assert self.server.gathered == len(requests)
        return answers

    def connect(self):
        try:
            return self.idle.popleft()
        except IndexError:
            return HTTPConnection(*self.address, timeout=60)

    def close(self):
        for connection in self.idle:
            connection.close()


def as_request(environ):
    """What Client.ask() takes."""
    path = quote(environ["PATH_INFO"], encoding="latin-1")
    query = "?" + environ["QUERY_STRING"] if environ["QUERY_STRING"] else ""
    headers = {
        name.removeprefix("HTTP_").replace("_", "-"): value
        for name, value in environ.items()
        if name.startswith("HTTP_") or (name == "CONTENT_TYPE" and value)
    }
    headers["X-Test-Address"] = environ["REMOTE_ADDR"]
    length = environ.get("CONTENT_LENGTH")
    body = environ["wsgi.input"].read(int(length)) if length else None
    return environ["REQUEST_METHOD"], path + query, body, headers


class CrowdedClient(Client):
    """A client whose every request about messages is served in one round with four of others."""

    def ask(self, *requests):
        if len(requests) > 1 or not requests[0][1].startswith("/api/messages/"):
            return super().ask(*requests)
        sign_in = {"Authorization": requests[0][3].get("AUTHORIZATION", "")}
        lists = ("GET", "/api/messages/", None, sign_in)
        refused, breaks = message_request(sign_in, ""), message_request(sign_in, BREAKS)
        first, listed, own, second, last = self.ask_in_one_round(
            breaks, lists, *requests, refused, breaks
        )
        if own.status == 401:
            assert {first.status, listed.status, second.status, last.status} == {401}
        else:
            assert listed.status == 200 and second.status == 400
            assert {first.status, last.status} == {500}
        return [own]


CLIENTS = {"alone": Client, "crowded": CrowdedClient}


class Program:
    """`python factoryapp.py` as a real process, on a port of its own choice."""

    def __init__(
        self, folder, *arguments, preexec_fn=None, program=HERE / "factoryapp.py", prefix=(), **env
    ):
        self.folder, self.said = folder, ""
        command = [*prefix, sys.executable, program, "--port", "0"]
        with open(folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, "--db", folder / "factoryapp.db", *arguments],
                env={**os.environ, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                preexec_fn=preexec_fn,
            )
        host, port = self.wait_for(r"listens on http://(\S+):(\d+)").groups()
        self.address = host, int(port)
        self.url, self.http = f"http://{host}:{port}", Client(self)

    def wait_for(self, pattern, seconds=10):
        """Read what it prints until the pattern is there."""
        ends_at, output = time.monotonic() + seconds, select.poll()
        output.register(self.process.stdout, select.POLLIN)
        while not (match := re.search(pattern, self.said)):
            ready = output.poll(max(0, ends_at - time.monotonic()) * 1000)
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert chunk, f"no {pattern!r} in {self.said!r}"
            self.said += chunk.decode()
        return match

    def log(self):
        return (self.folder / "log").read_text()

    def megabytes(self, what="VmRSS"):
        """How much memory it takes, or took at most (VmHWM); 0 where that cannot be known."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return 0
        return int(re.search(rf"{what}:\s+(\d+)", status.read_text())[1]) / 1024

    def type(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def end(self, signal_number=signal.SIGTERM):
        """Its exit code, and how many seconds it took to end."""
        started_at = time.monotonic()
        self.process.send_signal(signal_number)
        code = self.process.wait(10)
        return code, time.monotonic() - started_at

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.http.close()


class BotApi:
    """A small Bot API server on loopback: offsets, long polling, and failures on request.

    A text is stripped, trimmed, counted and refused as Telegram's server does.
    """

    def __init__(self):
        self.updates, self.next_update_id = [], 100
        self.message_id = 5000  # of what was last written to the bot
        self.sent = []  # (chat id, text as it appears) that it accepted, in order
        self.raw = []  # of each of these, its text as it came
        self.silent = []  # of each of these, whether it comes without a sound
        self.threads = []  # of each of these, the topic that it is in, or None
        self.topics = set()  # (chat id, message_thread_id) that there are
        self.replied = {}  # id of one that appears as a reply: which message it answers
        self.deleted = set()  # ids of messages that somebody deleted in Telegram
        self.keyboards = {}  # message id: the buttons below it, as they are seen
        self.buttons = {}  # the same, of those that went too
        self.allowed_updates = ()  # the kinds that were last asked for
        self.presses = set()  # ids of callback queries that wait for their answer
        self.answers = []  # (id of a callback query, what it was answered), in order
        self.attempts = []  # (time, chat id, text) that reached it, in order
        # Method or chat id: what the next calls get instead of an answer.
        self.failures = defaultdict(deque)
        self.away = None  # the failure that every call gets, as long as it is set
        self.answer_seconds = 0
        self.hung_up = threading.Event()  # ends the calls that hang
        self.webhook = None  # while there is one, the bot cannot poll
        self.is_open, self.changed = True, threading.Condition()
        self.server = BotApiServer(("127.0.0.1", 0), BotApiHandler)
        self.server.bot_api = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        serve = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        serve.start()

    def close(self):
        with self.changed:
            self.is_open = False
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()

    def next_failure(self, method, parameters):
        """What this call gets instead of an answer, or None."""
        chat_id = int(parameters.get("chat_id", 0))
        with self.changed:
            if method == "sendMessage":
                self.attempts.append((time.monotonic(), chat_id, parameters["text"]))
            self.changed.notify_all()
            if method == "getUpdates" and self.webhook:
                return WEBHOOK_IS_ACTIVE
            queue = self.failures[chat_id] or self.failures[method]
            return queue.popleft() if queue else self.away

    def getMe(self, parameters):
        user = {"id": BOT_ID, "is_bot": True, "first_name": "Factory"}
        return {**user, "username": "factory_test_bot"}

    def deleteWebhook(self, parameters):
        self.webhook = None
        return True

    def setMyCommands(self, parameters):
        self.commands = [command["command"] for command in json.loads(parameters["commands"])]
        return True

    def getUpdates(self, parameters):
        self.allowed_updates = json.loads(parameters["allowed_updates"])
        with self.changed:
            if "offset" in parameters:
                offset = int(parameters["offset"])
                self.updates = [u for u in self.updates if u["update_id"] >= offset]
            self.changed.notify_all()
            seconds = float(parameters["timeout"])
            self.changed.wait_for(lambda: self.updates or not self.is_open, seconds)
            return self.updates[:100]

    def sendMessage(self, parameters):
        chat_id, raw = int(parameters["chat_id"]), parameters["text"]
        thread_id = int(parameters["message_thread_id"]) if "message_thread_id" in parameters else 0
        assert "parse_mode" not in parameters
        assert json.loads(parameters["link_preview_options"]) == {"is_disabled": True}
        if len(raw) > 4096:
            raise Refused(TOO_LONG)
        if not (text := as_it_appears(raw)):
            raise Refused(EMPTY)
        if thread_id and (chat_id, thread_id) not in self.topics:
            raise Refused(NO_THREAD)
        replied, buttons = self.read_reply(chat_id, parameters), read_buttons(parameters)
        with self.changed:
            self.sent.append((chat_id, text))
            if replied:
                self.replied[len(self.sent)] = replied
            if buttons:
                self.keyboards[len(self.sent)] = self.buttons[len(self.sent)] = buttons
            self.raw.append(raw)
            self.silent.append(parameters.get("disable_notification") == "True")
            self.threads.append(thread_id or None)
            self.changed.notify_all()
            chat = {"id": chat_id, "type": "private"}
            return {"message_id": len(self.sent), "date": 0, "chat": chat, "text": text}

    def read_reply(self, chat_id, parameters):
        """The id of the message that a new one appears to answer, or None."""
        reply = json.loads(parameters.get("reply_parameters", "{}"))
        replied = reply.get("message_id")
        chats = dict(enumerate((chat for chat, _ in self.sent), 1))
        is_there = chats.get(replied) == chat_id and replied not in self.deleted
        if reply and not is_there and not reply.get("allow_sending_without_reply"):
            raise Refused(NO_REPLIED)
        return replied if is_there else None

    def answerCallbackQuery(self, parameters):
        with self.changed:
            if parameters.get("callback_query_id") not in self.presses:
                raise Refused(NO_QUERY)
            self.presses.remove(parameters["callback_query_id"])
            self.answers.append((parameters["callback_query_id"], parameters.get("text")))
            self.changed.notify_all()
            return True

    def editMessageReplyMarkup(self, parameters):
        message_id = int(parameters["message_id"])
        with self.changed:
            if message_id not in self.keyboards or "reply_markup" in parameters:
                raise Refused(NOT_MODIFIED)
            assert self.sent[message_id - 1][0] == int(parameters["chat_id"])
            del self.keyboards[message_id]
            self.changed.notify_all()
            chat = {"id": int(parameters["chat_id"]), "type": "private"}
            return {"message_id": message_id, "date": 0, "chat": chat}

    def press(self, chat_id, message_id, n=0, **fields):
        """Somebody presses the nth button below a message; returns the query's id.

        `fields` are other fields of the query.
        """
        chat = {"id": chat_id, "type": "private"}
        query = {
            "id": str(10**18 + self.next_update_id),
            "from": {"id": chat_id, "is_bot": False, "first_name": "Somebody"},
            "chat_instance": "1",
            "message": {"message_id": message_id, "date": 0, "chat": chat},
            **fields,
        }
        if "data" not in fields:
            query["data"] = self.buttons[message_id][n]["callback_data"]
        self.presses.add(query["id"])
        if "callback_query" in self.allowed_updates:
            self.push({"callback_query": query})
        return query["id"]

    def write(
        self,
        chat_id,
        text=None,
        reply_to=None,
        chat_type="private",
        kind="message",
        edit=None,
        **content,
    ):
        """Somebody writes to the bot in Telegram, or edits the message of the id `edit`.

        `content` are other fields of the message.
        """
        chat = {"id": chat_id, "type": chat_type}
        if edit is None:
            self.message_id += 1
            message = {"message_id": self.message_id, "date": 0, "chat": chat, **content}
        else:
            kind = f"edited_{kind}"
            message = {"message_id": edit, "date": 0, "edit_date": 1, "chat": chat, **content}
        if text is not None:
            message["text"] = text
        if chat_type == "private":
            somebody = {"id": chat_id, "is_bot": False, "first_name": "Somebody"}
            message.setdefault("from", somebody)
        if reply_to:
            message["reply_to_message"] = {"message_id": reply_to, "date": 0, "chat": chat}
            message["reply_to_message"]["from"] = {"id": BOT_ID, "is_bot": True}
            message["reply_to_message"]["text"] = self.sent[reply_to - 1][1]
        self.push({kind: message})

    def push(self, update):
        with self.changed:
            self.updates.append({"update_id": self.next_update_id, **update})
            self.next_update_id += 1
            self.changed.notify_all()

    def texts(self, chat_id):
        return [text for chat, text in self.sent if chat == chat_id]

    def wait_for(self, condition, seconds=10):
        """Wait until something that was sent or polled makes the condition true."""
        with self.changed:
            assert self.changed.wait_for(condition, seconds), (self.sent[-5:], self.attempts[-5:])

    def wait_for_texts(self, chat_id, count=1, seconds=10):
        """Wait until the bot has said so much in a chat."""
        self.wait_for(lambda: len(self.texts(chat_id)) >= count, seconds)


class Refused(Exception):
    """What a server of Telegram's answers to a call that makes no sense."""


def read_buttons(parameters):
    """The buttons of an inline keyboard, row by row."""
    rows = json.loads(parameters.get("reply_markup", "{}")).get("inline_keyboard", [])
    buttons = [button for row in rows for button in row]
    for button in buttons:
        if not as_it_appears(button["text"]) or len(button["callback_data"].encode()) > 64:
            raise Refused(BAD_BUTTON)
    return buttons


def as_it_appears(text):
    """A text as Telegram shows it."""
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u030a\u0333\u033f]", "", text)
    return text.replace("\t", " ").strip()


class BotApiServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100

    def __init__(self, *args):
        super().__init__(*args)
        self.connections = []

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def server_close(self):
        """Close the connections that clients keep, too: a thread stands behind each."""
        super().server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class BotApiHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        url = urlsplit(self.path)
        parameters = dict(parse_qsl(url.query) + parse_qsl(body, keep_blank_values=True))
        token, _, method = url.path.removeprefix("/bot").partition("/")
        if token != BOT_TOKEN:
            self.refuse(UNAUTHORIZED)
        elif len(self.path) > 2000:
            self.refuse({"error_code": 414, "description": "Request-URI Too Large"})
        else:
            self.answer_or_fail(method, parameters)

    do_POST = do_GET

    def answer_or_fail(self, method, parameters):
        bot_api = self.server.bot_api
        failure = bot_api.next_failure(method, parameters)
        time.sleep(bot_api.answer_seconds)
        if failure is None:
            try:
                self.answer({"ok": True, "result": getattr(bot_api, method)(parameters)})
            except Refused as refusal:
                self.refuse(*refusal.args)
        elif failure == "lost":  # it was sent, but nobody is told
            getattr(bot_api, method)(parameters)
            self.fail(3)
        else:
            self.fail(failure)

    def fail(self, failure):
        if failure == "drips":
            self.drip()
        elif failure == "reset":
            no_linger = b"\1\0\0\0\0\0\0\0"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
            self.close_connection = True
            self.connection.close()
        elif isinstance(failure, (int, float)):  # seconds to hang, then it closes without a word
            self.server.bot_api.hung_up.wait(failure)
            self.close_connection = True
        elif isinstance(failure, bytes):
            self.answer(failure, 502)
        elif isinstance(failure, tuple):  # a gateway's status and page
            self.answer(failure[1], failure[0])
        elif isinstance(failure, list) or failure.get("ok"):
            self.answer(failure)
        else:
            self.refuse(failure)

    def drip(self):
        """Answer byte by byte, so that no pause between two is long, and the whole is."""
        self.close_connection = True
        with suppress(OSError):
            for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b" " * 400:
                if self.server.bot_api.hung_up.wait(0.05):
                    break
                self.wfile.write(bytes([byte]))

    def refuse(self, failure):
        code = failure.get("error_code", 200)
        self.answer({"ok": False, **failure}, code if isinstance(code, int) else 400)

    def answer(self, value, status=200):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client gave up waiting: its right

    def log_message(self, *args):
        pass


# What version 5 of the schema made, at 2026-09-21: messages of every delivery, some to be sent in
# 2099, one half sent; the queue of chat 9 on its way to chat 10, that of chat 11 being given up.
VERSION_5 = """
CREATE TABLE signing_key (id INTEGER PRIMARY KEY CHECK (id = 1), key BLOB NOT NULL CHECK
  (length(key) >= 32)) STRICT;
CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, username TEXT NOT NULL UNIQUE CHECK
  (length(username) BETWEEN 1 AND 150), password TEXT NOT NULL, tokens_from INTEGER NOT NULL
  DEFAULT 0, created_at TEXT NOT NULL, folded TEXT NOT NULL DEFAULT '') STRICT;
CREATE INDEX users_by_folded ON users (folded);
CREATE TABLE blacklisted_tokens (jti TEXT PRIMARY KEY, expires_at REAL NOT NULL) STRICT, WITHOUT
  ROWID;
CREATE INDEX blacklisted_tokens_by_expiry ON blacklisted_tokens (expires_at);
CREATE TABLE api_keys (id INTEGER PRIMARY KEY AUTOINCREMENT, user_id INTEGER NOT NULL REFERENCES
  users ON DELETE CASCADE, name TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 100), key_hash
  BLOB NOT NULL UNIQUE, created_at TEXT NOT NULL, expires_at TEXT, last_used_on TEXT) STRICT;
CREATE INDEX api_keys_by_user ON api_keys (user_id);
CREATE TABLE link_tokens (user_id INTEGER PRIMARY KEY REFERENCES users ON DELETE CASCADE,
  token_hash BLOB NOT NULL UNIQUE, expires_at REAL NOT NULL) STRICT;
CREATE INDEX link_tokens_by_expiry ON link_tokens (expires_at);
CREATE TABLE bots (id INTEGER PRIMARY KEY, next_update_id INTEGER) STRICT;
CREATE TABLE chats (bot_id INTEGER NOT NULL, chat_id INTEGER NOT NULL, user_id INTEGER NOT NULL
  UNIQUE REFERENCES users ON DELETE CASCADE, linked_at TEXT NOT NULL, token_hash BLOB, PRIMARY KEY
  (bot_id, chat_id)) STRICT, WITHOUT ROWID;
CREATE TABLE told_groups (bot_id INTEGER NOT NULL, chat_id INTEGER NOT NULL, PRIMARY KEY (bot_id,
  chat_id)) STRICT, WITHOUT ROWID;
CREATE TABLE heard (bot_id INTEGER NOT NULL, chat_id INTEGER NOT NULL, message_id INTEGER NOT
  NULL, heard_at REAL NOT NULL, text_hash BLOB, album TEXT, was_told INTEGER NOT NULL DEFAULT 0
  CHECK (was_told IN (0, 1)), PRIMARY KEY (bot_id, chat_id, message_id)) STRICT, WITHOUT ROWID;
CREATE INDEX heard_by_age ON heard (heard_at);
CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, sender_id INTEGER NOT NULL REFERENCES
  users, recipient_id INTEGER NOT NULL REFERENCES users, text TEXT NOT NULL CHECK (length(text)
  BETWEEN 1 AND 16384), created_at TEXT NOT NULL, source TEXT NOT NULL CHECK (source IN ('api',
  'telegram')), delivery TEXT NOT NULL CHECK (delivery IN ('queued', 'sent', 'failed', 'unlinked',
  'cancelled')), failure TEXT, send_at TEXT, reply_to INTEGER REFERENCES messages ON DELETE SET
  NULL, choices TEXT, was_chosen INTEGER NOT NULL DEFAULT 0 CHECK (was_chosen IN (0, 1))) STRICT;
CREATE INDEX messages_by_sender ON messages (sender_id);
CREATE INDEX messages_by_recipient ON messages (recipient_id) WHERE recipient_id <> sender_id;
CREATE INDEX messages_by_reply ON messages (reply_to) WHERE reply_to IS NOT NULL;
CREATE INDEX messages_by_sender_delivery ON messages (sender_id, delivery);
CREATE INDEX messages_by_recipient_delivery ON messages (recipient_id, delivery) WHERE
  recipient_id <> sender_id;
CREATE TABLE idempotency_keys (user_id INTEGER NOT NULL REFERENCES users ON DELETE CASCADE, key
  TEXT NOT NULL CHECK (length(key) BETWEEN 1 AND 255), request_hash BLOB NOT NULL, message_id
  INTEGER NOT NULL REFERENCES messages, delivery TEXT NOT NULL, used_at REAL NOT NULL, PRIMARY KEY
  (user_id, key)) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (used_at);
CREATE INDEX idempotency_keys_by_message ON idempotency_keys (message_id);
CREATE TABLE outbox (id INTEGER PRIMARY KEY, bot_id INTEGER NOT NULL, chat_id INTEGER NOT NULL,
  text TEXT NOT NULL CHECK (length(text) BETWEEN 1 AND 4096), message_id INTEGER REFERENCES
  messages, is_own_copy INTEGER NOT NULL DEFAULT 0 CHECK (is_own_copy IN (0, 1)), is_last INTEGER
  NOT NULL DEFAULT 1 CHECK (is_last IN (0, 1)), silent INTEGER NOT NULL DEFAULT 0 CHECK (silent IN
  (0, 1)), send_at REAL NOT NULL DEFAULT 0, queued_at REAL NOT NULL, attempts INTEGER NOT NULL
  DEFAULT 0, due_at REAL NOT NULL DEFAULT 0, error TEXT, given_up_at TEXT, thread_id INTEGER,
  pause REAL NOT NULL DEFAULT 0, failing_since REAL, missing_since REAL) STRICT;
CREATE INDEX outbox_waiting ON outbox (bot_id, chat_id, send_at, id) WHERE given_up_at IS NULL;
CREATE INDEX outbox_given_up ON outbox (given_up_at) WHERE given_up_at IS NOT NULL;
CREATE INDEX outbox_by_message ON outbox (message_id) WHERE message_id IS NOT NULL;
CREATE TABLE leftovers (id INTEGER PRIMARY KEY, bot_id INTEGER NOT NULL, chat_id INTEGER NOT NULL,
  to_bot_id INTEGER, to_chat_id INTEGER, reason TEXT NOT NULL, last_id INTEGER NOT NULL,
  undelivered TEXT NOT NULL DEFAULT '[]') STRICT;
CREATE TABLE relayed (bot_id INTEGER NOT NULL, chat_id INTEGER NOT NULL, telegram_message_id
  INTEGER NOT NULL, message_id INTEGER NOT NULL REFERENCES messages, PRIMARY KEY (bot_id, chat_id,
  telegram_message_id)) STRICT, WITHOUT ROWID;
CREATE INDEX relayed_by_message ON relayed (message_id);
PRAGMA application_id = 0x46614170;
PRAGMA user_version = 5;
INSERT INTO signing_key VALUES (1, zeroblob(32));
INSERT INTO users VALUES (1, 'alice', HASH, 0, AT, 'alice'), (2, 'bob', HASH, 0, AT, 'bob'),
  (3, 'BOB', HASH, 0, AT, 'bob'), (4, 'carol', HASH, 0, AT, 'carol'),
  (5, 'dave', HASH, 0, AT, 'dave');
INSERT INTO api_keys VALUES (1, 1, 'cron',
  X'FBF3BD8BF1D0870142D892CCFED72741432C51D8CB52258A01163E5D143D9D62', AT, NULL, NULL);
INSERT INTO blacklisted_tokens VALUES ('00000000000000000000000000000000', 4070908800);
INSERT INTO link_tokens VALUES (3, zeroblob(32), 4070908800);
INSERT INTO bots VALUES (4242, 100);
INSERT INTO chats VALUES (4242, 7, 1, AT, zeroblob(32)), (4242, 8, 2, AT, NULL),
  (4242, 10, 4, AT, zeroblob(32));
INSERT INTO told_groups VALUES (4242, -5);
INSERT INTO heard VALUES (4242, 7, 55, 4070908800, zeroblob(32), 'album', 0);
INSERT INTO messages VALUES
  (1, 1, 1, 'заметка', AT, 'api', 'sent', NULL, NULL, NULL, NULL, 0),
  (2, 2, 1, 'привет', AT, 'telegram', 'sent', NULL, NULL, NULL, NULL, 0),
  (3, 1, 2, 'сейчас', AT, 'api', 'queued', NULL, NULL, NULL, NULL, 0),
  (4, 1, 2, 'Сюрприз? ' || LONG, AT, 'api', 'queued', NULL, LATER, NULL,
    '["Да", "Нет"]', 0),
  (5, 1, 3, 'нет чата', AT, 'api', 'unlinked', NULL, LATER, NULL, NULL, 0),
  (6, 1, 1, 'себе', AT, 'api', 'queued', NULL, LATER, 4, NULL, 0),
  (7, 2, 1, 'пропало', AT, 'telegram', 'failed', '403 Forbidden', NULL, NULL, NULL, 0),
  (8, 1, 2, 'длинное ' || LONG, AT, 'api', 'queued', NULL, NULL, NULL, NULL, 0),
  (9, 1, 1, 'просрочено', AT, 'api', 'queued', NULL, AT, NULL, NULL, 0),
  (10, 1, 4, 'переезд', AT, 'api', 'queued', NULL, NULL, NULL, NULL, 0),
  (11, 1, 5, 'ушёл', AT, 'api', 'queued', NULL, NULL, NULL, NULL, 0),
  (12, 1, 1, 'ответ', AT, 'api', 'sent', NULL, NULL, 4, NULL, 0);
INSERT INTO idempotency_keys VALUES (1, 'a-key', zeroblob(32), 1, 'queued', 4070908800);
INSERT INTO relayed VALUES (4242, 7, 1, 1), (4242, 7, 2, 2), (4242, 8, 2, 2), (4242, 8, 8, 8);
INSERT INTO outbox (id, chat_id, text, message_id, is_own_copy, is_last, silent, send_at, error,
  given_up_at, bot_id, queued_at) SELECT *, 4242, 1790000000 FROM (VALUES
  (4, 8, 'сейчас', 3, 0, 1, 0, 0, NULL, NULL),
  (5, 7, 'own: сейчас', 3, 1, 1, 0, 0, NULL, NULL),
  (6, 8, 'Сюрприз? ' || LONG, 4, 0, 0, 1, NEVER, NULL, NULL),
  (7, 8, LONG, 4, 0, 1, 1, NEVER, NULL, NULL),
  (8, 7, 'own: ' || LONG, 4, 1, 0, 1, NEVER, NULL, NULL),
  (9, 7, LONG, 4, 1, 1, 1, NEVER, NULL, NULL),
  (10, 7, 'own: нет чата', 5, 1, 1, 0, NEVER, NULL, NULL),
  (11, 7, 'себе', 6, 0, 1, 0, NEVER, NULL, NULL),
  (12, 7, 'пропало', 7, 0, 1, 0, 0, '403 Forbidden', AT),
  (15, 8, LONG, 8, 0, 1, 0, -1, NULL, NULL),
  (16, 7, 'own: ' || LONG, 8, 1, 0, 0, 0, NULL, NULL),
  (17, 7, LONG, 8, 1, 1, 0, 0, NULL, NULL),
  (18, 7, 'просрочено', 9, 0, 1, 0, 1790000100, NULL, NULL),
  (19, 9, 'переезд', 10, 0, 1, 0, 0, NULL, NULL),
  (20, 7, 'own: переезд', 10, 1, 1, 0, 0, NULL, NULL),
  (21, 11, 'ушёл', 11, 0, 1, 0, 0, NULL, NULL),
  (22, 7, 'own: ушёл', 11, 1, 1, 0, 0, NULL, NULL));
INSERT INTO leftovers VALUES (1, 4242, 9, 4242, 10, '', 19, '[]'),
  (2, 4242, 11, NULL, NULL, 'the chat was unlinked with /stop', 21, '[]');
UPDATE sqlite_sequence SET seq = 40 WHERE name = 'messages';
"""
VERSION_5 = re.sub(
    r"\b(AT|LATER|NEVER|LONG|HASH)\b",
    lambda word: {
        "AT": "'2026-09-21T14:13:20.000000Z'",
        "LATER": "'2099-01-01T00:00:00.000000Z'",
        "NEVER": "4070908800",
        "LONG": "replace(hex(zeroblob(600)), '00', 'слово ')",
        # Of PASSWORD, as cheap_hashes() hashes it.
        "HASH": "'scrypt$32768$8$3$a2tra2tra2tra2tra2traw==$jUv0OWRvEwtxKr+pe9wwmgkxVomifCukF6w24Xf"
        "sCPg='",
    }[word[0]],
    VERSION_5,
)
