"""Families of language models: packed samples stay apart, or the family is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, build, causal_lm
from tiny import tiny_hd, tiny_tokenizer
from transformers import GenerationConfig

from llava_hd.hd.errors import UsageError
from llava_hd.model.assemble import assemble
from llava_hd.model.generate import generate
from llava_hd.model.language import LanguageModel
from llava_hd.model.packing import Sample, pack

OTHER_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "d_model": 32, "n_layers": 2, "n_heads": 4}


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[kind for kind, _ in FAMILIES])
@torch.no_grad()
def test_a_family_computes_each_sample_of_a_pack_as_it_does_alone(
    kind: str, options: dict, attention: str
) -> None:
    language = causal_lm(kind, attention, **options)
    rows = [list(range(5, 14)), list(range(20, 25)), list(range(30, 43))]
    expected = torch.cat([language(input_ids=torch.tensor([row])).logits[0] for row in rows])
    model = build(language)
    logits = model.logits(pack([Sample(row, row) for row in rows], model.config))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("mistral", {"sliding_window": 4}, "sliding window of 4; choose attention=sdpa"),
        ("granite", {"logits_scaling": 3.0}, "logits are scaled"),
        ("cohere", {}, "logits are scaled"),
        ("gemma2", {}, "logits are scaled"),
        ("phi", {}, "its head has a bias"),
        ("falcon", {}, "attention cannot be replaced"),
        ("bloom", {}, "attention cannot be replaced"),
        ("gpt2", OTHER_NAMES, "positions are not rotary"),
    ],
)
def test_a_family_that_would_be_computed_wrongly_is_refused(
    kind: str, options: dict, words: str
) -> None:
    # Falcon cannot even be built with an attention that it does not know itself.
    language = causal_lm(kind, "eager" if kind == "falcon" else "auto", **options)
    with pytest.raises(UsageError, match=f"type '{kind}' cannot be used: .*{words}"):
        LanguageModel(language)


def test_an_unsupported_language_folder_is_refused_before_its_weights_are_read(
    parts: Path, tmp_path: Path
) -> None:
    causal_lm("falcon", "eager").config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="type 'falcon' cannot be used"):
        assemble(vision=parts / "vision", language=tmp_path, hd=tiny_hd("hd448"))


@torch.no_grad()
def test_a_sliding_window_is_kept_under_sdpa() -> None:
    language = causal_lm("mistral", "sdpa", sliding_window=4)
    rows = [list(range(5, 25)), list(range(30, 43))]
    expected = torch.cat([language(input_ids=torch.tensor([row])).logits[0] for row in rows])
    model = build(language)
    logits = model.logits(pack([Sample(row, row) for row in rows], model.config))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_greedy_is_greedy_whatever_the_models_generation_config_says() -> None:
    question = Sample(list(range(5, 20)), [-100] * 15)
    plain = build(causal_lm("llama"))
    biased = causal_lm("llama")
    biased.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=9.0
    )
    answers = [generate(m, [question], 12, tiny_tokenizer()) for m in (plain, build(biased))]
    assert answers[0] == answers[1]


def test_every_end_token_of_the_language_model_ends_an_answer() -> None:
    question = Sample(list(range(5, 20)), [-100] * 15)
    free = generate(build(causal_lm("llama", eos_token_id=2)), [question], 6, tiny_tokenizer())[0]
    assert len(free) == 6
    other = build(causal_lm("llama", eos_token_id=[2, free[2]]))
    cut = generate(other, [question], 6, tiny_tokenizer())[0]
    assert cut == free[: free.index(free[2])]
