-- FactoryApp's database. Applied at every start, from top to bottom: it adds what is missing and drops nothing, except for the
-- parts "Up to version N": those are for databases of an older schema alone.
--
-- *_at columns that end up in an answer are ISO 8601 text in UTC with a Z; those the server computes with are seconds since
-- 1970 (REAL). A column that was added later comes last in its table. Nothing but a statement ends with a semicolon at the end
-- of a line.

-- === Up to version 5: before the rest
-- Older names may differ by case alone.
UPDATE users SET folded = folded || ' ' || id
    WHERE id > (SELECT min(id) FROM users AS first WHERE first.folded = users.folded);
ALTER TABLE users DROP COLUMN tokens_from;
ALTER TABLE users ADD COLUMN changes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE messages ADD COLUMN scheduled_id INTEGER;
ALTER TABLE outbox RENAME TO old_outbox;
DROP INDEX outbox_by_message;
DROP TABLE idempotency_keys;

-- === The schema

-- Says that the database is FactoryApp's, and of which schema. A PRAGMA would not be in what `sqlite3 .dump` writes.
CREATE TABLE IF NOT EXISTS factoryapp (
    id             INTEGER PRIMARY KEY CHECK (id = 1),  -- there is one
    schema_version INTEGER NOT NULL
) STRICT;

-- The key that signs every JWT. Made at first start; a row here is what makes tokens survive a restart.
CREATE TABLE IF NOT EXISTS signing_key (
    id         INTEGER PRIMARY KEY CHECK (id = 1),      -- there is one
    key        BLOB NOT NULL CHECK (length(key) >= 32)  -- RFC 7518, section 3.2: HS256 wants 256 bits or more
) STRICT;

CREATE TABLE IF NOT EXISTS users (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: a JWT names its user by it
    username   TEXT NOT NULL UNIQUE CHECK (length(username) BETWEEN 1 AND 150),  -- trimmed, NFKC
    password   TEXT NOT NULL,                      -- scrypt$N$r$p$salt$hash, the last two in base64
    created_at TEXT NOT NULL,
    folded     TEXT NOT NULL DEFAULT '',           -- the name without case: no two differ by that alone
    changes    INTEGER NOT NULL DEFAULT 0          -- raised with each change that the user may see: see the triggers
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS users_by_case ON users (folded);

-- Refresh tokens that were ended before their time.
CREATE TABLE IF NOT EXISTS blacklisted_tokens (
    jti        TEXT PRIMARY KEY,
    expires_at REAL NOT NULL                       -- past it the token is dead anyway and the row may go
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blacklisted_tokens_by_expiry ON blacklisted_tokens (expires_at);

-- What programs sign in with.
CREATE TABLE IF NOT EXISTS api_keys (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id      INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    name         TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    key_hash     BLOB NOT NULL UNIQUE,             -- SHA-256; the key itself is random 256 bits and kept nowhere
    created_at   TEXT NOT NULL,
    expires_at   TEXT,                             -- NULL: never; past it the key is dead and the row may go
    last_used_on TEXT                              -- a date
) STRICT;
CREATE INDEX IF NOT EXISTS api_keys_by_user ON api_keys (user_id);
CREATE INDEX IF NOT EXISTS api_keys_by_expiry ON api_keys (expires_at) WHERE expires_at IS NOT NULL;

-- The one-time tokens that link a chat: one a user, a new one takes the place of the old.
CREATE TABLE IF NOT EXISTS link_tokens (
    user_id    INTEGER PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    token_hash BLOB NOT NULL UNIQUE,               -- SHA-256; the token itself is random 256 bits and kept nowhere
    expires_at REAL NOT NULL                       -- past it the token is dead and the row may go
) STRICT;
CREATE INDEX IF NOT EXISTS link_tokens_by_expiry ON link_tokens (expires_at);

-- The bots that have spoken for this database: 0 is the terminal, else Telegram's id of the bot.
CREATE TABLE IF NOT EXISTS bots (
    id             INTEGER PRIMARY KEY,
    next_update_id INTEGER                         -- offset of the next getUpdates; ids may restart anywhere, so it is assigned
) STRICT;

-- Which chat of which bot speaks for which user: at most one each way.
CREATE TABLE IF NOT EXISTS chats (
    bot_id     INTEGER NOT NULL,
    chat_id    INTEGER NOT NULL,                   -- Telegram's; 0 is the terminal
    user_id    INTEGER NOT NULL UNIQUE REFERENCES users ON DELETE CASCADE,
    linked_at  TEXT NOT NULL,
    token_hash BLOB,                               -- SHA-256 of the link token that did it; NULL: not known
    PRIMARY KEY (bot_id, chat_id)
) STRICT, WITHOUT ROWID;

-- What was heard in private chats, so that a message counts once, and an edit is known to be one.
CREATE TABLE IF NOT EXISTS heard (
    bot_id     INTEGER NOT NULL,
    chat_id    INTEGER NOT NULL,
    message_id INTEGER NOT NULL,                   -- Telegram's
    heard_at   REAL NOT NULL,                      -- forgotten after three days
    text_hash  BLOB,                               -- SHA-256 of its text; NULL: it has none, or its edit was answered
    PRIMARY KEY (bot_id, chat_id, message_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS heard_by_age ON heard (heard_at);

CREATE TABLE IF NOT EXISTS messages (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: who asks for what comes after an id relies on it
    sender_id    INTEGER NOT NULL REFERENCES users,
    recipient_id INTEGER NOT NULL REFERENCES users,  -- the sender, where nobody else is named
    text         TEXT NOT NULL CHECK (length(text) BETWEEN 1 AND 16384),  -- code points, exactly as sent
    created_at   TEXT NOT NULL,
    source       TEXT NOT NULL CHECK (source IN ('api', 'telegram')),
    delivery     TEXT NOT NULL                       -- of the recipient's copy
        CHECK (delivery IN ('queued', 'sent', 'failed', 'unlinked', 'cancelled')),
    failure      TEXT,                               -- why that was given up, in Telegram's words
    send_at      TEXT,                               -- when it was to be published; NULL: it was posted
    reply_to     INTEGER REFERENCES messages ON DELETE SET NULL,  -- the message it answers
    choices      TEXT,                               -- JSON array of the buttons below it
    was_chosen   INTEGER NOT NULL DEFAULT 0 CHECK (was_chosen IN (0, 1)),  -- one of them was the answer
    scheduled_id INTEGER                             -- what its id was while it was scheduled, by which its sender finds it
) STRICT;
CREATE INDEX IF NOT EXISTS messages_by_sender ON messages (sender_id);
CREATE INDEX IF NOT EXISTS messages_by_recipient ON messages (recipient_id) WHERE recipient_id <> sender_id;
-- With more than it sorts by: the answers to a message are filtered without reading them.
CREATE INDEX IF NOT EXISTS messages_by_answered ON messages (reply_to, id, sender_id, recipient_id, delivery)
    WHERE reply_to IS NOT NULL;
CREATE UNIQUE INDEX IF NOT EXISTS messages_by_scheduled_id ON messages (scheduled_id) WHERE scheduled_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS messages_by_pair ON messages (sender_id, recipient_id);
CREATE INDEX IF NOT EXISTS messages_by_pair_delivery ON messages (sender_id, recipient_id, delivery);
CREATE INDEX IF NOT EXISTS messages_by_sender_delivery ON messages (sender_id, delivery);
CREATE INDEX IF NOT EXISTS messages_by_recipient_delivery ON messages (recipient_id, delivery) WHERE recipient_id <> sender_id;

-- Messages that only their sender sees until send_at. Then each becomes a row of messages, with a new id. Ids here and there
-- are of one sequence, that of messages.
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
    source       TEXT AS ('api'),                      -- these three are for reading it as a message
    delivery     TEXT AS ('scheduled'),
    failure      TEXT AS (NULL)
) STRICT;
CREATE INDEX IF NOT EXISTS scheduled_by_sender ON scheduled (sender_id);
CREATE INDEX IF NOT EXISTS scheduled_by_recipient ON scheduled (recipient_id, sender_id);
CREATE INDEX IF NOT EXISTS scheduled_by_time ON scheduled (send_at);
CREATE INDEX IF NOT EXISTS scheduled_by_reply ON scheduled (reply_to) WHERE reply_to IS NOT NULL;
INSERT INTO sqlite_sequence (name, seq)
    SELECT 'messages', 0 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'messages');

-- What was answered to a POST with an Idempotency-Key, so that a retry is answered the same and stores nothing.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    user_id      INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    key          TEXT NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    request_hash BLOB NOT NULL,                    -- SHA-256 of the request's fields
    answer       BLOB NOT NULL,                    -- JSON in UTF-8
    used_at      REAL NOT NULL,                    -- forgotten after a day
    PRIMARY KEY (user_id, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS idempotency_keys_by_age ON idempotency_keys (used_at);

-- Everything the bot is still to say, a row for each Telegram message; within a chat it goes out in the order of id.
-- What was sent or given up is deleted.
CREATE TABLE IF NOT EXISTS outbox (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: what is being sent may have been given up
    bot_id        INTEGER NOT NULL,
    chat_id       INTEGER NOT NULL,
    text          TEXT NOT NULL CHECK (length(text) BETWEEN 1 AND 4096),  -- code points, Telegram's limit
    message_id    INTEGER REFERENCES messages,     -- that this is a copy of (a part of it); NULL: an answer of the bot
    is_own_copy   INTEGER NOT NULL DEFAULT 0 CHECK (is_own_copy IN (0, 1)),  -- for the sender of a message to somebody else
    is_first      INTEGER NOT NULL DEFAULT 1 CHECK (is_first IN (0, 1)),  -- of the parts of that copy
    is_last       INTEGER NOT NULL DEFAULT 1 CHECK (is_last IN (0, 1)),
    silent        INTEGER NOT NULL DEFAULT 0 CHECK (silent IN (0, 1)),  -- Telegram's disable_notification
    queued_at     REAL NOT NULL,
    attempts      INTEGER NOT NULL DEFAULT 0,      -- that failed
    due_at        REAL NOT NULL DEFAULT 0,         -- after a failed attempt: not before
    pause         REAL NOT NULL DEFAULT 0,         -- seconds from the last attempt to due_at: the clock may be set back
    error         TEXT,                            -- of the last attempt
    failing_since REAL,                            -- the first failed attempt
    missing_since REAL,                            -- of the last attempts, the first that was told: chat not found
    thread_id     INTEGER                          -- the topic of a forum group that it is for; else NULL
) STRICT;
CREATE INDEX IF NOT EXISTS outbox_queue ON outbox (bot_id, chat_id, id);
CREATE INDEX IF NOT EXISTS outbox_by_message ON outbox (message_id) WHERE message_id IS NOT NULL;

-- Which message stands behind what the bot said in a chat, so that a reply to it finds its author.
CREATE TABLE IF NOT EXISTS relayed (
    bot_id              INTEGER NOT NULL,
    chat_id             INTEGER NOT NULL,
    telegram_message_id INTEGER NOT NULL,
    message_id          INTEGER NOT NULL REFERENCES messages,
    PRIMARY KEY (bot_id, chat_id, telegram_message_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS relayed_by_message ON relayed (message_id);

-- A question is answered once: a press comes too late after an answer that has the text of a choice, by whatever way.
CREATE TRIGGER IF NOT EXISTS question_answered AFTER INSERT ON messages WHEN NEW.reply_to IS NOT NULL BEGIN
    UPDATE messages SET was_chosen = 1 WHERE id = NEW.reply_to
    AND recipient_id = NEW.sender_id AND sender_id = NEW.recipient_id
    AND NEW.text IN (SELECT value FROM json_each(choices)); END;

-- What stands on a message goes with it.
CREATE TRIGGER IF NOT EXISTS messages_deleting BEFORE DELETE ON messages BEGIN
    DELETE FROM outbox WHERE message_id = OLD.id; DELETE FROM relayed WHERE message_id = OLD.id; END;

-- users.changes: an ETag is made of it, and a waiting request waits until it is raised. So it counts, in the same transaction
-- and whoever writes, all that changes what a user's lists show, who may read them, or whether a chat is linked.
CREATE TRIGGER IF NOT EXISTS messages_added AFTER INSERT ON messages BEGIN
    -- By IN, as below, it takes twice as long.
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
-- Queues that were being moved or given up.
UPDATE old_outbox AS o SET bot_id = coalesce(to_bot_id, l.bot_id), error = reason,
    chat_id = coalesce(to_chat_id, l.chat_id),
    given_up_at = iif(to_chat_id IS NULL, 'now', NULL)
    FROM leftovers AS l WHERE o.bot_id = l.bot_id AND o.chat_id = l.chat_id
    AND o.id <= last_id AND given_up_at IS NULL;
UPDATE messages SET delivery = 'failed', failure = error FROM old_outbox
    WHERE message_id = messages.id AND delivery = 'queued' AND given_up_at IS NOT NULL
    AND NOT is_own_copy;
-- What is still to come.
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
