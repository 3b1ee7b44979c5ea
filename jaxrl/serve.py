"""Serve a Hugging Face checkpoint over OpenAI's API.

python -m jaxrl.serve --config=configs/serve.py --config.model=Qwen/Qwen3-0.6B
python -m jaxrl.serve --config=configs/serve.py --config.model=FOLDER --config.server.port=8001

/v1/completions, /v1/chat/completions, /v1/models, /health, /metrics (Prometheus), and POST
/update_weights_from_disk, which goes on with the weights in another folder. Listens on this host
alone unless config.server.host says otherwise, and then only with a key (JAXRL_API_KEY). Needs
`pip install "jaxrl[serve]"`. SIGTERM and Ctrl-C end it. Exit code: 0 ended, 1 the engine
failed, 2 bad input.
"""

import contextlib
import importlib.util
import socket
import sys
from collections.abc import Sequence

from jaxrl import cli
from jaxrl._platform import take_whole_gpus
from jaxrl.options import ConfigError
from jaxrl.perf.hardware import check_gpus_are_used
from jaxrl.serve_config import ServeConfig


def main(argv: Sequence[str]) -> int:
    """Serve as the command line says; returns the exit code."""
    config = cli.parse(ServeConfig, argv, __doc__ or "")
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f'{package} is not installed: pip install "jaxrl[serve]"')
    take_whole_gpus()
    check_gpus_are_used()
    from jaxrl.serving.app import make_server
    from jaxrl.serving.start import started

    with listening(config.server.host, config.server.port) as sock, started(config) as served:
        host, port = sock.getsockname()[:2]
        print(f"{served.name} at http://{host}:{port}/v1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # raised again when all is shut down
            make_server(served).run(sockets=[sock])
    if served.service.failure is None:
        return 0
    print(f"error: {served.service.failure}", file=sys.stderr)
    return 1


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises ConfigError where it cannot be."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error


if __name__ == "__main__":
    cli.run(main)
