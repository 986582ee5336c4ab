"""The container: wired into functions and methods, and overridden."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

import pytest
from dependency_injector.wiring import Provide, inject

from ledger.container import Container
from ledger.errors import UnknownAccount
from ledger.models import Account, Transfer
from ledger.repositories import AccountRepository
from ledger.services import AccountService, TransferService
from ledger.settings import LedgerSettings
from sessionwire import DatabaseSettings

# Wiring does not depend on the database.
pytestmark = pytest.mark.parametrize("sessionwire_settings", ["sqlite"], indirect=True)


@inject
async def pay(
    source: int, target: int, transfers: TransferService = Provide[Container.transfers]
) -> Transfer:
    return await transfers.transfer(source, target, Decimal("10.00"), "paid")


class Teller:
    @inject
    def __init__(self, accounts: AccountService = Provide[Container.accounts]) -> None:
        self.accounts = accounts

    @inject
    async def pay(
        self, source: int, target: int, transfers: TransferService = Provide[Container.transfers]
    ) -> Transfer:
        return await transfers.transfer(source, target, Decimal("10.00"), "paid by the teller")

    async def balance(self, account: int) -> Decimal:
        return await self.accounts.balance(account)


@pytest.fixture
def wired(container: Container) -> Iterator[Container]:
    container.wire(modules=[__name__])
    yield container
    container.unwire()


@pytest.mark.usefixtures("wired")
async def test_a_wired_function_gets_its_service(alice: Account, bob: Account) -> None:
    transfer = await pay(alice.id, bob.id)

    assert transfer.key == "paid"


@pytest.mark.usefixtures("wired")
async def test_a_wired_constructor_and_a_wired_method_get_their_services(
    alice: Account, bob: Account
) -> None:
    teller = Teller()

    await teller.pay(alice.id, bob.id)

    assert await teller.balance(bob.id) == Decimal("110.00")


def test_the_container_builds_services_before_the_database_is_open_and_anew_for_every_caller(
    sessionwire_settings: DatabaseSettings,
) -> None:
    container = Container(settings=LedgerSettings(database=sessionwire_settings))

    assert isinstance(container.accounts(), AccountService)
    assert isinstance(container.transfers(), TransferService)
    assert container.transfers() is not container.transfers()


class NobodyHere(AccountRepository):
    async def find(self, account_id: int) -> Account | None:
        return None

    async def lock(self, *account_ids: int) -> dict[int, Account]:
        return {}


async def test_a_repository_can_be_overridden_and_restored(
    wired: Container, alice: Account, bob: Account
) -> None:
    with wired.account_repository.override(NobodyHere(wired.db.session())):
        with pytest.raises(UnknownAccount):
            await pay(alice.id, bob.id)
        with pytest.raises(UnknownAccount):
            await Teller().balance(alice.id)

    await pay(alice.id, bob.id)
    assert await Teller().balance(alice.id) == Decimal("90.00")
