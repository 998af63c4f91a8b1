"""A store whose server speaks first, as MySQL's and SMTP's do: a greeting, then a line for each line: PUT KEY VALUE, GET KEY, COUNT."""

import asyncio
import socket
import sys

ROWS: dict[str, str] = {}


def answer(line: str) -> str:
    match line.split(" ", 2):
        case ["PUT", key, value]:
            ROWS[key] = value
            return "OK"
        case ["GET", key]:
            return ROWS.get(key, "NONE")
        case ["COUNT"]:
            return str(len(ROWS))
    return "WHAT?"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        writer.write(f"READY {socket.gethostname()}\n".encode())
        while line := await reader.readline():
            writer.write(f"{answer(line.decode().strip())}\n".encode())
            await writer.drain()
    except OSError:
        pass  # the client broke off, which is its right
    finally:
        writer.close()


async def main(port: int) -> None:
    async with await asyncio.start_server(serve, ["0.0.0.0", "::"], port, backlog=256) as server:
        await server.serve_forever()


asyncio.run(main(int(sys.argv[1])))
