"""The files in config/: each loads, and states its purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import make_url

from ledger.settings import LedgerSettings

from .conftest import CHECKOUT

FILES = sorted((CHECKOUT / "config").glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_variable_of_the_ledger_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEDGER_DATABASE__URL", raising=False)


def test_config_has_a_file_for_each_occasion() -> None:
    assert [file.stem for file in FILES] == ["default", "postgres", "production", "test"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_file_loads(file: Path) -> None:
    assert LedgerSettings.load(file).database.url


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_file_begins_with_its_purpose_and_explains_its_url(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()

    assert lines[0].startswith("# ")
    assert lines[
        next(n for n, line in enumerate(lines) if line.startswith("  url:")) - 1
    ].startswith("  # ")


def test_the_production_config_verifies_the_server_and_holds_no_secret() -> None:
    url = make_url(LedgerSettings.load(CHECKOUT / "config" / "production.yaml").database.url)

    assert url.get_backend_name() == "postgresql"
    assert url.password is None
    assert url.query["sslmode"] == "verify-full"


def test_environment_variables_override_a_config_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER_DATABASE__URL", "postgresql://other/ledger")
    monkeypatch.setenv("LEDGER_DATABASE__POOL__SIZE", "9")

    database = LedgerSettings.load(CHECKOUT / "config" / "default.yaml").database

    assert make_url(database.url).host == "other"
    assert (database.pool.size, database.pool.max_overflow) == (9, 0)


def test_a_secrets_directory_overrides_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "ledger_database__url").write_text("postgresql://ledger:secret@other/ledger")

    settings = LedgerSettings.load(CHECKOUT / "config" / "production.yaml", secrets_dir=tmp_path)

    assert make_url(settings.database.url).password == "secret"
    assert "secret" not in repr(settings)
