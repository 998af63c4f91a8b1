"""Certificates as connections find them: held, awaited, refused, expired, forgotten."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from mesh.model.identity import SpiffeId
from mesh.reactor.loop import Reactor
from mesh.testing.ca import FakeCa
from ztunnel_py.mover.credentials import Credentials, CredentialStore

ID = SpiffeId("cluster.local", "shop", "client")
CA = FakeCa()


class Store:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)
        self.asked: list[SpiffeId] = []
        self.store = CredentialStore(Reactor(), self.asked.append, now=lambda: self.now)
        self.got: list[Credentials | str] = []

    def want(self) -> None:
        self.store.when_available(ID, self.got.append)


def test_the_first_to_want_a_certificate_asks_and_all_get_it() -> None:
    store = Store()
    for _ in range(3):
        store.want()
    assert store.asked == [ID]
    assert store.store.wanted() == (ID,)
    bundle = CA.issue(ID)
    store.store.put(bundle)
    assert [isinstance(got, Credentials) and got.bundle is bundle for got in store.got] == [True] * 3
    assert store.store.wanted() == ()


def test_a_refusal_reaches_who_waits_and_spares_what_is_held() -> None:
    store = Store()
    store.want()
    store.store.refuse(ID, "the authority said no")
    assert store.got == ["identity error: the authority said no"]
    store.store.put(CA.issue(ID))
    store.store.refuse(ID, "and again")
    store.want()
    assert isinstance(store.got[-1], Credentials)


def test_an_expired_certificate_is_not_offered_and_the_reason_names_both() -> None:
    store = Store()
    bundle = CA.issue(ID, timedelta(hours=1))
    store.store.put(bundle)
    store.want()
    assert isinstance(store.got.pop(), Credentials)
    store.now += timedelta(hours=2)
    store.want()
    assert store.asked == [ID], "a new one is asked for"
    store.store.refuse(ID, "signing gRPC error (UNAVAILABLE): gone")
    (text,) = store.got
    assert (
        text == f"identity error: the certificate expired at {bundle.not_after:%Y-%m-%dT%H:%M:%SZ}: signing gRPC error (UNAVAILABLE): gone"
    )
    store.store.put(CA.issue(ID, timedelta(hours=3)))
    store.want()
    assert isinstance(store.got[-1], Credentials)


def test_nothing_is_kept_of_an_identity_that_no_pod_has() -> None:
    store = Store()
    store.store.put(CA.issue(ID))
    store.store.refuse(ID, "the identity is no longer needed")
    store.store.forget(ID)
    store.want()
    assert store.asked == [ID]
    assert store.got == []
