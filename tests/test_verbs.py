"""How verbs end: a sentence for what the user can mend and for an interruption, a traceback for what nobody foresaw."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from visrl.config import ConfigError
from visrl.verbs import USER_ERRORS, Verbs


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("mend this"), 1, "visrl: mend this\n"),
        (PermissionError(13, "not yours", "a.txt"), 1, "visrl: [Errno 13] not yours: 'a.txt'\n"),
        (KeyboardInterrupt(), 130, "visrl: interrupted; the same command goes on where this one stopped\n"),
        (ZeroDivisionError("ours"), 1, ""),
    ],
)
def test_a_verb_ends_with_one_sentence(error: BaseException, status: int, said: str) -> None:
    app = typer.Typer(cls=Verbs)

    @app.command()
    def work() -> None:
        raise error

    @app.command()
    def rest() -> None:
        pass

    ended = CliRunner().invoke(app, ["work"])
    assert (ended.exit_code, ended.stderr) == (status, said)
    assert isinstance(ended.exception, SystemExit if said else ZeroDivisionError)


def test_every_error_for_users_is_where_it_is_looked_for() -> None:
    for module, name in USER_ERRORS.items():
        assert issubclass(getattr(pytest.importorskip(module), name), Exception)
