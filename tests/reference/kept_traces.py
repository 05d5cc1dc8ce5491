"""Traces of models, kept over a test process: hundreds of tests import the same few tiny models, and torch.export takes
more than half of what importing one costs. They share what has the same context too: 64, unless that is the point."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel

from hetcomp.frontend import from_transformers, trace
from hetcomp.frontend.traced_model import TracedModel


class _Traced:
    """A model by what its trace depends on: the module on the meta device has no numbers, and is in float32 whatever
    the checkpoint's type is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = json.loads(model.config.to_json_string(use_diff=False))
        config.pop("dtype", None)
        self.key = (type(model), json.dumps(config, sort_keys=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Traced) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.lru_cache(maxsize=128)
def _traced(model: _Traced, context: int) -> TracedModel:
    return trace.trace(model.model, context)


def keep_traces() -> None:
    """From now on frontend.load traces a config for a context once. hetcomp.frontend.trace itself stays as it is."""

    def once(model: PreTrainedModel, context: int) -> TracedModel:
        return _traced(_Traced(model), context)

    kept: Any = SimpleNamespace(**{**vars(trace), "trace": once})
    from_transformers.trace = kept
