"""The own root in a Secret, where every replica and every restart finds it; Istio's name and keys, so that either can take over."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from datetime import datetime
from typing import Final

from istiod_py.ca import CaError, RootFiles, is_due, new_root, read_root
from istiod_py.succession import Material
from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.objects import mapping_at
from mesh.kube.resources import SECRETS
from mesh.telemetry.log import get_logger

NAME: Final = "istio-ca-secret"
_TYPE: Final = "istio.io/ca-root"
_KEY, _CERTIFICATE = "ca-key.pem", "ca-cert.pem"
_ATTEMPTS: Final = 5

_log = get_logger("ca")


class RootSecret:
    """Reads, makes and renews the Secret. Of replicas that write at once one wins, and the others read what it wrote."""

    def __init__(self, client: ApiClient, namespace: str, trust_domain: str) -> None:
        self._client = client
        self._namespace = namespace
        self._trust_domain = trust_domain
        self._where = f"Secret {namespace}/{NAME}"

    async def load(self, now: datetime) -> Material:
        """The root in force, made or renewed first if that is due. Raises CaError."""
        try:
            for _ in range(_ATTEMPTS):
                secret = await self._client.find(SECRETS.path(self._namespace, NAME))
                if secret is not None:
                    root = self._read(secret)
                    material = read_root(root, self._where)
                    if not is_due(material, now):
                        return material
                    root = new_root(self._trust_domain, now, root.key_pem, self._where)
                else:
                    root = new_root(self._trust_domain, now)
                if await self._write(secret, root):
                    return read_root(root, self._where)
        except (ApiError, ApiUnavailable) as exc:
            raise CaError(f"{self._where}: {exc}") from exc
        raise CaError(f"{self._where}: others write it all the time")

    def _read(self, secret: Mapping[str, object]) -> RootFiles:
        data = mapping_at(secret, "data")
        try:
            key, certificate = (base64.b64decode(str(data[name]), validate=True) for name in (_KEY, _CERTIFICATE))
        except (KeyError, binascii.Error, ValueError) as exc:
            raise CaError(f"{self._where}: {_KEY} and {_CERTIFICATE} are not both there: restore them, or delete the Secret") from exc
        return RootFiles(key, certificate)

    async def _write(self, before: Mapping[str, object] | None, root: RootFiles) -> bool:
        """False: somebody else was faster."""
        data = {_KEY: base64.b64encode(root.key_pem).decode(), _CERTIFICATE: base64.b64encode(root.certificate_pem).decode()}
        if not await write_secret(self._client, self._namespace, NAME, before, data, type=_TYPE):
            return False
        _log.info("root.made" if before is None else "root.renewed", secret=self._where)
        return True


async def write_secret(
    client: ApiClient, namespace: str, name: str, before: Mapping[str, object] | None, data: Mapping[str, str], *, type: str = "Opaque"
) -> bool:
    """Make a Secret, or set ``data`` (base64) in what was read; False: somebody else was faster. Raises ApiError, ApiUnavailable."""
    try:
        if before is None:
            made = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "type": type, "data": data}
            await client.create(SECRETS.collection(namespace), made)
        else:
            # With the version that was read it is a Conflict to write over what somebody else put there meanwhile.
            changed = {**before, "data": {**mapping_at(before, "data"), **data}}
            await client.replace(SECRETS.path(namespace, name), changed)
    except ApiError as exc:
        if exc.status == 409:
            return False
        raise
    return True
