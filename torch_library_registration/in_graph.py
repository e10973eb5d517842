"""Lets Dynamo put the autograd Functions into its graphs, as they are.

Only where it traces a transform of torch.func: otherwise its graphs hold the ops themselves. Not
imported before that, since ``torch.compiler.allow_in_graph`` imports Dynamo.
"""

import torch

from .autograd import APPLY

for _apply in APPLY:
    torch.compiler.allow_in_graph(_apply)
