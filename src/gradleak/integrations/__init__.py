"""Federated-learning frameworks: each module needs its own extra, and nothing else in gradleak imports it."""
