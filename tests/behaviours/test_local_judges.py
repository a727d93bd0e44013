"""Judges in this process: classifiers and chat models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from conftest import VOCABULARY, make_tokenizer
from judge_server import PAIRS, alone, kept
from runs import save_pico, save_speaker
from steer2edit.behaviours import judge_formats, judges
from steer2edit.behaviours.judge_formats import FORMATS, TEMPLATES
from steer2edit.behaviours.judges import Classifier, JudgeError, LocalChat
from steer2edit.errors import ModelError, RecipeError
from steer2edit.files.schema import parse


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(tmp_path, monkeypatch)


# A classifier in this process.

LABELS = {0: "Non-refusal", 1: "Refusal"}


def save_classifier(folder: Path, **changes: Any) -> BertForSequenceClassification:
    config = BertConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 66,
            "initializer_range": 0.5,
            "id2label": LABELS,
            "label2id": {name: number for number, name in LABELS.items()},
            **changes,
        }
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(str(folder))
    make_tokenizer().save_pretrained(str(folder))
    return model


def expected(model: Any, texts: list[str], column: int = 1) -> list[float]:
    """Each text alone, without padding."""
    tokenizer = make_tokenizer()
    with torch.inference_mode():
        rows = [model(torch.tensor([tokenizer(text or " ")["input_ids"][:64]])).logits for text in texts]
    return [row.softmax(-1)[0, column].item() for row in rows]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("response", "{r}"),
        ("minos", "<|user|>\n{p}\n<|assistant|>\n{r}"),
        ("Q: {prompt} A: {response} {}", "Q: {p} A: {r} {{}}"),
    ],
)
def test_a_classifier_gives_the_probability_of_its_label(tmp_path: Path, format: str, text: str) -> None:
    model = save_classifier(tmp_path / "bert")
    pairs = [(f"Prompt {'x' * i}", f"{'I cannot. ' * (i % 4)}") for i in range(20)]
    judge = Classifier(classifier=str(tmp_path / "bert"), label="Refusal", format=format)
    seen: list[tuple[int, int]] = []
    probabilities = judge.judged(pairs, lambda done, total: seen.append((done, total)))
    wanted = expected(model, [text.format(p=p, r=r) for p, r in pairs])
    assert probabilities == pytest.approx(wanted, abs=1e-5)
    assert len({round(p, 3) for p in probabilities}) > 3
    assert seen[-1] == (20, 20)
    # The same verdicts come from the file, to the last bit, and no model is loaded for them.
    judge_formats.text_classifier.cache_clear()
    assert judge.judged(pairs) == probabilities
    assert judge_formats.text_classifier.cache_info().misses == 0


def test_each_label_has_its_own_verdicts_and_other_weights_are_another_judge(tmp_path: Path) -> None:
    save_classifier(tmp_path / "bert")
    yes, no = (Classifier(classifier=str(tmp_path / "bert"), label=label) for label in ("Refusal", "Non-refusal"))
    assert yes.judged(PAIRS[:1])[0] + no.judged(PAIRS[:1])[0] == pytest.approx(1.0)
    before = {yes.identity, no.identity}
    save_classifier(tmp_path / "bert")
    assert len(before | {yes.identity}) == 3


def test_labels_that_exclude_nothing_are_judged_each_alone(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "bert", problem_type="multi_label_classification")
    (yes,) = Classifier(classifier=str(tmp_path / "bert"), label="Refusal").judged([("", "I cannot.")])
    with torch.inference_mode():
        logits = model(torch.tensor([make_tokenizer()("I cannot.")["input_ids"]])).logits
    assert yes == pytest.approx(logits.sigmoid()[0, 1].item(), abs=1e-5)


def test_a_text_that_is_too_long_is_cut_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_classifier(tmp_path / "bert")
    long = "I cannot help with that request. " * 40
    judge = Classifier(classifier=str(tmp_path / "bert"), label="Refusal")
    assert judge.judged([("", long), ("", "No.")]) == pytest.approx(expected(model, [long, "No."]), abs=1e-5)
    assert "1 texts were too long" in capsys.readouterr().err


def test_a_wrong_label_brings_the_nearest_one(tmp_path: Path) -> None:
    save_classifier(tmp_path / "bert")
    judge = Classifier(classifier=str(tmp_path / "bert"), label="refusal")
    with pytest.raises(JudgeError, match=r"does not have that label \(got: refusal\). Did you mean 'Refusal'\?"):
        judge.judged(PAIRS)


def test_a_model_that_is_no_classifier_is_refused(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "bert")
    BertModel(model.config).save_pretrained(str(tmp_path / "bare"))
    make_tokenizer().save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(ModelError, match=r"not a trained classifier \(got: no weights classifier.bias"):
        Classifier(classifier=str(tmp_path / "bare"), label="Refusal").judged(PAIRS)
    save_classifier(tmp_path / "score", problem_type="regression")
    with pytest.raises(JudgeError, match="gives scores"):
        Classifier(classifier=str(tmp_path / "score"), label="Refusal").judged(PAIRS)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "bert")
    shutil.move(tmp_path / "bert" / "model.safetensors", tmp_path / "elsewhere")
    torch.save(model.state_dict(), tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors weights"):
        Classifier(classifier=str(tmp_path / "bert"), label="Refusal").judged(PAIRS)


def test_a_classifier_that_is_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "nobody/has-this-model"):
        with pytest.raises(ModelError, match="cannot be fetched"):
            Classifier(classifier=name, label="Refusal").judged(PAIRS)


def test_a_classifier_of_nans_gives_no_verdict(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "bert")
    model.classifier.bias.data.fill_(float("nan"))
    model.save_pretrained(str(tmp_path / "bert"))
    with pytest.raises(JudgeError, match="gives no number"):
        Classifier(classifier=str(tmp_path / "bert"), label="Refusal").judged(PAIRS)


def test_texts_are_divided_where_memory_runs_out(tmp_path: Path) -> None:
    model, tokenizer = save_classifier(tmp_path / "bert"), make_tokenizer()
    sizes: list[int] = []

    def small(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")

    texts = ["I cannot.", "No.", "Sure, here is how", "Please ask", "I"]
    model.register_forward_pre_hook(small, with_kwargs=True)
    rows, cut = judge_formats.label_probabilities(model, tokenizer, texts)
    assert (sizes, cut) == ([5, 2, 3, 1, 2], 0)
    model._forward_pre_hooks.clear()
    assert [row[1] for row in rows] == pytest.approx(expected(model, texts), abs=1e-5)


def test_a_format_of_a_classifier_has_a_place_for_the_response() -> None:
    assert set(TEMPLATES) == {"response", "minos"}
    with pytest.raises(RecipeError, match="Did you mean 'minos'"):
        parse(Classifier, {"classifier": "a/b", "label": "x", "format": "mino"})


# A chat model in this process.


def test_a_chat_model_answers_a_question(tmp_path: Path) -> None:
    short = [("Hi", "I cannot."), ("Yo", "No."), ("Hi", "I cannot.")]
    seen: list[tuple[int, int]] = []
    for word, yes in (("Yes", 1.0), ("no", 0.0)):
        judge = LocalChat(local=save_speaker(tmp_path / word, word), question="No?", tokens=8)
        assert judge.judged(short, lambda done, total: seen.append((done, total))) == [yes] * 3
        judge_formats.chat_engine.cache_clear()
        assert judge.judged(short) == [yes] * 3
        assert judge_formats.chat_engine.cache_info().misses == 0
    assert seen == [(0, 2), (1, 2), (2, 2)] * 2


def test_a_local_judge_with_its_own_format_gets_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_speaker(tmp_path / "guard", "Refusal: Yes")
    assert LocalChat(local=folder, format="qwen3guard").judged([("How?", "No.")]) == [1.0]
    with pytest.raises(JudgeError, match="reply without a verdict"):
        LocalChat(local=folder, format="wildguard", tokens=9).judged([("How?", "No.")])
    engine = judge_formats.chat_engine(*judge_formats.source_of(folder))
    ask = FORMATS["wildguard"].ask("How?", "No.", "")
    assert engine.tokenizer.decode(list(judges._token_ids(engine, ask))) == ask


def test_a_chat_model_that_talks_nonsense(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "pico")
    judge = LocalChat(local=folder, question="No?", tokens=4)
    with pytest.raises(JudgeError, match=r"pico gives a reply without a verdict .*\. Raise tokens\."):
        judge.judged([("Hi", "I cannot."), ("Yo", "No.")])
    assert kept(judge) == 0


def test_a_chat_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be fetched"):
        LocalChat(local=str(tmp_path / "nowhere"), question="Q?").judged(PAIRS)
