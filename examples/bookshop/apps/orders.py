"""Takes orders."""

import itertools
import socket

import store

NUMBERS = itertools.count()


def order() -> str:
    key = f"order-{socket.gethostname()}-{next(NUMBERS) % 1000}"
    store.ask(f"PUT {key} taken")
    return key


store.serve(8080, {"/order": order, "/healthz": lambda: "fine"})
