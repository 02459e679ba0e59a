"""Configuration of every process: frozen, layered, each field documented by its `help`.

The command line is made from these classes (`epd.flags`): the name of a field is the name of its flag, its default is
the flag's default, and its help, with the unit, is what `--help` prints. Constructors validate; nothing is read from
the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from epd.access_options import AccessOptions, check_keys
from epd.addresses import endpoints, listening_endpoint
from epd.errors import ConfigError
from epd.gateway_options import GatewayOptions
from epd.model_options import MOST_SEQUENCES, MOST_TOKENS, DeviceOptions, EngineOptions, MediaOptions
from epd.number_flags import LAST_PORT, MOST_PROCESSES, MOST_THREADS, fault
from epd.options import option, required, secret_option
from metastore.config import MetastoreConfig

ROUTERS = ("random", "round_robin", "least_loaded", "power_of_two", "affinity")
"""Policies of `--encoder-router` and `--pd-router`; see `proxy.routing.policies`."""
TOOL_CALL_PARSERS = ("auto", "qwen25", "llama3", "mistral", "hermes", "qwen", "llama3_json")
"""Formats of tool calls, for `--tool-call-parser`; see `proxy.tools.families`."""


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """What every process has."""

    log_level: str = option("info", "what to log", choices=("debug", "info", "warning", "error"))
    cluster_keys: Path | None = option(
        None,
        "key file of `epd keys new`, the same in all processes: encrypts what they say, lets nobody else in",
        metavar="FILE",
    )
    metastore_client_config: str | None = secret_option(
        None,
        "where workers register and proxies find them, as JSON: "
        '{"metastore_client": "RedisMetastoreClient", "metastore_address": "redis://host:6379/0"}; default: nowhere',
        metavar="JSON",
    )

    @property
    def metastore(self) -> MetastoreConfig | None:
        """The store that `--metastore-client-config` names; None: there is none."""
        text = self.metastore_client_config
        return None if text is None else MetastoreConfig.from_json(text)

    def __post_init__(self) -> None:
        _ = self.metastore  # what is wrong with it is told now
        for each in fields(self):
            value, minimum = getattr(self, each.name), each.metadata.get("minimum")
            if minimum is None or value is None:
                continue
            wrong = fault(value, minimum, each.metadata.get("maximum"))
            if wrong is not None:
                raise ConfigError(f"--{each.name.replace('_', '-')} {value}: {wrong}")


@contextmanager
def _named(flag: str) -> Iterator[None]:
    """Errors inside begin with the flag."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _check_checkpoint(model: Path) -> None:
    if not (model / "config.json").is_file():
        raise ConfigError(f"--model {model}: no config.json there; give the folder of a checkpoint")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ProcessConfig):
    """A process that is about one checkpoint."""

    model: Path = required("checkpoint folder in Hugging Face format", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_checkpoint(self.model)


@dataclass(frozen=True, kw_only=True)
class ProxyConfig(GatewayOptions, AccessOptions, MediaOptions, ProcessConfig):
    """The HTTP front."""

    model: Path | None = option(
        None, "checkpoint folder in Hugging Face format, of which the tokenizer is needed", metavar="DIR"
    )
    models: tuple[Path, ...] = option(
        (),
        "folders of further checkpoints, or folders of such folders: loaded when workers appear that serve them",
        metavar="DIR",
    )
    host: str = option("0.0.0.0", "address to serve HTTP on")
    port: int = option(5580, "port to serve HTTP on; 0 takes a free one", minimum=0, maximum=LAST_PORT)
    proxy_addr: str | None = option(
        None, "address where workers announce themselves (/tmp/proxy, host:port)", metavar="ADDR"
    )
    encode_addr_list: tuple[str, ...] = option((), "addresses of encoder workers", metavar="ADDR")
    pd_addr_list: tuple[str, ...] = option((), "addresses of prefill-decode workers", metavar="ADDR")
    transfer_protocol: str | None = option(
        None, "what the addresses in these lists must be; default: as each is written", choices=("ipc", "tcp")
    )
    served_model_name: str | None = option(None, "name of the model in the API; default: --model as given")
    max_model_len: int | None = option(
        None, "context in tokens; default: what the prefill-decode workers say", minimum=1, maximum=MOST_TOKENS
    )
    request_timeout: float = option(120.0, "seconds a request may take in all", minimum=0.001)
    queue_timeout: float | None = option(
        None, "seconds from arrival to the first token at most; default: only --request-timeout counts", minimum=0.001
    )
    encode_timeout: float = option(
        30.0, "seconds until a picture that one encoder does not finish goes to another one", minimum=0.001
    )
    failover_wait: float = option(
        10.0, "seconds that a request which lost its worker waits for another one to appear", minimum=0
    )
    drain_timeout: float = option(30.0, "seconds that answers under way may go on after SIGTERM", minimum=0)
    admin_key: str | None = secret_option(
        None,
        "key that POST /abort with abort_all wants, good for everything else too; EPD_ADMIN_KEY stands for it; "
        "default: that is refused",
        metavar="KEY",
    )
    encoder_router: str = option(
        "affinity",
        "how an encoder is chosen for a picture; least_loaded: where it would be done first, power_of_two: the better "
        "of two drawn, affinity: the same picture to the same encoder while load allows",
        choices=ROUTERS,
    )
    pd_router: str = option(
        "least_loaded",
        "how a prefill-decode worker is chosen; affinity: prompts that begin alike, or with the same pictures, to the "
        "same one while load allows",
        choices=ROUTERS,
    )
    tool_call_parser: str = option(
        "auto",
        "what the model writes to call a tool; auto: as its chat template has it; hermes and qwen are qwen25, "
        "llama3_json is llama3",
        choices=TOOL_CALL_PARSERS,
    )
    max_body_bytes: int = option(64 << 20, "largest request body, in bytes", minimum=1)
    max_image_bytes: int = option(20 << 20, "largest picture file, in bytes", minimum=1)
    max_image_pixels: int = option(64_000_000, "largest picture, width × height in pixels", minimum=1)
    max_media_bytes: int = option(1 << 30, "bytes of request bodies and pictures held at once; more get 429", minimum=1)
    max_images_per_request: int = option(32, "most pictures in one request", minimum=1)
    max_stop_strings: int = option(16, "most stop strings of one request", minimum=1)
    media_timeout: float = option(10.0, "seconds that fetching a picture may take", minimum=0.001)
    use_tgi_api: bool = option(
        False, "answer /generate, /generate_stream and POST / as TGI does, whichever parameters a request has"
    )
    lightllm_error_417: bool = option(
        False, "errors of LightLLM's endpoints have its statuses, 417 and 503, in place of 400 and the like"
    )
    max_concurrent_requests: int = option(1024, "requests in work at once; more get 429", minimum=1)
    max_sessions: int = option(
        10_000,
        "conversations kept for each API key, or for all where there is none; the least recently used goes",
        minimum=1,
    )
    session_ttl: float = option(3600.0, "seconds since its last turn that a conversation is kept", minimum=0.001)
    max_session_bytes: int = option(
        256 << 20, "memory for kept conversations, in bytes; in Redis they take its memory instead", minimum=1
    )

    @property
    def model_name(self) -> str:
        """What `--model` is called where workers do not say."""
        return self.served_model_name or str(self.model or "")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_access()
        self.check_media()
        if self.admin_key is not None:  # an empty one would make everybody an operator
            check_keys((self.admin_key,), "--admin-key")
        self.check_gateway()
        if self.proxy_addr is not None:
            with _named("--proxy-addr"):
                listening_endpoint(self.proxy_addr)
        for flag, addresses in (
            ("--encode-addr-list", self.encode_addr_list),
            ("--pd-addr-list", self.pd_addr_list),
        ):
            with _named(flag):
                endpoints(addresses)
        if self.transfer_protocol is not None:
            self._check_protocol(self.transfer_protocol)
        if self.model is not None:
            _check_checkpoint(self.model)
        elif not self.models:
            raise ConfigError("--model or --models is needed: the folder of a checkpoint, or of several")

    def _check_protocol(self, protocol: str) -> None:
        for address in endpoints((*self.encode_addr_list, *self.pd_addr_list)):
            if not address.startswith(f"{protocol}://"):
                raise ConfigError(f"--transfer-protocol {protocol}: the address {address} is of another kind")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(DeviceOptions, ModelConfig):
    """What encoder and prefill-decode workers share."""

    served_model_name: str | None = option(
        None, "what clients call the model; default: what the proxy calls its checkpoint"
    )
    worker_addr: str = required(
        "address to listen on (/tmp/encoder_0, host:port; *:port listens on all interfaces, port 0 is a free one)",
        metavar="ADDR",
    )
    advertise_addr: str | None = option(
        None,
        "where others reach this worker; default: --worker-addr, or this host's address when that is all interfaces",
        metavar="HOST:PORT",
    )
    proxy_addr: tuple[str, ...] = option((), "proxies to announce this worker to", metavar="ADDR")
    threads: int | None = option(
        None, "CPU threads of the model; default: one per core", minimum=1, maximum=MOST_THREADS
    )
    share_cores: Path | None = option(
        None,
        "compute in turns with the workers of this host that are given the same path: for workers that have more "
        "threads than cores between them, on a CPU",
        metavar="PATH",
    )
    drain_timeout: float = option(30.0, "seconds to finish running work after SIGTERM", minimum=0)
    profile_dir: Path | None = option(
        None,
        "folder for traces of what is computed, as POST /start_profile asks for; default: none are made",
        metavar="DIR",
    )
    stall_timeout: float | None = option(
        None,
        "seconds without a finished step or batch, while there is work, after which the worker counts as stuck; "
        "default: learned from what its steps take",
        minimum=0.001,
    )

    @property
    def name(self) -> str:
        """What heads the worker's log lines."""
        return self.worker_addr.rsplit("/", 1)[-1]

    def __post_init__(self) -> None:
        """Check what would else be told only once the model is loaded."""
        super().__post_init__()
        with _named("--worker-addr"):
            listening_endpoint(self.worker_addr, any_port=True)
        with _named("--proxy-addr"):
            endpoints(self.proxy_addr)
        if self.share_cores is not None and not self.share_cores.parent.is_dir():
            raise ConfigError(f"--share-cores {self.share_cores}: there is no folder {self.share_cores.parent}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(WorkerConfig):
    """An encoder: the vision tower and nothing else."""

    embedding_cache_bytes: int = option(512 << 20, "memory for embeddings of pictures seen before, in bytes", minimum=0)
    max_batch_patches: int | None = option(
        None,
        "patches in one batch of the vision tower at most; a larger picture goes alone; default: 16384 on a GPU, 1024 "
        "on a CPU, which is no faster with more",
        minimum=1,
    )
    max_queued_images: int = option(256, "pictures waiting at most; more are refused as overloaded", minimum=1)
    nice: int = option(
        5,
        "how far the threads that compute stand back where cores are shared (Linux), so that answers under way go on; "
        "0: not at all, 19: most",
        minimum=0,
        maximum=19,
    )
    preprocess_threads: int = option(2, "threads that decode and resize pictures", minimum=1, maximum=MOST_THREADS)
    max_image_pixels: int = option(64_000_000, "largest picture, width × height in pixels", minimum=1)


@dataclass(frozen=True, kw_only=True)
class PrefillDecodeConfig(EngineOptions, WorkerConfig):
    """A prefill-decode worker: the language model and nothing else."""

    tp: int = option(
        1,
        "processes that share the model, each with its part of the heads (tensor parallel); on GPUs, one each",
        minimum=1,
        maximum=MOST_PROCESSES,
    )
    max_num_seqs: int = option(64, "requests that run at once", minimum=1, maximum=MOST_SEQUENCES)
    max_num_batched_tokens: int | None = option(
        None,
        "tokens in one step at most; default: 512 on a CPU, 4096 on a GPU",
        minimum=1,
        maximum=MOST_TOKENS,
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the device's memory to use, weights and KV cache together", minimum=0.01, maximum=1
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "memory for the KV cache, in bytes; default: from --gpu-memory-utilization, on a CPU 1 GiB at most",
        minimum=1,
    )
    block_size: int | None = option(
        None, "tokens in one KV block; default: 16 on a CPU, 256 on a GPU", minimum=1, maximum=MOST_TOKENS
    )
    enable_prefix_caching: bool = option(
        True, "keep computed prompts and answers in free KV memory for requests that begin with the same"
    )
    embedding_store_bytes: int = option(256 << 20, "memory for embeddings that arrived, in bytes", minimum=0)
    max_waiting: int = option(1024, "requests waiting at most; more are refused as overloaded", minimum=1)
