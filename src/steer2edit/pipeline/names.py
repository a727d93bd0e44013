"""The files of a run directory that one stage writes and another reads."""

TRACES, OWN_TRACES = "traces.jsonl", "traces/own.jsonl"
PROBE, SCORES, EDIT = "probe.safetensors", "scores.safetensors", "edit.safetensors"
TRIALS, DISCARDED, STUDY = "search/trials.jsonl", "search/discarded.jsonl", "search/study.json"
# What every trial answered and what that counted for.
TRIED_ANSWERS = "search/answers.jsonl"
CHOICE, RESULTS, ANSWERS = "choice.json", "evaluation/results.json", "evaluation/answers.jsonl"
# What training left; its checkpoints are in folders beside these files.
TRAINING = "training"
TRAINED_TRIALS, TRAINED_DISCARDED = "training/trials.jsonl", "training/discarded.jsonl"
TRAINED_STUDY, TRAINED_CHOICE = "training/study.json", "training/choice.json"
TRAINED_ANSWERS = "training/answers.jsonl"
