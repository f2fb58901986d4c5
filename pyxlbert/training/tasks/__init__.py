"""Tasks by their names, each a record of what the loop, `evaluate` and `predict` ask of it."""

from __future__ import annotations

from pyxlbert.training.tasks.answers import Answers
from pyxlbert.training.tasks.base import Task
from pyxlbert.training.tasks.choices import MultipleChoice
from pyxlbert.training.tasks.classification import TextClassification
from pyxlbert.training.tasks.tagging import Tagging

TASKS: dict[str, type[Task]] = {task.name: task for task in (TextClassification, Tagging, Answers, MultipleChoice)}

__all__ = ["TASKS", "Answers", "MultipleChoice", "Tagging", "Task", "TextClassification"]
