"""The true cost of leaving out an assignment, and the oracle that knows it. For learning and measuring only."""

import torch
from torch import Tensor

from ..moe.decision import Decision, Routing
from ..moe.families import Layer, MoeLayer
from ..selector.selector import LynxSelector, ThresholdPolicy
from ..selector.surrogates import Surrogates


class Oracle(ThresholdPolicy):
    """Knows what a scorer predicts: weight² × the squared error of the expert's surrogate, for each assignment.

    It runs every routed expert to find out, so it saves nothing; it is the floor for any scorer of the same surrogates.
    """

    name = "oracle"

    def __init__(self, selector: LynxSelector, threshold: float) -> None:
        # No compiled decision knows these costs.
        super().__init__(selector, {1: threshold}, f"tau={threshold:.3g}", kernel="torch")

    def decide(self, layer: Layer, routing: Routing, scale: Tensor | None = None) -> Decision:
        assert isinstance(layer, MoeLayer)  # no other one can run its experts for this
        ready = self.ready[layer.index]
        costs = true_costs(layer, ready.selector.surrogates, routing)[0] * ready.selector.sensitivity
        return ready.selector.answer(routing, ready.rewrite(routing, scale, costs=costs))

    def own_bytes(self, layer: Layer, skipped: Tensor, batches: int) -> float:
        """Of surrogates alone: it has no scorer."""
        return self.ready[layer.index].selector.surrogates.bytes_read(skipped, batches)


@torch.no_grad()
def true_costs(layer: MoeLayer, surrogates: Surrogates, routing: Routing) -> tuple[Tensor, Tensor]:
    """weight² × ‖E_e(x) − f_e(x)‖² of each assignment, and the same without surrogates, weight² × ‖E_e(x)‖².

    Both are `(G, T, top_k)` in float32, 0 for tokens that are not active. The routing may be on another device than the
    layer: inputs are brought there expert by expert.
    """
    hidden = routing.hidden.flatten(0, 1)
    indices, weights = routing.indices.flatten(0, 1), routing.weights.flatten(0, 1).float()
    costs, squares = torch.zeros_like(weights), torch.zeros_like(weights)
    live = routing.active.flatten().unsqueeze(-1)
    for expert in range(layer.num_experts):
        token, slot = ((indices == expert) & live).nonzero(as_tuple=True)
        if not len(token):
            continue
        x = hidden[token].to(layer.device, layer.dtype)
        output = layer.expert_output(expert, x).float()
        error = output - surrogates.output(expert, x)
        weight = weights[token, slot].square()
        costs[token, slot] = weight * error.square().sum(-1).to(weight.device)
        squares[token, slot] = weight * output.square().sum(-1).to(weight.device)
    return costs.view_as(routing.weights), squares.view_as(routing.weights)
