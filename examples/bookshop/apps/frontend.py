"""What visitors see: the books, and an order of one."""

import store


def page() -> dict[str, object]:
    return {"books": store.fetch("http://catalogue:8080/books"), "order": store.fetch("http://orders:8080/order")}


store.serve(8080, {"/": page, "/healthz": lambda: "fine"})
