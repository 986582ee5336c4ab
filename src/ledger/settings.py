"""Settings: a YAML file, overridden by variables such as LEDGER_DATABASE__URL."""

from pydantic_settings import SettingsConfigDict

from sessionwire import Settings


class LedgerSettings(Settings):
    """The settings of the ledger."""

    model_config = SettingsConfigDict(env_prefix="LEDGER_")
