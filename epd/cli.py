"""The `epd` command. The only module that wires the parts together; each command imports what it runs, no more."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from epd import __version__
from epd.bench.commands import add_bench
from epd.config import EncoderConfig, PrefillDecodeConfig, ProxyConfig, WorkerConfig
from epd.credentials import add_credentials, read_credentials
from epd.demo import CHECKPOINT_DIR
from epd.environment import api_key_default, metastore_client_config, router_defaults, unused_variables
from epd.errors import ConfigError
from epd.flag_aliases import translate
from epd.flags import HelpFormatter, add_flags, read_flags
from epd.number_flags import COUNT, NOT_NEGATIVE, POSITIVE, PROCESSES, NumberRange, add_number
from epd.up_config import UpConfig

log = logging.getLogger(__name__)

EXIT_CONFIG_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141
"""As the shell tells of a process that SIGPIPE ended."""

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 a flag or file is wrong, 130 interrupted."""
    try:
        parsed = make_parser().parse_args(translate(sys.argv[1:] if arguments is None else arguments))
        command: Command = parsed.command
        if "metastore_client_config" in parsed and command is not _up:  # whose children read the same variables
            parsed.metastore_client_config = metastore_client_config(parsed.metastore_client_config, os.environ)
        return command(parsed)
    except ConfigError as error:
        print(f"epd: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return EXIT_NO_READER


def _reader_has_gone() -> bool:
    """Whether nobody reads what is printed any more (`epd chat … | head -1`). Nothing is printed from then on."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors are told in any case
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def make_parser() -> argparse.ArgumentParser:
    """All commands with their flags. Tests hold what is written elsewhere, such as in deploy/, against it."""
    parser = argparse.ArgumentParser(
        prog="epd",
        description="A disaggregated encode / prefill / decode cluster for multimodal models.",
        epilog="Try it: `epd up` in one terminal, `epd chat --image picture.png 'What is this?'` in another.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"epd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    up = _add_command(commands, "up", _up, "run a whole cluster on this host, supervised", UpConfig)
    up.set_defaults(api_key=api_key_default(os.environ))
    proxy = _add_command(commands, "proxy", _proxy, "run the HTTP front", ProxyConfig)
    proxy.set_defaults(**router_defaults(os.environ), admin_key=os.environ.get("EPD_ADMIN_KEY", "").strip() or None)
    proxy.set_defaults(api_key=api_key_default(os.environ))
    _add_command(commands, "encoder", _encoder, "run an encoder worker", EncoderConfig)
    _add_command(commands, "pd", _prefill_decode, "run a prefill-decode worker", PrefillDecodeConfig)
    _add_chat(commands)
    _add_ping(commands)
    _add_status(commands)
    _add_demo(commands)
    add_bench(commands)
    _add_keys(commands)
    commands.add_parser("rank").set_defaults(command=_rank)  # without help it is not listed: `epd pd --tp` starts it
    return parser


def _add_command(commands: Any, name: str, command: Command, summary: str, config: type[Any] | None) -> Any:
    parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=HelpFormatter
    )
    parser.set_defaults(command=command)
    if config is not None:
        add_flags(parser, config)
    return parser


def _add_chat(commands: Any) -> None:
    chat = _add_command(commands, "chat", _chat, "ask a running cluster and see where the time went", None)
    chat.add_argument("question", help="what to ask")
    # One file each: with several, a question behind them would be taken for a file.
    chat.add_argument(
        "--image", action="append", type=Path, default=[], metavar="FILE", help="picture to ask about; may be repeated"
    )
    chat.add_argument(
        "--url",
        default="http://127.0.0.1:5580/v1",
        help="URL of the cluster, with or without /v1 (default: %(default)s)",
    )
    chat.add_argument("--model", help="model to ask (default: the first that the cluster lists)")
    add_number(chat, "--max-tokens", COUNT, default=256, help="longest answer, in tokens (default: %(default)s)")
    add_number(chat, "--temperature", NOT_NEGATIVE, default=0.0, help="0 is greedy (default: %(default)s)")
    add_credentials(chat, os.environ)


def _add_ping(commands: Any) -> None:
    summary = "ask one process whether it serves: exit code 0 yes, 1 no; for health checks"
    command = _add_command(commands, "ping", _ping, summary, None)
    command.add_argument("address", help="of a worker (/tmp/encoder_0, host:port) or a proxy (http://host:port)")
    command.add_argument(
        "--ready", action="store_true", help="want one that takes new requests, not only one that lives"
    )
    add_number(command, "--timeout", POSITIVE, default=3.0, metavar="S", help="seconds to wait (default: %(default)s)")
    command.add_argument("--cluster-keys", type=Path, metavar="FILE", help="the worker's, when it has any")
    command.add_argument(
        "--ca-file",
        type=Path,
        metavar="FILE",
        help="PEM of who signed an https proxy's certificate; default: it is not checked, and no key is sent",
    )


def _add_status(commands: Any) -> None:
    status = _add_command(commands, "status", _status, "show each worker, its load, and what is wrong", None)
    status.epilog = "Exit codes: 0 all is well, 1 a role is missing or a worker is not well, 2 nobody answers."
    status.add_argument("--url", help="URL of a proxy (default: http://127.0.0.1:5580)")
    status.add_argument(
        "--metastore-client-config", metavar="JSON", help="look into the metastore instead, as in `epd proxy --help`"
    )
    add_number(
        status,
        "--watch",
        NumberRange(float, 0.1, 86400),
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="look again and again until Ctrl-C (every 2 s when no time is given)",
    )
    add_credentials(status, os.environ)
    status.add_argument("--json", action="store_true", help="print what the proxy answers (GET /cluster) as it is")


def _add_demo(commands: Any) -> None:
    demo = _add_command(
        commands,
        "demo",
        _demo,
        "start a cluster with the shipped model, ask about real pictures, check the answers",
        None,
    )
    add_number(demo, "--encoders", PROCESSES, default=1, help="encoder workers (default: %(default)s)")
    add_number(demo, "--pds", PROCESSES, default=1, help="prefill-decode workers (default: %(default)s)")


def _add_keys(commands: Any) -> None:
    keys = _add_command(commands, "keys", _keys, "make the keys of a cluster", None)
    keys.add_argument("action", choices=("new",), help="new: make a key pair")
    keys.add_argument("file", type=Path, metavar="FILE", help="where to write it; give --cluster-keys FILE everywhere")


# -- commands ------------------------------------------------------------------------------------------------------


def _proxy(arguments: argparse.Namespace) -> int:
    from epd import collector

    collector.start()
    from epd.observability import setup_logging
    from proxy.app import run_proxy

    config = read_flags(ProxyConfig, arguments)
    setup_logging(f"proxy_{config.port}", config.log_level)
    for text in unused_variables(os.environ):
        log.warning("%s", text)
    _use_cluster_keys(config.cluster_keys)
    return run_proxy(config)


def _encoder(arguments: argparse.Namespace) -> int:
    config = read_flags(EncoderConfig, arguments)
    _prepare_worker(config)
    from workers.encoder import run_encoder

    return _run(run_encoder(config))


def _prefill_decode(arguments: argparse.Namespace) -> int:
    config = read_flags(PrefillDecodeConfig, arguments)
    _prepare_worker(config)
    from workers.prefill_decode_process import run_prefill_decode

    code = _run(run_prefill_decode(config))
    if config.tp > 1:
        # A thread may be left in a collective with a rank that died, or a group with one that had to be killed. Both
        # would hold up the interpreter's own end.
        logging.shutdown()
        os._exit(code)
    return code


def _rank(_: argparse.Namespace) -> int:
    from epd import collector

    collector.start()
    from workers.ranks import run_rank

    _quieten_transformers()
    return run_rank(sys.stdin.buffer)


def _prepare_worker(config: WorkerConfig) -> None:
    from epd import collector, cpu_runtime
    from epd.imports import leave_out_torchao
    from epd.observability import setup_logging

    if config.device != "cuda":
        cpu_runtime.ensure()
    collector.start()
    leave_out_torchao(config.model)
    setup_logging(config.name, config.log_level)
    _use_cluster_keys(config.cluster_keys)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave_while_loading)
    try:
        import torch

        _quieten_transformers()
    except ImportError as error:
        raise ConfigError(f"workers need torch and transformers ({error}): pip install 'epd[worker]'") from error
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here")
    threads = config.threads
    if threads is None and isinstance(config, PrefillDecodeConfig) and config.tp > 1:
        threads = max(1, torch.get_num_threads() // config.tp)  # the ranks share the cores
    if threads is not None:
        torch.set_num_threads(threads)


def _use_cluster_keys(file: Path | None) -> None:
    from epd.gate import use_cluster_keys
    from epd.keys import load_keys

    if file is not None:
        use_cluster_keys(load_keys(file))


def _leave_while_loading(number: int, _: Any) -> None:
    """Nobody waits for anything yet, and loading can't be interrupted otherwise. Until the worker is ready.

    It may come anywhere, also where an import is about to add a handler to those of `logging`, which `logging.shutdown`
    can't take: what goes wrong here must not become an error of the import.
    """
    try:
        log.info("%s while loading: nothing to finish", signal.Signals(number).name)
    finally:
        os._exit(0)


def _quieten_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _run(main_coroutine: Any) -> int:
    import uvloop

    return int(uvloop.run(main_coroutine))


def _up(arguments: argparse.Namespace) -> int:
    from epd.launcher import run_cluster
    from epd.observability import setup_logging

    config = read_flags(UpConfig, arguments)
    setup_logging("up", config.log_level)
    _use_cluster_keys(config.cluster_keys)
    return asyncio.run(run_cluster(config))


def _keys(arguments: argparse.Namespace) -> int:
    from epd.keys import new_key_file

    new_key_file(arguments.file)
    print(f"{arguments.file}: a new key pair; start every process of the cluster with --cluster-keys and a copy of it")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from epd.chat import ChatQuestion, ask_and_print

    names = {field.name for field in dataclasses.fields(ChatQuestion)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    question = ChatQuestion(**given, credentials=read_credentials(arguments))
    return ask_and_print(question)


def _ping(arguments: argparse.Namespace) -> int:
    from epd.ping import ping

    _use_cluster_keys(arguments.cluster_keys)
    is_well, told = asyncio.run(
        ping(arguments.address, timeout_s=arguments.timeout, ready=arguments.ready, ca_file=arguments.ca_file)
    )
    print(f"{arguments.address}: {told}", file=sys.stdout if is_well else sys.stderr)
    return 0 if is_well else 1


def _status(arguments: argparse.Namespace) -> int:
    from epd.status import DEFAULT_URL, StatusQuery, show_status
    from metastore.config import MetastoreConfig

    text = arguments.metastore_client_config if arguments.url is None else None
    return show_status(
        StatusQuery(
            url=arguments.url or DEFAULT_URL,
            metastore=None if text is None else MetastoreConfig.from_json(text),
            watch=arguments.watch,
            json=arguments.json,
            credentials=read_credentials(arguments),
        )
    )


def _demo(arguments: argparse.Namespace) -> int:
    from epd.demo.tour import run_tour
    from epd.observability import setup_logging

    setup_logging("demo", "warning")
    config = UpConfig(model=CHECKPOINT_DIR, encoders=arguments.encoders, pds=arguments.pds, log_level="warning")
    return asyncio.run(run_tour(config))
