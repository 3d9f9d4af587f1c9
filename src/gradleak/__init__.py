"""gradleak: how much private training data can be rebuilt from the updates that federated-learning clients share?"""

import os
from importlib.metadata import PackageNotFoundError, version

# OpenMP threads that wait busily make rounds 3 to 10 times slower on a machine with other work (docs/performance.md), and
# threads that sleep at once wake up late: libgomp waits for some microseconds, other runtimes sleep. Read when torch is
# first imported, so it must come before
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}

from gradleak.attacks import attack
from gradleak.client import Average, ClientOperator, FedAvg, FedSGD, build_client, operator, simulate
from gradleak.data import load as load_data
from gradleak.errors import GradleakError
from gradleak.evaluate import Evaluation, evaluate
from gradleak.invert import Reconstruction, invert
from gradleak.labels import Labels, recover
from gradleak.leak import Leak, measure_leak
from gradleak.matrix import audit_matrix
from gradleak.models import build as build_model
from gradleak.models import normalised
from gradleak.observation import Observation, Truth, Update
from gradleak.run import audit
from gradleak.spec import ClientSpec, DataSpec, DefenceSpec, ModelSpec, RunSpec, ThreatSpec, load
from gradleak.updates import from_gradient, from_weights, observe

try:
    __version__ = version("gradleak")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0"

__all__ = [
    "Average",
    "ClientOperator",
    "ClientSpec",
    "DataSpec",
    "DefenceSpec",
    "Evaluation",
    "FedAvg",
    "FedSGD",
    "GradleakError",
    "Labels",
    "Leak",
    "ModelSpec",
    "Observation",
    "Reconstruction",
    "RunSpec",
    "ThreatSpec",
    "Truth",
    "Update",
    "attack",
    "audit",
    "audit_matrix",
    "build_client",
    "build_model",
    "evaluate",
    "from_gradient",
    "from_weights",
    "invert",
    "load",
    "load_data",
    "measure_leak",
    "normalised",
    "observe",
    "operator",
    "recover",
    "simulate",
]
