"""Configuration of `epd up`: what of its parts' flags a whole cluster on one host takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from epd.access_options import AccessOptions
from epd.config import ROUTERS, TOOL_CALL_PARSERS, ModelConfig
from epd.demo import CHECKPOINT_DIR
from epd.errors import ConfigError
from epd.gateway_options import GatewayOptions
from epd.model_options import MOST_SEQUENCES, DeviceOptions, EngineOptions, MediaOptions
from epd.number_flags import LAST_PORT, MOST_PROCESSES, MOST_THREADS
from epd.options import option


@dataclass(frozen=True, kw_only=True)
class UpConfig(GatewayOptions, AccessOptions, MediaOptions, EngineOptions, DeviceOptions, ModelConfig):
    """A supervised cluster on this host."""

    model: Path = option(
        CHECKPOINT_DIR,
        "checkpoint folder in Hugging Face format; default: the demo model that comes along",
        metavar="DIR",
    )
    served_model_name: str | None = option(
        None, "name of the model in the API; default: --model as given, epd-demo for the demo model"
    )
    encoders: int = option(1, "encoder workers; 0 serves text only", minimum=0, maximum=MOST_PROCESSES)
    pds: int = option(1, "prefill-decode workers", minimum=1, maximum=MOST_PROCESSES)
    tp: int = option(
        1, "processes that share the model of each prefill-decode worker", minimum=1, maximum=MOST_PROCESSES
    )
    proxies: int = option(
        1, "HTTP fronts; the second listens on --port + 1, and so on", minimum=1, maximum=MOST_PROCESSES
    )
    host: str = option("127.0.0.1", "address to serve HTTP on")
    port: int = option(5580, "port to serve HTTP on", minimum=1, maximum=LAST_PORT)
    threads: int | None = option(
        None,
        "CPU threads of each worker's model; default: the cores shared among workers of one role",
        minimum=1,
        maximum=MOST_THREADS,
    )
    max_num_seqs: int | None = option(
        None,
        "requests that each prefill-decode worker runs at once; default: its own",
        minimum=1,
        maximum=MOST_SEQUENCES,
    )
    kv_cache_memory_bytes: int | None = option(
        None, "memory of each prefill-decode worker for its KV cache, in bytes", minimum=1
    )
    profile_dir: Path | None = option(
        None,
        "folder where workers write traces, as POST /start_profile asks for; default: none are made",
        metavar="DIR",
    )
    request_timeout: float = option(120.0, "seconds a request may take in all", minimum=0.001)
    failover_wait: float | None = option(
        None,
        "seconds that a request which lost its worker waits for another one to appear; default: the proxies' own, 10",
        minimum=0,
    )
    tool_call_parser: str | None = option(
        None, "what the model writes to call a tool; default: proxies' own, auto", choices=TOOL_CALL_PARSERS
    )
    encoder_router: str | None = option(
        None, "how proxies choose an encoder; default: theirs, affinity", choices=ROUTERS
    )
    pd_router: str | None = option(
        None, "how proxies choose a prefill-decode worker; default: theirs, least_loaded", choices=ROUTERS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_access()
        self.check_gateway()
        self.check_media()
        if self.port + self.proxies - 1 > LAST_PORT:
            raise ConfigError(f"--port {self.port}: want 1 to {LAST_PORT}, the ports of all --proxies included")
