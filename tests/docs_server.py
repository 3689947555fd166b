"""Run Python programs in forks of a process with loaded libraries.

So a page's commands take a second each.

``python docs_server.py SOCKET [HIDDEN...]`` imports the libraries, prints ``ready``, and serves until its standard
input ends. Packages that are HIDDEN cannot be imported; of the libraries only transformers is, then. A client
(:data:`CLIENT`) sends its arguments, folder, environment and file descriptors, and exits as the program does.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from importlib import import_module

LIBRARIES = (
    "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "peft",
    "torch.utils.tensorboard",
    "tove_llava.train.run",
    "tove_llava.inference.engine",
    "tove_llava.analysis.plots",
)

# An executable: what follows its name is what `python` would be given, after ``prefix``.
CLIENT = """#!{python} -SE
import json, os, socket, sys
request = json.dumps({{"argv": {prefix!r} + sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    code = server.recv(1)
sys.exit(code[0] if code else 1)
"""


def serve(address: str) -> None:
    """Accept clients until standard input ends; handle each in a separate process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # handlers are not waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in readable:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                handle(connection)
            connection.close()


def handle(connection: socket.socket) -> None:
    """Run one program, send its exit code, and exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(1 << 20)
    connection.sendall(bytes([program(json.loads(request), descriptors) % 256]))
    os._exit(0)


def program(request: dict, descriptors: list[int]) -> int:
    """Become the program and return its exit code."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    code = 0
    try:
        start(request["argv"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def start(arguments: list[str]) -> None:
    """Do as ``python ARGUMENTS...`` does for a module (``-m``) or a file."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    hidden = sys.argv[2:]
    sys.modules.update(dict.fromkeys(hidden))  # None: cannot be found, cannot be imported
    for module in LIBRARIES:
        if not hidden or module.startswith("transformers."):
            import_module(module)
    if not hidden:
        import_module("tove_llava").build_model("tiny")  # libraries do some of their work at the first use
    gc.freeze()  # collections in the forks leave the libraries' objects out
    serve(sys.argv[1])
