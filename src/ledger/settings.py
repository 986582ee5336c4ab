"""What the ledger reads at its start: a YAML file, under environment variables such as LEDGER_DATABASE__URL."""

from pydantic_settings import SettingsConfigDict

from sessionwire import Settings


class LedgerSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="LEDGER_")
