"""Pytest plugin that points timm's own model tests at the models of another package.

timm's `tests/test_models.py` asks `timm.list_models` at import which models to test. This plugin imports the package
first, so that its models are registered, and narrows what `list_models` answers to the chosen ones. The test files
stay as timm published them. Tests that name timm's models by hand or need pretrained weights are left out.

`scripts/run_timm_tests.py` is the command that uses it.
"""

from __future__ import annotations

import collections
import difflib
import fnmatch
import functools
import importlib
import re

import pytest
import timm

_OUTCOMES = ("passed", "failed", "skipped")


class SelectionError(ValueError):
    """A request that selects nothing, so that a run would be green without testing anything."""


def package_models(package: str) -> list[str]:
    """Names of the models whose entry point is defined in `package` or below it, in timm's order."""

    def owned(name: str) -> bool:
        module = timm.model_entrypoint(name).__module__
        return module == package or module.startswith(package + ".")

    return [name for name in timm.list_models() if owned(name)]


def select_models(names: list[str], patterns: list[str]) -> list[str]:
    """The names that match any of the wildcard patterns; each pattern has to match at least one name."""
    chosen = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"try {', '.join(close)}" if close else f"try one of the {len(names)} names listed by --list"
            raise SelectionError(f"expected a pattern that matches a registered model, got {pattern!r}; {hint}")
        chosen.update(matches)
    return [name for name in names if name in chosen]


def restrict_list_models(list_models, chosen: set[str], modules: set[str]):
    """Wrap `timm.list_models` so that it answers with models from `chosen` only.

    Args:
        list_models: timm's function.
        chosen: Model names without tags.
        modules: Registry modules of `chosen`. A `module=` filter names timm's modules that support a feature; the
            chosen models are held to the same contract, so their modules pass it.
    """

    @functools.wraps(list_models)
    def wrapper(filter="", module="", pretrained=False, **kwargs):
        if pretrained:  # these tests download weights
            return []
        if module:
            module = [*([module] if isinstance(module, str) else module), *sorted(modules)]
        names = list_models(filter, module, pretrained=False, **kwargs)
        # timm's tests single out models that pool no map by patterns such as "vit_*"; ours have other names
        tokens = {name for name in chosen if timm.get_pretrained_cfg(name).pool_size is None}
        if "vit_*" in kwargs.get("exclude_filters", ()):
            names = [name for name in names if base_name(name) not in tokens]
        elif "vit_*" in filter:
            tags = kwargs.get("include_tags")
            names = sorted({*names, *(n for n in list_models(include_tags=tags) if base_name(n) in tokens)})
        return [name for name in names if base_name(name) in chosen]

    return wrapper


def base_name(name: str) -> str:
    """The architecture name of `architecture.tag`."""
    return name.partition(".")[0]


def item_model(item: pytest.Item) -> str | None:
    """The architecture a collected test is parametrised with, or None."""
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("model_name") if callspec is not None else None
    return base_name(name) if isinstance(name, str) else None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("timm suite", "run timm's model tests on another package")
    group.addoption("--suite-import", metavar="PKG", default="visattn", help="package that registers the models")
    group.addoption("--suite-models", metavar="PATTERN", action="append", default=[], help="run every generic test")
    group.addoption("--suite-cfg-models", metavar="PATTERN", action="append", default=[], help="run the cfg tests only")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):  # timm's limits would be ignored without a word
        raise pytest.UsageError("expected the plugin pytest-timeout, got none; try pip install pytest-timeout")
    package = config.getoption("--suite-import")
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise pytest.UsageError(
            f"expected an importable package, got {package!r} ({error}); try pip install -e ."
        ) from error
    names = package_models(package)
    if not names:
        raise pytest.UsageError(f"expected {package!r} to register models with timm, got none; try another --import")
    try:
        full = select_models(names, config.getoption("--suite-models"))
        cfg_only = select_models(names, config.getoption("--suite-cfg-models"))
    except SelectionError as error:
        raise pytest.UsageError(str(error)) from error
    if not full and not cfg_only:
        raise pytest.UsageError("expected at least one model, got none; try --models 'test_*'")

    chosen = {*full, *cfg_only}
    modules = {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in chosen}
    # test_models.py does `from timm import list_models`: the name has to be replaced before that line runs.
    timm.list_models = restrict_list_models(timm.list_models, chosen, modules)
    timm.list_pretrained = lambda *args, **kwargs: []
    config.pluginmanager.register(Suite(set(full), set(cfg_only)), "timm-suite")


class Suite:
    """Keeps the chosen (model, test) pairs of one session and counts their outcomes per model."""

    def __init__(self, full: set[str], cfg_only: set[str]):
        self.full = full
        self.cfg_only = cfg_only - full
        self.outcomes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)

    def wants(self, item: pytest.Item) -> bool:
        model = item_model(item)
        if model in self.full:
            return True
        return model in self.cfg_only and item.get_closest_marker("cfg") is not None

    @pytest.hookimpl(tryfirst=True)  # before -k and -m, which may leave a model out on purpose
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not items:  # a file that failed to import reports itself
            return
        kept, dropped = [], []
        for item in items:
            (kept if self.wants(item) else dropped).append(item)
        missing = (self.full | self.cfg_only) - {item_model(item) for item in kept}
        if missing and not any("::" in arg for arg in config.args):
            raise pytest.UsageError(
                f"expected timm's suite to test every chosen model, got no test for {', '.join(sorted(missing))}; "
                "try a name that timm's own exclude filters do not match"
            )
        for item in kept:
            # user_properties travel with the report, also from the worker processes of pytest-xdist
            item.user_properties.append(("suite_model", item_model(item)))
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        model = dict(report.user_properties).get("suite_model")
        # one test gives up to three reports: count the call, and set-up or tear-down only when they decide the outcome
        if model is not None and (report.when == "call" or report.outcome != "passed"):
            self.outcomes[model][report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not self.outcomes:
            return
        terminalreporter.section("timm's suite, per model")
        width = max(len("model"), *map(len, self.outcomes))
        terminalreporter.write_line(f"{'model':{width}}" + "".join(f"{name:>9}" for name in _OUTCOMES))
        for model in sorted(self.outcomes, key=_natural):
            counts = self.outcomes[model]
            row = f"{model:{width}}" + "".join(f"{counts[name]:>9}" for name in _OUTCOMES)
            terminalreporter.write_line(row, red=bool(counts["failed"]), green=not counts["failed"])


def _natural(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
