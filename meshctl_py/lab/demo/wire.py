"""What travels on the link between two nodes while requests pass: readable, or nothing but TLS to the mesh's own port."""

from __future__ import annotations

from collections.abc import Callable

from mesh.model.ports import INBOUND_HBONE
from meshctl_py.lab.demo.report import Unmet
from meshctl_py.lab.demo.stage import Stage, Tap
from meshctl_py.lab.wiretap import Segment, is_tls, is_tls_1_3, join_segments, negotiated_tls


class Wire:
    """Requests of the client to the server, heard on the link to the server's node."""

    def __init__(self, stage: Stage, tap: Tap) -> None:
        self._stage = stage
        self._tap = tap

    def forget(self) -> None:
        """Leave out what passed so far."""
        self._tap.hear()

    def readable(self, family: str) -> str:
        """A new request is plain text between the pods. Tried again while an older label may still have effect."""
        text = f"/order-espresso-{family}"
        heard: list[Segment] = []

        def seen() -> bool:
            answer = self._stage.get("client", text, family)
            heard[:] = self._tap.hear()
            return answer.startswith("200") and any(text.encode() in segment.payload for segment in heard)

        if not self._stage.settle(seen):
            raise Unmet(f"{text!r} is not on the link, but {_describe(heard)}")
        segment = next(segment for segment in heard if text.encode() in segment.payload)
        first_line = segment.payload.splitlines()[0].decode()
        return f'"{first_line}" from {segment.source} to {segment.destination}'

    def encrypted(self, family: str, *, expected: Callable[[str], bool] = bool) -> str:
        """Requests that only wait for the mesh say nothing worth hiding; the one that follows must not be heard.

        ``expected`` says whether an answer came the way that is waited for.
        """
        before: list[Segment] = []
        if not self._settle_through_mesh(family, before, expected):
            raise Unmet(f"requests do not take the tunnel: {_describe(before)}")
        secret = f"/secret-recipe-{family}"
        answer = self._stage.get("client", secret, family)
        heard = self._tap.hear()
        if not answer.startswith("200") or secret not in answer or not expected(answer):
            raise Unmet(f"the request does not work any more: {answer}")
        if any(b"recipe" in segment.payload for segment in heard):
            raise Unmet("the request is still readable on the link")
        if not heard or not all(_is_tunnel(segment) for segment in heard):
            raise Unmet(f"other traffic than to port {INBOUND_HBONE} is on the link: {_describe(heard)}")
        tunnels = join_segments(filter(_is_tunnel, before + heard))
        # Older tunnels may still say something: their handshakes were heard by those who looked then.
        new = [stream for stream in tunnels if stream.source.port == INBOUND_HBONE and negotiated_tls(stream) is not None]
        if not new or not all(map(is_tls_1_3, new)) or not all(map(is_tls, tunnels)):
            raise Unmet(f"the tunnels are not all TLS 1.3: {_describe(heard)}")
        size = sum(len(segment.payload) for segment in heard)
        return f'answered "{answer[:9]}"; {size} bytes in {len(heard)} segments to and from {new[-1].source}, the text in none'

    def _settle_through_mesh(self, family: str, heard: list[Segment], expected: Callable[[str], bool]) -> bool:
        def seen() -> bool:
            answer = self._stage.get("client", "/warm-up", family)
            fresh = self._tap.hear()
            heard.extend(fresh)
            return answer.startswith("200") and expected(answer) and bool(fresh) and all(map(_is_tunnel, fresh))

        return self._stage.settle(seen)

    def wait_effect(self, *, through_mesh: bool) -> None:
        """Until a new request takes the way that the label says; held connections go on the way they took."""

        def seen() -> bool:
            text = "/which-way"
            self._tap.hear()
            answer = self._stage.get("client", text, "4")
            return answer.startswith("200") and through_mesh != any(text.encode() in segment.payload for segment in self._tap.hear())

        if not self._stage.settle(seen):
            self._stage.report.step("the label has no effect on new requests")


def _is_tunnel(segment: Segment) -> bool:
    return INBOUND_HBONE in (segment.source.port, segment.destination.port)


def _describe(segments: list[Segment]) -> str:
    ways = dict.fromkeys(f"{segment.source.ip} -> {segment.destination}" for segment in segments)
    return ", ".join(list(ways)[:4]) or "nothing is heard"
