-- FactoryApp's database. The server executes this file at every start, from top to bottom. The part "The schema" adds
-- everything that is missing and drops nothing. The parts "Up to version N" run only on databases of schema versions 1 to N.
--
-- Columns named *_at that clients see are ISO 8601 text in UTC with a Z; *_at columns that the server computes with are seconds
-- since 1970 (REAL). New columns are added at the end of a table, since ALTER TABLE can add them nowhere else. The server splits
-- the file at semicolons that end a line, so only statements may end a line with a semicolon.

-- === Up to version 5: before the rest
-- Older versions allowed names that differ only by case: add the id to the folded name of all but the first.
UPDATE users SET folded = folded || ' ' || id
    WHERE id > (SELECT min(id) FROM users AS first WHERE first.folded = users.folded);
ALTER TABLE users DROP COLUMN tokens_from;
ALTER TABLE users ADD COLUMN changes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE messages ADD COLUMN scheduled_id INTEGER;
ALTER TABLE outbox RENAME TO old_outbox;
DROP INDEX outbox_by_message;
DROP TABLE idempotency_keys;

-- === The schema

-- Marks the database as FactoryApp's and holds the version of the schema. `sqlite3 .dump` would not write a PRAGMA.
CREATE TABLE IF NOT EXISTS factoryapp (
    id             INTEGER PRIMARY KEY CHECK (id = 1),  -- a single row
    schema_version INTEGER NOT NULL
) STRICT;

-- The key that signs every JWT, unless the operator sets a secret. Made at the first start and kept, so that tokens survive a
-- restart.
CREATE TABLE IF NOT EXISTS signing_key (
    id         INTEGER PRIMARY KEY CHECK (id = 1),      -- a single row
    key        BLOB NOT NULL CHECK (length(key) >= 32)  -- RFC 7518, section 3.2: HS256 needs 256 bits or more
) STRICT;

CREATE TABLE IF NOT EXISTS users (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused: a JWT names its user by id
    username   TEXT NOT NULL UNIQUE CHECK (length(username) BETWEEN 1 AND 150),  -- trimmed, in NFKC
    password   TEXT NOT NULL,                      -- scrypt$N$r$p$salt$hash, salt and hash in base64
    created_at TEXT NOT NULL,
    folded     TEXT NOT NULL DEFAULT '',           -- the case-folded name: no two names differ only by case
    changes    INTEGER NOT NULL DEFAULT 0          -- counts the changes that the user may see, by the triggers below
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS users_by_case ON users (folded);

-- Refresh tokens that were ended before they expire, by a logout.
CREATE TABLE IF NOT EXISTS blacklisted_tokens (
    jti        TEXT PRIMARY KEY,
    expires_at REAL NOT NULL                       -- an expired token is invalid anyway: the row is deleted
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blacklisted_tokens_by_expiry ON blacklisted_tokens (expires_at);

-- API keys, with which programs sign in.
CREATE TABLE IF NOT EXISTS api_keys (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id      INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    name         TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    key_hash     BLOB NOT NULL UNIQUE,             -- SHA-256; the key itself, 256 random bits, is not stored
    created_at   TEXT NOT NULL,
    expires_at   TEXT,                             -- NULL: never; the row of an expired key is deleted
    last_used_on TEXT                              -- the date
) STRICT;
CREATE INDEX IF NOT EXISTS api_keys_by_user ON api_keys (user_id);
CREATE INDEX IF NOT EXISTS api_keys_by_expiry ON api_keys (expires_at) WHERE expires_at IS NOT NULL;

-- One-time tokens that link a chat. Each user has at most one token: a new token replaces the old one.
CREATE TABLE IF NOT EXISTS link_tokens (
    user_id    INTEGER PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    token_hash BLOB NOT NULL UNIQUE,               -- SHA-256; the token itself, 256 random bits, is not stored
    expires_at REAL NOT NULL                       -- the row of an expired token is deleted
) STRICT;
CREATE INDEX IF NOT EXISTS link_tokens_by_expiry ON link_tokens (expires_at);

-- Telegram bots that have received updates. The id is Telegram's. The terminal, bot 0 in other tables, has no row here.
CREATE TABLE IF NOT EXISTS bots (
    id             INTEGER PRIMARY KEY,
    next_update_id INTEGER                         -- offset of the next getUpdates; may go down: Telegram may restart the ids
) STRICT;

-- Links of chats to users: a chat has at most one user, and a user has at most one chat.
CREATE TABLE IF NOT EXISTS chats (
    bot_id     INTEGER NOT NULL,
    chat_id    INTEGER NOT NULL,                   -- Telegram's id; 0: the terminal
    user_id    INTEGER NOT NULL UNIQUE REFERENCES users ON DELETE CASCADE,
    linked_at  TEXT NOT NULL,
    token_hash BLOB,                               -- SHA-256 of the link token that was used; NULL: not known
    PRIMARY KEY (bot_id, chat_id)
) STRICT, WITHOUT ROWID;

-- Telegram messages heard in private chats, so that each message takes effect only once, and edits are recognized.
CREATE TABLE IF NOT EXISTS heard (
    bot_id     INTEGER NOT NULL,
    chat_id    INTEGER NOT NULL,
    message_id INTEGER NOT NULL,                   -- Telegram's id
    heard_at   REAL NOT NULL,                      -- the row is deleted after three days
    text_hash  BLOB,                               -- SHA-256 of the text; NULL: no text, or the bot has answered an edit
    PRIMARY KEY (bot_id, chat_id, message_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS heard_by_age ON heard (heard_at);

CREATE TABLE IF NOT EXISTS messages (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused: clients ask for the messages after an id
    sender_id    INTEGER NOT NULL REFERENCES users,
    recipient_id INTEGER NOT NULL REFERENCES users,  -- equal to sender_id in a message to oneself
    text         TEXT NOT NULL CHECK (length(text) BETWEEN 1 AND 16384),  -- in code points, exactly as sent
    created_at   TEXT NOT NULL,
    source       TEXT NOT NULL CHECK (source IN ('api', 'telegram')),
    delivery     TEXT NOT NULL                       -- state of the recipient's copy
        CHECK (delivery IN ('queued', 'sent', 'failed', 'unlinked', 'cancelled')),
    failure      TEXT,                               -- why the copy was given up, often in Telegram's words
    send_at      TEXT,                               -- the time set for publication; NULL: was not scheduled
    reply_to     INTEGER REFERENCES messages ON DELETE SET NULL,  -- the message that is answered
    choices      TEXT,                               -- JSON array of the buttons below the text
    was_chosen   INTEGER NOT NULL DEFAULT 0 CHECK (was_chosen IN (0, 1)),  -- 1: a reply had the text of a choice
    scheduled_id INTEGER                             -- the id while scheduled; the sender may still use the old id
) STRICT;
CREATE INDEX IF NOT EXISTS messages_by_sender ON messages (sender_id);
CREATE INDEX IF NOT EXISTS messages_by_recipient ON messages (recipient_id) WHERE recipient_id <> sender_id;
-- The extra columns let SQLite filter the answers to a message in the index, without reading the answers.
CREATE INDEX IF NOT EXISTS messages_by_answered ON messages (reply_to, id, sender_id, recipient_id, delivery)
    WHERE reply_to IS NOT NULL;
CREATE UNIQUE INDEX IF NOT EXISTS messages_by_scheduled_id ON messages (scheduled_id) WHERE scheduled_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS messages_by_pair ON messages (sender_id, recipient_id);
CREATE INDEX IF NOT EXISTS messages_by_pair_delivery ON messages (sender_id, recipient_id, delivery);
CREATE INDEX IF NOT EXISTS messages_by_sender_delivery ON messages (sender_id, delivery);
CREATE INDEX IF NOT EXISTS messages_by_recipient_delivery ON messages (recipient_id, delivery) WHERE recipient_id <> sender_id;

-- Scheduled messages, seen only by their sender. At send_at, each becomes a row of messages, with a new id. The ids of both
-- tables come from the sequence of messages, so that no id is in both.
CREATE TABLE IF NOT EXISTS scheduled (
    id           INTEGER PRIMARY KEY,
    sender_id    INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    recipient_id INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    text         TEXT NOT NULL CHECK (length(text) BETWEEN 1 AND 16384),
    created_at   TEXT NOT NULL,
    send_at      TEXT NOT NULL,
    silent       INTEGER NOT NULL CHECK (silent IN (0, 1)),
    reply_to     INTEGER REFERENCES messages ON DELETE SET NULL,
    choices      TEXT,
    source       TEXT AS ('api'),                      -- source to failure: for queries written for messages
    delivery     TEXT AS ('scheduled'),
    failure      TEXT AS (NULL)
) STRICT;
CREATE INDEX IF NOT EXISTS scheduled_by_sender ON scheduled (sender_id);
CREATE INDEX IF NOT EXISTS scheduled_by_recipient ON scheduled (recipient_id, sender_id);
CREATE INDEX IF NOT EXISTS scheduled_by_time ON scheduled (send_at);
CREATE INDEX IF NOT EXISTS scheduled_by_reply ON scheduled (reply_to) WHERE reply_to IS NOT NULL;
INSERT INTO sqlite_sequence (name, seq)
    SELECT 'messages', 0 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'messages');

-- Answers to POST requests with an Idempotency-Key, so that a retry gets the same answer and stores nothing.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    user_id      INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    key          TEXT NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    request_hash BLOB NOT NULL,                    -- SHA-256 of the request's fields
    answer       BLOB NOT NULL,                    -- JSON in UTF-8
    used_at      REAL NOT NULL,                    -- the row is deleted after a day
    PRIMARY KEY (user_id, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS idempotency_keys_by_age ON idempotency_keys (used_at);

-- Deliveries: a row for each Telegram message that the bot still has to send, within a chat in the order of id. Rows are deleted
-- when sent or given up.
CREATE TABLE IF NOT EXISTS outbox (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused: a sender may settle a row that was given up
    bot_id        INTEGER NOT NULL,
    chat_id       INTEGER NOT NULL,
    text          TEXT NOT NULL CHECK (length(text) BETWEEN 1 AND 4096),  -- Telegram's limit, in code points
    message_id    INTEGER REFERENCES messages,     -- the message that is copied, whole or in part; NULL: an answer of the bot
    is_own_copy   INTEGER NOT NULL DEFAULT 0 CHECK (is_own_copy IN (0, 1)),  -- 1: the sender's copy of a message to another
    is_first      INTEGER NOT NULL DEFAULT 1 CHECK (is_first IN (0, 1)),  -- 1: the first part of the copy
    is_last       INTEGER NOT NULL DEFAULT 1 CHECK (is_last IN (0, 1)),
    silent        INTEGER NOT NULL DEFAULT 0 CHECK (silent IN (0, 1)),  -- Telegram's disable_notification
    queued_at     REAL NOT NULL,
    attempts      INTEGER NOT NULL DEFAULT 0,      -- failed attempts
    due_at        REAL NOT NULL DEFAULT 0,         -- the earliest time of the next attempt
    pause         REAL NOT NULL DEFAULT 0,         -- seconds from the last attempt to due_at, in case the clock is set back
    error         TEXT,                            -- of the last failed attempt
    failing_since REAL,                            -- time of the first failed attempt
    missing_since REAL,                            -- since when each attempt failed with "chat not found"
    thread_id     INTEGER                          -- the topic, in a forum group; else NULL
) STRICT;
CREATE INDEX IF NOT EXISTS outbox_queue ON outbox (bot_id, chat_id, id);
CREATE INDEX IF NOT EXISTS outbox_by_message ON outbox (message_id) WHERE message_id IS NOT NULL;

-- The message that a Telegram message in a linked chat shows, so that a reply in Telegram finds the message.
CREATE TABLE IF NOT EXISTS relayed (
    bot_id              INTEGER NOT NULL,
    chat_id             INTEGER NOT NULL,
    telegram_message_id INTEGER NOT NULL,
    message_id          INTEGER NOT NULL REFERENCES messages,
    PRIMARY KEY (bot_id, chat_id, telegram_message_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS relayed_by_message ON relayed (message_id);

-- A question has one answer. Once a reply has the text of a choice, however the reply was sent, a button is pressed too late.
CREATE TRIGGER IF NOT EXISTS question_answered AFTER INSERT ON messages WHEN NEW.reply_to IS NOT NULL BEGIN
    UPDATE messages SET was_chosen = 1 WHERE id = NEW.reply_to
    AND recipient_id = NEW.sender_id AND sender_id = NEW.recipient_id
    AND NEW.text IN (SELECT value FROM json_each(choices)); END;

-- Deleting a message deletes its deliveries and its rows of relayed.
CREATE TRIGGER IF NOT EXISTS messages_deleting BEFORE DELETE ON messages BEGIN
    DELETE FROM outbox WHERE message_id = OLD.id; DELETE FROM relayed WHERE message_id = OLD.id; END;

-- users.changes is a part of each ETag, and a waiting request waits for users.changes to rise. So triggers count each change of
-- a user's lists, password or linked chat, and each deleted API key, in the transaction of the change.
CREATE TRIGGER IF NOT EXISTS messages_added AFTER INSERT ON messages BEGIN
    -- A single UPDATE with IN, as in the next trigger, takes twice as long.
    UPDATE users SET changes = changes + 1 WHERE id = NEW.sender_id; UPDATE users SET changes = changes + 1
    WHERE id = NEW.recipient_id AND id <> NEW.sender_id; END;
CREATE TRIGGER IF NOT EXISTS messages_changed AFTER UPDATE ON messages BEGIN
    UPDATE users SET changes = changes + 1 WHERE id IN (NEW.sender_id, NEW.recipient_id); END;
CREATE TRIGGER IF NOT EXISTS messages_deleted AFTER DELETE ON messages BEGIN
    UPDATE users SET changes = changes + 1 WHERE id IN (OLD.sender_id, OLD.recipient_id); END;
CREATE TRIGGER IF NOT EXISTS scheduled_added AFTER INSERT ON scheduled BEGIN
    UPDATE users SET changes = changes + 1 WHERE id = NEW.sender_id; END;
CREATE TRIGGER IF NOT EXISTS scheduled_changed AFTER UPDATE ON scheduled BEGIN
    UPDATE users SET changes = changes + 1 WHERE id = NEW.sender_id; END;
CREATE TRIGGER IF NOT EXISTS scheduled_deleted AFTER DELETE ON scheduled BEGIN
    UPDATE users SET changes = changes + 1 WHERE id = OLD.sender_id; END;
CREATE TRIGGER IF NOT EXISTS chats_added AFTER INSERT ON chats BEGIN
    UPDATE users SET changes = changes + 1 WHERE id = NEW.user_id; END;
CREATE TRIGGER IF NOT EXISTS chats_deleted AFTER DELETE ON chats BEGIN
    UPDATE users SET changes = changes + 1 WHERE id = OLD.user_id; END;
CREATE TRIGGER IF NOT EXISTS password_changed AFTER UPDATE OF password ON users BEGIN
    UPDATE users SET changes = changes + 1 WHERE id = NEW.id; END;
CREATE TRIGGER IF NOT EXISTS api_keys_deleted AFTER DELETE ON api_keys BEGIN
    UPDATE users SET changes = changes + 1 WHERE id = OLD.user_id; END;

-- === Up to version 5: after the rest
-- Version 5 moved and gave up long queues in portions. Finish the queues that were under way.
UPDATE old_outbox AS o SET bot_id = coalesce(to_bot_id, l.bot_id), error = reason,
    chat_id = coalesce(to_chat_id, l.chat_id),
    given_up_at = iif(to_chat_id IS NULL, 'now', NULL)
    FROM leftovers AS l WHERE o.bot_id = l.bot_id AND o.chat_id = l.chat_id
    AND o.id <= last_id AND given_up_at IS NULL;
UPDATE messages SET delivery = 'failed', failure = error FROM old_outbox
    WHERE message_id = messages.id AND delivery = 'queued' AND given_up_at IS NOT NULL
    AND NOT is_own_copy;
-- Messages to be sent later become scheduled messages.
INSERT INTO scheduled
    SELECT m.id, sender_id, recipient_id, m.text, created_at, m.send_at, max(silent),
        reply_to, choices
    FROM messages AS m JOIN old_outbox AS o ON message_id = m.id
    WHERE delivery = 'queued' AND NOT is_own_copy
    AND o.send_at > strftime('%s', 'now') + 0 GROUP BY m.id;
INSERT INTO outbox
    SELECT id, bot_id, chat_id, text, message_id, is_own_copy,
        send_at >= 0 AND id - 1 NOT IN (SELECT id FROM old_outbox WHERE NOT is_last),
        is_last, silent, queued_at, attempts, due_at, pause, error, failing_since,
        missing_since, thread_id
    FROM old_outbox WHERE given_up_at IS NULL;
DROP TABLE old_outbox;
DELETE FROM messages WHERE id IN (SELECT id FROM scheduled);
DROP INDEX users_by_folded;
DROP INDEX IF EXISTS messages_queued;
DROP INDEX IF EXISTS messages_by_reply;
ALTER TABLE heard DROP COLUMN album;
ALTER TABLE heard DROP COLUMN was_told;
DROP TABLE leftovers;
DROP TABLE told_groups;
