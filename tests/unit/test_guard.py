"""How commands end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import typer

from hetcomp.cli.guard import guard
from hetcomp.cli.start import INTERRUPTED
from hetcomp.errors import HetcompError


def _interrupted() -> None:
    raise KeyboardInterrupt


def _interrupted_within_a_lazy_import() -> None:
    try:
        raise KeyboardInterrupt
    except BaseException as error:
        raise ModuleNotFoundError("Could not import module") from error


def _refused_for_it() -> None:
    try:
        _interrupted_within_a_lazy_import()
    except ImportError:
        raise HetcompError("The tokenizer cannot be read.") from None


@pytest.mark.parametrize("body", [_interrupted, _interrupted_within_a_lazy_import, _refused_for_it])
def test_ctrl_c_is_one_sentence_wherever_it_comes(body: Callable[[], None], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit) as ended:
        guard(body, debug=False)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == f"{INTERRUPTED}\n"


def test_refusals_are_sentences_and_other_errors_are_not_hidden(capsys: pytest.CaptureFixture[str]):
    def refused() -> None:
        raise HetcompError("No.")

    def broken() -> None:
        raise ValueError("a fault of ours")

    with pytest.raises(typer.Exit) as ended:
        guard(refused, debug=False)
    assert (ended.value.exit_code, capsys.readouterr().err) == (1, "hetcomp: No.\n")
    with pytest.raises(HetcompError):
        guard(refused, debug=True)
    with pytest.raises(ValueError, match="fault"):
        guard(broken, debug=False)
