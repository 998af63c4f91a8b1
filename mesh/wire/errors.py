"""The exceptions of the wire: the peer broke the protocol, or we did.

Codes are those of HTTP/2 (RFC 9113 section 7); protocols without codes of their own use PROTOCOL_ERROR.
"""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """RFC 9113 section 7. Codes from the network stay plain ``int``: unknown ones are legal."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class RemoteProtocolError(Exception):
    """The peer broke the protocol: the only exception that peer bytes can raise out of `mesh.wire`; anything else is a bug."""

    def __init__(self, reason: str, code: int = ErrorCode.PROTOCOL_ERROR) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


class LocalProtocolError(Exception):
    """Our own side asked for what the protocol forbids (more DATA than the windows allow, a tunnel after GOAWAY): a bug of the caller."""
