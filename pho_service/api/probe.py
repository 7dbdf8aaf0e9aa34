"""
Whether the database answers, asked beside all other requests.
"""

import asyncio
import threading
from concurrent.futures import Future

from storage.database import Database
from storage.studies import DatabaseGone

ANSWER_S = 0.8  # for who asks whether all is well, and takes a second for a no


class Probe:
    """
    Asks a database in a thread of its own, on a connection of its own, one question at a time.

    However many requests wait for the threads and connections of the others, and however long a
    server that is frozen does not answer, who asks gets to know within a second.

    Args:
        database: Whose server is asked.
    """

    def __init__(self, database: Database) -> None:
        url = database.url.render_as_string(hide_password=False)
        self._database = Database(url, pool=1)
        self._asked: Future[None] | None = None

    async def check(self) -> None:
        """
        Raises:
            DatabaseGone: The server does not answer.
        """
        if self._asked is None or self._asked.done():
            self._asked = Future()
            # A daemon: the process need not wait for a server that is frozen.
            threading.Thread(target=self._ask, args=(self._asked,), daemon=True).start()
        asked = asyncio.wrap_future(self._asked)
        try:
            await asyncio.wait_for(asyncio.shield(asked), ANSWER_S)
        except TimeoutError:
            asked.add_done_callback(lambda done: done.cancelled() or done.exception())  # heard
            raise DatabaseGone(f"the database has not answered for {ANSWER_S:g} s") from None

    def close(self) -> None:
        """Close the connection."""
        self._database.close()

    def _ask(self, asked: "Future[None]") -> None:
        try:
            self._database.check()
        except BaseException as error:
            asked.set_exception(error)
        else:
            asked.set_result(None)
