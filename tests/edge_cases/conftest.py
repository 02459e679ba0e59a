"""The forty edge cases of the specification's section 12: `test_eNN_…` is about case NN.

What is the proxy's to get right is tried on a proxy in front of fake workers, the rest on the demo model.
"""

from __future__ import annotations

from tests.proxy.conftest import cluster, model, sockets, start_cluster, tokenizer

__all__ = ["cluster", "model", "sockets", "start_cluster", "tokenizer"]
