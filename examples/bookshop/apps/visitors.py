"""Visitors who come all the time and remember everything that went wrong: /report says how many there were, and who was turned away."""

import threading
import time

import store

RATE = 5.0
SEEN = 0
FAILED: list[dict[str, object]] = []


def visit() -> None:
    global SEEN
    began = time.time()
    try:
        page = store.fetch("http://frontend:8080/")
        if not (isinstance(page, dict) and len(page["books"]) == 5 and page["order"]):
            raise ValueError(f"a strange page: {page!r}")
        SEEN += 1
    except (OSError, ValueError, KeyError) as exc:
        FAILED.append({"at": began, "after": round(time.time() - began, 3), "because": f"{type(exc).__name__}: {exc}"})


def come() -> None:
    due = time.monotonic()
    while True:
        threading.Thread(target=visit, daemon=True).start()
        due += 1 / RATE
        time.sleep(max(0.0, due - time.monotonic()))


threading.Thread(target=come, daemon=True).start()
store.serve(8080, {"/report": lambda: {"served": SEEN, "failed": FAILED}, "/healthz": lambda: "fine"})
