"""Whatever the command line or the file holds: a checked Config, or a typed error; never a traceback."""

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visattn.train.arguments import parse
from visattn.train.checks import check
from visattn.train.config import Config, recipe
from visattn.train.errors import TrainError
from visattn.train.recipes import read_yaml

NAMES = sorted(recipe(Config()))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1e-320, 1e308, 10**30, 10**400, float("nan"), float("inf"), -float("inf")]),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.sampled_from(["auto", "none", "1e-3", "../x", "é", "\\"]))
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=4
)
KEYS = st.sampled_from(NAMES) | st.sampled_from(NAMES).map(lambda name: name.replace("_", "-")) | TEXT
WORDS = TEXT | NUMBERS.map(str) | st.sampled_from(["None", "True", "--", "-", "[]", "1e-3", "=", "a=1", "-h"])
FLAGS = st.sampled_from([f"--{name.replace('_', '-')}" for name in (*NAMES, "config", "resume")])
OPTIONS = st.tuples(FLAGS | FLAGS.map(lambda flag: f"--no-{flag[2:]}") | TEXT, st.lists(WORDS, max_size=2))
RUNS = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(action, *args):
    """What `action` returns, or how it ends the trainer."""
    try:
        return action(*args)
    except (TrainError, SystemExit) as error:
        return error


def assert_said_or_checked(result):
    if isinstance(result, TrainError):
        assert result.exit_code == 2
        assert "expected " in str(result)
        assert "; try " in str(result)
    elif isinstance(result, SystemExit):  # tyro's own, with the usage, or the help
        assert result.code in (0, 2)
    else:
        check(result)
    return isinstance(result, Config)


@RUNS
@given(values=st.dictionaries(KEYS, VALUES, max_size=4))
def test_files_of_options(tmp_path, values):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    result = outcome(parse, ["--config", str(path)])
    if assert_said_or_checked(result):
        assert all(key in NAMES for key in values)
        path.write_text(yaml.safe_dump(recipe(result)))
        assert recipe(read_yaml(path)) == recipe(result)  # no NaN has come through


@RUNS
@given(
    content=TEXT.map(str.encode)
    | st.binary(max_size=30)
    | st.sampled_from([b"a: &a [*a]", b"? [a]\n: b", b"%", b"a: !!int x"])
)
def test_files_of_anything(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    result = outcome(read_yaml, path)
    assert_said_or_checked(result)
    assert result == Config() or not isinstance(result, Config)  # no option has such a name


@RUNS
@given(options=st.lists(OPTIONS, max_size=3))
def test_command_lines(options):
    assert_said_or_checked(outcome(parse, [word for flag, words in options for word in (flag, *words)]))
