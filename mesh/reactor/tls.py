"""TLS without sockets: pyOpenSSL's contexts, OpenSSL's own calls for handshakes, the judgement of peers and records in our buffers.

OpenSSL here is whatever library `cryptography` was built with: OpenSSL as the package index has it, AWS-LC in the image (`LIBRARY`).
This is the one module that calls it through the cffi binding `cryptography` ships. pyOpenSSL's own ``send`` and ``recv_into``
copy every byte once more, Python's ``ssl`` uses the system's OpenSSL, which here lacks VAES: both cost half as much again per
byte. `tls_engine` checks that the binding has the calls and otherwise returns the engine that uses public methods only.

Buffers belong to the thread, not to the connection (`Scratch`): an idle connection owns none. So every step drains what it
produced before another connection's step begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

READ_SIZE: Final = 256 * 1024
"""Ciphertext taken from a socket at a time."""

PLAIN_OUT_SIZE: Final = 256 * 1024
"""Plaintext encrypted between two sends."""

_RECORD: Final = 16384
_CIPHER_OUT_SIZE: Final = PLAIN_OUT_SIZE + 64 * 1024
"""Room for the output of a full `PLAIN_OUT_SIZE` (22 bytes a record) and whatever else OpenSSL has to say."""

_WRITE_BIO_KEPT: Final = 32 * 1024
"""OpenSSL's memory BIO never shrinks; one that carried more than this is replaced by `release_memory`."""

_COPIED_AT_MOST: Final = 4096
"""Bytes of ciphertext that are cheaper copied into a BIO that stays than lent to OpenSSL in a BIO of their own."""

_OVERHEAD: Final = 22
"""What a TLS 1.3 record has besides its payload: header, content type and tag (RFC 8446 section 5.2), unless the peer pads it."""

_BINDING_NAMES = (
    *("SSL_do_handshake", "SSL_read", "SSL_write", "SSL_get_error", "SSL_set_bio"),
    *("BIO_new", "BIO_new_mem_buf", "BIO_s_mem", "BIO_read", "BIO_write", "BIO_get_mem_data", "BIO_free"),
    *("SSL_CTX_set_verify", "X509_STORE_CTX_get_error", "X509_STORE_CTX_get_error_depth", "X509_STORE_CTX_get_current_cert"),
    "i2d_X509_bio",
)

LIBRARY: Final = " ".join(SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode("ascii", "replace").split()[:2])
"""Name and version of what does the cryptography of this process."""

VerifyPeer = Callable[[bytes], str | None]


class TlsError(Exception):
    """The TLS connection is over. ``reason`` says why, in words for an access log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Scratch:
    """The buffers every engine of a thread shares."""

    __slots__ = ("cipher_in", "cipher_out", "lone_payload", "plain_in", "plain_out", "pointers")

    def __init__(self) -> None:
        # A record begun in an earlier read ends in this one, so plain_in takes more than a read brings.
        buffers = [bytearray(size) for size in (READ_SIZE, READ_SIZE + 2 * _RECORD, PLAIN_OUT_SIZE, _CIPHER_OUT_SIZE)]
        self.cipher_in, self.plain_in, self.plain_out, self.cipher_out = (memoryview(buffer) for buffer in buffers)
        self.lone_payload = self.plain_out[9:]
        """``plain_out`` behind the header of a frame: to cut it out anew for every frame costs more than to write the header."""
        self.pointers: tuple[Any, ...] = ()
        """The same buffers as C pointers. Of the bytearrays: cffi 2.1 crashes when the garbage collector frees one made of a memoryview."""
        if BINDING is not None:
            self.pointers = tuple(_ffi.from_buffer(buffer) for buffer in buffers)


_local = threading.local()


def scratch() -> Scratch:
    """This thread's buffers."""
    try:
        found: Scratch = _local.scratch
    except AttributeError:
        found = _local.scratch = Scratch()
    return found


def inner_scratch() -> Scratch:
    """This thread's other buffers: for TLS within what another engine has decrypted, and others still read from that engine's buffer."""
    try:
        found: Scratch = _local.inner
    except AttributeError:
        found = _local.inner = Scratch()
    return found


def verify_peers(context: SSL.Context, mode: int) -> None:
    """Have OpenSSL verify the chains of peers (``mode`` as of `SSL.Context.set_verify`), and the engines of the context judge their
    certificates."""
    if BINDING is None:
        context.set_verify(mode, _verify_by_pyopenssl)
    else:
        _lib.SSL_CTX_set_verify(context._context, mode, _VERIFY)


def _verify_by_pyopenssl(_connection: SSL.Connection, certificate: crypto.X509, error: int, depth: int, ok: int) -> bool:
    # Not by to_cryptography(), which would read it once more to write it once more.
    return _verify(bool(ok), error, depth, lambda: crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate))


def _verify_by_binding(ok: int, store: Any) -> int:
    """The same without pyOpenSSL's objects for connection and certificate, of either of which there would be one for each certificate of a
    chain."""
    depth = _lib.X509_STORE_CTX_get_error_depth(store)
    try:
        return int(_verify(ok == 1, _lib.X509_STORE_CTX_get_error(store), depth, lambda: _current_certificate(store)))
    except Exception as mistake:  # OpenSSL is between us and whoever can report it
        _local.mistake = mistake
        return 0


def _current_certificate(store: Any) -> bytes:
    bio = _lib.BIO_new(_lib.BIO_s_mem())
    try:
        if _lib.i2d_X509_bio(bio, _lib.X509_STORE_CTX_get_current_cert(store)) != 1:
            raise TlsError("the peer's certificate cannot be written")
        start = _ffi.new("char **")
        size = _lib.BIO_get_mem_data(bio, start)
        return bytes(_ffi.buffer(start[0], size))
    finally:
        _lib.BIO_free(bio)


def _verify(ok: bool, error: int, depth: int, certificate: Callable[[], bytes]) -> bool:
    """What OpenSSL asks about each certificate of a chain, when it has judged it: notes the reason of a refusal."""
    engine: TlsEngine | None = getattr(_local, "shaking_hands", None)
    if engine is None:  # no engine's connection, or none that shakes hands: nobody would judge
        return False
    if not ok:
        engine.refusal = f"certificate verify failed: {_verify_error(error)}"
        return False
    if depth == 0:
        der = engine.peer_der = certificate()
        engine.refusal = engine.verify_peer(der) if engine.verify_peer is not None else None
        return engine.refusal is None
    return True


class TlsEngine:
    """One TLS connection over memory, by pyOpenSSL's public methods.

    The driver puts ciphertext into ``scratch().cipher_in`` and calls `feed` and `handshake` until `established`, from then on `open`.
    Plaintext it puts into ``scratch().plain_out`` and calls `seal`. It sends what that says, and after the others what `take` says.
    """

    __slots__ = ("_connection", "_scratch", "established", "peer_closed", "peer_der", "refusal", "verify_peer")

    def __init__(
        self,
        context: SSL.Context,
        *,
        server_side: bool,
        verify_peer: VerifyPeer | None = None,
        server_name: str = "",
        buffers: Scratch | None = None,
    ) -> None:
        self._connection: Any = SSL.Connection(context, None)
        if server_name:
            self._connection.set_tlsext_host_name(server_name.encode("ascii"))
        if server_side:
            self._connection.set_accept_state()
        else:
            self._connection.set_connect_state()
        self._scratch = buffers or scratch()
        self.verify_peer = verify_peer
        """Judges the peer's verified certificate (DER) within the handshake; text refuses it."""
        self.refusal: str | None = None
        self.peer_der: bytes | None = None
        """What `_verify` was shown; nobody's until the handshake is over."""
        self.established = False
        self.peer_closed = False
        """The peer has sent close_notify: end of data, and not a truncation."""

    def feed(self, size: int) -> None:
        """Take the first ``size`` bytes of ``cipher_in``."""
        self._connection.bio_write(self._scratch.cipher_in[:size])

    def handshake(self) -> None:
        """Go on with the handshake; look at `established` afterwards. Raises TlsError."""
        _local.shaking_hands = self
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return
        except SSL.Error as exc:
            raise self._failure(exc) from exc
        finally:
            _local.shaking_hands = None
        self.established = True

    def read(self) -> int:
        """Decrypt all that was fed into ``plain_in``; the number of bytes. Sets `peer_closed`. Raises TlsError."""
        plain, offset = self._scratch.plain_in, 0
        while True:
            try:
                offset += self._connection.recv_into(plain[offset:], _RECORD)
            except SSL.WantReadError:
                return offset
            except SSL.ZeroReturnError:
                self.peer_closed = True
                return offset
            except SSL.Error as exc:
                raise self._failure(exc) from exc

    def write(self, size: int) -> None:
        """Encrypt the first ``size`` bytes of ``plain_out``. Raises TlsError."""
        plain, offset = self._scratch.plain_out, 0
        try:
            while offset < size:
                offset += self._connection.send(plain[offset : min(size, offset + _RECORD)])
        except SSL.Error as exc:
            raise self._failure(exc) from exc

    def open(self, size: int) -> int:
        """`feed` and `read` in one."""
        self.feed(size)
        return self.read()

    def seal(self, size: int) -> int:
        """`write` and `take` in one."""
        self.write(size)
        return self.take()

    def take(self) -> int:
        """Move the ciphertext to be sent into ``cipher_out``; the number of bytes."""
        try:
            data = self._connection.bio_read(_CIPHER_OUT_SIZE)
        except SSL.WantReadError:
            return 0
        self._scratch.cipher_out[: len(data)] = data
        return len(data)

    def close_notify(self) -> None:
        """Say that no more data comes from us. Never raises: a connection too broken to say it is closed all the same."""
        try:
            self._connection.shutdown()
        except SSL.Error:
            pass

    def release_memory(self) -> None:
        """Give back what a burst of traffic made OpenSSL allocate. Cheap; call it when the connection is quiet."""

    def peer_certificate(self) -> bytes | None:
        """The peer's certificate, DER."""
        if self.peer_der is not None:
            return self.peer_der
        certificate = self._connection.get_peer_certificate(as_cryptography=True)
        return None if certificate is None else certificate.public_bytes(Encoding.DER)

    @property
    def alpn(self) -> bytes:
        """The protocol agreed by ALPN, empty if the peer offered none."""
        return bytes(self._connection.get_alpn_proto_negotiated())

    @property
    def cipher_suite(self) -> str | None:
        """What was agreed, by its name in RFC 8446 section B.4."""
        name: str | None = self._connection.get_cipher_name()
        return name

    def _failure(self, error: Exception) -> TlsError:
        mistake: Exception | None = getattr(_local, "mistake", None)
        if mistake is not None:
            _local.mistake = None
            raise mistake
        if self.refusal is not None:
            return TlsError(self.refusal)
        reason = _reason_of(error) or ("connection truncated" if self.established else "connection closed within the handshake")
        if reason == "peer did not return a certificate":
            return TlsError("no client certificate")
        if "alert" in reason:
            return TlsError(f"refused by peer: {reason}")
        return TlsError(reason)


class BindingEngine(TlsEngine):
    """The same on OpenSSL's record calls, which read and write our buffers directly."""

    __slots__ = ("_at_boundary", "_cipher_in", "_cipher_out", "_most_taken", "_plain_in", "_plain_out", "_read_bio", "_ssl", "_write_bio")

    def __init__(
        self,
        context: SSL.Context,
        *,
        server_side: bool,
        verify_peer: VerifyPeer | None = None,
        server_name: str = "",
        buffers: Scratch | None = None,
    ) -> None:
        super().__init__(context, server_side=server_side, verify_peer=verify_peer, server_name=server_name, buffers=buffers)
        self._ssl = self._connection._ssl
        self._write_bio = self._connection._from_ssl
        self._read_bio = self._connection._into_ssl
        """Takes copies; None while OpenSSL reads from a BIO over our buffer."""
        self._at_boundary = False
        """Surely nothing but whole records has been read so far."""
        self._most_taken = 0
        self._cipher_in, self._plain_in, self._plain_out, self._cipher_out = self._scratch.pointers

    def feed(self, size: int) -> None:
        # All of it is consumed by the next read() or handshake(): a partial record is kept by OpenSSL.
        if size <= _COPIED_AT_MOST:
            if self._read_bio is None:
                self._read_bio = _lib.BIO_new(_lib.BIO_s_mem())
                _lib.SSL_set_bio(self._ssl, self._read_bio, self._write_bio)
            _lib.BIO_write(self._read_bio, self._cipher_in, size)
        else:
            # A read-only BIO over our buffer instead of a copy into a BIO that would keep its largest size for ever. OpenSSL frees
            # the previous one.
            self._lend(size)

    def handshake(self) -> None:
        # To wait for the peer is no exception here: pyOpenSSL raises one, and each end of a handshake waits at least once.
        _local.shaking_hands = self  # of whom `_verify` is asked
        result = _lib.SSL_do_handshake(self._ssl)
        _local.shaking_hands = None
        if result == 1:
            self.established = True
        elif _lib.SSL_get_error(self._ssl, result) != _WANT_READ:
            raise self._failed(result)

    def _lend(self, size: int) -> None:
        bio = _lib.BIO_new_mem_buf(self._cipher_in, size)
        _lib.BIO_set_mem_eof_return(bio, -1)
        _lib.SSL_set_bio(self._ssl, bio, self._write_bio)
        self._read_bio = None

    def open(self, size: int) -> int:
        bio = self._read_bio
        if size > _COPIED_AT_MOST or bio is None:
            self.feed(size)
            return self.read()
        # Most often one record has come, whole. To learn that by asking for another costs as much as the record itself. OpenSSL takes no
        # more of a record than it can return, so the sizes tell; if a part of one came before, the BIO does.
        _lib.BIO_write(bio, self._cipher_in, size)
        got: int = _lib.SSL_read(self._ssl, self._plain_in, _RECORD)
        if got > 0 and ((self._at_boundary and got + _OVERHEAD == size) or _lib.BIO_get_mem_data(bio, _NULL) == 0):
            self._at_boundary = True
            return got
        return self._read_on(got)

    def read(self) -> int:
        return self._read_on(_lib.SSL_read(self._ssl, self._plain_in, _RECORD))

    def _read_on(self, got: int) -> int:
        """All that is left, after a read that gave ``got``."""
        ssl_read, ssl, plain, offset = _lib.SSL_read, self._ssl, self._plain_in, 0
        self._at_boundary = False
        while got > 0:
            offset += got
            got = ssl_read(ssl, plain + offset, _RECORD)
        error = _lib.SSL_get_error(ssl, got)
        if error == _ZERO_RETURN:
            self.peer_closed = True
        elif error != _WANT_READ:
            raise self._failed(got)
        return offset

    def write(self, size: int) -> None:
        ssl_write, ssl, plain, offset = _lib.SSL_write, self._ssl, self._plain_out, 0
        while offset < size:
            # All records in one call, but for contexts that write one at a time (SSL_MODE_ENABLE_PARTIAL_WRITE).
            put = ssl_write(ssl, plain + offset, size - offset)
            if put <= 0:
                raise self._failed(put)
            offset += put

    def seal(self, size: int) -> int:
        if size > _RECORD:
            self.write(size)
            return self.take()
        put = _lib.SSL_write(self._ssl, self._plain_out, size)
        if put != size:
            raise self._failed(put)
        sealed: int = _lib.BIO_read(self._write_bio, self._cipher_out, _CIPHER_OUT_SIZE)
        return sealed

    def take(self) -> int:
        size: int = _lib.BIO_read(self._write_bio, self._cipher_out, _CIPHER_OUT_SIZE)
        if size <= 0:
            return 0
        if size > self._most_taken:
            self._most_taken = size
        return size

    def release_memory(self) -> None:
        if self._most_taken > _WRITE_BIO_KEPT:
            self._most_taken = 0
            self._write_bio = _lib.BIO_new(_lib.BIO_s_mem())
            self._lend(0)

    def _failed(self, result: int) -> TlsError:
        try:
            self._connection._raise_ssl_error(self._ssl, result)
        except SSL.Error as exc:
            return self._failure(exc)
        return TlsError("OpenSSL failed without a reason")


def _reason_of(error: Exception) -> str | None:
    """What TLS itself says went wrong, or else what was first said of it."""
    queue: list[tuple[str, str, str]] = error.args[0] if error.args and isinstance(error.args[0], list) else []
    reasons = [reason for library, _, reason in queue if library.startswith("SSL")] or [reason for _, _, reason in queue]
    if not reasons:
        return None
    # AWS-LC has names for what OpenSSL says in words: PEER_DID_NOT_RETURN_A_CERTIFICATE.
    return reasons[0].replace("_", " ").lower() if reasons[0].isupper() else reasons[0]


def _verify_error(code: int) -> str:
    text = X509_ERRORS(code) if X509_ERRORS is not None else None
    return text or f"error {code}"


def _find_binding() -> tuple[Any, Any] | None:
    lib, ffi = getattr(SSL, "_lib", None), getattr(SSL, "_ffi", None)
    if lib is None or ffi is None or not all(hasattr(lib, name) for name in (*_BINDING_NAMES, "BIO_set_mem_eof_return")):
        return None
    return lib, ffi


def _error_texts() -> Callable[[int], str] | None:
    if BINDING is None or not hasattr(BINDING[0], "X509_verify_cert_error_string"):
        return None
    lib, ffi = BINDING
    return lambda code: str(ffi.string(lib.X509_verify_cert_error_string(code)).decode())


BINDING = _find_binding()
X509_ERRORS = _error_texts()
if BINDING is not None:
    _lib, _ffi = BINDING
    _NULL = _ffi.NULL
    _WANT_READ, _ZERO_RETURN = _lib.SSL_ERROR_WANT_READ, _lib.SSL_ERROR_ZERO_RETURN
    _VERIFY = _ffi.callback("int (*)(int, X509_STORE_CTX *)", _verify_by_binding, error=0)


def tls_engine(
    context: SSL.Context,
    *,
    server_side: bool,
    verify_peer: VerifyPeer | None = None,
    server_name: str = "",
    buffers: Scratch | None = None,
) -> TlsEngine:
    """A TLS connection about to shake hands, on the faster of the engines this installation allows.

    ``server_name``: a client's SNI, ASCII. ``buffers``: what its driver uses instead of `scratch`.
    """
    kind = TlsEngine if BINDING is None else BindingEngine
    return kind(context, server_side=server_side, verify_peer=verify_peer, server_name=server_name, buffers=buffers)
