"""The chunk store's disk tier: a file an entry, and an index in SQLite that several processes share.

What is in the index is whole: a file is written aside under a lock, synced, renamed, and only then gets its row, in one
transaction; an eviction deletes the row, then the file. A process may die between any two of these: what is then left
over has no row, and no living process locks it, so that the next one to open the folder removes it. Files are never
written again, so a reader's memory map outlives an eviction.

The folder must be on a local disk of Linux or macOS: neither SQLite's write-ahead log nor the locks go over a network.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvjax.serve import entries, paging
from kvjax.serve.entries import Damaged, Entry

INDEX, LOCK = "index.sqlite", "lock"
OURS = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{16})\.(safetensors|writing)")
PATIENCE = 30.0  # seconds to wait for another process's transaction, which takes no longer than an fsync
HASTE = 0.05  # likewise, where a reader waits
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE entries (
  digest BLOB PRIMARY KEY, namespace TEXT NOT NULL, key BLOB NOT NULL, version INTEGER NOT NULL, size INTEGER NOT NULL,
  crc INTEGER NOT NULL, used INTEGER NOT NULL, prediction INTEGER
);
CREATE INDEX by_key ON entries (key);
CREATE INDEX by_use ON entries (used);
CREATE TABLE clock (now INTEGER NOT NULL);
INSERT INTO clock VALUES (0);
PRAGMA user_version = {entries.VERSION};
COMMIT;
"""


class Row(NamedTuple):
    """What the index says of an entry."""

    version: int  # of its file
    size: int  # bytes of it
    crc: int  # of its header


class Disk:
    """Files and index of one folder, as one process sees them. All namespaces in a folder share its capacity.

    Every method may raise OSError, or sqlite3.Error; the store makes misses of them.
    """

    def __init__(
        self, folder: Path, namespace: str, capacity: int | None, pages: Callable[[int], paging.Pages], warn: Callable
    ):
        self.folder, self.namespace, self.capacity = folder, namespace, capacity
        self.evicted = 0
        self._make_pages, self._warn = pages, warn
        self._lock = threading.RLock()  # of the connection and what follows
        self._pages, self._known, self._seen, self._others = None, {}, 0, None
        self._unit = 1 if capacity is None else entries.unit_of(capacity)
        self._pid = os.getpid()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"Store: folder={str(folder)!r} cannot be made ({error}). Give one that can, or None for memory alone."
            ) from error
        self.readonly, self._db = False, None
        try:
            with self._folder_locked(fcntl.LOCK_EX):
                self._db = self._open()
                self._clean()
        except (OSError, sqlite3.OperationalError) as error:
            self._warn("readonly", f"{folder} cannot be written ({error}): entries are read, and none are stored.")
            self.readonly, self._db = True, self._open_to_read()

    # Opening

    @contextlib.contextmanager
    def _folder_locked(self, how: int) -> Iterator[None]:
        """Alone, who opens a folder; shared, who creates a file, so that it is never seen before it is locked."""
        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, how)
            yield
        finally:
            os.close(lock)

    def _open(self) -> sqlite3.Connection:
        path = self.folder / INDEX
        try:
            return self._connect(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            self._warn("index", f"the index {path} is damaged ({error}): it is made anew, and the folder's entries go.")
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            path.replace(path.with_name(path.name + ".damaged"))
            return self._connect(path)

    def _connect(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            if self._is_new(db):
                db.executescript(SCHEMA)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            if (said := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(said)
            return db
        except BaseException:
            db.close()
            raise

    def _is_new(self, db: sqlite3.Connection) -> bool:
        """Whether there is nothing yet; what is not of this version is refused."""
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and version != entries.VERSION:
            raise ValueError(
                f"Store: {self.folder / INDEX} has version {version}, and this kvjax reads {entries.VERSION}. Take "
                f"another folder, or delete this one: a store can always be filled again."
            )
        return not tables

    def _open_to_read(self) -> sqlite3.Connection:
        path = self.folder / INDEX
        # `immutable` where the log's own files cannot be made; nobody writes then, or the checksums will tell.
        for how in ("mode=ro", "mode=ro&immutable=1"):
            with contextlib.suppress(sqlite3.Error):
                where = f"{path.absolute().as_uri()}?{how}"
                db = sqlite3.connect(where, uri=True, isolation_level=None, check_same_thread=False)
                if not self._is_new(db):
                    return db
        db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        db.executescript(SCHEMA)
        return db

    def _clean(self) -> None:
        """Drops rows without a file, files without a row unless their writer lives, and what exceeds the capacity."""
        with self._transaction() as db:
            rows = set(db.execute("SELECT digest, version FROM entries"))
            # Listed after the rows were read: whatever had a row then was there, or has been evicted since.
            found = {name: match for name in os.listdir(self.folder) if (match := OURS.fullmatch(name))}
            whole = {(bytes.fromhex(m[1]), int(m[2], 16)) for m in found.values() if m[3] == "safetensors"}
            db.executemany("DELETE FROM entries WHERE digest = ? AND version = ?", rows - whole)
            gone = self._settle(db)
        for name, match in found.items():
            if match[3] == "writing" or (bytes.fromhex(match[1]), int(match[2], 16)) not in rows:
                self._remove_if_abandoned(self.folder / name, bytes.fromhex(match[1]), int(match[2], 16))
        self._unlink(gone)

    def _remove_if_abandoned(self, path: Path, digest: bytes, version: int) -> None:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its writer lives
            # A writer lets go of its file after the row is there, so there is none if there is none now.
            row = self._db.execute("SELECT 1 FROM entries WHERE digest = ? AND version = ?", (digest, version))
            if row.fetchone() is None:
                path.unlink(missing_ok=True)

    # The index

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False, wait: float = PATIENCE) -> Iterator[sqlite3.Connection]:
        """All or nothing; `durable` also outlives a loss of power."""
        with self._connection() as db:
            db.execute(f"PRAGMA busy_timeout = {round(1000 * wait)}")
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                self._pages, self._known = None, {}  # they may be ahead of the index: filled again from there
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if os.getpid() != self._pid:
            raise ValueError("Store: it was opened before this process was forked. Open one in each process.")
        with self._lock:
            yield self._db

    def _settle(self, db: sqlite3.Connection) -> list[Path]:
        """Tells the pages what all processes did since the last time, in order, and drops the victims' rows.

        Returns:
          Their files, to be removed after the commit.
        """
        if self.capacity is None:
            return []
        if self._pages is None:
            self._pages, self._known, self._seen = self._make_pages(self.capacity // self._unit), {}, 0
        (others,) = db.execute("PRAGMA data_version").fetchone()  # changes when another connection writes
        if others != self._others:
            here = {digest for (digest,) in db.execute("SELECT digest FROM entries")}
            for digest in self._known.keys() - here:
                self._forget(digest)
            self._others = others
        rows = db.execute(
            "SELECT digest, version, size, prediction, used FROM entries WHERE used > ? ORDER BY used", (self._seen,)
        )
        gone = {}
        for digest, version, size, prediction, used in rows.fetchall():
            if digest in self._known and self._known[digest][1] != size:
                self._forget(digest)
            try:
                victims = self._pages.request(digest, prediction=prediction, size=-(-size // self._unit))
            except paging.Full:  # more than the capacity of this process, or header and arrays together are
                victims = [digest]
                self._forget(digest)
            self._known[digest] = version, size
            gone.pop(digest, None)
            gone |= {victim: self._known.pop(victim) for victim in victims}
            self._seen = used
        db.executemany("DELETE FROM entries WHERE digest = ?", [(digest,) for digest in gone])
        self.evicted += len(gone)
        return [self._path(digest, version) for digest, (version, _) in gone.items()]

    def _forget(self, digest: bytes) -> None:
        if self._known.pop(digest, None) is not None:
            self._pages.remove(digest)

    def _digest(self, key: str) -> bytes:
        space = self.namespace.encode("utf-8", "surrogatepass")
        return hashlib.sha256(len(space).to_bytes(8, "little") + space + _blob(key)).digest()

    def _path(self, digest: bytes, version: int, suffix: str = "safetensors") -> Path:
        return self.folder / f"{digest.hex()}.{version:016x}.{suffix}"

    def _unlink(self, paths: Sequence[Path]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):  # the next to open the folder tries again
                path.unlink(missing_ok=True)

    # What the store asks for

    def put(self, key: str, stored: Sequence[tuple], text: str, prediction: int | None) -> int | None:
        """Writes an entry. Returns the version of its file, or None if the pages would not have it."""
        if self.readonly:
            raise OSError(f"{self.folder} is read-only")
        if self.capacity is not None and sum(x.nbytes for layer in stored for x in layer) > self.capacity:
            self.remove(key)  # what it would have replaced is out of date
            return None
        digest, version = self._digest(key), secrets.randbits(63)
        path, aside = self._path(digest, version), self._path(digest, version, "writing")
        with self._folder_locked(fcntl.LOCK_SH):
            file = open(aside, "xb")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX)
        with file:  # and with it its lock, until its row is there
            try:
                size, crc = entries.write(file, self.namespace, key, stored, text)
                file.flush()
                os.fsync(file.fileno())
                os.rename(aside, path)
                self._sync_folder()
                gone = self._commit(digest, key, Row(version, size, crc), prediction)
            except BaseException:
                self._unlink([aside, path])
                raise
        self._unlink(gone)
        return None if path in gone else version

    def _sync_folder(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _commit(self, digest: bytes, key: str, row: Row, prediction: int | None) -> list[Path]:
        """The row of a new file. Returns the files that go: of what it replaces, and of victims."""
        with self._transaction(durable=True) as db:
            old = db.execute("SELECT version FROM entries WHERE digest = ?", (digest,)).fetchall()
            db.execute("UPDATE clock SET now = now + 1")
            db.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, (SELECT now FROM clock), ?)",
                (digest, self.namespace, _blob(key), *row, prediction),
            )
            return [self._path(digest, version) for (version,) in old] + self._settle(db)

    def row(self, key: str) -> Row | None:
        """What the index says of an entry."""
        with self._connection() as db:
            found = db.execute("SELECT version, size, crc FROM entries WHERE digest = ?", (self._digest(key),))
            found = found.fetchone()
        return None if found is None else Row(*found)

    def touch(self, key: str, prediction: int | None) -> Row | None:
        """As `row`, and the entry counts as used now, in all processes."""
        row = self.row(key)
        if row is None or self.readonly:
            return row
        # A full disk, or one that is busy, costs the time of use, not the hit.
        with contextlib.suppress(sqlite3.Error), self._transaction(wait=HASTE) as db:
            db.execute("UPDATE clock SET now = now + 1")
            db.execute(
                "UPDATE entries SET used = (SELECT now FROM clock), prediction = ? WHERE digest = ?",
                (prediction, self._digest(key)),
            )
        return row

    def read(self, key: str, row: Row | None) -> Entry | None:
        """The entry, mapped; `Entry.check` verifies its layers. None if it is gone.

        Raises:
          Damaged: If its file is gone though the index has it, or its header is not what was stored.
        """
        while row is not None:
            try:
                entry = entries.read(self._path(self._digest(key), row.version), self.namespace, key, row.size, row.crc)
                entry.version = row.version
                return entry
            except FileNotFoundError:
                again = self.row(key)  # evicted, or replaced, since the row was read
                if again == row:
                    raise Damaged("torn", f"{self.folder}: the file of {key!r} is gone.") from None
                row = again
        return None

    def remove(self, key: str, version: int | None = None) -> bool:
        """Drops an entry, or its `version` alone. Returns whether it was there."""
        digest = self._digest(key)
        row = self.row(key)
        if row is None or (version is not None and row.version != version) or self.readonly:
            return False
        with self._transaction(durable=True) as db:
            count = db.execute("DELETE FROM entries WHERE digest = ? AND version = ?", (digest, row.version)).rowcount
            self._forget(digest)
        self._unlink([self._path(digest, row.version)])
        return count > 0

    def keys(self, prefix: str = "") -> list[str]:
        """Keys of this namespace that begin with `prefix`."""
        with self._connection() as db:
            rows = db.execute("SELECT key FROM entries WHERE namespace = ?", (self.namespace,)).fetchall()
        keys = (key.decode("utf-8", "surrogatepass") for (key,) in rows)
        return [key for key in keys if key.startswith(prefix)]

    def is_foreign(self, key: str) -> bool:
        """Whether another namespace has the key."""
        with self._connection() as db:
            rows = db.execute("SELECT 1 FROM entries WHERE key = ? AND namespace <> ?", (_blob(key), self.namespace))
            return rows.fetchone() is not None

    def total(self) -> tuple[int, int]:
        """Entries and bytes in the folder, of all namespaces."""
        with self._connection() as db:
            return db.execute("SELECT count(*), coalesce(sum(size), 0) FROM entries").fetchone()

    def close(self) -> None:
        """Lets go of the index."""
        with self._lock:
            if self._db is not None and os.getpid() == self._pid:
                self._db.close()


def _blob(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
