"""An exported folder in ``transformers serve``, against ``tove-llava chat``."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from answer_parts import picture
from train_parts import ROOT, environment, flags, free_port, write_parts, write_records

from tove_llava.checkpoints.conversion import export_model
from tove_llava.train.run import main as train

for _library in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(_library)

QUESTIONS = ("What is it?", "Describe the  picture.")


@pytest.mark.slow
def test_server_answers_as_our_chat(tmp_path):
    write_parts(tmp_path)
    write_records(tmp_path, captions=4, count=4)
    options = ["--max_steps", "20", "--set", "vision.fusion=none", "--set", "vision.experts=[]"]
    assert train(flags(tmp_path, "finetune_lora", tmp_path / "model", *options)) == 0
    export_model(tmp_path / "model", tmp_path / "out")
    file = tmp_path / "wide.png"
    picture(7, (52, 31)).save(file)

    port = free_port()
    command = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", "--device", "cpu"]
    with open(tmp_path / "serve.log", "w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment(HF_HUB_OFFLINE="1", PYTHONPATH=""), cwd=tmp_path, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        for question in QUESTIONS:
            served = ask(port, tmp_path / "out", file, question)
            assert served.strip() == chat(tmp_path / "model", file, question)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def ask(port, model, file, question):
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": str(model), "messages": [{"role": "user", "content": content}], "max_tokens": 24, "stream": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(150):
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.loads(response.read())["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read()[:2000]) from error
        except urllib.error.URLError:  # not listening yet
            time.sleep(1)
    raise AssertionError("the server did not come up")


def chat(model, file, question):
    done = subprocess.run(
        [sys.executable, "-m", "tove_llava", "chat", "--model", str(model), "--image", str(file),
         "--question", question, "--max-new-tokens", "24", "--json", "--device", "cpu"],
        env=environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)["answer"]
