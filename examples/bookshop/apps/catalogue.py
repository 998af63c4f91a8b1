"""Which books there are."""

import store


def books() -> list[str]:
    (count,) = store.ask("COUNT")
    return store.ask(*(f"GET book-{number}" for number in range(min(int(count), 5))))


store.serve(8080, {"/books": books, "/healthz": lambda: "fine"})
