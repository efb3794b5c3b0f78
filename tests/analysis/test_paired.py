"""The paired comparison, with programs that print what they are told."""

import json
import shlex
import sys

import pytest

from gptjax.analysis.paired import compare, tokens_per_second
from gptjax.errors import RunError


def printing(text):
    return [sys.executable, "-c", f"print('starting'); print({text!r})"]


def counting(path, numbers):
    """A command that prints the next of `numbers` at each call, counting calls in a file."""
    code = (
        f"import json, pathlib; p = pathlib.Path({str(path)!r}); n = int(p.read_text()) if p.exists() else 0; "
        f"p.write_text(str(n + 1)); print(json.dumps(dict(tokens_per_second={numbers}[n])))"
    )
    return [sys.executable, "-c", code]


def test_medians_and_the_ratio_of_pairs(tmp_path):
    lines = []
    ours = counting(tmp_path / "ours", [110, 180, 20])
    theirs = counting(tmp_path / "theirs", [100, 200, 10])
    result = compare(ours, shlex.join(theirs), pairs=3, report=lines.append)
    assert result["runs"] == {"ours": [110, 180, 20], "theirs": [100, 200, 10]}
    assert (result["ours"], result["theirs"]) == (110, 100)
    assert result["ratio"] == pytest.approx(1.1)
    assert len(lines) == 4
    assert lines[-1].endswith("ratio 1.100")


def test_the_order_alternates(tmp_path):
    log = tmp_path / "log"

    def command(name):
        code = f"open({str(log)!r}, 'a').write({name!r}); import json; print(json.dumps(dict(tokens_per_second=1)))"
        return [sys.executable, "-c", code]

    compare(command("a"), shlex.join(command("b")), pairs=3, report=lambda _: None)
    assert log.read_text() == "abbaab"


@pytest.mark.parametrize("text", ["", "fast", "[1]", '{"speed": 3}', '{"tokens_per_second": null}'])
def test_a_last_line_without_the_number_is_an_error(text):
    with pytest.raises(RunError, match="must be a JSON object with tokens_per_second"):
        tokens_per_second(printing(text))


def test_a_failing_command_is_named_with_its_reason():
    with pytest.raises(RunError, match="ended with status 3: no such luck"):
        tokens_per_second([sys.executable, "-c", "import sys; print('no such luck', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(RunError, match="cannot be run"):
        tokens_per_second(["/nowhere/program"])


def test_the_last_line_counts():
    assert tokens_per_second(printing(json.dumps({"tokens_per_second": 12.5, "peer": "x"}))) == 12.5
