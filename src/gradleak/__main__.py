"""``python -m gradleak`` is ``gradleak``."""

from gradleak.cli import main

main()
