"""The oracle: a selector's surrogates and thresholds with the true cost of every assignment. For measuring alone."""

import torch
from torch import Tensor

from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from ..selector.layer import LayerSelector
from ..selector.selector import LynxSelector, ThresholdPolicy


class Oracle(ThresholdPolicy):
    """Knows what a scorer predicts: weight² × the squared error of the expert's surrogate, for each assignment.

    It runs every routed expert to find out, so it saves nothing; it is the floor for any scorer of the same surrogates.
    """

    name = "oracle"

    def __init__(self, selector: LynxSelector, threshold: float) -> None:
        super().__init__(selector, {1: threshold}, f"tau={threshold:.3g}")

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        ready = self.ready[layer.index]
        costs = true_costs(layer, ready.selector, routing) * ready.selector.sensitivity
        return ready.selector.decide(routing, ready.threshold(routing.active), costs)


@torch.no_grad()
def true_costs(layer: MoeLayer, own: LayerSelector, routing: Routing) -> Tensor:
    """weight² × ‖E_e(x) − f_e(x)‖² of each assignment `(G, T, top_k)`; 0 for tokens that are not active."""
    hidden = routing.hidden.flatten(0, 1)
    indices, weights = routing.indices.flatten(0, 1), routing.weights.flatten(0, 1).float()
    stand_in, costs = own.surrogates, torch.zeros_like(weights)
    live = routing.active.flatten().unsqueeze(-1)
    for expert in range(layer.num_experts):
        token, slot = ((indices == expert) & live).nonzero(as_tuple=True)
        if len(token):
            x = hidden[token]
            down, up, constant = (part[expert].float() for part in (stand_in.down, stand_in.up, stand_in.constant))
            error = layer.expert_output(expert, x).float() - (x.float() @ down.T @ up + constant)
            costs[token, slot] = weights[token, slot].square() * error.square().sum(-1)
    return costs.view_as(routing.weights)
