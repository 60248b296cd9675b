"""The true cost of leaving out an assignment, and the oracle that knows it. For learning and measuring only."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..moe.decision import Decision, Routing
from ..moe.families import Layer, MoeLayer
from ..selector.selector import LynxSelector, ThresholdPolicy

Answer = Callable[[int, Tensor], Tensor]
# Tokens of an expert that are run at a time.
ROWS_AT_A_TIME = 4096


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
        squares = squared_errors(layer, [ready.selector.surrogates.output], routing)
        costs = squares[0] * ready.selector.sensitivity
        return ready.selector.answer(routing, ready.rewrite(routing, scale, costs=costs))

    def own_bytes(self, layer: Layer, skipped: Tensor, batches: int) -> float:
        """Of surrogates alone: it has no scorer."""
        return self.ready[layer.index].selector.surrogates.bytes_read(skipped, batches)


@torch.no_grad()
def squared_errors(layer: MoeLayer, answers: Sequence[Answer], routing: Routing) -> Tensor:
    """The true cost of each assignment in squares: weight² × ‖E_e(x) − f_e(x)‖² for each kind of answer f, and then, for none
    at all, weight² × ‖E_e(x)‖².

    `(answers + 1, G, T, top_k)` in float32, 0 for tokens that are not active. Experts run one after the other. The routing may be on
    another device than the layer: inputs are brought there expert by expert.

    Args:
        answers: outputs `(tokens, hidden)` in float32 from the number of an expert and its inputs `(tokens, hidden)`.
    """
    hidden = routing.hidden.flatten(0, 1)
    indices, weights = routing.indices.flatten(0, 1), routing.weights.flatten(0, 1).float()
    found = weights.new_zeros(len(answers) + 1, *weights.shape)
    live = routing.active.flatten().unsqueeze(-1)
    for expert in range(layer.num_experts):
        token, slot = ((indices == expert) & live).nonzero(as_tuple=True)
        for some, where in zip(token.split(ROWS_AT_A_TIME), slot.split(ROWS_AT_A_TIME), strict=True):
            if not len(some):
                continue
            x = hidden[some].to(layer.device, layer.dtype)
            output = layer.expert_output(expert, x).float()
            errors = [*(output - answer(expert, x) for answer in answers), output]
            squares = torch.stack([error.square().sum(-1) for error in errors]).to(weights.device)
            found[:, some, where] = weights[some, where].square() * squares
    return found.view(-1, *routing.weights.shape)
