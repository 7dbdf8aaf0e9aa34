"""A multiple-choice task of eight questions, in words that the tests' tokenizer knows."""

import json

import yaml

QUESTIONS = {
    "the model": ["prune a small weight", "keep"],
    "search the best row": ["first", "last", "the sum of norm"],
    "find a token": ["in the text", "window", "slow study"],
    "the score mean": ["value", "rank value of a layer"],
    "remove large": ["input", "output error", "error"],
    "a fast study": ["find", "keep the row"],
    "last text": ["the window", "sum", "mean"],
    "study a norm": ["large", "small"],
}


def write_task(folder, answers, **more):
    """Write the task ``words`` and its data into a new folder, with more fields, or others."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": question, "choices": choices, "answer": answer}
        for (question, choices), answer in zip(QUESTIONS.items(), answers, strict=True)
    ]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "words.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 3.0},
        **more,
    }
    (folder / "words.yaml").write_text(yaml.safe_dump(task))
