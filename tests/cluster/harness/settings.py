"""What a cluster is started with, and the words its keeper and its users exchange."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

CONTROL_PLANE_PROGRAMS: Final = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
NODE_PROGRAMS: Final = ("containerd", "kube-proxy", "kubelet")


class Settings(msgspec.Struct, frozen=True):
    """``programs``, ``tree`` and ``seed``: directories of the cache (`build.Parts`, `images.Seed`). ``patience``: seconds until everything
    must be ready. ``tied``: the cluster ends when its starter does, however that ends. ``lock``, ``events``, ``listener``: inherited
    descriptors; the last one accepts the API server's clients on the host's loopback interface."""

    name: str
    path: str
    programs: str
    tree: str
    seed: str
    nodes: int
    dual_stack: bool
    patience: float
    tied: bool
    lock: int = -1
    events: int = -1
    listener: int = -1


class Telling(msgspec.Struct, tag=True, frozen=True):
    """Progress on the way up."""

    text: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """All nodes and the DNS are."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    because: str


Event: TypeAlias = Telling | Ready | Failed


class Order(msgspec.Struct, frozen=True):
    """``verb``: start, stop, signal (with ``number``), status, down. ``name``: a program (``etcd``, ``n1/kubelet``) or a node."""

    verb: str
    name: str = ""
    number: int = 0


class ProgramStatus(msgspec.Struct, frozen=True):
    """See `meshctl_py.lab.processes.ProcessStatus`; ``pid`` as the cluster counts."""

    name: str
    state: str
    pid: int | None
    starts: int
    last_exit: str


class Answer(msgspec.Struct, frozen=True):
    """``refused`` says why; empty when the order was carried out."""

    refused: str = ""
    programs: tuple[ProgramStatus, ...] = ()
