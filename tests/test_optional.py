"""Tests of imports of optional packages: installed, missing or broken."""

import json
import sys
from importlib import metadata

import pytest

from deepfeat._optional import import_optional


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """Write a package that can be imported until the end of the test."""
    written = []

    def write(name, source):
        written.append(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_an_installed_package_is_imported():
    """Of a submodule, the module itself is returned, not its package."""
    assert import_optional("json", extra="plot") is json
    assert import_optional("json.decoder", extra="plot") is json.decoder


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.part.of_it"])
def test_a_missing_package_names_the_extra_that_installs_it(name):
    """The error says what to type, and is an ImportError for those who catch one."""
    expected = (
        r"^The package no_such_package is needed here, .* Install the extra `ray` of deepfeat: "
        r"`pip install 'pyarrow>=\d+' 'ray\[data\]>=[\d.]+'`\.$"
    )
    with pytest.raises(ModuleNotFoundError, match=expected) as caught:
        import_optional(name, extra="ray")
    assert caught.value.name == "no_such_package"


def test_sources_that_are_not_installed_name_the_package(monkeypatch):
    """Without metadata there are no requirements to look up."""

    def raise_not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", raise_not_found)
    with pytest.raises(ModuleNotFoundError, match=r"`pip install no_such_package`\.$"):
        import_optional("no_such_package", extra="plot")


def test_a_missing_dependency_of_a_package_is_not_explained_away(make_package):
    """Its own error is raised: installing the extra would not help."""
    make_package("broken_package", "import no_such_package")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_package'$"):
        import_optional("broken_package", extra="plot")


@pytest.mark.parametrize("source", ["raise ImportError('old libc')", "1 / 0"])
def test_other_errors_of_a_package_are_raised(make_package, source):
    """An installed package that fails to import raises its own error."""
    make_package("failing_package", source)
    with pytest.raises((ImportError, ZeroDivisionError), match=r"old libc|division by zero"):
        import_optional("failing_package", extra="plot")


def test_a_module_that_an_installed_package_lacks_is_not_called_uninstalled(make_package):
    """An old release may lack the module: "is not installed" would be wrong."""
    make_package("old_package", "")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'old_package\.new'$"):
        import_optional("old_package.new", extra="plot")
