"""A backup that runs a program when somebody with the rights for it restores it."""

from pathlib import Path

from sqlalchemy import text

from storage.backup import back_up
from storage.database import Database

_FUNCTION = "CREATE OR REPLACE FUNCTION pho.f() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN {} $$"


def write_hostile_dump(database: Database, dump: Path, ran: Path) -> None:
    """Back up a database with a table whose check makes the file ``ran`` by a program."""
    with database.transaction() as connection:
        for statement in (
            _FUNCTION.format("RETURN true; END"),
            "CREATE TABLE pho.evil (a text CHECK (pho.f()))",
            "INSERT INTO pho.evil VALUES ('a')",
            _FUNCTION.format(f"COPY pho.evil FROM PROGRAM 'touch {ran}'; RETURN true; END"),
        ):
            connection.execute(text(statement))
    back_up(database, dump)
