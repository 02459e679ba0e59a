"""Who may import whom, read from the source: the layers of the system."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("epd", "proxy", "workers", "metastore")

FORBIDDEN: dict[str, tuple[str, ...]] = {
    # module or package → what it must not import, by prefix
    "epd": ("torch", "transformers", "fastapi", "redis", "proxy", "workers"),
    "proxy": ("torch", "transformers", "workers", "redis"),
    "proxy.cluster": ("proxy.api", "proxy.app"),
    "proxy.dispatch": ("proxy.api", "proxy.app"),
    "proxy.figures": ("proxy.api", "proxy.app"),
    "proxy.media": ("proxy.api", "proxy.app"),
    "proxy.models": ("proxy.api", "proxy.app"),
    "proxy.routing": ("proxy.api", "proxy.app"),
    "proxy.text": ("proxy.api", "proxy.app"),
    "proxy.tools": ("proxy.api", "proxy.app"),
    "workers": ("proxy", "redis", "fastapi"),
    "workers.engine": ("zmq", "redis", "asyncio", "epd.messages", "epd.transport", "epd.codec"),
    "workers.engine.request": ("torch",),
    "workers.engine.scheduler": ("torch",),
    "workers.engine.kv_cache_manager": ("torch",),
    "workers.engine.block_pool": ("torch",),
    "workers.encode_scheduler": ("torch",),
    "workers.embedding_cache": ("torch",),
    "metastore": ("torch", "transformers", "fastapi", "redis", "proxy", "workers"),
}
EXCEPTIONS: dict[str, tuple[str, ...]] = {
    # These wire the parts together, inside functions.
    "epd.cli": ("proxy", "workers", "torch", "transformers"),
    # The demo model's own tools.
    "epd.demo": ("torch", "transformers"),
    # The engine is measured as a library, next to transformers.
    "epd.bench.engine": ("torch", "transformers", "workers"),
    # The encoder's own code ships the embeddings that are measured.
    "epd.bench.transfer": ("workers",),
    # What the HTTP front is compared with.
    "epd.bench.echo": ("fastapi",),
    # Random weights need the model's class.
    "epd.bench.checkpoint": ("torch", "transformers"),
    "metastore.redis_store": ("redis",),
    "metastore.redis_client": ("redis",),
}


def modules() -> dict[str, Path]:
    """Dotted name → file, for all our source."""
    files = [path for package in OURS for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions too; those for type checkers alone are left out."""
    names: set[str] = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _nodes(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return []
    return [node] + [inner for child in ast.iter_child_nodes(node) for inner in _nodes(child)]


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(module: str, path: Path) -> list[str]:
    forbidden = {name for scope, names in FORBIDDEN.items() if is_within(module, scope) for name in names}
    allowed = {name for scope, names in EXCEPTIONS.items() if is_within(module, scope) for name in names}
    return sorted(
        f"{module} imports {name}"
        for name in imports(path)
        for prefix in forbidden - allowed
        if is_within(name, prefix)
    )


@pytest.mark.parametrize(("module", "path"), modules().items(), ids=list(modules()))
def test_module_respects_the_layers(module: str, path: Path) -> None:
    assert violations(module, path) == []


def test_a_violation_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "bad.py"
    source.write_text("def f():\n    from workers import engine\n    import torch.nn\n", encoding="utf-8")
    assert violations("proxy.bad", source) == [
        "proxy.bad imports torch.nn",
        "proxy.bad imports workers",
        "proxy.bad imports workers.engine",
    ]
