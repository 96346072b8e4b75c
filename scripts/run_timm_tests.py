"""Run timm's own model tests, unmodified, on the models of visattn.

    python scripts/run_timm_tests.py                        # every generic test on the test_* variants
    python scripts/run_timm_tests.py --ci                   # the same, and the cfg tests on every variant and tag
    python scripts/run_timm_tests.py --models 'dinat_*' --tests cfg,features -- -x -n 2
    python scripts/run_timm_tests.py --all                  # everything on everything: hours on a CPU

The tests come from timm's source distribution of the installed version, which pip fetches once into
`.cache/timm-<version>/`; after that no network is needed. Words after `--` go to pytest.
"""

from __future__ import annotations

import argparse
import email
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(__file__).resolve().parent

# timm's marks. The prune contract has none: timm leaves it out of its CI for time; "all" includes it.
MARKS = ("forward", "backward", "cfg", "features", "fxforward", "fxbackward")
# PyTorch calls TorchScript deprecated, and the models do not promise it: tests that script them are left out, by timm's
# mark and, where a test has none, by its name.
LEFT_OUT = "torchscript"
NO_TESTS_COLLECTED = 5  # pytest's exit status


class SuiteError(RuntimeError):
    """timm's tests cannot be obtained or do not fit the installed timm."""


def fetch_sdist(version: str, cache: Path) -> Path:
    """Path of timm's source distribution of this version; pip downloads it unless the cache has it."""
    archive = cache / f"timm-{version}.tar.gz"
    if archive.is_file():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", f"timm=={version}"]
        result = subprocess.run([*command, "-d", folder], capture_output=True, text=True, check=False)
        downloaded = Path(folder, archive.name)
        if result.returncode != 0 or not downloaded.is_file():
            lines = (result.stderr or result.stdout).strip().splitlines()
            reason = lines[-1] if lines else f"pip ended with status {result.returncode}"
            raise SuiteError(
                f"expected pip to download the source distribution timm=={version}, got: {reason}; "
                f"try again with a network, or put timm-{version}.tar.gz into {cache}"
            )
        # a rename, so that an interrupted run never leaves half an archive under the final name
        os.replace(downloaded, archive)
    return archive


def extract_tests(archive: Path, version: str, cache: Path) -> Path:
    """Put the archive's tests/ and pyproject.toml (it declares their markers) into `cache`; return tests/.

    Files that are there already are compared and written again where they differ, so the tests that run are the
    published ones. Only plain files below the two paths are taken, written by us: links and paths that leave the
    folder never reach the disk.
    """
    prefix = f"timm-{version}"
    try:
        with tarfile.open(archive) as tar:
            files = {
                PurePosixPath(member.name): tar.extractfile(member).read() for member in tar if _wanted(member, prefix)
            }
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SuiteError(f"expected a readable archive, got {archive} ({error}); try deleting it") from error

    info = files.pop(PurePosixPath(prefix, "PKG-INFO"), b"")
    found = email.message_from_bytes(info)["Version"]
    if found != version:
        raise SuiteError(f"expected timm {version} in {archive}, got {found}; try deleting it")
    if PurePosixPath(prefix, "tests/test_models.py") not in files:
        raise SuiteError(f"expected tests/test_models.py in {archive}, got {len(files)} other files; try deleting it")

    for path, content in files.items():
        target = cache.joinpath(*path.parts[1:])
        if target.is_file() and target.read_bytes() == content:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.part")
        partial.write_bytes(content)
        os.replace(partial, target)
    return cache / "tests"


def _wanted(member: tarfile.TarInfo, prefix: str) -> bool:
    path = PurePosixPath(member.name)
    if not member.isfile() or ".." in path.parts or path.parts[:1] != (prefix,):
        return False
    return path.parts[1:2] == ("tests",) or path.parts[1:] in (("PKG-INFO",), ("pyproject.toml",))


def pytest_command(tests: Path, args: argparse.Namespace) -> list[str]:
    """The pytest call for the parsed options."""
    command = [sys.executable, "-m", "pytest", "-p", "timm_suite_plugin", "-p", "no:cacheprovider"]
    command += ["-c", str(tests.parent / "pyproject.toml"), "--rootdir", str(tests.parent)]
    command += ["-q", "-rf", "--disable-warnings", "--suite-import", args.package]
    for pattern in args.models:
        command += ["--suite-models", pattern]
    for pattern in args.cfg_models:
        command += ["--suite-cfg-models", pattern]
    marks = "" if args.tests == ["all"] else f"({' or '.join(args.tests)}) and "
    command += ["-m", f"{marks}not {LEFT_OUT}", "-k", f"not {LEFT_OUT}"]
    # words of the user come last: pytest lets a later -m or -q win
    return [*command, str(tests / "test_models.py"), *args.pytest_args]


def parse_marks(text: str) -> list[str]:
    """Comma-separated marks, or all."""
    marks = [mark.strip() for mark in text.split(",") if mark.strip()]
    unknown = [mark for mark in marks if mark not in (*MARKS, "all")]
    if unknown or not marks:
        raise argparse.ArgumentTypeError(f"expected all or some of {', '.join(MARKS)}, got {text!r}")
    return ["all"] if "all" in marks else marks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what follows `--` is kept for pytest."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--models", nargs="+", metavar="PATTERN", help="model name wildcards (default: test_*)")
    scope.add_argument("--ci", action="store_true", help="all tests on test_*, cfg tests on every model and tag")
    scope.add_argument("--all", action="store_true", help="all tests on every model")
    parser.add_argument(
        "--tests", type=parse_marks, default=["all"], metavar="MARK,...", help=f"all or {','.join(MARKS)}"
    )
    parser.add_argument("--import", dest="package", default="visattn", metavar="PKG", help="package with the models")
    parser.add_argument("--list", action="store_true", help="print the package's models and stop")
    args = parser.parse_args(argv[:split])
    args.pytest_args = argv[split + 1 :]
    args.models = args.models or (["*"] if args.all else ["test_*"])
    args.cfg_models = ["*"] if args.ci else []
    return args


def list_package_models(package: str) -> None:
    """Print one name a line."""
    from timm_suite_plugin import package_models

    try:
        importlib.import_module(package)
    except ImportError as error:
        raise SuiteError(f"expected an importable package, got {package!r} ({error}); try pip install -e .") from error
    print("\n".join(package_models(package)))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.list:
            list_package_models(args.package)
            return 0
        version = importlib.metadata.version("timm")
        cache = ROOT / ".cache" / f"timm-{version}"
        tests = extract_tests(fetch_sdist(version, cache), version, cache)
    except (SuiteError, importlib.metadata.PackageNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TOOLS), environment.get("PYTHONPATH")]))
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the cache holds what timm published and nothing else
    environment.pop("GITHUB_ACTIONS", None)  # it makes timm's lists shorter: the selection must not depend on the host
    status = subprocess.run(pytest_command(tests, args), env=environment, cwd=tests.parent, check=False).returncode
    if status == NO_TESTS_COLLECTED:
        print("error: expected at least one test, got none selected; try --tests all or other models", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
