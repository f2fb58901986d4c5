"""Tasks by the names that pipelines of `transformers` have for them, and the class of each architecture."""

from __future__ import annotations

_ROBERTA = {
    "feature-extraction": "RobertaModel",
    "fill-mask": "RobertaForMaskedLM",
    "text-classification": "RobertaForSequenceClassification",
    "token-classification": "RobertaForTokenClassification",
    "question-answering": "RobertaForQuestionAnswering",
    "multiple-choice": "RobertaForMultipleChoice",
}

TASKS: dict[str, dict[str, str]] = {
    "bert": {
        "feature-extraction": "BertModel",
        "pretraining": "BertForPreTraining",
        "fill-mask": "BertForMaskedLM",
        "next-sentence": "BertForNextSentencePrediction",
        "text-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
        "multiple-choice": "BertForMultipleChoice",
    },
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "albert": {
        "feature-extraction": "AlbertModel",
        "pretraining": "AlbertForPreTraining",
        "fill-mask": "AlbertForMaskedLM",
        "text-classification": "AlbertForSequenceClassification",
        "token-classification": "AlbertForTokenClassification",
        "question-answering": "AlbertForQuestionAnswering",
        "multiple-choice": "AlbertForMultipleChoice",
    },
    "xlnet": {
        "feature-extraction": "XLNetModel",
        "text-generation": "XLNetLMHeadModel",
        "text-classification": "XLNetForSequenceClassification",
        "token-classification": "XLNetForTokenClassification",
        "question-answering": "XLNetForQuestionAnswering",
        "question-answering-simple": "XLNetForQuestionAnsweringSimple",
        "multiple-choice": "XLNetForMultipleChoice",
    },
}
#: Every task's name.
TASK_NAMES = tuple(dict.fromkeys(task for tasks in TASKS.values() for task in tasks))


def class_name(model_type: str, task: str) -> str:
    """The class of `pyxlbert.models` for a task; `transformers` has it under the architecture's own name.

    Args:
        model_type: as ``config.json`` has it.
        task: one of `TASK_NAMES`.

    Raises:
        ValueError: the architecture is unknown or has no such task; the message lists what there is.
    """
    if model_type not in TASKS:
        raise ValueError(f"model_type: got {model_type!r}, wanted one of {', '.join(TASKS)}")
    if task not in TASKS[model_type]:
        raise ValueError(f"task: got {task!r}, wanted for {model_type} one of {', '.join(TASKS[model_type])}")
    return TASKS[model_type][task]
