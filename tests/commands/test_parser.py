"""Options that no command knows are told with the one that may have been meant."""

from __future__ import annotations

import pytest

from mavis_logits import cli

MISTAKES = [
    ("generate --prompt x --weigths helpful=1", "unknown option --weigths: did you mean '--weights'?"),
    ("generate --prompt x --kll=3", "unknown option --kll=3: did you mean '--kl'?"),
    ("generate --prompt two words", "nothing is known of words: a text with spaces goes into quotes"),
    ("chat --modle x", "unknown option --modle: did you mean '--model'?"),
    ("verify --ulr http://x", "unknown option --ulr: did you mean '--url'?"),
    ("doctor --jsn", "unknown option --jsn: did you mean '--json'?"),
    ("serve --prot 1", "unknown option --prot: did you mean '--port'?"),
    ("demo --ouut x", "unknown option --ouut: did you mean '--out'?"),
]


@pytest.mark.parametrize(("line", "told"), MISTAKES)
def test_an_unknown_option_is_told_with_the_nearest(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
