"""One round of two sites in NVFlare's simulator; each audits its update before it leaves.

pip install "gradleak[nvflare]"
cd examples/nvflare
python job.py --workspace workspace --records records
"""

from __future__ import annotations

import argparse

import site_data
from nvflare.app_opt.pt.job_config.fed_avg import FedAvgJob
from nvflare.job_config.defs import FilterType
from nvflare.job_config.script_runner import ScriptRunner

from gradleak.integrations.nvflare import LeakFilter

SITES = ["site-1", "site-2"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", required=True, help="NVFlare's folder")
    parser.add_argument("--records", required=True, help="where each site keeps observations and leaks")
    parser.add_argument("--threshold", type=float, default=0.6, help="the largest leak score that is let pass")
    parser.add_argument("--rounds", type=int, default=100, help="of the attack")
    parser.add_argument("--only-warn", nargs="*", default=[], metavar="SITE", help="sites that do not block")
    arguments = parser.parse_args()

    job = FedAvgJob(name="leak", n_clients=len(SITES), num_rounds=1, initial_model=site_data.Net())
    job.set_app_packages(["gradleak"])  # it is installed: its source need not travel with the job
    for site in SITES:
        job.to(ScriptRunner(script="client.py"), site)
        leak = LeakFilter(
            model="site_data:Net",
            truth="site_data:batch",
            image_shape=[3, 16, 16],
            client={"protocol": "fedavg", "learning_rate": site_data.RATE},
            attack={"name": "cinet", "rounds": arguments.rounds},
            threshold=arguments.threshold,
            block=site not in arguments.only_warn,
            record=arguments.records,
        )
        job.to(leak, site, tasks=["train"], filter_type=FilterType.TASK_RESULT)
    job.simulator_run(arguments.workspace, threads=len(SITES))
