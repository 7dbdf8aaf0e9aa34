"""A backup that does something of its own while it is restored."""

from pathlib import Path

from sqlalchemy import text

from storage.backup import back_up
from storage.database import Database

_FUNCTION = "CREATE OR REPLACE FUNCTION pho.f() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN {} $$"


def program(ran: Path) -> str:
    """What makes a file by a program, if whoever restores may run programs."""
    return f"COPY pho.evil FROM PROGRAM 'touch {ran}'"


def write_hostile_dump(database: Database, dump: Path, does: str) -> None:
    """Back up a database with a table whose check does something."""
    with database.transaction() as connection:
        for statement in (
            _FUNCTION.format("RETURN true; END"),
            "CREATE TABLE pho.evil (a text CHECK (pho.f()))",
            "INSERT INTO pho.evil VALUES ('a')",
            _FUNCTION.format(f"{does}; RETURN true; END"),
        ):
            connection.execute(text(statement))
    back_up(database, dump)
