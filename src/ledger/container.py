"""The container: the one place that connects the classes of the ledger."""

from dependency_injector import containers, providers

from sessionwire import DatabaseContainer

from .repositories import AccountRepository, TransferRepository
from .services import AccountService, TransferService
from .settings import LedgerSettings


class Container(containers.DeclarativeContainer):
    """Build the services `accounts` and `transfers`.

    `Container(settings=…)` uses settings that are already loaded.
    """

    settings = providers.ThreadSafeSingleton(LedgerSettings.load)
    db = DatabaseContainer.nested(
        settings=settings.provided.database, migrations="ledger:migrations"
    )

    account_repository = providers.Factory(AccountRepository, session=db.session)
    transfer_repository = providers.Factory(TransferRepository, session=db.session)

    accounts = providers.Factory(
        AccountService,
        accounts=account_repository,
        transfers=transfer_repository,
        transaction=db.transaction,
    )
    transfers = providers.Factory(
        TransferService,
        accounts=account_repository,
        transfers=transfer_repository,
        transaction=db.transaction,
    )
