"""Router traces out of a vLLM worker: what every MoE layer is given, token by token, until `collect` takes it.

Only there when `collect` has asked for it through the additional config; a server's workers never come here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import TraceError
from ...moe.families import alike
from ...moe.identity import identify
from .layers import EngineLayer, Wrapping


class Recording(Wrapping):
    """Keeps the rows of every step with the request and the position that each is of.

    `rows` is set while the engine runs a planned step; warm-up finds None and is not kept.
    """

    def __init__(self, runner: Any, layers: list[EngineLayer]) -> None:
        super().__init__()
        self.runner, self.layers = runner, layers
        self.scheduled: Any = None
        self.rows: int | None = None
        self.clear()

    @classmethod
    def on(cls, worker: Any, layers: list[EngineLayer]) -> "Recording":
        """Attach to a worker, which then answers `lynx_describe` and `lynx_take`; workers that share a model see the same, so one keeps it."""
        recording = cls(worker.model_runner, layers)
        first = not worker.rank
        worker.lynx_describe = recording.describe if first else lambda: None
        worker.lynx_take = recording.take if first else lambda length: None
        if first:
            recording.replace(worker.model_runner, "execute_model", recording._execute_model)
            recording.replace(worker.model_runner, "_model_forward", recording._model_forward)
            for layer in layers:
                recording.replace(layer.runner.router, "_compute_routing", recording._keeper(layer))
        return recording

    def clear(self) -> None:
        self.requests: dict[str, int] = {}
        self.places: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.kept: list[list[dict[str, Tensor]]] = [[] for _ in self.layers]

    def describe(self) -> dict[str, Any]:
        """What a trace says of the model.

        Raises:
            ModelError: its layers differ in shape.
        """
        first = alike(self.layers)
        return {
            "identity": identify(self.layers),
            "layers": tuple(layer.name for layer in self.layers),
            "num_experts": first.num_experts,
            "top_k": first.top_k,
            "hidden_size": first.hidden_size,
            "dtype": str(first.dtype).removeprefix("torch."),
        }

    def _execute_model(self, own: Callable[..., Any], scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        for request in scheduled.scheduled_new_reqs:
            self.requests.setdefault(request.req_id, len(self.requests))
        self.scheduled = scheduled
        try:
            return own(scheduled, *args, **kwargs)
        finally:
            self.scheduled = None

    def _model_forward(
        self, own: Callable[..., Any], input_ids: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self.scheduled is not None:
            self._plan(input_ids)
        try:
            return own(input_ids, *args, **kwargs)
        finally:
            self.rows = None

    def _plan(self, input_ids: Tensor | None) -> None:
        """Which request and position each row of the step is of; rows behind the planned ones are padding."""
        if input_ids is None:
            raise TraceError("vLLM gives this model embeddings instead of tokens: its traces cannot be collected")
        batch, planned = self.runner.input_batch, self.scheduled.num_scheduled_tokens
        places = []
        for name, start in zip(batch.req_ids, batch.num_computed_tokens_cpu[: batch.num_reqs].tolist(), strict=True):
            positions = torch.arange(start, start + planned[name])
            places.append(torch.stack([torch.full_like(positions, self.requests[name]), positions]))
        self.places.append(torch.cat(places, dim=1))
        self.rows = self.places[-1].shape[1]
        self.tokens.append(input_ids[: self.rows].to("cpu", torch.int64, copy=True))

    def _keeper(self, layer: EngineLayer) -> Callable[..., tuple[Tensor, Tensor]]:
        scale = float(layer.runner.routed_scaling_factor)

        def keep(
            own: Callable[..., tuple[Tensor, Tensor]],
            hidden_states: Tensor,
            router_logits: Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            weights, ids = own(hidden_states, router_logits, *args, **kwargs)
            if self.rows is not None:
                part = slice(self.rows)
                self.kept[layer.index].append(
                    {
                        "hidden": hidden_states[part, : layer.hidden_size].to("cpu", layer.dtype, copy=True),
                        "logits": router_logits[part].to("cpu", torch.float32, copy=True),
                        "indices": ids[part].to("cpu", torch.int16, copy=True),
                        "weights": (weights[part] * scale).to("cpu", torch.float32, copy=True),
                    }
                )
            return weights, ids

        return keep

    def take(self, length: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Everything since the last time: tokens `(requests, length)` in the order that requests came, and per layer
        the tensors of a trace, in the same order. What was run twice, by a request that came back, is there once.

        Raises:
            TraceError: a token was not run, or a layer did not run with it.
        """
        count = len(self.requests)
        request, position = torch.cat(self.places, dim=1) if self.places else torch.empty(2, 0, dtype=torch.int64)
        order = torch.full((count, length), -1)
        inside = position < length
        order[request[inside], position[inside]] = torch.arange(len(position))[inside]
        if missing := int((order < 0).sum()):
            raise TraceError(f"vLLM ran {count * length - missing} of {count * length} tokens")
        for layer, parts in zip(self.layers, self.kept, strict=True):
            if sum(len(part["logits"]) for part in parts) != len(position):
                raise TraceError(f"layer {layer.name} was not run with every token")
        rows = order.flatten()
        tokens = torch.cat(self.tokens)[order]
        layers = [{key: torch.cat([part[key] for part in parts])[rows] for key in parts[0]} for parts in self.kept]
        self.clear()
        return tokens, layers
