"""The hash of code follows imports and meaning, not spelling."""

import shutil
import sys
from pathlib import Path

import pytest

import dmir
from dmir import provenance
from dmir.provenance import code_hash, imported_modules


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that a test may change."""
    copy = tmp_path / "dmir"
    shutil.copytree(Path(dmir.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ROOT", copy)
    forget()
    yield copy
    forget()


def forget():
    for name in ("code_hash", "source_of", "_imports", "_read"):
        getattr(provenance, name).cache_clear()


def changed_hash(path, text, *modules):
    path.write_text(path.read_text() + text)
    forget()
    return code_hash(*modules)


def test_imports_are_followed_through_functions_and_packages():
    found = imported_modules("dmir.preprocess.files")
    assert {"dmir", "dmir.preprocess", "dmir.preprocess.affine", "dmir.volumes", "dmir.fields", "dmir.errors"} <= found
    assert not any(name.startswith(("dmir.report", "dmir.networks", "dmir.config")) for name in found)


def test_one_network_does_not_depend_on_another():
    assert "dmir.networks.voxelmorph" not in imported_modules("dmir.training.loop", "dmir.networks.caml")
    assert "dmir.networks.caml" not in imported_modules("dmir.training.loop", "dmir.networks.voxelmorph")


def test_a_change_counts_where_it_is_imported_and_nowhere_else(package):
    affine, report = code_hash("dmir.preprocess.files"), code_hash("dmir.report.tables")
    after = changed_hash(package / "preprocess" / "affine.py", "\nNEW = 1\n", "dmir.preprocess.files")
    assert after != affine
    assert code_hash("dmir.report.tables") == report


def test_comments_and_docstrings_do_not_count(package):
    before = code_hash("dmir.fields")
    path = package / "fields" / "__init__.py"
    path.write_text(path.read_text().replace('"""The displacement field', '"""Of the displacement field'))
    assert changed_hash(path, "\n# a remark\n", "dmir.fields") == before
    assert changed_hash(path, "\nX = 0\n", "dmir.fields") != before


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"dmir\.nothing"):
        code_hash("dmir.nothing")


def test_parsing_a_workflow_needs_no_torch():
    """Everything that the Snakefile imports, loads none of the heavy libraries."""
    import subprocess

    code = (
        "import sys; import dmir.config, dmir.cohorts, dmir.provenance, dmir.structures;"
        "print([m for m in ('torch', 'ants', 'itk', 'SimpleITK', 'lightning', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
