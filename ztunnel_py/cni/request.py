"""What a CNI plugin asks when a pod's network was made: Istio's JSON, with the pod's uid added by ours. Pure."""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from typing import Final

import msgspec

from mesh.model.address import InvalidAddress, IpAddress, parse_ip

_MAX_NAME: Final = 253
_MAX_PATH: Final = 4096
_MAX_IPS: Final = 16


class BadRequest(Exception):
    """The body is not a request; the text names the field."""


@dataclass(frozen=True, slots=True)
class PodAdded:
    """A pod whose network exists and whose containers do not yet. ``uid`` is ``""`` where the plugin does not know it; ``netns_path`` is
    the container runtime's, on the node."""

    namespace: str
    name: str
    uid: str
    netns_path: str
    ips: tuple[IpAddress, ...]


class _Address(msgspec.Struct):
    IP: str


class _Ip(msgspec.Struct):
    Address: _Address


class _Body(msgspec.Struct):
    Netns: str
    PodName: str
    PodNamespace: str
    PodUID: str = ""
    IPs: list[_Ip] | None = None


_DECODER: Final = msgspec.json.Decoder(_Body)


def parse_added(body: bytes) -> PodAdded:
    """Raises BadRequest."""
    try:
        found = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error, RecursionError) as exc:
        raise BadRequest(f"not the JSON of an added pod: {exc}") from exc
    for field, value in (("PodName", found.PodName), ("PodNamespace", found.PodNamespace)):
        if not 0 < len(value) <= _MAX_NAME:
            raise BadRequest(f"{field}: expected a name, found {len(value)} characters")
    if len(found.PodUID) > _MAX_NAME:
        raise BadRequest(f"PodUID: found {len(found.PodUID)} characters")
    if not found.Netns.startswith("/") or "\0" in found.Netns or len(found.Netns) > _MAX_PATH:
        raise BadRequest("Netns: expected an absolute path")
    ips = found.IPs or []
    if len(ips) > _MAX_IPS:
        raise BadRequest(f"IPs: found {len(ips)}, at most {_MAX_IPS} are expected")
    try:
        addresses = tuple(parse_ip(ip.Address.IP) for ip in ips)
    except InvalidAddress as exc:
        raise BadRequest(f"IPs: {exc}") from exc
    return PodAdded(found.PodNamespace, found.PodName, found.PodUID, found.Netns, addresses)
