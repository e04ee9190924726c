"""FactoryApp: an HTTP API whose messages a Telegram bot repeats in the chats that people linked to their accounts.

One message's journey:
  1. POST /api/messages/ checks who asks and what is sent (HTTP);
  2. one transaction stores the message and an outbox row for each Telegram message it becomes (Store);
  3. once that is on disk, 201 is answered;
  4. a sender thread takes the oldest row of a chat nobody else is sending to, sends it, and settles it (Outbox);
  5. what people write to the bot arrives on the polling thread and takes the same way (Bot).

Run it with `python factoryapp.py`; `--help` lists the settings. Without a bot token the bot talks in the terminal.
"""

import argparse
import base64
import fcntl
import functools
import hashlib
import hmac
import io
import ipaddress
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import signal
import socket
import sqlite3
import sys
import threading
import time
import unicodedata
import urllib.parse
from collections import OrderedDict, deque
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import GeneratorType

try:
    import jwt
    import requests
    import telebot
    import waitress
    from bottle import HTTP_CODES, Bottle, HTTPError, HTTPResponse, request, response
    from telebot import apihelper
    from waitress import wasyncore
    from waitress.buffers import OverflowableBuffer
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.task import ErrorTask, ThreadedTaskDispatcher
    from waitress.utilities import BadRequest
except ModuleNotFoundError as error:
    print(
        f"factoryapp: the package {error.name} is missing: start as README.md says, or install requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)

# --- Settings ---------------------------------------------------------------------------------------------------------
# What the operator sets is in `settings`, filled by main(); what we decided is a constant, its unit in its name.

SCHEMA_VERSION = 1
APPLICATION_ID = (
    0x46614170  # "FaAp", in the database's header: nobody else's file is taken for ours
)
ACCESS_TOKEN_SECONDS = 5 * 60
REFRESH_TOKEN_SECONDS = 24 * 3600
LINK_TOKEN_SECONDS = 10 * 60
SECRET_MIN_BYTES = 32  # RFC 7518, section 3.2

MAX_USERNAME = 150  # code points, as the other MAX_ lengths
MIN_PASSWORD = 8
MAX_PASSWORD = 1024
MAX_TEXT = 16_384
MAX_BODY_BYTES = 64 * 1024
MAX_MESSAGE_BODY_BYTES = (
    12 * MAX_TEXT + 4096
)  # JSON may spell one code point as 12 bytes: \ud83d\ude00
MAX_ID = 2**63 - 1  # SQLite's
MAX_PAGE_ROWS = 1000  # that a client may ask for
LIST_PAGE_ROWS = 200  # that are read at a time
TOKENS_REMEMBERED = 2000
CHECKPOINT_COMMITS = 50
WAL_LONG_FRAMES = 1500  # of 4 KiB
WAL_PATIENCE_MILLISECONDS = 100

SCRYPT = {
    "n": 2**15,
    "r": 8,
    "p": 3,
}  # OWASP's password storage cheat sheet; 32 MiB and about 170 ms
HASHES_AT_ONCE = 2
IDEMPOTENCY_SECONDS = 24 * 3600
SEND_AHEAD_SECONDS = 30 * 24 * 3600
LOGIN_WINDOW_SECONDS = 5 * 60
LOGIN_FAILURES_PER_NAME = 10  # from one address, in the window
LOGIN_FAILURES_PER_ADDRESS = 100
LOGIN_KEYS_REMEMBERED = 10_000

TELEGRAM_MAX_TEXT = 4096  # code points in one message (Bot API, sendMessage)
SENDERS = 16  # threads
SENDS_PER_SECOND = 30  # Telegram's limit for one bot
SENDS_BURST = 5  # at once, so that the network's jitter makes no second of more than that
SEND_TIMEOUT_SECONDS = 15
LONG_POLL_SECONDS = 25
BACKOFF_MAX_SECONDS = 5 * 60
POLL_BACKOFF_MAX_SECONDS = 30
RETRY_AFTER_MAX_SECONDS = 3600  # more than Telegram ever asked for
UPDATE_TRIES = 3

PATIENT_THREADS = 4
CONNECTIONS = 200
OPEN_FILES = 8192  # connections, and answers that are not taken yet
REQUEST_SECONDS = 10  # to send a whole request, or to take some of an answer
REQUEST_SECONDS_CROWDED = 2  # the same, with every connection taken
DATABASE_BUSY_SECONDS = 5  # how long a write waits for others, before 503
PATIENCE_SECONDS = (
    0.01  # how long one does on the thread that serves everybody, before it goes to another
)
MAX_UNTAKEN_BYTES = (
    256 * 1024**2
)  # of answers that a client has yet to take, before a thread waits for it
STOP_SECONDS = 1  # what a clean stop grants to those at work

log = logging.getLogger("factoryapp")


class settings:
    """What main() was told; tests set it too."""

    db = "factoryapp.db"
    secret = None  # bytes: FACTORYAPP_SECRET, in place of the key in the database
    trusted_proxy = None  # address whose X-Forwarded-For is believed


def now():
    """Seconds since 1970."""
    return time.time()


def ticks():
    """Seconds that only go forward, for pauses and paces: the clock may be set back."""
    return time.monotonic()


def iso(seconds):
    """ISO 8601 in UTC, to the microsecond, as Django REST framework writes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# --- Long texts -------------------------------------------------------------------------------------------------------


def is_inside_cluster(text, i):
    """Whether a cut before text[i] would go through what people see as one character (the usual cases of UAX #29)."""
    before, after = text[i - 1], text[i]
    is_flag = [0x1F1E6 <= ord(c) <= 0x1F1FF for c in (before, after)]
    if all(is_flag):  # flags are pairs of these letters: count those before the cut
        return len(re.search("[\U0001f1e6-\U0001f1ff]*$", text[max(0, i - 256) : i])[0]) % 2 == 1
    return (
        unicodedata.category(after) in ("Mn", "Mc", "Me")
        or "\u200d" in (before, after)  # accents, joined emoji
        or after in "\u200c\u0e33\u0eb3\uff9e\uff9f"
        or "\U0001f3fb" <= after <= "\U0001f3ff"  # vowels, skin tones
        or "\U000e0020" <= after <= "\U000e007f"
        or before + after == "\r\n"
        or "\u1160" <= after <= "\u11ff"
        or "\u1100" <= before <= "\u115f"
        and "\u1100" <= after <= "\ud7a3"  # Hangul
        or unicodedata.combining(before) == 9
        and after.isalpha()
    )  # Indic conjuncts


def split_text(text, limit=TELEGRAM_MAX_TEXT):
    """The text as parts of at most `limit` code points, none blank: cut after a line or word that ends in a part's second half."""
    parts = []
    while len(text) > limit:
        cuts = [i for i in range(limit, limit // 2, -1) if not is_inside_cluster(text, i)] or [
            limit
        ]
        after_line = (i for i in cuts if text[i - 1] == "\n")
        after_word = (i for i in cuts if text[i - 1].isspace())
        cut = next(after_line, None) or next(after_word, cuts[0])
        parts.append(text[:cut])
        text = text[cut:]
    return [part for part in (*parts, text) if part.strip()]


# --- Turns ------------------------------------------------------------------------------------------------------------
# Who sends to which chat when. The Store wakes it after each commit, the Outbox's senders take turns.


class Turns:
    """Which chats have something queued, when each is due, and which are being sent to: one sender a chat, the pace of all.

    Kept in memory alone, since one process owns the database: what was in flight when it died is due again at the next start.
    """

    def __init__(self):
        self.changed = threading.Condition()
        self.open(None, ())

    def open(self, bot_id, queues):
        """Start with what the outbox holds for this bot: (chat id, seconds until it is due) pairs. Without a bot, end."""
        with self.changed:
            self.bot_id, self.busy = (
                bot_id,
                {},
            )  # chat: the outbox row being sent to it, None before it is known
            self.hurried = set()  # chats that were busy when hurry() was called
            self.due = {chat_id: ticks() + pause for chat_id, pause in queues}
            self.pauses = {}  # chats that wait since a send failed: whether Telegram told them to
            self.suspects = set()  # chats whose last send failed: they may hang again
            self.sent_at = deque(maxlen=SENDS_PER_SECOND)
            self.changed.notify_all()

    def wake(self, bot_id, chat_id):
        """Something was queued for the chat. One that waits out a pause goes on waiting."""
        with self.changed:
            if bot_id == self.bot_id and chat_id not in self.pauses:
                self.due[chat_id] = min(self.due.get(chat_id, ticks()), ticks())
                self.changed.notify()

    def take(self, wait_seconds=0):
        """The chat that has been due the longest, or None when none is due in time. It must be given back."""
        patience_ends = time.monotonic() + wait_seconds
        with self.changed:
            while True:
                # Chats that may hang get half of the senders at most.
                barred = (
                    self.suspects if len(self.busy.keys() & self.suspects) >= SENDERS // 2 else ()
                )
                due_at, chat_id = min(
                    (
                        (at, chat)
                        for chat, at in self.due.items()
                        if chat not in self.busy and chat not in barred
                    ),
                    default=(float("inf"), None),
                )
                for sends in (SENDS_BURST, SENDS_PER_SECOND):
                    if len(self.sent_at) >= sends:
                        due_at = max(due_at, self.sent_at[-sends] + sends / SENDS_PER_SECOND)
                if due_at <= ticks():
                    del self.due[chat_id]
                    self.busy[chat_id] = None
                    self.pauses.pop(chat_id, None)
                    self.sent_at.append(ticks())
                    return chat_id
                pause = min(due_at - ticks(), patience_ends - time.monotonic())
                if pause <= 0 or self.bot_id is None:  # closed
                    return None
                self.changed.wait(pause)

    def claim(self, chat_id, delivery_id):
        """False when the delivery is being sent already, to the chat that its account had before."""
        with self.changed:
            if delivery_id in self.busy.values():
                return False
            self.busy[chat_id] = delivery_id
            return True

    def give_back(self, chat_id, pause=None, is_told=None):
        """The sender is done with the chat, which is due again in `pause` seconds; None: when something is queued for it.

        `is_told` after a failure: whether the pause is Telegram's wish.
        """
        with self.changed:
            self.busy.pop(chat_id, None)
            self.suspects.discard(chat_id)
            if is_told is False and chat_id in self.hurried:
                pause = min(pause, 1)
            self.hurried.discard(chat_id)
            if is_told is not None:
                self.due[chat_id], self.pauses[chat_id] = ticks() + pause, is_told
                self.suspects |= set() if is_told else {chat_id}
            elif pause is not None:
                self.due[chat_id] = min(ticks() + pause, self.due.get(chat_id, float("inf")))
            self.changed.notify()

    def hurry(self):
        """Telegram is back: what waited for that is due now. Chats that Telegram told to wait do."""
        with self.changed:
            for chat_id in [chat_id for chat_id, is_told in self.pauses.items() if not is_told]:
                self.due[chat_id] = ticks()
                del self.pauses[chat_id]
            self.hurried = set(self.busy)
            self.changed.notify_all()


turns = Turns()


# --- Store ------------------------------------------------------------------------------------------------------------
# One connection a thread. Functions take `db` first, so that the caller's `with transaction() as db:` shows what is atomic.


class BadSetting(Exception):
    """The server cannot start as it was told to; the text tells the operator what to do."""


class MustWait(BaseException):
    """Raised on the thread that serves everybody, by what would hold it up: Lanes does it again on a thread that may wait.

    Raised before anything has happened. A BaseException, since it is no error and must pass everybody who catches those.
    """


class MustHash(MustWait):
    """The same, by the hash of a password, which takes so long that it gets threads of its own."""


class Connection(sqlite3.Connection):
    """A thread's connection, with what its open transaction has to remember until the commit."""

    is_grouping = False  # transactions are not committed one by one, but together, by commit()
    transactions = 0  # begun so far
    is_lost = False  # SQLite took back the group's earlier transactions when a later one failed
    queued_for = frozenset()  # (bot id, chat id) of the chats that something was queued for


class Wal:
    """The write-ahead log's length, which we bound ourselves: SQLite's own checkpoints keep a failing disk to themselves."""

    commits = 0  # since the last checkpoint
    frames = 0  # in the log at the last checkpoint


local = threading.local()  # this thread's `db`, the `path` it is open on, and its `patience`
write_lock = threading.Lock()


def may_not_wait():
    """Whether this is the thread that serves everybody: it has some patience for other writers, in seconds, but not much."""
    return hasattr(local, "patience")


def database_uri(mode="rw"):
    """The database's SQLite URI. Only open_store() may make the file: where it has vanished, an empty one would be no database."""
    return f"file:{urllib.parse.quote(os.fsencode(settings.db))}?mode={mode}"


def file_identity(path):
    """(device, inode): it tells a file from another of its name. Raises OSError."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


opened_file = functools.cache(file_identity)  # the file's identity when open_store() opened it


def is_database_there():
    """Whether the file we opened is still the one of its name; what is written to another is lost at the next start."""
    try:
        return file_identity(settings.db) == opened_file(settings.db)
    except OSError:
        return False


def connection():
    """This thread's connection to the database, opened at first use."""
    if getattr(local, "path", None) != settings.db:
        db = sqlite3.connect(
            database_uri(),
            uri=True,
            timeout=0 if may_not_wait() else DATABASE_BUSY_SECONDS,
            isolation_level=None,
            factory=Connection,
        )
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA wal_autocheckpoint = 0")  # see checkpoint()
        local.db, local.path = db, settings.db
    return local.db


def begin(db):
    """Start a write, after those of other threads. Raises MustWait, or sqlite3.OperationalError when they take too long."""
    if not is_database_there():
        raise sqlite3.OperationalError("the database file was removed or replaced")
    if not write_lock.acquire(timeout=getattr(local, "patience", DATABASE_BUSY_SECONDS)):
        raise (
            MustWait
            if may_not_wait()
            else sqlite3.OperationalError("other threads write for too long")
        )
    try:
        db.execute("BEGIN IMMEDIATE")
    except BaseException as error:
        write_lock.release()
        raise MustWait if may_not_wait() and "locked" in str(error) else error
    db.queued_for, db.is_lost = set(), False


def commit(db):
    """Bring a write to the disk, then wake the senders. When it raises sqlite3.Error, nothing was stored."""
    try:
        if db.is_lost:
            raise sqlite3.OperationalError("an earlier part of the transaction was lost")
        with fsync_or_exit():
            db.execute("COMMIT")
        Wal.commits += 1
        if Wal.commits >= CHECKPOINT_COMMITS:
            checkpoint(db)
    finally:
        release(db)
    for bot_id, chat_id in db.queued_for:
        turns.wake(bot_id, chat_id)


@contextmanager
def fsync_or_exit():
    """End the process when the disk fails to store something: what memory holds can then no longer be trusted, since the
    kernel forgets what it could not write (https://wiki.postgresql.org/wiki/Fsync_Errors)."""
    try:
        yield
    except sqlite3.Error as error:
        if "FSYNC" in getattr(error, "sqlite_errorname", ""):
            log.critical(
                "the disk failed to store what was written: ending. Mend it, then start again"
            )
            os._exit(1)
        raise


def checkpoint(db):
    """Copy the write-ahead log into the database, so that it starts anew. Once it is long, wait a moment for those who read it."""
    is_long, Wal.commits = Wal.frames > WAL_LONG_FRAMES, 0
    try:
        if is_long:
            db.execute(f"PRAGMA busy_timeout = {WAL_PATIENCE_MILLISECONDS}")
        with fsync_or_exit():
            Wal.frames = db.execute(
                f"PRAGMA wal_checkpoint({'RESTART' if is_long else 'PASSIVE'})"
            ).fetchone()[1]
    except sqlite3.Error as error:
        log.warning(
            "the write-ahead log was not copied, and grows: %s", error
        )  # the commit itself is safe in it
    finally:
        if is_long:
            db.execute(
                f"PRAGMA busy_timeout = {0 if may_not_wait() else DATABASE_BUSY_SECONDS * 1000}"
            )


def release(db):
    """Let others write. What is not committed is gone."""
    try:
        if db.in_transaction:
            db.execute("ROLLBACK")
    finally:
        write_lock.release()


@contextmanager
def transaction():
    """One write, all or nothing, on disk when it ends; in a group, when that ends. Raises as begin() and commit() do."""
    db = connection()
    if not db.in_transaction:
        begin(db)
    db.transactions += 1
    db.execute("SAVEPOINT one")
    try:
        yield db
        db.execute("RELEASE one")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK TO one")
        else:
            db.is_lost = True  # some failures, like a full disk, take all back
        if not db.is_grouping:
            release(db)
        raise
    if not db.is_grouping:
        commit(db)


def check_store():
    """Raise BadSetting when the file that should be our database is something else; touch nothing."""
    try:
        if os.path.exists(settings.db) and not os.path.isfile(settings.db):
            raise BadSetting(f"The database {settings.db} is no file: name another with --db.")
        if os.path.exists(settings.db) and os.path.getsize(settings.db):
            with closing(sqlite3.connect(database_uri("ro"), uri=True)) as db:
                application_id, version, tables = db.execute("""
                    SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)
                    FROM pragma_application_id, pragma_user_version""").fetchone()
            if tables and application_id != APPLICATION_ID:
                raise BadSetting(
                    f"The database {settings.db} is another program's: name another file with --db."
                )
            if version > SCHEMA_VERSION:
                raise BadSetting(
                    f"The database {settings.db} is from a newer version of FactoryApp: start that version, or name "
                    "another file with --db."
                )
    except (OSError, sqlite3.Error) as error:
        raise BadSetting(
            f"The database {settings.db} cannot be used ({error}): name another file with --db."
        ) from None


def open_store():
    """Make or update the database. Raises BadSetting when that cannot be done."""
    try:
        with open(settings.db, "ab"):
            for path in filter(
                os.path.exists, (settings.db, settings.db + "-wal", settings.db + "-shm")
            ):
                os.chmod(path, 0o600)
        opened_file.cache_clear()
        opened_file(settings.db)
        db = connection()
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(
            f"BEGIN IMMEDIATE; {Path(__file__).with_name('schema.sql').read_text('utf-8')} "
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
        with transaction() as db:
            db.execute(
                "INSERT INTO signing_key (id, key) VALUES (1, ?) ON CONFLICT DO NOTHING",
                (secrets.token_bytes(SECRET_MIN_BYTES),),
            )
    except (OSError, sqlite3.Error) as error:
        raise BadSetting(
            f"The database {settings.db} cannot be used ({error}): name a file that can be written with "
            "--db."
        ) from None


@functools.cache
def signing_key(path):
    """The key of the database at `path`, at least 32 bytes."""
    return connection().execute("SELECT key FROM signing_key").fetchone()["key"]


def add_user(db, username, password_hash):
    """The new user's id. Raises sqlite3.IntegrityError when the name is taken."""
    return db.execute(
        "INSERT INTO users (username, password, created_at) VALUES (?, ?, ?)",
        (username, password_hash, iso(now())),
    ).lastrowid


def find_user(db, user_id):
    return db.execute(
        "SELECT id, username, tokens_from FROM users WHERE id = ?", (user_id,)
    ).fetchone()


def find_user_by_name(db, username):
    return db.execute(
        "SELECT id, username, password, tokens_from FROM users WHERE username = ?", (username,)
    ).fetchone()


def find_password(db, user_id):
    """The hash of the user's password."""
    return db.execute("SELECT password FROM users WHERE id = ?", (user_id,)).fetchone()["password"]


def set_password(db, user_id, old_hash, new_hash):
    """Change the password, and end every token issued until now. False when it is not the old one any more."""
    db.execute("DELETE FROM link_tokens WHERE user_id = ?", (user_id,))
    return (
        db.execute(
            "UPDATE users SET password = ?, tokens_from = ? WHERE id = ? AND password = ?",
            (new_hash, int(now()) + 1, user_id, old_hash),
        ).rowcount
        == 1
    )


def find_user_page_end(db, after, before, rows, order):
    """Of the first (order "ASC") or last ("DESC") so many users between two ids: the id at the far end and, if any, the next."""
    return db.execute(
        f"SELECT id FROM users WHERE id > ? AND id < ? ORDER BY id {order} LIMIT 2 OFFSET ? - 1",
        (after, before, rows),
    ).fetchall()


def list_users(db, after, before, rows):
    """The first users between two ids, both excluded: (id, JSON) rows."""
    return db.execute(
        """
        SELECT id, json_object('id', id, 'username', username) FROM users WHERE id > ? AND id < ? ORDER BY id LIMIT ?
        """,
        (after, before, rows),
    ).fetchall()


def add_blacklisted_token(db, jti, expires_at):
    """End a refresh token before its time, and forget those whose time has passed."""
    db.execute(
        "DELETE FROM blacklisted_tokens WHERE jti IN (SELECT jti FROM blacklisted_tokens WHERE expires_at < ? LIMIT 100)",
        (now(),),
    )
    db.execute(
        "INSERT INTO blacklisted_tokens (jti, expires_at) VALUES (?, ?) ON CONFLICT DO NOTHING",
        (jti, expires_at),
    )


def is_blacklisted(db, jti):
    return (
        db.execute("SELECT 1 FROM blacklisted_tokens WHERE jti = ?", (jti,)).fetchone() is not None
    )


def add_link_token(db, user_id, token, expires_at):
    """Remember a link token by its hash; the user's earlier one is dead from now on."""
    db.execute(
        "INSERT OR REPLACE INTO link_tokens (user_id, token_hash, expires_at) VALUES (?, ?, ?)",
        (user_id, hashlib.sha256(token.encode()).digest(), expires_at),
    )


def spend_link_token(db, token):
    """The user the token was made for, or None when it is wrong, used, replaced or too old. It works once."""
    row = db.execute(
        "DELETE FROM link_tokens WHERE token_hash = ? RETURNING user_id, expires_at",
        (hashlib.sha256(token.encode()).digest(),),
    ).fetchone()
    return find_user(db, row["user_id"]) if row and row["expires_at"] > now() else None


def find_bot(db, bot_id):
    """The bot's row (username, next_update_id), or None when it has never spoken."""
    return db.execute(
        "SELECT username, next_update_id FROM bots WHERE id = ?", (bot_id,)
    ).fetchone()


def set_bot(db, bot_id, **columns):
    """Change the named columns of the bot's row, which is made where missing."""
    db.execute("INSERT INTO bots (id) VALUES (?) ON CONFLICT DO NOTHING", (bot_id,))
    for column, value in columns.items():
        db.execute(f"UPDATE bots SET {column} = ? WHERE id = ?", (value, bot_id))


def link_chat(db, bot_id, chat_id, user_id):
    """From now on this chat, and no other, speaks for this user, and for no other.

    What is queued for the user's earlier chat moves here; what is queued here for the chat's earlier user is given up.
    """
    earlier_chat, earlier_user = find_chat(db, user_id), find_chat_user(db, bot_id, chat_id)
    if earlier_user and earlier_user["id"] != user_id:
        unlink_chat(db, bot_id, chat_id, "the chat was linked to another account")
    if earlier_chat:
        db.execute(
            "UPDATE outbox SET bot_id = ?, chat_id = ? WHERE bot_id = ? AND chat_id = ? AND given_up_at IS NULL",
            (bot_id, chat_id, *earlier_chat),
        )
    db.execute(
        "INSERT OR REPLACE INTO chats (bot_id, chat_id, user_id, linked_at) VALUES (?, ?, ?, ?)",
        (bot_id, chat_id, user_id, iso(now())),
    )
    db.queued_for.add((bot_id, chat_id))


def unlink_chat(db, bot_id, chat_id, reason):
    """The chat speaks for nobody from now on, and what is queued for it is given up."""
    db.execute("DELETE FROM chats WHERE bot_id = ? AND chat_id = ?", (bot_id, chat_id))
    give_up(db, reason, "bot_id = ? AND chat_id = ? AND given_up_at IS NULL", (bot_id, chat_id))


def find_chat(db, user_id):
    """(bot id, chat id) of the chat linked to the user, or None."""
    return db.execute("SELECT bot_id, chat_id FROM chats WHERE user_id = ?", (user_id,)).fetchone()


def find_chat_user(db, bot_id, chat_id):
    """The user the chat is linked to, or None."""
    return db.execute(
        """
        SELECT users.id, username FROM chats JOIN users ON users.id = user_id WHERE bot_id = ? AND chat_id = ?
        """,
        (bot_id, chat_id),
    ).fetchone()


def add_told_group(db, bot_id, chat_id):
    """True the first time, False when the group has been told before."""
    return (
        db.execute(
            "INSERT INTO told_groups (bot_id, chat_id) VALUES (?, ?) ON CONFLICT DO NOTHING",
            (bot_id, chat_id),
        ).rowcount
        == 1
    )


def add_message(db, sender, recipient, text, source, silent=False, send_at=0):
    """Store a message and queue its copies: one for the recipient's chat, one for the sender's own. Returns it as answered."""
    send_at = send_at if send_at > now() else 0
    chat = find_chat(db, recipient["id"])
    created_at, delivery = iso(now()), "queued" if chat else "unlinked"
    message_id = db.execute(
        """
        INSERT INTO messages (sender_id, recipient_id, text, created_at, source, delivery) VALUES (?, ?, ?, ?, ?, ?)
        """,
        (sender["id"], recipient["id"], text, created_at, source, delivery),
    ).lastrowid
    own_copy = f"{sender['username']}, я получил от тебя сообщение:\n\n{text}"
    if sender["id"] != recipient["id"]:
        if chat:
            queue_text(
                db,
                *chat,
                f"Сообщение от {sender['username']}:\n\n{text}",
                message_id,
                silent,
                send_at,
            )
        if own_chat := find_chat(db, sender["id"]):
            queue_text(db, *own_chat, own_copy, None, silent, send_at)
    elif chat:
        queue_text(db, *chat, own_copy, message_id, silent, send_at)
    return {
        "id": message_id,
        "sender": sender["username"],
        "recipient": recipient["username"],
        "text": text,
        "created_at": created_at,
        "source": source,
        "delivery": delivery,
    }


def find_message(db, message_id, user_id):
    """A message's JSON, or None when there is none or it is not the user's."""
    row = db.execute(
        f"""
        SELECT {MESSAGE_JSON} FROM messages AS m JOIN users AS s ON s.id = m.sender_id JOIN users AS r ON r.id = m.recipient_id
        WHERE m.id = ? AND ? IN (m.sender_id, m.recipient_id)
        """,
        (message_id, user_id),
    ).fetchone()
    return row[0] if row else None


def add_idempotency_key(db, user_id, key, request_hash, message):
    """Remember what a request with this key was answered."""
    db.execute(
        """
        INSERT OR REPLACE INTO idempotency_keys (user_id, key, request_hash, message_id, delivery, used_at)
        VALUES (?, ?, ?, ?, ?, ?)
        """,
        (user_id, key, request_hash, message["id"], message["delivery"], now()),
    )


def find_idempotency_key(db, user_id, key):
    """(request hash, message id, delivery) of the user's request with this key, or None. Keys are forgotten after a day."""
    oldest = now() - IDEMPOTENCY_SECONDS
    db.execute(
        """
        DELETE FROM idempotency_keys WHERE (user_id, key) IN (SELECT user_id, key FROM idempotency_keys WHERE used_at < ? LIMIT 100)
        """,
        (oldest,),
    )
    return db.execute(
        """
        SELECT request_hash, message_id, delivery FROM idempotency_keys WHERE user_id = ? AND key = ? AND used_at >= ?
        """,
        (user_id, key, oldest),
    ).fetchone()


MESSAGE_JSON = """json_object('id', m.id, 'sender', s.username, 'recipient', r.username, 'text', m.text,
                                 'created_at', m.created_at, 'source', m.source, 'delivery', m.delivery)"""


def select_message_ids(order, limit):
    """SQL for the first (order "ASC") or last ("DESC") ids of what a user sent or received, between two others, both excluded."""
    return f"""
        SELECT * FROM (SELECT id FROM messages WHERE sender_id = :user
                       AND id > :after AND id < :before ORDER BY id {order} LIMIT :rows + 1)
        UNION ALL
        SELECT * FROM (SELECT id FROM messages WHERE recipient_id = :user AND recipient_id <> sender_id
                       AND id > :after AND id < :before ORDER BY id {order} LIMIT :rows + 1)
        ORDER BY id {order} LIMIT {limit}"""


def find_message_page_end(db, user_id, after, before, rows, order):
    """As find_user_page_end, of what the user sent or received."""
    return db.execute(
        select_message_ids(order, "2 OFFSET :rows - 1"),
        {"user": user_id, "after": after, "before": before, "rows": rows},
    ).fetchall()


def list_messages(db, user_id, after, before, rows):
    """The first messages that the user sent or received, between two ids, both excluded: (id, JSON) rows."""
    return db.execute(
        f"""
        SELECT m.id, {MESSAGE_JSON}
        FROM ({select_message_ids("ASC", ":rows")}) AS page
        JOIN messages AS m ON m.id = page.id
        JOIN users AS s ON s.id = m.sender_id
        JOIN users AS r ON r.id = m.recipient_id
        ORDER BY m.id
        """,
        {"user": user_id, "after": after, "before": before, "rows": rows},
    ).fetchall()


def queue_text(db, bot_id, chat_id, text, message_id=None, silent=False, send_at=0):
    """Queue what the bot shall say in a chat, in as many parts as Telegram needs."""
    parts = split_text(text)
    for number, part in enumerate(parts, 1):
        db.execute(
            """
            INSERT INTO outbox (bot_id, chat_id, text, message_id, is_last, silent, send_at, queued_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)
            """,
            (bot_id, chat_id, part, message_id, number == len(parts), silent, send_at, now()),
        )
    db.queued_for.add((bot_id, chat_id))


def list_queues(db, bot_id):
    """(chat id, seconds until its head is due) of each chat with something queued."""
    chats = db.execute(
        "SELECT DISTINCT chat_id FROM outbox WHERE bot_id = ? AND given_up_at IS NULL", (bot_id,)
    ).fetchall()
    heads = [find_head(db, bot_id, chat["chat_id"]) for chat in chats]
    return [
        (
            head["chat_id"],
            max(0, head["send_at"] - now(), min(head["due_at"] - now(), RETRY_AFTER_MAX_SECONDS)),
        )
        for head in heads
    ]


def find_head(db, bot_id, chat_id):
    """The delivery whose turn it is in a chat, now or at its send_at, or None when all is said."""
    return db.execute(
        """
        SELECT id, bot_id, chat_id, text, message_id, is_last, silent, send_at, attempts, due_at FROM outbox
        WHERE bot_id = ? AND chat_id = ? AND given_up_at IS NULL ORDER BY send_at, id LIMIT 1
        """,
        (bot_id, chat_id),
    ).fetchone()


def count_waiting(db):
    """(how many deliveries are due, since when the oldest is) in seconds since 1970, or None where there is none."""
    return db.execute(
        """
        SELECT count(*), min(max(queued_at, send_at)) FROM outbox WHERE given_up_at IS NULL AND send_at <= ?
        """,
        (now(),),
    ).fetchone()


def settle_sent(db, delivery, telegram_message_id):
    """The delivery is done: forget it, but remember what a reply to it would answer."""
    db.execute("DELETE FROM outbox WHERE id = ?", (delivery["id"],))
    if delivery["message_id"] and telegram_message_id:
        db.execute(
            """
            INSERT OR REPLACE INTO relayed (bot_id, chat_id, telegram_message_id, message_id)
            SELECT ?, ?, ?, id FROM messages WHERE id = ? AND sender_id <> recipient_id
            """,
            (delivery["bot_id"], delivery["chat_id"], telegram_message_id, delivery["message_id"]),
        )
    if not delivery["is_last"]:  # nothing comes between the parts of a text
        db.execute(
            "UPDATE outbox SET queued_at = max(queued_at, send_at), send_at = -1 WHERE id = ? + 1",
            (delivery["id"],),
        )
    else:  # an earlier part may have been given up: then the copy has failed, and stays so
        db.execute(
            "UPDATE messages SET delivery = 'sent' WHERE id = ? AND delivery = 'queued'",
            (delivery["message_id"],),
        )


def settle_later(db, delivery, due_at, error):
    """The delivery failed for now; it is due again at `due_at`."""
    db.execute(
        "UPDATE outbox SET attempts = attempts + 1, due_at = ?, error = ? WHERE id = ?",
        (due_at, error, delivery["id"]),
    )


NOT_DELIVERED = "Не доставлено пользователю {username}: {count} сообщ."


def give_up(db, reason, which, values):
    """The outbox rows that fit an SQL condition are never sent. They keep the reason, their messages show it, and who sent them
    is told once, if there is a chat to say it in."""
    rows = db.execute(
        f"UPDATE outbox SET given_up_at = ?, error = ? WHERE {which} RETURNING message_id",
        (iso(now()), reason, *values),
    ).fetchall()
    if rows:
        log.warning("%s deliveries given up: %s", len(rows), reason)
    undelivered = {}  # (sender, recipient): how many messages
    for message_id in dict.fromkeys(row["message_id"] for row in rows):
        for message in db.execute(
            "UPDATE messages SET delivery = 'failed' WHERE id = ? AND delivery <> 'failed' "
            "RETURNING sender_id, recipient_id",
            (message_id,),
        ).fetchall():
            undelivered[tuple(message)] = undelivered.get(tuple(message), 0) + 1
    for (sender_id, recipient_id), count in undelivered.items():
        if chat := find_chat(db, sender_id):
            queue_text(db, *chat, NOT_DELIVERED.format(count=count, **find_user(db, recipient_id)))


def settle_given_up(db, delivery, error):
    """The delivery is never sent."""
    give_up(db, error, "id = ?", (delivery["id"],))


def settle_chat_gone(db, delivery, error):
    """Nothing reaches the delivery's chat any more: unlink it and give up all that waits for it."""
    unlink_chat(db, delivery["bot_id"], delivery["chat_id"], error)


def find_relayed_author(db, bot_id, chat_id, telegram_message_id):
    """Who wrote the message that the bot relayed as this Telegram message, or None."""
    return db.execute(
        """
        SELECT users.id, username FROM relayed
        JOIN messages ON messages.id = message_id JOIN users ON users.id = sender_id
        WHERE bot_id = ? AND chat_id = ? AND telegram_message_id = ?
        """,
        (bot_id, chat_id, telegram_message_id),
    ).fetchone()


# --- Passwords and tokens ---------------------------------------------------------------------------------------------

hashing = threading.BoundedSemaphore(
    HASHES_AT_ONCE
)  # each takes 32 MiB: a burst of logins must not take them all


def scrypt(password, salt, n, r, p):
    if may_not_wait():
        raise MustHash
    with hashing:
        return hashlib.scrypt(
            password.encode(), salt=salt, n=n, r=r, p=p, maxmem=2 * 128 * n * r, dklen=32
        )


def hash_password(password):
    """The password's hash with the parameters it was made with, as the users table keeps it."""
    salt = secrets.token_bytes(16)
    return format_hash(salt, scrypt(password, salt, **SCRYPT))


def format_hash(salt, digest):
    return "$".join(
        [
            "scrypt",
            *(str(SCRYPT[k]) for k in "nrp"),
            *(base64.b64encode(b).decode() for b in (salt, digest)),
        ]
    )


def nobodys_hash():
    """What an unknown user's password is compared to, so that a wrong name takes the time of a wrong password."""
    return format_hash(secrets.token_bytes(16), secrets.token_bytes(32))


def password_matches(password, password_hash):
    _, n, r, p, salt, digest = password_hash.split("$")
    return hmac.compare_digest(
        scrypt(password, base64.b64decode(salt), int(n), int(r), int(p)), base64.b64decode(digest)
    )


class TokenError(Exception):
    """A JWT that is not to be believed; the text is for the client."""


def jwt_key():
    return settings.secret or signing_key(settings.db)


def issue_token(kind, user):
    """A JWT with simplejwt's claims. `kind` is "access" or "refresh"."""
    issued_at = max(int(now()), user["tokens_from"])  # which may be the next second
    lifetime = ACCESS_TOKEN_SECONDS if kind == "access" else REFRESH_TOKEN_SECONDS
    claims = {
        "token_type": kind,
        "exp": issued_at + lifetime,
        "iat": issued_at,
        "jti": secrets.token_hex(16),
        "user_id": str(user["id"]),
    }
    return jwt.encode(claims, jwt_key(), algorithm="HS256")


def read_token(token, kind=None):
    """The claims of a valid JWT of that kind (None: of any). Raises TokenError, worded and ordered as simplejwt does."""
    try:
        claims = jwt.decode(
            token,
            jwt_key(),
            algorithms=["HS256"],
            options={"verify_aud": False, "verify_exp": False, "verify_iat": False},
        )
        expires_at = int(claims["exp"]) if "exp" in claims else None
        if (
            expires_at is not None
            and datetime.fromtimestamp(expires_at, timezone.utc).timestamp() <= now()
        ):  # absurd ones raise
            raise TokenError("Token is expired")
        if "iat" in claims and int(claims["iat"]) > now() + 1:
            raise TokenError("Token is invalid")
    except (jwt.InvalidTokenError, ValueError, TypeError, OverflowError, OSError, RecursionError):
        raise TokenError("Token is invalid") from None
    if kind != "access" and is_blacklisted(connection(), claims.get("jti")):
        raise TokenError("Token is blacklisted")
    if expires_at is None:
        raise TokenError("Token has no 'exp' claim")
    if "jti" not in claims:
        raise TokenError("Token has no id")
    if kind and "token_type" not in claims:
        raise TokenError("Token has no type")
    if kind and claims["token_type"] != kind:
        raise TokenError("Token has wrong type")
    return claims


verified_tokens = {}  # access token: (when it expires, its claims)


def read_access_token(token):
    """As read_token, but a token is verified once and remembered, never past its expiry."""
    expires_at, claims = verified_tokens.get(token, (0, None))
    if expires_at <= now():
        claims = read_token(token, "access")
        if len(verified_tokens) >= TOKENS_REMEMBERED:
            verified_tokens.clear()
        verified_tokens[token] = int(claims["exp"]), claims
    return claims


def token_user(claims):
    """The user a JWT's claims name, or None when there is no such user (any more)."""
    user_id = str(claims.get("user_id"))
    return find_user(connection(), int(user_id)) if re.fullmatch("[0-9]{1,18}", user_id) else None


def was_ended(claims, user):
    """Whether the user's password was changed after the JWT was issued."""
    return int(claims.get("iat", 0)) < user["tokens_from"]


class LoginThrottle:
    """Failed logins of the last minutes, by address and by name from an address; the longest untouched are forgotten first."""

    def __init__(self):
        self.failures = OrderedDict()  # key: times, the newest last
        self.lock = threading.Lock()

    @staticmethod
    def limits(address, username):
        return (
            ((address, username[: MAX_USERNAME + 1]), LOGIN_FAILURES_PER_NAME),
            (address, LOGIN_FAILURES_PER_ADDRESS),
        )

    def try_once(self, address, username):
        """0, and the try counts as failed until forgive(); or how many seconds this address has to wait before it may try."""
        with self.lock:
            pauses = [
                times[-limit] + LOGIN_WINDOW_SECONDS - ticks()
                for key, limit in self.limits(address, username)
                if len(times := self.failures.get(key, ())) >= limit
            ]
            if (wait := max(pauses, default=0)) > 0:
                return wait
            for key, limit in self.limits(address, username):
                self.failures[key] = [*self.failures.get(key, ())[-limit + 1 :], ticks()]
                self.failures.move_to_end(key)
            while len(self.failures) > LOGIN_KEYS_REMEMBERED:
                self.failures.popitem(last=False)
            return 0

    def forgive(self, address, username):
        """The right password was given: what went before were typing errors, and this try was none."""
        with self.lock:
            self.failures.pop(self.limits(address, username)[0][0], None)
            self.failures[address] = self.failures.get(address, [])[:-1]


login_throttle = LoginThrottle()


# --- Outbox -----------------------------------------------------------------------------------------------------------
# One delivery, one round, the loop. A home (see Bot) has an id, send(chat_id, text), and these ways to fail:


class TryLater(Exception):
    """Not sent, or not known to be sent. `retry_after`: seconds that Telegram told us to wait, None when it is up to us."""

    def __init__(self, reason, retry_after=None):
        super().__init__(reason)
        self.retry_after = retry_after


class GiveUp(Exception):
    """This text can never be sent."""


class ChatGone(GiveUp):
    """Nothing can be sent to this chat any more."""


def backoff(attempts, longest):
    """Seconds to wait after so many failed attempts: exponential, with jitter so that not all come back at once."""
    return min(longest, 2.0 ** min(attempts, 20)) * random.uniform(0.5, 1)


def settle(change, *args):
    """Write down what became of a delivery. While the database cannot, wait: sending it once more would be worse."""
    while True:
        try:
            with transaction() as db:
                return change(db, *args)
        except sqlite3.Error:
            log.exception("a delivery could not be settled; trying again")
            time.sleep(1)


def deliver(home, delivery):
    """Send one delivery and settle it. None when that is done, else (seconds to the next try, whether they are Telegram's wish)."""
    try:
        telegram_message_id = home.send(
            delivery["chat_id"], delivery["text"], bool(delivery["silent"])
        )
    except ChatGone as error:
        log.warning("chat %s is gone: unlinked", delivery["chat_id"])
        settle(settle_chat_gone, delivery, str(error))
    except GiveUp as error:
        settle(settle_given_up, delivery, str(error))
    except TryLater as error:
        is_told = error.retry_after is not None
        pause = error.retry_after if is_told else backoff(delivery["attempts"], BACKOFF_MAX_SECONDS)
        log.warning(
            "delivery %s to chat %s failed (%s): again in %.1f s",
            delivery["id"],
            delivery["chat_id"],
            error,
            pause,
        )
        settle(settle_later, delivery, now() + pause, str(error))
        return pause, is_told
    else:
        settle(settle_sent, delivery, telegram_message_id)


def deliver_next(home, wait_seconds=0):
    """Deliver the head of the chat whose turn it is, waiting for one to come due. False when none did."""
    chat_id = turns.take(wait_seconds)
    if chat_id is None:
        return False
    again = 1, False  # should anything below fail
    try:
        head = find_head(connection(), home.id, chat_id)
        again = None
        if head and head["send_at"] <= now():
            again = deliver(home, head) if turns.claim(chat_id, head["id"]) else (0.5, None)
        if again is None and (head := find_head(connection(), home.id, chat_id)):
            again = max(0, head["send_at"] - now()), None
    finally:
        turns.give_back(chat_id, *again or ())
    return True


def run_outbox(home, stop):
    """Deliver until told to stop; one bad round never ends the thread."""
    while not stop.is_set():
        try:
            deliver_next(home, wait_seconds=1)
        except Exception:
            log.exception("outbox round failed")
            stop.wait(1)


def announce(line):
    """Tell the operator, who may have closed standard output."""
    try:
        print(line, flush=True)
    except OSError:
        log.info("%s", line)


# --- Bot --------------------------------------------------------------------------------------------------------------
# What it says, the conversation, then its two homes: Telegram and the terminal.

HOW_TO_GET_A_TOKEN = (
    "Токен выдаёт API: GET /api/users/get-telegram-token/. Он действует 10 минут и только один раз."
)
GREETING = f"Здравствуйте! Пришлите мне токен, чтобы привязать этот чат к вашему аккаунту.\n\n{HOW_TO_GET_A_TOKEN}"
LINKED = "Готово: этот чат и аккаунт {username} успешно привязаны. Теперь я повторяю здесь ваши сообщения."
NOT_LINKED = f"Этот чат не привязан: токен неверный или устарел. Получите новый и пришлите его мне.\n\n{HOW_TO_GET_A_TOKEN}"
WRONG_TOKEN = (
    f"Этот токен неверный или устарел. Получите новый и пришлите его мне.\n\n{HOW_TO_GET_A_TOKEN}"
)
LINKED_TO = "Этот чат привязан к аккаунту {username}. Отвязать его: /stop"
UNLINKED = f"Чат отвязан от аккаунта {{username}}. Чтобы привязать его снова, пришлите новый токен.\n\n{HOW_TO_GET_A_TOKEN}"
COMMANDS = {
    "start": "к какому аккаунту привязан этот чат",
    "stop": "отвязать чат",
    "help": "что я понимаю",
}
HELP = (
    "Я понимаю:\n"
    + "".join(f"/{name} — {what}\n" for name, what in COMMANDS.items())
    + """токен — привязать чат к аккаунту
Любой другой текст из привязанного чата становится вашим сообщением, а ответ на чужое сообщение уходит его автору."""
)
UNKNOWN_COMMAND = f"Такой команды я не знаю.\n\n{HELP}"
TOO_LONG = f"Это слишком длинно: я принимаю до {MAX_TEXT} символов."
TEXT_ONLY = "Я читаю только текст."
NO_CHAT = "Сообщение сохранено, но не доставлено: у пользователя {username} нет привязанного чата."
PRIVATE_ONLY = "Привязать можно только личный чат: напишите мне лично."

COMMAND = re.compile(r"/(?P<name>[A-Za-z0-9_]{1,32})(@\w+)?(\s+(?P<argument>.*))?", re.DOTALL)
LINK_TOKEN = re.compile("[A-Za-z0-9_-]{43}")  # what secrets.token_urlsafe(32) makes


def converse(db, bot_id, chat_id, text, reply_to=None):
    """What the bot answers to a text from a private chat (None: nothing but the relayed copy), once it has taken effect.

    `reply_to` is the Telegram message id that the text replies to, if any.
    """
    text = (
        text.replace("\0", "").encode("utf-8", "replace").decode()
    )  # SQLite and JSON take neither NUL nor lone surrogates
    user = find_chat_user(db, bot_id, chat_id)
    command = COMMAND.fullmatch(text.strip())
    name, argument = (
        (command["name"].lower(), (command["argument"] or "").strip()) if command else (None, "")
    )
    token = argument if name == "start" else text.strip()
    if LINK_TOKEN.fullmatch(token) and (owner := spend_link_token(db, token)):
        link_chat(db, bot_id, chat_id, owner["id"])
        return LINKED.format(**owner)
    if name == "help":
        return HELP
    if name == "start" and not argument:
        return LINKED_TO.format(**user) if user else GREETING
    if name == "start" or not user:
        return WRONG_TOKEN if user else NOT_LINKED
    if name == "stop":
        unlink_chat(db, bot_id, chat_id, "the chat was unlinked with /stop")
        return UNLINKED.format(**user)
    if name:
        return UNKNOWN_COMMAND
    if len(text) > MAX_TEXT:
        return TOO_LONG
    if not text.strip():
        return None
    recipient = find_relayed_author(db, bot_id, chat_id, reply_to) or user
    if add_message(db, user, recipient, text, "telegram")["delivery"] == "unlinked":
        return NO_CHAT.format(**recipient)


def hear(db, bot_id, chat_id, text, reply_to=None):
    """Let a text from a private chat take effect, and queue the answer."""
    if answer := converse(db, bot_id, chat_id, text, reply_to):
        queue_text(db, bot_id, chat_id, answer)


def receive(bot_id, update):
    """Everything one raw update does, and the offset behind it, in one transaction: it counts once, whatever happens."""
    parsed = telebot.types.Update.de_json(update)
    message = parsed.message or parsed.channel_post
    with transaction() as db:
        set_bot(db, bot_id, next_update_id=parsed.update_id + 1)
        if (
            message is None
            or message.content_type in telebot.util.content_type_service
            and message.chat.type == "private"
        ):
            return
        if message.chat.type != "private":
            if add_told_group(db, bot_id, message.chat.id):
                queue_text(db, bot_id, message.chat.id, PRIVATE_ONLY)
        elif message.content_type != "text":
            queue_text(db, bot_id, message.chat.id, TEXT_ONLY)
        else:
            replied = message.reply_to_message
            hear(db, bot_id, message.chat.id, message.text, replied.message_id if replied else None)


def receive_or_skip(bot_id, update):
    """Receive an update; one that fails time and again is skipped, unless it is the database that fails."""
    for attempt in range(1, UPDATE_TRIES + 1):
        try:
            return receive(bot_id, update)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError):
                raise
            update_id = update.get("update_id") if isinstance(update, dict) else None
            log.warning(
                "update %s failed, try %s of %s",
                update_id,
                attempt,
                UPDATE_TRIES,
                exc_info=(type(error), None, error.__traceback__),
            )  # the exception's own text may quote the message
    if isinstance(update_id, int):
        log.error("update %s is skipped", update_id)
        with transaction() as db:
            set_bot(db, bot_id, next_update_id=update_id + 1)


class TelegramError(Exception):
    """A call to the Bot API failed. The text has no secrets.

    `code` is Telegram's error_code, None for no (sensible) answer; `retry_after` is how many seconds it told us to wait, or None.
    """

    def __init__(self, code, description, retry_after=None):
        super().__init__(f"{code} {description}" if code else description)
        self.code, self.description, self.retry_after = code, description, retry_after


def request_quietly(method, url, params=None, files=None, timeout=None, proxies=None):
    """telebot's way to the network. Texts go in the body, and an error names only its kind: the URL holds the bot's token."""
    arguments = {"data": params} if method == "post" else {"params": params}
    try:
        return apihelper._get_req_session().request(
            method, url, timeout=timeout, proxies=proxies, **arguments
        )
    except requests.RequestException as error:
        kind = type(error).__name__
    apihelper._get_req_session(reset=True)  # what is left of the connection is not to be trusted
    raise TelegramError(
        None, f"Telegram cannot be reached: {kind}"
    )  # out of the except: no __context__ with the URL


def is_webhook(error):
    """Whether a webhook keeps the bot from polling."""
    return error.code == 409 and "webhook" in error.description.lower()


class Telegram:
    """The bot's home where people meet it: long polling in, sendMessage out. One a process, as telebot's settings are."""

    allowed_updates = ["message", "channel_post"]

    def __init__(self, token, api_url):
        self.id, self.token = int(token.split(":")[0]), token
        self.failures = 0  # calls of run() that failed in a row
        apihelper.API_URL = (
            api_url.rstrip("/").replace("{", "%7B").replace("}", "%7D") + "/bot{0}/{1}"
        )
        apihelper.CUSTOM_REQUEST_SENDER = request_quietly

    def call(self, method, *args, **kwargs):
        """One call of the Bot API through telebot's function of that name. Raises TelegramError."""
        try:
            return method(self.token, *args, **kwargs)
        except apihelper.ApiTelegramException as error:
            parameters = error.result_json.get("parameters")
            retry_after = parameters.get("retry_after") if isinstance(parameters, dict) else None
            is_number = isinstance(retry_after, (int, float)) and 0 <= retry_after
            description = (
                str(error.description).encode("utf-8", "replace").decode()
            )  # SQLite takes no lone surrogates
            problem = (
                error.error_code,
                description,
                min(retry_after, RETRY_AFTER_MAX_SECONDS) if is_number else None,
            )
        except apihelper.ApiHTTPException as error:
            problem = None, f"Telegram answered {error.result.status_code} without JSON"
        except (apihelper.ApiInvalidJSONException, LookupError, TypeError, AttributeError) as error:
            problem = None, f"Telegram's answer makes no sense ({type(error).__name__})"
        raise TelegramError(*problem)

    def send(self, chat_id, text, silent):
        """Send a text as it is; returns Telegram's id of the message. Raises TryLater, GiveUp, ChatGone."""
        try:
            sent = self.call(
                apihelper.send_message,
                chat_id,
                text,
                timeout=SEND_TIMEOUT_SECONDS,
                disable_notification=silent or None,
                link_preview_options=telebot.types.LinkPreviewOptions(is_disabled=True),
            )
        except TelegramError as error:
            if (
                error.code == 403
                or error.code == 400
                and "chat not found" in error.description.lower()
            ):
                raise ChatGone(str(error)) from None
            if error.code == 400:
                raise GiveUp(str(error)) from None
            raise TryLater(str(error), error.retry_after) from None
        message_id = sent.get("message_id") if isinstance(sent, dict) else None
        return message_id if isinstance(message_id, int) and 0 < message_id <= MAX_ID else None

    def introduce(self):
        """Learn the bot's name, for the operator and for t.me links."""
        username = str(self.call(apihelper.get_me)["username"])
        with transaction() as db:
            set_bot(db, self.id, username=username)
        announce(f"bot: @{username} on Telegram")
        try:
            self.call(
                apihelper.set_my_commands,
                [telebot.types.BotCommand(*command) for command in COMMANDS.items()],
            )
        except TelegramError as error:
            log.info("Telegram's menu does not show the commands: %s", error)

    def delete_webhook(self):
        """Take away the webhook that keeps this bot from polling."""
        self.call(apihelper.delete_webhook)

    def poll(self):
        """Receive one batch of updates, waiting for it up to LONG_POLL_SECONDS, or not long when it may fail again.

        False when nothing came, or nothing that moved the offset, and that at once.
        """
        started_at = time.monotonic()
        bot = find_bot(connection(), self.id)
        updates = self.call(
            apihelper.get_updates,
            offset=bot["next_update_id"],
            timeout=LONG_POLL_SECONDS + 5,
            long_polling_timeout=1 if self.failures else LONG_POLL_SECONDS,
            allowed_updates=self.allowed_updates,
        )
        if not isinstance(updates, list):
            raise TelegramError(None, "Telegram's answer makes no sense (updates are no list)")
        for update in updates:
            receive_or_skip(self.id, update)
        return (
            find_bot(connection(), self.id)["next_update_id"] != bot["next_update_id"]
            or time.monotonic() - started_at > 1
        )

    def explain(self, error):
        """Tell the operator what a failed poll means."""
        if error.code in (401, 404):
            log.error(
                "Telegram refuses TELEGRAM_BOT_TOKEN (%s): get the right one from @BotFather and start again. "
                "The HTTP API goes on, deliveries wait.",
                error,
            )
        elif is_webhook(error):
            log.warning("this bot has a webhook, which keeps it from polling: deleting it")
        elif error.code == 409:
            log.error("another process polls this bot: end it, or use another bot (%s)", error)
        else:
            log.warning("polling failed: %s", error)

    def run(self, stop):
        """Poll until told to stop; when Telegram comes back after an absence, so do the deliveries."""
        step = self.introduce
        while not stop.is_set():
            pause = 0
            try:
                if step() is False:
                    pause = 1  # a server that answers at once with nothing must not be hammered
                if self.failures:
                    log.warning("Telegram answers again")
                    turns.hurry()
                step, self.failures = self.poll, 0
            except Exception as error:
                self.failures += 1
                pause = backoff(self.failures, POLL_BACKOFF_MAX_SECONDS)
                if isinstance(error, TelegramError):
                    self.explain(error)
                    step = self.delete_webhook if is_webhook(error) else step
                    pause = pause if error.retry_after is None else max(error.retry_after, 1)
                else:
                    log.exception("polling round failed")
            stop.wait(pause)


class Terminal:
    """The bot's home on a bare machine: lines typed are what a Telegram user would write, and what it says is printed."""

    id = chat_id = 0

    def send(self, chat_id, text, silent):
        """Print a text. Control characters, which could play tricks on the terminal, are replaced. Raises TryLater."""
        visible = "".join(
            c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text
        )
        try:
            print(f"{visible}\n", flush=True)
        except OSError as error:
            raise TryLater(f"the terminal is gone: {error.strerror}") from None

    def run(self, stop):
        """Read lines until they end, or told to stop; without a terminal the bot only speaks."""
        if sys.stdin is None:
            return
        # Unbuffered: a daemon thread that sleeps in a buffered read makes the interpreter's exit crash.
        with io.open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
            while not stop.is_set():
                try:
                    line = stdin.readline()
                except (
                    OSError
                ):  # in the background of a shell there is nothing to read, but there may be again
                    stop.wait(1)
                    continue
                if not line:
                    return announce(
                        "bot: the input has ended; what is written in the API is still repeated here"
                    )
                self.hear(line.decode("utf-8", "replace").rstrip("\r\n"), stop)

    def hear(self, text, stop):
        """Take in one typed line, however long the database may be away."""
        while text.strip() and not stop.is_set():
            try:
                with transaction() as db:
                    return hear(db, self.id, self.chat_id, text)
            except sqlite3.Error:
                log.exception("a typed line could not be stored; trying again")
                stop.wait(1)


# --- Page -------------------------------------------------------------------------------------------------------------
# What GET / answers: one self-contained document. Its Content-Security-Policy lets its own style and script through, no others.

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>FactoryApp</title>
<style>
:root { color-scheme: light dark;
    --page: #f4f6f7; --card: #fff; --ink: #1b2227; --quiet: #58646d; --line: #d8dfe3; --edge: #7d8993;
    --accent: #0a665c; --on-accent: #fff; --mine: #e2f1ee; --good: #146c3c; --wait: #855400; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
    --page: #12171a; --card: #1b2226; --ink: #e5eaed; --quiet: #9fabb4; --line: #303a41; --edge: #74818b;
    --accent: #68cdbd; --on-accent: #06231f; --mine: #17362f; --good: #74d19b; --wait: #e6b866; --bad: #ff9389; } }
* { box-sizing: border-box; margin: 0; }
[hidden], p:empty, span:empty { display: none !important; }
body { max-width: 50rem; margin: auto; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
    font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.1rem; }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .75rem; }
header { justify-content: space-between; margin-bottom: .25rem; }
.card, #link { display: grid; grid-template-columns: minmax(0, 1fr); gap: .75rem; }
.card { margin-top: 1rem; padding: 1.1rem; background: var(--card); border: 1px solid var(--line); border-radius: .75rem; }
.quiet, label, #requests p { font-size: .9rem; }
.quiet, .about, #requests p, #messages:empty::before { color: var(--quiet); }
.error::first-letter { text-transform: uppercase; }
@media (hover: none) { .row .quiet { display: none; } }
label { display: grid; gap: .25rem; font-weight: 600; }
input, textarea, button, .button { font: inherit; padding: .5rem .75rem; border: 1px solid var(--edge); border-radius: .5rem; }
input, textarea { width: 100%; font-size: 1rem; font-weight: 400; background: var(--page); color: inherit; }
textarea { min-height: 5rem; max-height: 50vh; resize: vertical; field-sizing: content; }
a, button { color: var(--accent); }
button, .button { background: none; font-weight: 600; text-decoration: none; cursor: pointer; }
.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button:disabled { opacity: .55; cursor: default; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
code { display: block; padding-left: 2ch; text-indent: -2ch; color: var(--ink); font: .85rem/1.6 ui-monospace, monospace;
    user-select: all; }
#link code { padding: .5rem .75rem; text-indent: 0; border: 1px dashed var(--edge); border-radius: .5rem; }
#messages { display: flex; flex-direction: column; gap: .5rem; padding: 0; max-height: 60vh; overflow: auto;
    margin-bottom: .25rem; list-style: none; }
#messages:empty::before { content: "No messages yet."; }
#messages li { align-self: start; max-width: 92%; padding: .5rem .75rem; border: 1px solid var(--line); border-radius: .75rem; }
#messages .mine { align-self: end; background: var(--mine); border-color: transparent; }
.text { white-space: pre-wrap; unicode-bidi: plaintext; }
.about { display: flex; flex-wrap: wrap; gap: 0 .75rem; font-size: .8rem; }
[data-delivery=sent] .delivery { color: var(--good); } [data-delivery=queued] .delivery { color: var(--wait); }
.error, [data-delivery=failed] .delivery { color: var(--bad); }
</style>

<header class="row">
    <h1>FactoryApp</h1>
    <form id="session" class="row" hidden><span>Signed in as <b id="me"></b></span> <button>Log out</button></form>
</header>
<p class="quiet">A Telegram bot repeats your messages in the chat that you link to your account.</p>
<main>
<noscript><p class="card">This page needs JavaScript. The requests below do not.</p></noscript>

<form id="sign-in" class="card">
    <h2>Log in or register</h2>
    <label>Username <input name="username" autocomplete="username" autocapitalize="none" spellcheck="false" required></label>
    <label>Password <input name="password" type="password" autocomplete="current-password" required></label>
    <p class="quiet">New here? Choose a name and a password of at least 8 characters, then register.</p>
    <p class="error" role="alert"></p>
    <p class="row"><button class="main">Log in</button> <button name="register">Register</button></p>
</form>

<div id="signed-in" hidden>
    <form id="telegram" class="card">
        <h2>Telegram</h2>
        <p id="linked" role="status"></p>
        <p class="row"><button class="main" name="token" hidden>Link a chat</button>
            <button name="unlink" hidden>Unlink</button></p>
        <div id="link" role="status" hidden>
            <p class="row"><a class="button main" target="_blank" rel="noreferrer">Open the bot in Telegram</a></p>
            <p class="how"></p> <code tabindex="0"></code> <p class="quiet"></p>
        </div>
        <p class="error" role="alert"></p>
    </form>
    <form id="compose" class="card">
        <h2>Messages</h2>
        <ol id="messages" role="log" tabindex="0" aria-label="Messages"></ol>
        <p id="trouble" class="error" role="status"></p>
        <label>To <input name="recipient" list="people" placeholder="yourself" autocomplete="off" autocapitalize="none"></label>
        <datalist id="people"></datalist>
        <label>Message <textarea name="text" required></textarea></label>
        <p class="error" role="alert"></p>
        <p class="row"><button class="main">Send</button> <span class="quiet">or press Ctrl and Enter</span></p>
    </form>
</div>

<section id="requests" class="card">
    <h2>Requests</h2>
    <p class="quiet">What this page does, any program can do. Bodies are JSON or forms, answers are JSON; the
        <a href="/openapi.json" target="_blank">OpenAPI description</a> has all fields.</p>
    <p>Register <code>curl ORIGIN/api/users/register/ -d username=alice -d password=S3cure-pass-91</code></p>
    <p>Log in <code>curl ORIGIN/auth/token/ -d username=alice -d password=S3cure-pass-91</code></p>
    <p>Keep the access token, which lives 5 minutes <code>AUTH="Authorization: Bearer ACCESS_TOKEN"</code></p>
    <p>Get a new one <code>curl ORIGIN/auth/token/refresh/ -d refresh=REFRESH_TOKEN</code></p>
    <p>Check a token <code>curl ORIGIN/auth/token/verify/ -d token=ACCESS_TOKEN</code></p>
    <p>Log out <code>curl ORIGIN/auth/token/blacklist/ -d refresh=REFRESH_TOKEN</code></p>
    <p>See who you are <code>curl ORIGIN/api/users/me/ -H "$AUTH"</code></p>
    <p>Change the password, which ends all tokens
        <code>curl ORIGIN/api/users/set-password/ -H "$AUTH" -d current_password=OLD -d new_password=NEW</code></p>
    <p>Get a token that links a chat <code>curl ORIGIN/api/users/get-telegram-token/ -H "$AUTH"</code></p>
    <p>Unlink the chat <code>curl ORIGIN/api/users/unlink-telegram/ -H "$AUTH" -X POST</code></p>
    <p>List everybody <code>curl ORIGIN/api/users/ -H "$AUTH"</code></p>
    <p>Send a message, to yourself without a recipient
        <code>curl ORIGIN/api/messages/ -H "$AUTH" --data-urlencode "text=Line 4 has stopped" -d recipient=bob</code></p>
    <p>List your messages <code>curl ORIGIN/api/messages/ -H "$AUTH"</code></p>
    <p>List up to 50 after (or before) number 7 <code>curl "ORIGIN/api/messages/?after=7&amp;limit=50" -H "$AUTH"</code></p>
    <p>See one of them <code>curl ORIGIN/api/messages/1/ -H "$AUTH"</code></p>
    <p>See whether the server is well <code>curl ORIGIN/health/</code></p>
</section>
</main>

<template id="message"><li>
    <p class="text"></p> <p class="about"><b></b> <time></time> <span class="source"></span> <span class="delivery"></span></p>
</li></template>

<script>
"use strict";
const WATCH_MS = 2000, PATIENCE_MS = 20000, SHOWN = 50, MOST = 1000;  // messages: SHOWN on the page, MOST in one answer
const SETTLED = {sent: "sent", failed: "failed", unlinked: "unlinked: no chat to send it to"};  // these change no more
const $ = (id) => document.getElementById(id);
const write = (element, words) => { if (element.textContent !== words) element.textContent = words; };
const localTime = (iso) => new Date(iso).toLocaleString([], {dateStyle: "medium", timeStyle: "short"});
const refusal = (status, sentence) => Object.assign(new Error(sentence), {status});
let session = null;  // {access, refresh, username, seen, isWatching}: kept nowhere but here
let posted = {};  // what was posted last, and the key that keeps a second try from posting it twice

async function send(method, path, body, headers) {  // answers the JSON that came, or throws what to tell people
    const answer = await fetch(path, {method, headers: {...headers, "Content-Type": "application/json"}, cache: "no-store",
        body: JSON.stringify(body), signal: AbortSignal.timeout(PATIENCE_MS)}).catch(() => {
        throw refusal(0, "The server cannot be reached. Check the connection, then try again.");
    });
    const value = answer.status === 204 ? {} : await answer.json().catch(() => null);
    if (answer.ok && value) return value;
    const fields = Object.entries(value || {}).map(([field, sentences]) => `${field}: ${[sentences].flat().join(" ")}`);
    const pause = answer.headers.get("Retry-After") || "some";
    throw refusal(answer.status, answer.status === 429 ? `Too many tries. Wait ${pause} seconds, then try again.`
        : value?.detail || fields.join(" ") || `The server is out of order (status ${answer.status}). Try again later.`);
}

async function ask(method, path, body, headers) {  // as who is signed in; an access token that is too old is renewed once
    const mine = session;
    const attempt = () => send(method, path, body, {...headers, Authorization: `Bearer ${mine.access}`});
    const value = await attempt().catch(async (error) => {
        if (error.status !== 401) throw error;
        mine.access = (await send("POST", "/auth/token/refresh/", {refresh: mine.refresh})).access;
        return attempt();
    }).catch((error) => {
        if (error.status === 401 && session === mine) signOut("Your session has ended. Please log in again.");
        throw error;
    });
    if (session !== mine) throw refusal(0, "You have logged out.");
    return value;
}

function showAccount({username, telegram_linked}) {
    write($("me"), session.username = username);
    write($("linked"), telegram_linked ? "A chat is linked: the bot repeats your messages there."
        : "No chat is linked yet, so the bot has nowhere to repeat your messages.");
    $("telegram").elements.token.hidden = telegram_linked;
    $("telegram").elements.unlink.hidden = !telegram_linked;
    $("link").hidden ||= telegram_linked;
}

function showLink({telegram_token, expires_at, link}) {
    const [button, how, code, until] = $("link").querySelectorAll("a, .how, code, .quiet");
    button.href = link || "";
    button.parentElement.hidden = !link;
    write(how, link ? "Or send it this:" : "The bot talks in the terminal where the server runs. Type this line there:");
    write(code, telegram_token);
    write(until, `It works once, until ${localTime(expires_at)}.`);
    $("link").hidden = false;
}

function showMessages(messages) {
    const list = $("messages"), wasAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    for (const message of messages) {
        const next = [...list.children].find((item) => item.dataset.id >= message.id) || null;
        const item = next?.dataset.id === String(message.id) ? next : list.insertBefore(newItem(message), next);
        item.dataset.delivery = message.delivery;
        write(item.querySelector(".delivery"), SETTLED[message.delivery] || message.delivery);
    }
    while (list.children.length > SHOWN) list.firstElementChild.remove();
    if (wasAtEnd) list.scrollTop = list.scrollHeight;
}

function newItem({id, sender, recipient, text, created_at, source}) {
    const item = $("message").content.firstElementChild.cloneNode(true), me = session.username;
    const [words, who, time, from] = item.querySelectorAll(".text, b, time, .source");
    item.dataset.id = id;
    if (sender === me) item.className = "mine";
    write(words, text);
    write(who, sender !== me ? sender : recipient === me ? "You" : `You to ${recipient}`);
    write(time, localTime(created_at));
    write(from, source === "telegram" ? "written to the bot" : "");
    return item;
}

async function listPeople() {
    const people = await ask("GET", "/api/users/?limit=1000").catch(() => []);  // without them, one types the whole name
    $("people").replaceChildren(...people.map(({username}) => new Option(username)));
}

async function watch() {  // what is new, and how the deliveries go on: all from the first that is not settled
    const mine = session;
    if (!mine || mine.isWatching || document.hidden) return;
    mine.isWatching = true;
    try {
        showAccount(await ask("GET", "/api/users/me/"));
        const moving = [...$("messages").children].filter((item) => !SETTLED[item.dataset.delivery]);
        const after = Math.min(mine.seen, ...moving.map((item) => item.dataset.id - 1));
        const range = mine.seen === undefined ? `before=9223372036854775807&limit=${SHOWN}` : `after=${after}&limit=${MOST}`;
        const messages = await ask("GET", `/api/messages/?${range}`);
        showMessages(messages);
        mine.seen = Math.max(mine.seen || 0, ...messages.map((message) => message.id));
        write($("trouble"), "");
    } catch (error) {
        if (session === mine) write($("trouble"), error.message);
    } finally {
        mine.isWatching = false;
    }
}

function onSubmit(id, act) {  // `act` gets the form's fields and the name of the button; what it throws is shown in the form
    const form = $(id), buttons = form.querySelectorAll("button"), complaint = form.querySelector("[role=alert]");
    form.addEventListener("submit", async (event) => {
        event.preventDefault();
        if (buttons[0].disabled) return;
        const mine = session, focused = document.activeElement;
        buttons.forEach((button) => { button.disabled = true; });
        complaint?.replaceChildren();
        try {
            await act(form.elements, event.submitter?.name);
        } catch (error) {
            if (session === mine) complaint?.append(error.message);
        }
        buttons.forEach((button) => { button.disabled = false; });
        if (document.activeElement === document.body) focused.focus();
    });
}

onSubmit("sign-in", async ({username, password}, button) => {
    const account = {username: username.value, password: password.value};
    if (button === "register") await send("POST", "/api/users/register/", account);
    session = await send("POST", "/auth/token/", account).catch((error) => {
        throw error.status === 401 ? refusal(401, "Wrong username or password.") : error;
    });
    password.value = "";
    $("sign-in").hidden = true;
    $("session").hidden = $("signed-in").hidden = false;
    listPeople();
    await watch();
    ($("telegram").elements.token.hidden ? $("compose").elements.text : $("telegram").elements.token).focus();
});

function signOut(sentence) {
    session = null;
    posted = {};
    for (const form of document.forms) form.reset();
    for (const element of document.querySelectorAll("#messages, #people, #me, #linked, #link code, .error")) write(element, "");
    $("link").querySelector("a").href = "";
    $("session").hidden = $("signed-in").hidden = $("link").hidden = true;
    $("sign-in").hidden = false;
    $("sign-in").elements.username.focus();
    write($("sign-in").querySelector("[role=alert]"), sentence);
}

onSubmit("session", async () => {
    const {refresh} = session;
    signOut("");
    await send("POST", "/auth/token/blacklist/", {refresh});
});

onSubmit("telegram", async (fields, button) => {
    if (button === "token") return showLink(await ask("GET", "/api/users/get-telegram-token/"));
    await ask("POST", "/api/users/unlink-telegram/");
    showAccount({...session, telegram_linked: false});
});

onSubmit("compose", async ({recipient, text}) => {
    const body = {text: text.value, recipient: recipient.value.trim() || undefined}, words = JSON.stringify(body);
    if (posted.words !== words) posted = {words, key: crypto.getRandomValues(new Uint32Array(4)).join("-")};
    showMessages([await ask("POST", "/api/messages/", body, {"Idempotency-Key": posted.key})]);
    posted = {};
    if (text.value === body.text) text.value = "";
    $("messages").scrollTop = $("messages").scrollHeight;
});

$("compose").elements.recipient.addEventListener("focus", listPeople);
$("compose").elements.text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("compose").requestSubmit();
});
for (const code of $("requests").querySelectorAll("code")) write(code, code.textContent.replace("ORIGIN", location.origin));
document.addEventListener("visibilitychange", watch);
setInterval(watch, WATCH_MS);
</script>
"""


def csp_hash(element):
    """The Content-Security-Policy source that allows the page's one inline style or script (CSP level 2, hash sources)."""
    text = re.search(f"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)[1]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE_HEADERS = [
    ("Content-Type", "text/html; charset=utf-8"),
    ("Referrer-Policy", "no-referrer"),
    (
        "Content-Security-Policy",
        (
            f"default-src 'none'; script-src {csp_hash('script')}; style-src {csp_hash('style')}; connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        ),
    ),
]


# --- HTTP -------------------------------------------------------------------------------------------------------------
# The app, the one door for errors, sign-in, fields; then the routes in the order a user meets them; then the server.

app = Bottle()
app.uninstall(True)  # Bottle's own plugins: routes answer through ours

PUBLIC_DETAILS = {
    400: "Bad request.",
    404: "Not found.",
    413: "The request is too large.",
    500: "Something went wrong here. It has been noted; try again later.",
    503: "The database cannot be used right now. Nothing was stored; try again in a few seconds.",
}

JSON_HEADERS = [
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
]


def to_json(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def as_json(body):
    """The answer's body, and its headers: what we answer is nobody else's, and nothing but JSON."""
    for name, value in JSON_HEADERS:
        if name not in response.headers:
            response.set_header(name, value)
    return (
        b"" if body is None else body if isinstance(body, (bytes, GeneratorType)) else to_json(body)
    )


@app.hook("before_request")
def add_trailing_slash():
    """Serve /api/users as /api/users/: the original redirected, which lost the body of a POST."""
    if not request.environ["PATH_INFO"].endswith("/"):
        request.environ["PATH_INFO"] += "/"


def answer_json(route):
    """Bottle plugin: what a route returns goes out as JSON, what it fails with goes to the log."""

    @functools.wraps(route)
    def answer(*args, **kwargs):
        try:
            body = route(*args, **kwargs)
        except HTTPResponse:
            raise
        except sqlite3.DatabaseError as error:
            log.error("%s %r failed: %s", request.method, request.path, error)
            raise HTTPError(503) from None
        except Exception:
            log.exception("%s %r failed", request.method, request.path)
            raise HTTPError(500) from None
        return as_json(body)

    return answer


app.install(answer_json)


def answer_error(error):
    """The one door for errors, Bottle's own included: JSON, worded as the original does."""
    status = error.status_code
    if status == 405:
        return answer_wrong_method(error)
    body = (
        error.body
        if isinstance(error.body, dict)
        else {"detail": PUBLIC_DETAILS.get(status, error.status_line[4:])}
    )
    if status in (401, 429):
        log.warning(
            "refused %s %r from %s: %s",
            request.method,
            request.path,
            client_address(),
            body["detail"],
        )
    if status == 401:
        response.set_header("WWW-Authenticate", 'Bearer realm="api"')
    if status == 503:
        response.set_header("Retry-After", "5")
    return as_json(body)


app.default_error_handler = answer_error


def answer_wrong_method(error):
    """405, or 401 for who may not know; 204 for OPTIONS. All with what is allowed."""
    allowed = error.get_header("Allow").split(",")
    if request.method != "OPTIONS":
        route, _ = app.match({**request.environ, "REQUEST_METHOD": allowed[0]})
        try:
            getattr(route.callback, "check_sign_in", lambda: None)()
        except (HTTPError, sqlite3.Error) as error:
            refusal = error if isinstance(error, HTTPError) else HTTPError(503)
            refusal.apply(response)
            return answer_error(refusal)
    response.status = 204 if request.method == "OPTIONS" else 405
    response.set_header(
        "Allow", ", ".join([*allowed, *(["HEAD"] if "GET" in allowed else []), "OPTIONS"])
    )
    return as_json({"detail": f'Method "{request.method}" not allowed.'})


def client_address():
    """Whom a request is from: the peer, or whom the trusted proxy names as its own peer."""
    peer = request.environ.get("REMOTE_ADDR", "")
    forwarded = request.environ.get("HTTP_X_FORWARDED_FOR", "").split(",")[-1].strip()
    try:
        return str(ipaddress.ip_address(forwarded)) if peer == settings.trusted_proxy else peer
    except ValueError:
        return peer


PASSWORD_CHANGED = {"detail": "The user's password has been changed.", "code": "password_changed"}


def sign_in():
    """The user that the Authorization header names, None without one. Raises HTTPError 401 as simplejwt does."""
    scheme, *rest = request.environ.get("HTTP_AUTHORIZATION", "").split() or [""]
    if scheme.lower() != "bearer":
        return None
    if len(rest) != 1:
        raise HTTPError(
            401,
            {
                "detail": "Authorization header must contain two space-delimited values",
                "code": "bad_authorization_header",
            },
        )
    try:
        claims = read_access_token(rest[0])
    except TokenError as error:
        raise HTTPError(
            401,
            {
                "detail": "Given token not valid for any token type",
                "code": "token_not_valid",
                "messages": [
                    {"token_class": "AccessToken", "token_type": "access", "message": str(error)}
                ],
            },
        ) from None
    if "user_id" not in claims:
        raise HTTPError(
            401,
            {
                "detail": "Token contained no recognizable user identification",
                "code": "token_not_valid",
            },
        )
    user = token_user(claims)
    if user is None:
        raise HTTPError(401, {"detail": "User not found", "code": "user_not_found"})
    if was_ended(claims, user):
        raise HTTPError(401, PASSWORD_CHANGED)
    request.environ["factoryapp.user_id"] = user["id"]
    return user


def require_user():
    """The signed-in user. Raises HTTPError 401 when there is none."""
    user = sign_in()
    if user is None:
        raise HTTPError(401, {"detail": "Authentication credentials were not provided."})
    return user


def signed_in(route):
    """Call the route with the signed-in user first."""

    @functools.wraps(route)
    def with_user(*args, **kwargs):
        return route(require_user(), *args, **kwargs)

    with_user.check_sign_in = require_user
    return with_user


def signed_in_or_anonymous(route):
    """Anybody may call the route, but not with a wrong token."""

    @functools.wraps(route)
    def checked(*args, **kwargs):
        sign_in()
        return route(*args, **kwargs)

    checked.check_sign_in = sign_in
    return checked


class Text:
    """A text field: what it takes, and Django REST framework's wording of what it does not."""

    def __init__(
        self,
        max_length=None,
        required=True,
        tidy=None,
        pattern=None,
        pattern_error=None,
        example=None,
    ):
        self.max_length, self.required, self.tidy, self.example = (
            max_length,
            required,
            tidy,
            example,
        )
        self.pattern, self.pattern_error = pattern, pattern_error

    def describe(self):
        """The field's JSON schema."""
        schema = {
            "type": ["string", "number"],
            "minLength": 1,
            "maxLength": self.max_length,
            "example": self.example,
            "pattern": f"^{self.pattern}$"
            if self.pattern
            else r"^[^\u0000]*[^\s\u0000\u001c-\u001f\u0085][^\u0000]*$",
        }
        return {name: value for name, value in schema.items() if value is not None}

    def read(self, value):
        """(text, errors) of what was sent; a number counts as its digits."""
        if value is None:
            return None, ["This field may not be null."]
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return None, ["Not a valid string."]
        text = self.tidy(str(value)) if self.tidy else str(value)
        if not text.strip():
            return None, ["This field may not be blank."]
        errors = []
        if self.pattern and not re.fullmatch(self.pattern, text):
            errors.append(self.pattern_error)
        if self.max_length and len(text) > self.max_length:
            errors.append(f"Ensure this field has no more than {self.max_length} characters.")
        if "\0" in text:
            errors.append("Null characters are not allowed.")
        if surrogate := re.search("[\ud800-\udfff]", text):
            errors.append(f"Surrogate characters are not allowed: U+{ord(surrogate[0]):X}.")
        return text, errors


class NewPassword(Text):
    """A password to be set, which has to be hard enough to guess."""

    def describe(self):
        return {
            **super().describe(),
            "type": "string",
            "minLength": MIN_PASSWORD,
            "pattern": r"^[^\u0000]*[^\d\s\u0000\u001c-\u001f\u0085][^\u0000]*$",
        }

    def read(self, value):
        text, errors = super().read(value)
        if not errors and len(text) < MIN_PASSWORD:
            errors.append(
                f"This password is too short. It must contain at least {MIN_PASSWORD} characters."
            )
        if text and text.isdigit():
            errors.append("This password is entirely numeric.")
        return text, errors


class Flag:
    """Yes or no; in a form, true or false."""

    required = False

    def describe(self):
        return {"type": "boolean"}

    def read(self, value):
        if value is None:
            return None, ["This field may not be null."]
        if isinstance(value, str):
            value = {"true": True, "false": False, "1": True, "0": False}.get(value.lower())
        return (value, []) if isinstance(value, bool) else (None, ["Must be a valid boolean."])


class Moment:
    """A time in ISO 8601, up to 30 days ahead; one that has passed means at once. Read as seconds since 1970."""

    required = False
    pattern = r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d(:\d\d(\.\d{1,9})?)?([Zz]|[+-]\d\d:?\d\d)"

    def describe(self):
        return {"type": "string", "format": "date-time"}

    def read(self, value):
        if value is None:
            return None, ["This field may not be null."]
        try:
            if not re.fullmatch(self.pattern, value):
                raise ValueError
            seconds = datetime.fromisoformat(value.upper().replace("Z", "+00:00")).timestamp()
        except (TypeError, ValueError, OverflowError):
            return None, [
                "Datetime has wrong format. Use this format instead: YYYY-MM-DDThh:mm[:ss[.uuuuuu]](+HH:MM|-HH:MM|Z)."
            ]
        if seconds > now() + SEND_AHEAD_SECONDS:
            return None, [f"Ensure this is at most {SEND_AHEAD_SECONDS // 86_400} days ahead."]
        return seconds, []


class Number:
    """An integer of a query string."""

    required = False

    def __init__(self, least, most):
        self.least, self.most = least, most

    def describe(self):
        return {"type": "integer", "minimum": self.least, "maximum": self.most}

    def read(self, value):
        if not re.fullmatch("-?[0-9]{1,20}", value):
            return None, ["A valid integer is required."]
        if int(value) < self.least:
            return None, [f"Ensure this value is greater than or equal to {self.least}."]
        if int(value) > self.most:
            return None, [f"Ensure this value is less than or equal to {self.most}."]
        return int(value), []


def tidy_username(name):
    """The one spelling of a username: trimmed, NFKC."""
    return unicodedata.normalize("NFKC", name.strip())


class Form(dict):
    """Fields of an HTML form, which cannot leave one out: a blank one may mean that."""


def read_fields(fields, sent):
    """The values of declared fields, None for one that may be left out and is. Raises HTTPError 400 naming all that are wrong."""
    values, errors = {}, {}
    for name, field in fields.items():
        if name not in sent or not field.required and isinstance(sent, Form) and sent[name] == "":
            values[name], errors[name] = None, ["This field is required."] if field.required else []
        else:
            values[name], errors[name] = field.read(sent[name])
    if errors := {name: sentences for name, sentences in errors.items() if sentences}:
        raise HTTPError(400, errors)
    return values


def takes(max_body_bytes=MAX_BODY_BYTES, **fields):
    """Call the route with the fields of the request's body. Answers 400 for what they do not take, 413 and 415 before."""

    def declare(route):
        @functools.wraps(route)
        def with_fields(*args, **kwargs):
            return route(*args, **kwargs, **read_fields(fields, read_body(max_body_bytes)))

        with_fields.fields = fields
        return with_fields

    return declare


def asks(**fields):
    """Call the route with the fields of the request's query string."""

    def declare(route):
        @functools.wraps(route)
        def with_fields(*args, **kwargs):
            return route(*args, **kwargs, **read_fields(fields, request.query))

        with_fields.query_fields = fields
        return with_fields

    return declare


def answers(status, schema, *refusals):
    """Declare what the route answers: the status when all went well, the JSON schema of that answer (None: no JSON), and the
    statuses it refuses with beside those that other declarations imply."""

    def declare(route):
        @functools.wraps(route)
        def with_status(*args, **kwargs):
            body = route(*args, **kwargs)
            if status != 200:
                response.status = status
            return body

        with_status.answer, with_status.refusals = (status, schema), refusals
        return with_status

    return declare


def read_body(max_bytes):
    """The fields of the request's body, JSON or a form, as a dict. Raises HTTPError 400, 413, 415."""
    if request.content_length > max_bytes:
        raise HTTPError(
            413, {"detail": f"The request is too large: {max_bytes} bytes are the most."}
        )
    if request.content_length <= 0:
        return {}
    media_type = request.content_type.split(";")[0].strip().lower()
    if media_type == "application/json":
        return read_json(request.body.read())
    if media_type == "application/x-www-form-urlencoded":
        return Form(
            urllib.parse.parse_qsl(
                request.body.read().decode("utf-8", "replace"), keep_blank_values=True
            )
        )
    if media_type == "multipart/form-data":
        try:
            return Form(request.POST)
        except (HTTPError, ValueError, LookupError) as error:
            log.info("multipart form refused: %s", error)
            raise HTTPError(
                400, {"detail": "Multipart form parse error - the body does not follow RFC 7578."}
            ) from None
    raise HTTPError(415, {"detail": f'Unsupported media type "{request.content_type}" in request.'})


def read_json(body):
    """The object in a JSON body. Raises HTTPError 400 in the words of Python's json, as the original does."""
    try:
        value = json.loads(body.decode(), parse_constant=refuse_constant, parse_float=finite_float)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise HTTPError(400, {"detail": f"JSON parse error - {reason}"}) from None
    if value is None:
        raise HTTPError(400, {"non_field_errors": ["No data provided"]})
    if not isinstance(value, dict):
        raise HTTPError(
            400,
            {
                "non_field_errors": [
                    f"Invalid data. Expected a dictionary, but got {type(value).__name__}."
                ]
            },
        )
    return value


def refuse_constant(name):
    """NaN and Infinity are Python's, not JSON's."""
    raise ValueError(f"Out of range float values are not JSON compliant: {name!r}")


def finite_float(digits):
    """A float, unless it is too large for one."""
    value = float(digits)
    return value if abs(value) < float("inf") else refuse_constant(digits)


def answer_list(find_page_end, list_rows, args, after, before, limit):
    """A JSON array of the rows between two ids, or of `limit` of them: the last before `before`, else the first.

    Few rows are answered whole, more are streamed in bounded memory. Where `limit` leaves some out, a Link header names the
    next page (RFC 8288).
    """
    query = {
        name: value
        for name, value in (("after", after), ("before", before), ("limit", limit))
        if value is not None
    }
    side = "after" if before is None or after is not None else "before"
    after, before = after or 0, MAX_ID if before is None else before
    if limit:
        order = "ASC" if side == "after" else "DESC"
        end = [row["id"] for row in find_page_end(connection(), *args, after, before, limit, order)]
        if len(end) == 2:  # the page's last row, and one more
            query[side] = end[0]
            response.set_header(
                "Link", f'<{request.path}?{urllib.parse.urlencode(query)}>; rel="next"'
            )
            after, before = (after, end[1]) if side == "after" else (end[1], before)
    rows = list_rows(connection(), *args, after, before, LIST_PAGE_ROWS)
    if len(rows) < LIST_PAGE_ROWS:
        return b"[%s]" % ",".join(text for _, text in rows).encode()
    if may_not_wait():
        raise MustWait
    return stream_rows(rows, list_rows, args, before)


def stream_rows(rows, list_rows, args, before):
    """The pieces of such an array, from its first rows on."""
    opening = "["
    while rows:
        yield (opening + ",".join(text for _, text in rows)).encode()
        opening, rows = ",", list_rows(connection(), *args, rows[-1]["id"], before, LIST_PAGE_ROWS)
    yield b"]"


def an_object(**properties):
    """The JSON schema of an object that has all of these."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


ID = {"type": "integer", "minimum": 1, "example": 1}
A_NAME = {"type": "string", "example": "alice"}
A_TIME = {"type": "string", "format": "date-time", "example": "2026-11-23T18:08:27.130235Z"}
A_JWT = {"type": "string", "example": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJ0b2tlbl90eXBlIjoi…"}
USER = an_object(id=ID, username=A_NAME)
MESSAGE = an_object(
    id=ID,
    sender=A_NAME,
    recipient=A_NAME,
    text={"type": "string", "example": "Линия 4 остановлена"},
    created_at=A_TIME,
    source={"enum": ["api", "telegram"]},
    delivery={
        "enum": ["queued", "sent", "failed", "unlinked"],
        "description": "of the recipient's copy",
    },
)

USERNAME = Text(
    MAX_USERNAME,
    tidy=tidy_username,
    example="alice",
    pattern=r"[\w.@+-]+",
    pattern_error=(
        "Enter a valid username. This value may contain only letters, numbers, and @/./+/-/_ characters."
    ),
)
NAME = Text(tidy=tidy_username, example="alice")  # of somebody who may not exist
RECIPIENT = Text(tidy=tidy_username, example="alice", required=False)
PASSWORD = Text(example="S3cure-pass-91")
NEW_PASSWORD = NewPassword(MAX_PASSWORD, example="S3cure-pass-91")
TOKEN = Text(example=A_JWT["example"])
MESSAGE_TEXT = Text(MAX_TEXT, example="Линия 4 остановлена")
PAGING = {
    "after": Number(0, MAX_ID),
    "before": Number(0, MAX_ID),
    "limit": Number(1, MAX_PAGE_ROWS),
}


@app.get("/")
@answers(200, None)
def show_page():
    """The page for people with a browser."""
    for name, value in PAGE_HEADERS:
        response.set_header(name, value)
    return PAGE.encode()


@app.get("/openapi.json/")
@answers(200, {"type": "object"})
def show_openapi():
    """This description of the API, in OpenAPI 3.1."""
    from_proxy = (
        request.environ.get("REMOTE_ADDR") == settings.trusted_proxy
    )  # else anybody might say https
    scheme = request.urlparts.scheme if from_proxy else request.environ["wsgi.url_scheme"]
    return describe_api(f"{scheme}://{request.environ.get('HTTP_HOST', '')}")


@app.get("/health/")
@answers(
    200,
    an_object(
        status={"const": "ok"},
        bot={"type": ["string", "null"], "example": "@factory_bot"},
        queued={"type": "integer"},
        oldest_queued_seconds={"type": "number"},
    ),
    503,
)
def show_health():
    """Whether the database answers, which bot speaks (null: Telegram was not reached yet), and how much it has still to say."""
    if may_not_wait():
        raise MustWait  # counting a long queue takes a while
    try:
        if not is_database_there():
            raise sqlite3.OperationalError("its file was removed or replaced")
        with closing(
            sqlite3.connect(database_uri("ro"), uri=True)
        ) as db:  # a new one: ours may answer from memory
            db.row_factory = sqlite3.Row
            bot = find_bot(db, turns.bot_id)
            queued, oldest = count_waiting(db)
    except sqlite3.Error as error:
        log.error("the database does not answer: %s", error)
        raise HTTPError(
            503, {"status": "error", "reason": f"The database does not answer: {error}."}
        ) from None
    name = (
        "terminal"
        if turns.bot_id == Terminal.id
        else f"@{bot['username']}"
        if bot and bot["username"]
        else None
    )
    return {
        "status": "ok",
        "bot": name,
        "queued": queued,
        "oldest_queued_seconds": round(now() - oldest, 3) if queued else 0,
    }


@app.post("/api/users/register/")
@signed_in_or_anonymous
@takes(username=USERNAME, password=NEW_PASSWORD)
@answers(201, USER, 401)
def register(username, password):
    """Make an account."""
    if find_user_by_name(
        connection(), username
    ):  # or each of many tries would take the time of a hash
        raise HTTPError(400, NAME_TAKEN)
    password_hash = hash_password(password)
    try:
        with transaction() as db:
            user_id = add_user(db, username, password_hash)
    except sqlite3.IntegrityError:
        raise HTTPError(400, NAME_TAKEN) from None
    return {"id": user_id, "username": username}


NAME_TAKEN = {"username": ["A user with that username already exists."]}


def check_password(user_id, username, password, password_hash):
    """Whether the password is right. Raises HTTPError 429 once this address has guessed too often."""
    if may_not_wait():
        raise MustHash
    address = client_address()
    if (wait := math.ceil(login_throttle.try_once(address, username))) > 0:
        raise HTTPError(
            429,
            {"detail": f"Request was throttled. Expected available in {wait} seconds."},
            **{"Retry-After": str(wait)},
        )
    is_right = password_matches(password, password_hash) and user_id is not None
    if is_right:
        login_throttle.forgive(address, username)
    return is_right


@app.post("/auth/token/")
@takes(username=NAME, password=PASSWORD)
@answers(200, an_object(refresh=A_JWT, access=A_JWT), 401, 429)
def log_in(username, password):
    """Exchange name and password for a refresh and an access token."""
    user = find_user_by_name(connection(), username)
    is_right = check_password(
        user and user["id"], username, password, user["password"] if user else nobodys_hash()
    )
    if (
        not is_right or find_password(connection(), user["id"]) != user["password"]
    ):  # it may have been changed meanwhile
        raise HTTPError(401, {"detail": "No active account found with the given credentials"})
    return {"refresh": issue_token("refresh", user), "access": issue_token("access", user)}


def read_live_token(token, kind=None):
    """(claims, user) of a JWT that is neither blacklisted nor ended by a new password; the user may be gone: None.

    Raises HTTPError 401, worded as simplejwt's token views do.
    """
    try:
        claims = read_token(token, kind)
    except TokenError as error:
        raise HTTPError(401, {"detail": str(error), "code": "token_not_valid"}) from None
    user = token_user(claims)
    if user and was_ended(claims, user):
        raise HTTPError(401, PASSWORD_CHANGED)
    return claims, user


@app.post("/auth/token/refresh/")
@takes(refresh=TOKEN)
@answers(200, an_object(access=A_JWT), 401)
def refresh_token(refresh):
    """Exchange a refresh token for a new access token."""
    _, user = read_live_token(refresh, "refresh")
    if user is None:
        raise HTTPError(
            401,
            {"detail": "No active account found for the given token.", "code": "no_active_account"},
        )
    return {"access": issue_token("access", user)}


@app.post("/auth/token/verify/")
@takes(token=TOKEN)
@answers(200, an_object(), 401)
def verify_token(token):
    """Say whether a token of either kind is valid."""
    read_live_token(token)
    return {}


@app.post("/auth/token/blacklist/")
@takes(refresh=TOKEN)
@answers(200, an_object(), 401)
def blacklist_token(refresh):
    """Log out: the refresh token is dead from now on."""
    claims, _ = read_live_token(refresh, "refresh")
    with transaction() as db:
        add_blacklisted_token(db, claims["jti"], float(claims["exp"]))
    return {}


@app.get("/api/users/get-telegram-token/")
@signed_in
@answers(
    200,
    an_object(
        telegram_token={"type": "string"}, expires_at=A_TIME, link={"type": ["string", "null"]}
    ),
)
def get_telegram_token(user):
    """A new one-time token that links a chat to the account; the earlier one is dead."""
    token, expires_at = secrets.token_urlsafe(32), now() + LINK_TOKEN_SECONDS
    with transaction() as db:
        add_link_token(db, user["id"], token, expires_at)
        bot = find_bot(db, turns.bot_id)
    link = f"https://t.me/{bot['username']}?start={token}" if bot and bot["username"] else None
    return {"telegram_token": token, "expires_at": iso(expires_at), "link": link}


@app.post("/api/users/unlink-telegram/")
@signed_in
@answers(204, None)
def unlink_telegram(user):
    """Unlink the account's chat, for a lost phone: what is queued for it is given up."""
    if may_not_wait():
        raise MustWait  # that may be much
    with transaction() as db:
        if chat := find_chat(db, user["id"]):
            unlink_chat(db, *chat, "the user unlinked the chat")


@app.post("/api/users/set-password/")
@signed_in
@takes(current_password=PASSWORD, new_password=NEW_PASSWORD)
@answers(204, None, 429)
def change_password(user, current_password, new_password):
    """Change the password, which ends every token issued before."""
    old_hash = find_password(connection(), user["id"])
    if not check_password(user["id"], user["username"], current_password, old_hash):
        log.warning("refused set-password from %s: wrong password", client_address())
        raise HTTPError(400, {"current_password": ["Invalid password."]})
    new_hash = hash_password(new_password)
    with transaction() as db:
        if not set_password(db, user["id"], old_hash, new_hash):
            raise HTTPError(401, PASSWORD_CHANGED)


@app.get("/api/users/me/")
@signed_in
@answers(200, an_object(id=ID, username=A_NAME, telegram_linked={"type": "boolean"}))
def show_account(user):
    """Who you are, and whether a chat is linked to you."""
    return {
        "id": user["id"],
        "username": user["username"],
        "telegram_linked": find_chat(connection(), user["id"]) is not None,
    }


@app.get("/api/users/")
@signed_in
@asks(**PAGING)
@answers(200, {"type": "array", "items": USER})
def list_all_users(user, **page):
    """Everybody: ids and names. All, or a page."""
    return answer_list(find_user_page_end, list_users, (), **page)


@app.post("/api/messages/")
@signed_in
@takes(
    MAX_MESSAGE_BODY_BYTES, text=MESSAGE_TEXT, recipient=RECIPIENT, silent=Flag(), send_at=Moment()
)
@answers(201, MESSAGE, 422)
def post_message(user, text, recipient, silent, send_at):
    """Store a message and queue its copies, together or not at all. With an Idempotency-Key, a retry stores nothing more."""
    key = read_idempotency_key()
    request_hash = hashlib.sha256(repr((text, recipient, silent, send_at)).encode()).digest()
    with transaction() as db:
        if key and (earlier := find_idempotency_key(db, user["id"], key)):
            return replay(db, user, request_hash, earlier)
        to = find_user_by_name(db, recipient) if recipient else user
        if to is None:
            raise HTTPError(400, {"recipient": ["No such user."]})
        message = add_message(db, user, to, text, "api", bool(silent), send_at or 0)
        if key:
            add_idempotency_key(db, user["id"], key, request_hash, message)
    return message


post_message.headers = {"Idempotency-Key": {"type": "string", "pattern": "^[!-~]{1,255}$"}}


def read_idempotency_key():
    """The request's Idempotency-Key, or None. Raises HTTPError 400."""
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is not None and not re.fullmatch("[!-~]{1,255}", key):
        raise HTTPError(400, {"Idempotency-Key": ["Give 1 to 255 visible ASCII characters."]})
    return key


def replay(db, user, request_hash, earlier):
    """What was answered before to a request with this key. Raises HTTPError 422 when it was another request."""
    if earlier["request_hash"] != request_hash:
        raise HTTPError(
            422, {"detail": "This Idempotency-Key was used for another message: take a new key."}
        )
    response.set_header("Idempotency-Replayed", "true")
    return {
        **json.loads(find_message(db, earlier["message_id"], user["id"])),
        "delivery": earlier["delivery"],
    }


@app.get("/api/messages/")
@signed_in
@asks(**PAGING)
@answers(200, {"type": "array", "items": MESSAGE})
def list_own_messages(user, **page):
    """All that you sent or received, oldest first. All, or a page."""
    return answer_list(find_message_page_end, list_messages, (user["id"],), **page)


@app.get("/api/messages/<message_id:re:[0-9]{1,19}>/")
@signed_in
@answers(200, MESSAGE, 404)
def show_message(user, message_id):
    """One message that you sent or received."""
    message = find_message(connection(), min(int(message_id), MAX_ID), user["id"])
    if message is None:
        raise HTTPError(404)
    return message.encode()


def describe_api(address):
    """The OpenAPI 3.1 document, made from what the routes declare. `address` is this server's URL."""
    paths = {}
    for route in app.routes:
        path = re.sub(r"<(\w+):[^>]+>", r"{\1}", route.rule)
        path = path.rstrip("/") if "." in path else path
        paths.setdefault(path, {})[route.method.lower()] = describe_route(
            route.callback, re.findall(r"{(\w+)}", path)
        )
    return {
        "openapi": "3.1.0",
        "info": {"title": "FactoryApp", "version": "1.0.0", "description": __doc__.splitlines()[0]},
        "servers": [{"url": address}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "Bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
            }
        },
    }


def describe_route(route, path_names):
    """The OpenAPI operation of one route: every field it takes, every status it answers."""
    status, schema = route.answer
    fields, query = getattr(route, "fields", {}), getattr(route, "query_fields", {})
    sign_in_check = getattr(route, "check_sign_in", None)
    statuses = {
        500,
        503,
        *route.refusals,
        *([400] if fields or query else []),
        *([413, 415] if fields else []),
        *([401] if sign_in_check else []),
    }
    operation = {
        "operationId": route.__name__,
        "summary": route.__doc__.split("\n")[0],
        "responses": {str(status): {"description": "done"}},
    }
    if schema is not None:
        operation["responses"][str(status)]["content"] = {"application/json": {"schema": schema}}
    elif status == 200:
        operation["responses"]["200"]["content"] = {"text/html": {"schema": {"type": "string"}}}
    for refusal in sorted(statuses):
        operation["responses"][str(refusal)] = {
            "description": HTTP_CODES[refusal],
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
    for name, statuses_with_it in (
        ("Link", [200] if "limit" in query else []),
        ("Retry-After", statuses & {429, 503}),
        ("Idempotency-Replayed", [201] if hasattr(route, "headers") else []),
    ):
        for with_it in statuses_with_it:
            operation["responses"][str(with_it)].setdefault("headers", {})[name] = {
                "schema": {"type": "string"}
            }
    if sign_in_check:
        operation["security"] = (
            [{"Bearer": []}] if sign_in_check is require_user else [{"Bearer": []}, {}]
        )
    operation["parameters"] = [
        *({"name": name, "in": "path", "required": True, "schema": ID} for name in path_names),
        *(
            {"name": name, "in": "query", "schema": field.describe()}
            for name, field in query.items()
        ),
        *(
            {"name": name, "in": "header", "schema": header}
            for name, header in getattr(route, "headers", {}).items()
        ),
    ]
    if fields:
        body = {
            "schema": {
                "type": "object",
                "properties": {name: field.describe() for name, field in fields.items()},
                "required": [name for name, field in fields.items() if field.required],
            }
        }
        operation["requestBody"] = {
            "required": True,
            "content": dict.fromkeys(
                ("application/json", "application/x-www-form-urlencoded", "multipart/form-data"),
                body,
            ),
        }
    return operation


class JsonErrorTask(ErrorTask):
    """waitress's own refusals, of what is not HTTP or too large, in JSON like all others."""

    def execute(self):
        error = self.request.error
        detail = (
            PUBLIC_DETAILS[error.code]
            if error.code in (413, 500, 503)
            else f"{error.reason}: {error.body}"
        )
        body = to_json({"detail": detail})
        self.status = f"{error.code} {error.reason}"
        self.response_headers.extend(
            [*JSON_HEADERS, *([("Retry-After", "5")] if error.code == 503 else [])]
        )
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class NotStored:
    """What take_back() answers, as waitress has its errors."""

    code, reason, body = 503, "Service Unavailable", PUBLIC_DETAILS[503]


class TimedRequest(HTTPRequestParser):
    """A request that knows when it began, and refuses what others might read in another way (RFC 9112, sections 2.2, 6.1)."""

    def __init__(self, adj):
        super().__init__(adj)
        self.started_at = time.time()

    def received(self, data):
        if self.body_rcv is None and b"\n\n" in (self.header_plus + data).partition(b"\r\n\r\n")[0]:
            self.error, self.completed = BadRequest("a line ends with CR LF"), True
            return len(data)
        return super().received(data)

    def parse_header(self, header_plus):
        super().parse_header(header_plus)
        if self.chunked and "CONTENT_LENGTH" in self.headers or "TRANSFER_ENCODING" in self.headers:
            raise ParsingError("send Content-Length or, in HTTP/1.1, Transfer-Encoding, not both")


class Channel(HTTPChannel):
    """One client's connection."""

    error_task_class = JsonErrorTask
    parser_class = TimedRequest

    def take_back(self):
        """Say that it did not work, instead of the answer that waits to be sent."""
        if not self.connected:
            return
        self.outbufs, self.total_outbufs_len = [OverflowableBuffer(self.adj.outbuf_overflow)], 0
        request = TimedRequest(self.adj)
        request.error, request.version = NotStored, "1.1"
        JsonErrorTask(self, request).service()
        self.close_when_flushed = True

    def handle_read(self):
        """Read, but do not count blank lines as activity: they could keep a connection open for ever."""
        last_activity = self.last_activity
        super().handle_read()
        if self.request is None and not self.requests:
            self.last_activity = last_activity

    def _flush_some(self, do_close=True):
        """Send what waits to be sent; nothing leaves while the round that answers it is not on disk."""
        return not (may_not_wait() and connection().is_grouping) and super()._flush_some(do_close)

    def _flush_outbufs_below_high_watermark(self):
        """Let no thread wait for a client that takes its answer slowly: what it has not taken is kept in a temporary file."""
        if self.total_outbufs_len > MAX_UNTAKEN_BYTES and not may_not_wait():
            super()._flush_outbufs_below_high_watermark()

    def is_too_slow(self, at, is_crowded):
        """Whether it has held on to its connection too long. waitress itself counts only the time between two bytes."""
        seconds = REQUEST_SECONDS_CROWDED if is_crowded else REQUEST_SECONDS
        if self.requests:  # being served: does the client take the answer?
            return self.total_outbufs_len > 0 and at - self.last_activity > REQUEST_SECONDS
        if self.request is None and not is_crowded:
            return False  # an idle keep-alive connection: waitress's channel_timeout sees to it
        return at - (self.request.started_at if self.request else self.last_activity) > seconds


def is_post(channel):
    return getattr(channel.requests[0], "command", None) == "POST"


class Lanes:
    """waitress's dispatcher: most requests are served where they are read, on waitress's own thread, since handing one to
    another thread costs more than serving it. What would hold that thread up goes to threads that may wait."""

    def __init__(self):
        self.quick = deque()
        self.patient, self.hashing = ThreadedTaskDispatcher(), ThreadedTaskDispatcher()
        self.patient.set_thread_count(PATIENT_THREADS)
        self.hashing.set_thread_count(HASHES_AT_ONCE)

    def add_task(self, channel):
        """Choose the lane of a channel's next request. The caller holds the channel's lock: it is not served in here."""
        if may_not_wait():
            self.quick.append(channel)
        else:  # the next request of who did not wait for an answer: it may hash
            self.hashing.add_task(channel)

    def serve_quick(self):
        """Serve what was read in this round. What it writes is one transaction, so that all wait for the disk but once."""
        if not self.quick:
            return
        db, wrote = connection(), []
        batch = sorted(
            self.quick, key=is_post
        )  # who reads, reads before: it might see what cannot be stored
        self.quick.clear()
        local.patience, db.is_grouping = PATIENCE_SECONDS, True
        for channel in batch:
            transactions, body = db.transactions, channel.requests[0].get_body_stream()
            try:
                channel.service()
            except MustWait as reason:
                local.patience = 0  # once a round
                body.seek(0)
                (self.hashing if isinstance(reason, MustHash) else self.patient).add_task(channel)
            if db.transactions > transactions:
                wrote.append(channel)
        db.is_grouping = False
        try:
            if wrote:
                commit(db)
        except sqlite3.Error as error:
            log.error("%s requests could not be stored: %s", len(wrote), error)
            for channel in wrote:
                channel.take_back()
        for channel in batch:
            if channel.total_outbufs_len:
                channel.handle_write()
        for channel in self.quick:  # likewise
            self.hashing.add_task(channel)
        self.quick.clear()

    def shutdown(self):
        self.patient.shutdown(timeout=STOP_SECONDS / 2)
        self.hashing.shutdown(timeout=STOP_SECONDS / 2)


def log_requests(application):
    """The WSGI application, with a line in the log for each request."""

    def logged(environ, start_response):
        started_at, path, status = (
            time.perf_counter(),
            urllib.parse.quote(environ["PATH_INFO"], encoding="latin-1"),
            [],
        )

        def note_status(line, *args):
            status[:] = [line[:3]]
            return start_response(line, *args)

        try:
            return application(environ, note_status)
        finally:
            if status:  # else it is done again on another thread
                log.info(
                    "%s %s %s %.1f ms, user %s, %s",
                    environ["REQUEST_METHOD"],
                    path,
                    status[0],
                    (time.perf_counter() - started_at) * 1000,
                    environ.get("factoryapp.user_id", "-"),
                    client_address(),
                )

    return logged


def make_server(sock):
    """waitress on a listening socket, with our lanes, limits and JSON errors."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue is no news
    application = log_requests(app) if log.isEnabledFor(logging.INFO) else app
    server = waitress.create_server(
        application,
        sockets=[sock],
        _dispatcher=Lanes(),
        ident=None,
        connection_limit=CONNECTIONS,
        cleanup_interval=1,
        channel_timeout=60,
        max_request_body_size=MAX_MESSAGE_BODY_BYTES,
        max_request_header_size=16 * 1024,
        clear_untrusted_proxy_headers=False,
    )

    def close_slow_channels(at):
        type(server).maintenance(server, at)
        for channel in server.active_channels.values():
            if channel.is_too_slow(at, server.in_connection_overflow):
                channel.will_close = True

    def wake_loop():
        if not may_not_wait():  # or it is awake
            type(server).pull_trigger(server)

    server.channel_class, server.maintenance, server.pull_trigger = (
        Channel,
        close_slow_channels,
        wake_loop,
    )
    return server


def serve(server, stop):
    """Serve until told to stop. This thread may not wait from now on: everybody would."""
    local.patience, local.path = 0, None
    while not stop.is_set():
        wasyncore.poll2(1, server._map)
        server.task_dispatcher.serve_quick()
    server.task_dispatcher.shutdown()
    del local.patience, local.path


# --- Main -------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadSetting(f"{message}. See --help.")


def read_arguments(argv):
    """The command line, where the environment has not decided already. Raises BadSetting."""
    env = os.environ.get
    parser = Parser(
        description="An HTTP API whose messages a Telegram bot repeats in linked chats.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""environment:
  FACTORYAPP_HOST, FACTORYAPP_PORT, FACTORYAPP_DB, FACTORYAPP_TRUSTED_PROXY,
  FACTORYAPP_LOG_LEVEL  the same as the options; an option wins
  TELEGRAM_BOT_TOKEN    the bot's token from @BotFather; without it the bot talks in this terminal
  TELEGRAM_API_URL      Bot API server to use (default https://api.telegram.org)
  FACTORYAPP_SECRET     key that signs the JWTs, at least 32 bytes (default: made at first start, kept in the database)""",
    )
    parser.add_argument(
        "--host",
        default=env("FACTORYAPP_HOST", "127.0.0.1"),
        help="address to listen on (default 127.0.0.1)",
    )
    parser.add_argument(
        "--port",
        default=env("FACTORYAPP_PORT", "8080"),
        help="port to listen on, 0 for any (default 8080)",
    )
    parser.add_argument(
        "--db",
        default=env("FACTORYAPP_DB", "factoryapp.db"),
        help="database file (default factoryapp.db)",
    )
    parser.add_argument(
        "--trusted-proxy",
        metavar="ADDRESS",
        default=env("FACTORYAPP_TRUSTED_PROXY"),
        help="address of a reverse proxy whose X-Forwarded-For is believed",
    )
    parser.add_argument(
        "--log-level",
        default=env("FACTORYAPP_LOG_LEVEL"),
        help="least urgent lines to log to standard error: "
        "debug, info (a line a request), warning or error (default info; warning when the bot talks in "
        "this terminal, where the lines would come between you and it)",
    )
    arguments = parser.parse_args(argv)
    arguments.log_level = arguments.log_level or (
        "info" if env("TELEGRAM_BOT_TOKEN") else "warning"
    )
    if arguments.log_level.lower() not in ("debug", "info", "warning", "error"):
        raise BadSetting(
            f"The log level has to be debug, info, warning or error, not {arguments.log_level!r}: change --log-level "
            "or FACTORYAPP_LOG_LEVEL."
        )
    try:
        arguments.trusted_proxy = (
            str(ipaddress.ip_address(arguments.trusted_proxy)) if arguments.trusted_proxy else None
        )
    except ValueError:
        raise BadSetting(
            f"The trusted proxy has to be an IP address, not {arguments.trusted_proxy!r}: change --trusted-proxy or "
            "FACTORYAPP_TRUSTED_PROXY."
        ) from None
    for name in ("host", "db"):
        if not getattr(arguments, name):
            raise BadSetting(
                f"The {name} is empty: give --{name} or FACTORYAPP_{name.upper()} a value, or leave it out."
            )
    if not re.fullmatch("[0-9]{1,5}", arguments.port) or int(arguments.port) > 65535:
        raise BadSetting(
            f"The port has to be a number from 0 to 65535, not {arguments.port!r}: change --port or FACTORYAPP_PORT."
        )
    return arguments


def choose_home():
    """The bot's home that the environment asks for. Raises BadSetting."""
    token = os.environ.get("TELEGRAM_BOT_TOKEN", "").strip()
    if not token:
        return Terminal()
    if not re.fullmatch("[1-9][0-9]{0,17}:[A-Za-z0-9_-]+", token):
        raise BadSetting(
            "TELEGRAM_BOT_TOKEN is malformed: copy it whole from @BotFather, it looks like 123456789:AAE3xyz."
        )
    api_url = os.environ.get("TELEGRAM_API_URL") or "https://api.telegram.org"
    try:
        parts = urllib.parse.urlsplit(api_url)
        is_good = (
            parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        )  # .port raises when it is no port
    except ValueError:
        is_good = False
    if not is_good:
        raise BadSetting("TELEGRAM_API_URL is malformed: it looks like https://api.telegram.org.")
    return Telegram(token, api_url)


def lock_database():
    """Keep other processes off the database for as long as this one lives. Raises BadSetting when one is there already."""
    try:
        lock = open(settings.db + ".lock", "a")
        os.chmod(lock.name, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadSetting(
            f"FactoryApp is already running on the database {settings.db}: end that one, or name another file "
            "with --db."
        ) from None
    except OSError as error:
        raise BadSetting(
            f"The database {settings.db} cannot be used ({error.strerror}): name a file in a folder that can be "
            "written with --db."
        ) from None
    return lock


def listen(host, port):
    """A listening socket. Raises BadSetting when the address cannot be had."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except (OSError, ValueError, TypeError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (while")[0]
        raise BadSetting(
            f"Cannot listen on {host} port {port} ({reason}): choose another --host or --port, or end what uses "
            "it."
        ) from None


def main(argv=None):
    """Start everything, serve until SIGTERM or Ctrl-C, end cleanly. Returns the exit code."""
    os.umask(0o077)  # what we make is for its owner alone
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(few, files), most))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging._srcfile, logging.logThreads, logging.logProcesses = (
        None,
        False,
        False,
    )  # "Optimization" in its HOWTO: we print none
    for name in ("urllib3", "TeleBot"):  # they print URLs, and with them the bot's token
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")
    try:
        arguments = read_arguments(argv)
        logging.getLogger().setLevel(arguments.log_level.upper())
        settings.db = str(Path(arguments.db).resolve())
        settings.trusted_proxy = arguments.trusted_proxy
        settings.secret = os.fsencode(os.environ.get("FACTORYAPP_SECRET", "")) or None
        if settings.secret and len(settings.secret) < SECRET_MIN_BYTES:
            raise BadSetting(
                f"FACTORYAPP_SECRET is too short: give it at least {SECRET_MIN_BYTES} bytes, or leave it out."
            )
        home = choose_home()
        check_store()
        lock = lock_database()
        sock = listen(arguments.host, int(arguments.port))
        open_store()
    except BadSetting as error:
        print(f"factoryapp: {error}", file=sys.stderr)
        return 2

    stop = threading.Event()
    server = make_server(sock)

    def end(signum, frame):
        stop.set()
        server.trigger.pull_trigger()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(
        signal.SIGTTIN, signal.SIG_IGN
    )  # or reading the terminal from the background would stop the process
    turns.open(home.id, list_queues(connection(), home.id))
    host, port = sock.getsockname()[:2]
    announce(
        f"FactoryApp listens on http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)\n"
        f"database: {settings.db}"
    )
    if isinstance(home, Terminal):
        announce(
            "bot: this terminal; type what you would write to it in Telegram, /start to begin with"
        )
    else:
        announce("bot: on Telegram, not reached yet")
    senders = [
        threading.Thread(target=run_outbox, args=(home, stop), name=f"sender-{n}", daemon=True)
        for n in range(SENDERS)
    ]
    for worker in (
        threading.Thread(target=home.run, args=(stop,), name="polling", daemon=True),
        *senders,
    ):
        worker.start()
    serve(server, stop)
    sock.close()
    turns.open(None, ())
    ends_at = time.monotonic() + STOP_SECONDS / 2
    for sender in senders:  # not the polling thread, which may sleep in its call: what it has not received yet comes again
        sender.join(max(0, ends_at - time.monotonic()))
    try:
        connection().execute("PRAGMA busy_timeout = 200")
        connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        log.warning("the write-ahead log was left as it is: %s", error)  # the next start reads it
    lock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
