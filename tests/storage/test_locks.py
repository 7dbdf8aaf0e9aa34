"""Taking turns by way of the database."""

import threading
import time
from contextlib import closing

import pytest
from sqlalchemy import text

from storage.database import Database, taking_turns


class Stop(Exception):
    """The test has waited for long enough."""


def stop():
    raise Stop


def end_transactions(database):
    with database.transaction() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
                "pg_backend_pid() AND datname = current_database() "
                "AND state = 'idle in transaction'"
            )
        )


def test_while_one_is_inside_nobody_else_is_but_with_another_name(database):
    waited = threading.Event()
    entered = []

    def second():
        with taking_turns(database, "bundle", waited.set):
            entered.append(2)

    with taking_turns(database, "bundle", stop):
        with taking_turns(database, "other", stop):
            entered.append("other")
        thread = threading.Thread(target=second)
        thread.start()
        assert waited.wait(30)
        entered.append(1)
    thread.join()

    assert entered == ["other", 1, 2]


def test_whoever_leaves_by_an_error_or_gives_up_waiting_holds_up_nobody(database):
    with pytest.raises(RuntimeError), taking_turns(database, "bundle", stop):
        raise RuntimeError
    with (
        taking_turns(database, "bundle", stop),
        pytest.raises(Stop),
        taking_turns(database, "bundle", stop),
    ):
        pass
    with taking_turns(database, "bundle", stop):
        pass


def test_whose_transaction_the_server_has_ended_holds_up_nobody(database):
    tries = iter(range(300))

    def end_transactions_again():  # they are busy while they ping, and end a moment later
        time.sleep(0.1)
        end_transactions(database)
        assert next(tries, None) is not None, "the lock is still held"

    with (
        taking_turns(database, "bundle", stop),
        taking_turns(database, "bundle", end_transactions_again),
    ):
        pass


def test_while_the_database_is_away_all_go_on_and_say_so(caplog):
    with (
        closing(Database("postgresql://u:p@127.0.0.1:1/x")) as gone,
        taking_turns(gone, "bundle", stop),
    ):
        pass

    assert "the database is away" in caplog.text
    assert "u:p" not in caplog.text
