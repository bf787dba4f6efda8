"""A wire between a client and Postgres that can be cut at the worst moment: around a COMMIT."""

import select
import shutil
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

Cut = Literal["before", "after"]


class CuttingProxy:
    """Forwards connections to a Postgres URL. `cut_next` loses the next COMMIT, or the answer to it."""

    def __init__(self, url: str) -> None:
        self._upstream, self._target = url.partition("?host=")[0], url.partition("?host=")[2]
        self._folder = Path(tempfile.mkdtemp(prefix="tinsmith-cut-"))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._folder / ".s.PGSQL.5432"))
        self._listener.listen()
        self._cut: Cut | None = None
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self._upstream}?host={quote(str(self._folder))}"

    def cut_next(self, when: Cut) -> None:
        self._cut = when

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        shutil.rmtree(self._folder)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with suppress(ConnectionError), client, socket.socket(socket.AF_UNIX) as server:
            server.connect(f"{self._target}/.s.PGSQL.5432")
            ends = {end.fileno(): end for end in (client, server)}
            poll = select.poll()  # unlike select, it takes files of any number
            for end in ends:
                poll.register(end, select.POLLIN)
            while True:
                ready = ends[poll.poll()[0][0]]
                data = ready.recv(65536)
                if not data:
                    return
                if ready is server:
                    client.sendall(data)
                elif self._cut is not None and b"COMMIT" in data:
                    self.cuts += 1
                    when, self._cut = self._cut, None
                    if when == "after":
                        server.sendall(data)
                        server.recv(65536)
                    return
                else:
                    server.sendall(data)
