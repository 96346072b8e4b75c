"""The runner of timm's own tests: what it selects, and that it never ends green without having tested anything."""

import importlib.metadata
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).resolve().parents[2]

import run_timm_tests  # noqa: E402
import timm_suite_plugin  # noqa: E402

VERSION = importlib.metadata.version("timm")
CACHE = ROOT / ".cache" / f"timm-{VERSION}"

# The shape of timm's test file: a generic test, a generic test by module, a hand-listed one, one that needs weights.
STAND_IN = """
import pytest
from timm import list_models, list_pretrained

@pytest.mark.cfg
@pytest.mark.parametrize("model_name", list_models(exclude_filters=["*_5b_*"], include_tags=True))
def test_generic(model_name):
    assert not model_name.startswith("test_convnext2")

@pytest.mark.features
@pytest.mark.parametrize("model_name", list_models(module=["resnet"]))
def test_by_module(model_name):
    pytest.skip("counted")

@pytest.mark.parametrize("model_name", ["resnet18"])
def test_hand_listed(model_name):
    assert False

@pytest.mark.parametrize("model_name", list_models(pretrained=True) + list_pretrained("test_*"))
def test_weights(model_name):
    assert False
"""


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["cfg", "features"]\n')
    tests = tmp_path / "timm_stand_in"
    tests.mkdir()
    (tests / "test_models.py").write_text(STAND_IN)
    return tests


def run_main(monkeypatch, capfd, tests, *argv):
    """Run the tool on the stand-in, with pytest in this process: a second interpreter costs seconds."""

    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, pytest.main([*command[3:], "--import-mode=importlib"]))

    sys.modules.pop("timm_stand_in.test_models", None)  # of an earlier run
    monkeypatch.setattr(timm, "list_models", timm.list_models)  # the plugin replaces them: put them back afterwards
    monkeypatch.setattr(timm, "list_pretrained", timm.list_pretrained)
    monkeypatch.setattr(run_timm_tests.subprocess, "run", run)
    monkeypatch.setattr(run_timm_tests, "fetch_sdist", lambda version, cache: None)
    monkeypatch.setattr(run_timm_tests, "extract_tests", lambda archive, version, cache: tests)
    status = run_timm_tests.main(["--import", "timm.models.convnext", *argv])
    return status, "".join(capfd.readouterr())


def test_package_models_follows_the_defining_module():
    names = timm_suite_plugin.package_models("timm.models.convnext")
    assert "test_convnext" in names
    assert "resnet18" not in names
    assert timm_suite_plugin.package_models("timm.models.conv") == []  # a prefix of a name is not a package


def test_select_models_keeps_order_and_refuses_what_matches_nothing():
    names = ["a_tiny", "a_small", "test_a"]
    assert timm_suite_plugin.select_models(names, ["test_*", "a_t*", "*tiny"]) == ["a_tiny", "test_a"]
    with pytest.raises(timm_suite_plugin.SelectionError, match=r"got 'a_tyni'; try a_tiny"):
        timm_suite_plugin.select_models(names, ["test_a", "a_tyni"])


def test_list_models_is_restricted_to_the_chosen_models():
    list_models = timm_suite_plugin.restrict_list_models(timm.list_models, {"test_convnext"}, {"convnext"})
    assert list_models() == ["test_convnext"]
    assert list_models(module=["resnet", "vision_transformer"]) == ["test_convnext"]
    assert list_models(include_tags=True) == ["test_convnext.r160_in1k"]
    assert list_models(exclude_filters=["test_*"]) == []
    assert list_models(pretrained=True) == []


def test_models_without_a_pooled_map_count_as_the_vision_transformers():
    list_models = timm_suite_plugin.restrict_list_models(timm.list_models, {"mixer_b16_224", "resnet18"}, set())
    assert list_models() == ["mixer_b16_224", "resnet18"]
    assert list_models(exclude_filters=["vit_*"]) == ["resnet18"]
    assert {name.partition(".")[0] for name in list_models(["vit_*"], include_tags=True)} == {"mixer_b16_224"}


def test_only_chosen_models_run_and_are_summed_up(monkeypatch, capfd, stand_in):
    status, output = run_main(monkeypatch, capfd, stand_in, "--models", "test_convnext", "test_convnext2")
    assert status == 1
    table = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith("test_convnext")}
    assert table == {"test_convnext": ["1", "0", "1"], "test_convnext2": ["0", "1", "1"]}
    assert "resnet18" not in output


def test_zero_selected_tests_are_an_error(monkeypatch, capfd, stand_in):
    status, output = run_main(monkeypatch, capfd, stand_in, "--models", "test_convnext", "--tests", "fxforward")
    assert status == run_timm_tests.NO_TESTS_COLLECTED
    assert "expected at least one test, got none selected" in output


def test_a_chosen_model_that_the_suite_skips_is_an_error(monkeypatch, capfd, stand_in):
    text = stand_in.joinpath("test_models.py").read_text().replace("*_5b_*", "*convnext2")
    text = text.replace('list_models(module=["resnet"])', "[]")
    stand_in.joinpath("test_models.py").write_text(text)
    status, output = run_main(monkeypatch, capfd, stand_in, "--models", "test_convnext", "test_convnext2")
    assert status == 4
    assert "got no test for test_convnext2" in output


def test_options_name_the_pytest_call():
    args = run_timm_tests.parse_args(["--ci", "--tests", "cfg,features", "--", "-x", "--models"])
    assert (args.models, args.cfg_models, args.pytest_args) == (["test_*"], ["*"], ["-x", "--models"])
    command = run_timm_tests.pytest_command(Path("/suite/tests"), args)
    assert command[command.index("-m", 3) + 1] == "(cfg or features) and not torchscript"
    assert command[-2:] == ["-x", "--models"]
    assert run_timm_tests.parse_args(["--all"]).models == ["*"]
    with pytest.raises(SystemExit):
        run_timm_tests.parse_args(["--tests", "cgf"])


def test_pip_failure_is_a_typed_error(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="notice\nERROR: no network\n")
    monkeypatch.setattr(run_timm_tests.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(run_timm_tests.SuiteError, match=r"got: ERROR: no network; try"):
        run_timm_tests.fetch_sdist("9.9.9", tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "timm-9.9.9.tar.gz").touch()  # what is cached needs no pip
    assert run_timm_tests.fetch_sdist("9.9.9", tmp_path) == tmp_path / "timm-9.9.9.tar.gz"


def write_archive(path, version, members, links=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"timm-9.9.9/PKG-INFO": f"Version: {version}\n", **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def test_extraction_takes_plain_test_files_and_repairs_edits(tmp_path):
    members = {
        "timm-9.9.9/tests/test_models.py": "published",
        "timm-9.9.9/tests/../../escape.py": "x",
        "/tmp/absolute.py": "x",
        "timm-9.9.9/timm/__init__.py": "x",
    }
    links = [("timm-9.9.9/tests/link.py", "/etc/hostname")]
    archive = write_archive(tmp_path / "a.tar.gz", "9.9.9", members, links)
    cache = tmp_path / "outer" / "cache"
    tests = run_timm_tests.extract_tests(archive, "9.9.9", cache)
    tests.joinpath("test_models.py").write_text("edited")
    tests = run_timm_tests.extract_tests(archive, "9.9.9", cache)
    assert tests.joinpath("test_models.py").read_text() == "published"
    assert [path.relative_to(tmp_path / "outer").as_posix() for path in tmp_path.joinpath("outer").rglob("*.*")] == [
        "cache/tests/test_models.py"
    ]


def test_an_archive_of_another_version_or_no_archive_is_refused(tmp_path):
    archive = write_archive(tmp_path / "a.tar.gz", "9.9.8", {"timm-9.9.9/tests/test_models.py": ""})
    with pytest.raises(run_timm_tests.SuiteError, match=r"expected timm 9\.9\.9 in .*, got 9\.9\.8"):
        run_timm_tests.extract_tests(archive, "9.9.9", tmp_path)
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(run_timm_tests.SuiteError, match="expected a readable archive"):
        run_timm_tests.extract_tests(archive, "9.9.9", tmp_path)


@pytest.mark.skipif(not (CACHE / f"timm-{VERSION}.tar.gz").is_file(), reason="timm's sdist is not in the cache")
def test_timms_own_suite_runs_on_the_chosen_model(capfd):
    argv = ["--import", "timm.models.convnext", "--models", "test_convnext", "--", "-k", "default_cfgs or getter", "-q"]
    assert run_timm_tests.main(argv) == 0
    output = capfd.readouterr().out
    assert [line.split()[1:] for line in output.splitlines() if line.startswith("test_convnext ")] == [["1", "0", "0"]]
