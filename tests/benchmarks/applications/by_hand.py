"""Without a library: a session from the factory, and the graph spelt out."""

from fastapi import FastAPI

from .parts import Accounts, Answer, Books, Desk, Limits, Rates, new_sessions

sessions = new_sessions()
app = FastAPI()


@app.get("/accounts/{number}")
async def read(number: int) -> Answer:
    async with sessions() as session:
        return await Desk(Books(Rates(Limits(Accounts(session))))).answer(number)
