"""Search spaces: what a sweep needs of them, in one place. The parts: definition (file → Space), points (Space → trials),
trial_config (trial → config), knobs."""

from tune_spaces.definition import Space, load_space, names
from tune_spaces.knobs import Choice, Condition, Int, LogUniform, Uniform
from tune_spaces.points import draw, optuna_points, optuna_trial_values
from tune_spaces.trial_config import apply, check

__all__ = [
    "Choice",
    "Condition",
    "Int",
    "LogUniform",
    "Space",
    "Uniform",
    "apply",
    "check",
    "draw",
    "load_space",
    "names",
    "optuna_points",
    "optuna_trial_values",
]
