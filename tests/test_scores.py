"""Log-probabilities of answers: against logits of one sample at a time, and the greedy answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import random_image, tiny_hd

from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import pack
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import SampleError, Turn
from llava_hd.model.scores import score_answers


@pytest.fixture(scope="module")
def pair(parts: Path) -> tuple[LlavaHD, Processor]:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    return model.eval(), processor


def by_logits(model: LlavaHD, processor: Processor, images, question, said) -> tuple[float, int]:
    """The same from the logits of every place, added up by hand."""
    tags = "<image>\n" * len(images)
    turns = [Turn("human", tags + question), Turn("gpt", said)]
    sample = processor.conversation(turns, images)
    with torch.inference_mode():
        logits = model.logits(pack([sample], model.config)).double().log_softmax(-1)
    places = [i for i, label in enumerate(sample.labels) if label != -100]
    return sum(float(logits[i - 1, sample.ids[i]]) for i in places), len(places)


def test_scores_of_a_mixed_batch_are_those_of_each_row_alone(pair) -> None:
    model, processor = pair
    one, two = random_image((100, 90), 1), random_image((33, 200), 2)
    images = [[one], [], [one, two], [one]]
    questions = ["what colour?", "the dog is", "are they red?", "what colour?"]
    answers = ["red", "on the mat", "Yes", "green"]
    scores = score_answers(model, processor, images, questions, answers)
    rows = zip(images, questions, answers, scores, strict=True)
    for row, question, given, score in rows:
        total, count = by_logits(model, processor, row, question, given)
        assert score.num_tokens == count
        assert score.log_probability == pytest.approx(total, abs=1e-4)
        assert score.mean_loss == pytest.approx(-total / count, abs=1e-4)
    assert score_answers(model, processor, [], [], []) == []


def test_only_the_answer_that_the_model_gives_is_greedy(parts: Path) -> None:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    turns = [Turn("human", "the dog is"), Turn("gpt", "on the mat")]
    batch = pack([processor.conversation(turns, [])], model.config)
    steps = torch.optim.Adam(model.language.parameters(), lr=1e-2)
    for _ in range(30):
        steps.zero_grad()
        model(batch).loss_sum.backward()
        steps.step()
    model.eval()
    asked, answers = ["the dog is"] * 3, ["on the mat", "on the", "red"]
    scores = score_answers(model, processor, [[]] * 3, asked, answers)
    assert [score.greedy for score in scores] == [True, False, False]
    assert answer(model, processor, None, "the dog is") == "on the mat"
    assert max(scores, key=lambda score: score.log_probability) == scores[0]


def test_an_empty_answer_has_no_score(pair) -> None:
    with pytest.raises(SampleError, match="empty answer"):
        score_answers(*pair, [[]], ["a"], [" "])
    with pytest.raises(ValueError, match="1 questions"):
        score_answers(*pair, [], ["a"], ["b"])
