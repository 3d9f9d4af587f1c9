"""The public names of the package, with all that they need: `import gradleak` gives them, and loads them when one is used."""

from gradleak.attacks import attack
from gradleak.client import Average, ClientOperator, FedAvg, FedSGD, build_client, operator, simulate
from gradleak.data import load as load_data
from gradleak.errors import GradleakError
from gradleak.evaluate import Evaluation, evaluate
from gradleak.invert import Progress, Reconstruction, invert
from gradleak.labels import Labels, recover
from gradleak.leak import Leak, measure_leak
from gradleak.live import NotebookFigure, TensorBoard
from gradleak.matrix import audit_matrix
from gradleak.models import build as build_model
from gradleak.models import normalised
from gradleak.observation import Observation, Truth, Update
from gradleak.run import audit
from gradleak.spec import ClientSpec, DataSpec, DefenceSpec, ModelSpec, RunSpec, ThreatSpec, load
from gradleak.updates import from_gradient, from_weights, observe

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
    "NotebookFigure",
    "Observation",
    "Progress",
    "Reconstruction",
    "RunSpec",
    "TensorBoard",
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
