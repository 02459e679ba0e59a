"""Steps through a graph that torch's compiler made of what lies between the attention calls.

A worker serves by plain calls from the start, and switches when the graph is there. One graph takes any number of
tokens, decoding rows and prompt chunks alike; attention and packed linear layers are calls out of it.

A helper process at the lowest priority traces and compiles the model, once for this model, code and machine, and leaves
the graph in the cache folder. A thread of this process takes it from there, about a second's work, and tries it. Such
files are programs, as the compiler's own in that folder and the kernels are: who may write there may run code here.

Whatever fails on the way is logged, and steps go on by plain calls.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from workers.engine import attention, cache_files, graph_files, int8_linear, packed_linear
from workers.engine.attention import AttentionBackend
from workers.engine.config import EngineConfig
from workers.engine.forward import LocalForward
from workers.engine.kernels import build
from workers.engine.language_model import LanguageModel
from workers.engine.step_inputs import StepInputs

log = logging.getLogger(__name__)

_EXAMPLE_TOKENS = 16
_LARGEST_DIFFERENCE = 0.1
"""Between a compiled and a plain step, relative to the largest hidden state; rounding alone gives a few hundredths."""
_HELPER_TIMEOUT_S = 1800
_HELPER_CACHE_BYTES = 64 << 20
_SWITCH_INTERVAL_S = 0.0005
"""How long the loading thread may keep the engine's thread waiting: 5 ms, the default, are half a step."""

_SOURCES = (
    "compiled_forward.py", "attention.py", "packed_linear.py", "bf16_kernel.py", "int8_linear.py", "int8_kernel.py",
    "shared_product.py", "language_model.py", "adapter.py",
)  # fmt: skip
"""What of ours is part of the graph."""
_FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Hidden = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Graph = Callable[[LanguageModel, torch.Tensor, torch.Tensor], torch.Tensor]


class CompiledForward(LocalForward):
    """Runs steps plainly until `start`ed preparations have ended well, then by the graph."""

    def __init__(self, model: LanguageModel, backend: AttentionBackend, config: EngineConfig) -> None:
        """Run `model` on the cache of `backend`, whose rows beyond those of a step must not matter."""
        super().__init__(model, backend)
        self._config = config
        self._compiled: Hidden | None = None
        self.compiled_steps = 0
        """Steps that ran by the graph."""
        self.ended = threading.Event()
        """Set when the preparations have ended, well or not."""

    @property
    def is_compiled(self) -> bool:
        """Whether steps run by the graph."""
        return self._compiled is not None

    def start(self) -> None:
        """Prepare the graph on a thread of its own."""
        threading.Thread(target=self._prepare_in_background, name="compile", daemon=True).start()

    def prepare(self, graph: Graph | None = None) -> None:
        """Switch to a graph once it was tried; default: one that is made here and now."""
        compiled = _for_all_sizes(compile_hidden(self._model) if graph is None else graph, self._model)
        _check(compiled, self._model)
        self._compiled = compiled

    def hidden(self, inputs: StepInputs) -> torch.Tensor:
        """See `Forward`."""
        compiled = self._compiled
        if compiled is None or any(image.deepstack is not None for image in inputs.images):
            return super().hidden(inputs)
        self._backend.prepare(inputs.chunks)
        try:
            with attention.use_backend(self._backend):
                hidden = compiled(self._model.embed(inputs), inputs.positions)
        except (RuntimeError, AssertionError) as error:  # the graph looks at the sizes of what it gets
            # The step is run again, plainly, and so are all that follow.
            self._compiled = None
            log.warning("steps are not compiled any more: %s", _first_line(error))
            return super().hidden(inputs)
        self.compiled_steps += 1
        return hidden

    def _prepare_in_background(self) -> None:
        started = time.monotonic()
        interval = sys.getswitchinterval()
        try:
            file = _graph_file(self._config)
            if not cache_files.was_made(file):
                _make(self._config, file)
            loading = time.monotonic()
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
            self._prepare_from(file)
            log.info(
                "steps are compiled now, %.0f s after the start (%.1f s of it in this process)",
                time.monotonic() - started, time.monotonic() - loading,
            )  # fmt: skip
        except Exception as error:
            # The edge of the thread. Compilers fail in many ways, and none of them may cost a request.
            log.warning("steps are not compiled: %s", _first_line(error))
            log.debug("why steps are not compiled", exc_info=True)
        finally:
            sys.setswitchinterval(interval)
            self.ended.set()

    def _prepare_from(self, file: Path) -> None:
        try:
            self.prepare(load_hidden(file))
        except Exception:  # of any kind, see `load_hidden`
            file.unlink(missing_ok=True)  # so that the next start makes another one
            raise


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or repr(error)


def use_cache_folder() -> None:
    """Keep the compiler's files where kernels are kept, and compile in this process alone. Before the first use."""
    from torch._inductor import config, runtime  # noqa: PLC0415  # takes seconds, and few need it

    folders: Any = runtime.cache_dir_utils
    if os.environ.get(_FOLDER_VARIABLE) in (None, folders.default_cache_dir()):  # the compiler sets it itself
        os.environ[_FOLDER_VARIABLE] = str(cache_files.folder() / "inductor")
    settings: Any = config
    settings.compile_threads = 1


def _hidden(model: LanguageModel, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What is compiled. The weights are reached through `model`, so that the graph holds for others of its kind."""
    return model.hidden(embeds, positions)


def compile_hidden(model: LanguageModel, compiler: str | Callable[..., Any] = "inductor") -> Graph:
    """`_hidden` as one graph for two tokens or more."""
    from torch._dynamo import config  # noqa: PLC0415  # takes seconds, and few need it

    use_cache_folder()
    _register_operators()
    packed_linear.register_lowerings()
    int8_linear.register_lowerings()
    # Conditions that the compiler found are not looked at again: the graph is tried before it is used.
    options: Any = {"guard_filter_fn": lambda conditions: [False for _ in conditions]}
    settings: Any = config
    compiled: Any = torch.compile(_hidden, fullgraph=True, backend=compiler, options=options)
    # Inputs of inference mode, as those of steps are: a graph for others is another one.
    with attention.use_backend(_Echo()), torch.inference_mode(), settings.patch(enable_aot_compile=True):
        embeds, positions = _example(model, _EXAMPLE_TOKENS)
        torch._dynamo.mark_dynamic(embeds, 0)
        torch._dynamo.mark_dynamic(positions, 1)
        graph: Graph = compiled.aot_compile(((model, embeds, positions), {}))
    return graph


def save_hidden(graph: Graph, file: Path) -> None:
    """Leave what `compile_hidden` made to others; all of the file is there or nothing."""
    made: Any = graph
    made.save_compiled_function(str(file))


def load_hidden(file: Path) -> Graph:
    """The graph that `save_hidden` left.

    Raises:
        Exception: of any kind: it is broken, or of another version of the compiler.
    """
    use_cache_folder()
    _register_operators()
    with file.open("rb") as opened:
        graph: Any = torch.compiler.load_compiled_function(opened)
    graph.disable_guard_check()
    return graph  # type: ignore[no-any-return]


def _register_operators() -> None:
    attention.register_compiled()
    packed_linear.register_compiled()
    int8_linear.register_compiled()


def _for_all_sizes(graph: Graph, model: LanguageModel) -> Hidden:
    """The graph for one token too."""

    def hidden(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if embeds.shape[0] > 1:
            return graph(model, embeds, positions.contiguous())
        # The compiler takes 1 for a number that never varies, so a lone token gets company, which nobody looks at.
        return graph(model, embeds.expand(2, -1).contiguous(), positions.expand(-1, 2).contiguous())[:1]

    return hidden


@torch.inference_mode()
def _check(compiled: Hidden, model: LanguageModel) -> None:
    """Raise ArithmeticError when a compiled step is not what a plain one is."""
    with attention.use_backend(_Echo()):
        for tokens in (1, _EXAMPLE_TOKENS + 1):
            example = _example(model, tokens)
            expected, actual = model.hidden(*example), compiled(*example)
            difference = ((expected - actual).abs().max() / expected.abs().max()).item()
            if not difference < _LARGEST_DIFFERENCE:
                raise ArithmeticError(f"compiled steps differ from plain ones by {difference:.0%}")


def _example(model: LanguageModel, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = model.embedding_weight
    embeds = weight[torch.arange(tokens) % len(weight)].clone()
    return embeds, torch.arange(tokens).repeat(model.adapter.num_axes, 1)


class _Echo(AttentionBackend):
    """Attention to nothing but oneself, for trying a model without a cache."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def forward(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        return values.repeat_interleave(queries.shape[1] // values.shape[1], dim=1).clone()

    def _prepare(self, chunks: Any) -> None:
        raise NotImplementedError

    def _attend(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError


def _graph_file(config: EngineConfig) -> Path:
    """Where the graph of this model, code and machine is kept."""
    here = Path(__file__).parent
    parts = [
        (Path(config.model) / "config.json").read_bytes(),
        f"{config.dtype} {config.quantization}".encode(),
        f"{torch.__version__} {transformers.__version__} {torch.get_num_threads()}".encode(),
        build.processor(),
        *((here / name).read_bytes() for name in _SOURCES),
    ]
    return cache_files.folder() / f"graph-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:16]}.bin"


def _make(config: EngineConfig, file: Path) -> None:
    """Leave the graph in `file`, or wait until another process has. Raises RuntimeError or TimeoutError."""
    with graph_files.only_maker(file, timeout_s=_HELPER_TIMEOUT_S):
        if not cache_files.was_made(file):
            _run_helper(config, file)
            cache_files.remove_old(file.parent)


def _run_helper(config: EngineConfig, file: Path) -> None:
    """Compile in a process that stands back for every other. Raises RuntimeError when it fails."""
    # The graph does not depend on the context, for which so small a cache may have no room.
    small: dict[str, Any] = {"kv_cache_memory_bytes": _HELPER_CACHE_BYTES, "max_model_len": 1}
    settings = asdict(replace(config, load_format="dummy", compile="off", **small))
    words = [sys.executable, "-m", "workers.engine.compile_helper", str(torch.get_num_threads()), str(file)]
    use_cache_folder()
    done = subprocess.run(  # noqa: S603  # ourselves
        words,
        input=json.dumps(settings),
        text=True,
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=_HELPER_TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
