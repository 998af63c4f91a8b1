"""A Secret: texts by key that nobody else may see. Neither values nor what is wrong with them is ever part of a message."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.kube.fields import Fields
from mesh.kube.objects import KubeObject, SourceProblem


@dataclass(frozen=True, slots=True)
class KubeSecret:
    """``data`` is decoded; what is no text is left out, since what we need (PEM) is one."""

    namespace: str
    name: str
    data: Mapping[str, str] = field(repr=False)


def read_secret(obj: KubeObject) -> tuple[KubeSecret, tuple[SourceProblem, ...]]:
    """The secret and every mistake in it. ``stringData`` goes before ``data``, as it would in an API server."""
    fields = Fields(obj)
    data: dict[str, str] = {}
    for key, encoded in fields.string_map("data").items():
        try:
            data[key] = base64.b64decode("".join(encoded.split()), validate=True).decode("utf-8")
        except UnicodeDecodeError:
            continue
        except (binascii.Error, ValueError):
            fields.complain("data", "not Base64", key)
    data |= fields.string_map("stringData")
    return KubeSecret(obj.namespace, obj.name, data), tuple(fields.problems)
