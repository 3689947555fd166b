"""Hostile requests to the endpoint, without a network."""

import asyncio
import base64
import io
from pathlib import Path

import httpx
from hostile.invariant import Case, strict_json
from hostile.kinds import World, picture
from hostile.mutations import dice_of, mutate_text, mutate_value, written

from tove_llava.inference.engine import Engine
from tove_llava.serve.openai_api import Endpoint


def good_request() -> dict:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    more = {"temperature": 0, "top_p": 1, "max_tokens": 2, "stop": ["\n\n"], "seed": 1, "n": 1, "user": "someone"}
    return {"model": "model", "messages": turns, "stream": False, **more}


def post(engine: Engine, body: bytes) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Endpoint(engine).app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})

    return asyncio.run(send())


def requests(seed: int, folder: Path, world: World) -> Case:
    """Status 200 counts as exit code 0, and a client's fault as 2."""
    dice, value = dice_of("requests", seed), good_request()
    value["model"] = Endpoint(world.engine).model
    passes = dice.random() < 0.15
    if not passes:
        for _ in range(dice.choice([0, 1, 1, 2])):
            value = mutate_value(dice, value)
    body = written(dice, value)
    if not passes and dice.random() < 0.3:
        body = mutate_text(dice, body)
    (folder / "body.json").write_bytes(body)

    def call() -> int:
        answer = post(world.engine, body)
        print(answer.text)
        return 0 if answer.status_code == 200 else 2 if 400 <= answer.status_code < 500 else 1

    def right(out: str) -> None:
        if out.startswith("data: "):  # stream: true
            assert "[DONE]" in out
            return
        answer = strict_json(out)
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)
        assert choice["finish_reason"] in ("stop", "length")
        assert 0 <= answer["usage"]["completion_tokens"] <= 600

    return Case(call, ('{"error":{"message":', '{"error": {"message":'), right, folder, f"requests {seed}", passes)
