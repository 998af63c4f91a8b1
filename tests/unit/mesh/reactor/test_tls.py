import gc
import itertools
import os
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.reactor import tls
from mesh.reactor.tls import BindingEngine, TlsEngine, TlsError, VerifyPeer, scratch, tls_engine
from mesh.testing.ca import FakeCa
from mesh.tls.contexts import hbone_context

SERVER = SpiffeId("cluster.local", "default", "server")
CLIENT = SpiffeId("cluster.local", "default", "client")


@pytest.fixture(params=["binding", "portable"], autouse=True)
def engine_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[TlsEngine]:
    monkeypatch.setattr(tls, "_local", threading.local())  # buffers that an engine of the one kind made lack what the other needs
    if request.param == "portable":
        monkeypatch.setattr(tls, "BINDING", None)
    return TlsEngine if request.param == "portable" else BindingEngine


@pytest.fixture(scope="module")
def ca() -> FakeCa:
    return FakeCa()


def pair(ca: FakeCa, *, judge_client: VerifyPeer | None = None, judge_server: VerifyPeer | None = None) -> tuple[TlsEngine, TlsEngine]:
    client = tls_engine(hbone_context(ca.issue(CLIENT)), server_side=False, verify_peer=judge_server)
    server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True, verify_peer=judge_client)
    return client, server


def carry(source: TlsEngine, sink: TlsEngine) -> bytes:
    """Give ``sink`` what ``source`` has to send; the plaintext that comes of it."""
    size = source.take()
    if not size:
        return b""
    scratch().cipher_in[:size] = scratch().cipher_out[:size]
    sink.feed(size)
    if not sink.established:
        sink.handshake()
    return bytes(scratch().plain_in[: sink.read()]) if sink.established else b""


def shake_hands(client: TlsEngine, server: TlsEngine) -> None:
    client.handshake()
    for _ in range(3):
        carry(client, server)
        carry(server, client)


def write(engine: TlsEngine, data: bytes) -> None:
    scratch().plain_out[: len(data)] = data
    engine.write(len(data))


def test_the_engine_is_the_one_the_binding_allows(ca: FakeCa, engine_kind: type[TlsEngine]) -> None:
    assert type(pair(ca)[0]) is engine_kind


def test_handshake_agrees_on_aes_128_the_post_quantum_group_and_h2(ca: FakeCa) -> None:
    client, server = pair(ca)
    client.handshake()
    carry(client, server)
    size = server.take()
    answer = bytes(scratch().cipher_out[:size])
    # Of the ServerHello, which is not encrypted: key_share (51) with the share of X25519MLKEM768 (0x11ec), 1120 bytes.
    assert b"\x00\x33\x04\x64\x11\xec\x04\x60" in answer[:200]
    scratch().cipher_in[:size] = answer
    client.feed(size)
    client.handshake()
    carry(client, server)
    assert client.established
    assert server.established
    for engine in (client, server):
        assert engine.cipher_suite == "TLS_AES_128_GCM_SHA256"
        assert engine.alpn == b"h2"
        assert engine.peer_certificate() is not None


def test_the_suite_is_of_the_servers_choice_on_openssl_and_of_the_clients_on_aws_lc(ca: FakeCa) -> None:
    context = hbone_context(ca.issue(CLIENT))
    context.set_tls13_ciphersuites(b"TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256")
    client = tls_engine(context, server_side=False)
    server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True)
    shake_hands(client, server)
    assert client.cipher_suite == ("TLS_AES_256_GCM_SHA384" if tls.LIBRARY.startswith("AWS-LC") else "TLS_AES_128_GCM_SHA256")


@pytest.mark.parametrize("size", [1, 100, 16384, 16385, 100_000, tls.PLAIN_OUT_SIZE])
def test_bytes_of_any_number_of_records_arrive_in_one_read(ca: FakeCa, size: int) -> None:
    client, server = pair(ca)
    shake_hands(client, server)
    data = os.urandom(size)
    write(client, data)
    sent = client.take()
    cipher = bytes(scratch().cipher_out[:sent])
    received = b""
    for start in range(0, len(cipher), tls.READ_SIZE):
        piece = cipher[start : start + tls.READ_SIZE]
        scratch().cipher_in[: len(piece)] = piece
        server.feed(len(piece))
        received += scratch().plain_in[: server.read()]
    assert received == data


def test_a_record_in_pieces_is_read_when_its_last_byte_has_come(ca: FakeCa) -> None:
    client, server = pair(ca)
    shake_hands(client, server)
    write(client, b"x" * 5000)
    cipher = bytes(scratch().cipher_out[: client.take()])
    sizes = []
    for byte in (cipher[:3], cipher[3:2000], cipher[2000:-1], cipher[-1:]):
        scratch().cipher_in[: len(byte)] = byte
        server.feed(len(byte))
        sizes.append(server.read())
    assert sizes == [0, 0, 0, 5000]


class Sealer:
    """A peer that makes its TLS 1.3 records (RFC 8446 section 5.2) itself: empty ones and padded ones, which OpenSSL makes for nobody."""

    def __init__(self, secret: bytes) -> None:
        self._take_keys(secret)

    def _take_keys(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = AESGCM(self._expand(b"key", 16))
        self._iv = int.from_bytes(self._expand(b"iv", 12))
        self._number = 0

    def _expand(self, name: bytes, length: int) -> bytes:
        label = b"tls13 " + name  # section 7.1
        return HKDFExpand(SHA256(), length, bytes((0, length, len(label))) + label + b"\0").derive(self._secret)

    def record(self, payload: bytes, padding: int = 0, kind: int = 23) -> bytes:
        inner = payload + bytes((kind,)) + bytes(padding)
        header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2)
        nonce = (self._iv ^ self._number).to_bytes(12)
        self._number += 1
        return header + self._cipher.encrypt(nonce, inner, header)

    def key_update(self) -> bytes:
        """Section 4.6.3, with none asked for in return."""
        record = self.record(b"\x18\0\0\1\0", kind=22)
        self._take_keys(self._expand(b"traffic upd", 32))
        return record


def sealed_pair(ca: FakeCa) -> tuple[Sealer, TlsEngine]:
    """A server whose client, after the handshake, is only its keys."""
    lines: list[bytes] = []
    context = hbone_context(ca.issue(CLIENT))
    context.set_keylog_callback(lambda _connection, line: lines.append(line))
    client = tls_engine(context, server_side=False)
    server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True)
    shake_hands(client, server)
    (secret,) = (line.split()[2] for line in lines if line.startswith(b"CLIENT_TRAFFIC_SECRET_0 "))
    return Sealer(bytes.fromhex(secret.decode())), server


def opened(engine: TlsEngine, cipher: bytes) -> bytes:
    """What one read off a socket becomes."""
    scratch().cipher_in[: len(cipher)] = cipher
    return bytes(scratch().plain_in[: engine.open(len(cipher))])


FULL = 16384


@pytest.mark.parametrize(
    "records",
    [[0], [1], [FULL], [1, 1], [0, 0], [0, 1], [1, 0], [22, 0], [0, 22], [1000, 1000, 1000], [FULL, 1], [1, FULL], [FULL] * 15],
    ids=str,
)
def test_one_read_is_opened_whole_however_many_records_it_has(ca: FakeCa, records: list[int]) -> None:
    sealer, server = sealed_pair(ca)
    for _ in range(3):  # what the read before it was like decides about the way that the next one takes
        payloads = [os.urandom(size) for size in records]
        assert opened(server, b"".join(map(sealer.record, payloads))) == b"".join(payloads)
        assert opened(server, sealer.record(b"lone")) == b"lone"


@pytest.mark.parametrize("padding", [1, 22, 23, 100])
def test_padding_is_not_taken_for_another_record_nor_another_record_for_padding(ca: FakeCa, padding: int) -> None:
    sealer, server = sealed_pair(ca)
    assert opened(server, sealer.record(b"lone")) == b"lone"
    assert opened(server, sealer.record(b"padded", padding)) == b"padded"
    assert opened(server, sealer.record(b"padded", padding) + sealer.record(b"plain")) == b"paddedplain"
    assert opened(server, sealer.record(b"", padding)) == b""
    assert opened(server, sealer.record(b"lone")) == b"lone"


def test_a_key_update_is_passed_over_and_what_follows_is_read(ca: FakeCa) -> None:
    sealer, server = sealed_pair(ca)
    assert opened(server, sealer.record(b"lone")) == b"lone"
    assert opened(server, sealer.key_update()) == b""
    assert opened(server, sealer.record(b"lone")) == b"lone"
    assert opened(server, sealer.key_update() + sealer.record(b"behind")) == b"behind"
    assert opened(server, sealer.record(b"before") + sealer.key_update()) == b"before"
    assert opened(server, sealer.record(b"lone")) == b"lone"


def test_sizes_that_fit_by_chance_hide_no_record(ca: FakeCa) -> None:
    """What is missing of the first record is as long as the second: the read has the size of one record, and holds the ends of two."""
    sealer, server = sealed_pair(ca)
    assert opened(server, sealer.record(b"lone")) == b"lone"
    first, second = sealer.record(b"first" * 20), sealer.record(b"second")
    assert opened(server, first[: len(second)]) == b""
    assert opened(server, first[len(second) :] + second) == b"first" * 20 + b"second"
    assert opened(server, sealer.record(b"lone")) == b"lone"


RECORDS = st.lists(st.tuples(st.sampled_from([0, 1, 21, 22, 23, 100, 4000, 4096, FULL]), st.sampled_from([0, 0, 0, 1, 22])), max_size=8)


@given(RECORDS, st.lists(st.integers(0, 60_000), max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_cut_anywhere_give_the_same_bytes(ca: FakeCa, records: list[tuple[int, int]], cuts: list[int]) -> None:
    sealer, server = sealed_pair(ca)
    payloads = [bytes((number,)) * size for number, (size, _) in enumerate(records, 1)]
    sealed = [
        sealer.record(payload, padding if size + padding <= FULL else 0) for payload, (size, padding) in zip(payloads, records, strict=True)
    ]
    edges = {0, *itertools.accumulate(map(len, sealed))}  # the reads end where records end, and where nobody would expect it
    total = max(edges)
    ends = sorted({*(list(edges)[::2]), *(cut % total for cut in cuts if total), total} - {0})
    received = b""
    for start, end in itertools.pairwise([0, *ends]):
        received += opened(server, b"".join(sealed)[start:end])
    assert received == b"".join(payloads)


def test_a_connection_goes_on_after_its_memory_was_released(ca: FakeCa) -> None:
    client, server = pair(ca)
    shake_hands(client, server)
    for _ in range(3):
        write(client, b"x" * 200_000)
        assert len(carry(client, server)) == 200_000
        client.release_memory()
        server.release_memory()
        write(server, b"back")
        assert carry(server, client) == b"back"


def test_close_notify_is_told_from_silence(ca: FakeCa) -> None:
    client, server = pair(ca)
    shake_hands(client, server)
    write(client, b"last words")
    client.close_notify()
    assert carry(client, server) == b"last words"
    assert server.peer_closed
    assert not client.peer_closed


def test_garbage_after_the_handshake_breaks_the_connection(ca: FakeCa) -> None:
    client, server = pair(ca)
    shake_hands(client, server)
    write(client, b"hello")
    size = client.take()
    scratch().cipher_in[:size] = scratch().cipher_out[:size]
    scratch().cipher_in[size - 1] ^= 1
    server.feed(size)
    with pytest.raises(TlsError, match="bad record mac"):
        server.read()


def refusal(client: TlsEngine, server: TlsEngine) -> tuple[str, str]:
    """Who refused, and why."""
    for turn in range(6):
        source, sink, name = (client, server, "server") if turn % 2 == 0 else (server, client, "client")
        try:
            if turn == 0:
                client.handshake()
            carry(source, sink)
        except TlsError as exc:
            return name, exc.reason
    raise AssertionError("nobody refused")


def test_a_client_without_certificate_is_refused(ca: FakeCa) -> None:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_alpn_protos([b"h2"])
    client = tls_engine(context, server_side=False)
    server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True)
    assert refusal(client, server) == ("server", "no client certificate")
    with pytest.raises(TlsError, match=r"refused by peer: .*certificate required"):
        carry(server, client)


UNKNOWN_CA = [
    ("other.example", "certificate verify failed: unable to get local issuer certificate"),
    ("cluster.local", "certificate verify failed: certificate signature failure"),  # same name, other key
]


@pytest.mark.parametrize(("name", "reason"), UNKNOWN_CA)
def test_a_client_of_an_unknown_ca_is_refused(ca: FakeCa, name: str, reason: str) -> None:
    bundle = replace(FakeCa(name).issue(CLIENT), roots_pem=ca.root_pem)
    client = tls_engine(hbone_context(bundle), server_side=False)
    server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True)
    assert refusal(client, server) == ("server", reason)
    with pytest.raises(TlsError, match="refused by peer"):
        carry(server, client)


@pytest.mark.parametrize(("name", "reason"), UNKNOWN_CA)
def test_a_server_of_an_unknown_ca_is_refused(ca: FakeCa, name: str, reason: str) -> None:
    client = tls_engine(hbone_context(FakeCa(name).issue(CLIENT)), server_side=False)
    server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True)
    assert refusal(client, server) == ("client", reason)


def test_an_expired_certificate_is_refused(ca: FakeCa) -> None:
    client = tls_engine(hbone_context(ca.issue(CLIENT, timedelta(minutes=-1))), server_side=False)
    server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True)
    assert refusal(client, server) == ("server", "certificate verify failed: certificate has expired")


def test_the_callers_judgement_refuses_within_the_handshake(ca: FakeCa) -> None:
    client, server = pair(ca, judge_client=lambda _der: "foreign trust domain")
    assert refusal(client, server) == ("server", "foreign trust domain")
    client, server = pair(ca, judge_server=lambda _der: "not the one we meant")
    assert refusal(client, server) == ("client", "not the one we meant")


def test_a_verifier_that_raises_refuses(ca: FakeCa) -> None:
    def fail(_der: bytes) -> str | None:
        raise RuntimeError("bug")

    client, server = pair(ca, judge_client=fail)
    with pytest.raises(RuntimeError, match="bug"):
        refusal(client, server)
    assert not server.established
    shake_hands(*pair(ca))  # nobody else's refusal


def test_nobody_is_let_in_whom_nobody_judges(ca: FakeCa) -> None:
    """A connection that OpenSSL verifies while no engine shakes hands has no judge."""
    client = SSL.Connection(hbone_context(ca.issue(CLIENT)))
    client.set_connect_state()
    _, server = pair(ca)
    with pytest.raises(SSL.WantReadError):
        client.do_handshake()
    hello = client.bio_read(16384)
    scratch().cipher_in[: len(hello)] = hello
    server.feed(len(hello))
    server.handshake()
    client.bio_write(bytes(scratch().cipher_out[: server.take()]))
    with pytest.raises(SSL.Error):
        client.do_handshake()


def test_a_client_that_offers_no_alpn_is_served_and_one_that_offers_another_is_not(ca: FakeCa) -> None:
    for offered, served in (([], True), ([b"http/1.1"], False), ([b"http/1.1", b"h2"], True)):
        bundle = ca.issue(CLIENT)
        context = hbone_context(bundle)
        context.set_alpn_protos(offered) if offered else None
        client = tls_engine(context, server_side=False)
        server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True)
        if served:
            shake_hands(client, server)
            assert server.established
        else:
            assert refusal(client, server)[0] == "server"


def test_tls_1_2_is_refused(ca: FakeCa) -> None:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    client = tls_engine(context, server_side=False)
    server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True)
    assert refusal(client, server) == ("server", "unsupported protocol")


def test_plain_http_is_refused(ca: FakeCa) -> None:
    server = tls_engine(hbone_context(ca.issue(SERVER)), server_side=True)
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    scratch().cipher_in[: len(request)] = request
    server.feed(len(request))
    with pytest.raises(TlsError, match="http request"):
        server.handshake()


def test_engines_of_finished_threads_are_freed_safely(ca: FakeCa) -> None:
    """cffi crashed here once: a buffer of a memoryview, freed within a cycle."""

    def work() -> None:
        for _ in range(5):
            shake_hands(*pair(ca))

    for _ in range(4):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        gc.collect()
