"""Steps through a graph that torch's compiler made of what lies between the attention calls.

A worker serves by plain calls from the start, and switches when the graph is ready. One graph takes any number of
tokens, decoding rows and prompt chunks alike; attention and packed linear layers are calls out of it. Preparing takes
two stages, so that running answers notice little of it:

1. a helper process at the lowest priority compiles the same graph, for its files in the cache folder alone. It is
   left out where a mark says that this was done before for this model, code and machine;
2. a thread of this process waits for an idle moment, traces the model and finds everything compiled.

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

from workers.engine import attention, int8_linear, packed_linear
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
_IDLE_S = 2.0
_LONGEST_WAIT_S = 600.0
"""A worker that is never idle is better off compiled after a few slow seconds."""
_SWITCH_INTERVAL_S = 0.0005
"""How long the tracing thread may keep the engine's thread waiting: 5 ms, the default, are half a step."""

_SOURCES = (
    "compiled_forward.py", "attention.py", "packed_linear.py", "bf16_kernel.py", "int8_linear.py", "int8_kernel.py",
    "shared_product.py",
)  # fmt: skip
"""What of ours is part of the graph."""
_FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Hidden = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class CompiledForward(LocalForward):
    """Runs steps plainly until `start`ed preparations have ended well, then by the graph."""

    def __init__(self, model: LanguageModel, backend: AttentionBackend, config: EngineConfig) -> None:
        """Run `model` on the cache of `backend`, whose rows beyond those of a step must not matter."""
        super().__init__(model, backend)
        self._config = config
        self._compiled: Hidden | None = None
        self._last_step = time.monotonic()
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

    def prepare(self) -> None:
        """Make the graph, here and now; compiled files come from the cache folder or go there."""
        compiled = compile_hidden(self._model)
        _check(compiled, self._model)
        self._compiled = compiled

    def hidden(self, inputs: StepInputs) -> torch.Tensor:
        """See `Forward`."""
        self._last_step = time.monotonic()
        compiled = self._compiled
        if compiled is None or any(image.deepstack is not None for image in inputs.images):
            return super().hidden(inputs)
        self._backend.prepare(inputs.chunks)
        try:
            # The graph is the only one and takes any step, so that asking whether it fits would be time lost.
            with attention.use_backend(self._backend), torch.compiler.set_stance(_STANCE, skip_guard_eval_unsafe=True):
                hidden = compiled(self._model.embed(inputs), inputs.positions)
        except RuntimeError as error:
            # The step is run again, plainly, and so are all that follow.
            self._compiled = None
            log.warning("steps are not compiled any more: %s", _first_line(error))
            return super().hidden(inputs)
        self.compiled_steps += 1
        return hidden

    def _wait_for_idle(self) -> None:
        """Return when no step ran for a while: steps beside the tracing take many times as long as usual."""
        give_up = time.monotonic() + _LONGEST_WAIT_S
        while (wait_s := self._last_step + _IDLE_S - time.monotonic()) > 0 and time.monotonic() < give_up:
            time.sleep(wait_s)

    def _prepare_in_background(self) -> None:
        started = time.monotonic()
        interval = sys.getswitchinterval()
        try:
            mark = _mark(self._config)
            if not mark.exists():
                _run_helper(self._config)
                mark.touch()
            self._wait_for_idle()
            traced = time.monotonic()
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
            self.prepare()
            log.info(
                "steps are compiled now, %.0f s after the start (%.1f s of it in this process)",
                time.monotonic() - started, time.monotonic() - traced,
            )  # fmt: skip
        except Exception as error:
            # The edge of the thread. Compilers fail in many ways, and none of them may cost a request.
            log.warning("steps are not compiled: %s", _first_line(error))
            log.debug("why steps are not compiled", exc_info=True)
        finally:
            sys.setswitchinterval(interval)
            self.ended.set()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or repr(error)


_STANCE: Any = "fail_on_recompile"
"""A step that the graph does not fit is an error, not half a minute of compiling."""


def use_cache_folder() -> None:
    """Keep the compiler's files where kernels are kept, and compile in this process alone. Before the first use."""
    from torch._inductor import config, runtime  # noqa: PLC0415  # takes seconds, and few need it

    folders: Any = runtime.cache_dir_utils
    if os.environ.get(_FOLDER_VARIABLE) in (None, folders.default_cache_dir()):  # the compiler sets it itself
        os.environ[_FOLDER_VARIABLE] = str(build.cache_folder() / "inductor")
    settings: Any = config
    settings.compile_threads = 1


def compile_hidden(model: LanguageModel, compiler: str | Callable[..., Any] = "inductor") -> Hidden:
    """`model.hidden` as one graph for two tokens or more; what it returns takes one token too."""
    use_cache_folder()
    attention.register_compiled()
    packed_linear.register_compiled()
    int8_linear.register_compiled()
    graph = torch.compile(lambda embeds, positions: model.hidden(embeds, positions), backend=compiler, fullgraph=True)

    def hidden(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if embeds.shape[0] > 1:
            return graph(embeds, positions.contiguous())
        # The compiler takes 1 for a number that never varies, so a lone token gets company, which nobody looks at.
        return graph(embeds.expand(2, -1).contiguous(), positions.expand(-1, 2).contiguous())[:1]

    # Inputs of inference mode, as those of steps are: for others the compiler would make a second graph.
    with attention.use_backend(_Echo()), torch.inference_mode():
        embeds, positions = _example(model, _EXAMPLE_TOKENS)
        torch._dynamo.mark_dynamic(embeds, 0)
        torch._dynamo.mark_dynamic(positions, 1)
        graph(embeds, positions)
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


def _mark(config: EngineConfig) -> Path:
    """The file whose presence says that the cache folder holds what this model needs."""
    here = Path(__file__).parent
    parts = [
        (Path(config.model) / "config.json").read_bytes(),
        f"{config.dtype} {config.quantization}".encode(),
        f"{torch.__version__} {transformers.__version__} {torch.get_num_threads()}".encode(),
        build.processor(),
        *((here / name).read_bytes() for name in _SOURCES),
    ]
    return build.cache_folder() / f"compiled-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:16]}"


def _run_helper(config: EngineConfig) -> None:
    """Compile in a process that stands back for every other. Raises RuntimeError when it fails."""
    settings = asdict(replace(config, load_format="dummy", compile="off", kv_cache_memory_bytes=64 << 20))
    words = [sys.executable, "-m", "workers.engine.compile_helper", str(torch.get_num_threads())]
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
