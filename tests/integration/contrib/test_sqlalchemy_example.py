"""The example with SQLAlchemy, run as its head says, and asked over real HTTP."""

from __future__ import annotations

import asyncio

from applications import client_of_example


async def test_the_example_moves_money_once(tmp_path):
    """Transfers that are asked for at once conflict, and each is made once."""
    async with client_of_example("sqlalchemy_app.py", tmp_path / "log") as client:
        assert (await client.get("/accounts")).json() == {"Ada": 1000, "Grace": 1000}
        for _ in range(8):
            moves = [
                {"payer": "Ada", "payee": "Grace", "amount": 30},
                {"payer": "Grace", "payee": "Ada", "amount": 10},
            ] * 2
            answers = await asyncio.gather(*(client.post("/transfers", params=move) for move in moves))
            assert [answer.status_code for answer in answers] == [201] * 4
        assert (await client.get("/accounts")).json() == {"Ada": 680, "Grace": 1320}
        told = (await client.get("/transfers")).json()
        assert (told["transfers"], told["retries"] > 0) == (32, True)
        assert (
            await client.post("/transfers", params={"payer": "Ada", "payee": "Bob", "amount": 1})
        ).status_code == 409
