"""Generated inputs for every parser: targets shared by Hypothesis and atheris."""
