# /// script
# requires-python = ">=3.11"
# dependencies = ["bottle~=0.13.4", "PyJWT~=2.11", "pyTelegramBotAPI==4.37.1", "waitress==3.0.2"]
# ///
"""FactoryApp: an HTTP API whose messages a Telegram bot repeats in the chats that people linked.

One message's journey:
  1. The serving thread reads POST /api/messages/ together with all other requests that arrived at
     the same moment: a round (Server). The token names the user, and the fields are checked (HTTP).
     The message is stored with its deliveries, one row in the outbox for each Telegram message to
     be sent (Routes, Outbox, Store).
  2. The round is committed once, before its writing requests are answered. If the commit fails,
     each of their successful answers becomes a 503.
  3. When a chat is due and no sender is busy with the chat (Turns), a sender sends the chat's
     oldest delivery and settles the delivery: sent, retried later, or given up (Outbox).
  4. Messages to the bot arrive on the polling thread (Bot). One transaction stores all effects of
     an update, together with the offset of the next update.

Threads:
  - The serving thread reads every request and answers most of them. The threads of the worker
    pools answer the requests that would hold up the serving thread (POOLS).
  - The outbox thread takes turns, and up to 64 senders deliver.
  - The polling thread listens to Telegram or to the terminal. Each press of a button is answered on
    a thread of its own.
  - One thread does the upkeep, and one writes the log.
The threads share the database, `turns`, `news`, `log_lines`, the limiters, `used_keys`, the state
of the bot and the stop event.

Rooms of the file, in order; a room uses only the rooms above:
  Settings  every setting and every limit         Page     the HTML page at GET /
  Texts     sentences of the bot, long texts      HTTP     errors, sign-in, fields, pages
  Turns     the chat to send to next              Routes   the requests, as a user meets them
  Store     a function for each query or change   OpenAPI  generated from the routes
  Passwords and tokens                            Server   rounds, pools; the only user of waitress
  Outbox    queue, deliver one, one round, all    Main     read settings, start, serve, stop
  Bot       the conversation and both transports

Words:
  round            the requests that arrived together and are committed together
  worker pool      threads for requests that would hold up the serving thread
  waiting request  a long poll: answered when there is news for its user, or when its time is over
  message          a text from one user to another, or to oneself (a note)
  delivery         a row of the outbox: one Telegram message to be sent
  own copy         a delivery to the sender of a message to somebody else
  turn             the moment at which a chat may be sent the next delivery
  transport        Telegram or the terminal (class Home)
  link token       the one-time token that links a chat to an account
  scheduled        a message with a send_at in the future, in a table of its own until then
  the original     the Django REST framework server that this one replaces

How to add:
  - A setting: Settings, read_arguments(), read_settings() and README.
  - A route: Routes alone, since OpenAPI is generated from the routes. A route that hashes, writes
    much or writes in a GET needs @waits(), or everybody waits for it.
  - A field of a message: the last column of its table in schema.sql, an ALTER TABLE there in a part
    "Up to version N" for databases of today, SCHEMA_VERSION, SELECT_MESSAGE, A_MESSAGE and README.
    A field that is known before send_at is a column of the table scheduled too.
  - A change of the data that a list shows: nothing. The triggers of schema.sql count it, for ETags
    and waiting requests, whoever writes. A new table whose rows a list shows needs triggers.
  - A sentence of the bot: Texts. A second language: Texts, and a language of each user to choose
    by: queue_text() and relay() put the sentences together, receive() answers without a user.

Run the server with `python factoryapp.py`; `--help` lists the settings. Without a bot token, the
bot talks in the terminal.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    # Before 3.8, `:=` is a syntax error, and Python's report shows the next line with the advice.
    print(_ := "factoryapp: Python 3.11 or newer is needed: use another Python.", file=sys.stderr)
    sys.exit(2)

import signal

if __name__ == "__main__":
    # Until serve() installs a handler, Ctrl-C ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import codecs
import email.utils
import encodings
import getpass
import hashlib
import ipaddress
import json
import logging
import logging.handlers
import math
import os
import queue
import random
import re
import secrets
import socket
import threading
import time
import unicodedata
import urllib.parse
from collections import Counter, OrderedDict, deque, namedtuple
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache, lru_cache, partial
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ModuleNotFoundError:
    # Windows has no such module, and needs none: allow_files() does nothing there.
    resource = None

try:
    import sqlite3

    import jwt
    import telebot
    import urllib3.util.connection
    from bottle import (
        HTTP_CODES,
        Bottle,
        HTTPError,
        HTTPResponse,
        MultipartError,
        request,
        response,
    )
    from telebot import apihelper
    from waitress import wasyncore
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.server import TcpWSGIServer
    from waitress.utilities import BadRequest, InternalServerError
except ModuleNotFoundError as error:
    print(
        f"factoryapp: the package {error.name} is missing: start as README.md says, or install "
        "requirements.txt; use another Python if its name begins with _",
        file=sys.stderr,
    )
    sys.exit(2)

# --- Settings -------------------------------------------------------------------------------------
# The operator's settings are in `settings`, filled in by main(). Our own choices are constants,
# with the unit in the name.

VERSION = "1.2.0"
SCHEMA_VERSION = 6

# Tokens and passwords
ACCESS_TOKEN_SECONDS = 5 * 60
REFRESH_TOKEN_SECONDS = 24 * 3600
LINK_TOKEN_SECONDS = 10 * 60
SECRET_MIN_BYTES = 32  # RFC 7518, section 3.2
TOKENS_REMEMBERED = 2000
KEY_PREFIX = "fa_"
KEYS = 50  # API keys of one user
SCRYPT = {"n": 2**13, "r": 8, "p": 10}  # OWASP's cheat sheet: 8 MiB, about 150 ms
HASHES_AT_ONCE = 2  # threads for logins; one more for registrations
# Limits for a Limiter: (tries allowed at once, seconds until each further try).
LOGIN_FAILURES_PER_NAME = 10, 30  # for one name, from one address
LOGIN_FAILURES_PER_ADDRESS = 100, 3
REGISTRATIONS_PER_ADDRESS = 100, 3
MESSAGES_TO_ANOTHER = 100, 1
TEXT_ONLY_ANSWERS = 1, 5  # per chat
GROUP_ANSWERS = 1, 30 * 24 * 3600  # telling a group that only private chats can be linked
TLS_WARNINGS = 1, 60
LIMITER_KEYS = 10_000  # remembered by each Limiter

# Limits on requests. The MAX_ lengths are code points.
MAX_USERNAME = 150
MIN_PASSWORD = 8
MAX_PASSWORD = 1024
# The most common passwords of Django's list. MIN_PASSWORD already refuses the shorter ones.
COMMON_PASSWORDS = set(
    """
    123456789 password 12345678 password1 1234567890 iloveyou 1q2w3e4r5t qwertyuiop 1qaz2wsx
    myspace1 homelesspa 1q2w3e4r qwerty123 987654321 target123 1g2w3e4r zag12wsx gwerty123
    asdfghjkl 123123123 princess computer football 1234qwer sunshine iloveyou1 fuckyou1 789456123
    princess1 abcd1234 11111111 passer2009 superman football1 jordan23 12qwaszx baseball
    123456789a q1w2e3r4t5y6 88888888 fqrg7cs493
    """.split()
)
MAX_TEXT = 16_384
MAX_BODY_BYTES = 64 * 1024
LONG_BODY_BYTES = 16 * 1024  # longer bodies are read in a worker pool
MAX_FORM_FIELDS = 1000
# JSON may write one code point as 12 bytes: \ud83d\ude00
MAX_MESSAGE_BODY_BYTES = 12 * MAX_TEXT + 4096
MAX_ID = 2**63 - 1  # the largest id in SQLite
MAX_PAGE_ROWS = 1000
SEND_AHEAD_SECONDS = 30 * 24 * 3600
MAX_RECIPIENTS = 20
# Limits on waiting messages: one transaction has to move or give up a whole queue.
MAX_QUEUED = 2000  # from one user to another, and as many scheduled
MAX_QUEUED_TO_ONESELF = 50_000  # if the new text has at most SHORT_TEXT code points
SHORT_TEXT = 1000  # code points
QUEUE_FULL_SECONDS = 60  # Retry-After when a queue is full
MAX_CHOICES = 8
MAX_CHOICE = 64  # code points
WAIT_SECONDS = 50  # at most, for news; nginx gives up after 60
IDEMPOTENCY_SECONDS = 24 * 3600
DELIVERIES = "scheduled", "queued", "sent", "failed", "unlinked", "cancelled"

# The database. A list longer than LIST_ROWS or LIST_BYTES is read in pieces by a worker pool.
LIST_ROWS = 200
LIST_BYTES = 128 * 1024
LIST_PIECE_BYTES = 48 * 1024
PATIENCE_SECONDS = 5  # to wait for other writers, from the arrival of a request; then 503
SERVING_PATIENCE_SECONDS = 0.01  # the same wait on the serving thread
CHECKPOINT_COMMITS = 50
WAL_LONG_FRAMES = 1500  # of 4 KiB each
WAL_RESTART_SECONDS = 0.1
WAL_KEPT_BYTES = 8 * 1024**2  # to which the log file is cut after a full checkpoint
PORTION_ROWS = 200  # changed or deleted by one statement
PORTION_PAUSE_SECONDS = 0.02
PUBLISH_ROWS = 20  # due messages published in one transaction, while other writers wait
PUBLISH_AGAIN_SECONDS = 3600  # until a message that cannot be published is retried
FORGET_SECONDS = 3600  # between two searches for old rows

# Telegram
TELEGRAM_MAX_TEXT = 4096  # code points (Bot API, sendMessage)
SENDERS = 64  # threads
SENDS_PER_SECOND = 30  # Telegram's limit for one bot
# Sends at the same moment. A larger burst could, by network jitter, exceed 30 in one second.
SENDS_BURST = 5
SEND_TIMEOUT_SECONDS = 15
CONNECT_SECONDS = 5  # to one address; then urllib3 tries the next address
LONG_POLL_SECONDS = 25
BACKOFF_MAX_SECONDS = 5 * 60
POLL_BACKOFF_MAX_SECONDS = 30
SLOW_SECONDS = 60  # after the pause of a 429, while its chat gets one message a second
REFUSALS = 3  # 429s in a row, from as many linked chats, until all chats wait
FAILURES_BEFORE_GIVING_UP = 20  # and FAILING_SECONDS since the first of them
FAILING_SECONDS = 3600
MISSING_SECONDS = 600  # of "chat not found" until the chat is unlinked
HEARD_SECONDS = 3 * 24 * 3600
UPKEEP_SECONDS = 0.5  # between two runs of the upkeep
SILENT_SECONDS = 60  # without an answer, until /health/ reports the bot as failing
OUTAGE_FAILURES = 3  # failed polls in a row; a gateway may cut each long poll
WEBHOOK_SECONDS = 3600  # for which /health/ reports that another program sets a webhook
PRESSES_AT_ONCE = 16  # button presses being answered, each on a thread

# The server
CONNECTIONS = 200
LEAST_CONNECTIONS = 8  # if fewer open files are allowed than these need, we do not start
# Files open besides clients: the database for each thread, and a socket for each sender.
OWN_FILES = 240
MAX_PROXIES = 20  # read from the end of X-Forwarded-For
REQUEST_SECONDS = 10  # to send a whole request
IDLE_SECONDS = 60  # between two requests
STUCK_SECONDS = 30  # without the client reading any more of the answer
ANSWER_SECONDS = 30  # to read a whole answer while other clients need the connection
SEND_BUFFER_BYTES = 64 * 1024  # in the kernel, for each connection
UNSENT_BYTES = 64 * 1024**2  # waiting to be sent, of all answers together
WAITING = 100  # requests waiting for news at once
WAITING_OF_A_USER = 10
STOP_SECONDS = 1  # granted to unfinished work by a clean stop
LOG_LINES = 2000  # waiting to be written; further lines are lost

DESCRIPTION = "An HTTP API whose messages a Telegram bot repeats in linked chats."

log = logging.getLogger("factoryapp")


class settings:
    """Hold the settings of this process. main() fills them in; tests change them."""

    db = "factoryapp.db"
    secret = None  # bytes, used in place of the signing key in the database
    key = None  # bytes for signing the JWTs, set by open_store()
    trusted_proxies = ()  # networks of proxies that may set X-Forwarded-… headers
    registration = "open"  # or "closed"
    keep_days = 0  # age at which messages are deleted; 0: never
    connections = CONNECTIONS  # fewer if the system allows few open files


log_lines = queue.Queue(LOG_LINES)


class LogHandler(logging.handlers.QueueHandler):
    """Put each log record into log_lines unchanged: write_log() formats the records."""

    def prepare(self, record):
        return record


def write_log(handler):
    """Write log_lines, on a separate thread: writing blocks if nobody reads standard error."""
    while record := log_lines.get():
        handler.handle(record)
        log_lines.task_done()


def now():
    """Return the seconds since 1970, by the system's clock."""
    return time.time()


def ticks():
    """Return seconds that never go back, for pauses and limits: now() may be set back."""
    return time.monotonic()


class BadSetting(Exception):
    """Tell the operator why the server cannot start, and name the remedy."""


def start_thread(name, target, *args):
    """Start a thread that ends with the process. Returns the thread.

    Raises BadSetting if the system allows no more threads.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise BadSetting(f"{error}: allow 100 more (ulimit -u, or TasksMax).") from None
    return thread


def end(code):
    """End the process with this exit code, after up to STOP_SECONDS / 2 to write the log.

    os._exit() skips Python's own shutdown: the shutdown would wait for a thread that is writing,
    and crash if a thread is reading standard input.
    """
    ends_at = ticks() + STOP_SECONDS / 2
    while log_lines.unfinished_tasks and ticks() < ends_at:
        time.sleep(0.01)
    os._exit(code)


def iso(seconds):
    """Return a time in UTC as ISO 8601 with microseconds, as Django REST framework does."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")[:26] + "Z"


# --- Texts ----------------------------------------------------------------------------------------
# The sentences of the bot, and the splitting of long texts.

OWN_COPY = "{username}, я получил от тебя сообщение:\n\n{text}"
OWN_COPY_FOR = "{username}, я получил от тебя сообщение для {recipient}:\n\n{text}"
FROM_ANOTHER = "Сообщение от {username}:\n\n{text}"
LATER_PART = "{username} ({n}/{of}):\n\n{text}"
TOO_FAST = "Так много пользователю {username} сразу нельзя: повторите через {seconds} с."
NOT_DELIVERED = "Не доставлено пользователю {username}: {count} сообщ."

HOW_TO_GET_A_TOKEN = (
    "Токен выдаёт API: GET /api/users/get-telegram-token/. Он действует 10 минут и только один раз."
)
GREETING = f"""\
Здравствуйте! Пришлите мне токен, чтобы привязать этот чат к вашему аккаунту.

{HOW_TO_GET_A_TOKEN}"""
LINKED = (
    "Готово: этот чат и аккаунт {username} успешно привязаны. Теперь я повторяю здесь ваши "
    "сообщения."
)
WRONG_TOKEN = f"""\
Этот токен неверный или устарел. Получите новый и пришлите его мне.

{HOW_TO_GET_A_TOKEN}"""
NOT_LINKED = f"""\
Этот чат не привязан: токен неверный или устарел. Получите новый и пришлите его мне.

{HOW_TO_GET_A_TOKEN}"""
LINKED_TO = "Этот чат привязан к аккаунту {username}. Отвязать его: /stop"
LINKED_ELSEWHERE = "Аккаунт {username} теперь привязан к другому чату, а этот чат отвязан."
FORWARDED_TOKEN = "Пересланный токен я не принимаю: скопируйте его и пришлите сами."
STOP_FIRST = (
    "Этот чат привязан к аккаунту {username}. Чтобы привязать другой аккаунт, пришлите сначала "
    "/stop, а потом токен."
)
TOKEN_SEEN = (
    "Этот токен увидели другие, и он больше не действует. Получите новый и пришлите его мне лично."
)
UNLINKED = f"""\
Чат отвязан от аккаунта {{username}}. Чтобы привязать его снова, пришлите новый токен.

{HOW_TO_GET_A_TOKEN}"""
COMMANDS = {
    "start": "к какому аккаунту привязан этот чат",
    "stop": "отвязать чат",
    "help": "что я понимаю",
}
ANSWER_BY_NUMBER = "\nСтрока «#17 текст» отвечает на сообщение 17."
NO_SUCH_NUMBER = "У вас нет сообщения с таким номером, поэтому я никому ничего не передаю."
TOO_LATE = "Этот вопрос больше не ждёт ответа."
HELP = f"""\
Я понимаю:
{"".join(f"/{name} — {COMMANDS[name]}{chr(10)}" for name in COMMANDS)}\
токен — привязать чат к аккаунту
Любой другой текст из привязанного чата становится вашим сообщением, а ответ на чужое сообщение \
уходит его автору."""
UNKNOWN_COMMAND = f"Такой команды я не знаю.\n\n{HELP}"
TOO_LONG = f"Это слишком длинно: я принимаю до {MAX_TEXT} символов."
TEXT_ONLY = "Я читаю только текст."
NO_CHAT = "Сохранено: пользователь {username} увидит это через API, чата у него нет."
EDITED = "Правок я не вижу: пришлите исправленное новым сообщением."
UNKNOWN_REPLY = "Я не знаю, чьё это сообщение, поэтому никому ничего не передаю."
PRIVATE_ONLY = "Привязать можно только личный чат: напишите мне лично."

# A flag is a pair of these letters.
FLAG_LETTERS = "🇦🇧🇨🇩🇪🇫🇬🇭🇮🇯🇰🇱🇲🇳🇴🇵🇶🇷🇸🇹🇺🇻🇼🇽🇾🇿"
# Characters joined to the character before: ZWNJ, Thai and Lao vowels, Japanese sound marks, skin
# tones, tags of regional flags.
JOINING = "[\u200c\u0e33\u0eb3\uff9e\uff9f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"


def is_inside_cluster(text, i):
    """Return whether a cut before text[i] would split a grapheme cluster.

    Covers the usual cases of UAX #29.
    """
    before, after = text[i - 1 : i + 1]
    if before in FLAG_LETTERS and after in FLAG_LETTERS:
        return (i - len(text[:i].rstrip(FLAG_LETTERS))) % 2 == 1
    return (
        unicodedata.category(after)[0] == "M"
        or "\u200d" in (before, after)
        or before + after == "\r\n"
        or re.match(JOINING, after)
    )


def find_cut(text, limit):
    """Return the index at which to cut a text, at most `limit`.

    Prefers the end of a line, then of a word, then of a grapheme cluster, each in the second half
    of `limit`.
    """
    for ends in (lambda c: c == "\n", str.isspace, lambda c: True):
        for i in range(limit, limit // 2, -1):
            if ends(text[i - 1]) and not is_inside_cluster(text, i):
                return i
    return limit


# Pieces of a text that can be normalized one by one: no piece ends before a combining mark or a
# Hangul jamo, unless hundreds of them follow each other.
PIECE = re.compile(r".{1,300}(?![^\w\s!-\u02ff\u2100-\u2bff]|[\u1161-\u11c2])|.{1,300}", re.DOTALL)

# Characters that Telegram strips or trims, and invisible ones: Telegram treats a text of nothing
# else as empty.
NOTHING = re.compile(
    "[\\s\x00-\x1f\x7f-\x9f\xad\u030a\u0333\u033f\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0]*"
)


def split_text(text, username=""):
    """Split a text into Telegram messages. Returns a list of texts, none of them empty.

    All but the first begin with `username`, the author. The text is normalized to NFC, since
    Telegram strips some accents that stand alone. Normalizing piece by piece avoids quadratic time
    for thousands of marks.
    """
    text = PIECE.sub(lambda piece: unicodedata.normalize("NFC", piece[0]), text)
    room = TELEGRAM_MAX_TEXT
    later_room = room - len(LATER_PART.format(username=username, n=99, of=99, text=""))
    parts = []
    while len(text) > room:
        cut = find_cut(text, room)
        parts.append(text[:cut])
        text, room = text[cut:], later_room
    first, *later = [part for part in (*parts, text) if not NOTHING.fullmatch(part)]
    of = len(later) + 1
    return [first] + [
        LATER_PART.format(username=username, n=n, of=of, text=part)
        for n, part in enumerate(later, 2)
    ]


def normalize(form, text, most):
    """Return a text in a Unicode normal form, such as "NFC".

    A text of more than 4 * most code points comes back unchanged. At most four code points compose
    into one, so the text is longer than `most` in any form, and normalizing thousands of marks
    takes quadratic time.
    """
    return unicodedata.normalize(form, text) if len(text) <= 4 * most else text


def fold(name):
    """Return the case-folded key of a name: equal for names that differ only by case."""
    return normalize("NFKC", name.casefold(), MAX_USERNAME)


# --- Turns ----------------------------------------------------------------------------------------
# When each chat gets the next delivery. The Store calls wake() after a commit that queued one for a
# chat. The Outbox takes the turns.


class Again(NamedTuple):
    """Say in how many seconds a chat's turn comes again, and why.

    `why` is "early" (something is queued), "failed" (our own back-off after a failed send) or
    "told" (rate-limited: Telegram's retry_after).
    """

    seconds: float
    why: str


class Turn(NamedTuple):
    """Say when a chat's turn comes, in ticks(), and why: one of the words that Again explains."""

    due_at: float
    chat_id: int
    why: str


class Turns:
    """Keep track of the chats with a queue: when each is due, and which are being sent to.

    Allows one sender for each chat, and SENDS_PER_SECOND for all chats together. Turns are kept
    only in memory, since one process owns the database. A delivery that was in flight when the
    process died is due again at the next start.
    """

    def __init__(self):
        self.changed = threading.Condition()
        self.open(None, ())

    def close(self):
        """Hand out no more turns, and wait up to STOP_SECONDS / 2 for the turns in progress."""
        with self.changed:
            self.bot_id = None
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.busy, STOP_SECONDS / 2)

    def open(self, bot_id, queues):
        """Start with the queues of this bot: (chat id, Again) pairs from list_queues()."""
        with self.changed:
            self.bot_id = bot_id
            self.order = []  # a heap of Turn: at most one for each chat, none while busy
            self.due = set()  # chats with a Turn in `order`
            self.busy = {}  # chat that is being sent to: back_at when its turn began
            self.sending = {}  # busy chat: the id of the outbox row that is claimed for sending
            self.queued = set()  # busy chats for which wake() was called meanwhile
            self.sent_at = deque([-math.inf] * SENDS_BURST, SENDS_BURST)  # latest sends (ticks)
            # In seconds since 1970: passed_at is the time of the last send that did not fail,
            # back_at the end of Telegram's last outage.
            self.passed_at = self.back_at = 0
            self.slow = {}  # chat: until when the chat gets at most one message a second
            self.refused = {}  # linked chat with a 429 since the last success: end of its pause
            self.barred_until = 0  # end of a pause of the whole bot
            for chat_id, again in queues:
                self.put(chat_id, again)
            self.changed.notify_all()

    def put(self, chat_id, again):
        """Schedule a chat's turn, unless the chat has one already. The caller holds the lock.

        A scheduled turn stays as it is: a new message must not end a pause.
        """
        if chat_id in self.due:
            return
        least = 1 if ticks() < self.slow.get(chat_id, 0) else 0
        turn = Turn(ticks() + max(again.seconds, least), chat_id, again.why)
        self.due.add(chat_id)
        heappush(self.order, turn)
        if self.order[0] is turn:
            self.changed.notify()

    def wake(self, bot_id, chat_id):
        """Take note of something queued for a chat.

        If the chat is busy, give_back() schedules the next turn.
        """
        with self.changed:
            if chat_id in self.busy:
                self.queued.add(chat_id)
            elif bot_id == self.bot_id:
                self.put(chat_id, Again(0, "early"))

    def take(self, wait_seconds=0):
        """Take the first turn that is due. Returns its chat, or None if no turn comes in time.

        The caller must call give_back() for the chat. At most SENDERS chats are busy at a time.
        """
        ends_at = time.monotonic() + wait_seconds
        with self.changed:
            while self.bot_id is not None:
                is_any = self.order and len(self.busy) < SENDERS
                due_at = max(
                    self.order[0].due_at if is_any else math.inf,
                    # At most SENDS_BURST sends in SENDS_BURST / SENDS_PER_SECOND seconds.
                    self.sent_at[0] + SENDS_BURST / SENDS_PER_SECOND,
                    self.barred_until,
                )
                if due_at <= ticks():
                    chat_id = heappop(self.order).chat_id
                    self.due.remove(chat_id)
                    self.busy[chat_id] = self.back_at
                    self.sent_at.append(ticks())
                    return chat_id
                left = ends_at - time.monotonic()
                if left <= 0:
                    break
                self.changed.wait(min(left, due_at - ticks()))
        return None

    def claim(self, chat_id, delivery):
        """Reserve a delivery for the sender that has this chat's turn.

        Returns False if another sender is sending the delivery already, to the chat that the
        account was linked to before.
        """
        with self.changed:
            if delivery["id"] in [row["id"] for row in self.sending.values()]:
                return False
            self.sending[chat_id] = delivery
            return True

    def is_sending(self, message_id):
        """Return whether the recipient's copy of a message is being sent."""
        with self.changed:
            return any(
                row["message_id"] == message_id and not row["is_own_copy"]
                for row in self.sending.values()
            )

    def give_back(self, chat_id, again):
        """End a chat's turn. `again` tells when the next turn comes; None if the queue is empty.

        If an outage of Telegram ended during the turn, a failed send is retried within a second.
        """
        with self.changed:
            began_at = self.busy.pop(chat_id, self.back_at)
            delivery = self.sending.pop(chat_id, None)
            why = again.why if again else "early"
            if why == "told":
                self.note_refusal(delivery, ticks() + again.seconds)
            elif why == "early" and delivery:
                self.refused.clear()
                self.passed_at = now()
            if why == "early" and chat_id in self.queued:
                again = Again(0, "early")
            elif why == "failed" and began_at != self.back_at:
                again = Again(min(again.seconds, 1), "failed")
            self.queued.discard(chat_id)
            if again:
                self.put(chat_id, again)
            self.changed.notify_all()

    def note_refusal(self, delivery, until):
        """Note that Telegram rate-limited the chat of a delivery. The caller holds the lock.

        Once REFUSALS linked chats in a row are rate-limited, the limit must be the bot's: all chats
        wait until the shortest of the REFUSALS pauses ends. Unlinked chats do not count, since
        anybody can open many chats.
        """
        chat_id = delivery["chat_id"]
        self.slow = {chat: ends_at for chat, ends_at in self.slow.items() if ends_at > ticks()}
        self.slow[chat_id] = until + SLOW_SECONDS
        if not delivery["is_linked"]:
            return
        self.refused.pop(chat_id, None)
        self.refused[chat_id] = until
        latest = list(self.refused.values())[-REFUSALS:]
        if len(latest) == REFUSALS:
            self.barred_until = min(latest)

    def hurry(self):
        """Make failed sends due now, since Telegram answers again.

        Rate-limited chats keep their pause.
        """
        with self.changed:
            self.order = sorted(
                turn._replace(due_at=ticks()) if turn.why == "failed" else turn
                for turn in self.order
            )
            self.back_at = now()
            self.changed.notify_all()


turns = Turns()


class news:
    """Tell the serving thread, which keeps the waiting requests, that there was a commit."""

    is_new = False
    wake = staticmethod(lambda: None)  # wakes the serving thread


# --- Store ----------------------------------------------------------------------------------------
# Each thread has its own connection. Functions take `db` first, so that the caller's `with
# transaction() as db:` shows the extent of a transaction. A `chat` is (bot id, chat id).


class AlreadyRunning(BadSetting):
    """Another process has locked the database."""


class Connection(sqlite3.Connection):
    """The connection of one thread, with the state of the thread's transaction."""

    queued_for: set  # chats to wake after the commit

    def wait_for_others(self, seconds):
        """Set for how many seconds a statement waits while other processes hold a lock."""
        self.execute(f"PRAGMA busy_timeout = {max(0, int(1000 * seconds))}")

    def run(self, sql, *values, **named):
        return self.execute(sql, values or named)

    def changes(self, sql, *values, **named):
        """Execute a statement. Returns True if exactly one row was changed."""
        return self.run(sql, *values, **named).rowcount == 1

    def one(self, sql, *values, **named):
        """Execute a query. Returns the first row, or None."""
        return self.run(sql, *values, **named).fetchone()

    def list(self, sql, *values, **named):
        """Execute a query. Returns the first column of all rows."""
        return [row[0] for row in self.run(sql, *values, **named)]

    def insert(self, table, verb="INSERT", **row):
        """Insert a row, {column: value}. Returns the cursor."""
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        return self.execute(f"{verb} INTO {table} ({names}) VALUES ({marks})", [*row.values()])


# SQLite has no lists: a list is bound as JSON, for json_each().
sqlite3.register_adapter(list, partial(json.dumps, ensure_ascii=False))


class opened:
    """State of the database's files in this process."""

    files = {}  # path: os.stat() of the file, since open_store()
    commits = 0  # since the last checkpoint
    frames = 0  # in the write-ahead log at the last checkpoint


# The state of each thread: `db`, the connection; `path`, the database that `db` is open on;
# `patience`, the seconds to wait for other writers; `answer`, the Answer that the thread is making.
local = threading.local()
write_lock = threading.Lock()


def is_outage(error):
    """Return whether the database failed, for example by a lock, a full disk or a bad file.

    An IntegrityError is no outage: then the data broke a constraint.
    """
    return isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError)


def patience():
    return getattr(local, "patience", PATIENCE_SECONDS)


def check_files():
    """Raise sqlite3.OperationalError if a file of the open database was removed or replaced.

    Anything written to such a file would be lost at the next start.
    """
    try:
        if all(os.path.samestat(os.stat(path), known) for path, known in opened.files.items()):
            return
    except OSError as error:
        log.debug(f"the database file: {error}")
    raise sqlite3.OperationalError("the database file, or its -wal, was removed or replaced")


def connect(mode):
    """Return a new connection to the database. `mode` is "ro" or "rw".

    Neither mode creates the file, since an empty file is no database: only open_store() does.
    """
    uri = f"file:{urllib.parse.quote(os.fsencode(settings.db))}?mode={mode}"
    db = sqlite3.connect(
        uri, uri=True, timeout=patience(), isolation_level=None, factory=Connection
    )
    db.row_factory = sqlite3.Row
    return db


def connection():
    """Return this thread's connection to the database, opened at the first use."""
    if getattr(local, "path", None) != settings.db:
        local.db, local.path = connect("rw"), settings.db
        local.db.executescript(f"""
            -- A commit is on disk when it returns: on macOS that takes the other two.
            PRAGMA synchronous = FULL;
            PRAGMA fullfsync = ON;
            PRAGMA checkpoint_fullfsync = ON;
            PRAGMA foreign_keys = ON;
            PRAGMA temp_store = MEMORY;
            PRAGMA secure_delete = ON;
            PRAGMA cache_size = -500;
            PRAGMA journal_size_limit = {WAL_KEPT_BYTES};
            -- See checkpoint().
            PRAGMA wal_autocheckpoint = 0;
            """)
    return local.db


def transaction():
    """Return a context manager for a write that is stored whole or not at all.

    The write is on disk when the context ends. Within another transaction, the write is a part that
    may fail alone. Raises sqlite3.OperationalError if others write for too long, and sqlite3.Error
    if the write cannot be stored: then nothing was stored.
    """
    db = connection()
    return savepoint(db) if db.in_transaction else outermost(db)


@contextmanager
def outermost(db):
    """Run a whole transaction. After the commit, wake senders and waiting requests."""
    db.queued_for = set()
    ends_at = ticks() + patience()
    if not write_lock.acquire(timeout=patience()):
        raise sqlite3.OperationalError("other threads write for too long")
    try:
        db.wait_for_others(ends_at - ticks())
        db.execute("BEGIN IMMEDIATE")
        # Only after BEGIN: the files may have been replaced while BEGIN waited for other writers.
        check_files()
        yield db
        commit(db)
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
        write_lock.release()
    for bot_id, chat_id in db.queued_for:
        turns.wake(bot_id, chat_id)
    news.is_new = True
    news.wake()


@contextmanager
def savepoint(db):
    """Run a part of a transaction: if the part fails, only the part is rolled back.

    On some errors, such as a full disk, SQLite itself rolls back the whole transaction.
    """
    db.execute("SAVEPOINT part")
    try:
        yield db
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK TO part")
            db.execute("RELEASE part")
        raise
    db.execute("RELEASE part")


def commit(db):
    """Write a transaction to the disk. Raises sqlite3.Error: then nothing was stored."""
    with fsync_or_exit():
        db.execute("COMMIT")
    opened.commits += 1
    if opened.commits >= CHECKPOINT_COMMITS:
        checkpoint(db)


@contextmanager
def fsync_or_exit():
    """End the process if fsync() fails.

    The data in memory can then no longer be trusted, since the kernel drops data that could not be
    written (https://wiki.postgresql.org/wiki/Fsync_Errors).
    """
    try:
        yield
    except sqlite3.Error as error:
        if "FSYNC" in getattr(error, "sqlite_errorname", ""):
            log.critical("the disk failed to store what was written: ending. Mend it, then start")
            end(1)
        raise


def checkpoint(db):
    """Copy the write-ahead log into the database, so that the log can start anew.

    We checkpoint ourselves, because SQLite's automatic checkpoints report no disk errors. If the
    log is long, RESTART waits up to WAL_RESTART_SECONDS for readers of the log.
    """
    mode = "RESTART" if opened.frames > WAL_LONG_FRAMES else "PASSIVE"
    opened.commits = 0
    try:
        db.wait_for_others(WAL_RESTART_SECONDS)
        with fsync_or_exit():
            opened.frames = db.one(f"PRAGMA wal_checkpoint({mode})")[1]
    except sqlite3.Error as error:
        # The commit itself is safe in the write-ahead log.
        log.warning(f"the write-ahead log was not copied, and grows: {error}")


def check_sqlite():
    """Raise BadSetting if the SQLite of this Python is too old for us."""
    if sqlite3.sqlite_version_info < (3, 37):
        found = f"this Python has {sqlite3.sqlite_version}: use another Python."
        raise BadSetting(f"SQLite 3.37 or newer is needed, and {found}")


def cannot_be_used(error):
    return BadSetting(
        f"The database {settings.db} cannot be used ({error}). It, its -wal, -shm and .lock beside "
        "it, and their folder have to be readable and writable: mend that, or name another with "
        "--db."
    )


def has_another_name():
    """Return whether the database has a second name, by a hard link or a mount.

    A program that opens the second name would look for the write-ahead log beside that name.
    """
    # Escaped as in /proc/self/mountinfo, see proc_pid_mountinfo(5).
    path = os.fsencode(settings.db).replace(b"\\", rb"\134").replace(b" ", rb"\040")
    mounts = Path("/proc/self/mountinfo")
    is_mounted = mounts.exists() and b" %b " % path in mounts.read_bytes()
    return is_mounted or os.stat(settings.db).st_nlink > 1


def read_version(db):
    """Return the version of the database's schema, or 0 if the database is empty.

    Raises BadSetting if this program cannot use the database.
    """
    names = set(db.list("SELECT name FROM sqlite_master"))
    version = 0
    if "factoryapp" in names:
        (version,) = db.one("SELECT schema_version FROM factoryapp")
    elif {"signing_key", "leftovers"} <= names:
        version = 5
    elif names:
        raise BadSetting(
            f"The database {settings.db} is another program's, or of an old version: name another "
            "file with --db, or start version 1.1.0 with it once."
        )
    if version > SCHEMA_VERSION:
        raise BadSetting(
            f"The database {settings.db} is from a newer version of FactoryApp: start that "
            "version, or name another file with --db."
        )
    return version


def check_store():
    """Return the version of the database's schema, or 0 if there is no schema yet.

    Changes nothing. Raises BadSetting if this program cannot use the database.
    """
    for path in (settings.db + suffix for suffix in ("-wal", "-shm", ".lock")):
        if os.path.islink(path):
            raise BadSetting(f"{path} is a symbolic link, which is never followed: remove it.")
    try:
        if not os.path.exists(settings.db):
            return 0
        if not os.path.isfile(settings.db):
            raise BadSetting(f"The database {settings.db} is not a file: name another with --db.")
        if has_another_name():
            raise BadSetting(
                f"The database {settings.db} has another name, by a hard link or a mount, and what "
                "was written last may lie beside that: mount the folder, not the file, and remove "
                "other links."
            )
        with closing(connect("ro")) as db:
            return read_version(db)
    except (OSError, sqlite3.Error) as error:
        raise cannot_be_used(error) from None


def apply(db, schema, version):
    """Execute schema.sql on a database of this version.

    The parts "Up to version N" are for databases of the versions 1 to N only.
    """
    for part in re.split("(?m)^(?=-- === )", schema):
        up_to = re.match(r"-- === Up to version (\d+)", part)
        if not up_to or 0 < version <= int(up_to[1]):
            for statement in part.split(";\n"):
                db.execute(statement)


def make_private(path):
    """Let only the owner read and write the file.

    Raises BadSetting if the file belongs to another user.
    """
    try:
        os.chmod(path, 0o600)
    except PermissionError:
        raise BadSetting(
            f"{path} belongs to another user: start as that one, or make it yours with chown."
        ) from None


def lock_database():
    """Lock the database against other processes. Returns the lock; close the lock to release it.

    The lock is a small database beside the real one, since SQLite can lock files on every system.
    Raises AlreadyRunning if another process has the lock, BadSetting if locking fails.
    """
    path = settings.db + ".lock"
    try:
        with open(path, "ab"):
            make_private(path)
        # Without a timeout, two processes that start at the same moment could refuse each other.
        lock = sqlite3.connect(path, timeout=0.3, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
    except OSError as error:
        raise cannot_be_used(error) from None
    except sqlite3.Error as error:
        if error.sqlite_errorname != "SQLITE_BUSY":
            raise cannot_be_used(f"{path}: {error}") from None
        raise AlreadyRunning(
            f"FactoryApp is already running on the database {settings.db}: end that one, or name "
            "another file with --db."
        ) from None
    return lock


def open_store():
    """Create the database, or update its schema. Raises BadSetting if either fails."""
    version = check_store()
    # Resolved, since the program may be started through a symbolic link.
    path = Path(__file__).resolve().with_name("schema.sql")
    try:
        schema = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise BadSetting(f"{path} cannot be read ({error}): put it there again.") from None
    try:
        with open(settings.db, "ab"):
            paths = [settings.db + suffix for suffix in ("", "-wal", "-shm")]
            for path in filter(os.path.exists, paths):
                make_private(path)
        opened.files = {}
        db = connection()
        if db.one("PRAGMA journal_mode = WAL")[0] != "wal":
            raise sqlite3.OperationalError("SQLite or its file system has no write-ahead log")
        with transaction():
            apply(db, schema, version)
            db.insert("factoryapp", "REPLACE", id=1, schema_version=SCHEMA_VERSION)
            # Version 1.1.0 refuses a database with a higher user_version than its own.
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            key = secrets.token_bytes(SECRET_MIN_BYTES)
            db.insert("signing_key", "INSERT OR IGNORE", id=1, key=key)
        # Not the -shm: nothing is lost without the -shm, since SQLite rebuilds it from the -wal.
        opened.files = {path: os.stat(path) for path in paths[:2]}
        settings.key = settings.secret or db.one("SELECT key FROM signing_key")["key"]
    except (OSError, sqlite3.Error) as error:
        raise cannot_be_used(error) from None


def add_user(db, username, password_hash):
    """Add a user. Returns the id, or None if the name is taken, in this or another case."""
    added = db.one(
        """
        INSERT INTO users (username, password, created_at, folded) VALUES (?, ?, ?, ?)
        ON CONFLICT DO NOTHING RETURNING id
        """,
        username,
        password_hash,
        iso(now()),
        fold(username),
    )
    return added and added["id"]


# The columns of a user in every SELECT.
USER = "users.id, username, password, changes"


def find_user(db, user_id):
    return db.one(f"SELECT {USER} FROM users WHERE id = ?", user_id)


def find_user_by_name(db, username, folded=""):
    """Return the user of exactly this name, or else of this case-folded name, or None."""
    return db.one(
        f"SELECT {USER} FROM users WHERE username = ? OR folded = ? ORDER BY username <> ?",
        username,
        folded,
        username,
    )


def list_accounts(db):
    """Return (name, id, since, bot, linked since, state) of all accounts by name, all as text."""
    return db.run(
        """
        SELECT username, users.id || '', created_at,
            CASE bot_id WHEN 0 THEN 'terminal' ELSE ifnull(bot_id || '', '-') END,
            ifnull(linked_at, '-'), iif(password LIKE '%$', 'disabled', 'active')
        FROM users LEFT JOIN chats ON user_id = users.id ORDER BY username
        """
    ).fetchall()


def set_password(db, user_id, old_hash, new_hash):
    """Change a user's password, and end all tokens and keys of the user.

    Returns False if the old hash is no longer the user's: another request changed the password.
    """
    db.run("DELETE FROM link_tokens WHERE user_id = ?", user_id)
    db.run("DELETE FROM api_keys WHERE user_id = ?", user_id)
    return db.changes(
        "UPDATE users SET password = ? WHERE id = ? AND password = ?", new_hash, user_id, old_hash
    )


def list_changes(db, user_ids):
    """Map each of these user ids to the user's counter of changes (users.changes)."""
    sql = "SELECT id, changes FROM users WHERE id IN (SELECT value FROM json_each(?))"
    return dict(db.run(sql, user_ids))


# The columns of an API key that clients see.
KEY_COLUMNS = "id, name, created_at, expires_at, last_used_on"


def add_key(db, user_id, name, key, expires_at):
    """Store the hash of a new API key. Returns the columns that clients see."""
    return db.one(
        f"""
        INSERT INTO api_keys (user_id, name, key_hash, created_at, expires_at)
        VALUES (?, ?, ?, ?, ?) RETURNING {KEY_COLUMNS}
        """,
        user_id,
        name,
        sha256(key),
        iso(now()),
        expires_at and iso(expires_at),
    )


def list_keys(db, user_id):
    """Return the columns that clients see of a user's API keys that have not expired."""
    return db.run(
        f"""
        SELECT {KEY_COLUMNS} FROM api_keys
        WHERE user_id = ? AND (expires_at IS NULL OR expires_at > ?) ORDER BY id
        """,
        user_id,
        iso(now()),
    ).fetchall()


def find_key_user(db, key):
    """Return an API key's user, with the key's key_id, expires_at and last_used_on, or None."""
    return db.one(
        f"""
        SELECT {USER}, api_keys.id AS key_id, expires_at, last_used_on
        FROM api_keys JOIN users ON users.id = user_id WHERE key_hash = ?
        """,
        sha256(key),
    )


def delete_key(db, user_id, key_id):
    """Delete an API key. Returns False if the user has no such key."""
    return db.changes("DELETE FROM api_keys WHERE id = ? AND user_id = ?", key_id, user_id)


def set_keys_used(db, key_ids):
    """Note that the API keys with the given ids were used today."""
    db.run(
        """
        UPDATE api_keys SET last_used_on = ?
        WHERE id IN (SELECT value FROM json_each(?))
        """,
        iso(now())[:10],
        key_ids,
    )


def add_blacklisted_token(db, jti, expires_at):
    """End a refresh token before it expires."""
    db.insert("blacklisted_tokens", "REPLACE", jti=jti, expires_at=expires_at)


def is_blacklisted(db, jti):
    return db.one("SELECT 1 FROM blacklisted_tokens WHERE jti = ?", jti) is not None


def sha256(text):
    return hashlib.sha256(text.encode()).digest()


def add_link_token(db, user_id, token, expires_at):
    """Store the hash of a link token. The user's earlier link token ends."""
    token_hash = sha256(token)
    db.insert(
        "link_tokens", "REPLACE", user_id=user_id, token_hash=token_hash, expires_at=expires_at
    )


def find_link_token_user(db, token):
    """Return a link token's user, or None if the token is unknown, used, replaced or expired."""
    return db.one(
        f"""
        SELECT {USER} FROM link_tokens JOIN users ON users.id = user_id
        WHERE token_hash = ? AND expires_at > ?
        """,
        sha256(token),
        now(),
    )


def spend_link_token(db, token):
    """End a link token. Returns whether the token was still valid."""
    spent = db.one(
        "DELETE FROM link_tokens WHERE token_hash = ? RETURNING expires_at", sha256(token)
    )
    return spent is not None and spent["expires_at"] > now()


def find_offset(db, bot_id):
    """Return the id of the update that the bot asks for next, or None if not known."""
    bot = db.one("SELECT next_update_id FROM bots WHERE id = ?", bot_id)
    return bot and bot["next_update_id"]


def set_offset(db, bot_id, next_update_id):
    """Store the id of the next update to ask for: all earlier updates have been received."""
    db.insert("bots", "REPLACE", id=bot_id, next_update_id=next_update_id)


def set_chat(db, chat, user_id, token):
    """Link a chat and a user. Earlier links of the chat or of the user end."""
    bot_id, chat_id = chat
    db.insert(
        "chats",
        "REPLACE",
        bot_id=bot_id,
        chat_id=chat_id,
        user_id=user_id,
        linked_at=iso(now()),
        token_hash=sha256(token),
    )


def delete_chat(db, chat):
    """Delete the link between a chat and its user."""
    db.run("DELETE FROM chats WHERE bot_id = ? AND chat_id = ?", *chat)


def find_chat(db, user_id):
    """Return (bot id, chat id) of the chat linked to the user, or None."""
    return db.one("SELECT bot_id, chat_id FROM chats WHERE user_id = ?", user_id)


def count_elsewhere(db, bot_id):
    """Return how many accounts are linked to a chat of another bot."""
    return db.one("SELECT count(*) FROM chats WHERE bot_id <> ?", bot_id)[0]


def find_chat_user(db, chat):
    """Return the user that a chat is linked to, with the link token's token_hash, or None."""
    return db.one(
        f"""
        SELECT {USER}, token_hash FROM chats JOIN users ON users.id = user_id
        WHERE bot_id = ? AND chat_id = ?
        """,
        *chat,
    )


def add_heard(db, chat, message_id, text):
    """Remember that a Telegram message was heard. Returns False if the message is known already."""
    bot_id, chat_id = chat
    heard = db.insert(
        "heard",
        "INSERT OR IGNORE",
        bot_id=bot_id,
        chat_id=chat_id,
        message_id=message_id,
        heard_at=now(),
        text_hash=sha256(text) if text else None,
    )
    return heard.rowcount == 1


def set_edited(db, chat, message_id, text):
    """Note that the text of a heard message was edited.

    Returns True only for the first edit that changes the text of a message in `heard`.
    """
    return db.changes(
        """
        UPDATE heard SET text_hash = NULL
        WHERE bot_id = ? AND chat_id = ? AND message_id = ? AND text_hash <> ?
        """,
        *chat,
        message_id,
        sha256(text) if text else None,
    )


def add_message(db, **columns):
    """Store a message, created now unless `columns` have a created_at. Returns the message's id."""
    return db.insert("messages", **{"created_at": iso(now()), **columns}).lastrowid


# Selects the id of each message, and its JSON for clients (UTF-8).
SELECT_MESSAGE = """
    SELECT m.id AS id, CAST(json_object(
        'id', m.id, 'sender', s.username, 'recipient', r.username, 'text', m.text,
        'created_at', m.created_at, 'source', m.source, 'delivery', m.delivery,
        'failure', m.failure, 'send_at', m.send_at, 'reply_to', m.reply_to,
        'choices', json(m.choices)) AS BLOB)
    FROM messages AS m
    JOIN users AS s ON s.id = m.sender_id JOIN users AS r ON r.id = m.recipient_id
    """


def of_scheduled(sql):
    """Rewrite a query on `messages` for the table `scheduled`. Returns the SQL."""
    return sql.replace("messages", "scheduled").replace("queued", "scheduled")


FIND_MESSAGE = f"""
    {SELECT_MESSAGE} WHERE m.id = :id AND :user IN (m.sender_id, m.recipient_id)
    UNION ALL {of_scheduled(SELECT_MESSAGE)} WHERE m.id = :id AND m.sender_id = :user
    """


def find_message(db, message_id, user_id):
    """Return the JSON of a message that the user sent or received, or None.

    Only the sender of a scheduled message can find the message.
    """
    row = db.one(FIND_MESSAGE, id=message_id, user=user_id)
    return row[1] if row else None


def find_new_id(db, message_id, user_id):
    """Return the new id of a published message, given the id under which the user scheduled it.

    Any other id is returned unchanged.
    """
    row = db.one(
        "SELECT id FROM messages WHERE scheduled_id = ? AND sender_id = ?", message_id, user_id
    )
    return row["id"] if row else message_id


def find_other_user(db, message_id, user_id):
    """Return the other user of a message that the user sent or received, or None."""
    return db.one(
        f"""
        SELECT {USER} FROM messages
        JOIN users ON users.id = CASE sender_id WHEN :user THEN recipient_id ELSE sender_id END
        WHERE messages.id = :id AND :user IN (sender_id, recipient_id)
        """,
        id=message_id,
        user=user_id,
    )


def find_choice(db, user_id, message_id, n):
    """Return the user who asked a question, with the `text` of choice n of the question.

    The `text` is None if there is no choice n. Returns None if the question was not sent to the
    user `user_id`, was cancelled, or was answered with one of the choices.
    """
    return db.one(
        f"""
        SELECT {USER}, json_extract(choices, '$[' || ? || ']') AS text
        FROM messages JOIN users ON users.id = sender_id
        WHERE messages.id = ? AND recipient_id = ? AND NOT was_chosen AND delivery <> 'cancelled'
        """,
        n,
        message_id,
        user_id,
    )


class Listing(NamedTuple):
    """SELECT statements for a list of rows with ids between :after and :before, both excluded."""

    ids: str
    rows: str  # selects (id, JSON in UTF-8), in order of id


USERS = Listing(
    "SELECT id FROM users WHERE id > :after AND id < :before",
    """
    SELECT id, CAST(json_object('id', id, 'username', username) AS BLOB)
    FROM users WHERE id > :after AND id < :before ORDER BY id
    """,
)


def own_messages(*parts):
    """Return the Listing of the user's messages that meet any of some conditions.

    Each part is (index, condition). No message may meet two conditions, or the message is listed
    twice. Each index yields its part in order of id, so SQLite merges the parts without sorting.
    The index is named, since newer versions of SQLite would choose another index and read all
    messages of a user.
    """
    ids, rows = (
        " UNION ALL ".join(
            select.replace("messages AS m", f"messages AS m INDEXED BY messages_by_{index}")
            + f" WHERE {condition} AND m.id > :after AND m.id < :before"
            for index, condition in parts
        )
        for select in ("SELECT m.id AS id FROM messages AS m", SELECT_MESSAGE)
    )
    return Listing(ids, f"{rows} ORDER BY id")


SENT = "m.sender_id = :user"
RECEIVED = "m.recipient_id = :user AND m.recipient_id <> m.sender_id"
OF_DELIVERY = "AND m.delivery = :delivery"
OWN_MESSAGES = own_messages(("sender", SENT), ("recipient", RECEIVED))
OWN_MESSAGES_BY_DELIVERY = own_messages(
    ("sender_delivery", f"{SENT} {OF_DELIVERY}"),
    ("recipient_delivery", f"{RECEIVED} {OF_DELIVERY}"),
)
OTHER = "(SELECT id FROM users WHERE username = :with)"
# A message to oneself counts as sent, not as received, or the message would be listed twice.
SENT_TO = f"{SENT} AND m.recipient_id = {OTHER}"
RECEIVED_FROM = f"m.recipient_id = :user AND m.sender_id = nullif({OTHER}, :user)"
CONVERSATION = own_messages(("pair", SENT_TO), ("pair", RECEIVED_FROM))
CONVERSATION_BY_DELIVERY = own_messages(
    ("pair_delivery", f"{SENT_TO} {OF_DELIVERY}"),
    ("pair_delivery", f"{RECEIVED_FROM} {OF_DELIVERY}"),
)
# The index holds all columns of the conditions, so SQLite reads only the messages that match.
OWN_ANSWERS = own_messages(
    (
        "answered",
        f"""
        m.reply_to = :reply_to AND :user IN (m.sender_id, m.recipient_id)
        AND m.delivery = coalesce(:delivery, m.delivery)
        AND (:with IS NULL OR {OTHER} =
            CASE :user WHEN m.sender_id THEN m.recipient_id ELSE m.sender_id END)
        """,
    )
)
OWN_SCHEDULED = Listing(
    *map(
        of_scheduled,
        own_messages(
            (
                "sender",
                f"""
                {SENT} AND coalesce(:reply_to, 0) IN (m.reply_to, 0)
                AND (:with IS NULL OR m.recipient_id = {OTHER})
                """,
            )
        ),
    )
)


def erase_some(db, user):
    """Delete some messages of a user, or the user once no message is left.

    Returns False once the user is deleted. Other users' idempotency keys are deleted too if the
    stored answer names the user as recipient.
    """
    some = f"DELETE FROM messages WHERE id IN ({OWN_MESSAGES.ids} LIMIT :most)"
    if db.run(some, user=user["id"], after=0, before=MAX_ID, most=PORTION_ROWS).rowcount:
        return True
    named = f'"recipient":"{user["username"]}"'.encode()
    db.run("DELETE FROM idempotency_keys WHERE instr(answer, ?)", named)
    db.run("DELETE FROM users WHERE id = ?", user["id"])
    return False


def find_page_end(db, listing, page, order):
    """Return [(id of a page's last row,), (id of the next row,)]; the next row may be missing.

    The page is :limit rows from the listing's start ("ASC"), or backwards from its end ("DESC").
    Returns an empty list if there are fewer than :limit rows.
    """
    end = f"ORDER BY id {order} LIMIT 2 OFFSET :limit - 1"
    return db.execute(f"{listing.ids} {end}", page).fetchall()


def find_last_id(db, listing):
    """Return the highest id ever given to a row of the listing's table, or 0."""
    table = "users" if listing is USERS else "messages"
    return db.one("SELECT max(seq) FROM sqlite_sequence WHERE name = ?", table)[0] or 0


def list_rows(db, listing, page):
    """Return a cursor that reads the listing's rows lazily."""
    rows = db.cursor()
    # With tuples in place of sqlite3.Row, a list of 100 rows is a tenth faster.
    rows.row_factory = None
    return rows.execute(listing.rows, page)


HAS_QUEUED = """
    SELECT 1 FROM (
        SELECT min(id) AS first FROM messages
        WHERE sender_id = :sender AND recipient_id = :recipient AND delivery = 'queued')
    CROSS JOIN messages
    WHERE sender_id = :sender AND recipient_id = :recipient AND delivery = 'queued'
        -- They are counted only if as many ids have been given since the first of them.
        AND first + :last <= (SELECT max(id) FROM messages)
    LIMIT 1 OFFSET :last
    """


def has_waiting(db, sender_id, recipient_id, most, is_scheduled):
    """Return whether at least `most` messages from sender to recipient are queued.

    With `is_scheduled`, scheduled messages count instead of queued ones.
    """
    sql = of_scheduled(HAS_QUEUED) if is_scheduled else HAS_QUEUED
    last = db.one(sql, sender=sender_id, recipient=recipient_id, last=most - 1)
    return last is not None


def cancel_message(db, message_id):
    """Cancel a queued message and delete its deliveries.

    Returns False if the message is not queued, or if the recipient's copy was sent, even in part.
    """
    is_cancelled = db.changes(
        """
        UPDATE messages SET delivery = 'cancelled'
        WHERE id = :id AND delivery = 'queued' AND EXISTS (
            SELECT 1 FROM outbox WHERE message_id = :id AND NOT is_own_copy AND is_first)
        """,
        id=message_id,
    )
    if is_cancelled:
        db.run("DELETE FROM outbox WHERE message_id = ?", message_id)
    return is_cancelled


def add_scheduled(db, send_at, **columns):
    """Store a scheduled message. Returns the id.

    The id comes from the sequence of `messages`, so that no message ever has the same id.
    """
    (message_id,) = db.one(
        "UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'messages' RETURNING seq"
    )
    at = {"created_at": iso(now()), "send_at": iso(send_at)}
    db.insert("scheduled", id=message_id, **at, **columns)
    return message_id


def list_due_scheduled(db):
    """Return the ids of up to PUBLISH_ROWS scheduled messages that are due, the earliest first."""
    return db.list(
        "SELECT id FROM scheduled WHERE send_at <= ? ORDER BY send_at, id LIMIT ?",
        iso(now()),
        PUBLISH_ROWS,
    )


def set_send_at(db, message_id, send_at):
    """Change the time at which a scheduled message is published."""
    db.run("UPDATE scheduled SET send_at = ? WHERE id = ?", iso(send_at), message_id)


def delete_scheduled(db, message_id):
    """Delete a scheduled message. Returns its columns.

    Returns None if the message has already been published or cancelled.
    """
    return db.one(
        """
        DELETE FROM scheduled WHERE id = ? RETURNING
            id AS scheduled_id, sender_id, recipient_id, text, send_at, silent, reply_to, choices
        """,
        message_id,
    )


def delete_all_scheduled(db, sender_id):
    """Delete all scheduled messages of a sender."""
    db.run("DELETE FROM scheduled WHERE sender_id = ?", sender_id)


# Rows to delete when they are old: {table: (key columns, condition for an old row)}.
FORGET = {
    "blacklisted_tokens": ("jti", "expires_at < :now"),
    "link_tokens": ("user_id", "expires_at < :now"),
    "api_keys": ("id", "expires_at < :now_iso"),
    "heard": ("bot_id, chat_id, message_id", "heard_at < :heard_before"),
    "idempotency_keys": ("user_id, key", "used_at < :used_before"),
    # Only the first :most messages without a delivery in the outbox: ids are given in order of
    # time, so the messages with higher ids are not older.
    "messages": (
        "id",
        """
        created_at < :kept_from AND id IN (
            SELECT id FROM messages
            WHERE NOT EXISTS (SELECT 1 FROM outbox WHERE message_id = messages.id)
            ORDER BY id LIMIT :most)
        """,
    ),
}


def forget_some(db):
    """Delete up to PORTION_ROWS old rows of each table. Returns False if there were none."""
    values = {
        "now": now(),
        "now_iso": iso(now()),
        "heard_before": now() - HEARD_SECONDS,
        "used_before": now() - IDEMPOTENCY_SECONDS,
        "kept_from": iso(now() - settings.keep_days * 86_400) if settings.keep_days else "",
        "most": PORTION_ROWS,
    }
    found = 0
    for table, (key, old) in FORGET.items():
        some = f"SELECT {key} FROM {table} WHERE {old} LIMIT :most"
        found += db.run(f"DELETE FROM {table} WHERE ({key}) IN ({some})", **values).rowcount
    return found > 0


def add_idempotency_key(db, user_id, key, request_hash, answer):
    """Store the answer to a request with an Idempotency-Key, for retries of the request."""
    db.insert(
        "idempotency_keys",
        "REPLACE",
        user_id=user_id,
        key=key,
        request_hash=request_hash,
        answer=answer,
        used_at=now(),
    )


def find_idempotency_key(db, user_id, key):
    """Return (request hash, answer) of the user's earlier request with this key, or None.

    A key is valid for IDEMPOTENCY_SECONDS.
    """
    return db.one(
        """
        SELECT request_hash, answer FROM idempotency_keys
        WHERE user_id = ? AND key = ? AND used_at >= ?
        """,
        user_id,
        key,
        now() - IDEMPOTENCY_SECONDS,
    )


def add_delivery(db, chat, **columns):
    """Queue one Telegram message for a chat."""
    bot_id, chat_id = chat
    db.insert("outbox", bot_id=bot_id, chat_id=chat_id, queued_at=now(), **columns)
    db.queued_for.add((bot_id, chat_id))


def list_queue(db, chat):
    """Return the ids of the deliveries that are queued for a chat, in order."""
    return db.list("SELECT id FROM outbox WHERE bot_id = ? AND chat_id = ? ORDER BY id", *chat)


def portions(ids):
    """Yield the ids in lists of at most PORTION_ROWS.

    SQLite keeps in memory all rows that one statement changes.
    """
    for start in range(0, len(ids), PORTION_ROWS):
        yield ids[start : start + PORTION_ROWS]


def move_queue(db, chat, to_chat):
    """Move the queued deliveries of a chat to another chat."""
    for ids in portions(list_queue(db, chat)):
        db.run(
            """
            UPDATE outbox SET bot_id = ?, chat_id = ?
            WHERE id IN (SELECT value FROM json_each(?))
            """,
            *to_chat,
            ids,
        )
    db.queued_for.add(to_chat)


def list_queues(db, bot_id):
    """Return (chat id, Again) for each chat with queued deliveries.

    The clock may have been set back, so no chat waits longer than the pause after its last attempt.
    """
    # With max(), SQLite takes due_at, pause and error from the row of the maximum: the delivery
    # that was tried last.
    queues = db.run(
        """
        SELECT chat_id, max(due_at - pause), max(0, min(due_at - :now, pause)),
            CASE WHEN due_at <= :now THEN 'early'
                WHEN error LIKE '429 %' THEN 'told' ELSE 'failed' END
        FROM outbox WHERE bot_id = :bot GROUP BY chat_id
        """,
        now=now(),
        bot=bot_id,
    )
    return [(chat_id, Again(seconds, why)) for chat_id, _, seconds, why in queues]


def list_queued_chats(db, bot_id):
    """Return the ids of the chats with queued deliveries."""
    return db.list("SELECT DISTINCT chat_id FROM outbox WHERE bot_id = ?", bot_id)


def find_head(db, bot_id, chat_id):
    """Return the first delivery in a chat's queue, or None.

    The row also has is_linked, true if the chat is linked to a user; choices, the JSON array of
    buttons below the text; and replied_id, the id of the Telegram message to reply to.
    """
    return db.one(
        """
        SELECT outbox.*,
            EXISTS (SELECT 1 FROM chats WHERE chats.bot_id = outbox.bot_id
                AND chats.chat_id = outbox.chat_id) AS is_linked,
            (SELECT choices FROM messages
                WHERE id = message_id AND is_last AND NOT is_own_copy) AS choices,
            (SELECT min(telegram_message_id) FROM relayed JOIN messages AS m
                ON relayed.message_id = m.reply_to
                WHERE m.id = outbox.message_id AND relayed.bot_id = outbox.bot_id
                AND relayed.chat_id = outbox.chat_id AND is_first) AS replied_id
        FROM outbox WHERE bot_id = ? AND chat_id = ? ORDER BY id LIMIT 1
        """,
        bot_id,
        chat_id,
    )


def count_waiting(db, bot_id):
    """Return (number of the bot's queued deliveries, queued_at of the oldest or None).

    The time is in seconds since 1970.
    """
    return db.one("SELECT count(*), min(queued_at) FROM outbox WHERE bot_id = ?", bot_id)


# If an earlier part was given up, the message has failed already. Sending the last part does not
# change that: only a queued message becomes sent.
SETTLE_SENT = (
    "DELETE FROM outbox WHERE id = :id",
    """
    UPDATE messages SET delivery = 'sent'
    WHERE id = :message_id AND delivery = 'queued' AND :is_last AND NOT :is_own_copy
    """,
)
ADD_RELAYED = """
    INSERT OR REPLACE INTO relayed (bot_id, chat_id, telegram_message_id, message_id)
    SELECT :bot_id, :chat_id, :telegram_message_id, id FROM messages
    WHERE id = :message_id AND :telegram_message_id IS NOT NULL
    """


def settle_sent(db, delivery, telegram_message_id):
    """Delete a delivery that was sent, and mark the message as sent after its last part.

    Remember which message the Telegram message shows, so that a reply finds the message.
    """
    values = {**delivery, "telegram_message_id": telegram_message_id}
    for statement in (*SETTLE_SENT, ADD_RELAYED):
        db.execute(statement, values)


def add_relayed(db, **columns):
    """Store which message was made from a user's Telegram message.

    Does nothing if the telegram_message_id is None.
    """
    db.run(ADD_RELAYED, **columns)


def settle_later(db, delivery, pause, error, is_missing):
    """Note a failed attempt of a delivery, to be retried after a pause in seconds.

    `is_missing` is true if Telegram answered that there is no such chat.
    """
    db.run(
        """
        UPDATE outbox SET attempts = attempts + 1, pause = :pause, due_at = :now + :pause,
            error = :error, failing_since = coalesce(failing_since, :now),
            missing_since = CASE WHEN :is_missing THEN coalesce(missing_since, :now) END
        WHERE id = :id
        """,
        id=delivery["id"],
        now=now(),
        pause=pause,
        error=error,
        is_missing=is_missing,
    )


def delete_deliveries(db, ids):
    """Delete deliveries without sending them.

    Returns (message id, whether it was the sender's own copy, description for the log) of each.
    """
    return db.run(
        """
        DELETE FROM outbox WHERE id IN (SELECT value FROM json_each(?))
        RETURNING message_id, is_own_copy, coalesce((
            SELECT printf('message %d from user %d to user %d', id, sender_id, recipient_id)
            FROM messages WHERE id = message_id), 'an answer of the bot')
        """,
        ids,
    ).fetchall()


def fail_messages(db, message_ids, reason):
    """Mark messages as failed, because their recipients' copies were given up.

    Returns (sender id, recipient id) of each message that had not failed before.
    """
    return db.run(
        """
        UPDATE messages SET delivery = 'failed', failure = ?
        WHERE id IN (SELECT value FROM json_each(?)) AND delivery <> 'failed'
        RETURNING sender_id, recipient_id
        """,
        reason,
        message_ids,
    ).fetchall()


def find_relayed(db, chat, telegram_message_id):
    """Return (message_id,) of the message that a Telegram message shows, or None."""
    return db.one(
        """
        SELECT message_id FROM relayed
        WHERE bot_id = ? AND chat_id = ? AND telegram_message_id = ?
        """,
        *chat,
        telegram_message_id,
    )


# --- Passwords and tokens -------------------------------------------------------------------------


def new_salt():
    return base64.b64encode(secrets.token_bytes(16)).decode()


def hash_with(salt, password, n, r, p):
    """Return scrypt's parameters, the salt and the hash, in the format of users.password."""
    salt_bytes = base64.b64decode(salt)
    digest = hashlib.scrypt(
        password.encode(), salt=salt_bytes, n=n, r=r, p=p, maxmem=256 * n * r, dklen=32
    )
    return f"scrypt${n}${r}${p}${salt}${base64.b64encode(digest).decode()}"


def hash_password(password):
    return hash_with(new_salt(), compose(password), **SCRYPT)


def compose(password):
    """Return the canonical form of a password, whatever the keyboard (RFC 8265, section 4.2)."""
    return normalize("NFC", password, MAX_PASSWORD)


def nobodys_hash():
    """Return a hash that no password matches, for unknown users and disabled accounts.

    Comparing takes as long as with a real user's hash, so response times reveal no usernames.
    """
    return f"scrypt${SCRYPT['n']}${SCRYPT['r']}${SCRYPT['p']}${new_salt()}$"


def password_matches(password, password_hash):
    _, n, r, p, salt, _ = password_hash.split("$")
    hashed = hash_with(salt, compose(password), int(n), int(r), int(p))
    return secrets.compare_digest(hashed, password_hash)


# Ids of API keys used today, until run_upkeep() stores the date.
used_keys = set()


class TokenError(Exception):
    """Signal an invalid JWT or API key. The exception's text is for the client."""


@lru_cache(TOKENS_REMEMBERED)
def hash_of_hash(password_hash):
    """Return the value of the JWT claim "hash_password".

    The value changes with the password. Tokens with an older value are refused.
    """
    return sha256(password_hash)[:16].hex()


def issue_token(kind, user):
    """Return a new JWT with simplejwt's claims. `kind` is "access" or "refresh"."""
    issued_at = int(now())
    lifetime = ACCESS_TOKEN_SECONDS if kind == "access" else REFRESH_TOKEN_SECONDS
    claims = {
        "token_type": kind,
        "exp": issued_at + lifetime,
        "iat": issued_at,
        "jti": secrets.token_hex(16),
        "user_id": str(user["id"]),
        "hash_password": hash_of_hash(user["password"]),
    }
    return jwt.encode(claims, settings.key, algorithm="HS256")


@lru_cache(TOKENS_REMEMBERED)
def verify_signature(token, key):
    """Return the claims of a JWT after checking the signature and the time of issue.

    Expiry is not checked, since results are cached. Raises TokenError if the time of issue is in
    the future, and the errors of PyJWT and int() if the token is malformed.
    """
    options = {"verify_aud": False, "verify_exp": False, "verify_iat": False}
    claims = jwt.decode(token, key, algorithms=["HS256"], options=options)
    if "iat" in claims and int(claims["iat"]) > now() + 1:
        raise TokenError("Token is invalid")
    return claims


def read_token(token, kind):
    """Return the claims of a valid JWT of this kind (None: any kind).

    Raises TokenError. The sentences and the order of the checks are simplejwt's.
    """
    try:
        claims = verify_signature(token, settings.key)
        # fromtimestamp() raises an error for absurd times, or such a token would be valid for ever.
        if "exp" in claims and datetime.fromtimestamp(int(claims["exp"]), UTC).timestamp() <= now():
            raise TokenError("Token is expired")
    except (
        jwt.InvalidTokenError,
        ValueError,
        TypeError,
        OverflowError,
        OSError,
        RecursionError,
    ):
        raise TokenError("Token is invalid") from None
    if kind != "access" and is_blacklisted(connection(), claims.get("jti")):
        raise TokenError("Token is blacklisted")
    if "exp" not in claims:
        raise TokenError("Token has no 'exp' claim")
    if "jti" not in claims:
        raise TokenError("Token has no id")
    if kind and "token_type" not in claims:
        raise TokenError("Token has no type")
    if kind and claims["token_type"] != kind:
        raise TokenError("Token has wrong type")
    return claims


class Limiter:
    """Limit tries by key: a burst, then one try per interval (GCRA, as in ATM networks).

    At most LIMITER_KEYS keys are remembered: the least recently used keys are forgotten first.
    """

    def __init__(self):
        self.spent_until = OrderedDict()  # key: ticks() at which a full burst is allowed again
        self.lock = threading.Lock()

    def try_once(self, limits):
        """Count a try for every key and return 0, or count none and return the seconds to wait.

        `limits` is {key: (tries in a burst, seconds per further try)}.
        """
        with self.lock:
            at, spent, wait = ticks(), {}, 0
            for key, (most, seconds) in limits.items():
                spent[key] = max(0, self.spent_until.get(key, 0) - at) + seconds
                wait = max(wait, spent[key] - most * seconds)
            # Without round(), a tiny floating-point error would make ceil() add a second.
            if wait := math.ceil(round(wait, 3)):
                return wait
            for key, seconds in spent.items():
                self.spent_until[key] = at + seconds
                self.spent_until.move_to_end(key)
            while len(self.spent_until) > LIMITER_KEYS:
                self.spent_until.popitem(last=False)
        return 0

    def forgive(self, of_name, of_address):
        """Forget all tries of the name and one try of the address, after a successful login."""
        with self.lock:
            self.spent_until.pop(of_name, None)
            if of_address in self.spent_until:
                self.spent_until[of_address] -= LOGIN_FAILURES_PER_ADDRESS[1]


login_limiter, registration_limiter = Limiter(), Limiter()
message_limiter, said_limiter = Limiter(), Limiter()


# --- Outbox ---------------------------------------------------------------------------------------
# In this order: queue messages, send one delivery, serve one chat, run the threads, do the upkeep.


def queue_text(db, chat, text, username="", **columns):
    """Queue a text for a chat, split into as many Telegram messages as needed.

    `chat` is (bot id, chat id), or None if no chat is linked: nothing is queued then. `username` is
    the author's name, shown above later parts. `columns` are other columns of the outbox.
    """
    parts = split_text(text, username) if chat else ()
    for n, part in enumerate(parts, 1):
        ends = {"is_first": n == 1, "is_last": n == len(parts)}
        add_delivery(db, chat, text=part, **ends, **columns)


def relay(db, sender, recipient, text, source, silent=False, **columns):
    """Store a message and queue its copies, for the recipient's chat and for the sender's chat.

    `columns` are other columns of the message. Returns (message id, delivery).
    """
    chat = find_chat(db, recipient["id"])
    delivery = "queued" if chat else "unlinked"
    message_id = add_message(
        db,
        sender_id=sender["id"],
        recipient_id=recipient["id"],
        text=text,
        source=source,
        delivery=delivery,
        **columns,
    )

    if sender["id"] == recipient["id"]:
        copies = [(chat, OWN_COPY, False)]
    else:
        copies = [(chat, FROM_ANOTHER, False), (find_chat(db, sender["id"]), OWN_COPY_FOR, True)]
    names = {"username": sender["username"], "recipient": recipient["username"]}
    for chat, words, is_own_copy in copies:
        about = {"message_id": message_id, "silent": silent, "is_own_copy": is_own_copy}
        queue_text(db, chat, words.format(text=text, **names), names["username"], **about)
    return message_id, delivery


def publish(db, message_id):
    """Post a scheduled message as if sent now. Does nothing if the message was cancelled."""
    if row := delete_scheduled(db, message_id):
        message = dict(row)
        users = [find_user(db, message.pop(key)) for key in ("sender_id", "recipient_id")]
        relay(db, *users, source="api", **message)


def publish_due():
    """Publish some scheduled messages that are due. Returns False if none is due.

    A message that cannot be published is rescheduled, so that other messages are not held up.
    Raises sqlite3.Error if the database itself fails.
    """
    if not (due := list_due_scheduled(connection())):
        return False
    with transaction() as db:
        for message_id in due:
            try:
                with transaction():
                    publish(db, message_id)
            except Exception as error:
                if is_outage(error):
                    raise
                log.error(f"message {message_id} is scheduled again", exc_info=without_text(error))
                set_send_at(db, message_id, now() + PUBLISH_AGAIN_SECONDS)
    return True


def without_text(error):
    """Return exc_info for the log without the exception's text: the text may quote a message."""
    return type(error), None, error.__traceback__


def wait_to_send(db, sender, recipients, text, is_scheduled=False):
    """Count one message to each recipient. Returns 0, or the seconds to wait if none was counted.

    The sender has to wait if rate-limited, or if too many messages to a recipient are waiting.
    """
    limits = {}
    for to in recipients:
        ids, most = (sender["id"], to["id"]), MAX_QUEUED
        if sender["id"] != to["id"]:
            limits[ids] = MESSAGES_TO_ANOTHER
        elif len(text) <= SHORT_TEXT and not is_scheduled:
            most = MAX_QUEUED_TO_ONESELF
        if has_waiting(db, *ids, most, is_scheduled):
            return QUEUE_FULL_SECONDS
    return message_limiter.try_once(limits)


def link_chat(db, chat, user_id, token):
    """Link a chat to a user. The queue of the user's earlier chat moves to the new chat.

    The earlier chat is told if the same bot serves both chats.
    """
    earlier_chat = find_chat(db, user_id)
    if earlier_chat and tuple(earlier_chat) != chat:
        move_queue(db, earlier_chat, chat)
        if earlier_chat["bot_id"] == chat[0]:
            queue_text(db, earlier_chat, LINKED_ELSEWHERE.format(**find_user(db, user_id)))
    set_chat(db, chat, user_id, token)


def unlink_chat(db, chat, reason):
    """Unlink a chat from its user, and give up the deliveries queued for the chat."""
    delete_chat(db, chat)
    give_up(db, reason, list_queue(db, chat))


def give_up(db, reason, ids):
    """Delete unsent deliveries. `reason` goes to the log and into messages.failure.

    A message that loses the recipient's copy is marked as failed, and the sender is told.
    """
    rows = [row for some in portions(ids) for row in delete_deliveries(db, some)]
    if rows:
        named = ", ".join(dict.fromkeys(what for _, _, what in rows[:10]))
        log.warning(f"{len(rows)} deliveries given up ({reason}): {named}")
    message_ids = [message_id for message_id, is_own_copy, _ in rows if not is_own_copy]
    undelivered = Counter(
        row for some in portions(message_ids) for row in fail_messages(db, some, reason)
    )
    for (sender_id, recipient_id), count in undelivered.items():
        sentence = NOT_DELIVERED.format(count=count, **find_user(db, recipient_id))
        queue_text(db, find_chat(db, sender_id), sentence)


class NotSent(Exception):
    """Signal a delivery that failed or may have failed: (reason, what_follows, retry_after).

    `what_follows` is "later" to retry; "missing" to retry too, but to unlink the chat once
    Telegram has not found the chat for ten minutes; "never" to give up, since Telegram
    refuses the text; "gone" to unlink the chat, since nothing can be sent there any more.
    `retry_after` is Telegram's pause before a retry, in seconds; None means our own back-off.
    """


class Home:
    """Carry messages between the bot and people: the base class of the transports.

    A transport has an `id`, the bot's id. send(delivery) returns Telegram's id of the sent message,
    or None if there is no such id, or raises NotSent. run(stop) receives messages until `stop` is
    set.
    """

    name = None  # "@username" (None until Telegram is first reached) or "terminal"
    error = None  # the current problem, in words for the operator, without secrets
    answered = None  # ticks() at the last successful call of run() to Telegram

    def is_well(self):
        """Return whether messages can be sent, as far as the transport knows."""
        return True


def backoff(attempts, longest):
    """Return seconds of back-off: 2 ** attempts, at most `longest`, times a jitter of 0.5 to 1."""
    return min(longest, 2.0 ** min(attempts, 20)) * random.uniform(0.5, 1)


def settle(change, *args):
    """Call change(db, *args) in a transaction, and retry each second while the database fails.

    The change records a past event: a sent delivery or a typed line. After giving up, the delivery
    would be sent twice or the line would be lost. Returns the result of `change`.
    """
    while True:
        try:
            with transaction() as db:
                return change(db, *args)
        except sqlite3.Error:
            log.exception("what has happened could not be stored; trying again")
            time.sleep(1)


def deliver(home, delivery):
    """Send one delivery and store the outcome.

    Returns None if the delivery was sent or refused for good, else Again: the chat's next turn.
    """
    try:
        telegram_message_id = home.send(delivery)
    except NotSent as error:
        return handle_failure(home, delivery, *error.args)
    except Exception as error:
        log.exception(f"delivery {delivery['id']} failed")
        return handle_failure(home, delivery, type(error).__name__)
    settle(settle_sent, delivery, telegram_message_id)
    return None


def handle_failure(home, delivery, reason, what_follows="later", retry_after=None):
    """Handle a failed attempt: schedule a retry, give up the delivery, or unlink the chat.

    Unless Telegram refuses for good ("never", "gone"), give up only if the chat is still missing
    after ten minutes, or if the delivery keeps failing while other deliveries are sent.

    Returns None after such a refusal, else Again: the chat's next turn.
    """
    missing_since, failing_since = delivery["missing_since"], delivery["failing_since"]
    is_missing = what_follows == "missing"
    was_missing = missing_since and now() - missing_since >= MISSING_SECONDS
    # Failures before back_at, the end of Telegram's last outage, do not count.
    is_old = failing_since and max(failing_since, turns.back_at) <= now() - FAILING_SECONDS
    # The previous attempt of this delivery was at due_at - pause.
    others_pass = turns.passed_at >= delivery["due_at"] - delivery["pause"]
    is_hopeless = is_old and others_pass and delivery["attempts"] + 1 >= FAILURES_BEFORE_GIVING_UP
    if what_follows == "gone" or (is_missing and was_missing):
        log.warning(f"chat {delivery['chat_id']} is gone: unlinked")
        settle(unlink_chat, (home.id, delivery["chat_id"]), reason)
    elif what_follows == "never" or is_hopeless:
        settle(give_up, reason, [delivery["id"]])
    else:
        again = Again(backoff(delivery["attempts"], BACKOFF_MAX_SECONDS), "failed")
        if retry_after is not None:
            again = Again(retry_after, "told")
        failure = f"delivery {delivery['id']} to chat {delivery['chat_id']} failed ({reason})"
        log.warning(f"{failure}: again in {again.seconds:.1f} s")
        settle(settle_later, delivery, again.seconds, reason, is_missing)
        return again
    return None if what_follows in ("gone", "never") else Again(0, "failed")


def deliver_head(home, chat_id):
    """Send the first delivery of a chat's queue.

    Returns Again for the chat's next turn, or None if the queue is empty.
    """
    # cancel() needs write_lock until its commit, so it cannot cancel `head` before the claim.
    with write_lock:
        if not (head := find_head(connection(), home.id, chat_id)):
            return None
        if not turns.claim(chat_id, head):
            return Again(0.5, "failed")
    if again := deliver(home, head):
        return again
    return Again(0, "early") if find_head(connection(), home.id, chat_id) else None


def deliver_to(home, chat_id):
    """Send the first delivery of a chat after turns.take(), and give the turn back."""
    try:
        again = deliver_head(home, chat_id)
    except Exception:
        log.exception(f"a delivery to chat {chat_id} failed")
        again = Again(1, "failed")
    turns.give_back(chat_id, again)


def run_sender(home, chats):
    """Deliver to each chat id from the queue `chats`, until None comes."""
    for chat_id in iter(chats.get, None):
        deliver_to(home, chat_id)


def run_outbox(home, stop):
    """Take turns and hand each to a sender thread, until `stop` is set.

    Senders are started only when needed, since each opens connections of its own.
    """
    chats, senders = queue.SimpleQueue(), 0
    while not stop.is_set():
        chat_id = turns.take(wait_seconds=1)
        if chat_id is not None:
            chats.put(chat_id)
        try:
            if senders < len(turns.busy):
                start_thread("sender", run_sender, home, chats)
                senders += 1
        except BadSetting as error:
            log.warning(f"{senders} threads send, no more: {error}")
            if not senders:
                deliver_to(home, chats.get())
    for _ in range(senders):
        chats.put(None)


def wake_all(home):
    """Wake each chat with queued deliveries: another process may have queued some.

    A chat in a pause keeps the pause.
    """
    for chat_id in list_queued_chats(connection(), home.id):
        turns.wake(home.id, chat_id)


def note_used_keys():
    """Set last_used_on to today for the API keys in used_keys, and remove the ids from the set."""
    if key_ids := list(used_keys):
        with transaction() as db:
            set_keys_used(db, key_ids)
        used_keys.difference_update(key_ids)


def run_upkeep(home, stop):
    """Wake chats, publish due messages and store used keys, until `stop` is set.

    Old rows are deleted every hour, in portions.
    """
    forget_at = 0
    while not stop.is_set():
        is_more = False
        try:
            wake_all(home)
            is_more = publish_due()
            note_used_keys()
            if ticks() >= forget_at:
                with transaction() as db:
                    is_more = forget_some(db) or is_more
                if not is_more:
                    forget_at = ticks() + FORGET_SECONDS
        except Exception:
            log.exception("upkeep failed; trying again")
        stop.wait(PORTION_PAUSE_SECONDS if is_more else UPKEEP_SECONDS)


def announce(line):
    """Print a line for the operator, or log the line if standard output is closed."""
    try:
        print(line, flush=True)
    except OSError:
        log.info(line)


# --- Bot ------------------------------------------------------------------------------------------
# The conversation with a user, then the bot's two transports: Telegram and the terminal.

# A command such as "/start@bot TOKEN". The groups are the name and the argument.
COMMAND = re.compile(r"/([A-Za-z0-9_]{1,32})(?:@\w+)?(?:\s+(.*))?", re.DOTALL)
# A link token has 43 characters, as secrets.token_urlsafe(32) returns them. LINK_TOKEN matches
# only whole words. SHOWN_TOKEN also matches inside a longer word, at each position.
LINK_TOKEN = re.compile("(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")
SHOWN_TOKEN = re.compile("(?=([A-Za-z0-9_-]{43}))")
SHOWN_TOKENS = 100  # matches of SHOWN_TOKEN that are looked up in one text
# Fields that mark a message as written by Telegram itself: telebot's list, and some not in it.
SERVICE = {
    *telebot.util.content_type_service,
    *"connected_website gift passport_data successful_payment unique_gift web_app_data".split(),
}
# Fields of a rich message that hold words, in reading order (Bot API, RichBlock and RichText).
RICH_FIELDS = (
    "label summary text expression alternative_text blocks items cells buttons button caption "
    "credit"
).split()


def pick(source, name, *kinds):
    """Return a field of Telegram's JSON, or None if missing, of another type or too large.

    `kinds` are the allowed types. Integers have to fit into SQLite (MAX_ID). Only fields in use
    are ever read, so that fields added to the Bot API later change nothing.
    """
    value = source.get(name) if isinstance(source, dict) else None
    if type(value) not in kinds or (int in kinds and not abs(value) <= MAX_ID):
        return None
    return clean(value) if str in kinds else value


def clean(text):
    """Return a text that SQLite and JSON accept: without NUL and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


HEARD = (
    "chat text shown number kind place update_id message_id written_at is_wordless is_forwarded "
    "replied_id replies_to_bot query_id data thread_id"
)


class Heard(namedtuple("Heard", HEARD, defaults=[None] * 15)):
    """Describe an event in a chat with the bot. The conversation knows nothing else of the event.

    read_update() makes a Heard from each update, the terminal from each typed line. A field is
    None where it does not apply, `chat` is always set.

    chat            (bot id, chat id); the chat id is None if an update has no chat
    text            the text as a person wrote it
    shown           the text or caption, with the addresses of the links
    number          the id of the message that a line in the terminal answers
    kind            the type of update, one of Telegram.allowed_updates
    place           the type of the chat, such as "private"
    update_id       Telegram's id of the update
    message_id      Telegram's id of the message
    written_at      when the message was written, in seconds since 1970
    is_wordless     true if a person sent something other than text
    is_forwarded    true if the message was forwarded
    replied_id      Telegram's id of the replied message
    replies_to_bot  true if the bot wrote the replied message
    query_id        the id of a pressed button's callback query
    data            the callback data of a pressed button
    thread_id       the topic of a forum group
    """


def read_rich(part, separator=""):
    """Return the words in a part of a rich message. `separator` joins the elements of a list."""
    if isinstance(part, list):
        # The elements are dictionaries (blocks), lists (a table's rows) or strings (plain text).
        return separator.join(read_rich(element, separator and " ") for element in part)
    if not isinstance(part, dict):
        return part if isinstance(part, str) else ""
    words = [read_rich(part.get(name), "\n" * name.endswith("s")) for name in RICH_FIELDS]
    text = (" " if "label" in part else "\n").join(filter(None, words))
    return text + show_link(pick(part, "url", str), text)


def read_text(message):
    """Return a message's text, or None. Newer clients send lists and tables as `rich_message`."""
    text = pick(message, "text", str)
    if text is None:
        text = clean(read_rich(pick(message, "rich_message", dict))) or None
    return text


def read_update(bot_id, update):
    """Return an update as a Heard. Malformed fields count as missing; unknown ones are ignored."""
    kind = next((kind for kind in Telegram.allowed_updates if pick(update, kind, dict)), None)
    event = pick(update, kind, dict) or {}
    # For a pressed button, `event` is the callback query, and holds the message with the button.
    message = pick(event, "message", dict) or event
    of_message = partial(pick, message)
    chat, replied = of_message("chat", dict), of_message("reply_to_message", dict)
    sender, update_id = pick(event, "from", dict), pick(update, "update_id", int)
    is_bot, date = pick(sender, "is_bot", bool), of_message("date", int)
    text = read_text(message)
    entities = of_message("entities", list) or of_message("caption_entities", list) or ()
    # The message_thread_id of a reply is a topic's only if the reply has "is_topic_message".
    is_topic = not replied or of_message("is_topic_message", bool)
    return Heard(
        chat=(bot_id, pick(chat, "id", int)),
        # Ignore another bot's text, or the two bots would answer each other for ever.
        text=None if is_bot else text,
        shown=show_links(text or of_message("caption", str) or "", entities),
        kind=kind,
        place=pick(chat, "type", str),
        update_id=update_id,
        # A message without an id gets the negated update id, which equals no real message id.
        message_id=of_message("message_id", int) or -(update_id or 0),
        written_at=date if date and date > 0 else None,
        is_wordless=sender and not is_bot and text is None and SERVICE.isdisjoint(message),
        is_forwarded=of_message("forward_origin", dict) or of_message("forward_date", int),
        replied_id=pick(replied, "message_id", int),
        replies_to_bot=pick(pick(replied, "from", dict), "id", int) == bot_id,
        query_id=pick(event, "id", str),
        data=pick(event, "data", str),
        thread_id=of_message("message_thread_id", int) if is_topic else None,
    )


def converse(db, heard):
    """Process a text from a private chat. Returns the bot's answer, or None.

    A forwarded text is a quotation, never a command or a token.
    """
    chat, text = heard.chat, heard.text.strip()
    user = find_chat_user(db, chat)
    if answer := use_token(db, heard, user):
        return answer
    command = None if heard.is_forwarded else COMMAND.fullmatch(text)
    name, argument = command.groups("") if command else ("", "")
    name = name.lower()
    if user and user["token_hash"] == sha256(argument or text) and not heard.is_forwarded:
        return LINKED_TO.format(**user)
    if name == "help":
        return HELP + (ANSWER_BY_NUMBER if chat[0] == Terminal.id else "")
    if name == "start" and not argument:
        return LINKED_TO.format(**user) if user else GREETING
    if not user:
        return NOT_LINKED
    if name == "start":
        return WRONG_TOKEN
    if name == "stop" and not argument:
        unlink_chat(db, chat, "the chat was unlinked with /stop")
        return UNLINKED.format(**user)
    if name:
        return UNKNOWN_COMMAND
    return note(db, heard, user)


def find_tokens(heard):
    """Return everything in a text that looks like a link token, whole words first."""
    return LINK_TOKEN.findall(heard.shown) + SHOWN_TOKEN.findall(heard.shown)[:SHOWN_TOKENS]


def use_token(db, heard, user):
    """Link the chat if a live link token is in the text. Returns the bot's answer, or None.

    `user` is the user that the chat is linked to, or None.
    """
    for token in find_tokens(heard):
        if not (owner := find_link_token_user(db, token)):
            continue
        if heard.is_forwarded:
            return None if user else FORWARDED_TOKEN
        if user and owner["id"] != user["id"]:
            return STOP_FIRST.format(**user)
        spend_link_token(db, token)
        link_chat(db, heard.chat, owner["id"], token)
        return LINKED.format(**owner)
    return None


def note(db, heard, user):
    """Store a text from a linked chat as its user's message. Returns the bot's answer, or None."""
    if len(heard.shown) > MAX_TEXT:
        return TOO_LONG
    if not heard.shown.strip():
        return None
    recipient, reply_to = find_addressee(db, heard, user)
    if not recipient:
        return UNKNOWN_REPLY if heard.number is None else NO_SUCH_NUMBER
    if wait := wait_to_send(db, user, [recipient], heard.shown):
        return TOO_FAST.format(seconds=wait, **recipient)
    created_at = iso(min(now(), heard.written_at or math.inf))
    message_id, delivery = relay(
        db, user, recipient, heard.shown, "telegram", reply_to=reply_to, created_at=created_at
    )
    bot_id, chat_id = heard.chat
    add_relayed(
        db,
        bot_id=bot_id,
        chat_id=chat_id,
        telegram_message_id=heard.message_id,
        message_id=message_id,
    )
    if delivery == "unlinked":
        return NO_CHAT.format(**recipient)
    return None


def show_links(text, entities):
    """Return the text with the address of each link in brackets after the link's words.

    An address that the text already shows is left out. Offsets count UTF-16 code units (Bot API,
    MessageEntity).
    """
    units = text.encode("utf-16-le")
    links = []
    for entity in entities:
        url, offset = pick(entity, "url", str), pick(entity, "offset", int)
        length = pick(entity, "length", int)
        if offset is None or not length or not 0 <= offset < offset + length:
            continue
        end, link = 2 * (offset + length), show_link(url, text)
        if end <= len(units) and link:
            links.append((end, link))
    for end, link in sorted(links, reverse=True):
        before = units[:end].decode("utf-16-le", "ignore")
        text = before + link + text[len(before) :]
    return text


def show_link(url, text):
    """Return a link's address in brackets, or "" if there is none or the text already shows it."""
    return f" ({url})" if url and url.split("://", 1)[-1].strip("/") not in text else ""


def find_addressee(db, heard, user):
    """Return (recipient of a text, id of the answered message or None).

    The recipient is None if the text answers a message unknown to the user. A text that is no
    answer goes to the user.
    """
    if heard.number is not None:
        return find_other_user(db, heard.number, user["id"]), heard.number
    if relayed := find_relayed(db, heard.chat, heard.replied_id):
        # Finds no user if another account had the chat when the bot sent the message.
        return find_other_user(db, relayed["message_id"], user["id"]), relayed["message_id"]
    # A reply to a message that the bot has forgotten gets no recipient: the name shown in that
    # message may belong to somebody else by now.
    return (None if heard.replies_to_bot else user), None


def press(db, heard):
    """Store a pressed button as the user's answer to a question, only once.

    Returns the text to show the user, or None if the answer was stored.
    """
    user = find_chat_user(db, heard.chat)
    numbers = re.fullmatch("([0-9]{1,18}):([0-9])", heard.data or "")
    choice = user and numbers and find_choice(db, user["id"], *numbers.groups())
    if not choice or not choice["text"]:
        return TOO_LATE
    if wait := wait_to_send(db, user, [choice], choice["text"]):
        return TOO_FAST.format(seconds=wait, **choice)
    message_id = int(numbers[1])
    relay(db, user, choice, choice["text"], "telegram", reply_to=message_id)
    return None


def hear(db, heard):
    """Process a text from a private chat, and queue the bot's answer."""
    if answer := converse(db, heard):
        queue_text(db, heard.chat, answer)


def receive(heard):
    """Process an update and store the next offset, in one transaction.

    Returns the text to show the user after a pressed button, or None.
    """
    with transaction() as db:
        set_offset(db, heard.chat[0], heard.update_id + 1)
        if heard.kind == "callback_query":
            return press(db, heard)
        if heard.chat[1] is None:
            return None
        if heard.place != "private":
            overhear(db, heard)
        elif heard.kind == "message":
            hear_once(db, heard)
        elif set_edited(db, heard.chat, heard.message_id, heard.text):
            queue_text(db, heard.chat, EDITED)
    return None


def hear_once(db, heard):
    """Handle a message from a private chat, unless the message was already handled."""
    chat, text = heard.chat, heard.text
    if text is None and not heard.is_wordless:
        return
    if not add_heard(db, chat, heard.message_id, text):
        return
    if text is not None:
        hear(db, heard)
    elif not said_limiter.try_once({chat: TEXT_ONLY_ANSWERS}):
        queue_text(db, chat, TEXT_ONLY)


def overhear(db, heard):
    """Handle a message in a group or channel: revoke link tokens, since others can see them.

    In a group, the bot answers in the same topic: whenever a token was revoked, and once a month
    that only private chats can be linked. In a channel the bot says nothing.
    """
    seen = [token for token in find_tokens(heard) if spend_link_token(db, token)]
    is_said = heard.kind == "message" and (heard.text or heard.is_wordless)
    if heard.place not in ("group", "supergroup") or not (seen or is_said):
        return
    is_first = not said_limiter.try_once({heard.chat: GROUP_ANSWERS})
    if seen or is_first:
        answer = TOKEN_SEEN if seen else PRIVATE_ONLY
        queue_text(db, heard.chat, answer, thread_id=heard.thread_id)


def receive_or_skip(bot_id, update):
    """Receive an update, or skip the update if receiving fails.

    Returns (Heard, the text to show the user after a pressed button or None). Raises sqlite3.Error
    if the database fails: then the update is not skipped.
    """
    heard = Heard((bot_id, None), update_id=pick(update, "update_id", int))
    try:
        heard = read_update(bot_id, update)
        return heard, receive(heard)
    except Exception as error:
        if is_outage(error):
            raise
        log.error(f"update {heard.update_id} is skipped", exc_info=without_text(error))
    if heard.update_id is not None:
        with transaction() as db:
            set_offset(db, bot_id, heard.update_id + 1)
    return heard, TOO_LATE


class TelegramError(Exception):
    """Report a failed call to the Bot API. The text has no secrets.

    `code` is Telegram's error_code, or None without a sensible answer. `retry_after` is how many
    seconds Telegram told us to wait, or None.
    """

    def __init__(self, code, description, retry_after=None):
        super().__init__(f"{code} {description}" if code else description)
        self.code, self.retry_after = code, retry_after


WHAT_MENDS = {
    "InvalidSchema": ": a SOCKS proxy needs PySocks",
    "OSError": ": is REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE a file?",
    "ProxyError": ": is HTTPS_PROXY right?",
    "SSLError": ": is the certificate right, or REQUESTS_CA_BUNDLE?",
}


def name_failure(error):
    """Return why a call failed, without the exception's text: the text may quote the URL."""
    kind = type(error).__name__
    while cause := error.__cause__ or error.__context__:
        error = cause
    reason = getattr(error, "strerror", None) or type(error).__name__
    return f"{reason}, {kind}{WHAT_MENDS.get(kind, '')}"


# Matches Telegram's description of a 400 if the cause is the text, an entity or a button.
TEXT_IS_REFUSED = re.compile(
    "text (is|must)|message.(is.)?(empty|too.long)|utf-8|entit|button|keyboard|markup", re.I
)
create_connection = urllib3.util.connection.create_connection


class Telegram(Home):
    """Connect the bot to Telegram: receive by long polling, send by sendMessage.

    A process can have only one instance, because telebot's settings are global.
    """

    greeting = "bot: on Telegram, not reached yet"
    allowed_updates = (
        "message edited_message channel_post edited_channel_post callback_query".split()
    )

    def __init__(self, token, api_url):
        bot_id, _, self.secret = token.partition(":")
        self.id, self.token = int(bot_id), token
        self.refusal = None  # Telegram's error_code while Telegram refuses the bot
        self.started = ticks()
        self.failures = 0  # failed calls in a row, counted by run()
        # True after OUTAGE_FAILURES failed calls in a row, or one before Telegram's first answer.
        self.is_away = False
        # -1: no webhook found. 0: a webhook was deleted. Otherwise: until when, in ticks(), the
        # health route reports that another program sets webhooks.
        self.webhook_until = -1
        self.presses = threading.Semaphore(PRESSES_AT_ONCE)
        # Remove an ending such as "/bot<token>/getMe", copied by the operator with the address.
        api_url = re.sub(r"((?<![:/])/+bot(\d+:.*|[<{$].*)?)?/*$", "", api_url)
        apihelper.API_URL = api_url + "/bot{0}/{1}"
        apihelper.CUSTOM_REQUEST_SENDER = self.request
        apihelper.READ_TIMEOUT = SEND_TIMEOUT_SECONDS
        urllib3.util.connection.create_connection = self.connect

    def is_well(self):
        """Return whether Telegram accepts the bot and was silent for at most SILENT_SECONDS."""
        silent = ticks() - (self.answered or self.started)
        return not self.refusal and silent <= SILENT_SECONDS

    @staticmethod
    def connect(*args, **kwargs):
        """Connect as urllib3 does. Once IPv6 has timed out where IPv4 works, use only IPv4.

        Otherwise each new connection would first wait for the timeout of IPv6.
        """
        began_at = time.monotonic()
        sock = create_connection(*args, **kwargs)
        if time.monotonic() - began_at >= CONNECT_SECONDS:
            urllib3.util.connection.HAS_IPV6 = sock.family == socket.AF_INET6
        return sock

    def request(self, method, url, params, files, timeout, proxies):
        """Send a request for telebot. Returns the response. Raises TelegramError.

        Texts go into the body, since servers refuse very long URLs. Errors never quote the URL,
        since the URL holds the bot's token.
        """
        arguments = {"data": params} if method == "post" else {"params": params}
        session, failure = apihelper._get_req_session(), None
        try:
            timeout = CONNECT_SECONDS, timeout[1]
            answer = session.request(method, url, timeout=timeout, proxies=proxies, **arguments)
        except Exception as error:
            failure = name_failure(error)
        if failure:
            urllib3.util.connection.HAS_IPV6 = socket.has_ipv6
            # Drop the connection, since it may be broken. Raise only here: inside `except`, the
            # error's __context__ would keep the URL, and so the token.
            apihelper._get_req_session(reset=True)
            host = urllib.parse.urlsplit(url).hostname
            raise TelegramError(None, f"Telegram cannot be reached at {host}: {failure}")
        self.check(answer)
        return answer

    def check(self, response):
        """Raise TelegramError if a call failed or the answer makes no sense."""
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if pick(answer, "ok", bool) and response.status_code == 200 and "result" in answer:
            return
        description = pick(answer, "description", str)
        if description is None:
            description = f"Telegram answered {response.status_code}, which makes no sense"
        # The description may quote the token, or only the secret half: hide the secret half.
        description = description.replace(self.secret, "…")
        parameters = pick(answer, "parameters", dict)
        # "retry_after" may be a string, or missing and only mentioned in the description.
        said = f"retry after {pick(parameters, 'retry_after', str)} {description}"
        told = re.search(r"retry after (\d{1,9})\b", said, re.I)
        wait = pick(parameters, "retry_after", int, float) or int(told[1] if told else 0)
        raise TelegramError(
            pick(answer, "error_code", int), description, wait if wait > 0 else None
        )

    def send(self, delivery):
        """Send a delivery as plain text, without parse_mode.

        Returns Telegram's id of the message, or None if the answer holds no valid id. Raises
        NotSent.
        """
        reply = keyboard = None
        if delivery["replied_id"]:
            reply = telebot.types.ReplyParameters(
                delivery["replied_id"], allow_sending_without_reply=True
            )
        if delivery["choices"]:
            choices = enumerate(json.loads(delivery["choices"]))
            data = f"{delivery['message_id']}:"
            buttons = [[{"text": text, "callback_data": data + str(n)}] for n, text in choices]
            keyboard = json.dumps({"inline_keyboard": buttons})
        try:
            sent = apihelper.send_message(
                self.token,
                delivery["chat_id"],
                delivery["text"],
                timeout=SEND_TIMEOUT_SECONDS,
                disable_notification=bool(delivery["silent"]),
                message_thread_id=delivery["thread_id"],
                link_preview_options=telebot.types.LinkPreviewOptions(is_disabled=True),
                reply_parameters=reply,
                reply_markup=keyboard,
            )
        except TelegramError as error:
            what_follows = "gone" if error.code == 403 else "later"
            if error.code == 400 and "chat not found" in str(error).lower():
                what_follows = "missing"
            elif error.code == 400 and TEXT_IS_REFUSED.search(str(error)):
                what_follows = "never"
            raise NotSent(str(error), what_follows, error.retry_after) from None
        return pick(sent, "message_id", int)

    def introduce(self):
        """Get the bot's name, for the operator and for t.me links, and set the bot's menu.

        Raises TelegramError if the name cannot be had.
        """
        username = pick(apihelper.get_me(self.token), "username", str)
        if not username:
            raise TelegramError(None, "Telegram's answer makes no sense (the bot has no name)")
        self.name = f"@{username}"
        announce(f"bot: {self.name} on Telegram")
        try:
            commands = [telebot.types.BotCommand(*command) for command in COMMANDS.items()]
            apihelper.set_my_commands(self.token, commands)
        except TelegramError as error:
            log.info(f"Telegram's menu does not show the commands: {error}")

    def poll(self):
        """Fetch one batch of updates and receive each. Returns False if the caller has to pause.

        The long poll lasts LONG_POLL_SECONDS, but after a failure only 1 s, to notice soon that
        Telegram is back. A pause is needed after an answer that came at once and brought nothing
        new: polling on would hammer the server.
        """
        started_at = time.monotonic()
        offset = find_offset(connection(), self.id)
        updates = apihelper.get_updates(
            self.token,
            offset=offset,
            timeout=LONG_POLL_SECONDS + 5,
            long_polling_timeout=1 if self.failures else LONG_POLL_SECONDS,
            allowed_updates=self.allowed_updates,
        )
        if not isinstance(updates, list):
            raise TelegramError(None, "Telegram's answer makes no sense (updates are no list)")
        for update in updates:
            heard, said = receive_or_skip(self.id, update)
            if heard.query_id and self.presses.acquire(blocking=False):
                try:
                    start_thread("press", self.answer_press, heard, said)
                except BadSetting as error:
                    self.presses.release()
                    log.warning(f"a pressed button is not answered: {error}")
        is_new = find_offset(connection(), self.id) != offset
        return is_new or time.monotonic() - started_at > 1

    def answer_press(self, heard, said):
        """Answer a pressed button with the text `said`. If `said` is None, also remove the buttons.

        Runs in a thread of its own, because a call may hang.
        """
        calls = [(apihelper.answer_callback_query, heard.query_id, said)]
        if said is None:
            calls.append((apihelper.edit_message_reply_markup, heard.chat[1], heard.message_id))
        try:
            for call, *arguments in calls:
                try:
                    call(self.token, *arguments)
                except TelegramError as error:
                    log.info(f"a pressed button was not answered: {error}")
        finally:
            self.presses.release()

    def note_failure(self, error):
        """Explain a failed poll to the operator. Returns a call that mends the failure, or None."""
        if error.code == 409 and "webhook" in str(error).lower():
            log.warning("this bot has a webhook, which keeps it from polling: deleting it")
            if self.webhook_until >= 0:
                self.refusal, self.webhook_until = 409, ticks() + WEBHOOK_SECONDS
                self.error = "another program sets a webhook for this bot: end it"
            self.webhook_until = max(self.webhook_until, 0)
            return partial(apihelper.delete_webhook, self.token)
        self.refusal = error.code if error.code in (401, 404, 409) else None
        self.error = f"polling failed: {error}"
        if error.code == 409:
            self.error = f"another process polls this bot: end it, or use another bot ({error})"
        elif self.refusal:
            self.error = (
                f"Telegram refuses TELEGRAM_BOT_TOKEN ({error}): get the right one from @BotFather "
                "and start again"
            )
        if self.refusal or self.is_away:
            log.log(logging.ERROR if self.refusal else logging.WARNING, self.error)
        return None

    def run(self, stop):
        """Poll until `stop` is set. After an outage, retry failed deliveries at once."""
        step = self.introduce
        while not stop.is_set():
            pause = 0
            try:
                if step() is False:
                    pause = 1
                if self.is_away:
                    log.warning("Telegram answers again")
                    turns.hurry()
                if self.refusal != 409 or not (self.failures or ticks() < self.webhook_until):
                    # While another process polls, every second call succeeds: only a second
                    # success in a row clears a 409.
                    self.error = self.refusal = None
                step, self.failures, self.answered = self.poll, 0, ticks()
                self.is_away = False
            except Exception as error:
                self.failures += 1
                self.is_away = self.failures >= OUTAGE_FAILURES or not self.answered
                pause = backoff(self.failures, POLL_BACKOFF_MAX_SECONDS)
                if isinstance(error, TelegramError):
                    step = self.note_failure(error) or step
                    if error.retry_after is not None:
                        pause = max(error.retry_after, 1)
                else:
                    self.error = f"polling failed: {type(error).__name__}, see the log"
                    log.exception("polling round failed")
            stop.wait(min(pause, threading.TIMEOUT_MAX))


class Terminal(Home):
    """Connect the bot to the terminal, if there is no Telegram token.

    A typed line counts as a message from a Telegram user. The bot's messages are printed.
    """

    id, name = 0, "terminal"
    greeting = (
        "bot: this terminal; type what you would write to it in Telegram, /start to begin with"
    )

    def send(self, delivery):
        """Print a delivery. Control characters are replaced: some could manipulate the terminal.

        Raises NotSent if printing fails.
        """
        text = delivery["text"]
        if delivery["message_id"]:
            # Show the id: a typed line that begins with "#17 " answers message 17.
            text = f"#{delivery['message_id']}\n{text}"
        for choice in json.loads(delivery["choices"] or "[]"):
            text += f"\n[{choice}]"
        visible = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
        try:
            print(f"{visible}\n", flush=True)
        except OSError as error:
            raise NotSent(f"the terminal is gone: {error.strerror}") from None

    def run(self, stop):
        """Read typed lines until standard input ends or `stop` is set.

        Without standard input, the bot still prints messages but receives none.
        """
        stdin = sys.stdin and sys.stdin.buffer
        while not stop.is_set():
            line = None
            try:
                line = stdin and stdin.readline()
            except OSError:
                if stdin.isatty():
                    # A shell's background job cannot read, but may come to the foreground again.
                    stop.wait(1)
                    continue
            if not line:
                log.warning(
                    "nobody can write to the bot: standard input has ended. For a bot on Telegram "
                    "set TELEGRAM_BOT_TOKEN"
                )
                return
            self.hear(line.decode("utf-8", "replace").rstrip("\r\n"))

    def hear(self, text):
        """Handle one typed line."""
        numbered = re.fullmatch("#0*([0-9]+) +(.*)", text)
        # Cut a number that is too large for SQLite: 18 digits are more than any real id has.
        number = int(numbered[1][:18]) if numbered else None
        text = clean(numbered[2] if numbered else text)
        if text.strip():
            settle(hear, Heard((self.id, 0), text, text, number))


class running:
    """Hold the transport in use. main() sets `home`, and so do tests."""

    home = Terminal()


# --- Page -----------------------------------------------------------------------------------------
# GET / answers with one self-contained document, a chat that uses the API. The
# Content-Security-Policy allows the style and the script of the document, and no others.
#
# The variables of the script, in the order of declaration:
# - session: {id, username, refresh, access} of the signed-in user, or {}. Ends with the tab.
# - drafts: {address: {text, send_at, reply_to, key}}, the unsent message of each conversation. An
#   address is the page's own, such as "#with=bob". The key is the message's Idempotency-Key, kept
#   until the message is sent or changed: if the answer is lost and the user sends again, the server
#   stores the message only once.
# - read: {address: id of the last message that was read}. read.start is the newest id when the user
#   first came, and stands for conversations without an entry. Kept in localStorage until log-out.
# - known: the messages that make the list of conversations, the latest last.
# - open, other: the address of the open conversation, and the name of the other user, or "" if no
#   conversation is open.
# - etag: the ETag of the last list of news, undefined if more news may follow at once. With an
#   ETag, the next request is a long poll.
# - waiting: the AbortController that ends the long poll, or a pause between two requests.
#
# watch() calls listNews() in a loop while a user is signed in. listNews() waits for news, then
# updates the list of conversations by showPeople() and the open conversation by refresh().
# refresh() adds new messages, and draw() redraws each message that has changed. After a 304,
# listNews() pauses, because a server with too many waiting requests answers at once. A hidden tab
# without permission for notifications asks only once a minute: browsers allow six connections to a
# server, and each long poll takes one.
#
# press() calls the function in DO that has the name of the clicked button, one at a time, and shows
# the message of an error thrown by the function.

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>FactoryApp</title>
<meta name="viewport" content="width=device-width, interactive-widget=resizes-content">
<link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; --quiet: light-dark(#525e67, #a5b1ba);
    --edge: light-dark(#7d8993, #74818b); --accent: light-dark(#0a665c, #68cdbd);
    --mine: light-dark(#dff0ec, #17362f); --bad: light-dark(#b3261e, #ff9389); }
* { box-sizing: border-box; margin: 0; min-width: 0; max-width: 100%; }
body { background: Canvas; font: 1rem/1.4 system-ui, sans-serif; overflow-wrap: anywhere; }
.in main { display: grid; grid: auto minmax(15rem, 1fr) / 20rem 1fr; height: 100dvh; }
section { display: flex; flex-direction: column; gap: .5rem; padding: .5rem .75rem; }
section + section { border-inline-start: 1px solid var(--mine); }
h1 { font-size: 1.1rem; flex: 1; } ul, ol { padding: 0; list-style: none; }
form { display: grid; gap: .6rem; } #sign-in { width: 25rem; margin: 1rem auto; }
#scheduled { max-height: 20dvh; overflow: auto; } #notices { grid-column: 1 / -1; }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .6rem; }
label > input { display: block; width: 100%; } .small { font-size: .875rem; color: var(--quiet); }
input, textarea, button, code, .bubble { padding: .35rem .65rem; border-radius: .6rem;
    border: 1px solid var(--edge); background: none; font: inherit; }
a, button, summary { color: var(--accent); cursor: pointer; } :disabled { color: var(--quiet); }
li button, mark { padding: .1rem .5rem; border-radius: .6rem; } mark { justify-self: end; }
.main, [aria-pressed=true] { background: var(--accent); color: Canvas; }
details[open] { flex: 1 0 100%; } summary ~ * { margin-top: .5rem; } #later[open] { order: -1; }
nav, #stream { flex: 1 1 5rem; min-height: 5rem; overflow: hidden auto; }
nav a { display: grid; grid-template-columns: 1fr auto; gap: 0 .5rem; padding: .5rem;
    color: inherit; text-decoration: none; border-radius: .6rem; }
nav a:hover, [aria-current], .mine .bubble { background: var(--mine); }
.quote { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; flex: 1; }
#stream { display: flex; flex-direction: column-reverse; }  /* it stays at its end */
.bubble { position: relative; width: fit-content; max-width: 88%; margin: .15rem 0;
    border-color: var(--mine); } .mine .bubble { margin-inline-start: auto; }
#whom { flex-basis: 60%; } .text { white-space: pre-wrap; unicode-bidi: plaintext; }
li:not(:hover, :focus-within) :is([name=reply], .queued + *) { opacity: 0; pointer-events: none; }
form:has(input:not(:placeholder-shown)) + nav ul:empty::after { content: "Nobody has that name"; }
textarea { flex: 1 1 8rem; max-height: 30dvh; resize: none; field-sizing: content; }
output, .who { position: absolute; clip-path: inset(50%); }
.error, .failed { color: var(--bad); } @media (width >= 45rem) { #back { display: none; } }
@media (width < 45rem) { .in main { grid-template-columns: 1fr; }
    .talking #people, body:not(.talking) #talk { display: none; } }
[hidden], p:empty:not([role]), .unlinked, body:not(.in) .in, .in .out, .closed .when-open,
#people:not(.none, .elsewhere) #linking, .none [name=unlink], .open .when-closed, .talking #none,
body:not(.talking) #talk > :not(#none) { display: none !important; }
</style><main><div id="notices"><noscript>This page needs JavaScript. The API does not.</noscript>
    <p id="trouble" class="error" role="status"></p> <output id="news"></output>
    <p id="complaint" class="error" role="alert"></p></div>
<form id="sign-in" class="out" autocapitalize="none"><h1>FactoryApp</h1>
    <p>A Telegram bot repeats your messages in the chat that you link to your account.</p>
    <label>Username <input name="username" autocomplete="username" autofocus></label>
    <label>Password <input name="password" type="password" autocomplete="current-password"></label>
    <p class="small when-closed">New here? Ask whoever runs this server for an account.</p>
    <p class="small when-open">New here? Choose a name and a password of at least 8 characters.</p>
    <p class="row"><button name="log_in" class="main">Log in</button>
        <button name="register" class="when-open">Register</button>
        <button name="reveal" type="button">Show password</button></p></form>
<section id="people" class="in">
    <header class="row"><h1>FactoryApp</h1> <details><summary id="me"></summary> <p class="row">
        <button name="unlink">Unlink the chat</button> <button name="log_out">Log out</button>
        <button id="notify" name="notify">Notify me here</button></p> <form id="passwords">
        <label>Current password <input name="current_password" type="password"
            autocomplete="current-password"></label>
        <label>New password <input name="new_password" type="password"
            autocomplete="new-password"></label>
        <p class="row"><button name="change_password">Change password</button> <button
            name="reveal" type="button">Show passwords</button></p></form></details></header>
    <div id="linking" class="small"><button name="link">Link a Telegram chat</button> and the bot
        brings you there what others write. <p id="code" class="row" role="status"></p></div>
    <form><input id="search" type="search" placeholder="Find somebody"> <button name="find" hidden>
    </button></form> <nav aria-label="Conversations"><ul id="list"></ul></nav></section>
<section id="talk" class="in" aria-labelledby="whom">
    <p id="none" class="small">Choose a conversation, or find somebody to write to.</p>
    <header class="row"><a id="back" href="#" aria-label="All conversations">←</a>
        <h1 id="whom" class="quote"></h1> <span id="hint" class="small"></span></header>
    <div id="stream" role="region" aria-label="Messages" tabindex="0"><div>
        <button id="earlier" name="earlier">Earlier messages</button>
        <ol id="messages"></ol> <p id="nothing" class="small">No messages yet.</p></div></div>
    <button id="below" name="below" class="main">New messages below</button>
    <ol id="scheduled" aria-label="Scheduled"></ol>
    <form id="compose" autocomplete="off"><p id="answering" class="row"><span class="small quote">
            </span> <button name="forget" type="button">Do not answer it</button></p>
        <div class="row"><textarea name="text" rows="1" placeholder="Message"></textarea>
            <details id="later"><summary>Later</summary>
                <input name="send_at" type="datetime-local" aria-label="Send at"></details>
            <button id="send" name="send" class="main"></button></div></form></section>
</main><script>"use strict";
const WAIT_SECONDS = 50, HIDDEN_SECONDS = 60, RETRY_SECONDS = 2, LISTED = 1000, SHOWN = 100;
const END = Number.MAX_SAFE_INTEGER, isTouch = matchMedia("(pointer: coarse)").matches;
const LINK = /(https?:\/\/\S*[^\s.,:;!?'")\]}>»])/, HOUR = {timeStyle: "short"};
const $ = (id) => document.getElementById(id), {text, send_at} = $("compose").elements;
const write = (at, words) => { if (at.textContent !== words) at.textContent = words; };
const recall = (name, place = sessionStorage) => JSON.parse(place.getItem(name)) || {};
const keep = (name, value, place = sessionStorage) => place.setItem(name, JSON.stringify(value));
const session = recall("session"), drafts = recall(`drafts-${session.id}`);
const marks = `read-${session.id}`, read = {}, known = [];
let names = [], open = "", other = "", etag, waiting = new AbortController();
async function ask(method, path, {body, headers, signal, isLast} = {}) {
    const bearer = session.access && {Authorization: `Bearer ${session.access}`};
    const answer = await fetch(path, {
        method, headers: {...headers, ...bearer, "Content-Type": "application/json"},
        body: JSON.stringify(body), cache: "no-store", signal: signal || AbortSignal.timeout(20000),
    }).catch(() => { throw new Error("The server cannot be reached."); });
    const {status} = answer, isEmpty = [204, 304].includes(status);
    const value = isEmpty ? [] : await answer.json().catch(() => null);
    if (value && (answer.ok || isEmpty)) return {status, value, etag: answer.headers.get("ETag")};
    if (status === 401 && session.access && !isLast) {
        const {value} = await ask("POST", "auth/token/refresh/", {body: session, isLast: true});
        keep("session", Object.assign(session, value));
        return ask(method, path, {body, headers, signal, isLast: true});
    }
    if (status === 401 && session.access)
        beginAnew("Your session has ended. Log in again: what you wrote is kept.");
    const said = value?.detail || [...new Set(Object.values(value || {}).flat())].join(" ")
        || `The server is out of order (status ${status}). Try again later.`;
    throw new Error(said.replace(/^No active .* credentials$/, "Wrong username or password."));
}
const list = (query, how) => ask("GET", `api/messages/?${new URLSearchParams(query)}`, how);
const bodyOf = (form) => ({body: Object.fromEntries(new FormData($(form)))});
function beginAnew(complaint, next = {}) {
    keep("session", {...next, complaint});
    session.access = "";
    location.reload();
}
const isMine = ({sender}) => sender === session.username;
const otherOf = (message) => isMine(message) ? message.recipient : message.sender;
const titleOf = (name) => name === session.username ? "Notes to yourself" : name;
const addressOf = (name) => `#${new URLSearchParams({with: name})}`;
const isAtEnd = () => $("stream").scrollTop > -40;
const timeOf = (moment, date = new Date(moment)) => date.toLocaleString([],
    date.toDateString() === new Date().toDateString() ? HOUR : {dateStyle: "short", ...HOUR});
function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter(Boolean));
    return element;
}
const makeLink = (href, words) => make("a", {href, target: "_blank", rel: "noreferrer"}, words);
function showPeople(messages = []) {
    if (!session.access) return;
    Object.assign(read, recall(marks, localStorage));
    known.push(...messages);
    if (known.length && other && !document.hidden) read[open] = known.at(-1).id;
    keep(marks, read, localStorage);
    const people = new Map([[session.username, {unread: 0}]]);
    for (const last of known) {
        const name = otherOf(last), {unread = 0} = people.get(name) || {};
        const isUnread = !isMine(last) && last.id > (read[addressOf(name)] ?? read.start);
        people.delete(name);
        people.set(name, {last, unread: unread + isUnread});
    }
    const count = [...people.values()].reduce((sum, {unread}) => sum + unread, 0);
    document.title = count ? `(${count}) FactoryApp` : "FactoryApp";
    const part = $("search").value.normalize("NFKC").toLowerCase(), {hash} = document.activeElement;
    const found = names.filter((name) => name.toLowerCase().includes(part));
    const shown = part ? found.sort((a, b) => a.length - b.length).slice(0, 50)
        : [...people.keys()].reverse();
    $("list").replaceChildren(...shown.map((name) => {
        const {last, unread} = people.get(name) || {}, ariaCurrent = name === other || null;
        return make("li", {}, make("a", {href: addressOf(name), ariaCurrent},
            make("b", {className: "quote"}, titleOf(name)),
            make("time", {className: "small"}, last && timeOf(last.created_at)),
            make("span", {className: "small quote"}, last?.text.slice(0, 100)),
            unread && make("mark", {className: "main"}, `${unread} new`)));
    }));
    [...$("list").querySelectorAll("a")].find((link) => link.hash === hash)?.focus();
}
function openConversation() {
    other = new URLSearchParams(location.hash.slice(1)).get("with") || "";
    open = addressOf(other);
    document.body.classList.toggle("talking", other);
    for (const id of ["messages", "scheduled", "hint"]) $(id).replaceChildren();
    for (const id of ["earlier", "below", "nothing"]) $(id).hidden = true;
    write($("whom"), titleOf(other));
    etag = undefined;
    waiting.abort();
    (!other ? $("me") : isTouch ? $("stream") : text).focus();
    changeDraft({send_at: "", ...drafts[open]});
}
function showMessages(messages, add) {
    const added = messages.filter(({id}) => !$(`m${id}`));
    $("messages")[add](...added.map(({id}) => make("li", {id: `m${id}`, tabIndex: -1})));
    for (const message of messages) $(`m${message.id}`).message = message;
    const all = Array.from($("messages").children, ({message}) => message);
    for (const message of all) {
        const {id, text, reply_to, choices, recipient} = message;
        const answer = choices && all.find((later) => later.reply_to === id
            && later.sender === recipient && choices.includes(later.text))?.text;
        const isLatest = all.findLast((last) => isMine(last) && last.text === text) === message;
        draw($(`m${id}`), message, reply_to && quoteOf($(`m${reply_to}`) || {}), answer, isLatest);
    }
    const isReader = all.findLast(isMine)?.delivery === "unlinked";
    write($("hint"), isReader ? `${other} reads here only: no Telegram chat is linked` : "");
    $("nothing").hidden = all.length;
    changeDraft({key: drafts[open].key});
}
function draw(item, message, quote, answer, isLatest) {
    const {text, recipient, delivery, failure} = message, mine = isMine(message);
    const looks = JSON.stringify([message, quote, answer, isLatest]);
    if (item.looks === looks) return item;
    const act = (name, words, properties) => make("button",
        {name, ariaLabel: `${words}: ${text.slice(0, 80)}`, ...properties}, words);
    const part = (className, ...children) => make("p", {className}, ...children);
    if (item.contains(document.activeElement)) item.focus();
    item.replaceChildren(make("div", {className: "bubble"},
        part("who", authorOf(message)), part("small quote", quote),
        part("text", ...text.split(LINK).map((words, i) => i % 2 ? makeLink(words, words) : words)),
        part("row", ...(message.choices || []).map((words) => act("choose", words,
            {ariaPressed: words === answer, disabled: answer || recipient !== session.username}))),
        part("small row", timeOf(message.send_at || message.created_at),
            message.source === "telegram" && "by the bot",
            mine && make("span", {className: delivery},
                failure ? `not delivered: ${failure.replace(/^\d+ [\w ]+: /, "")}` : delivery),
            mine && /queued|scheduled/.test(delivery) && act("cancel", "Cancel"),
            mine && delivery === "failed" && isLatest && act("again", "Send again"),
            !mine && act("reply", "Reply"))));
    return Object.assign(item, {looks, message, className: mine ? "mine" : ""});
}
const authorOf = (message) => isMine(message) ? "You" : message.sender;
const quoteOf = ({message}) => message ? `${authorOf(message)}: ${message.text}` : "Earlier";
function changeDraft(change, at = open) {
    const draft = drafts[at] = {text: "", send_at: "", ...drafts[at], key: "", ...change};
    if (at === open) {
        text.value = draft.text;
        if (send_at.value !== draft.send_at) send_at.value = draft.send_at;
        if ("send_at" in change) $("later").open = draft.send_at || send_at.matches(":focus");
        write($("send"), draft.send_at ? "Schedule" : "Send");
        $("answering").hidden = !draft.reply_to;
        write($("answering").firstElementChild, quoteOf($(`m${draft.reply_to}`) || {}));
    }
    keep(`drafts-${session.id}`, drafts);
}
const post = (body, key) => ask("POST", "api/messages/", {body, headers: {"Idempotency-Key": key}})
    .then(DO.below).then(() => waiting.abort());
const DO = {
    register: () => ask("POST", "api/users/register/", bodyOf("sign-in")).then(DO.log_in),
    async log_in() {
        Object.assign(session, (await ask("POST", "auth/token/", bodyOf("sign-in"))).value);
        beginAnew("", {...session, ...(await ask("GET", "api/users/me/")).value});
    },
    async log_out() {
        const logout = ask("POST", "auth/token/blacklist/", {body: session});
        const {message} = await logout.catch((error) => error);
        for (const storage of [sessionStorage, localStorage]) storage.clear();
        for (const part of document.querySelectorAll("section, output")) part.remove();
        history.replaceState(null, "", location.pathname);
        document.body.className = "out";
        session.access = "";
        $("sign-in").elements.username.focus();
        waiting.abort();
        if (message) throw new Error(`${message} You are logged out in this tab alone.`);
    },
    reveal: (item, {form}) => form.querySelectorAll("[autocomplete$=password]").forEach((field) => {
        field.type = field.type === "text" ? "password" : "text"; }),
    change_password: () => ask("POST", "api/users/set-password/", bodyOf("passwords"))
        .then(() => beginAnew("Your password is changed. Log in with the new one.")),
    find: async () => $("list").querySelector("a")?.click(),
    notify: () => Notification.requestPermission().then(() => $("notify").remove()),
    async link() {
        const {value} = await ask("GET", "api/users/get-telegram-token/"), {bot, link} = value;
        if (!bot) throw new Error("Telegram is not reached yet. Try again.");
        const whom = link ? bot : "the terminal where the server runs";
        $("code").replaceChildren(`Within 10 minutes send this code to ${whom}:`,
            make("code", {tabIndex: 0}, value.telegram_token),
            make("button", {name: "copy"}, "Copy"), link ? makeLink(link, "Open Telegram") : "");
    },
    copy(item, button) {
        getSelection().selectAllChildren($("code").querySelector("code"));
        if (document.execCommand("copy")) write(button, "Copied");
    },
    unlink: async () => confirm("Unlink your chat? What waits for it is given up.")
        && ask("POST", "api/users/unlink-telegram/").then(() => $("code").replaceChildren()),
    earlier: () => refresh($("messages").firstElementChild.message.id),
    below: () => $("stream").scrollTo(0, 0),
    reply: ({message}) => changeDraft({reply_to: message.id}),
    forget: () => changeDraft({reply_to: null}),
    choose: ({message: {id, sender}}, {textContent}) =>
        post({text: textContent, recipient: sender, reply_to: id}, `choice-${id}`),
    again: ({message: {id, text, recipient, reply_to, choices}}) =>
        post({text, recipient, reply_to, choices}, `again-${id}`),
    cancel: ({message}) => ask("DELETE", `api/messages/${message.id}/`).then(() => waiting.abort()),
    async send() {
        const at = open, {text, send_at, reply_to, key: known} = drafts[at];
        if (!text.trim()) throw new Error("Write something first.");
        if (Date.parse(send_at) < Date.now()) throw new Error("Choose a time still to come.");
        const key = known || crypto.getRandomValues(new Uint32Array(4)).join("-");
        const moment = send_at ? new Date(send_at).toISOString() : null;
        changeDraft({key});
        await post({text: text.trimEnd(), recipient: other, reply_to, send_at: moment}, key);
        const now = drafts[at].text, rest = now.startsWith(text) ? now.slice(text.length) : now;
        changeDraft({text: rest.replace(/^\n+/, ""), send_at: "", reply_to: null}, at);
    },
};
async function press(event) {
    const button = event.target.closest("button");
    if (button) event.preventDefault();
    if (!button || document.body.ariaBusy) return;
    document.body.ariaBusy = "true";
    if (/send|reply|forget|cancel/.test(button.name)) text.focus();
    if (/below|earlier/.test(button.name)) $("stream").focus();
    write($("complaint"), "");
    const act = async () => DO[button.name](button.closest("li"), button);
    write($("complaint"), await act().then(() => "", (error) => error.message));
    document.body.ariaBusy = null;
}
const pause = (seconds, signal) => new Promise((resume) => {
    setTimeout(resume, seconds * 1000);
    signal.addEventListener("abort", resume);
});
async function watch() {
    while (session.access) {
        const {signal} = waiting = new AbortController();
        const {message} = await listNews(signal).catch((error) => error) || {};
        if (signal.aborted) continue;
        write($("trouble"), message ? `${message} Trying again.` : "");
        if (message?.includes("database restored")) location.reload();
        if (message) await pause(RETRY_SECONDS, signal);
    }
}
async function listNews(signal) {
    const isSlow = document.hidden && window.Notification?.permission !== "granted";
    const wait = etag && !isSlow && !$("trouble").textContent ? WAIT_SECONDS : 0;
    const range = known.length ? {after: known.at(-1).id} : {before: END};
    const news = await list({...range, limit: LISTED, wait}, {
        headers: etag && {"If-None-Match": etag},
        signal: AbortSignal.any([signal, AbortSignal.timeout((wait + 20) * 1000)]),
    });
    read.start ??= news.value.at(-1)?.id || 0;
    showPeople(news.value);
    if (news.status === 304) return pause(isSlow ? HIDDEN_SECONDS : RETRY_SECONDS, signal);
    if (etag) news.value.filter((message) => !isMine(message)).forEach(announce);
    const {telegram} = (await ask("GET", "api/users/me/")).value;
    $("people").className = `in ${telegram}`;
    if (!document.activeElement.checkVisibility()) $("me").focus();
    if (other) await refresh(END);
    if (!signal.aborted) etag = news.value.length < LISTED ? news.etag : undefined;
}
async function refresh(before) {
    const at = open, {value} = await list({with: other, before, limit: SHOWN});
    const later = await list({with: other, delivery: "scheduled", limit: SHOWN});
    if (at !== open) return;
    const first = value[0]?.id, isReading = $(`m${first}`) && !isAtEnd();
    if (before === END && !isReading)
        [...$("messages").children].forEach((item) => item.message.id < first && item.remove());
    $("below").hidden &&= !isReading || value.every(({id}) => $(`m${id}`));
    if (!isReading) $("earlier").hidden = value.length < SHOWN;
    showMessages(value, before === END ? "append" : "prepend");
    const items = later.value.map((message) => draw(make("li"), message)), box = $("scheduled");
    if (box.textContent !== make("p", {}, ...items).textContent) box.replaceChildren(...items);
}
function announce({sender, text}) {
    $("news").replaceChildren(`${sender}: ${text}`.slice(0, 300));
    if (!document.hidden || window.Notification?.permission !== "granted") return;
    const note = new Notification(sender, {body: text.slice(0, 300), tag: sender});
    note.onclick = () => { window.focus(); location.hash = addressOf(sender); };
}
document.body.className = session.access ? "in" : "out";
write($("complaint"), session.complaint || "");
document.addEventListener("click", press);
if (session.access) {
    write($("me"), session.username);
    $("notify").hidden = isTouch || window.Notification?.permission !== "default";
    openConversation();
    watch();
    window.addEventListener("hashchange", openConversation);
    document.addEventListener("visibilitychange", () => { waiting.abort(); showPeople(); });
    $("stream").addEventListener("scroll", () => { $("below").hidden ||= isAtEnd(); });
    $("list").addEventListener("click", () => { $("search").value = ""; showPeople(); });
    $("search").addEventListener("input", () => showPeople());
    $("search").addEventListener("focus", () => ask("GET", "api/users/").then(({value}) => {
        names = value.map(({username}) => username);
        showPeople();
    }, ({message}) => write($("complaint"), message)));
    $("compose").addEventListener("input", ({target}) => {
        write($("complaint"), "");
        changeDraft({[target.name]: target.value});
    });
    text.addEventListener("keydown", (event) => {
        if (event.key === "Escape" && drafts[open].reply_to) DO.forget();
        if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch) return;
        if (!document.body.ariaBusy) event.preventDefault();
        $("send").click();
    });
}
</script>
"""


def csp_hash(element):
    """Return the Content-Security-Policy source that allows the page's inline style or script.

    `element` is "style" or "script"; the page has one of each. See CSP level 2, hash sources.
    """
    text = re.search(f"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)[1]
    return f"'sha256-{base64.b64encode(sha256(text)).decode()}'"


PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {csp_hash('script')}; style-src {csp_hash('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
}


# --- HTTP -----------------------------------------------------------------------------------------
# The app, its error answers, sign-in, fields, bodies, and lists with their pages.

app = Bottle()
# Remove Bottle's own plugins: serve_declared() turns the results of routes into answers.
app.uninstall(True)
# Without a charset, Windows PowerShell 5.1 and other clients would read Latin-1.
response.default_content_type = "application/json; charset=utf-8"
# Keep bodies in memory: Bottle writes bodies longer than MEMFILE_MAX to temporary files.
type(request).MEMFILE_MAX = MAX_MESSAGE_BODY_BYTES


def coded(detail, code="token_not_valid"):
    """Return the JSON body of a refused token, in simplejwt's format."""
    return {"detail": detail, "code": code}


# Refusals are worded like those of simplejwt and Django REST framework.
NAME_TAKEN = {"username": ["A user with that username already exists."]}
PASSWORD_CHANGED = coded("The user's password has been changed.", "password_changed")
PUBLIC_DETAILS = {
    404: "Not found.",
    413: "The request is too large.",
    500: "Something went wrong here: it is in the server's log. Try again later.",
    503: "This cannot be done right now. Nothing was stored; try again in a few seconds.",
}


def refusal(status, detail, **headers):
    """Return an HTTPError with a JSON body of one sentence: {"detail": …}."""
    return HTTPError(status, {"detail": detail}, **headers)


def refuse_for(wait):
    """Raise HTTPError 429 unless `wait`, the seconds until the client may try again, is 0."""
    if wait:
        detail = f"Request was throttled. Expected available in {wait} seconds."
        raise refusal(429, detail, Retry_After=str(wait))


# Part of every ETag, random at each start. A restored database counts changes from an older number,
# so without STARTED an old ETag could match new content.
STARTED = secrets.token_hex(4)


def log_failure(what):
    """Log the exception that is being handled. Returns the JSON of the 500, with the log's id."""
    failure_id = secrets.token_hex(4)
    log.exception(f"{what} failed: {failure_id}")
    return {"detail": PUBLIC_DETAILS[500], "id": failure_id}


def encode_json(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@app.hook("before_request")
def check_request():
    """Refuse requests that no route should see. Raises HTTPError 400 or 403.

    Add a missing slash at the end of the path: /api/users is served as /api/users/. A redirect,
    as of the server that this one replaces, would lose the body of a POST.
    """
    environ = request.environ
    # Bottle drops bytes that are not UTF-8, so the request could reach the route of another path.
    if environ["PATH_INFO"].encode() != environ["bottle.raw_path"].encode("latin-1"):
        raise refusal(400, "The path is not UTF-8.")
    # A browser lets a page of any other site send a POST, such as a form, without a CORS preflight.
    is_foreign = environ.get("HTTP_SEC_FETCH_SITE") == "cross-site"
    if is_foreign and environ["REQUEST_METHOD"] == "POST":
        raise refusal(403, "Another site sent this: use the page here, or a program.")
    if not environ["PATH_INFO"].endswith("/"):
        environ["PATH_INFO"] += "/"


class Declared:
    """Hold the declarations of a route, for serve_declared() to obey and for OpenAPI to show."""

    pool = None  # name of the worker pool that serves the route; None: the serving thread
    sign_in = staticmethod(lambda: None)  # or require_user, require_login, may_register
    query = {}  # {name: Field}
    body = {}  # {name: Field}
    max_body_bytes = MAX_BODY_BYTES
    plain = None  # field for a text/plain body; the other fields are in the query string
    headers = {}  # {name: JSON schema} of the request's headers
    status = 200  # of a success
    schema = None  # JSON schema of the answer to a success, or None: no body
    answer_headers = ()  # names of headers in the answer to a success
    refusals = {500, 503}  # error statuses of the route, besides 400, which all routes may answer


def declared(route):
    return getattr(route, "declared", None) or Declared()


def declare(*refusals, **what):
    """Return a decorator that sets attributes of a route's Declared and adds error statuses."""

    def note_of(route):
        route.declared = said = declared(route)
        vars(said).update(what, refusals=said.refusals.union(refusals))
        return route

    return note_of


def waits(pool):
    """Declare that a worker pool serves the route: in a round, a slow route delays all clients."""
    return declare(pool=pool)


def asks(**fields):
    """Declare fields of the query string, passed to the route by name."""
    return declare(query=fields)


def takes(**fields):
    """Declare fields of the request's body, passed to the route by name."""
    return declare(403, 413, 415, body=fields)


def answers(status, schema, *refusals):
    """Declare the status and JSON schema of a success, and the error statuses of the route."""
    return declare(*refusals, status=status, schema=schema)


class WaitForNews(BaseException):
    """Stop serving a request until its user has news or the time is up; then the request is re-run.

    The arguments are the user and the end of the waiting, in ticks(). Not an Exception, for the
    same reason as Elsewhere.
    """


class Elsewhere(BaseException):
    """Hand a request over to a worker pool, before the request has had any effect.

    The argument is the pool's name. Not an Exception, so that no `except Exception` between the
    route and the server catches it.
    """


# Replaces the pool's name if a round's transaction could not begin: its routes then run in pools.
NO_ROUND = ""


def leave_round(pool):
    """Make sure that the request runs in this worker pool.

    If not, raise Elsewhere, and the pool re-runs the request.
    """
    if local.answer.pool != pool:
        raise Elsewhere(pool)


def call(route, user, values):
    return route(user, **values) if user else route(**values)


def read_query():
    """Return {name: value} of the query string, decoded as UTF-8. Bottle decodes it as Latin-1.

    Invalid bytes become U+FFFD, which is in no username and no other valid value.
    """
    sent = request.query.items() if request.query_string else ()
    return {name: value.encode("latin-1").decode(errors="replace") for name, value in sent}


def run(said, route, values):
    """Sign in, read the declared fields, and call the route. Returns the route's result."""
    user = said.sign_in()
    if said.query:
        values |= read_fields(said.query, read_query())
    if said.body:
        values |= read_fields(said.body, read_body(said), user)
    if local.answer.pool != "patient":
        return call(route, user, values)
    # As in a round, sign in within the transaction: the token or key may have ended while the
    # transaction waited for other writers.
    with transaction():
        return call(route, said.sign_in(), values)


def serve_declared(route):
    """Wrap a route so that its declarations are obeyed first, in the original's order.

    A Bottle plugin. The wrapper returns a dict or list as JSON. It logs an exception of the route
    and raises HTTPError 500, or 503 if the database fails.
    """
    said = declared(route)

    def serve(**values):
        if said.pool:
            leave_round(said.pool)
        elif local.answer.pool == NO_ROUND or (said.body and is_slow_to_read()):
            leave_round("patient")
        try:
            body = run(said, route, values)
        except HTTPResponse:
            raise
        except Exception as error:
            if is_outage(error):
                log.error(f"{request.method} {request.path!r} failed: {error}")
                raise HTTPError(503) from None
            failure = log_failure(f"{request.method} {request.path!r}")
            raise HTTPError(500, failure) from None
        response.status = said.status
        return encode_json(body) if isinstance(body, dict | list) else body

    return serve


app.install(serve_declared)


def answer_error(error):
    """Return the JSON body of any HTTPError, including Bottle's own, worded as in the original."""
    if error.status_code == 405:
        error = answer_wrong_method(error)
        error.apply(response)
    status, body = error.status_code, error.body
    if not isinstance(body, dict):
        body = {"detail": PUBLIC_DETAILS.get(status, error.status_line[4:])}
    if status in (401, 429):
        who = f"{request.method} {request.path!r} from {client_address()}"
        log.warning(f"refused {who}: {body['detail']}")
    if status == 401:
        response.set_header("WWW-Authenticate", 'Bearer realm="api"')
    if status == 503:
        response.set_header("Retry-After", "5")
    return encode_json(body)


app.default_error_handler = answer_error


def answer_wrong_method(error):
    """Return the answer to a method that the path does not have: 405, or 204 for OPTIONS.

    The route's sign-in comes before the 405, as in the original: if the sign-in fails, the answer
    is its refusal, or 503 if the database fails.
    """
    methods = error.get_header("Allow").split(",")
    if "GET" in methods:
        methods.append("HEAD")
    allow = ", ".join([*methods, "OPTIONS"])
    if request.method == "OPTIONS":
        return HTTPError(204, {}, Allow=allow)
    route, _ = app.match({**request.environ, "REQUEST_METHOD": methods[0]})
    try:
        declared(route.callback).sign_in()
    except HTTPError as refused:
        return refused
    except sqlite3.Error:
        return HTTPError(503)
    return refusal(405, f'Method "{request.method}" not allowed.', Allow=allow)


def read_address(text):
    """Return the IP address in a text from a proxy or the socket. Raises ValueError.

    A port is dropped: "192.0.2.1:80", "[2001:db8::1]:443". "::ffff:192.0.2.1" becomes 192.0.2.1.
    """
    with_port = re.fullmatch(r"\[(.*)\](?::\d+)?|([\d.]+):\d+", text)
    address = ipaddress.ip_address((with_port[1] or with_port[2]) if with_port else text)
    return getattr(address, "ipv4_mapped", None) or address


def is_trusted(address):
    return any(read_address(address) in network for network in settings.trusted_proxies)


def forwarded(name):
    """Yield the values of the header X-Forwarded-{name}, or nothing without a trusted proxy."""
    if is_trusted(request.environ["REMOTE_ADDR"]):
        for said in request.environ.get(f"HTTP_X_FORWARDED_{name}", "").split(","):
            if said := said.strip(' "'):
                yield said


def client_address():
    """Return the client's IP address: the connection's, or one that a trusted proxy forwarded.

    Read X-Forwarded-For from its end, up to the first address that is not a trusted proxy's: a
    trusted proxy added that address, but the client may have invented the earlier ones.
    """
    address = request.environ["REMOTE_ADDR"]
    try:
        for said in [address, *reversed([*forwarded("FOR")][-MAX_PROXIES:])]:
            address = str(read_address(said))
            if not is_trusted(address):
                break
    except ValueError:
        warn_of_unreadable_address()
    return address


def limiter_key():
    """Return the client's key for rate limits: the IPv4 address, or the /64 of the IPv6 address.

    A client with one address of a /64 can use all addresses of the /64.
    """
    address = read_address(client_address())
    return int(address) >> 64 if address.version == 6 else str(address)


@cache
def warn_of_unreadable_address():
    """Log that X-Forwarded-For is unreadable. @cache: log it once, not for each request."""
    said = request.environ.get("HTTP_X_FORWARDED_FOR")
    log.warning(f"no address is in X-Forwarded-For: {said!r}; its clients count as one")


def sign_in():
    """Return the user of the Authorization header, or None without a header of the scheme Bearer.

    The header holds a JWT or an API key. Raises HTTPError 401, worded as in simplejwt.
    """
    scheme, *rest = request.environ.get("HTTP_AUTHORIZATION", "").split() or [""]
    if scheme.lower() != "bearer":
        return None
    if len(rest) != 1:
        detail = "Authorization header must contain two space-delimited values"
        raise HTTPError(401, coded(detail, "bad_authorization_header"))
    by = sign_in_by_key if rest[0].startswith(KEY_PREFIX) else sign_in_by_token
    try:
        user = by(rest[0])
    except TokenError as error:
        reason = {"token_class": "AccessToken", "token_type": "access", "message": str(error)}
        detail = coded("Given token not valid for any token type") | {"messages": [reason]}
        raise HTTPError(401, detail) from None
    local.answer.user_id = user["id"]
    return user


def token_user(claims):
    """Return the user named by a JWT's claims, or None if there is no such user (any more).

    Raises HTTPError 401 if the password was changed after the JWT was issued.
    """
    user_id = str(claims.get("user_id"))
    user = find_user(connection(), int(user_id)) if re.fullmatch("[0-9]{1,18}", user_id) else None
    if user and claims.get("hash_password") != hash_of_hash(user["password"]):
        raise HTTPError(401, PASSWORD_CHANGED)
    return user


def sign_in_by_token(token):
    """Return the user of an access token. Raises TokenError or HTTPError 401."""
    claims = read_token(token, "access")
    if "user_id" not in claims:
        raise HTTPError(401, coded("Token contained no recognizable user identification"))
    user = token_user(claims)
    if user is None:
        raise HTTPError(401, coded("User not found", "user_not_found"))
    return user


def sign_in_by_key(key):
    """Return the user of an API key. Raises TokenError if the key is unknown or has expired."""
    user, at = find_key_user(connection(), key), iso(now())
    if user is None or (user["expires_at"] or "never") <= at:
        raise TokenError("Token is invalid")
    if user["last_used_on"] != at[:10]:
        used_keys.add(user["key_id"])
    return user


def require_user():
    """Return the signed-in user. Raises HTTPError 401 when nobody is signed in."""
    user = sign_in()
    if user is None:
        raise refusal(401, "Authentication credentials were not provided.")
    return user


def require_login():
    """Return the signed-in user. Raises HTTPError 401 without one, and 403 for an API key."""
    user = require_user()
    if "key_id" in user.keys():
        raise refusal(403, "An API key cannot do this: log in.")
    return user


def may_register():
    """Let anybody register, signed in or not, within the rate limit.

    Raises HTTPError 403 while registration is closed, whatever is sent; else 401 for a wrong token,
    and 429 after too many tries from the client's address.
    """
    if settings.registration == "closed":
        raise refusal(403, "Registration is closed: ask whoever runs this server.")
    sign_in()
    # Another method is refused with 405, and registers nobody.
    if request.method == "POST":
        refuse_for(registration_limiter.try_once({limiter_key(): REGISTRATIONS_PER_ADDRESS}))


# Requires a token or an API key. The route's first argument is the signed-in user.
signed_in = declare(401, sign_in=require_user)
# As signed_in, but requires a login with a password: API keys are refused.
logged_in = declare(401, 403, sign_in=require_login)
# Requires no sign-in while registration is open, but refuses a wrong token.
open_to_anybody = declare(401, 403, 429, sign_in=may_register)


class Refused(ValueError):
    """Refuse the value of a field. The arguments are sentences for the client."""


class Field:
    """Describe a value that a request may send. `schema` is the JSON schema that OpenAPI shows.

    A subclass has read(), which returns the checked value for the route, or raises Refused.
    """

    type = "string"
    required = False

    def __init__(self, **schema):
        self.schema = {"type": self.type, **schema}


class Text(Field):
    """Accept a text, or refuse it in the words of Django REST framework."""

    required = True
    # Not blank, and without NUL. The pattern lists \u001c-\u001f and \u0085 because str.strip()
    # removes them as white space, but \s in a JSON schema does not match them.
    pattern = r"^[^\u0000]*[^\s\u0000\u001c-\u001f\u0085][^\u0000]*$"

    def __init__(self, tidy=str, **schema):
        super().__init__(**{"minLength": 1, "pattern": self.pattern, **schema})
        self.tidy = tidy

    def read(self, value, username=None):
        """Return the text after tidy(). Raises Refused.

        `username` is the name of the account, if known: a password must not resemble the name.
        """
        if type(value) not in (str, int, float):
            raise Refused("Not a valid string.")
        text = self.tidy(str(value))
        if not text.strip():
            raise Refused("This field may not be blank.")
        if errors := list(self.errors_of(text, username)):
            raise Refused(*errors)
        return text

    def errors_of(self, text, username):
        most = self.schema.get("maxLength", math.inf)
        if len(text) > most:
            yield f"Ensure this field has no more than {most} characters."
        if "\0" in text:
            yield "Null characters are not allowed."
        if surrogate := re.search("[\ud800-\udfff]", text):
            yield f"Surrogate characters are not allowed: U+{ord(surrogate[0]):X}."


class OptionalText(Text):
    """Accept a text that may be left out."""

    required = False


class NewUsername(Text):
    """Accept a username, unless people could mistake it for another one."""

    # In a JSON schema, \w matches ASCII only: the second half admits all other characters.
    pattern = r"^([\w.@+-]|[^\u0000-\u007f])+$"

    def errors_of(self, text, username):
        if not re.fullmatch(r"[\w.@+-]+", text):
            yield (
                "Enter a valid username. This value may contain only letters, numbers, and "
                "@/./+/-/_ characters."
            )
            if " " in text and media_type() == FORM:
                yield 'In a form, "+" is a blank: send %2B.'
        yield from super().errors_of(text, username)
        words = {word for c in text[:MAX_USERNAME] for word in unicodedata.name(c, "").split()}
        if len(words & {"LATIN", "CYRILLIC", "GREEK"}) > 1:
            yield "Enter a valid username. This value mixes letters of two alphabets."
        # Unicode counts these characters as letters, so \w matches them, but they are invisible.
        if re.search("[\u115f\u1160\U00013441\U00013442]", text):
            yield "Enter a valid username. This value holds letters that cannot be seen."


class NewPassword(Text):
    """Accept a new password, unless it is too easy to guess."""

    # Not only digits and white space, and without NUL.
    pattern = r"^[^\u0000]*[^\d\s\u0000\u001c-\u001f\u0085][^\u0000]*$"

    @staticmethod
    def core(text):
        """Return a text case-folded and without digits at its ends, or unchanged if only digits."""
        return fold(text).strip("0123456789") or text

    def errors_of(self, text, username):
        yield from super().errors_of(text, username)
        if username and self.core(text) == self.core(username):
            yield "The password is too similar to the username."
        if len(text) < MIN_PASSWORD:
            least = f"It must contain at least {MIN_PASSWORD} characters."
            yield f"This password is too short. {least}"
        if text.lower() in COMMON_PASSWORDS:
            yield "This password is too common."
        if text.isdigit():
            yield "This password is entirely numeric."
        if "\ufffd" in text:
            yield "It holds U+FFFD, for what could not be read: send UTF-8."


class Choice(Field):
    """Accept a word of the schema's enum."""

    def read(self, value, username=None):
        if value not in self.schema["enum"]:
            raise Refused(f"Choose one of {', '.join(self.schema['enum'])}.")
        return value


class Flag(Field):
    """Accept yes or no, in every spelling that Django REST framework accepts."""

    type = "boolean"
    yes, no = "true t yes y on 1 1.0".split(), "false f no n off 0 0.0".split()

    def read(self, value, username=None):
        word = str(value).lower()
        if word not in (*self.yes, *self.no):
            raise Refused("Must be a valid boolean.")
        return word in self.yes


class Moment(Field):
    """Accept a time in ISO 8601, `least` to `most` seconds from now; read as seconds since 1970."""

    def __init__(self, least=-math.inf, most=math.inf, **schema):
        super().__init__(format="date-time", **schema)
        self.least, self.most = least, most

    def read(self, value, username=None):
        try:
            # In a form, an unescaped "+" of a time zone is decoded as a space.
            moment = datetime.fromisoformat(str(value).upper().replace(" ", "+"))
            if not moment.tzinfo:
                raise ValueError
            seconds = moment.timestamp()
            if seconds > now():
                # Raises ValueError if the time falls into the year 10000 in UTC.
                iso(seconds)
        except (ValueError, OverflowError):
            raise Refused(
                "Datetime has wrong format. Use this format instead: "
                "YYYY-MM-DDThh:mm[:ss[.uuuuuu]](+HH:MM|-HH:MM|Z)."
            ) from None
        if seconds < now() + self.least:
            raise Refused("This time has passed.")
        if seconds > now() + self.most:
            raise Refused(f"Ensure this is at most {self.most // 86_400} days ahead.")
        return seconds


class Number(Field):
    """Accept an integer, or text that spells an integer; 3.0 is accepted, as in the original."""

    type = "integer"

    def __init__(self, least, most, **schema):
        super().__init__(minimum=least, maximum=most, **schema)

    def read(self, value, username=None):
        if not (digits := re.fullmatch("(-?[0-9]{1,20})(?:[.]0*)?", str(value))):
            raise Refused("A valid integer is required.")
        number, least, most = int(digits[1]), self.schema["minimum"], self.schema["maximum"]
        if number < least:
            raise Refused(f"Ensure this value is greater than or equal to {least}.")
        if number > most:
            raise Refused(f"Ensure this value is less than or equal to {most}.")
        return number


class Several(Field):
    """Accept a list of different texts.

    If one text is enough, a text without a list is accepted too, and repeated texts count once.
    Otherwise repeated texts are refused.
    """

    def __init__(self, item, least, most, **schema):
        self.item, self.least, self.most = item, least, most
        array = {"type": "array", "items": item.schema, "minItems": least, "maxItems": most}
        one_too = {"oneOf": [item.schema, array]}
        self.schema = schema | (one_too if least == 1 else array | {"uniqueItems": True})

    def read(self, value, username=None):
        if not isinstance(value, list):
            if self.least == 1:
                return self.item.read(value)
            raise Refused("Expected a list of items.")
        # Read only so many items: a body may hold 100,000, and each takes time.
        longest = 2 * self.most
        texts = list(dict.fromkeys(map(self.item.read, value[:longest])))
        is_repeated = self.least > 1 and len(texts) < len(value)
        if is_repeated or len(value) > longest or not self.least <= len(texts) <= self.most:
            raise Refused(f"Give {self.least} to {self.most} different items.")
        return texts


def tidy_choice(text):
    """Return the text of a button, trimmed, or "" if the whole text is invisible."""
    return "" if NOTHING.fullmatch(text) else text.strip()


def tidy_username(name):
    """Return the canonical form of a username: trimmed, NFKC."""
    return normalize("NFKC", name.strip(), MAX_USERNAME)


def read_fields(fields, sent, user=None):
    """Return {name: value} of the declared fields. An optional field that was not sent is None.

    Raises HTTPError 400, with the errors of every wrong field.
    """
    values, errors = {}, {}
    for name, declared_field in fields.items():
        value = sent.get(name)
        if value is None:
            values[name] = None
            if declared_field.required:
                is_null = name in sent
                errors[name] = [f"This field {'may not be null' if is_null else 'is required'}."]
        else:
            try:
                username = user["username"] if user else values.get("username")
                values[name] = declared_field.read(value, username)
            except Refused as refused:
                errors[name] = list(refused.args)
    if errors:
        raise HTTPError(400, errors)
    return values


FORM, MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data"


def media_type():
    """Return the media type of the request's body, in lower case and without parameters."""
    return request.content_type.partition(";")[0].strip()


def is_slow_to_read():
    return request.content_length > LONG_BODY_BYTES or media_type() == MULTIPART


def read_body(said):
    """Return the fields of the request's body, JSON or a form, as {name: raw value}.

    `said` is the route's Declared. Raises HTTPError 400, 413 or 415.
    """
    encoding = request.environ.get("HTTP_CONTENT_ENCODING", "").strip()
    if encoding.lower() not in ("", "identity"):
        detail = f'Unsupported content encoding "{encoding}" in request: send the body as it is.'
        raise refusal(415, detail)
    length = request.content_length
    if length > said.max_body_bytes:
        raise refusal(413, f"The request is too large: {said.max_body_bytes} bytes are the most.")
    if length <= 0:
        return {}
    kind = media_type()
    if kind == "application/json":
        # Bottle's request.json would take ten times as long.
        return read_json(request.environ["wsgi.input"].read())
    try:
        return read_form(said, kind)
    except UnicodeError as error:
        raise refusal(400, f"Form parse error - {error}") from None
    except (MultipartError, LookupError, ValueError) as error:
        # A part of a form may name any charset. Python remembers each unknown name for ever, so
        # clients could fill the memory with made-up names.
        encodings._cache.clear()
        log.info(f"form refused: {error}")
        detail = f"the body has more than {MAX_FORM_FIELDS} fields, or does not follow RFC 7578."
        raise refusal(400, f"Form parse error - {detail}") from None


def read_form(said, kind):
    """Return the fields of a form, or of a JSON object that curl's -d sends as a form.

    A name with several values gets a list of them if its field is Several, else the last value.
    Raises HTTPError 400, or 415 for another kind of body, and ValueError, LookupError or
    MultipartError for a form that cannot be read.
    """
    if kind == MULTIPART:
        pairs = list(request.POST.allitems())
    elif kind == FORM:
        body = request.body.read()
        if body.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return read_json(body)
        pairs = parse_form(body.decode())
    elif kind == "text/plain" and said.plain:
        text = re.sub(r"\r?\n\Z", "", request.body.read().decode())
        pairs = [*parse_form(request.query_string), (said.plain, text)]
    else:
        raise refusal(415, f'Unsupported media type "{request.content_type}" in request.')
    form = dict(pairs)
    for name, declared_field in said.body.items():
        values = [value for key, value in pairs if key == name]
        if isinstance(declared_field, Several) and len(values) > 1:
            form[name] = values
        elif form.get(name) == "" and not declared_field.required:
            # A form sends an empty field as "". An optional field then counts as not given.
            del form[name]
    return form


def parse_form(text):
    return urllib.parse.parse_qsl(
        text, keep_blank_values=True, errors="strict", max_num_fields=MAX_FORM_FIELDS
    )


def read_json(body):
    """Return the object in a JSON body, as a dict.

    Raises HTTPError 400 in the words of Python's json, as the original does.
    """
    try:
        value = JSON_DECODER.decode(body.decode().removeprefix("\ufeff"))
    except RecursionError:
        raise refusal(400, "JSON parse error - nested too deeply") from None
    except ValueError as error:
        raise refusal(400, f"JSON parse error - {error}") from None
    if not isinstance(value, dict):
        sentence = f"Invalid data. Expected a dictionary, but got {type(value).__name__}."
        if value is None:
            sentence = "No data provided"
        raise HTTPError(400, {"non_field_errors": [sentence]})
    return value


def refuse_constant(name):
    """Raise ValueError for NaN and Infinity: Python's json accepts both, but JSON has neither."""
    raise ValueError(f"Out of range float values are not JSON compliant: {name!r}")


def finite_float(digits):
    """Return the number as a float. Raises ValueError if the number is too large for a float."""
    value = float(digits)
    if math.isinf(value):
        refuse_constant(digits)
    return value


# Shared by all requests: making a decoder takes as long as decoding a body.
JSON_DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite_float)


PAGING = {
    "after": Number(0, MAX_ID, example=0, description="Only what is later than this id."),
    "before": Number(
        0, MAX_ID, example=1_000_000, description="Only what is earlier than this id."
    ),
    "limit": Number(
        1, MAX_PAGE_ROWS, example=100, description="At most so many; a Link names the next page."
    ),
}


def answer_list(listing, user, **given):
    """Return a JSON array of a listing's rows, or of one page: bytes or, if long, a generator.

    Raises HTTPError 400 if no id as high as `after` has been given yet.
    """
    sent = {name: value for name, value in given.items() if value is not None}
    page = {"user": user["id"], **given, "after": 0, "before": MAX_ID, **sent}
    if "limit" in sent:
        end_page(listing, page, sent)
    _, is_whole, piece = read_piece(listing, page, LIST_ROWS, LIST_BYTES)
    if not piece and page["after"] > find_last_id(connection(), listing):
        sentence = "There is no such id yet: was the database restored? Start from 0."
        raise HTTPError(400, {"after": [sentence]})
    return b"[%s]" % piece if is_whole else stream_rows(listing, page)


def answer_unchanged(user, wait):
    """Set the ETag of the user's data, or answer 304 if the client already has this version.

    See RFC 9110, section 13.1.2. The 304 comes after `wait` seconds without news: until then raises
    WaitForNews, afterwards HTTPResponse 304.
    """
    etag = f'"{STARTED}-{user["id"]}-{user["changes"]}"'
    # Only the client's own cache may store the answer, and must revalidate it at each use.
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    known = request.environ.get("HTTP_IF_NONE_MATCH", "")
    if etag in known or known.strip() == "*":
        wait_for_news(user, wait)
        raise HTTPResponse(status=304, **headers)
    response.headers.update(headers)


def wait_for_news(user, wait):
    """Let the request wait for a change of the user's data, at most `wait` seconds.

    Raises WaitForNews to begin or continue the waiting. Returns once the waiting is over.
    """
    until = local.answer.waits_until
    if until is None:
        until = ticks() + (wait or 0)
    if ticks() < until:
        raise WaitForNews(user, until)


def end_page(listing, page, given):
    """Limit a page to `limit` rows. If more follow, a Link names the next page (RFC 8288)."""
    side, far_side, order = "after", "before", "ASC"
    if "before" in given and "after" not in given:
        side, far_side, order = "before", "after", "DESC"
    end = find_page_end(connection(), listing, page, order)
    if len(end) == 2:
        (last,), (page[far_side],) = end
        query = urllib.parse.urlencode({**given, side: last})
        # A relative URL, because a proxy may serve us under another path.
        response.set_header("Link", f'<?{query}>; rel="next"')


def stream_rows(listing, page):
    """Yield the JSON array in pieces, each read from the database lazily.

    The pieces are small, so that a client that reads nothing costs little memory.
    """
    # Bottle takes the first piece at once, on the serving thread: it must not need the database.
    yield b"["
    comma, is_whole = b"", False
    while not is_whole:
        page["after"], is_whole, *piece = read_piece(listing, page, math.inf, LIST_PIECE_BYTES)
        if piece[0]:
            # pop() keeps no reference to the piece here while the client reads the answer.
            yield comma + piece.pop()
            comma = b","
    yield b"]"


def read_piece(listing, page, most_rows, most_bytes):
    """Return (last id, is_whole, JSON) of a page's next rows. is_whole: no rows are left.

    The piece ends after most_rows rows, or with the row that reaches most_bytes.
    """
    texts, size, last = [], 0, page["after"]
    with closing(list_rows(connection(), listing, page)) as rows:
        for row_id, text in rows:
            if len(texts) == most_rows or size >= most_bytes:
                return last, False, b",".join(texts)
            texts.append(text)
            size += len(text)
            last = row_id
    return last, True, b",".join(texts)


# --- Routes ---------------------------------------------------------------------------------------
# The requests of the API, in the order a user meets them. Routes handle no threads: @waits and
# leave_round() name a worker pool, and the room Server does the rest.


def an_object(**properties):
    """Return the JSON schema of an object with exactly the given properties, all required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


COMPONENTS = {}  # name: JSON schema


def component(name, schema):
    """Add a JSON schema to COMPONENTS. Returns a reference to the schema.

    The API description spells each component out once, however often a route refers to it.
    """
    COMPONENTS[name] = schema
    return {"$ref": f"#/components/schemas/{name}"}


# JSON schemas of answers.
AN_ID = {
    "type": "integer",
    "minimum": 1,
    "example": 1,
    "description": "A number that the server gives, greater for what is later.",
}
A_TEXT = {"type": "string"}
OR_NULL = {"type": ["string", "null"]}
A_NAME = A_TEXT | {"example": "alice"}
A_TIME = A_TEXT | {"format": "date-time", "example": "2026-11-23T18:08:27.130235Z"}
A_JWT = A_TEXT | {"example": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJ0b2tlbl90eXBlIj…"}
A_BOT = OR_NULL | {"example": "@factory_bot"}
A_USER = component("User", an_object(id=AN_ID, username=A_NAME))
A_MESSAGE = component(
    "Message",
    an_object(
        id=AN_ID,
        sender=A_NAME,
        recipient=A_NAME,
        text=A_TEXT | {"example": "Линия 4 остановлена"},
        created_at=A_TIME,
        source={"enum": ["api", "telegram"]},
        delivery={"enum": DELIVERIES, "description": "of the recipient's copy"},
        failure=OR_NULL | {"example": "403 Forbidden: bot was blocked by the user"},
        send_at=A_TIME | OR_NULL,
        reply_to=AN_ID | {"type": ["integer", "null"]},
        choices={"type": ["array", "null"], "items": A_TEXT, "example": ["Да", "Нет"]},
    ),
)
A_KEY = component(
    "Key",
    an_object(
        id=AN_ID,
        name=A_TEXT | {"example": "night report"},
        created_at=A_TIME,
        expires_at=A_TIME | OR_NULL,
        last_used_on=OR_NULL | {"format": "date", "example": "2026-11-23"},
    ),
)
A_NEW_KEY = an_object(**COMPONENTS["Key"]["properties"], key=A_TEXT | {"example": "fa_9UdSeHhQ…"})
A_DETAIL = component(
    "Detail",
    {
        **an_object(detail=A_TEXT),
        "additionalProperties": True,
        "description": "A sentence, and what else is known.",
    },
)
FIELD_ERRORS = component(
    "FieldErrors",
    {"type": "object", "additionalProperties": {"type": "array", "items": A_TEXT}},
)

# Fields and headers of requests.
USERNAME_FIELD = NewUsername(tidy=tidy_username, maxLength=MAX_USERNAME, example="alice")
# A name to look up: the rules for new usernames do not apply, and there may be no such user.
NAME_FIELD = Text(tidy=tidy_username, example="alice")
WITH_FIELD = OptionalText(
    tidy=tidy_username, example="alice", description="Only the conversation with this user."
)
PASSWORD_FIELD = Text(example="S3cure-pass-91")
NEW_PASSWORD_FIELD = NewPassword(
    minLength=MIN_PASSWORD, maxLength=MAX_PASSWORD, example="S3cure-pass-91"
)
WAIT = Number(
    0,
    WAIT_SECONDS,
    example=0,
    description="Seconds to wait for something new, where there is none.",
)
IF_NONE_MATCH = {
    "If-None-Match": A_TEXT
    | {"example": '"0123456789abcdef"', "description": "The ETag of what you have already."}
}
TOKEN_FIELD = Text(tidy=str.strip, example=A_JWT["example"])


@app.get("/")
@answers(200, A_TEXT | {"contentMediaType": "text/html"})
def show_page():
    """Show the web page.

    The page is a chat for people with a browser, built on the other requests of the API.
    """
    response.headers.update(PAGE_HEADERS)
    return PAGE.replace("<main>", f'<main class="{settings.registration}">').encode()


@app.get("/health/")
@waits("health")
@answers(
    200,
    an_object(
        status={"enum": ["ok", "degraded"]},
        version=A_TEXT | {"example": VERSION},
        bot=A_BOT,
        bot_reachable={"type": "boolean"},
        bot_error=OR_NULL,
        bot_answered_at=A_TIME | OR_NULL,
        queued={"type": "integer"},
        oldest_queued_seconds={"type": "number"},
    ),
)
def show_health():
    """Show the health of the server.

    The answer names the bot and counts the bot's messages still to be sent. The bot is null until
    Telegram has been reached for the first time. The status is "degraded" if Telegram has not
    answered for a minute or refuses the bot. If the database does not answer, the answer is a 503.
    """
    home = running.home
    health = {
        "status": "ok" if home.is_well() else "degraded",
        "version": VERSION,
        "bot": home.name,
        "bot_reachable": home.name is not None and home.error is None,
        "bot_error": home.error,
        "bot_answered_at": home.answered and iso(now() - ticks() + home.answered),
    }
    try:
        check_files()
        # Only a new connection has to read the file: an open connection may answer from its cache.
        with closing(connect("ro")) as db:
            queued, oldest = count_waiting(db, home.id)
    except sqlite3.Error as error:
        log.error(f"the database does not answer: {error}")
        reason = f"The database does not answer: {error}."
        outage = {"status": "error", "reason": reason, "detail": reason}
        raise HTTPError(503, health | outage) from None
    oldest_seconds = round(now() - oldest, 3) if queued else 0
    return {**health, "queued": queued, "oldest_queued_seconds": oldest_seconds}


@app.post("/api/users/register/")
@waits("registering")
@open_to_anybody
@takes(username=USERNAME_FIELD, password=NEW_PASSWORD_FIELD)
@answers(201, A_USER)
def register(username, password):
    """Create an account.

    Anybody can register unless the operator of the server has closed registration (403). The limit
    for one address is 100 tries at once, then one every 3 seconds (429).
    """
    password_hash = hash_password(password)
    with transaction() as db:
        user_id = add_user(db, username, password_hash)
    if user_id is None:
        raise HTTPError(400, NAME_TAKEN)
    return {"id": user_id, "username": username}


def check_password(username, password, password_hash):
    """Return whether the password is right.

    Raises HTTPError 429 after too many wrong passwords from the client's address, for the given
    username or for all usernames together.
    """
    address = limiter_key()
    limits = {
        (address, username[: MAX_USERNAME + 1]): LOGIN_FAILURES_PER_NAME,
        address: LOGIN_FAILURES_PER_ADDRESS,
    }
    refuse_for(login_limiter.try_once(limits))
    is_right = password_matches(password, password_hash)
    if is_right:
        login_limiter.forgive(*limits)
    return is_right


@app.post("/auth/token/")
@waits("hashing")
@takes(username=NAME_FIELD, password=PASSWORD_FIELD)
@answers(200, an_object(refresh=A_JWT, access=A_JWT), 401, 429)
def log_in(username, password):
    """Exchange a username and password for two tokens.

    The access token authorizes requests and is valid for 5 minutes. The refresh token is exchanged
    for new access tokens and is valid for a day.
    """
    user = find_user_by_name(connection(), username)
    password_hash = user["password"] if user else nobodys_hash()
    is_right = check_password(username, password, password_hash)
    # Read the user again: while the password was being hashed, the password may have been changed
    # or the account erased.
    user = is_right and find_user(connection(), user["id"])
    if not user or user["password"] != password_hash:
        raise refusal(401, "No active account found with the given credentials")
    return {"refresh": issue_token("refresh", user), "access": issue_token("access", user)}


def read_live_token(token, kind=None):
    """Return (claims, user) of a valid JWT, with None for a user whose account is gone.

    `kind` is "access", "refresh", or None for any. Raises HTTPError 401, in the words of
    simplejwt's token views, if the JWT is invalid, blacklisted, or ended by a password change.
    """
    try:
        claims = read_token(token, kind)
    except TokenError as error:
        raise HTTPError(401, coded(str(error))) from None
    return claims, token_user(claims)


@app.post("/auth/token/refresh/")
@takes(refresh=TOKEN_FIELD)
@answers(200, an_object(access=A_JWT), 401)
def refresh_token(refresh):
    """Exchange a refresh token for an access token.

    The refresh token does not change and can be used again.
    """
    _, user = read_live_token(refresh, "refresh")
    if user is None:
        detail = "No active account found for the given token."
        raise HTTPError(401, coded(detail, "no_active_account"))
    return {"access": issue_token("access", user)}


@app.post("/auth/token/verify/")
@takes(token=TOKEN_FIELD)
@answers(200, an_object(), 401)
def verify_token(token):
    """Check whether a token is valid.

    Access tokens and refresh tokens are both accepted. An invalid token is answered 401, with the
    reason.
    """
    read_live_token(token)
    return {}


@app.post("/auth/token/blacklist/")
@takes(refresh=TOKEN_FIELD)
@answers(200, an_object(), 401)
def blacklist_token(refresh):
    """Log out.

    The refresh token ends at once. Access tokens stay valid until they expire.
    """
    claims, _ = read_live_token(refresh, "refresh")
    with transaction() as db:
        add_blacklisted_token(db, claims["jti"], float(claims["exp"]))
    return {}


# In a worker pool: the GETs of a round run before the round's transaction. The write here would
# need a commit of its own and hold up the serving thread.
@app.get("/api/users/get-telegram-token/")
@waits("patient")
@logged_in
@answers(
    200,
    an_object(
        telegram_token=A_TEXT,
        expires_at=A_TIME,
        bot=A_BOT,
        link=OR_NULL,
    ),
)
def get_telegram_token(user):
    """Get a token for linking a chat to the account.

    Send the token to the bot within 10 minutes. A token works once, and a new token ends the
    earlier one.
    """
    token, expires_at = secrets.token_urlsafe(32), now() + LINK_TOKEN_SECONDS
    with transaction() as db:
        add_link_token(db, user["id"], token, expires_at)
    bot = running.home.name
    link = f"https://t.me/{bot[1:]}?start={token}" if bot and bot[0] == "@" else None
    return {"telegram_token": token, "expires_at": iso(expires_at), "bot": bot, "link": link}


# In a worker pool: giving up a long queue takes too long for a round.
@app.post("/api/users/unlink-telegram/")
@waits("patient")
@logged_in
@answers(204, None)
def unlink_telegram(user):
    """Unlink the account's chat.

    Meant for a lost phone: all messages queued for the chat are given up.
    """
    with transaction() as db:
        if chat := find_chat(db, user["id"]):
            unlink_chat(db, chat, "the user unlinked the chat")


@app.post("/api/users/set-password/")
@waits("hashing")
@logged_in
@takes(current_password=PASSWORD_FIELD, new_password=NEW_PASSWORD_FIELD)
@answers(204, None, 429)
def change_password(user, current_password, new_password):
    """Change the password.

    The change ends every token and API key issued before.
    """
    old_hash = user["password"]
    if not check_password(user["username"], current_password, old_hash):
        log.warning(f"refused set-password from {client_address()}: wrong password")
        raise HTTPError(400, {"current_password": ["Invalid password."]})
    new_hash = hash_password(new_password)
    with transaction() as db:
        if not set_password(db, user["id"], old_hash, new_hash):
            raise HTTPError(401, PASSWORD_CHANGED)


@app.post("/api/users/keys/")
@logged_in
@takes(
    name=Text(maxLength=100, example="night report"),
    expires_at=Moment(0, example="2099-01-01T00:00:00Z", description="Never, if left out."),
)
@answers(201, A_NEW_KEY)
def make_key(user, name, expires_at):
    """Create an API key.

    A program sends the API key in place of an access token. No later answer shows the key again.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    with transaction() as db:
        if len(list_keys(db, user["id"])) >= KEYS:
            raise refusal(400, f"There are {KEYS} keys already: delete one first.")
        return {**add_key(db, user["id"], name, key, expires_at), "key": key}


@app.get("/api/users/keys/")
@signed_in
@answers(200, {"type": "array", "items": A_KEY})
def list_own_keys(user):
    """List your API keys.

    The answer has each key's name and dates, but never the key itself.
    """
    return [dict(row) for row in list_keys(connection(), user["id"])]


@app.delete("/api/users/keys/<key_id:re:[0-9]{1,18}>/")
@logged_in
@answers(204, None, 404)
def end_key(user, key_id):
    """Delete an API key.

    The key ends at once.
    """
    with transaction() as db:
        if not delete_key(db, user["id"], int(key_id)):
            raise HTTPError(404)


@app.get("/api/users/me/")
@signed_in
@answers(
    200,
    an_object(
        id=AN_ID,
        username=A_NAME,
        telegram_linked={"type": "boolean"},
        telegram={"enum": ["linked", "elsewhere", "none"]},
    ),
)
def show_account(user):
    """Show your account.

    The field telegram is "linked" if a chat is linked with the running bot, "elsewhere" if a chat
    is linked with another bot, and "none" if no chat is linked.
    """
    chat, telegram = find_chat(connection(), user["id"]), "none"
    if chat:
        telegram = "linked" if chat["bot_id"] == running.home.id else "elsewhere"
    return {
        "id": user["id"],
        "username": user["username"],
        "telegram_linked": telegram == "linked",
        "telegram": telegram,
    }


@app.get("/api/users/")
@signed_in
@asks(**PAGING)
@declare(answer_headers=["Link"])
@answers(200, {"type": "array", "items": A_USER})
def list_all_users(user, **page):
    """List all users.

    Users come in the order of their ids, the earliest first. Instead of all users, you can ask for
    a page of users after an id, or before an id.
    """
    return answer_list(USERS, user, **page)


@app.post("/api/messages/")
@signed_in
@takes(
    text=Text(maxLength=MAX_TEXT, example="Линия 4 остановлена"),
    recipient=Several(
        NAME_FIELD,
        1,
        MAX_RECIPIENTS,
        example="alice",
        description="A username, or a list of them; you, if left out.",
    ),
    silent=Flag(example=False),
    send_at=Moment(
        most=SEND_AHEAD_SECONDS,
        example="2026-01-01T09:00:00Z",
        description="At once, if left out.",
    ),
    # No example: API tools send examples unchanged, and a user without a message of the example's
    # id would get a 400.
    reply_to=Number(1, MAX_ID, description="The id of the message of yours that it answers."),
    choices=Several(
        Text(tidy=tidy_choice, maxLength=MAX_CHOICE),
        2,
        MAX_CHOICES,
        example=["Да", "Нет"],
        description="Buttons below the recipient's copy.",
    ),
)
@declare(
    max_body_bytes=MAX_MESSAGE_BODY_BYTES,
    plain="text",
    answer_headers=["Idempotency-Replayed"],
)
@answers(201, {"oneOf": [A_MESSAGE, {"type": "array", "items": A_MESSAGE}]}, 422, 429)
def post_message(user, text, recipient, silent, send_at, reply_to, choices):
    """Send a message.

    The message is stored and its copies are queued, together or not at all. A message with a
    send_at is scheduled: only you can see a scheduled message. At send_at the message is published
    with a new id, as if you posted the message then. With a header Idempotency-Key (1 to 255
    visible ASCII characters of your choice, different for each message), a retry stores nothing
    more, and the same key with other fields is refused (422). You can also send the text as
    text/plain, with the other fields in the query string. The limit for messages to one other
    person is 100 at once, then one a second (429).
    """
    is_list = isinstance(recipient, list)
    if is_list:
        # Splitting the text for up to MAX_RECIPIENTS recipients takes too long for a round.
        leave_round("patient")
    key = read_idempotency_key()
    request_hash = key and sha256(repr((text, recipient, silent, send_at, reply_to, choices)))
    with transaction() as db:
        if key and (earlier := find_idempotency_key(db, user["id"], key)):
            return replay(request_hash, earlier)
        reply_to = reply_to and find_new_id(db, reply_to, user["id"])
        recipients = find_recipients(db, user, recipient, reply_to)
        is_scheduled = send_at and send_at > now()
        refuse_for(wait_to_send(db, user, recipients, text, is_scheduled))
        message = {"text": text, "silent": bool(silent), "reply_to": reply_to, "choices": choices}
        if is_scheduled:
            message |= {"sender_id": user["id"], "send_at": send_at}
            ids = [add_scheduled(db, recipient_id=to["id"], **message) for to in recipients]
        else:
            ids = [relay(db, user, to, source="api", **message)[0] for to in recipients]
        messages = [find_message(db, message_id, user["id"]) for message_id in ids]
        answer = b"[%s]" % b",".join(messages) if is_list else messages[0]
        if key:
            add_idempotency_key(db, user["id"], key, request_hash, answer)
    return answer


def find_recipients(db, user, recipient, reply_to):
    """Return the recipients of a message that `user` posts, each user once.

    Without a named recipient, the recipient is the other person of the message `reply_to`, or else
    `user`. Raises HTTPError 400 if a named user, or the user's message `reply_to`, does not exist.
    """
    other = reply_to and find_other_user(db, reply_to, user["id"])
    if reply_to and not other:
        raise HTTPError(400, {"reply_to": ["No such message."]})
    if not recipient:
        return [other or user]
    is_one = isinstance(recipient, str)
    names = [recipient] if is_one else recipient
    found = {name: find_user_by_name(db, name, fold(name)) for name in names}
    if unknown := [name for name in names if not found[name]]:
        which = "" if is_one else f": {', '.join(unknown)}"
        raise HTTPError(400, {"recipient": [f"No such user{which}."]})
    return {user["id"]: user for user in found.values()}.values()


def read_idempotency_key():
    """Return the request's Idempotency-Key, or None. Raises HTTPError 400 for a malformed key."""
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is not None and not re.fullmatch("[!-~]{1,255}", key):
        raise HTTPError(400, {"Idempotency-Key": ["Give 1 to 255 visible ASCII characters."]})
    return key


def replay(request_hash, earlier):
    """Return the answer stored for the earlier request with the same Idempotency-Key.

    Raises HTTPError 422 if the earlier request had other fields.
    """
    if earlier["request_hash"] != request_hash:
        raise refusal(422, "This Idempotency-Key was used for another message: take a new key.")
    response.set_header("Idempotency-Replayed", "true")
    return earlier["answer"]


@app.get("/api/messages/")
@signed_in
@asks(
    **PAGING,
    delivery=Choice(
        enum=DELIVERIES,
        example="failed",
        description="Only those of this delivery.",
    ),
    **{"with": WITH_FIELD},
    reply_to=Number(
        1,
        MAX_ID,
        example=17,
        description="Only the answers to the message of this id.",
    ),
    wait=WAIT,
)
@declare(304, headers=IF_NONE_MATCH, answer_headers=["Link", "ETag"])
@answers(200, {"type": "array", "items": A_MESSAGE})
def list_own_messages(user, delivery, reply_to, wait, **page):
    """List your messages.

    The answer has all messages that you sent or received, or one page of them, oldest first.
    Scheduled messages are listed only with delivery=scheduled.
    """
    listing = OWN_MESSAGES_BY_DELIVERY if delivery else OWN_MESSAGES
    if name := page["with"]:
        listing = CONVERSATION_BY_DELIVERY if delivery else CONVERSATION
        if not (other := find_user_by_name(connection(), name, fold(name))):
            raise HTTPError(400, {"with": ["No such user."]})
        page["with"] = other["username"]
    if reply_to:
        listing, reply_to = OWN_ANSWERS, find_new_id(connection(), reply_to, user["id"])
    if delivery == "scheduled":
        listing = OWN_SCHEDULED
    answer_unchanged(user, wait)
    body = answer_list(listing, user, delivery=delivery, reply_to=reply_to, **page)
    if body == b"[]" and "HTTP_IF_NONE_MATCH" not in request.environ:
        wait_for_news(user, wait)
    return body


@app.get("/api/messages/<message_id:re:[0-9]{1,19}>/")
@signed_in
@asks(wait=WAIT)
@declare(304, headers=IF_NONE_MATCH, answer_headers=["ETag"])
@answers(200, A_MESSAGE, 404)
def show_message(user, message_id, wait):
    """Show a message.

    You can see the messages that you sent or received. Any other id is answered 404.
    """
    message = own_message(user, message_id)
    answer_unchanged(user, wait)
    is_queued = json.loads(message)["delivery"] in ("scheduled", "queued")
    if is_queued and "HTTP_IF_NONE_MATCH" not in request.environ:
        wait_for_news(user, wait)
    return message


def own_message(user, message_id):
    """Return the JSON of a message that the user sent or received.

    A sender can still use the old id of a scheduled message after its publication. Raises
    HTTPError 404 if the user has no such message.
    """
    message_id = find_new_id(connection(), min(int(message_id), MAX_ID), user["id"])
    message = find_message(connection(), message_id, user["id"])
    if message is None:
        raise HTTPError(404)
    return message


@app.delete("/api/messages/<message_id:re:[0-9]{1,19}>/")
@signed_in
@answers(200, A_MESSAGE, 403, 404, 409)
def cancel(user, message_id):
    """Cancel a message.

    You can cancel a queued message of yours unless a part has been sent, or is being sent, to the
    recipient. Your own copy of a cancelled message is not sent either. A scheduled message is
    deleted.
    """
    with transaction() as db:
        message = json.loads(own_message(user, message_id))
        message_id = message["id"]
        if message["sender"] != user["username"]:
            raise refusal(403, "Only its sender can cancel a message.")
        if delete_scheduled(db, message_id):
            return message | {"delivery": "cancelled"}
        if turns.is_sending(message_id) or not cancel_message(db, message_id):
            raise refusal(409, "Only what is queued, and not on its way yet, can be cancelled.")
        return find_message(db, message_id, user["id"])


# --- OpenAPI --------------------------------------------------------------------------------------
# The description of the API, generated from the declarations of the routes.

# {path prefix: tag}. A path gets the tag of the first prefix that matches.
TAGS = {
    "/api/users/": "accounts",
    "/api/messages/": "messages",
    "/auth/": "tokens",
    "/": "server",
}
BEARER = {"Bearer": []}
SECURITY = {
    require_user: [BEARER],
    require_login: [BEARER],
    may_register: [{}, BEARER],
}


def describe_api(address):
    """Return the OpenAPI 3.1 document. `address` is the URL of the server."""
    paths = {}
    for route in app.routes:
        path = re.sub(r"<(\w+):[^>]+>", r"{\1}", route.rule)
        if "." in path:
            path = path.rstrip("/")
        paths.setdefault(path, {})[route.method.lower()] = describe_route(path, route.callback)
    bearer = {
        "type": "http",
        "scheme": "bearer",
        "description": "An access token, or an API key where that is allowed.",
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FactoryApp",
            "version": VERSION,
            "description": f"{DESCRIPTION} Bodies may also be forms, urlencoded or multipart; "
            "numbers, true and false may be written as text.",
        },
        "servers": [{"url": address}],
        "paths": paths,
        "components": {"schemas": COMPONENTS, "securitySchemes": {"Bearer": bearer}},
    }


def describe_route(path, route):
    """Return the OpenAPI operation of a route, with every declared field and status."""
    said = declared(route)
    # `python -OO` removes docstrings: fall back to the function's name.
    text = route.__doc__ or route.__name__.replace("_", " ")
    summary, _, more = text.partition(".\n")
    operation = {
        "operationId": route.__name__,
        "tags": [next(TAGS[start] for start in TAGS if path.startswith(start))],
        "summary": summary,
        "description": " ".join(more.split()),
        "security": SECURITY.get(said.sign_in, []),
        "parameters": describe_parameters(said, re.findall(r"{(\w+)}", path)),
        "responses": describe_answers(said),
    }
    if said.body:
        operation["requestBody"] = {"required": True, **as_content(describe_body(said.body))}
    return operation


def describe_parameters(said, path_names):
    """Return the OpenAPI parameters of a route: path, query string and headers."""
    query = {name: field.schema for name, field in said.query.items()}
    places = {"path": dict.fromkeys(path_names, AN_ID), "query": query, "header": said.headers}
    return [
        {
            "name": name,
            "in": place,
            "required": place == "path",
            "description": schema["description"],
            "example": schema["example"],
            "schema": schema,
        }
        for place, schemas in places.items()
        for name, schema in schemas.items()
    ]


def describe_body(fields):
    schemas = {name: each.schema for name, each in fields.items()}
    return {
        "type": "object",
        "properties": schemas,
        "example": {
            name: schema["example"] for name, schema in schemas.items() if "example" in schema
        },
        "required": [name for name, each in fields.items() if each.required],
    }


def describe_answers(said):
    """Return the OpenAPI responses of a route: description, headers and schema of each status."""
    schemas = {
        said.status: said.schema,
        **dict.fromkeys(said.refusals, A_DETAIL),
        400: {"anyOf": [A_DETAIL, FIELD_ERRORS]},
    }
    if 304 in schemas:
        schemas[304] = None
    headers = {
        said.status: said.answer_headers,
        304: ["ETag"],
        429: ["Retry-After"],
        503: ["Retry-After"],
    }
    return {
        str(status): {
            "description": PUBLIC_DETAILS.get(status, HTTP_CODES[status]),
            "headers": dict.fromkeys(headers.get(status, ()), {"schema": A_TEXT}),
            **as_content(schemas[status]),
        }
        for status in sorted(schemas)
    }


def as_content(schema):
    """Return {"content": …} for a body with the given schema, or {} if there is no body (None)."""
    if schema is None:
        return {}
    media_type = schema.get("contentMediaType", "application/json")
    return {"content": {media_type: {"schema": schema}}}


@app.get("/openapi.json/")
@answers(200, {"type": "object"})
def show_openapi():
    """Describe the API.

    The answer is a document in OpenAPI 3.1. Postman imports the document, and generators make
    clients from it.
    """
    environ = request.environ
    # If a header lists several values, the first comes from the proxy closest to the client.
    scheme = next(forwarded("PROTO"), environ["wsgi.url_scheme"]).lower()
    host = next(forwarded("HOST"), environ.get("HTTP_HOST", "localhost"))
    prefix = next(forwarded("PREFIX"), "").strip("/")
    return describe_api(f"{scheme}://{host}/{prefix}".rstrip("/"))


# --- Server ---------------------------------------------------------------------------------------
# Rounds, worker pools, waiting requests, limits. No other room of the file uses waitress.
#
# Threads: only the serving thread touches sockets and channels. A pool's thread gets an Answer to
# make and gives the Answer back. No thread waits for a client: the next piece of a long list is
# made when the client has read the piece before, so at most one piece is kept for a client.
#
# If the commit of a round fails, nothing of the round is stored, and each 2xx becomes a 503 with
# Retry-After; a refusal (4xx, 5xx) is sent unchanged. If the round cannot begin, because another
# writer holds the lock, each request moves to a worker pool and waits there for the lock, until
# PATIENCE_SECONDS after the request arrived; then the answer is 503. In a pool, a request is
# committed alone, and answered 503 if the commit fails. After a failed fsync the process ends.
#
# On SIGTERM, each waiting request (long poll) is answered at once, as if the wait were over.
# Requests in a pool, long lists and unsent answers have STOP_SECONDS / 2 to finish. Requests that
# arrive later are not served, and bytes that are still unsent at the end are lost.
#
# A client that reads nothing is closed after STUCK_SECONDS. The client is closed earlier if a new
# client needs the connection, or if all unsent answers together have more than UNSENT_BYTES and
# the client's answer is the largest. Meanwhile no further request of the client is served.
#
# From other rooms: `with transaction()` takes the write lock, waiting up to `local.patience`
# seconds, and commits at the end. transaction() raises sqlite3.Error if the lock or the commit
# fails, or if the database file was removed or replaced. Within another transaction, transaction()
# is a part that may fail alone. A route's own failure is an answer (500, 503) and does not end the
# round. A route that declares a pool raises Elsewhere in any other place, before any effect.
#
# Names of waitress that its documentation does not promise (requirements.txt names the version):
#   HTTPRequestParser: received, parse_header, header_plus, body_rcv, completed, error, headers,
#     expect_continue, chunked, command, path, query, version, connection_close, get_body_stream
#   errors: ParsingError, BadRequest, InternalServerError, with code, reason, body
#   TcpWSGIServer: application, channel_class, adj, pull_trigger, handle_accept
#   wasyncore is a copy of asyncore, which Python 3.11 documents.
# Other undocumented names in use: apihelper.API_URL, CUSTOM_REQUEST_SENDER and _get_req_session of
# telebot (Bot); create_connection and HAS_IPV6 of urllib3.util.connection (Bot); unfinished_tasks
# of queue.Queue (end()).


# Threads of each worker pool. Each kind of work has a pool, so as not to queue after slower or more
# frequent work: a login never waits for registrations, a piece of a long list never waits for
# requests that need the write lock, and /health/ waits for nothing.
POOLS = {"patient": 3, "lists": 2, "hashing": HASHES_AT_ONCE, "registering": 1, "health": 1}


TLS_HANDSHAKE = b"\x16"  # first byte of a TLS client (RFC 8446, section 5.1)


class NotStored:
    """Refuse with 503, in the form of waitress's errors: a commit failed or a wait was too long."""

    code, reason, body = 503, "Service Unavailable", ""


class StrictRequest(HTTPRequestParser):
    """Parse a request, and refuse any that a proxy might read in another way.

    RFC 9112, sections 2.2 and 6.1.
    """

    command = "GET"  # until a request line has been parsed

    def received(self, data):
        is_header = self.body_rcv is None
        if is_header and b"\n\n" in (self.header_plus + data).partition(b"\r\n\r\n")[0]:
            self.error, self.completed = BadRequest("a line ends with CR LF"), True
            return len(data)
        taken = super().received(data)
        if self.completed or taken < len(data):
            # No 100 Continue: the request is complete, or the body has begun to arrive.
            self.expect_continue = False
        return taken

    def parse_header(self, header_plus):
        header = header_plus.replace(b"\t", b" ")
        if b" " * 100 in header or b"\r\n " in header or b"\0" in header:
            # waitress takes quadratic time for a long run of blanks, and unfolding makes long runs.
            raise ParsingError("a header is not folded, and has no NUL and no long blanks")
        try:
            super().parse_header(header_plus)
        except ValueError:
            # urlsplit() refused the address, or int() a number of thousands of digits.
            raise ParsingError("the address or Content-Length is invalid") from None
        codings = re.findall(rb"\ntransfer-encoding:([^\r\n]*)", header.lower())
        if codings and [coding.strip(b" ") for coding in codings] != [b"chunked"]:
            raise ParsingError("the one Transfer-Encoding is chunked")
        is_twice = self.chunked and "CONTENT_LENGTH" in self.headers
        if is_twice or "TRANSFER_ENCODING" in self.headers:
            raise ParsingError("send Content-Length or, in HTTP/1.1, Transfer-Encoding, not both")
        # Connection is a list of words (RFC 9110, section 7.6.1); waitress compares the whole text.
        words = re.findall("[^, \t]+", self.headers.get("CONNECTION", "").lower())
        ends = self.version != "1.1" and "keep-alive" not in words
        self.connection_close = ends or "close" in words


@lru_cache(1)
def http_date(second):
    """Return a time as the Date header has it, cached for a second (RFC 9110, section 5.6.7)."""
    return email.utils.formatdate(second, usegmt=True)


class Answer:
    """Make the answer to one request, calling the app as a WSGI server does (PEP 3333).

    One thread at a time makes an answer: the serving thread, or a thread of a pool. The bytes to be
    sent next are in `written`. If the round's commit fails, refuse(NotStored) replaces a 2xx by a
    503. On SIGTERM, a waiting request gets waits_until = 0 and is re-run, and so answered at once.
    While a client reads nothing, go_on() is not called, and the rest of a long list is not made.
    """

    pool = None  # its pool's name; None: in a round; NO_ROUND: no round could begin
    pieces = None  # iterator of the body's pieces that are not made yet
    waits_until = None  # end of a long poll, in ticks; 0: answer at once; None: not known yet
    user_id = "-"  # the signed-in user, for the log

    def __init__(self, channel, request):
        self.asker, self.request, self.addr = channel, request, channel.addr
        self.arrived_at = time.monotonic()

    def make(self, pool=None):
        """Serve the request from its beginning: set `status`, `headers`, `written` and `pieces`.

        Raises Elsewhere if another pool has to serve the request, and WaitForNews if the request
        has to wait. In both cases make() is called again later.
        """
        local.answer, self.pool = self, pool
        error = self.request.error
        if pool:
            # Never wait for news in a pool: there, a commit between reading the changes and
            # waiting would go unnoticed.
            self.waits_until = 0
            local.patience = PATIENCE_SECONDS + self.arrived_at - time.monotonic()
            if local.patience <= 0:
                error = NotStored
        if error:
            self.refuse(error)
            return
        began_at = time.monotonic()
        self.closes = self.request.connection_close or self.request.version not in ("1.0", "1.1")
        try:
            body = self.asker.server.application(self.make_environ(), self.start)
            if not isinstance(body, list):
                self.pieces, body = iter(body), ()
            self.written = self.make_head() + b"".join(body)
        except Exception:
            failure = log_failure(f"{self.request.command} {self.request.path!r}")
            self.refuse(InternalServerError(""), failure)
            return
        if log.isEnabledFor(logging.INFO):
            path = urllib.parse.quote(self.request.path, encoding="latin-1")
            took = f"{(time.monotonic() - began_at) * 1000:.1f} ms"
            who = f"user {self.user_id}, {client_address()}"
            log.info(f"{self.request.command} {path} {self.status[:3]} {took}, {who}")

    def make_environ(self):
        """Return the WSGI environ, with no more than Bottle and our routes read."""
        request, stream = self.request, self.request.get_body_stream()
        # A request that is re-run reads the body again.
        stream.seek(0)
        environ = {
            "REQUEST_METHOD": request.command.upper(),
            "PATH_INFO": re.sub("^/+", "/", request.path),
            "QUERY_STRING": request.query,
            "REMOTE_ADDR": self.addr[0],
            "wsgi.url_scheme": "http",
            "wsgi.input": stream,
            "wsgi.errors": sys.stderr,
        }
        for name, value in request.headers.items():
            prefix = "" if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_"
            environ[prefix + name] = value
        return environ

    def start(self, status, headers, exc_info=None):
        """Keep the status line and the headers: WSGI's start_response."""
        self.status, self.headers = status, headers

    def make_head(self):
        """Return the status line and the headers, in bytes.

        An answer without Content-Length closes the connection.
        """
        headers = {
            # No cache may keep one user's data, and no browser may guess a content type.
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Date": http_date(int(time.time())),
            **dict(self.headers),
        }
        is_1_1, has_body = self.request.version == "1.1", self.status[:3] not in ("204", "304")
        if has_body and "Content-Length" not in headers:
            self.closes = True
        if is_1_1 and self.pieces:
            # RFC 9112, section 7.1.
            headers["Transfer-Encoding"] = "chunked"
        if self.closes or not is_1_1:
            headers["Connection"] = "close" if self.closes else "Keep-Alive"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.{is_1_1:d} {self.status}\r\n{lines}\r\n".encode("latin-1")

    def refuse(self, error, failure=None):
        """Replace the answer by this refusal, after which the connection closes.

        `failure` is the JSON of a 500, as log_failure() returns it.
        """
        detail = PUBLIC_DETAILS.get(error.code, f"{error.reason}: {error.body}")
        body = encode_json(failure or {"detail": detail})
        headers = {
            "Content-Type": response.default_content_type,
            "Content-Length": str(len(body)),
        }
        if error.code == 503:
            headers["Retry-After"] = "5"
        self.start(f"{error.code} {error.reason}", headers)
        self.pieces, self.closes = None, True
        self.written = self.make_head() + body

    def go_on(self):
        """Make the next piece of a long list, or the end of the list."""
        piece = b""
        try:
            self.written = piece = next(self.pieces, b"")
            if self.request.version == "1.1":
                # An empty chunk ends the body.
                self.written = b"%x\r\n%b\r\n" % (len(piece), piece)
        except Exception:
            log.exception(f"{self.request.path!r} failed in the middle of an answer, which is cut")
        if not piece:
            self.pieces = None


# A channel's states. Only the serving thread changes them: a pool's thread only makes answers.
#
#         handle_read()      handle_read()             let_go()
#     idle --------> reading ------------> in a round --------> sending
#      ^                ^                  |   ^    |           ^   |  |
#      |                |      WaitForNews |   |    | Elsewhere |   |  |
#      |                |                  v   |    v           |   |  |
#      |                |              waiting |  in a pool ----+   |  |
#      |                |                  |   |      ^   let_go()  |  |
#      |                |                  +---+      |             |  |
#      |                |           end_waiting()     +-------------+  |
#      |                |              handle_write(), a list goes on  |
#      +----------------+----------------------------------------------+
#          handle_write(), all is sent: to reading if `unread` holds bytes, else to idle
#
# close_slow() closes a channel that stays too long in a state (closes_at), let_in() a channel whose
# place another client needs, bound_unsent() the channel with most to send.


class Channel(wasyncore.dispatcher):
    """Hold one client's connection: read a request, send the answer, then read the next request.

    A success is sent after the commit of the round; if the commit fails, let_go() sends 503
    instead. On SIGTERM, a waiting request is answered at once, and an answer in a pool has
    STOP_SECONDS / 2 to be made.

    While a client reads nothing, one answer or one piece of a long list stays in `unsent`, and no
    request is read. close_slow() closes the channel once STUCK_SECONDS pass without a byte sent;
    let_in() and bound_unsent() may close the channel earlier. An answer that fits into the kernel's
    buffer (SEND_BUFFER_BYTES) counts as sent, even if the client never reads.
    """

    request = None  # the StrictRequest that is still arriving
    answer = None  # the Answer that is not wholly made yet
    unread = b""  # received bytes that are not parsed yet
    unsent = b""  # bytes of the answer that the socket has not accepted yet
    is_ending = False  # close when `unsent` is sent

    def __init__(self, server, sock, addr, adj, map):
        super().__init__(sock, map)
        self.server, self.addr, self.adj, self.connected = server, addr, adj, True
        server.channels.add(self)
        self.begin_idling()

    def begin_idling(self):
        # When the client connected, became idle, or began a request while idle. A pipelined request
        # does not renew `since`.
        self.since = time.monotonic()
        self.closes_at = self.since + IDLE_SECONDS

    def readable(self):
        if self.answer:
            # Read during a long poll as well, or nobody would notice that the client has left.
            return self.answer in self.server.waiting and len(self.unread) < self.adj.recv_bytes
        return not (self.unread or self.unsent)

    def writable(self):
        return len(self.unsent) > 0

    def handle_read(self):
        is_idle = not (self.request or self.unread or self.answer)
        self.unread += self.recv(self.adj.recv_bytes)
        if self.unread.startswith(TLS_HANDSHAKE) and not (self.request or self.answer):
            if not said_limiter.try_once({"TLS": TLS_WARNINGS}):
                log.warning("a client speaks TLS (https) to this port of plain HTTP")
            self.handle_close()
            return
        self.read()
        if is_idle and (self.request or self.answer):
            self.since = time.monotonic()

    def read(self):
        """Parse the received bytes, up to the end of one request.

        Bytes after the request stay in `unread` until the answer is sent.
        """
        if not (self.request or self.answer):
            # Blank lines before a request are allowed (RFC 9112, section 2.2).
            self.unread = self.unread.lstrip()
        while self.unread and not self.answer:
            if not self.request:
                self.request = StrictRequest(self.adj)
                self.closes_at = time.monotonic() + REQUEST_SECONDS
            read = self.request.received(self.unread)
            self.unread = self.unread[read:]
            if self.request.completed:
                self.answer, self.request = Answer(self, self.request), None
                self.closes_at = math.inf
                self.server.arrived.append(self.answer)
        if self.request and self.request.expect_continue:
            self.request.expect_continue = False
            self.unsent = b"HTTP/1.1 100 Continue\r\n\r\n"
            self.handle_write()

    def let_go(self, is_stored=True):
        """Send the finished part of the answer. If the commit failed, a 2xx becomes a 503."""
        answer = self.answer
        if not self.connected:
            return
        if not is_stored and answer.status.startswith("2"):
            answer.refuse(NotStored)
        self.unsent, answer.written = memoryview(answer.written), b""
        self.closes_at = time.monotonic() + STUCK_SECONDS
        if not answer.pieces:
            self.answer, self.is_ending = None, answer.closes
        self.handle_write()
        if self.unsent:
            self.server.bound_unsent()

    def handle_write(self):
        """Send as many bytes as the socket accepts.

        When all are sent, close, or have the next piece made, or read the next request.
        """
        try:
            sent = self.send(self.unsent)
        except OSError as error:
            log.info(f"a client cannot be reached: {error}")
            self.handle_close()
        if not self.connected:
            return
        self.unsent = self.unsent[sent:]
        if self.unsent:
            if sent and not self.request:
                self.closes_at = time.monotonic() + STUCK_SECONDS
        elif self.is_ending:
            self.handle_close()
        elif self.answer:
            self.closes_at = math.inf
            self.server.pools["lists"].put(self.answer)
        elif not self.request:
            self.read()
            if not (self.request or self.answer):
                self.begin_idling()

    def handle_close(self):
        self.server.channels.discard(self)
        self.server.waiting.pop(self.answer, None)
        # The answer refers to the channel: without this line only the garbage collector would
        # free the two.
        self.answer = None
        self.close()

    # HTTP has no urgent data, and poll() would report urgent data again and again.
    handle_expt = handle_close

    def has_held_on(self, at):
        """Return the seconds since `since`, less a bonus, for find_longest() to compare.

        The bonus is ANSWER_SECONDS in the first second after `since`, and ANSWER_SECONDS + 1 while
        an answer is being made or sent.
        """
        seconds = at - self.since
        if self.unsent or (self.answer and self.answer not in self.server.waiting):
            return seconds - ANSWER_SECONDS - 1
        return seconds - (ANSWER_SECONDS if seconds < 1 else 0)


class FairQueue(queue.Queue):
    """Queue a pool's answers, so that client addresses take turns however much each one asks.

    None in place of an answer tells a thread of the pool to end.
    """

    def _init(self, maxsize):
        self.by_address = OrderedDict()

    def _qsize(self):
        return sum(map(len, self.by_address.values()))

    def _put(self, answer):
        self.by_address.setdefault(answer and answer.addr[0], deque()).append(answer)

    def _get(self):
        address, answers = self.by_address.popitem(last=False)
        answer = answers.popleft()
        if answers:
            self.by_address[address] = answers
        return answer


class Server(TcpWSGIServer):
    """Serve HTTP on a listening socket: waitress with our rounds, pools, limits and JSON errors.

    Requests that arrived together are a round: served on one thread, because handing a request to
    another thread costs more than serving the request, and committed once. A request that would
    hold up the serving thread goes to a worker pool, whose threads may wait.

    If a round's commit fails, each success of the round is sent as 503, and nothing is stored
    (serve_writers). On SIGTERM, waiting requests are answered at once, and requests in a pool have
    STOP_SECONDS / 2 to finish (serve). A client that reads nothing is closed after STUCK_SECONDS
    (close_slow), or earlier if a new client needs the connection (let_in) or too many bytes are
    unsent (bound_unsent).
    """

    channel_class = Channel

    def __init__(self, sock):
        self.channels = set()
        self.arrived = deque()  # answers to be made
        self.made = deque()  # answers, or pieces of answers, that a pool has made
        self.waiting = {}  # {Answer of a waiting request: the user's row when the wait began}
        news.wake = self.pull_trigger
        self.is_ending = self.is_asked = False
        self.map = {}  # {descriptor: channel, server or trigger}, for wasyncore
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        super().__init__(
            app,
            self.map,
            _sock=sock,
            # Never used, but without a dispatcher waitress would start threads.
            dispatcher=self,
            bind_socket=False,
            ident=None,
            max_request_body_size=MAX_MESSAGE_BODY_BYTES,
            max_request_header_size=16 * 1024,
        )
        self.pools = {pool: FairQueue() for pool in POOLS}
        for pool in Counter(POOLS).elements():
            start_thread(pool, self.work, pool)

    def work(self, pool):
        """Make answers in a thread of a worker pool, until None comes from the queue."""
        while answer := self.pools[pool].get():
            try:
                # Skip the work if the client has left.
                if answer.asker.connected:
                    answer.go_on() if answer.pieces else answer.make(pool)
            except Elsewhere as elsewhere:
                self.pools[elsewhere.args[0]].put(answer)
            else:
                self.made.append(answer)
                self.pull_trigger()

    def serve(self):
        """Serve until end() is called, then answer the requests that are left.

        Every client depends on this thread, so the thread waits for nothing but the disk. After
        end(), waiting requests are answered at once, and answers in a pool have STOP_SECONDS / 2.
        """
        # With path = None, the connection to the database is opened again, with this patience.
        local.patience, local.path = SERVING_PATIENCE_SECONDS, None
        looks_at = time.monotonic()
        while not self.is_ending:
            is_busy = self.arrived or (news.is_new and self.waiting)
            self.poll(0 if is_busy else self.time_to_wait())
            self.end_waiting()
            self.serve_round()
            if time.monotonic() >= looks_at:
                looks_at = time.monotonic() + 1
                self.close_slow(time.monotonic())
                # Another process may have committed, and cannot set the flag.
                news.is_new = True
        self.end_waiting(is_over=True)
        self.serve_round()
        ends_at = time.monotonic() + STOP_SECONDS / 2
        while time.monotonic() < ends_at and any(
            channel.answer or channel.unsent for channel in self.channels
        ):
            self.poll(STOP_SECONDS / 20)
        for pool in Counter(POOLS).elements():
            self.pools[pool].put(None)

    def end(self, *_):
        """Make serve() return. No lock is taken, so a signal handler may call end() at any time."""
        self.is_ending = True
        self.pull_trigger()

    def poll(self, seconds):
        """Wait up to `seconds` for sockets and pools, then read, send, and let clients connect."""
        wasyncore.loop(seconds, use_poll=True, map=self.map, count=1)
        while self.made:
            self.made.popleft().asker.let_go()
        self.let_in()

    def bound_unsent(self):
        """Close the channel with the most unsent bytes if the sum of all exceeds UNSENT_BYTES."""
        if sum(len(channel.unsent) for channel in self.channels) > UNSENT_BYTES:
            max(self.channels, key=lambda channel: len(channel.unsent)).handle_close()

    def wait_for_news(self, answer, user, until):
        """Keep a request until there is news, or answer at once if too many requests wait."""
        answer.waits_until = until
        of_user = sum(waiting["id"] == user["id"] for waiting in self.waiting.values())
        most = min(WAITING, settings.connections // 2)
        if len(self.waiting) < most and of_user < WAITING_OF_A_USER:
            self.waiting[answer] = user
        else:
            answer.waits_until = 0
            self.arrived.append(answer)

    def time_to_wait(self):
        """Return the seconds until the first long poll is over, at most one."""
        first = min((answer.waits_until for answer in self.waiting), default=math.inf)
        return max(0, min(1, first - ticks()))

    def end_waiting(self, is_over=False):
        """Put waiting requests back into `arrived` if they have news or their time is over.

        With is_over, the time of every request is over.
        """
        changes = None
        if news.is_new and self.waiting:
            # Clear the flag before reading: a commit during the read sets the flag again.
            news.is_new = False
            user_ids = [user["id"] for user in self.waiting.values()]
            try:
                changes = list_changes(connection(), user_ids)
            except sqlite3.Error as error:
                # serve() looks for changes again within a second.
                log.error(f"waiting requests hear of no news: {error}")
        for answer, user in list(self.waiting.items()):
            if is_over:
                answer.waits_until = 0
            # An erased user has no entry in `changes`: answered too.
            is_changed = changes is not None and changes.get(user["id"]) != user["changes"]
            if is_changed or answer.waits_until <= ticks():
                del self.waiting[answer]
                self.arrived.append(answer)

    def make_here(self, answer, pool=None):
        """Make an answer on this thread. Returns False if the request waits or moves to a pool."""
        try:
            if answer.asker.connected:
                answer.make(pool)
            return True
        except WaitForNews as waits:
            self.wait_for_news(answer, *waits.args)
        except Elsewhere as elsewhere:
            self.pools[elsewhere.args[0]].put(answer)
        return False

    def serve_round(self):
        """Serve all requests that arrived: first the reads, then the others in one transaction."""
        readers, writers = [], deque()
        while self.arrived:
            answer = self.arrived.popleft()
            is_reader = answer.request.command in ("GET", "HEAD", "OPTIONS")
            (readers if is_reader else writers).append(answer)
        # Reads come first: after a write, reads would see rows whose commit may still fail.
        # All answers are sent together: sent one by one, clients would fall out of step, and the
        # next round would be smaller.
        for answer in [answer for answer in readers if self.make_here(answer)]:
            answer.asker.let_go()
        if writers:
            self.serve_writers(writers)

    def serve_writers(self, waiting):
        """Serve the requests of a round in one transaction, and send no success before the commit.

        If the commit fails, every 2xx becomes a 503, even for a request that wrote nothing: the
        answer may rest on rows that another request of the round wrote. Refusals are sent as made.
        """
        served = []
        is_begun = is_stored = False
        try:
            with transaction() as db:
                is_begun = True
                # On a full disk SQLite rolls the transaction back. The round is lost; requests not
                # served yet come in the next round.
                while waiting and db.in_transaction:
                    answer = waiting.popleft()
                    if self.make_here(answer):
                        served.append(answer)
            is_stored = True
        except sqlite3.Error as error:
            if is_begun:
                log.error(f"a round of {len(served)} requests could not be stored: {error}")
        # While another writer keeps the lock, only the first round waits for the lock.
        local.patience = SERVING_PATIENCE_SECONDS if is_begun else 0
        for answer in served:
            answer.asker.let_go(is_stored)
        # The requests left in `waiting` have had no effect yet.
        for answer in waiting:
            if is_begun:
                self.arrived.append(answer)
            elif self.make_here(answer, NO_ROUND):
                # With NO_ROUND, a request that reaches a route moves to a pool, to wait for the
                # lock. So this answer is a refusal that was made before.
                answer.asker.let_go()

    def close_slow(self, at):
        """Close the channels whose time, closes_at, is over."""
        for channel in list(self.channels):
            if at > channel.closes_at:
                channel.handle_close()

    def find_longest(self):
        """Return the channel to close for a new client: the one whose has_held_on() is highest.

        An address with half of all channels or more gives up a channel first. Returns None if every
        client waits for news.
        """
        at, half = time.monotonic(), len(self.channels) / 2
        counts = Counter(channel.addr[0] for channel in self.channels)
        return max(
            (
                channel
                for channel in self.channels
                if channel.unread or channel.answer not in self.waiting
            ),
            key=lambda channel: (counts[channel.addr[0]] >= half, channel.has_held_on(at)),
            default=None,
        )

    def readable(self):
        return len(self.channels) < settings.connections or bool(self.find_longest())

    def handle_accept(self):
        """Note that a client wants to connect; let_in() accepts after wasyncore.loop().

        A socket accepted in the middle of the loop could get the descriptor of a socket just
        closed, and receive the events found for the closed socket.
        """
        self.is_asked = True

    def let_in(self):
        """Accept some new clients, each in place of an old client if all connections are in use."""
        for _ in range(1 + settings.connections // 4):
            if not self.is_asked:
                break
            count = len(self.channels)
            longest = self.find_longest() if count >= settings.connections else None
            if longest or count < settings.connections:
                super().handle_accept()
            self.is_asked = len(self.channels) > count
            if self.is_asked and longest:
                longest.handle_close()


# --- Main -----------------------------------------------------------------------------------------
# Read the settings, open the store, start the background threads, serve, stop.


def tidy_setting(name, value):
    """Return a setting without blanks around. Raises BadSetting for a control character."""
    value = value.strip()
    if re.search("[\x00-\x1f\x7f-\x9f]", value):
        raise BadSetting(f"{name} holds a control character: write it anew, without.")
    return value


def read_variable(name, default=None):
    """Return an environment variable, or the default if unset or empty. Raises BadSetting."""
    return tidy_setting(name, os.environ.get(name, "")) or default


def read_secret(name):
    """Return a secret from the variable NAME, or from the file that NAME_FILE names.

    Returns None if neither is set. Raises BadSetting if both are, or if the file is empty or cannot
    be read.
    """
    value, path = read_variable(name), read_variable(f"{name}_FILE")
    if not path:
        return value
    try:
        held = tidy_setting(path, Path(path).read_text("utf-8-sig", "surrogateescape"))
    except OSError as error:
        raise BadSetting(f"{name}_FILE names {path}, which cannot be read ({error}).") from None
    if value or not held:
        raise BadSetting(f"{name}_FILE names an empty file, or {name} is set too: mend one.")
    return held


def read_option(name, pattern, value):
    """Return an option's value without blanks around. Raises BadSetting if the value is wrong."""
    value = tidy_setting(f"--{name}", value)
    if not re.fullmatch(pattern, value, re.IGNORECASE):
        raise BadSetting(f"--{name} cannot be {value!r}: see --help.")
    return value


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadSetting(f"{message.rstrip('.')}. See --help.")


def read_arguments(argv):
    """Return the command line, with defaults from the environment. Raises BadSetting."""
    parser = Parser(
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""environment:
  FACTORYAPP_HOST, FACTORYAPP_PORT, FACTORYAPP_DB, FACTORYAPP_TRUSTED_PROXY,
  FACTORYAPP_REGISTRATION, FACTORYAPP_KEEP_DAYS,
  FACTORYAPP_LOG_LEVEL  the same as the options; an option wins
  TELEGRAM_BOT_TOKEN    the bot's token from @BotFather; without it the bot talks in this terminal
  TELEGRAM_API_URL      Bot API server to use (default https://api.telegram.org)
  FACTORYAPP_SECRET     key that signs the JWTs, at least 32 bytes (default: one in the database)
  TELEGRAM_BOT_TOKEN_FILE, FACTORYAPP_SECRET_FILE  files that hold them instead""",
    )
    parser.add_argument("--version", action="version", version=f"FactoryApp {VERSION}")
    parser.add_argument(
        "--trusted-proxy",
        type=networks,
        default=read_variable("FACTORYAPP_TRUSTED_PROXY"),
        help="reverse proxies (addresses, networks) whose X-Forwarded-… is believed",
    )
    administration = parser.add_mutually_exclusive_group()
    for name, explanation in (
        (
            "set-password",
            "set the password of the account NAME, or make it, and end its tokens and keys",
        ),
        (
            "disable",
            "end the tokens and keys of the account NAME, unlink its chat, let no password fit",
        ),
        ("erase", "delete NAME and every message that it sent or received"),
    ):
        administration.add_argument(
            f"--{name}",
            metavar="NAME",
            type=account_name,
            help=f"{explanation}; a server may run",
        )
    parser.add_argument("--yes", action="store_true", help="erase without asking")
    administration.add_argument(
        "--accounts",
        action="store_true",
        help="list the accounts: since when, linked to which bot, whether disabled",
    )
    for name, default, pattern, explanation in (
        ("host", "127.0.0.1", ".+", "address to listen on (default 127.0.0.1)"),
        ("port", "8080", "[0-9]{1,5}", "port to listen on, 0 for any (default 8080)"),
        ("db", "factoryapp.db", ".+", "database file (default factoryapp.db)"),
        (
            "registration",
            "open",
            "open|closed",
            "who may make an account: open (anybody) or closed (--set-password) (default open)",
        ),
        (
            "keep-days",
            "0",
            "[0-9]{1,4}",
            "days that messages are kept, unless they are queued; 0: for ever (default 0)",
        ),
        (
            "log-level",
            None,
            "debug|info|warning|error",
            "lines to log: debug, info (one a request), warning or error (default info; warning "
            "while the bot talks in this terminal)",
        ),
    ):
        parser.add_argument(
            f"--{name}",
            type=partial(read_option, name, pattern),
            default=read_variable("FACTORYAPP_" + name.upper().replace("-", "_"), default),
            help=explanation,
        )
    return parser.parse_args(argv)


def account_name(text):
    """Return the canonical form of a username. Raises argparse.ArgumentTypeError."""
    try:
        return USERNAME_FIELD.read(text)
    except Refused as refused:
        raise argparse.ArgumentTypeError(" ".join(refused.args)) from None


def networks(text):
    """Return the IP networks in a text, separated by commas or blanks. Raises ValueError."""
    return [
        ipaddress.ip_network(name if "/" in name else read_address(name), strict=False)
        for name in text.replace(",", " ").split() or [text]
    ]


def allow_files():
    """Raise the limit of open files, or lower settings.connections to fit the limit.

    Raises BadSetting if fewer than LEAST_CONNECTIONS fit.
    """
    if not resource:
        return
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OWN_FILES + CONNECTIONS
    files = max(files, wanted if most == resource.RLIM_INFINITY else min(wanted, most))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    settings.connections = min(CONNECTIONS, files - OWN_FILES)
    if settings.connections < LEAST_CONNECTIONS:
        raise BadSetting(
            f"{files} open files are too few: allow {wanted} (ulimit -n, or LimitNOFILE)."
        )


def choose_home(token):
    """Return the bot's transport: Telegram, or Terminal without a token. Raises BadSetting."""
    if not token:
        return Terminal()
    if not re.fullmatch("[1-9][0-9]{0,17}:[A-Za-z0-9_-]+", token):
        raise BadSetting(
            "TELEGRAM_BOT_TOKEN is malformed: copy it whole from @BotFather, it looks like "
            "123456789:AAE3xyz."
        )
    api_url = read_variable("TELEGRAM_API_URL", "https://api.telegram.org")
    with suppress(ValueError):
        parts = urllib.parse.urlsplit(api_url)
        # Reading .port raises ValueError if the port is no number up to 65535.
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return Telegram(token, api_url)
    raise BadSetting("TELEGRAM_API_URL is malformed: it looks like https://api.telegram.org.")


def listen(host, port):
    """Return a listening socket. A socket on "::" serves IPv4 as well. Raises BadSetting."""
    host = host.strip("[]")
    is_ipv6 = ":" in host
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=is_ipv6 and socket.has_dualstack_ipv6(),
        )
    except (OSError, OverflowError, ValueError, TypeError) as error:
        raise BadSetting(
            f"Cannot listen on {host} port {port} ({error}): choose another --host or --port, or "
            "end what uses it."
        ) from None


class Plain(logging.Formatter):
    """Format a log message as one line, with unprintable characters escaped as in "\\x1b".

    Any text that looks like an API key, a link token, a bot token or a part of a JWT is masked.
    """

    @staticmethod
    def show(text):
        text = re.sub("[A-Za-z0-9_-]{35,}", "…", text)
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

    def formatMessage(self, record):
        return self.show(super().formatMessage(record))

    def formatException(self, ei):
        return "\n".join(map(self.show, super().formatException(ei).split("\n")))


def prepare_process():
    """Make new files private, set up the log, and let standard output take any character."""
    os.umask(0o077)
    handler = logging.StreamHandler()
    handler.setFormatter(Plain("%(asctime)s %(levelname)s %(message)s"))
    start_thread("log", write_log, handler)
    # When log_lines is full, lines are lost silently: if nobody reads standard error, a report
    # there would block.
    logging.raiseExceptions = False
    logging.basicConfig(level=logging.WARNING, handlers=[LogHandler(log_lines)])
    # These loggers print URLs, and the bot's token is part of the URL.
    for noisy in ("urllib3", "TeleBot"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL + 1)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(encoding="utf-8", errors="replace")


def read_settings(argv):
    """Fill `settings` from the command line and the environment. Raises BadSetting.

    Returns the command line's arguments and the bot's transport.
    """
    arguments, token = read_arguments(argv), read_secret("TELEGRAM_BOT_TOKEN")
    log_level = arguments.log_level or ("info" if token else "warning")
    logging.getLogger().setLevel(log_level.upper())
    settings.db = os.path.realpath(arguments.db)
    settings.trusted_proxies = arguments.trusted_proxy or ()
    settings.registration = arguments.registration.lower()
    settings.keep_days = int(arguments.keep_days)
    settings.secret = os.fsencode(read_secret("FACTORYAPP_SECRET") or "") or None
    if settings.secret and len(settings.secret) < SECRET_MIN_BYTES:
        raise BadSetting(
            f"FACTORYAPP_SECRET is too short: give it at least {SECRET_MIN_BYTES} bytes, or leave "
            "it out."
        )
    return arguments, choose_home(token)


def ask_password(name):
    """Return the hash of an account's new password.

    The password is typed twice at a terminal; otherwise the password is the first line of standard
    input. Raises BadSetting.
    """
    # Without KeyboardInterrupt, Ctrl-C would leave the terminal without an echo.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if sys.stdin.isatty():
            password = getpass.getpass("Password: ")
            if getpass.getpass("The same again: ") != password:
                raise BadSetting("The two passwords are not the same: try again.")
        else:
            password = sys.stdin.buffer.readline().decode().rstrip("\r\n")
        return hash_password(NEW_PASSWORD_FIELD.read(password, name))
    except Refused as refused:
        raise BadSetting(f"The password cannot be taken: {' '.join(refused.args)}") from None
    except (AttributeError, EOFError, KeyboardInterrupt, OSError, ValueError) as error:
        # The text of the error may hold the typed password: show only the type.
        reason = type(error).__name__
        raise BadSetting(f"No password could be read ({reason}): try again.") from None


def confirm(name):
    """Ask whether to erase an account. Raises BadSetting unless the account's name is typed."""
    typed = None
    with suppress(AttributeError, EOFError):
        typed = sys.stdin.isatty() and input(f"To erase {name} for ever, type the name: ")
    if typed != name:
        raise BadSetting("Nothing was erased: type the name at a terminal, or add --yes.")


def administer(name, password_hash, is_erased=False):
    """Set an account's password, or disable the account (password_hash None), or erase the account.

    Setting a password adds a missing account. A server of the same version may run meanwhile.
    Raises BadSetting, sqlite3.Error.
    """
    log.setLevel(logging.ERROR)
    nobody = BadSetting(f"There is no account {name} in the database {settings.db}.")
    done = "its password is set, its tokens and keys have ended" if password_hash else "disabled"
    if not password_hash and not check_store():
        raise nobody
    open_store()
    with transaction() as db:
        if user := find_user_by_name(db, name):
            set_password(db, user["id"], user["password"], password_hash or nobodys_hash())
        elif password_hash:
            if add_user(db, name, password_hash) is None:
                raise BadSetting(f"There is an account {name} in another case already.")
            done = "its account is made"
        else:
            raise nobody
        if not password_hash:
            delete_all_scheduled(db, user["id"])
            if chat := find_chat(db, user["id"]):
                unlink_chat(db, chat, "the account was disabled")
    if is_erased:
        erase(user)
        done = "erased"
    announce(f"{name}: {done}")


def erase(user):
    """Delete a user and every message that the user sent or received, and overwrite the data.

    One transaction deletes a portion, so that a server running meanwhile can write in between.
    """
    is_more = True
    while is_more:
        with transaction() as db:
            is_more = erase_some(db, user)
        time.sleep(PORTION_PAUSE_SECONDS)
    close_store()


def print_accounts():
    """Print all accounts: a table on a terminal, else lines separated by tabs."""
    with closing(connect("ro")) as db:
        rows = list_accounts(db)
    if sys.stdout.isatty():
        rows.insert(0, ("name", "id", "since", "bot", "linked since", "state"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows = [map(str.ljust, row, widths) for row in rows]
    announce("\n".join(map("\t".join, rows)))


def start_workers(home, stop):
    """Start the background threads: polling, upkeep, outbox."""
    running.home = home
    turns.open(home.id, list_queues(connection(), home.id))
    if elsewhere := count_elsewhere(connection(), home.id):
        log.warning(f"{elsewhere} accounts are linked to another bot: they have to link again")
    start_thread("polling", home.run, stop)
    start_thread("upkeep", run_upkeep, home, stop)
    start_thread("outbox", run_outbox, home, stop)


def close_store():
    """Copy the write-ahead log into the database, and empty the log."""
    try:
        connection().wait_for_others(0.2)
        connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        # Nothing is lost: the next start reads the log.
        log.warning(f"the write-ahead log was left as it is: {error}")


def serve(sock, home):
    """Start the background threads, serve until SIGTERM or Ctrl-C, and stop cleanly."""
    stop = threading.Event()
    server = Server(sock)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.end)
    if hasattr(signal, "SIGTTIN"):
        # By default, reading the terminal from the background would stop the process.
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    host, port = sock.getsockname()[:2]
    shown_host = f"[{host}]" if ":" in host else host
    address = f"http://{shown_host}:{port}"
    announce(
        f"FactoryApp listens on {address} (Ctrl-C ends it)\n"
        f"database: {settings.db}\n{home.greeting}"
    )
    start_workers(home, stop)
    server.serve()
    sock.close()
    stop.set()
    # Wait for the senders, but not for the polling thread, whose call may last long: Telegram
    # sends unconfirmed updates again.
    turns.close()
    close_store()


def main(argv=None):
    """Obey the command line: serve, or administer accounts. Returns the exit code."""
    try:
        prepare_process()
        check_sqlite()
        allow_files()
        arguments, home = read_settings(argv)
        version = check_store()
        if arguments.accounts:
            if version:
                print_accounts()
            return 0
        name = arguments.set_password or arguments.disable or arguments.erase
        if arguments.erase and not arguments.yes:
            confirm(name)
        # Ask before taking the lock: typing takes time, and a server must be able to start
        # meanwhile.
        password_hash = ask_password(name) if arguments.set_password else None
        try:
            lock = lock_database()
        except AlreadyRunning:
            if not name or check_store() != SCHEMA_VERSION:
                raise
        if name:
            administer(name, password_hash, bool(arguments.erase))
            return 0
        sock = listen(arguments.host, int(arguments.port))
        open_store()
        serve(sock, home)
    except (BadSetting, sqlite3.Error) as error:
        said = error if isinstance(error, BadSetting) else cannot_be_used(error)
        print(f"factoryapp: {said}", file=sys.stderr)
        return 2
    lock.close()
    return 0


if __name__ == "__main__":
    end(main())
