"""Tests through the front doors: HTTP to a real server, a small real Bot API server in Telegram's
place, the program itself. What these stand-ins are made of is at the end of the file."""

import base64
import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
from collections import defaultdict, deque
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import jwt
import pytest
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
FORM = "application/x-www-form-urlencoded"


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
    monkeypatch.setattr(factoryapp, "login_throttle", factoryapp.LoginThrottle())
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
    assert program.end() == (0, pytest.approx(0, abs=2))
    program = start()  # a link, a login and the messages outlive the process
    assert [(m["text"], m["source"]) for m in list_messages(program.http, headers)] == [
        ("при\x1b[2Jвет", "api"),
        ("написано боту", "telegram"),
    ]
    post(program.http, headers, "снова")
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


# --- What the rooms' tests share ------------------------------------------------------------------

RETRY_AFTER_9 = {
    "error_code": 429,
    "description": "Too Many Requests",
    "parameters": {"retry_after": 9},
}
BLOCKED = {"error_code": 403, "description": "Forbidden: bot was blocked by the user"}
CHAT_NOT_FOUND = {"error_code": 400, "description": "Bad Request: chat not found"}
TOO_LONG = {"error_code": 400, "description": "Bad Request: message is too long"}
WEBHOOK_IS_ACTIVE = {
    "error_code": 409,
    "description": "Conflict: can't use getUpdates method while webhook is active",
}
BREAKS, BREAKS_AT_ONCE = "breaks a constraint later", "breaks a constraint"
alone_and_crowded = pytest.mark.parametrize("http", ["alone", "crowded"], indirect=True)


@pytest.fixture
def breaking(monkeypatch):
    """A message of the text BREAKS is stored, then breaks a constraint; BREAKS_AT_ONCE before."""
    real = factoryapp.add_message

    def break_constraint(db):
        db.execute("INSERT INTO users (username) VALUES (NULL)")

    def add_message(db, *args, **kwargs):
        if BREAKS_AT_ONCE in args:
            break_constraint(db)
        message = real(db, *args, **kwargs)
        if BREAKS in args:
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
    home.introduce()
    return home


@pytest.fixture
def clock(monkeypatch):
    """The time, which moves only when told to."""
    clock = Clock()
    monkeypatch.setattr(factoryapp, "now", lambda: clock.seconds)
    monkeypatch.setattr(factoryapp, "ticks", lambda: clock.ticks)
    return clock


@pytest.fixture
def linked(http, telegram, bot_api):
    """Alice, whose chat is 7."""
    headers = join(http, "alice")
    link_chat(http, telegram, bot_api, headers, 7)
    bot_api.sent.clear()
    return headers


@pytest.fixture
def running(telegram, bot_api):
    """The same with its polling thread and senders at work."""
    stop = threading.Event()
    threads = [threading.Thread(target=telegram.run, args=(stop,), daemon=True)]
    threads += [
        threading.Thread(target=factoryapp.run_outbox, args=(telegram, stop), daemon=True)
        for _ in range(factoryapp.SENDERS)
    ]
    for thread in threads:
        thread.start()
    yield telegram
    stop.set()
    bot_api.hung_up.set()
    factoryapp.turns.close()
    for thread in threads[1:]:
        thread.join(5)
        assert not thread.is_alive()


def message_request(headers, text):
    """A POST of a message as Client.ask() takes it."""
    return "POST", "/api/messages/", json.dumps({"text": text}), {**headers, "Content-Type": JSON}


def deliver_all(home):
    while factoryapp.deliver_next(home):
        pass


def say(telegram, bot_api, chat_id, text=None, **content):
    """Write to the bot, let it receive that and answer; what it sent to the chat since."""
    before = len(bot_api.texts(chat_id))
    bot_api.write(chat_id, text, **content)
    telegram.poll()
    deliver_all(telegram)
    return bot_api.texts(chat_id)[before:]


def link_chat(http, telegram, bot_api, headers, chat_id):
    assert "успешно привязаны" in say(telegram, bot_api, chat_id, link_token(http, headers))[-1]


# --- Texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "я" * 16_384,
        "слово " * 2000,
        "строка\n" * 2000,
        "👨‍👩‍👧‍👦" * 1500,
        "🇷🇺" * 5000,
        "é" * 6000,
        "👍🏽" * 4000,
        "각" * 4000,
        "क्षि" * 3000,
        " \n" * 100 + "x" + "\r\n" * 5000,
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿" * 1000,
    ],
)
def test_long_text_is_split_without_loss_between_characters(text):
    parts = factoryapp.split_text(text)
    assert all(0 < len(part) <= 4096 and part.strip() for part in parts)
    assert "".join(parts).rstrip() == text.rstrip()
    for part in parts[1:]:
        assert not part.startswith(("\u200d", "\ufe0f", "🏽", "\U000e0067"))
        assert not unicodedata.combining(part[0])
    if text[0] == "🇷":
        assert all(len(part) % 2 == 0 for part in parts)
    if text[0] in "сc" and len(parts) > 1:
        assert all(part[-1].isspace() for part in parts[:-1])


def test_text_of_nothing_but_accents_is_split_where_it_must_be():
    text = "a" + "\u0301" * 9000
    parts = factoryapp.split_text(text)
    assert [len(part) for part in parts] == [4096, 4096, 809] and "".join(parts) == text


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


def test_clock_set_back_holds_up_nothing(http, telegram, bot_api, clock, linked):
    headers = log_in(http, "alice")
    post(http, headers, "one")
    deliver_all(telegram)
    clock.move(-3600)
    post(http, log_in(http, "alice"), "two")
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == ["one", "two"]


def test_chats_that_may_hang_do_not_get_all_senders(http, telegram):
    half = factoryapp.SENDERS // 2
    for chat_id in range(1, factoryapp.SENDERS + 1):
        # A send to each has failed.
        factoryapp.turns.give_back(chat_id, factoryapp.Again(0, "failed"))
    assert None not in [factoryapp.turns.take() for _ in range(half)]
    assert factoryapp.turns.take() is None
    factoryapp.turns.wake(telegram.id, 99)
    assert factoryapp.turns.take() == 99


def test_chats_that_were_reached_again_get_all_senders(telegram, bot_api, clock):
    chats = range(1, factoryapp.SENDERS + 1)
    for chat_id in chats:
        bot_api.failures[chat_id].append("reset")
        bot_api.write(chat_id, "/start")
    telegram.poll()
    deliver_all(telegram)
    clock.move(1)
    deliver_all(telegram)
    assert sorted(chat_id for chat_id, _ in bot_api.sent) == list(chats)
    for chat_id in chats:
        bot_api.write(chat_id, "/start")
    telegram.poll()
    clock.move(1)
    assert sorted(factoryapp.turns.take() for _ in chats) == list(chats)


def test_no_more_than_thirty_sends_a_second(http, telegram, bot_api, clock, linked, monkeypatch):
    monkeypatch.setattr(factoryapp, "SENDS_BURST", 5)
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
        assert len(waits) == 2
        turns.close()
        sender.join(5)
        assert not sender.is_alive()
    finally:
        del turns.changed.wait


def test_memory_of_turns_grows_with_the_chats_and_not_with_the_messages(http, clock):
    turns = factoryapp.turns
    for _ in range(1000):  # to a chat that also has something for next week
        turns.wake(0, 1)
        assert turns.take() == 1
        turns.give_back(1, factoryapp.Again(7 * 86_400, "early"))
        clock.move(1)
    assert len(turns.order) < 200


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


# --- Store ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm", [lambda path: path.unlink(), lambda path: (path.parent / "new").rename(path)]
)
def test_nothing_is_acknowledged_into_a_file_that_is_gone(http, tmp_path, harm):
    headers = join(http, "alice")
    (tmp_path / "new").touch()
    harm(tmp_path / "factoryapp.db")
    assert http.post_json("/api/messages/", {"text": "a"}, headers=headers, status=503).json[
        "detail"
    ]
    assert "removed or replaced" in http.get("/health/", status=503).json["reason"]


@pytest.fixture
def version_1(tmp_path, monkeypatch):
    """A database that version 1 of the schema has made and filled."""
    path = str(tmp_path / "factoryapp.db")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
    monkeypatch.setattr(factoryapp.settings, "db", path)
    return path


def columns_of(path, table):
    with closing(sqlite3.connect(path)) as db:
        return [column[1] for column in db.execute(f"PRAGMA table_info({table})")]


def schema_version(path):
    with closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def test_database_of_version_1_is_brought_up_with_all_that_is_in_it(version_1, start, bot_api):
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN, TELEGRAM_API_URL=bot_api.url)
    bot_api.wait_for_texts(7, 2)
    assert bot_api.texts(7)[0] == "Не доставлено пользователю bob: 1 сообщ."
    assert bot_api.texts(7)[1] == "alice, я получил от тебя сообщение:\n\nlater"
    alice = log_in(program.http, "alice")
    assert [(m["id"], m["text"], m["delivery"]) for m in list_messages(program.http, alice)] == [
        (1, "заметка", "sent"),
        (2, "привет", "sent"),
        (3, "later", "failed"),
    ]
    assert list_messages(program.http, log_in(program.http, "Иван")) == []
    bot_api.write(7, "ответ", reply_to=2)
    bot_api.wait_for_texts(7, 3)
    assert list_messages(program.http, alice)[-1]["recipient"] == "bob"
    assert program.end()[0] == 0
    assert schema_version(version_1) == factoryapp.SCHEMA_VERSION
    check_database(version_1)


def add_steps(monkeypatch, *steps):
    """Have the ladder end with these steps."""
    version = factoryapp.SCHEMA_VERSION
    ladder = {**factoryapp.LADDER, **dict(enumerate(steps, version))}
    monkeypatch.setattr(factoryapp, "LADDER", ladder)
    monkeypatch.setattr(factoryapp, "SCHEMA_VERSION", version + len(steps))
    return version


def test_step_that_fails_leaves_the_steps_before_and_is_climbed_at_the_next_start(
    version_1, monkeypatch
):
    good = "ALTER TABLE users ADD COLUMN nick TEXT"
    bad = "ALTER TABLE users ADD COLUMN half TEXT; INSERT INTO users (id) VALUES (9)"
    version = add_steps(monkeypatch, good, bad)
    with pytest.raises(factoryapp.BadSetting, match="NOT NULL"):
        factoryapp.open_store()
    assert schema_version(version_1) == version + 1
    assert columns_of(version_1, "users")[-1] == "nick"
    factoryapp.LADDER[version + 1] = "ALTER TABLE users ADD COLUMN whole TEXT"
    factoryapp.open_store()
    assert schema_version(version_1) == version + 2
    assert columns_of(version_1, "users")[-2:] == ["nick", "whole"]
    check_database(version_1)


def test_step_may_rebuild_a_table_that_others_refer_to(version_1, monkeypatch):
    rebuild = """
        CREATE TABLE new_messages (
            id INTEGER PRIMARY KEY AUTOINCREMENT, sender_id INTEGER NOT NULL REFERENCES users,
            recipient_id INTEGER NOT NULL REFERENCES users, text TEXT NOT NULL,
            created_at TEXT NOT NULL, source TEXT NOT NULL, delivery TEXT NOT NULL) STRICT;
        INSERT INTO new_messages SELECT id, sender_id, recipient_id, text, created_at, source,
            delivery FROM messages;
        DROP TABLE messages;
        ALTER TABLE new_messages RENAME TO messages
        """
    add_steps(monkeypatch, rebuild)
    factoryapp.open_store()
    db = factoryapp.connection()
    assert db.execute("SELECT count(*) FROM messages").fetchone()[0] == 3
    assert db.execute("SELECT message_id FROM relayed").fetchone()[0] == 2
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        db.execute("UPDATE relayed SET message_id = 77")  # they are checked again
    check_database(version_1)


def test_step_that_loses_what_others_refer_to_is_refused(version_1, monkeypatch):
    version = add_steps(monkeypatch, "DELETE FROM messages WHERE id = 2")
    with pytest.raises(factoryapp.BadSetting, match="refer to others that are not there"):
        factoryapp.open_store()
    assert schema_version(version_1) == version
    check_database(version_1)


def test_link_token_is_stored_as_a_hash_alone(http):
    token = link_token(http, join(http, "alice"))
    dump = "\n".join(factoryapp.connection().iterdump())
    assert "link_tokens" in dump and token not in dump


def test_token_for_the_terminal_has_no_link(http):
    headers = join(http, "alice")
    assert http.get("/api/users/get-telegram-token/", headers=headers).json["link"] is None


def count(table):
    return factoryapp.connection().execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_link_token_is_forgotten_when_its_time_has_passed(http, clock):
    link_token(http, join(http, "alice"))
    clock.move(factoryapp.LINK_TOKEN_SECONDS + 1)
    link_token(http, join(http, "bob"))
    assert count("link_tokens") == 1


def test_blacklisted_token_is_forgotten_when_its_time_has_passed(http, clock):
    register(http, "alice")
    for _ in range(2):
        tokens = http.post_json("/auth/token/", {"username": "alice", "password": PASSWORD}).json
        http.post_json("/auth/token/blacklist/", {"refresh": tokens["refresh"]})
        assert count("blacklisted_tokens") == 1
        clock.move(factoryapp.REFRESH_TOKEN_SECONDS + 1)


@alone_and_crowded
def test_idempotency_key_is_forgotten_when_its_time_has_passed(http, clock):
    register(http, "alice")
    for key in ("one", "two"):
        headers = {**log_in(http, "alice"), "Idempotency-Key": key}
        post(http, headers, "a")
        assert count("idempotency_keys") == 1
        clock.move(factoryapp.IDEMPOTENCY_SECONDS + 1)


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
    assert chat_id == 7 and factoryapp.turns.claim(7, head["id"])  # a sender is at it
    assert say(telegram, bot_api, 9, link_token(http, headers)) == []
    if is_sent:
        factoryapp.settle(factoryapp.settle_sent, head, 55)
        factoryapp.turns.give_back(7, None)
    else:
        factoryapp.settle(factoryapp.unlink_chat, telegram.id, 7, "403 Forbidden")
        factoryapp.turns.give_back(7, None)
    clock.move(1)
    deliver_all(telegram)
    *moved, answer = bot_api.texts(9)
    assert [text[-3:] for text in moved] == ["one", "two"][is_sent:] and "успешно" in answer
    assert bot_api.texts(7) == []


def test_what_waits_for_the_earlier_account_of_a_chat_is_given_up(
    http, telegram, bot_api, clock, linked
):
    alice, bob = log_in(http, "alice"), join(http, "bob")
    post(http, alice, "not for bob", send_at=factoryapp.iso(clock.seconds + 60))
    link_chat(http, telegram, bot_api, bob, 7)
    clock.move(61)
    deliver_all(telegram)
    assert len(bot_api.texts(7)) == 1 and list_messages(http, alice)[0]["delivery"] == "failed"


@alone_and_crowded
def test_chat_moves_to_another_account_only_with_its_token(http, telegram, bot_api):
    alice, bob = join(http, "alice"), join(http, "bob")
    link_chat(http, telegram, bot_api, alice, 7)
    link_chat(http, telegram, bot_api, bob, 7)
    assert post(http, alice, "a")["delivery"] == "unlinked"
    assert post(http, bob, "b")["delivery"] == "queued"
    link_chat(http, telegram, bot_api, bob, 9)  # and an account has one chat
    assert "неверный или устарел" in say(telegram, bot_api, 7, "hello")[-1]


# --- Passwords and tokens -------------------------------------------------------------------------


def test_password_is_kept_as_scrypt_with_its_parameters(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "SCRYPT", {"n": 2**15, "r": 8, "p": 3})
    register(http, "alice")
    kept = factoryapp.find_user_by_name(factoryapp.connection(), "alice")["password"]
    assert kept.startswith("scrypt$32768$8$3$") and PASSWORD not in kept
    monkeypatch.setattr(factoryapp, "SCRYPT", {"n": 16, "r": 8, "p": 1})
    assert log_in(http, "alice")


def test_no_more_than_two_passwords_are_hashed_at_once(http, monkeypatch):
    at_work, most, real = [], [], factoryapp.hashlib.scrypt

    def counted(*args, **kwargs):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.02)
        at_work.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(factoryapp.hashlib, "scrypt", counted)
    threads = [threading.Thread(target=factoryapp.hash_password, args=("x",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 2


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
        assert list(claims) == ["token_type", "exp", "iat", "jti", "user_id"]
        assert claims["token_type"] == kind and claims["exp"] - claims["iat"] == seconds
        assert re.fullmatch("[0-9a-f]{32}", claims["jti"]) and claims["user_id"] == str(user["id"])


def try_password(http, username, password="wrong", address="192.0.2.1", status=401, **headers):
    return http.post_json(
        "/auth/token/",
        {"username": username, "password": password},
        headers=headers,
        extra_environ={"REMOTE_ADDR": address},
        status=status,
    )


def test_ten_failures_for_a_name_are_enough_for_five_minutes(http, clock, caplog):
    register(http, "alice")
    for _ in range(10):
        try_password(http, "alice")
        clock.move(1)
    refused = try_password(http, "alice", PASSWORD, status=429)
    assert refused.json == {"detail": "Request was throttled. Expected available in 290 seconds."}
    assert refused.headers["Retry-After"] == "290"
    try_password(http, "bob")
    try_password(http, "alice", PASSWORD, address="192.0.2.2", status=200)
    clock.move(290)
    try_password(http, "alice", PASSWORD, status=200)
    assert [("192.0.2.1" in r.message, PASSWORD in r.message) for r in caplog.records] == [
        (True, False)
    ] * 12


def test_hundred_failures_of_an_address_are_enough(http, clock):
    register(http, "alice")
    for n in range(100):
        try_password(http, f"user{n}")
    assert try_password(http, "alice", PASSWORD, status=429).headers["Retry-After"] == "300"
    try_password(http, "alice", PASSWORD, address="192.0.2.2", status=200)


def test_right_password_forgives_the_failures_before(http):
    register(http, "alice")
    for _ in range(3):
        for _ in range(9):
            try_password(http, "alice")
        try_password(http, "alice", PASSWORD, status=200)


def test_right_passwords_do_not_count_towards_the_limit_of_their_address(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LOGIN_FAILURES_PER_ADDRESS", 5)
    register(http, "alice")
    for n in range(4):
        try_password(http, f"user{n}")
    for _ in range(5):
        try_password(http, "alice", PASSWORD, status=200)
    try_password(http, "bob")
    try_password(http, "alice", PASSWORD, status=429)


def test_memory_for_failed_logins_is_bounded(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LOGIN_KEYS_REMEMBERED", 50)
    for n in range(100):
        try_password(http, "x" * 1000, address=f"192.0.2.{n}")
    assert len(factoryapp.login_throttle.failures) == 50
    assert all(len(str(key)) < 250 for key in factoryapp.login_throttle.failures)


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
    assert bot_api.texts(7)[1:] == ["alice, я получил от тебя сообщение:\n\nпривет"]
    assert bot_api.texts(8)[1:] == ["Сообщение от alice:\n\nпривет"]
    assert list_messages(http, bob)[0]["delivery"] == "sent"


@alone_and_crowded
def test_long_message_goes_out_in_parts_in_order(http, telegram, bot_api):
    headers, text = join(http, "alice"), "слово " * 2700
    link_chat(http, telegram, bot_api, headers, 7)
    post(http, headers, text)
    factoryapp.deliver_next(telegram)
    assert list_messages(http, headers)[0]["delivery"] == "queued"
    deliver_all(telegram)
    assert len(bot_api.texts(7)) == 5
    assert "".join(bot_api.texts(7)[1:]) == f"alice, я получил от тебя сообщение:\n\n{text}"
    assert list_messages(http, headers)[0]["delivery"] == "sent"


@alone_and_crowded
def test_nothing_comes_between_the_parts_of_a_text(http, telegram, bot_api, clock, linked):
    headers = log_in(http, "alice")
    post(http, headers, "длинно " * 1500, send_at=factoryapp.iso(clock.seconds + 60))
    clock.move(61)
    factoryapp.deliver_next(telegram)
    post(http, headers, "кратко")
    deliver_all(telegram)
    assert [text.split()[-1] for text in bot_api.texts(7)] == ["длинно"] * 3 + ["кратко"]


@alone_and_crowded
def test_silent_message_comes_without_a_sound(http, telegram, bot_api, linked):
    for silent in (True, False, "true"):
        post(http, linked, "a", silent=silent)
    deliver_all(telegram)
    assert bot_api.silent == [False, True, False, True]  # the first is the answer to linking


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
    factoryapp.turns.open(
        telegram.id, factoryapp.list_queues(factoryapp.connection(), telegram.id)
    )  # as after a restart
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
        b"<html>502 Bad Gateway</html>",
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
        assert list_messages(http, headers)[0]["delivery"] == "queued"
        clock.move(2**attempts)
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
    with suppress(sqlite3.OperationalError):
        factoryapp.deliver_next(telegram)
    assert failures == bot_api.sent == []
    clock.move(60)
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == ["one"]


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


def test_odd_description_is_kept_as_the_reason(http, telegram, bot_api, linked):
    bot_api.failures[7].append({"error_code": 400, "description": "Bad \ud800"})
    post(http, linked, "one")
    deliver_all(telegram)
    assert list_messages(http, linked)[0]["delivery"] == "failed"


@alone_and_crowded
@pytest.mark.parametrize("failure", [BLOCKED, CHAT_NOT_FOUND])
def test_chat_that_is_gone_is_unlinked_and_its_queue_given_up(
    http, telegram, bot_api, linked, failure
):
    bot_api.failures[7].append(failure)
    post(http, linked, "one")
    post(http, linked, "two")
    deliver_all(telegram)
    assert bot_api.sent == []
    assert [m["delivery"] for m in list_messages(http, linked)] == ["failed", "failed"]
    assert post(http, linked, "three")["delivery"] == "unlinked"
    reasons = (
        factoryapp.connection()
        .execute("SELECT error FROM outbox WHERE given_up_at IS NOT NULL")
        .fetchall()
    )
    assert [failure["description"] in row["error"] for row in reasons] == [True, True]


@alone_and_crowded
def test_text_that_can_never_be_sent_is_given_up_alone(http, telegram, bot_api, linked):
    bot_api.failures[7].append(TOO_LONG)
    post(http, linked, "one " * 2000)
    post(http, linked, "two")
    deliver_all(telegram)
    assert [text[-3:] for text in bot_api.texts(7)] == [
        "ne ",
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


def test_two_people_and_a_bad_day(http, running, bot_api, monkeypatch):
    # 200 messages between two chats; trouble on the way, and at the end one chat blocks the bot.
    monkeypatch.setattr(factoryapp, "SEND_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(factoryapp, "SENDS_PER_SECOND", 400)
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
        RETRY_AFTER_9,
        0.6,
    ],
)
def test_telegram_may_be_away_as_long_as_it_likes(http, running, bot_api, monkeypatch, away):
    monkeypatch.setattr(factoryapp, "SEND_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(factoryapp, "RETRY_AFTER_MAX_SECONDS", 0.5)
    monkeypatch.setattr(factoryapp, "SENDS_BURST", 5)
    monkeypatch.setattr(factoryapp, "backoff", lambda attempts, longest: 0.2)
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
        for n in range(20):
            started_at = time.monotonic()
            post(http, headers, str(n))
            durations.append(time.monotonic() - started_at)
        time.sleep(0.4)
        assert len(bot_api.sent) == 1 and sorted(durations)[10] < 0.1
        monkeypatch.setattr(factoryapp, "SEND_TIMEOUT_SECONDS", 15)
        bot_api.away = None
        monkeypatch.setattr(factoryapp.apihelper, "API_URL", bot_api.url + "/bot{0}/{1}")
        bot_api.wait_for(lambda: len(bot_api.sent) == 21)
    assert [text.split()[-1] for text in bot_api.texts(7)[1:]] == [str(n) for n in range(20)]
    times = [at for at, _, _ in bot_api.attempts[-20:]]
    assert all(b - a > 0.4 for a, b in zip(times, times[15:], strict=False))  # no storm


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


@pytest.mark.parametrize("text", ["  \n ", "\u2003", "\0"])
def test_blank_text_to_the_bot_is_no_message(http, telegram, bot_api, linked, text):
    assert say(telegram, bot_api, 7, text) == []
    assert list_messages(http, linked) == []


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


@alone_and_crowded
def test_reply_to_somebody_without_a_chat_says_so(http, telegram, bot_api):
    alice, bob = join(http, "alice"), join(http, "bob")
    link_chat(http, telegram, bot_api, bob, 8)
    post(http, alice, "привет", recipient="bob")
    deliver_all(telegram)
    said = say(telegram, bot_api, 8, "ответ", reply_to=len(bot_api.sent))
    assert said == [
        "bob, я получил от тебя сообщение:\n\nответ",
        factoryapp.NO_CHAT.format(username="alice"),
    ]
    assert list_messages(http, alice)[-1]["text"] == "ответ"


def test_group_is_told_once_that_linking_is_for_private_chats(http, telegram, bot_api):
    token = link_token(http, join(http, "alice"))
    assert say(telegram, bot_api, -100, token, chat_type="group") == [factoryapp.PRIVATE_ONLY]
    assert say(telegram, bot_api, -100, "/start " + token, chat_type="group") == []
    assert say(telegram, bot_api, -200, token, chat_type="channel", kind="channel_post") == [
        factoryapp.PRIVATE_ONLY
    ]
    assert say(telegram, bot_api, -200, token, chat_type="channel", kind="channel_post") == []
    assert "успешно привязаны" in say(telegram, bot_api, 7, token)[0]


def test_odd_update_is_tried_three_times_then_skipped(http, telegram, bot_api, caplog):
    headers = join(http, "alice")
    bot_api.push({"message": {"message_id": "?", "chat": "nonsense"}})
    bot_api.push({"some_new_kind": {}})
    assert "успешно привязаны" in say(telegram, bot_api, 7, link_token(http, headers))[0]
    assert [r.message for r in caplog.records if "try" in r.message] == [
        f"update 100 failed, try {n} of 3" for n in (1, 2, 3)
    ]
    assert "update 100 is skipped" in caplog.text
    assert factoryapp.find_bot(factoryapp.connection(), BOT_ID)["next_update_id"] == 103


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
    assert factoryapp.find_bot(factoryapp.connection(), BOT_ID)["next_update_id"] == 6


def test_updates_that_make_no_sense_are_not_asked_for_at_once_again(http, telegram, bot_api):
    bot_api.failures["getUpdates"].append({"ok": True, "result": [None, {}, 5, {"update_id": "x"}]})
    assert telegram.poll() is False


def test_polling_waits_as_long_as_telegram_tells_it_to(telegram, bot_api):
    bot_api.failures["getUpdates"].append(RETRY_AFTER_9)
    stop = StopAtFirstPause()
    telegram.run(stop)
    assert stop.seconds == pytest.approx(9, abs=1)


class StopAtFirstPause(threading.Event):
    """A stop event that is set once somebody would have had to wait for it."""

    seconds = None

    def wait(self, seconds=None):
        if seconds:
            self.seconds = seconds
            self.set()
        return self.is_set()


def test_webhook_that_keeps_the_bot_from_polling_is_deleted(telegram, bot_api, monkeypatch):
    monkeypatch.setattr(factoryapp, "backoff", lambda *args: 0.01)
    bot_api.webhook = "https://factory.example/hook"
    bot_api.write(7, "/start")
    with polling(telegram):
        bot_api.wait_for(lambda: not bot_api.updates)
    deliver_all(telegram)
    assert bot_api.webhook is None and bot_api.texts(7) == [factoryapp.GREETING]


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
        {"error_code": 409, "description": "Conflict: terminated by other getUpdates request"},
        {"error_code": 401, "description": "Unauthorized"},
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


# --- Page -----------------------------------------------------------------------------------------


def test_page_allows_its_own_style_and_script_alone(http):
    response = http.get("/")
    policy = response.headers["Content-Security-Policy"]
    assert response.content_type == "text/html"
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for element in ("script", "style"):
        (text,) = re.findall(f"<{element}>(.*?)</{element}>", response.text, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert not re.search(
        r"""(src|href)="(?!openapi.json"|\s*")|style="|[ ]on\w+="|url\(|@import"""
        "|innerHTML|localStorage|cookie",
        response.text,
    )


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_page_runs_in_a_browser(start, tmp_path):
    program = start()
    shown = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={tmp_path / 'chromium'}",
            "--virtual-time-budget=2000",
            "--enable-logging=stderr",
            "--dump-dom",
            program.url + "/",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Log in or register" in shown.stdout and 'href="openapi.json"' in shown.stdout
    assert "Content Security Policy" not in shown.stderr and "Uncaught" not in shown.stderr


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
    refresh = factoryapp.issue_token("refresh", {"id": 1, "tokens_from": 0})
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


def test_path_without_its_slash_is_served(http):
    sent, alice = {"username": "alice", "password": PASSWORD}, {"id": 1, "username": "alice"}
    assert http.post_json("/api/users/register", sent, status=201).json == alice
    assert http.get("/api/users", headers=log_in(http, "alice")).json == [alice]


def test_forwarded_address_is_believed_only_from_the_trusted_proxy(http, monkeypatch, caplog):
    for trusted, forwarded, believed in (
        (None, "203.0.113.9", "192.0.2.1"),
        ("192.0.2.1", "1.1.1.1, 203.0.113.9", "203.0.113.9"),
        ("192.0.2.9", "203.0.113.9", "192.0.2.1"),
        ("192.0.2.1", "junk\\nline", "192.0.2.1"),
    ):
        monkeypatch.setattr(factoryapp.settings, "trusted_proxy", trusted)
        try_password(http, "nobody", **{"X-Forwarded-For": forwarded})
        assert f"from {believed}:" in caplog.records[-1].message


def test_every_answer_is_private_and_nothing_but_json(http):
    headers = join(http, "alice")
    for response in (
        http.get("/api/messages/", headers=headers),
        http.get("/api/users/", status=401),
        http.get("/x", status=404),
        http.put("/api/messages/", status=405, headers=headers),
        http.post_json("/auth/token/", {}, status=400),
    ):
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Content-Type"] == JSON and "Server" not in response.headers


def test_multipart_form_is_read(http):
    response = http.post(
        "/api/users/register/",
        {"username": "Анна", "password": PASSWORD},
        upload_files=[("x", "x.txt", b"x")],
    )
    assert response.json == {"id": 1, "username": "Анна"}


ODD_VALUES = [
    '"a\\u0000"',
    '"\\ud800"',
    "null",
    "true",
    "[]",
    "{}",
    "[[1]]",
    "1e999",
    "-1e999",
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
    ]
    for body in bodies:
        response = http.post(path, body, content_type=JSON, headers=headers, expect_errors=True)
        assert 400 <= response.status_int < 500, (body[:60], response)
        assert response.headers["Content-Type"] == JSON and response.json
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
    assert response.headers["Content-Type"] == JSON


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


@pytest.mark.parametrize("spelling", ["alice", " alice ", "ａｌｉｃｅ"])
def test_username_is_normalised_at_login_too(http, spelling):
    register(http, "alice")
    assert log_in(http, spelling)


def test_password_is_kept_exactly(http):
    register(http, "alice", "  spaced out  ")
    assert log_in(http, "alice", "  spaced out  ")
    http.post_json("/auth/token/", {"username": "alice", "password": "spaced out"}, status=401)


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
    headers = log_in(http, "alice", "An0ther-pass")  # within the same second
    http.get("/api/users/me/", headers=headers)


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


def test_account_shows_whether_a_chat_is_linked(http, telegram, bot_api):
    headers = join(http, "alice")
    assert http.get("/api/users/me/", headers=headers).json == {
        "id": 1,
        "username": "alice",
        "telegram_linked": False,
    }
    link_chat(http, telegram, bot_api, headers, 7)
    assert http.get("/api/users/me/", headers=headers).json["telegram_linked"] is True


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
        ('{"text": "a", "recipient": null}', 400, '{"recipient":["This field may not be null."]}'),
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
    }
    assert list_messages(http, headers) == [message]


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
        ("silent", None),
        ("silent", 5),
        ("silent", [1]),
        ("send_at", "soon"),
        ("send_at", "2027-01-15 12:00:00Z"),
        ("send_at", 5),
        ("send_at", None),
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
    monkeypatch.setattr(factoryapp, "LIST_PIECE_ROWS", 7)
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
        url = re.fullmatch('<(/[^>]+)>; rel="next"', link)[1] if link else None


@alone_and_crowded
@pytest.mark.parametrize("page_rows", [2, 200])
@pytest.mark.parametrize(
    "path, ids", [("/api/messages/", [1, 3, 5, 7, 9, 11, 13]), ("/api/users/", range(1, 8))]
)
def test_pages_are_followed_by_their_links(http, monkeypatch, path, ids, page_rows):
    monkeypatch.setattr(factoryapp, "LIST_PIECE_ROWS", page_rows)
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
    assert pages(f"?after={last}") == [[]]


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
    answer = http.delete("/api/messages/1/", headers=alice, status=405)
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"


def test_health_tells_the_bot_and_the_queue(http, telegram, bot_api, clock, linked):
    headers = log_in(http, "alice")
    assert http.get("/health/").json == {
        "status": "ok",
        "bot": "@factory_test_bot",
        "queued": 0,
        "oldest_queued_seconds": 0,
    }
    post(http, headers, "a")
    post(http, headers, "later", send_at=factoryapp.iso(clock.seconds + 60))
    clock.move(12.5)
    assert http.get("/health").json == {
        "status": "ok",
        "bot": "@factory_test_bot",
        "queued": 1,
        "oldest_queued_seconds": 12.5,
    }
    factoryapp.turns.open(0, ())
    assert http.get("/health/").json["bot"] == "terminal"


def test_health_without_a_database_says_so(http, monkeypatch, tmp_path):
    monkeypatch.setattr(factoryapp.settings, "db", str(tmp_path))
    answer = http.get("/health/", status=503).json
    assert answer["status"] == "error" and answer["reason"].startswith(
        "The database does not answer: "
    )


# --- OpenAPI --------------------------------------------------------------------------------------


def fits(value, schema):
    """Whether a value is what a JSON schema of ours says."""
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(
        isinstance(value, kinds[t]) and (t == "boolean" or not isinstance(value, bool))
        for t in types
    ):
        return False
    if isinstance(value, list):
        return all(fits(item, schema["items"]) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        return set(value) == set(schema["required"]) and all(
            fits(value[n], s) for n, s in schema["properties"].items()
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
    readme = (HERE / "README.md").read_text()
    for method, path in operations:
        assert f"`{method} {path.replace('{message_id}', 'ID')}`" in readme
    assert len(operations) == len(factoryapp.app.routes) == 16


def test_every_answer_is_in_the_openapi_document(http):
    # Each operation is sent what its schemas allow and what they do not.
    draw, seen = random.Random(1), set()
    document, headers = http.get("/openapi.json").json, join(http, "alice")
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
                .get("schema", {"properties": {}})
            )
            for _ in range(60):
                body = {
                    name: field.get("example", odd[-1]) if draw.random() < 0.6 else draw.choice(odd)
                    for name, field in body_schema["properties"].items()
                    if draw.random() < 0.8
                }
                query = "&".join(
                    f"{p['name']}={draw.choice(['1', '0', '-1', 'x', '1000', str(2**63)])}"
                    for p in operation["parameters"]
                    if p["in"] == "query" and draw.random() < 0.5
                )
                response = http.request(
                    path.replace("{message_id}", draw.choice(["1", "7", "9" * 19])) + "?" + query,
                    method=method.upper(),
                    body=json.dumps(body).encode() if body_schema["properties"] else b"",
                    expect_errors=True,
                    content_type=draw.choice([JSON, JSON, JSON, "text/plain"]),
                    headers=draw.choice(
                        [headers, headers, headers, {}, {"Authorization": "Bearer x"}]
                    ),
                )
                if path.endswith("set-password/") and response.status_int == 204:
                    headers = log_in(http, "alice", str(body["new_password"]))
                seen.add(response.status_int)
                declared = operation["responses"].get(str(response.status_int))
                assert declared, (method, path, body, response)
                for media_type, content in declared.get("content", {}).items():
                    assert response.content_type == media_type
                    assert media_type != JSON or fits(response.json, content["schema"]), (
                        method,
                        path,
                        response,
                    )
    assert {200, 201, 204, 400, 401, 404, 415} <= seen


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


@pytest.mark.parametrize(
    "path", ["/auth/token/", "//auth/token/", "/auth/token%FF/", "/auth/token"]
)
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
        sent = {"username": name, "password": PASSWORD, "text": "a", "recipient": "alice"}
        tokens = http.post_json("/auth/token/", sent).json
        sent.update(token=tokens["access"], refresh=tokens["refresh"])
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
        )
    assert len(threads) > 2 * len(factoryapp.app.routes) and "serving" not in threads


@pytest.mark.parametrize(
    "method, path, function",
    [
        ("POST", "/api/users/unlink-telegram/", "unlink_chat"),
        ("GET", "/api/users/get-telegram-token/", "add_link_token"),
        ("GET", "/health/", "count_waiting"),
    ],
)
def test_what_may_take_long_is_not_done_on_the_serving_thread(
    http, telegram, bot_api, linked, monkeypatch, method, path, function
):
    threads = note_threads(monkeypatch, factoryapp, function)
    http.request(path, method=method, headers=linked)
    assert len(threads) == 1 and threads[0] != "serving"


@pytest.mark.parametrize("limit, most", [("LIST_PIECE_ROWS", 2), ("LIST_PIECE_BYTES", 200)])
@pytest.mark.parametrize("path", ["/api/messages/", "/api/users/"])
def test_long_list_goes_on_in_a_lane_after_one_piece(http, monkeypatch, path, limit, most):
    monkeypatch.setattr(factoryapp, limit, most)
    headers = join(http, "alice")
    for n in range(15):
        register(http, f"user{n}")
        post(http, headers, "x" * 20)
    threads = note_threads(monkeypatch, factoryapp, "read_piece")
    assert len(http.get(path, headers=headers).json) >= 15
    assert threads.count("serving") == 1 and len(threads) >= 4


def test_list_of_one_piece_is_answered_in_its_round(http, monkeypatch):
    monkeypatch.setattr(factoryapp, "LIST_PIECE_ROWS", 2)
    headers = join(http, "alice")
    post(http, headers, "one")
    post(http, headers, "two")
    threads = note_threads(monkeypatch, factoryapp, "read_piece")
    assert len(list_messages(http, headers)) == 2 and threads == ["serving"]


def test_lists_are_merged_in_the_order_of_their_indexes(http):
    db = factoryapp.connection()
    page = {"user": 1, "after": 0, "before": 9, "limit": 5}
    for listing in (factoryapp.OWN_MESSAGES, factoryapp.USERS):
        for query in (listing.rows, f"{listing.ids} ORDER BY id DESC LIMIT 2"):
            plan = [row["detail"] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", page)]
            assert "SEARCH" in str(plan) and "TEMP B-TREE" not in str(plan), plan
            assert not [step for step in plan if step.startswith("SCAN")], plan


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


def test_request_behind_one_in_a_lane_is_answered_after_it_and_in_a_round(http, monkeypatch):
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


def test_fifty_logins_at_once_hold_up_nobody_and_fit_in_memory(start):
    program = start()
    headers = join(program.http, "alice")
    done = []
    logins = [
        threading.Thread(target=lambda: done.append(log_in(program.http, "alice")))
        for _ in range(50)
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
    assert slowest < 1 and most < 200 and len(done) == 50


def test_list_of_who_reads_slowly_holds_up_nobody(start, tmp_path):
    program = start()
    headers = join(program.http, "alice")
    with closing(sqlite3.connect(tmp_path / "factoryapp.db")) as db, db:
        db.execute("""
            WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 1500)
            INSERT INTO messages (sender_id, recipient_id, text, created_at, source, delivery)
            SELECT 1, 1, printf('%.16000c', 'x'), '2026-11-23T18:08:27Z', 'api', 'unlinked' FROM n
            """)
    slow = []
    for _ in range(2 * factoryapp.PATIENT_THREADS):
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
    "pieces",
    [
        [b"\r\n\r\n"],
        [b"\r\n", b"\r\n"],
    ],
)
def test_blank_lines_do_not_keep_a_connection_open(http, monkeypatch, pieces):
    real, ahead = time.time, [0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
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


def run_program(*arguments, **env):
    """The exit code, standard output and standard error of a run that ends by itself."""
    done = subprocess.run(
        [sys.executable, str(HERE / "factoryapp.py"), *arguments],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10,
    )
    return done.returncode, done.stdout, done.stderr


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
    ],
)
def test_bad_setting_ends_with_one_sentence(tmp_path, arguments, env, hint):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        sqlite3.connect(tmp_path / "newer.db") as newer,
    ):
        newer.execute("PRAGMA user_version = 999")
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


def test_second_process_on_a_database_is_refused(start, tmp_path):
    start()
    code, _, error = run_program("--port", "0", "--db", str(tmp_path / "factoryapp.db"))
    assert code == 2 and "already running" in error and error.count("\n") == 1


def test_database_and_its_companions_are_for_their_owner_alone(start, tmp_path):
    (tmp_path / "factoryapp.db").touch(0o644)
    join(start().http, "alice")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("factoryapp.db*")}
    assert modes == {f"factoryapp.db{suffix}": 0o600 for suffix in ("", "-wal", "-shm", ".lock")}


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
    token = link_token(program.http, headers)
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
    assert program.end()[0] == 0
    log = program.log()
    assert "failed" in log and "refused" in log
    secrets = [PASSWORD, token, headers["Authorization"].split()[1], "text-of-a-message"]
    for secret in [BOT_TOKEN, BOT_TOKEN.split(":")[1], *secrets]:
        assert secret not in log


def test_telegram_that_refuses_the_token_is_told_and_the_api_stays_up(start, bot_api, tmp_path):
    program = start(TELEGRAM_BOT_TOKEN="4242:wrong", TELEGRAM_API_URL=bot_api.url)
    join(program.http, "alice")
    assert "Telegram refuses TELEGRAM_BOT_TOKEN" in (tmp_path / "log").read_text()
    assert "4242:wrong" not in (tmp_path / "log").read_text()
    assert program.end()[0] == 0


def test_telegram_that_cannot_be_reached_is_no_reason_not_to_start(start, tmp_path):
    program = start(TELEGRAM_BOT_TOKEN=BOT_TOKEN)
    join(program.http, "alice")
    assert "cannot be reached" in (tmp_path / "log").read_text()
    assert BOT_TOKEN not in (tmp_path / "log").read_text()


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
    kill_loop(start, bot_api, seconds=3)


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
        ends_at = time.monotonic() + 3
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

    def work(method, **sent):
        while not stop.is_set():
            program.http.request(
                "/api/messages/", method=method, headers=headers, expect_errors=True, **sent
            )

    text = {"body": b"text=" + b"x" * 2000, "content_type": FORM}
    threads = [threading.Thread(target=work, args=("POST",), kwargs=text) for _ in range(4)]
    threads += [threading.Thread(target=work, args=("GET",)) for _ in range(2)]
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
    assert load_with_readers(start(), seconds=2) < 20_000_000


@pytest.mark.long
def test_write_ahead_log_stays_short_for_an_hour(start):
    assert load_with_readers(start(), seconds=3600) < 20_000_000


# --- The tests' own ground ------------------------------------------------------------------------


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
    with pytest.raises(factoryapp.TelegramError, match="cannot be reached: ConnectionError"):
        home.introduce()


def test_ci_runs_the_test_command_of_the_readme():
    command = [line for line in (HERE / ".ci/run").read_text().splitlines() if "pytest" in line]
    assert len(command) == 1 and f"    {command[0]}\n" in (HERE / "README.md").read_text()


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
    sock, stop = factoryapp.listen("127.0.0.1", 0), threading.Event()
    server = Server(sock)
    server.address = sock.getsockname()
    thread = threading.Thread(target=server.serve, args=(stop,), name="serving")
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        server.trigger.pull_trigger()
        thread.join()
        wasyncore.close_all(server._map)


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

    def __init__(self, folder, *arguments, preexec_fn=None, **env):
        self.folder, self.said = folder, ""
        command = [sys.executable, HERE / "factoryapp.py", "--port", "0"]
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
        ends_at = time.monotonic() + seconds
        while not (match := re.search(pattern, self.said)):
            pause = max(0, ends_at - time.monotonic())
            ready, _, _ = select.select([self.process.stdout], [], [], pause)
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert chunk, f"no {pattern!r} in {self.said!r}"
            self.said += chunk.decode()
        return match

    def log(self):
        return (self.folder / "log").read_text()

    def megabytes(self):
        """How much memory it takes, 0 where that cannot be known."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return 0
        return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) / 1024

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
    """A small Bot API server on loopback: offsets, long polling, and failures on request."""

    def __init__(self):
        self.updates, self.next_update_id = [], 100
        self.sent = []  # (chat id, text) that it accepted, in order
        self.silent = []  # of each of these, whether it comes without a sound
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
        with self.changed:
            if "offset" in parameters:
                offset = int(parameters["offset"])
                self.updates = [u for u in self.updates if u["update_id"] >= offset]
            self.changed.notify_all()
            seconds = float(parameters["timeout"])
            self.changed.wait_for(lambda: self.updates or not self.is_open, seconds)
            return self.updates[:100]

    def sendMessage(self, parameters):
        chat_id, text = int(parameters["chat_id"]), parameters["text"]
        assert 0 < len(text) <= 4096 and "parse_mode" not in parameters
        assert json.loads(parameters["link_preview_options"]) == {"is_disabled": True}
        with self.changed:
            self.sent.append((chat_id, text))
            self.silent.append(parameters.get("disable_notification") == "True")
            self.changed.notify_all()
            chat = {"id": chat_id, "type": "private"}
            return {"message_id": len(self.sent), "date": 0, "chat": chat, "text": text}

    def write(
        self, chat_id, text=None, reply_to=None, chat_type="private", kind="message", **content
    ):
        """Somebody writes to the bot in Telegram."""
        chat = {"id": chat_id, "type": chat_type}
        message = {"message_id": 5000, "date": 0, "chat": chat, **content}
        if text is not None:
            message["text"] = text
        if chat_type == "private":
            message["from"] = {"id": chat_id, "is_bot": False, "first_name": "Somebody"}
        if reply_to:
            message["reply_to_message"] = {"message_id": reply_to, "date": 0, "chat": chat}
            message["reply_to_message"]["text"] = "…"
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
            self.refuse({"error_code": 401, "description": "Unauthorized"})
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
            self.answer({"ok": True, "result": getattr(bot_api, method)(parameters)})
        elif failure == "lost":  # it was sent, but nobody is told
            getattr(bot_api, method)(parameters)
            self.fail(3)
        else:
            self.fail(failure)

    def fail(self, failure):
        if failure == "reset":
            no_linger = b"\1\0\0\0\0\0\0\0"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
            self.close_connection = True
            self.connection.close()
        elif isinstance(failure, (int, float)):  # seconds to hang, then it closes without a word
            self.server.bot_api.hung_up.wait(failure)
            self.close_connection = True
        elif isinstance(failure, bytes):
            self.answer(failure, 502)
        elif isinstance(failure, list) or failure.get("ok"):
            self.answer(failure)
        else:
            self.refuse(failure)

    def refuse(self, failure):
        self.answer({"ok": False, **failure}, failure.get("error_code", 200))

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


# What version 1 of the schema made, with messages sent, failed and still to be sent at 2026-09-21.
VERSION_1 = """
BEGIN TRANSACTION;
CREATE TABLE blacklisted_tokens (
    jti TEXT PRIMARY KEY,
    expires_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO "blacklisted_tokens" VALUES('00000000000000000000000000000000',1790086400.0);
CREATE TABLE bots (
    id INTEGER PRIMARY KEY,
    username TEXT,
    next_update_id INTEGER
) STRICT;
INSERT INTO "bots" VALUES(0,NULL,NULL);
INSERT INTO "bots" VALUES(4242,'factory_test_bot',100);
CREATE TABLE chats (
    bot_id INTEGER NOT NULL,
    chat_id INTEGER NOT NULL,
    user_id INTEGER NOT NULL UNIQUE REFERENCES users ON DELETE CASCADE,
    linked_at TEXT NOT NULL,
    PRIMARY KEY (bot_id, chat_id)
) STRICT, WITHOUT ROWID;
INSERT INTO "chats" VALUES(0,0,2,'2026-09-21T14:13:20.000000Z');
INSERT INTO "chats" VALUES(4242,7,1,'2026-09-21T14:13:20.000000Z');
CREATE TABLE idempotency_keys (
    user_id INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    key TEXT NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    request_hash BLOB NOT NULL,
    message_id INTEGER NOT NULL REFERENCES messages,
    delivery TEXT NOT NULL,
    used_at REAL NOT NULL,
    PRIMARY KEY (user_id, key)
) STRICT, WITHOUT ROWID;
INSERT INTO "idempotency_keys"
    VALUES(1,'a-key',X'6868686868686868686868686868686868686868686868686868686868686868',1,
    'queued',1790000000.0);
CREATE TABLE link_tokens (
    user_id INTEGER PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    token_hash BLOB NOT NULL UNIQUE,
    expires_at REAL NOT NULL
) STRICT;
INSERT INTO "link_tokens"
    VALUES(3,X'CC0B1C2C66F3BB9FD1A081C626BA1BEF62F6F96441A43BE15268523776AC26A1',1790000600.0);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    sender_id INTEGER NOT NULL REFERENCES users,
    recipient_id INTEGER NOT NULL REFERENCES users,
    text TEXT NOT NULL CHECK (length(text) BETWEEN 1 AND 16384),
    created_at TEXT NOT NULL,
    source TEXT NOT NULL CHECK (source IN ('api', 'telegram')),
    delivery TEXT NOT NULL CHECK (delivery IN ('queued', 'sent', 'failed', 'unlinked'))
) STRICT;
INSERT INTO "messages" VALUES(1,1,1,'заметка','2026-09-21T14:13:20.000000Z','api','sent');
INSERT INTO "messages" VALUES(2,2,1,'привет','2026-09-21T14:13:20.000000Z','telegram','sent');
INSERT INTO "messages" VALUES(3,1,2,'later','2026-09-21T14:13:20.000000Z','api','failed');
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY,
    bot_id INTEGER NOT NULL,
    chat_id INTEGER NOT NULL,
    text TEXT NOT NULL CHECK (length(text) BETWEEN 1 AND 4096),
    message_id INTEGER REFERENCES messages,
    is_last INTEGER NOT NULL DEFAULT 1 CHECK (is_last IN (0, 1)),
    silent INTEGER NOT NULL DEFAULT 0 CHECK (silent IN (0, 1)),
    send_at REAL NOT NULL DEFAULT 0,
    queued_at REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    due_at REAL NOT NULL DEFAULT 0,
    error TEXT,
    given_up_at TEXT
) STRICT;
INSERT INTO "outbox" VALUES(3,0,0,'bob, я получил от тебя сообщение:

привет',NULL,1,0,0.0,1790000000.0,0,0.0,'403 Forbidden','2026-09-21T14:13:20.000000Z');
INSERT INTO "outbox" VALUES(4,0,0,'Сообщение от alice:

later',3,1,0,1790003600.0,1790000000.0,0,0.0,'403 Forbidden','2026-09-21T14:13:20.000000Z');
INSERT INTO "outbox" VALUES(5,4242,7,'alice, я получил от тебя сообщение:

later',NULL,1,0,1790003600.0,1790000000.0,0,0.0,NULL,NULL);
INSERT INTO "outbox"
    VALUES(6,4242,7,'Не доставлено пользователю bob: 1 сообщ.',NULL,1,0,0.0,1790000000.0,0,0.0,
    NULL,NULL);
CREATE TABLE relayed (
    bot_id INTEGER NOT NULL,
    chat_id INTEGER NOT NULL,
    telegram_message_id INTEGER NOT NULL,
    message_id INTEGER NOT NULL REFERENCES messages,
    PRIMARY KEY (bot_id, chat_id, telegram_message_id)
) STRICT, WITHOUT ROWID;
INSERT INTO "relayed" VALUES(4242,7,2,2);
CREATE TABLE signing_key (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    key BLOB NOT NULL CHECK (length(key) >= 32)
) STRICT;
INSERT INTO "signing_key"
    VALUES(1,X'E0E6CD427CAAC764CBF46B57DF1DB8E933E36F3FC254568ACD2749F25805D064');
CREATE TABLE told_groups (
    bot_id INTEGER NOT NULL,
    chat_id INTEGER NOT NULL,
    PRIMARY KEY (bot_id, chat_id)
) STRICT, WITHOUT ROWID;
INSERT INTO "told_groups" VALUES(4242,-100);
CREATE TABLE users (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    username TEXT NOT NULL UNIQUE CHECK (length(username) BETWEEN 1 AND 150),
    password TEXT NOT NULL,
    tokens_from INTEGER NOT NULL DEFAULT 0,
    created_at TEXT NOT NULL
) STRICT;
INSERT INTO "users"
    VALUES(1,'alice',
    'scrypt$16$8$1$nrFUguiCQvl/A2pxqH5QLg==$uIAGBA92bjo2MBKMsHmTMciT4Tkzz5TAQr/xM8+v6VQ=',0,
    '2026-09-21T14:13:20.000000Z');
INSERT INTO "users"
    VALUES(2,'bob',
    'scrypt$16$8$1$rsSlldrhdZJzkpM5x1cqEQ==$DSb8N6ScioFpZ79ToSn+UHSLefcpov8QuWJnTd6MRo8=',0,
    '2026-09-21T14:13:20.000000Z');
INSERT INTO "users"
    VALUES(3,'Иван',
    'scrypt$16$8$1$7a3hzwUbnt3MlXdoYKMbLg==$FRyEt+LTwEELr2Hua2ht6tYqjUxqOOx6kAjRooJ7zug=',0,
    '2026-09-21T14:13:20.000000Z');
CREATE INDEX blacklisted_tokens_by_expiry ON blacklisted_tokens (expires_at);
CREATE INDEX messages_by_sender ON messages (sender_id);
CREATE INDEX messages_by_recipient ON messages (recipient_id) WHERE recipient_id <> sender_id;
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (used_at);
CREATE INDEX outbox_waiting ON outbox (bot_id, chat_id, send_at, id) WHERE given_up_at IS NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('users',3);
PRAGMA application_id = 1180778864;
PRAGMA user_version = 1;
COMMIT;
"""
