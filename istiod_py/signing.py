"""The certificate service as agents call it: ``istio.v1.auth.IstioCertificateService/CreateCertificate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.message import DecodeError

from istiod_py.authenticate import REFUSED, Authenticator, Caller, IdentityRefused, NodeAuthorizer, Unauthenticated, Undecided
from istiod_py.ca import BadRequest, CaError, CertificateAuthority
from mesh.model.identity import SpiffeId
from mesh.rpc import Call, RpcError, Status
from mesh.telemetry.log import get_logger
from mesh.telemetry.metrics import Registry
from mesh.xds.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse

_IMPERSONATED: Final = "ImpersonatedIdentity"
_LONGEST_REQUESTABLE: Final = 10 * 365 * 86400
"""Seconds; far beyond what is granted, and small enough for date arithmetic."""

_log = get_logger("ca")


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request asks for, parsed: whose certificate, for which key, for how long."""

    csr_pem: bytes
    impersonated: str | None
    lifetime: timedelta


class SigningMetrics:
    """Istio's citadel counters."""

    def __init__(self, registry: Registry) -> None:
        self.requests = registry.counter("citadel_server_csr_count", "The number of CSRs received by Citadel server").labelled()
        self.issued = registry.counter(
            "citadel_server_success_cert_issuance_count", "The number of certificates issuances that have succeeded"
        ).labelled()
        self.unauthenticated = registry.counter(
            "citadel_server_authentication_failure_count", "The number of authentication failures"
        ).labelled()
        self.unparsable = registry.counter(
            "citadel_server_csr_parsing_err_count", "The number of errors occurred when parsing the CSR"
        ).labelled()


@dataclass(frozen=True, slots=True)
class SigningService:
    """Authenticate, authorize, sign: in this order, each step with what the one before has proven."""

    ca: CertificateAuthority
    authenticator: Authenticator
    authorizer: NodeAuthorizer
    metrics: SigningMetrics
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    async def create_certificate(self, request: bytes, call: Call) -> bytes:
        """The handler. RpcError: UNAUTHENTICATED (token, or another node's identity), INVALID_ARGUMENT (request), UNAVAILABLE (nobody can
        judge the token now), INTERNAL (us)."""
        self.metrics.requests.value += 1
        caller = await self._authenticate(call)
        grant = self._parse(request, caller)
        identity = await self._authorize(caller, grant)
        try:
            chain = self.ca.sign_workload(grant.csr_pem, identity, grant.lifetime, self.now())
        except BadRequest as exc:
            self.metrics.unparsable.value += 1
            _log.warning("csr.refused", caller=str(caller), identity=str(identity), because=str(exc))
            raise RpcError(Status.INVALID_ARGUMENT, str(exc)) from exc
        except CaError as exc:
            _log.error("signing.failed", identity=str(identity), because=str(exc))
            raise RpcError(Status.INTERNAL, "the certificate authority can't sign now") from exc
        self.metrics.issued.value += 1
        _log.info("signed", caller=str(caller), identity=str(identity))
        return IstioCertificateResponse(cert_chain=[pem.decode("ascii") for pem in chain]).SerializeToString()

    async def _authenticate(self, call: Call) -> Caller:
        try:
            return await require_caller(self.authenticator, call)
        except RpcError as exc:
            self.metrics.unauthenticated.value += exc.status is Status.UNAUTHENTICATED
            raise

    def _parse(self, request: bytes, caller: Caller) -> Grant:
        try:
            return parse_request(request)
        except BadRequest as exc:
            self.metrics.unparsable.value += 1
            _log.warning("csr.refused", caller=str(caller), because=str(exc))
            raise RpcError(Status.INVALID_ARGUMENT, str(exc)) from exc

    async def _authorize(self, caller: Caller, grant: Grant) -> SpiffeId:
        if grant.impersonated is None:
            return SpiffeId(self.authorizer.trust_domain, caller.namespace, caller.service_account)
        try:
            return await self.authorizer.authorize(caller, grant.impersonated)
        except IdentityRefused as exc:
            # The caller is not told why: what runs where is none of its business.
            _log.warning("identity.refused", caller=str(caller), identity=grant.impersonated, because=str(exc))
            raise RpcError(Status.UNAUTHENTICATED, REFUSED) from exc


def parse_request(data: bytes) -> Grant:
    """Parse an IstioCertificateRequest. Without ``ImpersonatedIdentity`` the caller asks for its own. Raises BadRequest."""
    try:
        message = IstioCertificateRequest.FromString(data)
    except DecodeError as exc:
        raise BadRequest(f"not an IstioCertificateRequest: {exc}") from exc
    fields = message.metadata.fields
    impersonated = fields[_IMPERSONATED].string_value if _IMPERSONATED in fields else None
    seconds = message.validity_duration
    if abs(seconds) > _LONGEST_REQUESTABLE:
        raise BadRequest(f"the requested lifetime of {seconds} s is out of range")
    return Grant(message.csr.encode(), impersonated, timedelta(seconds=seconds))


async def require_caller(authenticator: Authenticator, call: Call, *, fresh: bool = False) -> Caller:
    """The call's proven caller; the mesh's state is not for everybody who reaches the port either. Raises RpcError: UNAUTHENTICATED, or
    UNAVAILABLE when nobody can say now."""
    try:
        return await authenticator.authenticate(call.metadata, fresh=fresh)
    except Unauthenticated as exc:
        _log.warning("caller.refused", peer=call.peer.address, path=call.path, because=str(exc))
        raise RpcError(Status.UNAUTHENTICATED, str(exc)) from exc
    except Undecided as exc:
        _log.error("caller.undecided", peer=call.peer.address, path=call.path, because=str(exc))
        raise RpcError(Status.UNAVAILABLE, "callers can't be authenticated now") from exc
