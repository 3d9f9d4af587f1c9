"""A round of a real job in NVFlare's simulator, for ``test_nvflare.py``: ``site-1`` blocks, ``site-2`` only warns.

    python job.py WORKSPACE RECORDS

A process of its own, in its own folder: NVFlare copies what lies there into the job.
"""

from __future__ import annotations

import sys

import site_data
from nvflare.app_opt.pt.job_config.fed_avg import FedAvgJob
from nvflare.job_config.defs import FilterType
from nvflare.job_config.script_runner import ScriptRunner

from gradleak.integrations.nvflare import LeakFilter

SITES = ["site-1", "site-2"]

if __name__ == "__main__":
    workspace, records = sys.argv[1:]
    job = FedAvgJob(name="leak", n_clients=len(SITES), num_rounds=1, initial_model=site_data.Net())
    if hasattr(job, "set_app_packages"):  # since NVFlare 2.7: what is installed need not travel with the job
        job.set_app_packages(["gradleak"])
    for site in SITES:
        job.to(ScriptRunner(script="client.py"), site)
        leak = LeakFilter(
            model="site_data:Net",
            truth="site_data:batch",
            image_shape=[3, 16, 16],
            client={"protocol": "fedavg", "learning_rate": site_data.RATE},
            attack={"name": "cinet", "rounds": 2, "channels": 8},
            threshold=0.0,
            block=site == "site-1",
            record=records,
        )
        job.to(leak, site, tasks=["train"], filter_type=FilterType.TASK_RESULT)
    job.simulator_run(workspace, threads=len(SITES))
