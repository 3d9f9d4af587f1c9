"""A site's training, through NVFlare's Client API: one step on all of its images."""

from __future__ import annotations

import nvflare.client as flare
import site_data
import torch
from torch.nn.functional import cross_entropy

flare.init()
while flare.is_running():
    received = flare.receive()
    model, own = site_data.Net(), site_data.batch(flare.get_site_name(), received.current_round)
    model.load_state_dict({name: torch.as_tensor(t) for name, t in received.params.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=site_data.RATE)
    cross_entropy(model(own.images), own.labels).backward()
    optimizer.step()
    flare.send(flare.FLModel(params={name: t.clone() for name, t in model.state_dict().items()}))
