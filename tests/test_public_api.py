"""The public names, and that nothing else is promised."""

from __future__ import annotations

import importlib
import inspect

import pytest

import sfumato

NAMES = ["Budget", "Generator", "Ledger", "OwnerImages", "PrivImage", "ProtectedImages", "PublicImages"]


def test_the_public_names_are_these():
    assert sorted(sfumato.__all__) == sorted([*NAMES, "__version__"])
    assert set(NAMES) <= set(dir(sfumato))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_a_documented_class_from_its_own_module(name):
    value = getattr(sfumato, name)
    assert inspect.isclass(value)
    assert value.__name__ == name
    assert inspect.getdoc(value)
    assert getattr(importlib.import_module(value.__module__), name) is value


def test_the_version_is_the_installed_one():
    from importlib.metadata import version

    assert sfumato.__version__ == version("sfumato")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Privimage'"):
        _ = sfumato.Privimage
    with pytest.raises(ImportError):
        exec("from sfumato import Nothing")
